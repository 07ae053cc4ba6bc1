"""The simulated cohort: made of named random numbers, valid, streamed, and holding exactly what was planted."""

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmri_book import cohort as co
from fmri_book import data
from fmri_book.cohort import LEMON, TASKS, Cohort, Effect, Spectrum
from fmri_book.data import NETWORKS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def digest(run) -> str:
    return hashlib.sha256(run.bold.tobytes()).hexdigest()


def small(**changes) -> Cohort:
    return Cohort(**{"n_subjects": 4, "n_frames": 120, "space": "schaefer100", **changes})


# --- random numbers that belong to a run


def test_any_order_gives_the_same_runs():
    cohort = small(tasks=("rest", "motor"))
    forward = [digest(run) for run in cohort]
    assert len(forward) == len(cohort) == 16 and len(set(forward)) == 16
    again = small(tasks=("rest", "motor"))
    assert [digest(again[i]) for i in range(15, -1, -1)] == forward[::-1]
    assert digest(again.run("sim-0002", 2, "motor")) == forward[7] == digest(again[-9])


@pytest.mark.parametrize("threads", ["1", "2"])
def test_another_process_gives_the_same_bits_whatever_its_threads(threads):
    cohort = small(space="schaefer400", tasks=("rest", "visual"))
    code = (
        "import hashlib\nfrom fmri_book.cohort import Cohort\n"
        "c = Cohort(n_subjects=4, n_frames=120, space='schaefer400', tasks=('rest', 'visual'))\n"
        "print(hashlib.sha256(c[5].bold.tobytes()).hexdigest(), c[5].events.to_json())"
    )
    env = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PYTHONPATH": ROOT}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split()
    assert out[0] == digest(cohort[5]) and out[1] == cohort[5].events.to_json()


def test_threads_of_one_process_make_the_same_bits():
    code = (
        "import hashlib\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from threadpoolctl import threadpool_info\nfrom fmri_book.cohort import Cohort\n"
        "c = Cohort(n_subjects=6, n_frames=100, space='schaefer400', tasks=('rest', 'visual'))\n"
        "make = lambda i: hashlib.sha256(c[i].bold.tobytes()).hexdigest()\n"
        "make(1); before = threadpool_info()\n"
        "with ThreadPoolExecutor(8) as pool: print(*pool.map(make, range(24)))\n"
        "assert threadpool_info() == before, 'the limit on threads was not given back'\n"
    )
    env = os.environ | {"OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4", "PYTHONPATH": ROOT}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split()
    assert out == [digest(run) for run in Cohort(n_subjects=6, n_frames=100, space="schaefer400", tasks=("rest", "visual"))]


def test_what_is_shared_cannot_be_written_to():
    shared = [co.activation_pattern("visual"), co.neighbourhood("fsaverage5", 3.0).data, small()._connectivity(0, 1), co._group(100).cov]
    for array in shared:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
    matrix = small().truth.connectivity("sim-0001")
    matrix[0] = 7  # the reader's own copy
    assert (small().truth.connectivity("sim-0001")[0] != 7).all()


def test_a_run_can_be_asked_for_by_its_own_names():
    cohort = small(tasks=("rest", "motor"))
    for run in (cohort[1], cohort[6]):
        assert digest(cohort.run(run.subject, run.session, run.task)) == digest(run)
    assert digest(cohort.run("sim-0001", np.int64(2))) == digest(cohort.run("sim-0001", "2"))
    for wrong in (1.0, True, "01", None, 0):
        with pytest.raises(ValueError, match="unknown session .*: expected 1 to 2"):
            cohort.run("sim-0001", wrong)
        with pytest.raises(ValueError, match="unknown session"):
            cohort.truth.connectivity("sim-0001", wrong)


def test_a_cohort_is_walked_and_not_searched():
    cohort = small(n_subjects=1, n_sessions=1, tasks=("rest", "motor"))
    with pytest.raises(TypeError):
        _ = cohort[0] in cohort
    assert not hasattr(cohort, "index") and [r.task for r in cohort] == ["rest", "motor"] == [r.task for r in reversed(cohort)][::-1]


def test_settings_in_other_forms_are_the_same_cohort():
    effect = Effect("group", ["Default", "Cont"], 0.8)
    assert effect == Effect("group", ("Default", "Cont"), 0.8) and hash(effect)
    assert small(tasks="rest", effects=effect) == small(tasks=["rest"], effects=[effect])
    spectrum = Spectrum(band=[0.01, 0.1], steepness=[1, 2])
    assert spectrum == Spectrum(band=(0.01, 0.1), steepness=(1.0, 2.0)) and hash(small(spectrum=spectrum))
    other = dataclasses.replace(small(space="schaefer100"), space="schaefer400")
    assert (small().n_parcels, other.n_parcels, small(parcels=200).n_parcels, small(space="fsLR_32k").n_parcels) == (100, 400, 200, 400)


def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match="expected a Spectrum, found None"):
        small(spectrum=None)
    with pytest.raises(TypeError, match="effects made by Effect"):
        small(effects=("group",))
    for steepness in ((0, 1), (1,), (1, float("nan")), None):
        with pytest.raises(ValueError, match="steepness of two numbers above 0"):
            Spectrum(steepness=steepness)
    for band in ((0.01,), (0.01, float("inf")), (0.01, 0.02, 0.03)):
        with pytest.raises(ValueError, match="two rising frequencies"):
            Spectrum(band=band)
    with pytest.raises(ValueError, match="expected a space of parcels, found 'fsaverage5'"):
        co.activation_pattern("visual", "fsaverage5")
    for n in (8, 14):
        with pytest.raises(ValueError, match=f"at least 20 frames to average 5 frequencies, found {n}"):
            co.power_spectrum(np.random.default_rng(0).standard_normal((n, 3)), 1.4)
    assert np.isfinite(co.power_spectrum(np.random.default_rng(0).standard_normal((20, 3)), 1.4)[1]).all()


def test_a_thousand_parcels_carry_the_truth_only_roughly():
    carry, z = data.transfer("schaefer400", "schaefer1000"), {}
    assert not carry.exact
    group = data.group_connectivity(400).astype(float)
    for n, cov in ((400, group), (1000, carry.matrix @ group @ carry.matrix.T)):
        z[n] = co.network_z(cov, co.network_means(n))
    assert 0.02 < np.abs(z[1000] - z[400]).max() < 0.15
    run = Cohort(n_subjects=1, n_sessions=1, n_frames=20, space="schaefer1000", tasks="rest")[0]
    assert run.meta["exact"] is False and small()[0].meta["exact"] is True
    assert Cohort(n_subjects=1, n_frames=20, space="fsaverage5", tasks="rest")[0].meta["exact"] is True


def test_a_subject_does_not_depend_on_the_size_of_the_cohort_or_its_other_tasks():
    one, other = small(), small(n_subjects=50, n_sessions=3, tasks=("emotion", "rest"))
    assert digest(one.run("sim-0003", 2, "emotion")) == digest(other.run("sim-0003", 2, "emotion"))
    pd.testing.assert_frame_equal(one.participants, other.participants.head(4))


def test_seeds_subjects_and_sessions_differ():
    runs = [small(seed=s).run(sub, ses).bold for s in (0, 1) for sub in ("sim-0001", "sim-0002") for ses in (1, 2)]
    flat = np.corrcoef([r.ravel() - 100 for r in runs])
    assert np.abs(flat[np.triu_indices(8, 1)]).max() < 0.3


def test_a_cohort_travels_to_workers():
    cohort = small()
    assert pickle.loads(pickle.dumps(cohort)) == cohort and digest(pickle.loads(pickle.dumps(cohort))[3]) == digest(cohort[3])


# --- a run is a Run


def test_a_run_says_what_it_is():
    run = small().run("sim-0002", 2, "motor")
    assert (run.subject, run.session, run.task, run.space, run.tr) == ("sim-0002", "2", "motor", "schaefer100", 1.4)
    assert run.meta["simulated"] is True and run.bold.dtype == np.float32 and run.bold.shape == (120, 100)
    assert set(run.events.trial_type) == {"motor_left", "motor_right"} and list(run.events) == ["onset", "duration", "trial_type"]
    assert small().run("sim-0002").events is None
    assert abs(run.bold.mean() - 100) < 0.5


@pytest.mark.parametrize("space", data.SPACES)
def test_every_space(space):
    run = Cohort(n_subjects=1, n_sessions=1, n_frames=30, tr=2.0, space=space, tasks=("visual",))[0]
    assert run.space == space and run.bold.shape == (30, data.Space.named(space).n_sites)
    assert (run.bold[:, ~run.sites.cortex] == 0).all() and (run.bold[:, run.sites.cortex].std(0) > 0).all()


@pytest.mark.parametrize("space", ["fsLR_32k", "fsaverage5", "MNI152NLin6Asym_4mm"])
def test_parcels_come_back_from_their_sites(space):
    settings_ = {"n_subjects": 1, "n_sessions": 1, "n_frames": 40, "tasks": ("rest",)}
    dense, parcels = Cohort(space=space, **settings_)[0], Cohort(space="schaefer400", **settings_)[0]
    labels = np.where(dense.sites.cortex, data.parcellation(400, space), 0)
    for k in np.unique(labels[labels > 0]):
        np.testing.assert_allclose(dense.bold[:, labels == k].mean(1), parcels.bold[:, k - 1], atol=2e-3)
    many = np.bincount(labels)[1:].argmax() + 1
    inside = np.corrcoef(dense.bold[:, labels == many].T)
    assert 0.2 < inside.mean() < 0.95  # sites of one parcel are alike, and not copies of each other


@pytest.mark.parametrize("tr", [0.1, 0.72, 2.0, 3.0])
def test_any_repetition_time(tr):
    run = small(tr=tr, n_frames=int(150 / tr), tasks=("language",), drift=0, activation=0, subject_share=0, effects=())[0]
    assert abs(run.bold.std() - 1) < 0.15 and run.events.onset.max() + 16 + 12 <= run.duration


# --- connectivity: valid, and exactly what was planted

networks = st.sampled_from(NETWORKS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.floats(0, 0.5), st.floats(0, 0.4), st.integers(1, 30), st.floats(-2, 2), st.floats(-0.95, 0.95))
def test_covariances_are_always_positive_definite(seed, session, own, other, modes, d, r):
    effects = (Effect("group", ("Default", "Cont"), d), Effect("score", ("Vis", "SomMot"), r))
    cohort = small(seed=seed, n_sessions=3, subject_share=own, session_share=other, n_modes=modes, effects=effects)
    matrix = cohort.truth.connectivity("sim-0002", session)
    assert np.linalg.eigvalsh(matrix)[0] > 1e-4
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(networks, networks, st.floats(-0.25, 0.25), st.sampled_from([100, 200]))
def test_setting_a_connection_moves_no_other(a, b, step, n):
    if a == b:
        return
    cov, means = data.group_connectivity(n).astype(float), co.network_means(n)
    z = co.network_z(cov, means)
    i, j = NETWORKS.index(a), NETWORKS.index(b)
    new = co.network_z(co.set_connections(cov, means, {(a, b): z[i, j] + step}, np.tanh(z) + np.eye(7)), means)
    change = new - z
    np.testing.assert_allclose(change[[i, j], [j, i]], step, atol=1e-9)
    change[[i, j], [j, i]] = 0
    np.testing.assert_allclose(change, 0, atol=1e-9)


def test_planted_strengths_are_in_every_session():
    cohort = small(n_subjects=60, n_sessions=2)
    for number, subject in enumerate(cohort.participants.subject):
        for session in (1, 2):
            z = co.network_z(cohort.truth.connectivity(subject, session), co.network_means(100))
            got = [z[tuple(map(NETWORKS.index, e.connection))] for e in cohort.effects]
            np.testing.assert_allclose(got, cohort.truth.session_strengths.loc[(subject, session)], atol=2e-6)
            np.testing.assert_allclose(got, cohort.truth.strengths.iloc[number], atol=4 * cohort.session_spread)


@pytest.mark.parametrize(("d", "r"), [(0.8, 0.5), (-1.5, -0.8), (0.0, 0.0)])
def test_effects_have_the_planted_size_and_the_rest_none(d, r):
    n = 600
    cohort = Cohort(n_subjects=n, n_sessions=1, session_spread=0, effects=(Effect("group", ("Default", "Cont"), d), Effect("score", ("Vis", "SomMot"), r)))
    z = np.array([co.network_z(cohort._connectivity(i, 1), co.network_means(100)) for i in range(n)])
    people, (i, j) = cohort.participants, np.triu_indices(7, 1)
    z, is_b = z[:, i, j], (people.group == "B").to_numpy()
    found_d = (z[is_b].mean(0) - z[~is_b].mean(0)) / np.sqrt((z[is_b].var(0) + z[~is_b].var(0)) / 2)
    found_r = np.array([np.corrcoef(x, people.score)[0, 1] for x in z.T])
    names = [{NETWORKS[a], NETWORKS[b]} for a, b in zip(i, j)]
    at_d, at_r = names.index({"Default", "Cont"}), names.index({"Vis", "SomMot"})
    assert abs(found_d[at_d] - d) < 3.5 * np.sqrt(4 / n + d**2 / (2 * n)) and abs(found_r[at_r] - r) < 3.5 * (1 - r**2) / np.sqrt(n)
    assert np.abs(np.delete(found_d, at_d)).max() < 4 * np.sqrt(4 / n) and np.abs(np.delete(found_r, at_r)).max() < 4 / np.sqrt(n)
    assert 0.08 < z[:, at_r].std() < 0.12  # the spread that was asked for


def test_runs_have_the_connectivity_of_the_truth():
    cohort = small(n_frames=6000, drift=0)
    pairs = np.triu_indices(100, 1)
    found, truth = (m[pairs] for m in (data.connectivity(cohort.run("sim-0001").bold), cohort.truth.connectivity("sim-0001")))
    assert np.corrcoef(found, truth)[0, 1] > 0.99 and np.abs(found - truth).max() < 0.1


def test_traits_are_balanced_and_independent():
    people = Cohort(n_subjects=401).participants
    assert abs((people.group == "A").sum() - 200.5) < 1 and list(people) == ["subject", "group", "score"]
    assert abs(np.corrcoef(people.group == "B", people.score)[0, 1]) < 0.15 and abs(people.score.std() - 1) < 0.12


def fingerprints(**changes) -> float:
    cohort = Cohort(n_subjects=30, n_sessions=2, n_frames=200, tasks=("rest",), drift=0, **changes)
    pairs = np.triu_indices(100, 1)
    z = np.array([np.arctanh(data.connectivity(run.bold)[pairs]) for run in cohort]).reshape(30, 2, -1)
    similar = np.corrcoef(z[:, 1], z[:, 0])[:30, 30:]
    return (similar.argmax(1) == np.arange(30)).mean()


def test_fingerprints_where_planted_and_nowhere_else():
    assert fingerprints() > 0.8
    assert fingerprints(subject_share=0, effects=()) < 0.2  # chance 0.03


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(networks, networks, st.sampled_from(["group", "score"]), st.floats(-0.9, 0.9)), min_size=1, max_size=6), st.integers(0, 99))
def test_a_cohort_that_is_accepted_can_make_all_its_sessions(drawn, seed):
    effects = {frozenset(e[:2]): Effect(e[2], e[:2], e[3]) for e in drawn if e[0] != e[1]}
    try:
        cohort = Cohort(n_subjects=15, n_sessions=2, effects=tuple(effects.values()), seed=seed)
    except ValueError as error:
        assert "use a spread of" in str(error)
        return
    for (subject, session), wanted in cohort.truth.session_strengths.iterrows():
        z = co.network_z(cohort.truth.connectivity(subject, session), co.network_means(100))
        np.testing.assert_allclose([z[e.where] for e in cohort.effects], wanted, atol=2e-6)


def test_the_spread_that_an_error_proposes_is_accepted():
    effects = tuple(Effect("group", (a, "Default"), 1.0) for a in ("SalVentAttn", "DorsAttn", "SomMot"))
    with pytest.raises(ValueError, match="use a spread of") as caught:
        Cohort(effects=effects, spread=0.2)
    fits = float(str(caught.value).split("use a spread of ")[1].split()[0])
    assert 0 < fits < 0.2 and Cohort(effects=effects, spread=fits - 0.0006).spread < fits


def test_rare_subjects_are_drawn_back_and_the_truth_says_so():
    pairs = [("DorsAttn", "Default"), ("SalVentAttn", "Default"), ("SomMot", "Cont")]
    cohort = Cohort(n_subjects=1, spread=0.03, session_spread=0.03, effects=[Effect("score", p, 0.5) for p in pairs])
    far = np.array([1.0, -1.0, 1.0])  # Fisher z: more than three connections can do at once
    assert not cohort._valid(far) and cohort._valid(cohort._drawn_back(far))
    near = np.array([0.05, -0.05, 0.05])
    assert (cohort._drawn_back(near) == near).all()


@pytest.mark.parametrize("shares", [(0.9, 0.0, 1), (0.5, 0.4, 1), (0.35, 0.15, 10)])
def test_connections_are_exact_at_extreme_shares(shares):
    own, other, modes = shares
    cohort = small(n_subjects=25, subject_share=own, session_share=other, n_modes=modes)
    for (subject, session), wanted in cohort.truth.session_strengths.iterrows():
        z = co.network_z(cohort.truth.connectivity(subject, session), co.network_means(100))
        np.testing.assert_allclose([z[e.where] for e in cohort.effects], wanted, atol=2e-6)


def test_a_connection_with_an_effect_varies_between_sessions_as_others_do():
    cohort = small(n_subjects=100)
    z = np.array([[co.network_z(cohort._connectivity(i, s), co.network_means(100)) for s in (1, 2)] for i in range(100)])
    daily = (z[:, 0] - z[:, 1]).std(0) / np.sqrt(2)
    there = [e.where for e in cohort.effects]
    others = [daily[i, j] for i, j in zip(*np.triu_indices(7, 1)) if (i, j) not in there and (j, i) not in there]
    assert 0.03 < min(others) and max(others) < 0.08 and all(0.03 < daily[w] < 0.08 for w in there)
    strengths, sessions = cohort.truth.strengths, cohort.truth.session_strengths
    assert np.abs(sessions.groupby("subject").mean() - strengths).max().max() < 0.2
    assert np.abs((sessions.groupby("subject").mean() - strengths).mean()).max() < 0.02


# --- time: spectrum, haemodynamic response, events


@pytest.mark.parametrize("spectrum", [Spectrum(), LEMON, Spectrum(knee=0.02, slope=1, white=0.5)])
@pytest.mark.parametrize("tr", [0.72, 1.4, 2.5])
def test_noise_has_its_spectrum(spectrum, tr):
    x = co.coloured_noise(np.random.default_rng(0), 512, 600, tr, spectrum)
    assert x.dtype == np.float32 and abs(x.var() - 1) < 0.05
    power = (np.abs(np.fft.rfft(x * np.hanning(512)[:, None], axis=0)) ** 2).mean(1)[4:-2]
    wanted = spectrum.power(512, tr)[4:-2]
    strong = wanted > 0.02 * wanted.max()
    ratio = (power / power[strong].mean()) / (wanted / wanted[strong].mean())
    assert np.abs(ratio[strong] - 1).max() < 0.35 and abs(ratio[strong].mean() - 1) < 0.05


def test_the_lemon_spectrum_is_that_of_the_real_run():
    real = data.load_example_run().to("schaefer100")
    fake = Cohort(n_subjects=4, n_sessions=1, n_frames=652, spectrum=LEMON, drift=0, tasks=("rest",))
    _, p_real = co.power_spectrum(real.bold, 1.4)
    p_fake = np.mean([co.power_spectrum(run.bold, 1.4)[1] for run in fake], 0)
    assert np.minimum(p_real, p_fake).sum() / p_real.sum() > 0.85

    def autocorrelation(x, lag):
        x = (x - x.mean(0)) / x.std(0)
        return (x[lag:] * x[:-lag]).mean()

    for lag in (1, 3, 5):
        assert abs(np.mean([autocorrelation(run.bold, lag) for run in fake]) - autocorrelation(real.bold, lag)) < 0.08


def test_response_against_a_convolution_and_against_nilearn():
    from nilearn.glm.first_level import compute_regressor

    rng = np.random.default_rng(3)
    onset = np.sort(rng.uniform(0, 90, 6))
    events = pd.DataFrame({"onset": onset, "duration": rng.uniform(0.5, 20, 6), "trial_type": list("aabbab")})
    times, grid = np.arange(100) * 1.37, np.arange(0, 140, 0.005)
    for name in "ab":
        mine = events[events.trial_type == name]
        boxes = sum(((grid >= o) & (grid < o + d)).astype(float) for o, d in zip(mine.onset, mine.duration))
        from scipy.signal import fftconvolve

        wanted = np.interp(times, grid, fftconvolve(boxes, co.hrf(grid))[: len(grid)] * 0.005)
        got = co.response(events, name, times)
        np.testing.assert_allclose(got, wanted, atol=0.01)
        theirs, _ = compute_regressor(np.array([mine.onset, mine.duration, np.ones(len(mine))]), "spm", times)
        assert np.corrcoef(got, theirs[:, 0])[0, 1] > 0.995


def test_the_task_is_the_planted_pattern_times_the_planted_course():
    settings_ = {"n_subjects": 2, "n_sessions": 1, "n_frames": 200, "tasks": ("memory",)}
    with_task, without = Cohort(**settings_)[1], Cohort(**settings_, activation=0)[1]
    cohort = Cohort(**settings_)
    planted = cohort.amplitude("sim-0002", "memory") * np.outer(cohort.truth.response(with_task, "memory"), cohort.truth.patterns["memory"])
    np.testing.assert_allclose(with_task.bold - without.bold, planted, atol=1e-3)


def test_events_without_length_and_events_that_cannot_be():
    times = np.arange(0, 60, 0.5)

    def of(onset, duration):
        return pd.DataFrame({"onset": [onset], "duration": [duration], "trial_type": "a"})

    np.testing.assert_allclose(co.response(of(3.0, 0.0), "a", times), co.hrf(times - 3))
    np.testing.assert_allclose(co.response(of(3.0, 0.0), "a", times), co.response(of(3.0, 0.01), "a", times) / 0.01, atol=2e-3)
    for wrong in (of(3.0, -1.0), of(3.0, np.nan), of(np.nan, 1.0), of(3.0, np.inf)):
        with pytest.raises(ValueError, match="events 'a': expected finite onsets and durations from 0 up"):
            co.response(wrong, "a", times)
    with pytest.raises(ValueError, match="unknown trial type 'b': expected one of a"):
        co.response(of(3.0, 1.0), "b", times)


def test_the_truth_of_a_run_without_that_task_is_silence():
    cohort = small(tasks=("rest", "motor"))
    rest, motor = cohort[0], cohort[1]
    assert (cohort.truth.response(rest, "motor_left") == 0).all() and len(cohort.truth.response(rest, "visual")) == 120
    assert (cohort.truth.response(motor, "visual") == 0).all() and cohort.truth.response(motor, "motor_left").max() > 0.9
    with pytest.raises(ValueError, match="unknown trial type 'chess'"):
        cohort.truth.response(rest, "chess")
    with pytest.raises(ValueError, match="unknown trial type 'chess'"):
        cohort.amplitude("sim-0001", "chess")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([t for t in TASKS if TASKS[t]]), st.floats(70, 1500), st.integers(0, 1000))
def test_events_fit_into_the_run(task, duration, seed):
    events = co.task_events(np.random.default_rng(seed), task, duration)
    assert set(events.trial_type) == set(TASKS[task])
    assert events.onset.iloc[0] == co.START and events.onset.iloc[-1] + co.BLOCK + co.END <= duration + 0.01
    gaps = events.onset.diff().dropna() - co.BLOCK
    assert gaps.between(co.PAUSE[0] - 0.01, co.PAUSE[1] + 0.01).all()
    counts = events.trial_type.value_counts()
    assert counts.max() - counts.min() <= 1


def test_patterns_lie_where_their_names_say():
    for n in (100, 200, 300, 400):
        sites = data.Space.named(f"schaefer{n}")
        left, visual, language = (co.activation_pattern(k, sites.name) for k in ("motor_left", "visual", "language"))
        assert (sites.hemisphere[left > 0.1] == "R").all() and (sites.network[left > 0] == "SomMot").all()
        assert set(sites.network[visual > 0]) == {"Vis"} and (sites.hemisphere[language > 0.3] == "L").all()
        assert co.activation_pattern("memory", sites.name).min() < -0.5


def test_drift_is_slow():
    drift = co.slow_drift(np.random.default_rng(0), 400, 500, 1.4)
    f, p = co.power_spectrum(drift, 1.4, smooth=1)
    assert abs(drift.var() - 1) < 0.1 and p[f > 0.015].sum() / p.sum() < 0.01


# --- streaming


def test_memory_does_not_grow_with_the_cohort():
    def peak(n):
        cohort = Cohort(n_subjects=n, n_sessions=1, n_frames=60, tasks=("rest",))
        cohort[0]
        tracemalloc.start()
        for _ in cohort:
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(200) < 1.3 * peak(10) + 2e5


def test_importing_the_module_is_light():
    code = "import sys, fmri_book.cohort; print([m for m in ('nilearn', 'nibabel', 'plotly', 'sklearn', 'torch', 'brainspace') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert out.stdout.strip() == "[]"


# --- bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"space": "schaefer500"}, r"unknown space 'schaefer500': expected one of fsaverage5"),
        ({"tr": 0}, r"expected a repetition time.*greater than 0, found 0"),
        ({"tr": -1.4}, r"found -1.4"),
        ({"tr": 720}, r"milliseconds"),
        ({"tasks": ("rest", "chess")}, r"unknown task 'chess': expected one of rest, motor"),
        ({"tasks": ()}, r"expected at least one task.*found none"),
        ({"n_frames": 40, "tr": 1.0}, r"task 'motor': expected a run of at least 68 s.*found 40 s"),
        ({"n_frames": 3}, r"n_frames to be a whole number of at least 8, found 3"),
        ({"n_subjects": 0}, r"n_subjects to be a whole number of at least 1, found 0"),
        ({"n_subjects": 2.5}, r"found 2.5"),
        ({"seed": -1}, r"seed to be a whole number of at least 0, found -1"),
        ({"parcels": 1000}, r"group connectivity matrix \(100, 200, 300, 400\), found 1000"),
        ({"activation": -1}, r"activation to be a number from 0 up, found -1"),
        ({"drift": float("nan")}, r"drift .* found nan"),
        ({"subject_share": 0.8, "session_share": 0.2}, r"at most 0.9, found 1"),
        ({"spread": 0.5}, r"expected room for 2.5 SD on both sides of Default–Cont, Vis–SomMot.* use a spread of 0\.\d+ at most \(found 0.5\)"),
        ({"spread": 0}, r"expected a spread above 0 for the effects on .*Default–Cont.*, found 0"),
        ({"session_spread": -0.1}, r"session_spread to be a number from 0 up, found -0.1"),
        ({"drift": "much"}, r"drift to be a number from 0 up, found 'much'"),
        ({"parcels": 100.0}, r"group connectivity matrix .*found 100.0"),
        ({"tasks": ("rest", "rest")}, r"expected every task once, found"),
        ({"spectrum": Spectrum(band=(0.01, 0.3)), "tr": 2.0}, r"expected a band below 0.25 Hz"),
        ({"effects": (Effect("group", ("Vis", "Cont"), 0.1), Effect("score", ("Cont", "Vis"), 0.1))}, r"at most one effect for each connection"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Cohort(**wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("group", ("Default", "Cont"), 3), r"Cohen d from -2 to 2, found 3"),
        (("score", ("Default", "Cont"), 1.0), r"correlation from -0.95 to 0.95, found 1.0"),
        (("score", ("Default", "Cont"), float("nan")), r"found nan"),
        (("age", ("Default", "Cont"), 0.1), r"unknown trait 'age': expected 'group' or 'score'"),
        (("group", ("Default", "Default"), 0.1), r"found \('Default', 'Default'\)"),
        (("group", ("Default", "Amygdala"), 0.1), r"two of the networks Vis, SomMot.*found"),
    ],
)
def test_wrong_effects_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Effect(*arguments)


def test_wrong_requests_are_refused():
    cohort = small(tasks=("rest",))
    with pytest.raises(ValueError, match=r"unknown subject 'sim-0009': expected sim-0001 to sim-0004"):
        cohort.run("sim-0009")
    with pytest.raises(ValueError, match=r"unknown session 3: expected 1 to 2"):
        cohort.run("sim-0001", 3)
    with pytest.raises(ValueError, match=r"unknown task 'motor': expected one of rest"):
        cohort.run("sim-0001", 1, "motor")
    with pytest.raises(IndexError, match=r"below 8, found 8"):
        cohort[8]
    with pytest.raises(TypeError, match="one at a time"):
        cohort[:3]
    with pytest.raises(ValueError, match=r"unknown preset 'huge': expected one of ci, gpu, paper"):
        Cohort.from_preset("huge")
    with pytest.raises(ValueError, match=r"unknown trial type 'chess': expected one of motor_left"):
        co.activation_pattern("chess")
    with pytest.raises(ValueError, match=r"white share from 0 to 1"):
        Spectrum(white=1.5)
    with pytest.raises(ValueError, match=r"two rising frequencies"):
        Spectrum(band=(0.1, 0.01))


def test_presets_are_cohorts():
    for name, preset in co.PRESETS.items():
        cohort = Cohort.from_preset(name)
        assert len(cohort) == preset.n_subjects * preset.n_sessions * 6 and cohort.space == preset.space
