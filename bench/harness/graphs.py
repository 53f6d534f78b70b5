"""CUDA graphs: the forward of every provider, and a whole training step of ours with promotion.

Only on a GPU. A replay costs no launch from the host and reads its ids and gradients from memory
that is filled anew before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esapn_kernels import ResizableEmbedding, optim

from .gate import GateError
from .providers import Eager, Ours, Provider, Workload
from .roof import Looked, forward_bytes, promotion_bytes, sparse_step_bytes
from .table import Row
from .timing import Entry, Timer

GRAPH_IDS = 65_536
GROWING = 1_024
"""Ids of a batch, its first ones, that a captured step promotes."""

_WARM_UP = 3
_CHECKED_STEPS = 5
_LR = 1e-3


def capture(region: Callable[[], Any], warm_up: int = _WARM_UP) -> tuple[Any, Any]:
    """Run ``region`` on a side stream, then record it; gives the graph and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            region()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = region()
    return graph, result


@torch.no_grad()
def measure_forward_graphs(
    workload: Workload, providers: Sequence[Provider], timer: Timer, repeats: int | None
) -> list[Row]:
    """Forward without gradient.

    Raises:
        GateError: a replay gives other outputs than the call.
    """
    ids = workload.batches[0].clone()
    rows, entries = [], []
    for provider in providers:
        looked = workload.looked(ragged=provider.ragged)
        row = workload.row(
            "forward graph", provider.name, looked, forward_bytes, provider.table_bytes
        )
        rows.append(row)
        if isinstance(provider, Eager):
            row.note = "not capturable: boolean masks synchronise with the host"
            continue
        try:
            graph, out = capture(partial(provider, ids))
        except RuntimeError as error:
            row.note = "not captured: " + str(error).strip().partition("\n")[0]
            continue
        ids.copy_(workload.batches[1])
        graph.replay()
        if not torch.equal(out, provider(ids)):
            raise GateError(f"{provider.name}: the replayed graph gives other outputs")
        entries.append(_replay(row, graph, lambda turn: ids.copy_(workload.batch(turn))))
    timer.measure(entries, repeats)
    return rows


def _replay(row: Row, graph: Any, prepare: Callable[[int], Any]) -> Entry:
    return Entry(row, lambda turn, _: graph.replay(), prepare)


class GrowingStep:
    """Forward, backward with fused Adam, Adam on the hops, then promotion of the first ids."""

    def __init__(self, module: ResizableEmbedding, steps: int) -> None:
        # Before the state exists and anything is captured: from here on nothing is replaced.
        module.reserve(steps * GROWING)
        self.module = module
        self.rows = optim.Adam(module, lr=_LR)
        self.hops = torch.optim.Adam([module.chain], lr=_LR, capturable=module.chain.is_cuda)

    def __call__(self, ids: Tensor, grad: Tensor) -> Tensor:
        out = self.module(ids)
        out.backward(grad)
        self.hops.step()
        self.hops.zero_grad(set_to_none=True)
        self.module.promote(ids[:GROWING])
        result: Tensor = out.detach()
        return result

    def twin(self) -> GrowingStep:
        """Another one in the same state."""
        twin = GrowingStep(copy.deepcopy(self.module), 0)
        twin.rows.load_state_dict(self.rows.state_dict())
        twin.hops.load_state_dict(copy.deepcopy(self.hops.state_dict()))
        return twin

    def same_as(self, other: GrowingStep) -> bool:
        """Whether sizes, outputs of all rows, hops and their moments are equal, bit by bit."""
        ids = torch.arange(self.module.num_embeddings, device=self.module.chain.device)
        with torch.no_grad():
            pairs = [(s.module.sizes_of(), s.module(ids), s.module.chain) for s in (self, other)]
        states = [s.hops.state[s.module.chain] for s in (self, other)]
        equal = all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        return equal and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def measure_step_graph(workload: Workload, timer: Timer, repeats: int) -> list[Row]:
    """One captured step, replayed on changing ids and gradients, beside the same calls.

    Raises:
        GateError: replays and calls from one state end in different states.
    """
    steps = repeats + _WARM_UP + _CHECKED_STEPS + 2
    step = GrowingStep(Ours(workload.table, timer.device).module, steps)
    ids, grad = workload.batches[0].clone(), workload.grad.clone()
    graph, out = capture(partial(step, ids, grad))
    calls = step.twin()

    def bring(turn: int) -> None:
        ids.copy_(workload.batch(turn))
        torch.mul(workload.grad, 1.0 + turn, out=grad)

    for turn in range(_CHECKED_STEPS):
        bring(turn)
        graph.replay()
        if not torch.equal(out, calls(ids, grad)):
            raise GateError(f"step graph: outputs of replay {turn} are not those of the calls")
    if not step.same_as(calls):
        raise GateError("step graph: replays and calls from one state end in different ones")
    looked = workload.looked()
    mode, memory = "step+promote graph", step.module.memory_report()
    held = memory.serving + memory.optimizer
    entries = [
        _replay(workload.row(mode, "ours", looked, _bytes, held), graph, bring),
        Entry(
            workload.row(mode, "ours calls", looked, _bytes, held),
            lambda turn, _: calls(ids, grad),
            bring,
        ),
    ]
    return timer.measure(entries, repeats)


def _bytes(looked: Looked) -> int:
    """A step with Adam, and the promotion of as many rows of the batch's own mix."""
    share = min(GROWING / max(sum(looked.counts), 1), 1.0)
    return sparse_step_bytes(looked, "adam") + promotion_bytes(
        [round(share * count) for count in looked.counts]
    )
