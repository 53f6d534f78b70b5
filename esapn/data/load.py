"""Ratings by name: generated, a MovieLens set, a file or a folder."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import did_you_mean
from .cache import cache_folder, load_file, report_skipped
from .files import KINDS, MALFORMED, of_five_classes
from .movielens import MOVIELENS, load_movielens
from .ratings import DataError, Ratings, fail
from .synthetic import synthetic_ratings

__all__ = ["load_ratings"]

# The files of a folder, in the order in which they are tried.
_KNOWN_FILES = ("u.data", "ratings.dat", "ratings.csv", "ratings.parquet")
_NAMES = ("synthetic", *MOVIELENS)


def load_ratings(
    data: str | os.PathLike[str],
    *,
    events: int = 200_000,
    seed: int = 0,
    archive: str | os.PathLike[str] | None = None,
    url: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    malformed: str = "refuse",
    five_classes: bool = False,
) -> Ratings:
    """Read ratings from a file, a directory or a MovieLens set, or generate them.

    What was read is kept in the cache as memory-mapped columns; the same bytes are parsed once.

    Args:
        data: `"synthetic"`; or a set's name, a key of `esapn.data.movielens.MOVIELENS` (`ml-100k`,
            `ml-1m`, `ml-10m`, `ml-20m`, `ml-25m`, `ml-32m`, `ml-latest`, `ml-latest-small`),
            which is downloaded unless the cache has it; or a directory holding `u.data`,
            `ratings.dat`, `ratings.csv` or `ratings.parquet` (the first of these that is there
            is read); or a file. A directory with a set's name is `./NAME`. `.data` (tab
            separated) and `.dat` (`::` separated) have no header and the fields user, item,
            rating, timestamp; `.csv` and `.parquet` have columns user (or userId), item (or
            itemId, movieId), rating and optionally timestamp, in any case and order.
        events, seed: for `"synthetic"` only.
        archive: for a set only, its zip on this machine, read instead of a download.
        url: for a set only, another http(s) address of its zip.
        cache: the cache folder; `$ESAPN_CACHE` or the platform's by default (`~/.cache/esapn`).
        malformed: `"refuse"` a file with rows that lack a field, have too many, or a rating or
            timestamp that is none; or `"skip"` such rows, with their number on stderr.
        five_classes: rows with a rating outside 0.5..5 are malformed, as five classes cannot
            hold it; by default any finite rating is taken.

    Returns:
        The ratings in file order, duplicates and rows out of time order included. Raw IDs may be
        integers or strings; codes follow their sorted order, numeric where every ID is a 64-bit
        integer written plainly (`7`, not `007`). Blanks around a text value do not count,
        and lines of nothing but blanks are no rows.

    Raises:
        DataError: for anything that cannot be taken as it stands. No row is dropped but for
            `malformed="skip"`. Rows in messages count from 1 and leave the header out.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "ratings.csv")
        ...     _ = path.write_text("user,item,rating\\n7,1,4\\n7,1,4.5\\n9,2,\\n")
        ...     ratings = load_ratings(path, cache=folder, malformed="skip")
        >>> ratings.user.tolist(), ratings.counts["duplicates"], ratings.counts["skipped"]
        ([0, 0], 1, 1)
    """
    if malformed not in MALFORMED:
        raise DataError(f"malformed must be refuse or skip, got {malformed!r}")
    is_set = isinstance(data, str) and data in MOVIELENS
    if not is_set and (archive is not None or url is not None):
        given = "--archive" if archive is not None else "--url"
        meant = did_you_mean(os.fspath(data), MOVIELENS)
        raise DataError(f"{given} is for one of {', '.join(MOVIELENS)}, not for {data}{meant}")
    if os.fspath(data) == "synthetic":
        return synthetic_ratings(events, seed=seed)
    folder = cache_folder(cache)
    if is_set:
        name, zipped = str(data), None if archive is None else Path(archive)
        columns, checksum = load_movielens(
            name, archive=zipped, url=url, malformed=malformed, folder=folder
        )
    else:
        path, kind = _find_file(data)
        name = path.name
        columns, checksum = load_file(path, kind, name=name, malformed=malformed, folder=folder)
    if five_classes:
        columns = of_five_classes(columns, name=name, malformed=malformed)
    report_skipped(name, columns.counts)
    return Ratings(**vars(columns), name=name, checksum=checksum)


def _find_file(data: str | os.PathLike[str]) -> tuple[Path, str]:
    try:
        path = next((p for name in _KNOWN_FILES if (p := Path(data, name)).is_file()), Path(data))
    except OSError as error:  # a name that is too long, a folder that may not be read
        fail(f"{os.fspath(data):.100}", error.strerror or str(error))
    if path.is_dir():
        fail(str(path), f"directory holds none of {', '.join(_KNOWN_FILES)}")
    if not path.is_file():
        fail(str(path), "no such file or directory" + did_you_mean(str(path), _NAMES))
    kind = path.suffix.lower()
    if kind not in KINDS:
        fail(path.name, f"unknown kind of file '{kind}' (known: {', '.join(KINDS)})")
    if path.stat().st_size == 0:
        fail(path.name, "file is empty")
    return path, kind
