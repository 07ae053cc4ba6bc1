"""The package as others install it."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

import fmri_book

MODULES = sorted(p.stem for p in (ROOT / "fmri_book").glob("*.py") if not p.stem.startswith("_"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "fmri_book", source / "fmri_book", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.timeout(180)
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"fmri_book/{m}.py" for m in MODULES} <= set(names)
    assert {name.split("/")[0] for name in names} == {"fmri_book", f"fmri_book-{fmri_book.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.timeout(180)
def test_wheel_installs_and_imports_away_from_the_repository(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(pip, check=True)
    # the finder of the editable install is switched off, so only the wheel can answer
    script = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "") + repr(f)]
sys.path[:] = [{str(tmp_path / "site")!r}] + [p for p in sys.path if p != {str(ROOT)!r}]
import importlib
for name in {MODULES!r}:
    module = importlib.import_module("fmri_book." + name)
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)


def test_importing_the_package_is_cheap():
    script = "import sys, fmri_book; assert not {'torch', 'nilearn', 'vtk', 'matplotlib'} & set(sys.modules); print(fmri_book.__version__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fmri_book.__version__


def python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.mark.timeout(120)
def test_timm_and_torchvision_import_with_any_torch():
    code, out, err = python("import fmri_book, timm, torchvision; print(timm.create_model('vit_tiny_patch16_224').num_classes)")
    assert (code, out) == (0, "1000"), err


def test_the_door_is_there_once_and_leaves_after_use():
    program = """
import sys, fmri_book, importlib
doors = lambda: sum(type(f).__name__ == "TorchvisionDoor" for f in sys.meta_path)
importlib.reload(fmri_book); assert doors() == 1
import json; assert doors() == 1
import torchvision; assert doors() == 0
importlib.reload(fmri_book); assert doors() == 0
"""
    assert python(program)[0] == 0, python(program)[2]


def test_operators_that_exist_are_left_alone():
    program = """
import torch
own = torch.library.Library("torchvision", "FRAGMENT")
from fmri_book import compat
own.define("nms" + compat.SIGNATURE)
compat._loads = lambda folder: True
assert compat.declare_operators() is False
compat._loads = lambda folder: False      # one is there, one is missing: no error, only the missing one is added
compat.declare_operators()
assert hasattr(torch.ops.torchvision, "nms") and (torch.version.cuda or hasattr(torch.ops.torchvision, "qnms"))
"""
    assert python(program)[0] == 0, python(program)[2]
