"""The published BrainLM families: recorded numbers, independent references, files of the published form, bad input."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fmri_book  # noqa: F401  before transformers
from transformers import AutoConfig, AutoModelForPreTraining, ViTMAEConfig, ViTMAEForPreTraining

from fmri_book import brainlm_2024 as L
from fmri_book import recordings
from fmri_book.brainlm_2024 import (
    BrainLMMAE,
    BrainLMMAEConfig,
    BrainLMViTMAE,
    BrainLMViTMAEConfig,
    Canvas,
    DatRuns,
    kept_tokens,
    load_published,
    published_name,
    y_order,
)
from fmri_book.data import Run, Space
from fmri_book.formats import ArrowRuns, write_arrow
from fmri_book.splits import Scaler
from fmri_book.storage import Layout, write_store

pytestmark = pytest.mark.timeout(120)

SHARED = Path(__file__).resolve().parents[2] / "shared"
ATLASES = SHARED / "data" / "atlases"
quick = settings(max_examples=30, deadline=None, derandomize=True)

TINY = dict(
    hidden_size=32,
    decoder_hidden_size=32,
    num_hidden_layers=2,
    decoder_num_hidden_layers=1,
    num_attention_heads=4,
    decoder_num_attention_heads=4,
    intermediate_size=64,
    decoder_intermediate_size=64,
    num_brain_voxels=6,
    num_timepoints_per_voxel=40,
    timepoint_patching_size=10,
    mask_ratio=0.5,
)
TINY_PICTURE = dict(
    hidden_size=32,
    decoder_hidden_size=32,
    num_hidden_layers=1,
    decoder_num_hidden_layers=1,
    num_attention_heads=4,
    decoder_num_attention_heads=4,
    intermediate_size=64,
    decoder_intermediate_size=64,
    mask_ratio=0.2,
)
SMALL_PICTURE = TINY_PICTURE | dict(num_brain_voxels=40, num_timepoints_per_voxel=24, patch_size=8)


def filled(model):
    "Weights by the formula of the recorded numbers (specs/brainlm.md 1.15), in the order of the published names."
    state, k = model.state_dict(), 0
    for name in sorted(state, key=published_name):
        if name.endswith((".pe", "position_embeddings", "decoder_pos_embed")):
            continue
        value, i = state[name], torch.arange(state[name].numel(), dtype=torch.float64)
        wave = 0.05 * torch.sin(0.37 * i + 1.3 * k) + float(value.ndim == 1 and name.endswith(".weight"))
        value.copy_(wave.view_as(value))
        k += 1
    return model.eval()


def wave(batch, parcels, frames):
    b, v, t = (torch.arange(n, dtype=torch.float64) for n in (batch, parcels, frames))
    b, v = b[:, None, None], v[:, None]
    return torch.sin(0.05 * t + 0.7 * v + b) + 0.3 * torch.cos(0.11 * t * (v + 1))


XYZ = torch.stack(
    [torch.arange(6.0) - 5, 2 * torch.arange(6.0) - 7, 3 * torch.sin(torch.arange(6.0))], 1
).double()


def noisy(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def one_d(**fields):
    torch.manual_seed(0)
    return noisy(BrainLMMAE(BrainLMMAEConfig(**TINY | fields)))


def picture(**fields):
    torch.manual_seed(0)
    return noisy(BrainLMViTMAE(BrainLMViTMAEConfig(**SMALL_PICTURE | fields)))


def signal(batch=2, parcels=6, frames=40, seed=0):
    return torch.randn(batch, parcels, frames, generator=torch.Generator().manual_seed(seed))


def matches(found, expected, tolerance=1e-6):
    flat = found.detach().flatten()
    assert list(found.shape) == expected["shape"]
    np.testing.assert_allclose(flat[:5], expected["first"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(flat[-3:], expected["last"], rtol=0, atol=tolerance)
    assert float(flat.abs().mean()) == pytest.approx(expected["absmean"], abs=tolerance)
    assert float(flat.sum()) == pytest.approx(expected["sum"], abs=tolerance)


# ---- numbers recorded from the published code


@pytest.mark.skipif(
    not (SHARED / "golden").exists(), reason="recorded numbers of the published code are absent"
)
def test_one_d_model_gives_the_recorded_numbers():
    recorded = json.loads((SHARED / "golden" / "brainlm_original.json").read_text())
    expected = recorded["full_softmax(num_landmarks==segment_means_seq_len)"]
    model = filled(BrainLMMAE(BrainLMMAEConfig(**TINY, legacy=True, check_input=False)).double())
    b, i = torch.arange(2)[:, None], torch.arange(24)
    noise = ((37 * i + 11 * b) % 24 / 24).double()
    out = model.predict(wave(2, 6, 40), XYZ, noise=noise)
    assert float(out.loss) == pytest.approx(expected["loss"], abs=1e-6)
    matches(out.logits, expected["logits"])
    matches(out.last_hidden_state, expected["latent"])
    assert out.mask.int().tolist() == expected["mask"]


@pytest.mark.skipif(
    not (SHARED / "golden").exists(), reason="recorded numbers of the published code are absent"
)
@pytest.mark.parametrize("mode", ["predict_last", "predict_last_pixel"])
def test_picture_model_gives_the_recorded_numbers(mode):
    expected = json.loads((SHARED / "golden" / "brainlm_vitmae_padded.json").read_text())[mode]
    model = filled(BrainLMViTMAE(BrainLMViTMAEConfig(**TINY_PICTURE)).double())
    pixels = wave(1, 424, 200)[:, None].expand(-1, 3, -1, -1)
    out = model.predict(None, pixel_values=pixels, train_mode=mode)
    assert float(out.loss) == pytest.approx(expected["loss"], abs=1e-6)
    matches(out.logits, expected["logits"])
    assert float(out.mask.sum()) == expected["mask_sum"]
    assert int(out.mask[0].all(0).sum()) == expected["mask_cols"]


# ---- sizes


@pytest.mark.parametrize(("width", "parameters"), [(256, 5_047_724), (512, 13_429_292)])
def test_one_d_models_have_the_published_sizes(width, parameters):
    sizes = dict(
        num_hidden_layers=4, num_attention_heads=4, decoder_num_hidden_layers=2, decoder_num_attention_heads=4
    )
    with torch.device("meta"):
        model = BrainLMMAE(
            BrainLMMAEConfig(
                hidden_size=width,
                decoder_hidden_size=width,
                num_timepoints_per_voxel=200,
                timepoint_patching_size=20,
                **sizes,
            )
        )
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(state) == 124
    assert sum(v.numel() for v in state.values()) == parameters + 2 * 5000 * width
    assert state["vit.encoder.layer.3.attention.self.conv.weight"].shape == (4, 1, 65, 1)
    assert state["decoder.decoder_pred.weight"].shape == (768, width)


@pytest.mark.parametrize(
    ("fields", "parameters", "trainable", "entries", "patches"),
    [
        ({}, 112_590_080, 111_655_680, 334, 729),
        (
            dict(
                hidden_size=1280,
                num_hidden_layers=32,
                num_attention_heads=16,
                intermediate_size=5120,
                patch_size=14,
            ),
            658_337_868,
            None,
            654,
            961,
        ),
    ],
)
def test_picture_models_have_the_published_sizes(fields, parameters, trainable, entries, patches):
    with torch.device("meta"):
        model = BrainLMViTMAE(BrainLMViTMAEConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    assert model.vit.embeddings.position_embeddings.shape[1] == patches + 1 == model.config.canvas.grid**2 + 1
    frozen = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
    assert not any(table.requires_grad for table in frozen)
    if trainable:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


# ---- the 1-D model against a plain reference


def plain_layer(x, w, heads, eps=1e-12):
    "One layer by its equations: loops over heads and over the taps of the convolution."

    def linear(name, y):
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, y):
        centred = y - y.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    q, k, v = (linear(f"attention.self.{n}", x) for n in ("query", "key", "value"))
    d, n_taps, context = x.shape[-1] // heads, w["attention.self.conv.weight"].shape[2], torch.zeros_like(x)
    for h in range(heads):
        at = slice(h * d, (h + 1) * d)
        scores = (q[..., at] / d**0.25) @ (k[..., at] / d**0.25).transpose(-1, -2)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        mixed = weights @ v[..., at]
        for place in range(x.shape[1]):
            for tap in range(n_taps):
                other = place + tap - n_taps // 2
                if 0 <= other < x.shape[1]:
                    mixed[:, place] += w["attention.self.conv.weight"][h, 0, tap, 0] * v[:, other, at]
        context[..., at] = mixed
    x = norm("attention.output.LayerNorm", linear("attention.output.dense", context) + x)
    y = linear("intermediate.dense", x)
    y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    return norm("output.LayerNorm", linear("output.dense", y) + x)


def test_one_d_model_is_its_equations():
    model = one_d(conv_kernel_size=5).double()
    w, x, xyz = model.state_dict(), signal().double(), XYZ
    n, place = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(0, 32, 2, dtype=torch.float64)
    rates, positions = 10000 ** (-place / 32), torch.zeros(4, 32, dtype=torch.float64)
    positions[:, 0::2], positions[:, 1::2] = torch.sin(n * rates), torch.cos(n * rates)
    tokens = torch.zeros(2, 25, 32, dtype=torch.float64)
    tokens[:, 0] = w["vit.embeddings.cls_token"][0, 0]
    for v in range(6):
        for b in range(4):
            e = "vit.embeddings.signal_embedding_projection"
            place = (
                w["vit.embeddings.xyz_embedding_projection.weight"] @ xyz[v]
                + w["vit.embeddings.xyz_embedding_projection.bias"]
            )
            piece = x[:, v, 10 * b : 10 * b + 10] @ w[f"{e}.weight"].T + w[f"{e}.bias"]
            tokens[:, 1 + 4 * v + b] = piece + place + positions[b]
    for i in range(2):
        start = f"vit.encoder.layer.{i}."
        tokens = plain_layer(
            tokens, {k.removeprefix(start): t for k, t in w.items() if k.startswith(start)}, 4
        )
    tokens = torch.nn.functional.layer_norm(
        tokens, (32,), w["vit.layernorm.weight"], w["vit.layernorm.bias"], 1e-12
    )
    model.config.check_input = False
    out = model.predict(x, xyz)
    torch.testing.assert_close(out.last_hidden_state, tokens, rtol=0, atol=1e-6)


def test_attention_with_convolution_agrees_with_transformers_nystromformer():
    module = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    from transformers import NystromformerConfig

    fields = dict(
        hidden_size=32, num_attention_heads=4, conv_kernel_size=65, num_landmarks=64, segment_means_seq_len=64
    )
    theirs = module.NystromformerSelfAttention(
        NystromformerConfig(attention_probs_dropout_prob=0.0, **fields)
    ).eval()
    ours = one_d().vit.encoder["layer"][0].attention["self"]
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 25, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=0, atol=1e-5)


# ---- determinism


@pytest.mark.parametrize(("make", "size"), [(one_d, (6, 40)), (picture, (40, 24))])
def test_the_same_subject_twice_gives_the_same_bits(make, size):
    model, x = make(check_input=False), signal(3, *size)
    xyz = torch.randn(size[0], 3, generator=torch.Generator().manual_seed(1)) * 40
    torch.manual_seed(1)
    first = model.embed({"signal_vectors": x, "xyz_vectors": xyz})
    torch.manual_seed(2)
    model.train()
    again = model.embed({"signal_vectors": x, "xyz_vectors": xyz})
    assert model.training
    assert torch.equal(first.cls, again.cls) and torch.equal(first.patch, again.patch)
    out, repeated = model.predict(x, xyz), model.predict(x, xyz)
    assert torch.equal(out.logits, repeated.logits)
    assert out.loss is None and not out.mask.any()
    other = model.embed({"signal_vectors": x.flip(0), "xyz_vectors": xyz})
    torch.testing.assert_close(other.cls.flip(0), first.cls, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ask", ["embed", "predict"])
@pytest.mark.parametrize(("make", "size"), [(one_d, (6, 40)), (picture, (40, 24))])
def test_looking_leaves_no_trace(make, size, ask):
    "No gradient is kept, and every part of the model is in the mode that it was in: also one that was frozen by hand."
    model, x = make(check_input=False).train(), signal(2, *size)
    model.vit.embeddings.eval()
    before = [part.training for part in model.modules()]
    xyz = torch.randn(size[0], 3, generator=torch.Generator().manual_seed(1)) * 40
    batch = {"signal_vectors": x, "xyz_vectors": xyz}
    found = model.embed(batch).patch if ask == "embed" else model.predict(**batch).logits
    assert not found.requires_grad
    assert [part.training for part in model.modules()] == before
    with pytest.raises(ValueError, match="expected"):
        wrong = {"signal_vectors": x, "xyz_vectors": xyz[:3]}
        model.config.check_input = True
        model.embed(wrong) if ask == "embed" else model.predict(**wrong)
    assert [part.training for part in model.modules()] == before


@pytest.mark.parametrize(("make", "size"), [(one_d, (6, 40)), (picture, (40, 24))])
def test_recordings_of_another_tr_are_refused(make, size):
    model, x = make(zscore=True, tr=0.72), signal(2, *size).transpose(1, 2)
    fits, wrong = torch.tensor([0.72, 0.7204]), torch.tensor([0.72, 2.0])
    assert model.scaled({"signal": x, "tr": fits})["signal_vectors"].shape == (2, *size)
    assert model.scaled({"signal": x})["signal_vectors"].shape == (2, *size)  # nobody says
    for call in (model.scaled, model.embed):
        with pytest.raises(ValueError, match=r"TR of 0.72 s, as in training, found 0.72, 2 s; resample"):
            call({"signal": x, "tr": wrong})
    model.config.tr = 0.0  # unknown, as of the published weights
    assert model.scaled({"signal": x, "tr": wrong})["signal_vectors"].shape == (2, *size)


def test_legacy_order_changes_the_class_token_and_the_fixed_order_does_not():
    model, x = one_d(), signal()
    state = torch.get_rng_state()
    draws = [model.predict(x, XYZ, mask_ratio=0.0, legacy=True).last_hidden_state[:, 0] for _ in range(2)]
    assert not torch.equal(*draws) and not torch.equal(state, torch.get_rng_state())
    identity = torch.arange(24).expand(2, -1) / 24
    fixed = model.predict(x, XYZ, mask_ratio=0.0, noise=identity, legacy=True).last_hidden_state[:, 0]
    assert torch.equal(fixed, model.embed({"signal_vectors": x, "xyz_vectors": XYZ}).cls[:, 0])


def test_a_generator_decides_what_is_hidden():
    model, x = one_d().train(), signal()
    draw = lambda seed: model(x, XYZ, generator=torch.Generator().manual_seed(seed)).mask
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).flatten(1).sum(1).tolist() == [12, 12]


def test_block_embeddings_come_time_by_time():
    model, x = one_d(), signal(1)
    tokens = model.embed({"signal_vectors": x, "xyz_vectors": XYZ}).patch
    hidden = model.predict(x, XYZ).last_hidden_state
    for v in (0, 5):
        for n in (0, 3):
            assert torch.equal(tokens[:, n * 6 + v], hidden[:, 1 + v * 4 + n])


@quick
@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 99), st.booleans())
def test_masks_keep_the_promised_number(tokens, ratio, seed, legacy):
    noise = torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed))
    n = L._n_kept(ratio, tokens)
    ids = kept_tokens(noise, n, legacy)
    assert ids.shape == (3, max(1, int(tokens * (1 - ratio))))
    assert all(len(set(row)) == n for row in ids.tolist())
    assert torch.equal(kept_tokens(noise, n), kept_tokens(noise, n, True).sort(1).values)
    rest = torch.ones_like(noise, dtype=torch.bool).scatter(1, ids, False)
    if rest.any():
        for row, hide in zip(noise, rest):
            assert row[~hide].max() <= row[hide].min()


def test_hidden_values_are_not_used():
    model, x = one_d(check_input=False), signal()
    mask = torch.zeros(2, 6, 4, dtype=torch.bool)
    mask[0, :3, 1], mask[1, 3:, 2] = True, True
    clean = model.predict(x, XYZ, mask=mask)
    other = x.unflatten(-1, (4, 10)).masked_fill(mask[..., None], float("nan")).flatten(2)
    assert torch.equal(model.predict(other, XYZ, mask=mask).logits, clean.logits)
    error = (clean.logits - x.unflatten(-1, (4, 10)))[mask]
    assert float(clean.loss) == pytest.approx(float(error.square().mean()), rel=1e-5)


def test_gradients_reach_all_but_the_fossil():
    model = one_d(attention_probs_dropout_prob=0.0).train()
    model(signal(), XYZ, generator=torch.Generator().manual_seed(0)).loss.backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {"decoder.decoder_pred.weight", "decoder.decoder_pred.bias"}


def test_absolute_error():
    model, x = one_d(loss_fn="mae"), signal()
    out = model.predict(x, XYZ, mask_ratio=0.5, generator=torch.Generator().manual_seed(0))
    error = (out.logits - x.unflatten(-1, (4, 10)))[out.mask]
    assert float(out.loss) == pytest.approx(float(error.abs().mean()), rel=1e-5)


# ---- pictures


@quick
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([2, 7, 8, 16]))
def test_padding_is_undone_by_the_window(parcels, frames, patch):
    canvas = Canvas(parcels, frames, patch)
    pixels = torch.randn(2, 3, parcels, frames, generator=torch.Generator().manual_seed(0))
    square = canvas.pad(pixels)
    assert square.shape[-2:] == (canvas.side, canvas.side) and canvas.side % patch == 0
    assert torch.equal(square[:, :, *canvas.window], pixels)
    outside = torch.ones(canvas.side, canvas.side, dtype=torch.bool)
    outside[canvas.window] = False
    assert (square[:, :, outside] == -1).all()
    blocks = square.new_zeros(canvas.side, canvas.side).masked_fill(~outside, 1)
    by_hand = [
        [bool(blocks[r : r + patch, c : c + patch].any()) for c in range(0, canvas.side, patch)]
        for r in range(0, canvas.side, patch)
    ]
    assert canvas.filled.tolist() == by_hand


def test_the_published_canvases():
    first, second = Canvas(), Canvas(patch=14)
    assert (first.side, first.grid, first.window) == (432, 27, (slice(4, 428), slice(116, 316)))
    assert (second.side, second.grid, second.window) == (434, 31, (slice(5, 429), slice(117, 317)))
    assert int(first.filled.sum()) == 351 and int(second.filled.sum()) == 465
    hidden = first.task("predict_last", 0.2)
    assert hidden.patches.any(0).nonzero().flatten().tolist() == [17, 18, 19]
    assert hidden.counted[0].nonzero().flatten().tolist() == list(range(156, 200))
    pixel = first.task("predict_last_pixel", 0.2)
    assert pixel.patches.any(0).nonzero().flatten().tolist() == [18, 19]
    assert pixel.counted[0].nonzero().flatten().tolist() == list(range(160, 200))
    assert pixel.zeroed == slice(276, 288) and hidden.patches[:, 17].all()
    assert second.task("predict_last", 0.2).patches.any(0).nonzero().flatten().tolist() == [19, 20, 21, 22]


@quick
@given(st.integers(1, 200), st.integers(0, 99), st.integers(1, 30))
def test_sorting_is_stable_and_undone(n, seed, levels):
    rng = np.random.default_rng(seed)
    xyz = rng.integers(0, levels, (n, 3)) - levels // 2
    order = y_order(xyz)
    assert order.tolist() == sorted(range(n), key=lambda i: (xyz[i, 1], i))
    x = torch.arange(n)
    assert torch.equal(x[order][order.argsort()], x)


@pytest.mark.skipif(not ATLASES.exists(), reason="the A424 atlas is not on this machine")
def test_a424_is_sorted_as_published():
    space = L.read_coordinates(
        ATLASES / "A424_Coordinates.dat", "a424_as_published"
    )  # others may register a424
    assert space.n_sites == 424 and len(np.unique(space.coords[:, 1])) == 77
    assert y_order(space.coords)[:10].tolist() == [4, 184, 185, 192, 5, 12, 337, 199, 200, 331]
    default = np.argsort(space.coords[:, 1])
    assert (default != y_order(space.coords).numpy()).any()
    config = BrainLMViTMAEConfig.for_data("a424_as_published", 0.735)
    assert config.num_brain_voxels == 424 and config.image_size == 432 and config.space == "a424_as_published"


def test_parcels_come_back_in_their_order():
    model, x = picture(check_input=False), signal(2, 40, 24)
    xyz = 40 * torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    order = y_order(xyz)
    out = model.predict(x, xyz, train_mode="predict_last", mask_ratio=0.5)
    rows = model.predict(
        None,
        pixel_values=(x / 5.6430855)[:, None, order].expand(-1, 3, -1, -1),
        train_mode="predict_last",
        mask_ratio=0.5,
    )
    torch.testing.assert_close(out.logits[:, order], rows.logits * 5.6430855)
    assert float(out.loss) == pytest.approx(float(rows.loss), rel=1e-6)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    moved = model.predict(x[:, shuffled], xyz[shuffled], train_mode="predict_last", mask_ratio=0.5)
    torch.testing.assert_close(moved.logits, out.logits[:, shuffled], rtol=0, atol=1e-5)


def test_each_sample_is_sorted_by_its_own_coordinates():
    model, x = picture(check_input=False), signal(2, 40, 24)
    xyz = 40 * torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1))
    both = model.predict(
        x, xyz, mask_ratio=0.5, noise=torch.rand(2, 25, generator=torch.Generator().manual_seed(3))
    )
    noise = torch.rand(2, 25, generator=torch.Generator().manual_seed(3))
    for i in range(2):
        one = model.predict(x[i : i + 1], xyz[i], mask_ratio=0.5, noise=noise[i : i + 1])
        torch.testing.assert_close(one.logits[0], both.logits[i], rtol=0, atol=1e-5)


def test_without_padding_it_is_transformers_vit_mae():
    fields = TINY_PICTURE | dict(patch_size=8, mask_ratio=0.5)
    ours = noisy(
        BrainLMViTMAE(BrainLMViTMAEConfig(num_brain_voxels=32, num_timepoints_per_voxel=32, **fields))
    )
    theirs = ViTMAEForPreTraining(ViTMAEConfig(image_size=32, **fields)).eval()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(pixels, noise=noise)
    found = ours.predict(None, pixel_values=pixels, noise=noise)
    images = theirs.unpatchify(expected.logits).mean(1)
    torch.testing.assert_close(found.logits, images, rtol=0, atol=1e-5)
    hidden = expected.mask.view(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2).bool()
    assert torch.equal(found.mask, hidden)
    grey = pixels.mean(1)
    assert float(found.loss) == pytest.approx(float((images - grey)[hidden].square().mean()), rel=1e-5)


def test_a_fresh_picture_model_knows_places():
    model = BrainLMViTMAE(BrainLMViTMAEConfig(**SMALL_PICTURE))
    table = model.vit.embeddings.position_embeddings[0]
    for row, column in ((0, 0), (2, 3), (4, 1)):
        at = table[1 + 5 * row + column]
        rates = 10_000.0 ** -(np.arange(8) / 8)
        expected = np.concatenate([f(a * rates) for a in (column, row) for f in (np.sin, np.cos)])
        np.testing.assert_allclose(at, expected, atol=1e-6)
    assert torch.equal(model.decoder.decoder_pos_embed, model.vit.embeddings.position_embeddings)
    assert (table[0] == 0).all() and model.decoder.mask_token.abs().sum() > 0


def test_normalised_pixels_are_normalised_over_time():
    model = picture(norm_pix_loss=True, check_input=False)
    pixels = signal(1, 40, 24)[:, None].expand(-1, 3, -1, -1) * 3 + 1
    out = model.predict(None, pixel_values=pixels, train_mode="predict_last", mask_ratio=0.5)
    x = pixels[:, 0]
    target = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
    assert float(out.loss) == pytest.approx(float((out.logits - target)[out.mask].square().mean()), rel=1e-5)


def test_picture_training_needs_a_train_mode():
    model, x = picture(check_input=False).train(), signal(2, 40, 24)
    xyz = torch.randn(40, 3)
    with pytest.raises(ValueError, match="train mode"):
        model(x, xyz)
    g = torch.Generator().manual_seed(0)
    model.config.train_mode, model.config.mask_ratio = "auto_encode", 0.75
    loss = model(x, xyz, generator=g).loss
    loss.backward()
    assert model.vit.embeddings.cls_token.grad.abs().sum() > 0


# ---- files


def write_folder(folder, state, config, kind="bin"):
    folder.mkdir(exist_ok=True)
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


OLD_CONFIG = {k: v for k, v in TINY.items()} | {
    "model_type": "brainlm_mae",
    "architectures": ["BrainLMForPretraining"],
    "torch_dtype": "float32",
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "transformers_version": "4.28.0",
}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_one_d_folder_of_the_published_form(tmp_path, kind):
    model = one_d()
    state = model.state_dict()
    state["vit.embeddings.pos_embedding.pe"] = state["vit.embeddings.pos_embedding.pe"][None]
    loaded = load_published(write_folder(tmp_path / "old", state, OLD_CONFIG, kind))
    assert isinstance(loaded, BrainLMMAE) and not loaded.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    report = loaded.load_report
    assert report.entries == len(state) and len(report.sha256) == 64 and report.known_as == ""
    assert "pe" in report.notes[0] and report.family in str(report)


def published_state(model):
    return {published_name(k): v for k, v in model.state_dict().items()}


SHIPPED = TINY_PICTURE | {
    "model_type": "vit_mae",
    "patch_size": 8,
    "image_size": 224,
    "architectures": ["ViTMAEForPreTraining"],
}


@pytest.mark.parametrize("spelling", ["published", "installed"])
def test_a_picture_folder_of_the_published_form(tmp_path, spelling):
    model = picture()
    state = published_state(model) if spelling == "published" else model.state_dict()
    folder = write_folder(tmp_path / "x", state, SHIPPED)
    loaded = load_published(folder, num_brain_voxels=40, num_timepoints_per_voxel=24)
    assert isinstance(loaded, BrainLMViTMAE) and loaded.config.train_mode is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert any("train_mode" in note for note in loaded.load_report.notes)
    assert any("224" in note and "40" in note for note in loaded.load_report.notes)
    trained = BrainLMViTMAE.from_pretrained(
        folder, num_brain_voxels=40, num_timepoints_per_voxel=24, train_mode="predict_last"
    )
    assert trained.config.train_mode == "predict_last"
    assert not any("train_mode" in note for note in trained.load_report.notes)
    assert any("scaler" in note for note in trained.load_report.notes)


def test_files_that_the_installed_transformers_saves_are_read(tmp_path):
    fields = {
        k: v for k, v in SMALL_PICTURE.items() if not k.startswith("num_b") and not k.startswith("num_t")
    }
    theirs = ViTMAEForPreTraining(ViTMAEConfig(image_size=40, **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_published(tmp_path / "theirs", num_brain_voxels=40, num_timepoints_per_voxel=24)
    expected = published_state(theirs)
    found = published_state(loaded)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_parts_of_a_large_file(tmp_path):
    model = picture()
    state, names = published_state(model), sorted(published_state(model))
    where = {k: f"pytorch_model-0000{1 + (i > 20)}-of-00002.bin" for i, k in enumerate(names)}
    for file in set(where.values()):
        torch.save({k: state[k] for k in names if where[k] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text(json.dumps(SHIPPED))
    load = lambda: load_published(tmp_path, num_brain_voxels=40, num_timepoints_per_voxel=24)
    assert load().load_report.entries == len(state)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="part of the weights"):
        load()


@pytest.mark.parametrize("make", [one_d, picture])
def test_saved_and_opened_again(tmp_path, make):
    layout = Layout.of("schaefer100")
    model = make(space="schaefer100", layout=layout.digest, tr=1.4)
    model.save_pretrained(tmp_path / "m")
    saved = load_file(tmp_path / "m" / "model.safetensors")
    assert set(saved) == {published_name(k) if make is picture else k for k in model.state_dict()}
    for loaded in (
        type(model).from_pretrained(tmp_path / "m"),
        AutoModelForPreTraining.from_pretrained(tmp_path / "m"),
    ):
        assert type(loaded) is type(model)
        assert all(
            torch.equal(a, b)
            for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
        )
        assert loaded.input_spec == model.input_spec
        assert loaded.input_spec.tr == 1.4 and loaded.input_spec.space == "schaefer100"
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert type(config) is type(model.config) and config.hidden_size == 32
    model.save_pretrained(tmp_path / "m")  # an existing folder is replaced, file by file


def stopped_after_the_weights(model, folder, monkeypatch):
    "A save that is killed where nothing can be tidied up: after the weights, before the settings."
    real = L.atomic_path

    def killed(path, *told):
        if path.name == "config.json":
            raise KeyboardInterrupt
        return real(path, *told)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(L, "atomic_path", killed)
        model.save_pretrained(folder)


@pytest.mark.parametrize("make", [one_d, picture])
def test_new_weights_never_stand_beside_old_settings(tmp_path, make, monkeypatch):
    folder = tmp_path / "m"
    make(tr=0.72).save_pretrained(folder)
    changed = noisy(make(tr=2.0), 1)
    stopped_after_the_weights(changed, folder, monkeypatch)
    for cls in (type(changed), AutoModelForPreTraining):
        with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
            cls.from_pretrained(folder)
    assert changed.save_pretrained(folder) and type(changed).from_pretrained(folder).config.tr == 2.0


def test_a_save_with_the_same_settings_may_stop_anywhere(tmp_path, monkeypatch):
    folder, more = one_d(tr=0.72).save_pretrained(tmp_path / "m"), noisy(one_d(tr=0.72), 1)
    stopped_after_the_weights(more, folder, monkeypatch)
    loaded = BrainLMMAE.from_pretrained(folder)
    assert loaded.config.tr == 0.72
    assert torch.equal(loaded.decoder.mask_token, more.decoder.mask_token)


def test_a_known_checksum_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "old", one_d().state_dict(), OLD_CONFIG)
    monkeypatch.setitem(L.KNOWN_FILES, L.read_published(folder).sha256, "a file of ours")
    assert load_published(folder).load_report.known_as == "a file of ours"
    assert "a file of ours" in str(load_published(folder).load_report)


def test_every_weight_must_fit(tmp_path):
    state = one_d().state_dict()
    first = "vit.encoder.layer.0.attention.self.conv.weight"
    less = {k: v for k, v in state.items() if k != first}
    for name, wrong, message in (
        ("missing", less, "1 weights missing"),
        ("extra", state | {"vit.pooler.weight": torch.zeros(3)}, "1 weights left over: vit.pooler.weight"),
        ("size", state | {first: torch.zeros(4, 1, 33, 1)}, "another size"),
        ("renamed", less | {first.replace("conv", "konv"): state[first]}, "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            BrainLMMAE.from_pretrained(write_folder(tmp_path / name, wrong, OLD_CONFIG))


def test_the_wrong_family_names_the_right_class(tmp_path):
    pictures = write_folder(tmp_path / "p", published_state(picture()), SHIPPED)
    blocks = write_folder(tmp_path / "b", one_d().state_dict(), OLD_CONFIG)
    decoder = write_folder(
        tmp_path / "d", {"model.embeddings.signal_projection.weight": torch.zeros(2, 2)}, {}
    )
    with pytest.raises(ValueError, match=r"BrainLMViTMAE\.from_pretrained"):
        BrainLMMAE.from_pretrained(pictures)
    with pytest.raises(ValueError, match=r"BrainLMMAE\.from_pretrained"):
        BrainLMViTMAE.from_pretrained(blocks)
    for load in (load_published, BrainLMMAE.from_pretrained):
        with pytest.raises(ValueError, match=r"fmri_book\.brainlm\.BrainLMForPretraining"):
            load(decoder)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors or pytorch_model\.bin.*old_13M"):
        load_published(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found nothing"):
        load_published(tmp_path / "empty")
    folder = write_folder(tmp_path / "x", one_d().state_dict(), OLD_CONFIG)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_published(folder)
    with pytest.raises(ValueError, match="have one of"):
        load_published(write_folder(tmp_path / "other", {"bert.weight": torch.zeros(2)}, {}))
    with pytest.raises(ValueError, match="found also no_such_field"):
        load_published(write_folder(tmp_path / "y", one_d().state_dict(), OLD_CONFIG), no_such_field=1)
    with pytest.raises(ValueError, match="40 pixels wide"):
        load_published(write_folder(tmp_path / "p", published_state(picture()), SHIPPED))


def in_pickle(folder, state, config=OLD_CONFIG):
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_torn_files_are_named(tmp_path):
    state = one_d().state_dict()
    first = "vit.layernorm.weight"
    torn = in_pickle(tmp_path / "torn", state) / "pytorch_model.bin"
    torn.write_bytes(torn.read_bytes()[:20_000])
    safe = write_folder(tmp_path / "safe", state, OLD_CONFIG, kind="safetensors")
    file = safe / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for folder in (torn.parent, safe):
        with pytest.raises(ValueError, match="expected a file of tensors"):
            load_published(folder)
    for name, wrong in (
        ("nan", torch.full((32,), float("nan"))),
        ("whole", torch.ones(32, dtype=torch.int64)),
        ("sparse", torch.ones(32).to_sparse()),
    ):
        with pytest.raises(ValueError, match=rf"finite real numbers, found others in {first}"):
            load_published(in_pickle(tmp_path / name, state | {first: wrong}))
    with pytest.raises(ValueError, match="checkpoint of a training run"):
        load_published(in_pickle(tmp_path / "nested", {"model": state}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"hidden_size": 3', "JSON with names and values"),
        ("[1]", "JSON with names and values, found list"),
        (OLD_CONFIG | {"hidden_size": "32"}, "hidden_size as a whole number, found '32'"),
        (OLD_CONFIG | {"coordinates": [[1.0, 2.0, 3.0]]}, r"\(parcels, 3\) .* for 6 parcels"),
    ],
)
def test_settings_that_are_none_are_named(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_published(in_pickle(tmp_path / "x", one_d().state_dict(), config))


def test_an_index_names_files_beside_it(tmp_path):
    one_d().save_pretrained(tmp_path / "other")
    (tmp_path / "x").mkdir()
    index = tmp_path / "x" / "model.safetensors.index.json"
    for text, message in (
        ("nonsense", "JSON with names and values"),
        ("{}", "a weight_map"),
        ('{"weight_map": {"w": "../other/model.safetensors"}}', "beside the index"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_published(tmp_path / "x")


def test_pictures_without_positions_are_named(tmp_path):
    state = published_state(picture())
    del state["vit.embeddings.position_embeddings"]
    with pytest.raises(ValueError, match="position_embeddings of a ViT-MAE"):
        load_published(write_folder(tmp_path / "p", state, SHIPPED))


class Danger:
    def __reduce__(self):
        return Path.touch, (Path("danger"),)


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"vit": Danger()}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a file of tensors"):
        load_published(tmp_path)
    assert not (tmp_path / "danger").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    with pytest.raises(ValueError, match="expected a file of tensors"):
        load_published(tmp_path)


# ---- bad input


def test_bad_signals_are_named():
    model, x = one_d(), signal()
    cases = {
        "6 parcels, 40 frames": x[:, :5],
        "transpose": x.transpose(1, 2),
        "40 frames": x[..., :30],
        "first: sample 1, parcel 3": x.clone().index_put_(
            (torch.tensor(1), torch.tensor(3), torch.tensor(7)), torch.tensor(float("nan"))
        ),
        "constant": x * (torch.arange(6) != 2)[:, None],
        "robust": 9000 + 50 * x,
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            model.predict(wrong, XYZ)
        with pytest.raises(ValueError, match=message):
            model.embed({"signal_vectors": wrong, "xyz_vectors": XYZ})
    for wrong in (100 * x, x / 1000):
        with pytest.raises(ValueError, match="quartiles"):
            model.predict(wrong, XYZ)


def test_bad_coordinates_are_named():
    model, x = one_d(), signal()
    with pytest.raises(ValueError, match="found none"):
        model.predict(x)
    with pytest.raises(ValueError, match=r"\(parcels, 3\) .* for 6 parcels, found shape \(5, 3\)"):
        model.predict(x, XYZ[:5])
    with pytest.raises(ValueError, match="finite coordinates, found 1 parcels without"):
        model.predict(
            x,
            XYZ.clone().index_put_(
                (torch.tensor(2), torch.tensor(0)), torch.tensor(float("nan"), dtype=torch.float64)
            ),
        )
    coords = Space.named("schaefer100").coords
    with pytest.raises(ValueError, match="affine"):
        L.check_coordinates((coords + (90, 126, 72)) / 2, 100)
    with pytest.raises(ValueError, match="within 250 of the origin"):
        L.check_coordinates(coords / 1000, 100)
    assert L.check_coordinates(coords, 100) is coords


def test_bad_sizes_and_masks_are_named():
    for fields, message in (
        (dict(timepoint_patching_size=7), "divides 40 time points"),
        (dict(decoder_hidden_size=16), "as wide as the encoder"),
        (dict(num_landmarks=32), "Nyström approximation is not built"),
        (dict(num_attention_heads=5), "heads divide"),
        (dict(loss_fn="huber"), "mse or mae"),
    ):
        with pytest.raises(ValueError, match=message):
            one_d(**fields)
    model, x = one_d(), signal()
    uneven = torch.zeros(2, 6, 4, dtype=torch.bool)
    uneven[0, 0, 0] = True
    for wrong in (uneven, torch.ones(2, 6, 4)):
        with pytest.raises(ValueError, match="as many tokens"):
            model.predict(x, XYZ, mask=wrong)
    with pytest.raises(ValueError, match=r"broadcasts to \(2, 6, 4\)"):
        model.predict(x, XYZ, mask=torch.zeros(2, 6, 5))
    with pytest.raises(ValueError, match="noise of shape"):
        model.predict(x, XYZ, noise=torch.rand(2, 23))
    with pytest.raises(ValueError, match="mask ratio"):
        model.predict(x, XYZ, mask_ratio=1.0)
    with pytest.raises(ValueError, match="train_mode"):
        BrainLMViTMAEConfig(train_mode="predict_first")
    pictures = picture(check_input=False)
    with pytest.raises(ValueError, match="train_mode"):
        pictures.predict(signal(1, 40, 24), torch.randn(40, 3), train_mode="last")
    with pytest.raises(ValueError, match="hides some of 24 frames"):
        pictures.predict(signal(1, 40, 24), torch.randn(40, 3), train_mode="predict_last", mask_ratio=0.01)
    with pytest.raises(ValueError, match="as many patches"):
        pictures.predict(signal(1, 40, 24), torch.randn(40, 3), mask=torch.ones(1, 5, 5))


def test_a_parcel_without_a_place_and_a_foreign_scaler_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found none for 2 parcels .*give the atlas's own table"):
        BrainLMMAEConfig.for_data("schaefer1000", 2.0)
    source = dat_folder(tmp_path)
    scaler = Scaler.fit(source, subjects="all")
    with pytest.raises(ValueError, match="layout"):
        BrainLMMAEConfig.for_data("schaefer200", 2.0, scaler)
    with pytest.raises(ValueError, match="seconds"):
        BrainLMMAEConfig.for_data("schaefer100", 2000.0)


# ---- data


def dat_folder(folder, n=4, parcels=100, frames=40):
    rng = np.random.default_rng(0)
    for i in range(n):
        np.savetxt(
            folder / f"{100 + i // 2}_{i}.dat", 5000 + 40 * rng.standard_normal((frames, parcels)), fmt="%.3f"
        )
    return DatRuns(folder, "schaefer100", 0.735, lambda name: name.split("_")[0])


def test_text_files_to_arrow_tables_to_embeddings(tmp_path):
    (tmp_path / "dat").mkdir()
    source = dat_folder(tmp_path / "dat")
    assert len(source) == 4 and [r.subject for r in source] == ["100", "100", "101", "101"]
    scaler = Scaler.fit(source, kind="robust", per="site", subjects=["100"])
    write_arrow(source, tmp_path / "arrow", transform=scaler.transform)
    read = list(ArrowRuns(tmp_path / "arrow"))
    assert len(read) == 4 and read[0].tr == 0.735
    fields = {k: v for k, v in TINY.items() if k != "num_brain_voxels"}
    config = BrainLMMAEConfig.for_data(source.layout, 0.735, scaler, **fields)
    assert config.num_brain_voxels == 100
    torch.manual_seed(0)
    model = BrainLMMAE(config).eval()
    raw = torch.from_numpy(np.stack([r.values for r in source]))
    ready = torch.from_numpy(np.stack([r.values for r in read])).transpose(1, 2)
    torch.testing.assert_close(model.scaled({"signal": raw})["signal_vectors"], ready)
    assert torch.equal(model.embed({"signal": raw}).cls, model.embed({"signal_vectors": ready}).cls)
    model.save_pretrained(tmp_path / "m")
    again = load_published(tmp_path / "m")
    assert torch.equal(again.embed({"signal": raw}).cls, model.embed({"signal": raw}).cls)
    with pytest.raises(KeyError, match="signal_vectors"):
        model.embed({"image": raw})
    model.config.scaler = None
    with pytest.raises(ValueError, match="scaler in the config"):
        model.embed({"signal": raw})


def test_bad_text_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\.dat"):
        DatRuns(tmp_path, "schaefer100", 2.0, str)
    source = dat_folder(tmp_path)
    nobody = DatRuns(tmp_path, "schaefer100", 2.0, lambda name: "")
    with pytest.raises(ValueError, match="who was scanned"):
        next(iter(nobody))
    np.savetxt(tmp_path / "000.dat", np.zeros((100, 40)))
    with pytest.raises(ValueError, match="transposed"):
        list(dat_again(source, tmp_path))
    np.savetxt(tmp_path / "000.dat", np.full((40, 100), np.nan))
    with pytest.raises(ValueError, match="4000 others"):
        list(dat_again(source, tmp_path))
    (tmp_path / "c.dat").write_text("1 5 5 5\n3 1 1 1\n")
    with pytest.raises(ValueError, match="numbered 1, 2, 3"):
        L.read_coordinates(tmp_path / "c.dat", "atlas_of_two")


def dat_again(source, folder):
    return DatRuns(folder, source.layout, source.tr, source.subject_of)


# ---- normalisations, reconstruction


def test_normalisations_of_the_conversion_script(tmp_path):
    source = dat_folder(tmp_path)
    recordings = [r.values.astype(np.float64) for r in source]
    everything = np.concatenate(recordings)
    x = recordings[3]
    expected = {
        "All_Patient_All_Voxel": (x - everything.min()) / np.ptp(everything),
        "Per_Patient_All_Voxel": (x - x.min()) / np.ptp(x),
        "Per_Patient_Per_Voxel": (x - x.min(0)) / np.ptp(x, axis=0),
        "Per_Voxel_All_Patient": (x - everything.min(0)) / np.ptp(everything, axis=0),
        "Subtract_Mean_Divide_Global_STD": (x - x.mean(0)) / 41.44047,
        "Subtract_Mean_Divide_Global_99thPercent": (x - x.mean(0)) / 111.13143061224855,
    }
    assert set(expected) == set(L.VARIANTS)
    for variant, values in expected.items():
        transform = L.normalisation_2024(variant, source, ["100", "101"])
        np.testing.assert_allclose(transform(list(source)[3].values), values, rtol=0, atol=1e-4)
    of_one = L.normalisation_2024("All_Patient_All_Voxel", source, ["100"])
    low, high = min(r.min() for r in recordings[:2]), max(r.max() for r in recordings[:2])
    np.testing.assert_allclose(of_one(list(source)[3].values), (x - low) / (high - low), atol=1e-4)
    assert (L.normalisation_2024("Per_Patient_Per_Voxel")(np.ones((5, 3), np.float32)) == 0).all()
    for wrong in ("Robust", "All_Patient_All_Voxel"):
        with pytest.raises(ValueError, match="expected"):
            L.normalisation_2024(wrong, source, ["nobody"])


class Recorder:
    "Stands for a model: predicts the number of the call, and notes what was hidden."

    def __init__(self, model):
        self.model, self.config, self.hidden = model, model.config, []

    def __call__(self, signal, xyz, **options):
        out = type(self.model).predict(self.model, signal, xyz, **options)
        self.hidden.append(out.mask)
        out.logits = torch.full_like(out.logits, float(len(self.hidden)))
        return out


@pytest.mark.parametrize(
    ("make", "size", "ratio"), [(one_d, (6, 40), 0.3), (one_d, (6, 40), 0.75), (picture, (40, 24), 0.4)]
)
def test_every_point_is_predicted_while_hidden(make, size, ratio, monkeypatch):
    model, x, xyz = make(check_input=False), signal(2, *size), torch.randn(size[0], 3)
    record = Recorder(model)
    monkeypatch.setattr(model, "predict", record, raising=False)
    first = L.reconstruct(model, x, xyz, ratio=ratio, how="first", seed=3)
    masks = [m.repeat_interleave(10, 2) if make is one_d else m for m in record.hidden]
    passes = torch.stack(masks).int()
    assert (passes.sum(0) > 0).all() and len(masks) <= math.ceil(1 / ratio) + 1
    assert torch.equal(first, passes.argmax(0) + 1.0)
    record.hidden.clear()
    mean = L.reconstruct(model, x, xyz, ratio=ratio, seed=3)
    numbers = torch.arange(1, len(masks) + 1.0)[:, None, None, None]
    torch.testing.assert_close(mean, (passes * numbers).sum(0) / passes.sum(0))


def test_reconstruction_refuses_what_hides_nothing():
    model = one_d()
    with pytest.raises(ValueError, match="hides some of 24"):
        L.reconstruct(model, signal(), XYZ, ratio=0.0)
    with pytest.raises(ValueError, match="mean or first"):
        L.reconstruct(model, signal(), XYZ, how="last")


def test_scaled_coordinates_are_scaled_coordinates():
    model, x = one_d(), signal()
    scaled = one_d(xyz_scale=0.5)
    scaled.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        scaled.predict(x, 2 * XYZ).logits, model.predict(x, XYZ).logits, rtol=0, atol=1e-5
    )
    assert (scaled.predict(x, XYZ).logits - model.predict(x, XYZ).logits).abs().max() > 1e-4


def test_in_bfloat16_parcels_keep_their_rows():
    model, x = picture(check_input=False), signal(1, 40, 24)
    xyz = torch.stack([torch.zeros(40), 100 + torch.linspace(0, 1, 40).flip(0), torch.zeros(40)], 1)
    low = picture(check_input=False).bfloat16()
    out, half = (m.predict(x, xyz, train_mode="predict_last", mask_ratio=0.5).logits for m in (model, low))
    assert float(torch.corrcoef(torch.stack([out.flatten(), half.float().flatten()]))[0, 1]) > 0.99
    assert len(xyz[:, 1].bfloat16().unique()) < 40


@pytest.mark.parametrize("make", ["one_d", "picture"])
def test_a_published_folder_embeds_a_store_from_the_command_line(tmp_path, make):
    (tmp_path / "dat").mkdir()
    source = dat_folder(tmp_path / "dat")
    atlas = Space.named("schaefer100").coords.round()
    (tmp_path / "atlas.dat").write_text(
        "\n".join(f"{i + 1} {x:.0f} {y:.0f} {z:.0f}" for i, (x, y, z) in enumerate(atlas))
    )
    space = L.read_coordinates(tmp_path / "atlas.dat", f"own_{make}")
    scans = DatRuns(tmp_path / "dat", space, 0.735, source.subject_of)
    store = write_store(scans, tmp_path / "store", progress=False)
    scaler = Scaler.fit(store, kind="robust", per="site", subjects=["100"])
    torch.manual_seed(0)
    if make == "one_d":
        untold = noisy(BrainLMMAE(BrainLMMAEConfig(**TINY)))
    else:
        fields = TINY_PICTURE | dict(num_brain_voxels=100, num_timepoints_per_voxel=40)
        untold = noisy(BrainLMViTMAE(BrainLMViTMAEConfig(**fields)))
    untold.save_pretrained(tmp_path / "published")
    model = load_published(tmp_path / "published", **L.data_fields(store.layout, 0.735, scaler))
    model.save_pretrained(tmp_path / "ready")
    # in a process of its own, which knows the atlas from the store and the model only
    call = ["embed", "ready", "store", "-o", "out", "--family", "brainlm-2024"]
    done = subprocess.run(
        [sys.executable, "-m", "fmri_book.cli", *call],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = sorted((tmp_path / "out").glob("sub-*.npz"))
    assert len(found) == 4
    run = Run(next(iter(scans)).values, 0.735, space.name, "100")
    expected = recordings.embed_run(model, run, progress=False)
    assert np.isfinite(expected.cls).all() and expected.cls.shape == (1, 1, 32)
    closest = min(
        float(np.abs(recordings.RunEmbeddings.load(path).cls - expected.cls).max()) for path in found
    )
    assert closest < 1e-5
    with pytest.raises(ValueError, match="expected"):
        recordings.embed_run(load_published(tmp_path / "published"), run, progress=False)


def test_embeddings_of_another_scaler_are_other_embeddings(tmp_path):
    source = dat_folder(tmp_path)
    scalers = [Scaler.fit(source, kind="robust", per="site", subjects=[s]) for s in ("100", "101")]
    fields = {k: v for k, v in TINY.items() if k != "num_brain_voxels"}
    digests = set()
    for scaler in (*scalers, scalers[0]):
        torch.manual_seed(0)
        model = BrainLMMAE(BrainLMMAEConfig.for_data(source.layout, 0.735, scaler, **fields))
        digests.add(recordings.digest_of(model))
    assert len(digests) == 2


def test_places_of_another_table(tmp_path):
    own = Space.named("schaefer100").coords + 3
    assert L.data_fields("schaefer100", 2.0, coordinates=own)["coordinates"] == own.tolist()
    with pytest.raises(ValueError, match=r"for 100 parcels, found shape \(99, 3\)"):
        L.data_fields("schaefer100", 2.0, coordinates=own[:99])


def test_another_atlas_than_the_published_is_told(tmp_path):
    "1-D weights take any number of parcels; the report says that it is another."
    noisy(BrainLMMAE(BrainLMMAEConfig(**TINY))).save_pretrained(tmp_path / "one")
    same = L.load_published(tmp_path / "one")
    assert not [n for n in same.load_report.notes if "told" in n]
    fields = L.data_fields("schaefer100", 0.735)
    notes = L.load_published(tmp_path / "one", **fields).load_report.notes
    assert f"{TINY['num_brain_voxels']} parcels in config.json, 100 told: the weights were trained on other recordings than these" in notes


@pytest.mark.skipif(not ATLASES.exists(), reason="the A424 atlas is not on this machine")
def test_a424_in_another_order_is_refused(tmp_path):
    rows = (ATLASES / "A424_Coordinates.dat").read_text().splitlines()
    cells = [row.split() for row in rows]
    cells[5][1:], cells[300][1:] = cells[300][1:], cells[5][1:]
    (tmp_path / "a.dat").write_text("\n".join(" ".join(c) for c in cells))
    with pytest.raises(ValueError, match="expected A424, found 2 of 424 parcels elsewhere"):
        L.read_coordinates(tmp_path / "a.dat", "a424_in_another_order")
    known = Space.named("schaefer100")
    order = [*range(49, -1, -1), *range(50, 100)]
    with pytest.raises(ValueError, match="own: expected the order of schaefer100"):
        L.data_fields(dataclasses.replace(known, name="own", coords=known.coords[order]).register(), 0.735)
