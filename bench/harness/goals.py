"""The goals of the lookup, each computed from the rows of one run, none from a constant.

A goal is a ratio of two medians or a share of the roof. Its limit is the same ratio of fewest
bytes: what it would be if both sides ran at the bandwidth of a copy; against the loop over sizes,
whose bytes are ours, the loop's time over our roof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.table import Row

_LARGE = 1 << 20
_SMALL = 1 << 16
_WARM, _COLD = "ml-20m", "ml-20m x100"


@dataclass(frozen=True)
class Goal:
    """One line.

    Attributes:
        name: what is measured, where.
        device: where the goal holds, ``cuda`` or ``cpu``.
        at_most: whether ``value`` must not exceed ``goal``; else not fall below it.
        goal: the number to reach; ``None``: reported beside another, without a goal of its own.
        value: measured in this run; ``None`` where its rows are missing.
        limit: the value at the roof, from the byte model.
        status: met | missed | needs a GPU | not measured | reported.
    """

    name: str
    device: str
    at_most: bool
    goal: float | None
    value: float | None
    limit: float | None
    status: str


class _Measured:
    """Rows by what they measure."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {
            (r.table, r.traffic, r.ids, r.mode, r.provider): r
            for r in rows
            if r.median_ms is not None
        }

    def ratio(self, ours: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, Any]:
        """Time and bytes of the first row over those of the second."""
        a, b = self.rows.get(ours), self.rows.get(other)
        if a is None or b is None or a.median_ms is None or b.median_ms is None:
            return None, None
        return a.median_ms / b.median_ms, a.bytes / b.bytes

    def share(self, key: tuple[Any, ...]) -> tuple[Any, Any]:
        row = self.rows.get(key)
        return (None, None) if row is None else (row.roof_share, 1.0)


def judge(rows: Sequence[Row], facts: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Every goal, as values that JSON can hold.

    Args:
        rows: of one run.
        facts: ``exact`` (whether runs were equal bit by bit, see ``lookup.py``) and ``promotion``
            (``promotions.count_launches``), where they were measured.
        device: ``cuda`` or ``cpu``, that the run used.
    """
    found = _Measured(rows)
    goals: list[Goal] = []

    def add(
        name: str, where: str, sign: str, goal: float | None, value: Any, limit: Any = None
    ) -> None:
        at_most = sign == "<="
        if where == "cuda" and device != "cuda":
            status = "needs a GPU"
        elif value is None:
            status = "not measured"
        elif goal is None:
            status = "reported"
        else:
            status = "met" if (value <= goal if at_most else value >= goal) else "missed"
        if where == "cpu" and device != "cpu":
            return
        goals.append(Goal(name, where, at_most, goal, value, limit, status))

    def fixed(mode: str, table: str, traffic: str, ids: int) -> tuple[Any, Any]:
        case = (table, traffic, ids, mode)
        return found.ratio((*case, "ours"), (*case, "fixed"))

    def speedup(mode: str, ids: int, provider: str) -> tuple[Any, Any]:
        case = (_WARM, "uniform", ids, mode)
        key = (*case, "ours")
        ratio, limit = found.ratio((*case, provider), key)
        if ratio is not None and provider != "fixed":
            limit = ratio / found.rows[key].roof_share
        return ratio, limit

    def over_fixed(name: str, mode: str, table: str, traffic: str, ids: int, goal: float) -> None:
        where = f"{ids:,} {traffic}, {table}"
        add(f"{name} / fixed, {where}", "cuda", "<=", goal, *fixed(mode, table, traffic, ids))

    over_fixed("forward fp32", "forward", _COLD, "uniform", _LARGE, 0.82)
    over_fixed("forward fp32", "forward", _WARM, "uniform", _LARGE, 1.0)
    over_fixed("forward fp32", "forward", _WARM, "zipf", _LARGE, 1.05)
    for table in (_WARM, _COLD):
        over_fixed("forward, graph replay", "forward graph", table, "uniform", _SMALL, 1.0)
    over_fixed("fp32 rows, bf16 out", "forward bf16 out", _COLD, "uniform", _LARGE, 0.80)
    for mode, name, goal in (("forward", "forward", 0.85), ("backward sgd", "backward", 0.65)):
        share = found.share((_COLD, "uniform", _LARGE, mode, "ours"))
        add(f"share of the roof, {name}, {_LARGE:,} uniform, {_COLD}", "cuda", ">=", goal, *share)
    for ids, over_loop in ((_SMALL, 15.0), (_LARGE, 5.0)):
        at = f"/ ours, {ids:,} uniform, {_WARM}"
        for provider, goal in (("eager", over_loop), ("compiled", 2.0)):
            add(f"{provider} {at}, forward", "cuda", ">=", goal, *speedup("forward", ids, provider))
            both = speedup("both", ids, provider)
            add(f"{provider} {at}, forward + backward", "cuda", ">=", None, *both)
    for ids, goal in ((_SMALL, 3.0), (_LARGE, 1.25)):
        ratio = speedup("step adam", ids, "fixed")
        add(f"fixed / ours, {ids:,} uniform, {_WARM}, step with Adam", "cuda", ">=", goal, *ratio)
    for table in (_WARM, _COLD):
        keys = [(table, t, _LARGE, "backward sgd", "ours") for t in ("zipf", "uniform")]
        ratio = found.ratio(keys[0], keys[1])
        add(f"backward Zipf / uniform, {_LARGE:,}, {table}", "cuda", "<=", 1.15, *ratio)
    # Ours has one mode, so deterministic over fastest is 1 if the runs were in fact equal.
    exact = facts.get("exact") or {}
    runs = exact.get("runs", 20)
    equal = min(exact["ours"].values()) if exact else None
    name = f"runs of ours with equal bits, of {runs}, in its only mode"
    add(name, device, ">=", runs, equal, runs)
    promotion = facts.get("promotion") or {}
    for name, goal in (("launches", 3), ("synchronisations", 0)):
        text = f"promotion of {promotion.get('ids', 10_240):,} rows: {name}"
        add(text, "cuda", "<=", goal, promotion.get(name), goal)
    at = f"/ ours, {_SMALL:,} uniform, {_WARM}"
    add(f"eager {at}, forward", "cpu", ">=", 3.0, *speedup("forward", _SMALL, "eager"))
    add(f"eager {at}, forward + backward", "cpu", ">=", None, *speedup("both", _SMALL, "eager"))
    ratio = fixed("forward out=", _WARM, "uniform", _SMALL)
    name = f"forward / index_select, both into out=, {_SMALL:,} uniform, {_WARM}"
    add(name, "cpu", "<=", 3.5, *ratio)
    return [asdict(goal) for goal in goals]


def lines(goals: Sequence[dict[str, Any]]) -> list[str]:
    """The goals as text, at most 120 columns."""
    out = [f"{'goals':<78}{'measured':>9}{'goal':>9}{'limit':>7}  "]
    for goal in goals:
        sign = "<=" if goal["at_most"] else ">="
        wanted = "" if goal["goal"] is None else f"{sign} {_number(goal['goal'])}"
        measured, limit = _number(goal["value"]), _number(goal["limit"])
        out.append(f"  {goal['name']:<76}{measured:>9}{wanted:>9}{limit:>7}  {goal['status']}")
    return [line.rstrip() for line in out]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value == round(value) else f"{value:.2f}"
