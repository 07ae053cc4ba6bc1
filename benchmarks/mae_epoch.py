"""End to end: clips of a training epoch per second, from shards to updated weights; this book against the peer `cortex_mae` 0.1.1.

    python -m pip install --no-deps --target _build/peer cortex_mae==0.1.1 jaxtyping wadler-lindig braceexpand
    python benchmarks/mae_epoch.py [--peer _build/peer] [--grids small published] [--workers 1] [--table results/mae_epoch.csv] [--check]

Simulated noise is written as WebDataset shards into a temporary folder: 4 runs of 432 frames, float16. Two settings, both with
ViT-S, clips of 16 frames, 160 patches a clip, tubes of 90 % hidden, every other frame predicted, batch 8:
- small: maps of 56 × 140 pixels (4,860 inside the mask), patches of 14 × 14 × 4; the step dominates;
- published: maps of 224 × 560 pixels (77,763 inside), patches of 56 × 56 × 4: as many patches, but the data of the published size.

The peer's way: its WebDataset pipeline (oversample 4, shuffle buffer), its transform and its masks in the workers, dense clips
to the model, float32 masks as large as the images. The book's: `ClipDataset` on the same shards, packed clips, `ClipDecoder` and
masks where the model is. Both with as many workers, the same batches per epoch, float32, and bfloat16 as each side trains
with it (see mae_step.py). An epoch begins when the loader is made. The ways take turns. Waiting is the time from asking for a
batch to having it, from the second batch on (the first holds the start of the workers, and is told apart).

Processor seconds, workers included, are told beside the clock, since neighbours on a shared machine disturb them less. Memory is
not measured here. The peer's flat-map resampler fetches files and is replaced by the mask of the simulated shards, nothing else.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mae_step import Book, Peer, device, load_peer, ratio, simulated_mask, write_rows
from torch import Tensor

from fmri_book.clips import ClipDataset, ClipDecoder, clip_loader
from fmri_book.formats import ShardIndex, write_shards
from fmri_book.mae import SIZES, random_masks
from fmri_book.storage import Layout, Record

GRIDS = {"small": ((56, 140), 4860, 14), "published": ((224, 560), 77763, 56)}  # image, pixels inside, patch
RUNS, FRAMES, BATCH = 4, 432, 8


class Noise:
    "Runs of simulated noise."

    def __init__(self, mask: Tensor):
        self.layout = Layout.flat(mask.numpy())

    def __len__(self) -> int:
        return RUNS

    def __iter__(self) -> Iterator[Record]:
        for i in range(RUNS):
            values = np.random.default_rng(i).standard_normal((FRAMES, self.layout.n_sites), np.float32)
            yield Record(values.astype(np.float16), 1.0, f"{i:03d}", "1", "rest", "1")


def peer_pipeline(mask: Tensor) -> types.SimpleNamespace:
    "The peer's data and transforms, with this mask in place of the one that it downloads."
    neuromaps, maps = types.ModuleType("neuromaps"), types.ModuleType("neuromaps.transforms")
    neuromaps.transforms = maps  # imported there, not used for flat maps
    resampler = types.ModuleType("cortex_mae.nisc")
    resampler.flat_resampler_fslr64k_224_560 = lambda: types.SimpleNamespace(mask_=mask.numpy())
    sys.modules.update({"neuromaps": neuromaps, "neuromaps.transforms": maps, "cortex_mae.nisc": resampler})
    sys.modules.pop("cortex_mae.transforms", None)
    made = {name: importlib.import_module(f"cortex_mae.{name}") for name in ("data", "transforms", "masking")}
    made["transforms"].FlatUnmask.dim = int(mask.sum())
    return types.SimpleNamespace(**made)


def peer_batches(shards: Path, mask: Tensor, patch: int, workers: int, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    "Images, mask and visible mask, as the peer's training script makes them."
    from webdataset import WebLoader

    peer = peer_pipeline(mask)
    masks = peer.masking.create_masking("tube", mask_ratio=0.9, img_size=tuple(mask.shape), patch_size=patch, num_frames=16, t_patch_size=4)
    data = peer.data.make_fmri_wds_dataset(str(shards / "*.tar"), clipping="random", clipping_kwargs={"oversample": 4.0}, buffer_size=1000)
    data = data.map(peer.transforms.make_transform(space="flat", normalize="frame", clip_vmax=3.0))
    collate = partial(peer.masking.mask_collate, mask_fn=masks)
    loader = WebLoader(data, batch_size=BATCH, collate_fn=collate, num_workers=workers, drop_last=True).with_epoch(n)
    for batch in loader:
        yield batch["bold"], batch["mask"], batch["visible_mask"]


def book_batches(shards: Path, workers: int, n: int) -> Iterator[dict]:
    clips = ClipDataset(ShardIndex(shards), frames=16, mode="random", oversample=4)
    loader = clip_loader(clips, BATCH, workers)
    for _, batch in zip(range(n), loader):
        yield batch


class Epoch:
    "One way to train; calling it runs an epoch."

    def __init__(self, shards: Path, mask: Tensor, patch: int, workers: int, low: bool, peer: types.SimpleNamespace | None, model: str = "small"):
        self.shards, self.mask, self.patch, self.workers, self.peer = shards, mask, patch, workers, peer
        setting = dict(img_size=tuple(mask.shape), patch_size=patch, in_chans=1, num_frames=16, t_patch_size=4, t_pred_stride=2, pos_embed="sep")
        torch.manual_seed(0)
        name, model = f"mae_vit_{model}", SIZES[f"mae_vit_{model}"](**setting)
        self.grid = model.grid
        if peer is None:
            self.way = Book(model, mask, low)
            self.decoder = ClipDecoder(Layout.flat(mask.numpy()))
        else:
            theirs = getattr(peer.models_mae, name)(**setting)
            theirs.load_state_dict(model.state_dict())
            self.way = Peer(theirs, model.grid, mask, peer, low)

    def inputs(self, batch: dict, step: int) -> tuple[Tensor, Tensor]:
        "From packed clips to images and visible patches, in the training process."
        images = self.decoder.decode(batch)["image"]
        chance = torch.Generator().manual_seed(step)
        return images, random_masks("tube", 0.9, self.grid, self.mask, len(images), chance)

    def __call__(self, n: int) -> dict[str, float]:
        begin, used = time.perf_counter(), processor()
        waited, steps = [], []
        batches = book_batches(self.shards, self.workers, n) if self.peer is None else peer_batches(self.shards, self.mask, self.patch, self.workers, n)
        asked = time.perf_counter()
        for step, batch in enumerate(batches):
            got = time.perf_counter()
            if self.peer is None:
                loss = self.way.step(*self.inputs(batch, step))
            else:
                loss = self.way.step_on(*batch)
            done = time.perf_counter()
            waited, steps = [*waited, got - asked], [*steps, done - got]
            asked = done
        if len(steps) != n or not np.isfinite(loss):
            raise SystemExit(f"expected {n} steps and a finite loss, found {len(steps)} and {loss}")
        seconds = time.perf_counter() - begin
        del batches
        gc.collect()  # ends the workers, so that their seconds are counted
        return {
            "seconds": seconds,
            "clips/s": n * BATCH / seconds,
            "processor s per clip": (processor() - used) / (n * BATCH),
            "first batch, s": waited[0],
            "waiting, share of a step": sum(waited[1:]) / (sum(waited[1:]) + sum(steps[1:])),
        }


def processor() -> float:  # s, of this process and of those it has ended
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def check_same_clip(peer: types.SimpleNamespace, mask: Tensor, shards: Path) -> float:
    "Largest difference between both sides' image of the same clip."
    pipeline = peer_pipeline(mask)
    clips = ClipDataset(ShardIndex(shards), frames=16)
    batch = clips.batch([0])
    ours = ClipDecoder(clips.layout).decode(dict(batch))["image"][0]
    bold = batch["packed"][0].numpy()
    transform = pipeline.transforms.make_transform(space="flat", normalize="frame", clip_vmax=3.0)
    return (transform({"bold": bold})["bold"] - ours).abs().max().item()


def measure(grid: str, peer: types.SimpleNamespace, options: argparse.Namespace) -> list[dict]:
    size, pixels, patch = GRIDS[grid]
    mask = simulated_mask(*size, pixels)
    rows: list[dict] = []
    add = lambda what, way, value, unit="", low="", high="", n="": rows.append(
        dict(what=what, grid=grid if options.model == "small" else f"{grid}, mae_vit_{options.model}", way=way, value=value, unit=unit, low=low, high=high, rounds=n, load_1_and_5_min=" ".join(f"{x:.1f}" for x in os.getloadavg()[:2]))
    )
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        write_shards(Noise(mask), shards, runs_per_shard=1)
        apart = check_same_clip(peer, mask, shards)
        print(f"{grid}: images of the same clip differ by {apart:.1e} SD at most")
        if apart > 1e-4:
            raise SystemExit("expected the same image of a clip from both sides, found different ones")
        add("largest difference of a clip's image", "book and peer", apart, "SD")
        for kind in options.precision:
            low = kind == "bfloat16"
            ways = {who: Epoch(shards, mask, patch, options.workers, low, None if who == "book" else peer, options.model) for who in ("peer", "book")}
            found: dict[str, list[dict]] = {who: [] for who in ways}
            for turn in range(options.rounds + 1):
                for who in ("peer", "book") if turn % 2 else ("book", "peer"):
                    one = ways[who](options.batches if turn else 3)
                    if turn:  # the first round warms up
                        found[who].append(one)
            for who, runs in found.items():
                for what in runs[0]:
                    if what != "seconds":
                        each = [r[what] for r in runs]
                        add(what, f"{who} {kind}", float(np.median(each)), "", min(each), max(each), len(each))
            for what in ("seconds", "processor s per clip"):
                x = ratio(*([r[what] for r in found[who]] for who in ("peer", "book")))
                add(f"times as fast as the peer, by {'the clock' if what == 'seconds' else 'processor seconds'}", kind, x[0], "", *x[1:], options.rounds)
    return rows


def missed(rows: list[dict]) -> list[str]:
    "What does not meet the floors."
    bad = [f"{r['grid']}, {r['way']}: 2 times the peer, found {r['value']:.2f}" for r in rows if r["what"].endswith("the clock") and r["value"] < 2]
    late = [r for r in rows if r["what"].startswith("waiting") and r["way"].startswith("book") and r["value"] > 0.05]
    return bad + [f"{r['grid']}, {r['way']}: waiting below 5 %, found {r['value']:.1%}" for r in late]


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="_build/peer", help="folder with the installed peer")
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--model", default="small", choices=["small", "d3"], help="d3: where the step is no longer nearly all")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each way")
    parser.add_argument("--batches", type=int, default=24, help="steps of an epoch")
    parser.add_argument("--table", type=Path, help="write the numbers to this CSV file, too")
    parser.add_argument("--append", action="store_true", help="add to the file what this run measures")
    parser.add_argument("--check", action="store_true", help="fail if a floor is missed")
    options = parser.parse_args()
    if (peer := load_peer(options.peer)) is None:
        raise SystemExit(f"{options.peer}: expected the peer there, found none; install it as said in --help")
    where = f"{device()}, {torch.get_num_threads()} threads, {options.workers} workers; Python {platform.python_version()}, torch {torch.__version__}"
    print(where)
    rows = [r for grid in options.grids for r in measure(grid, peer, options)]
    for r in rows:
        span = f"[{r['low']:.3g}, {r['high']:.3g}]" if r["low"] != "" else ""
        print(f"{r['grid']:<11}{r['what']:<50}{r['way']:<16}{r['value']:>10.4g} {r['unit']:<4}{span:<18} load {r['load_1_and_5_min']}")
    if options.table:
        setting = f"simulated noise, {RUNS} runs × {FRAMES} frames; mae_vit_{options.model}, 160 patches a clip, batch {BATCH}, {options.batches} steps an epoch, seed 0"
        write_rows(options.table, rows, f"command: {shlex.join(['python', *sys.argv])}", where, setting, options.append)
    if options.check and (bad := missed(rows)):
        raise SystemExit(f"expected {'; '.join(bad)}: not met")
    return rows


if __name__ == "__main__":
    main()
