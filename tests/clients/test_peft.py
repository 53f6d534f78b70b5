"""peft: LoRA on tables, and tables that are trained beside it, in a small GPT-2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding
from tests.clients import quality as large
from tests.clients.language import IDS, build, learn, train
from tests.clients.shared import check_same, grow, tables

ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["wte", "wpe", "c_attn"]},
    "DoRA": {"target_modules": ["wte", "c_attn"], "use_dora": True},
    "modules_to_save": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    "tokens": {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [3, 5]}},
}
# Those that write to the table when they are merged into it.
WRITING = ("LoRA", "DoRA", "tokens")


def adapted(model: nn.Module, name: str, rank: int = 4) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **ADAPTERS[name]))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_size_is_adapted_saved_and_merged_as_plain(embeddings, name):
    def run() -> tuple[nn.Module, list[Any]]:
        model = adapted(build("GPT-2", tied=False), name)
        losses = train(model)
        model.save_pretrained("adapter")
        loaded = PeftModel.from_pretrained(build("GPT-2", tied=False), "adapter")
        assert torch.equal(logits(loaded), logits(model))
        numbers = [losses, logits(model).tolist()]
        model.merge_adapter()
        numbers.append(logits(model).tolist())
        model.unmerge_adapter()
        numbers.append(logits(model).tolist())
        return model.merge_and_unload(), numbers

    check_same(embeddings, run)


@pytest.mark.parametrize("name", ADAPTERS)
def test_default_sizes_are_adapted_grow_and_are_saved(embeddings, name):
    embeddings("default sizes")
    base = build("GPT-2", tied=False)
    train(base)
    grow(base)
    whole = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, name)
    losses = train(model)
    grow(model)
    losses += train(model, steps=10)
    assert losses[-1] < losses[0]
    model.save_pretrained("adapter")
    again = build("GPT-2", tied=False)
    again.load_state_dict(whole)
    loaded = PeftModel.from_pretrained(again, "adapter")
    # Rows of the base have other sizes there: growth does not change outputs, up to rounding.
    torch.testing.assert_close(logits(loaded), logits(model))
    grow(loaded)


@pytest.mark.parametrize("name", ADAPTERS)
def test_default_sizes_are_merged(embeddings, name):
    """Into rows of the largest size exactly; shorter rows take the nearest, as ``weight`` does."""
    embeddings("default sizes")
    model = adapted(build("GPT-2", tied=False), name)
    train(model)
    before = logits(model)
    model.merge_adapter()
    distance = (logits(model) - before).abs().max()
    assert (distance > 0.01) == (name in WRITING)
    model.unmerge_adapter()
    if name != "DoRA":  # which scales what it merged into
        torch.testing.assert_close(logits(model), before)
    model = adapted(build("GPT-2", tied=False), name)
    for table in tables(model):
        table.resize(torch.arange(table.num_embeddings), table.embedding_dim)
    train(model)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before)
    whole = model.merge_and_unload()
    assert isinstance(whole.get_input_embeddings(), ResizableEmbedding)
    torch.testing.assert_close(logits(whole), before)


def test_a_shorter_row_merges_to_the_nearest_output(embeddings):
    embeddings("default sizes")
    model = adapted(build("GPT-2", tied=False), "LoRA")
    train(model)
    layer = model.base_model.model.transformer.wte
    table = layer.base_layer
    assert (table.sizes_of() == 2).all()
    sums = (table.weight + layer.get_delta_weight("default")).detach().double()
    # The outputs that rows of size 2 reach lie in a plane through the bias, here 0.
    plane = table.weight.detach().double()
    basis = torch.linalg.svd(plane, full_matrices=False)[2][:2]
    layer.merge()
    nearest = (sums @ basis.T @ basis).float()
    torch.testing.assert_close(table.weight.detach(), nearest, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["LoRA", "modules_to_save"])
def test_quality(quality, name):
    """A base learns one language, its adapter another; rows of the base grow in the first."""

    def run(seed: int, epochs: large.Epochs) -> dict[str, float]:
        base = build("GPT-2", tied=False, tokens=200, dim=32, seed=seed)
        learn(base, large.Epochs(3, epochs.growing), seed)
        return {"loss": learn(adapted(base, name, rank=8), epochs, seed, language=1)}

    quality(f"peft {name}, GPT-2", run, epochs=4)
