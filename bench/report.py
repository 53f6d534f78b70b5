"""The rows of the lookup benchmark: what follows from the samples, and the printed table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from providers import TOLERANCE


@dataclass
class Row:
    """One line of the report; times in milliseconds, ``None`` where a note says why."""

    table: str
    rows: int
    traffic: str
    ids: int
    distinct: int
    mode: str
    provider: str
    memory_bytes: int
    note: str = ""
    repeats: int = 0
    bytes: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    copy_share: float | None = None
    times_ours: float | None = None
    gate_error: float | None = None
    samples_ms: list[float] = field(default_factory=list)


def fill(row: Row, samples: list[float], copy: float) -> None:
    """Set what follows from the samples."""
    times = torch.tensor(samples, dtype=torch.float64)
    p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    row.samples_ms = [round(ms, 6) for ms in samples]
    row.repeats = len(samples)
    row.median_ms, row.p20_ms, row.p80_ms = median, p20, p80
    row.gb_per_s = row.bytes / median / 1e6
    row.copy_gb_per_s = copy
    row.copy_share = row.gb_per_s / copy


def relate(rows: Sequence[Row]) -> None:
    """Set every row's time over that of ours in the same mode."""
    ours = {row.mode: row.median_ms for row in rows if row.provider == "ours"}
    for row in rows:
        base = ours.get(row.mode)
        if row.median_ms is not None and base:
            row.times_ours = row.median_ms / base


def report(rows: Sequence[Row]) -> str:
    """The rows as text, a block per case, at most 120 columns."""
    lines: list[str] = []
    heading = None
    mode = None
    for row in rows:
        case = (row.table, row.traffic, row.ids)
        if case != heading:
            heading, mode = case, None
            lines += [
                "",
                f"{row.table} ({row.rows:,} rows), {row.traffic}, {row.ids:,} ids "
                f"({row.distinct:,} distinct)"
                + (f"; copy {row.copy_gb_per_s:.1f} GB/s" if row.copy_gb_per_s else ""),
                f"  {'mode':<14}{'provider':<9}{'median ms':>12}  {'[p20, p80]':<24}{'GB/s':>8}"
                f"{'of copy':>9}{'/ ours':>9}{'MiB':>10}{'n':>5}",
            ]
        line = f"  {row.mode if row.mode != mode else '':<14}{row.provider:<9}"
        mode = row.mode
        if row.median_ms is None:
            lines.append((line + "  " + row.note)[:120])
            continue
        assert row.copy_share is not None
        spread = f"[{row.p20_ms:.3f}, {row.p80_ms:.3f}]"
        ratio = "" if row.times_ours is None else f"{row.times_ours:.2f}x"
        lines.append(
            f"{line}{row.median_ms:>12.3f}  {spread:<24}{row.gb_per_s:>8.1f}{row.copy_share:>9.1%}"
            f"{ratio:>9}{row.memory_bytes / 2**20:>10.1f}{row.repeats:>5}"
        )
    return "\n".join(lines[1:])


def conditions(
    info: dict[str, Any], device: torch.device, seed: int, flush_bytes: int
) -> list[str]:
    """What the numbers hold for, as lines of text."""
    where = f"{info['cpu'] or 'CPU'}, {info['threads']} threads"
    timing = "wall clock"
    memory = "rows, locations and hops"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, driver {info['driver']}"
        timing = f"CUDA events, {flush_bytes >> 20} MiB written before each, host launches included"
        memory += ", and what one forward and backward adds at its peak"
    commit = info["commit"] or "none"
    return [
        f"device: {where}; backend: {info['auto'][device.type]}; float32",
        f"timing: {timing}",
        f"torch {info['torch']}, triton {info['triton']}, python {info['python']}, "
        f"commit {commit[:12]}{' (modified)' if info['dirty'] else ''}, seed {seed}",
        f"gate: passed, largest relative error of outputs and gradients <= {TOLERANCE:.0e} "
        "against float64",
        "forward builds the graph for backward (a 'forward graph' is a CUDA graph's replay without "
        "gradient);",
        "gradients are dense, as torch gives them, and the bytes count writing them",
        "GB/s: fewest bytes (every distinct row once) over the median",
        "of copy: share of a large copy's bandwidth, read + write, measured around the case "
        "(above 100%: from cache)",
        "/ ours: time of that provider over time of ours, above 1 where ours is faster",
        f"MiB: {memory}",
    ]
