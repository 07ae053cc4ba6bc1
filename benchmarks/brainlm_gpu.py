"""BrainLM's attention on a GPU, three ways: FlexAttention, block by block, and a dense boolean mask. In one run.

    python benchmarks/brainlm_gpu.py [--frames 100 200 400 800] [--table results/brainlm_gpu.csv]

Nobody has run it yet on a GPU: none was at hand when it was written. `--device cpu --parcels 12 --frames 40 80 --rounds 2` goes through
the same code on a processor (FlexAttention has no gradient there, so only its forward); such numbers say nothing about a GPU.

First, for the shortest window in float32 (TF32 off): context and gradients of each way must agree with a dense mask in float64. Then
forward and backward of attention (424 parcels, patches of 20, 8 heads of 32) in bfloat16 for growing windows, and a training step of the
default model (8 layers, 424 × 200, bfloat16 autocast, fused AdamW, no attention dropout). The ways take turns; seconds are medians of
rounds between two synchronisations; memory is the peak that PyTorch allocated. The mask of FlexAttention is made, and its kernel
compiled, in rounds that do not count; what the mask holds is counted for itself. A way that runs out of memory gets a row that says so.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from brainlm_memory import mask_bytes
from brainlm_step import make_model, simulated_batch
from mae_step import device as processor
from mae_step import write_rows
from torch import Tensor

from fmri_book import brainlm
from fmri_book.training import parameter_groups

PATCH, HEADS, WIDTH = 20, 8, 32
WAYS = {"flex": brainlm.flex_attention, "blocks": brainlm.block_attention, "dense": brainlm.dense_attention}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_since(device: str, run: Callable[[], object]) -> float | str:  # MiB
    "What PyTorch allocates at most while it runs, less what it held before."
    if device != "cuda":
        run()
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def has_gradient(way: str, device: str) -> bool:
    return device == "cuda" or way != "flex"


def inputs(options: argparse.Namespace, frames: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (options.batch, HEADS, 1 + options.parcels * frames // PATCH, WIDTH)
    return [torch.randn(shape).to(options.device, dtype).requires_grad_() for _ in range(3)]


def compare(options: argparse.Namespace) -> list[dict]:
    "Relative differences from a dense mask in float64; raises where one is larger than float32 explains."
    torch.backends.cuda.matmul.allow_tf32 = False
    frames, rows = min(options.frames), []
    x = inputs(options, frames, torch.float32)
    weight = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1)).to(options.device)

    def values(attend: Callable, given: list[Tensor], gradients: bool) -> list[Tensor]:
        out = attend(*(given if gradients else [y.detach() for y in given]), options.parcels)
        return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), given)] if gradients else [out]

    exact = values(brainlm.dense_attention, [y.detach().double().requires_grad_() for y in x], True)
    for way, attend in WAYS.items():
        found = values(attend, x, has_gradient(way, options.device))
        apart = max(((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=False))
        what = "context and gradients" if len(found) > 1 else "context"
        print(f"{way}: {what} {apart:.1e} from float64")
        if not apart < 1e-4:
            raise SystemExit(f"{way}: expected {what} within 1e-4 of a dense mask in float64, found {apart:.1e}")
        rows.append(row(f"relative difference of {what}", way, frames, options, apart, ""))
    return rows


def row(what: str, way: str, frames: int, options: argparse.Namespace, value: float | str, unit: str, low: float | str = "", high: float | str = "") -> dict:
    tokens = 1 + options.parcels * frames // PATCH
    return dict(what=what, way=way, frames=frames, tokens=tokens, batch=options.batch, value=value, unit=unit, low=low, high=high)


def take_turns(runs: dict[str, Callable[[], object]], what: str, frames: int, options: argparse.Namespace) -> list[dict]:
    "Medians and peaks of each way, in turns."
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    memory: dict[str, float | str] = {}
    failed: set[str] = set()
    for turn in range(options.rounds + 2):  # two to warm up and compile; the second tells the memory
        for way, run in runs.items():
            if way in failed:
                continue
            try:
                if turn == 1:
                    memory[way] = peak_since(options.device, run)
                    continue
                wait(options.device)
                start = time.perf_counter()
                run()
                wait(options.device)
            except torch.OutOfMemoryError:
                failed.add(way)
                torch.cuda.empty_cache()
                continue
            if turn > 1:
                seconds[way].append(time.perf_counter() - start)
    rows = []
    for way, each in seconds.items():
        value: float | str = "out of memory" if way in failed else float(np.median(each))
        span = ("", "") if way in failed else (min(each), max(each))
        rows.append(row(f"{what}, seconds", way, frames, options, value, "s", *span))
        rows.append(row(f"{what}, peak memory", way, frames, options, "out of memory" if way in failed else memory[way], "MiB"))
    return rows


def attention_rows(frames: int, options: argparse.Namespace) -> list[dict]:
    x = inputs(options, frames, torch.bfloat16)

    def run_of(way: str) -> Callable[[], object]:
        def run() -> None:
            gradient = has_gradient(way, options.device)
            out = WAYS[way](*(x if gradient else [y.detach() for y in x]), options.parcels)
            if gradient:
                torch.autograd.grad(out.float().square().sum(), x)

        return run

    rows = take_turns({way: run_of(way) for way in WAYS}, "attention, forward and backward", frames, options)
    rule = brainlm._flex_mask(x[0].shape[2], options.parcels, False, str(x[0].device))
    held = {"flex": sum(t.nbytes for t in rule.as_tuple() if isinstance(t, Tensor))}
    held |= {way: mask_bytes(name, options.parcels, frames // PATCH) for way, name in (("blocks", "blocks"), ("dense", "dense, bool"))}
    return rows + [row("mask", way, frames, options, size / 2**20, "MiB") for way, size in held.items()]


def step_rows(frames: int, options: argparse.Namespace) -> list[dict]:
    shape = SimpleNamespace(layers=options.layers, width=256, parcels=options.parcels, frames=frames, batch=options.batch)
    model = make_model(shape).to(options.device).train()
    model.config.attention_probs_dropout_prob = 0.0
    batch = [x.to(options.device) for x in simulated_batch(0, shape)]
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, fused=True)

    def run_of(way: str) -> Callable[[], object]:
        def run() -> None:
            model.config.attention = way
            with torch.autocast(options.device, torch.bfloat16):
                loss = model(*batch).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return run

    return take_turns({way: run_of(way) for way in WAYS if has_gradient(way, options.device)}, "training step", frames, options)


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 200, 400, 800])
    parser.add_argument("--parcels", type=int, default=424)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", type=Path, help="write the numbers to this CSV file, too")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU on this machine: nothing measured, nothing written. Run the same command where torch sees one.")
        return []
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"{processor()} (no GPU)"
    where = f"{card}; Python {platform.python_version()}, torch {torch.__version__}"
    print(where)
    rows = compare(options)
    for frames in options.frames:
        rows += attention_rows(frames, options)
    rows += step_rows(200 if 200 in options.frames else max(options.frames), options)
    for r in rows:
        print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()))
    if options.table:
        setting = f"{options.parcels} parcels, patch {PATCH}, {HEADS} heads of {WIDTH}, attention in bfloat16; step: {options.layers} layers, width 256, bfloat16 autocast, no attention dropout"
        write_rows(options.table, rows, f"command: {shlex.join(['python', *sys.argv])}", where, setting)
    return rows


if __name__ == "__main__":
    main()
