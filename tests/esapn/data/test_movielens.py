"""MovieLens by name, against a server on this machine and archives of made-up ratings."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import ssl
import sys
import threading
import urllib.error
import zipfile
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import esapn.data.cache
import esapn.data.movielens
from esapn.data.load import load_ratings
from esapn.data.movielens import MOVIELENS
from esapn.data.ratings import DataError
from tests.helpers import install_command

pytest.importorskip("polars")
pytest.importorskip("pooch")
pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing is written to the user's own cache, and no proxy is used."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESAPN_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    return folder


def refusal(*args, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_ratings(*args, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Archives

EVENTS = 2_000
USER = np.random.default_rng(0).integers(1, 60, EVENTS)
ITEM = np.random.default_rng(1).integers(1, 90, EVENTS)
RATING = np.random.default_rng(2).integers(1, 6, EVENTS)


def rows_of(name: str) -> bytes:
    """The made-up ratings, laid out as those of the set `name` are."""
    kind = MOVIELENS[name].kind
    separator = {".data": "\t", ".dat": "::", ".csv": ","}[kind]
    header = "userId,movieId,rating,timestamp\n" if kind == ".csv" else ""
    lines = (
        separator.join(map(str, (u, i, r, 900_000_000 + t))) + "\n"
        for t, (u, i, r) in enumerate(zip(USER, ITEM, RATING, strict=True))
    )
    return (header + "".join(lines)).encode()


def zip_of(name: str, rows: bytes | None = None, member: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, so that a byte of it is one of a rating
        archive.writestr("README", "made up")
        archive.writestr(member or MOVIELENS[name].member, rows or rows_of(name))
    return buffer.getvalue()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def known(monkeypatch, name: str, data: bytes) -> bytes:
    """Make `data` the archive that the table expects for `name`."""
    monkeypatch.setitem(MOVIELENS, name, replace(MOVIELENS[name], md5=md5(data)))
    return data


def check(ratings, name: str) -> None:
    assert ratings.name == name and ratings.checksum == hashlib.sha256(rows_of(name)).hexdigest()
    users, items = np.unique(USER), np.unique(ITEM)
    assert (users[ratings.user] == USER).all() and (items[ratings.item] == ITEM).all()
    assert (ratings.rating == RATING).all() and ratings.n_users == len(users)
    assert ratings.timestamp.tolist() == list(range(900_000_000, 900_000_000 + EVENTS))


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# A server


@dataclass
class Site:
    """What a server on 127.0.0.1 holds, how it misbehaves and what requests came."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # bytes after which an answer breaks off
    ranges: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range header

    def url(self, path: str) -> str:
        return f"{self.address}/{path}"


@pytest.fixture
def site(monkeypatch) -> Iterator[Site]:
    site = Site()
    # The site is a thread of this process: it answers, whenever that may be.
    monkeypatch.setattr(esapn.data.movielens, "TIMEOUT_SECONDS", None)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            part = self.headers.get("Range")
            site.requests.append((self.path[1:], part))
            data = site.files.get(self.path[1:])
            if data is None:
                self.send_error(404)
                return
            start = 0
            if part and site.ranges:
                start = int(part.removeprefix("bytes=").removesuffix("-"))
                if start >= len(data):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = start + site.cuts.pop(0) if site.cuts else None
            self.wfile.write(data[start:end])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def unexpected(*args, **options):
    raise AssertionError("should not be needed")


# The table


def test_the_table():
    assert list(MOVIELENS) == [
        *("ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m"),
        *("ml-latest", "ml-latest-small"),
    ]
    for name, dataset in MOVIELENS.items():
        assert dataset.url == f"https://files.grouplens.org/datasets/movielens/{name}.zip"
        assert dataset.md5 is None or len(bytes.fromhex(dataset.md5)) == 16
        assert "redistribute" in dataset.licence and "10.1145/2827872" in dataset.citation
    assert MOVIELENS["ml-10m"].member == "ml-10M100K/ratings.dat"
    assert MOVIELENS["ml-25m"].kind == ".csv" and MOVIELENS["ml-100k"].kind == ".data"
    assert {n for n, d in MOVIELENS.items() if d.md5 is None} == {
        *("ml-10m", "ml-latest", "ml-latest-small"),
    }
    with pytest.raises(FrozenInstanceError):
        MOVIELENS["ml-1m"].md5 = ""


# Downloads


@pytest.mark.parametrize("name", MOVIELENS)
def test_download(site, monkeypatch, own_cache, capsys, name):
    data = known(monkeypatch, name, zip_of(name))
    site.files["a.zip"] = data
    check(load_ratings(name, url=site.url("a.zip")), name)
    assert site.requests == [("a.zip", None)]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"{name}: free for research")
    assert "do not redistribute" in said and "Harper and Joseph A. Konstan" in said
    files = files_in(own_cache)
    assert f"archives/{name}.zip" in files and f"movielens/{name}.json" in files
    assert sum(file.startswith("columns/") for file in files) == 5 and len(files) == 7
    # Once in the cache it is the same set from any address, and is not announced again.
    site.files.clear()
    monkeypatch.setattr(esapn.data.cache, "read_columns", unexpected)
    monkeypatch.setattr(zipfile, "ZipFile", unexpected)
    for options in ({"url": site.url("a.zip")}, {}):
        check(load_ratings(name, **options), name)
    assert len(site.requests) == 1 and capsys.readouterr().err == ""


def test_a_connection_that_is_cut_is_continued(site, monkeypatch, own_cache):
    data = known(monkeypatch, "ml-1m", zip_of("ml-1m"))
    site.files["a.zip"] = data
    site.cuts = [10_000, 5_000]
    check(load_ratings("ml-1m", url=site.url("a.zip")), "ml-1m")
    assert site.requests == [("a.zip", None), ("a.zip", "bytes=10000-"), ("a.zip", "bytes=15000-")]
    assert (own_cache / "archives" / "ml-1m.zip").read_bytes() == data
    assert not any(".part" in file for file in files_in(own_cache))


def test_a_later_call_continues(site, monkeypatch, own_cache):
    data = known(monkeypatch, "ml-1m", zip_of("ml-1m"))
    site.files["a.zip"] = data
    site.cuts = [9_000, 0]
    message = refusal("ml-1m", url=site.url("a.zip"))
    assert message.startswith(f"ml-1m: cannot be fetched from {site.url('a.zip')}: ")
    assert "; 9,000 bytes are kept and the next call continues; a local copy" in message
    (part,) = (own_cache / "archives").iterdir()
    assert part.read_bytes() == data[:9_000]
    site.requests.clear()
    check(load_ratings("ml-1m", url=site.url("a.zip")), "ml-1m")
    assert site.requests == [("a.zip", "bytes=9000-")]


def test_a_server_that_does_not_continue_starts_again(site, monkeypatch):
    site.files["a.zip"] = known(monkeypatch, "ml-1m", zip_of("ml-1m"))
    site.ranges, site.cuts = False, [10_000]
    check(load_ratings("ml-1m", url=site.url("a.zip")), "ml-1m")
    assert site.requests == [("a.zip", None), ("a.zip", "bytes=10000-")]


@pytest.mark.parametrize("size", ["some", "all", "more"])
def test_a_part_of_something_else_is_fetched_again(site, monkeypatch, own_cache, size):
    data = known(monkeypatch, "ml-1m", zip_of("ml-1m"))
    site.files["a.zip"] = data
    length = {"some": 5_000, "all": len(data), "more": len(data) + 7}[size]
    part = own_cache / "archives" / f"ml-1m-{md5(data)[:8]}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * length)
    check(load_ratings("ml-1m", url=site.url("a.zip")), "ml-1m")
    assert site.requests == [("a.zip", f"bytes={length}-"), ("a.zip", None)]


def test_wrong_checksum_of_a_download(site, own_cache):
    data = zip_of("ml-1m")
    site.files["a.zip"] = data
    assert refusal("ml-1m", url=site.url("a.zip")) == (
        f"ml-1m: {site.url('a.zip')} has md5 {md5(data)}, expected "
        "c4d9eecfca2ab87c1945afe126590906; nothing was kept"
    )
    assert files_in(own_cache) == set()


@pytest.mark.parametrize("form", ["MD5 (ml-latest.zip) = {}\n", "{}  ml-latest.zip\n", "{}"])
def test_the_checksum_beside_an_archive(site, own_cache, form):
    data = zip_of("ml-latest")
    site.files |= {"a.zip": data, "a.zip.md5": form.format(md5(data).upper()).encode()}
    check(load_ratings("ml-latest", url=site.url("a.zip")), "ml-latest")
    assert site.requests == [("a.zip.md5", None), ("a.zip", None)]
    # Another address may hold another release.
    newer = zip_of("ml-latest", b"userId,movieId,rating\n1,1,4\n")
    site.files |= {"b.zip": newer, "b.zip.md5": form.format(md5(newer)).encode()}
    assert load_ratings("ml-latest", url=site.url("b.zip")).rating.tolist() == [4]
    assert load_ratings("ml-latest").rating.tolist() == [4]
    assert len(site.requests) == 4


def test_the_checksum_beside_an_archive_is_wrong_or_missing(site, own_cache):
    data = zip_of("ml-10m")
    url = site.url("a.zip")
    site.files["a.zip"] = data
    assert f"ml-10m: no checksum from {url}.md5: HTTP status 404" in refusal("ml-10m", url=url)
    site.files["a.zip.md5"] = b"<html>moved</html>"
    assert refusal("ml-10m", url=url) == f"{url}.md5: holds no md5 checksum"
    site.files["a.zip.md5"] = b"0" * 32
    assert f"has md5 {md5(data)}, expected {'0' * 32}" in refusal("ml-10m", url=url)
    assert files_in(own_cache) == set()


def test_unreachable(site, monkeypatch, own_cache):
    missing = site.url("missing.zip")
    wanted = f"ml-1m: cannot be fetched from {missing}: HTTP status 404 Not Found; a local copy"
    assert refusal("ml-1m", url=missing).startswith(wanted)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/a.zip"
    assert f"from {url}: Connection refused; a local copy" in refusal("ml-1m", url=url)
    assert f"no checksum from {url}.md5: Connection refused" in refusal("ml-latest", url=url)
    assert "url must begin with https://" in refusal("ml-1m", url="file:///a.zip")
    assert files_in(own_cache) == set()


def test_a_lapsed_certificate_is_named_and_not_overlooked(monkeypatch):
    assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED

    def lapsed(request, timeout):
        assert request.full_url == "https://files.grouplens.org/datasets/movielens/ml-25m.zip"
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "certificate has expired"
        raise urllib.error.URLError(error)

    monkeypatch.setattr(esapn.data.movielens.urllib.request, "urlopen", lapsed)
    message = refusal("ml-25m")
    assert "its certificate is not valid (certificate has expired); a local copy" in message


def test_without_pooch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    message = refusal("ml-1m")
    assert message.startswith("ml-1m: a download needs pooch and tqdm; to install: ")
    assert install_command(message) == ["pip", "install", "esapn-kernels[train]"]
    archive = tmp_path / "a.zip"
    archive.write_bytes(known(monkeypatch, "ml-1m", zip_of("ml-1m")))
    check(load_ratings("ml-1m", archive=archive), "ml-1m")


# Local archives


def test_a_local_archive(tmp_path, monkeypatch, own_cache, capsys):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(known(monkeypatch, "ml-20m", zip_of("ml-20m")))
    check(load_ratings("ml-20m", archive=str(archive)), "ml-20m")
    assert capsys.readouterr().err.startswith("ml-20m: free for research")
    assert not (own_cache / "archives").exists()
    archive.unlink()
    check(load_ratings("ml-20m"), "ml-20m")
    assert f"{archive}: no such file" in refusal("ml-20m", archive=archive)
    assert capsys.readouterr().err == ""


def test_wrong_checksum_of_a_local_archive(tmp_path, monkeypatch):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(data := zip_of("ml-1m"))
    wanted = MOVIELENS["ml-1m"].md5
    message = f"{archive}: is not the archive of ml-1m: md5 {md5(data)}, expected {wanted}"
    assert refusal("ml-1m", archive=archive) == message
    # A good one in the cache does not make a wrong one right, nor does a wrong one harm it.
    known(monkeypatch, "ml-1m", data)
    check(load_ratings("ml-1m", archive=archive), "ml-1m")
    archive.write_bytes(data[:-1])
    assert "is not the archive of ml-1m" in refusal("ml-1m", archive=archive)
    check(load_ratings("ml-1m"), "ml-1m")


def test_a_local_archive_without_a_known_checksum(tmp_path, capsys):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(data := zip_of("ml-10m"))
    beside = tmp_path / "mine.zip.md5"
    beside.write_text(f"MD5 (ml-10m.zip) = {'1' * 32}\n")
    message = refusal("ml-10m", archive=archive)
    assert f"md5 {md5(data)}, expected {'1' * 32}" in message
    beside.write_text(f"{md5(data)}  ml-10m.zip\n")
    check(load_ratings("ml-10m", archive=archive), "ml-10m")
    assert "no checksum" not in capsys.readouterr().err
    beside.unlink()
    check(load_ratings("ml-10m", archive=archive), "ml-10m")
    said = f"ml-10m: no checksum to hold {archive} against (mine.zip.md5 is not there)\n"
    assert capsys.readouterr().err == said


def broken_archives() -> dict[str, tuple[bytes, str]]:
    data = zip_of("ml-latest")
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    torn = {}
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as archive:
            archive.writestr("ml-latest/ratings.csv", rows_of("ml-latest"))
        torn[method] = bytearray(packed.getvalue())
        torn[method][500:900] = bytes(400)
    misnamed = bytearray(zip_of("ml-latest", member="ml-latest/\xe9.csv"))
    misnamed[misnamed.rindex("\xe9".encode())] = 0xFF
    encrypted = bytearray(data)
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        at = encrypted.rindex(mark)
        encrypted[at + (6 if mark[2] == 3 else 8)] |= 1
    return {
        "truncated": (data[: len(data) // 2], "is damaged: File is not a zip file"),
        "corrupted": (bytes(flipped), "is damaged: Bad CRC-32 for file 'ml-latest/ratings.csv'"),
        "torn": (bytes(torn[zipfile.ZIP_DEFLATED]), "is damaged: "),
        "torn bzip2": (bytes(torn[zipfile.ZIP_BZIP2]), "is damaged: Invalid data stream"),
        "torn lzma": (bytes(torn[zipfile.ZIP_LZMA]), "is damaged: Corrupt input data"),
        "misnamed": (bytes(misnamed), "is damaged: 'utf-8' codec can't decode"),
        "encrypted": (bytes(encrypted), "is damaged: "),
        "no zip": (b"not a zip", "is damaged: File is not a zip file"),
        "empty": (b"", "is damaged: File is not a zip file"),
        "no member": (zip_of("ml-latest", member="x/y.csv"), "holds no ml-latest/ratings.csv"),
        "bad row": (zip_of("ml-latest", b"user,item,rating\n1,1,x\n"), "row 1: rating 'x' is not"),
    }


@pytest.mark.parametrize("case", broken_archives())
def test_broken_archives_leave_a_good_cache_alone(tmp_path, own_cache, monkeypatch, case):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(zip_of("ml-latest"))
    check(load_ratings("ml-latest", archive=archive), "ml-latest")
    before = files_in(own_cache)
    data, words = broken_archives()[case]
    archive.write_bytes(data)
    message = refusal("ml-latest", archive=archive)
    assert message.startswith("ml-latest: ") and words in message
    assert files_in(own_cache) == before and not list(own_cache.glob(".new-*"))
    monkeypatch.setattr(esapn.data.cache, "read_columns", unexpected)
    check(load_ratings("ml-latest"), "ml-latest")


def test_skipping_rows_of_a_set(tmp_path, capsys):
    archive = tmp_path / "mine.zip"
    rows = b"userId,movieId,rating,timestamp\n1,1,4,5\n1,2,x,5\n"
    archive.write_bytes(zip_of("ml-latest-small", rows))
    for _ in range(2):
        ratings = load_ratings("ml-latest-small", archive=archive, malformed="skip")
        assert ratings.counts["rating is not a finite number"] == ratings.counts["skipped"] == 1
        assert "ml-latest-small: skipped 1 of 2 rows" in capsys.readouterr().err
    assert "row 2: rating 'x'" in refusal("ml-latest-small", archive=archive)


def test_damaged_columns_are_read_from_the_archive_again(site, monkeypatch, own_cache, capsys):
    site.files["a.zip"] = known(monkeypatch, "ml-1m", zip_of("ml-1m"))
    load_ratings("ml-1m", url=site.url("a.zip"))
    (column,) = own_cache.glob("columns/*/user.npy")
    column.write_bytes(b"")
    capsys.readouterr()
    check(load_ratings("ml-1m", url=site.url("a.zip")), "ml-1m")
    assert len(site.requests) == 1 and "damaged" in (said := capsys.readouterr().err)
    assert "free for research" not in said
    # The archive serves, too, where the checksum beside its source cannot be fetched again.
    latest = zip_of("ml-latest")
    site.files |= {"b.zip": latest, "b.zip.md5": md5(latest).encode()}
    load_ratings("ml-latest", url=site.url("b.zip"))
    shutil.rmtree(own_cache / "columns")
    site.files.pop("b.zip.md5")
    check(load_ratings("ml-latest"), "ml-latest")
    check(load_ratings("ml-1m"), "ml-1m")
    del site.requests[1:]
    # And a damaged archive is fetched again.
    shutil.rmtree(own_cache / "columns")
    (own_cache / "archives" / "ml-1m.zip").write_bytes(b"damaged")
    check(load_ratings("ml-1m", url=site.url("a.zip")), "ml-1m")
    assert len(site.requests) == 2


# A full disk


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full to write to")
def test_disk_full_while_downloading(site, monkeypatch, own_cache):
    data = known(monkeypatch, "ml-1m", zip_of("ml-1m"))
    site.files["a.zip"] = data
    part = own_cache / "archives" / f"ml-1m-{md5(data)[:8]}.part"
    part.parent.mkdir()
    part.symlink_to("/dev/full")
    wanted = f"ml-1m: cannot write the cache {part.parent}: No space left on device"
    assert refusal("ml-1m", url=site.url("a.zip")) == wanted
    assert files_in(own_cache) == set() and not part.is_symlink()


@pytest.mark.parametrize(("place", "what"), [(shutil, "copyfileobj"), (np, "save")])
def test_disk_full_while_unpacking_or_storing(tmp_path, monkeypatch, own_cache, place, what):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(known(monkeypatch, "ml-1m", zip_of("ml-1m")))
    with monkeypatch.context() as patch:
        patch.setattr(place, what, full)
        wanted = f"ml-1m: cannot write the cache {own_cache}: No space left on device"
        assert refusal("ml-1m", archive=archive) == wanted
    assert files_in(own_cache) == set() and not list(own_cache.glob("**/.new-*"))
    check(load_ratings("ml-1m", archive=archive), "ml-1m")
