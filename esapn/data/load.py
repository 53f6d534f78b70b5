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

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from .cache import cache_folder, load_file, report_skipped
from .files import KINDS, MALFORMED, RATING_MAX, RATING_MIN, DataError, event_counts, fail
from .movielens import MOVIELENS, load_movielens

NUM_CLASSES = 5
MAX_RANK = 32

# Looked for in this order when `data` is a directory.
_KNOWN_FILES = ("u.data", "ratings.dat", "ratings.csv", "ratings.parquet")
# Fixed: the random draws come chunk by chunk, so this size is part of what a seed means.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Ratings:
    """One event a row, in file order; arrays may be read-only maps of cached files."""

    user: np.ndarray  # [E], codes 0..n_users-1 in sorted order of the raw IDs; int32 if they fit
    item: np.ndarray  # [E], codes 0..n_items-1, likewise
    rating: np.ndarray  # float32 [E], within 0.5..5
    timestamp: np.ndarray | None  # int64 [E]
    n_users: int
    n_items: int
    name: str  # "synthetic", a set's name or the file name
    checksum: str  # sha256 (hex) of the file; of the generated arrays for synthetic data
    # rows; duplicates, whose user and item came before; unsorted, earlier than the row before;
    # skipped, malformed and left out, and of these each reason's share. All but skipped are kept.
    counts: dict[str, int] = field(default_factory=dict)


class Batch(NamedTuple):
    """One batch of a `Stream`, in the dtypes that models take; shape [B] each."""

    user: Tensor  # int64
    item: Tensor  # int64
    target: Tensor  # float32 of 0 and 1 (binary), int64 of 0..4 (multiclass)
    user_freq: Tensor  # int32
    item_freq: Tensor  # int32
    user_last: Tensor  # bool
    item_last: Tensor  # bool
    user_keep: Tensor  # bool
    item_keep: Tensor  # bool


@dataclass(frozen=True)
class Bounds(Sequence[tuple[int, int]]):
    """Start and end of every batch, computed when asked for; covers all events.

    Batches have `batch_size` events; the last may have fewer, or one more, never one alone.

    Example:
        >>> list(Bounds(n_events=9, batch_size=4))
        [(0, 4), (4, 9)]
    """

    n_events: int
    batch_size: int

    def __len__(self) -> int:
        return max(self.n_events - 2, 0) // self.batch_size + 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        places = range(len(self))[index]  # negative ones, and IndexError
        if isinstance(places, range):
            return [self[place] for place in places]
        end = self.n_events if places == len(self) - 1 else (places + 1) * self.batch_size
        return places * self.batch_size, end


@dataclass(frozen=True)
class Stream:
    """Ordered events with their counters, resident on one device: 21 bytes an event.

    Formulas at the file's top. The dtypes are compact; `batch` and `labels` give those of `Batch`.
    """

    user: Tensor  # int32 [E], codes
    item: Tensor  # int32 [E]
    target: Tensor  # uint8 [E], 0 or 1 (binary), 0..4 (multiclass)
    user_freq: Tensor  # int32 [E], 1-based, runs on through the test part
    item_freq: Tensor  # int32 [E]
    user_last: Tensor  # bool [E], last event of its ID inside its batch
    item_last: Tensor  # bool [E]
    user_keep: Tensor  # bool [E], among the last `history` events of its ID inside its batch
    item_keep: Tensor  # bool [E]
    bounds: Bounds  # (start, end) of every batch
    n_train: int  # events before this index train; always the start of a batch
    n_users: int
    n_items: int
    task: str  # "binary" or "multiclass"

    def batch(self, index: int) -> Batch:
        """Return batch `index`; IDs and target are converted, the rest are views. No sync."""
        start, end = self.bounds[index]
        part = slice(start, end)
        rest = (getattr(self, name)[part] for name in Batch._fields[3:])
        return Batch(self.user[part].long(), self.item[part].long(), self.labels(start, end), *rest)

    def labels(self, start: int, end: int) -> Tensor:
        """Return the targets of the events `[start, end)` in the dtype of `Batch.target`."""
        target = self.target[start:end]
        if target.dtype != torch.uint8:
            return target  # replaced by the caller, in the dtype that is wanted
        return target.float() if self.task == "binary" else target.long()


def load_ratings(
    data: str | os.PathLike[str],
    *,
    events: int = 200_000,
    seed: int = 0,
    archive: str | os.PathLike[str] | None = None,
    url: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    malformed: str = "refuse",
) -> Ratings:
    """Read ratings from a file, a directory or a MovieLens set, or generate them.

    What was read is kept in the cache as memory-mapped columns; the same bytes are parsed once.

    Args:
        data: `"synthetic"`; or a set's name, a key of `esapn.data.movielens.MOVIELENS` (`ml-100k`,
            `ml-1m`, `ml-10m`, `ml-20m`, `ml-25m`, `ml-32m`, `ml-latest`, `ml-latest-small`),
            which is downloaded if the cache has it not; or a directory holding `u.data`,
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
        given = "archive" if archive is not None else "url"
        raise DataError(f"{given} is for one of {', '.join(MOVIELENS)}, not for {data}")
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
    report_skipped(name, columns.counts)
    return Ratings(**vars(columns), name=name, checksum=checksum)


def _find_file(data: str | os.PathLike[str]) -> tuple[Path, str]:
    try:
        path = next((p for name in _KNOWN_FILES if (p := Path(data, name)).is_file()), Path(data))
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        fail(f"{os.fspath(data):.100}", error.strerror or str(error))
    if path.is_dir():
        fail(str(path), f"directory holds none of {', '.join(_KNOWN_FILES)}")
    if not path.is_file():
        fail(str(path), "no such file or directory")
    kind = path.suffix.lower()
    if kind not in KINDS:
        fail(path.name, f"unknown kind of file '{kind}' (known: {', '.join(KINDS)})")
    if path.stat().st_size == 0:
        fail(path.name, "file is empty")
    return path, kind


def _check_least(**bounds: tuple[int, int]) -> None:
    for name, (value, least) in bounds.items():
        if value < least:
            raise DataError(f"{name} must be at least {least}, got {value}")


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
        The ratings, 20 bytes an event; IDs that were never drawn keep their code.

    Raises:
        DataError: if a count is below 1 or the seed is negative.
    """
    n_users = max(50, events // 20) if n_users is None else n_users
    n_items = max(50, events // 40) if n_items is None else n_items
    _check_least(events=(events, 1), n_users=(n_users, 1), n_items=(n_items, 1), seed=(seed, 0))

    rng = np.random.default_rng(seed)
    u_ids, u_cdf, u_bias, u_factors = _plant(rng, n_users, events, exponent=0.8, bias_std=0.3)
    i_ids, i_cdf, i_bias, i_factors = _plant(rng, n_items, events, exponent=1.05, bias_std=0.4)
    user: np.ndarray = np.empty(events, np.int32)
    item: np.ndarray = np.empty(events, np.int32)
    rating: np.ndarray = np.empty(events, np.float32)
    timestamp: np.ndarray = np.empty(events, np.int64)
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
    for array, dtype in ((user, np.int64), (item, np.int64), (rating, None), (timestamp, None)):
        for start in range(0, events, _CHUNK):
            digest.update(np.ascontiguousarray(array[start : start + _CHUNK], dtype).data)
    checksum = digest.hexdigest()
    counts = event_counts(user, item, timestamp, n_items) | {"skipped": 0}
    return Ratings(user, item, rating, timestamp, n_users, n_items, "synthetic", checksum, counts)


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
        order: `"shuffle"`, NumPy's `RandomState(seed).permutation`; or `"time"`, a stable sort by
            timestamp.
        batch_size: events a batch, at least 2. A last batch of a single event joins the one
            before it, since BatchNorm needs two rows.
        train_fraction: `n_train` is `floor(train_fraction * E)` rounded down to the start of a
            batch, with at least one batch on each side.
        history: ring-buffer slots an ID has (the paper's T), at least 1.
        device: where the tensors live, 21 bytes an event.

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
        >>> stream.target.dtype, stream.labels(0, stream.n_train).dtype
        (torch.uint8, torch.float32)
        >>> int(batch.user_last.sum()) == batch.user.unique().numel()
        True
    """
    n_events = len(ratings.user)
    _check_least(batch_size=(batch_size, 2), history=(history, 1), seed=(seed, 0))
    if not 0 < train_fraction < 1:
        raise DataError(f"train_fraction must be between 0 and 1, got {train_fraction}")
    if n_events < 2 * batch_size:
        fail(ratings.name, f"{n_events} events are fewer than two batches of {batch_size}")
    if task not in ("binary", "multiclass"):
        raise DataError(f"task must be binary or multiclass, got {task!r}")
    arrays = _ordered(ratings, task, _permutation(ratings, order, seed))

    bounds = Bounds(n_events, batch_size)
    # The tiny term: 0.29 * 100 is 28.999999999999996 in floats.
    n_train = int(train_fraction * n_events + 1e-9) // batch_size * batch_size
    n_train = min(max(n_train, batch_size), bounds[-1][0])

    tensors = {}
    for side in ("user", "item"):
        counted = _count(arrays[side], bounds, history)
        for name, array in zip(("freq", "last", "keep"), counted, strict=True):
            tensors[f"{side}_{name}"] = torch.from_numpy(array).to(device)
    for name in list(arrays):
        tensors[name] = torch.from_numpy(arrays.pop(name)).to(device)
    return Stream(
        **tensors,
        bounds=bounds,
        n_train=n_train,
        n_users=ratings.n_users,
        n_items=ratings.n_items,
        task=task,
    )


def _permutation(ratings: Ratings, order: str, seed: int) -> np.ndarray:
    if order == "shuffle":
        # NumPy's legacy generator: its seed 0 is the shuffle that earlier results were taken on.
        return np.random.RandomState(seed).permutation(len(ratings.user))
    if order != "time":
        raise DataError(f"order must be shuffle or time, got {order!r}")
    if ratings.timestamp is None:
        fail(ratings.name, "order=time needs timestamps and there are none; order=shuffle works")
    return np.argsort(ratings.timestamp, kind="stable")


def _ordered(ratings: Ratings, task: str, permutation: np.ndarray) -> dict[str, np.ndarray]:
    """Return user, item (int32 [E]) and target (uint8 [E]) in the order of the stream."""
    n_events = len(permutation)
    out: dict[str, np.ndarray] = {
        "user": np.empty(n_events, np.int32),
        "item": np.empty(n_events, np.int32),
        "target": np.empty(n_events, np.uint8),
    }
    for part in _chunks(n_events):
        rows = permutation[part]
        out["user"][part] = ratings.user[rows]
        out["item"][part] = ratings.item[rows]
        out["target"][part] = _target(ratings.rating[rows], task)
    return out


def _target(rating: np.ndarray, task: str) -> np.ndarray:
    if task == "binary":
        return rating > 3.5
    return np.clip(np.floor(rating - 0.5), 0, NUM_CLASSES - 1)


def _chunks(n: int) -> Iterator[slice]:
    """Cut `range(n)`, so that what is computed on the way is small beside the arrays."""
    return (slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK))


def _count(
    ids: np.ndarray, bounds: Bounds, history: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `freq` (int32 [E]), `last` and `keep` (bool [E]), as defined at the file's top.

    A stable sort of `ids` (int32 [E]) puts the events of an (ID, batch) pair side by side in
    stream order: `freq` is the distance to the first event of the ID, and at least k events of
    the pair follow if the event k places on is still of the pair.
    """
    n_events, bits = len(ids), len(ids).bit_length()
    # Sorting ID and position as one integer is stable and several times faster than argsort.
    key: np.ndarray = np.empty(n_events, np.int64)
    for part in _chunks(n_events):
        key[part] = ids[part].astype(np.int64) << bits | np.arange(part.start, part.stop)
    key.sort()

    def split(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """ID and position of the sorted events [begin, end)."""
        return key[begin:end] >> bits, key[begin:end] & ((1 << bits) - 1)

    def of_batch(position: np.ndarray) -> np.ndarray:
        return np.minimum(position // bounds.batch_size, len(bounds) - 1)

    freq: np.ndarray = np.empty(n_events, np.int32)
    last: np.ndarray = np.empty(n_events, np.bool_)
    keep: np.ndarray = np.empty(n_events, np.bool_)
    current, first = -1, 0  # the ID at the end of the chunk before, and where its events begin
    for part in _chunks(n_events):
        begin, end = part.start, part.stop
        id_, position = split(begin, end)
        batch = of_batch(position)
        place = np.arange(begin, end)
        firsts = np.where(np.diff(id_, prepend=current) != 0, place, first)
        firsts = np.maximum.accumulate(firsts)
        freq[position] = place - firsts + 1
        current, first = int(id_[-1]), int(firsts[-1])
        for flag, ahead in ((last, 1), (keep, history)):
            other_id, other_position = split(begin + ahead, end + ahead)
            n = len(other_id)  # fewer at the end, where nothing follows
            follows = (other_id == id_[:n]) & (of_batch(other_position) == batch[:n])
            flag[position[:n]] = ~follows
            flag[position[n:]] = True
    return freq, last, keep
