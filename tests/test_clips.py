"""Clips: the published numbers, exact routes, every clip once over ranks and workers, bad input."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmri_book import clips as C
from fmri_book.clips import (
    ClipDataset,
    ClipDecoder,
    ClipRule,
    ClipSampler,
    ClipStream,
    clip_loader,
    dense_batch,
)
from fmri_book.formats import ShardIndex, write_shards
from fmri_book.storage import Layout, Record, Store, write_store
import functools
import operator

pytestmark = pytest.mark.timeout(120)

# Extract of golden/fmri_fm.json: mask 4 × 6 without its first and last pixel, 4 sin(0.7 k) + 0.1 k, padded to 6 × 8.
# Row 2 and 3 (columns 1 to 6) of the first frame, and the sum over all three frames, computed by the published code.
PUBLISHED = {
    "none": (
        [-0.903132975101471, -2.886302947998047, -3.0, -1.7250659465789795, 0.9672560095787048, 3.0],
        [3.0, 3.0, 2.576392889022827, -0.0659170001745224, -2.0187830924987793, -2.316710948944092],
        117.4479137584567,
    ),
    "frame": (
        [
            -0.82915198802948,
            -1.4911810159683228,
            -1.6058520078659058,
            -1.1035330295562744,
            -0.2047719955444336,
            0.683430016040802,
        ],
        [
            1.1590379476547241,
            1.0140659809112549,
            0.3323970139026642,
            -0.5496690273284912,
            -1.2015819549560547,
            -1.3010380268096924,
        ],
        0.0,
    ),
    "global": (
        [
            -1.2630970478057861,
            -1.840988039970398,
            -1.9410840272903442,
            -1.5026060342788696,
            -0.7180709838867188,
            0.05724700167775154,
        ],
        [
            0.4724079966545105,
            0.3458609879016876,
            -0.24917300045490265,
            -1.0191340446472168,
            -1.5881940126419067,
            -1.6750099658966064,
        ],
        0.0,
    ),
}


def corners() -> np.ndarray:
    mask = np.ones((4, 6), bool)
    mask[0, 0] = mask[3, 5] = False
    return mask


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_published_transform(kind):
    k = np.arange(66, dtype=np.float32)
    x = torch.from_numpy((4 * np.sin(0.7 * k) + 0.1 * k).reshape(1, 3, 22))
    out = ClipDecoder(Layout.flat(corners()), 3, kind, size=(6, 8), mask_from="first_frame")(x)
    second, third, total = PUBLISHED[kind]
    image = out["image"]
    assert image.shape == (1, 1, 3, 6, 8) and image.dtype == torch.float32 and out["mask"].sum() == 21
    np.testing.assert_allclose(image[0, 0, 0, 2, 1:7], second, atol=3e-6)
    np.testing.assert_allclose(image[0, 0, 0, 3, 1:7], third, atol=3e-6)
    assert image.sum().item() == pytest.approx(total, abs=3e-5)
    assert (image[..., 0] == 0).all() and (image[..., 0, :] == 0).all() and (image[..., 5, :] == 0).all()


class Source(list):
    layout: Layout


def recordings(lengths, layout=None, tr=1.0, dtype=np.float16, events=None) -> Source:
    layout = layout or Layout.flat(np.random.default_rng(0).random((32, 48)) < 0.6)
    out = Source()
    for i, n in enumerate(lengths):
        values = np.random.default_rng(i).standard_normal((n, layout.n_sites)).astype(dtype)
        values[:, 0] = i  # which run, and below which frame: a clip can be recognised
        values[:, 1] = np.arange(n)
        out.append(Record(values, tr, f"{i:02d}", "1", "rest", events=events))
    out.layout = layout
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    source = recordings([70, 40, 12, 33, 55])
    write_store(source, folder / "store", progress=False)
    write_store(source, folder / "patched", patch=(8, 8), progress=False)
    write_shards(source, folder / "shards", runs_per_shard=2)
    return folder


def cut_up(image, t, h, w):
    b, _, frames, high, wide = image.shape
    x = image.reshape(b, frames // t, t, high // h, h, wide // w, w).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(b, -1, t * h * w)


@pytest.mark.parametrize("kind", ["none", "frame", "global"])
@pytest.mark.parametrize("mask_from", ["layout", "first_frame"])
@pytest.mark.parametrize("folder", ["store", "patched"])
def test_all_routes_agree(made, kind, mask_from, folder):
    clips = ClipDataset(made / folder, mode="random", oversample=2)
    batch = clips.batch([0, 5, 9])
    batch["packed"][1, 0, 5:9] = 0  # pixels that the published rule loses
    told = [batch["packed"], None, None]
    decoder = ClipDecoder(clips.layout, normalise=kind, mask_from=mask_from)
    out = decoder(*told)
    assert torch.equal(decoder.patches(told[0], (4, 8, 8)), cut_up(out["image"], 4, 8, 8))
    assert torch.equal(dense_batch(decoder, *told), out["image"])
    keep = torch.tensor([[3, 1], [7, 2], [0, 23]])
    tokens = cut_up(out["image"], 16, 8, 8)
    mine = decoder.patches(told[0], (16, 8, 8), keep=keep)
    assert torch.equal(mine, torch.stack([tokens[b, keep[b]] for b in range(3)]))
    assert torch.equal(decoder.patches(told[0], (16, 8, 8), keep=keep[0]), tokens[:, keep[0]])


@pytest.mark.parametrize("kind", ["frame", "global"])
def test_against_an_independent_float64_computation(made, kind):
    clips = ClipDataset(made / "patched", mode="random")
    batch = clips.batch([1, 3])
    mask, order = clips.layout.mask, clips.layout.order
    x = np.empty(batch["packed"].shape)
    x[..., order] = batch["packed"].numpy()  # canonical columns
    axis = 2 if kind == "frame" else (1, 2)
    z = (x - x.mean(axis, keepdims=True)) / (x.std(axis, ddof=1, keepdims=True) + 1e-6)
    expected = np.zeros((2, 1, 16, *mask.shape))
    expected[:, 0, :, mask] = np.moveaxis(np.clip(z, -3, 3), 2, 0)
    for stats in ((None, None), (batch["frame_mean"], batch["frame_sd"])):
        image = ClipDecoder(clips.layout, normalise=kind)(batch["packed"], *stats)["image"]
        np.testing.assert_allclose(image, expected, atol=2e-5)
    assert (image.numpy()[..., ~mask] == 0).all()


def test_statistics_stay_float32_under_autocast_and_compile(made):
    clips = ClipDataset(made / "store", mode="random")
    packed = clips.batch([0, 1])["packed"] * 100 + 1000  # bfloat16 statistics would be far off
    decoder = ClipDecoder(clips.layout)
    plain = decoder(packed)["image"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decoder(packed)["image"], plain)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(packed)["image"], plain, atol=1e-5)
    half = ClipDecoder(clips.layout, dtype=torch.bfloat16)(packed)["image"]
    assert half.dtype == torch.bfloat16 and torch.equal(half, plain.bfloat16())


def test_the_input_is_not_changed():
    layout = Layout.flat(corners())
    packed = torch.randn(2, 16, 22)  # float32: no conversion that would copy
    before = packed.clone()
    for decoder in (
        ClipDecoder(layout),
        ClipDecoder(layout, mask_from="first_frame"),
        ClipDecoder(layout, crop=(0.9, 1)),
    ):
        decoder(packed)
        decoder.eval().patches(packed, (16, 2, 2))
        dense_batch(decoder, packed)
    ClipDecoder(Layout.of("schaefer100"), 16, "frame")(torch.randn(1, 16, 100))
    assert torch.equal(packed, before)


def test_crops():
    layout = Layout.flat(np.random.default_rng(0).random((40, 100)) < 0.9)
    x = torch.randn(64, 16, layout.n_sites)
    decoder = ClipDecoder(layout, crop=(0.9, 1.0))
    left, top, w, h = decoder.crop_windows(2000).T
    area = w * h / 4000
    assert (0.88 < area).all() and (area <= 1).all() and (left + w <= 100).all() and (top + h <= 40).all()
    assert torch.allclose(w / h, torch.tensor(2.5), atol=0.1)
    out = decoder(x)
    assert (
        out["mask"].shape == (64, 40, 100)
        and (out["image"][:, 0].transpose(0, 1)[:, ~out["mask"]] == 0).all()
    )
    inside = [out["image"][b, 0, 3][out["mask"][b]] for b in range(64)]
    assert max(abs(v.mean().item()) for v in inside) < 0.02  # clipping at 3 moves it a little
    assert len({m.numpy().tobytes() for m in out["mask"]}) > 10
    whole = ClipDecoder(layout, crop=(1.0, 1.0))
    assert torch.allclose(whole(x)["image"], whole.eval()(x)["image"], atol=1e-4)
    with pytest.raises(ValueError, match="patches without an image"):
        decoder.patches(x, (16, 8, 10))


def test_a_constant_image_survives_a_crop():
    "Zeros outside the mask must not leak in at its edge."
    layout = Layout.flat(np.random.default_rng(0).random((40, 100)) < 0.7)
    out = ClipDecoder(layout, 16, "none", crop=(0.9, 0.95))(torch.full((3, 16, layout.n_sites), 2.0))
    assert torch.allclose(out["image"][:, 0, 0][out["mask"]], torch.tensor(2.0), atol=1e-5)


def test_parcels_and_volumes():
    x = torch.randn(2, 16, 100) * 50
    out = ClipDecoder(Layout.of("schaefer100"))(x)
    assert torch.equal(out["signal"], x) and out["mask"].shape == (100,)
    space = "MNI152NLin6Asym_4mm"
    layout = Layout.of(space)
    x = torch.randn(1, 2, layout.n_sites)
    out = ClipDecoder(layout, 2)(x)
    i, j, k = layout.sites.voxels[77]
    assert out["volume"].shape == (1, 1, 2, 45, 54, 45) and out["volume"][0, 0, 1, i, j, k] == x[0, 1, 77]
    assert out["mask"].sum() == layout.n_sites and (out["volume"][0, 0, :, ~out["mask"]] == 0).all()


# ------------------------------------------------------------------------------------------------ which clips


def test_rules_of_the_three_modes():
    events = pd.DataFrame(
        {"onset": [5.0, 0.5, 80.0, np.nan, 6.0, -9.0], "duration": 1.0, "trial_type": list("abcdef")}
    )
    assert ClipRule().cut(50, 2.0).starts.tolist() == [0, 16, 32]
    assert ClipRule(stride=10).cut(50, 2.0).starts.tolist() == [0, 10, 20, 30]
    random = ClipRule(mode="random", oversample=4).cut(50, 2.0, words=(1, 2, 3)).starts
    assert len(random) == int(4 * 50 / 16) and (np.diff(random) >= 0).all() and random.max() <= 34
    cut = ClipRule(mode="events", hrf_delay=4).cut(50, 2.0, events)
    assert cut.starts.tolist() == [int(4.5 / 2), int(9 / 2), int(10 / 2)] and cut.trial_types == [
        "b",
        "a",
        "e",
    ]
    assert cut.dropped == {"no onset": 1, "starts before the run": 1, "runs over the end": 1}
    cut = ClipRule(mode="events", hrf_delay=4, min_gap=2, trial_types=["a", "e"]).cut(50, 2.0, events)
    assert cut.trial_types == ["a"] and cut.dropped == {"too close to the one before": 1}
    assert len(ClipRule(mode="random").cut(15, 2.0).starts) == 0
    assert ClipRule(mode="events").cut(50, 2.0, None).starts.tolist() == []


def test_random_starts_use_every_frame_alike():
    run, start = ClipRule(mode="random", oversample=100).random_starts(
        np.array([116] * 50), 0, 0, rows=np.arange(50)
    )
    assert len(start) == 50 * 725 and start.min() == 0 and start.max() == 100
    counts = np.bincount(start, minlength=101)
    expected = len(start) / 101
    assert ((counts - expected) ** 2 / expected).sum() < 150  # chi², 100 degrees of freedom
    assert (np.bincount(run) == 725).all()


@pytest.mark.parametrize(
    "bad",
    [
        dict(mode="all"),
        dict(frames=0),
        dict(stride=0),
        dict(frames=2.5),
        dict(oversample=0),
        dict(oversample=np.nan),
        dict(min_gap=-1),
        dict(hrf_delay=np.inf),
    ],
)
def test_bad_rules(bad):
    with pytest.raises(ValueError, match=r"clips: expected .* found"):
        ClipRule(**bad)


def test_items_are_what_the_store_holds(made):
    store = Store(made / "store")
    for mode in ("sequential", "random"):
        clips = ClipDataset(store, mode=mode)
        for i in range(len(clips)):
            clip = clips[i]
            row, start = store.find(subject=clip["subject"])[0], int(clip["start"])
            assert (
                np.array_equal(clip["packed"], store.read(row, start, 16))
                and clip["packed"].dtype == torch.float16
            )
            mean, sd = store.frame_stats(row)
            assert np.array_equal(clip["frame_mean"], mean[start : start + 16]) and np.array_equal(
                clip["frame_sd"], sd[start : start + 16]
            )
            assert clip["key"] == store.index["key"][row] and int(clip["index"]) == i and clip["tr"] == 1
    assert clips.skipped == {
        "sub-02_ses-1_task-rest": "12 frames, shorter than a clip"
    } and "1 runs skipped" in repr(clips)
    assert int(clips[-1]["index"]) == len(clips) - 1
    with pytest.raises(IndexError, match=f"below {len(clips)}"):
        clips[len(clips)]


def test_shards_without_conversion_give_the_same(made):
    rule = dict(mode="random", oversample=3, seed=5)
    a, b = ClipDataset(made / "store", **rule), ClipDataset(ShardIndex(made / "shards"), **rule)
    order = [b.table.key.index(key) for key in a.table.key]
    assert order == list(range(5))
    first, second = a.batch(range(len(a))), b.batch(range(len(b)))
    assert torch.equal(first["packed"], second["packed"]) and first["key"] == second["key"]
    assert second["frame_mean"] is None and second["frame_sd"] is None
    told = ClipDataset(ShardIndex(made / "shards"), stats=True, **rule).batch(range(len(b)))
    assert torch.allclose(told["frame_sd"], first["frame_sd"], atol=1e-6)


def test_choosing_runs_does_not_move_random_starts(made):
    everything = ClipDataset(made / "store", mode="random", seed=3)
    chosen = ClipDataset(made / "store", mode="random", seed=3, subjects=["sub-03", "04"])
    whole = everything.batch(range(len(everything)))
    mine = [int(s) for s, who in zip(whole["start"], whole["subject"], strict=True) if who in ("03", "04")]
    assert chosen.batch(range(len(chosen)))["start"].tolist() == mine
    assert set(ClipDataset(made / "store", runs=[1]).batch([0])["subject"]) == {"01"}
    for wrong in (dict(subjects=["99"]), dict(runs=[5]), dict(runs=["sub-99"])):
        with pytest.raises(ValueError, match="found .*9|found .*5"):
            ClipDataset(made / "store", **wrong)


def test_epochs_and_seeds(made):
    clips, other = (
        ClipDataset(made / "store", mode="random"),
        ClipDataset(made / "store", mode="random", seed=1),
    )
    starts = lambda c: c.batch(range(len(c)))["start"].tolist()
    zero = starts(clips)
    clips.set_epoch(1)
    assert starts(clips) != zero != starts(other) and len(starts(clips)) == len(zero)
    clips.set_epoch(0)
    assert starts(clips) == zero == starts(pickle.loads(pickle.dumps(clips)))


def test_repetition_times(tmp_path):
    source = recordings([40, 40])
    source[1].tr = 2.0
    write_store(source, tmp_path / "mixed", progress=False)
    with pytest.raises(ValueError, match=r"expected a TR of 1 s in every run, found 2 s in sub-01.*1 of 2"):
        ClipDataset(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"expected a TR of 2 s in every run, found 1 s in sub-00"):
        ClipDataset(tmp_path / "mixed", tr=2.0)
    assert ClipDataset(tmp_path / "mixed", tr="any").batch([0, 2])["tr"].tolist() == [1, 2]
    assert len(ClipDataset(tmp_path / "mixed", tr=2.0, subjects=["01"])) == 2
    write_shards(source, tmp_path / "shards")
    with pytest.raises(ValueError, match=r"sub-01.*expected a TR of 1 s, found 2 s"):
        list(ClipStream(tmp_path / "shards", mode="sequential", train=False))
    assert len(list(ClipStream(tmp_path / "shards", mode="sequential", train=False, tr="any"))) == 4


def test_events_are_followed_and_counted(tmp_path):
    events = pd.DataFrame(
        {"onset": [0.0, 10.0, 30.0], "duration": 1.0, "trial_type": ["left", "right", "left"]}
    )
    source = recordings([40, 60], events=events)
    source[0].events = None
    write_store(source, tmp_path / "store", progress=False)
    clips = ClipDataset(tmp_path / "store", mode="events", hrf_delay=15)
    batch = clips.batch(range(len(clips)))
    assert batch["start"].tolist() == [15, 25] and batch["trial_type"] == ["left", "right"]
    assert clips.dropped == {"runs over the end": 1} and clips.skipped == {
        "sub-00_ses-1_task-rest": "no events"
    }
    with pytest.raises(ValueError, match="expected at least one clip, found none.*no events"):
        ClipDataset(tmp_path / "store", mode="events", runs=[0])
    with pytest.raises(ValueError, match="expected at least one clip, found none.*shorter than 100 frames"):
        ClipDataset(tmp_path / "store", frames=100)


def test_reading_into_given_memory(made):
    clips = ClipDataset(made / "store")
    out = torch.zeros(2, 16, clips.layout.n_sites, dtype=torch.float16)
    assert clips.batch([0, 1], out)["packed"] is out and out[1, 0, 1] == 16
    with pytest.raises(ValueError, match="expected out as"):
        clips.batch([0], out)
    image = torch.zeros(2, 1, 16, 32, 48)
    assert dense_batch(ClipDecoder(clips.layout), out, out=image) is image and image.any()
    with pytest.raises(ValueError, match="contiguous float32"):
        dense_batch(ClipDecoder(clips.layout), out, out=image.half())


# ------------------------------------------------------------------------------------------------ many processes


def identity(batch) -> list:
    return list(zip(batch["key"], batch["start"].tolist(), strict=True))


def test_two_spawned_workers_change_nothing(made):
    clips = ClipDataset(made / "store", mode="random", oversample=4)
    alone = clip_loader(clips, 4, seed=3)
    helped = clip_loader(clips, 4, workers=2, seed=3, multiprocessing_context="spawn")
    for epoch in (0, 2):
        alone.batch_sampler.set_epoch(epoch)
        first = [(identity(b), b["packed"].clone()) for b in alone]
        helped.batch_sampler.set_epoch(epoch)
        second = [(identity(b), b["packed"].clone()) for b in helped]
        assert [i for i, _ in first] == [i for i, _ in second]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 3))
def test_sampler_reads_exactly_once(made, world, batch_size, epoch):
    clips = ClipDataset(made / "store", stride=1)
    exact = [ClipSampler(clips, batch_size, train=False, rank=r, world=world) for r in range(world)]
    assert sorted(i for s in exact for b in s for i in b) == list(range(len(clips)))
    assert all(len(list(s)) == len(s) for s in exact)
    train = [ClipSampler(clips, batch_size, rank=r, world=world) for r in range(world)]
    for sampler in train:
        sampler.set_epoch(epoch)
    seen = [[b for b in s] for s in train]
    flat = [i for s in seen for b in s for i in b]
    assert len({len(s) for s in seen}) == 1 and all(len(b) == batch_size for s in seen for b in s)
    assert (
        len(set(flat)) == len(flat) == len(clips) - train[0].left_over
        and train[0].left_over < world * batch_size
    )


def test_a_stopped_training_continues(made):
    clips = ClipDataset(made / "store", mode="random", oversample=4)
    sampler = ClipSampler(clips, 4, seed=1)
    sampler.set_epoch(3)
    batches = list(sampler)
    state = sampler.state_dict(batches_used=2)
    resumed = ClipSampler(clips, 4, seed=1)
    resumed.load_state_dict(state)
    assert list(resumed) == batches[2:] and len(resumed) == len(batches) - 2
    assert resumed.state_dict(batches_used=1)["first"] == 3
    resumed.set_epoch(4)
    assert len(resumed) == len(batches) and list(resumed) != batches
    with pytest.raises(ValueError, match="seed 2, found 1"):
        ClipSampler(clips, 4, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="expected at least 1 × 1000 clips"):
        ClipSampler(clips, 1000)


def test_ranks(monkeypatch):
    assert C.rank_and_world(1, 3) == (1, 3)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert C.rank_and_world() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert C.rank_and_world() == (2, 4)
    for wrong in ((3, 3), (-1, 2), (0, None)):
        with pytest.raises(ValueError, match="expected"):
            C.rank_and_world(*wrong)


class Info:
    def __init__(self, number, of):
        self.id, self.num_workers = number, of


def each_worker(monkeypatch, make, world, workers) -> list[list]:
    "What every worker of every rank yields; the workers are played one after another."
    out = []
    for rank in range(world):
        for worker in range(workers):
            monkeypatch.setattr(
                C, "get_worker_info", lambda worker=worker: Info(worker, workers) if workers else None
            )
            out.append([(c["key"], int(c["start"])) for c in make(rank)])
    monkeypatch.setattr(C, "get_worker_info", lambda: None)
    return out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(["sequential", "random"]),
)
def test_stream_reads_exactly_once(tmp_path_factory, monkeypatch, world, workers, a_shard, runs, mode):
    folder = tmp_path_factory.mktemp("stream")
    lengths = [16 + 9 * i for i in range(runs)]
    write_shards(recordings(lengths, Layout.flat(np.ones((2, 3), bool))), folder, runs_per_shard=a_shard)
    make = lambda rank: ClipStream(folder, mode=mode, train=False, rank=rank, world=world)
    found = sorted(functools.reduce(operator.iadd, each_worker(monkeypatch, make, world, workers), []))
    alone = sorted(
        (c["key"], int(c["start"])) for c in ClipStream(folder, mode=mode, train=False, rank=0, world=1)
    )
    assert found == alone and len(found) == sum(n // 16 for n in lengths)
    if mode == "sequential":
        assert len(set(found)) == len(found)


def test_training_streams_differ_between_workers_and_repeat(made, monkeypatch):
    def make(rank, epoch=0, seed=0):
        stream = ClipStream(
            made / "shards", shuffle=30, oversample=2, seed=seed, rank=rank, world=2, tr="any"
        )
        stream.set_epoch(epoch)
        return (clip for clip, _ in zip(stream, range(60), strict=False))

    def sets():
        one = [each_worker(monkeypatch, make, 2, 2) for _ in range(2)]
        changed = [
            each_worker(monkeypatch, lambda r, new=new: make(r, **new), 2, 2)
            for new in ({"epoch": 1}, {"seed": 1})
        ]
        return *one, *changed

    with pytest.warns(UserWarning, match="sub-02.*12 frames, shorter than a clip"):
        four, again, later, other = sets()
    assert four == again and all(len(s) == 60 for s in four)
    assert len({tuple(s) for s in four + later + other}) == 12
    assert {key for s in four for key, _ in s} == {f"sub-{i:02d}_ses-1_task-rest" for i in (0, 1, 3, 4)}


def test_stream_in_a_loader_gives_whole_batches(made):
    stream = ClipStream(made / "shards", mode="sequential", train=False)
    loader = clip_loader(stream, 4, workers=2)
    batches = list(loader)
    found = sorted(i for b in batches for i in identity(b))
    store = ClipDataset(made / "store")
    assert found == sorted(identity(store.batch(range(len(store)))))
    for b in batches:
        assert (
            b["packed"].shape[1:] == (16, store.layout.n_sites)
            and b["frame_mean"] is None
            and b["index"].tolist() == [-1] * len(b["key"])
        )
        for clip, subject, start in zip(b["packed"], b["subject"], b["start"], strict=True):
            assert clip[0, 0] == int(subject) and clip[0, 1] == start
    assert set(batches[0]) == set(store.batch([0]))


def test_stream_refuses_another_mask_and_counts_damage(tmp_path):
    write_shards(recordings([40], Layout.flat(np.ones((2, 3), bool))), tmp_path / "a", name="a")
    write_shards(recordings([40], Layout.flat(np.ones((3, 2), bool))), tmp_path / "b", name="b")
    both = [tmp_path / "a" / "a_0000.tar", tmp_path / "b" / "b_0000.tar"]
    with pytest.raises(
        ValueError,
        match=r"b_0000.tar, sample .*expected the mask of the stream, \(2, 3\).*found another, \(3, 2\)",
    ):
        list(ClipStream(both, mode="sequential", train=False))
    damaged = tmp_path / "c_0000.tar"
    damaged.write_bytes(both[0].read_bytes()[:900])
    with pytest.raises(ValueError, match="c_0000"):
        list(ClipStream([both[0], damaged], mode="sequential", train=False))
    stream = ClipStream([both[0], damaged], mode="sequential", train=False, on_error="skip")
    with pytest.warns(UserWarning, match="c_0000"):
        assert len(list(stream)) == 2 and len(stream.problems) == 1
    short = ClipStream(both[0], frames=50)
    with (
        pytest.warns(UserWarning, match="shorter"),
        pytest.raises(ValueError, match="found none in .* runs in a row"),
    ):
        next(iter(short))


def test_shuffle_buffer():
    items = list(range(500))
    out = list(C.shuffled(items, 50, 1, 2))
    assert sorted(out) == items and out != items
    assert out == list(C.shuffled(items, 50, 1, 2)) != list(C.shuffled(items, 50, 1, 3))
    assert sorted(C.shuffled(items[:10], 50, 1)) == items[:10]
    assert np.abs(np.array(out) - np.arange(500)).mean() > 20


GLOO = """
import sys, json, torch, torch.distributed as dist
from fmri_book.clips import ClipDataset, ClipStream, clip_loader
if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), sys.argv[1]
    said = {"rank": rank}
    stream = ClipStream(folder + "/shards", mode="sequential", train=False)
    name = lambda loader: [[k, s] for b in loader for k, s in zip(b["key"], b["start"].tolist())]
    said["stream"] = name(clip_loader(stream, 3, workers=2))
    clips = ClipDataset(folder + "/store")
    said["exact"] = name(clip_loader(clips, 3, workers=2, train=False))
    loader = clip_loader(clips, 3, workers=2)
    said["train"], total = [], torch.zeros(1)
    for b in loader:
        said["train"] += [int(i) for i in b["index"]]
        step = torch.ones(1)
        dist.all_reduce(step)  # waits for the other rank: unequal numbers of batches would hang
        total += step
    said["steps"] = total.item()
    open(f"{folder}/said_{rank}.json", "w").write(json.dumps(said))
    dist.destroy_process_group()
"""


@pytest.mark.filterwarnings("ignore")
def test_two_processes_of_torchrun(made, tmp_path):
    import json

    script = tmp_path / "ranks.py"
    script.write_text(GLOO)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(made),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads((made / f"said_{rank}.json").read_text()) for rank in range(2)]
    clips = ClipDataset(made / "store")
    everything = sorted(map(list, identity(clips.batch(range(len(clips))))))
    for kind in ("stream", "exact"):
        assert sorted(said[0][kind] + said[1][kind]) == everything
    seen = said[0]["train"] + said[1]["train"]
    assert len(set(seen)) == len(seen) == len(clips) // 6 * 6 and said[0]["steps"] == said[1][
        "steps"
    ] == 2 * (len(clips) // 6)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: ClipDecoder(f, normalise="zscore"), "found 'zscore'"),
        (lambda f: ClipDecoder(f, size=(3, 8)), r"at least \(4, 6\).*found \(3, 8\)"),
        (lambda f: ClipDecoder(f, crop=(0.9, 1.1)), r"found \(0.9, 1.1\)"),
        (lambda f: ClipDecoder(f)(torch.zeros(1, 16, 23)), r"\(batch, 16, 22\), found shape \(1, 16, 23\)"),
        (lambda f: ClipDecoder(f)(torch.zeros(1, 15, 22)), r"\(batch, 16, 22\), found shape \(1, 15, 22\)"),
        (
            lambda f: ClipDecoder(f).patches(torch.zeros(1, 16, 22), (16, 4, 4)),
            r"divides .* \(16, 4, 6\), found \(16, 4, 4\)",
        ),
        (lambda f: ClipDecoder(Layout.of("schaefer100"), crop=(0.9, 1)), "layout of 'schaefer100'"),
        (
            lambda f: ClipDecoder(Layout.of("schaefer100")).patches(torch.zeros(1, 16, 100)),
            "decodes to 'signal'",
        ),
        (
            lambda f: dense_batch(ClipDecoder(Layout.of("schaefer100")), torch.zeros(1, 16, 100)),
            "decoder of pictures",
        ),
    ],
)
def test_the_decoder_says_what_it_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make(Layout.flat(corners()))


def test_memory_does_not_grow_with_clips(made):
    "Many batches leave nothing behind: statistics, files and tables are not collected."
    import tracemalloc

    clips = ClipDataset(made / "store", mode="random", oversample=4)
    numbers = np.random.default_rng(0).integers(0, len(clips), (400, 8))
    for some in numbers[:50]:
        clips.batch(some)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for some in numbers:
        clips.batch(some)
    gained = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert gained < 100_000


def test_packed_of_a_scaled_store_is_what_the_file_holds(tmp_path):
    "z-scores of each site over its run; site_scale brings the raw units of the record back."
    rng = np.random.default_rng(0)
    values = (1000 + 50 * rng.standard_normal((64, 100))).astype(np.float32)

    class Source(list):
        layout = Layout.of("schaefer100")

    store = write_store(
        Source([Record(values, 1.0, "01")]), tmp_path / "s", dtype="float16", scale="site", progress=False
    )
    packed = ClipDataset(store, 64)[0]["packed"].numpy().astype(np.float64)
    assert np.abs(packed.mean(0)).max() < 1e-3 and np.abs(packed.std(0) - 1).max() < 1e-3
    mean, sd = store.site_scale(0)
    np.testing.assert_allclose(packed * sd + mean, values, atol=0.2)
