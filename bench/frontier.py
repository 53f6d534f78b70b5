"""Quality over serving bytes on several orders: tables, and a figure of all sets.

    python bench/frontier.py NAME=FILE.csv ... [--figure FILE.png]

A FILE is what ``bench/orders.py --out`` joined. Orders are the units, or seeds where there is one
order: a difference is paired by order and seed, and has Student's 95 % interval over orders. Orders
differ more than methods do, and not every method walked all of them: a method's loss is that of the
widest one size, over all orders, and the mean difference to it over those that both walked. Every
method is compared with

    its bytes   the one size (FIXED) of its bytes, where there is one
    any size    the one size of the least mean loss
    hops        with tails: the same method with padded hops

Holm's correction is over all differences of one kind and set; what is clear after it is bold. Seeds
of one order are no independent samples: where they are the units, nothing is bold. The figure has a
line for each family: its loss less that of the widest one size, with the interval as its band.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.command import Parser, output
from orders import WIDEST, OrdersError, Row, paired, read

from esapn.compare.formats import signed
from esapn.compare.intervals import Difference, difference_of, holm, mean_interval
from esapn.config import tuned_name
from esapn.errors import UserError
from esapn.methods import method_settings
from esapn_kernels.budget import budget_bytes

FIXED = "FIXED"
COLUMNS = ("accuracy", "loss", "serving_bytes", "serving_peak_bytes", "fixed128_bytes")
FAMILIES = {
    "fixed": FIXED,
    "counts": "counts",
    "counts,hops=tails": "counts, tails",
    "power": "power",
    "esapn": "ESAPN, no budget",
    "esapn-dwell": "ESAPN",
}
STYLES = {
    FIXED: ("#000000", "-", "o"),
    "counts": ("#0072B2", "-", "s"),
    "counts, tails": ("#D55E00", "-", "D"),
    "counts, to 16": ("#0072B2", "--", "s"),
    "counts, tails, to 16": ("#D55E00", "--", "D"),
    "power": ("#009E73", ":", "v"),
    "ESAPN": ("#CC79A7", "-", "^"),
    "ESAPN, to 16": ("#CC79A7", "--", "^"),
}
"""Colour, line and marker of the families that the figure shows."""


@dataclass(frozen=True)
class Shown:
    """A method's means over orders, its family, and its bytes as a share of ids x 128 floats."""

    label: str
    family: str
    name: str
    share: float
    accuracy: float
    loss: float
    units: int


def family_of(label: str) -> str:
    """A method's family in words.

    Example:
        >>> family_of("counts-50%,hops=tails,to=16"), family_of("fixed-8")
        ('counts, tails, to 16', 'FIXED')
        >>> family_of("esapn,budget=6.25%")
        'ESAPN, no dwell'
    """
    label, _, widest = label.partition(",to=")
    settings = method_settings(label)[1]
    name = tuned_name(settings)
    if name.startswith("fixed-"):
        # With settings of its own, or beside another largest size, it is no row of the table's own.
        return FIXED if label == f"fixed-{settings['fixed_size']}" and not widest else label
    words = [FAMILIES.get(name, name)]
    words += ["no dwell"] if name == "esapn-dwell" and not settings.get("dwell") else []
    words += ["decayed"] if settings.get("half_life") else []
    words += [f"to {widest}"] if widest else []
    return ", ".join(words)


def name_of(label: str, family: str) -> str:
    """What a table calls a method: its bytes stand beside it."""
    return f"{FIXED} {label.removeprefix('fixed-')}" if family == FIXED else family


def methods_of(rows: Sequence[Row]) -> list[Shown]:
    """Every method of a set, one size first, then by family and bytes."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    widest = _widest(rows)
    base = {name: _mean(rows, widest, name) for name in ("accuracy", "loss")}
    found = []
    for label in labels:
        family = family_of(label)
        plain = float(next(row["fixed128_bytes"] for row in rows if row["label"] == label))
        less = {name: difference(rows, label, widest, name) for name in base}
        found.append(
            Shown(
                label,
                family,
                name_of(label, family),
                _mean(rows, label, "serving_bytes") / plain,
                base["accuracy"] + less["accuracy"].mean,
                base["loss"] + less["loss"].mean,
                less["loss"].n,
            )
        )
    families = list(dict.fromkeys([FIXED, *STYLES, *(shown.family for shown in found)]))
    return sorted(found, key=lambda shown: (families.index(shown.family), shown.share))


def _widest(rows: Sequence[Row]) -> str:
    """The label of the widest one size."""
    fixed = {row["label"] for row in rows if family_of(row["label"]) == FIXED}
    return max(fixed, key=lambda label: int(label.removeprefix("fixed-")))


def _one_order(rows: Sequence[Row]) -> bool:
    """Whether seeds are the units."""
    return len({row["order_seed"] for row in rows}) == 1


def _mean(rows: Sequence[Row], label: str, name: str) -> float:
    """The mean over orders of the mean over the seeds of each."""
    orders: dict[str, list[float]] = {}
    for row in rows:
        if row["label"] == label:
            orders.setdefault(row["order_seed"], []).append(float(row[name]))
    return mean_interval(mean_interval(values).mean for values in orders.values()).mean


def difference(rows: Sequence[Row], a: str, b: str, name: str = "loss") -> Difference:
    """Method ``a`` less method ``b``, over orders; over seeds where all runs are of one order."""
    runs = paired(rows, a, b, name)
    if _one_order(rows):
        return difference_of(runs.values())
    orders: dict[int, list[float]] = {}
    for (order, _), value in runs.items():
        orders.setdefault(order, []).append(value)
    return difference_of(mean_interval(values).mean for values in orders.values())


def rival(shown: Shown, methods: Sequence[Shown]) -> Shown | None:
    """The one size of its bytes; a budget of these may leave some hundredths of them."""
    fixed = [m for m in methods if m.family == FIXED and 0.999 <= m.share / shown.share <= 1.05]
    return min(fixed, key=lambda m: m.share, default=None)


def best_fixed(methods: Sequence[Shown]) -> Shown:
    """The one size of the least mean loss."""
    return min((m for m in methods if m.family == FIXED), key=lambda m: m.loss)


def pairs(methods: Sequence[Shown]) -> dict[str, list[tuple[str, str]]]:
    """Labels of the methods that are compared, by the kind of comparison."""
    found: dict[str, list[tuple[str, str]]] = {"bytes": [], "any": [], "hops": []}
    best, labels = best_fixed(methods), {m.label for m in methods}
    for shown in methods:
        if shown.family == FIXED:
            continue
        other = rival(shown, methods)
        if other is not None:
            found["bytes"].append((shown.label, other.label))
        found["any"].append((shown.label, best.label))
        twin = shown.label.replace(",hops=tails", "")
        if twin != shown.label and twin in labels:
            found["hops"].append((shown.label, twin))
    return found


def compared(rows: Sequence[Row], labels: Sequence[tuple[str, str]]) -> dict[str, Difference]:
    """By the first label the difference of losses over orders; p after Holm's correction."""
    found = {a: difference(rows, a, b) for a, b in labels}
    if _one_order(rows):
        return {a: Difference(d.mean, d.half, d.n, None) for a, d in found.items()}
    adjusted = iter(holm([d.p for d in found.values() if d.p is not None]))
    return {
        label: d if d.p is None else Difference(d.mean, d.half, d.n, next(adjusted))
        for label, d in found.items()
    }


def over_cap(rows: Sequence[Row]) -> float | None:
    """Bytes at most over the budget, the largest of all runs that have one; None: none has.

    Example:
        >>> run = {"label": "counts-50%,to=16", "fixed128_bytes": "1600"}
        >>> over_cap([run | {"serving_peak_bytes": "90"}])  # half of 200
        0.9
    """
    found = []
    for row in rows:
        label, _, widest = row["label"].partition(",to=")
        budget = method_settings(label)[1].get("budget")
        if budget:
            plain = int(row["fixed128_bytes"]) * int(widest or WIDEST) // WIDEST
            found.append(float(row["serving_peak_bytes"]) / budget_bytes(budget, plain))
    return max(found, default=None)


def table(name: str, rows: Sequence[Row]) -> list[str]:
    """The lines of a set's table, in Markdown."""
    methods = methods_of(rows)
    kinds = {kind: compared(rows, labels) for kind, labels in pairs(methods).items()}
    names = {m.label: m.name for m in methods}
    against = {a: names[b] for a, b in pairs(methods)["bytes"]}
    best = best_fixed(methods).name
    loss = "MSE" if rows[0]["task"] == "binary" else "cross-entropy"
    units = "seeds" if _one_order(rows) else "orders"
    heads = ["method", "bytes", units, "accuracy", loss, "less one size of its bytes"]
    heads += [f"less the best one size, {best}", "tails less padded"]
    lines = [f"{name}:", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for m in methods:
        cells = [m.name, f"{100 * m.share:.1f} %", str(m.units)]
        cells += [f"{m.accuracy:.4f}", f"{m.loss:.5f}"]
        for kind, d in ((kind, of.get(m.label)) for kind, of in kinds.items()):
            cells.append(_cell(d, against.get(m.label, "") if kind == "bytes" else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(d: Difference | None, other: str) -> str:
    """A difference with its interval, bold where it is clear after Holm's correction."""
    if d is None:
        return "-"
    text = signed(d.mean, 5).replace("\N{MINUS SIGN}", "-")
    if d.half is not None:
        ends = (signed(end, 5).replace("\N{MINUS SIGN}", "-") for end in (d.low, d.high))
        text += f" [{', '.join(ends)}]"
    if d.p is not None and d.p < 0.05:
        text = f"**{text}**"
    return f"{other}: {text}" if other else text


def draw(sets: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A panel for each set: the families' losses less that of the widest one size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(4.0 * len(sets) + 0.4, 5.0), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, sets.items(), strict=True):
        methods, widest = methods_of(rows), _widest(rows)
        for family, (color, line, marker) in STYLES.items():
            members = [m for m in methods if m.family == family]
            points = [difference(rows, m.label, widest) for m in members]
            if not points:
                continue
            x = [100 * m.share for m in members]
            y = [1000 * point.mean for point in points]
            (handle,) = axes.plot(x, y, color=color, linestyle=line, marker=marker, markersize=5)
            handles.setdefault(family, handle)
            low, high = ([1000 * getattr(p, end) for p in points] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
        axes.axhline(0, color="#555555", linewidth=0.8)
        axes.set(xscale="log", title=name, xlabel="bytes, % of IDs x 128 floats")
        axes.set_xticks([1.6, 3.1, 6.2, 12.5, 25, 50, 100])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        loss = "MSE" if rows[0]["task"] == "binary" else "cross-entropy"
        axes.set_ylabel(f"{loss} less that of size 128, x 1000")
        axes.grid(True, color="#e3e3e3", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle("Quality over bytes: lower is better, left is smaller")
    figure.savefig(path, metadata={"Software": None})


def _check(path: str, rows: Sequence[Row]) -> None:
    """Refuse a file that cannot be compared as a whole.

    Raises:
        OrdersError: it lacks a column or a value, or one size, or holds several tasks or modes.
        ConfigError: a label is no method's.
    """
    for row in rows:
        if not all(row.get(name) for name in COLUMNS):
            raise OrdersError(f"{path}: a run lacks one of {', '.join(COLUMNS)}")
    if len({(row["task"], row["mode"]) for row in rows}) > 1:
        raise OrdersError(f"{path}: has runs of several tasks or modes")
    if not any(family_of(row["label"]) == FIXED for row in rows):
        raise OrdersError(f"{path}: has no run of one size, such as fixed-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, draws the figure and returns the exit status."""
    parser = Parser("bench/frontier.py", __doc__)
    parser.add_argument("sets", nargs="+", metavar="NAME=FILE.csv", help="a set's name and runs")
    parser.add_argument("--figure", type=output, metavar="FILE.png", help="quality over bytes")
    args = parser.parse_args(argv)
    try:
        sets = {}
        for text in args.sets:
            name, equals, path = text.partition("=")
            if not equals:
                raise OrdersError(f"{text}: expected NAME=FILE.csv")
            if name in sets:
                raise OrdersError(f"{name}: named twice")
            sets[name] = read(Path(path))
            _check(path, sets[name])
        for name, rows in sets.items():
            print("\n".join(table(name, rows)), end="\n\n")
            if (most := over_cap(rows)) is not None:
                print(f"No run took more than {most:.2%} of its budget.", end="\n\n")
        if args.figure:
            draw(sets, args.figure)
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
