"""Ratings in, stream out: read or generate events, order them, count their IDs, batch them.

What the search needs to know of an event depends on the order alone, so it is counted once:

    freq[t] = #{s <= t : id[s] == id[t]}                                running, 1-based
    left[t] = #{s >  t : id[s] == id[t], s in the batch of t}           still to come
    last[t] = left[t] == 0                                              the ID decides here
    keep[t] = left[t] < history                                         ring slot written here

The kept events of an ID in one batch number at most `history` and follow each other, so their
ring slots `(freq - 1) % history` are all different: a scatter has no write conflicts.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import polars as pl

RATING_MIN, RATING_MAX = 0.5, 5.0
NUM_CLASSES = 5
MAX_RANK = 32

# Looked for in this order when `data` is a directory.
_KNOWN_FILES = ("u.data", "ratings.dat", "ratings.csv", "ratings.parquet")
_SEPARATORS = {".data": "\t", ".dat": "::"}
_ALIASES = {
    "user": ("user", "userid", "user_id"),
    "item": ("item", "itemid", "item_id", "movieid", "movie_id"),
    "rating": ("rating",),
    "timestamp": ("timestamp",),
}
_FIELDS = tuple(_ALIASES)
# Fixed: the random draws come chunk by chunk, so this size is part of what a seed means.
_CHUNK = 1 << 18


class DataError(ValueError):
    """A mistake in the data or in how it was asked for; the message is one line."""


@dataclass(frozen=True)
class Ratings:
    """One event a row, in file order."""

    user: np.ndarray  # int64 [E], codes 0..n_users-1 in sorted order of the raw IDs
    item: np.ndarray  # int64 [E], codes 0..n_items-1, likewise
    rating: np.ndarray  # float32 [E], within 0.5..5
    timestamp: np.ndarray | None  # int64 [E]
    n_users: int
    n_items: int
    name: str  # "synthetic" or the file name
    checksum: str  # sha256 (hex) of the file; of the generated arrays for synthetic data


class Batch(NamedTuple):
    """Views of one batch of a `Stream`; fields, dtypes and meaning as there, shape [B]."""

    user: Tensor
    item: Tensor
    target: Tensor
    user_freq: Tensor
    item_freq: Tensor
    user_last: Tensor
    item_last: Tensor
    user_keep: Tensor
    item_keep: Tensor


@dataclass(frozen=True)
class Stream:
    """Ordered events with their counters, resident on one device; formulas at the file's top."""

    user: Tensor  # int64 [E], codes
    item: Tensor  # int64 [E]
    target: Tensor  # float32 [E] of 0 and 1 (binary), int64 [E] of 0..4 (multiclass)
    user_freq: Tensor  # int32 [E], 1-based, runs on through the test part
    item_freq: Tensor  # int32 [E]
    user_last: Tensor  # bool [E], last event of its ID inside its batch
    item_last: Tensor  # bool [E]
    user_keep: Tensor  # bool [E], among the last `history` events of its ID inside its batch
    item_keep: Tensor  # bool [E]
    bounds: list[tuple[int, int]]  # (start, end) of every batch, covering all events
    n_train: int  # events before this index train; always the start of a batch
    n_users: int
    n_items: int

    def batch(self, index: int) -> Batch:
        """Return batch `index` as views of the stream's tensors (nothing is copied)."""
        part = slice(*self.bounds[index])
        return Batch(*(getattr(self, field)[part] for field in Batch._fields))


def load_ratings(data: str | os.PathLike[str], *, events: int = 200_000, seed: int = 0) -> Ratings:
    """Read ratings from a file or directory, or generate them.

    Args:
        data: `"synthetic"`; or a directory holding `u.data`, `ratings.dat`, `ratings.csv` or
            `ratings.parquet` (the first of these that is there is read); or a file. `.data`
            (tab separated) and `.dat` (`::` separated) have no header and the fields user, item,
            rating, timestamp; `.csv` and `.parquet` have columns user (or userId), item (or
            itemId, movieId), rating and optionally timestamp, in any case and order.
        events, seed: for `"synthetic"` only.

    Returns:
        The ratings in file order. Raw IDs may be integers or strings; codes follow their sorted
        order, numeric where every ID is an integer written plainly (`7`, not `007`). Blanks
        around a text value do not count.

    Raises:
        DataError: for anything that cannot be taken as it stands; no row is ever dropped. Rows
            in messages count from 1 and leave the header out.
    """
    if os.fspath(data) == "synthetic":
        return synthetic_ratings(events, seed=seed)
    path = next((p for name in _KNOWN_FILES if (p := Path(data, name)).is_file()), Path(data))
    if path.is_dir():
        _fail(str(path), f"directory holds none of {', '.join(_KNOWN_FILES)}")
    if not path.is_file():
        _fail(str(path), "no such file or directory")
    kind = path.suffix.lower()
    if kind not in (*_SEPARATORS, ".csv", ".parquet"):
        _fail(path.name, f"unknown kind of file '{kind}' (known: .data, .dat, .csv, .parquet)")

    if path.stat().st_size == 0:
        _fail(path.name, "file is empty")
    frame = _read_frame(path, kind)
    if frame.height == 0:
        _fail(path.name, "holds no ratings")
    user, n_users = _codes(frame["user"])
    item, n_items = _codes(frame["item"])
    rating = _rating(path.name, frame["rating"])
    timestamp = _timestamp(path.name, frame["timestamp"]) if "timestamp" in frame.columns else None
    checksum = hashlib.sha256(np.memmap(path, np.uint8, "r").data).hexdigest()
    return Ratings(user, item, rating, timestamp, n_users, n_items, path.name, checksum)


def _fail(name: str, what: str) -> NoReturn:
    # Parser messages and odd file names may hold line breaks; the promise is one line.
    raise DataError(" ".join(f"{name}: {what}".split()))


def _check_least(**bounds: tuple[int, int]) -> None:
    for name, (value, least) in bounds.items():
        if value < least:
            raise DataError(f"{name} must be at least {least}, got {value}")


def _read_frame(path: Path, kind: str) -> pl.DataFrame:
    """Read the columns named in `_FIELDS`, none missing anywhere; text in a file stays text."""
    try:
        import polars as pl
    except ImportError:
        _fail(path.name, "reading files needs polars: pip install 'esapn-kernels[train]'")
    try:
        if kind == ".parquet":
            wanted = _pick_columns(path.name, pl.read_parquet_schema(path))
            frame = pl.read_parquet(path, columns=list(wanted.values()))
        elif kind == ".csv":
            frame = pl.read_csv(path, infer_schema=False)
        else:
            frame = _read_lines(path, _SEPARATORS[kind])
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as err:
        if kind == ".csv":
            _refuse_long_rows(path)
        _fail(path.name, f"cannot be read: {str(err).strip().splitlines()[0]}")
    columns = _pick_columns(path.name, frame.columns)
    frame = frame.select(pl.col(raw).alias(field) for field, raw in columns.items())
    frame = frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
    frame = frame.with_columns(pl.col(pl.String).str.strip_chars().replace("", None))
    for column in frame.iter_columns():
        is_id, dtype = column.name in ("user", "item"), column.dtype
        if dtype != pl.String and not (dtype.is_integer() if is_id else dtype.is_numeric()):
            expected = "integers or strings" if is_id else "numbers"
            _fail(path.name, f"column '{column.name}' is {dtype}, expected {expected}")
        _refuse(path.name, column, column.is_null(), "is missing")
    return frame


def _read_lines(path: Path, separator: str) -> pl.DataFrame:
    """Split header-less lines; a column separator that no text holds leaves each line whole."""
    import polars as pl

    options: dict[str, Any] = {"has_header": False, "infer_schema": False, "quote_char": None}
    lines = pl.read_csv(path, separator="\x1f", new_columns=["line"], **options)["line"]
    lines = lines.fill_null("")
    count = lines.str.count_matches(separator, literal=True) + 1
    if (bad := (count != len(_FIELDS)).arg_true()).len():
        found = f"{count[bad[0]]} fields separated by {separator!r}"
        _fail(path.name, f"row {bad[0] + 1}: {found}, expected 4 ({', '.join(_FIELDS)})")
    fields = lines.str.split_exact(separator, len(_FIELDS) - 1).struct.unnest()
    return fields.rename(dict(zip(fields.columns, _FIELDS, strict=True)))


def _refuse_long_rows(path: Path) -> None:
    """Name the first CSV row with too many fields: the parser gives no row number."""
    with suppress(UnicodeDecodeError, csv.Error), path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        width = len(next(rows, []))
        for number, row in enumerate(rows, start=1):
            if len(row) > width:
                _fail(path.name, f"row {number}: {len(row)} fields, the header has {width}")


def _pick_columns(name: str, columns: Iterable[str]) -> dict[str, str]:
    raw = list(columns)
    picked = {}
    for field, aliases in _ALIASES.items():
        matches = [column for column in raw if column.strip().lower() in aliases]
        if len(matches) > 1:
            _fail(name, f"more than one column for '{field}' ({', '.join(matches)})")
        if matches:
            picked[field] = matches[0]
        elif field != "timestamp":
            _fail(name, f"column '{field}' not found (columns: {', '.join(raw)})")
    return picked


def _refuse(name: str, column: pl.Series, bad: pl.Series, what: str) -> None:
    """Raise for the first row flagged in `bad`; `{}` in `what` becomes the value found there."""
    rows = bad.fill_null(True).arg_true()
    if rows.len():
        value = what.replace("{}", repr(column[rows[0]])[:60])
        _fail(name, f"row {rows[0] + 1}: {column.name} {value}")


def _codes(column: pl.Series) -> tuple[np.ndarray, int]:
    if not column.dtype.is_integer():
        unique = column.unique()
        # "007" and "7" are two IDs: the column counts as integers only if nothing would merge.
        if (unique.cast(int, strict=False).cast(str) == unique).fill_null(False).all():
            column = column.cast(int)
    codes: np.ndarray = column.rank("dense").to_numpy().astype(np.int64) - 1
    return codes, int(codes.max()) + 1


def _rating(name: str, column: pl.Series) -> np.ndarray:
    number = _finite(name, column)
    outside = (number < RATING_MIN) | (number > RATING_MAX)
    _refuse(name, column, outside, f"{{}} is outside {RATING_MIN:g}..{RATING_MAX:g}")
    return number.to_numpy().astype(np.float32)


def _timestamp(name: str, column: pl.Series) -> np.ndarray:
    number = _finite(name, column)
    # Whole numbers beyond 2**53 lose digits as floats, so integers are taken as they stand.
    whole = column.cast(int, strict=False).fill_null(number.cast(int, strict=False))
    _refuse(name, column, whole.cast(float) != number, "{} is not a whole number")
    return whole.to_numpy().astype(np.int64)


def _finite(name: str, column: pl.Series) -> pl.Series:
    number = column.cast(float, strict=False)
    _refuse(name, column, ~number.is_finite(), "{} is not a finite number")
    return number


def synthetic_ratings(
    events: int = 200_000, *, n_users: int | None = None, n_items: int | None = None, seed: int = 0
) -> Ratings:
    r"""Generate ratings in which an ID needs the more dimensions the more popular it is.

    Every event draws a user u and an item i independently, so a pair may come back:

        P(u) ~ rank(u)^-0.8,  P(i) ~ rank(i)^-1.05           (ranks are a random permutation)
        score  = 3.85 + a_u + b_i + sum_{k < min(K_u, K_i)} s_k p_uk q_ik + noise
        rating = score rounded to the nearest half, clipped to 0.5..5

        a_u ~ N(0, 0.3^2),  b_i ~ N(0, 0.4^2),  centred over the traffic
        p_uk, q_ik ~ N(0, 1),  s_k^2 = 0.25 / (k + 1),  noise ~ N(0, 0.5^2)
        K = clip(floor(sqrt(n) / 2), 1, 32),  n = events * P(id), the ID's expected count

    An ID expected 16 times has 2 factors, one expected 4096 times has 32. Between two head IDs
    the interaction has variance 1.01, of which the first two factors hold 37 %; a tail ID has
    nothing for a wide row to learn. Timestamps rise by 1 to 120 s from event to event.

    Args:
        events: number of events E, at least 1.
        n_users, n_items: `events // 20` and `events // 40` by default, at least 50.
        seed: equal arguments give equal arrays.

    Returns:
        The ratings, 28 bytes an event; IDs that were never drawn keep their code.

    Raises:
        DataError: if a count is below 1 or the seed is negative.
    """
    n_users = max(50, events // 20) if n_users is None else n_users
    n_items = max(50, events // 40) if n_items is None else n_items
    _check_least(events=(events, 1), n_users=(n_users, 1), n_items=(n_items, 1), seed=(seed, 0))

    rng = np.random.default_rng(seed)
    u_ids, u_cdf, u_bias, u_factors = _plant(rng, n_users, events, exponent=0.8, bias_std=0.3)
    i_ids, i_cdf, i_bias, i_factors = _plant(rng, n_items, events, exponent=1.05, bias_std=0.4)
    integers: np.ndarray = np.empty((3, events), np.int64)
    rating: np.ndarray = np.empty(events, np.float32)
    user, item, timestamp = integers
    now = 1_000_000_000
    for start in range(0, events, _CHUNK):
        part = slice(start, min(start + _CHUNK, events))
        size = part.stop - part.start
        u = np.searchsorted(u_cdf, rng.random(size), side="right")
        i = np.searchsorted(i_cdf, rng.random(size), side="right")
        score = 3.85 + u_bias[u] + i_bias[i] + rng.normal(0.0, 0.5, size)
        score += np.einsum("ek,ek->e", u_factors[u], i_factors[i])
        rating[part] = np.clip(np.round(score * 2) / 2, RATING_MIN, RATING_MAX)
        user[part], item[part] = u_ids[u], i_ids[i]
        timestamp[part] = now + np.cumsum(rng.integers(1, 121, size))
        now = int(timestamp[part.stop - 1])
    digest = hashlib.sha256()
    for array in (user, item, rating, timestamp):
        digest.update(array.data)
    return Ratings(user, item, rating, timestamp, n_users, n_items, "synthetic", digest.hexdigest())


def _plant(
    rng: np.random.Generator, n: int, events: int, exponent: float, bias_std: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return one side's IDs [n], cdf [n], biases [n] and factors [n, MAX_RANK], by popularity."""
    share = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    share /= share.sum()
    cdf = np.cumsum(share)
    cdf[-1] = 1.0
    bias = rng.normal(0.0, bias_std, n)
    bias -= share @ bias
    rank = np.clip(np.sqrt(events * share) // 2, 1, MAX_RANK)
    factors = rng.standard_normal((n, MAX_RANK), dtype=np.float32)
    factors *= (0.25 / np.arange(1, MAX_RANK + 1, dtype=np.float32)) ** 0.25  # sqrt(s_k) a side
    factors *= np.arange(MAX_RANK) < rank[:, None]
    return rng.permutation(n), cdf, bias, factors


def build_stream(
    ratings: Ratings,
    *,
    task: str = "binary",
    order: str = "shuffle",
    seed: int = 0,
    batch_size: int = 500,
    train_fraction: float = 0.75,
    history: int = 5,
    device: torch.device | str = "cpu",
) -> Stream:
    """Order the events, cut them into batches and count every ID; equal arguments, equal stream.

    Args:
        ratings: the E events.
        task: `"binary"`, target `rating > 3.5`; or `"multiclass"`, 5 classes, target
            `clip(floor(rating - 0.5), 0, 4)`.
        order: `"shuffle"`, a permutation from `seed`; or `"time"`, a stable sort by timestamp.
        batch_size: events a batch, at least 2. A last batch of a single event joins the one
            before it, since BatchNorm needs two rows.
        train_fraction: `n_train` is `floor(train_fraction * E)` rounded down to the start of a
            batch, with at least one batch on each side.
        history: ring-buffer slots an ID has (the paper's T), at least 1.
        device: where the tensors live, 32 bytes an event (28 for the binary task).

    Raises:
        DataError: for an argument out of range, fewer events than two batches, or `order="time"`
            without timestamps.

    Example:
        >>> stream = build_stream(synthetic_ratings(1_000), batch_size=100)
        >>> len(stream.bounds), stream.n_train
        (10, 700)
        >>> batch = stream.batch(0)
        >>> batch.user.shape, batch.target.dtype, int(batch.user_freq.min())
        (torch.Size([100]), torch.float32, 1)
        >>> int(batch.user_last.sum()) == batch.user.unique().numel()
        True
    """
    n_events = len(ratings.user)
    _check_least(batch_size=(batch_size, 2), history=(history, 1), seed=(seed, 0))
    if not 0 < train_fraction < 1:
        raise DataError(f"train_fraction must be between 0 and 1, got {train_fraction}")
    if n_events < 2 * batch_size:
        _fail(ratings.name, f"{n_events} events are fewer than two batches of {batch_size}")
    permutation = _permutation(ratings, order, seed)

    starts = np.arange(0, n_events - 1, batch_size)  # - 1: no batch starts at the last event
    # The tiny term: 0.29 * 100 is 28.999999999999996 in floats.
    n_train = int(train_fraction * n_events + 1e-9) // batch_size * batch_size
    n_train = min(max(n_train, batch_size), int(starts[-1]))

    arrays: dict[str, Any] = {"target": _target(ratings.rating, task)[permutation]}
    for side, codes in (("user", ratings.user), ("item", ratings.item)):
        arrays[side] = codes[permutation]
        arrays[f"{side}_freq"], left = _count(arrays[side], starts)
        arrays[f"{side}_last"] = left == 0
        arrays[f"{side}_keep"] = left < history
    return Stream(
        **{name: torch.from_numpy(array).to(device) for name, array in arrays.items()},
        bounds=list(zip(starts.tolist(), [*starts[1:].tolist(), n_events], strict=True)),
        n_train=n_train,
        n_users=ratings.n_users,
        n_items=ratings.n_items,
    )


def _target(rating: np.ndarray, task: str) -> np.ndarray:
    if task == "binary":
        return (rating > 3.5).astype(np.float32)
    if task == "multiclass":
        return np.clip(np.floor(rating - 0.5), 0, NUM_CLASSES - 1).astype(np.int64)
    raise DataError(f"task must be binary or multiclass, got {task!r}")


def _permutation(ratings: Ratings, order: str, seed: int) -> np.ndarray:
    if order == "shuffle":
        return np.random.default_rng(seed).permutation(len(ratings.user))
    if order != "time":
        raise DataError(f"order must be shuffle or time, got {order!r}")
    if ratings.timestamp is None:
        _fail(ratings.name, "order=time needs timestamps and there are none; order=shuffle works")
    return np.argsort(ratings.timestamp, kind="stable")


def _count(ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `freq` and `left`, int32 [E], as defined at the file's top.

    A stable sort of `ids` (int64 [E]) puts the events of an (ID, batch) pair side by side in
    stream order, so both counts are distances to the edge of a run. `starts` are the batches'.
    """
    position = np.arange(len(ids))
    # Sorting ID and position as one integer is stable and several times faster than argsort.
    bits = len(ids).bit_length()
    key = np.sort(ids << bits | position)
    by_id = key & ((1 << bits) - 1)
    new_id = np.diff(key >> bits, prepend=-1) != 0
    batch = np.minimum(by_id // starts[1], len(starts) - 1)
    new_run = new_id | (np.diff(batch, prepend=-1) != 0)
    freq: np.ndarray = np.empty(len(ids), np.int32)
    left: np.ndarray = np.empty(len(ids), np.int32)
    freq[by_id] = position - np.maximum.accumulate(np.where(new_id, position, 0)) + 1
    run_ends: np.ndarray = np.append(np.flatnonzero(new_run)[1:], len(ids))
    left[by_id] = np.repeat(run_ends, np.diff(run_ends, prepend=0)) - 1 - position
    return freq, left
