"BrainLM: attention with dropout and in bfloat16 on the processor, and the benchmarks that measure it."

import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fmri_book.brainlm as B
from fmri_book.brainlm import BlockByBlock, block_attention, block_causal, dense_attention


@pytest.fixture
def benchmark(monkeypatch):
    "A benchmark by its name."
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


TINY = SimpleNamespace(layers=2, width=16, parcels=6, frames=60, batch=2, rounds=1, threads=1, cpu_time=True)


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
    for head, rows, keys, _, drawn in B._shares(
        q.detach().flatten(0, 1), k.detach().flatten(0, 1), reads, dropout, seed
    ):
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
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(
        ~block_causal(2, parcels, open_cls), -math.inf
    )
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
    for neighbour in (
        rows[1:] * rows[:-1],
        rows[:, 1:] * rows[:, :-1],
        kept[0, 0, 1:61, 1:61] * kept[1, 0, 1:61, 1:61],
    ):
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


def test_step_compares_models_that_compute_the_same(benchmark):
    step = benchmark("brainlm_step")
    found = step.compare(TINY)
    assert list(found) == ["dense", "original"]
    assert all(loss < 1e-6 and gradient < 1e-5 for loss, gradient in found.values())


def test_step_notices_another_rule(benchmark, monkeypatch):
    step = benchmark("brainlm_step")
    monkeypatch.setattr(
        step, "block_causal", lambda blocks, parcels, leak: block_causal(blocks, parcels, not leak)
    )
    apart = step.compare(TINY)
    assert apart["original"][1] > 1e-3 > apart["dense"][1]


@pytest.mark.parametrize("setting", [("float32", 0.1), ("bfloat16", 0.1)])
def test_step_measures_every_way(benchmark, setting):
    step = benchmark("brainlm_step")
    rows = step.measure(setting, TINY)
    timed = [r["way"] for r in rows if r["what"] == "step, median"]
    assert timed == list(step.names_of(setting[0]))
    assert all(r["value"] > 0 for r in rows)


def test_step_says_which_floor_is_missed(benchmark):
    step = benchmark("brainlm_step")
    row = lambda what, way, value: step.row(what, ("float32", 0.0), way, value, "")
    rows = [
        row("step, median", "blocks", 1.0),
        row("peak memory of two steps", "blocks", 9.0),
        row("peak memory of two steps", "dense", 8.0),
    ]
    assert len(step.missed([*rows, row("blocks: times as fast as", "dense", 1.39)])) == 2
    assert len(step.missed([*rows, row("blocks: times as fast as", "dense", 1.41)])) == 1


FLOORS = {
    ("blocks: times as fast as", "dense"): 1.41,
    ("peak memory of two steps", "blocks"): 8.0,
    ("peak memory of two steps", "dense"): 9.0,
}


@pytest.mark.parametrize("absent", FLOORS)
@pytest.mark.parametrize("instead", [None, "not run: needs more than 9, free 8", math.nan])
def test_step_meets_no_floor_with_a_number_that_is_not_there(benchmark, absent, instead):
    step = benchmark("brainlm_step")
    row = lambda what, way, value: step.row(what, ("float32", 0.0), way, value, "")
    rows = [row("step, median", "blocks", 1.0), *(row(*key, value) for key, value in FLOORS.items())]
    assert step.missed(rows) == []
    rows = [r for r in rows if (r["what"], r["way"]) != absent]
    rows += [] if instead is None else [row(*absent, instead)]
    (bad,) = step.missed(rows)
    assert str("nothing measured" if instead is None else instead) in bad


def test_step_without_any_float32_has_met_nothing(benchmark):
    step = benchmark("brainlm_step")
    assert "float32, found none" in step.missed([])[0]
    assert step.missed([step.row("step, median", ("bfloat16", 0.0), "blocks", 1.0, "s")])


def test_step_says_at_once_that_it_cannot_check_memory_without_measuring_it(benchmark, monkeypatch, capsys):
    step = benchmark("brainlm_step")
    monkeypatch.setattr(sys, "argv", ["brainlm_step.py", "--check", "--no-memory"])
    with pytest.raises(SystemExit):
        step.arguments()
    assert "found --no-memory" in capsys.readouterr().err


def memory_rows(memory, peaks):
    "As the benchmark writes them down, from (way, dropout, frames) -> MiB."
    what = "peak of forward and backward"
    rows = [
        dict(what=what, way=way, attention_dropout=dropout, frames=frames, value=value)
        for (way, dropout, frames), value in peaks.items()
    ]
    return rows + memory.growth(rows)


def test_memory_says_which_floor_is_missed_or_not_measured(benchmark):
    memory = benchmark("brainlm_memory")
    good = {
        (way, dropout, frames): float(frames * (1 if way == "blocks" else frames))
        for way in ("blocks", "dense")
        for dropout in ("0.0", "0.1")
        for frames in (100, 200)
    }
    missed = lambda **changes: memory.missed(memory_rows(memory, good | changes.get("peaks", {})))
    assert missed() == []
    assert missed(peaks={("dense", "0.1", 200): "not run"}) == []  # the shorter window tells
    (bad,) = missed(peaks={("dense", "0.1", frames): "not run" for frames in (100, 200)})
    assert bad.startswith("dropout 0.1: less memory") and bad.endswith("200 and not run")
    (bad,) = missed(peaks={("blocks", "0.0", 200): 400.0})
    assert "found exponent 2.00" in bad
    alone = {key: value for key, value in good.items() if key[2] == 100}
    assert all("nothing measured" in bad for bad in memory.missed(memory_rows(memory, alone)))
    assert len(memory.missed([])) == 4


class Made(TorchDispatchMode):
    "Numbers in the largest tensor that an operation makes, and the masks among them."

    def __init__(self):
        super().__init__()
        self.largest, self.masks = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **kwargs or {})
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.masks = max(self.masks, x.numel() * (x.dtype == torch.bool))
        return found


def made(attend, many, monkeypatch, parcels=20, blocks=8):
    "By one forward and backward."
    monkeypatch.setattr(B, "_MANY", many)
    q, k, v = tokens(batch=1, heads=1, parcels=parcels, blocks=blocks)
    with Made() as found:
        attend(q, k, v, parcels).sum().backward()
    return found


@pytest.mark.parametrize("many", [0, 10**9], ids=["our own", "PyTorch's"])
def test_block_by_block_nothing_as_large_as_a_mask_is_made(many, monkeypatch):
    square = (1 + 20 * 8) ** 2
    assert made(dense_attention, many, monkeypatch).masks == square
    found = made(block_attention, many, monkeypatch)
    assert found.masks == 0 and found.largest < square / 4


def test_mask_memory_grows_with_the_square_or_not_at_all(benchmark, monkeypatch):
    size = benchmark("brainlm_memory").mask_bytes
    assert size("blocks", 50, 40) == 0
    with monkeypatch.context() as patched:  # one mask among the pieces would be counted
        patched.setattr(B, "_reads", lambda *_: [(slice(0, 1), torch.ones(7, dtype=torch.bool))])
        assert size("blocks", 50, 40) == 7
    assert size("dense, bool", 10, 4) == 41**2
    assert size("dense, float32", 10, 4) == 4 * 41**2
    assert 0 < size("flex", 50, 40) < size("dense, bool", 50, 40) / 100


def test_gpu_benchmark_goes_through_on_a_processor_and_says_when_there_is_no_gpu(
    benchmark, monkeypatch, tmp_path, capsys
):
    gpu, table = benchmark("brainlm_gpu"), tmp_path / "table.csv"
    small = [
        "--device",
        "cpu",
        "--parcels",
        "4",
        "--frames",
        "40",
        "60",
        "--rounds",
        "1",
        "--layers",
        "1",
        "--batch",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["brainlm_gpu.py", *small, "--table", str(table)])
    rows = gpu.main()
    assert {r["way"] for r in rows} == {"flex", "blocks", "dense"}
    assert {r["frames"] for r in rows if r["what"] == "mask"} == {40, 60}
    assert "no GPU" in table.read_text().splitlines()[0]
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["brainlm_gpu.py", "--table", str(tmp_path / "none.csv")])
        assert gpu.main() == [] and not (tmp_path / "none.csv").exists()
        assert "nothing measured" in capsys.readouterr().out


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real sessions, which are no part of this repository")
def test_real_sessions_from_the_file_to_the_table(tmp_path):
    "A part of them, two steps of each training: people are kept apart, and everything that is promised is in the table."
    with np.load(SHARED / "tbi_ds000220" / "tbi_schaefer1000_60sessions.npz") as file:
        some = {k: file[k][:40] for k in sorted(file.files) if k.split("_")[0][-2:] in ("01", "02", "03", "04")}
    np.savez(tmp_path / "some.npz", **some)
    centroids = SHARED / "atlases" / "Schaefer2018_1000Parcels_7Networks_order_FSLMNI152_2mm.Centroid_RAS.csv"
    script = Path(__file__).parents[1] / "benchmarks" / "brainlm_tbi.py"
    asked = dict(data=tmp_path / "some.npz", coordinates=centroids, seeds=0, steps=2, tuned=2, work=tmp_path / "work")
    asked |= {"table": tmp_path / "table.csv"}
    command = [sys.executable, str(script), *(str(x) for k, v in asked.items() for x in (f"--{k}", v))]
    model = ["--model", "hidden_size=16", "num_hidden_layers=1", "intermediate_size=16"]
    (tmp_path / "work").mkdir()
    done = subprocess.run([*command, *model], capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "table.csv").set_index(["what", "rival"])
    for what, rivals in {
        "R², held out, random": ("BrainLM", "straight lines", "linear rule from visible parcels"),
        "fingerprint, held-out people": ("connectivity", "CLS", "mean of tokens", "connectivity of tokens"),
        "group, held-out people, auc": ("BrainLM, probe", "BrainLM, full", "connectivity", "trivial"),
    }.items():
        for rival in rivals:
            assert np.isfinite(table.value[what, rival])
    parts = pd.read_csv(tmp_path / "work" / "pretrained0" / "recordings.csv", dtype=str).groupby("subject").part
    assert parts.nunique().max() == 1 and set(parts.first()) == {"train", "held out"}
    assert len(parts) == len({k.split("_")[0] for k in some})
    tuned = pd.read_csv(tmp_path / "work" / "full0" / "predictions" / "held-out.csv", dtype=str)
    assert set(tuned.subject) == set(parts.first().index[parts.first() == "held out"])
