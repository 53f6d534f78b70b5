"""The rows of the lookup benchmark: what follows from the samples, and the printed table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Row:
    """One line of the report; times in milliseconds, ``None`` where a note says why.

    Attributes:
        bytes: fewest bytes of the work, every distinct row once.
        cold_bytes: the same with a row per lookup.
        roof_ms: ``bytes`` over the bandwidth of a large copy measured around the workload.
        roof_share: ``roof_ms`` over the median.
        times_ours: time over that of ours in the same mode.
        limit_times_ours: ``bytes`` over those of ours: ``times_ours`` if both were at their roof.
        gate_error: largest relative error that the gate saw.
    """

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
    cold_bytes: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    roof_ms: float | None = None
    roof_share: float | None = None
    times_ours: float | None = None
    limit_times_ours: float | None = None
    gate_error: float | None = None
    samples_ms: list[float] = field(default_factory=list)


def fill(row: Row, samples: list[float], copy: float) -> None:
    """Set what follows from the samples, in milliseconds, and the copy's GB/s."""
    times = torch.tensor(samples, dtype=torch.float64)
    p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    row.samples_ms = [round(ms, 6) for ms in samples]
    row.repeats = len(samples)
    row.median_ms, row.p20_ms, row.p80_ms = median, p20, p80
    row.gb_per_s = row.bytes / median / 1e6
    row.copy_gb_per_s = copy
    row.roof_ms = row.bytes / copy / 1e6
    row.roof_share = row.roof_ms / median


def relate(rows: Sequence[Row]) -> None:
    """Set every row's time, and its bytes, over those of ours in the same mode."""
    ours = {row.mode: row for row in rows if row.provider == "ours"}
    for row in rows:
        base = ours.get(row.mode)
        if base is None or base.median_ms is None or row.median_ms is None:
            continue
        row.times_ours = row.median_ms / base.median_ms
        row.limit_times_ours = row.bytes / base.bytes


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows as text, a block per workload, at most 120 columns."""
    text: list[str] = []
    heading = None
    mode = None
    for row in rows:
        workload = (row.table, row.traffic, row.ids)
        if workload != heading:
            heading, mode = workload, None
            text += [
                "",
                f"{row.table} ({row.rows:,} rows), {row.traffic}, {row.ids:,} ids "
                f"({row.distinct:,} distinct)"
                + (f"; copy {row.copy_gb_per_s:.1f} GB/s" if row.copy_gb_per_s else ""),
                f"  {'mode':<22}{'provider':<11}{'median ms':>11}  {'[p20, p80]':<22}{'roof ms':>9}"
                f"{'of roof':>9}{'/ ours':>8}{'limit':>8}{'MiB':>9}{'n':>4}",
            ]
        line = f"  {row.mode if row.mode != mode else '':<22}{row.provider:<11}"
        mode = row.mode
        if row.median_ms is None:
            text.append((line + "  " + row.note)[:120])
            continue
        spread = f"[{row.p20_ms:.3f}, {row.p80_ms:.3f}]"
        ratio, limit = (
            "" if x is None else f"{x:.2f}x" for x in (row.times_ours, row.limit_times_ours)
        )
        text.append(
            f"{line}{row.median_ms:>11.3f}  {spread:<22}{row.roof_ms:>9.3f}{row.roof_share:>9.1%}"
            f"{ratio:>8}{limit:>8}{row.memory_bytes / 2**20:>9.1f}{row.repeats:>4}"
        )
    return text[1:]


def conditions(
    info: dict[str, Any], device: torch.device, seed: int, flush_bytes: int, tolerance: float
) -> list[str]:
    """What the numbers hold for, as lines of text."""
    where = f"{info['cpu'] or 'CPU'}, {info['threads']} threads"
    timing = "wall clock"
    memory = "rows, locations, hops and optimizer state"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, driver {info['driver']}"
        timing = f"CUDA events, {flush_bytes >> 20} MiB written before each, host launches included"
        memory += "; forward, backward, both: and what these add at their peak"
    commit = info["commit"] or "none"
    return [
        f"device: {where}; backend: {info['auto'][device.type]}; float32 unless the mode says more",
        f"timing: {timing}",
        f"torch {info['torch']}, triton {info['triton']}, python {info['python']}, "
        f"commit {commit[:12]}{' (modified)' if info['dirty'] else ''}, seed {seed}",
        f"gate: passed, largest relative error of outputs, gradients and steps <= {tolerance:.0e} "
        "against float64",
        "forward builds the graph for backward, whose gradients are dense, as torch gives them;",
        "bf16, out= and graph modes are forward alone, without gradient; a step is forward, "
        "backward and optimizer",
        "roof: fewest bytes (every distinct row once) over the bandwidth of a large copy, read + "
        "write, measured around",
        "the case (above 100% of it: from cache); / ours: time over that of ours, above 1 where "
        "ours is faster;",
        "limit: bytes over those of ours, what / ours would be if both ran at their roof",
        f"MiB: {memory}",
    ]
