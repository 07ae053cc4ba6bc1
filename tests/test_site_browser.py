"""The built book in a real browser, without a network: every page, over http and from files."""

import io
import re

import pytest
from conftest import CHAPTERS, PAGES, watch
from PIL import Image, ImageStat

pytestmark = pytest.mark.timeout(120)
PLOTS = "div.js-plotly-plot, div.plotly-graph-div"
PIXELS = "c => c.toDataURL()"
EYE = "p => JSON.stringify(p._fullLayout.scene._scene.getCamera().eye)"
TO_THE_MIDDLE = "s => { s.value = (+s.min + +s.max) / 2; s.dispatchEvent(new Event('input', {bubbles: true})); }"
TOO_WIDE = """() => [...document.querySelectorAll('main *')].filter(e => {
    const box = e.getBoundingClientRect();
    if (box.width === 0 || box.right <= 394) return false;
    for (let p = e; p; p = p.parentElement)
        if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(p).overflowX)) return false;
    return true;
}).map(e => e.outerHTML.slice(0, 160))"""


def check(page):
    "What must hold on every page, however it was opened."
    assert page.wrong == []
    assert page.locator("h1").first.inner_text().strip()
    assert "#|" not in page.locator("main").inner_text(), "an nbdev directive is shown"
    blank = "imgs => imgs.filter(i => !(i.alt || '').trim()).map(i => i.outerHTML.slice(0, 200))"
    assert page.eval_on_selector_all("img", blank) == [], "images without a description"
    broken = "imgs => imgs.filter(i => i.loading !== 'lazy' && i.complete && !i.naturalWidth).map(i => i.src)"
    assert page.eval_on_selector_all("img", broken) == []
    printed = page.locator("main .output.stderr").all_inner_texts()
    assert [text for text in printed if "Warning" in text] == [], "a cell prints a warning"
    formulas, typeset = page.locator("main .math").count(), page.locator("main mjx-container").count()
    assert (typeset > 0) == (formulas > 0) and page.locator("mjx-merror").count() == 0
    assert page.locator(PLOTS).count() == page.locator(f":is({PLOTS}):has(.main-svg)").count(), "a plotly figure was not drawn"


@pytest.mark.parametrize("name", PAGES)
def test_page_from_a_file(open_page, name):
    check(open_page(name, "file"))


@pytest.fixture(scope="module", params=PAGES)
def visited(request, make_page):
    "A page over http, opened once; the tests of one page follow one another and leave it usable for the next."
    page = make_page(request.param)
    page.name = request.param
    yield page
    page.context.close()


class TestPageOverHttp:
    def test_healthy(self, visited):
        check(visited)

    def test_badge_and_measurements(self, visited):
        page, name = visited, visited.name
        if name not in CHAPTERS:
            return
        badge = page.locator("a:has(> img[alt='Open in Colab'])").first.get_attribute("href")
        launch = page.locator(".dropdown-launch-buttons a[href*='colab.research.google.com']").first.get_attribute("href")
        for address in (badge, launch):
            assert address.startswith("https://colab.research.google.com/github/")
            assert address.endswith(f"/fmri_book/blob/main/nbs/{name}.ipynb")
        stats = page.locator(".run-stats").first.inner_text()
        assert "This page ran in" in stats and "MB of memory" in stats and "cores of" in stats
        assert "google.colab" not in page.locator("main").inner_text(), "the cell for Colab is shown"

    def test_players_react(self, visited):
        page = visited
        for canvas in page.locator(".fb-canvas").all():
            box = canvas.locator("xpath=ancestor::*[.//input[contains(@class, 'fb-slider')]][1]")
            slider, clock = box.locator(".fb-slider").first, box.locator(".fb-time").first
            canvas.scroll_into_view_if_needed()
            page.wait_for_function("c => c.closest('[data-ready=\"1\"]')", arg=canvas.element_handle())
            before, time_before = canvas.evaluate(PIXELS), clock.inner_text()
            slider.evaluate(TO_THE_MIDDLE)
            page.wait_for_timeout(100)
            middle, time_middle = canvas.evaluate(PIXELS), clock.inner_text()
            assert middle != before and time_middle != time_before
            box.locator(".fb-play").first.click()
            page.wait_for_function("([c, old]) => c.toDataURL() !== old", arg=[canvas.element_handle(), middle], timeout=5000)
            box.locator(".fb-play").first.click()
        assert page.wrong == []

    def test_surfaces_turn(self, visited):
        page = visited
        for plot in page.locator(PLOTS).all():
            if not plot.evaluate("p => Boolean(p._fullLayout && p._fullLayout.scene)"):
                continue
            plot.scroll_into_view_if_needed()
            box = plot.locator("canvas").first.bounding_box()
            before = plot.evaluate(EYE)
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 60, y + 25, steps=4)
            page.mouse.up()
            page.wait_for_timeout(200)
            assert plot.evaluate(EYE) != before
            picture = Image.open(io.BytesIO(plot.screenshot())).convert("L")
            assert ImageStat.Stat(picture).stddev[0] > 3, "nothing is drawn"
        assert page.wrong == []

    def test_figures_keep_a_light_ground_in_the_dark(self, visited):
        page = visited
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        grounds = page.eval_on_selector_all("main .cell_output img", "imgs => imgs.map(i => getComputedStyle(i).backgroundColor)")
        assert set(grounds) <= {"rgb(255, 255, 255)"}
        page.emulate_media(color_scheme="light")
        assert page.wrong == []

    def test_fits_a_phone(self, visited):
        page = visited
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= 392
        assert page.evaluate(TOO_WIDE) == [], "wider than the page, and no scroll bar of its own"
        assert page.wrong == []


@pytest.mark.parametrize("over", ["http", "file"])
def test_search_finds_a_word(open_page, over):
    page = open_page("search.html?q=fingerprint", over)
    page.wait_for_selector("#search-results li a")
    assert any("A1_building" in a.get_attribute("href") for a in page.locator("#search-results li a").all())
    assert page.wrong == []


@pytest.mark.parametrize("what", ['class="math', "fb-canvas", "Plotly.newPlot", "<img"])
def test_the_checks_have_something_to_check(built_site, what):
    assert any(what in (built_site / f"{name}.html").read_text() for name in CHAPTERS)


def test_the_watch_sees_what_goes_wrong(browser, tmp_path):
    faults = {
        "asks the network": "<img src='https://example.org/x.png'>",
        "console": "<script>console.error('broken')</script>",
        "script error": "<script>undefined.x</script>",
        "failed request": "<script src='missing.js'></script>",
    }
    for expected, html in faults.items():
        (tmp_path / "page.html").write_text(f"<h1>x</h1>{html}")
        page = browser.new_page()
        wrong = watch(page, tmp_path.as_uri() + "/")
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_load_state("networkidle")
        assert any(line.startswith(expected) for line in wrong), (expected, wrong)
        page.close()


def test_previous_and_next_lead_through_the_book(built_site):
    seen = [PAGES[0]]
    while following := re.search(r'class="right-next"\s+href="(\w+)\.html"', (built_site / f"{seen[-1]}.html").read_text()):
        seen.append(following[1])
    assert seen == PAGES


def brightness(page, element=None) -> float:
    shot = (element or page).screenshot()
    return ImageStat.Stat(Image.open(io.BytesIO(shot)).convert("L")).mean[0]


@pytest.mark.parametrize("scheme,low,high", [("light", 200, 256), ("dark", 0, 80)])
def test_light_and_dark(open_page, scheme, low, high):
    page = open_page("A1_building", color_scheme=scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert low <= brightness(page) < high
    assert page.locator(f"img.only-{scheme}").first.is_visible()
    assert page.wrong == []
