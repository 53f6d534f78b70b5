"""``report.html`` of a comparison: one page with its figures inside, nothing fetched, no script.

Every number and every sentence of the page is computed from the records.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from . import figures
from .contrasts import (
    Comparison,
    Contrast,
    Difference,
    Group,
    Interval,
    best_control,
    load,
    mean_interval,
    paired_contrasts,
    same_bytes,
)

__all__ = ["render", "write"]

NONE = "\N{EN DASH}"
PERCENT = "\N{NO-BREAK SPACE}%"
SIDES = ("user", "item")
MORE = {"smallest": "more", "largest": "fewer"}
PARTS = ("payload", "slack", "locations", "chain", "serving", "optimizer", "fixed")


@dataclass(frozen=True)
class Table:
    """A table of texts; ``marked`` rows are set apart, ``words`` columns are not right-aligned.

    The columns in ``wrap`` may break their lines.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    marked: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset({0})
    wrap: frozenset[int] = frozenset()


@dataclass
class Part:
    """What the page shows of one group."""

    title: str
    anchor: str
    summary: list[str]
    tables: list[Table] = field(default_factory=list)
    memory: list[Table] = field(default_factory=list)
    drawn: list[dict[str, str]] = field(default_factory=list)


def write(folder: Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` of the comparison in ``folder``.

    Args:
        folder: holds ``compare.json`` and ``runs/``; runs that are missing are named in the page.

    Returns:
        The page's path.

    Raises:
        ReportError: ``folder`` holds no readable comparison; nothing is written.

    Example:
        >>> write(Path("nowhere"))
        Traceback (most recent call last):
        esapn.compare.contrasts.ReportError: nowhere: no compare.json; is it a comparison's folder?
    """
    comparison = load(folder)
    drawn = [figures.draw(comparison, group, folder / "figures") for group in comparison.groups]
    path = folder / "report.html"
    path.write_text(render(comparison, drawn), encoding="utf-8")
    return path


def render(comparison: Comparison, drawn: Sequence[Sequence[figures.Drawn]]) -> str:
    """The page's text; ``drawn`` holds the figures of every group of the comparison."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    header, data = comparison.header, comparison.header["data"]
    parts = [_part(group, mine) for group, mine in zip(comparison.groups, drawn, strict=True)]
    planned = len(comparison.runs) + len(comparison.missing) + len(comparison.not_finite)
    return environment.get_template("page.html").render(
        name=data.get("name", "data"),
        order=header.get("order", "?"),
        seeds=", ".join(map(str, header["seeds"])),
        finished=len(comparison.runs),
        planned=planned,
        missing=comparison.missing,
        not_finite=comparison.not_finite,
        parts=parts,
        conditions=_conditions(comparison),
        methods=_method_table(comparison),
        shared=_shared_settings(comparison),
        configs=_method_settings(comparison),
    )


def _part(group: Group, drawn: Sequence[figures.Drawn]) -> Part:
    title = f"{group.task}, {group.setting}"
    anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    part = Part(title, anchor, _summary(group))
    if group.runs:
        part.tables = [_results(group), *_difference_tables(group), _cost(group)]
        part.memory = [*(_rows_table(group, side) for side in SIDES), _bytes_table(group)]
    for picture in drawn:
        encoded = base64.b64encode(picture.path.read_bytes()).decode("ascii")
        part.drawn.append(
            {"title": picture.title, "caption": picture.caption, "file": picture.path.name}
            | {"source": f"data:image/png;base64,{encoded}"}
        )
    return part


def _loss(value: float) -> str:
    return f"{value:.5f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _with_half(interval: Interval | None, show: Any) -> str:
    if interval is None:
        return NONE
    if interval.half is None:
        return show(interval.mean)
    return f"{show(interval.mean)} ± {show(interval.half)}"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    # What rounds to zero has no sign worth showing.
    return text[1:] if not text.strip("+-0.") else text.replace("-", "\N{MINUS SIGN}")


def _difference(d: Difference, *, accuracy: bool = False) -> str:
    scale, digits = (100, 2) if accuracy else (1, 5)
    text = _signed(scale * d.mean, digits)
    if d.half is None:
        return f"{text} (one seed)"
    return f"{text} [{_signed(scale * d.low, digits)}, {_signed(scale * d.high, digits)}]"


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _share(group: Group, label: str, name: str) -> str:
    return f"{100 * group.mean(label, name) / group.mean(label, 'fixed128'):.1f}{PERCENT}"


def _plural(n: int, noun: str, plural: str = "") -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def _results(group: Group) -> Table:
    binary = group.task == "binary"
    quality = [("accuracy %", "accuracy", _percent), (group.loss_name, "loss", _loss)]
    if binary:
        quality += [("log loss", "log_loss", _loss), ("AUC", "auc", _loss)]
    columns = ["method", "seeds", "front", *(title for title, _, _ in quality)]
    columns += ["bytes, final", "bytes, peak", "bytes, mean"]
    rows, front = [], group.front
    for method in group.finished:
        label = method.label
        row = [label, str(len(group.of(label))), "yes" if label in front else NONE]
        row += [_with_half(group.interval(label, name), show) for _, name, show in quality]
        for name in ("serving", "serving_peak", "serving_mean"):
            row.append(f"{_count(group.mean(label, name))} ({_share(group, label, name)})")
        rows.append(row)
    rows += _absent(group, len(columns))
    note = (
        "Test part, each event predicted before it is learnt from. Mean over seeds ± half of the "
        "95 % t interval, the lowest loss first. Bytes are what serving takes for users and items "
        "together, at the end, at most and on average over the stream, as a mean over seeds, and "
        "in brackets of fixed 128. Front: no other method has as few bytes and as low a loss."
    )
    if len({frozenset(group.values(method.label, "loss")) for method in group.finished}) > 1:
        note += (
            " Seeds are missing: the order and the front use each method's difference to the "
            "reference over the seeds that both have."
        )
    if not binary:
        note += " The log loss of several classes is their cross-entropy."
    return Table("Results", columns, rows, note, _marked(group), frozenset({0, 2}))


def _absent(group: Group, width: int) -> list[list[str]]:
    """A row for every method that has no run yet."""
    done = {method.label for method in group.finished}
    return [
        [method.label, "0", *[NONE] * (width - 2)]
        for method in group.methods
        if method.label not in done
    ]


def _marked(group: Group) -> frozenset[int]:
    labels = [method.label for method in group.finished]
    return frozenset({labels.index(group.reference)} if group.reference in labels else ())


def _cost(group: Group) -> Table:
    columns = ["method", "wall s", "CPU s", "events / s", "peak memory MB", "bytes in training"]
    shows = [
        ("wall_seconds", lambda x: f"{x:,.1f}"),
        ("cpu_seconds", lambda x: f"{x:,.1f}"),
        ("events_per_second", _count),
        ("peak_rss", lambda x: f"{x / 1e6:,.1f}"),
        ("training", _count),
    ]
    rows = [
        [
            method.label,
            *(_with_half(group.interval(method.label, name), show) for name, show in shows),
        ]
        for method in group.finished
    ]
    note = (
        "Mean over seeds ± half of the 95 % interval. Peak memory is that of the whole process. "
        "Bytes in training count the tables and their optimizer's state."
    )
    return Table("Cost", columns, rows, note, _marked(group))


def _difference_tables(group: Group) -> list[Table]:
    reference = group.reference_method
    if reference is None:
        return []
    pairs = paired_contrasts(group)
    loss, mine = group.loss_name, reference.label
    columns = ["compared with", "bytes", "seeds", f"{loss}, difference", "Holm p", f"{mine} is"]
    columns += ["accuracy, difference (points)", "Holm p", f"{mine} is"]
    rows = [[c.name, _share(group, c.name, "serving"), *_contrast_cells(c)] for c in pairs]
    note = (
        f"{mine} minus the other, paired by seed, with the 95 % t interval of one difference. A "
        "difference is named only if its t test's p stays below 0.05 after Holm's correction over "
        f"all {_plural(len(pairs), 'row')}. Bytes: final serving bytes of fixed 128; {mine} takes "
        f"{_share(group, mine, 'serving')}."
    )
    words = frozenset({0, 5, 8})
    tables = [Table(f"{mine} against every other method", columns, rows, note, words=words)]

    controls = same_bytes(group)
    note = (
        f"Each family of methods at the serving bytes that {mine} ends with in the same seed: "
        "linear in log(bytes) between the family's neighbours in that seed. A family that does not "
        "reach so few or so many bytes is taken at its nearest end, and the row says so. In "
        "brackets: finished members. Holm's correction is over "
        f"{_plural(len(controls), 'family', 'families')}."
    )
    for first, last, name in ((3, 6, loss), (6, 9, "accuracy %")):
        rows = []
        for c in controls:
            its = _with_half(c.loss, _loss) if name == loss else _with_half(c.accuracy, _percent)
            seeds, *cells = _contrast_cells(c)
            cells = cells[first - 3 : last - 3]
            rows.append([f"{c.name} ({len(c.members)})", _where(c), its, seeds, *cells])
        heads = ["family", f"at the bytes of {mine}", f"its {name} there", "seeds"]
        title = f"At the same serving bytes: {name.removesuffix(' %')}"
        heads += columns[first:last]
        if name != loss:
            note = "As above; Holm's correction is over the accuracies by themselves."
        tables.append(Table(title, heads, rows, note, words=frozenset({0, 1, 6})))
    return tables


def _contrast_cells(c: Contrast) -> list[str]:
    return [
        str(c.loss_difference.n),
        _difference(c.loss_difference),
        _p(c.loss_p),
        c.loss_verdict,
        _difference(c.accuracy_difference, accuracy=True),
        _p(c.accuracy_p),
        c.accuracy_verdict,
    ]


def _where(c: Contrast) -> str:
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
            text += f": {_count(mean_interval(nearest).mean)}"
        if len(texts) > 1:
            text += f" ({len(nearest)} of {_plural(len(points), 'seed')})"
        parts.append(text)
    return "; ".join(parts)


def _summary(group: Group) -> list[str]:
    """Plain sentences: the best method, the reference, and the reference at equal bytes."""
    if not group.runs:
        return ["No run of this part has finished."]
    loss, best, reference = group.loss_name, group.finished[0], group.reference_method
    lines = [f"The lowest mean loss is that of {best.label}: {_standing(group, best.label)}."]
    if reference is None:
        missing = f"The reference method, {group.reference}, has no finished run"
        return [*lines, f"{missing if group.reference else 'No reference method is named'}."]
    mine = reference.label
    if mine != best.label:
        place = [method.label for method in group.finished].index(mine) + 1
        lines.append(
            f"The reference, {mine}, is number {place} of {len(group.finished)} by loss: "
            f"{_standing(group, mine)}."
        )
    control = best_control(group)
    if control is None:
        lines.append(f"No control has runs at the bytes of {mine} or fewer.")
    else:
        lines += _control_lines(group, control, mine, loss)
    lines.append(_dominated(group, mine))
    return lines


def _standing(group: Group, label: str) -> str:
    loss, accuracy = group.interval(label, "loss"), group.interval(label, "accuracy")
    seeds = len(group.of(label))
    return (
        f"{group.loss_name} {_with_half(loss, _loss)}, "
        f"accuracy {_with_half(accuracy, _percent)}{PERCENT}, "
        f"{_count(group.mean(label, 'serving'))} serving bytes "
        f"({_share(group, label, 'serving')} of fixed 128; "
        f"{_plural(seeds, 'seed') if seeds > 1 else 'one seed, so no interval'})"
    )


def _control_lines(group: Group, control: Contrast, mine: str, loss: str) -> list[str]:
    d, a = control.loss_difference, control.accuracy_difference
    direction = "lower" if d.mean < 0 else "higher"
    text = (
        f"At the serving bytes of {mine}, or fewer where a family ends below them, the best "
        f"control is the family {control.name} ({_where(control)}). There the {loss} of {mine} is "
        f"{_loss(abs(d.mean))} {direction}"
    )
    points = _signed(100 * a.mean, 2)
    if d.half is None:
        return [f"{text} and its accuracy differs by {points} points (one seed, so no verdict)."]
    low, high = _signed(d.low, 5), _signed(d.high, 5)
    text += (
        f" (95{PERCENT} interval of the difference {low} to {high}, {_plural(d.n, 'seed')}): "
        f"{control.loss_verdict}. Its accuracy differs by {points} points: "
        f"{control.accuracy_verdict}."
    )
    verdicts = [c.loss_verdict for c in same_bytes(group) if not c.larger]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    return [
        text,
        f"Of {_plural(len(verdicts), 'control family', 'control families')} that have runs at its "
        f"bytes or fewer, {mine} has a lower loss than {better} and a higher one than {worse}; for "
        f"{len(verdicts) - better - worse} no difference is shown.",
    ]


def _dominated(group: Group, mine: str) -> str:
    serving, loss = group.mean(mine, "serving"), group.standing(mine)
    verdicts = {c.name: c.loss_verdict for c in paired_contrasts(group)}
    above = [
        method.label
        for method in group.finished
        if group.mean(method.label, "serving") <= serving and group.standing(method.label) < loss
    ]
    if not above:
        return f"No method has both a lower mean loss and no more serving bytes than {mine}."
    sure = [label for label in above if verdicts.get(label) == "worse"]
    many = _plural(len(above), "method has", "methods have")
    text = f"{many} a lower mean loss with no more bytes than {mine}: {', '.join(above)}"
    return f"{text}; the difference is clear for {', '.join(sure) if sure else 'none'}."


def _rows_table(group: Group, side: str) -> Table:
    """IDs at each final size in the published form; sizes the reference lacks share a column."""
    first = group.reference_method or group.finished[0]
    sizes = list(_rows(group, first.label, side))
    columns = [f"{side}s at size", *sizes, "other sizes", "total dims", "IDs × 128", "ratio"]
    rows = []
    for method in group.finished:
        counts = _rows(group, method.label, side)
        dims = sum(int(size) * count for size, count in counts.items())
        fixed = _memory(group, method.label, side, "fixed") / 4
        other = [f"{size}: {_count(n)}" for size, n in counts.items() if size not in sizes]
        rows.append(
            [method.label, *(_count(counts[d]) if d in counts else NONE for d in sizes)]
            + [
                "; ".join(other) or NONE,
                _count(dims),
                _count(fixed),
                f"{100 * dims / fixed:.2f}{PERCENT}",
            ]
        )
    note = (
        f"Number of {side}s that end at each size, as a mean over seeds, and the sum of the sizes "
        "against IDs × 128."
    )
    words = frozenset({0, len(sizes) + 1})
    return Table(f"Final sizes of the {side}s", columns, rows, note, _marked(group), words)


def _rows(group: Group, label: str, side: str) -> dict[str, float]:
    """Size to mean number of IDs over the runs of a method."""
    runs = group.of(label)
    counts: dict[str, float] = {}
    for run in runs:
        for size, n in run.record.get("memory", {}).get(side, {}).get("rows_per_size", {}).items():
            counts[size] = counts.get(size, 0.0) + n / len(runs)
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def _memory(group: Group, label: str, side: str, part: str) -> float:
    found = [run.record["memory"][side].get(part, 0) for run in group.of(label)]
    return mean_interval(found).mean


def _bytes_table(group: Group) -> Table:
    columns = ["bytes", *PARTS, "serving / fixed"]
    rows = []
    for method in group.finished:
        totals = {p: sum(_memory(group, method.label, side, p) for side in SIDES) for p in PARTS}
        share = f"{100 * totals['serving'] / totals['fixed']:.2f}{PERCENT}"
        rows.append([method.label, *(_count(totals[part]) for part in PARTS), share])
    note = (
        "Bytes really allocated at the end for users and items together, as a mean over seeds. "
        "Serving takes payload, slack, locations and chain; the optimizer's state is needed in "
        "training only; fixed is IDs × 128 numbers of 4 bytes."
    )
    return Table("Real bytes", columns, rows, note, _marked(group))


def _conditions(comparison: Comparison) -> list[tuple[str, str]]:
    header, data = comparison.header, comparison.header["data"]
    rows = [(str(name), _plain(value)) for name, value in data.items()]
    rows = [(f"data: {name}", value) for name, value in rows]
    rows += [("order", str(header.get("order", "?"))), ("seeds", _plain(header["seeds"]))]
    rows += [("started", str(header.get("started", "?")))]
    rows += [(str(name), _plain(value)) for name, value in header.get("info", {}).items()]
    others = {json.dumps(run.record.get("info"), sort_keys=True) for run in comparison.runs}
    if len(others) > 1:
        rows.append(("versions and machines among the runs", f"{len(others)} that differ"))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, Iterable):
        return ", ".join(map(_plain, value)) or NONE
    return str(value)


def _method_table(comparison: Comparison) -> Table:
    references = comparison.header["reference"]
    rows = [
        [m.label, m.setting, m.family, m.text, _plain(m.options) if m.options else NONE]
        for m in comparison.methods
    ]
    marked = (i for i, m in enumerate(comparison.methods) if references.get(m.setting) == m.label)
    columns = ["method", "setting", "family", "what it is", "options"]
    note = "The reference of each setting is marked."
    every = frozenset(range(5))
    return Table("Methods", columns, rows, note, frozenset(marked), every, frozenset({3, 4}))


def _shared_settings(comparison: Comparison) -> dict[str, str]:
    """The settings that every run has the same value of."""
    configs = [run.record["config"] for run in comparison.runs]
    first: Mapping[str, Any] = configs[0] if configs else {}
    return {
        name: json.dumps(value)
        for name, value in first.items()
        if all(name in config and config[name] == value for config in configs)
    }


def _method_settings(comparison: Comparison) -> list[tuple[str, str]]:
    """Of every task and method, the settings that not every run shares, without the seed."""
    shared = {"seed"} | _shared_settings(comparison).keys()
    result = []
    for group in comparison.groups:
        for method in group.methods:
            runs = group.of(method.label)
            if not runs:
                continue
            own = [
                {k: v for k, v in run.record["config"].items() if k not in shared} for run in runs
            ]
            title = f"{method.label} ({group.task}, {group.setting})"
            if any(settings != own[0] for settings in own):
                title += f": settings differ among its seeds, these are of seed {runs[0].seed}"
            result.append((title, json.dumps(own[0], indent=1)))
    return result
