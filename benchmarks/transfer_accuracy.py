"""How much of the cortex gets its true Schaefer label when labels travel from fsLR_32k to fsaverage5?

The true labels are Schaefer's own fsaverage5 files ({lh,rh}.Schaefer2018_{n}Parcels_7Networks_order.annot), which no package ships:
    python benchmarks/transfer_accuracy.py --atlases FOLDER
writes results/transfer_accuracy.csv, which chapter 1 shows.
"""

import argparse
import datetime
import platform
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from fmri_book import data


def true_labels(folder: Path, n: int) -> np.ndarray:  # (20484,) 0..n
    sides = [
        nib.freesurfer.read_annot(folder / f"{h}h.Schaefer2018_{n}Parcels_7Networks_order.annot")[0]
        for h in "lr"
    ]
    return np.concatenate([sides[0], np.where(sides[1] > 0, sides[1] + n // 2, 0)])


def nearest_labels(n: int, points_5: np.ndarray, points_32: np.ndarray) -> np.ndarray:
    labels = data.parcellation(n, "fsLR_32k")
    sides = zip(data._sides("fsaverage5"), data._sides("fsLR_32k"))
    return np.concatenate([labels[b][data._nearest(points_5[a], points_32[b])] for a, b in sides])


def parcel_connectivity(bold: np.ndarray, labels: np.ndarray, n: int) -> np.ndarray:
    return data.connectivity(
        np.stack(
            [
                bold[:, labels == k].mean(1) if (labels == k).any() else np.zeros(len(bold))
                for k in range(1, n + 1)
            ],
            1,
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atlases", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "results/transfer_accuracy.csv"
    )
    args = parser.parse_args()
    run = data.load_example_run().clean()
    spheres = [data.unit(data.surface_mesh(s, "sphere").coords) for s in data.N_LEFT]
    middle = data.surface_mesh("fsLR_32k").coords
    rows = []
    for n in (400, 1000):
        truth = true_labels(args.atlases, n)
        methods = {
            "nearest on the two spheres": nearest_labels(n, *spheres),
            "nearest in the folded brain": nearest_labels(n, data.surface_mesh("fsaverage5").coords, middle),
            "after the affine": nearest_labels(n, data.in_mni152("fsaverage5"), middle),
            "after the fit, on the sphere": data.parcellation(n, "fsaverage5"),
        }
        pairs = np.triu_indices(n, 1)
        reference = parcel_connectivity(run.bold, truth, n)[pairs]
        for method, labels in methods.items():
            found = parcel_connectivity(run.bold, labels, n)[pairs]
            both = np.isfinite(found) & np.isfinite(reference)
            rows.append(
                {
                    "method": method,
                    "parcels": n,
                    "share_correct": (labels == truth)[truth > 0].mean(),
                    "connectivity_r": np.corrcoef(found[both], reference[both])[0, 1]
                    if both.any()
                    else np.nan,
                }
            )
    table = pd.DataFrame(rows).round(4)
    print(table.to_string(index=False))
    header = (
        f"# command: python benchmarks/transfer_accuracy.py --atlases FOLDER | date: {datetime.date.today()} | device: CPU {platform.machine()} | "
        "share_correct: share of the vertices with a true label that get it | connectivity_r: parcel connectivity of the LEMON run against the one with true labels\n"
    )
    args.out.write_text(header + table.to_csv(index=False))


if __name__ == "__main__":
    main()
