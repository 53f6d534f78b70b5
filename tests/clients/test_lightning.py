"""Lightning: ``Trainer.fit``, averaged weights and checkpoints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients import quality as large
from tests.clients.shared import FIELDS, check_same, grow, tables, toy

CALLBACKS = {
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
    "mean": WeightAveraging,
    # Its function would round the integers that say where rows lie.
    "EMA": lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.9), use_buffers=False),
}


class Factors(pl.LightningModule):
    def __init__(self, fields: tuple[int, ...] = FIELDS, dim: int = 8) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Embedding(n, dim) for n in fields)
        self.top = nn.Linear(dim, 1)
        self.losses: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        parts = [table(ids[:, k]) for k, table in enumerate(self.fields)]
        return self.top(torch.stack(parts).sum(0)).squeeze(1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        loss = nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])
        self.log("log loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(events: tuple[list[np.ndarray], np.ndarray], size: int = 50) -> DataLoader[Any]:
    ids, labels = events
    data = TensorDataset(torch.from_numpy(np.stack(ids, axis=1)), torch.from_numpy(labels))
    return DataLoader(data, batch_size=size, shuffle=True)


def trainer_of(*callbacks: pl.Callback, epochs: int = 5) -> pl.Trainer:
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        **options,
    )


def fit(*callbacks: pl.Callback) -> Factors:
    torch.manual_seed(0)
    model = Factors()
    trainer_of(*callbacks).fit(model, loader(toy()))
    return model


@pytest.mark.parametrize("name", CALLBACKS)
def test_one_size_is_averaged_as_plain(embeddings, name):
    def run() -> tuple[nn.Module, list[float]]:
        model = fit(CALLBACKS[name]())
        return model, model.losses

    check_same(embeddings, run)


@pytest.mark.parametrize("name", CALLBACKS)
def test_default_sizes_are_averaged_while_no_row_moves(embeddings, name):
    """Between two fits rows grow; averaged is what the second one makes of the grown rows."""
    embeddings("default sizes")
    model = fit()
    grow(model)
    trainer_of(CALLBACKS[name]()).fit(model, loader(toy()))
    assert model.losses[-1] < model.losses[0]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    grow(model)


def test_default_sizes_grow_and_are_saved(embeddings):
    embeddings("default sizes")
    model = fit()
    grow(model)
    trainer = trainer_of(epochs=3)
    trainer.fit(model, loader(toy()))
    trainer.save_checkpoint("model.ckpt")
    ids = torch.from_numpy(np.stack(toy(1)[0], axis=1))
    copy = Factors.load_from_checkpoint("model.ckpt")
    assert torch.equal(copy(ids), model(ids))
    for one, other in zip(tables(copy), tables(model), strict=True):
        assert torch.equal(one.sizes_of(), other.sizes_of())
    # The optimizer of the checkpoint goes on with rows of these sizes, and they grow.
    copy.losses.clear()
    trainer_of(epochs=6).fit(copy, loader(toy()), ckpt_path="model.ckpt")
    assert len(copy.losses) == 60 and copy.losses[-1] < model.losses[0]
    grow(copy)


class Begin(pl.Callback):
    def __init__(self, epochs: large.Epochs) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.epochs.begin(module)


def test_quality(quality):
    def run(seed: int, epochs: large.Epochs) -> dict[str, float]:
        torch.manual_seed(seed)
        model = Factors(large.FIELDS, 16)
        trainer = trainer_of(Begin(epochs), epochs=epochs.count)
        trainer.fit(model, loader(large.clicks(1, 15_000), 200))
        (scores,) = trainer.validate(model, loader(large.clicks(2, 5_000), 200), verbose=False)
        return scores

    quality("Lightning, sum of fields", run, epochs=6)
