"BrainLM: attention with dropout and in bfloat16 on the processor, and the benchmarks that measure it."

import math
import sys
from pathlib import Path

import pytest
import torch

import fmri_book.brainlm as B
from fmri_book.brainlm import BlockByBlock, block_attention, block_causal, dense_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch):
    "Our own attention for few tokens, too."
    monkeypatch.setattr(B, "_MANY", 0)


def tokens(batch=2, heads=2, parcels=5, blocks=3, width=8, dtype=torch.float64):
    chance = torch.Generator().manual_seed(0)
    shape = (batch, heads, 1 + parcels * blocks, width)
    return [torch.randn(shape, dtype=dtype, generator=chance).requires_grad_() for _ in range(3)]


def kept_tokens(q, k, v, parcels, open_cls, dropout, seed):
    "What the seed keeps, as (B, heads, L, L)."
    kept = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype).flatten(0, 1)
    reads = B._reads(q.shape[2], parcels, open_cls, 256)
    for head, rows, keys, _, drawn in B._shares(q.detach().flatten(0, 1), k.detach().flatten(0, 1), reads, dropout, seed):
        kept[head, rows, keys] = drawn
    return kept.view(*q.shape[:3], -1)


@pytest.mark.parametrize("open_cls", [False, True])
@pytest.mark.parametrize("parcels", [5, 300])
def test_dropout_block_by_block_is_dropout_of_the_shares(open_cls, parcels):
    "Context and gradients against the formula, with the mask that was drawn."
    q, k, v = tokens(parcels=parcels, blocks=2)
    torch.manual_seed(5)
    seed, dropout = int(torch.randint(2**62, ())), 0.25
    kept = kept_tokens(q, k, v, parcels, open_cls, dropout, seed)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~block_causal(2, parcels, open_cls), -math.inf)
    expected, weight = (scores.softmax(-1) * kept / (1 - dropout)) @ v, torch.randn(q.shape, dtype=q.dtype)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.manual_seed(5)
    found = block_attention(q, k, v, parcels, open_cls, dropout)
    torch.testing.assert_close(found, expected)
    for g, e in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(g, e)


def test_dropout_keeps_each_share_by_itself():
    q, k, v = tokens(batch=4, parcels=60, blocks=4)
    allowed, kept = block_causal(4, 60), kept_tokens(q, k, v, 60, False, 0.1, 1)
    chances = kept[..., allowed]
    assert abs(chances.mean() - 0.9) < 5 * math.sqrt(0.09 / chances.numel())
    rows = kept[0, 0, 1:61, 1:61]
    for neighbour in (rows[1:] * rows[:-1], rows[:, 1:] * rows[:, :-1], kept[0, 0, 1:61, 1:61] * kept[1, 0, 1:61, 1:61]):
        assert abs(neighbour.mean() - 0.81) < 5 * math.sqrt(0.81 * 0.19 / neighbour.numel())
    assert not torch.equal(kept, kept_tokens(q, k, v, 60, False, 0.1, 2))


@pytest.mark.parametrize("dropout", [1e-7, 0.5, 1 - 1e-7, 1.0])
def test_any_dropout_gives_finite_numbers(dropout):
    q, k, v = tokens()
    found = block_attention(q, k, v, 5, dropout=dropout)
    found.sum().backward()
    assert all(torch.isfinite(x).all() for x in (found, q.grad, k.grad, v.grad))
    if dropout == 1:
        assert not found.any()
    if dropout < 1e-6:
        torch.testing.assert_close(found, dense_attention(q, k, v, 5))


def test_a_gradient_of_dropout_repeats_under_checkpointing():
    found = []
    for recompute in (False, True):
        q, k, v = tokens()
        torch.manual_seed(1)
        run = lambda: block_attention(q, k, v, 5, dropout=0.3)  # noqa: B023
        out = torch.utils.checkpoint.checkpoint(run, use_reentrant=False) if recompute else run()
        (out**2).sum().backward()
        found.append(torch.stack([out.detach(), q.grad, k.grad, v.grad]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("open_cls", [False, True])
def test_bfloat16_is_as_near_as_bfloat16_can_be(open_cls):
    q, k, v = tokens(parcels=30)
    exact = dense_attention(q, k, v, 30, open_cls)
    weight = torch.randn_like(exact)
    wanted = [exact, *torch.autograd.grad((exact * weight).sum(), (q, k, v))]
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    out = block_attention(*low, 30, open_cls)
    found = [out, *torch.autograd.grad((out * weight.bfloat16()).sum(), low)]
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == torch.bfloat16
        assert (f.double() - w).norm() < 0.02 * w.norm()


def test_gradcheck_of_the_function_itself():
    q, k, v = (x.flatten(0, 1).detach().requires_grad_() for x in tokens(1, 2, 2, 2, 3))
    reads = B._reads(5, 2, False, 1)
    torch.manual_seed(0)
    start = torch.get_rng_state()

    def same_draw(*x):
        torch.set_rng_state(start)
        return BlockByBlock.apply(*x, reads, 0.4)

    assert torch.autograd.gradcheck(same_draw, (q, k, v))
