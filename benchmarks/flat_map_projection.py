"""Projecting a whole run onto the flat map: the book's sparse matrix against SciPy's LinearNDInterpolator.

    python benchmarks/flat_map_projection.py [--frames 652] [--repeats 5] [--table results/flat_map_projection.csv] [--check]

All project the same frames, in the same process, to the same array: (frames, 224, 560) float32, zero outside the mask.
The book's matrix is ready before the clock starts. SciPy is timed in three ways:
- plain call: `LinearNDInterpolator(points, values)(picture)`, all frames as one vector-valued function;
- with help: its triangulation is ready before the clock starts, too, and it only fills the pixels of our mask;
- frame by frame, with the same help.
Each is timed in three ways: with the result in memory that is there already ("reused"), in memory that the call asks for
("fresh"), both best of the repeats; and the first whole run in a process of its own ("first call"), where the operating
system has to find the memory: a cost that is the same whoever touches it, and larger than the projection. Memory is the peak of what Python and numpy allocate
(tracemalloc) during one call that makes its own result, as a multiple of that result.

`--check` fails if `project` is less than three times as fast as a plain call of SciPy (memory reused): a coarse guard
against a slow mistake, not a measurement.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import Delaunay

from fmri_book.data import load_example_run
from fmri_book.flat_maps import FlatMap

FLOOR = 8  # the issue asks for a projection at least this many times as fast as SciPy
Way = Callable[[np.ndarray | None], np.ndarray]  # takes the array to write into, or None


def best_time(way: Way, out: np.ndarray | None, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = way(out)
        times.append(time.perf_counter() - start)
        del made
    return min(times)


def peak(way: Way) -> int:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    way(None)
    found = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return found


def scipy_ways(fm: FlatMap, frames: np.ndarray) -> dict[str, Way]:
    used = np.unique(fm.faces)
    triangulation = Delaunay(fm.vertices[used])
    row, column = np.nonzero(fm.mask)
    points = np.stack([fm.raster.x[column], fm.raster.y[row]], 1)
    picture = np.stack(np.meshgrid(fm.raster.x, fm.raster.y), -1)

    def empty(out: np.ndarray | None) -> np.ndarray:
        if out is None:
            return np.zeros((len(frames), *fm.mask.shape), np.float32)
        out[:] = 0
        return out

    def plain(out: np.ndarray | None) -> np.ndarray:
        interpolate = LinearNDInterpolator(fm.vertices[used], frames[:, used].T, fill_value=0)
        values = interpolate(picture).transpose(2, 0, 1)  # (frames, height, width) float64
        if out is None:
            return np.ascontiguousarray(values, dtype=np.float32)
        out[:] = values
        return out

    def helped(out: np.ndarray | None) -> np.ndarray:
        values = LinearNDInterpolator(triangulation, frames[:, used].T)(points)  # (pixels, frames) float64
        out = empty(out)
        out[:, fm.mask] = values.T
        return out

    def one_by_one(out: np.ndarray | None) -> np.ndarray:
        out = empty(out)
        for frame, image in zip(frames, out, strict=True):
            image[fm.mask] = LinearNDInterpolator(triangulation, frame[used])(points)
        return out

    return {"SciPy, plain call": plain, "SciPy, with help": helped, "SciPy, frame by frame": one_by_one}


def device() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def first_call(name: str, frames: int) -> float:
    "Seconds of the first call on all frames, in a new process; everything that is kept is warm after a call on one frame."
    command = [sys.executable, __file__, "--frames", str(frames), "--first", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def all_ways(fm: FlatMap, frames: np.ndarray) -> dict[str, Way]:
    return {"book: project": lambda out: fm.project(frames, out=out), **scipy_ways(fm, frames)}


def measure(ways: dict[str, Way], frames: int, pixels: int, repeats: int) -> list[dict]:
    rows, ours = [], {}
    result = np.ones((frames, pixels), np.float32)  # touched: memory that is there
    for name, way in ways.items():
        out = result.reshape(frames, 224, 560)
        memory = peak(way) / result.nbytes
        for kind, into in (("reused", out), ("fresh", None), ("first call", None)):
            first = kind == "first call"
            seconds = first_call(name, frames) if first else best_time(way, into, repeats)
            ours.setdefault(kind, seconds)
            times = seconds / ours[kind]
            rows.append(
                dict(way=name, memory=kind, seconds=seconds, times_book=times, peak_over_output=memory)
            )
    return rows


def main() -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=652)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--table", type=Path, help="write the numbers to this CSV file, too")
    parser.add_argument("--check", action="store_true", help="fail if the book is hardly faster than SciPy")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    options = parser.parse_args()

    frames, fm = load_example_run().bold[: options.frames], FlatMap.fsaverage5()
    ways = all_ways(fm, frames)
    if options.first:
        all_ways(fm, frames[:1])[options.first](None)
        print(best_time(ways[options.first], None, 1))
        return []
    threads = min(4, os.cpu_count() or 1)
    where = f"{device()}; book on {threads} threads, SciPy on one; Python {platform.python_version()}"
    print(f"{fm}\n{len(frames)} frames; {where}")
    both = fm.project(frames[:4]), scipy_ways(fm, frames[:4])["SciPy, with help"](None)
    same = np.abs(both[0] - both[1])[:, fm.mask] < 1e-3 * np.abs(frames).max()
    print(f"pixels on which both agree: {same.mean():.1%} (SciPy draws its own triangles)")

    rows = measure(ways, len(frames), fm.mask.size, options.repeats)
    print(f"\n{'':<24}{'memory':<12}{'time (s)':>10}{'times the book':>16}{'peak / output':>15}")
    for row in rows:
        print(
            f"{row['way']:<24}{row['memory']:<12}{row['seconds']:>10.3f}{row['times_book']:>16.1f}{row['peak_over_output']:>15.2f}"
        )
        row["frames"] = len(frames)
    reached = [f"{r['way']} ({r['memory']} memory)" for r in rows if r["times_book"] >= FLOOR]
    print(f"\nat least {FLOOR} times slower than the book: {'; '.join(reached) or 'none'}")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"output {len(frames) * fm.mask.size * 4 / 1e6:.0f} MB; peak resident memory {resident:.0f} MB")
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        with options.table.open("w", newline="") as file:
            command = shlex.join(["python", *sys.argv])
            file.write(
                f"# command: {command} | date: {datetime.date.today()} | device: {where} | best of {options.repeats}\n"
            )
            table = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(
                {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows
            )
    if options.check and not rows[3]["times_book"] > 3:
        raise SystemExit(f"expected more than 3 times the speed of SciPy, found {rows[3]['times_book']:.1f}")
    return rows


if __name__ == "__main__":
    main()
