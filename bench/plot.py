"""Plot a result of the lookup benchmark: share of the roof over the batch size.

python bench/plot.py result.json plot.png
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.command import Parser, picture

MODES = ("forward", "backward", "both", "step sgd", "step adagrad", "step adam")
STYLES = {
    "ours": ("#0072B2", "o"),
    "ours deferred": ("#F0E442", "<"),
    "ours 128": ("#56B4E9", "s"),
    "ours dense": ("#009E73", "D"),
    "fixed": ("#D55E00", "^"),
    "fixed det.": ("#000000", "x"),
    "sparse": ("#CC79A7", "P"),
    "eager": ("#E69F00", "v"),
    "compiled": ("#8C8C8C", "*"),
}
"""Colour (Okabe and Ito's, told apart by the colour-blind) and marker of every provider."""

_COLUMNS = 3
_TRAFFIC: dict[str, Any] = {"uniform": "-", "zipf": ":"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a PNG with a panel per table and mode that has more than one batch size.

    Args:
        result: what ``bench/lookup.py --out`` wrote.
        path: of the PNG.

    Raises:
        ValueError: no row can be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in result["rows"] if r["mode"] in MODES and r["roof_share"] is not None]
    if not rows:
        raise ValueError("no measured row of " + ", ".join(MODES))
    tables = list(dict.fromkeys(r["table"] for r in rows))
    seen = {(r["table"], r["mode"]) for r in rows}
    panels = [[(table, mode) for mode in MODES if (table, mode) in seen] for table in tables]
    grid = [row[i : i + _COLUMNS] for row in panels for i in range(0, len(row), _COLUMNS)]
    columns = max(map(len, grid))
    figure = Figure(figsize=(3.9 * columns + 0.6, 3.0 * len(grid) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(grid), columns, squeeze=False, sharey=True)
    sizes = sorted({r["ids"] for r in rows})
    for line, names in zip(axes, grid, strict=True):
        for axis in line[len(names) :]:
            axis.set_axis_off()
        for axis, (table, mode) in zip(line, names, strict=False):
            _draw(axis, [r for r in rows if (r["table"], r["mode"]) == (table, mode)])
            axis.set_title(f"{mode}, {table}", fontsize=10)
            _set_scales(axis, sizes)
        line[0].set_ylabel("share of the roof")
    for axis in axes[-1]:
        axis.set_xlabel("ids in a batch")
    handles = _handles(rows)
    many = min(len(handles), 2 * columns)
    figure.legend(handles=handles, loc="outside upper center", ncols=many, frameon=False)
    figure.supxlabel(_caption(result, 52 * columns), fontsize=8, color="0.3")
    figure.savefig(path, dpi=120)


def _set_scales(axis: Any, sizes: Sequence[int]) -> None:
    """Both logarithmic; a tick per batch size, a dashed line at the roof."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{int(n):,}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g}%"))
    axis.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axis.axhline(1.0, color="0.35", linewidth=0.9, linestyle=(0, (6, 3)))
    axis.grid(which="major", color="0.9", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def _draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for provider, (color, marker) in STYLES.items():
        for traffic, style in _TRAFFIC.items():
            mine = [r for r in rows if (r["provider"], r["traffic"]) == (provider, traffic)]
            mine.sort(key=lambda r: r["ids"])
            axis.plot(
                [r["ids"] for r in mine],
                [r["roof_share"] for r in mine],
                color=color,
                marker=marker,
                linestyle=style,
                markersize=5,
                # Hollow for Zipf: with one batch size there is no line to tell them apart.
                markerfacecolor=color if traffic == "uniform" else "white",
                linewidth=2.0 if provider == "ours" else 1.3,
                zorder=3 if provider == "ours" else 2,
            )


def _handles(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Entries of the legend: providers, then traffic."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, label=name)
        for name, (color, marker) in STYLES.items()
        if any(r["provider"] == name for r in rows)
    ]
    for traffic, dashes in _TRAFFIC.items():
        if any(r["traffic"] == traffic for r in rows):
            face = "0.2" if traffic == "uniform" else "white"
            style = {"linestyle": dashes, "marker": "o", "markersize": 5, "markerfacecolor": face}
            handles.append(Line2D([], [], color="0.2", label=traffic, **style))
    return handles


def _caption(result: dict[str, Any], width: int) -> str:
    repeats = sorted({r["repeats"] for r in result["rows"] if r["repeats"]})
    many = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    text = (
        "100% = the fewest bytes of the mode at the bandwidth of a large copy (dashed line; above "
        f"it: from cache). Medians of {many}. {result['conditions'][0]}; {result['conditions'][2]}"
    )
    return "\n".join(textwrap.wrap(text, width))


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the plot and returns the exit status."""
    parser = Parser("bench/plot.py", __doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="RESULT.json", help="what bench/lookup.py --out wrote")
    add("target", type=picture, metavar="FILE.png", help="the plot to write")
    args = parser.parse_args(argv)
    try:
        plot(json.loads(args.source.read_text(encoding="utf-8")), args.target)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        parser.error(f"{args.source}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
