"""Promotion: its gate, and that every turn begins from the same table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import promotions
from harness.gate import GateError
from harness.providers import Ours
from harness.timing import Timer

from tests.bench.small import CPU, SMALL


def test_gate_of_the_promotion(spec: Any, monkeypatch: Any) -> None:
    ours = Ours(spec, CPU)
    ids = promotions.draw_batches(spec, CPU, torch.Generator().manual_seed(0))[0]
    assert sorted(ids.tolist()) == (spec.sizes < 128).nonzero()[:, 0].tolist()
    before = ours.storage.detach().clone()
    assert max(promotions.check_promotion(ours, ids).values()) < 1e-6
    assert torch.equal(ours.storage, before)
    ready, eager = promotions.Ready, promotions.EagerPromotion
    for holder, spoil, message in [
        (ready, lambda r: r.ours.storage.data.mul_(1.001), "other rows changed"),
        (ready, lambda r: r.optimizer.state[r.ours.storage]["exp_avg"].add_(1), "moments"),
        (eager, lambda e: [t.mul_(1.001) for t in e.tables], "eager, promotion: .* by 1.0e-03"),
        (eager, lambda e: [m.add_(1) for m, _ in e.moments], "moments"),
        (eager, lambda e: e.level.add_(1), "sizes are wrong"),
    ]:
        right = holder.promote

        def wrong(self: Any, ids: torch.Tensor, right: Any = right, spoil: Any = spoil) -> Any:
            result = right(self, ids)
            spoil(self)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(holder, "promote", wrong)
            with pytest.raises(GateError, match=message):
                promotions.check_promotion(ours, ids)


def test_promotion_starts_from_the_same_table_every_turn(spec: Any) -> None:
    ours, timer = Ours(spec, CPU), Timer(CPU)
    generator = torch.Generator().manual_seed(0)
    rows, facts = promotions.measure_promotion(spec, ours, timer, 3, generator)
    assert [(r.provider, r.ids, r.repeats) for r in rows] == [("ours", 17, 3), ("eager", 17, 3)]
    assert facts == {} and torch.equal(ours.module.sizes_of(), spec.sizes)
    eager = promotions.EagerPromotion(ours, 17)
    level = torch.searchsorted(torch.tensor(list(SMALL)), spec.sizes)
    for _ in range(2):
        eager.reset()
        eager.promote((spec.sizes < 128).nonzero()[:, 0])
        assert torch.equal(eager.level.long(), level.add(1).clamp(max=5))


def test_gate_refuses_a_promotion_that_moves_nothing(spec: Any, monkeypatch: Any) -> None:
    (ids, *_) = promotions.draw_batches(spec, CPU, torch.Generator().manual_seed(0))
    monkeypatch.setattr(promotions.Ready, "promote", lambda self, ids: torch.zeros(1).bool())
    with pytest.raises(GateError, match="left where they are"):
        promotions.check_promotion(Ours(spec, CPU), ids)


def test_a_copy_to_the_host_is_no_launch() -> None:
    on_gpu = ["_claim_kernel", "Memcpy DtoH (Device -> Pinned)", "Memset (Device)"]
    assert promotions.launches(on_gpu) == ["_claim_kernel", "Memset (Device)"]
