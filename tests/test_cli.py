"The program fmri-book: what it prints, where, and with which exit status."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fmri_book import cli
from fmri_book.cohort import Cohort
from fmri_book.data import package_file
from fmri_book.prepare import partial_folder, write_simulated_bids
from fmri_book.storage import Store, verify

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def program(*arguments, **options):
    "The program in a process of its own."
    command = [sys.executable, "-m", "fmri_book.cli", *map(str, arguments)]
    settings = dict(capture_output=True, text=True, env=ENVIRONMENT, timeout=120) | options
    return subprocess.run(command, **settings, check=False)


@pytest.fixture
def run(capsys, monkeypatch):
    "The program in this process: status, standard output, standard error."
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay

    def call(*arguments):
        status = cli.main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def bids_once(tmp_path_factory):
    cohort = Cohort(n_subjects=4, n_sessions=1, n_frames=60, tr=1.4, tasks=("rest",), space="schaefer100")
    return write_simulated_bids(tmp_path_factory.mktemp("bids"), list(cohort))


@pytest.fixture
def bids(bids_once, tmp_path):
    return Path(shutil.copytree(bids_once, tmp_path / "bids"))


@pytest.fixture
def prepared(bids, tmp_path, run):
    status, _, err = run("prepare", bids, tmp_path / "out", "--to", "schaefer100", "--workers", "0")
    assert status == 0, err
    return tmp_path / "out"


# ---------------------------------------------------------------------------------------------------------- the shell


def test_help_is_quick_and_names_every_command():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        helped = program("--help")
        times.append(time.perf_counter() - start)
    assert helped.returncode == 0 and min(times) < 0.5
    for name in ("inspect", "prepare", "convert", "verify", "split", "list", "fetch", "exit status"):
        assert name in helped.stdout


def test_help_imports_nothing_heavy():
    code = "import sys; from fmri_book import cli\ntry: cli.main(['prepare', '--help'])\nexcept SystemExit: pass\nprint(sorted(set(sys.modules) & {'numpy', 'pandas', 'torch', 'nibabel', 'scipy', 'distributed'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.stdout.strip().endswith("[]")


def test_torch_is_never_imported(prepared):
    code = "import sys; from fmri_book import cli\nfor a in (['verify', sys.argv[1]], ['inspect', sys.argv[1]], ['list', 'spaces']): cli.main(a)\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, prepared], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_a_command_help_and_status_2(run):
    status, out, err = run()
    assert status == 2 and out == "" and "usage" in err


def test_the_installed_script_is_this_program():
    script = Path(sys.executable).with_name("fmri-book")
    if not script.exists():
        pytest.skip("fmri-book is not installed in this environment")
    assert subprocess.run(
        [script, "--version"], capture_output=True, text=True, check=False
    ).stdout.startswith("fmri-book 0")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("inspect", "nowhere.nii"), 2, "nothing at nowhere.nii"),
        (("prepare", "nowhere", "out"), 2, "nothing at"),
        (("prepare", ".", "out", "--to", "mars"), 2, "to: expected one of"),
        (("prepare", ".", "out", "--confounds", "magic"), 2, "confounds"),
        (("prepare", ".", "out", "--format", "zip"), 2, "format"),
        (("prepare", ".", "out", "--hold-out-site", "X"), 2, "--split"),
        (("inspect", "nowhere.nii", "nor-here.nii"), 2, "nor-here.nii"),
        (("prepare", ".", "out", "--update", "--format", "wds"), 2, "fmri-book convert"),
        (("prepare", ".", "out", "--update", "--overwrite"), 2, "found both"),
        (("verify", "nowhere"), 1, ""),
        (("convert", "nowhere", "out", "--format", "h5"), 2, "none of them"),
        (("fetch", "no-such-data"), 2, "no-such-data"),
    ],
)
def test_what_cannot_be_meant_is_said_in_words(run, tmp_path, monkeypatch, arguments, status, said):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(*arguments)
    assert found == status and said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--tr", "fast", "expected seconds or 'keep'"), ("--patch", "big", "pixels such as 16")],
)
def test_a_value_of_the_wrong_kind_is_said_in_words(run, capsys, option, value, said):
    with pytest.raises(SystemExit) as stopped:
        run("prepare", ".", "out", option, value)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("FMRI_BOOK_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("inspect", "nowhere.nii")


def test_a_fault_of_ours_is_called_one(run, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_inspect", lambda asked: 1 / 0)
    status, _, err = run("inspect", tmp_path)
    assert status == 1 and "ZeroDivisionError" in err and "FMRI_BOOK_DEBUG" in err


def test_a_closed_pipe_is_no_error(prepared):
    command = (
        f"'{sys.executable}' -m fmri_book.cli inspect '{prepared}' --json | true; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.stdout.strip() == "0" and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------- prepare and after


def test_prepare_verify_inspect_convert(prepared, tmp_path, run):
    assert run("verify", prepared)[0] == 0
    status, out, _ = run("inspect", prepared, "--json")
    told = json.loads(out)[0]
    assert status == 0 and told["runs"] == 4 and told["space"] == "schaefer100" and told["manifest"] is True
    works = {m["model"]: m["works"] for m in told["models"]}
    assert works == {"flat-map MAE": "no", "BrainLM": "yes", "BrainMT": "no", "fMRI-LM": "no"}
    assert "published weights 424" in next(m["reason"] for m in told["models"] if m["model"] == "BrainLM")
    assert run("convert", prepared, tmp_path / "h5", "--format", "h5")[0] == 0
    assert run("convert", tmp_path / "h5", tmp_path / "store", "--format", "store")[0] == 0
    np.testing.assert_allclose(
        Store(tmp_path / "store").record(0).values, Store(prepared).record(0).values, rtol=1e-6
    )
    status, _, err = run("convert", prepared, tmp_path / "h5", "--format", "h5")
    assert status == 2 and "overwrite" in err


@pytest.mark.parametrize(
    "columns, option, reason",
    [
        (100, "--to schaefer100", "published weights need 424 (A424)"),
        (333, "--to parcels --atlas FILE", "published weights need 424 (A424)"),
        (424, "--to parcels --atlas A424", "424 columns; check their order"),
    ],
)
def test_a_brainlm_takes_any_number_of_parcels(columns, option, reason, tmp_path, run):
    path = tmp_path / "sub-1_task-rest_bold.npy"
    np.save(path, np.random.default_rng(0).normal(size=(220, columns)).astype(np.float32))
    _, out, _ = run("inspect", path, "--source-tr", "1.4", "--json")
    told = {m["model"]: m for m in json.loads(out)[0]["models"]}
    assert told["BrainLM"]["works"] == "yes" and told["BrainLM"]["option"] == option
    assert reason in told["BrainLM"]["reason"] and told["fMRI-LM"]["works"] == "no"


def test_a_brainlm_takes_the_parcels_of_a_surface(run):
    path = min(package_file("brainspace", "datasets", "preprocessing").glob("*.mgz"))
    _, out, _ = run("inspect", path, "--source-tr", "1.4", "--json")
    told = next(m for m in json.loads(out)[0]["models"] if m["model"] == "BrainLM")
    assert (told["works"], told["option"]) == ("with option", "--to schaefer400")
    assert "the published weights need A424" in told["reason"]


def test_convert_asks_in_the_words_of_the_shell(tmp_path, run):
    import h5py

    from fmri_book.data import Space
    from fmri_book.formats import VolumeRuns, write_volumes
    from fmri_book.storage import Layout, Record, write_store

    class Twice:  # one person, scanned twice
        layout = Layout.of(
            Space.from_mask("volume_for_cli", np.ones((3, 4, 2), bool), np.eye(4) * 2, "native")
        )

        def __iter__(self):
            values = np.random.default_rng(0).standard_normal((20, 24)).astype(np.float16)
            return (Record(values, 2.0, "01", session=s) for s in ("1", "2"))

    write_store(Twice(), tmp_path / "store", progress=False)
    status, _, err = run("convert", tmp_path / "store", tmp_path / "pt", "--format", "pt")
    assert (
        status == 2 and "--folders recording" in err and "name=" not in err and not (tmp_path / "pt").exists()
    )
    status, out, _ = run(
        "convert", tmp_path / "store", tmp_path / "pt", "--format", "pt", "--folders", "recording"
    )
    assert status == 0 and "2 runs" in out and len(VolumeRuns(tmp_path / "pt")) == 2
    status, _, err = run("convert", tmp_path / "store", tmp_path / "pt", "--format", "pt")
    assert status == 2 and "--overwrite" in err and "True" not in err
    for option in (("--source-tr", "2"), ("--source-axes", "LAS")):  # a store knows these itself
        status, _, err = run("convert", tmp_path / "store", tmp_path / "x", "--format", "wds", *option)
        assert status == 2 and "a reader of 'store'" in err
    status, _, err = run(
        "convert", tmp_path / "store", tmp_path / "x", "--format", "wds", "--folders", "subject"
    )
    assert status == 2 and "--format pt" in err

    (tmp_path / "h5").mkdir()
    with h5py.File(tmp_path / "h5/data_resampled.h5", "w") as file:
        file["time_series/sample_000000"] = np.ones((100, 20), np.float32)
    call = ["convert", tmp_path / "h5", tmp_path / "out", "--format", "store"]
    for asked, option in (("--source-tr", "2"), ("--source-space", "schaefer100")):
        status, _, err = run(*call)
        assert status == 2 and asked in err and "=…" not in err
        call += [asked, option]
    assert run(*call)[0] == 0 and len(Store(tmp_path / "out")) == 1

    source = Twice()
    write_volumes(source, tmp_path / "foreign", name="key")
    for path in (tmp_path / "foreign").glob("img/*/*.json"):
        path.unlink()
    call = ["convert", tmp_path / "foreign", tmp_path / "v", "--format", "store", "--source-tr", "2"]
    status, _, err = run(*call)
    assert status == 2 and "--source-axes RAS" in err
    status, _, err = run(*call, "--source-axes", "RAS")
    assert (status, err) == (0, "") and len(Store(tmp_path / "v")) == 2


def test_verify_is_0_only_if_every_byte_is_accounted_for(prepared, run):
    file = next((prepared / "runs").iterdir())
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:500] + bytes([whole[500] ^ 4]) + whole[501:], whole + b"x"):
        file.write_bytes(damaged)
        status, out, _ = run("verify", prepared)
        assert status == 1 and file.name in out
    file.write_bytes(whole)
    (prepared / "extra.txt").write_text("?")
    assert run("verify", prepared)[0] == 1
    (prepared / "extra.txt").unlink()
    assert run("verify", prepared)[0] == 0
    (prepared / "MANIFEST.json").unlink()
    status, out, _ = run("verify", prepared, "--json")
    assert status == 1 and json.loads(out)[str(prepared)]["ok"] is False


def test_prepare_again_and_with_other_settings(prepared, bids, run):
    status, out, _ = run("prepare", bids, prepared, "--to", "schaefer100")
    assert status == 0 and "nothing to do" in out
    status, _, err = run("prepare", bids, prepared, "--to", "schaefer100", "--tr", "keep")
    assert status == 2 and "tr: was 1.0, is None" in err


def test_a_dry_run_as_json(bids, tmp_path, run):
    status, out, _ = run("prepare", bids, tmp_path / "dry", "--to", "schaefer100", "--dry-run", "--json")
    told = json.loads(out)
    assert (
        status == 0
        and told["counts"] == {"planned": 4}
        and len(told["runs"]) == 4
        and not (tmp_path / "dry").exists()
    )


def test_status_1_if_a_recording_failed(bids, tmp_path, run, monkeypatch):
    from fmri_book import prepare

    def out_of_luck(job):
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(
        prepare,
        "_finish",
        lambda job, real=prepare._finish: out_of_luck(job) if "0002" in job.source.key else real(job),
    )
    status, out, _ = run("prepare", bids, tmp_path / "out", "--to", "schaefer100", "--workers", "0")
    assert status == 1 and "cosmic ray" in out and "3 done" in out and verify(tmp_path / "out").ok


def test_split_options_reach_the_output(bids, tmp_path, run):
    people = tmp_path / "participants.tsv"
    people.write_text(
        "participant_id\tfamily\tsite\n"
        + "".join(f"sub-sim-000{i}\t{f}\t{'X' if i == 4 else 'Y'}\n" for i, f in enumerate("abcc", 1))
    )
    options = (
        "--split",
        ".5,.25,.25",
        "--participants",
        people,
        "--groups",
        "subject,family",
        "--hold-out-site",
        "X",
    )
    status, _, err = run("prepare", bids, tmp_path / "out", "--to", "schaefer100", "--workers", "0", *options)
    assert status == 0, err
    parts = json.loads((tmp_path / "out" / "split.json").read_text())["parts"]
    assert parts["test"] == ["sim-0003", "sim-0004"]  # 4 is from X, 3 is of its family
    assert sorted(parts["train"] + parts["validation"]) == ["sim-0001", "sim-0002"]


def test_split_alone_is_written_once_and_checked(tmp_path, run):
    people, out = tmp_path / "participants.tsv", tmp_path / "split.json"
    people.write_text("participant_id\tfamily\n" + "".join(f"sub-{i}\tf{i // 2}\n" for i in range(12)))
    assert run("split", people, out, "--shares", ".5,.25,.25")[0] == 0
    assert run("split", people, out, "--shares", ".5,.25,.25")[0] == 0  # the very same
    status, _, err = run("split", people, out, "--shares", ".4,.3,.3")
    assert status == 2 and "expected no file, or this very split" in err
    assert run("split", people, out, "--check")[0] == 0
    people.write_text("participant_id\tfamily\n" + "".join(f"sub-{i}\tall\n" for i in range(12)))
    status, _, err = run("split", people, out, "--check")
    assert status == 2 and "two sides" in err


def test_fetch_shows_the_licence_and_says_offline_at_once(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("fetch", "fbert-corpus")
    assert status == 2 and "licence:" in out and "accept_licence" in err and not list(tmp_path.iterdir())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    status, _, err = run("fetch", "fbert-corpus", "--accept-licence")
    assert status == 1 and err and time.perf_counter() - start < 10 and "Traceback" not in err


@pytest.mark.parametrize(
    ("what", "names"), [("datasets", "ds000228"), ("spaces", "schaefer400"), ("formats", "arrow")]
)
def test_lists(run, what, names):
    status, out, _ = run("list", what)
    assert status == 0 and names in out and names in json.loads(run("list", what, "--json")[1])


def interrupted(command: list, out: Path, stop: signal.Signals) -> tuple[int, str]:
    "Status and messages of a preparation that was told to stop once its journal was there."
    process = subprocess.Popen(
        [*command[:5], out, *command[5:]],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # a shell that starts this test run in the background makes everything below it deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads here)
    )
    while not (partial_folder(out) / "journal.jsonl").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_leaves_what_is_done_and_says_how_to_go_on(bids, tmp_path):
    command = [sys.executable, "-m", "fmri_book.cli", "prepare", bids, "--to", "schaefer100"]
    for stop in (signal.SIGINT, signal.SIGTERM):
        for attempt in range(3):  # on a busy machine all may be done before the signal is sent
            out = tmp_path / f"out{stop}-{attempt}"
            status, err = interrupted(command, out, stop)
            if status != 0:
                break
        assert status == 130 and "the same command goes on" in err and "Traceback" not in err
        assert not out.exists() and not verify(partial_folder(out)).ok
    assert program("prepare", bids, out, "--to", "schaefer100").returncode == 0 and verify(out).ok


def test_paths_that_a_terminal_cannot_show(bids, tmp_path):
    src = bids.rename(tmp_path / "脳 λ ü")
    done = program(
        "prepare",
        src,
        tmp_path / "out é",
        "--to",
        "schaefer100",
        "--workers",
        "0",
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert done.returncode == 0 and verify(tmp_path / "out é").ok, done.stderr


# ------------------------------------------------------------------------------------------------------ the real files


@real
def test_inspect_tells_what_the_real_files_are(run):
    files = [
        SHARED / "haxby2001_small" / "haxby2001" / "sub001" / "BOLD" / "task001_run001" / "bold_25mm.nii.gz",
        SHARED / "nifti_small" / "functional.nii",
        SHARED / "tbi_ds000220" / "tbi_schaefer1000_60sessions.npz",
        SHARED / "atlases" / "A424+2mm.nii.gz",
    ]
    status, out, _ = run("inspect", *files, "--json")
    haxby, small, tbi, atlas = json.loads(out)
    assert status == 0 and [len(t["models"]) for t in (haxby, small, tbi, atlas)] == [4] * 4
    assert haxby["what"] == "BOLD volume" and haxby["frames"] == 121 and haxby["tr"] == 2.5
    assert any(d["check"] == "length" and d["level"] == "refuse" for d in small["decisions"])
    assert tbi["space"] == "schaefer1000" and len(tbi["members"]) == 60
    assert "atlas" in atlas["what"] and {m["works"] for m in atlas["models"]} == {"no"}
    for text in run("inspect", *files)[1].split("\n\n"):
        assert "flat-map MAE" in text


@real
def test_the_real_files_go_through_prepare(run, tmp_path):
    haxby = (
        "prepare",
        SHARED / "haxby2001_small" / "haxby2001",
        tmp_path / "haxby",
        "--to",
        "volume",
        "--pattern",
        "bold_25mm*",
        "--tr",
        "keep",
        "--workers",
        "0",
    )
    assert run(*haxby)[0] == 0 and len(Store(tmp_path / "haxby").events(0)) == 8
    status, out, _ = run(
        "prepare", SHARED / "nifti_small", tmp_path / "small", "--to", "volume", "--workers", "0"
    )
    assert status == 1 and out.count("too short") == 3 and "3 refused" in out
    tbi = (
        "prepare",
        SHARED / "tbi_ds000220",
        tmp_path / "tbi",
        "--to",
        "schaefer1000",
        "--source-tr",
        "2",
        "--workers",
        "0",
    )
    assert (
        run(*tbi)[0] == 0 and len(Store(tmp_path / "tbi")) == 60 and run("verify", tmp_path / "tbi")[0] == 0
    )
