"""transformers: a small GPT-2 and a small BERT, saved, loaded, resized, tied."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from esapn_kernels import ResizableEmbedding
from tests.clients import quality as large
from tests.clients.language import IDS, build, learn, train
from tests.clients.shared import check_same, grow

MODELS = ("GPT-2", "BERT")


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


@pytest.mark.parametrize("name", MODELS)
def test_grown_rows_load_as_a_state_dict(embeddings, name):
    """``from_pretrained`` compares shapes with those of a model that has not grown, and refuses."""
    embeddings("default sizes")
    model = build(name, tied=False)
    grow(model)
    model.save_pretrained("saved")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained("saved")
    loaded = build(name, tied=False, seed=1)
    loaded.load_state_dict(load_file("saved/model.safetensors"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    grow(loaded)


def test_tied_rows_of_several_sizes_are_refused(embeddings):
    """In the words of transformers: there is no Parameter to share."""
    embeddings("default sizes")
    with pytest.raises(AttributeError, match="`transformer.wte.weight` is neither a parameter"):
        build("GPT-2")


@pytest.mark.parametrize("name", MODELS)
def test_quality(quality, name):
    def run(seed: int, epochs: large.Epochs) -> dict[str, float]:
        model = build(name, tied=False, tokens=200, dim=32, seed=seed)
        return {"loss": learn(model, epochs, seed, masked=name == "BERT")}

    quality(f"transformers {name}", run, epochs=5)
