"""The decoder-only BrainLM: the published numbers, an independent reference, no look-ahead, masks, files, bad input."""

import copy
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fmri_book import brainlm as B
from fmri_book.brainlm import (
    BrainLMConfig,
    BrainLMForFinetuning,
    BrainLMForPretraining,
    BrainLMModel,
    block_causal,
    draw_mask,
)
from fmri_book.data import Space
from fmri_book.splits import Scaler
from fmri_book.storage import Layout
from fmri_book.training import decays, layers_of, parameter_groups

pytestmark = pytest.mark.timeout(120)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
PUBLISHED = Path(__file__).with_name("brainlm_published.json")  # a copy, for those who have a clone only
LEGACY = {"legacy_mask": True, "open_cls": True}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZE |= {
    "timepoint_patching_size": 4,
    "num_timepoints_per_voxel": 12,
    "num_brain_voxels": 6,
    "xyz_scale": 0.02,
}
STILL = {"attention_probs_dropout_prob": 0.0, "embedding_dropout_prob": 0.0}
quick = settings(max_examples=25, deadline=None, derandomize=True)


def make(cls=BrainLMForPretraining, seed=0, dtype=torch.float32, **fields):
    "A tiny model whose every weight is random: biases, norms and tokens too."
    torch.manual_seed(seed)
    model = cls(BrainLMConfig(**(SIZE | STILL | fields))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype)


def data(batch=2, parcels=6, blocks=3, patch=4, seed=0):
    "Signals as a robust scaler leaves them, and millimetres."
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(batch, parcels, blocks * patch, generator=g)
    return signal, 40 * torch.randn(parcels, 3, generator=g)


def some(batch=2, parcels=6, blocks=3, seed=0):
    return torch.rand(batch, parcels, blocks, generator=torch.Generator().manual_seed(seed)) < 0.5


def near(found, expected, tolerance=1e-5):
    found, expected = (x.detach().double() if torch.is_tensor(x) else x for x in (found, expected))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


def same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# ---- the published numbers


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("brainlm_*.safetensors")), ids=lambda p: p.stem)
@pytest.mark.parametrize("attention", ["blocks", "dense", "flex"])
@torch.no_grad()
def test_golden_files(path, attention):
    from safetensors import safe_open

    golden = load_file(path)
    with safe_open(path, "pt") as file:
        config = BrainLMConfig(**json.loads(file.metadata()["config"]), **LEGACY, attention=attention)
    part = lambda start: {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}
    model = BrainLMForPretraining(config).eval()
    model.load_state_dict(part("state_dict."))
    signal, xyz, mask = (part("input.")[k] for k in ("signal_vectors", "xyz_vectors", "mask"))
    out, expected = model(signal, xyz, mask), part("output.")
    near(out.logits, expected["logits"])
    near(out.last_hidden_state, expected["hidden_states"])
    near(out.loss.reshape(1), expected["loss"])
    assert torch.equal(out.mask, mask.bool())
    assert out.n_points == mask.sum() * config.timepoint_patching_size
    tuned = BrainLMForFinetuning(config).eval()
    body = {k: v for k, v in part("state_dict.").items() if k.startswith("model.")}
    tuned.load_state_dict(body | part("finetune_head."))
    near(tuned(signal, xyz, mask).logits.flatten(), expected["finetune_logits"])


def test_golden_files_are_there():
    if not GOLDEN.exists():
        pytest.skip(f"no {GOLDEN}: the golden values are not part of a clone; brainlm_published.json is")
    assert len(list(GOLDEN.glob("brainlm_*.safetensors"))) == 2
    assert json.loads(PUBLISHED.read_text().replace("NaN", "0")) == json.loads(
        (GOLDEN / "brainlm_decoder_only.json").read_text().replace("NaN", "0")
    )


def fill(model):
    "Weights by a formula: every tensor in the order of its name."
    state = model.state_dict()
    for k, name in enumerate(sorted(n for n in state if not n.endswith(".pe"))):
        i = torch.arange(state[name].numel(), dtype=torch.float64)
        values = 0.05 * torch.sin(0.37 * i + 1.3 * k)
        values += state[name].ndim == 1 and name.endswith(".weight")
        state[name].copy_(values.view(state[name].shape))
    return model


def formula_inputs():
    b, v, t = (x.double() for x in torch.meshgrid(*map(torch.arange, (2, 6, 40)), indexing="ij"))
    signal = torch.sin(0.05 * t + 0.7 * v + b) + 0.3 * torch.cos(0.11 * t * (v + 1))
    v = torch.arange(6.0, dtype=torch.float64)
    xyz = torch.stack([v - 5, 2 * v - 7, 3 * torch.sin(v)], -1)
    b, v, n = torch.meshgrid(*map(torch.arange, (2, 6, 4)), indexing="ij")
    masks = {"none": None, "forward": n == 3, "pattern": (v + 2 * n + b) % 3 == 0}
    return signal, xyz, masks


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"num_brain_voxels": 6, "num_timepoints_per_voxel": 40, "timepoint_patching_size": 10}


@pytest.mark.parametrize("loss", ["mse", "mae"])
@pytest.mark.parametrize("name", ["none", "forward", "pattern"])
@torch.no_grad()
def test_published_numbers_in_double_precision(name, loss):
    golden = json.loads(PUBLISHED.read_text())[name]
    config = BrainLMConfig(**SMALL, **LEGACY, loss_fn=loss)
    model = fill(BrainLMForPretraining(config).double().eval())
    signal, xyz, masks = formula_inputs()
    out = model(signal, xyz, masks[name])
    if name == "none":
        assert out.loss is None  # the published code gives NaN
        assert out.mask is None
    else:
        near(out.loss, golden[loss], 1e-6)
    for found, expected in ((out.logits, golden["logits"]), (out.last_hidden_state, golden["hidden"])):
        assert list(found.shape) == expected["shape"]
        near(found.sum(), expected["sum"], 1e-6)
        near(found.abs().mean(), expected["absmean"], 1e-6)
        near(found.flatten()[:5], expected["first"], 1e-6)
        near(found.flatten()[-3:], expected["last"], 1e-6)
    near(out.last_hidden_state[0, 0, :5], golden["cls"], 1e-6)
    tuned = fill(BrainLMForFinetuning(config).double().eval())
    near(tuned(signal, xyz, masks[name]).logits.flatten(), golden["finetune_logits"], 1e-6)


def test_published_weights_by_name_shape_and_number():
    "Section 1.7 of the facts on the published code."
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.device("meta"):
        model = BrainLMForPretraining(BrainLMConfig())
        assert count(model) == 6_360_980
        assert count(BrainLMForFinetuning(BrainLMConfig())) == 6_375_041
        assert count(BrainLMForPretraining(BrainLMConfig(num_hidden_layers=4))) == 3_201_940
        wide = BrainLMConfig(hidden_size=512, intermediate_size=2048)
        assert count(BrainLMForPretraining(wide)) == 25_370_388
        tuned = BrainLMForFinetuning(BrainLMConfig())
    h, f, p = 256, 1024, 20
    expected = {f"embeddings.{k}": (1, 1, h) for k in ("mask_token", "cls_token")}
    expected |= {"embeddings.signal_projection.weight": (h, p), "embeddings.signal_projection.bias": (h,)}
    expected |= {"embeddings.xyz_projection.weight": (h, 3), "embeddings.xyz_projection.bias": (h,)}
    expected |= {"embeddings.temporal_encoding.pe": (5000, h)}
    expected |= {"layernorm.weight": (h,), "layernorm.bias": (h,)}
    for i in range(8):
        maps = {f"attention.{k}": (h, h) for k in ("query", "key", "value")}
        maps |= {"attn_output.dense": (h, h), "intermediate.dense": (f, h), "ffn_output.dense": (h, f)}
        maps |= {"layernorm_before": (h,), "layernorm_after": (h,)}
        for name, shape in maps.items():
            expected |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": shape[:1]}
    body = {f"model.{k}": v for k, v in expected.items()}
    head = {"pred_head.0.weight": (h // 2, h), "pred_head.0.bias": (h // 2,)}
    head |= {"pred_head.2.weight": (p, h // 2), "pred_head.2.bias": (p,)}
    shapes = lambda m: {k: tuple(v.shape) for k, v in m.state_dict().items()}
    assert shapes(model) == body | head
    assert len(shapes(model)) == 141
    lins = {"lin1": (h // 2, h), "lin2": (h // 2, h // 2), "lin3": (1, h // 2)}
    for name, shape in lins.items():
        body |= {f"mlp_pred_head.{name}.weight": shape, f"mlp_pred_head.{name}.bias": shape[:1]}
    assert shapes(tuned) == body


def test_first_weights_as_published():
    torch.manual_seed(0)
    model = BrainLMForPretraining(BrainLMConfig(num_hidden_layers=1))
    for name, p in model.named_parameters():
        if "layernorm" in name:
            assert (p == float(name.endswith("weight"))).all(), name
        elif name.endswith("bias"):
            assert not p.any(), name
        elif "token" in name:
            assert 0.015 < p.std() < 0.025, name
        else:  # Xavier, uniform
            limit = math.sqrt(6 / sum(p.shape))
            assert 0.97 * limit < p.abs().max() <= limit, name


def test_published_defaults():
    c = BrainLMConfig()
    published = {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
    }
    published |= {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.1}
    published |= {"initializer_range": 0.02, "layer_norm_eps": 1e-12, "qkv_bias": True, "loss_fn": "mse"}
    published |= {"num_brain_voxels": 424, "num_timepoints_per_voxel": 200, "mask_ratio": 0.75}
    published |= {"timepoint_patching_size": 20, "forward_mask_prob": 0.5}
    assert {k: getattr(c, k) for k in published} == published
    assert c.model_type == "brainlm"
    assert not c.legacy_mask
    assert not c.open_cls
    assert c.check_input


# ---- an independent forward pass: dense masks, explicit softmax, one thing after the other


def positions(n, width):
    table = torch.zeros(n, width, dtype=torch.float64)
    for i in range(n):
        for k in range(width // 2):
            angle = i / 10000 ** (2 * k / width)
            table[i, 2 * k], table[i, 2 * k + 1] = math.sin(angle), math.cos(angle)
    return table


def norm(x, w, name, eps):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def affine(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def reference(model, signal, xyz, hidden=None):
    "Hidden states and predictions in double precision, written from the description (section 1.3)."
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    batch, parcels, frames = signal.shape
    patch, width, heads = c.timepoint_patching_size, c.hidden_size, c.num_attention_heads
    blocks = frames // patch
    tokens, when = [w["model.embeddings.cls_token"][0].expand(batch, -1)], positions(blocks, width)
    signal, xyz = signal.double(), xyz.double() * c.xyz_scale
    for n in range(blocks):
        for v in range(parcels):
            what = affine(signal[:, v, n * patch : (n + 1) * patch], w, "model.embeddings.signal_projection")
            where = affine(xyz[v] if xyz.ndim == 2 else xyz[:, v], w, "model.embeddings.xyz_projection")
            hide = torch.zeros(batch, 1) if hidden is None else hidden[:, v, n, None].double()
            token = w["model.embeddings.mask_token"][0]
            if c.legacy_mask:
                tokens.append((1 - hide) * (what + where + when[n]) + hide * token)
            else:
                tokens.append((1 - hide) * what + hide * token + where + when[n])
    x = torch.stack(tokens, 1)
    block_of = [blocks] + [n for n in range(blocks) for _ in range(parcels)]
    closed = torch.zeros(len(block_of), len(block_of))
    for row, mine in enumerate(block_of):
        for column, theirs in enumerate(block_of):
            reads = row == 0 or (theirs <= mine if column else c.open_cls)
            closed[row, column] = 0.0 if reads else -math.inf
    act = {"gelu": lambda u: u * (1 + torch.erf(u / math.sqrt(2))) / 2, "relu": lambda u: u.clamp(min=0)}
    act |= {"gelu_new": act["gelu"], "swish": lambda u: u * torch.sigmoid(u)}
    size = width // heads
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}"
        u = norm(x, w, f"{at}.layernorm_before", c.layer_norm_eps)
        q, k, v = (affine(u, w, f"{at}.attention.{name}") for name in ("query", "key", "value"))
        context = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size) + closed
            context.append(torch.softmax(scores, -1) @ v[..., part])
        x = x + affine(torch.cat(context, -1), w, f"{at}.attn_output.dense")
        u = norm(x, w, f"{at}.layernorm_after", c.layer_norm_eps)
        u = act[c.hidden_act](affine(u, w, f"{at}.intermediate.dense"))
        x = x + affine(u, w, f"{at}.ffn_output.dense")
    x = norm(x, w, "model.layernorm", c.layer_norm_eps)
    u = affine(x[:, 1:], w, "pred_head.0")
    logits = affine(torch.where(u > 0, u, 0.1 * u), w, "pred_head.2")
    return x, logits.view(batch, blocks, parcels, patch).transpose(1, 2)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("open_cls", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"hidden_act": "relu"}, {"hidden_act": "swish", "qkv_bias": False}, {"hidden_act": "gelu_new"}],
    ids=lambda f: f.get("hidden_act", "gelu"),
)
@torch.no_grad()
def test_forward_pass_against_the_reference(legacy, open_cls, fields):
    model = make(dtype=torch.float64, legacy_mask=legacy, open_cls=open_cls, layer_norm_eps=1e-3, **fields)
    signal, xyz = data()
    for hidden in (None, some()):
        out, (states, logits) = model(signal, xyz, hidden), reference(model, signal, xyz, hidden)
        near(out.last_hidden_state, states, 1e-6)  # the table of positions is in float32
        near(out.logits, logits, 1e-6)
        if hidden is None:
            assert out.loss is None
            continue
        target = signal.double().unflatten(-1, (-1, 4))
        errors = (logits - target)[hidden]
        near(out.loss, errors.square().mean(), 1e-6)
        assert out.n_points == errors.numel()
        model.config.loss_fn = "mae"
        near(model(signal, xyz, hidden).loss, errors.abs().mean(), 1e-6)
        other = data(seed=5)[0]
        errors = (logits - other.double().unflatten(-1, (-1, 4)))[hidden]
        near(model(signal, xyz, hidden, labels=other).loss, errors.abs().mean(), 1e-6)
        model.config.loss_fn = "mse"


@pytest.mark.parametrize("xyz", ["(V, 3)", "(1, V, 3)", "(B, V, 3)", "numpy", "a list", "the config"])
@torch.no_grad()
def test_coordinates_in_every_form(xyz):
    signal, where = data()
    model = make(coordinates=where.double().tolist())
    expected = make()(signal, where).logits
    forms = {"(V, 3)": where, "(1, V, 3)": where[None], "(B, V, 3)": where.expand(2, -1, -1)}
    forms |= {"numpy": where.double().numpy(), "a list": where.tolist(), "the config": None}
    near(model(signal, forms[xyz]).logits, expected, 1e-6)
    if xyz == "(B, V, 3)":  # each sample has its own
        own = torch.stack([where, where.flip(0)])
        near(model(signal, own).logits[1], make()(signal[1:], where.flip(0)).logits[0], 1e-5)


@torch.no_grad()
def test_coordinates_are_multiplied_by_their_factor():
    signal, xyz = data()
    near(make(xyz_scale=1.0)(signal, 0.5 * xyz).logits, make(xyz_scale=0.5)(signal, xyz).logits)


def test_sinusoid_by_its_formula():
    near(B.sinusoid(7, 6), positions(7, 6), 1e-6)
    assert make().model.embeddings.temporal_encoding.pe.shape == (5000, 16)


@torch.no_grad()
def test_other_numbers_of_parcels_and_frames_than_in_the_config():
    model = make()
    for batch, parcels, blocks in ((1, 1, 1), (3, 1, 2), (1, 9, 1), (2, 11, 7)):
        signal, xyz = data(batch, parcels, blocks)
        hidden = torch.ones(batch, parcels, blocks, dtype=torch.bool)
        out = model(signal, xyz, hidden)
        states, logits = reference(model, signal, xyz, hidden)
        near(out.last_hidden_state, states)
        near(out.logits, logits)
        assert out.n_points == signal.numel()


@torch.no_grad()
def test_whole_numbers_and_arrays_as_signals():
    model, (signal, xyz) = make(), data()
    whole = (3 * signal).round()
    expected = model(whole, xyz, some())
    for given_ in (whole.long(), whole.double(), whole.numpy(), whole.to(torch.int16)):
        out = model(given_, xyz, some())
        near(out.logits, expected.logits, 1e-6)
        near(out.loss, expected.loss, 1e-6)


# ---- three ways to the same attention


@pytest.mark.parametrize("open_cls", [False, True])
def test_who_reads_whom(open_cls):
    rows = [  # CLS, then two blocks of two parcels
        [1, 1, 1, 1, 1],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1],
    ]
    expected = torch.tensor(rows, dtype=torch.bool)
    expected[:, 0] |= open_cls
    assert torch.equal(block_causal(2, 2, open_cls), expected)


@quick
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_attention_block_by_block_is_attention_under_the_mask(batch, parcels, blocks, open_cls, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, 2, 1 + parcels * blocks, 8, requires_grad=True) for _ in range(3))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(
        ~block_causal(blocks, parcels, open_cls), -math.inf
    )
    expected, weight = scores.softmax(-1) @ v, torch.randn(8)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for attend in (B.block_attention, B.dense_attention):
        found = attend(q, k, v, parcels, open_cls)
        near(found, expected)
        for g, e in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), wanted, strict=True):
            near(g, e)


@pytest.mark.parametrize("open_cls", [False, True])
@pytest.mark.parametrize("parcels, blocks", [(1, 1), (1, 4), (5, 3), (40, 4)])
@torch.no_grad()
def test_flex_attention_is_attention_under_the_mask(parcels, blocks, open_cls):
    q, k, v = torch.randn(3, 2, 2, 1 + parcels * blocks, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second time with the rule that was kept
        near(B.flex_attention(q, k, v, parcels, open_cls), B.dense_attention(q, k, v, parcels, open_cls))


@pytest.mark.parametrize("fields", [{}, LEGACY], ids=["default", "legacy"])
def test_gradients_of_every_weight_agree(fields):
    found = {}
    for attention in ("blocks", "dense", "auto"):
        model = make(attention=attention, dtype=torch.float64, **fields).train()
        signal, xyz = data()
        model(signal.double(), xyz, some()).loss.backward()
        found[attention] = {k: p.grad for k, p in model.named_parameters()}
    for name, gradient in found["dense"].items():
        near(found["blocks"][name], gradient, 1e-10)
        near(found["auto"][name], gradient, 1e-10)
        read = name != "model.embeddings.cls_token" or fields  # by default nobody who is scored reads it
        assert gradient.any() == bool(read), name


@pytest.fixture(params=[True, False], ids=["our own", "torch's"])
def kernel(request, monkeypatch):
    "Long sequences go another way on a CPU, with dropout or in half precision: here short ones too, or none."
    monkeypatch.setattr(B, "_MANY", 0 if request.param else 10**9)


@pytest.mark.parametrize("open_cls", [False, True])
def test_dropout_of_shares_by_its_definition(open_cls, kernel):
    "With ones as values the output is what each row heard of each key."
    torch.manual_seed(0)
    batch, heads, parcels, blocks, p = 64, 2, 4, 3, 0.3
    length = 1 + parcels * blocks
    q, k = torch.randn(2, batch, heads, length, length)
    v = torch.eye(length).expand(batch, heads, -1, -1)
    allowed = block_causal(blocks, parcels, open_cls)
    shares = B.dense_attention(q, k, v, parcels, open_cls)
    heard = B.block_attention(q, k, v, parcels, open_cls, p)
    kept = heard > 0
    near(heard[kept], shares[kept] / (1 - p), 1e-3)  # the rate has 16 bits
    assert not heard[..., ~allowed].any()
    share = kept[..., allowed].double().mean((0, 1))  # of each pair of tokens
    assert (share - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / (batch * heads))
    one, two = kept[..., allowed].flatten(0, 1)[:2]  # heads and samples draw for themselves
    assert not torch.equal(one, two)
    assert not torch.equal(B.block_attention(q, k, v, parcels, open_cls, p) > 0, kept)
    for _ in range(2):
        torch.manual_seed(4)
        again, seed = B.block_attention(q, k, v, parcels, open_cls, p), torch.get_rng_state()
        torch.manual_seed(4)
        assert torch.equal(B.block_attention(q, k, v, parcels, open_cls, p), again)
        assert torch.equal(torch.get_rng_state(), seed)


@pytest.mark.parametrize("open_cls", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_of_block_attention_by_differences(open_cls, dropout, kernel):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attend(q, k, v):
        torch.manual_seed(5)
        return B.block_attention(q, k, v, 3, open_cls, dropout)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("parcels, blocks", [(3, 4), (300, 2), (513, 1)])
def test_block_attention_in_half_precision(parcels, blocks, kernel):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 1 + parcels * blocks, 8).bfloat16() for _ in range(3)]
    weight, found = torch.randn(8), []
    for attend, dtype in ((B.block_attention, torch.bfloat16), (B.dense_attention, torch.float32)):
        now = [x.to(dtype).requires_grad_() for x in inputs]
        out = attend(*now, parcels)
        assert out.dtype == dtype
        found.append([out, *torch.autograd.grad((out * weight.to(dtype)).sum(), now)])
    for half, exact in zip(*found, strict=True):
        assert half.dtype == torch.bfloat16
        assert (half - exact).norm() < 0.02 * exact.norm()


def test_flex_refuses_dropout():
    model = make(attention="flex", attention_probs_dropout_prob=0.1).train()
    with pytest.raises(
        ValueError, match="no dropout; set attention_probs_dropout_prob=0, or attention='blocks'"
    ):
        model(*data())
    with torch.no_grad():
        near(model.eval()(*data()).logits, make()(*data()).logits)


def test_dropout_of_attention_in_training_only():
    model = make(attention_probs_dropout_prob=0.5)
    signal, xyz = data()
    assert torch.equal(model(signal, xyz, some()).logits, model(signal, xyz, some()).logits)
    model.train()
    assert not torch.equal(model(signal, xyz, some()).logits, model(signal, xyz, some()).logits)
    for name in ("hidden_dropout_prob", "embedding_dropout_prob"):
        one = make(**{name: 0.5})
        assert torch.equal(one(signal, xyz, some()).logits, one(signal, xyz, some()).logits)
        one.train()
        assert not torch.equal(one(signal, xyz, some()).logits, one(signal, xyz, some()).logits)


def test_where_dropout_is():
    "With everything dropped nothing is left but what goes around it."
    signal, xyz = data()
    model = make(BrainLMForFinetuning, hidden_dropout_prob=1.0).train()
    body = model.model
    tokens = body.embeddings(signal, xyz)
    x = torch.cat([body.embeddings.cls_token.expand(2, -1, -1), tokens], 1)
    out = model(signal, xyz)
    near(out.last_hidden_state, body.layernorm(x), 1e-6)  # both halves of every layer add 0
    inside = model.mlp_pred_head.lin3(torch.zeros(2, 8))
    near(out.logits, inside, 1e-6)
    model = make(embedding_dropout_prob=1.0).train()
    assert not model.model.embeddings(signal, xyz, some()).any()
    legacy = make(embedding_dropout_prob=1.0, legacy_mask=True).train().model.embeddings  # as published
    tokens = legacy(signal, xyz, some()).unflatten(1, (3, 6)).transpose(1, 2)
    assert not tokens[~some()].any()
    assert torch.equal(tokens[some()], legacy.mask_token[0].expand(int(some().sum()), -1))


# ---- nothing looks ahead


@st.composite
def ahead(draw):
    blocks = draw(st.integers(2, 5))
    return {
        "depth": draw(st.integers(1, 4)),
        "parcels": draw(st.integers(1, 9)),
        "blocks": blocks,
        "known": draw(st.integers(1, blocks - 1)),  # blocks before the change
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        "legacy": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "many": draw(st.sampled_from([0, 512])),  # tokens from which another kernel takes over
        "factor": draw(st.sampled_from([-1.0, 0.0, 3.0, 1e4])),
        "seed": draw(st.integers(0, 999)),
    }


def changed_later(case):
    "Two inputs with the same past; the future differs in its values and in what is hidden."
    signal, xyz = data(2, case["parcels"], case["blocks"], seed=case["seed"])
    start = case["known"]
    other = signal.clone()
    other[..., 4 * start :] *= case["factor"]
    other[..., 4 * start :] += 1
    masks = [None, None]
    if case["masked"]:
        masks = [some(2, case["parcels"], case["blocks"], case["seed"]) for _ in range(2)]
        masks[1][..., start:] = ~masks[1][..., start:]
    return signal, other, masks, xyz


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ahead(), st.sampled_from(["blocks", "dense"]))
@torch.no_grad()
def test_what_comes_later_changes_nothing_before(case, attention):
    "To the last bit: predictions and hidden states of every earlier token."
    model = make(
        num_hidden_layers=case["depth"],
        dtype=case["dtype"],
        legacy_mask=case["legacy"],
        attention=attention,
        seed=case["seed"],
        check_input=False,
    )
    signal, other, masks, xyz = changed_later(case)
    with mock.patch.object(B, "_MANY", case["many"]):
        one, two = model(signal, xyz, masks[0]), model(other, xyz, masks[1])
    early = slice(1, 1 + case["known"] * case["parcels"])
    assert torch.equal(one.last_hidden_state[:, early], two.last_hidden_state[:, early])
    assert torch.equal(one.logits[:, :, : case["known"]], two.logits[:, :, : case["known"]])
    # the class token reads everything, and so do the tokens that were changed
    assert not torch.equal(one.last_hidden_state[:, 0], two.last_hidden_state[:, 0])
    assert not torch.equal(one.logits, two.logits)


@torch.no_grad()
def test_a_cut_window_says_the_same_of_its_blocks():
    model, (signal, xyz) = make(num_hidden_layers=3), data(blocks=5)
    whole = model(signal, xyz, some(blocks=5)).logits
    for n in (1, 2, 4):
        near(model(signal[..., : 4 * n], xyz, some(blocks=5)[..., :n]).logits, whole[:, :, :n], 1e-5)


def test_no_gradient_from_earlier_predictions_to_later_signals():
    model = make(num_hidden_layers=3).train()
    signal, xyz = data(blocks=4)
    signal.requires_grad_()
    model(signal, xyz, torch.zeros(2, 6, 4)[..., :].index_fill(2, torch.tensor(3), 1)).logits[
        :, :, :2
    ].sum().backward()
    assert not signal.grad[..., 8:].any()
    assert (signal.grad[..., :8] != 0).all()


@torch.no_grad()
def test_the_leak_of_the_open_class_token():
    "One layer hides it, since the class token has not read yet; with every further layer it grows."
    spread = {}
    for depth in (1, 2, 3, 4):
        signal, xyz = data(parcels=12, blocks=4)
        other = signal.clone()
        other[..., 8:] = 5 + 3 * other[..., 8:]
        for open_cls in (True, False):
            model = make(BrainLMModel, num_hidden_layers=4, open_cls=open_cls)
            model.layers = model.layers[:depth]
            model.layernorm = torch.nn.Identity()
            early = slice(1, 1 + 2 * 12)
            one, two = (model(x, xyz).last_hidden_state[:, early] for x in (signal, other))
            spread[depth, open_cls] = (one - two).square().mean().item()
    assert spread[1, True] == 0
    assert 1e-6 < spread[2, True] < spread[3, True] < spread[4, True]
    assert not any(spread[depth, False] for depth in (1, 2, 3, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_future_values_that_are_no_numbers_are_refused(bad):
    signal, xyz = data()
    signal[0, 2, -1] = bad
    with pytest.raises(
        ValueError, match=r"finite signals, found NaN or infinity in 1 parcels \(2\); mend them, or mark"
    ):
        make()(signal, xyz)


# ---- what is hidden keeps its place


@torch.no_grad()
def test_hidden_parcels_of_a_block_are_told_apart():
    signal, xyz = data(parcels=8)
    last = draw_mask(2, 8, 3, kind="forward")
    spread = lambda x: (x[:, :, -1] - x[:, :1, -1]).abs().amax((0, 2))[1:]
    assert (spread(make()(signal, xyz, last).logits) > 1e-3).all()
    assert not spread(make(**LEGACY)(signal, xyz, last).logits).any()  # one curve for all parcels
    # and blocks are told apart too
    everything = torch.ones_like(last)
    assert not torch.equal(*make(open_cls=True)(signal, xyz, everything).logits[0, 0, :2])


@torch.no_grad()
def test_hidden_values_are_not_read():
    for fields in ({}, LEGACY):
        model, hidden = make(**fields), some()
        signal, xyz = data()
        other = signal + 3 * hidden.repeat_interleave(4, -1) * torch.randn_like(signal)
        one, two = model(signal, xyz, hidden), model(other, xyz, hidden)
        assert torch.equal(one.last_hidden_state, two.last_hidden_state)
        assert one.loss != two.loss


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_masks_of_any_type(dtype):
    model, (signal, xyz) = make(), data()
    out = model(signal, xyz, some().to(dtype))
    assert out.mask.dtype == torch.bool
    assert torch.equal(out.logits, model(signal, xyz, some()).logits)
    assert torch.equal(out.loss, model(signal, xyz, some()).loss)


def test_a_mask_is_drawn_in_training_only():
    model, (signal, xyz) = make(), data()
    out = model(signal, xyz)
    assert out.mask is None
    assert out.loss is None
    assert torch.equal(out.logits, model(signal, xyz, torch.zeros(2, 6, 3)).logits)
    assert model(signal, xyz, torch.zeros(2, 6, 3)).loss is None
    model.train()
    drawn = [model(signal, xyz, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0].mask, drawn[1].mask)
    assert torch.equal(drawn[0].loss, drawn[1].loss)
    assert not torch.equal(drawn[0].mask, drawn[2].mask)
    with pytest.raises(ValueError, match="a mask that hides something that has data, found none"):
        model(signal, xyz, torch.zeros(2, 6, 3))


def test_the_mask_drawn_is_that_of_the_config():
    signal, xyz = data(64, 6, 4)
    own = lambda: [torch.Generator().manual_seed(100 + i) for i in range(64)]
    for fields in ({"mask_ratio": 0.3, "forward_mask_prob": 0.25}, {"legacy_mask": True}):
        model = make(**fields).train()
        c = model.config
        options = {"kind": "mixed", "ratio": c.mask_ratio, "forward_prob": c.forward_mask_prob}
        found = model(signal, xyz, generator=own()).mask
        assert torch.equal(found, draw_mask(64, 6, 4, generator=own(), legacy=c.legacy_mask, **options))


# ---- masks


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(0.02, 1), st.integers(1, 12), st.integers(0, 9))
def test_the_share_of_hidden_blocks_is_exact_on_average(ratio, blocks, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = draw_mask(40, 200, blocks, ratio=ratio, generator=g)
    counts = hidden.sum(-1).double()
    exact = blocks * ratio
    fraction = exact - math.floor(exact)
    assert set(counts.unique().tolist()) <= {math.floor(exact), math.ceil(exact)}
    deviation = math.sqrt(fraction * (1 - fraction) / counts.numel())
    assert abs(counts.mean() - exact) <= 5 * deviation + 1e-6
    share = hidden.double().mean((0, 1))  # no block is preferred
    assert (share - ratio).abs().max() < 5 * math.sqrt(0.25 / counts.numel()) + 1e-9


def test_legacy_counts():
    for blocks, ratio, count in ((10, 0.75, 7), (10, 0.2, 2), (4, 0.01, 1), (1, 0.5, 1), (3, 1.0, 3)):
        hidden = draw_mask(3, 50, blocks, ratio=ratio, legacy=True)
        assert (hidden.sum(-1) == count).all(), (blocks, ratio)
    ours = draw_mask(200, 50, 10, ratio=0.75).sum(-1)
    assert set(ours.flatten().tolist()) == {7, 8}
    kinds = draw_mask(32, 8, 4, kind="mixed", ratio=0.5, legacy=True).sum(-1)
    assert len({tuple(k.flatten().unique().tolist()) for k in kinds}) == 1  # one kind for the whole batch


def test_forward_masks_hide_the_last_block_of_everybody():
    hidden = draw_mask(2, 5, 4, kind="forward")
    assert hidden[..., -1].all()
    assert not hidden[..., :-1].any()
    assert hidden.dtype == torch.bool
    assert draw_mask(2, 5, 1, kind="forward").all()


def test_mixed_masks_draw_a_kind_for_each_sample():
    g = torch.Generator().manual_seed(0)
    hidden = draw_mask(2000, 6, 4, kind="mixed", ratio=0.5, forward_prob=0.3, generator=g)
    last = draw_mask(1, 6, 4, kind="forward")
    share = (hidden == last).flatten(1).all(1).double().mean()
    assert abs(share - 0.3) < 0.05
    for p, expected in ((0.0, 0), (1.0, 2000)):
        drawn = draw_mask(2000, 6, 4, kind="mixed", ratio=0.5, forward_prob=p)
        assert (drawn == last).flatten(1).all(1).sum() == expected


@quick
@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    st.sampled_from(["random", "mixed"]),
    st.booleans(),
)
def test_a_sample_has_its_mask_in_any_company(seeds, kind, legacy):
    g = lambda seed: torch.Generator().manual_seed(seed)
    options = {"kind": kind, "ratio": 0.4, "legacy": legacy}
    together = draw_mask(len(seeds), 5, 6, generator=[g(s) for s in seeds], **options)
    for seed, mask in zip(seeds, together, strict=True):
        assert torch.equal(mask, draw_mask(1, 5, 6, generator=g(seed), **options)[0])


def test_masks_come_from_their_generator_alone():
    g = lambda: torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    one = draw_mask(3, 5, 6, kind="mixed", generator=g())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(one, draw_mask(3, 5, 6, kind="mixed", generator=g()))


@pytest.mark.parametrize("ratio", [1e-9, 1e-4, 0.01])
def test_tiny_shares_hide_one_token_somewhere(ratio):
    hidden = draw_mask(500, 4, 5, ratio=ratio, generator=torch.Generator().manual_seed(0))
    counts = hidden.flatten(1).sum(1)
    assert (counts >= 1).all()
    assert counts.double().mean() < 1.2
    assert (hidden.sum(0) > 5).all()  # of 500, at each of the 20 places: no place is preferred


def test_one_block():
    hidden = draw_mask(400, 30, 1, ratio=0.25, generator=torch.Generator().manual_seed(0))
    assert abs(hidden.double().mean() - 0.25) < 0.02  # the published code hides all of it
    assert draw_mask(4, 30, 1, ratio=0.25, legacy=True).all()


def test_masks_that_cannot_be_meant():
    for options, message in (
        ({"kind": "tube"}, "kind from random, forward, mixed, found 'tube'"),
        ({"ratio": 0.0}, "ratio above 0, up to 1, found 0.0"),
        ({"ratio": 1.1}, "found 1.1"),
        ({"ratio": math.nan}, "found nan"),
        ({"generator": [torch.Generator()]}, "a generator for each of 2 samples, found 1"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_mask(2, 3, 4, **options)


# ---- parcels without data


def test_values_of_missing_parcels_never_matter():
    for fields in ({}, {"legacy_mask": True}):
        missing = torch.zeros(2, 6, dtype=torch.bool)
        missing[0, 1] = missing[1, 4] = True
        outs, gradients = [], []
        for value in (0.0, math.nan, math.inf, 1e9):
            signal, xyz = data()
            signal[missing] = value
            model = make(**fields).train()
            out = model(signal, xyz, some(), missing=missing)
            out.loss.backward()
            outs.append(out)
            gradients.append({k: p.grad for k, p in model.named_parameters()})
        for out, gradient in zip(outs, gradients, strict=True):
            assert torch.equal(out.loss, outs[0].loss)
            assert torch.equal(out.logits, outs[0].logits)
            assert out.logits.isfinite().all()
            same_weights(gradient, gradients[0])
            assert all(g.isfinite().all() for g in gradient.values())


@torch.no_grad()
def test_missing_parcels_are_hidden_and_not_counted():
    model, (signal, xyz) = make(), data()
    missing = torch.zeros(2, 6, dtype=torch.bool)
    missing[:, 2] = True
    out = model(signal, xyz, some(), missing=missing)
    hidden = some() | missing[..., None]
    states, logits = reference(model, signal, xyz, hidden)
    near(out.last_hidden_state, states)
    counted = some() & ~missing[..., None]
    near(out.loss, (logits - signal.unflatten(-1, (-1, 4)))[counted].square().mean())
    assert out.n_points == counted.sum() * 4
    assert torch.equal(out.mask, some())
    for form in (missing.int(), missing.float()):
        assert torch.equal(model(signal, xyz, some(), missing=form).loss, out.loss)
    near(
        model(signal, xyz, missing=missing).last_hidden_state,
        reference(model, signal, xyz, missing[..., None].expand(-1, -1, 3))[0],
    )
    nobody = model(signal, xyz, some(), missing=torch.ones_like(missing))
    assert nobody.loss is None
    with pytest.raises(ValueError, match="found none: there is nothing to learn from"):
        model.train()(signal, xyz, some(), missing=torch.ones_like(missing))


# ---- embeddings and predictions


@pytest.mark.parametrize("cls", [BrainLMModel, BrainLMForPretraining, BrainLMForFinetuning])
def test_embeddings_are_the_same_every_time(cls):
    dropout = {"attention_probs_dropout_prob": 0.3, "embedding_dropout_prob": 0.3, "hidden_dropout_prob": 0.3}
    model, (signal, xyz) = make(cls, **dropout), data(4)
    model.train()
    batch = {"signal_vectors": signal, "xyz_vectors": xyz}
    before = torch.get_rng_state()
    one, two = model.embed(batch), model.embed(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(part.training for part in model.modules())
    assert one.reg is None
    for a, b in ((one.cls, two.cls), (one.patch, two.patch)):
        assert torch.equal(a, b)
        assert not a.requires_grad
    body = model if cls is BrainLMModel else model.model
    body.eval()
    hidden = body(signal, xyz).last_hidden_state
    near(one.cls, hidden[:, :1])
    near(one.patch, hidden[:, 1:])
    for i in range(4):  # and in any company
        alone = body.embed({"signal_vectors": signal[i : i + 1], "coords": xyz})
        near(alone.patch[0], one.patch[i])
        near(alone.cls[0], one.cls[i])


def test_modes_of_all_parts_are_restored():
    model = make(BrainLMForFinetuning).freeze_backbone().train()
    assert model.training
    assert not model.model.training
    model.embed({"signal_vectors": data()[0], "xyz_vectors": data()[1]})
    assert model.training
    assert not model.model.training
    pretrained = make().train()
    pretrained.model.layers[0].eval()
    with pytest.raises(ValueError, match="a multiple of 4 frames"):
        pretrained.embed({"signal_vectors": data()[0][..., :7], "xyz_vectors": data()[1]})
    assert pretrained.training
    assert not pretrained.model.layers[0].training
    assert pretrained.model.layers[1].training


def test_predictions_under_a_mask():
    model, (signal, xyz) = make(embedding_dropout_prob=0.5).train(), data()
    batch = {"signal_vectors": signal, "xyz_vectors": xyz}
    one, two = model.predict(batch, some()), model.predict(batch, some())
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.loss, two.loss)
    assert model.predict(batch).loss is None
    assert not one.logits.requires_grad
    assert model.training


@pytest.fixture(scope="module")
def schaefer():
    "A scaler of three parcels' worth of facts for all of Schaefer-100, and a config with it."
    layout = Layout.of("schaefer100")
    centre = np.linspace(900, 1100, 100).astype(np.float32)
    scale = np.linspace(5, 15, 100).astype(np.float32)
    scaler = Scaler("robust", "site", "frames", layout.digest, 100, centre, scale, 3, "abc", 600)
    return scaler, BrainLMConfig.for_data(
        "schaefer100", 0.72, scaler, **(SIZE | STILL | {"num_brain_voxels": 100})
    )


def test_recordings_are_scaled_by_the_scaler_of_the_config(schaefer):
    scaler, config = schaefer
    torch.manual_seed(0)
    model = BrainLMModel(config).eval()
    raw = 1000 + 10 * torch.randn(2, 12, 100)
    expected = (raw - torch.tensor(scaler.centre)) / torch.tensor(scaler.scale)
    found = model.scaled({"signal": raw, "tr": torch.tensor([0.72, 0.72])})
    near(found["signal_vectors"], expected.transpose(1, 2), 1e-5)
    near(found["xyz_vectors"], Space.named("schaefer100").coords, 1e-3)
    near(model.scaled({"signal": raw.numpy()})["signal_vectors"], expected.transpose(1, 2), 1e-5)
    one, two = model.embed({"signal": raw}), model.embed({"signal_vectors": expected.transpose(1, 2)})
    assert one.cls.shape == (2, 1, 16)
    assert one.patch.shape == (2, 300, 16)
    near(one.patch, two.patch)
    # block n of parcel v is token n * V + v
    moved = raw.clone()
    moved[:, 8:, 7] += 30
    changed = (model.embed({"signal": moved}).patch - one.patch).abs().amax((0, 2)) > 1e-7
    assert not changed[:200].any()
    assert changed[207]
    assert "missing" in model.scaled({"signal": raw, "missing": torch.zeros(2, 100)})
    with pytest.raises(ValueError, match="scaled parcel by parcel"):
        model(raw.transpose(1, 2))
    with pytest.raises(ValueError, match=r"expected the 100 parcels of schaefer100, found 99"):
        model.embed({"signal": raw[..., :99]})
    with pytest.raises(
        ValueError,
        match=r"expected the 100 parcels of schaefer100, found 99; bring the run there with run.to",
    ):
        model(expected.transpose(1, 2)[:, :99])


def test_what_a_recording_must_become(schaefer):
    scaler, config = schaefer
    spec = BrainLMForPretraining(config).input_spec
    assert (spec.space, spec.frames, spec.tr, spec.normalise) == ("schaefer100", 12, 0.72, "none")
    assert spec.mask_digest == Layout.of("schaefer100").digest
    assert not spec.zscore
    assert spec.clip is None
    assert make().input_spec is None
    assert Scaler.from_dict(config.scaler) == scaler


def test_scalers_and_spaces_that_do_not_fit(schaefer):
    scaler, _ = schaefer
    with pytest.raises(ValueError, match=r"a scaler of schaefer200 \(200 parcels\), found Scaler"):
        BrainLMConfig.for_data("schaefer200", 0.72, scaler)
    strange = Scaler("robust", "site", "frames", "0123", 100, scaler.centre, scaler.scale, 3, "abc", 600)
    with pytest.raises(ValueError, match="of another layout"):
        BrainLMConfig.for_data("schaefer100", 0.72, strange)
    loose = Scaler(
        "global", "site", "frames", scaler.layout, 100, np.zeros(1, np.float32), np.ones(1, np.float32)
    )
    with pytest.raises(
        ValueError, match=r"that was fitted on training subjects \(.*robust.*\), found Scaler\(global"
    ):
        BrainLMConfig.for_data("schaefer100", 0.72, loose)


def test_recordings_that_do_not_fit(schaefer):
    model = BrainLMModel(schaefer[1])
    raw = 1000 + 10 * torch.randn(2, 12, 100)
    for batch, message in (
        (
            {"signal": raw, "tr": torch.tensor([0.72, 2.0])},
            r"a TR of 0.72 s, as in training, found 0.72, 2 s; resample",
        ),
        ({"signal": raw, "tr": 1.0}, r"found 1 s; resample them \(run.resample\(0.72\)\)"),
        ({"signal": raw[0]}, r"'signal' \(batch, frames, parcels\), found shape \(12, 100\)"),
        ({"image": raw}, "a batch with 'signal' .* or 'signal_vectors', found image"),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed(batch)
    with pytest.raises(
        ValueError, match=r"found config.scaler None. Fit one on the training subjects .*for_data"
    ):
        make().embed({"signal": raw})


# ---- blocks that arrive one after the other


@st.composite
def arrivals(draw):
    blocks = draw(st.integers(1, 6))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, blocks - 1)), max_size=4)))
    return blocks, [c for c in cuts if c < blocks]


@quick
@given(arrivals(), st.integers(1, 4), st.booleans(), st.integers(1, 3), st.integers(0, 99))
@torch.no_grad()
def test_reading_on_is_reading_again(arrival, parcels, masked, depth, seed):
    (blocks, cuts), model = arrival, make(BrainLMModel, num_hidden_layers=depth, seed=seed)
    signal, xyz = data(2, parcels, blocks, seed=seed)
    hidden = some(2, parcels, blocks, seed) if masked else None
    whole, cache, parts = model(signal, xyz, hidden).last_hidden_state[:, 1:], None, []
    for start, end in zip([0, *cuts], [*cuts, blocks], strict=True):
        now = None if hidden is None else hidden[..., start:end]
        states, cache = model.extend(cache, signal[..., 4 * start : 4 * end], xyz, now)
        parts.append(states)
        assert cache.blocks == end
    near(torch.cat(parts, 1), whole, 2e-5)


@torch.no_grad()
def test_a_guess_leaves_the_cache_alone():
    model, (signal, xyz) = make(BrainLMModel), data(blocks=4)
    _, cache = model.extend(None, signal[..., :12], xyz)
    kept = copy.deepcopy(cache)
    hidden = torch.ones(2, 6, 1)
    guess, same = model.extend(cache, torch.zeros(2, 6, 4), xyz, hidden, keep=False)  # nothing to read there
    assert same is cache
    assert cache.blocks == 3
    for a, b in zip(cache.keys + cache.values, kept.keys + kept.values, strict=True):
        assert torch.equal(a, b)
    masked = torch.cat([torch.zeros(2, 6, 3), hidden], -1)
    near(guess, model(signal, xyz, masked).last_hidden_state[:, -6:])
    states, longer = model.extend(cache, signal[..., 12:], xyz)
    assert longer.blocks == 4
    near(states, model(signal, xyz).last_hidden_state[:, -6:])
    missing = torch.zeros(2, 6)
    missing[:, 3] = 1
    _, cache = model.extend(None, signal[..., :12], xyz, missing=missing)
    states, _ = model.extend(cache, signal[..., 12:], xyz, missing=missing)
    near(states, model(signal, xyz, missing=missing).last_hidden_state[:, -6:])


def test_reading_on_is_never_random():
    model, (signal, xyz) = (
        make(BrainLMModel, embedding_dropout_prob=0.5, hidden_dropout_prob=0.5).train(),
        data(),
    )
    one, two = model.extend(None, signal, xyz)[0], model.extend(None, signal, xyz)[0]
    assert torch.equal(one, two)
    assert model.training


def test_reading_on_where_it_cannot_be():
    model, (signal, xyz) = make(BrainLMModel), data(blocks=2)
    with pytest.raises(ValueError, match="open_cls=False to read on block by block, found True"):
        make(BrainLMModel, open_cls=True).extend(None, signal, xyz)
    _, cache = model.extend(None, signal, xyz)
    with pytest.raises(
        ValueError, match="the next blocks of 2 samples with 6 parcels, as in the cache, found 1 with 6"
    ):
        model.extend(cache, signal[:1], xyz)
    with pytest.raises(ValueError, match="found 2 with 5"):
        model.extend(cache, signal[:, :5], xyz[:5])
    half = torch.zeros(2, 6, 2)
    half[..., 0] = 1
    with pytest.raises(ValueError, match="finite signals"):  # half of it is seen
        model.extend(cache, signal * math.nan, xyz, half)
    guess, _ = model.extend(cache, signal * math.nan, xyz, torch.ones(2, 6, 2))  # nothing of it is
    assert guess.isfinite().all()
    cache.blocks, cache.keys = 4999, [k[:, :, :1].expand(-1, -1, 4999 * 6, -1) for k in cache.keys]
    with pytest.raises(ValueError, match="up to 5000 time blocks, found 5001; start again with the latest"):
        model.extend(cache, signal, xyz)


# ---- fine-tuning


@torch.no_grad()
def head_reference(model, hidden):
    "Two hidden layers with ReLU, then numbers; or a linear map."
    w = {k: v.double() for k, v in model.state_dict().items()}
    cls, rest = hidden[:, 0].double(), hidden[:, 1:].double().mean(1)
    x = {"cls": cls, "mean": rest, "both": torch.cat([cls, rest], -1)}[model.config.pooling]
    if model.config.head == "linear":
        return affine(x, w, "linear_head")
    for name in ("lin1", "lin2"):
        x = affine(x, w, f"mlp_pred_head.{name}").clamp(min=0)
    return affine(x, w, "mlp_pred_head.lin3")


@pytest.mark.parametrize("pooling", ["cls", "mean", "both"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
@torch.no_grad()
def test_heads_and_pooling(head, pooling):
    model, (signal, xyz) = make(BrainLMForFinetuning, head=head, pooling=pooling, num_targets=3), data()
    out = model(signal, xyz)
    near(out.logits, head_reference(model, out.last_hidden_state))
    assert out.logits.shape == (2, 3)
    assert out.loss is None
    assert torch.equal(out.predictions, out.logits)
    assert torch.equal(out.last_hidden_state, model.model(signal, xyz).last_hidden_state)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_fine_tuning_hides_nothing(mode):
    "In the published code the same input gave −0.199 and then −0.255."
    model, (signal, xyz) = make(BrainLMForFinetuning), data()
    getattr(model, mode)()
    assert torch.equal(model(signal, xyz).logits, model(signal, xyz).logits)
    assert torch.equal(model(signal, xyz).logits, model(signal, xyz, torch.zeros(2, 6, 3)).logits)
    assert not torch.equal(model(signal, xyz).logits, model(signal, xyz, some()).logits)


@pytest.mark.parametrize("loss_fn", ["mse", "mae"])
def test_loss_of_numbers_in_scaled_units(loss_fn):
    fields = {"num_targets": 2, "target_centre": [60.0, 5.0], "target_scale": [8.0, 2.0], "loss_fn": loss_fn}
    model, (signal, xyz) = make(BrainLMForFinetuning, **fields), data(3)
    labels = torch.tensor([[55.0, math.nan], [71.0, 4.0], [math.nan, math.nan]])
    out = model(signal, xyz, labels=labels)
    logits = out.logits.detach().double()
    near(out.predictions, logits * torch.tensor([8.0, 2.0]) + torch.tensor([60.0, 5.0]))
    terms = [logits[0, 0] - (55 - 60) / 8, logits[1, 0] - (71 - 60) / 8, logits[1, 1] - (4 - 5) / 2]
    expected = [t**2 if loss_fn == "mse" else abs(t) for t in terms]
    near(out.loss, sum(expected) / 3)
    assert out.n_points == 3
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # the unknown ones have no part in the gradient
    gradient = model.mlp_pred_head.lin1.weight.grad.clone()
    model.zero_grad()
    model(signal[:2], xyz, labels=labels[:2]).loss.backward()
    near(model.mlp_pred_head.lin1.weight.grad, gradient)


def test_targets_on_a_log_scale():
    fields = {"num_targets": 2, "target_transform": ["log1p", "none"], "target_centre": [2.0, 5.0]}
    fields["target_scale"] = [0.5, 2.0]
    model, (signal, xyz) = make(BrainLMForFinetuning, **fields), data(3)
    labels = torch.tensor([[0.0, 4.0], [12.0, -3.0], [math.nan, 7.0]])
    out = model(signal, xyz, labels=labels)
    logits = out.logits.detach().double()
    near(out.predictions[:, 0], (logits[:, 0] * 0.5 + 2).exp() - 1, 1e-4)
    near(out.predictions[:, 1], logits[:, 1] * 2 + 5)
    first = (labels[:2, 0].double() + 1).log()
    terms = torch.cat([logits[:2, 0] - (first - 2) / 0.5, logits[:, 1] - (labels[:, 1] - 5) / 2])
    near(out.loss, terms.square().mean())
    assert out.n_points == 5
    with pytest.raises(ValueError, match="targets above -1 for target_transform log1p, found -1"):
        model(signal, xyz, labels=labels - 1)


def test_labels_of_one_target_in_two_shapes():
    model, (signal, xyz) = make(BrainLMForFinetuning), data(3)
    labels = torch.tensor([1.0, 2.0, 4.0])
    losses = [
        model(signal, xyz, labels=x).loss for x in (labels, labels[:, None], labels.long(), labels.double())
    ]
    expected = (model(signal, xyz).logits[:, 0] - labels).square().mean()
    for loss in losses:
        near(loss, expected)
    alone = model(signal[:1], xyz, labels=labels[:1])
    assert alone.loss.shape == ()


def test_without_a_known_target_the_loss_is_nought():
    for fields, labels in (
        ({}, torch.full((2,), math.nan)),
        ({"target_kind": "classification", "num_targets": 2}, torch.full((2,), -100)),
        (
            {"target_kind": "classification", "num_targets": 2, "class_weights": [1.0, 3.0]},
            torch.full((2,), math.nan),
        ),
    ):
        model = make(BrainLMForFinetuning, **fields)
        out = model(*data(), labels=labels)
        out.loss.backward()
        assert out.loss == 0
        assert out.n_points == 0
        assert not model.model.layers[0].attention.query.weight.grad.any()


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_loss_of_classes(weights):
    fields = {"target_kind": "classification", "num_targets": 3, "class_weights": weights}
    model, (signal, xyz) = make(BrainLMForFinetuning, **fields), data(4)
    labels = torch.tensor([0, 2, -100, 1])
    out = model(signal, xyz, labels=labels)
    logits = out.logits.detach().double()
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    near(out.predictions, p)
    w = weights or [1.0, 1.0, 1.0]
    expected = -(w[0] * p[0, 0].log() + w[2] * p[1, 2].log() + w[1] * p[3, 1].log()) / (w[0] + w[2] + w[1])
    near(out.loss, expected)
    assert out.n_points == 3
    for form in (labels[:, None], torch.tensor([0.0, 2.0, math.nan, 1.0]), labels.int()):
        near(model(signal, xyz, labels=form).loss, out.loss, 1e-7)


@pytest.mark.parametrize(
    "fields, labels, message",
    [
        ({}, torch.zeros(2, 2), r"labels \(batch, targets\) = \(2, 1\), found shape \(2, 2\)"),
        ({}, torch.zeros(3), r"found shape \(3,\)"),
        ({}, torch.tensor(1.0), r"found shape \(\)"),
        ({"num_targets": 2}, torch.zeros(2), r"= \(2, 2\), found shape \(2,\)"),
        ({"num_targets": 3}, torch.zeros(3, 2), r"= \(2, 3\), found shape \(3, 2\)"),
        (
            {"target_kind": "classification", "num_targets": 2},
            torch.tensor([0, 2]),
            "classes from 0 to 1, found 2",
        ),
        (
            {"target_kind": "classification", "num_targets": 2},
            torch.tensor([0, -1]),
            "classes from 0 to 1, found -1",
        ),
        (
            {"target_kind": "classification", "num_targets": 2},
            torch.zeros(2, 2),
            r"a class for each of 2 samples, found labels of shape \(2, 2\)",
        ),
        (
            {"target_kind": "classification", "num_targets": 2},
            torch.tensor([0.0, 0.7]),
            "the numbers of classes, found 0.7; .* target_kind='regression'",
        ),
    ],
)
def test_labels_that_do_not_fit(fields, labels, message):
    with pytest.raises(ValueError, match=message):
        make(BrainLMForFinetuning, **fields)(*data(), labels=labels)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_a_probe_changes_its_head_only(head):
    dropout = {"embedding_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = make(BrainLMForFinetuning, head=head, **dropout).train()
    assert model.freeze_backbone() is model
    signal, xyz = data()
    assert torch.equal(model(signal, xyz).logits, model(signal, xyz).logits)  # no dropout in what is frozen
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.1)
    model(signal, xyz, labels=torch.tensor([1.0, 2.0])).loss.backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    name = "mlp_pred_head" if head == "mlp" else "linear_head"
    assert changed == {k for k in before if k.startswith(name)}
    free = make(BrainLMForFinetuning, **dropout).train()
    assert free.model.training
    assert not torch.equal(free(signal, xyz).logits, free(signal, xyz).logits)


@pytest.mark.parametrize("cls", [BrainLMForPretraining, BrainLMForFinetuning])
def test_it_learns(cls):
    signal, xyz = data(8)
    signal[:, 1:] = signal[:, :1] * torch.linspace(0.5, 1.5, 5)[:, None]  # parcels that say the same
    labels, model = signal.mean((1, 2)), make(cls).train()
    given_ = {"labels": labels} if cls is BrainLMForFinetuning else {"mask": some(8)}
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(signal, xyz, **given_).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


# ---- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A checkpoint of each class, all weights random."
    folder, models = tmp_path_factory.mktemp("brainlm"), {}
    for cls in (BrainLMModel, BrainLMForPretraining, BrainLMForFinetuning):
        models[cls] = make(cls, seed=3, num_targets=2)
        models[cls].save_pretrained(folder / cls.__name__)
    return folder, models


@pytest.mark.parametrize("cls", [BrainLMModel, BrainLMForPretraining, BrainLMForFinetuning])
def test_saved_and_loaded(cls, saved):
    folder, models = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = cls.from_pretrained(folder / cls.__name__)
    same_weights(model.state_dict(), models[cls].state_dict())
    assert model.loading == {"new": [], "left over": []}
    assert not model.training
    signal, xyz = data()
    assert torch.equal(model(signal, xyz).last_hidden_state, models[cls](signal, xyz).last_hidden_state)
    assert not list((folder / cls.__name__).glob("*.bin"))
    assert all(p.requires_grad for p in model.parameters())


def test_automatic_classes(saved):
    from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

    folder, models = saved
    path = folder / "BrainLMForPretraining"
    assert type(AutoConfig.from_pretrained(path)) is BrainLMConfig
    assert type(AutoConfig.for_model("brainlm", hidden_size=32)) is BrainLMConfig
    for auto, cls in ((AutoModel, BrainLMModel), (AutoModelForPreTraining, BrainLMForPretraining)):
        model = auto.from_pretrained(path)
        assert type(model) is cls
        trained = models[BrainLMForPretraining]
        same_weights(model.state_dict(), (trained.model if cls is BrainLMModel else trained).state_dict())
        assert type(auto.from_config(BrainLMConfig(**SIZE))) is cls


@pytest.mark.parametrize("source", [BrainLMModel, BrainLMForPretraining, BrainLMForFinetuning])
@pytest.mark.parametrize("target", [BrainLMModel, BrainLMForFinetuning])
def test_a_trained_body_in_another_class(source, target, saved):
    folder, models = saved
    model = target.from_pretrained(folder / source.__name__)
    trained = models[source] if source is BrainLMModel else models[source].model
    same_weights((model if target is BrainLMModel else model.model).state_dict(), trained.state_dict())
    heads = lambda m: [k for k in m.state_dict() if "head" in k]
    if source is target:
        assert model.loading == {"new": [], "left over": []}
    else:
        assert model.loading == {
            "new": heads(model) and sorted(heads(model)),
            "left over": sorted(heads(models[source])),
        }
    if target is BrainLMForFinetuning and source is not target:  # the new head is drawn as ever
        assert not model.mlp_pred_head.lin2.bias.any()
        weight = model.mlp_pred_head.lin1.weight
        limit = math.sqrt(6 / sum(weight.shape))
        assert 0.8 * limit < weight.abs().max() <= limit


def test_new_settings_of_a_head_on_a_pretrained_body(saved):
    folder, _ = saved
    fields = {"num_targets": 3, "target_kind": "classification", "head": "linear", "pooling": "both"}
    model = BrainLMForFinetuning.from_pretrained(folder / "BrainLMForPretraining", **fields)
    assert model.linear_head.weight.shape == (3, 32)
    assert model.loading["new"] == ["linear_head.bias", "linear_head.weight"]
    for fields, message in (
        ({"head": "round"}, "expected head from mlp, linear, found 'round'"),
        ({"target_scale": [0.0, 1.0]}, r"expected target_scale above 0, found \[0.0, 1.0\]"),
        ({"num_labels": 3}, "expected num_targets, found num_labels=3"),
    ):
        with pytest.raises(ValueError, match=message):
            BrainLMForFinetuning.from_pretrained(folder / "BrainLMForPretraining", **fields)


def test_positions_are_never_uninitialised_memory(saved):
    "Trap 10: buffers that are not in the file came back as whatever was in memory."
    folder, _ = saved
    for cls in (BrainLMModel, BrainLMForPretraining, BrainLMForFinetuning):
        model = cls.from_pretrained(
            folder / "BrainLMForPretraining" if cls is not BrainLMForFinetuning else folder / cls.__name__
        )
        body = model if cls is BrainLMModel else model.model
        near(body.embeddings.temporal_encoding.pe, B.sinusoid(5000, 16), 1e-7)
        assert {k for k, _ in model.named_buffers()} <= set(
            model.state_dict()
        )  # none that a file would not keep
        assert all(t.isfinite().all() for t in model.state_dict().values())


def altered(folder, tmp_path, change, cls=BrainLMForPretraining):
    "A checkpoint with other weights in its file."
    path = tmp_path / "altered"
    path.mkdir()
    source = folder / cls.__name__
    weights = change(load_file(source / "model.safetensors"))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text((source / "config.json").read_text())
    return path


def test_positions_in_a_file_are_taken_as_they_are(saved, tmp_path):
    pe = "model.embeddings.temporal_encoding.pe"
    path = altered(saved[0], tmp_path, lambda w: w | {pe: 0.5 * w[pe]})
    for cls in (BrainLMForPretraining, BrainLMForFinetuning):
        near(
            cls.from_pretrained(path).model.embeddings.temporal_encoding.pe, 0.5 * B.sinusoid(5000, 16), 1e-7
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: {k: v for k, v in w.items() if "layers.1.attention.key" not in k},
         r"found 2 weights missing: model.layers.1.attention.key.bias, model.layers.1.attention.key.weight"),
        (lambda w: {k: v for k, v in w.items() if not k.endswith(".pe")}, "1 weights missing: model.embeddings.temporal_encoding.pe"),
        (lambda w: {k: v for k, v in w.items() if "pred_head" not in k}, "4 weights missing: pred_head.0.bias"),
        (lambda w: w | {"model.layers.7.strange": torch.zeros(3)}, "1 weights left over: model.layers.7.strange"),
        (lambda w: w | {"pred_head.0.bias": torch.zeros(3)}, r"1 weights of another size: pred_head.0.bias \(3,\) instead of \(8,\)"),
        (lambda w: {k.replace("layers", "blocks"): v for k, v in w.items()}, "missing: .*left over: "),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_an_error(change, message, saved, tmp_path):
    path = altered(saved[0], tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        BrainLMForPretraining.from_pretrained(path)
    assert f"{path}: expected the weights of BrainLMForPretraining" in str(error.value)
    assert "Take the class and the settings that it was saved with" in str(error.value)


@pytest.mark.parametrize("cls", [BrainLMModel, BrainLMForPretraining, BrainLMForFinetuning])
def test_a_folder_that_is_not_there_or_lacks_its_weights_is_named(cls, tmp_path):
    said = (
        r"expected a folder with config.json and model.safetensors \(or org/name on the Hub\), found none at "
    )
    with pytest.raises(FileNotFoundError, match=said + re.escape(str(tmp_path / "nothing"))):
        cls.from_pretrained(tmp_path / "nothing")
    BrainLMConfig().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=said + re.escape(str(tmp_path))):
        cls.from_pretrained(tmp_path)


def test_heads_that_do_not_fit_are_an_error(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(ValueError, match="missing: pred_head.0.bias.*left over: mlp_pred_head.lin1.bias"):
        BrainLMForPretraining.from_pretrained(folder / "BrainLMForFinetuning")
    with pytest.raises(ValueError, match="4 weights missing: pred_head"):
        BrainLMForPretraining.from_pretrained(folder / "BrainLMModel")
    with pytest.raises(
        ValueError, match=r"of another size: mlp_pred_head.lin3.bias \(2,\) instead of \(3,\)"
    ):
        BrainLMForFinetuning.from_pretrained(folder / "BrainLMForFinetuning", num_targets=3)
    with pytest.raises(ValueError, match="6 weights left over: mlp_pred_head"):
        BrainLMForFinetuning.from_pretrained(folder / "BrainLMForFinetuning", head="linear")
    with pytest.raises(ValueError, match="ignore_mismatched_sizes would draw others at random"):
        BrainLMForFinetuning.from_pretrained(folder / "BrainLMForFinetuning", ignore_mismatched_sizes=True)
    half = altered(
        folder, tmp_path, lambda w: {k: v for k, v in w.items() if "lin3" not in k}, BrainLMForFinetuning
    )
    with pytest.raises(ValueError, match="2 weights missing: mlp_pred_head.lin3.bias"):
        BrainLMForFinetuning.from_pretrained(half)
    for cls in (BrainLMModel, BrainLMForFinetuning):
        with pytest.raises(ValueError, match="of another size: "):
            cls.from_pretrained(folder / "BrainLMForPretraining", hidden_size=32)


def test_options_of_loading(saved):
    path = saved[0] / "BrainLMForPretraining"
    model, info = BrainLMForPretraining.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    half = BrainLMForPretraining.from_pretrained(path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    near(half.pred_head[0].weight, model.pred_head[0].weight, 5e-3)

    class Own(BrainLMForFinetuning):
        "A subclass may do what its parent may."

    assert len(Own.from_pretrained(path).loading["new"]) == 6
    from transformers import logging

    assert logging.get_verbosity() > 0


def test_the_config_as_a_file(schaefer, tmp_path):
    _, config = schaefer
    config = copy.deepcopy(config)
    config.target_names, config.target_centre, config.target_scale = ["age"], [54.0], [7.5]
    config.save_pretrained(tmp_path)
    loaded = BrainLMConfig.from_pretrained(tmp_path)
    told = lambda c: {
        k: v for k, v in c.to_dict().items() if k not in ("transformers_version", "_name_or_path")
    }
    assert told(loaded) == told(config)
    assert Scaler.from_dict(loaded.scaler) == schaefer[0]
    near(torch.tensor(loaded.coordinates), Space.named("schaefer100").coords, 1e-3)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "brainlm"
    own = config.to_diff_dict()
    assert own["hidden_size"] == 16
    assert "layer_norm_eps" not in own or own["layer_norm_eps"] == 1e-12
    assert told(pickle.loads(pickle.dumps(config))) == told(config)  # of our own process, no file
    assert told(copy.deepcopy(config)) == told(config)
    assert "schaefer100" in repr(config)


def test_a_model_is_copied_with_all_it_has():
    model, (signal, xyz) = make(), data()
    other = copy.deepcopy(model)
    assert torch.equal(other(signal, xyz).logits, model(signal, xyz).logits)
    with torch.no_grad():
        other.pred_head[2].bias.add_(1)
    assert not torch.equal(other(signal, xyz).logits, model(signal, xyz).logits)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_act": "tanh"}, "hidden_act from gelu, gelu_new, relu, swish, found 'tanh'"),
        ({"loss_fn": "huber"}, "loss_fn from mse, mae, found 'huber'"),
        ({"attention": "sparse"}, "attention from auto, blocks, flex, dense, found 'sparse'"),
        ({"head": "deep"}, "head from mlp, linear"),
        ({"pooling": "max"}, "pooling from cls, mean, both"),
        ({"target_kind": "ordinal"}, "target_kind from regression, classification"),
        ({"hidden_size": 15, "num_attention_heads": 3}, "hidden_size even and divisible by num_attention_heads, found 15 and 3"),
        ({"hidden_size": 16, "num_attention_heads": 3}, "found 16 and 3"),
        ({"num_attention_heads": 0}, "found 256 and 0"),
        ({"num_timepoints_per_voxel": 210}, "a multiple of timepoint_patching_size, found 210 and 20"),
        ({"timepoint_patching_size": 0}, "found 200 and 0"),
        ({"mask_ratio": 1.5}, "mask_ratio from 0 to 1, found 1.5"),
        ({"forward_mask_prob": -0.1}, "forward_mask_prob from 0 to 1"),
        ({"embedding_dropout_prob": 2}, "embedding_dropout_prob from 0 to 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of at least 1, found 0"),
        ({"num_targets": 0}, "num_targets of at least 1 for regression, found 0"),
        ({"target_kind": "classification"}, "num_targets of at least 2 for classification, found 1"),
        ({"num_targets": 2, "target_centre": [1.0]}, r"target_centre for 2 targets \(num_targets\), found 1"),
        ({"target_transform": ["sqrt"]}, "target_transform from log1p, none, found 'sqrt'"),
        ({"num_targets": 2, "target_transform": ["log1p"]}, "target_transform for 2 targets"),
        ({"target_scale": [-1.0]}, r"target_scale above 0, found \[-1.0\]"),
        ({"target_kind": "classification", "num_targets": 2, "class_weights": [1.0]}, "class_weights for 2 targets"),
        ({"num_labels": 3}, r"num_targets \(with target_kind\), found num_labels=3"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(fields, message):
    with pytest.raises(
        ValueError, match=f"BrainLMConfig: expected .*{message}|BrainLMConfig: expected {message}"
    ):
        BrainLMConfig(**fields)


def test_settings_changed_later_are_checked_by_the_model():
    config = BrainLMConfig(**SIZE)
    config.pooling = "first"
    with pytest.raises(ValueError, match="pooling from cls, mean, both, found 'first'"):
        BrainLMForFinetuning(config)


# ---- bad input


def spoiled(what):
    signal, xyz = data(2, 12)
    more = {}
    if what == "frames":
        signal = signal[..., :10]
    elif what == "too few frames":
        signal = signal[..., :3]
    elif what == "no frames":
        signal = signal[..., :0]
    elif what == "nobody":
        signal = signal[:0]
    elif what == "two axes":
        signal = signal[0]
    elif what == "no coordinates":
        xyz = None
    elif what == "voxels":
        xyz = (xyz - xyz.min(0).values) / 2
    elif what == "metres":
        xyz = xyz / 1000
    elif what == "micrometres":
        xyz = xyz * 1000
    elif what == "nought":
        xyz = 0 * xyz
    elif what == "NaN coordinates":
        xyz[3] = math.nan
    elif what == "fewer coordinates":
        xyz = xyz[:11]
    elif what == "samples of coordinates":
        xyz = xyz.expand(3, -1, -1)
    elif what == "flat coordinates":
        xyz = xyz.flatten()
    elif what == "NaN":
        signal[:, [2, 7]] = math.nan
    elif what == "many NaN":
        signal[:] = math.nan
    elif what == "dead":
        signal[1, 5] = 0
    elif what == "raw":
        signal = 10_000 + 100 * signal
    elif what == "not divided":
        signal = 100 * signal
    elif what == "not centred":
        signal = signal + 100
    elif what == "too small":
        signal = signal / 1e5  # windows of scrubbed frames go down to a thousandth
    elif what == "mask":
        more["mask"] = torch.zeros(2, 12, 4)
    elif what == "missing":
        more["missing"] = torch.zeros(12)
    elif what == "labels":
        more["labels"] = torch.zeros(2, 12, 3)
    elif what == "label":
        more["labels"] = torch.ones(2)
    return signal, xyz, more


SCALED = r"scaled parcel by parcel to median 0 and interquartile range 1, found a typical SD of {}.*Scaler.fit\(source, 'robust'.*for_data"
BAD = {
    "frames": r"a multiple of 4 frames \(timepoint_patching_size\), found 10; cut the window to 8",
    "too few frames": "a multiple of 4 frames .*, found 3; take a longer window",
    "no frames": r"signal_vectors \(batch, parcels, frames\), found shape \(2, 12, 0\)",
    "nobody": r"found shape \(0, 12, 12\)",
    "two axes": r"signal_vectors \(batch, parcels, frames\), found shape \(12, 12\)",
    "no coordinates": r"xyz_vectors, millimetres of each parcel \(Space.named\(…\).coords\), found none, and none in the config",
    "voxels": r"millimetres, left of the midline below 0, found nothing below 0 \(voxel numbers\?\): multiply by the image's affine",
    "metres": "millimetres within 250 of the origin, found numbers up to 0.",
    "micrometres": r"millimetres within 250 of the origin, found numbers up to .*e\+0",
    "nought": "millimetres within 250 of the origin, found numbers up to 0$",
    "NaN coordinates": "finite coordinates, found 1 parcels without",
    "fewer coordinates": r"\(parcels, 3\) or \(batch, parcels, 3\) for 12 parcels, found shape \(11, 3\)",
    "samples of coordinates": "coordinates for 2 samples or for all of them, found 3",
    "flat coordinates": r"for 12 parcels, found shape \(36,\)",
    "NaN": r"finite signals, found NaN or infinity in 2 parcels \(2, 7\); mend them, or mark them in missing=",
    "many NaN": r"found NaN or infinity in 12 parcels \(0, 1, 2, 3, 4 …\)",
    "dead": r"signals that move, found 1 parcels \(5\) constant over the window .*; mark them in missing=",
    "raw": SCALED.format(r"[\d.]+ around \d{2,}"),
    "not divided": SCALED.format(r"[\d.]+ around 0.\d+ SD"),
    "not centred": SCALED.format(r"[01]\.\d+ around \d\d"),
    "too small": SCALED.format(r"[\d.]+e-0\d"),
    "mask": r"a mask \(batch, parcels, blocks\) = \(2, 12, 3\), found \(2, 12, 4\)",
    "missing": r"missing \(batch, parcels\) = \(2, 12\), found \(12,\)",
    "labels": r"labels, what to predict instead of the signal, of its shape \(2, 12, 12\), found \(2, 12, 3\)",
    "label": r"of its shape \(2, 12, 12\), found \(2,\)",
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bad_input(what, mode):
    model = make()
    getattr(model, mode)()
    signal, xyz, more = spoiled(what)
    with pytest.raises(
        ValueError, match=f"brainlm: expected .*(?:{BAD[what]})|brainlm: expected (?:{BAD[what]})"
    ):
        model(signal, xyz, **more)


@torch.no_grad()
def test_checks_can_be_left_out_but_shapes_stay():
    model = make(check_input=False)
    for what in ("raw", "voxels", "dead", "metres"):
        signal, xyz, _ = spoiled(what)
        assert model(signal, xyz).logits.isfinite().all()
    for what in (
        "frames",
        "two axes",
        "fewer coordinates",
        "flat coordinates",
        "mask",
        "no coordinates",
        "samples of coordinates",
    ):
        signal, xyz, more = spoiled(what)
        with pytest.raises(ValueError, match="brainlm: expected"):
            model(signal, xyz, **more)


@torch.no_grad()
def test_input_that_is_unusual_but_right():
    model, (signal, xyz) = make(), data(2, 12)
    for fine in (
        4 * signal,
        signal / 10,
        signal + 1.5,
        0.05 * signal + 1,  # a slow signal in a short window
        signal.index_fill(2, torch.arange(3), 30.0),  # a spike
    ):
        model(fine, xyz)
    model(signal, xyz - torch.tensor([0.0, 150.0, 0.0]))
    left = xyz.clone()
    left[:, 0] = -left[:, 0].abs()
    model(signal, left)
    frame = make(timepoint_patching_size=1)
    assert frame(signal[..., :1], xyz).logits.shape == (2, 12, 1, 1)
    with pytest.raises(ValueError, match="finite signals"):
        frame(signal[..., :1] * math.nan, xyz)
    with pytest.raises(ValueError, match="up to 5000 time blocks, found 5001"):
        frame(torch.randn(1, 1, 5001), xyz[:1])


@pytest.mark.parametrize("cls", [BrainLMModel, BrainLMForPretraining, BrainLMForFinetuning])
def test_arguments_that_nobody_reads(cls):
    model, (signal, xyz) = make(cls), data()
    model(signal, xyz, input_ids=signal, output_attentions=False)  # the published code takes them too
    with pytest.raises(TypeError, match="expected signal_vectors, .*found masks, nonsense"):
        model(signal, xyz, masks=some(), nonsense=1)
    assert not model.accepts_loss_kwargs  # transformers' Trainer would not divide when it accumulates


def test_published_order_of_arguments():
    for cls in (BrainLMForPretraining, BrainLMForFinetuning):
        names = list(inspect.signature(cls.forward).parameters)
        assert names[1:5] == ["signal_vectors", "xyz_vectors", "mask", "labels"]


# ---- training in all its forms


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_with_checkpointing(dropout, kernel):
    found = []
    for checkpointing in (False, True):
        model = make(attention_probs_dropout_prob=dropout, hidden_dropout_prob=dropout).train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers 6 will call it otherwise
                model.gradient_checkpointing_enable({"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        torch.manual_seed(7)
        out = model(*data(), some())
        out.loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters()})
    same_weights(*found)


@pytest.mark.parametrize("cls", [BrainLMForPretraining, BrainLMForFinetuning])
def test_bfloat16(cls, kernel):
    signal, xyz = data(8)
    given_ = {"labels": torch.linspace(20.0, 80, 8)} if cls is BrainLMForFinetuning else {"mask": some(8)}
    fields = {"target_centre": [50.0], "target_scale": [20.0]}
    expected = make(cls, **fields)(signal, xyz, **given_)
    for pure in (False, True):  # weights in single precision under autocast, or all of it in half
        model = make(cls, dtype=torch.bfloat16 if pure else torch.float32, **fields).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            out = model(signal, xyz, **given_)
        assert out.loss.dtype == torch.float32
        near(out.loss, expected.loss, 0.05)
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        if cls is BrainLMForFinetuning:
            assert out.predictions.dtype == torch.float32  # ages with 8 bits are ages to half a year


def test_doubles_into_a_single_precision_model_and_back():
    signal, xyz = data()
    near(make()(signal.double(), xyz.double(), some()).logits, make()(signal, xyz, some()).logits, 1e-6)
    double = make(dtype=torch.float64)(signal, xyz, some())
    assert double.logits.dtype == double.loss.dtype == torch.float64


def test_compiled():
    import torch._dynamo

    torch._dynamo.reset()
    model, (signal, xyz) = make(num_hidden_layers=1).train(), data()
    expected = model(signal, xyz, some())
    model.compile(backend="eager")
    out = model(signal, xyz, some())
    near(out.loss, expected.loss, 1e-6)
    near(out.logits, expected.logits, 1e-6)
    out.loss.backward()
    torch._dynamo.reset()


def test_layers_and_groups_for_the_optimiser():
    for cls, prefix in (
        (BrainLMModel, ""),
        (BrainLMForPretraining, "model."),
        (BrainLMForFinetuning, "model."),
    ):
        model = make(cls, num_hidden_layers=3)
        layer = layers_of(model)
        for name, number in layer.items():
            if name.startswith(f"{prefix}embeddings"):
                assert number == 0, name
            elif name.startswith(f"{prefix}layers"):
                assert number == int(name.removeprefix(prefix).split(".")[1]) + 1, name
            else:
                assert number == 4, name
        exempt = {k for k, p in model.named_parameters() if not decays(k, p)}
        assert {k for k in layer if "token" in k or k.endswith("bias") or "layernorm" in k} == exempt
        groups = parameter_groups(model, 0.1, layer_decay=0.5)
        assert sum(p.numel() for g in groups for p in g["params"]) == sum(
            p.numel() for p in model.parameters()
        )
        assert {g["lr_scale"] for g in groups} == {1.0, 0.5, 0.25, 0.125, 0.0625}


@pytest.mark.parametrize("pooling", ["cls", "mean", "both"])
def test_every_weight_has_a_gradient_in_every_step(pooling):
    "Processes that train together wait for all of them."
    signal, xyz = data()
    for model, given_ in (
        (make(), {}),
        (make(legacy_mask=True), {}),
        (make(open_cls=True), {"mask": some()}),
        (make(BrainLMForFinetuning, pooling=pooling), {"labels": torch.ones(2)}),
        (make(BrainLMForFinetuning, pooling=pooling), {"labels": torch.full((2,), math.nan)}),
    ):
        model.train()(signal, xyz, **given_).loss.backward()
        assert not [k for k, p in model.named_parameters() if p.grad is None]


def steps_together(out, rank=None):
    "Three steps of both models on half of the data, with another process; or on all of it, alone."
    from torch.nn.parallel import DistributedDataParallel

    signal, xyz = data(4)
    mine = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    for cls, name, target in (
        (BrainLMForPretraining, "mask", draw_mask(4, 6, 3, kind="forward")),
        (BrainLMForFinetuning, "labels", torch.tensor([1.0, 2.0, 3.0, 4.0])),
    ):
        model = make(cls).train()
        worker = model if rank is None else DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            worker(signal[mine], xyz, **{name: target[mine]}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        save_file(model.state_dict(), f"{out}_{cls.__name__}_{rank or 0}.safetensors")


TOGETHER = """
import faulthandler, sys
faulthandler.dump_traceback_later(120, exit=True)  # a process that hangs says where
sys.path.insert(0, sys.argv[1])
import test_brainlm as t, torch.distributed as dist
dist.init_process_group("gloo")
t.steps_together(sys.argv[2], dist.get_rank())
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path):
    "With DistributedDataParallel as it is: no weight stays behind, and the steps are those of one process."
    (tmp_path / "together.py").write_text(TOGETHER)
    # both are children of torchrun: one that fails or hangs takes the other with it, and says why
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "together.py"), str(Path(__file__).parent), str(tmp_path / "both")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    steps_together(tmp_path / "alone")
    for cls in ("BrainLMForPretraining", "BrainLMForFinetuning"):
        alone = load_file(tmp_path / f"alone_{cls}_0.safetensors")
        for rank in (0, 1):
            both = load_file(tmp_path / f"both_{cls}_{rank}.safetensors")
            assert both.keys() == alone.keys()
            for name, value in alone.items():
                near(both[name], value, 1e-5)


def test_presets_make_models():
    for name, preset in B.PRESETS.items():
        config = BrainLMConfig(**preset.config(num_brain_voxels=Space.named(preset.space).n_sites))
        with torch.device("meta"):
            model = BrainLMForPretraining(config)
        assert len(model.model.layers) == preset.layers, name
        assert config.num_timepoints_per_voxel % config.timepoint_patching_size == 0
        assert preset.config(mask_ratio=0.9)["mask_ratio"] == 0.9


@pytest.mark.parametrize("tr", [0, -1, 2000, math.nan])
def test_a_model_is_for_recordings_that_exist(schaefer, tr):
    "TR in seconds, a place for every parcel, scales above 0."
    scaler, _ = schaefer
    with pytest.raises(ValueError, match="BrainLMConfig: expected a repetition time"):
        BrainLMConfig.for_data("schaefer100", tr, scaler)
    still = Scaler("robust", "site", "frames", scaler.layout, 100, scaler.centre, 0 * scaler.scale, 3, "abc", 600)
    with pytest.raises(ValueError, match="scales are above 0"):
        BrainLMConfig.for_data("schaefer100", 0.72, still)
    many = Layout.of("schaefer1000")
    wide = Scaler(
        "robust", "site", "frames", many.digest, 1000, *np.ones((2, 1000), np.float32), 3, "abc", 600
    )
    with pytest.raises(ValueError, match="expected coordinates of every parcel, found none for 2 parcels"):
        BrainLMConfig.for_data(many, 0.72, wide)
    places = np.nan_to_num(Space.named("schaefer1000").coords)
    config = BrainLMConfig.for_data(many, 0.72, wide, coordinates=places)
    assert np.allclose(config.coordinates, places, atol=1e-3)
    with pytest.raises(ValueError, match="BrainLMConfig: expected .*voxel numbers"):
        BrainLMConfig.for_data(many, 0.72, wide, coordinates=abs(places))
    with pytest.raises(ValueError, match="BrainLMConfig: expected parcels, found fsaverage5"):
        layout = Layout.of("fsaverage5")
        n = layout.n_sites
        BrainLMConfig.for_data(
            layout, 1, Scaler("robust", "site", "frames", layout.digest, n, *np.ones((2, n), np.float32), 3, "abc", 9)
        )


def test_arrays_are_taken_for_tensors(tmp_path):
    model, (signal, xyz) = make(), data()
    mask, missing = some(), torch.tensor([[True] + 5 * [False], 6 * [False]])
    found = model(signal, xyz, mask=mask, missing=missing)
    again = model(signal.numpy(), xyz.numpy(), mask=mask.numpy(), missing=missing.numpy())
    assert torch.equal(found.loss, again.loss) and torch.equal(found.mask, again.mask)
    placed = make(coordinates=xyz.numpy())
    placed.save_pretrained(tmp_path)
    near(BrainLMConfig.from_pretrained(tmp_path).coordinates, xyz)


def test_forward_masks_need_no_ratio():
    mask = draw_mask(3, 6, 4, kind="mixed", ratio=0, forward_prob=1.0)
    assert torch.equal(mask, draw_mask(3, 6, 4, kind="forward"))
    with pytest.raises(ValueError, match="ratio above 0, up to 1, found 0"):
        draw_mask(3, 6, 4, kind="mixed", ratio=0, forward_prob=0.9)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_torn_file_is_named(tmp_path, name):
    make().save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        BrainLMForPretraining.from_pretrained(tmp_path)
