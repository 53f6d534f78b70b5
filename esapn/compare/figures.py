"""The figures of a comparison: one folder of PNG files, one colour and marker per family.

Every curve is a mean over seeds; bars and bands are 95 % t intervals. Without a display:
matplotlib's Agg canvas is used directly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from .contrasts import (
    Comparison,
    Group,
    Interval,
    Method,
    best_control,
    mean_interval,
    paired_difference,
)

__all__ = ["Drawn", "draw", "family_styles", "selected"]

# Okabe and Ito's palette without its yellow, then darker hues of Tol's: distinct to colour-blind
# readers on white. Vermillion is the reference's alone; markers tell the families apart in grey.
REFERENCE = ("#D55E00", "*")
OKABE_ITO = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7")
COLORS = (*OKABE_ITO, "#882255", "#999933", "#332288", "#000000", "#888888")
MARKERS = "osD^vPXh<>"
LINES = ("-", "--", ":", "-.")
SIDES = ("user", "item")
WIDTH = 11.0
DPI = 120
ZERO = 0.5  # where a logarithmic axis shows the frequency 0


@dataclass(frozen=True)
class Drawn:
    """A figure that was written: its file and the words that go with it."""

    path: Path
    title: str
    caption: str


def family_styles(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Colour and marker of every family, the same in every figure of the comparison."""
    references = set(comparison.header["reference"].values())
    mine = {method.family for method in comparison.methods if method.label in references}
    others = dict.fromkeys(m.family for m in comparison.methods if m.family not in mine)
    styles = {
        family: (COLORS[k % len(COLORS)], MARKERS[(k + k // len(COLORS)) % len(MARKERS)])
        for k, family in enumerate(others)
    }
    return styles | dict.fromkeys(mine, REFERENCE)


def selected(group: Group) -> list[Method]:
    """The methods that curves over frequency or time show, at most five.

    The reference, the fixed table nearest to 128 in bytes, the best control family's member nearest
    to the reference's bytes, the method of the lowest loss and the one of the fewest bytes.
    """
    chosen: list[Method] = []
    reference, families = group.reference_method, group.families
    if reference is not None:
        chosen.append(reference)
    if "fixed" in families:
        chosen.append(
            min(
                families["fixed"],
                key=lambda m: abs(
                    math.log(group.mean(m.label, "serving") / group.mean(m.label, "fixed128"))
                ),
            )
        )
    control = best_control(group)
    if control is not None and reference is not None:
        chosen.append(_nearest(group, families[control.name], reference))
    if group.finished:
        chosen.append(group.finished[0])
        chosen.append(min(group.finished, key=lambda m: group.mean(m.label, "serving")))
    return list({method.label: method for method in chosen}.values())


def draw(comparison: Comparison, group: Group, folder: Path) -> list[Drawn]:
    """Write a group's figures into ``folder``; one that its runs hold nothing for is left out.

    Args:
        comparison: what the colours are chosen over.
        group: one task in one setting.
        folder: made if it does not exist.

    Returns:
        What was written, in the order that a reader wants it.
    """
    if not group.runs:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    styles = family_styles(comparison)
    drawn = []
    for name, function in FIGURES.items():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained", dpi=DPI)
        FigureCanvasAgg(figure)
        words = function(figure, group, styles, comparison)
        if words is None:
            continue
        path = folder / f"{group.task}-{group.setting}-{name}.png"
        figure.savefig(path, metadata={"Software": None})
        drawn.append(Drawn(path, *words))
    return drawn


def _nearest(group: Group, members: Sequence[Method], reference: Method) -> Method:
    target = math.log(group.mean(reference.label, "serving"))
    return min(members, key=lambda m: abs(math.log(group.mean(m.label, "serving")) - target))


def _line_styles(
    methods: Iterable[Method], styles: dict[str, tuple[str, str]]
) -> list[tuple[Method, dict[str, Any]]]:
    """A family's second member is dashed, its third dotted."""
    seen: dict[str, int] = {}
    result = []
    for method in methods:
        k = seen[method.family] = seen.get(method.family, -1) + 1
        color, marker = styles[method.family]
        style: dict[str, Any] = {"label": method.label, "color": color, "marker": marker}
        style |= {"linestyle": LINES[k % len(LINES)], "linewidth": 1.5, "markersize": 5}
        if marker == "*":
            style |= {"markersize": 9, "zorder": 5}
        result.append((method, style))
    return result


def _finish(figure: Figure, axes: Iterable[Axes]) -> None:
    """Grid, no box, and one legend for all panels right of them."""
    handles: dict[str, Any] = {}
    for panel in axes:
        panel.grid(True, color="#e3e3e3", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)


def _half(intervals: Iterable[Interval]) -> list[float]:
    return [interval.half or 0.0 for interval in intervals]


def _size(value: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} B"


def _pareto(
    figure: Figure, group: Group, styles: dict[str, tuple[str, str]], comparison: Comparison
) -> tuple[str, str]:
    left, right = figure.subplots(1, 2)
    for axes, measure in ((left, "loss"), (right, "accuracy")):
        scale = 100 if measure == "accuracy" else 1
        for family, members in group.families.items():
            color, marker = styles[family]
            x = [group.mean(m.label, "serving") for m in members]
            y = [mean_interval(group.values(m.label, measure).values()) for m in members]
            axes.errorbar(
                x,
                [scale * point.mean for point in y],
                yerr=[scale * half for half in _half(y)],
                color=color,
                marker=marker,
                markersize=12 if marker == "*" else 6,
                # The reference's family holds variants, not one knob's settings: no line.
                linewidth=0 if marker == "*" else 1.3,
                elinewidth=1.3,
                capsize=2.5,
                label=family,
                zorder=5 if marker == "*" else 3,
            )
            if marker == "*":
                named: list[float] = []
                for place, point, method in zip(x, y, members, strict=True):
                    # A label takes the room of a factor of 3 in bytes; the tables have the rest.
                    if any(1 / 3 < place / other < 3 for other in named):
                        continue
                    named.append(place)
                    at = (place, scale * point.mean)
                    axes.annotate(
                        method.label,
                        at,
                        xytext=(8, 8),
                        textcoords="offset points",
                        color=color,
                        fontsize=9,
                        zorder=6,
                        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5},
                    )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
        axes.set_xlabel("serving bytes at the end of the stream")
    front = [(group.mean(x, "serving"), group.standing(x)) for x in group.front]
    front.append((max(group.mean(m.label, "serving") for m in group.finished), front[-1][1]))
    left.step(
        *zip(*front, strict=True),
        where="post",
        color="#555555",
        linewidth=6,
        alpha=0.2,
        solid_capstyle="round",
        label="front of the loss",
        zorder=1,
    )
    left.set(ylabel=group.loss_name, title="Loss (lower is better)")
    right.set(ylabel="accuracy (%)", title="Accuracy (higher is better)")
    _finish(figure, (left, right))
    return (
        "Quality over serving bytes",
        "Test part, mean over seeds and 95 % interval; a line joins a family's members. Most of an "
        "interval is what the seeds share: the tables above have the paired differences. The grey "
        "band marks the front: no method has fewer bytes and a lower loss than "
        f"{', '.join(group.front)}.",
    )


def _buckets(group: Group, label: str, side: str, measure: str) -> dict[float, dict[int, float]]:
    """Lower end of a frequency bucket to seed to the measure of its test events."""
    result: dict[float, dict[int, float]] = {}
    for run in group.of(label):
        for bucket in run.record.get("by_frequency", {}).get(side, []):
            value = bucket[measure]
            if bucket["events"] and value is not None and math.isfinite(value):
                result.setdefault(bucket["from"] or ZERO, {})[run.seed] = value
    return dict(sorted(result.items()))


def _frequency_axis(axes: Axes, side: str, what: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0")
    )
    axes.set_xlabel(f"{what} of the {side}")


def _frequency(
    figure: Figure, group: Group, styles: dict[str, tuple[str, str]], comparison: Comparison
) -> tuple[str, str] | None:
    figure.set_size_inches(WIDTH, 7.2)
    panels = figure.subplots(2, 2)
    shown = False
    for row, measure in zip(panels, ("loss", "accuracy"), strict=True):
        scale = 100 if measure == "accuracy" else 1
        for axes, side in zip(row, SIDES, strict=True):
            for method, style in _line_styles(selected(group), styles):
                curve = _buckets(group, method.label, side, measure)
                y = [scale * mean_interval(values.values()).mean for values in curve.values()]
                axes.plot(list(curve), y, **style)
                shown = shown or bool(curve)
            _frequency_axis(axes, side, "running frequency")
            axes.set_ylabel(group.loss_name if measure == "loss" else "accuracy (%)")
    if not shown:
        return None
    _finish(figure, panels.flat)
    return (
        "Loss and accuracy by frequency",
        "Test events by the running frequency of their user (left) or item (right), in buckets of "
        "powers of two drawn at their lower end; mean over seeds. The left end is the cold start.",
    )


def _frequency_difference(
    figure: Figure, group: Group, styles: dict[str, tuple[str, str]], comparison: Comparison
) -> tuple[str, str] | None:
    reference = group.reference_method
    if reference is None:
        return None
    others = [m for m in selected(group) if m.label != reference.label]
    figure.set_size_inches(WIDTH, 7.2)
    panels = figure.subplots(2, 2)
    shown = False
    for row, measure in zip(panels, ("loss", "accuracy"), strict=True):
        scale = 100 if measure == "accuracy" else 1
        for axes, side in zip(row, SIDES, strict=True):
            mine = _buckets(group, reference.label, side, measure)
            for k, (method, style) in enumerate(_line_styles(others, styles)):
                theirs = _buckets(group, method.label, side, measure)
                # Shifted a little, so that the bars of two methods do not cover each other.
                shift = 2 ** (0.12 * (k - (len(others) - 1) / 2))
                points = {
                    low * shift: paired_difference(theirs[low], mine[low])
                    for low in mine
                    if low in theirs and mine[low].keys() & theirs[low].keys()
                }
                axes.errorbar(
                    list(points),
                    [scale * point.mean for point in points.values()],
                    yerr=[scale * half for half in _half(points.values())],
                    capsize=2,
                    elinewidth=0.9,
                    **style,
                )
                shown = shown or bool(points)
            axes.axhline(0, color=REFERENCE[0], linewidth=1.5, label=reference.label)
            _frequency_axis(axes, side, "running frequency")
            unit = group.loss_name if measure == "loss" else "accuracy (points)"
            axes.set_ylabel(f"{unit}, minus the reference's")
    if not shown:
        return None
    _finish(figure, panels.flat)
    return (
        f"Difference to {reference.label} by frequency",
        f"The curves above minus those of {reference.label}, paired by seed, with 95 % intervals. "
        "Above zero in the upper row, or below it in the lower row, the reference is better.",
    )


def _sizes(
    figure: Figure, group: Group, styles: dict[str, tuple[str, str]], comparison: Comparison
) -> tuple[str, str] | None:
    reference = group.reference_method
    methods = [] if reference is None else [reference]
    for family, members in group.families.items():
        if reference is None or family != reference.family:
            methods.append(
                members[-1] if reference is None else _nearest(group, members, reference)
            )
    panels = figure.subplots(1, 2)
    shown = False
    for axes, side in zip(panels, SIDES, strict=True):
        for method, style in _line_styles(methods, styles):
            curve: dict[float, list[float]] = {}
            for run in group.of(method.label):
                for bucket in run.record.get("sizes_by_frequency", {}).get(side, []):
                    if bucket["ids"]:
                        curve.setdefault(bucket["from"] or ZERO, []).append(bucket["mean_size"])
            if curve:
                shown = True
                x = sorted(curve)
                axes.plot(x, [mean_interval(curve[low]).mean for low in x], **style)
        _frequency_axis(axes, side, "events")
        axes.set(ylabel="mean size (numbers per row)", title=f"{side}s", ylim=(0, None))
    if not shown:
        return None
    _finish(figure, panels)
    return (
        "Final size by frequency",
        "Mean size of the IDs that the whole stream holds so often, in buckets of powers of two. "
        "Of every family, the member nearest to the reference in serving bytes.",
    )


def _histogram(
    figure: Figure, group: Group, styles: dict[str, tuple[str, str]], comparison: Comparison
) -> tuple[str, str] | None:
    from matplotlib import colormaps

    reference = group.reference_method
    if reference is None:
        return None
    run = group.of(reference.label)[0]
    log = run.record.get("log", [])
    sizes = [int(d) for d in run.record["memory"]["user"]["rows_per_size"]]
    if (
        not sizes
        or not log
        or any(len(line[f"{s}_rows"]) != len(sizes) for line in log for s in SIDES)
    ):
        return None
    panels = figure.subplots(1, 2)
    colors = [colormaps["cividis_r"]((k + 0.5) / len(sizes)) for k in range(len(sizes))]
    events = [line["events"] for line in log]
    for axes, side in zip(panels, SIDES, strict=True):
        rows = [
            [line[f"{side}_rows"][k] / sum(line[f"{side}_rows"]) for line in log]
            for k in range(len(sizes))
        ]
        axes.stackplot(events, rows, colors=colors, labels=[f"size {d}" for d in sizes])
        axes.set(xlabel="events", ylabel=f"share of the {side}s", ylim=(0, 1))
        axes.set_xlim(events[0], max(events[-1], events[0] + 1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        _test_part(axes, comparison)
    _finish(figure, panels)
    for axes in panels:
        axes.grid(False)
    return (
        f"Sizes of {reference.label} over the stream",
        f"Share of the rows at each size, seed {run.seed}. The dotted line is where the test part "
        "begins.",
    )


def _test_part(axes: Axes, comparison: Comparison) -> None:
    train = comparison.header["data"].get("train_events")
    if train:
        axes.axvline(train, color="#555555", linestyle=":", linewidth=1)


def _stream(
    figure: Figure, group: Group, styles: dict[str, tuple[str, str]], comparison: Comparison
) -> tuple[str, str] | None:
    left, right = figure.subplots(1, 2)
    shown = False
    for method, style in _line_styles(selected(group), styles):
        style = style | {"marker": ""}
        for axes, name in ((left, "loss"), (right, "serving_bytes")):
            curve: dict[int, list[float]] = {}
            for run in group.of(method.label):
                for line in run.record.get("log", []):
                    value = line.get(name)
                    if value is not None and math.isfinite(value):
                        curve.setdefault(line["events"], []).append(value)
            # A window that only some seeds have would move the mean by who is in it.
            full = max(map(len, curve.values()), default=0)
            x = sorted(events for events, values in curve.items() if len(values) == full)
            axes.plot(x, [mean_interval(curve[events]).mean for events in x], **style)
            shown = shown or bool(x)
    if not shown:
        return None
    for axes in (left, right):
        axes.set_xlabel("events")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _test_part(axes, comparison)
    left.set(ylabel=f"{group.loss_name} of the window", title="Prequential loss")
    right.set(ylabel="serving bytes", title="Memory", yscale="log")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
    _finish(figure, (left, right))
    return (
        "Loss and bytes over the stream",
        "Each point is the mean loss of the events since the point before, predicted before they "
        "were learnt from, mean over seeds. The dotted line is where the test part begins.",
    )


def _throughput(
    figure: Figure, group: Group, styles: dict[str, tuple[str, str]], comparison: Comparison
) -> tuple[str, str] | None:
    rates = [(m, group.interval(m.label, "events_per_second")) for m in group.methods]
    known = [(method, rate) for method, rate in rates if rate is not None]
    if not known:
        return None
    figure.set_size_inches(WIDTH, 1.0 + 0.27 * len(known))
    axes = figure.subplots()
    bars = axes.barh(
        [method.label for method, _ in known],
        [rate.mean for _, rate in known],
        xerr=_half(rate for _, rate in known),
        color=[styles[method.family][0] for method, _ in known],
        height=0.7,
        error_kw={"elinewidth": 0.9, "capsize": 2},
    )
    axes.bar_label(bars, [f"{rate.mean:,.0f}" for _, rate in known], padding=6, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("events per second, training and prediction")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(figure, (axes,))
    axes.grid(False, axis="y")
    return "Throughput", "Mean over seeds and 95 % interval; longer is better."


FIGURES = {
    "pareto": _pareto,
    "frequency": _frequency,
    "difference": _frequency_difference,
    "sizes": _sizes,
    "histogram": _histogram,
    "stream": _stream,
    "throughput": _throughput,
}
