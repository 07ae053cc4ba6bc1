"""Projecting a whole run onto the flat map: the book's sparse matrix against SciPy's LinearNDInterpolator.

    python benchmarks/flat_map_projection.py [--frames 652] [--repeats 3] [--json FILE]

Both project the same frames, in the same process, to the same array: (frames, 224, 560) float32, zero outside the mask.
The book's matrix is ready before the clock starts. SciPy is timed in three ways:
- plain call: `LinearNDInterpolator(points, values)(picture)`, all frames as one vector-valued function;
- with help: its triangulation is ready before the clock starts, too, and it only fills the pixels of our mask;
- frame by frame, with the same help.
Times are the best of the repeats. Memory is the peak of what Python and numpy allocate (tracemalloc) during one call,
beyond what was there before, as a multiple of the output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import Delaunay

from fmri_book.data import load_example_run
from fmri_book.flat_maps import FlatMap


def best_time(function: Callable[[], np.ndarray], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def peak(function: Callable[[], np.ndarray]) -> int:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    function()
    found = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return found


def scipy_ways(fm: FlatMap, frames: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    used = np.unique(fm.faces)
    triangulation = Delaunay(fm.vertices[used])
    row, column = np.nonzero(fm.mask)
    points = np.stack([fm.raster.x[column], fm.raster.y[row]], 1)

    picture = np.stack(np.meshgrid(fm.raster.x, fm.raster.y), -1)

    def plain() -> np.ndarray:
        values = LinearNDInterpolator(fm.vertices[used], frames[:, used].T, fill_value=0)(
            picture
        )  # (height, width, frames) float64
        return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)

    def helped() -> np.ndarray:
        values = LinearNDInterpolator(triangulation, frames[:, used].T)(points)  # (pixels, frames) float64
        out = np.zeros((len(frames), *fm.mask.shape), np.float32)
        out[:, fm.mask] = values.T
        return out

    def one_by_one() -> np.ndarray:
        out = np.zeros((len(frames), *fm.mask.shape), np.float32)
        for frame, image in zip(frames, out, strict=True):
            image[fm.mask] = LinearNDInterpolator(triangulation, frame[used])(points)
        return out

    return {"SciPy, plain call": plain, "SciPy, with help": helped, "SciPy, frame by frame": one_by_one}


def main() -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=652)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    options = parser.parse_args()

    frames = load_example_run().bold[: options.frames]
    fm = FlatMap.fsaverage5()
    ways = {
        "book: project": lambda: fm.project(frames),
        "book: project_packed": lambda: fm.project_packed(frames),
        **scipy_ways(fm, frames),
    }
    print(
        f"{fm}; {len(frames)} frames; {platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    )

    same = (
        np.abs(fm.project(frames[:4]) - scipy_ways(fm, frames[:4])["SciPy, with help"]())[:, fm.mask]
        < 1e-3 * np.abs(frames).max()
    )
    print(f"pixels on which both agree: {same.mean():.1%} (SciPy draws its own triangles)")
    output = len(frames) * fm.mask.size * 4
    rows = {}
    for name, function in ways.items():
        rows[name] = {
            "seconds": best_time(function, options.repeats),
            "peak_over_output": peak(function) / output,
        }
    ours = rows["book: project"]["seconds"]
    print(f"\n{'':<28}{'time (s)':>10}{'SciPy / book':>14}{'peak / output':>15}")
    for name, row in rows.items():
        row["ratio"] = row["seconds"] / ours
        print(f"{name:<28}{row['seconds']:>10.3f}{row['ratio']:>14.1f}{row['peak_over_output']:>15.2f}")
    print(
        f"\noutput {output / 1e6:.0f} MB; peak resident memory of the whole process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )
    found = {"frames": len(frames), "cores": os.cpu_count(), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
