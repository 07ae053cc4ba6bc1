"""The builder on books of a few lines."""

import json
import os
import sys
import textwrap

import pytest
import yaml
from conftest import ROOT

from fmri_book import building
from fmri_book.building import Book, BuildError

pytestmark = pytest.mark.timeout(120)


def notebook(path, *cells):
    "A notebook from (tags, source) pairs; a source that begins with # is markdown."
    out = []
    for number, (tags, source) in enumerate(cells):
        kind = "markdown" if source.startswith("#") and not source.startswith("#|") else "code"
        extra = {"outputs": [], "execution_count": None} if kind == "code" else {}
        meta = {"tags": tags.split()} if tags else {}
        out.append({"cell_type": kind, "id": f"cell-{number}", "metadata": meta, "source": textwrap.dedent(source)} | extra)
    kernel = {"kernelspec": {"name": "no-such-kernel", "language": "python", "display_name": "?"}}
    path.write_text(json.dumps({"cells": out, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def book(tmp_path):
    "Two chapters, a landing page, references."
    nbs = tmp_path / "nbs"
    nbs.mkdir()
    notebook(nbs / "index.ipynb", ("", "# Home\n\n[one](01_one.ipynb) and [two](02_two.ipynb)"))
    notebook(
        nbs / "01_one.ipynb",
        ("", "# One\n\n[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/fmri_book/blob/main/nbs/01_one.ipynb)"),
        ("run-stats", "# run time"),
        ("colab", "import sys\nif 'google.colab' in sys.modules: raise SystemExit"),
        ("", "#| default_exp one"),
        ("parameters", 'PRESET = "paper"  # the size'),
        ("", '#| export\ndef one() -> int:  # always 1\n    "The first number."\n    return 1'),
        ("", "import os, sys\nfrom pathlib import Path\nprint('ran with', PRESET, sys.executable)"),
        ("", "assets = Path(os.environ['FMRI_BOOK_ASSETS'])\n(assets / 'deep').mkdir()\n_ = (assets / 'deep/hello.txt').write_text('hello')"),
        ("", "assert os.environ['FMRI_BOOK_BUILD'] == '1' and Path.cwd().name == 'nbs'"),
        ("", "# Mathematics\n\n$e = mc^2$ and a link to [two](02_two.ipynb)"),
    )
    notebook(nbs / "02_two.ipynb", ("", "# Two"), ("parameters", 'PRESET = "ci"'), ("", "value = 2\nvalue"))
    (nbs / "references.md").write_text("# References\n")
    (nbs / "references.bib").write_text("")
    (tmp_path / "fmri_book").mkdir()
    (tmp_path / "fmri_book" / "one.py").write_text('def one() -> int:  # always 1\n    "The first number."\n    return 1\n')
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nuser = ada\n")
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
    toc = {
        "format": "jb-book",
        "root": "index",
        "parts": [
            {"caption": "Data", "chapters": [{"file": "01_one"}, {"file": "02_two"}]},
            {"caption": "Appendix", "chapters": [{"file": "references"}, {"file": "api"}]},
        ],
    }
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    for name in ("_config.yml", "_ext", "_static"):
        (tmp_path / name).symlink_to(ROOT / name)
    return Book(tmp_path, tmp_path / "_build")


def arguments(book, *more):
    return ["--root", str(book.root), "--build", str(book.build), *more]


def test_a_book_from_nothing_to_a_site_and_again_in_a_moment(book, capfd):
    assert building.main(arguments(book)) == 0
    html = (book.html / "01_one.html").read_text()
    assert f"ran with ci {sys.executable}" in html, "the preset or the interpreter is not ours"
    assert "PRESET" in html and "paper" not in html
    assert "#|" not in html and "google.colab" not in html and "injected" not in html
    assert "/ada/fmri_book/blob/main/nbs/01_one.ipynb" in html and "OWNER" not in html
    assert "This page ran in" in html and "MB of memory" in html
    assert (book.html / "_assets/01_one/deep/hello.txt").read_text() == "hello"
    assert (book.html / "index.html").exists() and (book.html / "search.html").exists()
    assert "always 1" in (book.html / "api.html").read_text()
    assert (book.html / "_static/mathjax/tex-mml-chtml.js").exists()
    assert building.outside(book.html) == []

    stamp = (book.html / "index.html").stat().st_mtime_ns
    capfd.readouterr()
    assert building.main(arguments(book)) == 0
    assert capfd.readouterr().err.count("cached") == 2
    assert (book.html / "index.html").stat().st_mtime_ns == stamp, "the site was built again"

    assert building.main(arguments(book, "--chapters", "02")) == 0
    assert (book.html / "02_two.html").exists() and not (book.html / "01_one.html").exists()
    assert 'href="01_one.html"' not in (book.html / "index.html").read_text()


def test_a_failed_cell_is_named_and_the_others_run(book, capfd):
    notebook(book.nbs / "01_one.ipynb", ("", "# One"), ("parameters", 'PRESET = "ci"'), ("", "x = 1"), ("", "y = [x]\ny[5]"))
    for _ in range(2):  # also the second time: a failure is never remembered as a success
        assert building.main(arguments(book)) == 1
        err = capfd.readouterr().err
        assert "01_one.ipynb, cell 4 of 4" in err and "| y[5]" in err
        assert "IndexError: list index out of range" in err and "1 of 2 chapters failed" in err
        assert not book.html.exists()
    assert list(book.cache.glob("01_one/*")) == [] and len(list(book.cache.glob("02_two/*"))) == 1
    assert [p.name for p in book.cache.glob(".*")] == [], "temporary folders were left behind"
    assert (book.build / "failed/01_one.ipynb").exists()


def test_a_kernel_that_dies_is_reported(book):
    notebook(book.nbs / "01_one.ipynb", ("parameters", 'PRESET = "ci"'), ("", "import os\nos._exit(3)"))
    with pytest.raises(BuildError, match=r"(?s)01_one.ipynb, cell 2 of 2:.*os._exit.*[Dd]ied"):
        building.build(book, "01", execute_only=True)


def test_time_and_memory_are_measured(book):
    cells = ("parameters", 'PRESET = "ci"'), ("", "import time\nheld = bytearray(300_000_000)\ntime.sleep(1)")
    notebook(book.nbs / "01_one.ipynb", *cells)
    notebook(book.nbs / "02_two.ipynb", ("parameters", 'PRESET = "ci"'), ("", "1"))
    large, small = building.build(book, execute_only=True, jobs=1)  # side by side they would share libraries
    assert large.seconds > 1 and 240e6 < large.peak_bytes - small.peak_bytes < 340e6
    assert f"{large.peak_bytes / 1e6:,.0f} MB" in building.run_stats(large) and "2 min 05 s" in building.run_stats(
        building.replace(large, seconds=125.2)
    )


def test_what_makes_a_chapter_run_again(book):
    first = building.fingerprint(book, "01_one")
    path = book.nbs / "01_one.ipynb"
    content = json.loads(path.read_text())

    def changed() -> bool:
        path.write_text(json.dumps(content))
        return building.fingerprint(book, "01_one") != first

    content["cells"][5]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "old"}]
    content["cells"][5]["execution_count"] = 7
    assert not changed(), "outputs do not matter"
    content["cells"][5]["source"] += " "
    assert changed(), "sources do"
    content["cells"][5]["source"] = content["cells"][5]["source"][:-1]
    content["cells"][4]["metadata"]["tags"] = []
    assert changed(), "tags do"
    content["cells"][4]["metadata"]["tags"] = ["parameters"]
    assert not changed()
    assert building.fingerprint(Book(book.root, book.build, "gpu"), "01_one") != first
    for name in ("fmri_book/one.py", "constraints.txt"):
        text = (book.root / name).read_text()
        (book.root / name).write_text(text + "\n")
        assert changed(), name
        (book.root / name).write_text(text)
    (book.root / "fmri_book" / "new.py").write_text("")
    assert changed(), "a new module"


def test_the_cache_forgets_old_executions(book, monkeypatch):
    def execute(book, page, folder, on_cell):
        folder.mkdir()
        return building.Execution(page, 1.0, 1, "a machine", book.preset)

    monkeypatch.setattr(building, "execute", execute)
    for number in range(building.KEEP + 3):
        (book.root / "constraints.txt").write_text(f"numpy=={number}")
        assert building.run_chapter(book, "01_one").fresh
    assert len(list(book.cache.glob("01_one/*"))) == building.KEEP
    assert not building.run_chapter(book, "01_one").fresh


def test_a_warning_of_sphinx_fails_the_build_and_keeps_the_last_site(book, capfd):
    notebook(book.nbs / "01_one.ipynb", ("", "# One\n\n[nowhere](99_missing.ipynb)"))
    notebook(book.nbs / "02_two.ipynb", ("", "# Two"))
    book.html.mkdir(parents=True)
    (book.html / "index.html").write_text("the last good site")
    assert building.main(arguments(book)) == 1
    assert "99_missing" in capfd.readouterr().err
    assert (book.html / "index.html").read_text() == "the last good site"
    assert [p.name for p in book.build.glob(".site*")] == []


def test_bad_requests_say_what_was_expected(book, capfd):
    assert building.main(arguments(book, "--chapters", "07")) == 1
    assert "no chapter begins with '07'; found index, 01_one, 02_two" in capfd.readouterr().err
    with pytest.raises(ValueError, match="preset: expected one of ci, gpu, paper; found 'huge'"):
        Book(book.root, book.build, "huge")
    with pytest.raises(SystemExit):
        building.main(arguments(book, "--preset", "huge"))
    (book.nbs / "02_two.ipynb").unlink()
    assert building.main(arguments(book, "--execute-only")) == 1
    assert "02_two" in capfd.readouterr().err


def test_selecting_chapters():
    toc = {"root": "index", "parts": [
        {"caption": "a", "chapters": [{"file": "01_data"}, {"file": "01a_cohort"}]},
        {"caption": "b", "chapters": [{"file": "A1_building"}, {"file": "api"}]},
    ]}  # fmt: skip

    def pages(wanted):
        return building.toc_pages(building.select_pages(toc, wanted))

    assert pages("") == ["index", "01_data", "01a_cohort", "A1_building", "api"]
    assert pages("01") == ["index", "01_data", "01a_cohort", "api"]
    assert pages("01_") == ["index", "01_data", "api"]
    assert pages("01a a1") == ["index", "01a_cohort", "A1_building", "api"]


def test_links_to_absent_pages_become_words():
    text = "[a](01_a.ipynb), [b](02_b.ipynb#part), ![c](01_a.ipynb), [d](https://x/01_a.ipynb)"
    assert building.finish_text(text, "ada", frozenset({"01_a"})) == text.replace("[a](01_a.ipynb)", "a")


def test_owner_is_kept_in_one_place(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nrepo = fmri_book\nuser = OWNER\nbranch = main\n")
    (tmp_path / "README.md").write_text("https://github.com/OWNER/fmri_book and github.com/other/thing")
    (tmp_path / "nbs/a.ipynb").write_text("colab.research.google.com/github/OWNER/fmri_book/blob")
    assert len(building.set_owner(tmp_path, "ada-l")) == 3
    assert building.owner(tmp_path) == "ada-l"
    assert (tmp_path / "README.md").read_text() == "https://github.com/ada-l/fmri_book and github.com/other/thing"
    with pytest.raises(ValueError, match="expected a GitHub name; found 'a b'"):
        building.set_owner(tmp_path, "a b")


def test_the_offline_check_finds_what_a_browser_would_fetch(tmp_path):
    fine = """<a href="https://doi.org/x">doi</a> <link rel="canonical" href="https://x.org/"> <img src="a.png">
              <pre>&lt;script src="https://cdn"&gt; url(https://cdn/x.png)</pre> <script>const a = "https://plain.text";</script>"""
    (tmp_path / "fine.html").write_text(fine)
    assert building.outside(tmp_path) == []
    bad = {
        "script": '<script async src="https://cdn/x.js">', "style": '<link href="//cdn/x.css" rel="stylesheet">',
        "image": '<img alt="a" src="http://cdn/x.png">', "frame": "<iframe src='https://cdn/x.html'>",
        "font": "<style>@font-face {src: url('https://cdn/x.woff2')}</style>", "import": "<style>@import \"https://cdn/x.css\";</style>",
        "module": '<script type="module">import x from "https://cdn/x.js"</script>', "fetch": "<script>fetch('https://cdn/x')</script>",
    }  # fmt: skip
    for name, text in bad.items():
        (tmp_path / f"{name}.html").write_text(text)
    assert sorted(line.split(".html")[0] for line in building.outside(tmp_path)) == sorted(bad)


def test_the_built_book_fetches_nothing_from_outside(built_site):
    assert building.outside(built_site) == []
    for script in built_site.rglob("_static/**/*.js"):
        assert "cdn.jsdelivr.net/npm/mathjax" not in script.read_text(errors="replace") or "mathjax" in str(script)


def test_signatures_on_the_page_of_functions():
    source = textwrap.dedent('''
        from dataclasses import dataclass

        @dataclass
        class Thing:
            "A thing."
            size: int       # in mm
            name: str = ""  # of no consequence

            @property
            def half(self) -> float: return self.size / 2

            def grow(self,
                by: int,    # mm
            ) -> None:
                self.size += by

            def _hidden(self): pass

        def _private(): pass

        @patch(as_prop=True)
        def twice(self: Thing) -> float: return self.size * 2
    ''')
    page = building.module_page(source, "fmri_book.things", "01_one")
    for wanted in ("class Thing:", "size: int       # in mm", "A thing.", "### `Thing`", "#### `Thing.half`", "### `Thing.twice`", "by: int,    # mm", "[](./01_one.ipynb)"):
        assert wanted in page
    for unwanted in ("_hidden", "_private", "self.size"):
        assert unwanted not in page


def test_files_appear_whole(tmp_path):
    building._write(tmp_path / "new" / "a.txt", "whole")
    assert (tmp_path / "new/a.txt").read_text() == "whole" and os.listdir(tmp_path / "new") == ["a.txt"]


def test_a_kernel_that_never_starts_is_started_again(book, tmp_path, monkeypatch):
    "Two kernels may choose the same port; the one that loses has run nothing, and gets another chance."
    script = tmp_path / "stumble.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"mark = {str(tmp_path / 'stumbled')!r}\n"
        "if not os.path.exists(mark): open(mark, 'w').close(); sys.exit(1)\n"
        "runpy.run_module('ipykernel_launcher', run_name='__main__')\n"
    )

    def stumbling_kernel(build):
        folder = build / "jupyter" / "kernels" / building.KERNEL
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(script), "-f", "{connection_file}"]
        (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "x", "language": "python"}))
        return build / "jupyter"

    monkeypatch.setattr(building, "write_kernel", stumbling_kernel)
    result = building.execute(book, "02_two", tmp_path / "run")
    assert (tmp_path / "stumbled").exists() and result.error == ""
