"Atlases: units, sides, order, and tables; what a network would not notice is refused by name."

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmri_book import atlases
from fmri_book.atlases import beside, check_coordinates, check_parcels, fingerprint, side_in_name, space_from_table
from fmri_book.data import Space

ROOT = Path(__file__).parent.parent
SHARED = next((p for p in (ROOT / "shared", ROOT.parent / "shared") if (p / "data").exists()), None)
needs_atlases = pytest.mark.skipif(SHARED is None, reason="needs the real atlases, which are no part of this repository")


def atlas(tmp_path, change=lambda rows: rows, head=True, suffix=".csv"):
    space, path = Space.named("schaefer400"), tmp_path / f"atlas{suffix}"
    rows = [
        [str(i + 1), *map(str, xyz.round().astype(int)), name]
        for i, (xyz, name) in enumerate(zip(space.coords, space.names))
    ]
    rows = change(rows)
    rows = [["Index", "X", "Y", "Z", "Name"], *rows] if head else rows
    path.write_text("\n".join({".csv": ",", ".tsv": "\t"}.get(suffix, " ").join(r) for r in rows))
    return path


def swapped(i, j, columns):
    def change(rows):
        for c in columns:
            rows[i][c], rows[j][c] = rows[j][c], rows[i][c]
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [[r[0], str(-int(r[1])), *r[2:]] for r in rows], "mirrored|hemispheres swapped"),
        (lambda rows: [[r[0], *rows[(i + 200) % 400][1:4], r[4]] for i, r in enumerate(rows)], "mirrored|hemispheres swapped"),
        (swapped(3, 60, (1, 2, 3)), "order of schaefer400, found 2 of 400"),
        (swapped(3, 60, (1, 2, 3, 4)), "order of schaefer400, found 2 of 400"),
        (lambda rows: [[r[0], *(str((int(v) + 130) // 2) for v in r[1:4]), r[4]] for r in rows], "voxel"),
        (lambda rows: rows[:-1], "expected 400 parcels, found 399"),
        (lambda rows: rows[::-1], "numbered 1, 2, 3"),
        (lambda rows: [[*r[:4], "LH_Vis_1"] for r in rows], "different names, found 1 of 400"),
        (lambda rows: [[r[0], "n/a", *r[2:]] for r in rows], "numbers in X, Y and Z"),
    ],
)  # fmt: skip
def test_wrong_atlases_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        space_from_table(atlas(tmp_path, change), "wrong", n=400)


def test_right_atlases_are_taken(tmp_path):
    for suffix, head in ((".csv", True), (".tsv", True), (".dat", False)):
        space = space_from_table(atlas(tmp_path, head=head, suffix=suffix), f"right{suffix}{head}", n=400)
        assert space.names.tolist() == Space.named("schaefer400").names.tolist() and space.network[0] == "Vis"
    with pytest.raises(ValueError, match="found none for 2 parcels"):
        check_parcels(Space.named("schaefer1000"))


@needs_atlases
def test_real_atlases(tmp_path):
    from fmri_book.ingest import read_atlas

    folder = SHARED / "data" / "atlases"
    rows = (folder / "A424_Coordinates.dat").read_text().splitlines()
    assert space_from_table(folder / "A424_Coordinates.dat", "A424", n=424).n_sites == 424
    cells = [r.split() for r in rows]
    for name, wrong in (
        ("swapped", [[str(i + 1), *cells[(i + 180) % 360 if i < 360 else i][1:]] for i in range(424)]),
        ("mirrored", [[c[0], str(-int(c[1])), *c[2:]] for c in cells]),
        ("order", [[str(i + 1), *cells[{10: 100, 100: 10}.get(i, i)][1:]] for i in range(424)]),
    ):
        (tmp_path / f"{name}.dat").write_text("\n".join(" ".join(c) for c in wrong))
        with pytest.raises(
            ValueError, match="hemispheres swapped" if name != "order" else "is the order another"
        ):
            space_from_table(tmp_path / f"{name}.dat", f"A424-{name}", n=424)
    tian = "Schaefer2018_400Parcels_7Networks_order_Tian_Subcortex_S3"
    both = read_atlas(folder / f"{tian}_MNI152NLin6Asym_2mm.nii.gz", folder / f"{tian}_label.txt").space
    assert check_parcels(both).n_sites == 450
    for n in (100, 1000):
        name = f"Schaefer2018_{n}Parcels_7Networks_order_FSLMNI152_2mm.Centroid_RAS.csv"
        assert space_from_table(folder / name, f"schaefer{n}_mni", n=n).names[0] == "7Networks_LH_Vis_1"


@needs_atlases
def test_the_fingerprint_is_that_of_the_published_table_and_fits_the_volume():
    from fmri_book.ingest import read_atlas

    folder = SHARED / "data" / "atlases"
    table = np.loadtxt(folder / "A424_Coordinates.dat")[:, 1:]
    assert fingerprint(table) == atlases._A424
    volume = read_atlas(folder / "A424+2mm.nii.gz").space.coords  # centres by another definition
    assert 5 < beside(np.asarray(volume, float), atlases._A424).max() < 15


@needs_atlases
def test_a424_in_other_orders(tmp_path):
    "Also those that keep every mirrored pair together."
    table = np.loadtxt(SHARED / "data" / "atlases" / "A424_Coordinates.dat")[:, 1:].astype(int)
    rng, noticed = np.random.default_rng(0), []

    def taken(order):
        (tmp_path / "a.dat").write_text("\n".join(f"{i + 1} {x} {y} {z}" for i, (x, y, z) in enumerate(table[order])))
        try:
            space_from_table(tmp_path / "a.dat", f"a424-order-{abs(hash(tuple(order)))}", n=424)
        except ValueError as error:
            assert re.search("A424, found .* of 424 parcels elsewhere|mirrors", str(error))
            return False
        return True

    assert taken(np.arange(424))
    for first, last in ((0, 180), (360, 396), (396, 424)):
        order = np.arange(424)
        order[first:last] = rng.permutation(order[first:last])
        if first == 0:
            order[180:360] = order[:180] + 180
        assert not taken(order)
    for _ in range(200):
        i, j = rng.choice(180, 2, replace=False)
        order = np.arange(424)
        order[[i, j, 180 + i, 180 + j]] = order[[j, i, 180 + j, 180 + i]]
        noticed.append(not taken(order))
    assert np.mean(noticed) > 0.85


@needs_atlases
def test_tian_in_other_orders():
    from dataclasses import replace

    from fmri_book.ingest import read_atlas

    folder = SHARED / "data" / "atlases"
    tian = "Schaefer2018_400Parcels_7Networks_order_Tian_Subcortex_S3"
    both = read_atlas(folder / f"{tian}_MNI152NLin6Asym_2mm.nii.gz", folder / f"{tian}_label.txt").space
    assert check_parcels(both) is both

    def changed(order=None, flip=()):
        xyz = np.array(both.coords)
        xyz[:50] = xyz[:50] if order is None else xyz[:50][order]
        xyz[list(flip), 0] *= -1
        return replace(both, coords=xyz)

    with pytest.raises(ValueError, match="expected .*-rh .number 1. on the right.*mirrored"):
        check_parcels(changed(flip=range(50)))
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = np.concatenate([rng.permutation(25), 25 + rng.permutation(25)])
        with pytest.raises(ValueError, match="mm outwards, forwards and upwards .* another order"):
            check_parcels(changed(order))


@given(st.integers(0, 2**32 - 1))
def test_a_fingerprint_says_the_box(seed):
    xyz = np.random.default_rng(seed).uniform(-100, 100, (30, 3))
    word = fingerprint(xyz)
    assert len(word) == 30 and not beside(xyz, word).any()
    moved = beside(xyz + [0, 0, 300], word)  # up to the open boxes, or out of those below
    top = np.array([atlases._LETTERS.index(c) % 4 == 3 for c in word])
    assert not moved[top].any() and (moved[~top] > 0).all()


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_units(kind):
    xyz = Space.named("schaefer100").coords.astype(np.float32)
    check_coordinates(kind(xyz), 100)
    check_coordinates(kind(xyz[None]), 100)
    for wrong, message in (
        ((xyz + 150) / 2, "voxel numbers"),
        (xyz / 1000, "found numbers up to 0.0"),
        (xyz * 10, "within 250 of the origin"),
        (np.where(xyz > 60, np.nan, xyz), "finite coordinates"),
        (xyz[:, :2], r"found shape \(100, 2\)"),
        (xyz[:50], r"for 100 parcels, found shape \(50, 3\)"),
    ):
        with pytest.raises(ValueError, match=f"here: .*{message}"):
            check_coordinates(kind(wrong), 100, "here")


@pytest.mark.parametrize(
    ("name", "side"),
    [("LH_Vis_1", "L"), ("7Networks_RH_Vis_3", "R"), ("HIP-head-m-rh", "R"), ("lAMY-lh", "L"), ("lGP-rh", "R"), ("Brain-Stem", ""),
     ("Right-Hippocampus", "R"), ("a424_7", ""), ("Limbic", ""), ("lh_R_area", "L")],
)  # fmt: skip
def test_sides_in_names(name, side):
    assert side_in_name(name) == side
