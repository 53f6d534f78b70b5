"""Columns of ratings kept as memory-mapped files, so that a file is parsed once.

    CACHE/columns/SHA256.KIND/     manifest.json, user.npy, item.npy, rating.npy, timestamp.npy
    CACHE/files/KEY.json           checksum of a file, valid while its size and mtime stay
    CACHE/archives/, movielens/    see `esapn.data.movielens`

SHA256 is that of the source, so an edited or replaced file never meets the columns of another.
Whatever is written takes its name when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..jsonfile import load_json, read_json, write_json
from .files import Columns, read_columns
from .ratings import DataError, fail

# Part of the manifest: raised when the meaning of the columns changes, so that old ones go.
_FORMAT = 3
_COLUMNS = {
    "user": ("int32", "int64"),
    "item": ("int32", "int64"),
    "rating": ("float32",),
    "timestamp": ("int64",),
}
# A file changed this shortly ago may change again within one tick of its clock.
_SETTLED_SECONDS = 2.0
_LEFT_SECONDS = 86_400.0
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

Cached = tuple[Columns, str]


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache folder: `cache`, else `$ESAPN_CACHE`, else the platform's.

    The platform's is `$XDG_CACHE_HOME/esapn` or `~/.cache/esapn`, `~/Library/Caches/esapn` on
    macOS and `%LOCALAPPDATA%/esapn` on Windows. Nothing is created.

    Raises:
        DataError: if there is no home folder to put it in.

    Example:
        >>> cache_folder("somewhere").name
        'somewhere'
    """
    chosen = cache if cache is not None else os.environ.get("ESAPN_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "esapn"
        variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
        return Path(os.environ.get(variable) or Path.home() / ".cache") / "esapn"
    except RuntimeError as error:
        raise DataError(f"no cache folder: {error}; set ESAPN_CACHE") from error


def say(line: str) -> None:
    """Print a line that needs no action of the user's."""
    print(line, file=sys.stderr)


def load_file(path: Path, kind: str, *, name: str, malformed: str, folder: Path) -> Cached:
    """Return the columns of a file and its sha256, from the cache `folder` where it has them.

    Args:
        path: the file.
        kind: `".data"`, `".dat"`, `".csv"` or `".parquet"`.
        name: what messages call the file.
        malformed: `"refuse"` or `"skip"`, as in `esapn.data.load.load_ratings`.
        folder: from `cache_folder`; created if need be.

    Raises:
        DataError: for a file that `read_columns` of `files` refuses, one that changes while it
            is read, and a cache that cannot be written. Without permission to write there, a line
            says so and the columns stay in memory.
    """
    try:
        before = path.stat()
        checksum = file_sum(path, "sha256", folder)
    except OSError as error:
        fail(name, f"cannot be read: {error.strerror or error}")
    columns = open_columns(checksum, kind, name=name, malformed=malformed, folder=folder)
    if columns is None:
        columns = read_columns(path, kind, name=name, malformed=malformed)
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            fail(name, "changed while it was read; load it again")
        columns = _keep(columns, checksum, kind, name=name, folder=folder)
    return columns, checksum


def open_columns(
    checksum: str, kind: str, *, name: str, malformed: str, folder: Path
) -> Columns | None:
    """Return memory-mapped columns; None if there are none, or damaged ones (a line says so).

    Every byte is checked against the manifest: 500 MB, those of 25 million ratings, take half a
    second. Columns that lack malformed rows are not those of a reading that refuses such rows.
    """
    place = _place(folder, checksum, kind)
    if not place.exists():
        return None
    try:
        manifest = load_json(place / "manifest.json")
        if manifest["format"] != _FORMAT:
            return None
        columns = _open_checked(place, manifest, checksum)
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"{name}: the cached columns are damaged ({reason:.100}); reading the source again")
        return None
    if malformed == "refuse" and columns.counts["skipped"]:
        return None
    return columns


def _place(folder: Path, checksum: str, kind: str) -> Path:
    return folder / "columns" / f"{checksum}{kind}"


def _open_checked(place: Path, manifest: dict[str, Any], checksum: str) -> Columns:
    counts = {str(key): int(value) for key, value in manifest["counts"].items()}
    if manifest["source"] != checksum or not counts.keys() >= {"rows", "skipped"}:
        raise ValueError("the manifest is that of something else")
    arrays: dict[str, np.ndarray] = {}
    for column, described in manifest["columns"].items():
        path = place / f"{column}.npy"
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        shape_is_right = list(array.shape) == described["shape"] == [counts["rows"]]
        if not shape_is_right or array.dtype.name not in _COLUMNS[column]:
            raise ValueError(f"{path.name} is {array.dtype} {array.shape}")
        if digest(path, "sha256") != described["sha256"]:
            raise ValueError(f"{path.name} is not what was written")
        arrays[column] = array
    return Columns(
        arrays["user"],
        arrays["item"],
        arrays["rating"],
        arrays.get("timestamp"),
        int(manifest["n_users"]),
        int(manifest["n_items"]),
        counts,
    )


def _keep(columns: Columns, checksum: str, kind: str, *, name: str, folder: Path) -> Columns:
    """Write the columns and return them as they are read back."""
    try:
        _write_columns(columns, checksum, _place(folder, checksum, kind))
    except OSError as error:
        if error.errno not in _READ_ONLY:
            fail(name, f"cannot write the cache {folder}: {error.strerror or error}")
        say(f"{name}: not cached, since {folder} may not be written ({error.strerror})")
        return columns
    return open_columns(checksum, kind, name=name, malformed="skip", folder=folder) or columns


def _write_columns(columns: Columns, checksum: str, place: Path) -> None:
    with scratch(place.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        described = {}
        for column in _COLUMNS:
            array = getattr(columns, column)
            if array is not None:
                np.save(new / f"{column}.npy", array)
                sha256 = digest(new / f"{column}.npy", "sha256")
                described[column] = {"shape": list(array.shape), "sha256": sha256}
        manifest = {
            "format": _FORMAT,
            "source": checksum,
            "columns": described,
            "n_users": columns.n_users,
            "n_items": columns.n_items,
            "counts": columns.counts,
        }
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        # What stood there was damaged or lacked rows; a process that maps it keeps its pages.
        with suppress(FileNotFoundError):
            place.rename(temporary / "old")
        try:
            new.rename(place)
        except OSError:
            if not (place / "manifest.json").exists():
                raise
            # Another process has written the same columns meanwhile.


def report_skipped(name: str, counts: dict[str, int]) -> None:
    """Print how many rows were dropped, and why; nothing if none were."""
    if skipped := counts["skipped"]:
        general = ("rows", "duplicates", "unsorted", "skipped")
        each = ", ".join(f"{k}: {n:,}" for k, n in counts.items() if k not in general)
        say(f"{name}: skipped {skipped:,} of {counts['rows'] + skipped:,} rows ({each})")


def file_sum(path: Path, algorithm: str, folder: Path) -> str:
    """Return a file's checksum, computed again only if its size or mtime changed."""
    stat = path.stat()
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    note = folder / "files" / f"{key}.json"
    state = {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    known = read_json(note)
    if {k: known.get(k) for k in state} != state:
        known = state
    if not isinstance(known.get(algorithm), str):
        settled = time.time() - stat.st_mtime > _SETTLED_SECONDS
        known[algorithm] = digest(path, algorithm)
        if settled:
            with suppress(OSError):  # it is computed again next time
                note.parent.mkdir(parents=True, exist_ok=True)
                write_json(note, known)
    return str(known[algorithm])


def digest(path: Path, algorithm: str) -> str:
    """Return the checksum (hex) of a file, read in pieces.

    Raises:
        OSError: if it cannot be read.
    """
    total = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Make `folder` if need be, and in it a folder for what is not complete, gone at the end.

    What a killed process could not remove is removed a day later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".new-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left)
    with TemporaryDirectory(prefix=".new-", dir=folder) as temporary:
        yield Path(temporary)


@contextmanager
def writing(name: str, folder: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into one line about the cache `folder`."""
    try:
        yield
    except OSError as error:
        fail(name, f"cannot write the cache {folder}: {error.strerror or error}")
