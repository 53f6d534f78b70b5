"""What ``launch_kernel`` keeps, told as JSON by a process whose kernels are compiled, not run.

    python -m tests.kernels.kept_worker

A kernel that is found is launched without ``JITFunction.run``, whose calls are counted.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import language as tl
from triton.runtime.jit import JITFunction

import esapn_kernels.gpu
from bench.harness.no_device import Launched, install, recorded
from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.gpu.compose import launch_compose
from esapn_kernels.gpu.lookup_fwd import launch_fwd
from esapn_kernels.gpu.resize import _fill_rows_kernel, launch_fill
from esapn_kernels.ops.backend import forget_kernels, launch_kernel

driver = install()
searches: list[str] = []
_run = JITFunction.run


def _counted(self: Any, *args: Any, **known: Any) -> Any:
    searches.append(self.__name__)
    return _run(self, *args, **known)


JITFunction.run = _counted


@triton.jit
def specialized_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, offs, mask=offs < n)


def kernels() -> list[Any]:
    """Every kernel of the package that is launched."""
    names = [info.name for info in pkgutil.iter_modules(esapn_kernels.gpu.__path__)]
    modules = [importlib.import_module(f"esapn_kernels.gpu.{name}") for name in names]
    found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, JITFunction)}
    return [kernel for kernel in found.values() if kernel.__name__.endswith("_kernel")]


def specialized() -> list[str]:
    """Integers of the kernels that Triton specialises."""
    return [
        f"{kernel.__name__}: {parameter.name}"
        for kernel in kernels()
        for parameter in kernel.params
        if not parameter.is_constexpr and not parameter.name.endswith("_ptr")
        if not parameter.do_not_specialize
    ]


def work() -> None:
    """Everything that launches a kernel."""
    sizes = (2, 16)
    module = ResizableEmbedding(
        600, sizes=sizes, initial_size=torch.tensor(sizes)[torch.arange(600) % 2], backend="triton"
    )
    ids = torch.arange(600)
    module(ids).backward(torch.ones(600, 16))
    optimizer = optim.Adam(module, lr=0.1)
    for batch in (ids, ids.repeat(8)):  # sorted by one program, and by more launches
        module(batch).backward(torch.ones(len(batch), 16))
    del optimizer
    deferred = optim.Adam(module, lr=0.1, deferred=True)
    module(ids).backward(torch.ones(600, 16))
    deferred.step()
    del deferred
    module.promote(ids, ids > 5)
    module.arena.free(ids[:3], backend="triton")
    module.arena.insert(ids[:3], 0, backend="triton")
    launch_fill([(module.arena.storage.detach(), 0.5)], ids, ids, sizes)
    # fp64 is grouped at any length.
    rows, hops = (t.detach().double() for t in (module.arena.storage, module.chain))
    launch_fwd(ids, rows, launch_compose(hops, sizes), module.arena.layout)


def differences() -> dict[str, Any]:
    """Of every launch of :func:`work`, made by Triton's search and then without: what differs."""
    differing: list[str] = []
    names: set[str] = set()
    modules = [m for m in list(sys.modules.values()) if vars(m).get("launch_kernel")]
    modules = [m for m in modules if m.__name__.startswith("esapn_kernels.gpu")]

    def twice(kernel: Any, *args: Any, **known: Any) -> None:
        before = len(searches)
        forget_kernels()
        with recorded() as launches:
            for _ in range(2):
                launch_kernel(kernel, *args, **known)
        found, kept = launches
        names.add(found.name)
        same = found.launcher is kept.launcher and len(found.arguments) == len(kept.arguments)
        same &= all(map(_same, found.arguments, kept.arguments))
        if not same or found.name != kernel.__name__ or len(searches) != before + 1:
            differing.append(found.name)

    for module in modules:
        module.launch_kernel = twice
    try:
        work()
    finally:
        for module in modules:
            module.launch_kernel = launch_kernel
    return {"differing": differing, "missing": [*{k.__name__ for k in kernels()} - names]}


def _same(a: Any, b: Any) -> bool:
    if hasattr(a, "extras"):  # Triton's own bundle for a hook
        return bool(a.get() == b.get())
    return a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b))


def _fill(tensor: torch.Tensor, at: torch.Tensor, n_rows: int = 8, **other: Any) -> None:
    known = {"SIZES": (2, 4), "DIM": 4, "VALUE": 0.0, "BLOCK_ROWS": 16, "BLOCK_DIM": 16}
    launch_kernel(_fill_rows_kernel, (1,), tensor, at, at, n_rows, **{**known, **other})


def searched(call: Callable[[], Any]) -> int:
    """How often Triton searches during a call."""
    before = len(searches)
    call()
    return len(searches) - before


def changes() -> dict[str, list[int]]:
    """Searches of a launch after another one, and when it is repeated."""
    rows, at = torch.zeros(64), torch.zeros(16, dtype=torch.int64)
    made = {
        "the first": lambda: _fill(rows, at),
        "another number": lambda: _fill(rows, at, 1),
        "other memory": lambda: _fill(rows[32:], at.clone()),
        "another dtype": lambda: _fill(rows.bfloat16(), at),
        "misaligned": lambda: _fill(rows[1:], at),
        "misaligned elsewhere": lambda: _fill(rows, at[1:]),
        "a wider number": lambda: _fill(rows, at, 1 << 31),
        "another constant": lambda: _fill(rows, at, VALUE=0.5),
        "another option": lambda: _fill(rows, at, num_warps=8),
        "another order": lambda: _fill(rows, at, num_stages=3, num_warps=8),
    }
    counts = {name: [searched(call), searched(call)] for name, call in made.items()}
    forget_kernels()
    counts["forgotten"] = [searched(made["the first"]), searched(made["the first"])]
    return counts


class Elsewhere(torch.Tensor):
    """A tensor on a CPU that says that it is on ``cuda:<device>``."""

    device_index = 0
    is_cuda = True

    def get_device(self) -> int:
        return self.device_index


def devices() -> dict[str, Any]:
    """Searches, and the devices that launches were made on and kernels loaded on."""

    def exchange(device: int) -> int:
        before, driver.device = driver.device, driver.device if device < 0 else device
        return before

    torch.cuda.current_device = lambda: driver.device
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
    at = torch.zeros(16, dtype=torch.int64)
    told: dict[str, Any] = {"searches": [], "loaded": [], "same": [], "after": []}
    first: dict[int, Launched] = {}
    for device in (0, 1, 1, 0, 1):
        rows = torch.zeros(64).as_subclass(Elsewhere)
        rows.device_index = device
        with recorded() as launches:
            told["searches"].append(searched(lambda rows=rows: _fill(rows, at)))
        (launch,) = launches
        told["loaded"].append(launch.launcher.device)
        told["same"].append(first.setdefault(device, launch).launcher is launch.launcher)
        told["after"].append(driver.device)
    return told


def numbers() -> list[Any]:
    """Of a kernel whose integer Triton specialises: searches, and binaries, of 1, 16 and 17."""
    rows = torch.zeros(64)
    with recorded() as launches:

        def call() -> None:
            for n in (1, 16, 17, 1):
                launch_kernel(specialized_kernel, (1,), rows, n, BLOCK=16)

        count = searched(call)
    return [count, len({id(each.launcher) for each in launches})]


if __name__ == "__main__":
    facts = {
        "specialized": specialized(),
        "differences": differences(),
        "changes": changes(),
        "numbers": numbers(),
    }
    triton.knobs.runtime.launch_enter_hook = lambda metadata: None
    facts["differences with a hook"] = differences()
    facts["devices"] = devices()
    print(json.dumps(facts))
