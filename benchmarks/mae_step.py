"""One training step of the masked autoencoder on the processor: this book against the installable peer `cortex_mae` 0.1.1.

    python -m pip install --no-deps --target _build/peer cortex_mae==0.1.1 jaxtyping wadler-lindig
    python benchmarks/mae_step.py [--peer _build/peer] [--models small base] [--table results/mae_step.csv] [--check]

A step is forward, backward and AdamW on 4 clips of 16 frames of 224 × 560 pixels (simulated: smooth patterns and noise inside
a mask of 77,763 pixels), patches of 16 × 16 × 4, tubes of 90 % hidden, every other frame predicted (t_pred_stride 2), on all
cores. Both sides start from the same weights and see the same clips and masks. Before anything is timed, loss and gradients
are compared in float32.

- float32: both as they come;
- bfloat16: the peer under torch.autocast, as it trains; the book as its training loop does with precision "bf16-pure": float32
  weights belong to the optimiser, a bfloat16 copy computes and is refreshed once a step.

The ways take turns, step by step, so that whatever else the machine does hits all of them alike; the ratio is the median over
the rounds, its interval a bootstrap over the rounds. Every timed step trains, so the losses along the way are the curves that
are compared. `--cpu-time` measures processor seconds of one thread, which neighbours on a shared machine disturb less. Memory
is the peak of a process of its own over two steps, less what it held after its imports.

The peer's package fetches files when it is imported; only its models, masks and utilities are loaded here, which need no network.
`--check` fails if float32 is slower or takes more memory than the peer, or bfloat16 less than 1.2 times as fast.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import os
import platform
import shlex
import subprocess
import sys
import time
import types
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmri_book.mae import SIZES, PatchGrid, random_masks
from fmri_book.training import parameter_groups

HEIGHT, WIDTH, PIXELS, FRAMES, BATCH = 224, 560, 77763, 16, 4
SETTING = dict(img_size=(HEIGHT, WIDTH), patch_size=16, in_chans=1, num_frames=FRAMES, t_patch_size=4, t_pred_stride=2, pos_embed="sep")
OPTIMISER = dict(lr=1e-3, betas=(0.9, 0.95))
WAYS = ("peer float32", "book float32", "peer bfloat16", "book bfloat16")


def load_peer(folder: str | Path) -> types.SimpleNamespace | None:
    "Models, masks and utilities of the peer; None if it is not in the folder."
    home = Path(folder).resolve() / "cortex_mae"
    if not (home / "models_mae.py").exists():
        return None
    if str(home.parent) not in sys.path:
        sys.path.append(str(home.parent))  # last: it replaces nothing that is installed
    package = types.ModuleType("cortex_mae")
    package.__path__ = [str(home)]
    sys.modules.setdefault("cortex_mae", package)  # without its __init__, which reaches for the network
    names = ("models_mae", "masking", "utils")
    return types.SimpleNamespace(**{name: importlib.import_module(f"cortex_mae.{name}") for name in names})


def simulated_mask(height: int = HEIGHT, width: int = WIDTH, pixels: int = PIXELS) -> Tensor:  # (H, W) bool
    "Two round hemispheres."
    y, x = np.mgrid[:height, :width]
    y, x = y / height - 0.5, x / width
    distance = np.minimum(np.hypot((x - 0.24) * 2.07, y), np.hypot((x - 0.76) * 2.07, y))
    mask = np.zeros(height * width, bool)
    mask[np.argsort(distance.ravel(), kind="stable")[:pixels]] = True
    return torch.from_numpy(mask.reshape(height, width))


def simulated_batch(seed: int, grid: PatchGrid, mask: Tensor, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    "Clips (B, 1, T, H, W), frames of mean 0 and SD 1 inside the mask; visible patches (B, patches)."
    chance = torch.Generator().manual_seed(seed)
    frames, *size = grid.image
    patterns = F.interpolate(torch.randn(8, 1, 7, 14, generator=torch.Generator().manual_seed(0)), size=size, mode="bicubic")[:, 0]
    weights = torch.randn(batch, frames, 8, generator=chance).cumsum(1)  # slow in time
    images = torch.einsum("btn,nhw->bthw", weights, patterns) + 0.5 * torch.randn(batch, frames, *size, generator=chance)
    inside = images[..., mask]
    images[..., mask] = (inside - inside.mean(-1, keepdim=True)) / inside.std(-1, keepdim=True)
    return (images * mask)[:, None], random_masks("tube", 0.9, grid, mask, batch, chance)


class Peer:
    "A step as the peer's training loop makes it."

    def __init__(self, model: nn.Module, grid: PatchGrid, mask: Tensor, peer: types.SimpleNamespace, low: bool = False):
        self.model, self.grid, self.mask, self.low = model, grid, mask.float(), low
        groups = peer.utils.get_param_groups(model)
        peer.utils.update_wd(groups, 0.05)
        self.optimiser = torch.optim.AdamW(groups, **OPTIMISER)

    def loss(self, images: Tensor, visible: Tensor) -> Tensor:
        "With masks as large as the images, as its loader makes them."
        (t, h, w), (_, high, wide) = self.grid.shape, self.grid.patch
        seen = visible.view(-1, 1, t, h, w)[:, :, :1].float().repeat_interleave(high, 3).repeat_interleave(wide, 4)
        return self.loss_on(images, self.mask.expand(len(images), 1, 1, *self.mask.shape), seen)

    def loss_on(self, images: Tensor, inside: Tensor, seen: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return self.model(images, img_mask=inside, visible_mask=seen, mask_ratio=None, with_state=False)

    def step(self, images: Tensor, visible: Tensor) -> float:
        return self.update(self.loss(images, visible))

    def step_on(self, images: Tensor, inside: Tensor, seen: Tensor) -> float:
        return self.update(self.loss_on(images, inside, seen))

    def update(self, loss: Tensor) -> float:
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


class Book:
    "A step as `fmri_book.training` makes it, in float32 or with a bfloat16 copy of the weights."

    def __init__(self, model: nn.Module, mask: Tensor, low: bool = False):
        self.model, self.mask, self.low = model, mask, low
        self.worker = deepcopy(model).bfloat16() if low else model
        self.optimiser = torch.optim.AdamW(parameter_groups(model, 0.05), fused=True, **OPTIMISER)

    def loss(self, images: Tensor, visible: Tensor) -> Tensor:
        return self.worker(images, self.mask, visible, mask_ratio=None).loss

    def step(self, images: Tensor, visible: Tensor) -> float:
        loss = self.loss(images, visible)
        loss.backward()
        if self.low:
            for p, copy in zip(self.model.parameters(), self.worker.parameters(), strict=True):
                p.grad, copy.grad = copy.grad.float(), None
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.low:
            with torch.no_grad():
                torch._foreach_copy_(list(self.worker.parameters()), list(self.model.parameters()))
        return loss.item()


def make_ways(size: str, peer: types.SimpleNamespace, names: tuple[str, ...] = WAYS, **changes) -> tuple[dict, PatchGrid, Tensor]:
    "The ways by name, all with the same weights."
    setting = SETTING | changes
    torch.manual_seed(0)
    ours = SIZES[f"mae_vit_{size}"](**setting)
    share = PIXELS / (HEIGHT * WIDTH)
    height, width = setting["img_size"]
    mask = simulated_mask(height, width, round(share * height * width))
    made = {}
    for name in names:
        low = name.endswith("bfloat16")
        if name.startswith("book"):
            made[name] = Book(deepcopy(ours), mask, low)
        else:
            theirs = getattr(peer.models_mae, f"mae_vit_{size}")(**setting)
            theirs.load_state_dict(ours.state_dict())
            made[name] = Peer(theirs, ours.grid, mask, peer, low)
    return made, ours.grid, mask


def compare(ways: dict, grid: PatchGrid, mask: Tensor) -> tuple[float, float]:
    "Relative difference of the loss, and of the gradients as one vector, between book and peer in float32."
    losses, gradients = {}, {}
    for name in ("peer float32", "book float32"):
        model = ways[name].model
        loss = ways[name].loss(*simulated_batch(10_000, grid, mask))
        loss.backward()
        losses[name], gradients[name] = loss.item(), {k: p.grad for k, p in model.named_parameters()}
        model.zero_grad()
    (a, b), (g, h) = losses.values(), gradients.values()
    if g.keys() != h.keys():
        raise SystemExit(f"expected gradients of the same parameters, found {sorted(g.keys() ^ h.keys())}")
    apart = sum((g[k] - h[k]).double().square().sum() for k in g).sqrt()
    return abs(a - b) / a, (apart / sum(x.double().square().sum() for x in g.values()).sqrt()).item()


def take_turns(ways: dict, grid: PatchGrid, mask: Tensor, rounds: dict[str, int], clock: Callable[[], float]) -> tuple[dict, dict]:
    "Seconds and losses of every step of every way; `rounds` of each after one to warm up."
    seconds, losses = ({name: [] for name in ways} for _ in range(2))
    for turn in range(max(rounds.values()) + 1):
        batch = simulated_batch(turn, grid, mask)
        now = [name for name in ways if turn <= rounds[name]]
        for name in now[turn % len(now) :] + now[: turn % len(now)]:
            start = clock()
            losses[name].append(ways[name].step(*batch))
            if turn:
                seconds[name].append(clock() - start)
    return seconds, losses


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    "Median over the rounds of slow / fast, and the 2.5 and 97.5 % points of its bootstrap."
    each = np.divide(slow[: len(fast)], fast[: len(slow)])
    drawn = np.random.default_rng(0).choice(each, (10_000, len(each)))
    return float(np.median(each)), *np.percentile(np.median(drawn, 1), [2.5, 97.5]).tolist()


def status(name: str) -> float:  # MB
    "VmRSS (memory held now) or VmHWM (its peak) of this process."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def measure_memory(size: str, name: str, peer: types.SimpleNamespace) -> None:
    "In a process of its own: two steps of one way."
    before = status("VmRSS")
    ways, grid, mask = make_ways(size, peer, (name,))
    for turn in range(2):
        ways[name].step(*simulated_batch(turn, grid, mask))
    print(status("VmHWM") - before)


def memory_rows(size: str, folder: str) -> list[dict]:
    rows = []
    for name in WAYS:
        command = [sys.executable, __file__, "--peer", folder, "--models", size, "--memory", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(row("peak memory of two steps", size, name, float(done.stdout.split()[-1]), "MB"))
    return rows


def row(what: str, model: str, way: str, value: float, unit: str, low: float | str = "", high: float | str = "", rounds: int | str = "") -> dict:
    load = " ".join(f"{x:.1f}" for x in os.getloadavg()[:2])
    return dict(what=what, model=f"ViT-{model[0].upper()}", way=way, value=value, unit=unit, low=low, high=high, rounds=rounds, load_1_and_5_min=load)


def measure(size: str, peer: types.SimpleNamespace, options: argparse.Namespace) -> list[dict]:
    ways, grid, mask = make_ways(size, peer)
    loss, gradient = compare(ways, grid, mask)
    print(f"ViT-{size}: float32 loss {loss:.1e} apart, gradients {gradient:.1e}")
    if loss > 1e-5 or gradient > 1e-4:
        raise SystemExit("expected the same loss and gradients from both, found different ones")
    rows = [row("relative difference of loss", size, "book and peer float32", loss, ""), row("relative difference of gradients", size, "book and peer float32", gradient, "")]
    clock = time.process_time if options.cpu_time else time.perf_counter
    n = options.rounds if size == "small" else min(3, options.rounds)
    longer = max(n, options.curve) if size == "small" else n
    rounds = {name: longer if name.endswith("bfloat16") else n for name in WAYS}
    seconds, losses = take_turns(ways, grid, mask, rounds, clock)
    unit = "processor s, one thread" if options.cpu_time else f"s, {torch.get_num_threads()} threads"
    for name, each in seconds.items():
        rows.append(row("step, median", size, name, float(np.median(each)), unit, min(each), max(each), len(each)))
    for kind in ("float32", "bfloat16"):
        slow, fast = seconds[f"peer {kind}"], seconds[f"book {kind}"]
        rows.append(row("times as fast as the peer", size, kind, *(x := ratio(slow, fast))[:1], "", *x[1:], len(fast)))
        apart = np.abs(np.subtract(losses[f"peer {kind}"], losses[f"book {kind}"]))
        rows.append(row("loss curves, largest difference", size, kind, float(apart.max()), "", "", "", len(apart)))
    apart = np.abs(np.subtract(losses["peer float32"], losses["peer bfloat16"][: n + 1]))
    rows.append(row("loss curves, largest difference", size, "peer bfloat16 to its float32", float(apart.max()), "", "", "", n + 1))
    for name, each in losses.items():
        print(f"{name:<15}" + " ".join(f"{x:.4f}" for x in each))
    return rows


def missed(rows: list[dict]) -> list[str]:
    "What does not meet the floors."
    value = {(r["what"], r["model"], r["way"]): r["value"] for r in rows}
    bad = []
    for model in sorted({r["model"] for r in rows}):
        if value["times as fast as the peer", model, "float32"] < 1:
            bad.append(f"{model} in float32 at least as fast as the peer")
        if value["times as fast as the peer", model, "bfloat16"] < 1.2:
            bad.append(f"{model} in bfloat16 at 1.2 times the peer")
        ours, theirs = (value.get(("peak memory of two steps", model, f"{who} float32"), 0) for who in ("book", "peer"))
        if ours > theirs:
            bad.append(f"{model} in float32 with no more memory than the peer")
    return bad


def device() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def write_rows(path: Path, rows: list[dict], command: str, where: str, setting: str, append: bool = False) -> None:
    "CSV with a first line that tells how the numbers came about."
    path.parent.mkdir(parents=True, exist_ok=True)
    more = append and path.exists()
    with path.open("a" if more else "w", newline="") as file:
        file.write(f"# {command} | date: {datetime.date.today()} | device: {where} | {setting}\n")
        table = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if not more:
            table.writeheader()
        table.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="_build/peer", help="folder with the installed peer")
    parser.add_argument("--models", nargs="+", default=["small", "base"], choices=["small", "base"])
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each way (ViT-B: at most 3)")
    parser.add_argument("--curve", type=int, default=30, help="steps of the bfloat16 loss curves (ViT-S)")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds of one thread")
    parser.add_argument("--table", type=Path, help="write the numbers to this CSV file, too")
    parser.add_argument("--append", action="store_true", help="add to the file what this run measures")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--check", action="store_true", help="fail if a floor is missed")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (peer := load_peer(options.peer)) is None:
        raise SystemExit(f"{options.peer}: expected the peer there, found none; install it as said in --help")
    if options.memory:
        measure_memory(options.models[0], options.memory, peer)
        return []
    if options.cpu_time:
        torch.set_num_threads(1)
    where = f"{device()}; Python {platform.python_version()}, torch {torch.__version__}"
    print(where)
    rows = []
    for size in options.models:
        rows += measure(size, peer, options)
        rows += [] if options.no_memory else memory_rows(size, options.peer)
    for r in rows:
        span = f"[{r['low']:.3g}, {r['high']:.3g}]" if r["low"] != "" else ""
        print(f"{r['model']:<7}{r['what']:<36}{r['way']:<30}{r['value']:>10.4g} {r['unit']:<24}{span:<18}{r['rounds']:>4}  load {r['load_1_and_5_min']}")
    if options.table:
        setting = "simulated clips, batch 4, 224 × 560 × 16, patch 16 × 16 × 4, tubes 0.9, t_pred_stride 2, seed 0; the published preset but for the batch"
        write_rows(options.table, rows, f"command: {shlex.join(['python', *sys.argv])}", where, setting, options.append)
    if options.check and (bad := missed(rows)):
        raise SystemExit(f"expected {'; '.join(bad)}: not met")
    return rows


if __name__ == "__main__":
    main()
