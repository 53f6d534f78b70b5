"""torch-rechub: three ranking models, by the library's own trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torch_rechub.basic.features import SparseFeature
from torch_rechub.models.ranking import DCN, DeepFM, WideDeep
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import TorchDataset

from tests.clients.shared import FIELDS, check_growing, check_same, toy

PENALTIES = {"embedding_l1": 0.0, "embedding_l2": 1e-5, "dense_l1": 0.0, "dense_l2": 1e-5}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    # Features hold their tables: those of another model are others.
    features = [SparseFeature(f"f{k}", n, embed_dim=8) for k, n in enumerate(FIELDS)]
    tower = {"dims": [32, 16], "dropout": 0.2, "activation": "relu"}
    if name == "DeepFM":
        return DeepFM(features, features, tower)
    if name == "DCN":
        return DCN(features, n_cross_layers=2, mlp_params=tower)
    return WideDeep(features[:1], features[1:], tower)


def loader(seed: int = 0) -> DataLoader[Any]:
    ids, labels = toy(seed)
    return DataLoader(TorchDataset({f"f{k}": x for k, x in enumerate(ids)}, labels), batch_size=50)


def trainer_of(model: torch.nn.Module) -> CTRTrainer:
    adam = {"lr": 0.01, "weight_decay": 1e-5}
    return CTRTrainer(model, optimizer_params=adam, regularization_params=dict(PENALTIES))


@pytest.mark.parametrize("name", ["DCN", "DeepFM", "WideDeep"])
def test_one_size_gives_the_same_numbers(embeddings, name):
    def run() -> tuple[torch.nn.Module, list[float]]:
        trainer = trainer_of(build(name))
        losses = [trainer.train_one_epoch(loader()) for _ in range(5)]
        return trainer.model, [*losses, trainer.evaluate(trainer.model, loader(1))]

    check_same(embeddings, run)


@pytest.mark.parametrize("name", ["DCN", "DeepFM", "WideDeep"])
def test_default_sizes(embeddings, name):
    embeddings("default sizes")
    trainer = trainer_of(build(name))

    def train() -> list[float]:
        return [trainer.train_one_epoch(loader()) for _ in range(3)]

    def predict(model: torch.nn.Module) -> torch.Tensor:
        return torch.tensor(trainer.predict(model, loader(1)))

    check_growing(trainer.model, train, lambda: build(name, seed=1), predict)
