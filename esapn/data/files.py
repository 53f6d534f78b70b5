"""A file of ratings read block by block into columns; malformed rows are named or counted.

A block's IDs become codes of that block at once, and the blocks' distinct IDs are merged at the
end, so memory holds a few numbers an event and one block of text, whatever the file's size.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ..extras import needs
from .ratings import RATING_MAX, RATING_MIN, event_counts, fail

if TYPE_CHECKING:
    import polars as pl

MALFORMED = ("refuse", "skip")
SEPARATORS = {".data": "\t", ".dat": "::", ".csv": ","}
KINDS = (*SEPARATORS, ".parquet")

_ALIASES = {
    "user": ("user", "userid", "user_id"),
    "item": ("item", "itemid", "item_id", "movieid", "movie_id"),
    "rating": ("rating",),
    "timestamp": ("timestamp",),
}
_FIELDS = tuple(_ALIASES)
_WIDTH = "wrong number of fields"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEADER_BYTES = 1 << 20  # a header has fewer, with the blank lines before it
BLOCK_BYTES = 1 << 24  # of text at a time
BLOCK_ROWS = 1 << 19  # of a Parquet file or of quoted text at a time


@dataclass(frozen=True)
class Columns:
    """The well-formed rows of a file, in file order."""

    user: np.ndarray  # [E], codes 0..n_users-1; int32 where they fit, int64 otherwise
    item: np.ndarray  # [E], likewise
    rating: np.ndarray  # float32 [E], finite
    timestamp: np.ndarray | None  # int64 [E]
    n_users: int
    n_items: int
    counts: dict[str, int]  # as in `Ratings`


class _Block(NamedTuple):
    """Some consecutive rows as read: text where the file holds text."""

    frame: pl.DataFrame  # columns named as in _FIELDS
    width: pl.Series | None = None  # fields that each row has, where that can go wrong
    wrong: pl.Series | None = None  # rows whose width is wrong
    expected: str = ""  # what to say of such a width


@dataclass
class _Problem:
    """Rows that are bad in one way."""

    row: int  # the first, from 1
    found: str
    count: int = 0


def read_columns(path: Path, kind: str, *, name: str, malformed: str = "refuse") -> Columns:
    """Read a file of ratings; see `esapn.data.load.load_ratings` for what it may hold.

    Args:
        path: the file.
        kind: one of `KINDS`; whatever the file's own suffix.
        name: what messages call the file.
        malformed: `"refuse"` or `"skip"`.

    Returns:
        The columns, 20 bytes an event.

    Raises:
        DataError: if the file cannot be read, has a malformed row and `malformed` is `"refuse"`,
            or has no well-formed row.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "u.data")
        ...     _ = path.write_text("7\\t30\\t4\\t1000\\n5\\t30\\t3.5\\t999\\n")
        ...     columns = read_columns(path, ".data", name="u.data")
        >>> columns.user.tolist(), columns.n_items, columns.counts["unsorted"]
        ([1, 0], 1, 1)
    """
    try:
        import polars as pl
    except ImportError:
        fail(name, needs("reading files", ["polars"]))
    checker = _Checker(keep_going=malformed == "skip")
    try:
        blocks = _parquet_blocks if kind == ".parquet" else _text_blocks
        for block in blocks(path, kind, name):
            checker.add(block)
    except UnicodeDecodeError as error:
        fail(name, f"cannot be read: line {_first_not_utf8(path)}: not UTF-8 ({error.reason})")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        fail(name, f"cannot be read: {(str(error).strip() or repr(error)).splitlines()[0]}")
    return checker.finish(name)


def of_five_classes(columns: Columns, *, name: str, malformed: str) -> Columns:
    """The columns if five classes can hold their ratings: those outside 0.5..5 are malformed.

    Args:
        columns: as read; returned as they are if no rating lies outside.
        name: what messages call the file.
        malformed: `"refuse"`, or `"skip"` such rows and count them.

    Raises:
        DataError: a rating lies outside and `malformed` is `"refuse"`, or all of them do.

    Example:
        >>> rating = np.array([4, 9, 5], np.float32)
        >>> user, item = np.array([0, 1, 2]), np.array([0, 1, 0])
        >>> columns = Columns(user, item, rating, None, 3, 2, {"rows": 3, "skipped": 0})
        >>> kept = of_five_classes(columns, name="ratings.csv", malformed="skip")
        >>> kept.user.tolist(), kept.n_items, kept.counts["skipped"]
        ([0, 1], 1, 1)
    """
    good = (columns.rating >= RATING_MIN) & (columns.rating <= RATING_MAX)
    rows = len(good)
    bad = rows - int(np.count_nonzero(good))
    if not bad:
        return columns
    what = f"is outside {RATING_MIN:g}..{RATING_MAX:g}"
    first = int(np.argmin(good))
    if malformed == "refuse":
        count = f"{bad:,} row{'s are' if bad > 1 else ' is'} bad in this way"
        found = f"row {first + 1}: rating {columns.rating[first]:g} {what}"
        fail(name, f"{found} ({count}, of {rows:,})")
    if bad == rows:
        fail(name, f"every row is malformed; rating {columns.rating[first]:g} {what}")
    # IDs that are left; their order stays.
    users, user = np.unique(columns.user[good], return_inverse=True)
    items, item = np.unique(columns.item[good], return_inverse=True)
    user, item = user.astype(columns.user.dtype), item.astype(columns.item.dtype)
    timestamp = None if columns.timestamp is None else columns.timestamp[good]
    counts = columns.counts | event_counts(user, item, timestamp, len(items))
    counts |= {"skipped": columns.counts["skipped"] + bad, f"rating {what}": bad}
    rating = columns.rating[good]
    return Columns(user, item, rating, timestamp, len(users), len(items), counts)


class _Checker:
    """Takes blocks in file order; keeps what is well-formed and what is known of the rest."""

    def __init__(self, *, keep_going: bool) -> None:
        self.keep_going = keep_going
        self.rows = 0
        self.problems: dict[str, _Problem] = {}
        self.ids = {"user": _Codes(), "item": _Codes()}
        self.rating: list[np.ndarray] = []
        self.timestamp: list[np.ndarray] | None = None

    def add(self, block: _Block) -> None:
        import polars as pl

        frame = block.frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
        frame = frame.with_columns(pl.col(pl.String).str.strip_chars().replace("", None))
        self.good = pl.repeat(True, frame.height, eager=True)
        if (width := block.width) is not None and block.wrong is not None:
            self._flag(_WIDTH, block.wrong, lambda row: f"{width[row]} {block.expected}")
        for column in frame.iter_columns():
            self._flag_value(column, column.is_null(), "is missing")
        rating = self._finite(frame["rating"], pl.Float32)
        timestamp = self._whole(frame["timestamp"]) if "timestamp" in frame.columns else None

        self.rows += frame.height
        if self.problems and not self.keep_going:
            return  # the rest is read for its count of bad rows alone
        if not self.good.all():
            frame, rating = frame.filter(self.good), rating.filter(self.good)
            timestamp = None if timestamp is None else timestamp.filter(self.good)
        self.rating.append(rating.to_numpy())
        if timestamp is not None:
            self.timestamp = self.timestamp or []
            self.timestamp.append(timestamp.to_numpy())
        for name, codes in self.ids.items():
            codes.add(frame[name])

    def _flag(self, reason: str, bad: pl.Series, found: Callable[[int], str]) -> None:
        """Note the rows flagged in `bad` that were good so far; a row is bad in one way."""
        bad = bad.fill_null(True) & self.good
        rows = bad.arg_true()
        if rows.len():
            first = self.rows + rows[0] + 1
            problem = self.problems.setdefault(reason, _Problem(first, found(rows[0])))
            problem.count += rows.len()
            self.good &= ~bad

    def _flag_value(self, column: pl.Series, bad: pl.Series, what: str) -> None:
        def found(row: int) -> str:
            value = column[row]
            return (
                f"{column.name} {what}" if value is None else f"{column.name} {value!r:.60} {what}"
            )

        self._flag(f"{column.name} {what}", bad, found)

    def _finite(self, column: pl.Series, dtype: Any = float) -> pl.Series:
        number = column.cast(dtype, strict=False)
        self._flag_value(column, ~number.is_finite(), "is not a finite number")
        return number

    def _whole(self, column: pl.Series) -> pl.Series:
        import polars as pl

        # Whole numbers beyond 2**53 lose digits as floats, so integers are taken as they stand.
        whole = column.cast(int, strict=False)
        exact = column.dtype.is_integer() or column.dtype == pl.String
        if exact and not whole.null_count():
            return whole
        number = self._finite(column)
        whole = whole.fill_null(number.cast(int, strict=False))
        self._flag_value(column, whole.cast(float) != number, "is not a whole number")
        return whole

    def finish(self, name: str) -> Columns:
        total = f"of {self.rows:,}"
        if self.problems and not self.keep_going:
            first = min(self.problems.values(), key=lambda problem: problem.row)
            count = f"{first.count:,} row{'s are' if first.count > 1 else ' is'} bad in this way"
            fail(name, f"row {first.row}: {first.found} ({count}, {total})")
        if self.rows == 0:
            fail(name, "holds no ratings")
        skipped = {reason: problem.count for reason, problem in self.problems.items()}
        if sum(skipped.values()) == self.rows:
            first = min(self.problems.values(), key=lambda problem: problem.row)
            fail(name, f"every row is malformed; row {first.row}: {first.found}")
        rating = np.concatenate(self.rating)
        timestamp = None if self.timestamp is None else np.concatenate(self.timestamp)
        self.rating, self.timestamp = [], None
        user, n_users = self.ids["user"].finish()
        item, n_items = self.ids["item"].finish()
        counts = event_counts(user, item, timestamp, n_items)
        counts |= {"skipped": sum(skipped.values()), **skipped}
        return Columns(user, item, rating, timestamp, n_users, n_items, counts)


class _Codes:
    """The IDs of one side: a block at a time as codes of that block, at the end as one."""

    def __init__(self) -> None:
        self.codes: list[np.ndarray] = []
        self.values: list[pl.Series] = []  # the distinct IDs of each block; a code is a place

    def add(self, column: pl.Series) -> None:
        import polars as pl

        if column.dtype == pl.String:
            # "007" and "7" are two IDs: they count as integers only if nothing would merge.
            whole = column.cast(int, strict=False)
            if (whole.cast(str) == column).fill_null(False).all():
                column = whole
        values = column.unique()
        places = pl.int_range(values.len(), dtype=pl.Int32, eager=True)
        self.values.append(values)
        self.codes.append(column.replace_strict(values, places, return_dtype=pl.Int32).to_numpy())

    def finish(self) -> tuple[np.ndarray, int]:
        """Return the codes [E] in sorted order of the IDs, and how many IDs there are."""
        import polars as pl

        if any(values.dtype == pl.String for values in self.values):
            self.values = [values.cast(pl.String) for values in self.values]
        rank = pl.concat(self.values).rank("dense").to_numpy()
        n_ids = int(rank.max())
        lookup = (rank - 1).astype(np.int32 if n_ids <= 1 << 31 else np.int64)
        out: np.ndarray = np.empty(sum(map(len, self.codes)), lookup.dtype)
        row, last = len(out), len(lookup)
        while self.codes:  # from the back, so that each block's memory goes at once
            codes, size = self.codes.pop(), len(self.values.pop())
            out[row - len(codes) : row] = lookup[last - size : last][codes]
            row, last = row - len(codes), last - size
        return out, n_ids


def _parquet_blocks(path: Path, kind: str, name: str) -> Iterator[_Block]:
    import polars as pl

    scan = pl.scan_parquet(path, glob=False)
    schema = scan.collect_schema()
    columns = _pick_columns(name, schema)
    text = (pl.String, pl.Categorical, pl.Enum)
    for field, raw in columns.items():
        dtype = schema[raw]
        is_id = field in ("user", "item")
        if dtype not in text and not (dtype.is_integer() if is_id else dtype.is_numeric()):
            expected = "integers or strings" if is_id else "numbers"
            fail(name, f"column '{field}' is {dtype}, expected {expected}")
    frame = scan.select(pl.col(raw).alias(f) for f, raw in columns.items())
    rows = frame.select(pl.len()).collect().item()
    for start in range(0, rows, BLOCK_ROWS):
        yield _Block(frame.slice(start, BLOCK_ROWS).collect())


def _text_blocks(path: Path, kind: str, name: str) -> Iterator[_Block]:
    """Cut lines at the separator, and from the first quote of a CSV on read as CSV in full."""
    with path.open("rb") as file:
        start = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
        file.seek(start)
        header: list[str] = []
        number = 0  # of lines before `start`
        if kind == ".csv":
            header, number = _read_header(file, name)
            columns = _pick_columns(name, header)
            places = {field: header.index(raw) for field, raw in columns.items()}
            start = file.tell()
        else:
            places = {field: place for place, field in enumerate(_FIELDS)}
        for lines in _whole_lines(file):
            if kind == ".csv" and b'"' in lines:
                file.seek(start)
                yield from _quoted_blocks(file, name, places, len(header), number)
                return
            start += len(lines)
            text = lines.decode().replace("\r\n", "\n").replace("\r", "\n")
            number += text.count("\n")
            yield _plain_block(text, kind, places, len(header))


def _read_header(file: BinaryIO, name: str) -> tuple[list[str], int]:
    """The column names of a CSV, and how many lines they end on; the file stands behind them."""
    start, head = file.tell(), file.read(_HEADER_BYTES)
    ends = start

    def lines() -> Iterator[str]:
        nonlocal ends
        for line in head.splitlines(keepends=True):
            ends += len(line)
            if ends - start == _HEADER_BYTES:
                raise csv.Error(f"the header is longer than {_HEADER_BYTES:,} bytes")
            yield line.decode()

    header, number = next(_csv_rows(lines(), name), ([], 0))
    file.seek(ends)
    return header, number


def _csv_rows(lines: Iterable[str], name: str, number: int = 0) -> Iterator[tuple[list[str], int]]:
    """Rows that are not blank, and the line that each ends on; `number` lines came before."""
    reader = csv.reader(lines, strict=True)
    ends = 0
    try:
        for row in reader:
            ends = reader.line_num
            if len(row) > 1 or (row and row[0].strip()):
                yield row, number + ends
    except csv.Error as error:
        fail(name, f"cannot be read: line {number + ends + 1}: {error}")


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Blocks of lines, which end with a line feed, a carriage return or both."""
    rest = b""
    while chunk := file.read(BLOCK_BYTES):
        if chunk.endswith(b"\r"):
            chunk += file.read(1)  # the two stay together
        end = max(chunk.rfind(b"\n"), chunk.rfind(b"\r")) + 1
        if end:
            yield rest + chunk[:end]
            rest = b""
        rest += chunk[end:]
    if rest:
        yield rest


def _first_not_utf8(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        return next(n for n, line in enumerate(file, 1) if re.search("[\udc80-\udcff]", line))


def _plain_block(text: str, kind: str, places: dict[str, int], header: int) -> _Block:
    import polars as pl

    separator = SEPARATORS[kind]
    lines = pl.Series([text.removesuffix("\n")]).str.split("\n").explode()
    width = lines.str.count_matches(separator, literal=True) + 1
    row = (width > 1) | (lines.str.strip_chars() != "")
    lines, width = lines.filter(row), width.filter(row)
    cut = lines.str.split_exact(separator, max(places.values())).struct.unnest()
    frame = pl.DataFrame({field: cut.to_series(place) for field, place in places.items()})
    if kind == ".csv":
        return _Block(frame, width, width > header, f"fields, the header has {header}")
    expected = f"fields separated by {separator!r}, expected {len(places)} ({', '.join(places)})"
    return _Block(frame, width, width != len(places), expected)


def _quoted_blocks(
    file: BinaryIO, name: str, places: dict[str, int], header: int, number: int
) -> Iterator[_Block]:
    import polars as pl

    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    rows = (row for row, _ in _csv_rows(text, name, number))
    try:
        while block := list(islice(rows, BLOCK_ROWS)):
            cut = {f: [r[at] if at < len(r) else None for r in block] for f, at in places.items()}
            frame = pl.DataFrame(cut, schema=dict.fromkeys(places, pl.String))
            width = pl.Series([len(row) for row in block])
            yield _Block(frame, width, width > header, f"fields, the header has {header}")
    finally:
        text.detach()  # the file is the caller's to close


def _pick_columns(name: str, columns: Iterable[str]) -> dict[str, str]:
    raw = list(columns)
    picked = {}
    for field, aliases in _ALIASES.items():
        matches = [column for column in raw if column.strip().lower() in aliases]
        if len(matches) > 1:
            fail(name, f"more than one column for '{field}' ({', '.join(matches)})")
        if matches:
            picked[field] = matches[0]
        elif field != "timestamp":
            fail(name, f"column '{field}' not found (columns: {', '.join(raw):.300})")
    return picked
