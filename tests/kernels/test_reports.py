"""Programs of users, of the kinds that public bug reports tell of: torch's class beside ours."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from esapn_kernels import ResizableEmbedding, ResizableEmbeddingBag, optim

N, SIZES = 12, (2, 4, 8)
IDS = torch.arange(N)


def ragged(cls=ResizableEmbedding):
    torch.manual_seed(0)
    module = cls(N, sizes=SIZES)
    module.promote(IDS[3:])
    module.promote(IDS[8:])
    return module


def one_size(cls=ResizableEmbedding):
    torch.manual_seed(0)
    return cls(N, 8, sizes=(8,))


def arguments(module):
    return (IDS, torch.tensor([0, 5])) if isinstance(module, nn.EmbeddingBag) else (IDS,)


def train(module, optimizer):
    optimizer.zero_grad()
    module(IDS).square().sum().backward()
    optimizer.step()


# ---- copies of a module and its optimizer -----------------------------------------------------

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}
MOVES = {
    "growth": lambda m: m.resize(IDS, 8),
    "some grow": lambda m: m.promote(IDS[:5]),
    "compaction": lambda m: m.compact(),
    "growth, then compaction": lambda m: (m.resize(IDS[:2], 8), m.compact()),
}


def of_rows(module, optimizer, name):
    """The state ``name``, row by row, whatever free places hold."""
    state = optimizer.state[module.arena.storage][name]
    if not state.dim():
        return state
    starts, sizes = module.arena.row_start.tolist(), module.sizes_of().tolist()
    return torch.cat([state[a : a + d] for a, d in zip(starts, sizes, strict=False)])


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad])
def test_rows_of_a_copied_pair_move_before_its_first_step(copied, move, kind):
    """The state of the copied optimizer goes with the copied rows, as that of the original does."""
    module = ragged()
    module.resize(IDS[4:6], 8)  # leaves holes
    optimizer = kind(module.parameters(), lr=0.1)
    train(module, optimizer)
    pairs = [(module, optimizer), COPIES[copied]((module, optimizer))]
    for m, o in pairs:
        MOVES[move](m)
        train(m, o)
        train(m, o)
    (module, optimizer), (other, its) = pairs
    assert torch.equal(module(IDS), other(IDS))
    for name in optimizer.state[module.arena.storage]:
        found, expected = (of_rows(m, o, name) for m, o in ((other, its), (module, optimizer)))
        assert torch.equal(found, expected)


# ---- several devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensors_on_several_devices_are_refused(backend):
    """Numbers that are not there are not read: ids, or hops that no loader has brought."""
    module = ResizableEmbedding(N, sizes=SIZES, backend=backend)
    module(IDS)  # the hops are composed, and kept
    with pytest.raises(RuntimeError, match="on the same device, but got ids on meta"):
        module(IDS.to("meta"))
    chain = module.chain
    module.chain = nn.Parameter(chain.detach().to("meta"))
    for use in (lambda: module(IDS), lambda: module.weight, module.to_embedding):
        with pytest.raises(RuntimeError, match="on the same device.*chain on meta"):
            use()
    module.chain = chain
    assert torch.equal(module(IDS), module.weight)
    # As with torch's, a module without numbers takes any ids.
    for cls in (nn.Embedding, ResizableEmbedding):
        assert cls(N, 8, device="meta")(IDS).is_meta
