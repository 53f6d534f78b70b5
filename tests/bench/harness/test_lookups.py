"""The lookup modes: what is measured where a provider fails."""

from __future__ import annotations

from typing import Any

import torch
from harness import lookups, providers, table
from harness.timing import Timer

from tests.bench.small import CPU


def test_a_loop_that_does_not_compile_is_a_note(spec: Any, monkeypatch: Any) -> None:
    def refuse() -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(providers, "compile_loop", refuse)
    generator = torch.Generator().manual_seed(0)
    workload = providers.make_workload(spec, "zipf", 30, CPU, generator)
    ours = providers.Ours(spec, CPU)
    compared = [ours, providers.Compiled(providers.Eager(ours))]
    rows = lookups.measure_lookups(workload, compared, Timer(CPU), 2)
    assert [row.note for row in rows] == ["", "not compiled: no C++ compiler"] * 3
    assert [row.median_ms is None for row in rows] == [False, True] * 3
    assert "not compiled: no C++ compiler" in "\n".join(table.lines(rows))
