"""torch-rechub: three ranking models, by the library's own trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch_rechub.basic.features import SparseFeature
from torch_rechub.models.ranking import DCN, DeepFM, WideDeep
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import TorchDataset

from tests.clients import quality as large
from tests.clients.shared import FIELDS, check_growing, check_same, toy

MODELS = ("DCN", "DeepFM", "WideDeep")
PENALTIES = {"embedding_l1": 0.0, "embedding_l2": 1e-5, "dense_l1": 0.0, "dense_l2": 1e-5}


def build(
    name: str, seed: int = 0, fields: tuple[int, ...] = FIELDS, dim: int = 8
) -> torch.nn.Module:
    torch.manual_seed(seed)
    # Features hold their tables: those of another model are others.
    features = [SparseFeature(f"f{k}", n, embed_dim=dim) for k, n in enumerate(fields)]
    tower = {"dims": [32, 16], "dropout": 0.2, "activation": "relu"}
    if name == "DeepFM":
        return DeepFM(features, features, tower)
    if name == "DCN":
        return DCN(features, n_cross_layers=2, mlp_params=tower)
    return WideDeep(features[:1], features[1:], tower)


def loader_of(events: tuple[list[np.ndarray], np.ndarray], size: int) -> DataLoader[Any]:
    ids, labels = events
    columns = {f"f{k}": column for k, column in enumerate(ids)}
    return DataLoader(TorchDataset(columns, labels), batch_size=size)


def loader(seed: int = 0) -> DataLoader[Any]:
    return loader_of(toy(seed), 50)


def trainer_of(model: torch.nn.Module) -> CTRTrainer:
    adam = {"lr": 0.01, "weight_decay": 1e-5}
    return CTRTrainer(model, optimizer_params=adam, regularization_params=dict(PENALTIES))


@pytest.mark.parametrize("name", MODELS)
def test_one_size_gives_the_same_numbers(embeddings, name):
    def run() -> tuple[torch.nn.Module, list[float]]:
        trainer = trainer_of(build(name))
        losses = [trainer.train_one_epoch(loader()) for _ in range(5)]
        return trainer.model, [*losses, trainer.evaluate(trainer.model, loader(1))]

    check_same(embeddings, run)


@pytest.mark.parametrize("name", MODELS)
def test_default_sizes(embeddings, name):
    embeddings("default sizes")
    trainer = trainer_of(build(name))

    def train() -> list[float]:
        return [trainer.train_one_epoch(loader()) for _ in range(3)]

    def predict(model: torch.nn.Module) -> torch.Tensor:
        return torch.tensor(trainer.predict(model, loader(1)))

    check_growing(trainer.model, train, lambda: build(name, seed=1), predict)


@pytest.mark.parametrize("name", MODELS)
def test_quality(quality, name):
    def run(seed: int, epochs: large.Epochs) -> dict[str, float]:
        trainer = trainer_of(build(name, seed, large.FIELDS, dim=16))
        for _ in range(epochs.count):
            epochs.begin(trainer.model)
            trainer.train_one_epoch(loader_of(large.clicks(1, 15_000), 200))
        held_out = loader_of(large.clicks(2, 5_000), 200)
        return {"AUC": trainer.evaluate(trainer.model, held_out)}

    quality(f"torch-rechub {name}", run, epochs=6)
