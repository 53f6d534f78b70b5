"""Lightning: ``Trainer.fit`` with averaged weights."""

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

from tests.clients.shared import FIELDS, check_same, toy

CALLBACKS = {
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
    "mean": WeightAveraging,
    "EMA": lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.9)),
}


class Factors(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Embedding(n, 8) for n in FIELDS)
        self.top = nn.Linear(8, 1)
        self.losses: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        parts = [table(ids[:, k]) for k, table in enumerate(self.fields)]
        return self.top(torch.stack(parts).sum(0)).squeeze(1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(callback: pl.Callback) -> Factors:
    ids, labels = toy()
    data = TensorDataset(torch.from_numpy(np.stack(ids, axis=1)), torch.from_numpy(labels))
    torch.manual_seed(0)
    model = Factors()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=5,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(model, DataLoader(data, batch_size=50, shuffle=True))
    return model


@pytest.mark.parametrize("name", CALLBACKS)
def test_one_size_is_averaged_as_plain(embeddings, name):
    def run() -> tuple[nn.Module, list[float]]:
        model = fit(CALLBACKS[name]())
        return model, model.losses

    check_same(embeddings, run)
