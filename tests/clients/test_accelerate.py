"""accelerate: training state saved and loaded, and models built without memory."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, init_empty_weights, load_checkpoint_in_model
from torch import Tensor, nn

from tests.clients.shared import check_same, grow

IDS = torch.arange(60).view(30, 2) % 20
LABELS = (IDS.sum(1) % 3 == 0).float()


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(20, 8), nn.Embedding(20, 8, padding_idx=0)
        self.top = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.users(ids[:, 0]) * self.items(ids[:, 1])).squeeze(1)


def train(accelerator: Accelerator, model: nn.Module, optimizer, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(model(IDS), LABELS)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def prepared() -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = TwoTables()
    return accelerator, *accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.05))


def test_one_size_is_saved_and_goes_on_as_plain(embeddings):
    """accelerate#2807: no table is taken for a copy of another."""

    def run() -> tuple[nn.Module, list[float]]:
        accelerator, model, optimizer = prepared()
        losses = train(accelerator, model, optimizer)
        accelerator.save_state("state")
        on = train(accelerator, model, optimizer)
        accelerator.load_state("state")
        assert train(accelerator, model, optimizer) == on
        return model, losses + on

    check_same(embeddings, run)


def test_default_sizes_are_saved_and_go_on(embeddings):
    embeddings("default sizes")
    accelerator, model, optimizer = prepared()
    losses = train(accelerator, model, optimizer)
    grow(model)
    losses += train(accelerator, model, optimizer)
    accelerator.save_state("state")
    on = train(accelerator, model, optimizer, steps=20)
    accelerator.load_state("state")
    assert train(accelerator, model, optimizer, steps=20) == on
    assert on[-1] < losses[0]


@pytest.mark.parametrize("kind", ["one size", "default sizes"])
@pytest.mark.parametrize("buffers", [False, True])
def test_a_model_without_memory_takes_a_checkpoint(embeddings, kind, buffers):
    """transformers#34234: built on the meta device, tensors assigned; then moved and grown."""
    embeddings(kind)
    accelerator, model, optimizer = prepared()
    train(accelerator, model, optimizer)
    accelerator.save_model(model, "saved")
    with init_empty_weights(include_buffers=buffers):
        empty = TwoTables()
    assert all(parameter.is_meta for parameter in empty.parameters())
    # Without a device map torch 2.13 refuses a model that is all on the meta device, plain too.
    load_checkpoint_in_model(empty, "saved", device_map={"": "cpu"})
    empty = empty.to("cpu")
    assert torch.equal(empty(IDS), model(IDS))
    if kind == "default sizes":
        grow(empty)
    adam = torch.optim.Adam(empty.parameters(), lr=0.05)
    losses = train(accelerator, empty, adam, steps=20)
    assert losses[-1] < losses[0]
