"""Reading, ordering and counting: every layout, every refusal, every counter against a loop."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esapn.data import Batch, DataError, Ratings, build_stream, load_ratings, synthetic_ratings

pl = pytest.importorskip("polars")

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"

# user, item, rating, timestamp; codes of users 3, 10, 20 are 0, 1, 2 and of items 4, 5, 100 too.
ROWS = [(10, 5, 4.0, 40), (3, 100, 0.5, 30), (10, 100, 3.5, 20), (20, 4, 5.0, 10)]
USER, ITEM = [1, 0, 1, 2], [1, 2, 2, 0]


def make(user, item=None, rating=None, timestamp=None) -> Ratings:
    user = np.asarray(user, np.int64)
    item = user if item is None else np.asarray(item, np.int64)
    rating = np.full(len(user), 4.0) if rating is None else np.asarray(rating)
    timestamp = None if timestamp is None else np.asarray(timestamp, np.int64)
    n_users, n_items = int(user.max()) + 1, int(item.max()) + 1
    return Ratings(user, item, rating.astype(np.float32), timestamp, n_users, n_items, "made", "")


def in_order(user, item=None, rating=None, **options):
    """Build a stream that keeps the order given."""
    ratings = make(user, item, rating, np.arange(len(user)))
    return build_stream(ratings, order="time", **options)


def refusal(call, *args, **options) -> str:
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Counters


def test_counters_by_hand():
    #         batch 0           batch 1
    user = [7, 7, 2, 7, 7] + [7, 2, 2, 7, 1]
    stream = in_order(user, [0] * 10, batch_size=5, history=2)
    assert stream.user_freq.tolist() == [1, 2, 1, 3, 4, 5, 2, 3, 6, 1]
    assert stream.user_last.int().tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 1, 1]
    assert stream.user_keep.int().tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert stream.item_freq.tolist() == list(range(1, 11))
    assert stream.item_last.int().tolist() == [0, 0, 0, 0, 1] * 2
    assert stream.item_keep.int().tolist() == [0, 0, 0, 1, 1] * 2


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=4, max_size=60),
    batch_size=st.integers(2, 12),
    history=st.integers(1, 6),
    order=st.sampled_from(["shuffle", "time"]),
    fraction=st.floats(0.01, 0.99),
)
def test_counters_against_a_loop(ids, batch_size, history, order, fraction):
    batch_size = min(batch_size, len(ids) // 2)
    users, items = [u for u, _ in ids], [i for _, i in ids]
    ratings = make(users, items, np.arange(len(ids)) % 10 / 2 + 0.5, np.arange(len(ids)) // 3)
    stream = build_stream(
        ratings,
        order=order,
        seed=3,
        batch_size=batch_size,
        history=history,
        train_fraction=fraction,
    )
    assert sorted(zip(stream.user.tolist(), stream.item.tolist(), strict=True)) == sorted(ids)
    for side in ("user", "item"):
        codes = getattr(stream, side).tolist()
        freq = [codes[: t + 1].count(code) for t, code in enumerate(codes)]
        left = []
        for start, end in stream.bounds:
            left += [codes[t + 1 : end].count(codes[t]) for t in range(start, end)]
        assert getattr(stream, f"{side}_freq").tolist() == freq
        assert getattr(stream, f"{side}_last").tolist() == [n == 0 for n in left]
        assert getattr(stream, f"{side}_keep").tolist() == [n < history for n in left]
        for index in range(len(stream.bounds)):
            batch = stream.batch(index)._asdict()
            keep = batch[f"{side}_keep"]
            slots = (batch[f"{side}_freq"][keep] - 1) % history
            written = list(zip(batch[side][keep].tolist(), slots.tolist(), strict=True))
            assert len(set(written)) == len(written)
            assert batch[f"{side}_last"].sum() == batch[side].unique().numel()

    starts, ends = zip(*stream.bounds, strict=True)
    sizes = [end - start for start, end in stream.bounds]
    assert starts[0] == 0 and ends[-1] == len(ids) and starts[1:] == ends[:-1]
    assert set(sizes[:-1]) == {batch_size} and 2 <= sizes[-1] <= batch_size + 1
    assert stream.n_train in starts[1:]


def test_dtypes_and_views():
    stream = in_order([0, 1, 0, 1, 2], batch_size=2)
    wanted = dict.fromkeys(Batch._fields, torch.bool)
    wanted |= {"user": torch.int64, "item": torch.int64, "target": torch.float32}
    wanted |= {"user_freq": torch.int32, "item_freq": torch.int32}
    for field, dtype in wanted.items():
        whole, part = getattr(stream, field), getattr(stream.batch(1), field)
        assert whole.dtype == dtype and whole.shape == (5,)
        assert torch.equal(part, whole[2:])
        assert part.data_ptr() == whole[2:].data_ptr()
    assert (stream.n_users, stream.n_items) == (3, 3)


# Targets, order, split

SCALE = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]


def test_targets():
    binary = in_order([0] * 10, rating=SCALE, batch_size=5)
    assert binary.target.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    classes = in_order([0] * 10, rating=SCALE, batch_size=5, task="multiclass")
    assert classes.target.dtype == torch.int64
    assert classes.target.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_time_order_is_stable():
    stream = build_stream(make(range(6), timestamp=[5, 1, 5, 1, 0, 5]), order="time", batch_size=2)
    assert stream.user.tolist() == [4, 1, 3, 0, 2, 5]


def test_shuffle_follows_the_seed_and_moves_rows_whole():
    ratings = make(range(100), 99 - np.arange(100), np.where(np.arange(100) < 30, 5, 1))
    one, same, other = (build_stream(ratings, seed=s, batch_size=10) for s in (1, 1, 2))
    assert one.user.tolist() == np.random.default_rng(1).permutation(100).tolist()
    assert torch.equal(one.user, same.user) and not torch.equal(one.user, other.user)
    assert torch.equal(one.item, 99 - one.user)
    assert torch.equal(one.target, (one.user < 30).float())


@pytest.mark.parametrize(
    ("events", "fraction", "bounds", "n_train"),
    [
        (12, 0.75, [(0, 4), (4, 8), (8, 12)], 8),
        (11, 0.75, [(0, 4), (4, 8), (8, 11)], 8),
        (13, 0.75, [(0, 4), (4, 8), (8, 13)], 8),  # a single event left over
        (13, 0.95, [(0, 4), (4, 8), (8, 13)], 8),  # 12 would cut the merged batch
        (12, 0.01, [(0, 4), (4, 8), (8, 12)], 4),
        (12, 0.99, [(0, 4), (4, 8), (8, 12)], 8),
        (9, 0.75, [(0, 4), (4, 9)], 4),
        (8, 0.75, [(0, 4), (4, 8)], 4),
    ],
)
def test_bounds_and_split(events, fraction, bounds, n_train):
    stream = in_order(range(events), batch_size=4, train_fraction=fraction)
    assert stream.bounds == bounds
    assert stream.n_train == n_train


def test_split_does_not_lose_a_batch_to_rounding():
    assert 0.29 * 100 < 29
    assert in_order(range(100), batch_size=29, train_fraction=0.29).n_train == 29


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "ranking"}, "task"),
        ({"order": "random"}, "order"),
        ({"order": "time"}, "order=shuffle works"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 6}, "fewer than two batches"),
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"train_fraction": 1.0}, "train_fraction"),
        ({"train_fraction": float("nan")}, "train_fraction"),
        ({"history": 0}, "history"),
        ({"seed": -1}, "seed"),
    ],
)
def test_stream_refuses(options, words):
    assert words in refusal(build_stream, make(range(10)), **{"batch_size": 5, **options})


# Files


def as_text(separator: str, rows=ROWS, header: str = "") -> str:
    return header + "".join(separator.join(map(str, row)) + "\n" for row in rows)


def write_frame(path: Path, **columns) -> Path:
    pl.DataFrame(columns).write_parquet(path)
    return path


def columns_of(rows=ROWS) -> dict[str, list]:
    names = ("user", "item", "rating", "timestamp")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def write_layout(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        return write_frame(path, **columns_of())
    if name.endswith(".csv"):
        path.write_text(as_text(",", header="user,item,rating,timestamp\n"))
    else:
        path.write_text(as_text("\t" if name.endswith(".data") else "::"))
    return path


def check_rows(ratings: Ratings, timestamps: bool = True) -> None:
    assert ratings.user.tolist() == USER and ratings.user.dtype == np.int64
    assert ratings.item.tolist() == ITEM and ratings.item.dtype == np.int64
    assert ratings.rating.tolist() == [4.0, 0.5, 3.5, 5.0]
    assert ratings.rating.dtype == np.float32
    assert (ratings.n_users, ratings.n_items) == (3, 3)
    if timestamps:
        assert ratings.timestamp is not None and ratings.timestamp.dtype == np.int64
        assert ratings.timestamp.tolist() == [40, 30, 20, 10]
    else:
        assert ratings.timestamp is None


@pytest.mark.parametrize("name", ["u.data", "ratings.dat", "ratings.csv", "ratings.parquet"])
@pytest.mark.parametrize("as_directory", [True, False])
def test_layouts(tmp_path, name, as_directory):
    path = write_layout(tmp_path, name)
    ratings = load_ratings(tmp_path if as_directory else str(path))
    check_rows(ratings)
    assert ratings.name == name
    assert ratings.checksum == hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_file_names(tmp_path):
    for name in ("mine.DATA", "mine.dat", "mine.csv", "mine.parquet"):
        layout = write_layout(tmp_path, "x" + Path(name).suffix.lower())
        check_rows(load_ratings(layout.rename(tmp_path / name)))


def test_csv_headers_of_movielens_in_any_case_and_order(tmp_path):
    path = tmp_path / "ratings.csv"
    rows = [(t, r, "x", i, u) for u, i, r, t in ROWS]
    path.write_text(as_text(",", rows, header="Timestamp,RATING,genre,movieId,userId\n"))
    check_rows(load_ratings(path))


def test_timestamps_are_optional_and_blanks_and_carriage_returns_harmless(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_bytes(as_text(", ", [r[:3] for r in ROWS], "user,item,rating\n").encode())
    check_rows(load_ratings(path), timestamps=False)
    dat = tmp_path / "ratings.dat"
    dat.write_bytes(as_text("::").replace("\n", "\r\n").encode())
    check_rows(load_ratings(dat))


def test_parquet_dtypes(tmp_path):
    frame = pl.DataFrame(columns_of()).with_columns(
        pl.col("user").cast(pl.UInt16),
        pl.col("item").cast(pl.String).replace({"4": "b", "5": "c", "100": "d"}),
        pl.col("rating").cast(pl.Float32),
        pl.col("timestamp").cast(pl.Float64),
    )
    frame = frame.with_columns(pl.col("item").cast(pl.Categorical))
    frame.write_parquet(tmp_path / "ratings.parquet")
    check_rows(load_ratings(tmp_path))


def test_string_ids_sort_as_strings_and_never_merge(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,rating\n7,z\u00e9,4\n007,a,4\n10,Z,4\n7,a,4\n")
    ratings = load_ratings(path)
    assert ratings.user.tolist() == [2, 0, 1, 2]  # "007" < "10" < "7"
    assert ratings.item.tolist() == [2, 1, 0, 1]
    assert (ratings.n_users, ratings.n_items) == (3, 3)


def test_large_timestamps_are_exact(tmp_path):
    path = tmp_path / "ratings.csv"
    exact = 2**62 + 1
    path.write_text(f"user,item,rating,timestamp\n1,1,4,{exact}\n1,1,4,1700000000.0\n")
    assert load_ratings(path).timestamp.tolist() == [exact, 1_700_000_000]


CSV_REFUSALS = {
    "no column": ("user,item,score\n1,1,4\n", "'rating' not found (columns: user, item, score)"),
    "no user": ("item,rating\n1,4\n", "column 'user' not found"),
    "twice": ("user,userId,item,rating\n1,1,1,4\n", "more than one column for 'user'"),
    "nan": ("user,item,rating\n1,1,4\n1,1,NaN\n", "row 2: rating 'NaN'"),
    "inf": ("user,item,rating\n1,1,inf\n", "row 1: rating 'inf'"),
    "null": ("user,item,rating\n1,1,4\n1,1,4\n1,1,\n1,1,\n", "row 3: rating is missing"),
    "word": ("user,item,rating\n1,1,good\n", "row 1: rating 'good'"),
    "high": ("user,item,rating\n1,1,5\n1,1,5.5\n", "row 2: rating '5.5' is outside 0.5..5"),
    "low": ("user,item,rating\n1,1,0\n", "row 1: rating '0' is outside"),
    "null user": ("user,item,rating\n1,1,4\n,1,4\n", "row 2: user is missing"),
    "empty item": ('user,item,rating\n1," ",4\n', "row 1: item is missing"),
    "short row": ("user,item,rating\n1,1,4\n1,1\n", "row 2: rating is missing"),
    "long row": ("user,item,rating\n1,1,4\n1,1,4,9,9\n", "row 2: 5 fields, the header has 3"),
    "blank line": ("user,item,rating\n1,1,4\n\n1,1,4\n", "row 2: user is missing"),
    "null time": ("user,item,rating,timestamp\n1,1,4,\n", "row 1: timestamp is missing"),
    "word time": ("user,item,rating,timestamp\n1,1,4,now\n", "row 1: timestamp 'now'"),
    "part time": ("user,item,rating,timestamp\n1,1,4,1.5\n", "row 1: timestamp '1.5'"),
    "long time": ("user,item,rating,timestamp\n1,1,4,1e40\n", "row 1: timestamp '1e40'"),
    "lines": ('user,item,rating\n1,1,"a\nb"\n', "row 1: rating 'a\\nb'"),
    "empty": ("", "file is empty"),
    "header only": ("user,item,rating\n", "holds no ratings"),
    "header no end": ("user,item,rating", "holds no ratings"),
}


@pytest.mark.parametrize("case", CSV_REFUSALS)
def test_csv_refuses(tmp_path, case):
    text, words = CSV_REFUSALS[case]
    path = tmp_path / "ratings.csv"
    path.write_text(text)
    message = refusal(load_ratings, path)
    assert message.startswith("ratings.csv: ") and words in message


def test_the_message_of_a_missing_column_in_full(tmp_path):
    (tmp_path / "ratings.csv").write_text("user,item,score\n1,1,4\n")
    wanted = "ratings.csv: column 'rating' not found (columns: user, item, score)"
    assert refusal(load_ratings, tmp_path) == wanted


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ratings.dat", "1::1::4::9\n1::1::4\n", "row 2: 3 fields"),
        ("ratings.dat", "1::1::4::9::9\n", "row 1: 5 fields"),
        ("ratings.dat", "1,1,4,9\n", "row 1: 1 fields"),
        ("ratings.dat", "1::1::4::9\n\n1::1::4::9\n", "row 2: 1 fields"),
        ("ratings.dat", "1::1::4::9\n::1::4::9\n", "row 2: user is missing"),
        ("ratings.dat", "1::1::4::\n", "row 1: timestamp is missing"),
        ("ratings.dat", "1::1::x::9\n", "row 1: rating 'x'"),
        ("ratings.dat", "", "file is empty"),
        ("u.data", "1\t1\t4\t9\n1\t1\t4\n", "row 2: 3 fields"),
        ("u.data", "1\t1\t6\t9\n", "row 1: rating '6' is outside"),
        ("u.data", "1\t1\t4\tx\n", "row 1: timestamp 'x'"),
        ("u.data", "", "file is empty"),
        ("ratings.parquet", "", "file is empty"),
        ("ratings.parquet", "not a parquet file", "cannot be read"),
        ("ratings.txt", "1,1,4\n", "unknown kind of file '.txt'"),
    ],
)
def test_other_files_refuse(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    message = refusal(load_ratings, tmp_path / name)
    assert message.startswith(f"{name}: ") and words in message


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("user", [1, None, 2, 3], "row 2: user is missing"),
        ("user", [1.0, 2.0, 3.0, 4.0], "expected integers or strings"),
        ("item", ["a", "b", None, "c"], "row 3: item is missing"),
        ("rating", [4.0, 4.0, 4.0, float("nan")], "row 4: rating nan"),
        ("rating", [4.0, float("inf"), 4.0, 4.0], "row 2: rating inf"),
        ("rating", [4.0, None, 4.0, 4.0], "row 2: rating is missing"),
        ("rating", [True, False, True, True], "expected numbers"),
        ("rating", [9, 4, 4, 4], "row 1: rating 9 is outside"),
        ("timestamp", [1, 2, 3, None], "row 4: timestamp is missing"),
        ("timestamp", [1.0, 2.5, 3.0, 4.0], "row 2: timestamp 2.5"),
        ("score", [1, 2, 3, 4], None),
    ],
)
def test_parquet_refuses(tmp_path, column, values, words):
    path = write_frame(tmp_path / "ratings.parquet", **{**columns_of(), column: values})
    if words is None:  # a further column is nobody's business
        check_rows(load_ratings(path))
    else:
        message = refusal(load_ratings, path)
        assert message.startswith("ratings.parquet: ") and words in message


def test_parquet_without_rows_or_columns_or_end(tmp_path):
    path = write_frame(tmp_path / "ratings.parquet", user=[], item=[], rating=[])
    assert "ratings.parquet: " in refusal(load_ratings, path)
    write_frame(path, user=[1], item=[1])
    assert "ratings.parquet: column 'rating' not found" in refusal(load_ratings, path)
    data = write_frame(path, **columns_of()).read_bytes()
    for cut in (4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert "ratings.parquet: cannot be read" in refusal(load_ratings, path)


def test_text_that_is_not_utf8(tmp_path):
    for name in ("ratings.csv", "ratings.dat"):
        (tmp_path / name).write_bytes(b"user,item,rating\n\xff,1,4\n")
        assert f"{name}: cannot be read" in refusal(load_ratings, tmp_path / name)


def test_missing_paths(tmp_path):
    assert "nowhere.csv: no such file" in refusal(load_ratings, tmp_path / "nowhere.csv")
    assert "nowhere: no such file" in refusal(load_ratings, str(tmp_path / "nowhere"))
    message = refusal(load_ratings, tmp_path)
    assert str(tmp_path) in message and "u.data, ratings.dat" in message


def test_polars_missing(tmp_path, monkeypatch):
    path = write_layout(tmp_path, "ratings.csv")
    monkeypatch.setitem(sys.modules, "polars", None)
    assert "ratings.csv: " in (message := refusal(load_ratings, path))
    assert "pip install 'esapn-kernels[train]'" in message
    assert len(load_ratings("synthetic", events=1_000).user) == 1_000


# Synthetic stream


def same(a: Ratings, b: Ratings) -> bool:
    pairs = [(a.user, b.user), (a.item, b.item), (a.rating, b.rating), (a.timestamp, b.timestamp)]
    return all(np.array_equal(x, y) for x, y in pairs)


def test_synthetic_follows_the_seed():
    one = load_ratings("synthetic", events=5_000, seed=1)
    assert same(one, synthetic_ratings(5_000, seed=1))
    assert one.checksum == synthetic_ratings(5_000, seed=1).checksum
    other = synthetic_ratings(5_000, seed=2)
    assert one.checksum != other.checksum
    for field in ("user", "item", "rating", "timestamp"):
        assert not np.array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("events", [1, 1_000, 300_000])
def test_synthetic_arrays(events):
    ratings = synthetic_ratings(events)  # the last length takes more than one chunk
    assert ratings.name == "synthetic" and len(ratings.checksum) == 64
    for array in (ratings.user, ratings.item, ratings.timestamp):
        assert array.shape == (events,) and array.dtype == np.int64
    assert ratings.n_users == max(50, events // 20) and ratings.user.max() < ratings.n_users
    assert ratings.n_items == max(50, events // 40) and ratings.item.max() < ratings.n_items
    assert ratings.rating.dtype == np.float32
    assert set(ratings.rating.tolist()) <= set(SCALE)
    assert (np.diff(ratings.timestamp) > 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_synthetic_share_of_positives(seed):
    assert 0.48 < (synthetic_ratings(100_000, seed=seed).rating > 3.5).mean() < 0.62


@pytest.mark.parametrize(("side", "exponent"), [("user", 0.8), ("item", 1.05)])
def test_synthetic_traffic_is_zipf(side, exponent):
    ratings = synthetic_ratings(200_000)
    n = getattr(ratings, f"n_{side}s")
    counts = np.bincount(getattr(ratings, side), minlength=n)
    share = np.sort(counts)[::-1] / len(ratings.user)
    zipf = np.arange(1, n + 1) ** -exponent
    zipf /= zipf.sum()
    head = n // 20
    assert share[0] == pytest.approx(zipf[0], rel=0.05)
    assert share[:head].sum() == pytest.approx(zipf[:head].sum(), rel=0.02)
    # The ID says nothing about its traffic: no rank correlation beyond chance.
    ranks = np.argsort(np.argsort(counts))
    assert abs(np.corrcoef(ranks, np.arange(n))[0, 1]) < 4 / np.sqrt(n)


def test_synthetic_refuses():
    for options in ({"events": 0}, {"n_users": 0}, {"n_items": 0}, {"seed": -1}):
        assert next(iter(options)) in refusal(synthetic_ratings, **options)


def interaction_spectrum(ratings: Ratings, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Eigenvalues of the users' interaction covariance over `items`, largest first.

    Each user's events are halved at random. Noise is independent between the halves, so the mean
    over users of (residual of item i, half A) * (residual of item j, half B) has none of it, and
    centring rows and columns of that matrix takes the users' biases out.
    """
    n = len(items)
    column = np.full(ratings.n_items, -1)
    column[items] = np.arange(n)
    row = np.full(ratings.n_users, -1)
    row[users] = np.arange(len(users))
    chosen = (column[ratings.item] >= 0) & (row[ratings.user] >= 0)
    r, c, y = row[ratings.user[chosen]], column[ratings.item[chosen]], ratings.rating[chosen]
    y = y - (np.bincount(c, y) / np.bincount(c))[c]
    half = np.random.default_rng(0).integers(0, 2, len(y))
    means, seen = [], []
    for side in (0, 1):
        cell = (r * n + c)[half == side]
        count = np.bincount(cell, minlength=len(users) * n)
        total = np.bincount(cell, y[half == side], minlength=len(users) * n)
        means.append((total / np.maximum(count, 1)).reshape(-1, n))
        seen.append((count > 0).astype(float).reshape(-1, n))
    covariance = (means[0].T @ means[1]) / (seen[0].T @ seen[1])
    centre = np.eye(n) - 1 / n
    covariance = centre @ (covariance + covariance.T) / 2 @ centre
    return np.sort(np.linalg.eigvalsh(covariance))[::-1]


@pytest.mark.parametrize("seed", range(3))
def test_popular_ids_carry_variance_beyond_rank_two_and_tail_ids_do_not(seed):
    # All items are popular here (rank 12 at least), so the users' own ranks are what is seen.
    ratings = synthetic_ratings(1_000_000, n_users=10_000, n_items=60, seed=seed)
    traffic = np.bincount(ratings.user, minlength=10_000)
    by_traffic = np.argsort(-traffic)
    items = np.argsort(-np.bincount(ratings.item))[:12]
    head, tail = by_traffic[:100], by_traffic[4_000:]
    assert traffic[head].min() > 24**2 and traffic[tail].max() < 100

    share = {}
    for name, users in (("head", head), ("tail", tail)):
        values = interaction_spectrum(ratings, users, items)
        assert values.sum() > 0.5  # 12 items: there is an interaction to begin with
        share[name] = values[2:].sum() / values.sum()
    assert share["head"] > 0.25
    assert share["tail"] < 0.15


def test_interactions_beat_biases():
    """Rank 0 (biases), 2 and 16 fitted to one half of a head block, scored on the other half."""
    ratings = synthetic_ratings(400_000)
    users = np.argsort(-np.bincount(ratings.user))[:100]
    items = np.argsort(-np.bincount(ratings.item))[:100]
    row, column = np.full(ratings.n_users, -1), np.full(ratings.n_items, -1)
    row[users], column[items] = np.arange(100), np.arange(100)
    chosen = (row[ratings.user] >= 0) & (column[ratings.item] >= 0)
    cell = (row[ratings.user] * 100 + column[ratings.item])[chosen]
    y = ratings.rating[chosen].astype(float)
    fit = np.random.default_rng(0).random(len(y)) < 0.5
    count = np.bincount(cell[fit], minlength=10_000)
    mean = (np.bincount(cell[fit], y[fit], 10_000) / np.maximum(count, 1)).reshape(100, 100)
    mean = np.where(count.reshape(100, 100) > 0, mean, y[fit].mean())
    biases = mean.mean(0) + mean.mean(1, keepdims=True) - mean.mean()
    u, s, v = np.linalg.svd(mean - biases)
    accuracy = {}
    for rank in (0, 2, 16):
        guess = (biases + (u[:, :rank] * s[:rank]) @ v[:rank]).ravel()[cell[~fit]]
        accuracy[rank] = ((guess > 3.75) == (y[~fit] > 3.5)).mean()
    assert accuracy[2] > accuracy[0] + 0.03
    assert accuracy[16] > accuracy[2] + 0.03


# Real data


@pytest.mark.parametrize(
    ("name", "events", "users", "items", "order"),
    [
        ("ml-1m", 1_000_209, 6_040, 3_706, "shuffle"),
        ("ml-100k", 100_000, 943, 1_682, "time"),
    ],
)
def test_real_data(name, events, users, items, order):
    if not (REAL / name).is_dir():
        pytest.skip(f"MovieLens may not be redistributed and {name} is not beside this checkout")
    ratings = load_ratings(REAL / name)
    assert (len(ratings.user), ratings.n_users, ratings.n_items) == (events, users, items)
    stream = build_stream(ratings, order=order)
    assert stream.n_train == int(0.75 * events) // 500 * 500
    assert stream.bounds[-1][1] == events
    for codes, freq in ((stream.user, stream.user_freq), (stream.item, stream.item_freq)):
        last_freq = torch.zeros(int(codes.max()) + 1, dtype=torch.int32)
        last_freq.scatter_reduce_(0, codes, freq, "amax")
        assert torch.equal(last_freq.long(), codes.bincount())
    if order == "time":
        permutation = np.argsort(ratings.timestamp, kind="stable")
        assert stream.user.tolist() == ratings.user[permutation].tolist()
