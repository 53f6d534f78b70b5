"""deepctr-torch: six models, by the library's own ``compile``, ``fit``, ``evaluate``."""

from __future__ import annotations

from typing import Any

import deepctr_torch.models
import numpy as np
import pytest
import torch
from deepctr_torch.inputs import SparseFeat

from tests.clients import quality as large
from tests.clients.shared import FIELDS, check_growing, check_same, toy

MODELS = ("AutoInt", "DCN", "DeepFM", "NFM", "WDL", "xDeepFM")


def build(
    name: str, seed: int = 1024, fields: tuple[int, ...] = FIELDS, dim: int = 8
) -> torch.nn.Module:
    columns = [SparseFeat(f"f{k}", n, embedding_dim=dim) for k, n in enumerate(fields)]
    options = {"cin_layer_size": (16, 16)} if name == "xDeepFM" else {}
    model = getattr(deepctr_torch.models, name)(
        columns, columns, dnn_hidden_units=(32, 16), device="cpu", seed=seed, **options
    )
    model.compile("adam", "binary_crossentropy", metrics=["auc", "logloss"])
    return model


Events = tuple[list[np.ndarray], np.ndarray]


def columns_of(events: Events) -> tuple[dict[str, np.ndarray], np.ndarray]:
    ids, labels = events
    return {f"f{k}": column for k, column in enumerate(ids)}, labels


def fit(model: torch.nn.Module, epochs: int) -> dict[str, list[float]]:
    x, y = columns_of(toy())
    return model.fit(x, y, batch_size=50, epochs=epochs, verbose=2).history


@pytest.mark.parametrize("name", MODELS)
def test_one_size_gives_the_same_numbers(embeddings, name):
    def run() -> tuple[torch.nn.Module, list[Any]]:
        model = build(name)
        return model, [fit(model, epochs=5), model.evaluate(*columns_of(toy(1)))]

    check_same(embeddings, run)


@pytest.mark.parametrize("name", MODELS)
def test_default_sizes(embeddings, name):
    embeddings("default sizes")
    model = build(name)

    def predict(model: torch.nn.Module) -> torch.Tensor:
        return torch.from_numpy(model.predict(columns_of(toy(1))[0]))

    check_growing(model, lambda: fit(model, 3)["loss"], lambda: build(name, seed=1), predict)


@pytest.mark.parametrize("name", MODELS)
def test_quality(quality, name):
    def run(seed: int, epochs: large.Epochs) -> dict[str, float]:
        model = build(name, seed, large.FIELDS, dim=16)
        for _ in range(epochs.count):
            epochs.begin(model)
            model.fit(*columns_of(large.clicks(1, 15_000)), batch_size=200, verbose=0)
        scores = model.evaluate(*columns_of(large.clicks(2, 5_000)))
        return {"AUC": scores["auc"], "log loss": scores["logloss"]}

    quality(f"deepctr-torch {name}", run, epochs=6)
