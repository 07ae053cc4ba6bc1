"""One training step of the masked autoencoder on a GPU: this book against the installable peer `cortex_mae` 0.1.1, in one run.

    python -m pip install --no-deps --target _build/peer cortex_mae==0.1.1 jaxtyping wadler-lindig
    python benchmarks/mae_gpu.py [--peer _build/peer] [--model base] [--batch 32 64] [--table results/mae_gpu.csv]

ViT-B, 224 × 560 × 16, patches of 16 × 16 × 4, tubes of 90 % hidden, every other frame predicted, bfloat16 autocast, fused AdamW on
both sides, with and without torch.compile; simulated clips that lie on the GPU already, so that the step alone is timed. First both
must give the same loss in float32 (TF32 off) from the same weights, clips and masks. Then the ways take turns; seconds are medians of
blocks of steps between two synchronisations.

Model-FLOP utilisation: products of matrices and attention that the published model asks for (the whole last decoder block, all visible
and predicted tokens; backward counted as twice forward), over the time and the peak of dense bfloat16 that the maker states. The work
that a side saves raises its number. On a card that is not in the table the column stays empty; `--peak` gives it in TFLOP/s.

Without a GPU the script says so, writes nothing, and ends with 0.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
import types
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from mae_step import Peer, load_peer, make_ways, simulated_batch, write_rows
from torch import Tensor, nn

from fmri_book.mae import MaskedAutoencoderViT, PatchMask
from fmri_book.training import parameter_groups

# TFLOP/s of dense bfloat16, from the makers' data sheets
PEAK = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165}


def forward_flops(model: MaskedAutoencoderViT, visible: int, predicted: int) -> float:
    "Of one clip: products of matrices and attention."
    c, grid, pred = model.config, model.grid, model.pred_grid

    def blocks(tokens: int, width: int, depth: int) -> float:
        return depth * (2 * tokens * width * width * (4 + 2 * c["mlp_ratio"]) + 4 * tokens * tokens * width)

    d, w = c["embed_dim"], c["decoder_embed_dim"] or c["embed_dim"]
    prefix = int(c["class_token"])
    encoder = 2 * visible * grid.n_values * d + blocks(visible + prefix + c["reg_tokens"], d, c["depth"])
    decoder = 2 * visible * d * w + blocks(visible + predicted + prefix, w, c["decoder_depth"])
    return encoder + decoder + 2 * predicted * w * pred.n_values


class Step:
    "A step on the GPU: bfloat16 autocast, fused AdamW."

    def __init__(self, model: nn.Module, ours: bool, mask: Tensor, compiled: bool, groups: list[dict]):
        self.model, self.ours, self.mask = model, ours, mask
        self.run = torch.compile(model) if compiled else model
        self.optimiser = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def loss(self, images: Tensor, visible: Tensor, seen: Tensor, low: bool = True) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            if self.ours:
                return self.run(images, self.mask, visible, mask_ratio=None).loss
            inside = self.mask.float().expand(len(images), 1, 1, *self.mask.shape)
            return self.run(images, img_mask=inside, visible_mask=seen, mask_ratio=None, with_state=False)

    def __call__(self, *batch: Tensor) -> None:
        self.loss(*batch).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def time_blocks(ways: dict[str, Step], batch: tuple[Tensor, ...], blocks: int, steps: int) -> dict[str, list[float]]:
    "Seconds of a step, one number for each block; the ways take turns."
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(blocks + 2):  # two to warm up and compile
        for name, step in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                step(*batch)
            torch.cuda.synchronize()
            if turn > 1:
                seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def on_gpu(grid, mask: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    "Clips, visible patches, and the visible mask as the peer wants it."
    images, visible = simulated_batch(0, grid, mask, n)
    seen = PatchMask.of_patches(grid, visible).image(n)[:, :, :1].float()
    return images.cuda(), visible.cuda(), seen.cuda()


def measure(peer: types.SimpleNamespace, options: argparse.Namespace, peak: float | None) -> list[dict]:
    made, grid, mask = make_ways(options.model, peer, ("peer float32", "book float32"))
    models = {"peer": made["peer float32"].model.cuda(), "book": made["book float32"].model.cuda()}
    mask, rows = mask.cuda(), []
    torch.backends.cuda.matmul.allow_tf32 = False
    make = lambda who, compiled: Step(
        model := deepcopy(models[who]), who == "book", mask, compiled,
        parameter_groups(model, 0.05) if who == "book" else Peer(model, grid, mask, peer).optimiser.param_groups,
    )  # fmt: skip
    batch = on_gpu(grid, mask.cpu(), 4)
    losses = [make(who, False).loss(*batch, low=False).item() for who in models]
    apart = abs(losses[0] - losses[1]) / losses[0]
    print(f"float32 loss: peer {losses[0]:.6f}, book {losses[1]:.6f}")
    if apart > 1e-5:
        raise SystemExit(f"expected the same loss from both, found a relative difference of {apart:.1e}")
    for n in options.batch:
        batch = on_gpu(grid, mask.cpu(), n)
        out = models["book"](batch[0], mask, batch[1], mask_ratio=None)
        flops = 3 * n * forward_flops(models["book"], out.visible_ids.shape[1], out.pred_ids.shape[1])
        del out
        ways = {f"{who}{', compiled' if c else ''}": make(who, c) for c in (False, True) for who in models}
        for name, each in time_blocks(ways, batch, options.blocks, options.steps).items():
            s = float(np.median(each))
            torch.cuda.reset_peak_memory_stats()
            ways[name](*batch)
            memory = torch.cuda.max_memory_allocated() / 2**20
            rows.append(dict(way=name, model=options.model, batch=n, seconds_a_step=s, low=min(each), high=max(each), clips_per_s=n / s, mfu=flops / s / (peak * 1e12) if peak else "", peak_memory_mib=memory, loss_difference_float32=apart))
    return rows


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="_build/peer", help="folder with the installed peer")
    parser.add_argument("--model", default="base", choices=["small", "base"])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--peak", type=float, help="TFLOP/s of dense bfloat16 of this card")
    parser.add_argument("--table", type=Path, help="write the numbers to this CSV file, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU on this machine: nothing measured, nothing written. Run the same command where torch sees one.")
        return []
    if (peer := load_peer(options.peer)) is None:
        raise SystemExit(f"{options.peer}: expected the peer there, found none; install it as said in --help")
    card = torch.cuda.get_device_name()
    peak = options.peak or next((tflops for name, tflops in PEAK.items() if name in card), None)
    where = f"{card}, peak {peak} TFLOP/s; Python {platform.python_version()}, torch {torch.__version__}"
    print(where)
    rows = measure(peer, options, peak)
    for r in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.items()))
    if options.table:
        setting = "simulated clips, 224 × 560 × 16, patch 16 × 16 × 4, tubes 0.9, t_pred_stride 2, bfloat16 autocast, seed 0"
        write_rows(options.table, rows, f"command: {shlex.join(['python', *sys.argv])}", where, setting)
    return rows


if __name__ == "__main__":
    main()
