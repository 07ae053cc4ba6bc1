"""One training step of BrainLM's decoder-only model on the processor: attention block by block against two ways with a mask.

    python benchmarks/brainlm_step.py --threads 2 --rounds 5 --table results/brainlm_step.csv --check

The default size: 424 parcels × 200 frames, patches of 20 (4,241 tokens), 8 layers, width 256, 8 heads; simulated signals. A step is
forward, backward and AdamW (fused). The ways have the same weights and see the same signals and masks; they differ in the attention:

- blocks: `attention="blocks"`, no mask at all;
- dense: `attention="dense"`, a boolean mask given to PyTorch's scaled_dot_product_attention, of the same model;
- original: the arithmetic of the published code, written anew: a float32 mask of 0 and -inf added to the scores, softmax, dropout,
  a product; the mask is made once and shared by the layers.

Settings: attention dropout 0 and 0.1 (as published), float32 and bfloat16 (autocast; not the original way). Before anything is timed,
loss and gradients are compared in float32 without attention dropout; what dropout draws is tested in tests/test_benchmarks_brainlm.py.

The ways take turns, step by step; the ratio is the median over the rounds of the ratios, its interval a bootstrap over the rounds.
`--cpu-time` measures processor seconds of one thread, which neighbours on a shared machine disturb less. Memory is the peak of a
process of its own over two steps, less what it held after its imports; a way for which less is free than it will need is not run,
and the table says so. `--check` fails if blocks are less than 1.4 times as fast as dense, or take as much memory, in float32, and also
if one of these numbers was not measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mae_step import device, ratio, status, write_rows
from torch import Tensor

from fmri_book.brainlm import BrainLMConfig, BrainLMForPretraining, block_causal, draw_mask
from fmri_book.training import parameter_groups

WAYS = ("blocks", "dense", "original")
SETTINGS = (("float32", 0.0), ("float32", 0.1), ("bfloat16", 0.0), ("bfloat16", 0.1))


class Original:
    "Attention as published: scores of all pairs, a float32 mask added, softmax, dropout."

    def __init__(self, dropout: float):
        self.dropout, self.added = dropout, torch.empty(0, 0)

    def __call__(self, attention: torch.nn.Module, x: Tensor, parcels: int) -> Tensor:
        q, k, v = attention.project(x)
        if len(self.added) != q.shape[2]:
            allowed = block_causal((q.shape[2] - 1) // parcels, parcels, attention.config.open_cls)
            self.added = torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.added
        shares = torch.nn.functional.dropout(scores.softmax(-1), self.dropout, attention.training)
        return (shares @ v).transpose(1, 2).flatten(2)


class Way:
    "A model that trains."

    def __init__(self, model: BrainLMForPretraining, name: str, precision: str, dropout: float):
        self.model, self.low = deepcopy(model).train(), precision == "bfloat16"
        self.model.config.attention = "dense" if name == "dense" else "blocks"
        self.model.config.attention_probs_dropout_prob = dropout
        if name == "original":
            attend = Original(dropout)
            for layer in self.model.model.layers:
                layer.attention.forward = partial(attend, layer.attention)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.model, 0.05), lr=1e-4, fused=True)

    def loss(self, signal: Tensor, xyz: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return self.model(signal, xyz, mask).loss

    def step(self, *batch: Tensor) -> float:
        loss = self.loss(*batch)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


def make_model(options: argparse.Namespace) -> BrainLMForPretraining:
    torch.manual_seed(0)
    small = {} if options.width == 256 else dict(hidden_size=options.width, intermediate_size=4 * options.width)
    return BrainLMForPretraining(BrainLMConfig(num_hidden_layers=options.layers, num_timepoints_per_voxel=options.frames, **small))


def simulated_batch(seed: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    "Signals (B, V, T), slow and noisy, SD 1; coordinates (V, 3) mm; hidden tokens (B, V, N)."
    chance = torch.Generator().manual_seed(seed)
    signal = torch.randn(options.batch, options.parcels, options.frames, generator=chance)
    signal = signal + signal.roll(1, -1) + signal.roll(2, -1)
    signal = (signal - signal.mean(-1, keepdim=True)) / signal.std(-1, keepdim=True)
    mask = draw_mask(options.batch, options.parcels, options.frames // 20, generator=chance)
    return signal, torch.randn(options.parcels, 3, generator=chance) * 40, mask


def compare(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    "For dense and original: relative difference to blocks of the loss, and of the gradients as one vector (float32, no attention dropout)."
    model, found = make_model(options), {}
    for name in WAYS:
        way = Way(model, name, "float32", 0.0)
        torch.manual_seed(1)  # the dropout of the embedding
        loss = way.loss(*simulated_batch(10_000, options))
        loss.backward()
        found[name] = loss.item(), torch.cat([p.grad.double().flatten() for p in way.model.parameters()])
    (loss, gradient), rest = found.pop("blocks"), found
    return {name: (abs(a - loss) / loss, ((g - gradient).norm() / gradient.norm()).item()) for name, (a, g) in rest.items()}


def names_of(precision: str) -> tuple[str, ...]:
    return WAYS if precision == "float32" else WAYS[:2]


def take_turns(ways: dict[str, Way], options: argparse.Namespace, clock: Callable[[], float]) -> tuple[dict, dict]:
    "Seconds and losses of every step of every way, after one to warm up."
    seconds, losses = ({name: [] for name in ways} for _ in range(2))
    names = list(ways)
    for turn in range(options.rounds + 1):
        batch = simulated_batch(turn, options)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            losses[name].append(ways[name].step(*batch))
            if turn:
                seconds[name].append(clock() - start)
    return seconds, losses


def needed(name: str, precision: str, dropout: float, options: argparse.Namespace) -> float:  # MiB
    "What a step will hold at least: of ways that keep the scores, layer by layer."
    tokens = 1 + options.parcels * options.frames // 20
    kept = 0 if name == "blocks" else (1 + 2 * bool(dropout)) if name == "original" else 3 * bool(dropout)
    return options.batch * options.layers * 8 * tokens**2 * kept * (4 if precision == "float32" else 2) / 2**20


def available() -> float:  # MiB
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))


def measure_memory(name: str, precision: str, dropout: float, options: argparse.Namespace) -> None:
    "In a process of its own: two steps of one way."
    before = status("VmRSS")
    way = Way(make_model(options), name, precision, dropout)
    for turn in range(2):
        way.step(*simulated_batch(turn, options))
    print(status("VmHWM") - before)


def row(what: str, setting: tuple[str, float], way: str, value: float | str, unit: str, low: float | str = "", high: float | str = "", rounds: int | str = "") -> dict:
    load = " ".join(f"{x:.1f}" for x in os.getloadavg()[:2])
    return dict(what=what, precision=setting[0], attention_dropout=str(setting[1]), way=way, value=value, unit=unit, low=low, high=high, rounds=rounds, load_1_and_5_min=load)


def memory_rows(setting: tuple[str, float], options: argparse.Namespace) -> list[dict]:
    rows = []
    for name in names_of(setting[0]):
        if (need := needed(name, *setting, options)) > 0.9 * available():
            rows.append(row("peak memory of two steps", setting, name, f"not run: needs more than {need:.0f}, free {available():.0f}", "MiB"))
            continue
        command = [sys.executable, __file__, "--memory", name, setting[0], str(setting[1])]
        for field in ("layers", "parcels", "frames", "batch", "width", "threads"):
            command += [f"--{field}", str(getattr(options, field))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(row("peak memory of two steps", setting, name, float(done.stdout.split()[-1]), "MiB"))
    return rows


def measure(setting: tuple[str, float], options: argparse.Namespace) -> list[dict]:
    model, rows = make_model(options), []
    ways = {name: Way(model, name, *setting) for name in names_of(setting[0]) if needed(name, *setting, options) < 0.9 * available()}
    clock = time.process_time if options.cpu_time else time.perf_counter
    unit = "processor s, one thread" if options.cpu_time else f"s, {options.threads} threads"
    seconds, losses = take_turns(ways, options, clock)
    for name, each in seconds.items():
        rows.append(row("step, median", setting, name, float(np.median(each)), unit, min(each), max(each), len(each)))
        print(f"{setting[0]}, dropout {setting[1]}, {name:<9}" + " ".join(f"{x:.4f}" for x in losses[name]), flush=True)
    for name in [name for name in ways if name != "blocks"]:
        middle, *span = ratio(seconds[name], seconds["blocks"])
        span = span if options.rounds > 2 else ("", "")  # one or two rounds have no spread
        rows.append(row("blocks: times as fast as", setting, name, middle, "", *span, options.rounds))
    return rows


def missed(rows: list[dict]) -> list[str]:
    "What does not meet the floors. A number that is not there meets none."
    value = {(r["what"], r["precision"], r["attention_dropout"], r["way"]): r["value"] for r in rows}
    dropouts = sorted({r["attention_dropout"] for r in rows if r["what"] == "step, median" and r["precision"] == "float32"})
    bad = [] if dropouts else ["steps in float32, found none measured (--settings float32:0.0)"]
    for dropout in dropouts:
        speed = value.get(("blocks: times as fast as", "float32", dropout, "dense"))
        if not at_least(speed, 1.4):
            bad.append(f"dropout {dropout}: blocks 1.4 times as fast as dense, found {told(speed, '.2f')}")
        ours, theirs = (value.get(("peak memory of two steps", "float32", dropout, way)) for way in ("blocks", "dense"))
        if not less(ours, theirs):
            bad.append(f"dropout {dropout}: less memory than dense (MiB), found {told(ours)} and {told(theirs)}")
    return bad


def at_least(value: object, floor: float) -> bool:
    return isinstance(value, float) and value >= floor


def less(ours: object, theirs: object) -> bool:
    return isinstance(ours, float) and isinstance(theirs, float) and ours < theirs


def told(value: object, digits: str = ".0f") -> str:
    "A number, or why there is none."
    return format(value, digits) if isinstance(value, float) else str(value or "nothing measured")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--parcels", type=int, default=424)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--settings", nargs="+", default=[f"{p}:{d}" for p, d in SETTINGS], help="precision:attention dropout")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds of one thread")
    parser.add_argument("--table", type=Path, help="write the numbers to this CSV file, too")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--check", action="store_true", help="fail if a floor is missed")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.threads = 1 if options.cpu_time else options.threads
    if options.check and options.no_memory:  # said before anything takes minutes
        parser.error("expected --check with memory, which it is about, too; found --no-memory: leave one of them out")
    return options


def main() -> list[dict]:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.memory:
        name, precision, dropout = options.memory
        measure_memory(name, precision, float(dropout), options)
        return []
    where = f"{device()}; Python {platform.python_version()}, torch {torch.__version__}"
    print(where)
    rows = []
    for name, (loss, gradient) in compare(options).items():
        rows.append(row("relative difference of loss", ("float32", 0.0), f"{name} and blocks", loss, ""))
        rows.append(row("relative difference of gradients", ("float32", 0.0), f"{name} and blocks", gradient, ""))
        if loss > 1e-5 or gradient > 1e-4:
            raise SystemExit(f"expected the same loss and gradients from blocks and {name}, found them {loss:.1e} and {gradient:.1e} apart")
    for text in options.settings:
        precision, dropout = text.split(":")
        rows += measure((precision, float(dropout)), options)
        rows += [] if options.no_memory else memory_rows((precision, float(dropout)), options)
    for r in rows:
        span = f"[{r['low']:.3g}, {r['high']:.3g}]" if r["low"] != "" else ""
        shown = f"{r['value']:.4g}" if isinstance(r["value"], float) else r["value"]
        print(f"{r['what']:<34}{r['precision']:<10}{r['attention_dropout']:<5}{r['way']:<20}{shown:>10} {r['unit']:<24}{span:<16}{r['rounds']:>3}  load {r['load_1_and_5_min']}")
    if options.table:
        setting = f"simulated signals, batch {options.batch}, {options.parcels} parcels × {options.frames} frames, patch 20, {options.layers} layer(s), width {options.width}, seed 0"
        write_rows(options.table, rows, f"command: {shlex.join(['python', *sys.argv])}", where, setting)
    if options.check and (bad := missed(rows)):
        raise SystemExit(f"expected {'; '.join(bad)}: not met")
    return rows


if __name__ == "__main__":
    main()
