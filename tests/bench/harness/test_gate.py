"""The gate of lookups and forwards, and the count of equal runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import gate, providers
from harness.gate import GateError

from tests.bench.small import CPU


def test_gate_passes_every_provider(spec: Any, ids: torch.Tensor) -> None:
    ours, fixed = providers.Ours(spec, CPU), providers.Fixed(spec, CPU)
    reference = gate.make_reference(ours, ids)
    assert gate.check(ours, ids, reference) < 1e-5
    assert gate.check(providers.Eager(ours), ids, reference) < 1e-5
    assert gate.check(fixed, ids, gate.make_reference(fixed, ids)) < 1e-5


def test_gate_refuses_wrong_outputs_and_gradients(spec: Any, ids: torch.Tensor) -> None:
    class Wrong(providers.Ours):
        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            return self.spoil(super().__call__(ids))

    provider = Wrong(spec, CPU)
    reference = gate.make_reference(provider, ids)
    for spoil, message in [
        (lambda out: out * (1 + 1e-3), "off by 1.0e-03"),
        (lambda out: out * torch.nan, "off by inf"),
        (lambda out: out * 2 - out.detach(), "gradient.* off by 1.0e\\+00"),
        (lambda out: out + 1e-20 * provider.parameters[0][-1], "not looked up"),
    ]:
        provider.spoil = spoil
        with pytest.raises(GateError, match="ours: .*" + message):
            gate.check(provider, ids, reference)


def test_gate_of_the_forwards(spec: Any, ids: torch.Tensor) -> None:
    fixed = providers.Fixed(spec, CPU)
    forwards = providers.make_forwards(spec, providers.Ours(spec, CPU), fixed)
    assert [(f.mode, f.name) for f in forwards] == [
        (f"forward {mode}", name)
        for mode in ("out=", "bf16 out", "bf16")
        for name in ("ours", "fixed")
    ]
    for forward in forwards:
        error = gate.check_forward(forward, ids)
        assert error < (3e-3 if forward.out_itemsize == 2 else 1e-5)
        assert error > 0 or forward.name == "fixed"
    into, wide, narrow = forwards[0], forwards[2], forwards[3]
    with torch.no_grad():
        # Into the same memory every time, and of the dtype that the mode says.
        assert into.call(ids).data_ptr() == into.call(ids).data_ptr()
        assert wide.call(ids).dtype == narrow.call(ids).dtype == torch.bfloat16
    off = providers.Forward("m", "n", lambda ids: wide.call(ids) * 1.02, wide.source, 4, 2)
    with pytest.raises(GateError, match=r"m n: outputs off by [12]\.\de-02"):
        gate.check_forward(off, ids)
    off = providers.Forward("m", "n", narrow.call, narrow.source)
    with pytest.raises(GateError, match="outputs of 2 bytes a number"):
        gate.check_forward(off, ids)


def test_equal_runs_are_counted() -> None:
    values = iter([1, 1, 2, 1])
    assert gate.equal_runs(lambda: [torch.tensor(7), torch.tensor(next(values))], 4) == 3
