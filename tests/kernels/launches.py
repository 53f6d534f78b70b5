"""Every launcher of ``esapn_kernels``, called on a GPU that is not there; nothing runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from esapn_kernels.gpu.compose import launch_compose, launch_compose_bwd
from esapn_kernels.gpu.launch import groups_ids
from esapn_kernels.gpu.lookup_bwd import launch_bwd, launch_bwd_rows, launch_bwd_update
from esapn_kernels.gpu.lookup_fwd import launch_fwd
from esapn_kernels.gpu.resize import (
    launch_demote,
    launch_fill,
    launch_free,
    launch_insert,
    launch_promote,
)
from esapn_kernels.gpu.row_step import launch_row_step
from esapn_kernels.ops.backend import launch_kernel
from esapn_kernels.ops.chain import chain_numel, compute_dtype
from esapn_kernels.ops.layout import Layout, Places
from esapn_kernels.ops.update import RULES, CollectedRows, Update

N_ROWS, PAGE = 10_000, 4096

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "debug", "sanitize_overflow", "maxnreg")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, types of its arguments, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


def _type(value: Tensor | int) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def calls(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    index: torch.dtype,
    n_ids: int,
    device: str = "cuda:0",
    full: bool = True,
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A label and a call for every operator and every variant of it that has kernels of its own.

    Not ``full``: of outputs in other dtypes and of rules only one, the longest.
    """
    mode = FakeTensorMode()
    wide = compute_dtype(dtype)
    capacity = 1 << 24 if index == torch.int32 else 1 << 33
    pages = capacity // PAGE

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype, device=device)

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            with mode:
                return function(*args, **options)

        return run

    ids, grad_out = made(n_ids, dtype=torch.int64), made(n_ids, sizes[-1])
    storage, chain = made(capacity), made(chain_numel(sizes))
    row_start, page_level = made(N_ROWS, dtype=index), made(pages, dtype=torch.int8)
    composed = made(sum(d + 1 for d in sizes[:-1]), sizes[-1], dtype=wide)
    layout = Layout(row_start, page_level, sizes, PAGE)
    yield "compose", call(launch_compose, chain, sizes)
    yield "compose", call(launch_compose_bwd, composed, chain, composed, sizes)
    for out_dtype in (dtype, torch.bfloat16) if full else (dtype,):
        hops = chain if groups_ids(n_ids, sizes, dtype) else None
        operands = (ids, storage, composed, layout, out_dtype, None, hops)
        yield f"to-{TYPES[out_dtype]}", call(launch_fwd, *operands)
    yield "gradient", call(launch_bwd, grad_out, ids, storage, composed, layout)
    if full:
        yield "collect", call(launch_bwd_rows, grad_out, ids, storage, composed, layout)
    listed = CollectedRows(
        ids, made(n_ids, dtype=torch.int8), ids, made(n_ids * sizes[-1], dtype=wide), True
    )
    shaped = [("adagrad", True), ("adam", True)]
    for rule, shapes in (
        [*((rule, False) for rule in RULES), *shaped] if full else [("adam", False)]
    ):
        numbers, clock = (made(n, dtype=torch.float64) for n in (11, 3))
        state = made(capacity, dtype=wide)
        adam = rule.endswith("adam")
        update = Update(
            rule,
            numbers,
            (state, state),
            row_sums=made(N_ROWS, dtype=wide) if rule.startswith("rowwise") else None,
            last_step=made(N_ROWS, dtype=torch.int32) if adam else None,
            clock=clock if adam else None,
            shaped=shapes,
        )
        name = f"{rule}-shaped" if shapes else rule
        yield name, call(launch_bwd_update, grad_out, ids, storage, composed, layout, update=update)
        yield f"step-{name}", call(launch_row_step, listed, storage, layout, update)
    places = Places(
        layout,
        made(N_ROWS, dtype=index),
        made(pages, dtype=torch.int32),
        *(made(len(sizes) + 1, dtype=torch.int64) for _ in range(2)),
        *(made(len(sizes), dtype=torch.int64) for _ in range(2)),
        made(N_ROWS, dtype=torch.int32),
        *(made(1, dtype=torch.int64) for _ in range(2)),
    )
    # Gradient and Adam's moments, and one more; the step that last touched an id.
    state = made(capacity, dtype=wide)
    states = [(storage, 0.0), (state, 0.0), (state, 0.0), (state, 0.5)]
    per_ids = [(made(N_ROWS, dtype=torch.int32), 0.0)]
    mask = made(n_ids, dtype=torch.bool)
    yield "promote", call(launch_promote, ids, mask, storage, chain, places, states, per_ids)
    down = made(chain_numel(sizes[::-1]), dtype=wide)
    yield "demote", call(launch_demote, ids, mask, storage, down, places, states, per_ids)
    yield "insert", call(launch_insert, ids, 0, storage, places, states, per_ids)
    yield "free", call(launch_free, ids, storage, places)
    yield "fill", call(launch_fill, [(state, 0.25)], ids, ids, sizes)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch made inside, in order."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Tensor | int, **known: Any) -> None:
        options = {name: known.pop(name) for name in OPTIONS if name in known}
        types = {name: _type(value) for name, value in zip(kernel.arg_names, args, strict=False)}
        assert [*types, *known] and {*types, *known} == set(kernel.arg_names), kernel
        launches.append(Launch(kernel, grid, types, known, options))

    files = [module for module in list(sys.modules.values()) if _launches(module)]
    before = launch_kernel
    try:
        for module in files:
            module.launch_kernel = record  # type: ignore[attr-defined]
        yield launches
    finally:
        for module in files:
            module.launch_kernel = before  # type: ignore[attr-defined]


def _launches(module: Any) -> bool:
    return getattr(module, "launch_kernel", None) is launch_kernel
