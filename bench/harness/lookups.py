"""Lookup modes: forward, backward and both of every provider, and the forwards without gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esapn_kernels import optim

from .gate import GateError, check, check_forward, equal_runs, make_reference
from .providers import (
    Compiled,
    Deterministic,
    Fixed,
    Forward,
    Ours,
    Provider,
    Workload,
    make_forwards,
)
from .roof import Looked, dense_backward_bytes, forward_bytes
from .table import Row
from .timing import Entry, Timer

MODES = ("forward", "backward", "both")
EXACT_RUNS = 20


def measure_lookups(
    workload: Workload, providers: Sequence[Provider], timer: Timer, repeats: int | None
) -> list[Row]:
    """Check every provider on the workload, then time forward, backward and both in turns.

    Raises:
        GateError: a provider is wrong; nothing has been timed.
    """
    ids = workload.batches[0]
    reference = make_reference(next(p for p in providers if isinstance(p, Ours)), ids)
    rows, entries = [], []
    for provider in providers:
        own = make_reference(provider, ids) if isinstance(provider, Fixed) else reference
        note, error, memory = "", None, provider.table_bytes
        try:
            with provider.around():
                error = check(provider, ids, own)
                memory += _peak_bytes(provider, ids, workload.grad, timer)
        except GateError:
            raise
        except Exception as failure:  # torch.compile fails in as many ways as it has parts
            if not isinstance(provider, Compiled):
                raise
            note = "not compiled: " + _first_line(failure)
        for entry in _entries(workload, provider, memory):
            entry.row.note, entry.row.gate_error = note, error
            rows.append(entry.row)
            if not note:
                entries.append(entry)
    timer.measure(entries, repeats)
    rows.sort(key=lambda row: MODES.index(row.mode))
    return rows


def lookup_bytes(mode: str, grad_elements: int) -> Callable[[Looked], int]:
    """The byte model of one of ``MODES``; the gradient of a table is dense."""
    dense = partial(dense_backward_bytes, grad_elements=grad_elements)
    models: dict[str, Callable[[Looked], int]] = {
        "forward": forward_bytes,
        "backward": dense,
        "both": lambda looked: forward_bytes(looked) + dense(looked),
    }
    return models[mode]


def _entries(workload: Workload, provider: Provider, memory: int) -> list[Entry]:
    looked = workload.looked(ragged=provider.ragged)

    def forward(turn: int, _: Any = None) -> Tensor:
        return provider(workload.batch(turn))

    def backward(_: int, out: Tensor) -> Any:
        return provider.backward(out, workload.grad)

    def both(turn: int, _: Any) -> Any:
        return backward(turn, forward(turn))

    def row(mode: str) -> Row:
        model = lookup_bytes(mode, provider.grad_elements)
        return workload.row(mode, provider.name, looked, model, memory)

    found = [
        Entry(row("forward"), forward, around=provider.around),
        Entry(row("backward"), backward, forward, provider.around),
        Entry(row("both"), both, around=provider.around),
    ]
    # The deterministic mode of torch concerns backward alone.
    return found[1:2] if isinstance(provider, Deterministic) else found


def _peak_bytes(provider: Provider, ids: Tensor, grad: Tensor, timer: Timer) -> int:
    """On a GPU what one forward and backward adds to the tables at its peak, else 0."""
    if not timer.cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.backward(provider(ids), grad)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def measure_forwards(
    workload: Workload, ours: Ours, fixed: Fixed, timer: Timer, repeats: int | None
) -> list[Row]:
    """Check and time the forwards without gradient: of other dtypes, and into given memory."""

    def entry(forward: Forward) -> Entry:
        model = partial(forward_bytes, itemsize=forward.itemsize, out_itemsize=forward.out_itemsize)
        row = workload.row(
            forward.mode,
            forward.name,
            workload.looked(ragged=forward.source.ragged),
            model,
            forward.source.table_bytes,
            gate_error=check_forward(forward, workload.batches[0]),
        )
        return Entry(row, lambda turn, _: forward.call(workload.batch(turn)), around=torch.no_grad)

    return timer.measure(list(map(entry, make_forwards(workload.table, ours, fixed))), repeats)


def compare_runs(
    workload: Workload, ours: Ours, fixed: Fixed, runs: int = EXACT_RUNS
) -> dict[str, Any]:
    """How many of ``runs`` equal runs give equal bits: ours in everything, torch's gradients."""
    ids = workload.batches[0]

    def gradients(provider: Provider) -> list[Tensor]:
        with provider.around():
            out = provider(ids)
            return [out.detach(), *provider.backward(out, workload.grad)]

    def step() -> list[Tensor]:
        stepped = copy.deepcopy(ours)
        optimizer = optim.Adam(stepped.module)
        stepped(ids).backward(workload.grad)
        state = optimizer.state[stepped.storage]
        chain_grad = stepped.module.chain.grad
        assert chain_grad is not None
        kept = [state[name] for name in ("exp_avg", "exp_avg_sq", "last_step")]
        return [stepped.storage.detach(), chain_grad, *kept]

    torch_modes = (fixed, Deterministic(fixed))
    return {
        "table": workload.table.name,
        "traffic": workload.traffic,
        "ids": workload.count,
        "runs": runs,
        "ours": {
            "outputs and gradients": equal_runs(lambda: gradients(ours), runs),
            "rows, state and hop gradients of a fused Adam step": equal_runs(step, runs),
        },
        "torch": {p.name: equal_runs(partial(gradients, p), runs) for p in torch_modes},
    }
