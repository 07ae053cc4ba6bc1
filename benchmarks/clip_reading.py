"""Clips of 16 frames from a shard of the published size: the dense route against packed clips.

    python benchmarks/clip_reading.py [--repeats 7] [--table results/clip_reading.csv] [--check]

A shard of simulated noise is written to a temporary folder and removed afterwards: 4 runs of 864 frames on a mask of
224 × 560 pixels with 77,763 inside, float16, 540 MB; and a clip store of the same runs. One process, one thread, all files
in the memory of the operating system. The ways take turns, and each hands over batches of 32 clips from random places:
- dense route: as published. Decode a sample of the shard, unmask the whole run to (864, 224, 560) float16, cut random clips,
  and of each: mask = first frame not 0, mean and SD of every frame inside, normalise, clip at 3 SD, float32. Measured with
  oversample 4 (216 clips from one decoded run), oversample 1 (54), and with a single clip from each decoded run;
- packed from the store: float16 with mean and SD of the frames from the store's index; what is left is done on the device;
- packed from the shard: the same without conversion and without statistics;
- dense from the store: decoded to float32 pictures on the processor, into a batch that is used again ("reused") or new;
- patches from the store: a tenth of the patches of 16 × 16 pixels, decoded on the processor, never a picture.
Ways that hand over the same form give the same values; the script compares them before it measures.

Memory is the peak of a process of its own that reads clips from runs of 300, 1,200 and 4,800 frames, less what it held after
its imports. `--check` fails if packed clips come less than 10 times, or dense ones less than 1.5 times as fast as the best
dense route, if memory grows with the length of a run or with clips read, or if a store of 1,000 runs takes a second to open.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import os
import platform
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

from fmri_book.clips import ClipDataset, ClipDecoder, dense_batch
from fmri_book.formats import ShardIndex, unpack_mask, write_shards
from fmri_book.storage import Layout, Record, Store, finish_store, write_run, write_store

HEIGHT, WIDTH, PIXELS, FRAMES, RUNS, BATCH = 224, 560, 77763, 864, 4, 32
LENGTHS = (300, 1200, 4800)


class Noise:
    "Runs of simulated noise on a mask of the published size."

    def __init__(self, n_runs: int, n_frames: int):
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        distance = np.minimum(np.hypot((x - 135) / 135, (y - 112) / 112), np.hypot((x - 425) / 135, (y - 112) / 112))
        mask = np.zeros(HEIGHT * WIDTH, bool)
        mask[np.argsort(distance.ravel(), kind="stable")[:PIXELS]] = True  # two round hemispheres
        self.layout, self.n_runs, self.n_frames = Layout.flat(mask.reshape(HEIGHT, WIDTH)), n_runs, n_frames

    def __len__(self) -> int:
        return self.n_runs

    def __iter__(self) -> Iterator[Record]:
        for i in range(self.n_runs):
            rng = np.random.default_rng(i)
            block = rng.standard_normal((min(self.n_frames, 216), PIXELS), np.float32).astype(np.float16)
            values = np.concatenate([block] * -(-self.n_frames // len(block)))[: self.n_frames]
            yield Record(values, 1.0, f"{i:03d}", "1", "rest", "1")


def dense_sample(path: Path, number: int) -> np.ndarray:  # (frames, height, width) float16
    "The published way to a run: every member of the sample decoded, every frame unmasked."
    with tarfile.open(path) as tar:
        members = [m for m in tar if m.name.endswith((".bold.npy", ".mask.npz"))][2 * number : 2 * number + 2]
        parts = {m.name.rpartition(".")[2]: tar.extractfile(m).read() for m in members}
    bold = np.load(io.BytesIO(parts["npy"]))
    mask = unpack_mask(parts["npz"], str(path))
    dense = np.zeros((len(bold), *mask.shape), np.float16)
    dense[:, mask] = bold
    return dense


def dense_clip(clip: np.ndarray) -> torch.Tensor:  # (1, frames, height, width) float32
    "The published transform of a clip."
    x = torch.from_numpy(clip).float()
    mask = (x[0] != 0).float()
    n = mask.sum()
    mean = (x * mask).sum((1, 2), keepdim=True) / n
    x = (x - mean) * mask
    sd = (x.square().sum((1, 2), keepdim=True) / (n - 1)).sqrt()
    return (x / (sd + 1e-6)).clamp_(-3, 3)[None]


def dense_route(path: Path, clips_a_run: int, run: int, seed: int) -> Iterator[torch.Tensor]:
    "Batches of one decoded run."
    dense = dense_sample(path, run)
    starts = np.sort(np.random.default_rng(seed).integers(0, len(dense) - 15, clips_a_run))
    for first in range(0, clips_a_run, BATCH):
        yield torch.stack([dense_clip(dense[s : s + 16]) for s in starts[first : first + BATCH]])


def some(clips: ClipDataset, seed: int, n: int) -> list[np.ndarray]:
    "Numbers of n random clips, in batches."
    chosen = np.random.default_rng(seed).integers(0, len(clips), n)
    return [chosen[i : i + BATCH] for i in range(0, n, BATCH)]


def ways(shard: Path, store: Path, patched: Path) -> dict[str, Callable[[int], int]]:
    "Name -> a function that takes a seed, hands over clips, and says how many."
    rule = dict(frames=16, mode="random", oversample=4)
    ours, raw, by_patch = ClipDataset(store, **rule), ClipDataset(ShardIndex(shard), **rule), ClipDataset(patched, **rule)
    decoder, patches = ClipDecoder(ours.layout), ClipDecoder(by_patch.layout)
    reused = torch.zeros(BATCH, 16, PIXELS, dtype=torch.float16)
    picture = torch.zeros(BATCH, 1, 16, HEIGHT, WIDTH)
    keep = torch.from_numpy(np.random.default_rng(0).permutation(len(patches.patch_mask()))[: len(patches.patch_mask()) // 10])
    n = 432 // BATCH * BATCH

    def dense_way(clips_a_run: int) -> Callable[[int], int]:
        return lambda seed: sum(map(len, dense_route(shard, clips_a_run, seed % RUNS, seed)))

    def packed_way(clips: ClipDataset, out: torch.Tensor | None, decode: Callable | None = None) -> Callable[[int], int]:
        def way(seed: int) -> int:
            for numbers in some(clips, seed, n):
                batch = clips.batch(numbers, out)
                if decode is not None:
                    decode(batch["packed"], batch["frame_mean"], batch["frame_sd"])
            return n

        return way

    return {
        "dense route, oversample 4": dense_way(int(4 * FRAMES / 16)),
        "dense route, oversample 1": dense_way(FRAMES // 16),
        "dense route, one clip a run": dense_way(1),
        "packed from the store": packed_way(ours, None),
        "packed from the store, reused": packed_way(ours, reused),
        "packed from the shard": packed_way(raw, None),
        "packed from the shard, reused": packed_way(raw, reused),
        "dense float32 from the store": packed_way(ours, None, lambda *given: dense_batch(decoder, *given)),
        "dense float32 from the store, reused": packed_way(ours, reused, lambda *given: dense_batch(decoder, *given, out=picture)),
        "a tenth of the patches from the store": packed_way(by_patch, reused, lambda x, m, s: patches.patches(x, None, m, s, keep)),
    }


def compare(shard: Path, store: Path, patched: Path) -> float:
    "The largest difference between the routes, over some clips of all runs; the packed ones must agree bit for bit."
    ours, raw, by_patch = (ClipDataset(s, mode="random", oversample=0.2) for s in (store, ShardIndex(shard), patched))
    worst, decoder, patches = 0.0, ClipDecoder(ours.layout), ClipDecoder(by_patch.layout)
    batches = [clips.batch(range(len(clips))) for clips in (ours, raw, by_patch)]
    if not torch.equal(batches[0]["packed"], batches[1]["packed"]) or batches[0]["key"] != batches[2]["key"]:
        raise SystemExit("expected the same packed clips from store and shard, found different ones")
    given, whole = [[b[k] for k in ("packed", "frame_mean", "frame_sd")] for b in batches], {}
    images = dense_batch(decoder, *given[0])
    tokens = patches.patches(given[2][0], None, *given[2][1:])
    cut = images[:, 0].unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    worst = max((tokens - cut).abs().max().item(), (decoder(*given[1])["image"] - images).abs().max().item())
    for b, start in enumerate(batches[0]["start"].tolist()):
        run = int(batches[0]["subject"][b])
        if run not in whole:
            whole = {run: dense_sample(shard, run)}
        published = dense_clip(whole[run][start : start + 16])
        seen = published[0, 0] != 0  # a value of exactly 0 in the first frame is lost by the published rule
        worst = max(worst, (published - images[b])[..., seen].abs().max().item())
    return worst


def status(name: str) -> float:  # MB
    "VmRSS (memory held now) or VmHWM (its peak) of this process."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def measure_memory(path: str) -> None:
    "In a process of its own: 320 clips, packed from a store or by the dense route from a shard."
    before = status("VmRSS")
    if path.endswith(".tar"):
        for _ in dense_route(Path(path), 64, 0, 0):
            pass
    else:
        clips = ClipDataset(path, mode="random", oversample=4)
        for numbers in some(clips, 0, 320):
            clips.batch(numbers)
    print(status("VmHWM") - before)


def in_a_new_process(path: Path) -> float:
    done = subprocess.run([sys.executable, __file__, "--memory", str(path)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def memory_rows(folder: Path) -> list[dict]:
    rows = []
    for frames in LENGTHS:
        noise = Noise(1, frames)
        write_store(noise, folder / f"store_{frames}", progress=False)
        write_shards(noise, folder / f"shard_{frames}")
        rows.append(row("peak memory, packed", f"runs of {frames} frames", in_a_new_process(folder / f"store_{frames}"), "MB"))
        shard = next((folder / f"shard_{frames}").glob("*.tar"))
        rows.append(row("peak memory, dense route", f"runs of {frames} frames", in_a_new_process(shard), "MB"))
    return rows


def many_runs(folder: Path, store: Path, n: int) -> list[dict]:
    "A store of many runs: how long it takes to open; and memory before and after many clips."
    layout, rng = Layout.of("schaefer400"), np.random.default_rng(0)
    values = rng.standard_normal((200, 400), np.float32).astype(np.float16)
    for i in range(n):
        write_run(folder / "many", Record(values, 1.0, f"{i:04d}"), layout, dtype="float16")
    finish_store(folder / "many", layout)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        Store(folder / "many")
        seconds.append(time.perf_counter() - start)
    rows = [row("open a store", f"{n} runs", max(seconds), "s (slowest of 5)")]
    for name, path in (("parcels, 1,000 runs", folder / "many"), ("flat maps, 4 runs", store)):
        clips = ClipDataset(path, mode="random", oversample=4)
        for numbers in some(clips, 0, 640):
            clips.batch(numbers)
        before = status("VmRSS")
        for numbers in some(clips, 1, 10_016):
            clips.batch(numbers)
        rows.append(row("memory gained by 10,000 clips", name, status("VmRSS") - before, "MB"))
    return rows


def row(what: str, setting: str, value: float, unit: str, times: float | None = None) -> dict:
    return dict(what=what, setting=setting, value=value, unit=unit, times_best_dense="" if times is None else times)


def speeds(folder: Path, repeats: int) -> tuple[list[dict], dict[str, float]]:
    "Clips per second of every way; the ways take turns."
    shard, store, patched = folder / "shard" / "flat_0000.tar", folder / "store", folder / "patched"
    table = ways(shard, store, patched)
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for repeat in range(repeats + 1):
        for name, way in table.items():
            start = time.perf_counter()
            n = way(repeat)
            if repeat:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / n)
    rate = {name: 1 / float(np.median(each)) for name, each in seconds.items()}
    best = max(1 / min(each) for name, each in seconds.items() if name.startswith("dense route"))
    rows = [row(name, f"median of {repeats}", r, "clips/s", r / best) for name, r in rate.items()]
    return [*rows, row("dense route, best of all repeats", "any setting", best, "clips/s", 1.0)], rate


def device() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def wrong(rows: list[dict]) -> list[str]:
    "What does not meet the floors."
    value = {(r["what"], r["setting"]): r for r in rows}
    times = {r["what"]: r["times_best_dense"] for r in rows}
    peaks = [r["value"] for r in rows if r["what"] == "peak memory, packed"]
    checks = {
        "packed clips from the store at 10 times the best dense route": times["packed from the store"] >= 10,
        "packed clips from the shard at 10 times the best dense route": times["packed from the shard"] >= 10,
        "dense float32 clips at 1.5 times the best dense route": times["dense float32 from the store"] >= 1.5,
        "peak memory that does not grow with the run (within 10 MB)": max(peaks) - min(peaks) < 10,
        "a store of 1,000 runs open in a second": value["open a store", "1000 runs"]["value"] < 1,
        "no memory gained by 10,000 clips (within 5 MB)": all(r["value"] < 5 for r in rows if r["what"].startswith("memory gained")),
    }
    return [name for name, met in checks.items() if not met]


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--table", type=Path, help="write the numbers to this CSV file, too")
    parser.add_argument("--check", action="store_true", help="fail if a floor is missed")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.memory)
        return []
    torch.set_num_threads(1)
    where = f"{device()}, one thread; Python {platform.python_version()}, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(Noise(RUNS, FRAMES), folder / "shard")
        write_store(ShardIndex(folder / "shard"), folder / "store", progress=False)
        write_store(ShardIndex(folder / "shard"), folder / "patched", patch=(16, 16), progress=False)
        size = (folder / "shard" / "flat_0000.tar").stat().st_size / 1e6
        print(f"simulated noise: {RUNS} runs × {FRAMES} frames × {PIXELS} pixels, {size:.0f} MB\n{where}")
        worst = compare(folder / "shard" / "flat_0000.tar", folder / "store", folder / "patched")
        print(f"largest difference between the routes: {worst:.1e} SD (packed clips: none)")
        if worst > 1e-4:
            raise SystemExit(f"expected the same values from all routes, found a difference of {worst:.1e} SD")
        rows, _ = speeds(folder, options.repeats)
        rows += [row("largest difference between routes", "normalised values", worst, "SD")]
        rows += memory_rows(folder) + many_runs(folder, folder / "store", 1000)
    for r in rows:
        times = f"{r['times_best_dense']:>8.1f}" if r["times_best_dense"] != "" else ""
        print(f"{r['what']:<40}{r['setting']:<24}{r['value']:>12.4g} {r['unit']:<18}{times}")
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        with options.table.open("w", newline="") as file:
            command = shlex.join(["python", *sys.argv])
            file.write(f"# command: {command} | date: {datetime.date.today()} | device: {where} | simulated noise, {RUNS} runs × {FRAMES} frames × {PIXELS} pixels, {size:.0f} MB\n")
            table = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    if options.check and (missed := wrong(rows)):
        raise SystemExit(f"expected {'; '.join(missed)}: not met")
    return rows


if __name__ == "__main__":
    main()
