"""What a CUDA graph captures."""

from __future__ import annotations

from typing import Any

import torch
from harness import graphs
from harness.providers import Ours, make_workload

from tests.bench.small import CPU


def test_step_of_the_graph_and_its_twin(spec: Any, monkeypatch: Any) -> None:
    """What a GPU captures, called: a twin takes the same steps from the same state."""
    monkeypatch.setattr(graphs, "GROWING", 4)
    step = graphs.GrowingStep(Ours(spec, CPU).module, 8)
    generator = torch.Generator().manual_seed(0)
    workload = make_workload(spec, "uniform", 9, CPU, generator)
    for turn in range(3):
        step(workload.batch(turn), workload.grad)
    sizes = step.module.sizes_of()
    assert int(sizes.sum()) > int(spec.sizes.sum())
    twin = step.twin()
    assert step.same_as(twin) and twin.module is not step.module
    for turn in range(3, 6):
        assert torch.equal(*(s(workload.batch(turn), workload.grad) for s in (step, twin)))
    assert step.same_as(twin) and not torch.equal(step.module.sizes_of(), sizes)
    twin(workload.batch(6), workload.grad)
    assert not step.same_as(twin)
