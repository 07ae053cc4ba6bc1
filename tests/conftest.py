"""Shared fixtures: the repository, the built site, a server for it, and a browser without a network."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
import yaml

from fmri_book import building

ROOT = Path(__file__).resolve().parent.parent
PAGES = building.toc_pages(yaml.safe_load((ROOT / "_toc.yml").read_text()))
CHAPTERS = [page for page in PAGES if building.CHAPTER.match(page)]
BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def built_site() -> Path:
    "The whole book's HTML: FMRI_BOOK_SITE if set, else _build/html, brought up to date (seconds if `make book` has run)."
    if "FMRI_BOOK_SITE" in os.environ:
        return Path(os.environ["FMRI_BOOK_SITE"])
    book = building.Book(ROOT, ROOT / "_build")
    building.build(book)
    return book.html


@pytest.fixture(scope="session")
def site_url(built_site):
    "The built site over http, on a free port."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(built_site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def chromium() -> str:
    "Path of a Chromium; without one the browser tests are skipped, except in CI, where they must run."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found:
        return found
    message = f"no Chromium found (looked for {', '.join(names)}; or set CHROMIUM to its path)"
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI needs a browser: {message}")
    pytest.skip(message)


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=BROWSER_ARGUMENTS)
        yield launched
        launched.close()


def watch(page, allowed: str) -> list[str]:
    "Collects what goes wrong on a page: errors in its console, failed requests, and any request that leaves the machine."
    wrong = []

    def request(route):
        url = route.request.url
        if url.startswith((allowed, "data:", "blob:")):
            route.continue_()
        else:
            wrong.append(f"asks the network for {url}")
            route.abort()

    page.route("**/*", request)
    page.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(f"script error: {e}"))
    page.on("requestfailed", lambda r: wrong.append(f"failed request: {r.url}"))
    page.on("response", lambda r: wrong.append(f"status {r.status}: {r.url}") if r.status >= 400 else None)
    return wrong


@pytest.fixture(scope="session")
def make_page(browser, built_site, site_url):
    "make_page('01_data', over='http', **context options) -> a page with `.wrong`, a list that a healthy page leaves empty."

    def make(name: str, over: str = "http", **options):
        base = site_url if over == "http" else built_site.as_uri()
        page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}).new_page()
        page.wrong = watch(page, base + "/")
        page.goto(f"{base}/{name}.html" if "." not in name else f"{base}/{name}")
        page.wait_for_load_state("networkidle")
        return page

    return make


@pytest.fixture
def open_page(make_page):
    "Like make_page, but the page is closed after the test."
    pages = []

    def opener(*args, **options):
        pages.append(make_page(*args, **options))
        return pages[-1]

    yield opener
    for page in pages:
        page.context.close()
