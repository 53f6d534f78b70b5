"""Language models of transformers on synthetic sentences, by the library's own trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.clients.quality import Epochs, popularity

IDS = torch.arange(96).view(8, 12)
MASK = 1
LENGTH = 8


def build(
    name: str, tied: bool = True, tokens: int = 100, dim: int = 16, seed: int = 0
) -> PreTrainedModel:
    """A GPT-2 or a BERT of one layer."""
    torch.manual_seed(seed)
    common = {"vocab_size": tokens, "tie_word_embeddings": tied}
    if name == "GPT-2":
        width = {"n_positions": 16, "n_embd": dim, "n_layer": 1, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **width, **common)).eval()
    width = {"max_position_embeddings": 16, "hidden_size": dim, "intermediate_size": 2 * dim}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**width, **heads, **common)).eval()


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """The losses of a few steps on ``IDS``."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def sentences(language: int, seed: int, count: int, tokens: int = 200) -> Tensor:
    """Ids ``[count, LENGTH]``; each depends on the one before, by four factors of both.

    Args:
        language: says which ids follow which.
        seed: of the draws.
        count: how many.
        tokens: ids lie below; the first three do not occur.
    """
    fixed = np.random.default_rng(language)
    logits = fixed.normal(0, 1.2, (tokens, 4)) @ fixed.normal(0, 1.2, (4, tokens))
    logits = logits + np.log(popularity(tokens))
    logits[:, :3] = -np.inf
    draws = np.random.default_rng(seed)
    ids = [draws.integers(3, tokens, count)]
    for _ in range(LENGTH - 1):
        ids.append((logits[ids[-1]] + draws.gumbel(size=(count, tokens))).argmax(1))
    return torch.from_numpy(np.stack(ids, axis=1))


def examples(language: int, seed: int, count: int, masked: bool) -> list[dict[str, Tensor]]:
    """What the trainer takes; of masked sentences the labels are what the mask hides."""
    ids = sentences(language, seed, count)
    labels = ids
    if masked:
        hidden = torch.from_numpy(np.random.default_rng(seed).random(ids.shape) < 0.15)
        labels = ids.where(hidden, torch.tensor(-100))
        ids = ids.where(~hidden, torch.tensor(MASK))
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


class Begin(TrainerCallback):
    """Rows grow between the epochs of a trainer."""

    def __init__(self, epochs: Epochs) -> None:
        self.epochs = epochs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any, **more: Any) -> None:
        self.epochs.begin(model)


def learn(
    model: nn.Module, epochs: Epochs, seed: int, language: int = 0, masked: bool = False
) -> float:
    """Train ``model`` on a language; returns its loss on other sentences of it."""
    options = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    steps = {"per_device_train_batch_size": 50, "per_device_eval_batch_size": 250}
    trainer = Trainer(
        model,
        TrainingArguments(
            "runs",
            num_train_epochs=epochs.count,
            seed=seed,
            learning_rate=0.005,
            lr_scheduler_type="constant",
            logging_strategy="no",
            **steps,
            **options,
        ),
        train_dataset=examples(language, 1, 4_000, masked),
        eval_dataset=examples(language, 2, 1_000, masked),
        callbacks=[Begin(epochs)],
    )
    if epochs.count:
        trainer.train()
    return float(trainer.evaluate()["eval_loss"])
