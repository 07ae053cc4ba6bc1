"""The clip store: bit for bit, safe to kill, every byte accounted for. Numbers against plain numpy and plain files."""

import errno
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fmri_book import storage
from fmri_book.data import Space
from fmri_book.storage import (
    DamagedFile,
    Layout,
    Record,
    Store,
    atomic_path,
    finish_store,
    finished_runs,
    run_key,
    sweep,
    verify,
    write_manifest,
    write_run,
    write_store,
)

MASK = np.array([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1]], bool)
EVENTS = pd.DataFrame(
    {
        "onset": [0.0, 2.5],
        "duration": [1.0, np.nan],
        "trial_type": ["faces", "čtení"],
        "response": [3.5, 4.25],
    }
)


class Source(list):
    "What a source is: a layout and records one after the other."

    def __init__(self, layout, records):
        super().__init__(records)
        self.layout = layout


def some_records(n=3, n_sites=11, frames=10, dtype=np.float32, offset=0.0):
    rng = np.random.default_rng(0)
    return [
        Record(
            (rng.standard_normal((frames + i, n_sites)) + offset).astype(dtype),
            1.0 + i / 8,
            f"{i:02d}",
            task="rest",
            events=EVENTS if i % 2 else None,
            meta={"number": i, "name": "ž", "nested": {"a": [1, 2.5, None]}},
        )
        for i in range(n)
    ]


def some_source(patch=None, **kwargs):
    return Source(Layout.flat(MASK, "fsLR_32k", patch), some_records(**kwargs))


def tree(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def in_memory():
    "A temporary folder where forcing files to the disk costs nothing, for tests that do it thousands of times."
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


@pytest.fixture
def memory_disk():
    with in_memory() as folder:
        yield Path(folder)


def write(source, folder, **kwargs):
    return write_store(source, folder, progress=False, **kwargs)


# --- names and layouts


def test_keys():
    assert run_key("01", "1", "rest", "2") == "sub-01_ses-1_task-rest_run-2"
    assert run_key("01", task="rest") == "sub-01_task-rest"
    assert run_key("e\u0301") == run_key("\u00e9") == "sub-\u00e9"
    assert (
        Record(np.zeros((2, 1), np.float32), 1, "sub-01", "ses-2", "task-x", "run-3").key
        == "sub-01_ses-2_task-x_run-3"
    )


@pytest.mark.parametrize("wrong", ["", "a/b", "a\\b", "a\nb", "a\0", "01_run-1", "01_ses-1", "\udc80"])
def test_keys_that_could_be_mistaken_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        run_key(wrong)


def by_patch(mask, height, width):
    "The order, told in loops."
    number = {pixel: i for i, pixel in enumerate(zip(*np.nonzero(mask)))}
    out = []
    for top in range(0, mask.shape[0], height):
        for left in range(0, mask.shape[1], width):
            for y in range(top, top + height):
                out += [number[y, x] for x in range(left, left + width) if (y, x) in number]
    return out


masks = npst.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))).filter(np.any)


@given(masks, st.integers(1, 4), st.integers(1, 4))
def test_patch_order(mask, height, width):
    layout = Layout.flat(mask, patch=(height, width))
    assert layout.order.tolist() == by_patch(mask, height, width)
    assert np.array_equal(layout.order[layout.inverse], np.arange(layout.n_sites))
    pixels = np.argwhere(mask)[layout.order]
    assert layout.patch_table[:, 3].sum() == layout.n_sites
    for row, column, first, count in layout.patch_table:
        assert count > 0 and np.all(pixels[first : first + count] // [height, width] == [row, column])


def test_layouts_that_differ_have_different_digests(tmp_path):
    other = MASK.copy()
    other[0, 0], other[0, 1] = True, False
    layouts = [
        Layout.flat(MASK),
        Layout.flat(other),
        Layout.flat(MASK, "fsaverage5"),
        Layout.flat(MASK, patch=(2, 2)),
        Layout.flat(MASK, patch=(2, 3)),
        Layout.flat(np.pad(MASK, 1)),
        Layout.of("schaefer100"),
        Layout.of("schaefer200"),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    for i, layout in enumerate(layouts):
        kept = Layout.load(layout.save(tmp_path / f"{i}.npz"))
        assert kept == layout and (kept.patch, kept.surface, kept.space) == (
            layout.patch,
            layout.surface,
            layout.space,
        )
        assert layout.mask is None or np.array_equal(kept.mask, layout.mask)
        assert pickle.loads(pickle.dumps(kept)) == layout
    assert (
        replace(Layout.load(tmp_path / "0.npz"), patch=(2, 2)).digest == layouts[3].digest
    )  # not the digest it was told


@pytest.mark.parametrize(
    "arguments",
    [
        ("flat", 3),
        ("schaefer100", 100, MASK),
        ("flat", 3, MASK),
        ("schaefer100", 100, None, "", (2, 2)),
        ("flat", 11, MASK, "", (0, 2)),
    ],
)
def test_layouts_that_cannot_be(arguments):
    with pytest.raises(ValueError, match="expected"):
        Layout(*arguments)


def test_a_space_of_ones_own_travels_with_the_store(tmp_path):
    corner = np.zeros((4, 4, 4), bool)
    corner[:, 1:3, 1:3] = True
    space = Space.from_mask("test_storage corner", corner, np.diag([3.0, 3, 3, 1]))
    records = some_records(2, n_sites=16)
    write(Source(Layout.of(space), records), tmp_path / "store")
    code = (
        "import sys; from fmri_book.storage import Store; s = Store(sys.argv[1]); r = s.run(0); "
        "print(r.space, r.sites.shape, float(r.sites.coords.sum()), float(r.bold.sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "store"], capture_output=True, text=True, check=True
    )
    assert (
        done.stdout.strip()
        == f"test_storage corner (4, 4, 4) {float(space.coords.sum())} {float(records[0].values.sum())}"
    )


# --- round trips


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bit_for_bit(data):
    "Any mask, patch, length, chunk and finite numbers (subnormal and minus zero, too) come back as they were."
    mask, dtype = data.draw(masks), data.draw(st.sampled_from([np.float16, np.float32]))
    patch = data.draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    frames, chunk = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    numbers = npst.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
    values = data.draw(npst.arrays(dtype, (frames, int(mask.sum())), elements=numbers))
    layout = Layout.flat(mask, patch=patch)
    start = data.draw(st.integers(0, frames - 1))
    n = data.draw(st.integers(1, frames - start))
    with in_memory() as folder:
        check_bits(Path(folder) / "s", layout, values, chunk, start, n)


def check_bits(folder, layout, values, chunk, start, n):
    store = write(Source(layout, [Record(values, 1.0, "01")]), folder, chunk_frames=chunk)
    assert store.record(0).values.tobytes() == values.tobytes() and store.dtype == values.dtype
    assert (folder / store.index["file"][0]).read_bytes() == values[:, layout.order].tobytes()
    clip = store.read(0, start, n)
    assert (
        clip.tobytes()
        == store.map(0)[start : start + n].tobytes()
        == values[start : start + n, layout.order].tobytes()
    )
    assert verify(folder).ok


@pytest.mark.parametrize("patch", [None, (2, 2)])
@pytest.mark.parametrize("scale", ["none", "site"])
def test_a_store_gives_back_what_it_was_given(tmp_path, scale, patch):
    source = some_source(offset=500, n=4)
    store = write(
        source,
        tmp_path / "s",
        dtype="float16",
        scale=scale,
        patch=patch,
        chunk_frames=4,
        settings={"tr": 1.0},
    )
    assert len(store) == 4 and store.settings == {"tr": 1.0} and store.layout.patch == patch
    for i, (given_, got) in enumerate(zip(source, store, strict=True)):
        assert (got.key, got.tr, got.meta) == (given_.key, given_.tr, given_.meta)
        if given_.events is None:
            assert got.events is None and len(store.events(i)) == 0
        else:
            pd.testing.assert_frame_equal(got.events, EVENTS)
        if scale == "none":
            assert got.values.dtype == np.float16 and np.array_equal(
                got.values, given_.values.astype(np.float16)
            )
        else:
            sd = given_.values.std(0, dtype=float)
            assert (
                got.values.dtype == np.float32 and np.abs(got.values - given_.values).max() < 2e-3 * sd.max()
            )
            mean_sd = np.array([given_.values.mean(0, dtype=float), sd])[:, store.layout.order]
            np.testing.assert_allclose(store.site_scale(i), mean_sd, rtol=1e-6)
        stored = store.map(i).astype(float)
        mean, sd = store.frame_stats(i)
        np.testing.assert_allclose(mean, stored.mean(1), atol=1e-4)
        np.testing.assert_allclose(sd, stored.std(1, ddof=1), rtol=1e-6)
        assert mean.dtype == sd.dtype == np.float32 and mean.shape == (got.n_frames,)
    assert verify(tmp_path / "s").ok


def test_scaling_keeps_constant_sites_and_tiny_fluctuations(tmp_path):
    values = np.full((50, 3), 10_000.1, np.float32)
    values[:, 1] = np.float32(10_000) + np.arange(50, dtype=np.float32) / 512
    store = write(
        Source(Layout.flat(np.ones((1, 3))), [Record(values, 1, "01")]),
        tmp_path / "s",
        dtype="float16",
        scale="site",
    )
    got = store.record(0).values
    assert np.array_equal(got[:, [0, 2]], values[:, [0, 2]]) and np.array_equal(
        store.site_scale(0)[1][[0, 2]], [0, 0]
    )
    assert np.abs(got[:, 1] - values[:, 1]).max() < 2e-3


def test_a_store_is_a_source(tmp_path):
    "Written again, also patch by patch and back, it is the same store."
    first = write(some_source(), tmp_path / "a")
    tiled = write(first, tmp_path / "b", patch=(2, 2))
    back = write(Source(first.layout, tiled), tmp_path / "c")
    assert tree(tmp_path / "a") == tree(tmp_path / "c") != tree(tmp_path / "b")
    assert len(back) == 3


def test_runs_back_and_forth(tmp_path):
    rng, layout = np.random.default_rng(0), Layout.of("schaefer100")
    record = Record(
        rng.standard_normal((20, 100)).astype(np.float32), 0.72, "01", "a", "x", "3", EVENTS, {"history": []}
    )
    run = record.to_run(layout)
    again = Record.from_run(run)
    assert again.key == record.key == "sub-01_ses-a_task-x_run-3" and again.meta == {"history": []}
    assert np.array_equal(again.values, record.values) and again.tr == 0.72
    confounded = run.replace(confounds=pd.DataFrame({"motion": np.zeros(20)}))
    assert Record.from_run(confounded).meta["confounds_left_out"] == ["motion"]
    silent = replace(record, values=record.values * (np.arange(100) > 4))
    assert silent.to_run(layout).n_frames == 20
    with pytest.raises(ValueError, match="flat map"):
        record.to_run(Layout.flat(MASK))
    with pytest.raises(ValueError, match="65,520"):
        Record.from_run(run.replace(bold=run.bold * 1e5), dtype="float16")


def test_other_byte_orders_and_memory_maps_are_read(tmp_path):
    values = np.arange(22, dtype=np.float32).reshape(2, 11)
    np.save(tmp_path / "v.npy", values)
    for i, one in enumerate(
        (
            values.astype(">f4"),
            values.astype(">f2"),
            np.load(tmp_path / "v.npy", mmap_mode="r"),
            values[:, ::-1][:, ::-1],
        )
    ):
        store = write(Source(Layout.flat(MASK), [Record(one, 1, "01")]), tmp_path / str(i))
        assert np.array_equal(store.record(0).values, values) and store.record(0).values.dtype.isnative


@pytest.mark.parametrize("dtype", [np.float64, np.int16, complex])
def test_a_record_takes_no_numbers_that_it_would_have_to_convert(dtype):
    with pytest.raises(ValueError, match="expected values as float16 or float32, found"):
        Record(np.zeros((2, 3), dtype), 1, "01")


def test_records_that_cannot_be():
    for wrong in (np.zeros(3, np.float32), np.zeros((0, 3), np.float32), np.zeros((3, 0), np.float32)):
        with pytest.raises(ValueError, match=r"sub-01: expected values of shape \(time, sites\)"):
            Record(wrong, 1, "01")
    with pytest.raises(ValueError, match="milliseconds"):
        Record(np.zeros((2, 3), np.float32), 720, "01")
    with pytest.raises(ValueError, match="onset, duration, trial_type"):
        Record(np.zeros((2, 3), np.float32), 1, "01", events=pd.DataFrame({"onset": [1]}))


# --- what is refused, and leaves nothing behind

LAYOUT = Layout.flat(MASK)


@pytest.mark.parametrize("scale", ["none", "site"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(tmp_path, bad, dtype, scale):
    values = np.zeros((200, 11), dtype)
    values[150, 7] = values[170, 3] = bad
    with pytest.raises(
        ValueError, match="sub-01: expected finite numbers, found 2 others, the first at frame 150, site 7"
    ):
        write_run(tmp_path / "s", Record(values, 1, "01"), LAYOUT, scale=scale)
    assert not (tmp_path / "s").exists()


def test_the_end_of_half_precision(tmp_path):
    values = np.full((3, 11), 65519.0, np.float32)
    write_run(tmp_path / "a", Record(values, 1, "01"), LAYOUT)
    assert finish_store(tmp_path / "a", LAYOUT).read(0, 0, 1).max() == 65504
    values[2, 4] = -65520
    with pytest.raises(
        ValueError,
        match="below 65,520, as float16 holds, found 1 others, the first at frame 2, site 4: -65520",
    ):
        write_run(tmp_path / "b", Record(values, 1, "01"), LAYOUT)
    write_run(tmp_path / "b", Record(values, 1, "01"), LAYOUT, scale="site")
    assert not tmp_path.joinpath("b", "building", "x").exists() and len(finished_runs(tmp_path / "b")) == 1


def test_one_store_one_layout(tmp_path):
    first, second, third = some_records()
    write_run(tmp_path, first, LAYOUT)
    other = MASK.copy()
    other[0, 0], other[0, 1] = True, False
    before = tree(tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"begun with layout {LAYOUT.digest}; found a run with layout {Layout.flat(other).digest}",
    ):
        write_run(tmp_path, second, Layout.flat(other))
    with pytest.raises(
        ValueError, match=r"sub-01_task-rest: expected 100 columns \(layout \w+ on schaefer100\), found 11"
    ):
        write_run(tmp_path, second, Layout.of("schaefer100"))
    for changed in ({"dtype": "float32"}, {"scale": "site"}, {"chunk_frames": 8}):
        with pytest.raises(ValueError, match="begun with " + next(iter(changed))):
            write_run(tmp_path, third, LAYOUT, **changed)
    with pytest.raises(ValueError, match="expected layout"):
        finish_store(tmp_path, Layout.flat(other))
    assert tree(tmp_path) == before
    for changed in ({"dtype": "float64"}, {"scale": "z"}, {"chunk_frames": 0}):
        with pytest.raises(ValueError, match="expected dtype float16 or float32, scale 'none' or 'site'"):
            write_run(tmp_path / "new", first, LAYOUT, **changed)


def test_each_recording_once(tmp_path):
    record, *_ = some_records()
    facts = write_run(tmp_path, record, LAYOUT)
    before = tree(tmp_path)
    assert write_run(tmp_path, record, LAYOUT) == facts and tree(tmp_path) == before
    for other in (
        replace(record, values=record.values[1:]),
        replace(record, tr=2.0),
        replace(record, events=EVENTS),
        replace(record, meta={}),
    ):
        with pytest.raises(
            ValueError, match="sub-00_task-rest: expected each recording once, found two of that name"
        ):
            write_run(tmp_path, other, LAYOUT)
    assert tree(tmp_path) == before
    store = finish_store(tmp_path, LAYOUT)
    assert write_run(tmp_path, record, LAYOUT)["file"] == store.index["file"][0]
    for other in (replace(record, tr=2.0), replace(record, subject="another")):
        with pytest.raises(ValueError, match="finished one without|expected each recording once"):
            write_run(tmp_path, other, LAYOUT)
    other = MASK[::-1].copy()  # as many pixels, the same numbers, another meaning
    for refused in (
        lambda: write_run(tmp_path, record, Layout.flat(other)),
        lambda: finish_store(tmp_path, Layout.flat(other)),
    ):
        with pytest.raises(ValueError, match=rf"{LAYOUT.digest}.*found.* {Layout.flat(other).digest}"):
            refused()
    assert verify(tmp_path).ok


def test_sources_with_faults(tmp_path):
    source = some_source()
    with pytest.raises(
        ValueError, match="sub-00_task-rest: expected each recording once in the source, found it twice"
    ):
        write(Source(source.layout, [*source, source[0]]), tmp_path / "a")
    half = replace(source[1], values=source[1].values.astype(np.float16))
    with pytest.raises(
        ValueError, match="sub-01_task-rest: expected float32 like the runs before it, found float16"
    ):
        write(Source(source.layout, [source[0], half]), tmp_path / "b")
    with pytest.raises(ValueError, match="at least one, found 0"):
        write(Source(source.layout, []), tmp_path / "c")
    with pytest.raises(ValueError, match="events or meta: expected something that JSON can hold, found set"):
        write(Source(source.layout, [replace(source[0], meta={"a": {1, 2}})]), tmp_path / "d")
    assert not list(tmp_path.rglob(".tmp-*")) and not list((tmp_path / "d").rglob("*.f32"))


def test_folders_that_are_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError,
        match=r"expected an empty folder or a store under construction, found 1 other files \(thesis.tex",
    ):
        write_run(tmp_path, some_records()[0], LAYOUT)
    with pytest.raises(FileExistsError, match="resume=False"):
        write(some_source(), tmp_path, resume=False)
    assert list(tree(tmp_path)) == ["thesis.tex"]
    with pytest.raises(ValueError, match="expected a finished store .*, found a folder that is none"):
        Store(tmp_path)
    write_manifest(tmp_path, "thesis")
    with pytest.raises(ValueError, match="expected a clip store, found 'thesis'"):
        Store(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the folder of a clip store"):
        Store(tmp_path / "nowhere")


def test_finishing_needs_what_was_expected(tmp_path):
    for record in some_records(2):
        write_run(tmp_path, record, LAYOUT)
    with pytest.raises(ValueError, match="2 finished runs: repeat what began it"):
        Store(tmp_path)
    with pytest.raises(ValueError, match=r"missing: 1 \(sub-07\), not expected: 1 \(sub-01_task-rest\)"):
        finish_store(tmp_path, LAYOUT, expected=["sub-00_task-rest", "sub-07"])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"found 1 others \(report.json\)"):
        finish_store(tmp_path, LAYOUT)
    with pytest.raises(FileNotFoundError, match="split.json"):
        finish_store(tmp_path, LAYOUT, extra_files=["report.json", "split.json"])
    order = ["sub-01_task-rest", "sub-00_task-rest"]
    store = finish_store(tmp_path, LAYOUT, expected=order, extra_files=["report.json"])
    assert store.index["key"].tolist() == order and verify(tmp_path).ok and "report.json" in tree(tmp_path)
    assert list(finished_runs(tmp_path)) == order


def test_clips_outside_a_run(tmp_path):
    store = write(some_source(), tmp_path / "s")
    for start, n in ((-1, 2), (9, 2), (0, 0), (0, 11), (11, 1)):
        with pytest.raises(IndexError, match="sub-00_task-rest: expected frames within 0 to 10"):
            store.read(0, start, n)
    for out in (
        np.empty((2, 11), np.float16),
        np.empty((3, 11), np.float32),
        np.empty((2, 22), np.float32)[:, ::2],
    ):
        with pytest.raises(ValueError, match=r"expected out as \(2, 11\) float32 in C order"):
            store.read(0, 0, 2, out=out)
    with pytest.raises(IndexError):
        store.read(3, 0, 1)
    with pytest.raises(IndexError, match="expected a run from 0 to 2, found 3"):
        store.record(3)
    with pytest.raises(ValueError, match="found \\['colour'\\]"):
        store.find(colour="red")
    assert store.find(subject=["00", "02"], task="rest") == [0, 2] and store.find(subject="no") == []
    with pytest.raises(ValueError, match="read-only"):
        store.map(0)[0] = 1


def test_names_on_disks_that_know_no_case(tmp_path):
    values = np.zeros((2, 11), np.float32)
    names = ["Anna", "anna", "Änna", "日本語", "a" * 150, "a" * 151, "CON", "a.b", "a:b?"]
    store = write(Source(LAYOUT, [Record(values, 1, name) for name in names]), tmp_path / "s")
    files = store.index["file"].tolist()
    assert len({name.lower() for name in files}) == len(names) and all(
        re.fullmatch(r"runs/[\w.+-]{1,120}", f, re.ASCII) for f in files
    )
    assert store.index["subject"].tolist() == names and verify(tmp_path / "s").ok


def test_unicode_paths(tmp_path):
    folder = tmp_path / "données fMRI" / "скан 日本"
    write(some_source(), folder)
    assert verify(folder).ok and Store(folder).record(1).events["trial_type"].tolist() == ["faces", "čtení"]


# --- kills


def in_a_child(work) -> int:
    "Run a function in a forked process; its exit status, or minus the signal."
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


STEPS = ("replace", "link", "fsync", "open", "mkdir", "close", "rmdir", "unlink")


def killed_at(step: int, work):
    "SIGKILL right before the step-th time that the disk is touched."
    count = [0]

    def counted(function):
        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    work()


def test_a_kill_at_every_step_loses_nothing(memory_disk):
    "Whenever it strikes: `verify` does not pass, the reader refuses, and repeating it gives the same bytes as one go."
    source = some_source(n=2)
    write(source, memory_disk / "whole")
    expected = tree(memory_disk / "whole")

    def attempt(step, folder):
        return in_a_child(lambda: killed_at(step, lambda: write(source, folder)))

    for step in range(1, 1000):
        folder = memory_disk / f"at{step}"
        if (status := attempt(step, folder)) == 0:
            break
        assert status == -signal.SIGKILL
        if folder.exists() and not (folder / "MANIFEST.json").exists():
            assert not verify(folder).ok
            with pytest.raises((ValueError, FileNotFoundError)):
                Store(folder)
        write(source, folder)
        assert tree(folder) == expected, step
        assert verify(folder).ok
    assert step > 60  # it really went through many


def test_kills_at_random_moments(memory_disk):
    script = """
import sys
from fmri_book.storage import Store, write_store
print("ready", flush=True)
write_store(Store(sys.argv[1]), sys.argv[2], patch=(2, 2), progress=False)
"""
    write(some_source(n=40), memory_disk / "source")
    write(Store(memory_disk / "source"), memory_disk / "whole", patch=(2, 2))
    rng, survived = np.random.default_rng(0), 0
    for attempt in range(5):
        folder = memory_disk / f"killed{attempt}"
        job = subprocess.Popen(
            [sys.executable, "-c", script, memory_disk / "source", folder], stdout=subprocess.PIPE
        )
        job.stdout.readline()
        try:
            job.wait(rng.uniform(0.01, 0.3))
        except subprocess.TimeoutExpired:
            job.kill()
        survived += job.wait() == 0
        job.stdout.close()
        assert verify(folder).ok == (folder / "MANIFEST.json").exists()
        write(Store(memory_disk / "source"), folder, patch=(2, 2))
        assert tree(folder) == tree(memory_disk / "whole")
    assert survived < 5


def test_files_lost_in_a_crash_are_written_again(tmp_path):
    first, second = some_records(2)
    facts = [write_run(tmp_path, r, LAYOUT) for r in (first, second)]
    os.truncate(tmp_path / facts[0]["file"], 10)
    (tmp_path / facts[1]["file"]).write_bytes(
        bytes(facts[1]["bytes"])
    )  # the length is right, the content is not
    assert finished_runs(tmp_path) == {}
    for record in (first, second):
        write_run(tmp_path, record, LAYOUT)
    finish_store(tmp_path, LAYOUT)
    assert verify(tmp_path).ok


def test_atomic_path(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        raise RuntimeError("stop")
    assert tree(tmp_path) == {"a.txt": b"old"}
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    with atomic_path(tmp_path / "made" / "folder", folder=True) as temporary:
        (temporary / "b").write_text("b")
    assert tree(tmp_path) == {"a.txt": b"new", "made/folder/b": b"b"}


def test_sweeping_spares_the_living(tmp_path):
    script = """
import sys, time
from fmri_book.storage import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    print("ready", flush=True)
    time.sleep(60)
"""
    job = subprocess.Popen([sys.executable, "-c", script, tmp_path / "x"], stdout=subprocess.PIPE)
    job.stdout.readline()
    assert sweep(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="expected all writers to have ended, found a temporary file"):
        write_manifest(tmp_path, "x")
    job.kill()
    job.wait()
    job.stdout.close()
    assert len(sweep(tmp_path)) == 1 and list(tmp_path.iterdir()) == []


# --- disks


@pytest.fixture
def tmpfs(tmp_path):
    "A file system of its own: mount(options) -> its folder."
    mounted = []

    def mount(options):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(tmpfs):
    folder = tmpfs("size=256k") / "store"
    source = some_source(n=8, frames=2000)  # 88 kB each
    with pytest.raises(OSError, match="full disk") as caught:
        write(source, folder)
    assert caught.value.errno == errno.ENOSPC and "nothing half-written" in str(caught.value)
    assert list(folder.rglob(".tmp-*")) == [] and len(finished_runs(folder)) in (1, 2)
    assert not verify(folder).ok
    subprocess.run(["mount", "-o", "remount,size=4m", folder.parent], check=True)
    write(source, folder)
    assert verify(folder).ok and len(Store(folder)) == 8


def test_a_full_disk_at_any_file(tmpfs, tmp_path):
    "Less and less room: whichever file is the one that does not fit, it is said, and a larger disk goes on."
    source = some_source(n=2)
    whole = sum(len(data) for data in tree(write(source, tmp_path / "whole").path).values())
    failures, disk = 0, tmpfs("size=4m")
    for pages in range(3, 14):
        folder = disk / f"store{pages}"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(free - 4096 * pages))
        try:
            write(source, folder)
        except OSError as error:
            failures += 1
            assert error.errno == errno.ENOSPC and not verify(folder).ok
            assert list(folder.rglob(".tmp-*")) == []
        (disk / "ballast").unlink()
        write(source, folder)
        assert tree(folder) == tree(tmp_path / "whole")
    assert whole < 4096 * 13 and failures >= 4


def test_a_read_only_disk(tmpfs):
    folder = tmpfs("size=1m")
    store = write(some_source(), folder / "store")
    begun = folder / "begun"
    write_run(begun, some_records()[0], LAYOUT)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for target in (folder / "new", begun):
        with pytest.raises(OSError, match="expected a folder that can be written to, found a read-only one"):
            write_run(target, some_records()[1], LAYOUT)
    assert (
        store.read(0, 2, 3).shape == (3, 11)
        and verify(folder / "store").ok
        and len(Store(folder / "store")) == 3
    )


# --- many processes


def test_two_processes_write_one_store(tmp_path):
    "Different runs, the same runs, and two that disagree about one run."
    records = some_records(30)
    go = multiprocessing.get_context("fork").Event()

    def write_all(mine):
        go.wait()
        for record in mine:
            write_run(tmp_path / "s", record, LAYOUT, dtype="float32")

    def fork(mine):
        if (pid := os.fork()) == 0:
            status = 5
            try:
                write_all(mine)
                status = 0
            except ValueError as error:
                status = 3 if "found two of that name" in str(error) else 4
            finally:
                os._exit(status)
        return pid

    changed = [replace(records[29], values=records[29].values + 1)]
    children = [fork(records[:20]), fork(records[10:29]), fork(records[29:]), fork(changed)]
    go.set()
    status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert status[:2] == [0, 0] and sorted(status[2:]) == [0, 3]
    store = finish_store(tmp_path / "s", LAYOUT, expected=[r.key for r in records])
    assert verify(tmp_path / "s").ok and len(list((tmp_path / "s" / "runs").iterdir())) == 30
    for i in range(29):
        assert np.array_equal(store.record(i).values, records[i].values)
    assert np.array_equal(store.record(29).values, (changed if status[3] == 0 else records[29:])[0].values)


def test_reading_in_threads_forks_and_pickles(tmp_path):
    "Many more runs than open files: every reader gets its own clip, always."
    records = [
        Record(
            np.full((20, 11), i, np.float32) + np.arange(20, dtype=np.float32)[:, None] / 32, 1, f"{i:03d}"
        )
        for i in range(150)
    ]
    store = write(Source(LAYOUT, records), tmp_path / "s")

    def reader(seed):
        rng, out = np.random.default_rng(seed), np.empty((5, 11), np.float32)
        for i, start in zip(rng.integers(0, 150, 1500).tolist(), rng.integers(0, 15, 1500).tolist()):
            store.read(i, start, 5, out=out)
            assert np.array_equal(out, records[i].values[start : start + 5])
        done.append(seed)

    done = []
    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    assert [in_a_child(lambda seed=seed: reader(seed)) for seed in (10, 11)] == [
        0,
        0,
    ]  # forked while threads read
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    packed = pickle.dumps(store)
    assert len(packed) < 500
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        clip = pool.apply(Store.read, (store, 7, 3, 2))
    assert np.array_equal(clip, records[7].values[3:5])
    assert len(os.listdir("/proc/self/fd")) < 150


def test_memory_and_open_files_do_not_grow(tmp_path):
    write(some_source(n=100, n_sites=11, frames=300), tmp_path / "s")
    code = """
import sys, os, psutil, numpy as np
from fmri_book.storage import Store
store, rng, out = Store(sys.argv[1]), np.random.default_rng(0), np.empty((16, 11), np.float32)
def read(n):
    for i, start in zip(rng.integers(0, 100, n).tolist(), rng.integers(0, 284, n).tolist()):
        store.read(i, start, 16, out=out); store.frame_stats(i)
read(1000)
before = psutil.Process().memory_info().rss
read(10_000)
print(psutil.Process().memory_info().rss - before, len(os.listdir("/proc/self/fd")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "s"], capture_output=True, text=True, check=True
    )
    growth, files = map(int, done.stdout.split())
    assert growth < 2_000_000 and files < 80


def test_places_beyond_two_gigabytes(tmp_path):
    store = write(some_source(n=1), tmp_path / "s")
    path, frame = (
        tmp_path / "s" / store.index["file"][0],
        60_000_000,
    )  # 11 sites × 4 bytes: 2.6 GB, mostly a hole
    with open(path, "r+b") as file:
        file.seek(frame * 44)
        file.write(np.arange(11, dtype=np.float32).tobytes())
    store._frames = np.array([frame + 1])
    assert np.array_equal(store.read(0, frame, 1)[0], np.arange(11))


# --- every byte


def test_every_flipped_byte_is_found(memory_disk):
    "Each byte of each file in turn, the manifest's own included."
    write(some_source(n=1), memory_disk, dtype="float16", scale="site", chunk_frames=4)
    assert verify(memory_disk, workers=1).ok
    flips = 0
    for path in sorted(p for p in memory_disk.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            with open(path, "r+b") as file:
                file.seek(place)
                file.write(bytes([whole[place] ^ (1 << place % 8)]))
            assert not verify(memory_disk, workers=1).ok, (path, place)
            flips += 1
        path.write_bytes(whole)
    assert verify(memory_disk).ok and flips == sum(len(data) for data in tree(memory_disk).values())


def test_missing_extra_truncated_and_longer_files(tmp_path):
    write(some_source(), tmp_path)
    whole = tree(tmp_path)
    for name, data in whole.items():
        path = tmp_path / name
        for other in (data[:-1], data + b"\0", data + b"\n", b""):
            path.write_bytes(other)
            assert not verify(tmp_path).ok, name
        path.unlink()
        problems = verify(tmp_path).problems
        assert len(problems) == 1 and path.name in problems[0] and "found no" in problems[0]
        path.write_bytes(data)
    for extra in ("x", "runs/.tmp-1", "building/a", ".hidden"):
        (tmp_path / extra).parent.mkdir(exist_ok=True)
        (tmp_path / extra).write_bytes(b"")
        assert verify(tmp_path).problems == [f"{extra}: expected no such file, found 0 bytes"]
        (tmp_path / extra).unlink()
    os.symlink(tmp_path / "store.json", tmp_path / "link")
    assert "link: expected no such file" in verify(tmp_path).problems[0]
    (tmp_path / "link").unlink()
    os.rename(tmp_path / "store.json", tmp_path / "moved")
    os.symlink(tmp_path / "moved", tmp_path / "store.json")
    assert any("store.json: expected a file, found a link" in p for p in verify(tmp_path).problems)
    assert verify(tmp_path / "nowhere").problems[0].startswith("expected")


@pytest.mark.parametrize("scale", ["none", "site"])
def test_damage_is_traced_to_run_and_frames(tmp_path, scale):
    store = write(some_source(n=3, frames=20), tmp_path, dtype="float16", scale=scale, chunk_frames=8)
    path, row = tmp_path / store.index["file"][1], 22
    whole = path.read_bytes()

    def problem(data):
        path.write_bytes(data)
        (found,) = verify(tmp_path).problems
        path.write_bytes(whole)
        assert "run sub-01_task-rest" in found
        return found

    def flip(*places):
        data = bytearray(whole)
        for place in places:
            data[place] ^= 1
        return bytes(data)

    assert "damaged: frames 8 to 15)" in problem(flip(9 * row))
    assert "damaged: frames 0 to 7, frames 16 to 20)" in problem(flip(0, 20 * row))
    assert "all frames are whole; 3 bytes too many" in problem(whole + b"abc")
    if scale == "site":
        assert "damaged: mean and SD of the sites)" in problem(flip(21 * row))
    else:
        assert "damaged: frames 16 to 20)" in problem(whole[:-1])
    path.write_bytes(whole[: 4 * row])
    with pytest.raises(DamagedFile, match="found the end of the file"):
        store.read(1, 2, 8)
    path.unlink()
    with pytest.raises(DamagedFile, match="expected the file .*, found none"):
        Store(tmp_path).read(1, 0, 1)


def test_manifests_of_other_things(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"abc")
    facts = json.loads(write_manifest(tmp_path, "shards", runs=3, name="ž").read_text())
    assert (facts["kind"], facts["runs"], facts["name"]) == ("shards", 3, "ž")
    import hashlib

    assert facts["files"] == {
        "a/b": {"bytes": 3, "blake2b": hashlib.blake2b(b"abc", digest_size=16).hexdigest()}
    }
    found = verify(tmp_path)
    assert found.ok and (found.n_files, found.n_bytes) == (2, 3) and "sound" in str(found)
    with pytest.raises(ValueError, match="names of their own, found \\['files'\\]"):
        write_manifest(tmp_path, "x", files=1)
    future = facts | {"version": 2}
    (tmp_path / "MANIFEST.json").write_bytes(storage._sealed(future))
    with pytest.raises(ValueError, match="version 1, found 2: update"):
        storage.read_manifest(tmp_path)
    (tmp_path / "MANIFEST.json").write_text("[]")
    with pytest.raises(DamagedFile, match="MANIFEST.json"):
        storage.read_manifest(tmp_path)


def test_labels_out_of_tables():
    "What pandas makes of an empty cell, and of whole numbers beside one, is no name."
    values = np.ones((2, 3), np.float32)
    assert Record(values, 1.0, "a", session=float("nan"), task=None, run=1.0).key == "sub-a_run-1"
    assert Record(values, 1.0, np.int64(7), session=pd.NA).key == "sub-7"
    assert Record(values, 1.0, "Cle\u0301a").subject == "Cl\u00e9a"
    with pytest.raises(ValueError, match="name its subject"):
        Record(values, 1.0, float("nan"))


@pytest.mark.parametrize("locks", [True, False])
def test_disks_without_hard_links_or_locks(tmp_path, monkeypatch, locks):
    "exFAT and some network shares know no hard links, NFS and Lustre may be mounted without locks."

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(storage.os, "link", refuse)
    if not locks:
        monkeypatch.setattr(storage.fcntl, "flock", refuse)
    source = some_source()
    with atomic_path(tmp_path / "living") as temporary:
        sweep(tmp_path)
        assert temporary.exists()
        temporary.write_bytes(b"")
    store = write_store(source, tmp_path / "store", progress=False)
    assert verify(store.path).ok and len(store) == 3
    assert storage.publish_once(tmp_path / "once", b"first") and not storage.publish_once(
        tmp_path / "once", b"2"
    )
    assert (tmp_path / "once").read_bytes() == b"first"
    site = tmp_path / "other"
    write_run(site, source[0], source.layout)
    with pytest.raises(ValueError, match="each recording once"):
        write_run(site, replace(source[0], values=-source[0].values), source.layout)
    assert len(list((site / "runs").iterdir())) == 1


def test_without_hard_links_exactly_one_is_first(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(storage.os, "link", refuse)
    for i in range(20):
        first, start = [], threading.Barrier(6)

        def one(k, i=i, first=first, start=start):
            start.wait()
            if storage.publish_once(tmp_path / f"f{i}", f"{k}".encode()):
                first.append(k)

        threads = [threading.Thread(target=one, args=(k,)) for k in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(first) == 1 and (tmp_path / f"f{i}").read_text() == str(first[0])


def test_many_take_up_the_last_steps_at_once(tmp_path):
    "Eight writers of a job array start again after a kill between the promised manifest and its move."
    for i in range(10):
        site, source = tmp_path / f"s{i}", some_source()
        for record in source:
            write_run(site, record, source.layout)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(storage, "_complete", lambda folder: None)
            with pytest.raises(ValueError, match="under construction"):
                finish_store(site, source.layout)
        assert (site / "building" / "MANIFEST.json").exists()
        start = threading.Barrier(8)

        def one(_, site=site, start=start):
            start.wait()
            return len(finished_runs(site))

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(one, range(8))) == {3}
        assert verify(site).ok


def test_a_writer_who_comes_after_the_end_is_told(tmp_path, monkeypatch):
    "The store is finished by somebody else between a run's file and its sidecar."
    first, late = some_source()[:2]
    layout, site = some_source().layout, tmp_path / "site"
    write_run(site, first, layout)
    publish_once = storage.publish_once

    def slow(path, data):
        if path.name.endswith(".run.json"):
            monkeypatch.setattr(storage, "publish_once", publish_once)
            finish_store(site, layout)
        return publish_once(path, data)

    monkeypatch.setattr(storage, "publish_once", slow)
    with pytest.raises(ValueError, match="found a finished one without sub-01"):
        write_run(site, late, layout)
    assert verify(site).ok and len(Store(site)) == 1


@pytest.mark.parametrize("name", ["index.parquet", "layout.npz", "store.json"])
def test_a_store_with_a_damaged_table_does_not_open(tmp_path, name):
    store = write_store(some_source(), tmp_path / "store", progress=False)
    path, whole = store.path / name, (store.path / name).read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(bytes(damaged))
        with pytest.raises(DamagedFile, match=rf"{name}: expected {len(whole)} bytes with blake2b"):
            Store(store.path)
    path.unlink()
    with pytest.raises(DamagedFile, match=f"{name}: expected .* found 0"):
        Store(store.path)
    path.write_bytes(whole)
    assert len(Store(store.path)) == 3


def test_a_damaged_extra_file_among_the_runs(tmp_path):
    source, site = some_source(), tmp_path / "site"
    for record in source:
        write_run(site, record, source.layout)
    (site / "runs" / "notes.txt").write_text("hello")
    finish_store(site, source.layout, extra_files=["runs/notes.txt"])
    assert verify(site).ok
    (site / "runs" / "notes.txt").write_text("hellO")
    problems = verify(site).problems
    assert len(problems) == 1 and problems[0].startswith("runs/notes.txt: expected blake2b")


def test_another_working_folder(tmp_path, monkeypatch):
    write_store(some_source(), tmp_path / "store", progress=False)
    monkeypatch.chdir(tmp_path)
    store = Store("store")
    packed = pickle.dumps(store)
    monkeypatch.chdir("/")
    assert np.array_equal(pickle.loads(packed).read(1, 0, 5), store.read(1, 0, 5))


MANY = """
import resource, sys
from fmri_book.storage import Store
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
stores = [Store(sys.argv[1]) for _ in range(20)]
want = [stores[0].read(i, 0, 4).tobytes() for i in range(3)]
for _ in range(2):
    for store in stores:
        for i in range(3):
            assert store.read(i, 0, 4).tobytes() == want[i]
print("read")
"""


def test_more_stores_than_open_files(tmp_path):
    write_store(some_source(), tmp_path / "store", progress=False)
    job = subprocess.run(
        [sys.executable, "-c", MANY, tmp_path / "store"], capture_output=True, text=True, check=False
    )
    assert job.stdout == "read\n", job.stderr


def test_events_in_a_forked_worker(tmp_path):
    "Opened (with pyarrow's threads) before the fork, read after it."
    store = write_store(some_source(), tmp_path / "store", progress=False)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(store.events, [1, 1]).get(timeout=60)
    assert all(one.equals(store.events(1)) for one in found)


def test_a_damaged_sidecar_is_not_believed(tmp_path):
    "An onset that changed by one bit, and a run whose file is gone, are errors, not another store or a smaller one."
    source, site = some_source(), tmp_path / "site"
    for record in source:
        write_run(site, record, source.layout)
    sidecar = next(p for p in (site / "building").glob("*.run.json") if b'"onset": 2.5' in p.read_bytes())
    sidecar.write_bytes(sidecar.read_bytes().replace(b'"onset": 2.5', b'"onset": 6.5'))
    (site / "building" / ".tmp-1-x.run.json").write_bytes(sidecar.read_bytes())  # of a writer who was killed
    assert len(finished_runs(site)) == 2
    with pytest.raises(ValueError, match=r"expected 3 finished runs, found 1 whose file .*sub-01_task-rest"):
        finish_store(site, source.layout)
    with pytest.raises(ValueError, match=r"missing: 1 \(sub-01_task-rest\)"):
        finish_store(site, source.layout, expected=[record.key for record in source])
    next((site / "runs").glob("sub-02*")).unlink()
    with pytest.raises(ValueError, match=r"found 2 whose file"):
        finish_store(site, source.layout)
    store = write_store(source, site, dtype="float16", progress=False)
    assert verify(site).ok and store.events(1)["onset"].tolist() == [0.0, 2.5]


def test_damaged_frames_side_by_side_are_named_as_one_stretch(tmp_path):
    source = some_source(n=1, frames=20)
    write_run(tmp_path, source[0], source.layout, dtype="float32", scale="site", chunk_frames=1)
    store = finish_store(tmp_path, source.layout)
    path, row = next((tmp_path / "runs").iterdir()), 4 * source.layout.n_sites
    whole = path.read_bytes()
    for first, last in ((3, 9), (12, 12), (18, 20)):  # 20: the scale behind the frames
        whole = whole[: first * row] + bytes((last - first + 1) * row) + whole[(last + 1) * row :]
    path.write_bytes(whole)
    assert (
        "damaged: frames 3 to 9, frames 12 to 12, frames 18 to 19, mean and SD of the sites)"
        in verify(store.path).problems[0]
    )


def test_a_folder_that_nfs_cannot_let_go_yet(tmp_path):
    "A sidecar that another machine reads stays for a while as .nfs…; the store is finished, and `verify` names the file."
    source = some_source(n=1)
    write_run(tmp_path, source[0], source.layout)
    held = tmp_path / "building" / ".nfs0000000000000001"
    held.write_text("{}")
    store = finish_store(tmp_path, source.layout)
    assert len(store) == 1 and verify(tmp_path).problems == [
        "building/.nfs0000000000000001: expected no such file, found 2 bytes"
    ]
    held.unlink()
    assert verify(tmp_path).ok
