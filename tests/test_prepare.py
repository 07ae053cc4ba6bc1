"Prepare: what the output holds, what survives a kill, and what is said about everything else."

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest

from fmri_book import formats, prepare as P
from fmri_book.cohort import Cohort
from fmri_book.data import package_file, resample_bold, zscore
from fmri_book.flat_maps import FlatMap
from fmri_book.ingest import IngestOptions
from fmri_book.prepare import Different, Settings, Unfinished, partial_folder, prepare
from fmri_book.storage import Store, verify

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
HERE = {"workers": 0, "progress": False}  # in this process: no time for starting others


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def journal(path):
    return P.read_journal(path)


@pytest.fixture(scope="session")
def cohort():
    "Five simulated people, rest and motor."
    return list(
        Cohort(n_subjects=5, n_sessions=1, n_frames=60, tr=1.4, tasks=("rest", "motor"), space="schaefer100")
    )


@pytest.fixture(scope="session")
def bids_once(cohort, tmp_path_factory):
    return P.write_simulated_bids(tmp_path_factory.mktemp("bids"), cohort)


@pytest.fixture
def bids(bids_once, tmp_path):
    "A copy that a test may damage."
    return Path(shutil.copytree(bids_once, tmp_path / "bids"))


@pytest.fixture(scope="session")
def surfaces(tmp_path_factory):
    "One simulated recording as a pair of GIFTI files."
    cohort = Cohort(n_subjects=1, n_sessions=1, n_frames=60, tr=1.4, tasks=("motor",), space="fsaverage5")
    return P.write_simulated_bids(tmp_path_factory.mktemp("surfaces"), list(cohort)), cohort[0]


def write_volume(path, frames=40, shape=(5, 6, 4), seed=0, mask=None, spoil=None):
    values = 1000 + np.random.default_rng(seed).standard_normal((*shape, frames)).astype(np.float32)
    if spoil:
        spoil(values)
    image = nib.Nifti1Image(values, np.diag([3.0, 3, 3, 1]))
    image.header.set_zooms((3, 3, 3, 2.0))
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return values


# ---------------------------------------------------------------------------------------------- what the output holds


def test_flat_frames_are_zscored_then_resampled_then_drawn(surfaces, tmp_path):
    folder, run = surfaces
    report = prepare(folder, tmp_path / "out", to="flat", **HERE)
    assert report.counts == {"done": 1}
    record = Store(report.out).record(0)
    z = zscore(run.bold)
    z[:, ~run.sites.cortex] = 0
    expected = FlatMap.fsaverage5().project(resample_bold(z, 1.4, 1.0))
    assert record.values.dtype == np.float16 and record.tr == 1.0
    images = np.zeros_like(expected)
    images[:, FlatMap.fsaverage5().mask] = record.values
    np.testing.assert_allclose(images, expected, atol=2e-3)
    assert (images[:, ~FlatMap.fsaverage5().mask] == 0).all()
    assert len(record.events) == len(run.events) and set(record.events.trial_type) == set(
        run.events.trial_type
    )


def test_patch_order_holds_the_same_pictures(surfaces, tmp_path):
    plain = prepare(surfaces[0], tmp_path / "a", to="flat", **HERE).out
    patched = prepare(surfaces[0], tmp_path / "b", to="flat", patch=16, **HERE).out
    assert Store(patched).layout.patch == (16, 16)
    np.testing.assert_array_equal(Store(plain).record(0).values, Store(patched).record(0).values)
    assert not np.array_equal(Store(plain).read(0, 0, 2), Store(patched).read(0, 0, 2))


def test_parcels_keep_raw_units_and_events(bids, cohort, tmp_path):
    out = prepare(bids, tmp_path / "out", to="schaefer100", tr=None, **HERE).out
    store = Store(out)
    assert len(store) == 10 and set(store.index["tr"]) == {1.4} and store.dtype == np.float16
    run = next(r for r in cohort if r.task == "motor" and r.subject == "sim-0003")
    record = store.record(store.find(subject="sim-0003", task="motor")[0])
    np.testing.assert_allclose(record.values, run.bold, atol=0.01 * run.bold.std(0).max())
    pd.testing.assert_frame_equal(
        record.events[["onset", "duration", "trial_type"]],
        run.events.reset_index(drop=True),
        check_exact=False,
    )


def test_one_tr_for_all_if_asked(bids, tmp_path):
    for path in sorted(bids.rglob("*.json"))[:4]:
        path.write_text(json.dumps({"RepetitionTime": 2.0}))
    mixed = Store(prepare(bids, tmp_path / "mixed", to="schaefer100", tr=None, **HERE).out)
    assert set(mixed.index["tr"]) == {1.4, 2.0}
    one = Store(prepare(bids, tmp_path / "one", to="schaefer100", tr=1.0, **HERE).out)
    assert set(one.index["tr"]) == {1.0} and set(one.index["frames"]) == {
        83,
        119,
    }  # last frame at 59·TR or before


def test_normalise_z_stores_zscores(bids, tmp_path):
    store = Store(prepare(bids, tmp_path / "z", to="schaefer100", tr=None, normalise="z", **HERE).out)
    values = store.record(0).values.astype(np.float64)
    np.testing.assert_allclose(values.mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(values.std(0), 1, atol=2e-3)
    assert store.scale == "none"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"to": "schaefer123"}, "schaefer123"),
        ({"format": "zip"}, "zip"),
        ({"tr": 1400.0}, "milliseconds"),
        ({"to": "flat", "normalise": "none"}, "normalise='z'"),
        ({"to": "schaefer100", "patch": 16}, "patch"),
        ({"to": "parcels"}, "atlas"),
    ],
)
def test_settings_that_cannot_be_meant(wrong, named):
    with pytest.raises(ValueError, match=named):
        Settings(**wrong)


def test_the_formats_are_those_of_the_formats_chapter():
    assert P.FORMATS == tuple(formats.FORMATS)


def test_settings_know_the_content_of_files(tmp_path):
    atlas = tmp_path / "atlas.nii.gz"
    atlas.write_bytes(b"one")
    first = Settings(to="parcels", options=IngestOptions(atlas=atlas)).facts()
    atlas.write_bytes(b"two")
    second = Settings(to="parcels", options=IngestOptions(atlas=atlas)).facts()
    assert [d.split(":")[0] for d in P.differences(first, second)] == ["options.atlas"]


@pytest.mark.parametrize("format", ["wds", "arrow", "h5"])
def test_other_formats_hold_the_same_values(bids, tmp_path, format):
    split = {"train": 0.6, "test": 0.4}
    report = prepare(bids, tmp_path / format, to="schaefer100", format=format, tr=None, split=split, **HERE)
    assert report.exit_status == 0 and verify(report.out).ok and formats.detect(report.out) == format
    store = Store(prepare(bids, tmp_path / "store", to="schaefer100", tr=None, scale="none", **HERE).out)
    made = {r.key: r for r in formats.open_source(report.out)}
    assert set(made) == set(store.index["key"])
    for i, key in enumerate(store.index["key"]):
        np.testing.assert_array_equal(made[key].values, store.record(i).values)
        assert made[key].tr == 1.4
    train = json.loads((report.out / "split.json").read_text())["parts"]["train"]
    if format == "arrow":
        assert {p.name for p in report.out.iterdir() if p.is_dir()} >= {"train", "test"}
    if format == "h5":
        stats = np.load(report.out / "normalization_params.npz")
        wanted = np.concatenate([store.record(i).values for i in store.find(subject=train)])
        found = sorted((np.asarray(v).ravel() for v in stats.values() if np.size(v) == 100), key=np.mean)
        assert any(
            np.allclose(v, q, rtol=1e-4) for v in found for q in (wanted.mean(0), np.median(wanted, 0))
        )


# ------------------------------------------------------------------------------------------------- nothing is dropped


def test_every_recording_has_a_row(tmp_path):
    "Truncated, NaN, too short, one image only, twice the same name: each is named, and the good one is done."
    src = tmp_path / "src"
    write_volume(src / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz", seed=1)
    whole = src / "sub-02" / "func" / "sub-02_task-rest_bold.nii.gz"
    write_volume(whole, seed=2)
    whole.write_bytes(whole.read_bytes()[:3000])
    write_volume(
        src / "sub-03" / "func" / "sub-03_task-rest_bold.nii.gz",
        seed=3,
        spoil=lambda v: v[2, 2, 2].fill(np.nan),
    )
    write_volume(src / "sub-04" / "func" / "sub-04_task-rest_bold.nii.gz", frames=20)
    write_volume(src / "sub-05" / "func" / "sub-05_task-rest_bold.nii.gz", seed=5)
    write_volume(src / "copy" / "sub-05" / "func" / "sub-05_task-rest_bold.nii.gz", seed=6)
    mask = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((5, 6, 4), np.uint8), np.diag([3.0, 3, 3, 1])), mask)
    report = prepare(src, tmp_path / "out", to="volume", options=IngestOptions(mask=mask), **HERE)
    table = report.table.set_index("key")
    assert dict(table["status"]) == {
        "sub-01_task-rest": "done",
        "sub-02_task-rest": "refused",
        "sub-03_task-rest": "refused",
        "sub-04_task-rest": "refused",
        "sub-05_task-rest": "refused",
    }
    reasons = table["reason"]
    assert (
        "NaN" in reasons["sub-03_task-rest"]
        and "40 s" in reasons["sub-04_task-rest"]
        and "2 of this name" in reasons["sub-05_task-rest"]
    )
    assert reasons["sub-02_task-rest"]
    assert report.exit_status == 0 and verify(report.out).ok
    saved = pd.read_csv(report.out / "report.csv")
    assert list(saved["key"]) == list(table.index) and saved["decisions"][0].count("expected") >= 3
    assert list(Store(report.out).index["key"]) == ["sub-01_task-rest"]


@pytest.mark.parametrize("sessions", [("1",), ("1", "2")])
def test_tensors_of_people_who_came_twice_get_a_folder_each(tmp_path, sessions):
    from fmri_book.formats import VolumeRuns

    for ses in sessions:
        here = tmp_path / "src" / "sub-01" / f"ses-{ses}" / "func"
        write_volume(here / f"sub-01_ses-{ses}_task-rest_bold.nii.gz", seed=int(ses))
    mask = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((5, 6, 4), np.uint8), np.diag([3.0, 3, 3, 1])), mask)
    options = IngestOptions(mask=mask)
    report = prepare(tmp_path / "src", tmp_path / "out", to="volume", format="pt", options=options, **HERE)
    assert report.exit_status == 0 and verify(report.out).ok
    folders = ["01"] if len(sessions) == 1 else ["sub-01_ses-1_task-rest", "sub-01_ses-2_task-rest"]
    assert sorted(p.name for p in (report.out / "img").iterdir()) == folders
    assert len(VolumeRuns(report.out)) == len(sessions)


def test_a_mask_of_another_shape_is_refused_for_every_run(tmp_path):
    write_volume(tmp_path / "src" / "sub-01_task-rest_bold.nii.gz")
    mask = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((7, 6, 4), np.uint8), np.diag([3.0, 3, 3, 1])), mask)
    report = prepare(
        tmp_path / "src", tmp_path / "out", to="volume", options=IngestOptions(mask=mask), **HERE
    )
    assert report.exit_status == 1 and not (tmp_path / "out").exists()
    assert "mask" in report.table["reason"][0] and not verify(partial_folder(report.out)).ok
    with pytest.raises(FileNotFoundError, match="expected a file as mask"):
        prepare(
            tmp_path / "src",
            tmp_path / "o2",
            to="volume",
            options=IngestOptions(mask=tmp_path / "none"),
            **HERE,
        )


def test_the_layout_of_most_runs_wins_and_the_other_is_named(tmp_path):
    for k in range(3):
        folder = tmp_path / "src" / f"sub-0{k}" / "func"
        write_volume(
            folder / f"sub-0{k}_task-rest_space-MNI152NLin6Asym_bold.nii.gz", seed=k, shape=(6, 6, 4)
        )
        inside = np.ones((6, 6, 4), np.uint8)
        inside[0] = k != 0
        image = nib.Nifti1Image(inside, np.diag([3.0, 3, 3, 1]))
        nib.save(image, folder / f"sub-0{k}_task-rest_space-MNI152NLin6Asym_desc-brain_mask.nii.gz")
    report = prepare(tmp_path / "src", tmp_path / "out", to="volume", **HERE)
    status = dict(zip(report.table["subject"], report.table["status"]))
    assert status == {"00": "refused", "01": "done", "02": "done"} and Store(report.out).layout.n_sites == 144
    assert "another mask" in report.table["reason"][0] and verify(report.out).ok


def test_unicode_paths_and_spaces(bids, tmp_path):
    src = bids.rename(tmp_path / "Aufnahmen für 脳 λ")
    out = tmp_path / "préparé ß"
    assert prepare(src, out, to="schaefer100", **HERE).counts == {"done": 10} and verify(out).ok


def test_an_output_inside_the_source_folder_is_not_a_recording(bids, tmp_path):
    first = prepare(bids, bids / "derived", to="schaefer100", **HERE)
    again = prepare(bids, bids / "derived2", to="schaefer100", **HERE)
    assert first.counts == again.counts == {"done": 10}
    assert prepare(bids, bids / "derived", to="schaefer100", **HERE).note.startswith("nothing to do")


# -------------------------------------------------------------------------------------------- what was begun before


def begin(bids, out, n, **settings):
    "An unfinished output with n recordings done, as a kill leaves it."
    settings = Settings(**{"to": "schaefer100", **settings})
    found = P._find(bids, out, settings, None, None)
    partial_folder(out).mkdir(exist_ok=True)
    P._begin(partial_folder(out), settings.facts() | {"split": None}, False)
    for key in sorted(found.sources)[:n]:
        result = P.work(P.Job(found.sources[key], settings, partial_folder(out), found.files[key]))
        assert result["status"] == "done"
    return found


def test_finished_runs_are_kept_and_changed_ones_made_again(bids, tmp_path):
    out = tmp_path / "out"
    found = begin(bids, out, 6)
    changed = sorted(found.sources)[2]
    path = found.sources[changed].files[0]
    values = np.load(path)
    np.save(path, values[::-1].copy())
    gone = sorted(found.sources)[4]
    found.sources[gone].files[0].unlink()
    report = prepare(bids, out, to="schaefer100", **HERE)
    status = dict(zip(report.table["key"], report.table["status"]))
    assert [k for k, v in status.items() if v == "kept"] == [
        k for k in sorted(found.sources)[:6] if k not in (changed, gone)
    ]
    assert status[changed] == "done" and gone not in status and report.counts == {"kept": 4, "done": 5}
    store = Store(out)
    reference = Store(prepare(bids, tmp_path / "calm", to="schaefer100", **HERE).out)
    assert (
        contents(out) == contents(reference.path) and verify(out).ok and gone not in set(store.index["key"])
    )


def test_an_events_file_that_changed_counts(bids, tmp_path):
    found = begin(bids, tmp_path / "out", 10)
    events = next(bids.rglob("*motor_events.tsv"))
    events.write_text(events.read_text().replace("\n", "\n", 1) + "50.0\t1.0\tadded\n")
    report = prepare(bids, tmp_path / "out", to="schaefer100", **HERE)
    assert report.counts == {"kept": 9, "done": 1} and len(found.sources) == 10


def test_other_settings_are_refused_and_named(bids, tmp_path):
    out = tmp_path / "out"
    begin(bids, out, 3)
    before = contents(partial_folder(out))
    with pytest.raises(Different, match=r"tr: was 1\.0, is 2\.0"):
        prepare(bids, out, to="schaefer100", tr=2.0, **HERE)
    after = contents(partial_folder(out))
    assert {k: v for k, v in after.items() if k != "lock"} == {k: v for k, v in before.items() if k != "lock"}
    report = prepare(bids, out, to="schaefer100", tr=2.0, overwrite=True, **HERE)
    assert report.counts == {"done": 10} and set(Store(out).index["tr"]) == {2.0}


def test_nothing_to_do_the_second_time(bids, tmp_path):
    out = prepare(bids, tmp_path / "out", to="schaefer100", **HERE).out
    before = {k: (out / k).stat().st_mtime_ns for k in contents(out)}
    report = prepare(bids, out, to="schaefer100", workers=3, progress=False)  # workers decide nothing
    assert (
        report.note.startswith("nothing to do") and report.counts == {"kept": 10} and report.exit_status == 0
    )
    assert before == {k: (out / k).stat().st_mtime_ns for k in contents(out)}
    with pytest.raises(Different, match="1 changed"):
        np.save(
            next(bids.rglob("*rest*.npy")), np.random.default_rng(0).standard_normal((60, 100)).astype("f4")
        )
        prepare(bids, out, to="schaefer100", **HERE)
    assert (
        prepare(bids, out, to="schaefer100", overwrite=True, **HERE).counts == {"done": 10} and verify(out).ok
    )


def test_what_prepare_did_not_write_is_never_replaced(bids, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(Different, match="another name"):
            prepare(bids, tmp_path / "thesis", to="schaefer100", overwrite=overwrite, **HERE)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_the_second_of_two_is_refused_while_the_first_lives(bids, tmp_path):
    out = tmp_path / "out"
    with P._alone(partial_folder(out)), pytest.raises(Unfinished, match=f"process {os.getpid()}"):
        prepare(bids, out, to="schaefer100", **HERE)
    assert prepare(bids, out, to="schaefer100", **HERE).counts == {"done": 10}


def test_a_dry_run_writes_nothing(bids, tmp_path):
    before = contents(tmp_path)
    report = prepare(bids, tmp_path / "out", to="schaefer100", dry_run=True, **HERE)
    assert report.counts == {"planned": 10} and contents(tmp_path) == before and report.exit_status == 0


def test_a_kill_after_the_rename_leaves_only_sweeping(bids, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(P, "_clean_up", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(bids, out, to="schaefer100", **HERE)
    assert verify(out).ok and partial_folder(out).exists()
    assert prepare(bids, out, to="schaefer100", **HERE).counts == {"kept": 10}
    assert not partial_folder(out).exists() and (tmp_path / "out.journal.jsonl").exists()


def test_limit_then_all(bids, tmp_path):
    assert prepare(bids, tmp_path / "few", to="schaefer100", limit=2, **HERE).counts == {"done": 2}
    with pytest.raises(Different, match="8 new"):
        prepare(bids, tmp_path / "few", to="schaefer100", **HERE)


def test_one_truncated_gifti_does_not_stop_the_others(surfaces, tmp_path):
    "XML that breaks off raises an error of its own kind."
    folder = Path(shutil.copytree(surfaces[0], tmp_path / "bids"))
    whole = min(folder.rglob("*hemi-L*.gii"))
    for side in "LR":
        other = whole.parent / whole.name.replace("sim-0001", "sim-0002").replace("hemi-L", f"hemi-{side}")
        shutil.copy(str(whole).replace("hemi-L", f"hemi-{side}"), other)
    sidecar = min(whole.parent.glob("*_bold.json"))
    shutil.copy(sidecar, sidecar.with_name(sidecar.name.replace("sim-0001", "sim-0002")))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    report = prepare(folder, tmp_path / "out", to="schaefer100", **HERE)
    assert report.counts == {"refused": 1, "done": 1}
    assert "breaks off" in report.table.query("status == 'refused'")["reason"].iloc[0]


def test_a_header_that_cannot_be_looked_at_fails_alone(bids, tmp_path, monkeypatch):
    honest = P.examine

    def strange(source, **how):
        if source.subject == "sim-0002":
            raise RecursionError("nobody expected this")
        return honest(source, **how)

    monkeypatch.setattr(P, "examine", strange)
    report = prepare(bids, tmp_path / "out", to="schaefer100", **HERE)
    assert report.counts == {"done": 10}  # the worker could read it


# ------------------------------------------------------------------------------------- new recordings, after the fact


def spoil(path):
    "A recording that fails, and what it was."
    whole = path.read_bytes()
    path.write_bytes(b"not an array" + whole[12:])
    return whole


@pytest.fixture
def finished(bids, tmp_path, monkeypatch):
    "An output of seven recordings, of which one failed; the source now has ten, one of them changed, none of them bad."
    later = tmp_path / "later"
    for path in sorted(bids.glob("sub-*"))[4:]:
        shutil.move(path, later / path.name)
    first = sorted(bids.rglob("*_bold.npy"))
    honest = P.make_record

    def fails(source, settings):
        if source.files[0] == first[2]:
            raise OSError("the disk coughed")
        return honest(source, settings)

    with monkeypatch.context() as m:
        m.setattr(P, "make_record", fails)
        report = prepare(bids, tmp_path / "out", to="schaefer100", **HERE)
    assert report.counts == {"done": 7, "failed": 1} and report.exit_status == 1
    for path in later.iterdir():
        shutil.move(path, bids / path.name)
    np.save(first[5], np.load(first[5])[::-1].copy())
    return bids, report.out


def test_an_update_makes_only_what_is_new_changed_or_failed(finished, tmp_path):
    bids, out = finished
    before = contents(out)
    with pytest.raises(Different, match=r"2 new .*1 changed .*1 failed .*--update"):
        prepare(bids, out, to="schaefer100", **HERE)
    dry = prepare(bids, out, to="schaefer100", update=True, dry_run=True, **HERE)
    assert dry.counts == {"kept": 6, "planned": 4} and contents(out) == before
    report = prepare(bids, out, to="schaefer100", update=True, **HERE)
    assert report.counts == {"kept": 6, "done": 4} and report.exit_status == 0
    ends = journal(tmp_path / "out.journal.jsonl").query("what == 'end'")
    assert sorted(ends["key"]) == sorted(report.table.query("status == 'done'")["key"])
    calm = prepare(bids, tmp_path / "calm", to="schaefer100", **HERE)
    assert contents(out) == contents(calm.out) and verify(out).ok and not partial_folder(out).exists()
    kept = [name for name in before if name.startswith("runs/") and name in contents(out)]
    assert len(kept) == 6 and all(contents(out)[name] == before[name] for name in kept)
    again = prepare(bids, out, to="schaefer100", update=True, **HERE)
    assert again.note.startswith("nothing to do") and again.counts == {"kept": 10}


def test_an_update_never_writes_to_the_old_output(finished, tmp_path, monkeypatch):
    "Stopped before each of its steps, the old output stays whole; and the next start goes on."
    bids, out = finished
    before = contents(out)
    for step in ("_adopt", "_make_all", "_assemble", "_publish", "verify", "_exchange"):

        def stop(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(P, step, stop)
            with pytest.raises(KeyboardInterrupt):
                prepare(bids, out, to="schaefer100", update=True, **HERE)
        assert contents(out) == before and verify(out).ok, step
    report = prepare(bids, out, to="schaefer100", update=True, **HERE)
    assert (
        report.counts == {"kept": 10} and verify(out).ok
    )  # those that were made before the stop are kept, too


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_around_the_exchange_of_names(finished, tmp_path, monkeypatch, exchange):
    bids, out = finished
    before, rename = contents(out), os.replace

    def once(a, b):
        rename(a, b)
        if Path(b).name == "replaced":
            raise KeyboardInterrupt  # between the two renames

    with monkeypatch.context() as m:
        if exchange:
            m.setattr(P, "_clean_up", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            m.setattr(P, "_exchange", lambda *_: False)
            m.setattr(P.os, "replace", once)
        with pytest.raises(KeyboardInterrupt):
            prepare(bids, out, to="schaefer100", update=True, **HERE)
    assert out.exists() == exchange
    if not exchange:
        P._put_back(out)
        assert contents(out) == before and verify(out).ok
    report = prepare(bids, out, to="schaefer100", update=True, **HERE)
    assert report.counts == {"kept": 10} and verify(out).ok and not partial_folder(out).exists()


def test_sigkill_in_the_middle_of_an_update(bids_once, bids, tmp_path):
    out = tmp_path / "out"
    later = [Path(shutil.move(p, tmp_path / p.name)) for p in sorted(bids.glob("sub-*"))[1:]]
    prepare(bids, out, to="schaefer100", **HERE)
    before = contents(out)
    for path in later:
        shutil.move(path, bids / path.name)
    command = [sys.executable, "-m", "fmri_book.cli", "prepare", bids, out, "--to", "schaefer100", "--update"]
    for ended in (0, 2, 5):
        process = subprocess.Popen(
            [*command, "--workers", "1"],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        results = partial_folder(out) / "results"
        wait_for(lambda n=2 + ended, r=results: len(list(r.glob("*.json"))) >= n or not out.exists())
        process.kill()
        process.wait()
        assert contents(out) == before and verify(out).ok and not verify(partial_folder(out)).ok
    assert subprocess.run([*command, "--workers", "0"], env=environment(), check=False).returncode == 0
    calm = prepare(bids, tmp_path / "calm", to="schaefer100", **HERE)
    assert contents(out) == contents(calm.out) and verify(out).ok and not partial_folder(out).exists()


def test_what_an_update_refuses(finished, tmp_path):
    bids, out = finished
    before = contents(out)
    with pytest.raises(Different, match=r"tr: was 1\.0, is 2\.0"):
        prepare(bids, out, to="schaefer100", tr=2.0, update=True, **HERE)
    with pytest.raises(ValueError, match="fmri-book convert"):
        prepare(bids, out, to="schaefer100", format="h5", update=True, **HERE)
    with pytest.raises(ValueError, match="found both"):
        prepare(bids, out, to="schaefer100", update=True, overwrite=True, **HERE)
    gone = min(bids.rglob("*rest*_bold.npy"))
    gone.rename(tmp_path / "withdrawn.npy")
    with pytest.raises(Different, match=r"1 gone \(first: sub-sim-0001_.*drops nothing"):
        prepare(bids, out, to="schaefer100", update=True, **HERE)
    assert contents(out) == before and not partial_folder(out).exists()


def test_a_damaged_run_is_made_again_by_an_update(finished, tmp_path):
    bids, out = finished
    victim = min((out / "runs").iterdir())
    raw = bytearray(victim.read_bytes())
    raw[100] ^= 1
    victim.write_bytes(raw)
    report = prepare(bids, out, to="schaefer100", update=True, **HERE)
    assert report.counts == {"kept": 5, "done": 5} and verify(out).ok


def test_an_update_moves_nobody_to_another_part(bids, tmp_path):
    later = Path(shutil.move(max(bids.glob("sub-*")), tmp_path / "sub-later"))
    out = prepare(bids, tmp_path / "out", to="schaefer100", split=(0.5, 0.0, 0.5), **HERE).out
    split = json.loads((out / "split.json").read_text())
    shutil.move(later, bids / "sub-sim-0005")
    with pytest.raises(ValueError, match="expected (all 5 subjects|only subjects)"):
        prepare(bids, out, to="schaefer100", update=True, **HERE)  # nobody said where the new one belongs
    moved = tmp_path / "moved.json"
    parts = {part: list(names) for part, names in split["parts"].items()}
    someone = parts["train"].pop()
    parts["test"] += [someone, "sim-0005"]
    moved.write_text(json.dumps(split | {"parts": parts}))
    with pytest.raises(Different, match=f"{someone} from train to test"):
        prepare(bids, out, to="schaefer100", update=True, split=moved, **HERE)
    parts["test"].remove(someone)
    parts["train"].append(someone)
    moved.write_text(json.dumps(split | {"parts": parts}))
    report = prepare(bids, out, to="schaefer100", update=True, split=moved, **HERE)
    assert report.counts == {"kept": 8, "done": 2} and verify(out).ok
    assert "sim-0005" in json.loads((out / "split.json").read_text())["parts"]["test"]


def test_overwrite_after_a_killed_update_makes_everything(finished, monkeypatch):
    bids, out = finished
    with monkeypatch.context() as m:
        m.setattr(P, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(bids, out, to="schaefer100", update=True, **HERE)
    assert prepare(bids, out, to="schaefer100", overwrite=True, **HERE).counts == {"done": 10}


def test_other_settings_are_welcome_where_nothing_was_done(tmp_path):
    "After 'give --source-tr', the same call with --source-tr works."
    np.save(tmp_path / "sub-01_task-rest_bold.npy", np.random.default_rng(0).standard_normal((90, 100)))
    src, out = tmp_path / "sub-01_task-rest_bold.npy", tmp_path / "out"
    refused = prepare(src, out, to="schaefer100", **HERE)
    assert refused.counts == {"refused": 1} and "--source-tr" in str(refused)
    told = prepare(src, out, to="schaefer100", options=IngestOptions(source_tr=2.0), **HERE)
    assert told.counts == {"done": 1} and verify(out).ok


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_resampled_tr_is_said(bids, tmp_path, dry_run):
    said = str(prepare(bids, tmp_path / "out", to="schaefer100", dry_run=dry_run, **HERE))
    assert "TR of the output (10 of 10): expected 1 s, found 1.4 s" in said and "--tr keep" in said
    kept = str(prepare(bids, tmp_path / "own", to="schaefer100", tr=None, dry_run=dry_run, **HERE))
    assert "TR of the output" not in kept


# ---------------------------------------------------------------------------------------------------------- the split


def test_the_split_is_made_before_the_work_and_leaks_stop_it(bids, tmp_path):
    people = pd.DataFrame({"subject": [f"sim-000{i}" for i in range(1, 6)], "family": list("aabbc")})
    out = prepare(
        bids, tmp_path / "out", to="schaefer100", split=(0.5, 0.25, 0.25), participants=people, **HERE
    ).out
    parts = json.loads((out / "split.json").read_text())["parts"]
    assert sorted(s for names in parts.values() for s in names) == sorted(people["subject"])
    for family in (["sim-0001", "sim-0002"], ["sim-0003", "sim-0004"]):
        assert sum(bool(set(family) & set(names)) for names in parts.values()) == 1
    leaky = people.assign(family=["a", "x", "a", "x", "a"])
    with pytest.raises(ValueError, match="two sides"):
        prepare(bids, tmp_path / "o2", to="schaefer100", split=out / "split.json", participants=leaky, **HERE)
    with pytest.raises(ValueError, match="sim-0005"):
        prepare(
            bids,
            tmp_path / "o3",
            to="schaefer100",
            split={"train": 0.5, "test": 0.5},
            participants=people[:4],
            **HERE,
        )
    assert not partial_folder(tmp_path / "o2").exists() and not partial_folder(tmp_path / "o3").exists()


# ------------------------------------------------------------------------------------------------------------ workers


def test_workers_and_dask_write_the_same_bytes(bids, tmp_path):
    one = prepare(bids, tmp_path / "one", to="schaefer100", **HERE)
    two = prepare(bids, tmp_path / "two", to="schaefer100", workers=2, progress=False)
    pytest.importorskip("distributed")
    dask = prepare(bids, tmp_path / "dask", to="schaefer100", dask="local", workers=2, progress=False)
    assert one.counts == two.counts == dask.counts == {"done": 10}
    assert contents(one.out) == contents(two.out) == contents(dask.out)
    seen = journal(tmp_path / "two.journal.jsonl")
    pids = set(seen.loc[seen["what"] == "end", "pid"])
    assert len(pids) == 2 and os.getpid() not in pids
    running = seen["what"].map({"begin": 0, "start": 1, "end": -1}).cumsum()
    assert running.max() == 2  # never more in flight than there are workers
    seen = journal(tmp_path / "dask.journal.jsonl")
    assert len(set(seen.loc[seen["what"] == "end", "pid"])) == 2


def test_a_scheduler_by_its_address_or_its_file(bids, tmp_path):
    distributed = pytest.importorskip("distributed")
    options = dict(n_workers=1, processes=False, dashboard_address=None)
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        client.write_scheduler_file(str(tmp_path / "scheduler.json"))
        for name, where in (("a", cluster.scheduler_address), ("b", str(tmp_path / "scheduler.json"))):
            report = prepare(bids, tmp_path / name, to="schaefer100", dask=where, progress=False)
            assert report.counts == {"done": 10}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(("retries", "status"), [(0, "failed"), (1, "done")])
def test_a_worker_that_is_killed_takes_one_recording_with_it(bids, tmp_path, retries, status):
    out, victims = tmp_path / "out", []

    def kill_first():
        path = partial_folder(out) / "journal.jsonl"
        while not (path.exists() and '"start"' in path.read_text()):
            time.sleep(0.001)
        worker = next(c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline()))
        worker.kill()
        victims.append(worker.pid)

    killer = threading.Thread(target=kill_first)
    killer.start()
    report = prepare(bids, out, to="schaefer100", workers=1, retries=retries, progress=False)
    killer.join()
    assert len(victims) == 1
    seen = journal(tmp_path / "out.journal.jsonl")
    if retries == 0:
        bad = report.table[report.table["status"] == "failed"]
        assert len(bad) == 1 and "worker died" in bad["reason"].iloc[0] and report.exit_status == 1
        assert report.counts == {"done": 9, "failed": 1} and len(Store(out)) == 9
        again = prepare(bids, out, to="schaefer100", **HERE)
        assert again.exit_status == 1 and "1 failed then" in again.note
    else:
        assert report.counts == {"done": 10} and (seen["what"] == "died").sum() == 1
    assert verify(out).ok


def test_a_script_without_a_guard_is_told_so(bids, tmp_path):
    script = tmp_path / "naive.py"
    script.write_text(
        f"from fmri_book.prepare import prepare\nprepare({str(bids)!r}, {str(tmp_path / 'out')!r}, to='schaefer100')\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment(), timeout=60, check=False
    )
    assert done.returncode != 0 and "__name__ == '__main__'" in done.stderr


def test_threads_are_one_each_and_given_back():
    before = dict(os.environ)
    with P._one_thread_each():
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert dict(os.environ) == before


# ------------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 600 kB."
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_said_and_the_work_goes_on_later(bids, small_disk, monkeypatch):
    out = small_disk / "out"
    with pytest.raises(Unfinished, match="expected room for about"):
        prepare(bids, out, to="fsLR_32k", **HERE)
    assert not out.exists()
    shutil.rmtree(partial_folder(out))
    monkeypatch.setattr(P, "_check_room", lambda *_: None)
    (small_disk / "others").write_bytes(bytes(430_000))
    with pytest.raises(Unfinished, match="disk is full"):
        prepare(bids, out, to="schaefer100", scale="none", **HERE)
    assert not out.exists() and not verify(partial_folder(out)).ok
    done = len(list((partial_folder(out) / "results").glob("*.json")))
    assert 0 < done < 10
    (small_disk / "others").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    report = prepare(bids, out, to="schaefer100", scale="none", **HERE)
    assert report.counts == {"kept": done, "done": 10 - done} and verify(out).ok


def test_a_read_only_disk_is_said_at_once(bids, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="[Rr]ead-only"):
        prepare(bids, small_disk / "out", to="schaefer100", **HERE)


# ------------------------------------------------------------------------------------------------------ the kill test


def environment():
    return os.environ | {"PYTHONPATH": str(Path(P.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def start(bids, out):
    "The program as a user starts it, with two workers."
    command = [
        sys.executable,
        "-m",
        "fmri_book.cli",
        "prepare",
        bids,
        out,
        "--to",
        "schaefer100",
        "--workers",
        "2",
    ]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(there, seconds=30.0):
    end = time.time() + seconds
    while not there():
        assert time.time() < end, "waited too long"
        time.sleep(0.002)


def check_after_kill(out, reference):
    "Either all of it is there, or nothing that looks like it."
    if out.exists():
        assert verify(out).ok and contents(out) == reference
    else:
        assert not verify(out).ok and not verify(partial_folder(out)).ok


FORKS = """
import os, sys
import nibabel, pandas, pyarrow.parquet, scipy.signal, scipy.interpolate, tqdm
from fmri_book import cli, formats, prepare, splits
bids = sys.argv[1]
for out in sys.stdin:   # the program with its imports done: each fork is one run of `fmri-book prepare`
    if (pid := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(cli.main(["prepare", bids, out.strip(), "--to", "schaefer100", "--workers", "0"]))
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Program:
    "Runs of the program without the second that Python needs to begin."

    def __init__(self, bids):
        command = [sys.executable, "-c", FORKS, bids]
        self.parent = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, out) -> int:
        self.parent.stdin.write(f"{out}\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(int(self.parent.stdout.readline()))


def test_sigkill_at_20_moments_loses_nothing(bids_once, tmp_path):
    program, calm = Program(bids_once), tmp_path / "calm"
    for out in (tmp_path / "warm", calm):
        begun = time.time()
        program.start(out)
        assert program.wait() == 0
    runtime, reference = time.time() - begun, contents(calm)
    rng, killed, kept = random.Random(0), 0, set()
    for k in range(20):
        out = tmp_path / f"out{k}"
        pid = program.start(out)
        time.sleep(runtime * (k + rng.random()) / 20)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was faster than the undisturbed one
        killed += program.wait() == -signal.SIGKILL
        check_after_kill(out, reference)
        program.start(out)
        assert program.wait() == 0 and contents(out) == reference and not partial_folder(out).exists()
        seen = journal(tmp_path / f"out{k}.journal.jsonl")
        begins, ends = seen[seen["what"] == "begin"], seen[seen["what"] == "end"]
        assert (ends["key"].value_counts() <= 1 + (begins["kept"].diff() < 0).sum()).all()
        kept.add(int(begins["kept"].iloc[-1]))
    assert killed >= 14 and len(kept) >= 3  # the kills did fall before, between and after the runs
    program.parent.stdin.close()
    program.parent.wait()


def test_sigkill_of_the_command_takes_its_workers_along(bids_once, tmp_path):
    out, children = tmp_path / "out", []
    for moment in (0.3, 1.2):
        process = start(bids_once, out)
        wait_for(lambda: partial_folder(out).exists() or out.exists())
        time.sleep(moment)
        children += psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        assert not (partial_folder(out) / "MANIFEST.json").exists()
        assert out.exists() or not verify(out).ok
    psutil.wait_procs(children, timeout=10)
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children), (
        "workers outlived their parent"
    )
    assert start(bids_once, out).wait() == 0 and verify(out).ok
    calm = prepare(bids_once, tmp_path / "calm", to="schaefer100", **HERE)
    assert contents(out) == contents(calm.out)


# ------------------------------------------------------------------------------------------------------ the real files


@real
def test_haxby_keeps_its_events(tmp_path):
    src = SHARED / "haxby2001_small" / "haxby2001"
    report = prepare(src, tmp_path / "haxby", to="volume", pattern="bold_25mm*", tr=None, **HERE)
    assert report.counts == {"done": 12} and verify(report.out).ok
    store = Store(report.out)
    assert set(store.index["tr"]) == {2.5} and set(store.index["frames"]) == {121}
    told = pd.read_csv(next(src.rglob("task001_run001/bold_events.tsv")), sep="\t")
    found = store.events(store.find(run="001")[0])
    assert list(found["trial_type"]) == list(told["trial_type"]) and np.allclose(
        found["onset"], told["onset"]
    )
    image = nib.load(next(src.rglob("task001_run001/bold_25mm.nii.gz")))
    values = nib.as_closest_canonical(image).get_fdata()[tuple(store.layout.sites.voxels.T)].T
    np.testing.assert_allclose(
        store.record(store.find(run="001")[0]).values, values, atol=0.01 * values.std(0).max()
    )


@real
def test_small_files_are_named_with_the_reason(tmp_path):
    report = prepare(SHARED / "nifti_small", tmp_path / "small", to="volume", **HERE)
    assert report.counts == {"refused": 3} and report.exit_status == 1 and not report.out.exists()
    assert report.table["reason"].str.contains("length: expected at least 60 s").all()


@real
def test_sixty_sessions_of_schaefer_1000(tmp_path):
    options = IngestOptions(source_tr=2.0)
    report = prepare(
        SHARED / "tbi_ds000220", tmp_path / "tbi", to="schaefer1000", options=options, tr=None, **HERE
    )
    assert report.counts == {"done": 60} and verify(report.out).ok
    store, row = Store(report.out), report.table.iloc[0]
    with np.load(SHARED / "tbi_ds000220" / "tbi_schaefer1000_60sessions.npz") as stored:
        member = row["file"].split("[")[1].rstrip("]")
        values = stored[member]
    made = store.record(list(store.index["key"]).index(row["key"]))
    np.testing.assert_allclose(made.values, values, atol=0.01 * values.std(0).max())


@pytest.mark.parametrize(("to", "format"), [("flat", "wds"), ("schaefer400", "arrow"), ("schaefer400", "h5")])
def test_the_shipped_recording_in_every_published_form(tmp_path, to, format):
    mgz = package_file("brainspace", "datasets", "preprocessing")
    options = IngestOptions(source_tr=1.4)
    report = prepare(mgz, tmp_path / "out", to=to, format=format, options=options, **HERE)
    assert report.counts == {"done": 1} and verify(report.out).ok and formats.detect(report.out) == format
    record = next(iter(formats.open_source(report.out)))
    assert record.tr == 1.0 and record.n_frames == 912 and np.isfinite(record.values).all()
    assert record.values.shape[1] == (FlatMap.fsaverage5().n_pixels if to == "flat" else 400)
