"""bench/orders.py: joined comparisons, differences with orders as the units, and its errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from scipy import stats

from esapn.compare.tables import write_csv
from tests.esapn.fake_comparison import write_comparison


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake gives."""
    from orders import main

    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert left.value.code == 2 and captured.err.count("\n") == 1
    return captured.err


def runs(losses: dict[str, list[list[float]]]) -> list[dict[str, str]]:
    """Rows of ``losses[label][order][seed]``."""
    return [
        {"label": label, "order_seed": str(order), "seed": str(seed), "loss": str(loss)}
        for label, orders in losses.items()
        for order, seeds in enumerate(orders)
        for seed, loss in enumerate(seeds)
    ]


def test_orders_are_the_units():
    from orders import differences

    a = [[0.5, 0.75], [0.25, 1.0], [2.0, 0.0]]
    b = [[0.25, 0.25], [0.5, 0.25], [1.0, 0.25]]
    found, over_orders, over_runs = differences(runs({"a": a, "b": b}), "a", "b", "loss")
    means = [0.375, 0.25, 0.375]
    assert found == dict(enumerate(means))
    each = [0.25, 0.5, -0.25, 0.75, 1.0, -0.25]
    for interval, values in ((over_orders, means), (over_runs, each)):
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
        assert interval.n == len(values)
    # Runs that only one of them made count nowhere.
    fewer, *_ = differences(runs({"a": a, "b": [[0.25], [0.5, 0.25]]}), "a", "b", "loss")
    assert fewer == {0: 0.25, 1: 0.25}


@pytest.fixture
def comparisons(tmp_path: Path) -> list[Path]:
    """Finished ones on two orders; the losses of the second are a tenth lower for `never`."""
    folders = []
    for order in (0, 3):
        folder = tmp_path / f"order-{order}"
        write_comparison(folder, tasks=("binary",), modes=("tuned",))
        for path in (folder / "runs").iterdir():
            content = json.loads(path.read_text())
            content["config"]["order_seed"] = order
            if order and content["label"] == "never":
                content["test"]["loss"] -= 0.1
            path.write_text(json.dumps(content))
        write_csv(folder)
        folders.append(folder)
    return folders


def test_comparisons_are_joined_and_compared(comparisons: list[Path], tmp_path: Path, capsys):
    from orders import main

    out = tmp_path / "all.csv"
    less = ["--less", "never", "always"]
    assert main([*map(str, comparisons), *less, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    with (comparisons[0] / "results.csv").open() as file:
        one = list(csv.DictReader(file))
    assert len(rows) == 2 * len(one)
    assert [row["order_seed"] for row in rows] == ["0"] * len(one) + ["3"] * len(one)
    assert rows[: len(one)] == [{"order_seed": "0", **row} for row in one]

    def mean(label: str, order: str) -> float:
        losses = [float(r["loss"]) for r in rows if (r["label"], r["order_seed"]) == (label, order)]
        return sum(losses) / len(losses)

    gaps = [mean("never", order) - mean("always", order) for order in ("0", "3")]
    (line,) = [x for x in said.splitlines() if x.startswith("    loss ")]
    assert f"loss {sum(gaps) / 2:+.5f} +- " in line and "(2 orders)" in line
    assert line.endswith(f"by order {gaps[0]:+.5f} {gaps[1]:+.5f}")
    assert gaps[1] == pytest.approx(gaps[0] - 0.1, abs=1e-6)
    # The joined file says the same.
    assert main([str(out), *less]) == 0 and capsys.readouterr().out == said


def test_a_smaller_largest_size_is_in_the_label_and_the_plain_table_is_128_wide(comparisons):
    from orders import join, read

    every, small = comparisons
    for path in (small / "runs").iterdir():
        content = json.loads(path.read_text())
        content["config"] |= {"order_seed": 0, "sizes": [2, 4, 8, 16]}
        path.write_text(json.dumps(content))
    rows = join([read(every), read(small)])
    (wide,) = {r["fixed128_bytes"] for r in rows if r["label"] == "never"}
    (narrow,) = {r["fixed128_bytes"] for r in rows if r["label"] == "never,to=16"}
    assert int(narrow) == 8 * int(wide)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.csv", None, "cannot be read"),
        ("empty.csv", "", "holds no runs with their order"),
        ("results.csv", "task,mode,label,seed,loss\nbinary,tuned,a,0,1\n", "holds no runs with"),
    ],
)
def test_files_that_are_refused(name, content, expected, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert expected in refusal(capsys, path)


def test_mistakes(comparisons: list[Path], tmp_path: Path, capsys):
    one = comparisons[0]
    for arguments, expected in {
        (one, one): "2 runs of always have order 0 and seed 0",
        (one, "--less", "never", "nonsense"): "never and nonsense have no run with one order",
        (tmp_path,): "no compare.json",
    }.items():
        assert expected in refusal(capsys, *arguments)
    path = next((one / "runs").iterdir())
    content = json.loads(path.read_text())
    content["config"]["order_seed"] = 9
    path.write_text(json.dumps(content))
    assert "runs of 2 orders, expected those of one" in refusal(capsys, one)
