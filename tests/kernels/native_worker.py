"""What ``test_cpu_native.py`` runs in processes of their own, by name."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.ops.lookup import Options, lookup
from esapn_kernels.testing import make_case

SIZES = (2, 4, 8, 16, 64, 128)
OPTIMIZERS: dict[str, Callable[[ResizableEmbedding], optim.FusedOptimizer]] = {
    "sgd": lambda module: optim.SGD(module, lr=0.1),
    "adagrad": lambda module: optim.Adagrad(module, lr=0.1, initial_accumulator_value=0.1),
    "rowwise_adagrad": lambda module: optim.Adagrad(module, lr=0.1, rowwise=True),
    "adam": lambda module: optim.Adam(module, lr=0.1),
    "rowwise_adam": lambda module: optim.AdamW(module, lr=0.1, rowwise=True, clip_row_norm=0.5),
}


def digest(*tensors: Tensor) -> str:
    """Of all bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.to_dense() if tensor.is_sparse else tensor
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def large(dtype: torch.dtype = torch.float32):
    """More than 4,096 distinct rows, which several tasks share, and some of them often."""
    case = make_case(SIZES, 6000, 0, dtype, backend="native")
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.arange(5000), torch.randint(300, (3000,), generator=generator)])
    ids = ids[torch.randperm(len(ids), generator=generator)]
    grad_out = torch.randn(len(ids), SIZES[-1], generator=generator).to(dtype)
    return type(case)(case.module, ids, grad_out)


def results(dtype: torch.dtype) -> dict[str, str]:
    """Digests of all that a lookup, its gradients and every optimizer write."""
    case = large(dtype)
    found = {"dense": digest(*case.run("native"))}
    storage, chain = case.leaves()
    options = Options(sparse=True, padding_idx=7)
    out = lookup(case.ids, storage, chain, case.layout, options, backend="native")
    out.backward(case.grad_out)
    found["sparse"] = digest(out, storage.grad.coalesce().indices(), storage.grad, chain.grad)
    for name, build in OPTIMIZERS.items():
        module = large(dtype).module
        rows = build(module)
        outputs = []
        for step in range(2):
            out = module(case.ids[step:])
            out.backward(case.grad_out[step:])
            outputs.append(out)
        parameter = module.arena.storage
        state = [t for t in rows.state[parameter].values() if isinstance(t, Tensor)]
        found[name] = digest(*outputs, parameter, module.chain.grad, *state)
    return found


def bits(threads: str) -> None:
    """Digests, a line each."""
    torch.set_num_threads(int(threads))
    for dtype in (torch.float32, torch.bfloat16):
        for name, found in results(dtype).items():
            print(dtype, name, found)


def second_thread() -> None:
    """The threads of this process before a lookup on two of them, and after it."""
    torch.set_num_threads(1)
    case = large()
    storage, chain = (t.detach() for t in case.leaves())
    out = torch.empty(len(case.ids), SIZES[-1])
    torch.set_num_threads(2)
    print(len(os.listdir("/proc/self/task")))
    lookup(case.ids, storage, chain, case.layout, backend="native", out=out)
    print(len(os.listdir("/proc/self/task")))


def fork() -> None:
    """Children of a process whose pool is at work look up, and step rows, on two threads."""
    torch.set_num_threads(2)
    case = large()
    module = case.module.requires_grad_(False)
    out, stop = torch.empty(len(case.ids), SIZES[-1]), threading.Event()
    expected = digest(module(case.ids))

    def work() -> None:
        own = torch.empty_like(out)
        while not stop.is_set():
            lookup(case.ids, module.arena.storage, module.chain, case.layout, out=own)

    other = threading.Thread(target=work)
    other.start()
    for _ in range(5):
        child = os.fork()
        if not child:
            torch.set_num_threads(2)
            found = digest(module(case.ids))
            module.arena.storage.requires_grad_()
            rows = optim.SGD(module, lr=0.0)  # a dense gradient torch fills on threads that hang
            module(case.ids).backward(case.grad_out)
            rows.detach()
            os._exit(0 if found == expected == digest(module(case.ids)) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    other.join()


def answer(queue, module: ResizableEmbedding, ids: Tensor) -> None:
    """What a spawned process finds in a module that it was sent."""
    torch.set_num_threads(2)
    queue.put(digest(module(ids)))


if __name__ == "__main__":
    {"bits": bits, "second_thread": second_thread, "fork": fork}[sys.argv[1]](*sys.argv[2:])
