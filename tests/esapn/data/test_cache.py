"""The cache: parsed once, checked when opened, rebuilt when damaged, whole or not there."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import esapn.data.cache
from esapn.data.load import load_ratings
from esapn.data.ratings import Ratings
from esapn.data.stream import build_stream
from tests.helpers import refusal

pl = pytest.importorskip("polars")

COLUMNS = {
    "user": [10, 3, 10, 20],
    "item": [5, 100, 100, 4],
    "rating": [4.0, 0.5, 3.5, 5.0],
    "timestamp": [40, 30, 20, 10],
}
CODES = [[1, 0, 1, 2], [1, 2, 2, 0], COLUMNS["rating"], COLUMNS["timestamp"]]


pytestmark = pytest.mark.usefixtures("own_cache")


def write_layout(folder: Path, name: str) -> Path:
    path = folder / name
    frame = pl.DataFrame(COLUMNS)
    if name.endswith(".parquet"):
        frame.write_parquet(path)
    elif name.endswith(".csv"):
        frame.write_csv(path)
    else:
        separator = "\t" if name.endswith(".data") else "::"
        path.write_text("".join(separator.join(map(str, row)) + "\n" for row in frame.rows()))
    return path


def arrays_of(ratings: Ratings) -> list[list]:
    arrays = (ratings.user, ratings.item, ratings.rating, ratings.timestamp)
    return [array.tolist() for array in arrays]


def rest_of(ratings: Ratings) -> tuple:
    return ratings.n_users, ratings.n_items, ratings.name, ratings.checksum, ratings.counts


def check(ratings: Ratings, first: Ratings) -> None:
    """`ratings` are those of COLUMNS; the rest is as it was for `first`."""
    assert arrays_of(ratings) == CODES and rest_of(ratings) == rest_of(first)
    assert rest_of(ratings)[:2] == (3, 3)


def settle(path: Path) -> None:
    """Make a file one that was not changed just now."""
    then = time.time() - 60
    os.utime(path, (then, then))


def unreadable(*args, **options):
    raise AssertionError("parsed again")


@pytest.mark.parametrize("name", ["u.data", "ratings.dat", "ratings.csv", "ratings.parquet"])
def test_a_file_is_parsed_once(tmp_path, monkeypatch, name):
    path = write_layout(tmp_path, name)
    first = load_ratings(path)
    monkeypatch.setattr(esapn.data.cache, "read_columns", unreadable)
    again = load_ratings(path)
    check(again, first)
    for array in (again.user, again.item, again.rating, again.timestamp):
        assert isinstance(array, np.memmap) and not array.flags.writeable
    stream = build_stream(again, batch_size=2)
    assert sorted(stream.user.tolist()) == [0, 1, 1, 2]
    # The same bytes elsewhere are the same ratings.
    other = tmp_path / "other" / name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    check(load_ratings(other), first)


def test_the_cache_needs_no_polars(tmp_path, monkeypatch):
    path = write_layout(tmp_path, "ratings.csv")
    load_ratings(path)
    monkeypatch.setitem(sys.modules, "polars", None)
    assert arrays_of(load_ratings(path)) == CODES


def test_equal_bytes_of_another_kind_are_another_file(tmp_path):
    text = "user,item,rating,timestamp\n1,1,4,5\n"
    for name in ("a.csv", "a.data"):
        (tmp_path / name).write_text(text)
    assert load_ratings(tmp_path / "a.csv").rating.tolist() == [4]
    assert "row 1: 1 fields" in refusal(load_ratings, tmp_path / "a.data")


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "ratings.csv"
    for rating in ("4", "3", "5"):  # of one length, within one tick of the clock
        path.write_text(f"user,item,rating\n1,1,{rating}\n")
        assert load_ratings(path).rating.tolist() == [float(rating)]


def test_a_settled_file_is_not_hashed_again(tmp_path, monkeypatch):
    path = write_layout(tmp_path, "ratings.csv")
    settle(path)
    first = load_ratings(path)
    hashed = []
    real = esapn.data.cache.digest
    monkeypatch.setattr(esapn.data.cache, "digest", lambda p, a: hashed.append(p) or real(p, a))
    check(load_ratings(path), first)
    assert hashed and path not in hashed
    path.write_text("user,item,rating\n1,1,2\n")
    settle(path)
    assert load_ratings(path).rating.tolist() == [2] and path in hashed


def columns_folder(cache: Path) -> Path:
    (folder,) = (cache / "columns").iterdir()
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda f: (f / "user.npy").write_bytes((f / "user.npy").read_bytes()[:-4]),
    "empty": lambda f: (f / "rating.npy").write_bytes(b""),
    "bit": lambda f: flip(f / "item.npy"),
    "gone": lambda f: (f / "timestamp.npy").unlink(),
    "dtype": lambda f: np.save(f / "user.npy", np.zeros(4, np.float64)),
    "length": lambda f: np.save(f / "user.npy", np.zeros(3, np.int32)),
    "pickle": lambda f: np.save(f / "user.npy", np.array([{}], object), allow_pickle=True),
    "manifest cut": lambda f: (f / "manifest.json").write_text('{"format": 3, "sour'),
    "manifest bare": lambda f: (f / "manifest.json").write_text('{"format": 3}'),
    "manifest list": lambda f: (f / "manifest.json").write_text("[]"),
    "manifest gone": lambda f: (f / "manifest.json").unlink(),
    "another": lambda f: edit(f / "manifest.json", source="0" * 64),
    "no column": lambda f: edit(f / "manifest.json", columns={}),
    "no number": lambda f: edit(f / "manifest.json", n_users=None),
}


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_columns_are_rebuilt(tmp_path, own_cache, capsys, damage):
    path = write_layout(tmp_path, "ratings.csv")
    first = load_ratings(path)
    DAMAGE[damage](columns_folder(own_cache))
    check(load_ratings(path), first)
    said = capsys.readouterr().err
    assert said.startswith("ratings.csv: the cached columns are damaged (")
    assert said.endswith("); reading the source again\n") and said.count("\n") == 1
    check(load_ratings(path), first)
    assert capsys.readouterr().err == ""
    columns_folder(own_cache)  # nothing else was left there


def test_columns_of_another_format_are_replaced(tmp_path, own_cache, capsys):
    path = write_layout(tmp_path, "ratings.csv")
    first = load_ratings(path)
    edit(columns_folder(own_cache) / "manifest.json", format=2)
    check(load_ratings(path), first)
    assert capsys.readouterr().err == ""
    manifest = json.loads((columns_folder(own_cache) / "manifest.json").read_text())
    assert manifest["format"] == 3 and manifest["counts"] == first.counts


def test_full_disk(tmp_path, own_cache, monkeypatch):
    path = write_layout(tmp_path, "ratings.csv")
    first = load_ratings(path)
    other = tmp_path / "other.csv"
    other.write_text("user,item,rating\n1,1,4\n")
    written = []

    def full(file, array):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(file.write_bytes(array.tobytes()))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        wanted = f"other.csv: cannot write the cache {own_cache}: No space left on device"
        assert refusal(load_ratings, other) == wanted
    columns_folder(own_cache)  # that of the first file, and nothing half-made
    monkeypatch.setattr(esapn.data.cache, "read_columns", unreadable)
    check(load_ratings(path), first)


def test_a_cache_that_may_not_be_written_is_left_alone(tmp_path, monkeypatch, capsys):
    def denied(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(np, "save", denied)
    assert arrays_of(load_ratings(write_layout(tmp_path, "ratings.csv"))) == CODES
    said = capsys.readouterr().err
    assert said.startswith("ratings.csv: not cached, since ") and said.count("\n") == 1


def test_a_cache_that_is_a_file(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    path = write_layout(tmp_path, "ratings.csv")
    assert f"cannot write the cache {blocked}" in refusal(load_ratings, path, cache=blocked)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(esapn.data.cache, "digest", denied)
    path = write_layout(tmp_path, "ratings.csv")
    assert refusal(load_ratings, path) == "ratings.csv: cannot be read: Permission denied"


def test_a_file_that_changes_while_it_is_read(tmp_path, own_cache, monkeypatch):
    path = write_layout(tmp_path, "ratings.csv")
    real = esapn.data.cache.read_columns

    def slow(*args, **options):
        columns = real(*args, **options)
        path.write_text("user,item,rating\n1,1,4\n")
        return columns

    monkeypatch.setattr(esapn.data.cache, "read_columns", slow)
    assert "changed while it was read" in refusal(load_ratings, path)
    assert not (own_cache / "columns").exists()


def test_two_that_read_one_file_at_once(tmp_path, own_cache, monkeypatch):
    path = write_layout(tmp_path, "ratings.csv")
    real, others = np.save, []

    def meanwhile(*args):
        if not others:
            others.append(None)
            others[0] = load_ratings(path)
        real(*args)

    monkeypatch.setattr(np, "save", meanwhile)
    check(load_ratings(path), others[0])
    assert arrays_of(others[0]) == CODES  # its files are replaced, its maps are not
    columns_folder(own_cache)


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path, own_cache):
    for name, age in ((".new-old", 90_000), (".new-now", 60)):
        left = own_cache / "columns" / name
        left.mkdir(parents=True)
        (left / "user.npy").write_bytes(b"half")
        os.utime(left, (time.time() - age,) * 2)
    load_ratings(write_layout(tmp_path, "ratings.csv"))
    assert {path.name for path in own_cache.glob("columns/.new-*")} == {".new-now"}


def test_where_the_cache_is(tmp_path, monkeypatch):
    path = write_layout(tmp_path, "ratings.csv")
    load_ratings(path, cache=tmp_path / "given")
    assert (tmp_path / "given" / "columns").is_dir()
    monkeypatch.setenv("ESAPN_CACHE", str(tmp_path / "environment"))
    load_ratings(path)
    assert (tmp_path / "environment" / "columns").is_dir()
    monkeypatch.delenv("ESAPN_CACHE")
    for platform, variable, wanted in (
        ("linux", "XDG_CACHE_HOME", "x/esapn"),
        ("win32", "LOCALAPPDATA", "x/esapn"),
        ("linux", None, "home/.cache/esapn"),
        ("darwin", None, "home/Library/Caches/esapn"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", platform)
            patch.setattr(Path, "home", lambda: tmp_path / "home")
            patch.delenv("XDG_CACHE_HOME", raising=False)
            patch.delenv("LOCALAPPDATA", raising=False)
            if variable:
                patch.setenv(variable, str(tmp_path / "x"))
            assert esapn.data.cache.cache_folder() == tmp_path / wanted
