"""bench/frontier.py: who is compared with whom, orders as the units, and what it refuses."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from scipy import stats

PLAIN = 1000
# Label: bytes, and the loss on three orders.
RUNS = {
    "fixed-4": (40, (0.5, 0.6, 0.7)),
    "fixed-8": (80, (0.4, 0.5, 0.7)),
    "fixed-128": (1000, (0.45, 0.55, 0.75)),
    "counts-8%": (79, (0.3, 0.45, 0.55)),
    "counts-8%,hops=tails": (78, (0.2, 0.3, 0.5)),
    "counts-50%,to=16": (80, (0.35, 0.4, 0.65)),
    "power-4,budget=25%": (250, (0.4, 0.5, 0.6)),
}


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """Two seeds on each order, a tenth above and below its loss."""
    path = tmp_path / "joined.csv"
    with path.open("w", newline="") as file:
        names = ["order_seed", "task", "mode", "label", "seed", "accuracy", "loss"]
        names += ["serving_bytes", "serving_peak_bytes", "fixed128_bytes"]
        writer = csv.writer(file)
        writer.writerow(names)
        for label, (size, losses) in RUNS.items():
            for order, loss in enumerate(losses):
                for seed, more in ((0, 0.1), (1, -0.1)):
                    row = [order, "binary", "tuned", label, seed, 0.75, loss + more]
                    writer.writerow([*row, size, size + seed, PLAIN])
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    from orders import read

    return read(path)


def test_methods_their_families_and_their_bytes(joined):
    from frontier import methods_of

    found = methods_of(rows_of(joined))
    assert [(m.label, m.family) for m in found] == [
        ("fixed-4", "FIXED"),
        ("fixed-8", "FIXED"),
        ("fixed-128", "FIXED"),
        ("counts-8%", "counts"),
        ("counts-8%,hops=tails", "counts, tails"),
        ("counts-50%,to=16", "counts, to 16"),
        ("power-4,budget=25%", "power"),
    ]
    assert found[3].share == pytest.approx(0.079) and found[1].name == "FIXED 8"
    assert found[3].loss == pytest.approx(1.3 / 3) and found[3].units == 3


def test_a_method_that_walked_fewer_orders_stands_by_its_difference(joined):
    from frontier import methods_of

    rows = rows_of(joined)
    fewer = [r for r in rows if r["label"] != "counts-8%" or r["order_seed"] == "1"]
    found = {m.label: m for m in methods_of(fewer)}["counts-8%"]
    # FIXED 128 has a mean of 1.75 / 3, and 0.55 on that order.
    assert found.loss == pytest.approx(1.75 / 3 + 0.45 - 0.55) and found.units == 1


def test_seeds_are_the_units_of_one_order(joined):
    from frontier import difference

    rows = [row for row in rows_of(joined) if row["order_seed"] == "0"]
    for row in rows:
        if row["label"] == "fixed-8" and row["seed"] == "1":
            row["loss"] = "0.4"
    found = difference(rows, "counts-8%", "fixed-8")
    # Seed 0: 0.4 less 0.5, seed 1: 0.2 less 0.4.
    assert found.n == 2 and found.mean == pytest.approx(-0.15)


def test_one_size_of_as_many_bytes_the_best_one_and_the_same_with_padded_hops(joined):
    from frontier import methods_of, pairs

    found = pairs(methods_of(rows_of(joined)))
    assert found["bytes"] == [
        ("counts-8%", "fixed-8"),
        ("counts-8%,hops=tails", "fixed-8"),
        ("counts-50%,to=16", "fixed-8"),
    ]
    assert {b for _, b in found["any"]} == {"fixed-8"} and len(found["any"]) == 4
    assert found["hops"] == [("counts-8%,hops=tails", "counts-8%")]


def test_differences_are_over_orders_with_holms_correction(joined):
    from frontier import compared

    labels = [("counts-8%", "fixed-8"), ("power-4,budget=25%", "fixed-8")]
    found = compared(rows_of(joined), labels)
    expected = stats.ttest_1samp([-0.1, -0.05, -0.15], 0.0)
    interval = expected.confidence_interval(0.95)
    mine = found["counts-8%"]
    assert (mine.mean, mine.n) == (pytest.approx(-0.1), 3)
    assert (mine.low, mine.high) == pytest.approx((interval.low, interval.high))
    assert mine.p == pytest.approx(2 * expected.pvalue)
    other = stats.ttest_1samp([0.0, 0.0, -0.1], 0.0)
    assert found["power-4,budget=25%"].p == pytest.approx(other.pvalue)


def test_the_tables_and_the_figure_are_made(joined, tmp_path, capsys):
    from frontier import main

    picture = tmp_path / "figure.png"
    assert main([f"one=set={joined}".replace("one=set", "a set"), "--figure", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "| counts | 7.9 % | 3 | 0.7500 | 0.43333 | FIXED 8: -0.10000 [" in said
    assert "less the best one size, FIXED 8" in said
    # The budget of all sizes is 80 bytes, that of 2 to 16 a half of 125: both have a peak of 81.
    assert f"No run took more than {81 / 62:.2%} of its budget." in said
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("nowhere.csv", "expected NAME=FILE.csv"),
        ("a=nowhere.csv", "cannot be read"),
    ],
)
def test_what_it_refuses(argument, said, capsys):
    from frontier import main

    with pytest.raises(SystemExit) as left:
        main([argument])
    captured = capsys.readouterr()
    assert left.value.code == 2 and captured.err.count("\n") == 1 and said in captured.err


ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
SETS = re.findall(r'"([^"=]+)=(bench/results/[\w-]+\.csv)"', PAGE)


@pytest.mark.parametrize(("name", "path"), SETS)
def test_the_tables_of_the_comparison_are_those_of_its_records(name, path):
    from frontier import over_cap, table

    rows = rows_of(ROOT / path)
    assert "\n".join(table(name, rows)) in PAGE
    assert over_cap(rows) <= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("1,binary", "1,multiclass"), "several tasks or modes"),
        (lambda text: text.replace("fixed-", "always-dwell-0."), "no run of one size"),
        (lambda text: text.replace(",1000", ","), "lacks one of"),
        (lambda text: text.replace("power-4", "other"), "unknown method"),
    ],
)
def test_files_that_cannot_be_compared(joined, change, said, capsys):
    from frontier import main

    joined.write_text(change(joined.read_text()))
    with pytest.raises(SystemExit) as left:
        main([f"a={joined}"])
    captured = capsys.readouterr()
    assert left.value.code == 2 and captured.err.count("\n") == 1 and said in captured.err


def test_a_set_named_twice_is_refused(joined, capsys):
    from frontier import main

    with pytest.raises(SystemExit):
        main([f"a={joined}", f"a={joined}"])
    assert "a: named twice" in capsys.readouterr().err


def test_the_comparison_has_four_sets():
    assert len(SETS) == 4
