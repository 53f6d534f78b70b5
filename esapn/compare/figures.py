"""The figures of a comparison: a folder of PNG files, one colour and marker a family.

Every curve is a mean over seeds, every bar a 95 % t interval. matplotlib's Agg canvas is used
directly, so no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from ..data.ratings import SIDES
from .contrasts import best_control
from .intervals import Interval, mean_interval, paired_difference
from .records import MEASURED, Comparison, Group, Method, is_finite

__all__ = ["Drawn", "draw", "family_styles", "selected"]

# Okabe and Ito's palette without its yellow, then darker hues of Tol's: distinct to colour-blind
# readers on white. Vermillion is the reference's alone; markers tell the families apart in grey.
REFERENCE = ("#D55E00", "*")
OKABE_ITO = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7")
COLORS = (*OKABE_ITO, "#882255", "#999933", "#332288", "#000000", "#888888")
MARKERS = "osD^vPXh<>"
LINES = ("-", "--", ":", "-.")
WIDTH = 11.0
DPI = 120
ZERO = 0.5  # where a logarithmic axis shows the frequency 0

# Accuracies are drawn in percent.
SCALE = {"loss": 1, "accuracy": 100}
# Family to colour and marker.
Styles = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Drawn:
    """A figure that was written: its file and the words that go with it."""

    path: Path
    title: str
    caption: str


def family_styles(comparison: Comparison) -> Styles:
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
        members = families["fixed"]
        chosen.append(_nearest(group, members, group.mean(members[0].label, "fixed128")))
    control = best_control(group)
    if control is not None and reference is not None:
        serving = group.mean(reference.label, "serving")
        chosen.append(_nearest(group, families[control.name], serving))
    if group.finished:
        chosen.append(group.finished[0])
        chosen.append(min(group.finished, key=lambda m: group.mean(m.label, "serving")))
    return list({method.label: method for method in chosen}.values())


def draw(comparison: Comparison, group: Group, folder: Path) -> list[Drawn]:
    """Write the figures of a group that its records have values for into ``folder``.

    Args:
        comparison: the colours are chosen over all its families.
        group: one task in one mode.
        folder: made if it does not exist.

    Returns:
        The figures that were written, in the order of the page.
    """
    if not group.records:
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
        path = folder / f"{group.task}-{group.mode}-{name}.png"
        figure.savefig(path, metadata={"Software": None})
        drawn.append(Drawn(path, *words))
    return drawn


def _nearest(group: Group, members: Sequence[Method], serving: float) -> Method:
    """The member whose mean serving bytes have the least ratio to ``serving``."""
    target = math.log(serving)
    return min(members, key=lambda m: abs(math.log(group.mean(m.label, "serving")) - target))


def _line_styles(
    methods: Iterable[Method], styles: Styles
) -> Iterator[tuple[Method, dict[str, Any]]]:
    """A family's second member is dashed, its third dotted."""
    seen: dict[str, int] = {}
    for method in methods:
        k = seen[method.family] = seen.get(method.family, -1) + 1
        color, marker = styles[method.family]
        style: dict[str, Any] = {"label": method.label, "color": color, "marker": marker}
        style |= {"linestyle": LINES[k % len(LINES)], "linewidth": 1.5, "markersize": 5}
        if marker == "*":
            style |= {"markersize": 9, "zorder": 5}
        yield method, style


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


def _half(intervals: Iterable[Interval], scale: float = 1) -> list[float]:
    return [scale * (interval.half or 0.0) for interval in intervals]


def _curve(points: Mapping[float, list[float]]) -> tuple[list[float], list[float]]:
    """Places in their order, and the mean over seeds at each."""
    x = sorted(points)
    return x, [mean_interval(points[place]).mean for place in x]


def _bytes(value: float, _: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1, as labels of an axis."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} B"


def _bytes_axis(axes: Axes, which: str) -> None:
    """Bytes along ``x`` or ``y``, on a logarithmic scale if the largest are four times the least.

    Methods within one budget hardly differ: an axis spans two fifths of its bytes at the least.
    """
    low, high = getattr(axes.dataLim, f"interval{which}")
    axis = axes.xaxis if which == "x" else axes.yaxis
    if 0 < 4 * low <= high:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_major_locator(MaxNLocator(5))
        if high < 1.2 * low:
            axes.set(**{f"{which}lim": (low / 1.2, high * 1.2)})
    axis.set_major_formatter(FuncFormatter(_bytes))
    axis.set_minor_formatter(NullFormatter())


def _events_axis(axes: Axes, comparison: Comparison) -> None:
    """Events along the stream; a dotted line where the test part begins."""
    axes.set_xlabel("events")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    train = comparison.header["data"].get("train_events")
    if train:
        axes.axvline(train, color="#555555", linestyle=":", linewidth=1)


def _over_bytes(figure: Figure, group: Group, styles: Styles, measure: str) -> Axes:
    """A measure over serving bytes: a line a family, with the band of its members' intervals."""
    figure.set_size_inches(8.0, 4.8)
    axes = figure.subplots()
    for family, members in group.families.items():
        _family_line(axes, group, members, measure, family, styles[family])
    _bytes_axis(axes, "x")
    axes.set_xlabel("serving bytes at the end of the stream")
    return axes


def _pareto(
    figure: Figure, group: Group, styles: Styles, comparison: Comparison
) -> tuple[str, str]:
    axes = _over_bytes(figure, group, styles, "loss")
    front = [(group.mean(x, "serving"), group.standing(x)) for x in group.front]
    front.append((max(group.mean(m.label, "serving") for m in group.finished), front[-1][1]))
    axes.step(
        *zip(*front, strict=True),
        where="post",
        color="#555555",
        linewidth=6,
        alpha=0.2,
        solid_capstyle="round",
        label="front",
        zorder=1,
    )
    axes.set_ylabel(f"{group.loss_name} (lower is better)")
    _finish(figure, (axes,))
    return (
        "Quality over serving bytes",
        "Test part; a line joins a family's members, its band is their 95 % interval over seeds. "
        "Most of that is what the seeds share: the table has the paired differences. The grey "
        "line is the front: no method has fewer bytes and a lower loss than "
        f"{', '.join(group.front)}.",
    )


def _accuracy(
    figure: Figure, group: Group, styles: Styles, comparison: Comparison
) -> tuple[str, str]:
    axes = _over_bytes(figure, group, styles, "accuracy")
    axes.set_ylabel("accuracy, % (higher is better)")
    _finish(figure, (axes,))
    return "Accuracy over serving bytes", "As the first figure."


def _family_line(
    axes: Axes,
    group: Group,
    members: Sequence[Method],
    measure: str,
    family: str,
    style: tuple[str, str],
) -> None:
    """A family's members over their bytes, and the band of their intervals."""
    color, marker = style
    x = [group.mean(m.label, "serving") for m in members]
    means = [mean_interval(group.values(m.label, measure).values()) for m in members]
    scale = SCALE[measure]
    axes.plot(
        x,
        [scale * mean.mean for mean in means],
        color=color,
        marker=marker,
        markersize=10 if marker == "*" else 6,
        linewidth=1.3,
        label=family,
        zorder=5 if marker == "*" else 3,
    )
    if any(mean.half for mean in means):
        low, high = ([scale * getattr(mean, end) for mean in means] for end in ("low", "high"))
        if len(x) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        else:
            axes.vlines(x, low, high, color=color, alpha=0.35, linewidth=5)


def _buckets(group: Group, label: str, side: str, measure: str) -> dict[float, dict[int, float]]:
    """Lower end of a frequency bucket to seed to the measure of its test events."""
    result: dict[float, dict[int, float]] = {}
    for record in group.of(label):
        for bucket in record.content.get("by_frequency", {}).get(side, []):
            if bucket["events"] and is_finite(bucket[measure]):
                result.setdefault(bucket["from"] or ZERO, {})[record.seed] = bucket[measure]
    return dict(sorted(result.items()))


def _frequency_axis(axes: Axes, side: str, what: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0")
    )
    axes.set_xlabel(f"{what} of the {side}")


def _frequency_panels(figure: Figure) -> list[tuple[Axes, str, str]]:
    """Axes, side and measure: a row for each measure, a column for each side."""
    figure.set_size_inches(WIDTH, 7.2)
    panels = []
    for row, measure in zip(figure.subplots(2, 2), MEASURED, strict=True):
        for axes, side in zip(row, SIDES, strict=True):
            _frequency_axis(axes, side, "running frequency")
            panels.append((axes, side, measure))
    return panels


def _frequency(
    figure: Figure, group: Group, styles: Styles, comparison: Comparison
) -> tuple[str, str] | None:
    shown = False
    panels = _frequency_panels(figure)
    for axes, side, measure in panels:
        for method, style in _line_styles(selected(group), styles):
            buckets = _buckets(group, method.label, side, measure)
            y = [SCALE[measure] * mean_interval(seeds.values()).mean for seeds in buckets.values()]
            axes.plot(list(buckets), y, **style)
            shown = shown or bool(buckets)
        axes.set_ylabel(group.loss_name if measure == "loss" else "accuracy (%)")
    if not shown:
        return None
    _finish(figure, [axes for axes, _, _ in panels])
    return (
        "Loss and accuracy by frequency",
        "Test events by the running frequency of their user (left) or item (right), in buckets of "
        "powers of two drawn at their lower end; mean over seeds. The left end is the cold start.",
    )


def _frequency_difference(
    figure: Figure, group: Group, styles: Styles, comparison: Comparison
) -> tuple[str, str] | None:
    reference = group.reference_method
    if reference is None:
        return None
    others = [m for m in selected(group) if m.label != reference.label]
    shown = False
    panels = _frequency_panels(figure)
    for axes, side, measure in panels:
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
                [SCALE[measure] * point.mean for point in points.values()],
                yerr=_half(points.values(), SCALE[measure]),
                capsize=2,
                elinewidth=0.9,
                **style,
            )
            shown = shown or bool(points)
        axes.axhline(0, color=REFERENCE[0], linewidth=1.5, label=reference.label)
        unit = group.loss_name if measure == "loss" else "accuracy (points)"
        axes.set_ylabel(f"{unit}, minus the reference's")
    if not shown:
        return None
    _finish(figure, [axes for axes, _, _ in panels])
    return (
        f"Difference to {reference.label} by frequency",
        f"The curves above minus those of {reference.label}, paired by seed, with 95 % intervals. "
        "Above zero in the upper row, or below it in the lower row, the reference is better.",
    )


def _sizes(
    figure: Figure, group: Group, styles: Styles, comparison: Comparison
) -> tuple[str, str] | None:
    reference = group.reference_method
    if reference is None:
        methods = [members[-1] for members in group.families.values()]
    else:
        serving = group.mean(reference.label, "serving")
        methods = [reference]
        for family, members in group.families.items():
            if family != reference.family:
                methods.append(_nearest(group, members, serving))
    panels = figure.subplots(1, 2)
    shown = False
    for axes, side in zip(panels, SIDES, strict=True):
        for method, style in _line_styles(methods, styles):
            points: dict[float, list[float]] = {}
            for record in group.of(method.label):
                for bucket in record.content.get("sizes_by_frequency", {}).get(side, []):
                    if bucket["ids"]:
                        points.setdefault(bucket["from"] or ZERO, []).append(bucket["mean_size"])
            if points:
                shown = True
                axes.plot(*_curve(points), **style)
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
    figure: Figure, group: Group, styles: Styles, comparison: Comparison
) -> tuple[str, str] | None:
    reference = group.reference_method
    if reference is None:
        return None
    record = group.of(reference.label)[0]
    log = record.content.get("log", [])
    sizes = list(record.content["memory"]["user"]["rows_per_size"])
    counted = all(len(line[f"{side}_rows"]) == len(sizes) for line in log for side in SIDES)
    if not sizes or not log or not counted:
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
        axes.set(ylabel=f"share of the {side}s", ylim=(0, 1))
        axes.set_xlim(events[0], max(events[-1], events[0] + 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        _events_axis(axes, comparison)
    _finish(figure, panels)
    for axes in panels:
        axes.grid(False)
    return (
        f"Sizes of {reference.label} over the stream",
        f"Share of the rows at each size, seed {record.seed}. The dotted line is where the test "
        "part begins.",
    )


def _stream(
    figure: Figure, group: Group, styles: Styles, comparison: Comparison
) -> tuple[str, str] | None:
    left, right = figure.subplots(1, 2)
    shown = False
    for method, style in _line_styles(selected(group), styles):
        for axes, name in ((left, "loss"), (right, "serving_bytes")):
            points: dict[float, list[float]] = {}
            for record in group.of(method.label):
                for line in record.content.get("log", []):
                    if is_finite(line.get(name)):
                        points.setdefault(line["events"], []).append(line[name])
            # The mean over some of the seeds would differ from its neighbours' by those left out.
            full = max(map(len, points.values()), default=0)
            points = {events: seeds for events, seeds in points.items() if len(seeds) == full}
            axes.plot(*_curve(points), **style | {"marker": ""})
            shown = shown or bool(points)
    if not shown:
        return None
    for axes in (left, right):
        _events_axis(axes, comparison)
    left.set(ylabel=f"{group.loss_name} of the window", title="Prequential loss")
    right.set(ylabel="serving bytes", title="Memory")
    _bytes_axis(right, "y")
    _finish(figure, (left, right))
    return (
        "Loss and bytes over the stream",
        "Each point is the mean loss of the events since the point before, predicted before they "
        "were learnt from, mean over seeds. The dotted line is where the test part begins.",
    )


def _throughput(
    figure: Figure, group: Group, styles: Styles, comparison: Comparison
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
    axes.set_xlim(left=0)
    axes.set_xlabel("events per second, training and prediction")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(figure, (axes,))
    axes.grid(False, axis="y")
    return "Throughput", "Mean over seeds and 95 % interval; longer is better."


FIGURES = {
    "pareto": _pareto,
    "accuracy": _accuracy,
    "frequency": _frequency,
    "difference": _frequency_difference,
    "sizes": _sizes,
    "histogram": _histogram,
    "stream": _stream,
    "throughput": _throughput,
}
