"""Tables of a group and ``results.csv``: their numbers are those of the records."""

from __future__ import annotations

import csv
import math

import pytest

from esapn.compare.contrasts import same_bytes
from esapn.compare.formats import signed
from esapn.compare.records import BYTES, Group, load
from esapn.compare.tables import (
    PageTable,
    bytes_table,
    contrast_tables,
    cost_table,
    measure_table,
    method_table,
    place,
    result_table,
    size_table,
    write_csv,
)
from tests.esapn.fake_comparison import METHODS, loss_of, write_comparison


def made_up(folder, *, modes=("tuned",), seeds=(0, 1, 2), task="binary", **options) -> Group:
    write_comparison(folder / "out", tasks=(task,), modes=modes, seeds=seeds, **options)
    return load(folder / "out").groups[0]


def rows_of(table: PageTable) -> dict[str, list[str]]:
    """First cell to row; every row is as long as the head."""
    assert all(len(row) == len(table.columns) for row in table.rows)
    return {row[0]: list(row) for row in table.rows}


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> Group:
    return made_up(tmp_path_factory.mktemp("comparison"), modes=("paper",), seeds=range(5))


def test_results_are_short_and_differences_are_the_methods_less_the_reference(tuned):
    table = result_table(tuned)
    rows = rows_of(table)
    assert table.columns[:4] == ["method", "bytes", "MSE", "accuracy %"]
    assert (
        table.columns[4] == "MSE × 1000, less esapn-rich" and rows.keys() == METHODS["tuned"].keys()
    )
    assert [table.rows[i][0] for i in table.marked] == ["esapn-rich"]
    assert rows["esapn-rich"][4] == "–"
    for label in ("biases", "fixed-2"):
        losses = [loss_of("binary", "tuned", label, seed) for seed in range(5)]
        d = [x - loss_of("binary", "tuned", "esapn-rich", s) for s, x in enumerate(losses)]
        mean = sum(d) / 5
        half = 2.776445 * math.sqrt(sum((x - mean) ** 2 for x in d) / 4 / 5)
        assert rows[label][2] == f"{sum(losses) / 5:.3g}"
        shown = [signed(1000 * x, 2) for x in (mean, mean - half, mean + half)]
        assert rows[label][4] == f"{shown[0]} [{shown[1]}, {shown[2]}]"
    assert "128 wide" in table.note


def test_results_without_a_reference_have_no_differences(tmp_path):
    gone = {f"binary-tuned-esapn-rich-s{seed}" for seed in range(3)}
    table = result_table(made_up(tmp_path, labels={"esapn-rich", "biases"}, skip=gone))
    assert table.columns == ["method", "bytes", "MSE", "accuracy %"]
    assert table.rows[-1] == ["esapn-rich", "–", "–", "–"] and not table.marked


def test_measures_are_means_of_the_records(tuned):
    table = measure_table(tuned)
    head, rows = table.columns, rows_of(table)
    assert head[:4] == ["method", "seeds", "front", "accuracy %"] and "log loss" in head
    assert rows.keys() == METHODS["tuned"].keys()
    for label, row in rows.items():
        losses = [loss_of("binary", "tuned", label, seed) for seed in range(5)]
        mean = sum(losses) / 5
        half = 2.776445 * math.sqrt(sum((x - mean) ** 2 for x in losses) / 4 / 5)
        assert row[head.index("MSE")] == f"{mean:.5f} ± {half:.5f}"
    means = [float(row[head.index("MSE")].split()[0]) for row in rows.values()]
    assert means == sorted(means)
    assert [table.rows[i][0] for i in table.marked] == ["esapn-rich"]


def test_several_classes_have_cross_entropy_and_no_auc(tmp_path):
    group = made_up(tmp_path, task="multiclass", labels={"esapn-rich", "biases"})
    table = measure_table(group)
    assert "cross-entropy" in table.columns and not {"AUC", "log loss", "MSE"} & set(table.columns)
    mean = sum(loss_of("multiclass", "tuned", "biases", seed) for seed in range(3)) / 3
    assert rows_of(table)["biases"][4].startswith(f"{mean:.5f} ±")
    assert "The log loss of several classes is their cross-entropy." in table.note


def test_missing_seeds_and_methods_are_shown(tmp_path):
    gone = {f"binary-tuned-esapn-rich-s{seed}" for seed in range(3)} | {"binary-tuned-always-s1"}
    labels = {"esapn-rich", "always", "biases"}
    table = measure_table(made_up(tmp_path, labels=labels, skip=gone))
    rows = rows_of(table)
    assert {label: row[1] for label, row in rows.items()} == {
        "biases": "3",
        "always": "2",
        "esapn-rich": "0",
    }
    assert table.rows[-1][:3] == ["esapn-rich", "0", "–"] and not table.marked
    assert "Seeds are missing" in table.note


def test_differences_and_verdicts(tuned):
    pairs, losses, accuracies = contrast_tables(tuned)
    assert pairs.title == "esapn-rich against every other method"
    cells = rows_of(pairs)
    assert cells.keys() == METHODS["tuned"].keys() - {"esapn-rich"}
    assert cells["biases"][3].startswith("−0.00335 [−0.00349, −0.0032")
    assert cells["biases"][5] == "better" and cells["fixed-128"][5] == "worse"
    assert cells["always"][5] == "no difference shown"
    assert losses.title == "At the same serving bytes: MSE"
    assert accuracies.title == "At the same serving bytes: accuracy"
    where = {name: row[1] for name, row in rows_of(losses).items()}
    assert where == {name: row[1] for name, row in rows_of(accuracies).items()}
    assert where["fixed (6)"] == "between fixed-8 and fixed-16"
    assert where["biases (1)"] == "only member, biases, with fewer bytes: 51,899"
    assert where["always (1)"].startswith("only member, always, with more bytes: 4,7")


def test_a_family_that_begins_above_the_reference(paper):
    (fixed,) = (c for c in same_bytes(paper) if c.name == "fixed")
    assert place(fixed) == "smallest of the family, fixed-128, with more bytes: 4,989,952"


def test_without_a_reference_there_are_no_contrasts(tmp_path):
    assert contrast_tables(made_up(tmp_path, labels={"fixed-4", "biases"})) == []


def test_one_seed_has_no_interval(tmp_path):
    group = made_up(tmp_path, labels={"esapn-rich", "fixed-8", "fixed-16"}, seeds=(4,))
    for table in (result_table(group), cost_table(group)):
        assert not any("±" in cell for row in table.rows for cell in row)
    row = contrast_tables(group)[1].rows[0]
    assert row[4].endswith("(one seed)") and row[5:] == ["–", "one seed"]


def test_costs(tuned):
    table = cost_table(tuned)
    assert table.columns[3:5] == ["events / s", "peak memory MB"]
    row = rows_of(table)["biases"]
    rates = [record.content["events_per_second"] for record in tuned.of("biases")]
    assert row[3].startswith(f"{sum(rates) / 5:,.0f} ± ") and row[4].startswith("414.0 ± ")


def test_memory_in_the_published_form(paper):
    table = size_table(paper, "user")
    sizes = ["2", "4", "8", "16", "64", "128"]
    head = ["users at size", *sizes, "other sizes", "total dims", "IDs × 128", "ratio"]
    assert table.title == "Final sizes of the users" and table.columns == head
    cells = rows_of(table)
    assert cells["darts"][7:] == ["222: 6,040", "1,340,880", "773,120", "173.44\xa0%"]
    counts = [int(cell.replace(",", "")) for cell in cells["esapn"][1:7]]
    dims = sum(int(size) * n for size, n in zip(sizes, counts, strict=True))
    assert sum(counts) == 6040 and cells["esapn"][8] == f"{dims:,}"
    assert rows_of(bytes_table(paper))["fixed-128"][1:3] == ["4,989,952", "128"]


def test_refused_rows_are_shown_where_there_are_any(tmp_path):
    paper = made_up(tmp_path, modes=("paper",))
    plain = bytes_table(paper)
    for record in paper.of("esapn"):
        record.content["bytes"] |= {"budget": 90_000, "refused": 6}
    found = bytes_table(paper)
    assert [*plain.columns, "budget", "rows refused"] == found.columns
    assert rows_of(found)["esapn"][-2:] == ["90,000", "6"]
    assert rows_of(found)["fixed-128"][-2:] == ["0", "0"] and "no room" in found.note
    for record in paper.of("esapn"):
        record.content["bytes"] |= {"refused": 0}
    assert bytes_table(paper) == plain


def test_methods(tmp_path):
    write_comparison(tmp_path / "out", tasks=("binary",), seeds=(0,), labels={"fixed-4", "esapn"})
    table = method_table(load(tmp_path / "out"))
    assert table.rows == [
        ["esapn", "paper", "esapn", "what esapn does", "–"],
        ["esapn", "tuned", "esapn", "what esapn does", "–"],
        ["fixed-4", "tuned", "fixed", "what fixed-4 does", "size 4"],
    ]
    assert table.marked == {0}


def test_csv_has_a_line_for_each_record(tmp_path):
    def change(record):
        if record["label"] == "biases":
            record["test"] |= {"auc": math.nan, "log_loss": None}

    labels = ("fixed-4", "esapn-rich", "biases")
    group = made_up(tmp_path, labels=labels, seeds=(0, 3), change=change)
    with write_csv(tmp_path / "out").open(newline="") as file:
        rows = list(csv.DictReader(file))
    about = [("biases", 0), ("biases", 3), ("esapn-rich", 0), ("esapn-rich", 3)]
    about += [("fixed-4", 0), ("fixed-4", 3)]
    assert [(row["label"], int(row["seed"])) for row in rows] == about
    for row in rows:
        assert (row["task"], row["mode"]) == ("binary", "tuned")
        record = next(r for r in group.of(row["label"]) if r.seed == int(row["seed"]))
        assert row["family"] == record.family
        for name in ("loss", "accuracy", "log_loss", "auc"):
            value = record.value(name)
            assert row[name] == ("" if value is None else f"{value:.6f}")
        for name in BYTES:
            assert int(row[f"{name}_bytes"]) == round(record.content["bytes"][name])
        assert float(row["cpu_seconds"]) == pytest.approx(record.content["cpu_seconds"], abs=0.06)
