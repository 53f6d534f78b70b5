"""The reference against other methods, and against whole families at the reference's bytes.

at equal bytes   linear in log(bytes) between a family's two neighbours, seed by seed
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .intervals import LEVEL, Difference, Interval, holm, mean_interval, paired_difference
from .records import MEASURED, Group, Method, Record

__all__ = [
    "AtBytes",
    "Compared",
    "Contrast",
    "at_bytes",
    "best_control",
    "paired_contrasts",
    "same_bytes",
    "verdict",
]


@dataclass(frozen=True)
class AtBytes:
    """A family's measure at given serving bytes, on the records of one seed.

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
    records: Iterable[Record], serving: Mapping[int, float], measure: str = "loss"
) -> dict[int, AtBytes]:
    """A family's measure at given serving bytes b, seed by seed, from that seed's records alone.

        y(b) = y_0 + (y_1 - y_0) log(b / b_0) / log(b_1 / b_0)     b_0 <= b <= b_1 neighbours

    Of two members with equal bytes the one with the lower loss counts.

    Args:
        records: the family's, of any seeds.
        serving: seed to bytes.
        measure: ``"loss"`` or ``"accuracy"``.

    Returns:
        Seed to value, for the seeds that both have.

    Example:
        >>> def record(label, serving, loss):
        ...     content = {"test": {"loss": loss}, "bytes": {"serving": serving}}
        ...     return Record("binary", "tuned", label, "fixed", 0, content)
        >>> family = [record("fixed-4", 100, 0.30), record("fixed-8", 400, 0.20)]
        >>> round(at_bytes(family, {0: 200})[0].value, 3)
        0.25
        >>> at_bytes(family, {0: 900})[0].outside
        'largest'
    """
    members: dict[int, dict[float, Record]] = {}
    for record in records:
        mine = members.setdefault(record.seed, {})
        size = record.number("serving")
        if size not in mine or record.number("loss") < mine[size].number("loss"):
            mine[size] = record
    result = {}
    for seed in sorted(members.keys() & serving.keys()):
        target, mine = serving[seed], members[seed]
        below = max((size for size in mine if size <= target), default=None)
        above = min((size for size in mine if size >= target), default=None)
        if below is None or above is None:
            end = min(mine) if below is None else max(mine)
            outside = "smallest" if below is None else "largest"
            label = mine[end].label
            result[seed] = AtBytes(mine[end].number(measure), label, label, outside, end)
            continue
        y0, y1 = mine[below].number(measure), mine[above].number(measure)
        share = math.log(target / below) / math.log(above / below) if above > below else 0.0
        result[seed] = AtBytes(y0 + share * (y1 - y0), mine[below].label, mine[above].label)
    return result


@dataclass(frozen=True)
class Compared:
    """One measure of two methods: the other's own, and the reference's minus the other's.

    ``p`` is adjusted by Holm's correction over all that the reference is compared with.
    """

    other: Interval
    difference: Difference
    p: float | None
    lower_is_better: bool

    @property
    def verdict(self) -> str:
        """The difference in words for the reference."""
        return verdict(self.difference.mean, self.p, lower_is_better=self.lower_is_better)


@dataclass(frozen=True)
class Contrast:
    """The reference against one other, by loss and by accuracy.

    ``points`` and ``members`` are set where the other is a family at the reference's bytes.
    """

    name: str
    loss: Compared
    accuracy: Compared
    points: Mapping[int, AtBytes] | None = None
    members: tuple[Method, ...] = ()

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
    reference = group.reference_method
    if reference is None:
        return []
    mine = _measures(group, reference.label)
    others = [method for method in group.finished if method.label != reference.label]
    found = (_contrast(mine, m.label, _measures(group, m.label)) for m in others)
    return _adjusted(found)


def same_bytes(group: Group) -> list[Contrast]:
    """The reference against every other family at the reference's serving bytes of each seed."""
    reference = group.reference_method
    if reference is None:
        return []
    mine = _measures(group, reference.label)
    serving = group.values(reference.label, "serving")
    found = []
    for family, members in group.families.items():
        if family == reference.family:
            continue
        records = [record for record in group.records if record.family == family]
        points = {name: at_bytes(records, serving, name) for name in MEASURED}
        values = {
            name: {seed: point.value for seed, point in points[name].items()} for name in MEASURED
        }
        found.append(_contrast(mine, family, values, points["loss"], tuple(members)))
    return sorted(_adjusted(found), key=lambda contrast: contrast.loss.other.mean)


def best_control(group: Group) -> Contrast | None:
    """The family that does best against the reference with no more than its bytes, by loss."""
    controls = [contrast for contrast in same_bytes(group) if not contrast.larger]
    return max(controls, key=lambda control: control.loss.difference.mean, default=None)


def _measures(group: Group, label: str) -> dict[str, dict[int, float]]:
    return {name: group.values(label, name) for name in MEASURED}


def _contrast(
    mine: Mapping[str, Mapping[int, float]],
    name: str,
    values: Mapping[str, Mapping[int, float]],
    points: Mapping[int, AtBytes] | None = None,
    members: tuple[Method, ...] = (),
) -> Contrast | None:
    """With its own p, not adjusted yet; None without a common seed."""
    if not mine["loss"].keys() & values["loss"].keys():
        return None
    compared = {}
    for measure in MEASURED:
        difference = paired_difference(mine[measure], values[measure])
        other = mean_interval(values[measure].values())
        compared[measure] = Compared(other, difference, difference.p, measure == "loss")
    return Contrast(name, compared["loss"], compared["accuracy"], points, members)


def _adjusted(contrasts: Iterable[Contrast | None]) -> list[Contrast]:
    """Holm's correction over the contrasts there are, of each measure by itself."""
    found = [contrast for contrast in contrasts if contrast is not None]
    losses = _holm([contrast.loss for contrast in found])
    accuracies = _holm([contrast.accuracy for contrast in found])
    return [
        replace(contrast, loss=loss, accuracy=accuracy)
        for contrast, loss, accuracy in zip(found, losses, accuracies, strict=True)
    ]


def _holm(compared: Sequence[Compared]) -> list[Compared]:
    adjusted = iter(holm([c.p for c in compared if c.p is not None]))
    return [c if c.p is None else replace(c, p=next(adjusted)) for c in compared]
