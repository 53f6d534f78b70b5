"""accelerate: training state saved and loaded, and models built without memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator, init_empty_weights, load_checkpoint_in_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients import quality as large
from tests.clients.shared import check_same, grow

IDS = torch.arange(60).view(30, 2) % 20
LABELS = (IDS.sum(1) % 3 == 0).float()


class TwoTables(nn.Module):
    def __init__(self, rows: tuple[int, int] = (20, 20), dim: int = 8) -> None:
        super().__init__()
        self.users = nn.Embedding(rows[0], dim)
        self.items = nn.Embedding(rows[1], dim, padding_idx=0)
        self.top = nn.Linear(dim, 1)

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


def test_quality(quality):
    """The first two fields of the clicks, the third of which is noise here."""

    def run(seed: int, epochs: large.Epochs) -> dict[str, float]:
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed)
        model = TwoTables(large.FIELDS[:2], dim=16)
        model, adam = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
        parts = {}
        for part, events in ((1, 15_000), (2, 5_000)):
            ids, labels = large.clicks(part, events)
            pairs = torch.from_numpy(np.stack(ids[:2], axis=1))
            data = TensorDataset(pairs, torch.from_numpy(labels))
            parts[part] = accelerator.prepare(DataLoader(data, batch_size=200, shuffle=part == 1))
        for _ in range(epochs.count):
            epochs.begin(model)
            for ids, labels in parts[1]:
                loss = nn.functional.binary_cross_entropy_with_logits(model(ids), labels)
                adam.zero_grad()
                accelerator.backward(loss)
                adam.step()
        with torch.no_grad():
            logits, labels = zip(*((model(ids), labels) for ids, labels in parts[2]), strict=True)
        whole = torch.cat(logits), torch.cat(labels)
        return {"log loss": nn.functional.binary_cross_entropy_with_logits(*whole).item()}

    quality("accelerate, product of two fields", run, epochs=6)
