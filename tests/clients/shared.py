"""What stands for ``nn.Embedding`` in a client's code, and what is checked of each client."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from esapn_kernels import ResizableEmbedding


class OneSize(ResizableEmbedding):
    """Takes what ``nn.Embedding`` takes, and is ``nn.Embedding``, number for number."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **options: Any):
        options.setdefault("sizes", (embedding_dim,))
        super().__init__(num_embeddings, embedding_dim, *args, **options)


class HalfWidth(ResizableEmbedding):
    """Has the default sizes; every row starts at half the largest."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **options: Any):
        options.setdefault("initial_size", max(embedding_dim // 2, 1))
        super().__init__(num_embeddings, embedding_dim, *args, **options)


CLASSES = {
    "plain": nn.Embedding,
    "one size": OneSize,
    "default sizes": ResizableEmbedding,
    "from half the width": HalfWidth,
}
FIELDS = (60, 40, 30)  # ids of each
EVENTS = 1_000


def toy(seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Ids ``[EVENTS]`` of every field, and labels that a sum of numbers of the ids decides."""
    numbers = np.random.default_rng(0)
    tastes = [numbers.normal(size=n) for n in FIELDS]
    draws = np.random.default_rng(seed)
    ids = [draws.integers(0, n, EVENTS) for n in FIELDS]
    score = sum(taste[column] for taste, column in zip(tastes, ids, strict=True))
    return ids, (score > 0).astype(np.float32)


def tables(model: nn.Module) -> list[ResizableEmbedding]:
    """The tables of several sizes."""
    found = [m for m in model.modules() if isinstance(m, ResizableEmbedding)]
    return [table for table in found if len(table.sizes) > 1]


def grow(model: nn.Module) -> None:
    """Promote every third row of every table; outputs stay, the sizes of the rows do not."""
    assert tables(model)
    for table in tables(model):
        ids = torch.arange(0, table.num_embeddings, 3)
        before, sizes = table(ids), table.sizes_of(ids)
        grown = table.promote(ids)
        assert torch.equal(grown, sizes < table.sizes[-1]) and grown.any()
        assert (table.sizes_of(ids) > sizes)[grown].all()
        torch.testing.assert_close(table(ids), before)


def check_same(
    embeddings: Callable[[str], None], run: Callable[[], tuple[nn.Module, list[Any]]]
) -> None:
    """With one size every number, and the trained model, is that of ``nn.Embedding``.

    Args:
        embeddings: the fixture.
        run: builds and trains a model; gives it and every number that the library reports.
    """
    embeddings("plain")
    model, numbers = run()
    assert numbers and not any(isinstance(m, OneSize) for m in model.modules())
    embeddings("one size")
    ours, our_numbers = run()
    assert any(isinstance(m, OneSize) for m in ours.modules())
    assert our_numbers == numbers
    state, our_state = model.state_dict(), ours.state_dict()
    assert our_state.keys() == state.keys()
    assert all(torch.equal(our_state[key], state[key]) for key in state)


def check_growing(
    model: nn.Module,
    train: Callable[[], list[float]],
    rebuild: Callable[[], nn.Module],
    predict: Callable[[nn.Module], torch.Tensor],
) -> None:
    """A model with the default sizes trains, grows, trains on, and is reloaded.

    Args:
        model: built with the default sizes.
        train: makes some epochs and gives their losses.
        rebuild: builds the model anew.
        predict: outputs of a model on some inputs.
    """
    losses = train()
    grow(model)
    losses += train()
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    copy = rebuild()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(predict(copy), predict(model))
    for one, other in zip(tables(copy), tables(model), strict=True):
        assert torch.equal(one.sizes_of(), other.sizes_of())
    grow(copy)
