"""What a comparison's runs say: intervals, paired differences, families at equal bytes.

    interval            m +- t(0.975, n - 1) s / sqrt(n)
    paired difference   the same for d_s = a_s - b_s, over the seeds s that both have
    at equal bytes      linear in log(bytes) between a family's two neighbours, seed by seed

``load`` reads a folder of runs, finished or not; everything else is a pure function of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]

__all__ = [
    "AtBytes",
    "Comparison",
    "Contrast",
    "Difference",
    "Group",
    "Interval",
    "Method",
    "ReportError",
    "Run",
    "at_bytes",
    "best_control",
    "holm",
    "load",
    "mean_interval",
    "paired_contrasts",
    "paired_difference",
    "pareto_front",
    "same_bytes",
    "verdict",
]

LEVEL = 0.95
HEADER = ("data", "tasks", "settings", "seeds", "methods", "reference")
MEASURED = ("loss", "accuracy")
BYTES = ("serving", "serving_peak", "serving_mean", "training", "fixed128")


class ReportError(ValueError):
    """A folder that holds no readable comparison."""


@dataclass(frozen=True)
class Interval:
    """A mean, ``half`` its 95 % interval's width (None where one value has no spread)."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference a - b; ``p`` of the two-sided t test, None with one seed."""

    p: float | None


def mean_interval(values: Iterable[float]) -> Interval:
    """Mean m and half-width t(0.975, n - 1) s / sqrt(n), s with n - 1 in the denominator.

    Args:
        values: at least one, in any unit; one per seed.

    Returns:
        The interval in the unit of the values; its ``half`` is None for one value.

    Raises:
        ValueError: no value.

    Example:
        >>> m = mean_interval([1.0, 2.0, 3.0])
        >>> f"{m.mean:.1f} +- {m.half:.3f}"
        '2.0 +- 2.484'
    """
    values = list(values)
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, float(stdtrit(n - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(n), n)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Mean of a_s - b_s over the common seeds s, its 95 % interval and p = 2 P(T > |t|).

    Args:
        a: seed to value.
        b: seed to value, in the same unit.

    Returns:
        The difference in that unit, ``n`` the number of common seeds.

    Raises:
        ValueError: no seed in common.

    Example:
        >>> d = paired_difference({0: 3.0, 1: 5.0, 7: 9.0}, {0: 2.0, 1: 2.0})
        >>> d.mean, d.n
        (2.0, 2)
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError("a paired difference needs a common seed")
    interval = mean_interval(a[s] - b[s] for s in seeds)
    if interval.half is None:
        return Difference(interval.mean, None, 1, None)
    if interval.half == 0:  # every seed differs by the same amount: the t statistic is 0 / 0 or inf
        p = 1.0 if interval.mean == 0 else 0.0
    else:
        t = abs(interval.mean) / interval.half * float(stdtrit(interval.n - 1, (1 + LEVEL) / 2))
        p = 2 * float(stdtr(interval.n - 1, -t))
    return Difference(interval.mean, interval.half, interval.n, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p: of the sorted p_(1) <= ... <= p_(m), max over j <= i of (m - j + 1) p_(j).

    Args:
        p_values: m of them, from 0 to 1.

    Returns:
        Adjusted values at most 1, in the order given. Rejecting those below 0.05 keeps the chance
        of any false rejection among the m below 5 % (Holm, 1979).

    Example:
        >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
        [0.06, 0.03, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (bytes, loss) that no other point matches in both and beats in one.

    Example:
        >>> pareto_front([(8, 0.3), (1, 0.5), (4, 0.4), (9, 0.35)])
        [1, 2, 0]
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        last = points[front[-1]] if front else None
        if last is None or points[i][1] < last[1] or points[i] == last:
            front.append(i)
    return front


@dataclass(frozen=True)
class Run:
    """One finished run; ``record`` is its file."""

    task: str
    setting: str
    label: str
    family: str
    seed: int
    record: Mapping[str, Any]

    def value(self, name: str) -> float | None:
        """A number of the test part, of ``bytes`` or of the run as a whole; None if not finite."""
        for place in (self.record["test"], self.record["bytes"], self.record):
            if name in place:
                found = place[name]
                return float(found) if _finite(found) else None
        return None

    def number(self, name: str) -> float:
        """``value`` of a number that ``load`` has checked."""
        found = self.value(name)
        assert found is not None
        return found


@dataclass(frozen=True)
class AtBytes:
    """A family's measure at given serving bytes, on the runs of one seed.

    ``below`` and ``above`` are its neighbours' labels. Outside the family's range both are the
    nearest end, ``outside`` says which ("smallest" or "largest" of the family) and ``nearest`` is
    that end's own serving bytes.
    """

    value: float
    below: str
    above: str
    outside: str = ""
    nearest: float = 0.0


def at_bytes(
    runs: Iterable[Run], serving: Mapping[int, float], measure: str = "loss"
) -> dict[int, AtBytes]:
    """A family's measure at given serving bytes b, seed by seed, from that seed's runs alone.

        y(b) = y_0 + (y_1 - y_0) log(b / b_0) / log(b_1 / b_0)     b_0 <= b <= b_1 neighbours

    Of two members with equal bytes the one with the lower loss counts.

    Args:
        runs: the family's runs, of any seeds.
        serving: seed to bytes.
        measure: ``"loss"`` or ``"accuracy"``.

    Returns:
        Seed to value, for the seeds that both have.

    Example:
        >>> def run(label, serving, loss):
        ...     record = {"test": {"loss": loss}, "bytes": {"serving": serving}}
        ...     return Run("binary", "tuned", label, "fixed", 0, record)
        >>> family = [run("fixed-4", 100, 0.30), run("fixed-8", 400, 0.20)]
        >>> round(at_bytes(family, {0: 200})[0].value, 3)
        0.25
        >>> at_bytes(family, {0: 900})[0].outside
        'largest'
    """
    members: dict[int, dict[float, Run]] = {}
    for run in runs:
        mine = members.setdefault(run.seed, {})
        size = run.number("serving")
        if size not in mine or run.number("loss") < mine[size].number("loss"):
            mine[size] = run
    result = {}
    for seed in sorted(members.keys() & serving.keys()):
        target, mine = serving[seed], members[seed]
        below = max((size for size in mine if size <= target), default=None)
        above = min((size for size in mine if size >= target), default=None)
        if below is None or above is None:
            end = min(mine) if below is None else max(mine)
            run = mine[end]
            outside = "smallest" if below is None else "largest"
            value = run.number(measure)
            result[seed] = AtBytes(value, run.label, run.label, outside, end)
            continue
        y0, y1 = mine[below].number(measure), mine[above].number(measure)
        share = math.log(target / below) / math.log(above / below) if above > below else 0.0
        result[seed] = AtBytes(y0 + share * (y1 - y0), mine[below].label, mine[above].label)
    return result


@dataclass(frozen=True)
class Method:
    label: str
    family: str
    setting: str
    text: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """One task in one setting: its methods, their finished runs and the reference's label."""

    task: str
    setting: str
    methods: tuple[Method, ...]
    runs: tuple[Run, ...]
    reference: str | None

    @property
    def loss_name(self) -> str:
        return "MSE" if self.task == "binary" else "cross-entropy"

    def of(self, label: str) -> list[Run]:
        """The finished runs of a method, by seed."""
        return [run for run in self.runs if run.label == label]

    def values(self, label: str, name: str) -> dict[int, float]:
        """Seed to a method's number, where a run has it."""
        found = {run.seed: run.value(name) for run in self.of(label)}
        return {seed: value for seed, value in found.items() if value is not None}

    def interval(self, label: str, name: str) -> Interval | None:
        values = self.values(label, name).values()
        return mean_interval(values) if values else None

    def mean(self, label: str, name: str) -> float:
        """Mean over seeds of a number that every run has."""
        return mean_interval(run.number(name) for run in self.of(label)).mean

    def standing(self, label: str) -> float:
        """A method's mean loss as ranked.

        Seeds differ more than methods do. A method whose seeds are not the reference's stands at
        the reference's mean loss plus the mean difference to it over their common seeds.
        """
        mine = self.values(label, "loss")
        reference = self.values(self.reference or "", "loss")
        common = mine.keys() & reference.keys()
        if not common or mine.keys() == reference.keys():
            return self.mean(label, "loss")
        return mean_interval(reference.values()).mean + paired_difference(mine, reference).mean

    @property
    def finished(self) -> list[Method]:
        """The methods with a run, by their standing."""
        done = {run.label for run in self.runs}
        methods = [method for method in self.methods if method.label in done]
        return sorted(methods, key=lambda method: self.standing(method.label))

    @property
    def reference_method(self) -> Method | None:
        """The reference, where it has a run."""
        return next((m for m in self.finished if m.label == self.reference), None)

    @property
    def families(self) -> dict[str, list[Method]]:
        """Finished methods of every family in the order named, members by their mean bytes."""
        done = {method.label for method in self.finished}
        families: dict[str, list[Method]] = {}
        for method in self.methods:
            if method.label in done:
                families.setdefault(method.family, []).append(method)
        for members in families.values():
            members.sort(key=lambda method: self.mean(method.label, "serving"))
        return families

    @property
    def front(self) -> list[str]:
        """Labels on the front of standing over mean serving bytes, from few bytes to many."""
        labels = [method.label for method in self.finished]
        points = [(self.mean(x, "serving"), self.standing(x)) for x in labels]
        return [labels[i] for i in pareto_front(points)]


@dataclass(frozen=True)
class Contrast:
    """The reference against one other: its own value, reference minus it, Holm-adjusted p.

    ``points`` and ``members`` are set where the other is a family at the reference's bytes.
    """

    name: str
    loss: Interval
    accuracy: Interval
    loss_difference: Difference
    accuracy_difference: Difference
    loss_p: float | None = None
    accuracy_p: float | None = None
    points: Mapping[int, AtBytes] | None = None
    members: tuple[Method, ...] = ()

    @property
    def loss_verdict(self) -> str:
        return verdict(self.loss_difference.mean, self.loss_p, lower_is_better=True)

    @property
    def accuracy_verdict(self) -> str:
        return verdict(self.accuracy_difference.mean, self.accuracy_p, lower_is_better=False)

    @property
    def larger(self) -> bool:
        """Whether the family has no member with as few bytes, in some seed."""
        return any(point.outside == "smallest" for point in (self.points or {}).values())


def verdict(difference: float, adjusted_p: float | None, *, lower_is_better: bool) -> str:
    """The difference a - b in words for a; ``adjusted_p`` is Holm's over all that are compared.

    Example:
        >>> verdict(-0.002, 0.01, lower_is_better=True)
        'better'
        >>> verdict(-0.002, 0.20, lower_is_better=True)
        'no difference shown'
    """
    if adjusted_p is None:
        return "one seed"
    if adjusted_p >= 1 - LEVEL:
        return "no difference shown"
    return "better" if (difference < 0) == lower_is_better else "worse"


def paired_contrasts(group: Group) -> list[Contrast]:
    """The reference against every other finished method of its group, by the other's loss."""
    if group.reference_method is None:
        return []
    mine = {name: group.values(group.reference_method.label, name) for name in MEASURED}
    others = [
        (method.label, {name: group.values(method.label, name) for name in MEASURED}, None, ())
        for method in group.finished
        if method.label != group.reference
    ]
    return _contrasts(mine, others)


def same_bytes(group: Group) -> list[Contrast]:
    """The reference against every other family at the reference's serving bytes of each seed."""
    reference = group.reference_method
    if reference is None:
        return []
    mine = {name: group.values(reference.label, name) for name in MEASURED}
    serving = group.values(reference.label, "serving")
    others: list[Any] = []
    for family, members in group.families.items():
        if family == reference.family:
            continue
        runs = [run for run in group.runs if run.family == family]
        points = {name: at_bytes(runs, serving, name) for name in MEASURED}
        values = {
            name: {seed: point.value for seed, point in points[name].items()} for name in MEASURED
        }
        others.append((family, values, points["loss"], tuple(members)))
    return sorted(_contrasts(mine, others), key=lambda contrast: contrast.loss.mean)


def best_control(group: Group) -> Contrast | None:
    """The family that does best against the reference with no more than its bytes, by loss."""
    controls = [contrast for contrast in same_bytes(group) if not contrast.larger]
    return max(controls, key=lambda control: control.loss_difference.mean, default=None)


def _contrasts(mine: Mapping[str, dict[int, float]], others: Iterable[Any]) -> list[Contrast]:
    rows = []
    for name, values, points, members in others:
        if not mine["loss"].keys() & values["loss"].keys():
            continue
        loss, accuracy = (mean_interval(values[measure].values()) for measure in MEASURED)
        d_loss = paired_difference(mine["loss"], values["loss"])
        d_accuracy = paired_difference(mine["accuracy"], values["accuracy"])
        rows.append((name, loss, accuracy, d_loss, d_accuracy, points, members))
    loss_p = _adjusted([row[3].p for row in rows])
    accuracy_p = _adjusted([row[4].p for row in rows])
    return [
        Contrast(*row[:5], loss_p=lp, accuracy_p=ap, points=row[5], members=row[6])
        for row, lp, ap in zip(rows, loss_p, accuracy_p, strict=True)
    ]


def _adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    known = [p for p in p_values if p is not None]
    adjusted = iter(holm(known))
    return [None if p is None else next(adjusted) for p in p_values]


@dataclass(frozen=True)
class Comparison:
    """A folder of runs: its header, its groups, and the planned runs that are not there.

    ``not_finite`` names the runs that ended without a finite loss; no mean includes them.
    """

    header: Mapping[str, Any]
    groups: tuple[Group, ...]
    methods: tuple[Method, ...]
    missing: tuple[str, ...]
    not_finite: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def load(folder: Path) -> Comparison:
    """Read ``compare.json`` and the runs beside it that the comparison planned.

    Raises:
        ReportError: no ``compare.json``, or a file that is broken, lacks a part or belongs to
            other data.

    Example:
        >>> load(Path("nowhere"))
        Traceback (most recent call last):
        esapn.compare.contrasts.ReportError: nowhere: no compare.json; is it a comparison's folder?
    """
    header = _read(folder / "compare.json", HEADER)
    try:
        methods = tuple(
            Method(m["label"], m["family"], m["setting"], m.get("text", ""), m.get("options", {}))
            for m in header["methods"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{folder / 'compare.json'}: methods: {error!r}") from error
    groups, missing, not_finite = [], [], []
    for task in header["tasks"]:
        for setting in header["settings"]:
            mine, runs = tuple(m for m in methods if m.setting == setting), []
            for method in mine:
                for seed in header["seeds"]:
                    name = f"{task}-{setting}-{method.label}-s{seed}"
                    path = folder / "runs" / f"{name}.json"
                    if not path.is_file():
                        missing.append(name)
                        continue
                    record = _read_run(path, header["data"])
                    if all(_finite(record["test"][measure]) for measure in MEASURED):
                        runs.append(Run(task, setting, method.label, method.family, seed, record))
                    else:
                        not_finite.append(name)
            reference = header["reference"].get(setting)
            groups.append(Group(task, setting, mine, tuple(runs), reference))
    return Comparison(header, tuple(groups), methods, tuple(missing), tuple(not_finite))


def _read(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReportError(f"{path.parent}: no {path.name}; is it a comparison's folder?") from error
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not readable as JSON: {error}") from error
    lacking = [key for key in keys if not isinstance(record, dict) or key not in record]
    if lacking:
        raise ReportError(f"{path}: lacks {', '.join(lacking)}")
    return record


def _read_run(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    record = _read(path, ("test", "bytes", "memory", "config"))
    lacking = [key for key in MEASURED if key not in record["test"]]
    lacking += [f"bytes {key}" for key in BYTES if not _finite(record["bytes"].get(key))]
    if lacking:
        raise ReportError(f"{path}: lacks {', '.join(lacking)}")
    if record["bytes"]["serving"] <= 0:
        raise ReportError(f"{path}: serving bytes must be positive")
    checksum = record.get("data", {}).get("sha256", data.get("sha256"))
    if checksum != data.get("sha256"):
        raise ReportError(f"{path}: run on other data than compare.json names")
    return record


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
