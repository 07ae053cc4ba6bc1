"What a trained model knows: attention against a written-out softmax, votes and fingerprints against hand-made cases, no leakage."

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmri_book import cli
from fmri_book import readouts as O
from fmri_book import recordings as R
from fmri_book.brainlm import (
    BrainLMConfig,
    BrainLMForFinetuning,
    BrainLMForPretraining,
    BrainLMModel,
    draw_mask,
)
from fmri_book.brainlm_2024 import BrainLMMAE, BrainLMMAEConfig
from fmri_book.cohort import Cohort
from fmri_book.data import Run, Space, connectivity, load_example_run, parcel_networks, zscore
from fmri_book.forecasting import RecordingReconstruction, reconstruct_recording
from fmri_book.mae import InputSpec
from fmri_book.splits import Scaler
from fmri_book.storage import Layout, Record, write_store

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
SMALL |= dict(num_timepoints_per_voxel=32, timepoint_patching_size=8)


def model_of(parcels=6, seed=0, kind=BrainLMForPretraining, **fields):
    torch.manual_seed(seed)
    return kind(BrainLMConfig(**SMALL | dict(num_brain_voxels=parcels, xyz_scale=0.05) | fields)).eval()


def inputs_of(parcels=6, batch=2, frames=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, parcels, frames, generator=g), torch.randn(parcels, 3, generator=g) * 40


def written_out(model, signal, xyz, layer, own_block=False, mask=None):
    "The profiles from the whole S × S softmax, token by token."
    body = getattr(model, "model", model)
    x = body.embeddings(signal, xyz, mask)
    x = torch.cat([body.embeddings.cls_token.expand(len(x), -1, -1), x], 1)
    for before in body.layers[: layer % len(body.layers)]:
        x = before(x, signal.shape[1])
    at, parcels = body.layers[layer], signal.shape[1]
    q, k, _ = at.attention.project(at.layernorm_before(x))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    block = (torch.arange(q.shape[2]) - 1) // parcels
    allowed = (block[None] == block[:, None]) if own_block else (block[None] <= block[:, None])
    if body.config.open_cls:
        allowed = allowed | (torch.arange(q.shape[2]) == 0)[None]
    else:
        allowed[:, 0] = False
    weights = scores.masked_fill(~allowed, -torch.inf)[:, :, 1:].softmax(-1)[..., 1:]
    weights = weights / weights.sum(-1, keepdim=True)  # without the class token
    out = torch.zeros(len(x), parcels, parcels)
    for reader in range(weights.shape[2]):
        for read in range(weights.shape[3]):
            out[:, reader % parcels, read % parcels] += weights[:, :, reader, read].mean(1)
    return out / (weights.shape[2] / parcels)


@pytest.mark.parametrize("fields", [{}, {"open_cls": True}, {"legacy_mask": True}])
@pytest.mark.parametrize("layer", [0, 1, -1, -2])
@pytest.mark.parametrize("own_block", [False, True])
def test_profiles_are_the_softmax_written_out(fields, layer, own_block):
    model, (signal, xyz) = model_of(**fields), inputs_of()
    mask = draw_mask(2, 6, 4, generator=torch.Generator().manual_seed(1))
    for hidden in (None, mask):
        found = O.attention_profiles(model, signal, xyz, layer, own_block=own_block, mask=hidden)
        with torch.no_grad():
            expected = written_out(model, signal, xyz, layer, own_block, hidden)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 4), st.booleans())
def test_profiles_sum_to_one_and_follow_the_order_of_parcels(seed, parcels, blocks, own_block):
    model, (signal, xyz) = model_of(parcels, seed), inputs_of(parcels, 2, 8 * blocks, seed)
    found = O.attention_profiles(model, signal, xyz, own_block=own_block)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, parcels))
    assert (found >= 0).all()
    order = torch.randperm(parcels, generator=torch.Generator().manual_seed(seed))
    moved = O.attention_profiles(model, signal[:, order], xyz[order], own_block=own_block)
    torch.testing.assert_close(moved, found[:, order][:, :, order], atol=1e-5, rtol=1e-4)


def test_profiles_take_every_class_and_leave_the_mode_alone():
    signal, xyz = inputs_of()
    trained = model_of().train()
    found = O.attention_profiles(trained, signal, xyz)
    assert trained.training and torch.equal(found, O.attention_profiles(trained, signal, xyz))  # no dropout
    torch.testing.assert_close(O.attention_profiles(trained.model, signal, xyz), found)
    head = BrainLMForFinetuning(trained.config)
    head.model.load_state_dict(trained.model.state_dict())
    torch.testing.assert_close(O.attention_profiles(head, signal, xyz), found)
    trained.model.layers[0].eval()  # a part that is frozen stays in its mode
    before = [part.training for part in trained.modules()]
    O.attention_profiles(trained, signal, xyz)
    assert [part.training for part in trained.modules()] == before
    with pytest.raises(ValueError):
        O.attention_profiles(trained, signal, xyz, 5)
    assert [part.training for part in trained.modules()] == before


def test_one_sample_or_many_give_the_same_profiles():
    model, (signal, xyz) = model_of(), inputs_of(batch=3)
    one = torch.cat([O.attention_profiles(model, s[None], xyz) for s in signal])
    torch.testing.assert_close(O.attention_profiles(model, signal, xyz), one, atol=1e-6, rtol=1e-5)


def test_profiles_of_what_is_not_there_are_refused():
    model, (signal, xyz) = model_of(), inputs_of()
    with pytest.raises(ValueError, match="expected a layer from -2 to 1, found 2"):
        O.attention_profiles(model, signal, xyz, 2)
    with pytest.raises(TypeError, match="expected a BrainLM model, found Linear"):
        O.attention_profiles(torch.nn.Linear(2, 2), signal, xyz)
    with pytest.raises(ValueError, match="multiple of 8 frames"):
        O.attention_profiles(model, signal[..., :30], xyz)
    with pytest.raises(ValueError, match="scaled parcel by parcel"):
        O.attention_profiles(model, signal + 1e4, xyz)


# ---- networks


def test_who_may_vote():
    space = Space.named("schaefer100")
    every, other, apart = (O.voters(space, rule) for rule in ("parcel", "hemisphere", "apart"))
    assert every.sum() == 100 * 99 and not every.diagonal().any()
    assert other.sum() == 2 * 50 * 50 and not other[:50, :50].any()
    xyz, mirrored = space.coords, space.coords * [-1, 1, 1]
    for i, j in ((0, 1), (3, 77), (20, 70)):
        near = min(np.linalg.norm(xyz[i] - xyz[j]), np.linalg.norm(xyz[i] - mirrored[j]))
        assert apart[i, j] == (near > 40) == apart[j, i]
    assert np.array_equal(O.voters("schaefer100", "apart", mm=0), O.voters("schaefer100", "apart", 0.0))
    with pytest.raises(ValueError, match="rule from parcel, hemisphere, apart, found 'left'"):
        O.voters(space, "left")


def test_votes_by_hand():
    places = np.array([[0.0], [1], [2], [10], [11], [5.2]])
    labels = np.array(["a", "a", "b", "b", "b", "b"])
    one = O.network_knn(places, labels, 1, metric="euclidean")
    assert one.predicted.tolist() == ["a", "a", "a", "b", "b", "b"]  # parcel 2: 1 is as near as it gets
    # two neighbours of different networks: the nearer decides
    assert O.network_knn(places, labels, 2, metric="euclidean").predicted[5] == "b"
    three = O.network_knn(places, labels, 3, metric="euclidean")
    assert three.accuracy == np.mean(three.predicted == labels) == float(three)
    only = np.zeros((6, 6), bool)
    only[:, 3:5] = True
    found = O.network_knn(places, labels, 1, allowed=only, metric="euclidean")
    assert set(found.predicted) == {"b"}  # also for 3 and 4, which have each other


def test_nobody_votes_for_itself():
    labels, rng = np.array(list("abcdefgh")), np.random.default_rng(0)
    found = O.network_knn(rng.normal(size=(8, 3)), labels, 1, allowed=np.ones((8, 8), bool))
    assert found.accuracy == 0  # every label occurs once


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_votes_follow_the_order_of_parcels_and_ignore_the_diagonal(seed, k):
    rng = np.random.default_rng(seed)
    profiles, labels = rng.random((20, 20)), rng.choice(list("abc"), 20)
    found, order = O.network_knn(profiles, labels, k), rng.permutation(20)
    moved = O.network_knn(profiles[order][:, order], labels[order], k)
    assert np.array_equal(moved.predicted, found.predicted[order])
    np.fill_diagonal(profiles, rng.normal(size=20) * 100)
    assert np.array_equal(O.network_knn(profiles, labels, k).predicted, found.predicted)


def test_planted_networks_are_found_and_random_ones_are_not():
    rng, labels = np.random.default_rng(0), np.repeat(list("abcd"), 25)
    same = labels[:, None] == labels
    planted = same + rng.normal(size=(100, 100))
    assert O.network_knn(planted, labels, 5).accuracy > 0.95
    shuffled = [O.network_knn(planted, rng.permutation(labels), 5).accuracy for _ in range(20)]
    assert 0.15 < np.mean(shuffled) < 0.35
    low, high = O.network_knn(planted, rng.permutation(labels), 5).interval()
    assert low < 0.25 < high


def test_connectivity_of_the_real_run_knows_networks_and_places_alone_know_less():
    run, labels = load_example_run().to("schaefer100"), parcel_networks(100)
    of = lambda x, rule, **how: O.network_knn(x, labels, 5, O.voters("schaefer100", rule), **how).accuracy
    places = Space.named("schaefer100").coords
    for rule in ("parcel", "hemisphere", "apart"):
        assert of(connectivity(run.bold), rule) > of(places, rule, metric="euclidean") + 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=0), "k from 1 to 9"),
        (dict(k=10), "k from 1 to 9.*found 10"),
        (dict(labels=list("ab")), "labels and voters for 10 parcels, found 2"),
        (dict(allowed=np.ones((3, 3), bool)), r"found 10 and \(3, 3\)"),
        (dict(metric="cosine"), "metric from correlation, euclidean, found 'cosine'"),
        (dict(features=np.full((10, 2), np.nan)), "20 that are not finite"),
        (dict(features=np.zeros(10)), r"\(parcels, columns\)"),
    ],
)
def test_votes_refuse(change, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        O.network_knn(**dict(features=rng.random((10, 4)), labels=list("ababababab"), k=3) | change)


# ---- readouts


def planted(n=90, columns=12, noise=0.5, rows=1, seed=0):
    rng = np.random.default_rng(seed)
    who = np.repeat([f"s{i:03d}" for i in range(n)], rows)
    target = np.repeat(rng.normal(size=n), rows)
    features = np.outer(target, rng.normal(size=columns)) + noise * rng.normal(size=(n * rows, columns))
    return features, target, who


@pytest.mark.parametrize("kind", O.KINDS)
def test_a_planted_number_is_read_out(kind):
    found = O.readout(*planted(), kind)
    assert found.metric == "R²" and found.score > 0.7 and -0.1 < found.baseline <= 0
    low, high = found.interval()
    assert low < found.score < high <= 1
    assert float(found) == found.score and len(found.chosen) == 5


@pytest.mark.parametrize("kind", O.KINDS)
def test_a_planted_class_is_read_out(kind):
    x, y, who = planted()
    found = O.readout(x, np.where(y > 0.3, "patient", "control"), who, kind)
    assert found.metric == "balanced accuracy" and found.score > 0.8 and found.baseline == 0.5


@pytest.mark.parametrize("kind", O.KINDS)
def test_noise_is_not_read_out(kind):
    scores = []
    for seed in range(3):
        x, _, who = planted(60, rows=2, seed=seed)
        noise = np.repeat(np.random.default_rng(100 + seed).normal(size=60), 2)
        scores.append(O.readout(x, noise, who, kind).score)
    assert np.mean(scores) < 0.1, scores


def test_a_subject_is_never_on_both_sides():
    "Features that name the subject and say nothing else: with one subject on both sides, R² would be near 1."
    rng = np.random.default_rng(0)
    person, target = np.repeat(rng.normal(size=(40, 30)), 5, 0), np.repeat(rng.normal(size=40), 5)
    who, x = np.repeat(np.arange(40), 5), person + 0.01 * rng.normal(size=(200, 30))
    assert O.readout(x, target, who, "knn").score < 0.1
    assert O.readout(x, target, np.arange(200), "knn").score > 0.4  # had nobody said whose rows they are
    for classes in (False, True):
        for train, test in O._folds(who.astype(str), target > 0, 5, classes, 0):
            assert not set(who[train]) & set(who[test])


def watched(monkeypatch, x, *methods):
    "Every call of these methods, in order: class, method, which rows of x it was given (-1: none as it stands there), targets."
    number, calls = {row.tobytes(): i for i, row in enumerate(x)}, []

    def noted(owner, name, real):
        def call(self, X, *rest, **more):
            calls.append((owner, name, [number.get(np.array(row).tobytes(), -1) for row in X], *rest))
            return real(self, X, *rest, **more)

        return call

    for owner, name in methods:
        monkeypatch.setattr(owner, name, noted(owner, name, getattr(owner, name)))
    return calls


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("kind", O.KINDS)
def test_nothing_is_fitted_on_test_rows(kind, classes, monkeypatch):
    "Scaler, components and predictor are fitted on one set of rows, and nobody in it is in the rows that are asked about next."
    from sklearn import linear_model, neighbors, neural_network
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler as Standard

    predictor = {
        "ridge": (linear_model.Ridge, linear_model.RidgeClassifier),
        "knn": (neighbors.KNeighborsRegressor, neighbors.KNeighborsClassifier),
        "mlp": (neural_network.MLPRegressor, neural_network.MLPClassifier),
    }[kind][classes]
    (x, y, who), passes = planted(40, rows=2), []
    target = np.where(y > 0, "a", "b") if classes else y
    steps = [(Standard, "fit"), (Standard, "transform"), (PCA, "fit_transform"), (predictor, "fit")]
    calls = watched(monkeypatch, x, *steps)
    O.readout(x, target, who, kind, pca=3)
    for owner, name, rows, *rest in calls:
        if (owner, name) == (Standard, "fit"):  # comes first, and is given the rows as they are
            passes.append({"taught": rows, "asked": None, "PCA": 0, "predictor": 0})
        elif owner is Standard:
            if rows != passes[-1]["taught"]:
                passes[-1]["asked"] = rows
        else:  # changed rows, as many as were taught, and with their targets
            taught = passes[-1]["taught"]
            assert len(rows) == len(taught)
            passes[-1]["PCA" if owner is PCA else "predictor"] += 1
            if owner is predictor:
                given = y[taught]
                expected = target[taught] if classes else (given - given.mean()) / given.std()
                assert np.array_equal(rest[0], expected)
    assert len(passes) == 5 * (3 + 1)  # three inner folds, then the outer one, five times
    for i, each in enumerate(passes):
        assert each["PCA"] == 1 <= each["predictor"] and -1 not in each["taught"] + each["asked"]
        assert not set(who[each["taught"]]) & set(who[each["asked"]])
        test = set(who[passes[i // 4 * 4 + 3]["asked"]])
        assert not set(who[each["taught"]]) & test  # settings too are chosen without the test subjects
    assert sorted(row for each in passes[3::4] for row in each["asked"]) == list(range(80))


def test_rows_without_a_target_are_left_out():
    x, y, who = planted()
    y[:10] = np.nan
    found = O.readout(x, y, who)
    assert found.known.sum() == 80 == len(found.predicted) and not found.known[:10].any()
    names = np.where(np.nan_to_num(y) > 0, "a", "b").astype(object)
    names[:4] = ""
    assert O.readout(x, names, who).known.sum() == 86


def test_r2_is_not_clipped():
    x, y, who = planted(30, 40, noise=1.0)
    found = O.readout(x * 0 + np.random.default_rng(1).normal(size=x.shape), y, who, "mlp")
    assert found.score < 0
    assert found.score == pytest.approx(1 - ((y - found.predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("kind", O.KINDS)
def test_order_of_rows_does_not_matter_and_calls_repeat(kind, classes):
    "Whoever a row is about gets the same prediction, wherever in the table the row stands."
    x, y, who = planted(rows=2)
    y = np.where(y > 0.3, "patient", "control") if classes else y
    order = np.random.default_rng(1).permutation(len(x))
    a, b = (O.readout(x, y, who, kind) for _ in range(2))
    assert np.array_equal(a.predicted, b.predicted)
    moved = O.readout(x[order], y[order], who[order], kind)
    assert moved.chosen == a.chosen and np.array_equal(moved.groups, who[order])
    same = np.array_equal if classes else lambda one, other: np.abs(one - other).max() < 1e-6
    assert same(moved.predicted, a.predicted[order])


def test_shuffled_targets_bring_nothing():
    x, y, who = planted(60, rows=2)
    scores = O.shuffled_scores(x, y, who, 4)
    assert scores.shape == (4,) and scores.mean() < 0.1 < O.readout(x, y, who).score
    with pytest.raises(ValueError, match="one target for each subject"):
        O.shuffled_scores(x, np.arange(120.0), who)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="svm"), "kind from ridge, knn, mlp, found 'svm'"),
        (dict(groups=["a"] * 90), "at least 5 subjects.*found 1"),
        (dict(targets=np.zeros(90)), "target that differs"),
        (dict(targets=np.arange(90).astype(str)), r"found 90 for 90; numbers must come as numbers"),
        (dict(targets=np.zeros(3)), r"found \(90, 12\), \(3,\), \(90,\)"),
        (dict(features=np.full((90, 12), np.inf)), "90 rows that are not"),
    ],
)
def test_readout_refuses(change, message):
    x, y, who = planted()
    with pytest.raises(ValueError, match=message):
        O.readout(**dict(features=x, targets=y, groups=who) | change)


def test_features_of_connectivity():
    run = Cohort(n_subjects=1, tasks=("rest",), n_frames=100)[0]
    found = O.connectivity_features(run.bold)
    assert found.shape == (4950,)
    assert found[0] == pytest.approx(np.arctanh(np.corrcoef(run.bold[:, 0], run.bold[:, 1])[0, 1]), abs=1e-4)


# ---- fingerprints


def test_fingerprint_by_hand():
    rng = np.random.default_rng(0)
    person = np.repeat(rng.normal(size=(10, 20)), 2, 0)
    who, when = np.repeat(np.arange(10), 2), np.tile([1, 2], 10)
    found = O.fingerprint(person + 0.1 * rng.normal(size=(20, 20)), who, when)
    assert found.accuracy == 1 == float(found) == found.auc and found.chance == pytest.approx(1 / 19)
    assert found.interval() == (1, 1)
    lost = O.fingerprint(rng.normal(size=(400, 20)), np.repeat(np.arange(200), 2), np.tile([1, 2], 200))
    assert lost.accuracy < 0.05 and 0.45 < lost.auc < 0.55
    low, high = lost.interval(of="closer")
    assert low < 0.5 < high


def test_the_same_session_does_not_count():
    "Two windows of one session are alike for reasons of the day: they may not be the answer."
    rng = np.random.default_rng(0)
    day = np.repeat(rng.normal(size=(20, 30)), 2, 0)  # 10 people, 2 sessions, 2 windows
    who, when = np.repeat(np.arange(10), 4), np.tile([1, 1, 2, 2], 10)
    found = O.fingerprint(day, who, when)
    assert found.accuracy < 0.4 and found.chance == pytest.approx(2 / 38)


def test_the_unbalanced_chance_of_the_real_sessions():
    "12 people with 3 sessions and 12 with 2: about 0.03, as shared/data tells."
    who = np.r_[np.repeat(np.arange(12), 3), np.repeat(np.arange(12, 24), 2)]
    when = np.r_[np.tile([1, 2, 3], 12), np.tile([1, 2], 12)]
    x = np.random.default_rng(0).normal(size=(60, 8))
    assert O.fingerprint(x, who, when).chance == pytest.approx((36 * 2 / 59 + 24 / 59) / 60)


def test_people_seen_once_are_strangers():
    rng = np.random.default_rng(0)
    found = O.fingerprint(rng.normal(size=(5, 4)), ["a", "a", "b", "b", "c"], [1, 2, 1, 2, 1])
    assert set(found.subjects) == {"a", "b"} and len(found.correct) == 4
    with pytest.raises(ValueError, match="somebody with two sessions"):
        O.fingerprint(rng.normal(size=(3, 4)), list("abc"), [1, 1, 1])
    with pytest.raises(ValueError, match="two subjects"):
        O.fingerprint(rng.normal(size=(3, 4)), list("aaa"), [1, 2, 3])
    with pytest.raises(ValueError, match="finite embeddings"):
        O.fingerprint(np.full((4, 4), np.nan), list("aabb"), [1, 2, 1, 2])


def test_standardising_keeps_a_common_pattern_from_drowning_people():
    rng = np.random.default_rng(0)
    person = np.repeat(rng.normal(size=(20, 30)), 2, 0) + 0.5 * rng.normal(size=(40, 30))
    drowned = 0.02 * person + rng.normal(size=30) + 3 * rng.normal(size=(40, 1)) * np.eye(30)[0]
    who, when = np.repeat(np.arange(20), 2), np.tile([1, 2], 20)
    with_, without = (O.fingerprint(drowned, who, when, standardise=s).accuracy for s in (True, False))
    assert with_ > without


# ---- recordings of people through BrainLM


class Records(list):
    layout = Layout.of("schaefer100")


@pytest.fixture(scope="module")
def people():
    return list(Cohort(n_subjects=2, n_sessions=2, n_frames=80, tasks=("rest",)))


@pytest.fixture(scope="module")
def stores(people, tmp_path_factory):
    "The same runs: as they are, and z-scored with their statistics beside."
    folder = tmp_path_factory.mktemp("stores")
    records = Records(Record.from_run(r) for r in people)
    for scale in ("none", "site"):
        write_store(
            records, folder / scale, scale=scale, dtype=None if scale == "none" else "float16", progress=False
        )
    return folder


def fitted(people, kind=BrainLMModel, z=False, **fields):
    runs = [r.replace(bold=zscore(r.bold)) if z else r for r in people]
    scaler = Scaler.fit(Records(map(Record.from_run, runs)), "robust", subjects="all")
    torch.manual_seed(0)
    options = SMALL | dict(zscore=z, xyz_scale=0.02) | fields
    return kind(BrainLMConfig.for_data("schaefer100", 1.4, scaler, **options)).eval()


@pytest.mark.parametrize("z", [False, True])
def test_a_run_is_embedded_as_the_model_would_read_it(people, z):
    model, run = fitted(people, z=z), people[0]
    found = R.embed_run(model, run, progress=False)
    assert found.cls.shape == (3, 1, 16) and found.patch.shape == (3, 400, 16) and found.reg is None
    bold = run.bold
    if z:
        bold = (
            ((bold - bold.mean(0, dtype=float)) / bold.std(0, dtype=float))
            .astype(np.float16)
            .astype(np.float32)
        )
    scaler = model.config.scaler
    x = (bold - np.float32(scaler["centre"])) / np.float32(scaler["scale"])
    with torch.no_grad():
        hidden = model(torch.from_numpy(x[32:64].T[None].copy())).last_hidden_state
    np.testing.assert_allclose(found.patch[1], hidden[0, 1:], atol=2e-3 if z else 1e-4)
    np.testing.assert_allclose(found.cls[1, 0], hidden[0, 0], atol=2e-3 if z else 1e-4)


@pytest.mark.parametrize("z", [False, True])
def test_profiles_of_a_whole_recording(people, stores, z):
    "The mean over windows of what the model reads; a file of a store gives the same as the run."
    model, run = fitted(people, z=z), people[0]
    found = O.run_profile(model, run, 0, own_block=True, batch_size=2)
    bold = zscore(run.bold) if z else run.bold
    x = (bold - np.float32(model.config.scaler["centre"])) / np.float32(model.config.scaler["scale"])
    cut = torch.from_numpy(np.stack([x[s : s + 32].T for s in (0, 32, 48)]))  # 80 frames: the last overlaps
    expected = O.attention_profiles(model, cut.float(), None, 0, own_block=True).mean(0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    stored = R.recordings_at(stores / "none", model.input_spec)[0]
    again = O.run_profile(model, stored[f"sub-{run.subject}_ses-{run.session}_task-rest"], 0, own_block=True)
    np.testing.assert_allclose(again, found, atol=1e-5)
    model.config.scaler = None
    with pytest.raises(ValueError, match="knows its scaler"):
        O.run_profile(model, run)


def test_the_same_recording_twice_is_bit_equal(people):
    model = fitted(people, BrainLMForPretraining).train()  # dropout and masks must not leak in
    one, two = (R.embed_run(model, people[0], progress=False) for _ in range(2))
    other = R.embed_run(model, people[0], batch_size=1, progress=False)
    for name in ("cls", "patch", "mean"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)
    assert model.training


def test_the_real_run_is_embedded_from_any_space(people):
    model, run = fitted(people, z=True), load_example_run()
    run = run.replace(bold=run.bold[:64], confounds=None)
    found = R.embed_run(model, run, progress=False)
    assert np.array_equal(found.patch, R.embed_run(model, run.to("schaefer100"), progress=False).patch)
    assert len(found) == 2 and np.isfinite(found.patch).all()


@pytest.mark.parametrize("scale, z", [("none", False), ("site", False), ("site", True), ("none", True)])
def test_stores_give_what_runs_give(people, stores, scale, z, tmp_path):
    model = fitted(people, z=z)
    report = R.embed_files(model, [stores / scale], tmp_path / "out", patches=True, progress=False)
    assert report.counts == {"done": 4} and report.exit_status == 0
    for run in people:
        found = R.RunEmbeddings.load(tmp_path / "out" / f"sub-{run.subject}_ses-{run.session}_task-rest.npz")
        expected = R.embed_run(model, run, progress=False)
        # halves in the store: three digits
        np.testing.assert_allclose(found.patch, expected.patch, atol=0.02 if scale == "site" else 1e-6)


def test_a_saved_model_by_the_name_of_its_family(people, stores, tmp_path, capsys):
    model = fitted(people, BrainLMForPretraining, z=True)
    model.save_pretrained(tmp_path / "model")
    loaded = R.load_model(tmp_path / "model", family="brainlm")
    assert isinstance(loaded, BrainLMModel) and loaded.input_spec == model.input_spec
    assert isinstance(R.load_model(tmp_path / "model", "brainlm", predicts=True), BrainLMForPretraining)
    expected = R.embed_run(model, people[1], progress=False)
    assert np.array_equal(R.embed_run(loaded, people[1], progress=False).patch, expected.patch)
    call = ["embed", tmp_path / "model", stores / "none", "-o", tmp_path / "out", "--family", "brainlm"]
    assert cli.main([str(x) for x in call]) == 0
    found = R.RunEmbeddings.load(tmp_path / "out" / "sub-sim-0001_ses-2_task-rest.npz")
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-6)


def without(run, parcel, frames=slice(None), value=500.0):
    "The run, with a parcel outside the field of view."
    bold = run.bold.copy()
    bold[frames, parcel] = value
    return run.replace(bold=bold, allow_constant=1)


@pytest.mark.parametrize("z", [False, True])
def test_a_parcel_without_data_is_hidden_from_the_model(people, z):
    model, name = fitted(people, z=z), Space.named("schaefer100").names[7]
    found, other = (R.embed_run(model, without(people[0], 7, value=v), progress=False) for v in (0, 9e4))
    assert np.array_equal(found.patch, other.patch)  # whatever stands in its place is not read
    assert not np.allclose(found.patch, R.embed_run(model, people[0], progress=False).patch, atol=1e-3)
    assert found.about["missing"] == [name]
    assert found.about["notes"][-1].startswith(f"1 parcels without data ({name}; in 3 of 3 windows), hidden")
    frames = R.read_frames(without(people[0], 7), model.input_spec).packed[32:64].astype(np.float32)
    given = model.scaled({"signal": torch.from_numpy(frames)[None]})
    with torch.no_grad():
        hidden = model(**given, missing=torch.arange(100)[None] == 7).last_hidden_state
    np.testing.assert_allclose(found.patch[1], hidden[0, 1:], atol=1e-4)
    assert np.isfinite(found.mean).all()
    one = R.embed_run(model, without(people[0], 7), 1, progress=False)
    np.testing.assert_allclose(one.mean, found.mean, atol=1e-5)


def test_what_moves_is_not_hidden_and_what_does_not_is_hidden_while_it_does_not(people):
    model, run = fitted(people), people[0]
    found, whole = (
        R.embed_run(model, r, progress=False) for r in (without(run, 7, slice(32)), without(run, 7))
    )
    usual = R.embed_run(model, run, progress=False)
    assert np.array_equal(found.patch[0], whole.patch[0])
    np.testing.assert_allclose(found.patch[1:], usual.patch[1:], atol=1e-5)
    assert "in 1 of 3 windows" in found.about["notes"][-1]
    assert usual.about["missing"] == [] and not any("without data" in note for note in usual.about["notes"])
    still = run.bold.copy()
    still[32:64] = 500
    for call in (lambda r: R.embed_run(model, r, progress=False), lambda r: O.run_profile(model, r)):
        with pytest.raises(
            ValueError, match=r"found 1 of 3 in which all are constant, the first from 44.8 s"
        ):
            call(run.replace(bold=still))


def test_profiles_hide_a_parcel_without_data_and_say_so(people):
    model, name = fitted(people), Space.named("schaefer100").names[7]
    with pytest.warns(UserWarning, match=f"run_profile: .*1 parcels without data .{name}; in 3 of 3 windows"):
        found = O.run_profile(model, without(people[0], 7), 0)
    scaler = model.config.scaler
    x = (without(people[0], 7).bold - np.float32(scaler["centre"])) / np.float32(scaler["scale"])
    cut = torch.from_numpy(np.stack([x[s : s + 32].T for s in (0, 32, 48)])).float()
    missing = (torch.arange(100) == 7).expand(3, -1)
    expected = O.attention_profiles(model, cut, None, 0, missing=missing).mean(0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.isfinite(found).all()


def test_the_command_embeds_parcels_without_data_and_says_so(people, tmp_path, capsys):
    fitted(people, BrainLMForPretraining).save_pretrained(tmp_path / "model")
    runs = Records(Record.from_run(r) for r in (without(people[0], 7), people[1]))
    write_store(runs, tmp_path / "store", scale="none", progress=False)
    call = ["embed", str(tmp_path / "model"), str(tmp_path / "store"), "-o", str(tmp_path / "out")]
    for state in ("done", "kept"):
        assert cli.main(call) == 0
        said = capsys.readouterr().out
        assert f"2 {state}" in said and said.count("1 parcels without data, hidden from the model") == 1
    assert cli.main([*call, "--json"]) == 0
    assert [row["missing"] for row in json.loads(capsys.readouterr().out)["runs"]] == [1, 0]
    assert pd.read_csv(tmp_path / "out" / "report.csv").missing.tolist() == [1, 0]
    call = ["forecast", *call[1:3], "-o", str(tmp_path / "next.npz"), "--key", "sub-sim-0001_ses-1_task-rest"]
    assert cli.main(call) == 0 and "note: 1 parcels without data" in capsys.readouterr().out


def test_the_models_of_2024_know_no_missing_parcel(people):
    scaler = Scaler.fit(Records(map(Record.from_run, people)), "robust", subjects="all")
    sizes = SMALL | dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_intermediate_size=32)
    model = BrainLMMAE(BrainLMMAEConfig.for_data("schaefer100", 1.4, scaler, **sizes)).eval()
    assert len(R.embed_run(model, people[0], progress=False)) == 3
    with pytest.raises(ValueError, match="no published BrainLM knows a missing parcel"):
        R.embed_run(model, without(people[0], 7), progress=False)


@pytest.mark.parametrize(
    "model_type, family",
    [
        ("brainlm", "brainlm"),
        ("brainlm_mae", "brainlm-2024"),
        ("brainlm_vitmae", "brainlm-2024"),
        (None, "mae"),
    ],
)
def test_the_folder_tells_the_family(model_type, family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    assert R.family_of(tmp_path) == family
    assert R.family_of(tmp_path, "brainlm-2024") == "brainlm-2024"  # told is told
    if model_type:
        with pytest.raises(ValueError, match=f"expected family={family}.*model_type '{model_type}'.*'mae'"):
            R.family_of(tmp_path, "mae")
    for text in ("[]", "{"):
        (tmp_path / "config.json").write_text(text)
        assert R.family_of(tmp_path) == "mae"
    assert R.family_of("some/name") == "mae"


def test_the_command_finds_the_family_by_itself(people, stores, tmp_path, capsys):
    model = fitted(people, BrainLMForPretraining)
    model.save_pretrained(tmp_path / "model")
    call = ["embed", str(tmp_path / "model"), str(stores / "none"), "-o", str(tmp_path / "out")]
    assert cli.main(call) == 0
    found = R.RunEmbeddings.load(tmp_path / "out" / "sub-sim-0001_ses-2_task-rest.npz")
    np.testing.assert_allclose(found.mean, R.embed_run(model, people[1], progress=False).mean, atol=1e-6)
    capsys.readouterr()
    assert cli.main([*call, "--family", "mae"]) == 2
    assert "expected --family brainlm" in capsys.readouterr().err


def test_the_command_reconstructs_by_a_brainlm(people, tmp_path, capsys):
    model, run = fitted(people, BrainLMForPretraining), without(people[0], 7)
    model.save_pretrained(tmp_path / "model")
    write_store(Records([Record.from_run(run)]), tmp_path / "store", scale="none", progress=False)
    call = ["reconstruct", str(tmp_path / "model"), str(tmp_path / "store"), "-o", str(tmp_path / "r.npz")]
    for wrong in (["--masking", "tube"], ["--denoise", "4"]):
        assert cli.main([*call, *wrong]) == 2
        assert f"found {wrong[0]}: only for the family mae" in capsys.readouterr().err
    assert not (tmp_path / "r.npz").exists()
    assert cli.main([*call, "--ratio", ".25", "--seed", "3", "--stride", "16", "--batch-size", "2"]) == 0
    said = capsys.readouterr().out
    assert "80 frames of 100 parcels" in said and "note: 1 parcels without data" in said
    made = RecordingReconstruction.load(tmp_path / "r.npz")
    own = reconstruct_recording(model, run, 0.25, seed=3, stride=16, progress=False)
    np.testing.assert_allclose(made.prediction, own.prediction, atol=1e-5)
    assert made.about["ratio"] == 0.25 and np.isnan(made.prediction[:, 7]).all()
    assert cli.main(call) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main([*call, "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ratio"] == 0.5 and told["missing"] == own.about["missing"] and told["parcels"] == 100
    assert cli.main([*call, "--overwrite", "--family", "brainlm-2024"]) == 2
    assert "mae or brainlm, found one of brainlm-2024" in capsys.readouterr().err
    with pytest.raises(ValueError, match="found BrainLMForPretraining .*forecasting.reconstruct_recording"):
        R.reconstruct_run(model, run, progress=False)


def test_recordings_that_do_not_fit_are_refused(people):
    model, run = fitted(people), people[0]
    bad = {
        "expected a recording for schaefer100.*found schaefer200": Run(
            np.random.rand(80, 200), 1.4, "schaefer200"
        ),
        "at least 32 frames": run.replace(bold=run.bold[:20]),
        "expected signals scaled.*Scaler.fit": run.replace(
            bold=run.bold * 50
        ),  # other units than the scaler's
    }
    for message, recording in bad.items():
        with pytest.raises(ValueError, match=message):
            R.embed_run(model, recording, progress=False)
    spec = InputSpec(space="schaefer100", frames=32, tr=2.0, normalise="none", clip=None, zscore=False)
    frames = R.read_frames(run, spec)
    assert frames.tr == 2.0 and len(frames.packed) == 56  # resampled, not taken as it is
    with pytest.raises(ValueError, match=r"frames of schaefer100 at a TR of 1.4 s, found schaefer100 at 2 s"):
        R.embed_run(model, frames, progress=False)


def test_a_model_that_does_not_know_its_data_is_refused(people):
    model = fitted(people)
    model.config.scaler = None
    with pytest.raises(ValueError, match="knows its scaler, found config.scaler None.*Scaler.fit"):
        R.embed_run(model, people[0], progress=False)
    with pytest.raises(ValueError, match="expected an input_spec"):
        R.embed_run(model_of(100), people[0], progress=False)
    other = fitted(people)
    other.config.layout = "0" * 16
    with pytest.raises(ValueError, match="expected the layout 0000000000000000"):
        R.embed_run(other, people[0], progress=False)


def test_importing_is_light():
    "Nothing beyond what the models' own page needs."
    heavy = [
        "nibabel",
        "nilearn",
        "matplotlib",
        "plotly",
        "omegaconf",
        "webdataset",
        "datasets",
        "sklearn",
        "peft",
        "pycortex",
    ]
    code = f"import json, sys; import fmri_book.readouts; print(json.dumps(sorted(set(sys.modules) & set({heavy}))))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []
