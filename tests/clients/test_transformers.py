"""transformers: a small GPT-2 and a small BERT, saved, loaded, resized, tied."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from esapn_kernels import ResizableEmbedding
from tests.clients.shared import check_same, grow

GPT2 = GPT2Config(
    vocab_size=100, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
)
BERT = BertConfig(
    vocab_size=100,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)
MODELS = {"GPT-2": (GPT2LMHeadModel, GPT2), "BERT": (BertForMaskedLM, BERT)}
IDS = torch.arange(96).view(8, 12)


def build(name: str, tied: bool = True) -> nn.Module:
    model, config = MODELS[name]
    torch.manual_seed(0)
    config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": tied})
    return model(config).eval()


def train(model: nn.Module, steps: int = 3) -> list[float]:
    adam, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def load(model: nn.Module) -> nn.Module:
    """What ``from_pretrained`` makes of what ``save_pretrained`` wrote."""
    model.save_pretrained("saved")
    torch.manual_seed(1)
    loaded, info = type(model).from_pretrained("saved", output_loading_info=True)
    assert not any(info.values())
    return loaded


@pytest.mark.parametrize("name", MODELS)
def test_one_size_is_saved_loaded_and_resized_as_plain(embeddings, name):
    def run() -> tuple[nn.Module, list[object]]:
        model = build(name)
        losses = train(model)
        loaded = load(model)
        # Every row as it was saved (transformers#46620).
        assert type(loaded.get_input_embeddings()) is type(model.get_input_embeddings())
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        losses += train(loaded)
        # transformers#851
        wide = loaded.resize_token_embeddings(120)
        assert wide is loaded.get_input_embeddings() and wide.weight.shape == (120, 16)
        assert loaded.get_output_embeddings().weight is wide.weight
        assert torch.equal(wide(IDS), wide.weight[IDS])
        losses += train(loaded)
        narrow = loaded.resize_token_embeddings(98)
        assert torch.equal(narrow.weight, wide.weight[:98])
        losses += train(loaded)
        return loaded, losses

    check_same(embeddings, run)


def test_embeddings_are_set_and_tied():
    plain, ours = build("GPT-2"), build("GPT-2")
    # It shares the rows of the table that it replaces.
    ours.set_input_embeddings(ResizableEmbedding.from_embedding(ours.get_input_embeddings()))
    ours.tie_weights()
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert train(ours) == train(plain)
    assert torch.equal(ours(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("name", MODELS)
def test_default_sizes_are_saved_and_loaded(embeddings, name):
    embeddings("default sizes")
    model = build(name, tied=False)
    losses = train(model)
    # transformers#48892: built on the meta device, tensors assigned.
    loaded = load(model)
    assert isinstance(loaded.get_input_embeddings(), ResizableEmbedding)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    grow(loaded)
    losses += train(loaded, steps=10)
    assert all(value.isfinite().all() for value in loaded.state_dict().values())
    assert losses[-1] < losses[0]
