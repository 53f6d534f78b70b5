"""The tables of the page, and ``results.csv``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import SearchConfig
from ..data.ratings import SIDES
from .contrasts import Compared, Contrast, paired_contrasts, same_bytes
from .formats import (
    NONE,
    PERCENT,
    count,
    difference,
    loss,
    mean,
    of_fixed128,
    p_value,
    percent,
    plain,
    plural,
    short,
    signed,
)
from .intervals import Difference, mean_interval
from .records import BYTES, Comparison, Group, load

__all__ = [
    "PageTable",
    "bytes_table",
    "contrast_tables",
    "cost_table",
    "measure_table",
    "method_table",
    "place",
    "result_table",
    "size_table",
    "write_csv",
]

PARTS = ("payload", "slack", "locations", "chain", "serving", "optimizer", "fixed")
LIMITS = ("budget", "refused")
# Where a family ends before the reference's bytes: its end has more or fewer bytes than those.
MORE = {"smallest": "more", "largest": "fewer"}


@dataclass(frozen=True)
class PageTable:
    """A table of texts.

    ``marked`` holds the indices of rows that are set apart, ``words`` those of columns that are
    aligned to the left, ``wrap`` those of columns that may break their lines.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    marked: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset({0})
    wrap: frozenset[int] = frozenset()


def result_table(group: Group) -> PageTable:
    """Serving bytes and quality of every method in few digits, the lowest loss first."""
    reference = group.reference_method
    columns = ["method", "bytes", f"{group.loss_name}", "accuracy %"]
    pairs = {} if reference is None else {c.name: c.loss for c in paired_contrasts(group)}
    if reference is not None:
        columns.append(f"{group.loss_name} × 1000, less {reference.label}")
    rows = []
    for method in group.finished:
        label = method.label
        row = [label, of_fixed128(group, label, "serving")]
        row += [short(group.mean(label, "loss")), short(100 * group.mean(label, "accuracy"))]
        if reference is not None:
            row.append(_thousandths(pairs[label].difference) if label in pairs else NONE)
        rows.append(row)
    done = {method.label for method in group.finished}
    rows += [
        [method.label, *[NONE] * (len(columns) - 1)]
        for method in group.methods
        if method.label not in done
    ]
    note = (
        "Test part, each event predicted before it is learnt from; means over seeds to three "
        "digits, the lowest loss first. Bytes are what serving takes at the end, of plain tables "
        f"{_width(group)} wide."
    )
    if reference is not None:
        note += " Differences are paired by seed, with the 95 % t interval of one of them."
    return PageTable("Results", columns, rows, note, _reference_row(group))


def _width(group: Group) -> str:
    """The largest of the sizes that a group's runs were given, in numbers a row."""
    configs = (SearchConfig.complete(record.content["config"]) for record in group.records)
    return " or ".join(str(width) for width in sorted({config["sizes"][-1] for config in configs}))


def _thousandths(d: Difference) -> str:
    """The other less the reference, where ``d`` is the reference less the other."""
    text = signed(-1000 * d.mean, 2)
    if d.half is None:
        return text
    return f"{text} [{signed(-1000 * d.high, 2)}, {signed(-1000 * d.low, 2)}]"


def measure_table(group: Group) -> PageTable:
    """All measures of every method with their intervals, the lowest loss first."""
    binary = group.task == "binary"
    quality = [("accuracy %", "accuracy", percent), (group.loss_name, "loss", loss)]
    if binary:
        quality += [("log loss", "log_loss", loss), ("AUC", "auc", loss)]
    columns = ["method", "seeds", "front", *(title for title, _, _ in quality)]
    columns += ["bytes, final", "bytes, peak", "bytes, mean"]
    rows, front = [], group.front
    for method in group.finished:
        label = method.label
        row = [label, str(len(group.of(label))), "yes" if label in front else NONE]
        row += [mean(group.interval(label, name), show) for _, name, show in quality]
        for name in ("serving", "serving_peak", "serving_mean"):
            row.append(f"{count(group.mean(label, name))} ({of_fixed128(group, label, name)})")
        rows.append(row)
    done = {method.label for method in group.finished}
    absent = [method.label for method in group.methods if method.label not in done]
    rows += [[label, "0", *[NONE] * (len(columns) - 2)] for label in absent]
    note = (
        "Test part, each event predicted before it is learnt from. Mean over seeds ± half of the "
        "95 % t interval, the lowest loss first. Bytes are what serving takes for users and items "
        "together, at the end, at most and on average over the stream, as a mean over seeds, and "
        "in brackets of plain tables of the largest size. Front: no other method has as few bytes "
        "and as low a loss."
    )
    if len({frozenset(group.values(method.label, "loss")) for method in group.finished}) > 1:
        note += (
            " Seeds are missing: the order and the front use each method's difference to the "
            "reference over the seeds that both have."
        )
    if not binary:
        note += " The log loss of several classes is their cross-entropy."
    title = "All measures"
    return PageTable(title, columns, rows, note, _reference_row(group), frozenset({0, 2}))


def _reference_row(group: Group) -> frozenset[int]:
    """Index of the reference among the finished methods."""
    labels = [method.label for method in group.finished]
    return frozenset({labels.index(group.reference)} if group.reference in labels else ())


def cost_table(group: Group) -> PageTable:
    """Time and memory of every method's runs."""
    columns = ["method", "wall s", "CPU s", "events / s", "peak memory MB", "bytes in training"]
    shows = [
        ("wall_seconds", lambda x: f"{x:,.1f}"),
        ("cpu_seconds", lambda x: f"{x:,.1f}"),
        ("events_per_second", count),
        ("peak_rss", lambda x: f"{x / 1e6:,.1f}"),
        ("training", count),
    ]
    rows = [
        [method.label, *(mean(group.interval(method.label, name), show) for name, show in shows)]
        for method in group.finished
    ]
    note = (
        "Mean over seeds ± half of the 95 % interval. Peak memory is that of the whole process. "
        "Bytes in training count the tables and their optimizer's state."
    )
    return PageTable("Cost", columns, rows, note, _reference_row(group))


def contrast_tables(group: Group) -> list[PageTable]:
    """The reference against every other method, and against every family at its own bytes."""
    reference = group.reference_method
    if reference is None:
        return []
    mine = reference.label
    controls = same_bytes(group)
    note = (
        f"Each family of methods at the serving bytes that {mine} ends with in the same seed: "
        "linear in log(bytes) between the family's neighbours in that seed. A family that does not "
        "reach so few or so many bytes is taken at its nearest end, and the row says so. In "
        "brackets: finished members. Holm's correction is over "
        f"{plural(len(controls), 'family', 'families')}."
    )
    again = "As above; Holm's correction is over the accuracies by themselves."
    return [
        _pair_table(group, mine),
        _family_table(group, mine, controls, note, accuracy=False),
        _family_table(group, mine, controls, again, accuracy=True),
    ]


def _pair_table(group: Group, mine: str) -> PageTable:
    pairs = paired_contrasts(group)
    columns = ["compared with", "bytes", "seeds"]
    columns += [*_heads(group, mine, accuracy=False), *_heads(group, mine, accuracy=True)]
    rows = [
        [c.name, of_fixed128(group, c.name, "serving"), str(c.loss.difference.n)]
        + [*_cells(c.loss, accuracy=False), *_cells(c.accuracy, accuracy=True)]
        for c in pairs
    ]
    note = (
        f"{mine} minus the other, paired by seed, with the 95 % t interval of one difference. A "
        "difference is named only if its t test's p stays below 0.05 after Holm's correction over "
        f"all {plural(len(pairs), 'row')}. Bytes: final serving bytes, of plain tables of the "
        f"largest size; {mine} takes {of_fixed128(group, mine, 'serving')}."
    )
    title = f"{mine} against every other method"
    return PageTable(title, columns, rows, note, words=frozenset({0, 5, 8}))


def _family_table(
    group: Group, mine: str, controls: Sequence[Contrast], note: str, *, accuracy: bool
) -> PageTable:
    name = "accuracy %" if accuracy else group.loss_name
    columns = ["family", f"at the bytes of {mine}", f"its {name} there", "seeds"]
    columns += _heads(group, mine, accuracy=accuracy)
    rows = []
    for c in controls:
        compared = c.accuracy if accuracy else c.loss
        its = mean(compared.other, percent if accuracy else loss)
        row = [f"{c.name} ({len(c.members)})", place(c), its, str(c.loss.difference.n)]
        rows.append(row + _cells(compared, accuracy=accuracy))
    title = f"At the same serving bytes: {name.removesuffix(' %')}"
    return PageTable(title, columns, rows, note, words=frozenset({0, 1, 6}))


def _heads(group: Group, mine: str, *, accuracy: bool) -> list[str]:
    what = "accuracy, difference (points)" if accuracy else f"{group.loss_name}, difference"
    return [what, "Holm p", f"{mine} is"]


def _cells(c: Compared, *, accuracy: bool) -> list[str]:
    return [difference(c.difference, accuracy=accuracy), p_value(c.p), c.verdict]


def place(c: Contrast) -> str:
    """Between which members the family was read, and where it had to be taken at an end."""
    points = list((c.points or {}).values())
    texts: dict[str, list[float]] = {}
    for p in points:
        if not p.outside:
            text = p.below if p.below == p.above else f"between {p.below} and {p.above}"
        elif len(c.members) == 1:
            text = f"only member, {p.below}, with {MORE[p.outside]} bytes"
        else:
            text = f"{p.outside} of the family, {p.below}, with {MORE[p.outside]} bytes"
        texts.setdefault(text, []).append(p.nearest)
    parts = []
    for text, nearest in texts.items():
        if nearest[0]:
            text += f": {count(mean_interval(nearest).mean)}"
        if len(texts) > 1:
            text += f" ({len(nearest)} of {plural(len(points), 'seed')})"
        parts.append(text)
    return "; ".join(parts)


def size_table(group: Group, side: str) -> PageTable:
    """IDs at each final size in the published form; sizes the reference lacks share a column."""
    first = group.reference_method or group.finished[0]
    sizes = list(_rows(group, first.label, side))
    columns = [f"{side}s at size", *sizes, "other sizes", "total dims", "IDs × 128", "ratio"]
    rows = []
    for method in group.finished:
        counts = _rows(group, method.label, side)
        dims = sum(int(size) * n for size, n in counts.items())
        fixed = _memory(group, method.label, side, "fixed") / 4
        other = [f"{size}: {count(n)}" for size, n in counts.items() if size not in sizes]
        rows.append(
            [method.label, *(count(counts[d]) if d in counts else NONE for d in sizes)]
            + ["; ".join(other) or NONE, count(dims), count(fixed)]
            + [f"{percent(dims / fixed)}{PERCENT}"]
        )
    note = (
        f"Number of {side}s that end at each size, as a mean over seeds, and the sum of the sizes "
        "against IDs × 128."
    )
    words = frozenset({0, len(sizes) + 1})
    title = f"Final sizes of the {side}s"
    return PageTable(title, columns, rows, note, _reference_row(group), words)


def _rows(group: Group, label: str, side: str) -> dict[str, float]:
    """Size to mean number of IDs over the records of a method."""
    records = group.of(label)
    counts: dict[str, float] = {}
    for record in records:
        memory = record.content.get("memory", {}).get(side, {})
        for size, n in memory.get("rows_per_size", {}).items():
            counts[size] = counts.get(size, 0.0) + n / len(records)
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def _memory(group: Group, label: str, side: str, part: str) -> float:
    return mean_interval(
        record.content["memory"][side].get(part, 0) for record in group.of(label)
    ).mean


def bytes_table(group: Group) -> PageTable:
    """Bytes of users and items together, by what they are for."""
    columns = ["bytes", *PARTS, "serving / fixed"]
    limits = _limits(group)
    rows = []
    for method in group.finished:
        totals = {p: sum(_memory(group, method.label, side, p) for side in SIDES) for p in PARTS}
        share = f"{percent(totals['serving'] / totals['fixed'])}{PERCENT}"
        rows.append([method.label, *(count(totals[part]) for part in PARTS), share])
        rows[-1] += [count(limits[method.label][p]) for p in LIMITS] if limits else []
    note = (
        "Bytes really allocated at the end for users and items together, as a mean over seeds. "
        "Serving takes payload, slack, locations and chain; the optimizer's state is needed in "
        "training only; fixed is IDs × 128 numbers of 4 bytes."
    )
    if limits:
        columns += ["budget", "rows refused"]
        note += " Rows refused would have grown, and found no room within the budget; 0: none."
    return PageTable("Real bytes", columns, rows, note, _reference_row(group))


def _limits(group: Group) -> dict[str, dict[str, float]]:
    """By method the mean bytes of its budget and its refused rows; nothing where none is refused.

    A record of a run without a budget holds neither.
    """
    found = {
        method.label: {
            part: mean_interval(
                r.content["bytes"].get(part, 0) for r in group.of(method.label)
            ).mean
            for part in LIMITS
        }
        for method in group.finished
    }
    return found if any(each["refused"] for each in found.values()) else {}


def method_table(comparison: Comparison) -> PageTable:
    """Every planned method and its settings."""
    references = comparison.header["reference"]
    rows = [
        [m.label, m.mode, m.family, m.text, plain(m.options) if m.options else NONE]
        for m in comparison.methods
    ]
    marked = (i for i, m in enumerate(comparison.methods) if references.get(m.mode) == m.label)
    columns = ["method", "mode", "family", "what it is", "options"]
    note = "The reference of each mode is marked."
    every = frozenset(range(5))
    return PageTable("Methods", columns, rows, note, frozenset(marked), every, frozenset({3, 4}))


def write_csv(folder: Path) -> Path:
    """Write ``results.csv`` of a comparison: one line for each finished run.

    Args:
        folder: holds ``compare.json`` and ``runs/``.

    Returns:
        The path of the file.

    Raises:
        ReportError: ``folder`` holds no readable comparison.
    """
    columns = ("task", "mode", "label", "family", "seed")
    measures = ("accuracy", "loss", "log_loss", "auc")
    records = sorted(load(folder).records, key=lambda r: [getattr(r, name) for name in columns])
    path = folder / "results.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *measures, *(f"{s}_bytes" for s in BYTES), "cpu_seconds"])
        for record in records:
            row = [getattr(record, name) for name in columns]
            row += [_short(record.value(name), 6) for name in measures]
            row += [round(record.number(name)) for name in BYTES]
            writer.writerow([*row, _short(record.value("cpu_seconds"), 1)])
    return path


def _short(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
