"""Training steps: their providers, their gate and what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import updates
from harness.gate import GateError
from harness.providers import Ours

from tests.bench.small import CPU


def one_step(spec: Any, rule: str, name: str) -> Any:
    return next(s for s in updates.make_steps(spec, CPU, rule) if s.name == name)


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_gate_of_steps(spec: Any, ids: torch.Tensor, rule: str) -> None:
    for step in updates.make_steps(spec, CPU, rule):
        assert updates.check_step(step, ids, rule) < 5e-5, step.name
    wrong = updates.fused_step(Ours(spec, CPU), rule)
    assert wrong.rows is not None
    wrong.rows.param_groups[0]["lr"] *= 1.01
    with pytest.raises(GateError, match="rows of level .* off by"):
        updates.check_step(wrong, ids, rule)


def test_every_rule_has_its_providers(spec: Any) -> None:
    names = ["ours", "ours deferred", "ours 128", "ours dense", "fixed", "sparse"]
    for rule, number in (("sgd", 5), ("adagrad", 5), ("rowwise_adagrad", 3), ("adam", 6)):
        steps = list(updates.make_steps(spec, CPU, rule))
        assert [step.name for step in steps] == names[:number]
        assert bool((steps[2].holder.module.sizes_of() == 128).all())


def test_gate_refuses_another_optimizer(spec: Any, ids: torch.Tensor) -> None:
    for rule, other in [("sgd", "adam"), ("adagrad", "rowwise_adagrad"), ("adam", "adagrad")]:
        step = updates.fused_step(Ours(spec, CPU), rule)
        with pytest.raises(GateError, match=f"ours, {other}: .* off by"):
            updates.check_step(step, ids, other)


@pytest.mark.parametrize("name", ["ours", "ours dense", "fixed"])
def test_gate_refuses_a_step_that_forgets(spec: Any, ids: torch.Tensor, name: str) -> None:
    """The second step of the gate meets the state of the first: one alone would pass."""
    step = one_step(spec, "adagrad", name)
    right = step.backward

    def forgetful(out: torch.Tensor, grad: torch.Tensor) -> None:
        right(out, grad)
        for optimizer in filter(None, (*step.optimizers, step.rows)):
            for state in optimizer.state.values():
                state["sum"].zero_()

    step.backward = forgetful
    with pytest.raises(GateError, match=f"{name}, adagrad: .* off by"):
        updates.check_step(step, ids, "adagrad")


def test_gate_refuses_a_row_too_many(spec: Any, ids: torch.Tensor) -> None:
    step = one_step(spec, "sgd", "fixed")
    right = step.backward

    def spill(out: torch.Tensor, grad: torch.Tensor) -> None:
        right(out, grad)
        step.holder.module.weight.data[0] += 1.0  # of an id that is not looked up

    step.backward = spill
    with pytest.raises(GateError, match="rows moved that were not looked up"):
        updates.check_step(step, ids, "sgd")


def test_timed_steps_move_next_to_nothing(spec: Any, ids: torch.Tensor) -> None:
    for step in updates.make_steps(spec, CPU, "adam"):
        step.settle()
        before = step.holder.parameters[0].detach().clone()
        step(ids, torch.randn(len(ids), 128))
        assert 0 < (step.holder.parameters[0] - before).abs().max() < 2e-6


def test_memory_of_a_step_counts_its_state(spec: Any) -> None:
    for rule, moments, step, last_steps in (("sgd", 0, 0, 0), ("adam", 2, 4, 24)):
        fixed = one_step(spec, rule, "fixed")
        fixed(torch.tensor([1]), torch.ones(1, 128))
        assert fixed.bytes == 4 * 128 * len(spec) * (1 + moments) + step
        ours = one_step(spec, rule, "ours")
        report = ours.holder.module.memory_report()
        assert ours.bytes == report.serving + report.optimizer + last_steps
