"""Real files in: every layout and every decision, on simulated files with known content and on the real files of ../shared."""

import gzip
import json
import os
import pickle
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.cifti2 import BrainModelAxis, LabelAxis, ParcelsAxis, SeriesAxis

from fmri_book import data
from fmri_book import ingest as g
from fmri_book.data import Space
from fmri_book.ingest import IngestOptions, Refused, discover, examine, inspect_file, load

SHARED = Path(os.environ.get("FMRI_BOOK_SHARED", Path(__file__).parents[2] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real files at {SHARED}")
FRAMES = 60
MNI = np.array([[-4.0, 0, 0, 90], [0, 4, 0, -126], [0, 0, 4, -72], [0, 0, 0, 1]])  # LAS, as FSL writes
GRID = (46, 55, 46)


def level(decisions, check):
    return next((d.level for d in decisions if d.check == check), None)


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(1000, 50, shape).astype(np.float32)


def save_volume(path, values, affine=MNI, tr=2.0, code=4, units=("mm", "sec")):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units(*units)
    image.header.set_zooms((*image.header.get_zooms()[:3], tr, 1)[: values.ndim])
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nib.save(image, path)
    return path


def save_gifti(path, values, side):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.GiftiImage(meta=nib.gifti.GiftiMetaData({"AnatomicalStructurePrimary": f"Cortex{side}"}))
    for frame in values:
        image.add_gifti_data_array(nib.gifti.GiftiDataArray(frame.astype(np.float32), "NIFTI_INTENT_TIME_SERIES"))
    nib.save(image, path)
    return path


def brain_models():
    "Cortex without the medial wall, and a few thalamus voxels, as in a 91k file; the right side first, to catch assumed orders."
    cortex = Space.named("fsLR_32k").cortex
    left, right = np.split(cortex, 2)
    models = BrainModelAxis.from_surface(np.flatnonzero(right), 32492, "CIFTI_STRUCTURE_CORTEX_RIGHT")
    models += BrainModelAxis.from_mask(np.ones((2, 2, 2), bool), name="THALAMUS_LEFT", affine=np.diag([2.0, 2, 2, 1]))
    return models + BrainModelAxis.from_surface(np.flatnonzero(left), 32492, "CIFTI_STRUCTURE_CORTEX_LEFT")


def save_cifti(path, values, axis, tr=0.72):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Cifti2Image(values, (SeriesAxis(0, tr, len(values), "SECOND"), axis)), path)
    return path


def confounds_table(frames=FRAMES, non_steady=0, outliers=()):
    "Simulated confounds under fMRIPrep's names."
    rng = np.random.default_rng(5)
    table = {}
    base = [f"{k}_{a}" for k in ("trans", "rot") for a in "xyz"] + ["white_matter", "csf", "global_signal"]
    for name in base:
        values = rng.normal(0, 0.01, frames).cumsum()
        table[name], table[f"{name}_power2"] = values, values**2
        step = np.concatenate([[np.nan], np.diff(values)])
        table[f"{name}_derivative1"], table[f"{name}_derivative1_power2"] = step, step**2
    table["framewise_displacement"] = np.where(np.isin(np.arange(frames), outliers), 1.2, 0.1)
    table["std_dvars"] = 1.0 + 0 * table["framewise_displacement"]
    for k in range(2):
        table[f"cosine{k:02d}"] = np.cos(np.pi * (k + 1) * (np.arange(frames) + 0.5) / frames)
    for k in range(non_steady):
        table[f"non_steady_state_outlier{k:02d}"] = (np.arange(frames) == k).astype(float)
    for k, frame in enumerate(outliers):
        table[f"motion_outlier{k:02d}"] = (np.arange(frames) == frame).astype(float)
    return pd.DataFrame(table)


@pytest.fixture
def study(simulated_study, tmp_path):
    "A copy of the simulated study that a test may break."
    return Path(shutil.copytree(simulated_study, tmp_path / "study"))


@pytest.fixture(scope="session")
def simulated_study(tmp_path_factory):
    "A simulated BIDS data set: raw events, and fMRIPrep-like derivatives of one recording in four spaces."
    raw = tmp_path_factory.mktemp("simulated") / "study"
    func = raw / "derivatives" / "fmriprep" / "sub-01" / "ses-a" / "func"
    stem = "sub-01_ses-a_task-nback_run-1"
    events = raw / "sub-01" / "ses-a" / "func" / f"{stem}_events.tsv"
    events.parent.mkdir(parents=True)
    events.write_text("onset\tduration\ttrial_type\n30.0\t2\tzeroback\n2.0\t1.0\ttwoback\n10.5\tn/a\ttwoback\n")
    brain = np.zeros(GRID, np.uint8)
    brain[8:38, 8:47, 8:38] = 1
    save_volume(func / f"{stem}_space-MNI152NLin6Asym_res-2_desc-preproc_bold.nii.gz", noise((*GRID, FRAMES)))
    save_volume(func / f"{stem}_space-MNI152NLin6Asym_res-2_desc-brain_mask.nii.gz", brain)
    for side, name in (("L", "Left"), ("R", "Right")):
        save_gifti(func / f"{stem}_hemi-{side}_space-fsaverage5_bold.func.gii", noise((FRAMES, 10242), ord(side)), name)
        (func / f"{stem}_hemi-{side}_space-fsaverage5_bold.json").write_text('{"RepetitionTime": 2.0}')
    models = brain_models()
    save_cifti(func / f"{stem}_space-fsLR_den-91k_bold.dtseries.nii", noise((FRAMES, len(models))), models, 2.0)
    for space in ("space-MNI152NLin6Asym_res-2_desc-preproc", "space-fsLR_den-91k"):
        (func / f"{stem}_{space}_bold.json").write_text('{"RepetitionTime": 2.0, "StartTime": 0.9}')
    confounds_table(non_steady=2, outliers=(20,)).to_csv(func / f"{stem}_desc-confounds_timeseries.tsv", sep="\t", index=False)
    (func / f"{stem}_desc-confounds_timeseries.json").write_text("{}")
    return raw


# --- discovery


@pytest.mark.parametrize(
    "to, kind, space",
    [
        ("flat", "grayordinates", "fsLR_32k"),
        ("schaefer400", "grayordinates", "fsLR_32k"),
        ("fsaverage5", "surface", "fsaverage5"),
        ("volume", "volume", "MNI152NLin6Asym"),
        ("MNI152NLin6Asym_4mm", "volume", "MNI152NLin6Asym"),
        (None, "grayordinates", "fsLR_32k"),
    ],
)
def test_the_form_of_a_recording_follows_the_target(study, to, kind, space):
    found = discover(study, to=to)
    (source,) = found.sources
    assert (source.kind, source.space, source.scheme) == (kind, space, "bids")
    assert source.key == "sub-01_ses-a_task-nback_run-1"
    assert source.events.name.endswith("events.tsv") and source.confounds.name.endswith("timeseries.tsv")
    assert g._json(source.sidecar)["RepetitionTime"] == 2.0
    others = [p for p in found.problems if p.level == "not needed" and "another form" in p.what]
    assert len(others) == 2 and all(source.files[0].name in p.what for p in others)


def test_an_atlas_decides_between_volumes_and_grayordinates(study):
    assert discover(study, to="parcels", atlas="a.nii.gz").sources[0].kind == "volume"
    assert discover(study, to="parcels", atlas="a.dlabel.nii").sources[0].kind == "grayordinates"


def test_a_missing_hemisphere_is_named(study):
    right = next(study.rglob("*hemi-R*.gii"))
    right.unlink()
    found = discover(study, to="fsaverage5")
    assert found.sources[0].kind == "grayordinates"
    assert any("found no R" in p.what and p.level == "refuse" for p in found.problems)


def test_the_same_recording_twice_is_refused_and_both_are_named(tmp_path):
    for folder in ("site1", "site2"):
        save_volume(tmp_path / folder / "sub-01_task-rest_bold.nii.gz", noise((4, 4, 4, 20)))
    found = discover(tmp_path)
    assert not found.sources
    (problem,) = found.problems
    assert problem.level == "refuse" and "site1" in problem.what and "site2" in problem.what


def test_several_versions_in_one_folder_need_a_pattern(tmp_path):
    folder = tmp_path / "sub001" / "BOLD" / "task001_run001"
    save_volume(folder / "bold_25mm.nii.gz", noise((4, 4, 4, 20)))
    save_volume(folder / "bold_1slice.nii.gz", noise((4, 4, 1, 20)))
    (problem,) = discover(tmp_path).problems
    assert "bold_1slice" in problem.what and "bold_25mm" in problem.what and "--pattern" in problem.remedy
    (source,) = discover(tmp_path, pattern="bold_25mm*").sources
    assert source.key == "sub-001_task-001_run-001" and source.scheme == "openfmri"


def test_acquisitions_are_recordings_and_echoes_are_versions(tmp_path):
    for extra in ("acq-AP", "acq-PA"):
        save_volume(tmp_path / f"sub-1_task-rest_{extra}_bold.nii.gz", noise((4, 4, 4, 20)))
    assert [s.run for s in discover(tmp_path).sources] == ["acq-AP", "acq-PA"]
    for echo in "12":
        save_volume(tmp_path / f"sub-2_task-rest_echo-{echo}_bold.nii.gz", noise((4, 4, 4, 20)))
    assert any("2 in one folder" in p.what for p in discover(tmp_path).problems)


def test_events_of_another_study_are_not_borrowed(tmp_path):
    other = tmp_path / "other" / "sub-01" / "func" / "sub-01_task-rest_events.tsv"
    other.parent.mkdir(parents=True)
    other.write_text("onset\tduration\ttrial_type\n1\t1\tx\n")
    save_volume(tmp_path / "mine" / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz", noise((4, 4, 4, 20)))
    (source,) = discover(tmp_path / "mine").sources
    assert source.events is None


def test_hcp_folders_prefer_the_cleaned_version(tmp_path):
    base = tmp_path / "100307" / "MNINonLinear" / "Results"
    models = brain_models()
    for version in ("_Atlas_MSMAll", "_Atlas_MSMAll_hp2000_clean_rclean_tclean"):
        values = noise((100, len(models)))
        save_cifti(base / "tfMRI_WM_LR" / f"tfMRI_WM_LR{version}.dtseries.nii", values, models)
    (base / "tfMRI_WM_LR" / "EVs").mkdir()
    (base / "tfMRI_WM_LR" / "EVs" / "2bk_faces.txt").write_text("36.1\t27.5\t1\n7.9\t27.5\t1\n")
    (base / "tfMRI_WM_LR" / "EVs" / "Sync.txt").write_text("12.3")
    np.savetxt(base / "tfMRI_WM_LR" / "Movement_Regressors.txt", np.random.default_rng(0).normal(size=(100, 12)))
    found = discover(tmp_path, to="flat")
    (source,) = found.sources
    assert source.key == "sub-100307_task-WM_run-LR" and "clean" in source.files[0].name
    assert any("another form" in p.what for p in found.problems)
    run, decisions = load(source, "flat", IngestOptions(confounds="motion"))
    assert run.tr == 0.72 and run.space == "fsLR_32k" and run.bold.shape == (100, 64984)
    assert list(run.events.onset) == [7.9, 36.1] and set(run.events.trial_type) == {"2bk_faces"}
    assert {k: run.meta[k] for k in ("mod", "task", "mag", "dir")} == dict(mod="tfMRI", task="WM", mag="3T", dir="LR")
    assert level(decisions, "event files") == "note" and level(decisions, "confounds") == "ok"


def test_uk_biobank_folders(tmp_path):
    inside = tmp_path / "1000011_20227_2_0" / "fMRI" / "rfMRI.ica"
    save_volume(inside / "filtered_func_data_clean.nii.gz", noise((6, 6, 6, 100)), np.diag([2.4, 2.4, 2.4, 1]), 0.735, 1)
    save_volume(inside / "filtered_func_data_clean_MNI.nii.gz", np.zeros((*GRID, 100), np.int16), MNI, 0.735, 4)
    save_volume(tmp_path / "1000022" / "fMRI" / "filtered_func_data_clean_MNI.nii.gz", np.zeros((*GRID, 100), np.int16), MNI, 0.735)
    np.savetxt(tmp_path / "1000033_20227_2_0.dat", noise((100, 424)))
    found = discover(tmp_path, to="volume")
    keys = {s.key: s for s in found.sources}
    assert set(keys) == {"sub-1000011_ses-2_task-rest", "sub-1000022_task-rest", "sub-1000033_ses-2_task-rest"}
    assert keys["sub-1000011_ses-2_task-rest"].files[0].name.endswith("_MNI.nii.gz")
    assert examine(keys["sub-1000022_task-rest"], to="volume").facts["tr"] == pytest.approx(0.735)
    table = keys["sub-1000033_ses-2_task-rest"]
    assert table.kind == "parcels" and "424 columns" in " ".join(examine(table).reasons)


def empty(root, *names):
    "Files without content: discovery reads names only."
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_combined_echoes_are_preferred_and_phase_is_named(tmp_path):
    stem = "sub-1/func/sub-1_task-rest"
    empty(tmp_path, *(f"{stem}_{e}part-mag_desc-preproc_bold.nii.gz" for e in ("echo-1_", "echo-2_", "")))
    empty(tmp_path, f"{stem}_part-phase_bold.nii.gz", f"{stem}_part-mag_desc-confounds_regressors.tsv")
    found = discover(tmp_path)
    (source,) = found.sources
    assert "echo" not in source.files[0].name and source.confounds.name.endswith("regressors.tsv")
    assert any("the phase part" in p.what for p in found.problems)


def test_templates_of_children_are_another_form_not_another_recording(tmp_path):
    spaces = ("MNIPediatricAsym_cohort-2_res-2", "MNI152NLin2009cAsym_res-2", "MNI152NLin2009cAsym_res-native")
    empty(tmp_path, *(f"sub-1/func/sub-1_task-rest_space-{s}_desc-preproc_bold.nii.gz" for s in spaces))
    (source,) = discover(tmp_path, to="schaefer400").sources
    assert source.key == "sub-1_task-rest" and "2009cAsym_res-2" in source.files[0].name


def test_runs_that_fmriprep_renumbered_keep_their_events(tmp_path):
    empty(tmp_path, "derivatives/fmriprep/sub-1/func/sub-1_task-nback_run-1_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    empty(tmp_path, "sub-1/func/sub-1_task-nback_run-01_events.tsv", "sub-1/func/sub-1_task-nback_run-10_events.tsv")
    (source,) = discover(tmp_path / "derivatives" / "fmriprep").sources
    assert source.events.name == "sub-1_task-nback_run-01_events.tsv"


def test_a_task_without_events_is_noted(tmp_path):
    for task in ("nback", "rest"):
        save_volume(tmp_path / f"sub-1_task-{task}_space-MNI152NLin6Asym_bold.nii.gz", noise((*GRID, 40)))
    nback, rest = (examine(s, to="schaefer100") for s in discover(tmp_path).sources)
    assert level(nback.decisions, "events") == "note" and not nback.refused
    assert level(rest.decisions, "events") is None


def test_linked_folders_are_entered_once(tmp_path):
    empty(tmp_path, "disk/sub-1/func/sub-1_task-rest_bold.nii.gz")
    study = tmp_path / "study"
    study.mkdir()
    (study / "sub-1").symlink_to(tmp_path / "disk" / "sub-1")
    (study / "again").symlink_to(study)  # a loop
    assert [s.key for s in discover(study).sources] == ["sub-1_task-rest"]


def test_a_subject_in_raw_form_only_is_named(tmp_path):
    empty(tmp_path, "sub-1/func/sub-1_task-rest_bold.nii.gz", "sub-2/func/sub-2_task-rest_bold.nii.gz")
    assert not [p for p in discover(tmp_path).problems if p.level == "note"]
    empty(tmp_path, "derivatives/fmriprep/sub-1/func/sub-1_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    (problem,) = [p for p in discover(tmp_path).problems if p.level == "note"]
    assert problem.where == "sub-2_task-rest" and "1 of 2" in problem.what


def test_hcp_products_visits_and_concatenations(tmp_path):
    for visit in ("V1", "V2"):
        results = f"HCA6002236_{visit}_MR/MNINonLinear/Results"
        for ending in (".nii.gz", "_hp2000_clean.nii.gz", "_hp2000_clean_vn.nii.gz", "_Atlas_MSMAll_hp2000_clean_vn.dscalar.nii"):
            empty(tmp_path, f"{results}/rfMRI_REST1_AP/rfMRI_REST1_AP{ending}")
        empty(tmp_path, f"{results}/rfMRI_REST/rfMRI_REST_hp0_clean.nii.gz")
    found = discover(tmp_path, to="volume")
    assert [s.key for s in found.sources] == [f"sub-HCA6002236_ses-{v}_task-REST1_run-AP" for v in ("V1", "V2")]
    assert {s.files[0].name for s in found.sources} == {"rfMRI_REST1_AP_hp2000_clean.nii.gz"}
    assert any("one by one" in p.what and "2 files" in p.what for p in found.problems)
    assert any("CIFTI map" in p.what for p in found.problems)
    (alone,) = discover(tmp_path / f"{results}/rfMRI_REST/rfMRI_REST_hp0_clean.nii.gz").sources
    assert alone.task == "REST"
    empty(tmp_path / "other", *(f"patient_{k}/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz" for k in (1, 2)))
    assert [s.subject for s in discover(tmp_path / "other").sources] == ["patient_1", "patient_2"]


def test_uk_biobank_tasks_and_summaries(tmp_path):
    for name in ("rfMRI.ica/filtered_func_data_clean", "rfMRI.ica/mean_func", "rfMRI_SBREF", "tfMRI.feat/filtered_func_data", "tfMRI"):
        empty(tmp_path, f"1000012/fMRI/{name}.nii.gz")
    empty(tmp_path, "1000012_25750_2_0.txt", "1000012_25753_2_0.txt")
    found = discover(tmp_path)
    assert [(s.task, s.files[0].parent.name) for s in found.sources] == [("faces", "tfMRI.feat"), ("rest", "rfMRI.ica")]
    assert not [p for p in found.problems if "expected" in p.what]


@pytest.mark.parametrize("space, vertices", [("fsaverage6", 40962), ("fsaverage", 163842)])
def test_finer_surfaces_are_refused_with_a_remedy(tmp_path, space, vertices):
    for side, name in (("L", "Left"), ("R", "Right")):
        save_gifti(tmp_path / f"sub-1_task-rest_hemi-{side}_space-{space}_bold.func.gii", noise((20, vertices)), name)
    (reason,) = examine(discover(tmp_path).sources[0], to="flat").reasons
    assert str(vertices) in reason and "mri_surf2surf" in reason


def test_confounds_are_not_removed_twice(study):
    folder = study / "derivatives" / "fmriprep" / "sub-01" / "ses-a" / "func"
    (cleaned,) = folder.glob("*desc-preproc_bold.nii.gz")
    cleaned = cleaned.rename(cleaned.with_name(cleaned.name.replace("preproc", "denoised")))
    (source,) = discover(folder, pattern="*denoised_bold.nii.gz").sources
    assert source.confounds is not None and not examine(source).refused
    (reason,) = examine(source, options=IngestOptions(confounds="simple")).reasons
    assert "desc-denoised" in reason and "--confounds none" in reason


def test_what_a_header_says_about_its_numbers(tmp_path):
    path = save_volume(tmp_path / "sub-1_task-rest_bold.nii", noise((8, 8, 8, 40)).astype(np.complex64))
    assert "complex" in examine(discover(path).sources[0]).reasons[0]
    path = save_volume(tmp_path / "sub-2_task-rest_bold.nii", noise((8, 8, 8, 40)))
    image = nib.load(path)
    image.header.set_intent("z score")
    nib.save(image, tmp_path / "sub-3_task-rest_bold.nii")
    seen = examine(discover(tmp_path / "sub-3_task-rest_bold.nii").sources[0])
    assert not seen.refused and level(seen.decisions, "intent") == "note"


def test_bridging_leaves_the_good_frames_as_they_are_without_it(study):
    source = discover(study, to="schaefer100").sources[0]
    kept, bridged = (load(source, "schaefer100", IngestOptions(confounds="simple", censor=c))[0] for c in ("keep", "interpolate"))
    good = np.setdiff1d(np.arange(58), kept.meta["censored"])
    assert len(good) == 57
    np.testing.assert_array_equal(kept.bold[good], bridged.bold[good])
    np.testing.assert_allclose(bridged.bold[18], (bridged.bold[17] + bridged.bold[19]) / 2, rtol=1e-5)


def test_confounds_equal_nilearn(study):
    "The regression of a named strategy against nilearn.signal.clean on the frames that were kept."
    from nilearn.interfaces.fmriprep import load_confounds_strategy
    from nilearn.signal import clean

    source = discover(study, to="volume").sources[0]
    plain, _ = load(source, "volume")
    run, _ = load(source, "volume", IngestOptions(confounds="scrubbing"))
    regressors, _ = load_confounds_strategy(str(source.files[0]), denoise_strategy="scrubbing")
    good = np.setdiff1d(np.arange(58), run.meta["censored"])
    wanted = clean(plain.bold[good], confounds=regressors.to_numpy()[2:][good], detrend=False, standardize=None)
    centred = run.bold[good] - run.bold[good].mean(0, dtype=np.float64)
    np.testing.assert_allclose(centred, wanted - wanted.mean(0), atol=1e-3)


def test_region_means_equal_nilearn(tmp_path):
    "On a grid that the atlas does not share, against nilearn's masker with the atlas brought to the run's grid."
    from nilearn.image import resample_to_img
    from nilearn.maskers import NiftiLabelsMasker

    values = noise((*GRID, 30))
    shifted = MNI + np.array([[0, 0, 0, 0.4], [0, 0, 0, 0.7], [0, 0, 0, 0.4], [0, 0, 0, 0]])
    blocks = np.add.outer(np.add.outer(np.arange(91) // 10, 10 * (np.arange(109) // 12)), 100 * (np.arange(91) // 10)) % 40
    blocks = np.pad(blocks[4:-4, 4:-4, 4:-4], 4)  # at the very edge the two differ in what is still inside
    atlas = save_volume(tmp_path / "blocks.nii.gz", blocks.astype(np.int16), np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]]))
    path = save_volume(tmp_path / "sub-1_task-rest_space-MNI152NLin6Asym_bold.nii.gz", values, shifted)
    run, _ = load(discover(path).sources[0], "parcels", IngestOptions(atlas=atlas))
    here = resample_to_img(nib.load(atlas), nib.load(path), interpolation="nearest", force_resample=True, copy_header=True)
    wanted = NiftiLabelsMasker(here, standardize=None).fit_transform(path)
    np.testing.assert_allclose(run.bold, wanted, rtol=1e-5)


def test_plain_arrays(tmp_path):
    np.savez(tmp_path / "many.npz", **{"A01_ses-1": noise((100, 200)), "A01_ses-2": noise((100, 200), 1)})
    np.save(tmp_path / "one.npy", noise((100, 1000)))
    found = discover(tmp_path)
    assert [s.key for s in found.sources] == ["sub-A01_ses-1", "sub-A01_ses-2", "sub-one"]
    run, decisions = load(found.sources[1], "schaefer200", IngestOptions(source_tr=2))
    np.testing.assert_array_equal(run.bold, noise((100, 200), 1))
    assert level(decisions, "space") == "note"
    with pytest.raises(Refused, match="source-tr"):
        load(found.sources[0], "schaefer200")
    wrong = discover(tmp_path / "one.npy", source_space="schaefer400").sources[0]
    assert "1000 columns" in examine(wrong).reasons[0]


def test_names_with_spaces_and_accents_and_hemispheres_in_front(tmp_path):
    folder = tmp_path / "Zoë Müller 研究"
    folder.mkdir()
    np.save(folder / "été 1.npy", noise((100, 400)))
    for side in ("lh", "rh"):
        for run in "12":
            values = noise((10242, 1, 1, 50), int(run) + ord(side[0]))
            nib.save(nib.MGHImage(values, np.eye(4)), folder / f"{side}.run{run}.mgz")
    sources = discover(tmp_path).sources
    assert [s.key for s in sources] == [f"sub-Zoë Müller 研究-{name}" for name in ("run1", "run2", "été 1")]
    run, _ = load(sources[1], "surface", IngestOptions(source_tr=2.0))
    np.testing.assert_array_equal(run.bold[:, 10242:], noise((10242, 1, 1, 50), 2 + ord("r"))[:, 0, 0].T)


def test_what_is_not_here_or_not_readable_is_a_problem(tmp_path):
    (tmp_path / "annexed.nii.gz").symlink_to(tmp_path / "nowhere" / "MD5E-s1.nii.gz")
    (tmp_path / "empty.nii").write_bytes(b"")
    problems = discover(tmp_path).problems
    assert [p.level for p in problems] == ["refuse", "refuse"]
    assert "datalad" in problems[0].what and "empty.nii" in problems[1].where
    with pytest.raises(FileNotFoundError, match="nothing at"):
        discover(tmp_path / "absent")


def test_analyze_images_have_no_left(tmp_path):
    nib.save(nib.AnalyzeImage(noise((6, 6, 6, 40)), np.eye(4)), tmp_path / "a_bold.img")
    assert "cannot be known" in " ".join(examine(discover(tmp_path).sources[0]).reasons)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.fixed_dictionaries(
        {k: st.text("abcXYZ0123456789é", min_size=1, max_size=6) for k in ("sub", "task")},
        optional={k: st.text("abc019", min_size=1, max_size=4) for k in ("ses", "acq", "run", "desc")},
    )
)
def test_entities_come_back_from_a_name(parts):
    name = "_".join(f"{k}-{v}" for k, v in parts.items()) + "_bold.nii.gz"
    assert g.entities(name) == parts | {"suffix": "bold"}


# --- time


@pytest.mark.parametrize(
    "header, sidecar, option, used, found",
    [
        (2.0, None, None, 2.0, "ok"),
        (2.0, 2.01, None, 2.01, "ok"),
        (2.0, 2.2, None, 2.2, "note"),
        (2.0, 2.2, 1.5, 1.5, "note"),
        (1.0, 0.8, None, 0.8, "note"),
        (1.0, None, None, None, "refuse"),
        (0.0, None, None, None, "refuse"),
        (2000.0, None, None, None, "refuse"),
        (None, None, None, None, "refuse"),
        (None, 2000, None, None, "refuse"),
        (float("nan"), None, None, None, "refuse"),
        (1.0, None, 1.0, 1.0, "ok"),
    ],
)
def test_repetition_time(header, sidecar, option, used, found):
    tr, rows = g.decide_tr(header, sidecar, option)
    assert tr == used and rows[0].level == found
    assert found != "refuse" or "--source-tr" in rows[0].decision


@given(st.floats(0.2, 15), st.floats(0.2, 15))
def test_the_sidecar_wins_and_a_difference_is_always_noted(header, sidecar):
    tr, rows = g.decide_tr(header, sidecar)
    assert tr == sidecar
    assert (rows[0].level == "note") == (abs(header - sidecar) > 0.01 * sidecar)


def test_units_of_time_and_space(tmp_path):
    path = save_volume(tmp_path / "a_bold.nii.gz", noise((6, 6, 6, 40)), np.diag([3e-3, 3e-3, 3e-3, 1]), 2000, 1, ("meter", "msec"))
    seen = examine(discover(path).sources[0], to="volume")
    assert seen.facts["tr"] == 2.0 and seen.facts["voxel_mm"] == [3, 3, 3]
    assert level(seen.decisions, "length unit") == level(seen.decisions, "time unit") == "note"


def test_too_short_runs_say_so_even_without_a_repetition_time(tmp_path):
    path = save_volume(tmp_path / "a_bold.nii.gz", noise((6, 6, 6, 10)), tr=0)
    reasons = " ".join(examine(discover(path).sources[0]).reasons)
    assert "10 frames" in reasons and "--source-tr" in reasons


def test_first_frames_are_dropped_and_events_move(study):
    source = discover(study, to="fsaverage5").sources[0]
    run, decisions = load(source, "fsaverage5")
    assert run.n_frames == FRAMES - 2 and run.meta["dropped_frames"] == 2
    assert list(run.events.trial_type) == ["twoback", "zeroback"] and list(run.events.onset) == [6.5, 26.0]
    assert level(decisions, "first frames") == level(decisions, "event onsets") == "note"
    assert run.meta["censored"] == [18]  # frame 20 of the file
    np.testing.assert_array_equal(run.bold[:, :10242], noise((FRAMES, 10242), ord("L"))[2:])
    kept, _ = load(source, "fsaverage5", IngestOptions(drop_first=0))
    assert kept.n_frames == FRAMES and len(kept.events) == 3 and kept.events.onset[0] == 2.0


# --- confounds


@pytest.mark.parametrize("strategy", ["motion", "simple", "scrubbing"])
@pytest.mark.parametrize("to", ["fsaverage5", "schaefer100"])
def test_named_strategies_remove_what_they_name(study, strategy, to):
    source = discover(study, to=to).sources[0]
    run, decisions = load(source, to, IngestOptions(confounds=strategy))
    table = g.read_confounds(source, strategy)[0].regressors.to_numpy(float)[2:]
    kept = np.setdiff1d(np.arange(run.n_frames), run.meta["censored"])
    site = run.bold[kept][:, run.sites.cortex][:, :50].astype(float)
    if to != "schaefer100":  # regression is linear, but float32 parcels are rounded on the way
        design = table[kept] - table[kept].mean(0)
        left = design.T @ (site - site.mean(0))
        scale = np.linalg.norm(design, axis=0)[:, None] * np.linalg.norm(site - site.mean(0), axis=0) + 1e-9
        assert np.abs(left / scale).max() < 1e-3
    raw, _ = load(source, to)
    cortex = raw.sites.cortex
    np.testing.assert_allclose(run.bold[kept].mean(0)[cortex], raw.bold[kept].mean(0)[cortex], rtol=1e-4)  # raw units
    assert run.bold[kept][:, cortex].std(0).mean() < 0.95 * raw.bold[kept][:, cortex].std(0).mean()
    assert level(decisions, "confounds") == "ok"


def test_a_strategy_that_the_table_cannot_serve_is_refused(study):
    source = discover(study, to="fsaverage5").sources[0]
    with pytest.raises(Refused, match="compcor"):
        load(source, "fsaverage5", IngestOptions(confounds="compcor"))
    for table in study.rglob("*timeseries.tsv"):
        table.unlink()
    source = discover(study, to="fsaverage5").sources[0]
    assert "no table" in " ".join(examine(source, options=IngestOptions(confounds="simple")).reasons)


def test_confounds_of_another_run_are_refused(study):
    confounds_table(FRAMES + 3).to_csv(next(study.rglob("*timeseries.tsv")), sep="\t", index=False)
    source = discover(study, to="fsaverage5").sources[0]
    for strategy in ("simple", "none"):  # without a strategy the table still says which frames to drop
        assert "63" in " ".join(examine(source, options=IngestOptions(confounds=strategy)).reasons)


def test_too_much_motion_is_refused_and_little_is_bridged(study):
    path = next(study.rglob("*timeseries.tsv"))
    confounds_table(outliers=range(10, 45)).to_csv(path, sep="\t", index=False)
    source = discover(study, to="fsaverage5").sources[0]
    assert level(examine(source).decisions, "motion") == "refuse"
    confounds_table(outliers=(10, 11)).to_csv(path, sep="\t", index=False)
    run, _ = load(source, "fsaverage5", IngestOptions(censor="interpolate"))
    raw, _ = load(source, "fsaverage5")
    np.testing.assert_allclose(run.bold[10], raw.bold[9] * 2 / 3 + raw.bold[12] / 3, rtol=1e-5)
    assert raw.meta["censored"] == [10, 11]


@given(st.lists(st.integers(0, 19), unique=True, max_size=15))
def test_bridging_changes_rejected_frames_only_and_stays_inside_the_data(rejected):
    values = noise((20, 3))
    out = g.fill_rejected(values, sorted(rejected)) if rejected else values
    kept = np.setdiff1d(np.arange(20), rejected)
    np.testing.assert_array_equal(out[kept], values[kept])
    assert out.min() >= values[kept].min() - 1e-3 and out.max() <= values[kept].max() + 1e-3


def test_filters_keep_the_mean(study):
    source, options = discover(study, to="volume").sources[0], dict(drop_first=0)
    run, decisions = load(source, "schaefer100", IngestOptions(high_pass=0.02, low_pass=0.1, **options))
    raw, _ = load(source, "schaefer100", IngestOptions(drop_first=0, censor="interpolate"))
    np.testing.assert_allclose(run.bold.mean(0), raw.bold.mean(0), rtol=1e-5)
    power = np.abs(np.fft.rfft(run.bold - run.bold.mean(0), axis=0)) ** 2
    band = np.fft.rfftfreq(FRAMES, 2.0) <= 0.15
    assert power[~band].sum() < 0.05 * power[band].sum() and level(decisions, "filter") == "ok"
    with pytest.raises(Refused, match="24 regressors"):  # of 58 frames, a band of 0.02 to 0.1 Hz leaves 19 numbers
        load(source, "schaefer100", IngestOptions(confounds="motion", high_pass=0.02, low_pass=0.1))


def test_compcor_and_aroma_through_nilearn(study):
    path = next(study.rglob("*timeseries.tsv"))
    table = confounds_table().assign(**{f"a_comp_cor_{k:02d}": noise(FRAMES, k) for k in range(3)})
    table.to_csv(path, sep="\t", index=False)
    retained = dict(Mask="combined", Method="aCompCor", Retained=True)
    path.with_suffix(".json").write_text(json.dumps({f"a_comp_cor_{k:02d}": retained for k in range(3)}))
    source = discover(study, to="volume").sources[0]
    run, _ = load(source, "schaefer100", IngestOptions(confounds="compcor"))
    z = (table["a_comp_cor_01"] - table["a_comp_cor_01"].mean()).to_numpy()
    assert np.abs(z @ run.bold).max() < 1e-3 * np.linalg.norm(z) * np.linalg.norm(run.bold, axis=0).max()
    assert "smoothAROMA" in " ".join(examine(source, options=IngestOptions(confounds="ica_aroma")).reasons)
    shutil.copy(source.files[0], str(source.files[0]).replace("desc-preproc", "desc-smoothAROMAnonaggr"))
    (aroma,) = discover(study, to="volume", pattern="*smoothAROMA*").sources
    _, decisions = load(aroma, "schaefer100", IngestOptions(confounds="ica_aroma"))
    assert level(decisions, "confounds") == "ok"


# --- surfaces and grayordinates


def test_cifti_is_expanded_by_its_own_brain_models(study):
    source = discover(study, to="flat").sources[0]
    run, _ = load(source, "flat", IngestOptions(drop_first=0))
    stored = noise((FRAMES, len(brain_models())))
    cortex = Space.named("fsLR_32k").cortex
    n_right = int(cortex[32492:].sum())
    np.testing.assert_array_equal(run.bold[:, np.flatnonzero(cortex[32492:]) + 32492], stored[:, :n_right])
    np.testing.assert_array_equal(run.bold[:, np.flatnonzero(cortex[:32492])], stored[:, n_right + 8 :])
    assert not run.bold[:, ~cortex].any() and run.meta["start_time"] == 0.9
    parcels, decisions = load(source, "schaefer100", IngestOptions(drop_first=0))
    np.testing.assert_allclose(parcels.bold, run.to("schaefer100").bold)
    assert level(decisions, "transfer") == "ok"  # labels are given on fsLR_32k


def test_unequal_or_swapped_hemispheres_are_refused(tmp_path):
    left = save_gifti(tmp_path / "x.L.func.gii", noise((40, 10242)), "Left")
    save_gifti(tmp_path / "x.R.func.gii", noise((39, 10242)), "Right")
    source = discover(left).sources[0]
    assert "39" in " ".join(examine(source).reasons)
    save_gifti(tmp_path / "x.R.func.gii", noise((40, 10242)), "Left")
    assert "wrong hemisphere" in " ".join(examine(source).reasons)
    save_gifti(tmp_path / "x.R.func.gii", noise((40, 5000)), "Right")
    assert "10242 left, 5000 right" in " ".join(examine(source).reasons)


def test_a_name_that_contradicts_the_vertices_is_refused(tmp_path):
    for side, name in (("L", "Left"), ("R", "Right")):
        save_gifti(tmp_path / f"sub-1_hemi-{side}_space-fsnative_bold.func.gii", noise((40, 10242)), name)
    reasons = examine(discover(tmp_path).sources[0]).reasons
    assert "fsnative" in reasons[0] and "fsaverage5" in reasons[0]


def test_one_hemisphere_of_cifti_is_refused(tmp_path):
    models = BrainModelAxis.from_surface(np.arange(32492), 32492, "CIFTI_STRUCTURE_CORTEX_LEFT")
    path = save_cifti(tmp_path / "a.dtseries.nii", noise((40, 32492)), models)
    assert "LEFT" in examine(discover(path).sources[0]).reasons[0]


def test_parcel_series_follow_their_names(tmp_path):
    names = np.array([f"7Networks_{n}" for n in data.parcel_names(100)])
    values = noise((100, 100))
    for label, order in (("right", np.arange(100)), ("wrong", np.roll(np.arange(100), 50))):
        axis = ParcelsAxis(names[order], [np.empty((0, 3), int)] * 100, [{}] * 100, np.eye(4), (2, 2, 2), {})
        save_cifti(tmp_path / f"{label}.ptseries.nii", values, axis)
    run, _ = load(discover(tmp_path / "right.ptseries.nii").sources[0], "schaefer100")
    np.testing.assert_array_equal(run.bold, values)
    with pytest.raises(Refused, match="RH_Vis_1"):
        load(discover(tmp_path / "wrong.ptseries.nii").sources[0], "schaefer100")


# --- volumes


def test_stored_order_never_matters(tmp_path):
    "The same brain written in LAS, RAS and with swapped axes gives the same run."
    values = noise((7, 8, 9, 40))
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = (-12, -10, -8)
    first = nib.Nifti1Image(values, affine)
    runs = []
    for axes in ("RAS", "LAS", "LPI", "SAR"):
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
        turned = first.as_reoriented(turn)
        assert "".join(nib.aff2axcodes(turned.affine)) == axes
        path = save_volume(tmp_path / f"{axes}_bold.nii.gz", np.asarray(turned.dataobj), turned.affine, 2.0, 1)
        run, decisions = load(discover(path).sources[0], "volume")
        assert level(decisions, "orientation") == ("ok" if axes == "RAS" else "note")
        runs.append(run)
    assert len({run.space for run in runs}) == 1
    for run in runs:
        np.testing.assert_array_equal(run.sites.to_grid(run.bold, 0), values.transpose(3, 0, 1, 2))


def test_blocks_give_what_one_read_gives(study):
    source = discover(study, to="volume").sources[0]
    a, b = (load(source, "schaefer100", IngestOptions(block=n))[0] for n in (7, 64))
    np.testing.assert_array_equal(a.bold, b.bold)
    assert discover(study, to="volume").sources[0].mask is not None


def test_point_weights_interpolate_linear_fields_exactly():
    affine = np.array([[3.0, 0.3, 0, -20], [-0.3, 3, 0, -30], [0, 0, 4, -10], [0, 0, 0, 1]])
    shape = (12, 14, 9)
    ijk = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    xyz = ijk @ affine[:3, :3].T + affine[:3, 3]
    field = xyz @ (1.0, -2.0, 0.5) + 7
    points = np.random.default_rng(0).uniform((2, 2, 2), (9, 11, 6), (50, 3)) @ affine[:3, :3].T + affine[:3, 3]
    weights = g.point_weights(points, affine, shape, np.ones(shape, bool))
    np.testing.assert_allclose(weights @ field, points @ (1.0, -2.0, 0.5) + 7, rtol=1e-5)


def test_a_painted_run_comes_back_from_its_volume(tmp_path):
    "Parcel values painted into MNI space, stored as LAS, read again: each parcel gets its own signal back."
    rng = np.random.default_rng(1)
    run = data.Run(rng.normal(100, 5, (40, 100)), 2.0, "schaefer100").to("MNI152NLin6Asym_4mm")
    grid = run.sites.to_grid(run.bold, 0).transpose(1, 2, 3, 0)
    image = nib.Nifti1Image(grid, run.sites.affine).as_reoriented([[0, -1], [1, 1], [2, 1]])
    path = save_volume(tmp_path / "sub-1_space-MNI152NLin6Asym_bold.nii.gz", np.asarray(image.dataobj), image.affine)
    source = discover(path).sources[0]
    back, _ = load(source, "schaefer100")
    np.testing.assert_allclose(back.bold, run.to("schaefer100").bold, rtol=1e-4)
    same, _ = load(source, "MNI152NLin6Asym_4mm")
    np.testing.assert_allclose(same.bold, run.bold, rtol=1e-6)


def test_an_mni_volume_becomes_a_surface_by_position_and_says_so(tmp_path):
    rng = np.random.default_rng(2)
    run = data.Run(rng.normal(100, 5, (40, 100)), 2.0, "schaefer100").to("MNI152NLin6Asym_2mm")
    grid = run.sites.to_grid(run.bold, 0).transpose(1, 2, 3, 0)
    path = save_volume(tmp_path / "sub-1_space-MNI152NLin6Asym_bold.nii.gz", grid, run.sites.affine)
    source = discover(path).sources[0]
    assert not examine(source, to="flat").refused
    surface, decisions = load(source, "surface")
    assert surface.space == "fsLR_32k" and "by position" in " ".join(d.decision for d in decisions if d.check == "target")
    np.testing.assert_allclose(surface.bold, run.to("fsLR_32k").bold, rtol=1e-4)
    found = {fit.model: fit for fit in inspect_file(path).models}["flat-map MAE"]
    assert found.option == "--to flat"


@pytest.mark.parametrize(
    "shape, code, what",
    [((6, 6, 6), 1, "single image"), ((6, 6, 6, 3, 40), 1, "not a series"), ((6, 6, 6, 40), 0, "cannot be known")],
)
def test_shapes_and_affines_that_cannot_be_used(tmp_path, shape, code, what):
    path = save_volume(tmp_path / "a_bold.nii.gz", noise(shape), code=code)
    assert what in " ".join(examine(discover(path).sources[0], to="volume").reasons)


def test_a_fifth_axis_of_length_one_is_left_out(tmp_path):
    path = save_volume(tmp_path / "a_bold.nii.gz", noise((6, 6, 6, 1, 40)), tr=1)
    run, decisions = load(discover(path).sources[0], "volume", IngestOptions(source_tr=2.0, source_space="native"))
    np.testing.assert_array_equal(run.sites.to_grid(run.bold, 0)[3, ::-1], noise((6, 6, 6, 1, 40))[..., 0, 3])
    assert level(decisions, "axes") == "note"


def test_scale_factors_are_applied(tmp_path):
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 200, (6, 6, 6, 40)).astype(np.int16), np.diag([3, 3, 3, 1.0]))
    image.header.set_slope_inter(0.5, 100)
    image.header.set_zooms((3, 3, 3, 2))
    nib.save(image, tmp_path / "a_bold.nii.gz")
    run, decisions = load(discover(tmp_path / "a_bold.nii.gz").sources[0], "volume")
    assert level(decisions, "scale") == "note" and 100 <= run.bold.min() and 150 < run.bold.max() <= 200


def test_numbers_that_are_not_numbers(tmp_path):
    values = noise((6, 6, 6, 40))
    values[2, 3, 4, 5] = np.nan
    values[0, 0, 0] = 5
    path = save_volume(tmp_path / "a_bold.nii.gz", values, code=1)
    mask = save_volume(tmp_path / "mask.nii.gz", np.ones((6, 6, 6), np.uint8), code=1)
    source = discover(path).sources[0]
    with pytest.raises(Refused, match="NaN or infinity at 1 of 215"):
        load(source, "volume", IngestOptions(source_space="native"))
    run, decisions = load(source, "volume", IngestOptions(nan="dead", mask=mask, source_space="native"))
    assert (np.ptp(run.bold, axis=0) == 0).sum() == run.allow_constant == 2
    assert level(decisions, "dead sites") == "note"
    with pytest.raises(Refused, match="at most 0%"):
        load(source, "volume", IngestOptions(nan="dead", mask=mask, source_space="native", max_dead=0))


def test_label_images_in_four_dimensions(tmp_path):
    labels = np.random.default_rng(0).integers(0, 30, (12, 12, 12, 40)).astype(np.int16)
    path = save_volume(tmp_path / "a_bold.nii.gz", labels)
    assert "label image" in inspect_file(path).what
    with pytest.raises(Refused, match="not BOLD"):
        load(discover(path).sources[0], "volume", IngestOptions(source_space="native"))
    still = np.repeat(noise((6, 6, 6, 1)), 40, 3)
    path = save_volume(tmp_path / "b_bold.nii.gz", still)
    with pytest.raises(Refused, match="not BOLD"):
        load(discover(path).sources[0], "volume", IngestOptions(source_space="native"))


def test_small_whole_numbers_around_zero_are_a_signal(tmp_path):
    "A demeaned run in int16: no labels, and a voxel that is 0 in the first frame by chance still counts."
    values = np.rint(np.random.default_rng(0).normal(0, 5, (*GRID, 40))).astype(np.int16)
    where = "sub-1_task-rest_space-MNI152NLin6Asym_bold.nii"
    runs = []
    for name, shift in (("zero", 0), ("high", 1000)):
        path = save_volume(tmp_path / name / where, (values + shift).astype(np.int16))
        runs.append(load(discover(path).sources[0], "schaefer100")[0].bold)
    assert (values[..., 0] == 0).mean() > 0.05
    np.testing.assert_allclose(runs[1] - runs[0], 1000, atol=1e-3)


def test_a_mask_on_another_grid_is_refused(tmp_path):
    path = save_volume(tmp_path / "a_bold.nii.gz", noise((6, 6, 6, 40)), code=1)
    mask = save_volume(tmp_path / "mask.nii.gz", np.ones((6, 6, 7), np.uint8), code=1)
    with pytest.raises(Refused, match=r"\(6, 6, 6\).*\(6, 6, 7\)"):
        load(discover(path).sources[0], "volume", IngestOptions(mask=mask))


def test_native_volumes_are_not_given_an_atlas(tmp_path):
    path = save_volume(tmp_path / "a_bold.nii.gz", noise((6, 6, 6, 40)), np.diag([3, 3, 3, 1.0]), code=1)
    source = discover(path).sources[0]
    for to in ("schaefer400", "MNI152NLin6Asym_2mm", "fsaverage5", "flat"):
        assert "native" in examine(source, to=to).reasons[0]
    assert not examine(source, to="volume").refused


# --- atlases


def test_an_atlas_of_ones_own(tmp_path):
    "Three boxes with known signals; one label without a voxel; numbers with gaps; the atlas on a finer grid than the run."
    fine = np.diag([2.0, 2, 2, 1])
    fine[:3, 3] = (-46, -46, -46)
    labels = np.zeros((46, 46, 46), np.int16)
    labels[2:16, 5:40, 5:40], labels[30:44, 5:40, 5:40], labels[20:26, 5:20, 5:20] = 7, 3, 12
    save_volume(tmp_path / "boxes.nii.gz", labels, fine)
    (tmp_path / "boxes.tsv").write_text("index\tname\n3\tright_R\n7\tleft_L\n12\tmiddle\n20\tnowhere_L\n")
    coarse = np.diag([4.0, 4, 4, 1])
    coarse[:3, 3] = (-46, -46, -46)
    signals = noise((40, 3), 9)
    values = np.zeros((23, 23, 23, 40), np.float32) + 1
    here = labels[::2, ::2, ::2]
    for number, column in zip((3, 7, 12), signals.T):
        values[here == number] = column
    path = save_volume(tmp_path / "sub-1_space-MNI152NLin6Asym_bold.nii.gz", values, coarse)
    options = IngestOptions(atlas=tmp_path / "boxes.nii.gz")
    run, decisions = load(discover(path).sources[0], "parcels", options)
    assert run.space == "boxes" and list(run.sites.names) == ["right_R", "left_L", "middle", "nowhere_L"]
    np.testing.assert_allclose(run.bold[:, :3], signals, rtol=1e-6)
    assert list(run.sites.hemisphere) == ["R", "L", "L", "L"] and not run.bold[:, 3].any()
    assert any("nowhere_L" in d.found for d in decisions if d.level == "note")
    assert "--atlas" in " ".join(examine(discover(path).sources[0], to="parcels").reasons)


def test_a_dlabel_atlas_is_matched_by_place(tmp_path):
    models = brain_models()
    left = models.name == "CIFTI_STRUCTURE_CORTEX_LEFT"
    labels = np.where(left, 1, np.where(models.name == "CIFTI_STRUCTURE_CORTEX_RIGHT", 2, 3))
    other = models[np.argsort(~left, kind="stable")]  # the atlas in another order than the run
    table = {k: (name, (0, 0, 0, 1)) for k, name in enumerate(("???", "all_L", "all_R", "thalamus_L"))}
    nib.save(nib.Cifti2Image(labels[np.argsort(~left, kind="stable")][None].astype(np.float32), (LabelAxis(["x"], [table]), other)), tmp_path / "sides.dlabel.nii")
    values = noise((100, len(models)))
    path = save_cifti(tmp_path / "a.dtseries.nii", values, models)
    run, _ = load(discover(path).sources[0], "parcels", IngestOptions(atlas=tmp_path / "sides.dlabel.nii"))
    wanted = np.stack([values[:, labels == k].mean(1) for k in (1, 2, 3)], 1)
    np.testing.assert_allclose(run.bold, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("one\n1 205 213 230 255\ntwo\n5 1 2 3 255\n", {1: "one", 5: "two"}),
        ("index\tname\tcolour\n1\tone\tred\n5\ttwo\tblue\n", {1: "one", 5: "two"}),
        ("1 one 10 20 30 0\n5 two 10 20 30 0\n", {1: "one", 5: "two"}),
        ("one\ntwo\n", {1: "one", 2: "two"}),
        ("index\tname\n0\tBackground\n1\tLeft Amygdala\n2\tRight Amygdala\n", {1: "Left Amygdala", 2: "Right Amygdala"}),
        ('name,index\n"Gyrus, left",3\n', {3: "Gyrus, left"}),
    ],
)
def test_lists_of_names(tmp_path, text, expected):
    (tmp_path / "names.txt").write_text(text)
    assert g.read_labels(tmp_path / "names.txt") == expected


# --- damage


def test_parcels_named_by_their_atlas(tmp_path):
    for subject, atlas, n in (("1", "Schaefer100", 100), ("2", "mine", 200)):
        np.save(tmp_path / f"sub-{subject}_ses-1_task-rest_atlas-{atlas}_bold.npy", noise((100, n)))
    first, second = discover(tmp_path).sources
    assert first.key == "sub-1_ses-1_task-rest" and (first.space, second.space) == ("schaefer100", "")
    assert [examine(s).facts["space"] for s in (first, second)] == ["schaefer100", "schaefer200"]


def test_one_grid_may_be_native_and_mni(tmp_path):
    path = save_volume(tmp_path / "a_bold.nii.gz", noise((6, 6, 6, 40)), code=1)
    mask = save_volume(tmp_path / "mask.nii.gz", np.ones((6, 6, 6), np.uint8), code=1)
    spaces = [
        load(discover(path).sources[0], "volume", IngestOptions(mask=mask, source_space=s))[0].sites
        for s in ("native", "MNI152NLin6Asym")
    ]
    assert [s.reference for s in spaces] == ["native", "MNI152"] and spaces[0].name != spaces[1].name


def test_truncated_files(tmp_path):
    path = save_volume(tmp_path / "a_bold.nii.gz", noise((20, 20, 20, 40)), code=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    source = discover(path, source_space="native").sources[0]
    with pytest.raises(Refused, match="cannot be read"):
        load(source, "volume")
    path.write_bytes(b"")
    assert "unknown" in inspect_file(path).what or inspect_file(path).models[0].works == "no"
    plain = tmp_path / "b_bold.nii"
    plain.write_bytes(gzip.decompress(whole)[:50_000])
    with pytest.raises(Refused, match="cannot be read"):
        load(discover(plain, source_space="native").sources[0], "volume")
    array = tmp_path / "c.npy"
    np.save(array, noise((100, 400)))
    array.write_bytes(array.read_bytes()[:1000])
    with pytest.raises(Refused):
        load(discover(array).sources[0], "schaefer400", IngestOptions(source_tr=2))


@pytest.mark.parametrize(
    "text, what",
    [("", "No columns"), ("time\tlabel\n1\tx\n", "no duration, onset"), ("onset\tduration\nsoon\t1\n", "not numbers"), ("onset\tduration\n3\t-1\n", "below 0")],
)
def test_damaged_event_tables_are_refused(study, text, what):
    next(study.rglob("*events.tsv")).write_text(text)
    source = discover(study, to="fsaverage5").sources[0]
    assert what in " ".join(examine(source).reasons)


def test_events_without_a_name_keep_their_place(tmp_path):
    (tmp_path / "x_events.tsv").write_bytes("onset\tduration\ttrial_type\r\n5\t2\tn/a\r\n1\t2\tface\r\n".encode("utf-8-sig"))
    events, decisions = g.read_events(tmp_path / "x_events.tsv")
    assert list(events.trial_type) == ["face", "n/a"] and level(decisions, "trial_type") == "note"


def test_a_sidecar_with_a_byte_order_mark_is_read(tmp_path):
    save_volume(tmp_path / "sub-1_task-rest_space-MNI152NLin6Asym_bold.nii.gz", noise((*GRID, 40)), tr=1.0)
    (tmp_path / "sub-1_task-rest_space-MNI152NLin6Asym_bold.json").write_bytes('{"RepetitionTime": 2.0}'.encode("utf-8-sig"))
    found = discover(tmp_path)
    assert examine(found.sources[0]).facts["tr"] == 2.0 and not found.problems


def test_a_broken_sidecar_is_reported(study):
    for path in study.rglob("*91k_bold.json"):
        path.write_text('{"RepetitionTime": 2.0')
    found = discover(study, to="flat")
    assert any("JSON" in p.what for p in found.problems)
    assert examine(found.sources[0]).facts["tr"] == 2.0  # the CIFTI header's own


def test_refusals_and_sources_travel_between_processes(study):
    source = discover(study, to="volume").sources[0]
    assert pickle.loads(pickle.dumps(source)) == source
    with pytest.raises(Refused) as caught:
        load(source, "schaefer100", IngestOptions(min_seconds=1e6))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.decisions == caught.value.decisions


def test_decisions_are_json_and_complete(study):
    run, decisions = load(discover(study, to="schaefer100").sources[0], "schaefer100")
    stored = json.loads(json.dumps(run.meta))
    assert len(stored["decisions"]) == len(decisions) and stored["history"][-1]["to"] == "schaefer100"
    assert {"orientation", "space", "TR"} & {d["check"] for d in stored["decisions"]} >= {"space", "TR"}


def test_options_are_checked():
    for bad in (dict(confounds="magic"), dict(max_censored=2), dict(source_tr=2000), dict(drop_first=-1), dict(nan="zero")):
        with pytest.raises(ValueError, match="expected"):
            IngestOptions(**bad)


def test_mixed_runs_are_reported_and_share_a_mask(tmp_path):
    a = save_volume(tmp_path / "sub-1_task-rest_bold.nii.gz", noise((6, 6, 6, 40)), code=1)
    values = noise((6, 6, 6, 40), 2)
    values[0] = 0
    save_volume(tmp_path / "sub-2_task-rest_bold.nii.gz", values, tr=2.5, code=1)
    sources = discover(tmp_path).sources
    problems = g.compare([examine(s) for s in sources])
    assert ["repetition times" in p.what for p in problems] == [True]
    mask = g.common_mask(sources, tmp_path / "shared_mask.nii.gz")
    spaces = {load(s, "volume", IngestOptions(mask=mask))[0].space for s in sources}
    assert len(spaces) == 1 and Space.named(spaces.pop()).n_sites == 5 * 36
    save_volume(a, noise((6, 6, 7, 40)), code=1)
    with pytest.raises(ValueError, match="grid"):
        g.common_mask(discover(tmp_path, pattern="sub*").sources, tmp_path / "x.nii.gz")


# --- inspection


def test_what_is_not_bold_is_called_by_its_name(study, tmp_path):
    anat = save_volume(tmp_path / "sub-1_T1w.nii.gz", noise((20, 20, 20)))
    assert "anatomical" in inspect_file(anat).what
    assert inspect_file(next(study.rglob("*brain_mask.nii.gz"))).what == "mask"
    assert inspect_file(next(study.rglob("*timeseries.tsv"))).what == "confounds table"
    assert inspect_file(next(study.rglob("*events.tsv"))).what == "events table"
    mesh = nib.GiftiImage(darrays=[nib.gifti.GiftiDataArray(np.zeros((4, 3), np.float32), 1008), nib.gifti.GiftiDataArray(np.zeros((2, 3), np.int32), 1009)])
    for name in ("lh.pial.gii", "lh.pial.surf.gii"):
        nib.save(mesh, tmp_path / name)
        assert inspect_file(tmp_path / name).what == "surface geometry"


def test_which_model_takes_what(study):
    def works(pattern):
        seen = inspect_file(next(study.rglob(pattern)), IngestOptions(min_seconds=10))
        assert seen.is_bold
        return {f.model: f.works for f in seen.models}

    assert works("*dtseries.nii")["flat-map MAE"] == "yes"
    assert works("*hemi-L*.gii") == {"flat-map MAE": "yes", "BrainLM": "no", "BrainMT": "no", "fMRI-LM": "no"}
    assert set(works("*preproc_bold.nii.gz").values()) == {"with option", "no"}  # 40 frames are too few for three


# --- the real files


@needs_shared
def test_haxby(tmp_path):
    folder = SHARED / "haxby2001_small" / "haxby2001"
    assert sum("in one folder" in p.what for p in discover(folder).problems) == 12
    sources = discover(folder, to="volume", pattern="bold_25mm*").sources
    assert len(sources) == 12
    runs = [load(s, "volume")[0] for s in sources]
    assert len({r.space for r in runs}) == 1 and {r.tr for r in runs} == {2.5}
    assert all(len(r.events) == 8 and r.n_frames == 121 for r in runs)
    stored = nib.as_closest_canonical(nib.load(sources[3].files[0])).get_fdata()
    mask = nib.as_closest_canonical(nib.load(folder / "sub001/masks/25mm/brain.nii.gz")).get_fdata() > 0
    np.testing.assert_array_equal(runs[3].bold, stored[mask].T.astype(np.float32))


@needs_shared
def test_small_niftis_are_too_small_and_say_why():
    for name, why in (("functional.nii", "20 frames × 2 s"), ("pcasl.nii.gz", "10 frames"), ("example4d.nii.gz", "2 frames")):
        seen = inspect_file(SHARED / "nifti_small" / name)
        assert why in " ".join(d.found for d in seen.decisions if d.level == "refuse")
    assert "2000 s" in " ".join(d.found for d in seen.decisions)


@needs_shared
def test_sixty_sessions():
    sources = discover(SHARED / "tbi_ds000220").sources
    assert len(sources) == 60 and len({s.subject for s in sources}) == 24
    run, _ = load(sources[0], "schaefer1000", IngestOptions(source_tr=2.0))
    with np.load(SHARED / "tbi_ds000220" / "tbi_schaefer1000_60sessions.npz") as stored:
        np.testing.assert_array_equal(run.bold, stored[sources[0].member])


@needs_shared
@pytest.mark.parametrize(
    "name, n", [("Schaefer2018_400Parcels_7Networks_order_Tian_Subcortex_S3_MNI152NLin6Asym_2mm", 450), ("A424+2mm", 424)]
)
def test_published_atlases(tmp_path, name, n):
    path = SHARED / "atlases" / f"{name}.nii.gz"
    atlas = g.read_atlas(path)
    assert atlas.space.n_sites == n and inspect_file(path).what == "atlas (label image)"
    image = nib.load(path)
    signals = noise((40, n + 1), 3)
    values = signals.T[np.asarray(image.dataobj).astype(int)[::2, ::2, ::2]]
    affine = image.affine @ np.diag([2, 2, 2, 1])
    volume = save_volume(tmp_path / "sub-1_space-MNI152NLin6Asym_bold.nii.gz", values, affine)
    run, decisions = load(discover(volume).sources[0], "parcels", IngestOptions(atlas=path))
    alive = np.ptp(run.bold, axis=0) > 0
    np.testing.assert_allclose(run.bold[:, alive], signals[:, 1:][:, alive], rtol=1e-5)
    assert alive.sum() > n - 12 and (alive.all() or level(decisions, "empty sites") == "note")
    if n == 450:
        assert not atlas.space.network[:50].any() and atlas.space.network[50:].all()
        assert np.array_equal(atlas.space.network[50:], data.parcel_networks(400))
        x = atlas.space.coords[:, 0]  # 'HIP-head-l-rh' is on the right
        assert np.array_equal(atlas.space.hemisphere[np.abs(x) > 3], np.where(x < 0, "L", "R")[np.abs(x) > 3])


def test_a_header_to_distrust():
    path = data._example_files()[0]
    source = discover(path).sources[0]
    assert "exactly 1 s" in examine(source).reasons[0]
    run, _ = load(source, "surface", IngestOptions(source_tr=1.4))
    np.testing.assert_array_equal(run.bold, data.load_example_run().bold)


@pytest.mark.parametrize("text", ['{"RepetitionTime": 2.0', "[2.0]", ""])
def test_a_broken_sidecar_is_refused_unless_the_user_gives_the_tr(tmp_path, text):
    save_volume(tmp_path / "sub-1_task-rest_space-MNI152NLin6Asym_bold.nii.gz", noise((6, 6, 6, 40)), tr=2.5)
    (tmp_path / "sub-1_task-rest_space-MNI152NLin6Asym_bold.json").write_text(text)
    source = discover(tmp_path).sources[0]
    assert source.sidecar is not None
    refused = examine(source, to="volume")
    assert refused.refused and "JSON object" in " ".join(refused.reasons) and "--source-tr" in " ".join(refused.reasons)
    told = examine(source, to="volume", options=IngestOptions(source_tr=2.5))
    assert not told.refused and level(told.decisions, "sidecar") == "note"
