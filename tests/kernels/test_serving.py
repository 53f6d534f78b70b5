"""docs/serving.md: every form that it names, written, read back and compared."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from esapn_kernels import ResizableEmbedding

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
SIZES = (2, 3, 8)
N = 50


def grown(dtype=torch.float32, compacted=False, init="isometric"):
    module = ResizableEmbedding(N, sizes=SIZES, dtype=dtype, init=init)
    if init == "tails":
        with torch.no_grad():
            module.chain.normal_()
    module.promote(torch.arange(0, N, 2))
    module.promote(torch.arange(0, N, 4))
    if compacted:
        module.compact()
    return module


def blocks():
    """The Python of the page, block by block."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def block(words):
    (found,) = (text for text in blocks() if words in text)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("init", ["isometric", "tails"])
@pytest.mark.parametrize("sizes", [SIZES, (3, 8)], ids=str)
def test_the_reader_on_the_page(dtype, compacted, init, sizes, tmp_path):
    """The very text of the page writes the file and reads it."""
    pytest.importorskip("safetensors")
    emb = (
        grown(dtype, compacted, init)
        if sizes == SIZES
        else ResizableEmbedding(N, sizes=sizes, dtype=dtype, init=init)
    )
    path = tmp_path / "emb.safetensors"
    scope = {"emb": emb}
    exec(block("save_file(").replace('"emb.safetensors"', repr(str(path))), scope)
    exec(block("class Reader"), scope)
    ids = torch.randint(N, (40,))
    found = scope["Reader"](path)(ids.numpy())
    assert found.dtype == emb(ids).detach().numpy().dtype
    tolerance = {torch.float16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(
        torch.from_numpy(found), emb(ids).detach(), rtol=tolerance, atol=tolerance
    )


def test_the_reader_is_short():
    reader = block("class Reader").split("\n\n\n")[1]
    assert len([line for line in reader.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through", ["safetensors", "torch"])
def test_files_load_into_other_sizes(through, dtype, tmp_path):
    emb, path = grown(dtype), tmp_path / "file"
    if through == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(emb.state_dict(), path)
        state = safetensors.load_file(path)
    else:
        torch.save(emb.state_dict(), path)
        state = torch.load(path, weights_only=True)
    for initial in (2, 8):
        fresh = ResizableEmbedding(N, sizes=SIZES, initial_size=initial, dtype=dtype)
        fresh.load_state_dict(state)
        assert torch.equal(fresh(torch.arange(N)), emb(torch.arange(N)))
        assert torch.equal(fresh.sizes_of(), emb.sizes_of())
        fresh.promote(torch.arange(N))


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_the_distributed_checkpoint_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "save", partial(dcp.save, no_dist=True))
    monkeypatch.setattr(dcp, "load", partial(dcp.load, no_dist=True))
    emb = grown()
    before = emb(torch.arange(N)).detach()
    scope = {"emb": emb, "path": str(tmp_path / "checkpoint")}
    exec(block("torch.distributed.checkpoint"), scope)
    fresh = ResizableEmbedding(N, sizes=SIZES, initial_size=8)
    scope["load"](fresh, scope["path"])
    assert torch.equal(fresh(torch.arange(N)), before)


def test_the_table_on_the_page_names_every_tensor():
    text = PAGE.read_text(encoding="utf-8")
    for key in grown().state_dict():
        assert f"`{key}`" in text, key
