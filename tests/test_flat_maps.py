"""Chapter 2: flat maps. Numbers against a brute-force reference and SciPy, contracts, bad input, the cache, pycortex."""

import importlib.util
import pickle
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.interpolate import LinearNDInterpolator

from fmri_book import data
from fmri_book import flat_maps as f


@pytest.fixture(scope="module")
def fm() -> f.FlatMap:
    return f.FlatMap.fsaverage5()


@pytest.fixture(scope="module")
def hcp() -> f.FlatMap:
    return f.FlatMap.fs_lr_32k()


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((20, 20484)).astype(np.float32)


def sheet(
    rows: int = 6, columns: int = 7, step: float = 3.0, shift: float = 0.0, jitter: float = 0.0, seed: int = 0
):
    "A small flat mesh: a grid of vertices, two triangles a cell."
    y, x = np.mgrid[0:rows, 0:columns]
    coords = np.stack([x.ravel() * step + shift, y.ravel() * step, np.zeros(x.size)], 1).astype(float)
    coords[:, :2] += np.random.default_rng(seed).uniform(-jitter, jitter, (len(coords), 2)) * step
    a = (y[:-1, :-1] * columns + x[:-1, :-1]).ravel()
    faces = np.concatenate(
        [np.stack([a, a + 1, a + columns], 1), np.stack([a + 1, a + columns + 1, a + columns], 1)]
    )
    return coords, faces


def small_map(**options) -> f.FlatMap:
    options = {"height": 30, "width": 70, "cache": False} | options
    return f.FlatMap.from_surfaces(sheet(jitter=0.2), sheet(jitter=0.2, seed=1), **options)


def brute_force_mask(fm: f.FlatMap) -> np.ndarray:
    "Every pixel asks every triangle near its row, one triangle after the other, by the signs of three cross products."
    mask = np.zeros((fm.height, fm.width), bool)
    x, y = np.meshgrid(fm.raster.x, fm.raster.y)
    for a, b, c in fm.vertices[fm.faces]:
        low, high = np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)
        rows = np.flatnonzero((fm.raster.y >= low[1] - 1) & (fm.raster.y <= high[1] + 1))
        columns = np.flatnonzero((fm.raster.x >= low[0] - 1) & (fm.raster.x <= high[0] + 1))
        if not len(rows) or not len(columns):
            continue
        box = np.ix_(rows, columns)
        px, py = x[box], y[box]
        signs = [
            (q[0] - p[0]) * (py - p[1]) - (q[1] - p[1]) * (px - p[0]) for p, q in ((a, b), (b, c), (c, a))
        ]
        mask[box] |= (np.min(signs, 0) >= -1e-9) | (np.max(signs, 0) <= 1e-9)
    return mask


# ------------------------------------------------------------------ the map of the book's recording


def test_fsaverage5_is_what_the_issue_names(fm):
    assert fm.mask.shape == (224, 560) == (fm.height, fm.width) and fm.mask.dtype == bool
    assert fm.n_vertices == 20484 and 1.25 < fm.pixel_size < 1.27
    assert sparse.issparse(fm.weights) and fm.weights.format == "csr"
    assert fm.weights.shape == (fm.mask.sum(), 20484) == (fm.n_pixels, fm.n_vertices)
    assert np.diff(fm.weights.indptr).max() <= 3 and (fm.weights.data > 0).all()
    assert np.abs(np.asarray(fm.weights.sum(1)).ravel() - 1).max() < 1e-12
    assert (np.flatnonzero(fm.mask.ravel()) == fm.pixels).all()  # row-major


def test_hemispheres_lie_left_then_right(fm):
    left, right = fm.vertices[:10242], fm.vertices[10242:]
    assert np.isclose(np.nanmax(left[:, 0]), -8) and np.isclose(np.nanmin(right[:, 0]), 8)
    side = fm.project(np.where(np.arange(20484) < 10242, -1.0, 1.0))
    x = np.broadcast_to(fm.raster.x, fm.mask.shape)
    assert (side[fm.mask & (x < 0)] == -1).all() and (side[fm.mask & (x > 0)] == 1).all()


def test_row_0_is_the_top(fm):
    up = fm.project(np.nan_to_num(fm.vertices[:, 1]))
    top, bottom = (np.flatnonzero(fm.mask.any(1))[k] for k in (0, -1))
    assert up[top][fm.mask[top]].min() > 100 > -100 > up[bottom][fm.mask[bottom]].max()


@pytest.mark.parametrize("a, b, c", [(1, 0, 0), (0, 1, 0), (3, -2, 5), (0.01, 0.02, -1)])
def test_linear_functions_come_out_exactly(fm, a, b, c):
    x, y = np.meshgrid(fm.raster.x, fm.raster.y)
    values = a * fm.vertices[:, 0] + b * fm.vertices[:, 1] + c
    image = fm.project(np.nan_to_num(values))
    assert np.abs(image - (a * x + b * y + c))[fm.mask].max() < 1e-4
    assert (image[~fm.mask] == 0).all()


def test_float32_values_are_exact_to_their_own_precision(fm):
    values = np.nan_to_num(fm.vertices[:, 0]).astype(np.float32)
    assert np.abs(fm.project(values) - fm.raster.x)[fm.mask].max() < 1e-4


def test_mask_is_the_brute_force_mask(fm):
    assert (brute_force_mask(fm) == fm.mask).all()


def test_mask_agrees_with_the_nilearn_files_themselves(fm):
    "Not through our own clean-up: the flat surface's triangles with a longest side below 16 mm."
    mesh = data.surface_mesh("fsaverage5", "flat")
    side = np.linalg.norm(mesh.coords[mesh.faces] - np.roll(mesh.coords[mesh.faces], 1, 1), axis=-1).max(1)
    assert (np.sort(mesh.faces[side < 16], axis=None) == np.sort(fm.faces, axis=None)).all()
    assert fm.report.stretched == (side >= 16).sum() == 27


def test_no_used_vertex_is_outside_the_picture(fm, hcp):
    for m in (fm, hcp, fm.grid(112, 280), fm.grid(56, 140)):
        left, right, bottom, top = m.extent
        x, y = m.vertices[np.unique(m.faces)].T
        assert x.min() >= left and x.max() <= right and y.min() >= bottom and y.max() <= top
        assert m.report.vertices_outside == 0


def test_same_as_scipy_where_the_triangles_are_the_same(fm, frames):
    drawn = f.FlatMap.from_surfaces(
        *f.split_hemispheres(data.surface_mesh("fsaverage5", "flat")), triangulation="delaunay", cache=False
    )
    row, column = np.nonzero(drawn.mask)
    used = np.unique(drawn.faces)
    points = np.stack([drawn.raster.x[column], drawn.raster.y[row]], 1)
    expected = LinearNDInterpolator(drawn.vertices[used], frames[:3, used].T.astype(float))(points).T
    assert np.abs(drawn.project_packed(frames[:3]) - expected).max() < 1e-4
    assert not (fm.mask & ~drawn.mask).any() and (drawn.mask & ~fm.mask).sum() < 0.02 * fm.n_pixels


def test_fs_lr_map(hcp):
    assert hcp.n_vertices == 64984 and hcp.mask.shape == (224, 560) and hcp.pixel_size == 1.2
    assert abs(hcp.n_pixels - 68346) <= 20  # the count of specs/fmri_fm.md, at almost the same scale
    assert hcp.report.covered_twice == 0 and hcp.report.flipped == 7 and hcp.report.stretched == 1
    assert (brute_force_mask(hcp) == hcp.mask).all()
    outside = data.parcellation(1000, "fsLR_32k") == 0
    assert not hcp.seen[outside].any()  # only cortex is drawn


# ------------------------------------------------------------------ projecting


def test_shapes_and_leading_dimensions(fm, frames):
    assert fm.project(frames[0]).shape == (224, 560)
    assert fm.project(frames.reshape(4, 5, -1)).shape == (4, 5, 224, 560)
    assert fm.project(frames[:0]).shape == (0, 224, 560)
    assert fm.project(frames).dtype == np.float32
    assert np.array_equal(fm.project(frames.reshape(4, 5, -1)).reshape(20, 224, 560), fm.project(frames))


def test_projecting_is_the_sparse_product(fm, frames):
    expected = (fm.weights @ frames.T.astype(float)).T
    assert np.abs(fm.pack(fm.project(frames)) - expected).max() < 1e-5
    assert np.array_equal(fm.project_packed(frames), fm.pack(fm.project(frames)))
    assert np.array_equal(fm.unpack(fm.project_packed(frames)), fm.project(frames))


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int16, bool])
def test_other_dtypes(fm, kind):
    values = np.random.default_rng(1).integers(0, 2, (2, 20484)).astype(kind)
    assert np.abs(fm.project(values) - fm.project(values.astype(np.float32))).max() < 1e-6


def test_non_contiguous_input_and_given_output(fm, frames, tmp_path):
    expected = fm.project(frames)
    assert np.array_equal(fm.project(np.asfortranarray(frames)), expected)
    assert np.array_equal(fm.project(np.repeat(frames, 2, 0)[::2]), expected)
    out = np.memmap(tmp_path / "images", np.float32, "w+", shape=expected.shape)
    out[:] = 7
    assert fm.project(frames, out=out) is out and np.array_equal(out, expected)


def test_output_of_the_wrong_shape_is_refused(fm, frames):
    for out in (
        np.zeros((20, 224, 560)),
        np.zeros((19, 224, 560), np.float32),
        np.zeros((20, 560, 224), np.float32).swapaxes(1, 2),
    ):
        with pytest.raises(ValueError, match=r"float32 array of shape \(20, 224, 560\)"):
            fm.project(frames, out=out)


def test_peak_memory_is_below_three_outputs(fm):
    run = np.random.default_rng(0).standard_normal((200, 20484)).astype(np.float32)
    fm.project(run[:1])
    tracemalloc.start()
    images = fm.project(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * images.nbytes


def test_labels_are_not_mixed(fm):
    labels = data.parcellation(400, "fsaverage5")
    image = fm.project_labels(labels)
    assert (
        image.shape == (224, 560)
        and (image[~fm.mask] == -1).all()
        and set(np.unique(image)) <= {-1, *np.unique(labels)}
    )
    strongest = np.array(
        [fm.weights[k].indices[fm.weights[k].data.argmax()] for k in range(0, fm.n_pixels, 997)]
    )
    best = np.array([fm.weights[k].data.max() for k in range(0, fm.n_pixels, 997)])
    assert np.allclose(
        [fm.weights[k, v] for k, v in zip(range(0, fm.n_pixels, 997), fm.strongest[::997], strict=True)], best
    )
    assert (strongest == fm.strongest[::997]).mean() > 0.99


# ------------------------------------------------------------------ the way back


@pytest.mark.parametrize("size, allowed", [((224, 560), 3e-4), ((112, 280), 2e-3), ((56, 140), 1e-3)])
def test_round_trip(fm, frames, size, allowed):
    m = fm.grid(*size) if size != (224, 560) else fm
    images = m.project(frames)
    again = m.project(m.unproject(images))
    assert np.linalg.norm(again - images) < allowed * np.linalg.norm(images)


def test_round_trip_on_fs_lr(hcp):
    images = hcp.project(np.random.default_rng(0).standard_normal((3, 64984)).astype(np.float32))
    assert np.linalg.norm(hcp.project(hcp.unproject(images)) - images) < 2e-3 * np.linalg.norm(images)


def test_vertices_come_back(fm, frames):
    back = fm.unproject(fm.project(frames))
    assert back.shape == frames.shape and back.dtype == np.float32
    assert np.sqrt(np.mean((back - frames)[:, fm.seen] ** 2)) < 0.01


def test_unseen_vertices_are_nan_unless_named(fm, frames):
    back = fm.unproject(fm.project(frames[0]))
    assert np.isnan(back[~fm.seen]).all() and np.isfinite(back[fm.seen]).all() and (~fm.seen).sum() == 1482
    assert (fm.unproject(fm.project(frames[0]), fill=-7)[~fm.seen] == -7).all()


def test_a_run_without_frames_comes_back_without_frames(fm):
    assert fm.unproject(np.zeros((0, 224, 560), np.float32)).shape == (0, 20484)
    assert fm.pack(np.zeros((2, 0, 224, 560))).shape == (2, 0, fm.n_pixels)


def test_least_squares_is_the_solution_of_its_equation():
    m = small_map()
    image = np.random.default_rng(2).standard_normal((30, 70))
    found = m.unproject(image)[m.seen].astype(float)
    weights, pixels = m.weights[:, m.seen].toarray(), m.pack(image)
    mean = (weights / weights.sum(0)).T @ pixels
    support = f.LEAN * weights.sum(0)
    expected = np.linalg.solve(weights.T @ weights + np.diag(support), weights.T @ pixels + support * mean)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_larger_lean_is_calmer_and_less_exact(hcp, frames):
    noise = np.random.default_rng(0).standard_normal((2, 224, 560))
    images = hcp.project(np.random.default_rng(1).standard_normal(64984))
    spread, error = [], []
    for lean in (1e-4, 1e-3, 1e-2):
        spread.append(np.nanstd(hcp.unproject(noise, lean=lean)))
        error.append(np.linalg.norm(hcp.project(hcp.unproject(images, lean=lean)) - images))
    assert spread[0] > 1.5 * spread[1] > 2 * spread[2] and error[0] < error[1] < error[2]
    assert np.array_equal(hcp.unproject(images, lean=f.LEAN), hcp.unproject(images), equal_nan=True)
    for bad in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="expected a lean above 0"):
            hcp.unproject(images, lean=bad)


def test_what_lies_outside_the_mask_is_ignored_on_the_way_back(fm, frames):
    image = fm.project(frames[0])
    changed = np.where(fm.mask, image, np.nan)
    assert np.array_equal(fm.unproject(changed), fm.unproject(image), equal_nan=True)


# ------------------------------------------------------------------ grids


def test_smaller_grids_keep_outline_and_extent(fm):
    for size in ((112, 280), (56, 140)):
        m = fm.grid(*size)
        assert m.mask.shape == size and np.allclose(m.extent, fm.extent)
        covered = fm.mask.reshape(size[0], 224 // size[0], size[1], 560 // size[1]).mean((1, 3))
        assert (m.mask == (covered > 0.5)).mean() > 0.985
    assert fm.grid(224, 560).n_pixels == fm.n_pixels


def test_a_grid_of_another_shape_keeps_square_pixels(fm):
    m = fm.grid(100, 100)
    left, right, bottom, top = m.extent
    assert np.isclose(right - left, top - bottom) and m.report.vertices_outside == 0


def test_published_picture_convention():
    grid = f.Grid(height=224, width=560, pixel_size=1.2, x0=-336.0, y0=146.0)
    assert np.allclose(grid.x[:3], [-336, -334.8, -333.6]) and np.allclose(grid.y[:3], [146, 144.8, 143.6])
    assert np.allclose(f.resize_grid(grid, 112, 280).x[0], -335.4)  # the middle of the first two columns
    assert f.PUBLISHED == dict(height=224, width=560, pixel_size=1.2, origin=(-336.0, 146.0))


# ------------------------------------------------------------------ properties, on random small sheets

sheets = st.builds(
    lambda rows, columns, jitter, seed: (
        sheet(rows, columns, jitter=jitter, seed=seed),
        sheet(rows, columns, jitter=jitter, seed=seed + 1),
    ),
    st.integers(2, 6),
    st.integers(2, 6),
    st.just(0.0) | st.floats(1e-3, 0.22),  # pixels on an edge, or clearly beside it
    st.integers(0, 1000),
)


@settings(max_examples=40, deadline=None)
@given(sheets, st.integers(8, 40), st.integers(16, 80))
def test_properties_of_every_map(surfaces, height, width):
    m = f.FlatMap.from_surfaces(*surfaces, height=height, width=width, padding=0.5, cache=False)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, m.n_vertices))
    assert np.allclose(m.weights.sum(1), 1) and np.diff(m.weights.indptr).max() <= 3
    assert np.allclose(m.project(np.full(m.n_vertices, 2.5)), 2.5 * m.mask, atol=1e-6)
    assert np.allclose(m.project(2 * a - 3 * b), 2 * m.project(a) - 3 * m.project(b), atol=1e-5)
    x, y = np.meshgrid(m.raster.x, m.raster.y)
    assert np.abs(m.project(m.vertices @ [1.0, -2.0]) - (x - 2 * y))[m.mask].max() < 1e-4
    assert (brute_force_mask(m) == m.mask).all()
    image = m.project(a)[m.mask]
    assert image.min() >= a.min() - 1e-6 and image.max() <= a.max() + 1e-6
    assert np.linalg.norm(m.project(m.unproject(m.project(a))) - m.project(a)) < 1e-2 * np.linalg.norm(
        m.project(a)
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=8, max_size=8))
def test_barycentric_weights_find_their_point(numbers):
    point, triangle = np.array(numbers[:2]), np.array(numbers[2:]).reshape(3, 2)
    edges = triangle[1:] - triangle[0]
    if abs(np.linalg.det(edges)) < 1e-2:
        return
    weights = f.barycentric(point[None], triangle[None])[0]
    assert np.isclose(weights.sum(), 1) and np.allclose(weights @ triangle, point, atol=1e-8)


# ------------------------------------------------------------------ who owns a pixel


def test_pixels_on_a_shared_edge_go_to_the_lower_triangle_and_are_not_double():
    square = np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    pixels, owner, weights, twice = f.rasterise(square, faces, f.Grid(5, 5, 1.0, 0.0, 4.0))
    assert len(pixels) == 25 and twice == 0 and np.allclose(weights.sum(1), 1)
    diagonal = [20, 16, 12, 8, 4]
    assert (owner[diagonal] == 0).all()
    assert (f.rasterise(square, faces[::-1], f.Grid(5, 5, 1.0, 0.0, 4.0))[1][diagonal] == 0).all()


def test_flipped_triangles_lose_and_doubles_are_counted():
    square = np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]])
    faces = np.array([[1, 0, 2], [0, 1, 2], [0, 2, 3], [0, 1, 2]])
    _pixels, owner, _, twice = f.rasterise(square, faces, f.Grid(5, 5, 1.0, 0.0, 4.0))
    assert f.flipped_triangles(square, faces).tolist() == [True, False, False, False]
    assert (
        set(owner) == {1, 2} and twice == 3
    )  # the three pixels well inside the triangle that is there three times


def test_a_pixel_outside_of_the_picture_is_no_pixel():
    triangle = np.array([[-50.0, -50], [50, -50], [0, 60]])
    pixels, *_ = f.rasterise(triangle, np.array([[0, 1, 2]]), f.Grid(3, 4, 1.0, 0.0, 2.0))
    assert pixels.tolist() == list(range(12))


# ------------------------------------------------------------------ faults of meshes


def test_stretched_triangles_are_dropped_and_reported():
    coords, faces = sheet(9, 9)
    far = np.concatenate([coords, [[100.0, 3.0, 0]]])
    m = f.FlatMap.from_surfaces(
        (far, np.concatenate([faces, [[0, 9, 81]]])), sheet(9, 9), 40, 120, cache=False
    )
    assert m.report.stretched == 1 and m.report.vertices_lost == 1 and np.isnan(m.vertices[81]).all()
    assert m.n_pixels < 0.75 * m.mask.size and m.vertices.shape == (163, 2)
    smaller = m.grid(20, 60).report  # another grid, the same mesh
    assert (smaller.triangles, smaller.stretched, smaller.vertices_lost) == (257, 1, 1)


def test_too_much_stretched_or_lost_is_refused():
    coords, faces = sheet(9, 9)
    far = np.concatenate([coords, [[100.0, 3.0, 0]]])
    torn = [[0, 9, 81], [0, 18, 81], [0, 27, 81]]
    with pytest.raises(ValueError, match=r"at most 1% stretched triangles, found 3 of 259 \(1.2%\)"):
        f.FlatMap.from_surfaces((far, np.concatenate([faces, torn])), sheet(9, 9), cache=False)
    far = np.concatenate([coords, [[100.0, 3.0, 0], [140.0, 3.0, 0]]])
    lost = np.concatenate([faces, [[0, 81, 82]]])
    with pytest.raises(ValueError, match=r"at most 1% vertices lost with them, found 2 of 164"):
        f.FlatMap.from_surfaces((far, lost), sheet(9, 9), cache=False)


@pytest.mark.parametrize("scale", [0.01, 0.001])
def test_coordinates_that_are_not_in_mm_are_refused(scale):
    flat = f.split_hemispheres(data.surface_mesh("fsaverage5", "flat"))
    with pytest.raises(ValueError, match=r"larger than the gap of 16 mm .* found .* in mm\?"):
        f.FlatMap.from_surfaces(*flat, scale=scale, cache=False)


def test_the_stretch_limit_grows_with_the_mesh():
    coarse, fine = sheet(step=20.0), sheet(step=2.0)
    assert f.stretch_limit(coarse[0][:, :2], coarse[1]) >= 100
    assert f.stretch_limit(fine[0][:, :2], fine[1]) == 16
    assert f.FlatMap.from_surfaces(coarse, coarse, cache=False).report.stretched == 0


def test_triangles_without_area_are_dropped_and_reported():
    coords, faces = sheet()
    m = f.FlatMap.from_surfaces(
        (coords, np.concatenate([faces, [[0, 0, 1], [0, 1, 2]]])), sheet(), cache=False
    )
    assert m.report.degenerate == 2


def test_more_than_one_percent_flipped_is_refused():
    coords, faces = sheet()
    broken = np.concatenate([faces, faces[:3, ::-1]])
    with pytest.raises(ValueError, match=r"at most 1% flipped triangles, found 3 of 123"):
        f.FlatMap.from_surfaces((coords, broken), sheet(), cache=False)


def test_an_overlapping_sheet_is_refused():
    coords, faces = sheet()
    twice = (np.concatenate([coords, coords + [0.5, 0.5, 0]]), np.concatenate([faces, faces + len(coords)]))
    with pytest.raises(ValueError, match=r"covered twice .*overlaps itself.*, found \d+ of \d+"):
        f.FlatMap.from_surfaces(twice, sheet(), cache=False)


def test_a_surface_that_is_not_planar_is_refused_with_its_spread():
    pial = f.split_hemispheres(data.surface_mesh("fsaverage5", "pial"))
    with pytest.raises(
        ValueError, match=r"left surface is not planar: .* z from -48\.32 to 78\.12 mm \(spread 126\.45 mm"
    ):
        f.FlatMap.from_surfaces(*pial)


def test_stale_coordinates_of_unused_vertices_do_not_matter():
    coords, faces = sheet()
    stale = np.concatenate([coords, [[500.0, 900, 77], [np.nan, 0, 0]]])
    m = f.FlatMap.from_surfaces((stale, faces), sheet(), 30, 70, cache=False)
    plain = f.FlatMap.from_surfaces(sheet(), sheet(), 30, 70, cache=False)
    assert (
        (m.mask == plain.mask).all()
        and m.pixel_size == plain.pixel_size
        and np.isnan(m.vertices[42:44]).all()
    )


@pytest.mark.parametrize(
    "left, message",
    [
        ((np.zeros((5, 2)), np.array([[0, 1, 2]])), r"coordinates \(vertices, 3\), found shape \(5, 2\)"),
        ((np.zeros((5, 3)), np.array([[0, 1, 9]])), r"vertex numbers 0 to 4 .* found 0 to 9"),
        ((np.zeros((5, 3)), np.zeros((0, 3), int)), r"triangles \(n, 3\) with n > 0, found shape \(0, 3\)"),
        ((np.zeros((5, 3)), np.zeros((2, 3))), r"integer vertex numbers, found float64"),
        ((np.full((5, 3), np.nan), np.array([[0, 1, 2]])), r"finite coordinates, found 3 vertices"),
        ((np.zeros((5, 3)), np.array([[0, 1, 2]])), r"expected triangles with an area .* found none among"),
    ],
)
def test_broken_surfaces_are_refused(left, message):
    right = left if "area" in message else sheet()
    with pytest.raises(ValueError, match=message):
        f.FlatMap.from_surfaces(left, right, cache=False)


def test_a_picture_that_is_too_small_for_the_sheet_is_refused():
    with pytest.raises(ValueError, match=r"84 used vertices inside the picture, found \d+ outside"):
        small_map(pixel_size=0.6)
    with pytest.raises(ValueError, match="no pixel inside any"):
        small_map(pixel_size=1.0, origin=(500.0, 500.0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"triangulation": "voronoi"}, "expected triangulation 'mesh' or 'delaunay', found 'voronoi'"),
        ({"scale": "fit"}, "expected a pixel_size in mm together with scale='fit'"),
        ({"keep": np.ones(3, bool)}, r"expected keep to be 84 booleans, found bool of shape \(3,\)"),
        ({"keep": np.zeros(84, bool)}, "expected triangles between the kept vertices, found none"),
        ({"height": 0}, "expected at least 1 × 1 pixels"),
        ({"height": 30.0}, r"expected a whole number of pixels, found height 30\.0"),
        ({"pixel_size": -1.0}, "expected at least 1 × 1 pixels of more than 0 mm"),
        ({"pixel_size": np.inf}, "expected at least 1 × 1 pixels of more than 0 mm"),
        ({"pixel_size": np.nan}, "expected at least 1 × 1 pixels of more than 0 mm"),
        ({"origin": (np.nan, 0)}, "expected a finite position of the first pixel"),
        ({"scale": -1}, "expected a scale above 0, or 'fit', found -1"),
        ({"scale": "auto"}, "expected a scale above 0, or 'fit', found 'auto'"),
        ({"max_side": np.nan}, "expected a max_side above 0 mm, found nan"),
        ({"padding": -2.0}, "expected a padding of at least 0 mm"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_map(**options)


def test_grids_are_whole_numbers(fm):
    for size in ((112.0, 280.0), (0, 280), (112, "280")):
        with pytest.raises(ValueError, match=r"whole number|at least 1 × 1"):
            fm.grid(*size)
    grid = f.Grid(np.int16(3), np.int64(4), np.float32(2), 0, 1)
    assert [type(v) for v in (grid.height, grid.width, grid.pixel_size, grid.x0, grid.y0)] == [
        int,
        int,
        float,
        float,
        float,
    ]


def test_a_place_of_ones_own_may_cut_off_one_percent_with_a_warning():
    whole, surfaces = small_map(), (sheet(30, 30), sheet(30, 30))
    tall = f.FlatMap.from_surfaces(*surfaces, 60, 140, cache=False)
    surfaces[0][0][-1, 1] += 0.7 * tall.pixel_size  # beyond the top edge, by a fifth of a pixel
    place = dict(pixel_size=tall.pixel_size, origin=(tall.raster.x0, tall.raster.y0))
    with pytest.warns(UserWarning, match="1 of 1800 used vertices lie beyond the picture"):
        m = f.FlatMap.from_surfaces(*surfaces, 60, 140, cache=False, **place)
    assert m.report.vertices_outside == 1
    with pytest.raises(ValueError, match=r"outside: .*call `.grid\(height, width\)`"):
        small_map(pixel_size=0.4, origin=(whole.raster.x0, whole.raster.y0))


def test_left_and_right_must_be_left_and_right(tmp_path):
    from nibabel import gifti, load, save

    flat = f.split_hemispheres(data.surface_mesh("fsaverage5", "flat"))
    paths = [tmp_path / "lh.gii", tmp_path / "rh.gii"]
    for path, surface, side in zip(paths, flat, ("CortexLeft", "CortexRight"), strict=True):
        f._write_gifti(path, *surface)
        image = load(path)
        image.darrays[0].meta = gifti.GiftiMetaData(AnatomicalStructurePrimary=side)
        save(image, path)
    assert f.FlatMap.from_surfaces(*paths, cache=False).n_vertices == 20484
    with pytest.raises(ValueError, match=r"expected the left hemisphere, found CortexRight in the header"):
        f.FlatMap.from_surfaces(*paths[::-1], cache=False)
    with pytest.raises(ValueError, match=r"expected the right hemisphere, found CortexLeft"):
        f.FlatMap.from_surfaces(paths[0], paths[0], cache=False)
    f._write_gifti(paths[0], *flat[0])  # and one whose header says nothing
    with pytest.raises(ValueError, match="the same file twice"):
        f.FlatMap.from_surfaces(paths[0], paths[0], cache=False)


def test_hemispheres_that_turn_the_other_way_round_are_no_flipped_sheet():
    coords, faces = sheet(jitter=0.2, seed=1)
    plain, turned = (
        small_map(),
        f.FlatMap.from_surfaces(sheet(jitter=0.2), (coords, faces[:, ::-1]), 30, 70, cache=False),
    )
    assert turned.report.flipped == 0 and (turned.mask == plain.mask).all()
    assert abs(turned.weights - plain.weights).max() < 1e-12


def test_what_is_left_out_by_keep_is_not_checked():
    coords, faces = sheet()
    dented = coords.copy()
    dented[[0, 6], 2] = 40  # two corners leave the plane
    keep = np.ones(84, bool)
    keep[[0, 6]] = False
    m = f.FlatMap.from_surfaces((dented, faces), sheet(), 30, 70, keep=keep, cache=False)
    assert np.isnan(m.vertices[[0, 6]]).all()
    with pytest.raises(ValueError, match="left surface is not planar"):
        f.FlatMap.from_surfaces((dented, faces), sheet(), 30, 70, cache=False)


# ------------------------------------------------------------------ bad values


def test_wrong_number_of_vertices(fm):
    with pytest.raises(
        ValueError, match=r"expected 20484 vertices in the last dimension, found shape \(3, 64984\)"
    ):
        fm.project(np.zeros((3, 64984)))
    with pytest.raises(ValueError, match="expected 20484 vertices"):
        fm.project(np.float32(3))


def test_nan_and_infinity_are_refused_with_their_place(fm, frames):
    vertex = int(np.flatnonzero(fm.seen)[77])
    for bad in (np.nan, np.inf):
        frames[13, vertex] = bad
        with pytest.raises(
            ValueError,
            match=rf"finite values at the 19002 vertices .* at 1 of them \(first: frame 13, vertex {vertex}\)",
        ):
            fm.project(frames)


def test_nan_off_the_map_does_no_harm(fm, frames):
    expected = fm.project(frames)
    frames[:, ~fm.seen] = np.nan
    assert np.array_equal(fm.project(frames), expected)


def test_text_and_complex_numbers_are_refused(fm):
    for bad in (np.full(20484, "a"), np.zeros(20484, complex)):
        with pytest.raises(ValueError, match="expected real numbers"):
            fm.project(bad)
    with pytest.raises(ValueError, match="expected real numbers, found complex128"):
        fm.unproject(np.zeros((224, 560), complex))


def test_numbers_that_float32_cannot_hold_are_refused(fm):
    for bad in (1e39, -3.4028235e38):
        values = np.zeros((3, 20484))
        values[2, np.flatnonzero(fm.seen)[5]] = bad
        with pytest.raises(ValueError, match=r"more than float32 holds \(3.4e\+38\) at 1 of them"):
            fm.project(values)
    with pytest.raises(ValueError, match="the most that float32 holds"):
        fm.unproject(np.full((224, 560), 1e39))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int8, np.int32])
def test_labels_of_any_integer_kind(fm, kind):
    labels = (np.arange(20484) % 100).astype(kind)
    image = fm.project_labels(labels)
    assert image.dtype == np.int64 and np.array_equal(image, fm.project_labels(labels.astype(int)))


def test_labels_that_are_no_labels_are_refused(fm):
    for bad in (np.zeros((2, 20484), int), np.zeros(20484), np.zeros(20484, bool), np.zeros(5, int)):
        with pytest.raises(ValueError, match=r"expected 20484 integer labels, found (int|float|bool)"):
            fm.project_labels(bad)


def test_a_fill_value_that_the_numbers_cannot_hold(fm):
    packed = np.ones(fm.n_pixels, np.int64)
    image = fm.unpack(packed, fill=np.nan)
    assert np.isnan(image[~fm.mask]).all() and (image[fm.mask] == 1).all()
    assert fm.unpack(packed).dtype == np.int64 and fm.unpack(packed > 0).dtype == bool
    image = fm.unpack(packed.astype(np.uint8), fill=-1)
    assert (image[~fm.mask] == -1).all() and (image[fm.mask] == 1).all()
    assert np.isnan(fm.unpack(packed.astype(np.float32), fill=np.nan)[~fm.mask]).all()


def test_a_shared_map_cannot_be_changed_by_accident(fm):
    assert f.FlatMap.fsaverage5() is fm
    for array in (fm.vertices, fm.faces, fm.pixels, fm.mask, fm.seen, fm.strongest, fm.weights.data):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_wrong_images_are_refused(fm):
    with pytest.raises(ValueError, match=r"expected images of 224 × 560 pixels, found shape \(2, 112, 280\)"):
        fm.unproject(np.zeros((2, 112, 280)))
    with pytest.raises(ValueError, match=r"finite values inside the mask, found 72599 pixels"):
        fm.unproject(np.full((224, 560), np.nan))
    with pytest.raises(ValueError, match=r"expected 72599 pixels of the mask"):
        fm.unpack(np.zeros((2, 77763)))


# ------------------------------------------------------------------ the cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FMRI_BOOK_CACHE", str(tmp_path))
    return tmp_path / "flat_maps"


def test_the_second_map_is_read_from_disk(cache, monkeypatch):
    first = small_map(cache=True)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(f, "rasterise", None)  # would fail if it were called
    again = small_map(cache=True)
    assert (again.weights != first.weights).nnz == 0 and again.report == first.report


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "one byte", "other arrays"])
def test_a_damaged_file_is_rebuilt(cache, damage):
    first = small_map(cache=True)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    if damage == "other arrays":
        np.savez(path, pixels=np.arange(3))
    else:
        middle = len(content) // 2
        path.write_bytes(
            {
                "truncated": content[:middle],
                "empty": b"",
                "garbage": b"PK" + b"x" * 500,
                "one byte": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            }[damage]
        )
    again = small_map(cache=True)
    assert (again.weights != first.weights).nnz == 0
    assert set(np.load(path).files) == set(f._STORED)  # and the file is whole again


@pytest.mark.parametrize("damage", ["short data", "zeros", "index", "row sums", "pixels", "starts"])
def test_a_readable_file_that_is_no_matrix_is_rebuilt(cache, damage):
    first = small_map(cache=True)
    (path,) = cache.iterdir()
    with np.load(path) as stored:
        arrays = dict(stored)
    if damage == "short data":
        arrays["data"] = arrays["data"][:-3]
    elif damage == "starts":
        arrays["indptr"] = arrays["indptr"][::-1]
    else:
        name = {"index": "indices", "pixels": "pixels"}.get(damage, "data")
        arrays[name] = {
            "zeros": arrays["data"] * 0,
            "index": arrays["indices"] + 80,
            "row sums": arrays["data"] * 1.1,
            "pixels": arrays["pixels"] + 30 * 70,
        }[damage]
    np.savez(path, **arrays)
    again = small_map(cache=True)
    assert (again.weights != first.weights).nnz == 0 and (again.pixels == first.pixels).all()


def test_without_a_cache_nothing_is_written(cache):
    small_map(cache=False).grid(15, 35)
    assert not cache.exists()


def test_a_change_of_geometry_grid_or_rules_is_another_file(cache, monkeypatch):
    small_map(cache=True)
    small_map(cache=True, height=31)
    small_map(cache=True, scale=1.01)
    monkeypatch.setattr(f, "CACHE_VERSION", 99)
    small_map(cache=True)
    assert len(list(cache.iterdir())) == 4


def test_many_at_once_write_one_whole_file(cache):
    with ThreadPoolExecutor(8) as pool:
        maps = list(pool.map(lambda _: small_map(cache=True), range(16)))
    assert len(list(cache.iterdir())) == 1
    assert all((m.weights != maps[0].weights).nnz == 0 for m in maps)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "flat_maps").write_text("a file where the folder should be")
    monkeypatch.setenv("FMRI_BOOK_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="could not be kept"):
        assert small_map(cache=True).n_pixels > 0


# ------------------------------------------------------------------ pycortex


def test_the_fsaverage5_subject_gives_the_same_map(fm, tmp_path):
    folder = f.pycortex_subject(tmp_path)
    assert folder == f.pycortex_subject(tmp_path)  # made once
    same = f.FlatMap.from_pycortex("fsaverage5", store=tmp_path)
    assert (same.mask == fm.mask).all() and abs(same.weights - fm.weights).max() < 1e-9


def test_a_missing_subject_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"'32k_fs_LR' in {tmp_path}.*download_fs_lr\(pycortex_store='{tmp_path}'\)"
    ):
        f.FlatMap.from_pycortex("32k_fs_LR", store=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cortex.download_subject\('nobody'\)"):
        f.FlatMap.from_pycortex("nobody", store=tmp_path)


def test_the_published_recipe_is_applied_to_32k_fs_lr(tmp_path):
    "A stand-in with 64,984 vertices: S1200's flat surface at the scale at which it fits the published box."
    flat = data.surface_mesh("fsLR_32k", "flat")
    (tmp_path / "32k_fs_LR" / "surfaces").mkdir(parents=True)
    for side, (coords, faces) in zip(("lh", "rh"), f.split_hemispheres(flat), strict=True):
        f._write_gifti(tmp_path / "32k_fs_LR" / "surfaces" / f"flat_{side}.gii", coords * 0.66, faces)
    m = f.FlatMap.from_pycortex("32k_fs_LR", store=tmp_path)
    assert (
        m.mask.shape == (224, 560)
        and m.pixel_size == 1.2
        and np.allclose((m.raster.x0, m.raster.y0), (-336, 146))
    )
    assert not m.seen[data.parcellation(1000, "fsLR_32k") == 0].any()
    more = f.FlatMap.from_pycortex("32k_fs_LR", store=tmp_path, triangulation="delaunay")
    assert more.n_pixels > m.n_pixels
    with pytest.raises(ValueError, match=r"outside: .*call `.grid\(height, width\)`"):
        f.FlatMap.from_pycortex("32k_fs_LR", store=tmp_path, height=112, width=280)
    assert m.grid(112, 280).mask.shape == (112, 280)


@pytest.mark.parametrize("what", ["a medial wall out of the plane", "a vertex beyond the published picture"])
def test_the_published_recipe_on_files_that_are_not_as_clean(tmp_path, what):
    mesh, folder = data.surface_mesh("fsLR_32k", "flat"), tmp_path / "32k_fs_LR" / "surfaces"
    folder.mkdir(parents=True)
    for side, (coords, faces) in zip(("lh", "rh"), f.split_hemispheres(mesh), strict=True):
        coords, wall = (
            coords * 0.66,
            data.parcellation(1000, "fsLR_32k").reshape(2, -1)[int(side == "rh")] == 0,
        )
        if what.startswith("a medial"):
            coords[wall, 2] = 20.0
            ring = np.flatnonzero(wall)[:300].reshape(-1, 3)  # and the file lists triangles there
            faces = np.concatenate([faces, ring])
        elif side == "lh":
            top = np.flatnonzero(~wall & np.isin(np.arange(len(wall)), faces))
            top = top[coords[top, 1].argmax()]
            coords[top, 1] = 150.0
        f._write_gifti(folder / f"flat_{side}.gii", coords, faces)
    if what.startswith("a medial"):
        m = f.FlatMap.from_pycortex("32k_fs_LR", store=tmp_path)
        assert m.report.vertices_outside == 0 and np.isfinite(m.vertices[:, 0]).sum() > 55_000
    else:
        with pytest.warns(UserWarning, match="1 of .* used vertices lie beyond the picture"):
            m = f.FlatMap.from_pycortex("32k_fs_LR", store=tmp_path, max_side=200.0)
        assert m.report.vertices_outside == 1


def test_the_subject_that_comes_with_pycortex():
    "S1: a real hand-made flat map with 300,000 vertices, whose unused vertices keep folded coordinates."
    try:
        f.pycortex_flat("S1")
    except FileNotFoundError:
        pytest.skip("pycortex is not installed")
    m = f.FlatMap.from_pycortex("S1", cache=False)
    assert (
        m.n_vertices == 304380
        and 0 < m.report.flipped < 100
        and 0 < m.report.covered_twice < 0.001 * m.n_pixels
    )


def test_pycortex_is_imported_with_the_books_own_store(tmp_path):
    "In a process of its own, as the first import decides; the settings of the user stay as they are."
    if importlib.util.find_spec("cortex") is None:
        pytest.skip("pycortex is not installed")
    code = (
        "import os, sys; from pathlib import Path; from fmri_book.flat_maps import import_pycortex, pycortex_subject\n"
        "before = os.environ.get('XDG_CONFIG_HOME'); pycortex_subject(); cortex = import_pycortex()\n"
        "assert 'fsaverage5' in cortex.db.subjects, list(cortex.db.subjects)\n"
        "assert os.environ.get('XDG_CONFIG_HOME') == before\n"
        "assert len(cortex.db.get_surf('fsaverage5', 'flat', merge=True)[0]) == 20484\n"
        "print(cortex.db.filestore)"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "FMRI_BOOK_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "cache" / "pycortex" / "db")
    assert not (home / ".config" / "pycortex").exists()


# ------------------------------------------------------------------ what the cuts do, pictures, import


def test_a_flat_copy_of_itself_has_no_distortion(fm):
    folded = np.pad(np.nan_to_num(fm.vertices), ((0, 0), (0, 1)))
    assert np.nanmax(np.abs(f.areal_distortion(fm, folded))) < 1e-9
    assert np.allclose(np.nanmedian(f.areal_distortion(fm, 2 * folded)), -2)


def test_torn_neighbours_are_found_on_a_sheet_with_a_known_cut():
    coords, faces = sheet(6, 8)
    cut = faces[
        ~((coords[faces][..., 0].min(1) >= 9) & (coords[faces][..., 0].max(1) <= 12))
    ]  # one column of cells
    apart = np.where(coords[:, [0]] >= 12, coords + [[60.0, 0, 0]], coords)
    m = f.FlatMap.from_surfaces((apart, cut), sheet(6, 8), 40, 120, cache=False)
    folded = np.concatenate([coords, coords + [500.0, 0, 0]])
    _pairs, on_surface, on_map = f.torn_neighbours(m, folded, np.concatenate([faces, faces + 48]), reach=3.5)
    torn = on_map > 4 * on_surface
    assert torn.sum() == 2 * 6 and np.allclose(on_surface[torn], 3) and np.allclose(on_map[torn], 63)


def test_volume_slices_refuse_other_spaces():
    with pytest.raises(ValueError, match=r"expected a volume space, found 'schaefer100' \(parcels\)"):
        f.volume_slices(np.zeros(100), data.Space.named("schaefer100"))


def test_volume_slices_show_the_whole_brain():
    space = data.Space.named("MNI152NLin6Asym_4mm")
    image = f.volume_slices(np.ones(len(space.voxels)), space, heights=(20,))
    level = round((20 - space.affine[2, 3]) / space.affine[2, 2])
    assert np.isfinite(image).sum() == (space.voxels[:, 2] == level).sum()


def test_volume_slices_keep_left_left():
    space = data.Space.named("MNI152NLin6Asym_4mm")
    image = f.volume_slices(space.coords[:, 0], space, heights=(20,))
    assert np.nanmean(image[:, : image.shape[1] // 2]) < 0 < np.nanmean(image[:, image.shape[1] // 2 :])
    front = f.volume_slices(space.coords[:, 1], space, heights=(20,))
    assert np.nanmean(front[: len(front) // 2]) > np.nanmean(
        front[len(front) // 2 :]
    )  # the front is at the top


def test_the_embedded_viewer_loads_nothing_from_a_file():
    page = f.embedded_viewer("a/b.html", "x", 'a "viewer"').data
    assert (
        " src=" not in page
        and 'data-src="a/b.html"' in page
        and "make serve" in page
        and "&quot;viewer&quot;" in page
    )


def test_importing_the_module_is_light():
    code = (
        "import sys, fmri_book.flat_maps; heavy = {'nilearn', 'nibabel', 'cortex', 'plotly', 'matplotlib', 'pandas', 'torch', 'PIL'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_map_travels_to_another_process(fm, frames):
    fm.unproject(fm.project(frames[:1]))  # with everything computed that can be
    copy = pickle.loads(pickle.dumps(fm))
    assert np.array_equal(copy.project(frames), fm.project(frames)) and copy.report == fm.report
