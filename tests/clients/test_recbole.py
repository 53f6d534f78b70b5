"""RecBole: two general recommenders and a context-aware one, by the library's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed

from esapn_kernels.grow import ByCounts
from tests.clients import quality as large
from tests.clients.shared import check_growing, check_same

MODELS = ("BPR", "NeuMF", "DeepFM")
CONFIG = {
    "data_path": "data",
    "load_col": {"inter": ["user_id", "item_id", "rating"]},
    "use_gpu": False,
    "state": "ERROR",
    "embedding_size": 16,
    "mf_embedding_size": 16,
    "mlp_embedding_size": 16,
    "learning_rate": 0.01,
    "train_batch_size": 40,
    "epochs": 3,
}
CONTEXT = {
    "threshold": {"rating": 3},
    "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "mode": "labeled"},
    "metrics": ["AUC", "LogLoss"],
    "valid_metric": "AUC",
    "train_neg_sample_args": None,
}
# The data that RecBole comes with, and its own settings. Of ten epochs plain tables are best after
# six, on the part to validate on.
ML_100K = {
    "embedding_size": 64,
    "epochs": 6,
    "learning_rate": 0.001,
    "threshold": {"rating": 4},
    "train_batch_size": 2048,
}
NAMES = {"auc": "AUC", "logloss": "log loss", "ndcg@10": "NDCG@10", "recall@10": "Recall@10"}


@pytest.fixture(autouse=True)
def files(tmp_path):
    """Two files of ratings."""
    draws = np.random.default_rng(0)
    pairs = zip(draws.integers(0, 50, 1_000), draws.integers(0, 40, 1_000), strict=True)
    toy = [(user, item, user * item % 5 + 1) for user, item in pairs]
    for name, rows in {"toy": toy, "large": large.ratings()}.items():
        lines = ["user_id:token\titem_id:token\trating:float"]
        lines += [f"u{user}\ti{item}\t{rating}" for user, item, rating in rows]
        Path(tmp_path, "data", name).mkdir(parents=True)
        Path(tmp_path, "data", name, f"{name}.inter").write_text("\n".join(lines) + "\n")


def prepare(name: str, dataset: str = "toy", **options: Any) -> tuple[Trainer, Any, Any, Any]:
    """A trainer of a new model, and the parts to train, validate and test on."""
    more = CONTEXT if name == "DeepFM" else {}
    config = Config(model=name, dataset=dataset, config_dict={**CONFIG, **more, **options})
    init_seed(config["seed"], reproducibility=True)
    train, valid, test = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, get_model(name)(config, train.dataset))
    return trainer, train, valid, test


@pytest.mark.parametrize("name", MODELS)
def test_one_size_gives_the_same_numbers(embeddings, name):
    def run() -> tuple[torch.nn.Module, list[Any]]:
        trainer, train, valid, test = prepare(name)
        trainer.epochs = 5
        best = trainer.fit(train, valid, saved=False, verbose=False)
        scores = trainer.evaluate(test, load_best_model=False)
        return trainer.model, [best, trainer.train_loss_dict, scores]

    check_same(embeddings, run)


@pytest.mark.parametrize("name", MODELS)
def test_default_sizes(embeddings, name):
    embeddings("default sizes")
    trainer, train, *_ = prepare(name)

    def fit() -> list[float]:
        trainer.fit(train, saved=False, verbose=False)
        return list(trainer.train_loss_dict.values())

    @torch.no_grad()
    def predict(model: torch.nn.Module) -> torch.Tensor:
        users, items = torch.cartesian_prod(torch.arange(50), torch.arange(40)).unbind(1)
        return model.eval().predict(Interaction({"user_id": users, "item_id": items}))

    check_growing(trainer.model, fit, lambda: prepare(name)[0].model, predict)


def metrics(scores: Any) -> dict[str, float]:
    return {NAMES[name]: float(score) for name, score in scores.items() if name in NAMES}


@pytest.mark.parametrize("name", MODELS)
def test_quality(quality, name):
    def run(seed: int, epochs: large.Epochs) -> dict[str, float]:
        options = {"seed": seed, "epochs": 1, "train_batch_size": 100, "learning_rate": 0.003}
        trainer, train, _, test = prepare(name, "large", **options)
        for _ in range(epochs.count):
            epochs.begin(trainer.model)
            trainer.fit(train, saved=False, verbose=False)
        return metrics(trainer.evaluate(test, load_best_model=False))

    quality(f"RecBole {name}", run, epochs=25 if name == "BPR" else 10)


def test_within_budgets(within_budgets):
    def run(seed: int, growing: dict[str, Any] | None) -> tuple[torch.nn.Module, dict[str, float]]:
        trainer, train, _, test = prepare("DeepFM", "ml-100k", **ML_100K, seed=seed)
        if growing is not None:
            ByCounts(trainer.model, **growing)
        trainer.fit(train, saved=False, verbose=False)
        return trainer.model, metrics(trainer.evaluate(test, load_best_model=False))

    within_budgets("RecBole DeepFM, ML-100K", run)
