"""Memory of BrainLM's attention as the window grows: of the mask, and at the peak of one forward and backward.

    python benchmarks/brainlm_memory.py [--frames 60 100 200 400] [--table results/brainlm_memory.csv] [--check]

424 parcels, patches of 20 frames: 424 tokens for each 20 frames, and the class token. Of the mask:

- blocks: none, a list of row and key ranges;
- dense, bool: what `attention="dense"` makes; dense, float32: what the published code keeps;
- flex: the tables of FlexAttention's BlockMask (integers for tiles of 128 × 128 tokens). On a processor without compilation, making
  them takes a dense mask for a moment; that is why `--flex-frames` is limited.

At the peak: attention alone, float32, forward and backward, in a process of its own, less what it held after its imports and its
inputs; 2 heads of 32 (of 8), so that the quadratic ways fit; scores grow with the number of heads, see brainlm_step.py for a whole
step. A way for which less is free than it will need is not run, and the table says so.

Growth is the slope of log memory over log frames, between the two longest windows. `--check` fails if the memory of blocks at the peak
grows faster than frames^1.2, or takes as much as dense in the longest window in which both were measured; a number that
was not measured at all has failed, too.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import shlex
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from brainlm_step import available, less, told
from mae_step import device, status, write_rows
from torch import Tensor

from fmri_book import brainlm

PATCH, HEADS, WIDTH = 20, 2, 32
PEAKS = (("blocks", 0.0), ("blocks", 0.1), ("dense", 0.0), ("dense", 0.1))


def mask_bytes(way: str, parcels: int, blocks: int) -> int:
    tokens = 1 + parcels * blocks
    if way == "blocks":
        reads = brainlm._reads(tokens, parcels, False)
        return sum(x.nbytes for pair in reads for x in pair if isinstance(x, Tensor))
    if way == "flex":
        rule = brainlm._flex_mask(tokens, parcels, False, "cpu")
        return sum(x.nbytes for x in rule.as_tuple() if isinstance(x, Tensor))
    allowed = brainlm.block_causal(blocks, parcels)
    return allowed.nbytes if way == "dense, bool" else torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf).nbytes


def measure_peak(way: str, dropout: float, parcels: int, blocks: int, answer: Connection) -> None:
    "In a process of its own."
    q, k, v = (torch.randn(1, HEADS, 1 + parcels * blocks, WIDTH, requires_grad=True) for _ in range(3))
    attend = getattr(brainlm, {"blocks": "block_attention", "dense": "dense_attention"}[way])
    attend(*(x[:, :, : 1 + 2 * 8] for x in (q, k, v)), 8, False, dropout).sum().backward()  # what the first call loads
    before = status("VmRSS")
    attend(q, k, v, parcels, False, dropout).sum().backward()
    answer.send(status("VmHWM") - before)


def peak(way: str, dropout: float, parcels: int, frames: int) -> float | str:  # MiB, or why there is no number
    need = HEADS * (1 + parcels * frames // PATCH) ** 2 * 16 / 2**20 if way == "dense" and dropout else 0
    if need > 0.9 * available():
        return f"not run: needs more than {need:.0f}, free {available():.0f}"
    context = multiprocessing.get_context("fork")  # its peak starts anew; nothing is imported twice
    ours, theirs = context.Pipe()
    process = context.Process(target=measure_peak, args=(way, dropout, parcels, frames // PATCH, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{way}, dropout {dropout}, {frames} frames: expected a number, found that the process ended (out of memory?)") from None
    finally:
        process.join()


def rows_of(options: argparse.Namespace) -> list[dict]:
    rows = []
    for frames in options.frames:
        tokens = 1 + options.parcels * frames // PATCH
        for way, dropout in PEAKS:
            size = peak(way, dropout, options.parcels, frames)
            rows.append(dict(what="peak of forward and backward", way=way, attention_dropout=str(dropout), frames=frames, tokens=tokens, value=size, unit="MiB"))
            print(frames, way, dropout, size, flush=True)
    for frames in options.frames:  # later: what is held here counts in no peak
        tokens = 1 + options.parcels * frames // PATCH
        for way in ("blocks", "dense, bool", "dense, float32", "flex"):
            if way == "flex" and frames > options.flex_frames:
                continue
            size = mask_bytes(way, options.parcels, frames // PATCH) / 2**20
            rows.append(dict(what="mask", way=way, attention_dropout="", frames=frames, tokens=tokens, value=size, unit="MiB"))
    return rows + growth(rows)


def growth(rows: list[dict]) -> list[dict]:
    "Exponents between the two longest windows that have a number above 0."
    found = []
    for key in dict.fromkeys((r["what"], r["way"], r["attention_dropout"]) for r in rows):
        points = [(r["frames"], r["value"]) for r in rows if key == (r["what"], r["way"], r["attention_dropout"]) and isinstance(r["value"], float) and r["value"] > 0]
        if len(points) > 1:
            (a, low), (b, high) = points[-2:]
            value = math.log(high / low) / math.log(b / a)
            found.append(dict(what=f"growth of {key[0]}", way=key[1], attention_dropout=key[2], frames=f"{a} to {b}", tokens="", value=value, unit="exponent of frames"))
    return found


def missed(rows: list[dict]) -> list[str]:
    "What does not meet the floors. A number that is not there meets none."
    bad = []
    rise = {(r["way"], r["attention_dropout"]): r["value"] for r in rows if r["what"] == "growth of peak of forward and backward"}
    for dropout in ("0.0", "0.1"):
        if not less(found := rise.get(("blocks", dropout)), 1.2):
            bad.append(f"blocks, dropout {dropout}: linear growth, found exponent {told(found, '.2f')}")
        ours, theirs = longest_pair(rows, dropout)
        if not less(ours, theirs):
            bad.append(f"dropout {dropout}: less memory than dense (MiB), found {told(ours)} and {told(theirs)}")
    return bad


def longest_pair(rows: list[dict], dropout: str) -> tuple[object, object]:
    "Peaks of blocks and dense in the longest window in which both have a number; in the longest of all, if there is none."
    peaks = {(r["frames"], r["way"]): r["value"] for r in rows if r["what"].startswith("peak") and r["attention_dropout"] == dropout}
    frames = sorted({frames for frames, _ in peaks})
    pairs = [(peaks.get((f, "blocks")), peaks.get((f, "dense"))) for f in frames] or [(None, None)]
    return next((pair for pair in reversed(pairs) if all(isinstance(x, float) for x in pair)), pairs[-1])


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[60, 100, 200, 400])
    parser.add_argument("--flex-frames", type=int, default=400, help="longest window for which FlexAttention's mask is made")
    parser.add_argument("--parcels", type=int, default=424)
    parser.add_argument("--table", type=Path, help="write the numbers to this CSV file, too")
    parser.add_argument("--check", action="store_true", help="fail if a floor is missed")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
    where = f"{device()}; Python {platform.python_version()}, torch {torch.__version__}"
    print(where)
    rows = rows_of(options)
    for r in rows:
        print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()))
    if options.table:
        setting = f"{options.parcels} parcels, patch {PATCH}; peaks with batch 1, {HEADS} heads of {WIDTH}, float32"
        write_rows(options.table, rows, f"command: {shlex.join(['python', *sys.argv])}", where, setting)
    if options.check and (bad := missed(rows)):
        raise SystemExit(f"expected {'; '.join(bad)}: not met")
    return rows


if __name__ == "__main__":
    main()
