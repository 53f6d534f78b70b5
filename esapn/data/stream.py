"""Ratings in, stream out: events ordered, their IDs counted, cut in batches.

What the search needs of an event depends on the order alone, so it is counted once:

    freq[t] = #{s <= t : id[s] == id[t]}                                running, 1-based
    left[t] = #{s >  t : id[s] == id[t], s in the batch of t}           still to come
    last[t] = left[t] == 0                                              the ID decides here
    keep[t] = left[t] < history                                         ring slot written here

The kept events of an ID in one batch number at most `history` and follow each other, so their
ring slots `(freq - 1) % history` are all different: a scatter has no write conflicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from ..errors import check_least
from .ratings import SIDES, DataError, Ratings, fail

__all__ = ["NUM_CLASSES", "Batch", "Bounds", "Stream", "build_stream", "training_part"]

NUM_CLASSES = 5
# Events at a time, so that what is computed on the way is small beside the arrays.
CHUNK = 1 << 18


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
    """Start and end of every batch, computed at each access; covers all events.

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
            return target  # the caller's own, in the dtype of the model
        return target.float() if self.task == "binary" else target.long()


def build_stream(
    ratings: Ratings,
    *,
    task: str = "binary",
    positive_above: float = 3.5,
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
        task: `"binary"`, target `rating > positive_above`; or `"multiclass"`, 5 classes, target
            `clip(floor(rating - 0.5), 0, 4)`.
        positive_above: for `"binary"` only, on the scale of the ratings.
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
        >>> from esapn.data.synthetic import synthetic_ratings
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
    _check(ratings, batch_size, train_fraction)
    check_least(DataError, 1, history=history)
    check_least(DataError, 0, seed=seed)
    if task not in ("binary", "multiclass"):
        raise DataError(f"task must be binary or multiclass, got {task!r}")
    arrays = _ordered(ratings, task, positive_above, _permutation(ratings, order, seed))

    bounds = Bounds(n_events, batch_size)
    n_train = _train_events(bounds, train_fraction)

    tensors = {}
    for side in SIDES:
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


def training_part(
    ratings: Ratings,
    *,
    order: str = "shuffle",
    seed: int = 0,
    batch_size: int = 500,
    train_fraction: float = 0.75,
) -> Ratings:
    """The events before the test part, in the order of the stream of equal arguments.

    Of the other events nothing is read but, to put them in order, their timestamps. The IDs stay
    those of all events, so that tables have all rows.

    Args:
        ratings: the E events.
        order, seed, batch_size, train_fraction: as for :func:`build_stream`.

    Raises:
        DataError: as there.

    Example:
        >>> from esapn.data.synthetic import synthetic_ratings
        >>> ratings = synthetic_ratings(1_000)
        >>> part = training_part(ratings, batch_size=100)
        >>> len(part.rating), part.n_users == ratings.n_users
        (700, True)
    """
    _check(ratings, batch_size, train_fraction)
    n_train = _train_events(Bounds(len(ratings.user), batch_size), train_fraction)
    rows = _permutation(ratings, order, seed)[:n_train]
    return Ratings(
        user=ratings.user[rows],
        item=ratings.item[rows],
        rating=ratings.rating[rows],
        timestamp=None if ratings.timestamp is None else ratings.timestamp[rows],
        n_users=ratings.n_users,
        n_items=ratings.n_items,
        name=ratings.name,
        checksum=ratings.checksum,
    )


def _check(ratings: Ratings, batch_size: int, train_fraction: float) -> None:
    check_least(DataError, 2, batch_size=batch_size)
    if not 0 < train_fraction < 1:
        raise DataError(f"train_fraction must be between 0 and 1, got {train_fraction}")
    if (n := len(ratings.user)) < 2 * batch_size:
        fail(ratings.name, f"{n} events are fewer than two batches of {batch_size}")


def _train_events(bounds: Bounds, train_fraction: float) -> int:
    """How many events train: whole batches, and at least one of them is left for the test part."""
    size = bounds.batch_size
    # The tiny term: 0.29 * 100 is 28.999999999999996 in floats.
    n_train = int(train_fraction * bounds.n_events + 1e-9) // size * size
    return min(max(n_train, size), bounds[-1][0])


def _permutation(ratings: Ratings, order: str, seed: int) -> np.ndarray:
    if order == "shuffle":
        # NumPy's legacy generator: its seed 0 is the shuffle that earlier results were taken on.
        return np.random.RandomState(seed).permutation(len(ratings.user))
    if order != "time":
        raise DataError(f"order must be shuffle or time, got {order!r}")
    if ratings.timestamp is None:
        fail(ratings.name, "order=time needs timestamps and there are none; order=shuffle works")
    return np.argsort(ratings.timestamp, kind="stable")


def _ordered(
    ratings: Ratings, task: str, positive_above: float, permutation: np.ndarray
) -> dict[str, np.ndarray]:
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
        out["target"][part] = _target(ratings.rating[rows], task, positive_above)
    return out


def _target(rating: np.ndarray, task: str, positive_above: float) -> np.ndarray:
    if task == "binary":
        return rating > positive_above
    return np.clip(np.floor(rating - 0.5), 0, NUM_CLASSES - 1)


def _chunks(n: int) -> Iterator[slice]:
    """Cut `range(n)` in chunks."""
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


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
