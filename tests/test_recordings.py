"Recordings through a model: the same numbers from a file, a run and a store; every frame in its window; bad input named."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fmri_book import cli
from fmri_book import recordings as R
from fmri_book.clips import ClipDataset, ClipDecoder
from fmri_book.cohort import Cohort
from fmri_book.data import Run, Space, load_example_run, resample_bold, zscore
from fmri_book.flat_maps import FlatMap
from fmri_book.ingest import IngestOptions, Refused
from fmri_book.mae import Cubes, InputSpec, MaskedAutoencoderViT, MaskedViT, as_images
from fmri_book.prepare import prepare, write_simulated_bids
from fmri_book.storage import Layout, Record, Store, write_store

QUIET = {"progress": False}


class Tokens(NamedTuple):
    cls: torch.Tensor | None
    reg: torch.Tensor | None
    patch: torch.Tensor


class Echo(nn.Module):
    "A stand-in that is no autoencoder: its tokens are frames, and it remembers its batches."

    def __init__(self, spec, registers=2):
        super().__init__()
        self.input_spec, self.weight, self.batches = spec, nn.Parameter(torch.ones(1)), []
        self.registers = registers

    def embed(self, batch):
        self.batches.append(batch)
        x = next(batch[k] for k in ("image", "signal", "volume") if k in batch)
        frames = (x[:, 0] if "signal" not in batch else x).flatten(2)[..., ::97] * self.weight
        reg = frames[:, : self.registers] if self.registers else None
        return Tokens(None, reg, frames)


class Records:
    "What `write_store` reads from."

    def __init__(self, layout, records):
        self.layout, self.records = layout, records

    def __iter__(self):
        return iter(self.records)

    def __len__(self):
        return len(self.records)


def flat_spec(**changes):
    return InputSpec(**dict(space="flat", surface="fsaverage5", frames=16, tr=1.0) | changes)


def parcels_spec(**changes):
    return InputSpec(**dict(space="schaefer100", frames=10, tr=1.4, normalise="none", clip=None) | changes)


def small_mae(spec, **options):
    torch.manual_seed(0)
    image = dict(img_size=(224, 560), patch_size=(56, 56), num_frames=spec.frames, t_patch_size=4)
    if spec.space != "flat":
        image = dict(img_size=(100, 1), patch_size=1, num_frames=spec.frames, t_patch_size=5)
    size = dict(
        depth=1, embed_dim=24, num_heads=2, decoder_depth=1, decoder_embed_dim=24, decoder_num_heads=2
    )
    model = MaskedAutoencoderViT(**image | size | dict(in_chans=1, reg_tokens=2) | options)
    model.input_spec = spec
    return model.eval()


@pytest.fixture(scope="session")
def run():
    "75 real frames, 105 seconds."
    whole = load_example_run()
    return whole.replace(bold=whole.bold[:75], confounds=None)


@pytest.fixture(scope="session")
def files(run, tmp_path_factory):
    "The same as a pair of GIFTI files."
    folder = write_simulated_bids(tmp_path_factory.mktemp("flat") / "bids", [run])
    return min(folder.rglob("*.gii"))


@pytest.fixture(scope="session")
def stores(files, tmp_path_factory):
    "Prepared as flat maps: columns in reading order, and by patches."
    folder = tmp_path_factory.mktemp("stores")
    for patch in (None, 16):
        prepare(files.parents[3], folder / str(patch), patch=patch, workers=0, progress=False)
    return folder


@pytest.fixture(scope="session")
def people():
    "Three simulated people on parcels."
    return list(Cohort(n_subjects=3, n_sessions=1, n_frames=64, tr=1.4, tasks=("rest",), space="schaefer100"))


@pytest.fixture(scope="session")
def bids(people, tmp_path_factory):
    return write_simulated_bids(tmp_path_factory.mktemp("parcels") / "bids", people)


# windows


@given(st.integers(1, 40), st.integers(0, 200), st.data())
def test_every_frame_is_in_a_window_and_fresh_once(frames, more, data):
    n = frames + more
    stride = data.draw(st.none() | st.integers(1, frames))
    starts = R.window_starts(n, frames, stride)
    fresh = R.fresh_frames(starts, frames)
    seen = (starts[:, None] + np.arange(frames))[fresh]
    assert np.array_equal(seen, np.arange(n))  # each once, in order
    assert starts[0] == 0 and starts[-1] == n - frames and (np.diff(starts) > 0).all()
    assert (starts[:-1] % (stride or frames) == 0).all()  # only the last may leave the grid


@pytest.mark.parametrize("stride", [0, 17, 2.5, -1])
def test_strides_that_would_leave_frames_out_are_refused(stride):
    with pytest.raises(ValueError, match="expected a stride of 1 to 16"):
        R.window_starts(100, 16, stride)


# the same recording from everywhere


def test_a_run_its_file_and_its_store_give_the_same_numbers(run, files, stores):
    model = small_mae(flat_spec())
    expected = R.embed_run(model, run, **QUIET)
    assert len(expected) == 7 and expected.cls.shape == (7, 1, 24) and expected.reg.shape == (7, 2, 24)
    key = Store(stores / "None").index["key"][0]
    for source in (files, stores / "None", stores / "16", Store(stores / "None")):
        found = R.embed_run(model, source, key=key if source != files else None, **QUIET)
        for name in ("cls", "reg", "patch", "mean", "starts", "fresh"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), (source, name)
    bold = R.embed_run(model, run.bold, tr=run.tr, space=run.space, **QUIET)
    assert np.array_equal(bold.patch, expected.patch)


def test_clips_of_the_store_through_the_loader_of_training_give_the_same_embeddings(stores):
    model, store = small_mae(flat_spec()), Store(stores / "16")
    found = R.embed_run(model, store, **QUIET)
    clips = ClipDataset(store, 16)
    decoder = ClipDecoder(store.layout)
    with torch.no_grad():
        batch = decoder.decode(clips.batch(range(len(clips))))
        expected = model.embed(batch)
    assert len(clips) == 6  # the loader leaves the end out, embed_run does not
    assert np.allclose(found.cls[:6], expected.cls, atol=1e-6)
    assert np.allclose(found.patch[:6], expected.patch, atol=1e-6)


def test_parcels_from_files_runs_and_stores_agree(people, bids, tmp_path):
    prepare(bids, tmp_path / "raw", to="schaefer100", tr=1.0, workers=0, progress=False)
    prepare(bids, tmp_path / "slow", to="schaefer100", tr=1.4, scale="none", workers=0, progress=False)
    model = Echo(parcels_spec(tr=1.0))
    path = min(bids.rglob("*.npy"))
    found = [
        R.embed_run(model, source, key=key, **QUIET).patch
        for source, key in (
            (people[0], None),
            (path, None),
            (tmp_path / "raw", Store(tmp_path / "raw").index["key"][0]),
            (tmp_path / "slow", Store(tmp_path / "slow").index["key"][0]),
        )
    ]
    assert found[0].shape[1] == 10
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_what_a_model_is_given_is_what_the_steps_by_hand_give(run):
    "z-score, resample, draw, normalise each frame, clip: without the book's shortcuts."
    model = Echo(flat_spec())
    made = R.embed_run(model, run, batch_size=3, **QUIET)
    z = zscore(run.bold)
    z[:, ~run.sites.cortex] = 0
    slow = resample_bold(z, run.tr, 1.0)
    fm = FlatMap.fsaverage5()
    frames = fm.project_packed(slow).astype(np.float16).astype(float)
    frames = (frames - frames.mean(1, keepdims=True)) / (frames.std(1, ddof=1, keepdims=True) + 1e-6)
    expected = fm.unpack(np.clip(frames, -3, 3))
    assert len(slow) == 104 and made.about["n_frames"] == 104
    got = np.concatenate([b["image"][:, 0].numpy() for b in model.batches])
    starts = made.starts.astype(int)
    assert starts.tolist() == [0, 16, 32, 48, 64, 80, 88] and made.fresh.tolist() == [16] * 6 + [8]
    for window, start in zip(got, starts, strict=True):
        assert np.allclose(window, expected[start : start + 16], atol=2e-5)
    assert all(np.array_equal(b["mask"], fm.mask) for b in model.batches)


def test_global_normalising_and_no_clipping_reach_the_model(people):
    model = Echo(parcels_spec(normalise="global", clip=None))
    R.embed_run(model, people[0], **QUIET)
    clips = torch.cat([b["signal"] for b in model.batches])
    assert np.allclose(clips.mean((1, 2)), 0, atol=1e-5) and np.allclose(clips.std((1, 2)), 1, atol=1e-3)
    model = Echo(parcels_spec(zscore=False))
    R.embed_run(model, people[0], **QUIET)
    clips = torch.cat([b["signal"] for b in model.batches])
    assert np.array_equal(clips[0], people[0].bold[:10])


def test_batch_size_changes_nothing(people, run):
    for model, recording in ((small_mae(parcels_spec()), people[0]), (small_mae(flat_spec()), run)):
        one, many = (R.embed_run(model, recording, batch_size=n, stride=7, **QUIET) for n in (1, 64))
        for name in ("cls", "reg", "patch", "mean"):
            assert np.allclose(getattr(one, name), getattr(many, name), atol=1e-5)
        assert np.allclose(one.mean, one.patch.mean(1), atol=1e-6)


def test_models_that_know_no_missing_columns_are_told_of_none(people):
    bold = people[0].bold.copy()
    bold[:, 7] = 0
    run = people[0].replace(bold=bold, allow_constant=1)
    made = R.embed_run(model := Echo(parcels_spec()), run, **QUIET)
    assert all("missing" not in batch for batch in model.batches) and made.about["missing"] == []
    assert not any("without data" in note for note in made.about["notes"])
    assert np.isfinite(R.embed_run(small_mae(parcels_spec()), run, **QUIET).mean).all()


def test_the_model_keeps_its_mode_and_gets_no_gradient(people):
    model = small_mae(parcels_spec(), drop_path_rate=0.5).train()
    model.decoder.eval()
    a, b = (R.embed_run(model, people[0], **QUIET) for _ in range(2))
    assert np.array_equal(a.patch, b.patch)  # eval mode inside: nothing is dropped
    assert model.training and model.encoder.training and not model.decoder.training
    assert all(p.grad is None for p in model.parameters())

    class Fails(Echo):
        def embed(self, batch):
            raise RuntimeError("no")

    failing = Fails(parcels_spec()).train()
    with pytest.raises(RuntimeError):
        R.embed_run(failing, people[0], **QUIET)
    assert failing.training


def test_a_model_without_class_token_or_registers(people):
    found = R.embed_run(Echo(parcels_spec(), registers=0), people[0], patches=False, **QUIET)
    assert found.cls is None and found.reg is None and found.patch is None
    assert list(found.pooled()) == ["patch"]


def test_volumes_go_through_as_volumes(tmp_path):
    mask = np.zeros((6, 7, 5), bool)
    mask[1:5, 1:6, 1:4] = True
    space = Space.from_mask("test_box", mask, np.diag([2.0, 2, 2, 1])).register()
    bold = np.random.default_rng(0).normal(size=(20, space.n_sites)).astype(np.float32)
    run = Run(bold, 1.0, "test_box")
    torch.manual_seed(0)
    cubes = Cubes(mask, side=4, min_share=0.2)
    n = len(cubes.inside)
    model = MaskedAutoencoderViT(
        img_size=(8, n, 64), patch_size=(4, 1, 64), in_chans=1, depth=1, embed_dim=24, num_heads=2,
        decoder_depth=1, decoder_embed_dim=24, decoder_num_heads=2,
    ).eval()  # fmt: skip
    model.cubes = cubes
    model.input_spec = InputSpec("test_box", frames=8, normalise="none", clip=None)
    assert R.embed_run(model, run, **QUIET).patch.shape == (3, 2 * n, 24)
    made = R.reconstruct_run(model, run, mask="random", ratio=0.5, **QUIET)
    z = zscore(bold)
    turned = mask.transpose(2, 1, 0)
    flat = np.zeros(turned.size, bool)
    flat[cubes.number[cubes.inside].numpy()] = True
    held = flat.reshape(turned.shape).transpose(2, 1, 0)[mask]
    assert 0 < held.sum() <= mask.sum()
    assert np.allclose(made.target[0][:, held], z[:8][:, held], atol=2e-3)  # float16
    assert not made.hidden[:, :, ~held].any() and made.hidden.any()


# what cannot be meant


def test_a_model_that_says_nothing_of_its_input(people):
    model = Echo(None)
    with pytest.raises(ValueError, match="expected an input_spec"):
        R.embed_run(model, people[0], **QUIET)
    assert len(R.embed_run(model, people[0], spec=parcels_spec(), **QUIET)) == 7


@pytest.mark.parametrize(
    "how, says",
    [
        (dict(recording=np.zeros((20, 100))), "expected tr .* and space with an array"),
        (dict(stride=11), "expected a stride of 1 to 10"),
        (dict(batch_size=0), "expected a batch size from 1 up, found 0"),
        (dict(tr=2.0), "this recording brings its own"),
        (
            dict(spec=parcels_spec(frames=65)),
            "expected at least 65 frames, one window of the model, found 64",
        ),
        (
            dict(spec=parcels_spec(space="schaefer400")),
            "expected a recording for schaefer400.*found schaefer100",
        ),
        (dict(spec=flat_spec()), "expected a recording for flat maps of fsaverage5.*found schaefer100"),
        (dict(spec=parcels_spec(mask_digest="0" * 16)), "expected the layout 0000"),
        (dict(recording="/nowhere/at/all"), "found nothing at"),
    ],
)
def test_bad_calls_say_what_was_expected(people, how, says):
    recording = how.pop("recording", people[0])
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        R.embed_run(Echo(parcels_spec()), recording, **how, **QUIET)


def test_another_mesh_is_refused_and_carried_on_request(files, run):
    model = Echo(flat_spec(surface="fsLR_32k", frames=8))
    for recording in (run, files):
        with pytest.raises(ValueError, match="flat maps of fsLR_32k.*found fsaverage5.*carry=True"):
            R.embed_run(model, recording, **QUIET)
    a, b = (R.embed_run(model, recording, carry=True, **QUIET) for recording in (run, files))
    assert np.array_equal(a.patch, b.patch)


def test_a_surface_becomes_parcels_by_labels(run):
    model = Echo(parcels_spec(tr=1.4))
    found = R.embed_run(model, run, **QUIET).patch
    assert np.array_equal(found, R.embed_run(model, run.to("schaefer100"), **QUIET).patch)


def test_short_runs_in_files_are_refused(files):
    with pytest.raises(Refused, match="seconds|s"):
        R.embed_run(Echo(flat_spec()), files, options=IngestOptions(min_seconds=3600), **QUIET)


def test_stores_that_do_not_fit(stores, people, files, tmp_path):
    flat, parcels = Echo(flat_spec()), Echo(parcels_spec())
    with pytest.raises(ValueError, match="expected flat maps at a TR of 2 s, found 1 s"):
        R.embed_run(Echo(flat_spec(tr=2.0)), stores / "None", **QUIET)
    with pytest.raises(ValueError, match="expected a store of schaefer100, found one of flat"):
        R.embed_run(parcels, stores / "None", **QUIET)
    write_store(
        Records(Layout.of("schaefer100"), [Record.from_run(p) for p in people]),
        tmp_path / "three",
        progress=False,
    )
    with pytest.raises(ValueError, match="expected one recording, found .*sim-0001.*key=…"):
        R.embed_run(parcels, tmp_path / "three", **QUIET)
    with pytest.raises(ValueError, match="expected the recording 'sub-x'"):
        R.embed_run(parcels, tmp_path / "three", key="sub-x", **QUIET)
    layout = Store(stores / "None").layout
    raw = Record(np.full((20, layout.n_sites), 1000, np.float32), 1.0, "01")
    write_store(Records(layout, [raw]), tmp_path / "raw", progress=False)
    with pytest.raises(ValueError, match="expected z-scored flat maps, found a pixel with a mean of 1000"):
        R.embed_run(flat, tmp_path / "raw", **QUIET)


def test_another_mask_is_refused_however_its_pixels_are_stored(run, stores):
    layout = Store(stores / "None").layout
    fits = [layout.digest, Store(stores / "16").layout.digest, ""]
    for digest in fits:
        assert len(R.embed_run(Echo(flat_spec(mask_digest=digest)), run, **QUIET)) == 7
    other = layout.mask.copy()
    other[tuple(np.argwhere(other)[0])] = False
    other = Layout.flat(other, "fsaverage5")
    with pytest.raises(ValueError, match=f"expected the layout {other.digest}.*found {layout.digest}"):
        R.embed_run(Echo(flat_spec(mask_digest=other.digest)), run, **QUIET)
    model = Echo(flat_spec())
    model.layout = other
    with pytest.raises(ValueError, match="expected the model's layout, 72,598 columns.*found 72,599"):
        R.embed_run(model, run, **QUIET)
    model.layout = Store(stores / "16").layout  # the same pixels in another order
    assert len(R.embed_run(model, run, **QUIET)) == 7


def test_the_published_maps_are_drawn_from_pycortex(run, monkeypatch):
    "Without its files: the geometry of another map in its place."
    fslr = run.to("fsLR_32k")
    monkeypatch.setattr(FlatMap, "from_pycortex", classmethod(lambda cls, subject: FlatMap.fs_lr_32k()))
    published, own = (Echo(flat_spec(surface=s)) for s in ("published", "fsLR_32k"))
    a, b = R.embed_run(published, fslr, **QUIET), R.embed_run(own, fslr, **QUIET)
    assert np.array_equal(a.patch, b.patch)
    assert a.about["layout"] != b.about["layout"]


# results


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_results_come_back_as_they_were(people, tmp_path, ending):
    model = small_mae(parcels_spec())
    made = [
        R.embed_run(model, people[0], **QUIET),
        R.embed_run(model, people[0], patches=False, **QUIET),
        R.reconstruct_run(model, people[0], ratio=0.5, **QUIET),
        R.denoise_run(model, people[0], samples=4, ratio=0.5, **QUIET),
    ]
    for i, one in enumerate(made):
        back = type(one).load(one.save(tmp_path / f"{i}{ending}"))
        for name, value in vars(one).items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(getattr(back, name), value, equal_nan=value.dtype.kind == "f"), name
                assert getattr(back, name).dtype == value.dtype
            else:
                assert getattr(back, name) == value, name
        assert repr(back) == repr(one)
    with pytest.raises(ValueError, match="expected a file of RunDenoising, found RunEmbeddings"):
        R.RunDenoising.load(tmp_path / f"0{ending}")
    whole = (tmp_path / f"0{ending}").read_bytes()
    (tmp_path / f"torn{ending}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected results that this book saved"):
        R.RunEmbeddings.load(tmp_path / f"torn{ending}")
    with pytest.raises(ValueError, match=r"ends in .npz or .safetensors, found '.pkl'"):
        made[0].save(tmp_path / "x.pkl")


def test_the_table_has_a_row_for_each_window_and_representation(people):
    found = R.embed_run(small_mae(parcels_spec()), people[0], **QUIET)
    table = found.table()
    assert len(table) == 3 * len(found) == 21 and set(table["representation"]) == {"cls", "reg", "patch"}
    cls = table.query("representation == 'cls'")
    assert np.array_equal(cls.filter(regex=r"^d\d+$").to_numpy(), found.cls[:, 0])
    assert np.allclose(table["stop"] - table["start"], 14.0)  # 10 frames of 1.4 s
    assert (table["subject"] == people[0].subject).all() and cls["start"].is_monotonic_increasing


# predictions


def plain_r2(target, prediction, counts):
    "One column after the other, as a textbook has it."
    out = np.full(target.shape[-1], np.nan)
    for c in range(target.shape[-1]):
        t, p = (x[..., c][counts[..., c]].astype(float) for x in (target, prediction))
        if len(t) > 1 and t.std() > 0:
            out[c] = 1 - ((t - p) ** 2).sum() / ((t - t.mean()) ** 2).sum()
    return out


@pytest.mark.parametrize("norm", [None, "global", "frame", "patch"])
@pytest.mark.parametrize("kind", ["tube", "random"])
def test_a_reconstruction_is_the_models_own(people, norm, kind):
    model = small_mae(parcels_spec(), target_norm=norm)
    made = R.reconstruct_run(model, people[0], mask=kind, ratio=0.6, seed=3, stride=9, batch_size=4, **QUIET)
    assert made.prediction.shape == made.target.shape == (7, 10, 100)
    windows = R.open_windows(model, people[0], 9)
    for at, batch in windows.batches(1):
        images, inside = as_images(batch)
        visible = ~torch.from_numpy(made.hidden[at]).view(1, 2, 5, 100)[:, :, 0].flatten(1)
        with torch.no_grad():
            out = model(images, inside, visible, mask_ratio=None)
        assert np.isclose(made.loss[at.start], out.loss, rtol=1e-5)
        images_of_it = out.pred_images[:, 0, :, :, 0].numpy()
        assert np.allclose(made.prediction[at], np.where(made.hidden[at], images_of_it, 0), atol=1e-5)
        assert np.array_equal(made.hidden[at], out.pred_mask[:, 0, :, :, 0].bool())
        assert np.array_equal(made.target[at], images[:, 0, :, :, 0])
    expected = plain_r2(made.target, made.prediction, made.hidden & made.fresh[..., None])
    assert np.allclose(made.r2, expected, atol=1e-4, equal_nan=True)
    share = made.hidden.mean((1, 2))
    assert np.allclose(share, 0.6, atol=0.02)
    if kind == "tube":
        assert (made.hidden == made.hidden[:, :1]).all()


def test_reconstruction_on_the_map_with_skipped_frames(run):
    model = small_mae(flat_spec(), t_pred_stride=2)
    made = R.reconstruct_run(model, run, ratio=0.8, batch_size=2, **QUIET)
    fm = FlatMap.fsaverage5()
    assert made.prediction.shape == (7, 8, fm.n_pixels)  # every second frame is predicted
    assert made.frame[1].tolist() == list(range(16, 32, 2)) and made.layout == Layout.flat(
        fm.mask, "fsaverage5"
    )
    windows = R.open_windows(model, run)
    (_, batch), *_ = windows.batches(1)
    assert np.array_equal(fm.unpack(made.target[0]), batch["image"][0, 0, ::2])
    visible = fm.unpack((~made.hidden[0]).astype(float))[0].reshape(4, 56, 10, 56).any((1, 3)).ravel()
    with torch.no_grad():
        out = model(
            batch["image"], batch["mask"], torch.from_numpy(np.tile(visible, 4)[None]), mask_ratio=None
        )
    assert np.isclose(made.loss[0], out.loss, rtol=1e-5)
    assert np.allclose(made.on_map(made.prediction[0], 0), out.pred_images[0, 0, ::2], atol=1e-5)
    assert np.isnan(made.on_map(made.r2)[~fm.mask]).all()
    again = R.reconstruct_run(model, run, ratio=0.8, batch_size=7, **QUIET)
    assert np.array_equal(made.hidden, again.hidden) and np.allclose(
        made.prediction, again.prediction, atol=1e-4
    )
    assert np.allclose(made.r2, again.r2, atol=1e-4, equal_nan=True)
    other = R.reconstruct_run(model, run, ratio=0.8, seed=1, **QUIET)
    assert (made.hidden != other.hidden).any()


@pytest.mark.parametrize("kind, ratio", [("tube", 0.9), ("random", 0.6), ("tube", 0.3), ("block", 0.7)])
def test_denoising_equals_the_plain_mean_and_sd(people, kind, ratio, monkeypatch):
    model, kept = small_mae(parcels_spec()), []
    predict = R._predict
    monkeypatch.setattr(R, "_predict", lambda *args: kept.append(predict(*args)) or kept[-1])
    made = R.denoise_run(model, people[0], 8, kind, ratio, batch_size=16, **QUIET)
    assert len(kept) == 8
    values, hidden = (np.stack([getattr(p, k).numpy() for p in kept]) for k in ("values", "hidden"))
    values = np.where(hidden, values, np.nan).astype(float)
    assert (
        np.array_equal(made.count, hidden.sum(0)) and made.count.min() >= 4
    )  # what one mask shows the next one hides
    assert np.allclose(made.mean, np.nanmean(values, 0), atol=1e-5)
    assert np.allclose(made.sd, np.nanstd(values, 0, ddof=1), atol=1e-5)
    assert not np.isnan(made.mean).any() and not np.isnan(made.sd).any()
    # what the page says of an SD over all samples, with 0 where a value was visible
    zeros = ((np.nan_to_num(values) - np.nanmean(values, 0)) ** 2).sum(0) / made.count
    n = made.count
    assert np.allclose(zeros, ((n - 1) * made.sd**2 + (8 - n) * made.mean**2) / n, atol=1e-5)
    assert np.allclose(
        made.r2, plain_r2(made.target, made.mean, made.fresh[..., None] & (made.count > 0)), atol=1e-4
    )


def test_denoising_does_not_depend_on_batches_and_never_sees_what_it_predicts(people):
    model = small_mae(parcels_spec())
    one, many = (R.denoise_run(model, people[0], 4, ratio=0.5, batch_size=n, **QUIET) for n in (1, 50))
    assert np.array_equal(one.count, many.count) and np.allclose(one.mean, many.mean, atol=1e-5)
    assert np.allclose(one.sd, many.sd, atol=1e-4)

    class Peeks(MaskedAutoencoderViT):
        "Tells, for every patch that it predicts, whether it could see it."

        def _decode(self, encoded, pred_ids):
            seen = (pred_ids[:, :, None] == encoded.ids[:, None]).any(-1)
            return seen[..., None].float().expand(*pred_ids.shape, self.pred_grid.n_values)

    peeking = Peeks(**small_mae(parcels_spec()).config).eval()
    peeking.input_spec = parcels_spec()
    assert not R.denoise_run(peeking, people[0], 6, ratio=0.4, **QUIET).mean.any()


@pytest.mark.parametrize("samples", [0, 2, 3, 5.5])
def test_too_few_masks_are_refused(people, samples):
    with pytest.raises(ValueError, match="expected an even number of samples from 4 up"):
        R.denoise_run(small_mae(parcels_spec()), people[0], samples, **QUIET)


def test_predictions_need_a_decoder(people):
    for model in (Echo(parcels_spec()), MaskedViT(img_size=32, depth=1, embed_dim=24, num_heads=2)):
        with pytest.raises(ValueError, match="expected a MaskedAutoencoderViT.*found"):
            R.reconstruct_run(model, people[0], **QUIET)


def test_dead_regions_have_no_explained_variance(people):
    bold = people[0].bold.copy()
    bold[:, 7] = 5
    run = people[0].replace(bold=bold, allow_constant=1)
    made = R.reconstruct_run(small_mae(parcels_spec()), run, ratio=0.5, **QUIET)
    assert np.isnan(made.r2[7]) and np.isfinite(made.r2[made.hidden.any((0, 1))]).sum() >= 98


# many files


@pytest.fixture
def model_folder(tmp_path):
    return small_mae(parcels_spec()).save_pretrained(tmp_path / "model")


@pytest.fixture
def some(bids, tmp_path):
    "Three recordings, the second one damaged."
    import shutil

    folder = Path(shutil.copytree(bids, tmp_path / "some"))
    paths = sorted(folder.rglob("*.npy"))
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:1000])
    return paths, whole


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".npz", ".safetensors")}


def test_one_broken_file_is_named_and_the_others_go_on(some, tmp_path, people):
    (paths, whole), out, model = some, tmp_path / "out", small_mae(parcels_spec())
    first = R.embed_files(model, paths, out, **QUIET)
    assert [r["status"] for r in first.rows] == ["done", "failed", "done"] and first.exit_status == 1
    assert first.rows[1]["reason"] and str(paths[1]) in first.rows[1]["source"]
    assert "2 done, 1 failed" in str(first)
    before = contents(out)
    assert len(before) == 2 and len(pd.read_csv(out / "report.csv")) == 3
    paths[1].write_bytes(whole)
    second = R.embed_files(model, paths, out, **QUIET)
    assert [r["status"] for r in second.rows] == ["kept", "done", "kept"] and second.exit_status == 0
    assert before.items() <= contents(out).items()
    table = pd.read_parquet(out / "windows.parquet")
    assert table["key"].nunique() == 3 and len(table) == 3 * 3 * 7
    one = R.RunEmbeddings.load(out / f"{second.rows[1]['key']}.npz")
    assert np.allclose(one.mean, R.embed_run(model, people[1], **QUIET).mean, atol=1e-6)


def test_what_changed_is_made_again_and_other_settings_are_refused(some, tmp_path):
    (paths, whole), out, model = some, tmp_path / "out", small_mae(parcels_spec())
    paths[1].write_bytes(whole)
    R.embed_files(model, paths, out, **QUIET)
    np.save(paths[0], np.load(paths[0])[::-1])
    (out / f"{R.embed_files(model, paths[2:], out, **QUIET).rows[0]['key']}.npz").write_bytes(b"torn")
    states = [r["status"] for r in R.embed_files(model, paths, out, **QUIET).rows]
    assert states == ["done", "kept", "done"]
    with pytest.raises(ValueError, match="expected the settings .*stride: was None, is 5"):
        R.embed_files(model, paths, out, stride=5, **QUIET)
    with torch.no_grad():
        model.encoder.norm.bias += 1
    with pytest.raises(ValueError, match="expected the settings .*model: was"):
        R.embed_files(model, paths, out, **QUIET)
    assert R.embed_files(model, paths, out, overwrite=True, **QUIET).counts == {"done": 3}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a new folder"):
        R.embed_files(model, paths, tmp_path / "other", **QUIET)


def test_a_recording_that_fails_now_leaves_no_old_embeddings(some, tmp_path):
    (paths, whole), out, model = some, tmp_path / "out", small_mae(parcels_spec())
    paths[1].write_bytes(whole)
    key = R.embed_files(model, paths, out, **QUIET).rows[1]["key"]
    np.save(paths[1], np.load(paths[1])[:20])  # too short now
    report = R.embed_files(model, paths, out, **QUIET)
    assert report.counts == {"kept": 2, "failed": 1} and not (out / f"{key}.npz").exists()
    assert key not in set(pd.read_parquet(out / "windows.parquet")["key"])


def test_two_recordings_of_one_name_and_paths_without_any(some, tmp_path):
    import shutil

    (paths, _), model = some, small_mae(parcels_spec())
    shutil.copytree(paths[0].parents[2], tmp_path / "twin" / paths[0].parents[2].name)
    (tmp_path / "empty").mkdir()
    twin = min((tmp_path / "twin").rglob("*.npy"))
    report = R.embed_files(
        model, [paths[0], twin, tmp_path / "empty", tmp_path / "nowhere"], tmp_path / "o", **QUIET
    )
    assert [r["status"] for r in report.rows] == ["done", "failed", "failed", "failed"]
    assert "another recording of this name" in report.rows[1]["reason"]
    R.embed_files(
        model, [paths[2]], tmp_path / "o", **QUIET
    )  # the table knows both calls, the report this one
    assert pd.read_parquet(tmp_path / "o" / "windows.parquet")["key"].nunique() == 2
    assert len(pd.read_csv(tmp_path / "o" / "report.csv")) == 1
    (tmp_path / "o" / "sub-torn.npz").write_bytes(b"PK")
    torn = R.embed_files(model, [paths[2]], tmp_path / "o", **QUIET)
    assert torn.counts == {"kept": 1, "failed": 1} and "sub-torn" in str(torn)
    assert "found nothing at" in report.rows[3]["reason"]


def test_a_store_goes_in_whole(people, tmp_path):
    write_store(
        Records(Layout.of("schaefer100"), [Record.from_run(p) for p in people]),
        tmp_path / "three",
        progress=False,
    )
    report = R.embed_files(
        small_mae(parcels_spec()), [tmp_path / "three"], tmp_path / "o", suffix=".safetensors", **QUIET
    )
    assert report.counts == {"done": 3} and len(contents(tmp_path / "o")) == 3
    assert R.embed_files(
        small_mae(parcels_spec()), [tmp_path / "three"], tmp_path / "o", suffix=".safetensors", **QUIET
    ).counts == {"kept": 3}


# the command line


def program(*words):
    return cli.main([str(w) for w in words])


def test_the_command_embeds_names_the_broken_and_goes_on(some, model_folder, tmp_path, capsys):
    (paths, whole), out = some, tmp_path / "out"
    assert program("embed", model_folder, *paths, "-o", out) == 1
    said = capsys.readouterr().out
    assert "2 done, 1 failed" in said and paths[1].name in said
    paths[1].write_bytes(whole)
    assert program("embed", model_folder, *paths, "-o", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"kept": 2, "done": 1}
    assert program("embed", model_folder, *paths, "-o", out, "--stride", 5) == 2
    assert "expected the settings" in (error := capsys.readouterr().err) and "--overwrite" in error
    assert program("embed", tmp_path / "no_model", *paths, "-o", out) == 2
    assert "found no" in capsys.readouterr().err


def test_killed_and_repeated_gives_what_one_go_gives(bids, model_folder, tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "fmri_book.cli", "embed", str(model_folder), str(bids), "-o", str(out)]
    going = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    until = time.time() + 120
    while going.poll() is None and time.time() < until and not list(out.glob("sub*.npz")):
        time.sleep(0.001)
    going.send_signal(signal.SIGKILL)  # after the first recording, at some point of the others
    going.communicate()
    (out / ".tmp-0123456789abcdef-x.npz").write_bytes(b"what a killed writer leaves")
    kept = len(list(out.glob("sub*.npz")))
    assert program("embed", model_folder, bids, "-o", out, "--json") == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert kept >= 1 and counts.get("kept", 0) == kept and sum(counts.values()) == 3
    assert program("embed", model_folder, bids, "-o", whole) == 0
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}  # and no temporary file
    for path in sorted(whole.glob("*.npz")):
        one, other = (R.RunEmbeddings.load(folder / path.name) for folder in (whole, out))
        assert np.array_equal(one.cls, other.cls) and one.about == other.about
    tables = [pd.read_parquet(folder / "windows.parquet") for folder in (whole, out)]
    pd.testing.assert_frame_equal(*tables)


def test_the_command_reconstructs_and_denoises(bids, model_folder, tmp_path, capsys):
    path = min(bids.rglob("*.npy"))
    assert (
        program(
            "reconstruct",
            model_folder,
            path,
            "-o",
            tmp_path / "r.npz",
            "--ratio",
            ".5",
            "--masking",
            "random",
        )
        == 0
    )
    assert "median_r2" in capsys.readouterr().out
    made = R.RunReconstruction.load(tmp_path / "r.npz")
    own = R.reconstruct_run(small_mae(parcels_spec()), path, "random", 0.5, **QUIET)
    assert np.allclose(made.prediction, own.prediction, atol=1e-6) and np.array_equal(made.hidden, own.hidden)
    assert program("reconstruct", model_folder, path, "-o", tmp_path / "r.npz") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (
        program(
            "reconstruct",
            model_folder,
            path,
            "-o",
            tmp_path / "d.npz",
            "--denoise",
            4,
            "--ratio",
            ".5",
            "--json",
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["samples"] == 4
    assert R.RunDenoising.load(tmp_path / "d.npz").count.min() >= 2
    assert program("reconstruct", model_folder, bids, "-o", tmp_path / "e.npz") == 2
    assert "--key" in capsys.readouterr().err
    assert program("reconstruct", model_folder, path, "-o", tmp_path / "e.pkl") == 2


def test_weights_without_input_description(bids, tmp_path, capsys):
    path, model = min(bids.rglob("*.npy")), small_mae(parcels_spec())
    (tmp_path / "input.json").write_text(model.input_spec.to_json())
    model.input_spec = None
    folder = model.save_pretrained(tmp_path / "model")
    assert program("embed", folder, path, "-o", tmp_path / "o") == 2
    assert "expected an input_spec" in (said := capsys.readouterr().err) and "--input FILE" in said
    assert program("embed", folder, path, "-o", tmp_path / "o", "--input", tmp_path / "input.json") == 0


def test_unknown_families_are_named(model_folder):
    with pytest.raises(ValueError, match="expected a family from mae.*found 'resnet'"):
        R.load_model(model_folder, "resnet")


def test_importing_is_light():
    code = "import sys; import fmri_book.recordings; print(sorted(set(sys.modules) & {'nibabel', 'nilearn', 'matplotlib', 'plotly', 'accelerate', 'omegaconf', 'webdataset', 'datasets'}))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# memory, and what is handed on


def test_a_run_is_unpacked_a_batch_at_a_time(run):
    model = Echo(flat_spec())
    R.embed_run(model, run, batch_size=3, **QUIET)
    assert [len(b["image"]) for b in model.batches] == [3, 3, 1]


def test_denoising_forgets_every_prediction(people, monkeypatch):
    import weakref

    model, alive, most = small_mae(parcels_spec()), weakref.WeakSet(), []
    predict = R._predict

    class Held:
        "Something that dies with a prediction."

    def watched(*args):
        found = predict(*args)
        found.values.held = Held()
        alive.add(found.values.held)
        most.append(len(alive))
        return found

    monkeypatch.setattr(R, "_predict", watched)
    R.denoise_run(model, people[0], 20, ratio=0.5, batch_size=50, **QUIET)
    assert len(most) == 20 and max(most) <= 2  # the one just made, and the one before it


def test_frames_that_were_read_before_serve_models_of_the_same_needs_only(people, run):
    frames = R.read_frames(people[0], parcels_spec())
    assert np.array_equal(
        R.embed_run(Echo(parcels_spec()), frames, **QUIET).patch,
        R.embed_run(Echo(parcels_spec()), people[0], **QUIET).patch,
    )
    with pytest.raises(
        ValueError, match=r"expected frames of schaefer100 at a TR of 1 s, found schaefer100 at 1\.4 s"
    ):
        R.embed_run(Echo(parcels_spec(tr=1.0)), frames, **QUIET)
    with pytest.raises(ValueError, match="expected frames of flat"):
        R.embed_run(Echo(flat_spec()), frames, **QUIET)
    flat = R.read_frames(run, flat_spec())
    with pytest.raises(ValueError, match="expected maps of fsLR_32k, found fsaverage5"):
        R.embed_run(Echo(flat_spec(surface="fsLR_32k")), flat, **QUIET)


def test_the_layout_in_a_models_folder_is_what_recordings_are_compared_with(run, tmp_path):
    mask = FlatMap.fsaverage5().mask.copy()
    mask[:, :100] = False
    model = small_mae(flat_spec())
    model.layout = Layout.flat(mask, "fsaverage5")
    loaded = R.load_model(model.save_pretrained(tmp_path / "m"))
    assert isinstance(loaded, MaskedViT) and loaded.layout == model.layout
    with pytest.raises(ValueError, match="expected the model's layout"):
        R.embed_run(loaded, run, **QUIET)


def test_a_digest_of_a_model_changes_with_any_weight_and_not_with_its_mode():
    model = small_mae(parcels_spec())
    before = R.digest_of(model)
    assert before == R.digest_of(model.train()) == R.digest_of(small_mae(parcels_spec()))
    with torch.no_grad():
        model.decoder.head.bias[0] += 1e-6
    assert R.digest_of(model) != before


def test_interrupted_it_says_what_is_kept(bids, model_folder, tmp_path, monkeypatch, capsys):
    save, saved = R.RunEmbeddings.save, []

    def interrupt(self, path):
        if saved:
            raise KeyboardInterrupt
        saved.append(save(self, path))

    monkeypatch.setattr(R.RunEmbeddings, "save", interrupt)
    assert program("embed", model_folder, bids, "-o", tmp_path / "out") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(contents(tmp_path / "out")) == 1


def test_a_folder_of_fmriprep_is_found_whole(run, tmp_path):
    "A volume in MNI space, simulated, beside tables that are no recordings."
    import nibabel as nib

    func = tmp_path / "sub-01" / "func"
    func.mkdir(parents=True)
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = -90, -126, -72
    values = np.random.default_rng(0).normal(1000, 20, (46, 55, 46, 40)).astype(np.float32)
    image = nib.Nifti1Image(values, affine)
    image.header.set_zooms((4, 4, 4, 2.0))
    image.header.set_xyzt_units("mm", "sec")
    stem = "sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold"
    nib.save(image, func / f"{stem}.nii.gz")
    (func / f"{stem}.json").write_text('{"RepetitionTime": 2.0}')
    (func / "sub-01_task-rest_desc-confounds_timeseries.tsv").write_text("a\n" + "1\n" * 40)
    found = R.embed_run(Echo(parcels_spec(tr=1.0)), tmp_path, **QUIET)
    assert found.about["subject"] == "01" and found.about["n_frames"] == 79
    assert any("LAS" in n or "position" in n for n in found.about["notes"])


# models of single pictures


@pytest.mark.parametrize("space", ["flat", "schaefer100"])
def test_models_of_single_pictures_take_windows_of_one_frame(people, run, space):
    flat = space == "flat"
    recording = run.replace(bold=run.bold[:20]) if flat else people[0].replace(bold=people[0].bold[:20])
    spec = (flat_spec if flat else parcels_spec)(frames=1, tr=1.4)
    image = dict(img_size=(224, 560), patch_size=56) if flat else dict(img_size=(100, 1), patch_size=1)
    model = small_mae(spec, **image, num_frames=None, t_patch_size=None)
    found, made = (
        R.embed_run(model, recording, **QUIET),
        R.reconstruct_run(model, recording, ratio=0.5, **QUIET),
    )
    (_, batch), *_ = R.open_windows(model, recording).batches(4)
    pictures = batch["image"][:, :, 0] if flat else batch["signal"][:, 0, None, :, None]
    inside = batch["mask"] if flat else None
    with torch.no_grad():
        expected = model.encoder(pictures, inside).embeddings.patch
    assert len(found) == 20 and np.allclose(found.patch[:4], expected, atol=1e-5)
    shown = R._columns(pictures, R.open_windows(model, recording))[:, 0].numpy()
    assert made.target.shape[:2] == (20, 1) and np.array_equal(made.target[:4, 0], shown)
    assert made.hidden.any((1, 2)).all() and not made.hidden.all()
    assert R.denoise_run(model, recording, 4, ratio=0.5, **QUIET).count.min() >= 2
    encoder = MaskedViT(**{k: v for k, v in model.encoder.config.items()}).eval()
    encoder.load_state_dict(model.encoder.state_dict())
    encoder.input_spec = spec
    assert np.array_equal(R.embed_run(encoder, recording, **QUIET).patch, found.patch)


def test_pictures_of_more_frames_than_the_model_reads_are_refused(people):
    model = small_mae(parcels_spec(), img_size=(100, 1), num_frames=None, t_patch_size=None)
    with pytest.raises(
        ValueError, match=r"expected images of shape \(batch, 1, 100, 1\), found \(7, 1, 10, 100, 1\)"
    ):
        R.embed_run(model, people[0], **QUIET)


# calls that cannot be meant fail before the first recording


@pytest.mark.parametrize(
    "how, says",
    [
        (dict(batch_size=0), "expected a batch size from 1 up, found 0"),
        (dict(stride=11), "expected a stride of 1 to 10"),
        (dict(device="cuda:99"), "expected a device of this machine.*found 'cuda:99'"),
        (dict(device="toaster"), "expected a device of this machine.*found 'toaster'"),
    ],
)
def test_wrong_calls_stop_before_anything_is_written(bids, tmp_path, how, says):
    with pytest.raises(ValueError, match=says):
        R.embed_files(small_mae(parcels_spec()), [bids], tmp_path / "out", **how, **QUIET)
    assert not (tmp_path / "out").exists()


def test_settings_under_which_nothing_could_be_made_bind_nobody(people, tmp_path):
    model, path = small_mae(parcels_spec()), tmp_path / "sub-01_atlas-schaefer100_timeseries.npy"
    np.save(path, people[0].bold)  # no sidecar, so no TR
    options = IngestOptions(source_space="schaefer100")
    first = R.embed_files(model, [path], tmp_path / "out", options=options, **QUIET)
    assert first.counts == {"failed": 1} and "--source-tr" in first.rows[0]["reason"]
    told = IngestOptions(source_space="schaefer100", source_tr=1.4)
    assert R.embed_files(model, [path], tmp_path / "out", options=told, **QUIET).counts == {"done": 1}
    with pytest.raises(ValueError, match=r"expected the settings.*source_tr"):
        R.embed_files(model, [path], tmp_path / "out", options=options, **QUIET)


def test_a_pattern_chooses_among_the_files_of_a_folder(bids, model_folder, tmp_path, capsys):
    assert program("embed", model_folder, bids, "-o", tmp_path / "o", "--pattern", "*sim-0002*") == 0
    assert [p.name[:12] for p in (tmp_path / "o").glob("*.npz")] == ["sub-sim-0002"]
    words = ("reconstruct", model_folder, bids, "-o", tmp_path / "r.npz", "--ratio", ".5")
    assert program(*words, "--pattern", "*sim-0002*") == 0
    assert R.RunReconstruction.load(tmp_path / "r.npz").about["subject"] == "sim-0002"


def test_what_failed_is_said_in_the_words_of_the_shell(bids, tmp_path, capsys):
    folder = small_mae(parcels_spec(space="schaefer200")).save_pretrained(tmp_path / "model")
    assert program("embed", folder, bids, "-o", tmp_path / "o", "--json") == 1
    told = json.loads(capsys.readouterr().out)["runs"]
    assert len(told) == 3 and all("--carry" in r["reason"] and "carry=True" not in r["reason"] for r in told)


def test_too_large_a_batch_names_the_remedy(people):
    class Large(Echo):
        def embed(self, batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    with pytest.raises(torch.OutOfMemoryError, match=r"choose a smaller batch_size \(CUDA out of memory"):
        R.embed_run(Large(parcels_spec()), people[0], **QUIET)


def test_z_scored_maps_are_refused_by_models_of_raw_units(stores):
    with pytest.raises(ValueError, match="expected flat maps in raw units, found .* z-scores"):
        R.embed_run(Echo(flat_spec(zscore=False)), stores / "None", **QUIET)
