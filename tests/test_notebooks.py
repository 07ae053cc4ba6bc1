"""The notebooks: their anatomy, and that the package is what they export."""

import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHAPTERS, PAGES, ROOT

from fmri_book import building


def cells(name: str) -> list[dict]:
    return json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]


def tagged(name: str, tag: str) -> list[dict]:
    return [cell for cell in cells(name) if tag in cell["metadata"].get("tags", [])]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def test_every_notebook_is_in_the_book():
    assert {path.stem for path in (ROOT / "nbs").glob("*.ipynb")} <= set(PAGES)


@pytest.mark.parametrize("name", CHAPTERS)
def test_anatomy(name):
    badge = text(cells(name)[0])
    assert badge.startswith("# ") and f"blob/main/nbs/{name}.ipynb)" in badge and building.COLAB in badge
    assert len(tagged(name, "run-stats")) == 1
    (install,) = tagged(name, "colab")
    assert 'if "google.colab" in sys.modules' in text(install) and "pip install" in text(install)
    (parameters,) = tagged(name, "parameters")
    assert re.search(r'^PRESET = "ci"', text(parameters), re.MULTILINE)
    source = "\n".join(map(text, cells(name)))
    assert re.search(r"^## Takeaways$", source, re.MULTILINE) and re.search(r"^## Exercises$", source, re.MULTILINE)
    assert len(re.findall(r":::+\{admonition\} Solution", source)) >= 3


@pytest.mark.parametrize("name", CHAPTERS)
def test_cells_are_short_and_carry_no_outputs(name):
    for number, cell in enumerate(cells(name), 1):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"cell {number} has outputs: nbdev_clean"
            assert text(cell).count("\n") < 40, f"cell {number} is too long to follow"


def test_links_name_the_owner_of_settings_ini():
    owner = building.owner(ROOT)
    texts = [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.cff"), ROOT / "_config.yml"]
    found = {path.name: set(re.findall(r"github(?:\.com)?/([\w-]+)/fmri_book", path.read_text())) - {owner} for path in texts}
    assert {name: owners for name, owners in found.items() if owners} == {}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The sources that nbdev reads, in a folder of their own."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "fmri_book"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def nbdev(command: str, folder: Path) -> None:
    done = subprocess.run([Path(sys.executable).parent / command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_is_what_the_notebooks_export(copy):
    nbdev("nbdev_export", copy)
    ours = sorted(p.relative_to(ROOT) for p in (ROOT / "fmri_book").rglob("*.py"))
    theirs = sorted(p.relative_to(copy) for p in (copy / "fmri_book").rglob("*.py"))
    assert ours == theirs
    different = [str(p) for p in ours if not filecmp.cmp(ROOT / p, copy / p, shallow=False)]
    assert different == [], "edit the notebook, then nbdev_export"
    assert (copy / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text(), "nbdev rewrote pyproject.toml"


def test_cleaning_keeps_the_tags(copy):
    nbdev("nbdev_clean", copy)
    for name in CHAPTERS:
        after = json.loads((copy / "nbs" / f"{name}.ipynb").read_text())["cells"]
        assert [c["metadata"].get("tags", []) for c in after] == [c["metadata"].get("tags", []) for c in cells(name)]
        assert [text(c) for c in after] == [text(c) for c in cells(name)]
