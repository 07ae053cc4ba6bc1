"""Downloads from a local server with every accident we could think of; never the real network."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from fmri_book import public_data
from fmri_book.public_data import (
    DATASETS,
    LicenceNotAccepted,
    Offline,
    PublicDataset,
    RemoteFile,
    download,
    fetch,
)
from fmri_book.storage import DamagedFile

BODY = bytes(range(256)) * 4000  # 1,024,000 bytes


class Server(http.server.ThreadingHTTPServer):
    "Files by path, and what is to go wrong."

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/file.tar": BODY}
        self.hang_ups = []  # after how many bytes of each answer to hang up
        self.status = []  # statuses to answer with first
        self.ranges, self.lengths, self.tag = True, True, '"v1"'
        self.asked = []  # (path, headers)
        self.redirect = {}
        self.before = lambda: None
        self.pace = 0  # seconds between pieces of 64 KiB
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s, path = self.server, urlsplit(self.path).path
        s.asked.append((self.path, dict(self.headers)))
        s.before()
        if path in s.redirect:
            self.send_response(302)
            self.send_header("Location", s.redirect[path])
            self.end_headers()
            return
        status = s.status.pop(0) if s.status else (200 if path in s.files or path in s.answers() else 404)
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, headers = s.answers().get(path, lambda q: (s.files[path], {}))(
            parse_qs(urlsplit(self.path).query)
        )
        start, asked = 0, self.headers.get("Range")
        if asked and s.ranges and self.headers.get("If-Range") == s.tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self.send_response(206 if start else 200)
        if s.tag:
            self.send_header("ETag", s.tag)
        if s.lengths:
            self.send_header("Content-Length", str(len(body) - start))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        end = start + s.hang_ups.pop(0) if s.hang_ups else len(body)
        with suppress(ConnectionError):
            for at in range(start, end, 1 << 16):
                self.wfile.write(body[at : min(at + (1 << 16), end)])
                time.sleep(s.pace)
        self.close_connection = True

    def log_message(self, *args):
        pass


Server.answers = lambda self: {}


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch, tmp_path):
    for name in (
        "FMRI_BOOK_OFFLINE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(public_data, "_hub_headers", dict)


def get(server, path, **options):
    return download(f"{server.url}/file.tar", path, **{"progress": False, "pause": 0.01, **options})


SHA = ("sha256", hashlib.sha256(BODY).hexdigest())


# ---------------------------------------------------------------- one file


def test_a_whole_file(server, tmp_path):
    path = get(server, tmp_path / "deep" / "a.tar", size=len(BODY), digest=SHA)
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["a.tar"]
    get(server, path, size=len(BODY), digest=SHA)
    assert len(server.asked) == 1  # what is there and right is not fetched again


@pytest.mark.parametrize(
    "hang_ups", [[1], [1000, 1, 500_000], [0, 300_000], [0, 0, 0, 0, 100_000, 0, 0, 0, 0]]
)
def test_interruptions_are_continued(server, tmp_path, hang_ups):
    server.hang_ups = list(hang_ups)
    path = get(server, tmp_path / "a.tar", digest=SHA)
    assert path.read_bytes() == BODY
    assert [h["If-Range"] for _, h in server.asked if "Range" in h] == ['"v1"'] * sum(
        1 for _, h in server.asked if "Range" in h
    )
    starts = [int(h["Range"][6:-1]) for _, h in server.asked if "Range" in h]
    assert starts == sorted(starts) and (sum(hang_ups[:1]) == 0 or starts[0] == hang_ups[0])


def test_giving_up_keeps_the_part_and_a_later_call_continues(server, tmp_path):
    server.hang_ups = [400_000, *[0] * 5]
    with pytest.raises(ConnectionError, match=r"5 times in a row; 400,000 bytes are kept in .*a\.tar\.part"):
        get(server, tmp_path / "a.tar", tries=5)
    assert not (tmp_path / "a.tar").exists() and (tmp_path / "a.tar.part").stat().st_size == 400_000
    server.asked.clear()
    assert get(server, tmp_path / "a.tar", digest=SHA).read_bytes() == BODY
    assert server.asked[0][1]["Range"] == "bytes=400000-"


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    server.hang_ups = [400_000, 0]
    with pytest.raises(ConnectionError):
        get(server, tmp_path / "a.tar", tries=1)
    server.files["/file.tar"], server.tag = BODY[::-1], '"v2"'
    assert get(server, tmp_path / "a.tar").read_bytes() == BODY[::-1]


@pytest.mark.parametrize("change", [{"ranges": False}, {"tag": ""}, {"tag": 'W/"weak"'}])
def test_servers_that_cannot_continue_start_over(server, tmp_path, change):
    for name, value in change.items():
        setattr(server, name, value)
    server.hang_ups = [400_000]
    assert get(server, tmp_path / "a.tar").read_bytes() == BODY


def test_without_a_length_the_size_decides(server, tmp_path):
    server.lengths, server.hang_ups = False, [400_000]
    assert get(server, tmp_path / "a.tar", size=len(BODY)).read_bytes() == BODY


def test_a_file_packed_on_the_way_is_not_taken_for_the_file(server, tmp_path):
    server.answers = lambda: {"/file.tar": lambda query: (b"packed", {"Content-Encoding": "gzip"})}
    with pytest.raises(DamagedFile, match="packed on the way"):
        get(server, tmp_path / "a.tar")
    assert server.asked[0][1]["Accept-Encoding"] == "identity" and not list(tmp_path.iterdir())


def test_a_rest_from_the_wrong_place_is_refused_and_the_next_call_starts_over(server, tmp_path):
    server.hang_ups = [400_000, 0]
    with pytest.raises(ConnectionError):
        get(server, tmp_path / "a.tar", tries=1)
    assert (tmp_path / "a.tar.part").stat().st_size == 400_000
    (tmp_path / "a.tar.part").write_bytes(BODY[:1000])
    send = Handler.send_header

    def wrong(self, name, value):
        send(self, name, "bytes 7-9/10" if name == "Content-Range" else value)

    try:
        Handler.send_header = wrong
        with pytest.raises(ValueError, match="expected bytes from 1000, found the range '7-9'"):
            get(server, tmp_path / "a.tar")
    finally:
        Handler.send_header = send
    assert get(server, tmp_path / "a.tar").read_bytes() == BODY and server.asked[-1][1].get("Range") is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, status):
    server.status = [status, status]
    assert get(server, tmp_path / "a.tar").read_bytes() == BODY


def test_a_broken_server_is_not_asked_for_ever(server, tmp_path):
    server.status = [503] * 20
    with pytest.raises(ConnectionError, match="503") as error:
        get(server, tmp_path / "a.tar", tries=3)
    assert "kept" not in str(error.value)  # nothing came
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "error"), [(403, PermissionError), (401, PermissionError), (404, FileNotFoundError)]
)
def test_refusals_are_told_apart(server, tmp_path, status, error):
    server.status = [status]
    with pytest.raises(error, match=str(status)):
        get(server, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists() and len(server.asked) == 1


def test_damage_leaves_nothing(server, tmp_path):
    with pytest.raises(DamagedFile, match=f"expected sha256 {'0' * 64}, found {SHA[1]}"):
        get(server, tmp_path / "a.tar", digest=("sha256", "0" * 64))
    with pytest.raises(DamagedFile, match="expected 5 bytes, found 1,024,000 announced"):
        get(server, tmp_path / "a.tar", size=5)
    server.lengths = False
    with pytest.raises(DamagedFile, match="expected 5 bytes, found 1,024,000"):
        get(server, tmp_path / "a.tar", size=5)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_a_wrong_file_under_the_name_is_reported_not_replaced(server, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"mine")
    with pytest.raises(DamagedFile, match="there already; remove it.*expected 1,024,000 bytes, found 4"):
        get(server, tmp_path / "a.tar", size=len(BODY))
    assert (tmp_path / "a.tar").read_bytes() == b"mine" and not server.asked


def test_a_part_that_is_complete_needs_no_more(server, tmp_path):
    (tmp_path / "a.tar.part").write_bytes(BODY)
    (tmp_path / "a.tar.part.tag").write_text('"v1"')
    assert get(server, tmp_path / "a.tar", size=len(BODY), digest=SHA).read_bytes() == BODY
    (tmp_path / "b.tar.part").write_bytes(BODY + b"too long")
    (tmp_path / "b.tar.part.tag").write_text('"v1"')
    assert get(server, tmp_path / "b.tar", size=len(BODY), digest=SHA).read_bytes() == BODY


def test_a_full_disk_is_said_before(server, tmp_path, monkeypatch):
    monkeypatch.setattr(public_data.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="expected 1,024,000 bytes free for the download, found 1,000"):
        get(server, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def test_only_one_process_fetches_a_file(server, tmp_path):
    inside = threading.Event()
    go_on = threading.Event()
    server.before = lambda: (inside.set(), go_on.wait(10))
    first = threading.Thread(target=get, args=(server, tmp_path / "a.tar"))
    first.start()
    assert inside.wait(10)
    with pytest.raises(BlockingIOError, match="another process at work"):
        get(server, tmp_path / "a.tar")
    go_on.set()
    first.join()
    assert (tmp_path / "a.tar").read_bytes() == BODY


def test_killed_downloads_continue(server, tmp_path):
    "SIGKILL in the middle: no file of that name, and the next call fetches only the rest."
    server.pace = 0.02
    code = f"from fmri_book.public_data import download; download({server.url + '/file.tar'!r}, {str(tmp_path / 'a.tar')!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part = tmp_path / "a.tar.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.005)
    process.kill()
    process.wait()
    had = part.stat().st_size
    assert 0 < had < len(BODY) and not (tmp_path / "a.tar").exists()
    server.pace = 0
    assert get(server, tmp_path / "a.tar", digest=SHA).read_bytes() == BODY
    assert server.asked[-1][1]["Range"] == f"bytes={had}-"
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_token_is_not_shown_to_another_server(server, tmp_path):
    other = Server()
    server.redirect["/file.tar"] = f"{other.url}/file.tar"
    get(server, tmp_path / "a.tar", headers={"Authorization": "Bearer secret"})
    assert server.asked[0][1]["Authorization"] == "Bearer secret"
    assert "Authorization" not in other.asked[0][1]
    other.shutdown()
    other.server_close()


# ---------------------------------------------------------------- online or not


def test_offline_is_said_at_once():
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        started = time.perf_counter()
        with pytest.raises(
            Offline,
            match=r"no network: expected an answer from 127\.0\.0\.1:\d+.*Offline you can use.*Cohort",
        ):
            public_data.check_online(f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert time.perf_counter() - started < 2


def test_a_name_that_is_not_found_is_offline():
    with pytest.raises(Offline, match="no-such-host.invalid:443"):
        public_data.check_online("https://no-such-host.invalid")


def test_a_proxy_is_what_must_answer(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    public_data.check_online("http://no-such-host.invalid")


@pytest.mark.parametrize("name", ["FMRI_BOOK_OFFLINE", "HF_HUB_OFFLINE"])
def test_switched_off_means_not_even_tried(server, monkeypatch, name, tmp_path, shelf):
    monkeypatch.setenv(name, "1")
    with pytest.raises(Offline, match=f"switched off: {name}=1"):
        fetch(shelf, tmp_path / "x", accept_licence=True)
    assert not server.asked and not (tmp_path / "x").exists()
    monkeypatch.setenv(name, "0")
    assert fetch(shelf, tmp_path / "x", accept_licence=True, progress=False)


# ---------------------------------------------------------------- collections


PAPERS = {".gitattributes": b"x", "README.md": b"me\n", "licences/ds1/LICENSE.txt": b"CC0"}


def hub_answers(server):
    listing = [{"type": "directory", "path": "data"}]
    for path, body in server.shards.items():
        listing.append(
            {
                "type": "file",
                "path": path,
                "size": len(body),
                "lfs": {"oid": hashlib.sha256(body).hexdigest()},
            }
        )
    listing += [{"type": "file", "path": path, "size": len(body)} for path, body in PAPERS.items()]

    def page(query):
        first = "cursor" not in query
        rest = (
            {"Link": f'<{server.url}/api/datasets/me/shelf/tree/main?recursive=true&cursor=2>; rel="next"'}
            if first
            else {}
        )
        return json.dumps(listing[:2] if first else listing[2:]).encode(), rest

    answers = {"/api/datasets/me/shelf/tree/main": page}
    for path, body in (server.shards | PAPERS).items():
        answers[f"/datasets/me/shelf/resolve/main/{path}"] = lambda q, body=body: (body, {})
    return answers


@pytest.fixture
def shelf(server, monkeypatch):
    "A collection on a Hub of our own: three shards and a README."
    server.shards = {f"data/shard_{i:04d}.tar": BODY[: 1000 * (i + 1)] for i in (2, 0, 1)}
    monkeypatch.setattr(Server, "answers", hub_answers)
    return replace(
        DATASETS["nsd-flat"],
        name="shelf",
        endpoint=server.url,
        place="me/shelf",
        homepage=f"{server.url}/datasets/me/shelf",
    )


def test_terms_come_first_and_nothing_else_without_them(server, shelf, tmp_path, capsys):
    with pytest.raises(LicenceNotAccepted, match="accept_licence=True after you have read the terms"):
        fetch(shelf, tmp_path / "x")
    shown = capsys.readouterr().out
    assert shelf.licence in shown and shelf.licence_url in shown and "not checked by us: the licence" in shown
    assert not server.asked and not (tmp_path / "x").exists()


def test_shards_from_a_hub(server, shelf, tmp_path):
    paths = fetch(shelf, tmp_path / "x", accept_licence=True, n=2, progress=False)
    assert [p.relative_to(tmp_path / "x").as_posix() for p in paths] == [
        "data/shard_0000.tar",
        "data/shard_0001.tar",
    ]
    assert all(p.read_bytes() == server.shards[p.relative_to(tmp_path / "x").as_posix()] for p in paths)
    everything = fetch(shelf, tmp_path / "x", accept_licence=True, n=None, progress=False)
    assert len(everything) == 3 and sum("resolve" in path for path, _ in server.asked) == 5
    assert (tmp_path / "x" / "licences" / "ds1" / "LICENSE.txt").read_bytes() == b"CC0"
    assert not (tmp_path / "x" / ".gitattributes").exists()
    source = json.loads((tmp_path / "x" / "SOURCE.json").read_text())
    assert (source["collection"], source["licence"]) == ("shelf", shelf.licence)
    assert [f["path"] for f in source["files"]] == [
        "data/shard_0000.tar",
        "data/shard_0001.tar",
        "README.md",
        "licences/ds1/LICENSE.txt",
        "data/shard_0002.tar",
    ]
    with pytest.raises(ValueError, match="expected the folder of 'other', found 'shelf'"):
        fetch(replace(shelf, name="other"), tmp_path / "x", accept_licence=True, progress=False)


def test_a_damaged_shard_is_named_and_not_kept(server, shelf, tmp_path, monkeypatch):
    answers = hub_answers(server)
    name = "/datasets/me/shelf/resolve/main/data/shard_0000.tar"
    flipped = bytearray(server.shards["data/shard_0000.tar"])
    flipped[500] ^= 1
    monkeypatch.setattr(Server, "answers", lambda self: {**answers, name: lambda q: (bytes(flipped), {})})
    with pytest.raises(DamagedFile, match=r"shard_0000\.tar: expected sha256"):
        fetch(shelf, tmp_path / "x", accept_licence=True, progress=False)
    assert not list((tmp_path / "x").rglob("*.tar*"))


@pytest.mark.parametrize("position", [0, 2])
def test_a_gated_collection_tells_how_to_get_in(server, shelf, tmp_path, position):
    server.status = [200] * position + [403]
    with pytest.raises(
        PermissionError,
        match=r"shelf is kept behind a form: .*403.* 1\. make an account.*accept the terms.*hf auth login.*fetch again",
    ):
        fetch(shelf, tmp_path / "x", accept_licence=True, progress=False)


def test_too_little_space_for_all_files(server, shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(public_data.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5999}))
    with pytest.raises(OSError, match="expected 6,006 bytes free"):
        fetch(shelf, tmp_path / "x", accept_licence=True, n=None, progress=False)
    assert not any("resolve" in path for path, _ in server.asked)


def test_no_data_files_is_an_error(server, shelf, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected files like \*\.parquet, found none"):
        fetch(replace(shelf, pattern="*.parquet"), tmp_path / "x", accept_licence=True, progress=False)


def test_a_bucket(server, tmp_path, monkeypatch):
    "Two pages of S3's XML; the tag of a file that went up in pieces is no MD5."
    keys = {
        "ds1/sub-1/func/a.dtseries.nii": BODY[:10],
        "ds1/sub-1/func/a.json": b"{}",
        "ds1/sub 2/b.dtseries.nii": BODY[:20],
    }

    def listing(query):
        second = "continuation-token" in query
        chosen = list(keys)[2:] if second else list(keys)[:2]
        entries = "".join(
            f"<Contents><Key>{k}</Key><ETag>&quot;{hashlib.md5(keys[k]).hexdigest()}{'-2' if 'b.' in k else ''}&quot;</ETag><Size>{len(keys[k])}</Size></Contents>"
            for k in chosen
        )
        more = "" if second else "<NextContinuationToken>t/1=</NextContinuationToken>"
        assert query["prefix"] == ["ds1/"] and (not second or query["continuation-token"] == ["t/1="])
        return (
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{entries}{more}</ListBucketResult>'.encode(),
            {},
        )

    answers = {"/bucket": listing} | {
        f"/bucket/{k.replace(' ', '%20')}": lambda q, k=k: (keys[k], {}) for k in keys
    }
    monkeypatch.setattr(Server, "answers", lambda self: answers)
    bucket = replace(DATASETS["ds006072"], name="bucket", endpoint=server.url, place="bucket/ds1")
    files = public_data.remote_files(bucket, None)
    assert [f.path for f in files] == ["sub 2/b.dtseries.nii", "sub-1/func/a.dtseries.nii"]
    assert files[0].digest is None and files[1].digest == ("md5", hashlib.md5(BODY[:10]).hexdigest())
    paths = fetch(bucket, tmp_path, accept_licence=True, n=None, progress=False)
    assert [p.read_bytes() for p in paths] == [BODY[:20], BODY[:10]]


@pytest.mark.parametrize("path", ["../evil.tar", "/etc/evil.tar", "a/../../evil.tar", "a\\..\\evil.tar"])
def test_a_server_cannot_write_outside_the_folder(server, shelf, tmp_path, monkeypatch, path):
    monkeypatch.setattr(
        public_data, "_hub_files", lambda *_: [RemoteFile(f"{server.url}/file.tar", path, len(BODY))]
    )
    with pytest.raises(ValueError, match="expected a file name inside the folder"):
        fetch(shelf, tmp_path / "x", accept_licence=True, progress=False)
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("n", [0, -1, 1.5, "all"])
def test_wrong_numbers_of_files(shelf, tmp_path, n):
    with pytest.raises(ValueError, match="n: expected a whole number from 1, or None"):
        fetch(shelf, tmp_path, accept_licence=True, n=n)


def test_nilearn_is_asked_for_people(monkeypatch, tmp_path, server):
    asked = {}

    def fetch_development_fmri(**options):
        asked.update(options)
        return type("Bunch", (), {"func": ["a.nii.gz"], "confounds": ["a.tsv"]})

    import nilearn.datasets

    monkeypatch.setattr(nilearn.datasets, "fetch_development_fmri", fetch_development_fmri)
    paths = fetch(replace(DATASETS["ds000228"], endpoint=server.url), tmp_path, accept_licence=True, n=3)
    assert asked == {"n_subjects": 3, "data_dir": str(tmp_path)} and [p.name for p in paths] == [
        "a.nii.gz",
        "a.tsv",
    ]
    assert (tmp_path / "SOURCE.json").exists()


def test_every_collection_says_what_one_must_know():
    for known in DATASETS.values():
        assert all(
            getattr(known, f) for f in ("what", "participants", "size", "licence", "arrives_as", "homepage")
        )
        assert known.licence_url.startswith("https://") and known.endpoint.startswith("https://")
        assert known.access in ("open", "registration") and known.route in ("nilearn", "hub", "s3")
        assert known.route == "nilearn" or "/" in known.place
        assert "registration" not in known.access or known.homepage in known.terms()
    assert set(DATASETS) == {"ds000228", "hcp-flat", "nsd-flat", "fbert-corpus", "ds006072"}
    assert list(public_data.datasets_table().index) == list(DATASETS)


def test_unknown_collection():
    with pytest.raises(ValueError, match="unknown collection 'hcp': expected one of ds000228, hcp-flat"):
        fetch("hcp", "x", accept_licence=True)


def test_import_is_light():
    code = "import sys, fmri_book.public_data; print([m for m in ('torch', 'pandas', 'nilearn', 'huggingface_hub', 'fsspec') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" not in found and "nilearn" not in found and "huggingface_hub" not in found


def test_own_collections_are_possible():
    mine = PublicDataset(
        "mine", "w", "1", "1", "CC0", "https://l", "https://h", "open", "tar", "s3", "https://e", "b/p"
    )
    assert public_data.dataset(mine) is mine and os.sep
