"""The four published formats: other programs read what we write, we read what others write, and damage is named."""

import http.server
import io
import json
import os
import pickle
import tarfile
import threading
import tracemalloc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmri_book import formats
from fmri_book.data import Space
from fmri_book.formats import (
    ArrowRuns,
    HDF5Runs,
    ShardIndex,
    Shards,
    VolumeRuns,
    convert,
    detect,
    expand_urls,
    iter_shard,
    join_by_subject,
    open_source,
    open_url,
    read_table,
    read_targets,
    write_arrow,
    write_hdf5,
    write_shards,
    write_volumes,
)
from fmri_book.storage import DamagedFile, Layout, Record, Store, verify, write_store

MASK = np.zeros((5, 7), bool)
MASK[1:4, 2:6] = True
MASK[2, 3] = False
FLAT = Layout.flat(MASK)
PARCELS = Layout.of("schaefer100")
EVENTS = pd.DataFrame({"onset": [0.1, 12.5], "duration": [12.4, np.nan], "trial_type": ["face", "häuser"], "value": [1, 2]})


@dataclass
class Some:
    layout: Layout
    records: list

    def __iter__(self):
        return iter(self.records)


def make(n=2, layout=FLAT, frames=40, dtype="float16", **more):
    rng = np.random.default_rng(n)
    facts = {"tr": 0.8, "session": "02", "task": "rest", "events": EVENTS, "meta": {"age": 31.5, "censored": [1, 2]}} | more
    values = [rng.standard_normal((frames + i, layout.n_sites)).astype(dtype) for i in range(n)]
    return Some(layout, [Record(v, subject=f"{i:03d}", **facts) for i, v in enumerate(values)])


def same(a, b):
    assert (a.key, a.tr, a.meta) == (b.key, b.tr, b.meta)
    assert a.values.dtype == b.values.dtype and a.values.tobytes() == b.values.tobytes()
    assert (a.events is None) == (b.events is None)
    if a.events is not None:
        pd.testing.assert_frame_equal(a.events, b.events, check_dtype=False)


def all_same(xs, ys):
    xs, ys = list(xs), list(ys)
    assert len(xs) == len(ys) > 0
    for x, y in zip(xs, ys, strict=True):
        same(x, y)


def volume_layout(name="volume_for_tests"):
    inside = np.zeros((4, 5, 3), bool)
    inside[0:3, 1:4, 1:] = True
    return Layout.of(Space.from_mask(name, inside, np.array([[4.0, 0, 0, -4], [0, 4, 0, -6], [0, 0, 4, 0], [0, 0, 0, 1]])))


# addresses ------------------------------------------------------------------------------------------------


def test_ranges_globs_folders_and_lists(tmp_path):
    for i in (8, 9, 10):
        (tmp_path / f"a_{i:04d}.tar").touch()
    names = [str(tmp_path / f"a_{i:04d}.tar") for i in (8, 9, 10)]
    assert expand_urls(f"{tmp_path}/a_{{0008..0010}}.tar") == names
    assert expand_urls(tmp_path) == expand_urls(f"{tmp_path}/*.tar") == expand_urls(names) == names
    assert expand_urls("http://h/{a,b}_{9..11}.tar")[:4] == [f"http://h/a_{i}.tar" for i in (9, 10, 11)] + ["http://h/b_9.tar"]
    assert expand_urls("pipe:awk '{print $1,$2}' x") == ["pipe:awk '{print $1,$2}' x"]
    assert expand_urls("pipe:cat x_{00..01}.tar") == ["pipe:cat x_00.tar", "pipe:cat x_01.tar"]
    braces = tmp_path / "odd{1..2}.tar"
    braces.touch()
    assert expand_urls(braces) == [str(braces)]


@pytest.mark.parametrize(
    ("urls", "word"),
    [("/nowhere/{0000..0002}.tar", "0000.tar"), ("/nowhere/*.tar", "found none"), ([], "empty"), ("http://h/{5..2}.tar", "rising"), (["http://h/a.tar"] * 2, "twice")],
)
def test_addresses_that_match_nothing_are_errors(urls, word):
    with pytest.raises((FileNotFoundError, ValueError), match=word):
        expand_urls(urls)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_shards(make(3), folder, runs_per_shard=2)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if not self.path.startswith("/cut/"):
                return super().do_GET()
            data = (folder / self.path.removeprefix("/cut/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True

    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{one.server_port}"
    one.shutdown()


def test_over_http(server):
    all_same(Shards(f"{server}/flat_{{0000..0001}}.tar"), make(3))


def test_a_cut_transfer_and_an_absent_file_are_named(server):
    with pytest.raises(DamagedFile, match=r"cut/flat_0000.tar: expected \d+ bytes, found \d+: the transfer was cut"):
        list(Shards(f"{server}/cut/flat_0000.tar"))
    with pytest.raises(FileNotFoundError, match="answered 404"):
        list(Shards(f"{server}/flat_0007.tar"))
    with pytest.raises(ConnectionError, match="expected a server"):
        list(iter_shard("http://127.0.0.1:9/x.tar"))


def test_a_cut_transfer_can_be_skipped_but_is_counted(server):
    source = Shards([f"{server}/cut/flat_0000.tar", f"{server}/flat_0001.tar"], on_error="skip")
    with pytest.warns(UserWarning, match="1 skipped, 2 read"):
        records = list(source)
    assert [r.subject for r in records] == ["000", "002"] and len(source.problems) == 1 and "cut" in source.problems[0]


def test_from_a_command(tmp_path):
    write_shards(make(2), tmp_path)
    all_same(Shards(f"pipe:cat {tmp_path}/flat_0000.tar", tr=0.8), make(2))
    with pytest.raises(OSError, match="exit status 0, found 7.*no such bucket"):
        list(Shards(f"pipe:cat {tmp_path}/flat_0000.tar; echo no such bucket >&2; exit 7"))
    with pytest.raises(OSError, match="found 7"):
        list(Shards(f"pipe:head -c 2000 {tmp_path}/flat_0000.tar; exit 7"))
    stream = iter(Shards(f"pipe:cat {tmp_path}/flat_0000.tar; sleep 60"))
    assert next(stream).subject == "000"


def test_hub_addresses_are_read_through_huggingface_hub(tmp_path, monkeypatch):
    import huggingface_hub

    write_shards(make(1), tmp_path)

    class Hub:
        def open(self, url, mode):
            assert url == "hf://datasets/medarc/x/flat_0000.tar" and mode == "rb"
            return open(tmp_path / "flat_0000.tar", "rb")

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    all_same(Shards("hf://datasets/medarc/x/flat_0000.tar"), make(1))


def test_other_schemes_go_through_fsspec_and_say_what_is_missing(tmp_path):
    import fsspec

    write_shards(make(1), tmp_path)
    with fsspec.open("memory://flat.tar", "wb") as out:
        out.write((tmp_path / "flat_0000.tar").read_bytes())
    all_same(Shards("memory://flat.tar"), make(1))
    if not pytest.importorskip("importlib.util").find_spec("s3fs"):
        with pytest.raises(ImportError, match="s3fs"), open_url("s3://bucket/flat.tar"):
            pass


# shards ---------------------------------------------------------------------------------------------------


def test_shards_round_trip_bit_for_bit_with_the_store(tmp_path):
    source = make(5)
    write_store(source, tmp_path / "store", progress=False)
    convert(tmp_path / "store", tmp_path / "wds", "wds", runs_per_shard=2)
    convert(tmp_path / "wds", tmp_path / "again", "store")
    all_same(Store(tmp_path / "again"), source)
    assert len(list((tmp_path / "wds").glob("*.tar"))) == 3 and len(Shards(tmp_path / "wds")) == 5
    assert Shards(tmp_path / "wds").layout == FLAT


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mask=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=4).filter(lambda m: any(map(any, m))),
    frames=st.integers(1, 5),
    subject=st.text("aé.%日1", min_size=1, max_size=4),
    runs=st.integers(1, 4),
    known=st.sampled_from([None, EVENTS, EVENTS.iloc[:0, :3]]),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_any_shard_comes_back(tmp_path_factory, mask, frames, subject, runs, known, dtype):
    folder, layout = tmp_path_factory.mktemp("any"), Layout.flat(np.array(mask))
    rng = np.random.default_rng(frames)
    records = [
        Record(rng.standard_normal((frames, layout.n_sites)).astype(dtype), 1.5, subject, run=str(i), events=known, meta={"ü": [1, None]})
        for i in range(runs)
    ]
    write_shards(Some(layout, records), folder, runs_per_shard=2)
    all_same(Shards(folder), records)
    index = ShardIndex(folder)
    all_same(index, records)
    assert index.layout == layout
    assert [s["__key__"] for s in _webdataset(folder)] == [formats.sample_key(r) for r in records]


def _webdataset(folder):
    import webdataset as wds

    return list(wds.WebDataset(expand_urls(folder), shardshuffle=False))


def test_webdataset_and_scipy_read_what_we_write(tmp_path):
    source = make(3, meta={"mod": "bold", "mag": "3T", "dir": "LR"})
    write_shards(source, tmp_path)
    samples = _webdataset(tmp_path)
    for sample, record in zip(samples, source, strict=True):
        assert sample["__key__"] == f"sub-{record.subject}_mod-bold_task-rest_mag-3T_dir-LR_ses-02"
        assert np.array_equal(np.load(io.BytesIO(sample["bold.npy"]), allow_pickle=False), record.values)
        assert np.array_equal(scipy.sparse.load_npz(io.BytesIO(sample["mask.npz"])).toarray(), MASK)
        meta = json.loads(sample["meta.json"])
        assert {k: meta[k] for k in ("sub", "mod", "task", "mag", "dir", "n_frames")} == {
            "sub": record.subject, "mod": "bold", "task": "rest", "mag": "3T", "dir": "LR", "n_frames": len(record.values)}
        assert json.loads(sample["events.json"])[0] == {"onset": 0.1, "duration": 12.4, "trial_type": "face", "value": 1}


def published(path, n=2, extra=(), **changes):
    "A shard as others write it, with webdataset and scipy."
    import webdataset as wds

    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    scipy.sparse.save_npz(buffer, scipy.sparse.coo_array(MASK))
    values = [rng.standard_normal((20, MASK.sum())).astype(np.float16) for _ in range(n)]
    with wds.TarWriter(str(path)) as sink:
        for i, v in enumerate(values):
            meta = {"sub": f"10{i}", "mod": "tfmri", "task": "WM", "mag": "3T", "dir": "LR", "n_frames": 20}
            sample = {"__key__": f"sub-10{i}_mod-tfmri_task-WM_mag-3T_dir-LR", "meta.json": json.dumps(meta).encode(),
                      "events.json": b"[]", "bold.npy": _npy(v), "mask.npz": buffer.getvalue()} | (changes if i == n - 1 else {})
            sink.write({k: v for k, v in sample.items() if v is not None})
    return values


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_we_read_what_webdataset_and_scipy_wrote(tmp_path):
    values = published(tmp_path / "hcp_0000.tar")
    records = list(Shards(tmp_path / "hcp_0000.tar"))
    for record, v in zip(records, values, strict=True):
        assert np.array_equal(record.values, v) and record.tr == 1.0 and "1 s" in record.meta["tr_source"]
        assert (record.session, record.run, record.meta["mod"]) == ("3T", "LR", "tfmri") and len(record.events) == 0
    assert records[0].key == "sub-100_ses-3T_task-WM_run-LR"
    all_same(ShardIndex(tmp_path), records)
    with pytest.raises(ValueError, match="expected a repetition time"):
        published(tmp_path / "bare.tar", **{"meta.json": b'{"sub": "x"}'})
        list(Shards(tmp_path / "bare.tar"))
    assert [r.tr for r in Shards(tmp_path / "hcp_0000.tar", tr=0.72)] == [0.72, 0.72]


def test_masks_with_and_without_format(tmp_path):
    row, col = np.nonzero(MASK)
    for more in ({}, {"format": np.array(b"coo")}, {"data": np.ones(len(row))}):
        buffer = io.BytesIO()
        np.savez(buffer, row=row, col=col, shape=MASK.shape, **more)
        assert np.array_equal(formats.unpack_mask(buffer.getvalue(), "x"), MASK)


def _npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


P = int(MASK.sum())
GOOD_MASK = {"row": np.nonzero(MASK)[0], "col": np.nonzero(MASK)[1], "shape": np.array(MASK.shape)}
DAMAGE = {
    "no values": ({"bold.npy": None}, "found no bold.npy"),
    "no mask": ({"mask.npz": None}, "found no mask.npz"),
    "no events": ({"events.json": None}, "found no events.json"),
    "float64": ({"bold.npy": _npy(np.zeros((20, P)))}, "expected float16.*found float64"),
    "integers": ({"bold.npy": _npy(np.zeros((20, P), np.int16))}, "found int16"),
    "columns": ({"bold.npy": _npy(np.zeros((20, P + 1), np.float16))}, rf"expected \(frames, {P}\).*found \(20, {P + 1}\)"),
    "dense": ({"bold.npy": _npy(np.zeros((20, 5, 7), np.float16))}, r"found \(20, 5, 7\)"),
    "short": ({"bold.npy": _npy(np.zeros((20, P), np.float16))[:-2]}, "expected 568 bytes.*found 566"),
    "pickle": ({"bold.npy": _npy(np.array([{}], dtype=object))}, "pickled objects, which are never opened"),
    "not npy": ({"bold.npy": b"hello there, this is text"}, "expected an .npy file"),
    "infinity": ({"bold.npy": _npy(np.full((20, P), np.inf, np.float16))}, "NaN or infinity"),
    "frames": ({"bold.npy": _npy(np.zeros((19, P), np.float16))}, "expected 20 frames.*found 19"),
    "mask out of range": ({"mask.npz": _npz(**GOOD_MASK | {"shape": np.array([2, 7])})}, "expected pixels inside"),
    "mask twice": ({"mask.npz": _npz(**GOOD_MASK | {"row": np.ones(P, int), "col": np.ones(P, int)})}, "every pixel once"),
    "mask dense": ({"mask.npz": _npz(mask=MASK)}, "sparse mask with row, col"),
    "mask pickled": ({"mask.npz": _npz(**GOOD_MASK | {"row": np.array([{}] * P, object)})}, "sparse mask"),
    "mask csr": ({"mask.npz": _npz(**GOOD_MASK | {"format": np.array(b"csr")})}, "csr"),
    "mask cut": ({"mask.npz": _npz(**GOOD_MASK)[:-30]}, "sparse mask"),
    "other mask": ({"mask.npz": formats.pack_mask(MASK.T)}, "mask"),
    "meta": ({"meta.json": b"{sub"}, "meta.json: expected JSON"),
    "nobody": ({"meta.json": b'{"mod": "x", "tr": 1}'}, "expected the subject"),
    "events": ({"events.json": b'[{"onset": 1}]'}, "duration, trial_type"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_names_shard_sample_and_member(tmp_path, kind):
    changes, word = DAMAGE[kind]
    published(tmp_path / "hcp_0000.tar", **changes)
    with pytest.raises(DamagedFile, match=word) as error:
        list(Shards(tmp_path))
    assert "hcp_0000.tar" in str(error.value) and "sub-101_mod-tfmri_task-WM" in str(error.value)
    if kind != "infinity":  # found when the values are read
        with pytest.raises(DamagedFile):
            ShardIndex(tmp_path)
    else:
        with pytest.raises(DamagedFile, match="NaN or infinity"):
            ShardIndex(tmp_path).record(1)


def test_skips_are_counted(tmp_path):
    published(tmp_path / "a.tar", n=3, **{"bold.npy": b"nothing"})
    source = Shards(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="1 skipped, 2 read"):
        assert len(list(source)) == 2
    with pytest.warns(UserWarning, match="1 skipped"):
        written = convert(tmp_path, tmp_path / "out", "store", source_options={"on_error": "skip"})
    assert written.runs == 2 and "sub-102" in written.notes[0] and verify(tmp_path / "out").ok
    assert "sub-102" in json.loads((tmp_path / "out" / "CONVERSION.json").read_text())["notes"][0]
    with pytest.raises(ValueError, match="never silent"):
        list(iter_shard(tmp_path / "a.tar", on_error="skip"))


def test_a_tar_cut_anywhere_is_noticed(tmp_path):
    write_shards(make(2), tmp_path)
    whole = (tmp_path / "flat_0000.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # the last member's last block
    for cut in (0, 100, 512, 1024, 1536, 3000, end // 2, end - 512, end):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DamagedFile, match=r"cut\.tar: expected"):
            list(iter_shard(str(tmp_path / "cut.tar")))
        with pytest.raises(DamagedFile):
            ShardIndex(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole + whole)
    with pytest.raises(DamagedFile, match="after the end"):
        list(iter_shard(str(tmp_path / "cut.tar")))


def test_a_flipped_bit_in_any_label_is_noticed_although_tarfile_does_not(tmp_path):
    write_shards(make(2), tmp_path)
    path, silent = tmp_path / "flat_0000.tar", 0
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        labels = [m.offset for m in tar.getmembers()]
    for at in labels:
        for byte in (3, 130, 148):  # name, size, checksum
            path.write_bytes(whole[: at + byte] + bytes([whole[at + byte] ^ 1]) + whole[at + byte + 1 :])
            with pytest.raises(DamagedFile, match=r"tar label at byte|is cut"):
                list(Shards(path))
            try:
                with tarfile.open(path) as tar:
                    silent += len(tar.getnames()) < len(labels)
            except tarfile.TarError:
                pass
    assert silent >= 7  # what we guard against is real


def test_compressed_shards_stream_but_are_not_indexed(tmp_path):
    import gzip

    write_shards(make(2), tmp_path)
    plain = (tmp_path / "flat_0000.tar").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(plain))
    all_same(Shards(tmp_path / "x.tar.gz"), make(2))
    with pytest.raises(ValueError, match="uncompressed"):
        ShardIndex(tmp_path / "x.tar.gz")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(plain)[:-40])
    with pytest.raises(DamagedFile, match=r"x\.tar\.gz"):
        list(Shards(tmp_path / "x.tar.gz"))


def test_names_that_collide_are_refused(tmp_path):
    records = make(1).records
    with pytest.raises(ValueError, match="own name, found two"):
        write_shards(Some(FLAT, [records[0], records[0]]), tmp_path / "a")
    write_shards(Some(FLAT, records), tmp_path / "b")
    write_shards(Some(FLAT, records), tmp_path / "c")
    both = [tmp_path / "b/flat_0000.tar", tmp_path / "c/flat_0000.tar"]
    with pytest.raises(ValueError, match="every recording once"):
        list(Shards(both))
    with pytest.raises(ValueError, match="every recording once"):
        ShardIndex(both)
    with pytest.raises(FileExistsError, match="new or empty"):
        write_shards(Some(FLAT, records), tmp_path / "b")


def test_long_unicode_names(tmp_path):
    long = replace(make(1).records[0], subject="größe" * 30, task="a.b")
    write_shards(Some(FLAT, [long]), tmp_path / "ü 日本")
    all_same(Shards(tmp_path / "ü 日本"), [long])
    assert [s["__key__"] for s in _webdataset(tmp_path / "ü 日本")] == [formats.sample_key(long)]


def test_clips_by_their_own_bytes(tmp_path):
    source = make(5, frames=50)
    write_shards(source, tmp_path, runs_per_shard=2)
    index = pickle.loads(pickle.dumps(ShardIndex(tmp_path)))
    assert index.tr == 0.8 and index.frames(3) == 53 and np.array_equal(index.mask, MASK)
    pd.testing.assert_frame_equal(index.events(0), EVENTS, check_dtype=False)
    out = np.empty((16, P), np.float16)
    for i, record in enumerate(source):
        for start in (0, 7, len(record.values) - 16):
            assert np.array_equal(index.read(i, start, 16), record.values[start : start + 16])
        assert index.read(i, 3, 16, out) is out and np.array_equal(out, record.values[3:19])
        mean, sd = index.frame_stats(i)
        wide = record.values.astype(np.float64)
        np.testing.assert_allclose(mean, wide.mean(1), rtol=0, atol=1e-6)
        np.testing.assert_allclose(sd, wide.std(1, ddof=1), rtol=1e-6)
    for start, n in ((-1, 16), (50, 16), (0, 0)):
        with pytest.raises(IndexError, match="expected a clip inside 50 frames"):
            index.read(0, start, n)
    with pytest.raises(ValueError, match="expected out as"):
        index.read(0, 0, 16, np.empty((16, P), np.float32))
    os.truncate(index.paths[0], 4000)
    with pytest.raises(DamagedFile, match="cut since it was indexed"):
        index.read(1, 0, 16)


def test_clips_from_threads_and_forks(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    source = make(4, frames=200)
    write_shards(source, tmp_path)
    index = ShardIndex(tmp_path)
    wanted = [(i % 4, (37 * i) % 180) for i in range(400)]

    def right(job):
        i, start = job
        return np.array_equal(index.read(i, start, 16), source.records[i].values[start : start + 16])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, wanted))
    child = os.fork()
    if child == 0:
        os._exit(0 if all(map(right, wanted)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_mixed_trs_are_listed(tmp_path):
    a, b = make(2).records
    write_shards(Some(FLAT, [a, replace(b, tr=2.0)]), tmp_path)
    with pytest.raises(ValueError, match=r"found \[0.8, 2.0\] s"):
        _ = ShardIndex(tmp_path).tr
    with pytest.raises(ValueError, match=r"given, 0.8 s, found 2 s"):
        list(Shards(tmp_path, tr=0.8))


def test_a_long_shard_needs_the_memory_of_one_run(tmp_path):
    layout = Layout.flat(np.ones((100, 100), bool))
    values = np.random.default_rng(0).standard_normal((500, 10_000)).astype(np.float16)  # 10 MB
    records = (Record(values, 1.0, str(i)) for i in range(8))
    write_shards(Some(layout, records), tmp_path, runs_per_shard=8)
    tracemalloc.start()
    n = sum(1 for _ in iter_shard(str(tmp_path / "flat_0000.tar")))
    streaming = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    index = ShardIndex(tmp_path)
    index.read(7, 100, 16)
    indexed = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 8 and streaming < 3.2 * values.nbytes and indexed < 2e6


def test_parcels_travel_as_a_strip(tmp_path):
    source = make(2, PARCELS)
    write_shards(source, tmp_path)
    assert Shards(tmp_path).layout == ShardIndex(tmp_path).layout == PARCELS
    all_same(Shards(tmp_path), source)


def test_rounding_into_float16_is_reported_and_overflow_refused(tmp_path):
    source = make(2, dtype="float32")
    written = write_shards(source, tmp_path / "a", dtype="float16")
    worst = max(np.abs(r.values - r.values.astype(np.float16)).max() for r in source)
    assert f"at most {worst:.3g}" in written.notes[0] and "2 runs" in written.notes[0]
    hot = replace(source.records[0], values=np.full((20, P), 70_000, np.float32))
    with pytest.raises(ValueError, match="at most 65504.*found 70000"):
        write_shards(Some(FLAT, [hot]), tmp_path / "b", dtype="float16")
    assert not list((tmp_path / "b").glob("*.tar"))


# tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_arrow_round_trip(tmp_path, dtype):
    source = make(3, PARCELS, dtype=dtype)
    write_arrow(source, tmp_path)
    all_same(ArrowRuns(tmp_path), source)
    assert len(ArrowRuns(tmp_path)) == 3 and ArrowRuns(tmp_path / "train").layout == PARCELS


def test_equal_tables_are_equal_files(tmp_path):
    for name in ("one", "two"):
        write_arrow(make(layout=PARCELS), tmp_path / name)
    write_arrow(make(3, layout=PARCELS), tmp_path / "other")
    marks = [json.loads((tmp_path / n / "train" / "state.json").read_text())["_fingerprint"] for n in ("one", "two", "other")]
    assert marks[0] == marks[1] != marks[2]


def test_datasets_reads_what_we_write(tmp_path):
    datasets = pytest.importorskip("datasets")
    source = make(3, PARCELS, dtype="float32", meta={"phenotypes": {"Age.At.MHQ": 61.0, "Gender": True, "site": "ü"}})
    write_arrow(source, tmp_path, split=lambda r: "val" if r.subject == "002" else "train")
    train, val, coords = (datasets.load_from_disk(str(tmp_path / n)) for n in ("train", "val", "coords"))
    assert len(train) == 2 and len(val) == 1 and train[0]["Age.At.MHQ"] == 61.0 and train[0]["site"] == "ü"
    assert np.array_equal(np.array(val[0][formats.RECORDING], np.float32), source.records[2].values)
    xyz = np.array([coords[a] for a in "XYZ"]).T
    np.testing.assert_allclose(xyz, PARCELS.sites.coords, atol=1e-4)
    assert [r.meta["split"] for r in ArrowRuns(tmp_path)] == ["train", "train", "val"]


def brainlm(folder, values, names="XYZ", coords=None, **columns):
    "Folders as BrainLM's own scripts save them."
    datasets = pytest.importorskip("datasets")
    rows = {formats.RECORDING: [v.tolist() for v in values]} | columns
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder / "train"))
    if coords is not None:
        datasets.Dataset.from_dict({a: coords[:, i].tolist() for i, a in enumerate(names)}).save_to_disk(str(folder / "coords"))


def test_we_read_what_datasets_wrote_and_ask_for_what_it_lacks(tmp_path):
    values = [np.random.default_rng(i).standard_normal((12, 100)) for i in range(2)]
    brainlm(tmp_path, values, coords=PARCELS.sites.coords, **{"Patient ID": ["7", "8"], "Age.At.MHQ": [50.0, 60.0]})
    with pytest.raises(ValueError, match=r"expected a repetition time.*pass tr="):
        list(ArrowRuns(tmp_path))
    source = ArrowRuns(tmp_path, tr=0.735)
    assert source.layout == PARCELS
    for record, v, name in zip(source, values, "78", strict=True):
        assert record.subject == name and record.tr == 0.735 and record.events is None
        assert np.array_equal(record.values, v.astype(np.float32)) and "Age.At.MHQ" in record.meta["phenotypes"]


def test_the_order_of_parcels_is_checked_against_their_places(tmp_path):
    values, xyz = [np.zeros((12, 100)) + np.arange(100)], PARCELS.sites.coords
    brainlm(tmp_path, values, coords=xyz[::-1])
    with pytest.raises(ValueError, match="order of 'schaefer100'.*100 of 100 sites elsewhere"):
        list(ArrowRuns(tmp_path, tr=1.0, space="schaefer100"))
    own = ArrowRuns(tmp_path, tr=1.0).layout.sites
    np.testing.assert_allclose(own.coords, xyz[::-1])
    assert own.hemisphere[0] == "R" and next(iter(ArrowRuns(tmp_path, tr=1.0))).subject == "train000000"


def test_arrow_says_what_is_missing(tmp_path):
    values = [np.zeros((12, 100))]
    brainlm(tmp_path / "a", values)
    with pytest.raises(ValueError, match="which 100 parcels"):
        list(ArrowRuns(tmp_path / "a", tr=1.0))
    brainlm(tmp_path / "b", values, coords=PARCELS.sites.coords[:99])
    with pytest.raises(DamagedFile, match="coordinates of 100 parcels, found 99"):
        list(ArrowRuns(tmp_path / "b", tr=1.0))
    with pytest.raises(ValueError, match=r"column Nothing.*Voxelwise"):
        list(ArrowRuns(tmp_path / "a", tr=1.0, column="Nothing", space=PARCELS))
    file = next((tmp_path / "a" / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(DamagedFile, match="whole Arrow stream"):
        list(ArrowRuns(tmp_path / "a", tr=1.0, space=PARCELS))
    with pytest.raises(FileNotFoundError, match="`datasets` saved"):
        ArrowRuns(tmp_path)


def test_raw_values_do_not_get_the_name_of_scaled_ones(tmp_path):
    raw = make(1, PARCELS, dtype="float32")
    raw.records[0].values += 10_000
    write_arrow(raw, tmp_path / "raw")
    datasets = pytest.importorskip("datasets")
    assert formats.RAW_RECORDING in datasets.load_from_disk(str(tmp_path / "raw/train")).column_names
    all_same(ArrowRuns(tmp_path / "raw"), raw)
    write_arrow(raw, tmp_path / "both", transform=lambda v: (v - 10_000) / 2)
    both = datasets.load_from_disk(str(tmp_path / "both/train"))
    assert {formats.RECORDING, formats.RAW_RECORDING} <= set(both.column_names)
    scaled = next(iter(ArrowRuns(tmp_path / "both"))).values
    np.testing.assert_array_equal(scaled, (raw.records[0].values - 10_000) / 2)
    all_same(ArrowRuns(tmp_path / "both", column=formats.RAW_RECORDING), raw)


# HDF5 -----------------------------------------------------------------------------------------------------


def test_h5_as_published(tmp_path):
    source = make(12, PARCELS, dtype="float32", meta={"phenotypes": {"age": 31.0}})
    write_hdf5(source, tmp_path, statistics_of=["000", "003"])
    all_same(HDF5Runs(tmp_path), source)
    with h5py.File(tmp_path / "data_resampled.h5") as f:
        first = f["time_series/sample_000000"]
        assert first.shape == (100, 40) and first.dtype == np.float32 and first.compression == "lzf"
        assert np.array_equal(first[:].T, source.records[0].values) and f.attrs["next_index"] == 12
        assert f["metadata/subjects"].asstr()[:].tolist() == [r.subject for r in source]
        assert f["metadata/dataset_names"].asstr()[11] == "sample_000011"
        assert f["metadata/shapes"].dtype == np.int32 and f["metadata/shapes"][3].tolist() == [100, 43]
    means = np.stack([source.records[i].values.mean(0, dtype=np.float64) for i in (0, 3)])
    with np.load(tmp_path / "normalization_params.npz") as z:
        np.testing.assert_allclose(z["medians_roi"], np.median(means, 0))
        np.testing.assert_allclose(z["iqrs"], np.subtract(*np.percentile(means, [75, 25])))
        assert z["iqrs_roi"].shape == z["std_roi"].shape == (100,) and z["mean"].shape == () and np.isclose(z["std"], means.std())
    people = read_table(tmp_path / "metadata.csv")
    assert people.subject_id.tolist() == [r.subject for r in source] and (people.age == 31).all()


def test_h5_keeps_float16_apart(tmp_path):
    source = make(2, PARCELS)
    write_hdf5(source, tmp_path)
    all_same(HDF5Runs(tmp_path), source)


@pytest.mark.parametrize("name", ["sample_{}", "sample_{:06d}"])
def test_numbers_not_names_decide_the_order(tmp_path, name):
    with h5py.File(tmp_path / "data_resampled.h5", "w") as f:
        for i in range(12):
            f[f"time_series/{name.format(i)}"] = np.full((100, 20), i, np.float32) + np.arange(20)
        f["metadata/subjects"] = [f"s{i}" for i in range(12)]
        f["metadata/sessions"] = ["1"] * 12
    for i, record in enumerate(HDF5Runs(tmp_path, tr=2.0, space="schaefer100")):
        assert record.subject == f"s{i}" and record.values[0, 0] == i
    with pytest.raises(ValueError, match="expected a repetition time"):
        HDF5Runs(tmp_path, space="schaefer100")
    with pytest.raises(ValueError, match="which 100 parcels"):
        HDF5Runs(tmp_path, tr=2.0)


def test_h5_appends_and_resumes(tmp_path):
    source = make(5, PARCELS, dtype="float32")
    write_hdf5(Some(PARCELS, source.records[:2]), tmp_path)
    with pytest.raises(FileExistsError, match="append=True"):
        write_hdf5(source, tmp_path)
    with h5py.File(tmp_path / "data_resampled.h5", "a") as f:  # a writer that died in the middle of the third
        f["time_series/sample_000002"] = np.zeros((100, 3), np.float32)
    write_hdf5(source, tmp_path, append=True)
    all_same(HDF5Runs(tmp_path), source)
    other = replace(source.records[0], values=source.records[0].values + 1)
    with pytest.raises(ValueError, match="in the file already"):
        write_hdf5(Some(PARCELS, [other]), tmp_path, append=True)
    with pytest.raises(ValueError, match="expected layout"):
        write_hdf5(make(1, Layout.of("schaefer200")), tmp_path, append=True)


def _break_h5(path, kind):
    with h5py.File(path, "a") as f:
        if kind == "rank":
            del f["time_series/sample_000001"]
            f["time_series/sample_000001"] = np.zeros((100, 3, 4), np.float32)
        if kind == "gap":
            del f["time_series/sample_000001"]
        if kind == "twice":
            f["time_series/sample_1"] = np.zeros((100, 3), np.float32)
        if kind == "metadata":
            f["metadata/subjects"].resize(2, axis=0)
        if kind == "order":
            f["metadata/dataset_names"][0] = "sample_000002"
        if kind == "parcels":
            del f["time_series/sample_000001"]
            f["time_series/sample_000001"] = np.zeros((99, 40), np.float32)
        if kind == "nan":
            f["time_series/sample_000001"][4, 4] = np.nan
        if kind == "group":
            del f["time_series"]


@pytest.mark.parametrize(
    ("kind", "word"),
    [("rank", "sample_000001: expected \\(parcels, time\\)"), ("gap", "samples 0 to 1"), ("twice", "each number once"), ("metadata", "expected 3 entries in metadata/subjects, found 2"),
     ("order", "in the order of the samples"), ("parcels", "expected 100 parcels.*found 99"), ("nan", "sample_000001: expected finite"), ("group", "in the group time_series"), ("cut", "whole HDF5 file")],
)  # fmt: skip
def test_h5_damage_is_named(tmp_path, kind, word):
    write_hdf5(make(3, PARCELS, dtype="float32"), tmp_path)
    path = tmp_path / "data_resampled.h5"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        _break_h5(path, kind)
    with pytest.raises(DamagedFile, match=word):
        list(HDF5Runs(tmp_path))


def test_flat_maps_have_no_place_in_parcels(tmp_path):
    with pytest.raises(ValueError, match="expected parcels for format 'h5', found a flat map: formats 'store' and 'wds'"):
        write_hdf5(make(1), tmp_path / "x.h5")
    with pytest.raises(ValueError, match="found a flat map"):
        write_arrow(make(1), tmp_path / "x")
    with pytest.raises(ValueError, match=r"expected volume for format 'pt', found parcels \(schaefer100\)"):
        write_volumes(make(1, PARCELS), tmp_path / "y")
    assert list(tmp_path.iterdir()) == []


# volumes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LAS"])
def test_volumes_round_trip_and_are_what_is_published(tmp_path, axes):
    layout = volume_layout()
    source = make(2, layout)
    write_volumes(source, tmp_path, axes=axes)
    all_same(VolumeRuns(tmp_path), source)
    tensor = torch.load(tmp_path / "img/000/func_data_MNI_fp16.pt", weights_only=True)
    assert type(tensor) is torch.Tensor and tensor.dtype == torch.float16 and tensor.shape == (4, 5, 3, 40)
    values, voxel = source.records[0].values, layout.sites.voxels[5]
    x = voxel[0] if axes == "RAS" else 3 - voxel[0]
    assert np.array_equal(tensor[x, voxel[1], voxel[2]].numpy(), values[:, 5])
    assert tensor[3 if axes == "RAS" else 0, 0, 0, 0] == values.min()  # the background
    clip = VolumeRuns(tmp_path).read(1, 20, 16)
    assert np.array_equal(clip, source.records[1].values[20:36])
    said = json.loads((tmp_path / "img/000/func_data_MNI_fp16.json").read_text())
    corner = np.array(said["affine"]) @ [x, *voxel[1:], 1]
    np.testing.assert_allclose(corner[:3], layout.sites.coords[5])


def test_global_normalisation_as_in_the_original(tmp_path):
    source = make(1, volume_layout(), dtype="float32")
    source.records[0].values *= 300
    source.records[0].values += 9000
    raw = source.records[0].values.astype(np.float64)
    write_volumes(source, tmp_path, normalise="global", background="zero")
    record = VolumeRuns(tmp_path).record(0)
    np.testing.assert_allclose(record.values, (raw - raw.mean()) / raw.std(ddof=1), atol=2e-3)
    assert np.isclose(record.meta["normalised"]["sd"], raw.std(ddof=1)) and VolumeRuns(tmp_path).tensor(0)[3, 0, 0, 0] == 0


def test_foreign_volumes_need_tr_axes_and_affine(tmp_path):
    grid = torch.zeros(91, 109, 91, 3, dtype=torch.float16) - 4
    grid[60, 50, 40] = torch.tensor([1.0, 2, 3], dtype=torch.float16)  # LAS: this is on the left
    grid[30, 50, 40] = torch.tensor([7.0, 8, 9], dtype=torch.float16)
    (tmp_path / "img/1001").mkdir(parents=True)
    torch.save(grid, tmp_path / "img/1001/func_data_MNI_fp16.pt")
    with pytest.raises(ValueError, match="axes='RAS' or axes='LAS'"):
        list(VolumeRuns(tmp_path, tr=0.735))
    with pytest.raises(ValueError, match="expected a repetition time"):
        list(VolumeRuns(tmp_path, axes="LAS"))
    with pytest.raises(ValueError, match="expected an affine"):
        _ = VolumeRuns(tmp_path, axes="RAS").layout
    (record,) = VolumeRuns(tmp_path, tr=0.735, axes="LAS")
    sites = VolumeRuns(tmp_path, tr=0.735, axes="LAS").layout.sites
    assert sites.hemisphere.tolist() == ["L", "R"] and sites.coords[0].tolist() == [-30.0, -26.0, 8.0]
    assert record.values[:, 0].tolist() == [1, 2, 3] and record.subject == "1001"


def test_volumes_refuse_pickles_and_oddities(tmp_path):
    folder = tmp_path / "img/1"
    folder.mkdir(parents=True)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    for saved, word in [({"x": Bomb()}, "never opened"), (torch.zeros(2, 2), "float32 \\(2, 2\\)"), ({"a": torch.zeros(1)}, "found dict"), (None, "whole PyTorch file")]:
        torch.save(saved, folder / "func_data_MNI_fp16.pt")
        if saved is None:
            (folder / "func_data_MNI_fp16.pt").write_bytes(b"PK broken")
        with pytest.raises(DamagedFile, match=word):
            VolumeRuns(tmp_path, axes="RAS", tr=1.0).tensor(0)
    assert not (tmp_path / "ran").exists()


def test_two_runs_of_a_subject_need_folders_of_their_own(tmp_path):
    layout = volume_layout()
    one = make(1, layout).records[0]
    two = Some(layout, [one, replace(one, session="03")])
    with pytest.raises(ValueError, match="name='key'"):
        write_volumes(two, tmp_path / "a")
    write_volumes(two, tmp_path / "b", name="key")
    all_same(VolumeRuns(tmp_path / "b"), two)


# people ---------------------------------------------------------------------------------------------------


def test_join_by_name(tmp_path):
    index = pd.DataFrame({"subject": ["007", "008", "008", "010"], "session": ["1", "1", "2", "1"]})
    (tmp_path / "d.csv").write_text("subject_id,session_id,age\nsub-008,2,30\n007,ses-1,20\n999,1,5\n")
    joined = join_by_subject(read_table(tmp_path / "d.csv"), index)
    assert joined.table.age.tolist()[0] == 20 and joined.table.age.tolist()[2] == 30 and joined.table.age.isna().tolist() == [False, True, False, True]
    assert joined.only_in_table.subject_id.tolist() == ["999"] and joined.only_in_index.subject.tolist() == ["008", "010"]
    with pytest.raises(ValueError, match=r"found two of \['007', '1'\]"):
        join_by_subject(pd.concat([read_table(tmp_path / "d.csv")] * 2).iloc[1:5], index)
    with pytest.raises(ValueError, match="'010188' has become 10188"):
        join_by_subject(pd.read_csv(io.StringIO("subject_id,age\n010188,3\n")), index)


def test_targets_report_gaps_and_repeats(tmp_path):
    (tmp_path / "t.csv").write_text("eid,g\n01,1\n02,\n03,2\n03,2\n")
    target, problems = read_targets(tmp_path / "t.csv", "g")
    assert target.to_dict() == {"01": 1.0, "03": 2.0} and "1 of 4 rows have no g: 02" in problems[0] and "1 rows repeat" in problems[1]
    (tmp_path / "t.csv").write_text("eid,g\n01,1\n01,2\n")
    with pytest.raises(ValueError, match=r"expected one g for each eid, found \[1, 2\] for 01"):
        read_targets(tmp_path / "t.csv", "g")
    with pytest.raises(ValueError, match="found no height"):
        read_targets(tmp_path / "t.csv", "height")


def test_pickles_only_on_request(tmp_path):
    pd.DataFrame({"eid": ["01"], "g": [1.0]}).to_pickle(tmp_path / "t.pkl")
    with pytest.raises(ValueError, match="runs code when opened"):
        read_targets(tmp_path / "t.pkl", "g")
    assert read_targets(tmp_path / "t.pkl", "g", allow_pickle=True)[0].to_dict() == {"01": 1.0}
    pd.DataFrame({"eid": ["01"], "g": [1.0]}).to_parquet(tmp_path / "t.parquet")
    assert read_targets(tmp_path / "t.parquet", "g")[0].to_dict() == {"01": 1.0}


# one door -------------------------------------------------------------------------------------------------


def test_detect_goes_by_content(tmp_path):
    write_shards(make(1), tmp_path / "wds")
    write_arrow(make(1, PARCELS), tmp_path / "arrow")
    write_hdf5(make(1, PARCELS), tmp_path / "h5")
    write_volumes(make(1, volume_layout()), tmp_path / "pt")
    write_store(make(1), tmp_path / "store", progress=False)
    for name in formats.FORMATS:
        assert detect(tmp_path / name) == name
        assert len(list(open_source(tmp_path / name))) == 1
    assert detect(tmp_path / "wds/flat_0000.tar") == detect("https://x/y.tar") == "wds"
    (tmp_path / "fake").mkdir()
    for name in ("fake.tar", "data_resampled.h5"):
        (tmp_path / "fake" / name).write_bytes(b"no" * 600)
    assert detect(tmp_path / "fake") is None and detect(tmp_path / "fake/fake.tar") is None and detect(tmp_path / "nothing") is None
    with pytest.raises(ValueError, match="found none of them"):
        open_source(tmp_path / "fake")


@pytest.mark.parametrize("format", ["wds", "arrow", "h5", "store"])
def test_conversions_of_parcels_keep_every_bit_and_a_manifest(tmp_path, format):
    source = make(3, PARCELS, dtype="float32")
    write_store(source, tmp_path / "store", progress=False)
    convert(tmp_path / "store", tmp_path / "there", format)
    assert verify(tmp_path / "there").ok
    convert(tmp_path / "there", tmp_path / "back", "store")
    all_same(Store(tmp_path / "back"), source)
    victim = max((p for p in (tmp_path / "there").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert not verify(tmp_path / "there").ok and victim.name in verify(tmp_path / "there").problems[0]


def test_volumes_to_store_and_back(tmp_path):
    source = make(2, volume_layout())
    convert(source, tmp_path / "pt", "pt", axes="LAS", background="zero")
    convert(tmp_path / "pt", tmp_path / "store", "store")
    all_same(Store(tmp_path / "store"), source)
    report = json.loads((tmp_path / "pt/CONVERSION.json").read_text())
    assert report["runs"] == 2 and any("events.csv" in n for n in report["notes"])
    assert pd.read_csv(tmp_path / "pt/img/000/events.csv").trial_type.tolist() == ["face", "häuser"]


def test_a_failed_conversion_leaves_nothing_and_an_existing_one_stands(tmp_path):
    class Dying(Some):
        def __iter__(self):
            yield self.records[0]
            raise RuntimeError("the disk caught fire")

    for format in ("wds", "arrow", "h5", "store"):
        with pytest.raises(RuntimeError, match="caught fire"):
            convert(Dying(PARCELS, make(2, PARCELS).records), tmp_path / "out", format)
        assert list(tmp_path.iterdir()) == []
    convert(make(1, PARCELS), tmp_path / "out", "wds")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(make(2, PARCELS), tmp_path / "out", "wds")
    with pytest.raises(RuntimeError, match="caught fire"):
        convert(Dying(PARCELS, make(2, PARCELS).records), tmp_path / "out", "wds", overwrite=True)
    assert len(list(Shards(tmp_path / "out"))) == 1 and verify(tmp_path / "out").ok
    convert(make(2, PARCELS), tmp_path / "out", "arrow", overwrite=True)
    assert detect(tmp_path / "out") == "arrow" and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="expected a folder"):
        convert(make(1), tmp_path / "x.h5", "h5")
    with pytest.raises(ValueError, match="found 'zarr'"):
        convert(make(1), tmp_path / "x", "zarr")
    with pytest.raises(ValueError, match="at least one recording"):
        convert(Some(FLAT, []), tmp_path / "x", "wds")


# what others write, and what damage does ------------------------------------------------------------------


def test_gzip_is_told_by_its_bytes_not_by_the_name(tmp_path):
    import gzip

    source = make(2)
    write_shards(source, tmp_path / "plain")
    packed = gzip.compress((tmp_path / "plain/flat_0000.tar").read_bytes())
    for name in ("x.tgz", "x.tar", "x.bin"):
        (tmp_path / name).write_bytes(packed)
        all_same(Shards(tmp_path / name), source)
    all_same(Shards(f"pipe:cat {tmp_path}/x.tgz"), source)
    all_same(Shards(f"pipe:gzip -dc {tmp_path}/x.tgz"), source)  # ends in tgz, delivers a tar
    assert detect(tmp_path / "x.tar") == "wds"
    with pytest.raises(ValueError, match="uncompressed"):
        ShardIndex(tmp_path / "x.tar")
    with pytest.raises(TypeError):
        len(Shards(tmp_path / "x.tar"))


def test_damaged_gzip_is_named_and_counted(tmp_path):
    import gzip

    write_shards(make(2), tmp_path / "plain")
    whole = gzip.compress((tmp_path / "plain/flat_0000.tar").read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(10, len(whole), 60):
        (tmp_path / "x.tgz").write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        with pytest.raises(DamagedFile, match=r"x\.tgz"):
            list(Shards(tmp_path / "x.tgz"))
        problems = []
        list(iter_shard(tmp_path / "x.tgz", on_error="skip", problems=problems))
        assert problems
    for cut in rng.integers(1, len(whole), 20):
        (tmp_path / "x.tgz").write_bytes(whole[:cut])
        with pytest.raises(DamagedFile):
            list(Shards(tmp_path / "x.tgz"))


def test_damage_in_long_names_is_named(tmp_path):
    write_shards(Some(FLAT, [replace(make(1).records[0], subject="ü" * 60)]), tmp_path)
    path = tmp_path / "flat_0000.tar"
    whole = path.read_bytes()
    for at in range(512, 660):  # the text of the extended label, which has no checksum
        for change in (1, 16, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            with pytest.raises(DamagedFile):
                list(Shards(path))
    path.write_bytes(whole[:512] + b"0 path=x\n" + whole[521:])  # a line of no length must not go on for ever
    with pytest.raises(DamagedFile, match="extended label"):
        list(Shards(path))


def test_every_flip_in_a_header_is_an_error_or_changes_nothing(tmp_path):
    write_shards(make(1), tmp_path)
    path = tmp_path / "flat_0000.tar"
    whole, (good,) = path.read_bytes(), Shards(tmp_path)
    with tarfile.open(path) as tar:
        places = {m.name.split(".", 1)[1]: (m.offset_data, m.size) for m in tar}
    (npy, _), (npz, size) = places["bold.npy"], places["mask.npz"]
    header, directory = range(npy, npy + 128), range(npz + size - 300, npz + size)
    for at, flip in [(at, 4) for at in header] + [(at, 1) for at in directory]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        for read in (Shards, ShardIndex):
            try:
                (found,) = read(path)
            except DamagedFile:
                continue
            assert np.array_equal(found.values, good.values)


def test_hidden_members_are_not_counted(tmp_path):
    write_shards(make(2), tmp_path / "a")
    with tarfile.open(tmp_path / "a/flat_0000.tar") as old, tarfile.open(tmp_path / "mac.tar", "w") as new:
        for member in old:
            hidden = tarfile.TarInfo(f"._{member.name}")
            hidden.size = 3
            new.addfile(hidden, io.BytesIO(b"mac"))
            new.addfile(member, old.extractfile(member))
    source = Shards(tmp_path / "mac.tar")
    assert len(source) == len(list(source)) == len(ShardIndex(tmp_path / "mac.tar")) == 2


def test_runs_that_only_the_sample_names_tell_apart(tmp_path):
    write_shards(make(2), tmp_path / "a")
    with tarfile.open(tmp_path / "a/flat_0000.tar") as old, tarfile.open(tmp_path / "b.tar", "w") as new:
        for i, member in enumerate(old):
            meta = {"sub": "101", "mod": "tfMRI", "task": "WM", "mag": "3T", "dir": "LR", "tr": 1.0}
            data = json.dumps(meta).encode() if member.name.endswith("meta.json") else old.extractfile(member).read()
            named = tarfile.TarInfo(f"sub-101_mod-tfMRI_task-WM_mag-3T_dir-LR_run-{1 + i // 4}.{member.name.split('.', 1)[1]}")
            named.size = len(data)
            new.addfile(named, io.BytesIO(data))
    assert [r.run for r in Shards(tmp_path / "b.tar")] == ["LR-1", "LR-2"] == ShardIndex(tmp_path / "b.tar").index.run.tolist()


def test_no_writer_takes_a_recording_twice(tmp_path):
    for name, write, layout in (("wds", write_shards, FLAT), ("arrow", write_arrow, PARCELS), ("h5", write_hdf5, PARCELS)):
        twice = make(1, layout).records * 2
        with pytest.raises(ValueError, match="once|its own name"):
            write(Some(layout, twice), tmp_path / name)
    with pytest.raises(ValueError, match="runs_per_shard=0"):
        write_shards(make(2), tmp_path / "none", runs_per_shard=0)


def test_several_recordings_of_a_person_in_a_table(tmp_path):
    datasets = pytest.importorskip("datasets")
    values = [r.values.tolist() for r in make(3, PARCELS, dtype="float32")]
    table = {formats.RECORDING: values, "Patient ID": ["a", "a", "b"], "Filename": ["a_1.dat", "a_2.dat", "b_1.dat"]}
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "t/train"))
    found = list(ArrowRuns(tmp_path / "t", tr=0.735, space="schaefer100"))
    assert [r.key for r in found] == ["sub-a_run-a_1", "sub-a_run-a_2", "sub-b"]
    assert all(np.array_equal(r.values, np.float32(v)) for r, v in zip(found, values, strict=True))


def test_damaged_tables_end_in_an_error_not_in_a_crash(tmp_path):
    import pyarrow as pa

    source = make(3, PARCELS, frames=10, meta={})
    write_arrow(source, tmp_path)
    (path,) = (tmp_path / "train").glob("*.arrow")
    whole = path.read_bytes()
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        stream.read_next_batch()
        first = file.tell()  # cut here, a shorter stream is left
    for cut in (first, len(whole) - 8, len(whole) // 2, 0):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedFile, match="arrow: expected a whole Arrow stream"):
            list(ArrowRuns(tmp_path))
    path.write_bytes(whole[:first] + b"\xff" * 4 + bytes(4) + whole[first + 8 :])  # an end in the middle
    with pytest.raises(DamagedFile, match="last row at byte"):
        list(ArrowRuns(tmp_path))
    values = source.records[0].values.tobytes()
    at = whole.index(np.arange(0, 1001, 100, dtype=np.int32).tobytes())  # where the frames of the first run begin
    assert values in whole
    path.write_bytes(whole[: at + 8] + np.int32(2**30).tobytes() + whole[at + 12 :])
    with pytest.raises(DamagedFile):
        list(ArrowRuns(tmp_path))
    path.write_bytes(whole)
    for text in ("", "{", "{}", '{"_data_files": [{}]}', "[]"):
        (tmp_path / "train/state.json").write_text(text)
        with pytest.raises(DamagedFile, match=r"state\.json"):
            list(ArrowRuns(tmp_path))


def test_published_h5_with_several_recordings_of_a_visit(tmp_path):
    text = h5py.string_dtype()
    with h5py.File(tmp_path / "x*.h5", "w") as f:  # a name of the original has a star in it
        for i in range(12):
            f[f"time_series/sample_{i}"] = np.full((100, 20), i, np.float32)
        f["metadata/subjects"] = np.arange(12) // 2  # numbers, not text
        f["metadata/sessions"] = np.array(["1"] * 12, dtype=text)
        f["metadata/file_ids"] = np.array([f"raw/f{i}" for i in range(12)], dtype=text)
    assert detect(tmp_path / "x*.h5") == "h5"
    source = HDF5Runs(tmp_path / "x*.h5", tr=2.0, space="schaefer100")
    assert [r.key for r in source][-2:] == ["sub-5_ses-1_run-f10", "sub-5_ses-1_run-f11"]
    assert [int(r.values[0, 0]) for r in source] == list(range(12))


def test_names_of_files_and_folders_are_taken_apart(tmp_path):
    datasets = pytest.importorskip("datasets")
    values = [r.values.tolist() for r in make(2, PARCELS, dtype="float32")]
    names = ["sub-01_ses-1_task-rest_bold.dat", "sub-01_ses-2_task-rest_bold.dat"]
    datasets.Dataset.from_dict({formats.RECORDING: values, "Filename": names}).save_to_disk(str(tmp_path / "t/train"))
    found = [r.key for r in ArrowRuns(tmp_path / "t", tr=2.0, space="schaefer100")]
    assert found == ["sub-01_ses-1_task-rest", "sub-01_ses-2_task-rest"]
    text = h5py.string_dtype()
    with h5py.File(tmp_path / "x.h5", "w") as f:
        for i in range(2):
            f[f"time_series/sample_{i}"] = np.full((100, 20), i, np.float32)
        f["metadata/subjects"] = np.array(["01", "01"], dtype=text)
        f["metadata/file_ids"] = np.array([f"sub-01_task-rest_run-{i}" for i in (1, 2)], dtype=text)
    source = HDF5Runs(tmp_path / "x.h5", tr=2.0, space="schaefer100")
    assert [r.key for r in source] == ["sub-01_task-rest_run-1", "sub-01_task-rest_run-2"]
    write_volumes(make(1, volume_layout()), tmp_path / "v", name="key")
    (told,) = (tmp_path / "v").glob("img/*/*.json")
    told.unlink()
    assert [r.key for r in VolumeRuns(tmp_path / "v", tr=2.0, axes="RAS")] == ["sub-000_ses-02_task-rest"]


def test_flips_in_the_structure_of_hdf5_are_named(tmp_path):
    write_hdf5(make(2, PARCELS, dtype="float32"), tmp_path)
    path, rng = tmp_path / "data_resampled.h5", np.random.default_rng(1)
    whole, known = path.read_bytes(), 0
    for at in rng.integers(0, 6000, 150):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1 :])
        try:
            list(HDF5Runs(path))
        except ValueError:  # DamagedFile is one; nothing else may come out
            known += 1
    assert known > 10


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    write_volumes(make(1, volume_layout()), tmp_path)
    (path,) = tmp_path.glob("img/*/*.pt")
    whole, values = path.read_bytes(), VolumeRuns(tmp_path).tensor(0).tobytes()
    at = whole.index(values) + len(values) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DamagedFile, match="checksums"):
        list(VolumeRuns(tmp_path))


def test_a_damaged_source_is_not_converted_into_a_sound_copy(tmp_path):
    convert(make(2), tmp_path / "a", "wds")
    shard = tmp_path / "a/flat_0000.tar"
    whole = shard.read_bytes()
    at = whole.index(make(2).records[0].values.tobytes()) + 100
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert len(list(Shards(tmp_path / "a"))) == 2  # no reader can see it
    with pytest.raises(DamagedFile, match=r"manifest says, found flat_0000\.tar"):
        convert(tmp_path / "a", tmp_path / "b", "store")
    assert not (tmp_path / "b").exists()
    for format in ("store", "wds"):
        written = convert(tmp_path / "a", tmp_path / format, format, source_options={"on_error": "skip"})
        assert "damaged in the source: flat_0000.tar" in json.loads((tmp_path / format / "CONVERSION.json").read_text())["notes"][0]
        assert written.runs == 2 and verify(tmp_path / format).ok
    shard.write_bytes(whole)
    (tmp_path / "a/README").write_text("laid beside the data")
    assert convert(tmp_path / "a", tmp_path / "c", "store").runs == 2


def test_overwriting_after_a_kill_and_never_into_the_source(tmp_path):
    convert(make(1), tmp_path / "a", "wds")
    convert(make(1), tmp_path / ".new-a", "wds")  # what a kill just before the swap leaves
    assert convert(make(3), tmp_path / "a", "wds", overwrite=True).runs == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    for dst in (tmp_path / "a/inside", tmp_path):
        with pytest.raises(ValueError, match="one inside the other"):
            convert(tmp_path / "a", dst, "store", overwrite=True)
    assert verify(tmp_path / "a").ok
    assert convert(tmp_path / "a", tmp_path / "a", "store", overwrite=True).runs == 3 and detect(tmp_path / "a") == "store"


def test_killed_conversions_leave_all_or_nothing(tmp_path):
    import os
    import signal
    import time

    write_store(make(12, PARCELS, frames=400, dtype="float32"), tmp_path / "src", progress=False)
    convert(tmp_path / "src", tmp_path / "warm", "h5")
    for i, format in enumerate(("wds", "arrow", "h5", "store") * 3):
        ready, tell = os.pipe()
        if (child := os.fork()) == 0:
            os.write(tell, b"x")
            try:
                convert(tmp_path / "src", tmp_path / "dst", format, overwrite=True)
            finally:
                os._exit(0)
        os.read(ready, 1)
        time.sleep(0.02 * i)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)
        for left in tmp_path.glob("[.d]*"):  # whatever passes has everything
            if verify(left).ok:
                assert len(list(open_source(left))) == 12
        assert convert(tmp_path / "src", tmp_path / "dst", format, overwrite=True).runs == 12 and verify(tmp_path / "dst").ok


def test_a_full_disk_is_said_before_hdf5_breaks(tmp_path, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr(formats.shutil, "disk_usage", lambda path: namedtuple("u", "total used free")(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="full disk") as error:
        write_hdf5(make(2, PARCELS), tmp_path / "h5")
    assert error.value.errno == 28 and not list((tmp_path / "h5").iterdir())


def test_importing_is_quick_and_needs_no_heavy_package():
    import subprocess
    import sys

    code = "import sys, fmri_book.formats; print([m for m in ('torch', 'h5py', 'pyarrow', 'datasets', 'fsspec', 'webdataset') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(formats.__file__).parent.parent)
    assert done.stdout.strip() == "[]"
