"""The goals of the lookup, each computed from the rows of one run, none from a constant.

A goal is a ratio of two medians, a share of the roof or a count. The limit of a ratio is the same
ratio of fewest bytes: what it would be if both sides ran at the bandwidth of a copy; against the
loop over sizes, whose bytes are ours, it is the loop's time over our roof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .lookups import EXACT_RUNS
from .promotions import PROMOTED
from .table import Row

_SMALL, _LARGE = 1 << 16, 1 << 20
_WARM, _COLD = "ml-20m", "ml-20m x100"
_PASSES = {"forward": "forward", "both": "forward + backward", "step adam": "step with Adam"}

Found = tuple[float | None, float | None]
"""What a run measured and its limit; ``None`` where rows are missing."""


class Key(NamedTuple):
    """The row of one mode and provider."""

    mode: str
    provider: str
    ids: int
    table: str = _WARM
    traffic: str = "uniform"


class Measured:
    """What one run measured: rows with times by key, and facts beside them."""

    def __init__(self, rows: Sequence[Row], facts: dict[str, Any]) -> None:
        timed = (row for row in rows if row.median_ms is not None)
        self.rows = {Key(r.mode, r.provider, r.ids, r.table, r.traffic): r for r in timed}
        self.facts = facts

    def ratio(self, over: Key, under: Key, *, roof: bool = False) -> Found:
        """Time of the first over that of the second; with ``roof`` the limit is over its roof."""
        a, b = self.rows.get(over), self.rows.get(under)
        if a is None or b is None:
            return None, None
        assert a.median_ms is not None and b.median_ms is not None and b.roof_share is not None
        ratio = a.median_ms / b.median_ms
        return ratio, ratio / b.roof_share if roof else a.bytes / b.bytes

    def share(self, key: Key) -> Found:
        """Share of the roof that a row reached."""
        row = self.rows.get(key)
        return (None, None) if row is None else (row.roof_share, 1.0)

    def count(self, kind: str, name: str, limit: int) -> Found:
        """``facts[kind][name]``, the smallest where there are several; the limit is known."""
        value = (self.facts.get(kind) or {}).get(name)
        return min(value.values()) if isinstance(value, dict) else value, limit


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals.

    Attributes:
        name: what is measured, where.
        device: where the goal holds: ``cuda``, ``cpu`` or ``any``.
        sign: ``<=``, the value must not exceed ``goal``, or ``>=``, not fall below it.
        goal: the number to reach; ``None``: reported beside another, without a goal of its own.
        find: the value and its limit in what a run measured.
    """

    name: str
    device: str
    sign: str
    goal: float | None
    find: Callable[[Measured], Found]

    def status(self, value: float | None, device: str) -> str:
        """``needs a GPU | not measured | reported | met | missed`` of a run on ``device``."""
        if self.device == "cuda" and device != "cuda":
            return "needs a GPU"
        if value is None:
            return "not measured"
        if self.goal is None:
            return "reported"
        met = value <= self.goal if self.sign == "<=" else value >= self.goal
        return "met" if met else "missed"


def _over_fixed(
    what: str, mode: str, ids: int, table: str, goal: float, traffic: str = "uniform"
) -> Goal:
    ours, fixed = (Key(mode, provider, ids, table, traffic) for provider in ("ours", "fixed"))
    name = f"{what} / fixed, {ids:,} {traffic}, {table}"
    return Goal(name, "cuda", "<=", goal, lambda run: run.ratio(ours, fixed))


def _roof_share(what: str, mode: str, goal: float) -> Goal:
    key = Key(mode, "ours", _LARGE, _COLD)
    name = f"share of the roof, {what}, {_LARGE:,} uniform, {_COLD}"
    return Goal(name, "cuda", ">=", goal, lambda run: run.share(key))


def _over_ours(
    provider: str, ids: int, mode: str, goal: float | None, device: str = "cuda"
) -> Goal:
    other, ours = (Key(mode, name, ids) for name in (provider, "ours"))
    name = f"{provider} / ours, {ids:,} uniform, {_WARM}, {_PASSES[mode]}"
    roof = provider != "fixed"
    return Goal(name, device, ">=", goal, lambda run: run.ratio(other, ours, roof=roof))


def _zipf_over_uniform(table: str) -> Goal:
    zipf, uniform = (
        Key("backward sgd", "ours", _LARGE, table, traffic) for traffic in ("zipf", "uniform")
    )
    name = f"backward Zipf / uniform, {_LARGE:,}, {table}"
    return Goal(name, "cuda", "<=", 1.15, lambda run: run.ratio(zipf, uniform))


def _into_out() -> Goal:
    ours, fixed = (Key("forward out=", provider, _SMALL) for provider in ("ours", "fixed"))
    name = f"forward / index_select, both into out=, {_SMALL:,} uniform, {_WARM}"
    return Goal(name, "cpu", "<=", 3.5, lambda run: run.ratio(ours, fixed))


def _count(name: str, device: str, sign: str, goal: int, kind: str, fact: str) -> Goal:
    return Goal(name, device, sign, goal, lambda run: run.count(kind, fact, goal))


_EQUAL = f"runs of ours with equal bits, of {EXACT_RUNS}, in its only mode"
_PROMOTION = f"promotion of {PROMOTED:,} rows"

GOALS = (
    _over_fixed("forward fp32", "forward", _LARGE, _COLD, 0.82),
    _over_fixed("forward fp32", "forward", _LARGE, _WARM, 1.0),
    _over_fixed("forward fp32", "forward", _LARGE, _WARM, 1.05, "zipf"),
    _over_fixed("forward, graph replay", "forward graph", _SMALL, _WARM, 1.0),
    _over_fixed("forward, graph replay", "forward graph", _SMALL, _COLD, 1.0),
    _over_fixed("fp32 rows, bf16 out", "forward bf16 out", _LARGE, _COLD, 0.80),
    _roof_share("forward", "forward", 0.85),
    _roof_share("backward", "backward sgd", 0.65),
    _over_ours("eager", _SMALL, "forward", 15.0),
    _over_ours("eager", _SMALL, "both", None),
    _over_ours("compiled", _SMALL, "forward", 2.0),
    _over_ours("compiled", _SMALL, "both", None),
    _over_ours("eager", _LARGE, "forward", 5.0),
    _over_ours("eager", _LARGE, "both", None),
    _over_ours("compiled", _LARGE, "forward", 2.0),
    _over_ours("compiled", _LARGE, "both", None),
    _over_ours("fixed", _SMALL, "step adam", 3.0),
    _over_ours("fixed", _LARGE, "step adam", 1.25),
    _zipf_over_uniform(_WARM),
    _zipf_over_uniform(_COLD),
    # Ours has one mode, so deterministic over fastest is 1 if the runs were in fact equal.
    _count(_EQUAL, "any", ">=", EXACT_RUNS, "exact", "ours"),
    _count(f"{_PROMOTION}: launches", "cuda", "<=", 3, "promotion", "launches"),
    _count(f"{_PROMOTION}: synchronisations", "cuda", "<=", 0, "promotion", "synchronisations"),
    _over_ours("eager", _SMALL, "forward", 3.0, "cpu"),
    _over_ours("eager", _SMALL, "both", None, "cpu"),
    _into_out(),
)


def judge(rows: Sequence[Row], facts: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Every goal that concerns ``device``, as values that JSON can hold.

    Args:
        rows: of one run.
        facts: ``exact`` (``lookups.compare_runs``) and ``promotion``
            (``promotions.count_launches``), where they were measured.
        device: ``cuda`` or ``cpu``, that the run used.
    """
    run = Measured(rows, facts)
    judged = []
    for goal in GOALS:
        if goal.device == "cpu" and device != "cpu":
            continue
        value, limit = goal.find(run)
        judged.append(
            {
                "name": goal.name,
                "device": device if goal.device == "any" else goal.device,
                "at_most": goal.sign == "<=",
                "goal": goal.goal,
                "value": value,
                "limit": limit,
                "status": goal.status(value, device),
            }
        )
    return judged


def lines(goals: Sequence[dict[str, Any]]) -> list[str]:
    """The judged goals as text, at most 120 columns."""
    out = [f"{'goals':<78}{'measured':>9}{'goal':>9}{'limit':>7}  "]
    for goal in goals:
        sign = "<=" if goal["at_most"] else ">="
        bound = "" if goal["goal"] is None else f"{sign} {_number(goal['goal'])}"
        measured, limit = _number(goal["value"]), _number(goal["limit"])
        out.append(f"  {goal['name']:<76}{measured:>9}{bound:>9}{limit:>7}  {goal['status']}")
    return [line.rstrip() for line in out]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value == round(value) else f"{value:.2f}"
