"""Ratings as arrays, and the mistakes that a user can make with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from ..errors import UserError

__all__ = [
    "RATING_MAX",
    "RATING_MIN",
    "SIDES",
    "DataError",
    "Ratings",
    "event_counts",
    "fail",
]

SIDES = ("user", "item")
RATING_MIN, RATING_MAX = 0.5, 5.0


class DataError(UserError):
    """Data that cannot be read or used as it stands, or an argument out of range; one line."""


def fail(name: str, what: str) -> NoReturn:
    """Raise `DataError` in one line: parser messages and odd names may hold anything."""
    line = " ".join(f"{name}: {what}".split())
    raise DataError(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    )


@dataclass(frozen=True)
class Ratings:
    """One event a row, in file order; arrays may be read-only maps of cached files."""

    user: np.ndarray  # [E], codes 0..n_users-1 in sorted order of the raw IDs; int32 if they fit
    item: np.ndarray  # [E], codes 0..n_items-1, likewise
    rating: np.ndarray  # float32 [E], finite
    timestamp: np.ndarray | None  # int64 [E]
    n_users: int
    n_items: int
    name: str  # "synthetic", a set's name or the file name
    checksum: str  # sha256 (hex) of the file; of the generated arrays for synthetic data
    # rows; duplicates, whose user and item came before; unsorted, earlier than the row before;
    # skipped, malformed and left out, and of these each reason's share. All but skipped are kept.
    counts: dict[str, int] = field(default_factory=dict)


def event_counts(
    user: np.ndarray, item: np.ndarray, timestamp: np.ndarray | None, n_items: int
) -> dict[str, int]:
    """Count the rows, those whose user and item came before, and the steps back in time.

    Example:
        >>> event_counts(np.array([0, 1, 0]), np.array([2, 2, 2]), np.array([5, 4, 4]), 3)
        {'rows': 3, 'duplicates': 1, 'unsorted': 1}
    """
    pair = user.astype(np.int64)
    pair *= n_items
    pair += item
    pair.sort()
    unsorted = 0 if timestamp is None else int(np.count_nonzero(timestamp[1:] < timestamp[:-1]))
    duplicates = int(np.count_nonzero(pair[1:] == pair[:-1]))
    return {"rows": len(pair), "duplicates": duplicates, "unsorted": unsorted}
