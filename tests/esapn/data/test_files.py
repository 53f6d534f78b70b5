"""Files of ratings: every layout, every refusal, skipped rows, IDs of any kind."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

import esapn.data.files
from esapn.data.load import load_ratings
from esapn.data.ratings import Ratings
from tests.helpers import install_command, refusal

pl = pytest.importorskip("polars")

# user, item, rating, timestamp; codes of users 3, 10, 20 are 0, 1, 2 and of items 4, 5, 100 too.
ROWS = [(10, 5, 4.0, 40), (3, 100, 0.5, 30), (10, 100, 3.5, 20), (20, 4, 5.0, 10)]
USER, ITEM = [1, 0, 1, 2], [1, 2, 2, 0]


pytestmark = pytest.mark.usefixtures("own_cache")


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
    assert ratings.user.tolist() == USER and ratings.user.dtype == np.int32
    assert ratings.item.tolist() == ITEM and ratings.item.dtype == np.int32
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
    "too large": ("user,item,rating\n1,1,4\n1,1,1e39\n", "row 2: rating '1e39' is not a finite"),
    "null user": ("user,item,rating\n1,1,4\n,1,4\n", "row 2: user is missing"),
    "empty item": ('user,item,rating\n1," ",4\n', "row 1: item is missing"),
    "short row": ("user,item,rating\n1,1,4\n1,1\n", "row 2: rating is missing"),
    "long row": ("user,item,rating\n1,1,4\n1,1,4,9,9\n", "row 2: 5 fields, the header has 3"),
    "blanks": ("user,item,rating\n1,1,4\n\n,,\n", "row 2: user is missing"),
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
        ("ratings.dat", "1::1::4::9\n\n1::1::4\n", "row 2: 3 fields"),
        ("u.data", "1\t1\t4\t9\n\t\t\t\n", "row 2: user is missing"),
        ("ratings.dat", "\n \n\n", "holds no ratings"),
        ("ratings.dat", "1::1::4::9\n::1::4::9\n", "row 2: user is missing"),
        ("ratings.dat", "1::1::4::\n", "row 1: timestamp is missing"),
        ("ratings.dat", "1::1::x::9\n", "row 1: rating 'x'"),
        ("ratings.dat", "", "file is empty"),
        ("u.data", "1\t1\t4\t9\n1\t1\t4\n", "row 2: 3 fields"),
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
        ("rating", [4.0, -1e39, 4.0, 4.0], "row 2: rating -1e+39 is not a finite"),
        ("timestamp", [1, 2, 3, None], "row 4: timestamp is missing"),
        ("timestamp", [1.0, 2.5, 3.0, 4.0], "row 2: timestamp 2.5"),
        ("score", [1, 2, 3, 4], None),
    ],
)
def test_parquet_refuses(tmp_path, column, values, words):
    path = write_frame(tmp_path / "ratings.parquet", **{**columns_of(), column: values})
    if words is None:  # a further column does not matter
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
        for mark in (b"", b'"'):
            text = b"user,item,rating\n" + b"1,1,4\r\n" * 9 + mark + b"\xff" + mark + b",1,4\n"
            (tmp_path / name).write_bytes(text)
            wanted = f"{name}: cannot be read: line 11: not UTF-8 (invalid start byte)"
            assert refusal(load_ratings, tmp_path / name) == wanted


def test_missing_paths(tmp_path):
    assert "nowhere.csv: no such file" in refusal(load_ratings, tmp_path / "nowhere.csv")
    assert "nowhere: no such file" in refusal(load_ratings, str(tmp_path / "nowhere"))
    assert "did you mean" not in refusal(load_ratings, "nowhere")
    for name, meant in (("ml1m", "ml-1m"), ("ml_latest", "ml-latest"), ("sythetic", "synthetic")):
        assert refusal(load_ratings, name).endswith(f"directory; did you mean {meant}?")
    assert "did you mean ml-1m?" in refusal(load_ratings, "ml1m", archive="a.zip")
    message = refusal(load_ratings, tmp_path)
    assert str(tmp_path) in message and "u.data, ratings.dat" in message


def test_names_that_are_patterns_or_too_long(tmp_path):
    check_rows(load_ratings(write_layout(tmp_path, "[a]*.parquet")))
    assert "too long" in refusal(load_ratings, "x" * 5_000)


def test_polars_missing(tmp_path, monkeypatch):
    path = write_layout(tmp_path, "ratings.csv")
    monkeypatch.setitem(sys.modules, "polars", None)
    assert "ratings.csv: " in (message := refusal(load_ratings, path))
    assert install_command(message) == ["pip", "install", "esapn-kernels[train]"]
    assert len(load_ratings("synthetic", events=1_000).user) == 1_000


# Blocks


@pytest.mark.parametrize("size", [1, 7, 16, 40, 1 << 20])
@pytest.mark.parametrize("name", ["u.data", "ratings.dat", "ratings.csv", "ratings.parquet"])
def test_blocks_leave_no_trace(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(esapn.data.files, "BLOCK_BYTES", size)
    monkeypatch.setattr(esapn.data.files, "BLOCK_ROWS", max(size // 16, 1))
    check_rows(load_ratings(write_layout(tmp_path, name)))


@pytest.mark.parametrize("size", [1, 9, 25, 1 << 20])
def test_bad_rows_are_numbered_and_counted_across_blocks(tmp_path, monkeypatch, size):
    monkeypatch.setattr(esapn.data.files, "BLOCK_BYTES", size)
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,rating\n1,1,4\n1,2,y\n1,3,\n\n,4,4\n1,4,x\n1,5,4\n1,6,7.5.\n")
    wanted = "row 2: rating 'y' is not a finite number (3 rows are bad in this way, of 7)"
    assert refusal(load_ratings, path) == f"ratings.csv: {wanted}"


def test_one_bad_row_in_full(tmp_path):
    path = tmp_path / "ratings.dat"
    path.write_text("1::1::4::9\n1::1::4\n")
    assert refusal(load_ratings, path) == (
        "ratings.dat: row 2: 3 fields separated by '::', expected 4 (user, item, rating, "
        "timestamp) (1 row is bad in this way, of 2)"
    )


@pytest.mark.parametrize("size", [1, 30, 1 << 20])
def test_quotes_anywhere_in_a_csv(tmp_path, monkeypatch, size):
    monkeypatch.setattr(esapn.data.files, "BLOCK_BYTES", size)
    monkeypatch.setattr(esapn.data.files, "BLOCK_ROWS", 2)
    path = tmp_path / "ratings.csv"
    text = 'user,"item",rating\n1,x,4\n2,"a,b",3\n"3","c\nd","2"\r\n1,"say ""x""",1\n2,x,5\n'
    path.write_bytes(text.encode())
    ratings = load_ratings(path)
    assert ratings.user.tolist() == [0, 1, 2, 0, 1]
    assert ratings.item.tolist() == [3, 0, 1, 2, 3]  # 'a,b' < 'c\nd' < 'say "x"' < 'x'
    assert ratings.rating.tolist() == [4, 3, 2, 1, 5]
    path.write_text(text + '1,"a"\n1,"b",3,3\n')
    ratings = load_ratings(path, malformed="skip")
    reasons = {"rating is missing": 1, "wrong number of fields": 1}
    assert ratings.counts == counts(5, unsorted=0, skipped=2, **reasons)


def test_an_open_quote_is_refused_and_not_skipped(tmp_path):
    path = tmp_path / "ratings.csv"
    wanted = "ratings.csv: cannot be read: line 5: unexpected end of data"
    for end in ("\n", "\r", "\r\n"):
        text = 'user,item,rating|1,1,4|"1\n",2,4|1,"2,4|1,3,4|'.replace("|", end)
        path.write_text(text, newline="")
        for malformed in ("refuse", "skip"):
            assert refusal(load_ratings, path, malformed=malformed) == wanted


def test_byte_order_mark_and_blank_lines_before_the_header(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_bytes(b"\xef\xbb\xbf\n\nuser,item,rating\n1,1,4")
    assert load_ratings(path).rating.tolist() == [4]
    # A mark is no part of the first ID either.
    for name in ("u.data", "ratings.dat"):
        path = write_layout(tmp_path, name)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        check_rows(load_ratings(path))


@pytest.mark.parametrize("size", [1, 9, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("quoted", [False, True])
def test_blank_lines_are_no_rows(tmp_path, monkeypatch, size, end, quoted):
    monkeypatch.setattr(esapn.data.files, "BLOCK_BYTES", size)
    monkeypatch.setattr(esapn.data.files, "BLOCK_ROWS", 2)
    for name, separator in (("u.data", "\t"), ("ratings.dat", "::"), ("ratings.csv", ",")):
        lines = [separator.join(map(str, row)) for row in ROWS]
        if name == "ratings.csv":
            lines = ["user,item,rating,timestamp", *lines]
            if quoted:
                lines[1] = '"10",5,4.0,40'
        blank = ["", "", " ", "\x0c", "\xa0"] + ["\t"] * (separator != "\t")
        spread = [*blank, lines[0], *blank, lines[1], "", *lines[2:], *blank, ""]
        path = tmp_path / name
        path.write_text(end.join(spread), encoding="utf-8", newline="")
        ratings = load_ratings(path)
        check_rows(ratings)
        assert ratings.counts == counts(4, duplicates=0, unsorted=3)


@pytest.mark.parametrize("size", [7, 1 << 20])
@pytest.mark.parametrize("header_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_ends_of_lines_may_differ(tmp_path, monkeypatch, size, header_end, end):
    monkeypatch.setattr(esapn.data.files, "BLOCK_BYTES", size)
    path = tmp_path / "ratings.csv"
    text = as_text(",").replace("\n", end, 2)
    for mark in ("", '"'):
        text = text.replace("100", f"{mark}100{mark}")
        path.write_text(f"user,item,rating,timestamp{header_end}{text}", newline="")
        check_rows(load_ratings(path))


def test_a_long_file_of_carriage_returns(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,rating\r" + "1,1,4\r" * 200_000, newline="")
    assert len(load_ratings(path).user) == 200_000


HEADERS = {
    "field": (f"\nuser,item,rating,{'x' * 131_073}\n1,1,4\n", "line 2: field larger than field"),
    "long": (f"user,item,rating{',abcdefg' * 200_000}\n1,1,4\n", "line 1: the header is longer"),
    "open": ('user,item,rating,"genre\n1,1,4\n', "cannot be read: line 1: unexpected end"),
    "after": ('user,item,rating,"gen"re\n1,1,4\n', "cannot be read: line 1: "),
    "blanks": ("\n" * (1 << 20), "line 1048576: the header is longer"),
    "utf-16": ("user,item,rating\n1,1,4\n".encode("utf-16"), "line 1: not UTF-8"),
    "nul": ("u\0s\0e\0r,item,rating\n1,1,4\n", ""),
    "nul body": ("user,item,rating\n1,1,4\n\0\0\0", "row 2: "),
    "escape": ("user,item,\x1b[31mrating\n1,1,4\n", "item, \\x1b[31mrating)"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_no_reader_takes(tmp_path, case):
    content, words = HEADERS[case]
    path = tmp_path / "ratings.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for malformed in ("refuse", "skip")[: 1 if case == "nul body" else 2]:
        message = refusal(load_ratings, path, malformed=malformed)
        assert message.startswith("ratings.csv: ") and words in message
        assert message.isprintable() and len(message) < 1_000


def test_a_header_of_several_lines(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text('"the\nuser",user,item,"a ""b""\r\nc",rating\nx,1,2,y,4\nx,2,2,"y",3\n')
    ratings = load_ratings(path)
    assert ratings.rating.tolist() == [4, 3] and ratings.user.tolist() == [0, 1]


# Malformed rows


def counts(rows, duplicates=0, unsorted=0, skipped=0, **reasons) -> dict[str, int]:
    total = {"rows": rows, "duplicates": duplicates, "unsorted": unsorted, "skipped": skipped}
    return total | reasons


def test_skipped_rows_are_counted_by_reason_and_reported(tmp_path, capsys):
    path = tmp_path / "ratings.csv"
    good = "1,1,4,10\n1,2,4.5,20\n3,1,0.5,20\n"
    bad = ",1,4,1\n1,,4,1\n1,1,,1\n1,1,4,\n1,1\n,,,\n\n1,1,4,1,1\n1,1,good,1\n1,1,nan,1\n"
    bad += "1,1,inf,1\n1,1,0.4,1\n1,1,5.1,1\n1,1,4,now\n1,1,4,1.5\n9,9,9,x,9\n"
    path.write_text("user,item,rating,timestamp\n" + bad + good + bad)
    reasons = {
        "wrong number of fields": 4,
        "user is missing": 4,
        "item is missing": 2,
        "rating is missing": 4,
        "timestamp is missing": 2,
        "rating is not a finite number": 6,
        "rating is outside 0.5..5": 4,
        "timestamp is not a finite number": 2,
        "timestamp is not a whole number": 2,
    }
    ratings = load_ratings(path, malformed="skip", five_classes=True)
    assert ratings.counts == counts(3, skipped=30, **reasons)
    assert sum(reasons.values()) == 30
    assert ratings.user.tolist() == [0, 0, 1] and ratings.n_users == 2  # 9 is no user
    assert ratings.item.tolist() == [0, 1, 0] and ratings.n_items == 2
    assert ratings.rating.tolist() == [4, 4.5, 0.5] and ratings.timestamp.tolist() == [10, 20, 20]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("ratings.csv: skipped 30 of 33 rows (")
    for reason, count in reasons.items():
        assert f"{reason}: {count}" in said
    again = load_ratings(path, malformed="skip", five_classes=True)
    assert again.counts == ratings.counts and capsys.readouterr().err == said
    # Columns that lack rows are not those of a reading that refuses such rows.
    assert "row 1: user is missing (4 rows are bad" in refusal(load_ratings, path)
    again = load_ratings(path, malformed="skip", five_classes=True)
    assert again.counts == ratings.counts
    # Of any rating, four rows more.
    other = load_ratings(path, malformed="skip")
    del reasons["rating is outside 0.5..5"]
    expected = counts(7, skipped=26, **reasons)
    assert {k: n for k, n in other.counts.items() if k in reasons or k in ("rows", "skipped")} == {
        k: n for k, n in expected.items() if k not in ("duplicates", "unsorted")
    }


def test_skipping_in_headerless_files_and_parquet(tmp_path):
    for name, separator in (("u.data", "\t"), ("ratings.dat", "::")):
        path = tmp_path / name
        path.write_text("1|1|4|9\n1|1|4\n1|1|4|9|9\n1|2|6|9\n".replace("|", separator))
        ratings = load_ratings(path, malformed="skip", five_classes=True)
        reasons = {"wrong number of fields": 2, "rating is outside 0.5..5": 1}
        assert ratings.counts == counts(1, skipped=3, **reasons)
    columns = columns_of() | {"rating": [4.0, float("nan"), None, 5.0]}
    path = write_frame(tmp_path / "ratings.parquet", **columns)
    ratings = load_ratings(path, malformed="skip")
    reasons = {"rating is missing": 1, "rating is not a finite number": 1}
    assert ratings.counts == counts(2, unsorted=1, skipped=2, **reasons)
    assert ratings.user.tolist() == [0, 1] and ratings.rating.tolist() == [4, 5]


def test_nothing_left_after_skipping(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,rating\n1,1,\n1,1,x\n")
    wanted = "ratings.csv: every row is malformed; row 1: rating is missing"
    assert refusal(load_ratings, path, malformed="skip") == wanted
    path.write_text("user,item,rating\n1,1,9\n1,1,x\n")
    wanted = "ratings.csv: every row is malformed; rating 9 is outside 0.5..5"
    assert refusal(load_ratings, path, malformed="skip", five_classes=True) == wanted


# Ratings on other scales


@pytest.mark.parametrize("name", ["u.data", "ratings.dat", "ratings.csv", "ratings.parquet"])
def test_any_finite_rating_is_read(tmp_path, name):
    values = [10.0, -3.0, 0.0, 250.5]
    if name == "ratings.parquet":
        path = write_frame(tmp_path / name, **columns_of() | {"rating": values})
    else:
        separator = {"u.data": "\t", "ratings.dat": "::", "ratings.csv": ","}[name]
        rows = [
            (user, item, rating, t) for (user, item, _, t), rating in zip(ROWS, values, strict=True)
        ]
        header = "user,item,rating,timestamp\n" if name == "ratings.csv" else ""
        path = tmp_path / name
        path.write_text(as_text(separator, rows, header=header))
    ratings = load_ratings(path)
    assert ratings.rating.dtype == np.float32 and ratings.rating.tolist() == values
    assert ratings.user.tolist() == USER and ratings.counts["skipped"] == 0


@pytest.mark.parametrize("cached", [False, True])
def test_five_classes_refuse_other_scales(tmp_path, cached):
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,rating\n1,1,5\n1,2,0.5\n7,3,5.5\n1,4,0\n\n1,5,4\n")
    if cached:
        load_ratings(path)
    wanted = "row 3: rating 5.5 is outside 0.5..5 (2 rows are bad in this way, of 5)"
    assert refusal(load_ratings, path, five_classes=True) == f"ratings.csv: {wanted}"
    path.write_text("user,item,rating\n1,1,5\n1,1,0.4\n")
    wanted = "row 2: rating 0.4 is outside 0.5..5 (1 row is bad in this way, of 2)"
    assert refusal(load_ratings, path, five_classes=True) == f"ratings.csv: {wanted}"


def test_five_classes_leave_out_other_scales(tmp_path, capsys):
    path = tmp_path / "u.data"
    rows = [(9, 1, 4, 10), (2, 4, 6, 9), (5, 3, 2, 11), (9, 1, 0, 12), (9, 3, 5, 8)]
    path.write_text(as_text("\t", rows))
    every = load_ratings(path, malformed="skip")
    assert every.counts == counts(5, duplicates=1, unsorted=2) and capsys.readouterr().err == ""
    ratings = load_ratings(path, malformed="skip", five_classes=True)
    reasons = {"rating is outside 0.5..5": 2}
    assert ratings.counts == counts(3, unsorted=1, skipped=2, **reasons)
    assert (ratings.user.tolist(), ratings.n_users) == ([1, 0, 1], 2)
    assert (ratings.item.tolist(), ratings.n_items) == ([0, 1, 1], 2)
    assert ratings.rating.tolist() == [4, 2, 5] and ratings.timestamp.tolist() == [10, 11, 8]
    assert ratings.user.dtype == every.user.dtype == np.int32
    assert ratings.checksum == every.checksum
    said = "u.data: skipped 2 of 5 rows (rating is outside 0.5..5: 2)\n"
    assert capsys.readouterr().err == said


def test_duplicates_and_unsorted_rows_are_kept_and_counted(tmp_path):
    path = tmp_path / "u.data"
    rows = [(1, 1, 4, 10), (1, 2, 4, 9), (1, 1, 2, 11), (2, 1, 4, 11), (1, 1, 4, 10), (2, 2, 3, 8)]
    path.write_text(as_text("\t", rows))
    ratings = load_ratings(path)
    assert ratings.counts == counts(6, duplicates=2, unsorted=3)
    assert ratings.rating.tolist() == [4, 4, 2, 4, 4, 3]
    assert ratings.timestamp.tolist() == [10, 9, 11, 11, 10, 8]


# IDs


@pytest.mark.parametrize("kind", ["csv", "quoted", "parquet"])
def test_ids_beyond_31_and_63_bits(tmp_path, kind):
    users = [2**31, 2**31 - 1, 2**63 - 1, 5, -(2**63)]
    items = [2**63, 10, 9, 2**63, 7]  # one ID that no int64 holds: all of them sort as text
    path = tmp_path / ("ratings.parquet" if kind == "parquet" else "ratings.csv")
    if kind == "parquet":
        write_frame(path, user=users, item=[str(i) for i in items], rating=[4.0] * 5)
    else:
        mark = '"' if kind == "quoted" else ""
        lines = [f"{mark}{u}{mark},{i},4" for u, i in zip(users, items, strict=True)]
        path.write_text("\n".join(["user,item,rating", *lines]))
    ratings = load_ratings(path)
    assert ratings.user.tolist() == [3, 2, 4, 1, 0]
    assert ratings.item.tolist() == [3, 0, 2, 3, 1]  # "10" < "7" < "9" < "9223372036854775808"


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_integers_and_strings_in_different_blocks(tmp_path, monkeypatch, size):
    monkeypatch.setattr(esapn.data.files, "BLOCK_BYTES", size)
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,rating\n10,10,4\n9,9,4\n10,x,4\n7,9,4\n")
    ratings = load_ratings(path)
    assert ratings.user.tolist() == [2, 1, 2, 0]  # 7 < 9 < 10
    assert ratings.item.tolist() == [0, 1, 2, 1]  # "10" < "9" < "x"


def test_unsigned_ids_of_a_parquet_file(tmp_path):
    path = tmp_path / "ratings.parquet"
    user = pl.Series([2**64 - 1, 3, 2**63], dtype=pl.UInt64)
    pl.DataFrame({"user": user, "item": [1, 1, 1], "rating": [1, 2, 3]}).write_parquet(path)
    assert load_ratings(path).user.tolist() == [2, 0, 1]


# Arguments


def test_arguments_that_do_not_fit(tmp_path):
    path = write_layout(tmp_path, "ratings.csv")
    assert "malformed must be refuse or skip, got 'drop'" in refusal(
        load_ratings, path, malformed="drop"
    )
    for data in (path, "synthetic", Path("ml-100k")):
        assert "archive is for one of ml-100k" in refusal(load_ratings, data, archive=path)
        assert "url is for one of ml-100k" in refusal(load_ratings, data, url="http://x/")
