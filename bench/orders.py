"""Two methods on several orders of one stream: paired differences, with orders as the units.

    python bench/orders.py DIR ... [--less A B] [--out FILE.csv]
    python bench/orders.py FILE.csv --less A B

A DIR is the ``--out`` of a comparison that has finished; their ``--order-seed`` differ. --out joins
their ``results.csv``, with the order's seed in front. Of a comparison whose largest size is not
128, as 16, labels get ``,to=16``, so that it can be joined with one of all sizes.

Seeds on one order see the same events, so they are no independent samples of a difference. For each
task and mode: d = loss of A less loss of B, run by run; the mean of d over the seeds of each order;
the mean of these and its 95 % interval by Student's t; and, for comparison, the interval over all
runs, as if they were independent. The same for the accuracy.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from harness.command import Parser, output

from esapn.compare.intervals import Interval, mean_interval
from esapn.compare.records import load
from esapn.config import SearchConfig
from esapn.errors import UserError

Row = dict[str, str]
WIDEST = SearchConfig().sizes[-1]


class OrdersError(UserError):
    """Comparisons that cannot be joined, or a method that they lack; one line."""


def read(path: Path) -> list[Row]:
    """The lines of a comparison's ``results.csv``, with its order; or those of a joined file.

    Raises:
        OrdersError: no finished comparison and no joined file.
        ReportError: a folder that holds no readable comparison.
    """
    own: Row = {}
    file, widest = path, WIDEST
    if path.is_dir():
        file = path / "results.csv"
        configs = [SearchConfig.complete(record.content["config"]) for record in load(path).records]
        orders = {config["order_seed"] for config in configs}
        if len(orders) != 1:
            raise OrdersError(f"{path}: runs of {len(orders)} orders, expected those of one")
        own = {"order_seed": str(orders.pop())}
        widest = configs[0]["sizes"][-1]
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = [own | row for row in csv.DictReader(opened)]
        if widest != WIDEST:
            rows = [_narrow(row, widest) for row in rows]
    except (OSError, UnicodeDecodeError) as error:
        raise OrdersError(f"{file}: cannot be read: {error}") from error
    if not rows or not {"order_seed", "task", "mode", "label", "seed", "loss"} <= rows[0].keys():
        raise OrdersError(f"{file}: holds no runs with their order")
    return rows


def _narrow(row: Row, widest: int) -> Row:
    """A run whose largest size is not 128: its label says so, its plain table is 128 wide too."""
    plain = int(row["fixed128_bytes"]) * WIDEST // widest
    return row | {"label": f"{row['label']},to={widest}", "fixed128_bytes": str(plain)}


def join(parts: Iterable[list[Row]]) -> list[Row]:
    """The runs of several comparisons.

    Raises:
        OrdersError: a run is there twice.
    """
    rows = [row for part in parts for row in part]
    names = ("task", "mode", "label", "order_seed", "seed")
    for key, count in Counter(tuple(row[name] for name in names) for row in rows).items():
        if count > 1:
            raise OrdersError(f"{count} runs of {key[2]} have order {key[3]} and seed {key[4]}")
    return rows


def paired(rows: Sequence[Row], a: str, b: str, measure: str) -> dict[tuple[int, int], float]:
    """Order and seed to the difference of ``measure``, method ``a`` less method ``b``.

    Raises:
        OrdersError: the two have no run in common.
    """
    of: dict[str, dict[tuple[int, int], float]] = {a: {}, b: {}}
    for row in rows:
        if row["label"] in of:
            of[row["label"]][int(row["order_seed"]), int(row["seed"])] = float(row[measure])
    runs = {key: of[a][key] - of[b][key] for key in sorted(of[a].keys() & of[b].keys())}
    if not runs:
        raise OrdersError(f"{a} and {b} have no run with one order and seed in common")
    return runs


def differences(
    rows: Sequence[Row], a: str, b: str, measure: str
) -> tuple[dict[int, float], Interval, Interval]:
    """Paired differences of ``measure``, method ``a`` less method ``b``.

    Args:
        rows: runs of one task and mode.
        a, b: labels.
        measure: a column.

    Returns:
        The mean difference of every order that both ran on, and the mean over orders and over runs
        with their intervals.

    Raises:
        OrdersError: the two have no run in common.

    Example:
        >>> runs = [("a", "0", 1.0), ("a", "1", 2.0), ("b", "0", 0.5), ("b", "1", 2.5)]
        >>> rows = [
        ...     {"label": label, "order_seed": order, "seed": "0", "loss": str(loss)}
        ...     for label, order, loss in runs
        ... ]
        >>> orders, over_orders, _ = differences(rows, "a", "b", "loss")
        >>> orders, over_orders.mean
        ({0: 0.5, 1: -0.5}, 0.0)
    """
    runs = paired(rows, a, b, measure)
    orders = {
        order: mean_interval(d for (o, _), d in runs.items() if o == order).mean
        for order in sorted({order for order, _ in runs})
    }
    return orders, mean_interval(orders.values()), mean_interval(runs.values())


def show(rows: Sequence[Row], pairs: Sequence[Sequence[str]], file: TextIO) -> None:
    """Print means of every method and, for each pair, its differences."""
    for task, mode in sorted({(row["task"], row["mode"]) for row in rows}):
        mine = [row for row in rows if (row["task"], row["mode"]) == (task, mode)]
        print(f"{task}, {mode}", file=file)
        for label in dict.fromkeys(row["label"] for row in mine):
            runs = [row for row in mine if row["label"] == label]
            means = [
                mean_interval(float(row[name]) for row in runs).mean
                for name in ("loss", "accuracy", "serving_bytes", "serving_peak_bytes")
            ]
            print(
                f"  {label}: loss {means[0]:.5f}, accuracy {means[1]:.4f}, {len(runs)} runs; "
                f"{means[2]:,.0f} serving bytes, {means[3]:,.0f} at most",
                file=file,
            )
        for a, b in pairs:
            print(f"  {a} less {b}", file=file)
            for measure in ("loss", "accuracy"):
                orders, over_orders, over_runs = differences(mine, a, b, measure)
                print(
                    f"    {measure} {_shown(over_orders, 'orders')}; {_shown(over_runs, 'runs')}; "
                    f"by order {' '.join(f'{d:+.5f}' for d in orders.values())}",
                    file=file,
                )


def _shown(interval: Interval, units: str) -> str:
    half = "" if interval.half is None else f" +- {interval.half:.5f}"
    return f"{interval.mean:+.5f}{half} ({interval.n} {units})"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints means and differences and returns the exit status."""
    parser = Parser("bench/orders.py", __doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="DIR")
    text = "labels of two methods; may be given again"
    parser.add_argument("--less", nargs=2, metavar=("A", "B"), action="append", help=text)
    parser.add_argument("--out", type=output, metavar="FILE.csv", help="all runs in one file")
    args = parser.parse_args(argv)
    try:
        rows = join(read(path) for path in args.paths)
        show(rows, args.less or [], sys.stdout)
    except UserError as error:
        parser.error(str(error))
    if args.out:
        with args.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
