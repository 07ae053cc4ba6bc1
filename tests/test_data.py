"""Runs, spaces, transfers: numbers against golden values and independent references, and the answers to bad input."""
import json
import sys
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from fmri_book import data
from fmri_book.data import Run, Space, transfer

# values computed once with the published code (float64), kept here so that a user's clone checks them too
RESAMPLED = {
    0.72: (72, [[0.5356950457165135, 0.9882986394875187], [0.7332460784299102, 0.32780559902787076], [1.0225340155870632, -0.8394260639179805]],
           [0.8675592182397207, 0.7364143214754887]),
    1.4: (140, [[0.5, 1.0], [0.6424117252923733, 0.7645803332484894], [0.7805384780382831, 0.2933266886145233]],
          [0.9708245852998624, 0.14844344450243785]),
    2.0: (200, [[0.5, 1.0], [0.6001818712154525, 0.8583373405014206], [0.6980444609925444, 0.6216099682706644]],
          [0.9987389694934307, -0.061015482621295525]),
}
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def run():
    return data.load_example_run()


def small_run(space="schaefer100", frames=30, seed=0, **fields):
    bold = np.random.default_rng(seed).standard_normal((frames, Space.named(space).n_sites)).astype(np.float32)
    return Run(bold, fields.pop("tr", 2.0), space, **fields)


def test_example_run(run):
    assert run.bold.shape == (652, 20484) and run.bold.dtype == np.float32
    assert run.tr == 1.4 and run.space == "fsaverage5" and run.confounds.shape == (652, 29)
    assert (np.ptp(run.bold[:, :10242], axis=0) == 0).sum() == 888 and (np.ptp(run.bold[:, 10242:], axis=0) == 0).sum() == 881
    assert np.linalg.norm(run.confounds[[f"a_comp_cor_{i:02d}" for i in range(6)]], axis=0) == pytest.approx(np.ones(6), abs=1e-3)


def test_left_comes_first_in_the_file(run):
    import nibabel as nib
    left = np.asarray(nib.load(data._example_files()[0]).dataobj).reshape(10242, 652)
    assert np.array_equal(run.bold[:, :10242], left.T.astype(np.float32))


@pytest.mark.parametrize("name", data.SPACES)
def test_spaces_are_consistent(name):
    space = Space.named(name)
    assert space.n_sites == len(space.names) == len(set(space.names)) and space.coords.dtype == np.float32
    left = space.coords[(space.hemisphere == "L") & space.cortex, 0]
    assert left.mean() < -10 and Space.named(name) is space
    if space.kind == "volume":
        assert np.allclose(space.voxels @ space.affine[:3, :3].T + space.affine[:3, 3], space.coords)
        assert space.affine[0, 0] > 0  # RAS: the first axis runs from left to right


def test_networks_of_schaefer_400_are_the_published_ones():
    networks = data.parcel_networks(400)
    blocks = {"Vis": [(1, 31), (201, 230)], "SomMot": [(32, 68), (231, 270)], "DorsAttn": [(69, 91), (271, 293)], "SalVentAttn": [(92, 113), (294, 318)],
              "Limbic": [(114, 126), (319, 331)], "Cont": [(127, 148), (332, 361)], "Default": [(149, 200), (362, 400)]}
    for network, spans in blocks.items():
        for first, last in spans: assert (networks[first - 1:last] == network).all(), network


@pytest.mark.skipif(not (SHARED / "data/atlases").exists(), reason="needs the shared atlases")
@pytest.mark.parametrize("n", [100, 200, 400, 1000])
def test_networks_against_the_published_tables(n):
    table = pd.read_csv(SHARED / f"data/atlases/Schaefer2018_{n}Parcels_7Networks_order_FSLMNI152_2mm.Centroid_RAS.csv")
    assert [name.split("_")[2] for name in table["ROI Name"]] == list(data.parcel_networks(n))
    here = Space.named(f"schaefer{n}")
    distance = np.linalg.norm(here.coords - table[["R", "A", "S"]].to_numpy(), axis=1)
    assert np.nanmedian(distance) < 8  # mm; their centroids are of volumes, ours of the mid surface


@pytest.mark.skipif(not (SHARED / "data/atlases").exists(), reason="needs the shared atlases")
def test_carried_labels_against_the_true_ones():
    import nibabel as nib
    sides = [nib.freesurfer.read_annot(SHARED / f"data/atlases/{h}h.Schaefer2018_400Parcels_7Networks_order.annot")[0] for h in "lr"]
    truth = np.concatenate([sides[0], np.where(sides[1] > 0, sides[1] + 200, 0)])
    assert (data.parcellation(400, "fsaverage5") == truth)[truth > 0].mean() > 0.86


@pytest.mark.parametrize("tr", RESAMPLED)
def test_resampling_matches_the_published_code(tr):
    n = np.arange(100)
    bold = np.column_stack([np.sin(0.2 * n) + 0.5 * np.cos(0.05 * n), np.cos(0.9 * n)])
    count, first, last = RESAMPLED[tr]
    out = data.resample_bold(bold, tr, 1.0, match_original=True)
    assert out.shape == (count, 2)
    assert np.allclose(out[:3], first, rtol=0, atol=1e-9) and np.allclose(out[-1], last, rtol=0, atol=1e-9)
    ours = data.resample_bold(bold, tr, 1.0)
    assert (len(ours) - 1) * 1.0 <= 99 * tr + 1e-9 < len(ours) * 1.0  # the last frame is inside the scan, one more would not be
    if tr > 1: assert np.array_equal(ours, out[:len(ours)])  # slowing down also keeps the mean, which the original shrinks
    else: assert np.allclose(ours - ours.mean(0), out[:len(ours)] - out[:len(ours)].mean(0), atol=2e-2)


@given(st.floats(0.3, 3), st.floats(0.3, 3), st.integers(40, 120))
@settings(max_examples=40, deadline=None)
def test_resampling_keeps_constants_and_never_leaves_the_scan(tr, new_tr, frames):
    out = data.resample_bold(np.full((frames, 2), 3.5), tr, new_tr)
    assert np.allclose(out, 3.5, rtol=1e-9)
    original = data.resample_bold(np.full((frames, 2), 3.5), tr, new_tr, match_original=True)
    assert np.allclose(original, 3.5 * (10 ** (-2 * 0.05 / 20) if new_tr > tr else 1), rtol=1e-6)  # 0.05 dB, forward and back
    assert (len(out) - 1) * new_tr <= (frames - 1) * tr * (1 + 1e-6) and len(out) * new_tr > (frames - 1) * tr * (1 - 1e-6)


def test_zscore_and_connectivity_against_numpy():
    bold = np.random.default_rng(1).normal(100, 3, (50, 7)).astype(np.float32)
    bold[:, 3] = 4
    z = data.zscore(bold)
    from scipy.stats import zscore
    assert np.allclose(z[:, :3], zscore(bold[:, :3].astype(float), axis=0), atol=1e-4) and (z[:, 3] == 0).all()
    matrix, keep = data.connectivity(bold), [0, 1, 2, 4, 5, 6]
    assert np.allclose(matrix[np.ix_(keep, keep)], np.corrcoef(bold[:, keep].T), atol=1e-5) and np.isnan(matrix[3]).all()


def test_zscore_with_a_large_offset_stays_accurate():
    bold = (20_000 + np.random.default_rng(0).standard_normal((300, 5))).astype(np.float32)
    z = data.zscore(bold)
    assert np.allclose(z.mean(0), 0, atol=2e-3) and np.allclose(z.std(0), 1, atol=1e-3)


def test_cleaning_matches_nilearn_in_one_piece(run):
    from nilearn import signal
    part = run.bold[:, 3000:3010]
    ours = data.clean_bold(part, 1.4, run.confounds.to_numpy(), 0.01, 0.1, block=3)
    whole = signal.clean(part, confounds=run.confounds.to_numpy(), high_pass=0.01, low_pass=0.1, t_r=1.4, detrend=False, standardize=None)
    assert np.allclose(ours, whole, atol=1e-5)


def test_cleaning_leaves_nothing_of_the_confounds():
    rng = np.random.default_rng(0)
    confound = rng.standard_normal((80, 1))
    run = small_run(frames=80)
    mixed = run.replace(bold=run.bold + 5 * confound, confounds=pd.DataFrame(confound, columns=["noise"]))
    left_over = mixed.clean(high_pass=None, low_pass=None).bold
    assert np.abs(data.zscore(left_over).T @ data.zscore(confound) / 80).max() < 1e-4


@pytest.mark.parametrize("target", [s for s in data.SPACES if s != "fsaverage5"])
def test_every_trip_from_fsaverage5(run, target):
    trip = transfer("fsaverage5", target)
    reached = np.diff(trip.matrix.indptr) > 0
    assert np.allclose(np.asarray(trip.matrix.sum(1)).ravel()[reached], 1, atol=1e-5)
    # nothing leaks from the medial wall, nor from one hemisphere into the other
    a, b = Space.named("fsaverage5"), Space.named(target)
    entries = trip.matrix.tocoo()
    assert a.cortex[entries.col].all() and (a.hemisphere[entries.col] == b.hemisphere[entries.row]).all()
    moved = run.replace(bold=run.bold[:10], confounds=None).to(target)
    assert moved.space == target and moved.meta["history"][-1]["exact"] is False


def test_parcels_of_fslr_are_plain_means():
    rng = np.random.default_rng(0)
    bold = rng.standard_normal((3, 64984)).astype(np.float32)
    run = Run(bold, 1.0, "fsLR_32k")
    labels, out = data.parcellation(200), run.to("schaefer200")
    labels = np.where(Space.named("fsLR_32k").cortex, labels, 0)  # recordings have nothing on the medial wall
    for k in range(1, 201): assert np.allclose(out.bold[:, k - 1], bold[:, labels == k].mean(1), atol=1e-5)
    assert out.meta["history"][-1]["exact"] is True


@pytest.mark.parametrize("source", ["schaefer100", "MNI152NLin6Asym_4mm", "fsLR_32k"])
def test_trips_back(source):
    run = small_run(source, frames=4)
    for target in ("fsaverage5", "schaefer200", "MNI152NLin6Asym_2mm"):
        moved = run.to(target)
        assert moved.n_frames == 4 and np.isfinite(moved.bold).all()


def test_painting_and_averaging_is_the_identity():
    run = small_run("schaefer300")
    assert np.allclose(run.to("fsLR_32k").to("schaefer300").bold, run.bold, atol=1e-5)
    assert np.allclose(run.to("fsaverage5").to("schaefer300").bold, run.bold, atol=1e-5)


def test_a_parcel_without_vertices_stays_zero_and_is_known():
    space = Space.named("schaefer1000")
    assert list(space.names[~space.cortex]) == ["RH_Vis_33", "RH_Cont_61"]  # no vertex at all; none in the cortex
    out = Run(np.random.default_rng(0).standard_normal((3, 64984)), 1.0, "fsLR_32k").to("schaefer1000")
    assert (out.bold[:, ~space.cortex] == 0).all()


@pytest.mark.parametrize("source", data.SPACES)
@pytest.mark.parametrize("target", data.SPACES)
def test_no_trip_mixes_in_the_medial_wall_and_all_rows_sum_to_one(source, target):
    if source == target: return
    trip = transfer(source, target)
    total = np.asarray(trip.matrix.sum(1)).ravel()
    assert np.allclose(total[total > 0], 1, atol=1e-5)
    entries = trip.matrix.tocoo()
    assert Space.named(source).cortex[entries.col].all() and Space.named(target).cortex[entries.row].all()


@pytest.mark.parametrize("name", ["MNI152NLin6Asym_2mm", "MNI152NLin6Asym_4mm"])
def test_voxels_are_near_the_cortex(name):
    from scipy.spatial import cKDTree
    fslr = Space.named("fsLR_32k")
    distance, _ = cKDTree(fslr.coords[fslr.cortex]).query(Space.named(name).coords)
    assert distance.max() <= 4.0


def test_dead_sites_travel_as_dead_sites():
    bold = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    bold[:, 7] = 0
    moved = Run(bold, 2.0, "schaefer100", allow_constant=1).to("fsLR_32k")
    dead = (np.ptp(moved.bold, axis=0) == 0) & moved.sites.cortex
    assert dead[data.parcellation(100) == 8][Space.named("fsLR_32k").cortex[data.parcellation(100) == 8]].all()
    assert set(np.flatnonzero(dead)) == set(moved.meta["history"][-1]["silent_sites"])
    back = moved.to("schaefer100")
    assert back.meta["history"][-1]["silent_sites"] == [7] and [h["step"] for h in back.meta["history"]] == ["to", "to"]


def test_shared_geometry_cannot_be_changed():
    for array in (Space.named("schaefer100").coords, data.surface_mesh("fsaverage5").coords, data.parcellation(100, "fsaverage5"),
                  data.parcellation(100), data.fsaverage5_on_fslr_sphere()):
        with pytest.raises(ValueError, match="read-only"): array[0] = 0


def test_integers_and_labels():
    counts = np.random.default_rng(0).integers(0, 1000, (40, 3)).astype(np.int16)
    assert data.zscore(counts).dtype == np.float32
    assert data.resample_bold(counts, 1.4, 1.0).dtype == np.float32
    grid = Space.named("MNI152NLin6Asym_4mm")
    labels = np.arange(grid.n_sites)
    assert np.isnan(grid.to_grid(labels)).any() and (grid.to_grid(labels, outside=-1) == -1).any()


def test_grid_puts_values_at_their_voxels():
    space = Space.named("MNI152NLin6Asym_4mm")
    values = np.arange(space.n_sites, dtype=np.float32)
    cube = space.to_grid(np.stack([values, -values]))
    assert cube.shape == (2, 45, 54, 45) and np.isfinite(cube[0]).sum() == space.n_sites
    i, j, k = space.voxels[123]
    assert cube[1, i, j, k] == -123
    with pytest.raises(ValueError, match="expected a volume space, found 'schaefer100'"): Space.named("schaefer100").to_grid(values)


def test_factors_give_correlations():
    bold = np.random.default_rng(2).standard_normal((40, 60)).astype(np.float32)
    factors = data.correlation_factors(bold, rank=40)
    assert np.allclose(factors @ factors.T, np.corrcoef(bold.T), atol=1e-3)
    assert np.allclose(data.seed_correlation(bold, 5), np.corrcoef(bold.T)[5], atol=1e-4)


def test_framewise_displacement_against_a_loop(run):
    fd, c = data.framewise_displacement(run.confounds), run.confounds
    t = 534
    by_hand = sum(abs(c[f"trans_{a}"][t] - c[f"trans_{a}"][t - 1]) + 50 * abs(c[f"rot_{a}"][t] - c[f"rot_{a}"][t - 1]) for a in "xyz")
    assert fd[t] == pytest.approx(by_hand) and fd[0] == 0 and len(fd) == 652


BAD = {
    "wrong number of sites": (dict(bold=np.zeros((5, 99))), r"sub-7.*expected bold of shape \(time, 100\) for space 'schaefer100', found \(5, 99\)"),
    "one dimension": (dict(bold=np.zeros(100)), r"found \(100,\)"),
    "one frame": (dict(bold=np.ones((1, 100))), "at least 2 frames, found 1"),
    "TR zero": (dict(tr=0), "greater than 0, found 0"),
    "TR negative": (dict(tr=-1.4), "greater than 0, found -1.4"),
    "TR missing": (dict(tr=None), "repetition time .* found None"),
    "TR NaN": (dict(tr=float("nan")), "greater than 0, found nan"),
    "TR in milliseconds": (dict(tr=1400), "milliseconds"),
    "unknown space": (dict(space="fsaverage6"), "unknown space 'fsaverage6': expected one of fsaverage5, fsLR_32k"),
    "TR absurdly small": (dict(tr=0.0014), "no scanner is that fast"),
    "complex values": (dict(bold=np.zeros((5, 100), complex)), "expected real numbers, found complex128"),
    "events as a list": (dict(events=[1, 2]), "expected events as a pandas DataFrame, found list"),
    "confounds of another run": (dict(confounds=pd.DataFrame(np.zeros((7, 2)))), "expected confounds with 30 rows.*found 7"),
    "events without onset": (dict(events=pd.DataFrame({"trial_type": ["a"]})), r"columns onset, duration, trial_type, found \['trial_type'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_expected_and_found(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message): small_run(subject="7").replace(**change)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_refused(value):
    bold = small_run().bold.copy()
    bold[3, 42] = value
    with pytest.raises(ValueError, match="NaN or infinity at 1 of 100 sites .first: site 42"): Run(bold, 2.0, "schaefer100")


def test_dead_vertices_in_the_cortex_are_refused(run):
    bold = run.bold[:20].copy()
    bold[:, 5000:5010] = 7
    with pytest.raises(ValueError, match="expected at most the 1769 sites.*found 1779 constant sites, 10 of them inside the cortex"): Run(bold, 1.4, "fsaverage5")
    assert Run(bold, 1.4, "fsaverage5", allow_constant=10).n_frames == 20


def test_mirrored_and_shuffled_spaces_are_refused():
    from dataclasses import replace
    space = Space.named("schaefer100")
    with pytest.raises(ValueError, match="mirrored"): replace(space, coords=space.coords * [-1, 1, 1])
    order = np.r_[50:100, 0:50]
    with pytest.raises(ValueError, match="all left sites before all right"): replace(space, coords=space.coords[order], hemisphere=space.hemisphere[order])
    with pytest.raises(ValueError, match="expected 100 entries in 'network', found 99"): replace(space, network=space.network[1:])


@pytest.mark.parametrize("call, message", [
    (lambda: data.surface_mesh("fsaverage6"), "expected a surface space .*found 'fsaverage6'"),
    (lambda: data.surface_mesh("fsaverage5", "round"), "unknown surface kind 'round'"),
    (lambda: data.parcellation(500), "found 500"),
    (lambda: data.parcellation(100, "schaefer200"), "expected a surface or volume space, found 'schaefer200'"),
    (lambda: data.group_connectivity(1000), "found 1000"),
    (lambda: data.group_connectivity(100, "test"), "found 'test'"),
    (lambda: data.transfer("fsaverage5", "fsaverage5"), "two different spaces"),
    (lambda: data.resample_bold(np.zeros((9, 2)), 0, 1), "greater than 0"),
    (lambda: data.clean_bold(np.zeros((50, 2)), 2.0, low_pass=0.3), "Nyquist frequency 0.2500 Hz of TR 2 s, found 0.3"),
    (lambda: data.connectivity(np.zeros((2, 20_484))), "found 20484"),
    (lambda: small_run().clean(), "expected confounds to regress out, found none"),
    (lambda: small_run(confounds=pd.DataFrame({"a": [0.0] * 30})).clean(["b"]), r"expected confounds among \['a'\], found \['b'\]"),
    (lambda: small_run(frames=50, confounds=pd.DataFrame({"a": [np.nan] + [0.0] * 49})).clean(), r"found NaN in \['a'\]"),
    (lambda: data.clean_bold(np.ones((50, 2)), 2.0, np.ones((50, 49))), "found 49 confounds for 50 frames"),
    (lambda: data.clean_bold(np.ones((20, 2)), 2.0, None, 0.01), "at least 40 frames to filter, found 20"),
    (lambda: data.resample_bold(np.zeros((9, 2)), 1.0, 2.0), "at least 30 frames to slow a run down, found 9"),
    (lambda: data.framewise_displacement(pd.DataFrame({"trans_x": [0.0]})), "found no"),
])
def test_functions_say_what_they_expected(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_missing_package_and_file_are_named():
    with pytest.raises(ModuleNotFoundError, match="'no_such_package' to be installed"): data.package_file("no_such_package", "x")
    with pytest.raises(FileNotFoundError, match="inside the package 'numpy'"): data.package_file("numpy", "no_such_file")


def test_operations_do_not_change_the_run_they_are_called_on(run):
    before = run.bold[::50].copy()
    short = run.replace(bold=run.bold[:60], confounds=run.confounds[:60])
    short.zscore(), short.resample(1.0), short.to("schaefer100")
    assert np.array_equal(run.bold[::50], before) and "history" not in run.meta


def test_import_is_light():
    code = "import sys, fmri_book.data, fmri_book.figures; print([m for m in ('nilearn','nibabel','plotly','torch','cortex','matplotlib','pandas','scipy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.skipif(not (SHARED / "golden").exists(), reason="needs the shared golden values")
def test_our_copy_of_the_golden_values_is_theirs():
    golden = json.loads((SHARED / "golden/fmri_fm.json").read_text())
    for tr, (count, first, last) in RESAMPLED.items():
        entry = golden[f"resample_{tr}_to_1.0"]
        assert entry["shape"][0] == count and entry["first3"] == first and entry["last"] == last


def test_figures_need_no_preparation():
    "A library user draws without having asked for the book's style first."
    code = """
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt, numpy as np
from fmri_book.data import show_connectivity
from fmri_book.flat_maps import FlatMap, show_flat
show_connectivity(plt.gca(), np.eye(100), "schaefer100", "x"); plt.gcf().canvas.draw()
fm = FlatMap.fsaverage5(56, 140); show_flat(np.ones(fm.mask.shape), fm).figure.canvas.draw()
print("drawn")"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "drawn"


# --- spaces that users bring ------------------------------------------------------------------------------------------

RAS = np.array([[3.0, 0, 0, -30], [0, 3, 0, -40], [0, 0, 3, -20], [0, 0, 0, 1]])


@pytest.fixture
def forget(monkeypatch):
    "Spaces registered in a test are forgotten after it."
    monkeypatch.setattr(data, "_OWN_SPACES", {})


def some_mask(seed=0, shape=(21, 9, 7)):
    return np.random.default_rng(seed).random(shape) < 0.3


def test_a_mask_becomes_a_space(forget):
    mask = some_mask()
    space = Space.from_mask("mine", mask, RAS, "MNI152")
    assert space is Space.named("mine") and space.n_sites == mask.sum() and space.shape == mask.shape
    np.testing.assert_allclose(space.coords, np.argwhere(mask) * 3.0 + RAS[:3, 3])
    x = space.coords[:, 0]
    assert set(space.hemisphere[x < 0]) == {"L"} and set(space.hemisphere[x > 0]) == {"R"} and set(space.hemisphere[x == 0]) == {""}
    grid = space.to_grid(np.arange(space.n_sites, dtype=np.float32))
    np.testing.assert_array_equal(grid[mask], np.arange(space.n_sites))
    assert np.isnan(grid[~mask]).all()
    run = Run(np.random.default_rng(1).standard_normal((5, space.n_sites)), 2.0, "mine")
    assert run.sites is space and "voxels" in repr(run)


def test_a_space_comes_back_from_its_file(forget, tmp_path, monkeypatch):
    space = Space.from_mask("mine", some_mask(), RAS)
    parcels = Space(
        "three", "parcels", np.array([[30.0, 0, 0], [-30, 0, 0], [0, 5, 5]], np.float32), np.array(["R", "L", ""]),
        np.array(["Vis", "", ""]), np.array([True, True, False]), "MNI152", names=np.array(["rechts", "links", "mitte ü"]),
    ).register()
    for original in (space, parcels, Space.named("schaefer100")):
        original.save(tmp_path / f"{original.name}.npz")
    monkeypatch.setattr(data, "_OWN_SPACES", {})
    for original in (space, parcels):
        with pytest.raises(ValueError, match="unknown space"):
            Space.named(original.name)
        loaded = Space.load(tmp_path / f"{original.name}.npz")
        assert loaded.digest == original.digest and loaded.shape == original.shape
        for key, value in vars(original).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(loaded, key), value)
                assert not getattr(loaded, key).flags.writeable
    assert Space.load(tmp_path / "schaefer100.npz") is Space.named("schaefer100")


def test_names_of_spaces_mean_one_thing(forget):
    Space.from_mask("mine", some_mask(), RAS)
    Space.from_mask("mine", some_mask(), RAS)
    with pytest.raises(ValueError, match="'mine'.*registered.*differs"):
        Space.from_mask("mine", some_mask(1), RAS)
    with pytest.raises(ValueError, match="name of a space of this package"):
        Space.from_mask("fsaverage5", some_mask(), RAS)


@pytest.mark.parametrize("change", ["coords", "hemisphere", "names", "cortex", "order"])
def test_the_digest_sees_every_change(forget, change):
    space = Space.from_mask("mine", some_mask(), RAS)
    if change == "order":
        moved = {k: getattr(space, k)[::-1] for k in ("coords", "hemisphere", "names", "cortex", "voxels")}
    else:
        value = getattr(space, change).copy()
        value[3] = {"coords": value[3] + 1 if change == "coords" else 0, "hemisphere": "", "names": "?", "cortex": False}[change]
        moved = {change: value}
    assert replace(space, **moved).digest != space.digest


def test_masks_that_are_refused(forget):
    with pytest.raises(ValueError, match="RAS order, found LAS"):
        Space.from_mask("m", some_mask(), RAS * [[-1], [1], [1], [1]])
    with pytest.raises(ValueError, match="3-D mask with voxels in it"):
        Space.from_mask("m", np.zeros((3, 3, 3)), RAS)
    with pytest.raises(ValueError, match="3-D mask"):
        Space.from_mask("m", np.ones((3, 3)), RAS)


def test_nothing_travels_from_a_space_that_is_not_known(forget):
    space = Space.from_mask("mine", some_mask(), RAS)
    with pytest.raises(ValueError, match="'mine': how values travel"):
        Run(np.random.default_rng(0).standard_normal((4, space.n_sites)), 1.0, "mine").to("schaefer100")


def test_a_mirrored_atlas_is_refused_in_any_order():
    coords = np.array([[30.0, 0, 0], [-30, 0, 0]], np.float32)
    make = lambda sides: Space("a", "parcels", coords, np.array(sides), np.array(["", ""]), np.ones(2, bool), "MNI152")
    assert make(["R", "L"]).n_sites == 2
    with pytest.raises(ValueError, match="mirrored"):
        make(["L", "R"])
