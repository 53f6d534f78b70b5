"""Counts how often a GPU would compile what interpreted kernels are launched with.

``pytest tests/kernels --count-variants``: Triton compiles a kernel once for every combination of
its tensors' dtypes and alignments, its compile-time arguments, its options, and the widths of its
integers. Interpreted kernels are launched with the same, so the tests on a CPU say how many
combinations a run of them on a GPU would compile.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

PACKAGE = "esapn_kernels."


def _compile_key(kernel: InterpretedFunction, args: tuple[Any, ...], known: dict[str, Any]) -> str:
    """What Triton's own key holds of a launch, as text."""
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **known}
    runtime = set(kernel.arg_names) - {
        name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)
    }
    exempt = kernel.kwargs.get("do_not_specialize") or ()
    parts = []
    for name, value in sorted(given.items()):
        if isinstance(value, torch.Tensor):
            aligned = value.data_ptr() % 16 == 0
            parts.append(f"{name}: {value.dtype}{' aligned' if aligned else ''}")
        elif type(value) is not int or name not in runtime:  # options are no parameters at all
            parts.append(f"{name} = {value!r}")
        elif value == 1 and name not in exempt:
            parts.append(f"{name} = 1")
        else:
            width = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and name not in exempt
            parts.append(f"{name}: {width}{' aligned' if divisible else ''}")
    return ", ".join(parts)


class Variants:
    """Of every kernel of the package: its launches, and the keys that they have."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.found: set[tuple[str, str]] = set()

    @property
    def by_kernel(self) -> dict[str, int]:
        return dict(sorted(Counter(name for name, _ in self.found).items()))

    def note(self, kernel: InterpretedFunction, args: Any, known: dict[str, Any]) -> None:
        if kernel.fn.__module__.startswith(PACKAGE):
            self.launches[kernel.__name__] += 1
            self.found.add((kernel.__name__, _compile_key(kernel, args, known)))

    def lines(self) -> list[str]:
        total, launches = len(self.found), self.launches.total()
        return [
            *(f"  {name}: {n} of {self.launches[name]}" for name, n in self.by_kernel.items()),
            f"variants: {total} to compile of {launches} launches of {len(self.by_kernel)} kernels",
        ]


@contextlib.contextmanager
def counted() -> Iterator[Variants]:
    """The launches made inside."""
    variants = Variants()
    run = InterpretedFunction.run

    def noting(kernel: Any, *args: Any, grid: Any, warmup: bool, **known: Any) -> Any:
        if not warmup:
            variants.note(kernel, args, known)
        return run(kernel, *args, grid=grid, warmup=warmup, **known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", noting)
        yield variants


class Plugin:
    """``--count-variants``: the counts of all tests, at the end."""

    def __init__(self) -> None:
        self.total = Variants()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[Any]:
        with counted() as variants:
            result = yield
        self.total.launches += variants.launches
        self.total.found |= variants.found
        return result

    # With pytest-xdist: what a worker counted goes to the process that reports.
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["variants"] = sorted(map(list, self.total.found))
            session.config.workeroutput["variant_launches"] = dict(self.total.launches)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        output = getattr(node, "workeroutput", {})
        self.total.found.update(map(tuple, output.get("variants", [])))
        self.total.launches.update(output.get("variant_launches", {}))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.total.lines():
            terminalreporter.write_line(line)
