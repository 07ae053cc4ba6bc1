"The benchmarks of the masked autoencoder: what they compare is the same, and they are honest where they cannot run."

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fmri_book.mae import HeadByHead, attend

ROOT = Path(__file__).parents[1]
PEER = Path(os.environ.get("FMRI_BOOK_PEER", ROOT / "_build" / "peer"))
SMALL = dict(img_size=(32, 48), patch_size=8, num_frames=8, t_patch_size=4, depth=2, embed_dim=32, num_heads=2, decoder_depth=2, decoder_embed_dim=32, decoder_num_heads=2)  # fmt: skip


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("mae_step")


@pytest.fixture
def small(step, monkeypatch):
    "Models that take a moment, in place of ViT-S."
    from fmri_book.mae import MaskedAutoencoderViT

    monkeypatch.setitem(step.SIZES, "mae_vit_small", MaskedAutoencoderViT)
    return step


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("mae_gpu")


def test_without_a_gpu_the_gpu_script_says_so_and_writes_nothing(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["mae_gpu.py", "--table", str(tmp_path / "gpu.csv")])
    assert gpu.main() == []  # returns, so the script ends with 0
    assert "No GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_no_table_of_gpu_numbers_without_the_card_that_gave_them():
    table = ROOT / "results" / "mae_gpu.csv"
    if table.exists():
        first = table.read_text().splitlines()[0]
        assert "device: NVIDIA" in first or "device: AMD Instinct" in first, first


def test_a_missing_peer_is_named(step, monkeypatch, tmp_path):
    assert step.load_peer(tmp_path) is None
    monkeypatch.setattr(sys, "argv", ["mae_step.py", "--peer", str(tmp_path)])
    with pytest.raises(SystemExit, match="expected the peer there, found none; install it as said in --help"):
        step.main()


def test_book_and_peer_give_the_same_loss_and_gradients(small, monkeypatch):
    if (peer := small.load_peer(PEER)) is None:
        pytest.skip(f"cortex_mae is not installed in {PEER}: see benchmarks/mae_step.py --help")
    monkeypatch.setattr(peer.models_mae, "mae_vit_small", peer.models_mae.MaskedAutoencoderViT)
    ways, grid, mask = small.make_ways("small", peer, small.WAYS[:2], **SMALL)
    loss, gradients = small.compare(ways, grid, mask)
    assert loss < 1e-5 and gradients < 1e-4


def test_a_difference_between_book_and_peer_is_found(small):
    "The comparison sees a stand-in for the peer that computes something else."
    ways, grid, mask = small.make_ways("small", None, ("book float32",), **SMALL)
    other, _, _ = small.make_ways("small", None, ("book float32",), **SMALL)
    ways["peer float32"] = other["book float32"]
    assert max(small.compare(ways, grid, mask)) < 1e-6
    with torch.no_grad():
        ways["peer float32"].model.decoder.head.bias += 0.1
    loss, gradients = small.compare(ways, grid, mask)
    assert loss > 1e-4 and gradients > 1e-4


def test_the_bfloat16_step_follows_the_float32_step(small):
    names = ("book float32", "book bfloat16")
    ways, grid, mask = small.make_ways("small", None, names, **SMALL)
    _, losses = small.take_turns(ways, grid, mask, dict.fromkeys(names, 6), lambda: 0.0)
    exact, low = (torch.tensor(losses[name]) for name in names)
    assert exact[-1] < exact[0] and (exact - low).abs().max() < 0.02 * exact.max()
    assert {p.dtype for p in ways["book bfloat16"].model.parameters()} == {torch.float32}


def test_ratio_is_the_median_of_the_rounds(step):
    middle, low, high = step.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert middle == 2 and low == 2 and high == 3


@pytest.mark.parametrize("lengths", [(1, 1), (30, 41), (33, 32), (70, 100)])
def test_attention_head_by_head_is_attention(lengths):
    torch.manual_seed(0)
    n_q, n_k = lengths
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (n_q, n_k, n_k))
    even = lambda x: F.pad(x, (0, 0, 0, -x.shape[2] % 32)).flatten(0, 1)
    ours = HeadByHead.apply(even(q * 8**-0.5), even(k), even(v), n_k).unflatten(0, (2, 3))[:, :, :n_q]
    theirs = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.randn_like(theirs)
    found = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad((theirs * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_long_bfloat16_attention_is_as_exact_as_the_fused_one():
    torch.manual_seed(0)
    exact = [torch.randn(1, 2, n, 16, requires_grad=True) for n in (515, 530, 530)]
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    fused = [x.detach().clone().requires_grad_() for x in low]
    outs = [f(*xs) for f, xs in ((F.scaled_dot_product_attention, exact), (attend, low), (F.scaled_dot_product_attention, fused))]
    assert "HeadByHead" in _names(outs[1]) and "HeadByHead" not in _names(outs[2])
    for out in outs:
        out.float().square().sum().backward()
    error = lambda xs: max(((a.grad.float() - b.grad).abs().max() / b.grad.abs().max()).item() for a, b in zip(xs, exact, strict=True))
    assert error(low) < max(2 * error(fused), 0.02)
    assert (outs[1].float() - outs[0]).abs().max() < 2 * (outs[2].float() - outs[0]).abs().max() + 1e-3


def _names(x: torch.Tensor) -> str:
    "Of all functions that led to it."
    names, queue = [], [x.grad_fn]
    while queue:
        if (f := queue.pop()) is not None:
            names.append(type(f).__name__)
            queue += [g for g, _ in f.next_functions]
    return " ".join(names)


def test_flops_are_those_of_the_products(gpu):
    from fmri_book.mae import MaskedAutoencoderViT

    model = MaskedAutoencoderViT(in_chans=1, **SMALL | {"decoder_depth": 1})
    images = torch.randn(1, 1, 8, 32, 48)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = model(images, mask_ratio=0.75)
    seen, asked, width = out.visible_ids.shape[1], out.pred_ids.shape[1], 32
    # the book computes queries, projection and MLP of the last decoder block for predicted tokens alone
    saved = (seen + 1) * (2 * width * width * 10 + 4 * (seen + 1 + asked) * width)
    assert counter.get_total_flops() == gpu.forward_flops(model, seen, asked) - saved
