"""What several tests of the benchmarks share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
SMALL = {2: 5, 4: 4, 8: 3, 16: 3, 64: 2, 128: 6}
CPU = torch.device("cpu")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user does, never with interpreted kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCH.parent), env.get("PYTHONPATH")]))
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def measured_row(mode: str, provider: str, median: float, **more: Any) -> Any:
    """A row of 65,536 uniform ids on ml-20m with one sample; the roof of 1e6 bytes is 1 ms."""
    from harness.table import Row, fill

    made = {"table": "ml-20m", "traffic": "uniform", "ids": 65_536, "bytes": 1_000_000, **more}
    row = Row(rows=9, distinct=9, mode=mode, provider=provider, memory_bytes=1, **made)
    fill(row, [median], 1.0)
    return row
