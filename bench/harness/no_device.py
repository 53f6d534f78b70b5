"""A driver for Triton that has no device: kernels are compiled for sm_90, none is loaded or run.

With it the launchers of a GPU run in a process without one, their tensors on a CPU: what a launch
costs on the host can be timed, and what a launcher hands over can be read. Not where
``TRITON_INTERPRET`` is set: interpreted kernels have no launcher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from esapn_kernels.ops import backend

__all__ = ["Launched", "NoDevice", "install", "recorded"]

# Of an H100.
_SHARED_BYTES, _THREADS = 227 << 10, 1024


@dataclass(frozen=True)
class Launched:
    """One launch: what launches it, and the arguments that this was called with."""

    launcher: _Launcher
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.launcher.name

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.arguments[:3]  # type: ignore[return-value]

    @property
    def operands(self) -> tuple[Any, ...]:
        """Those of the kernel, compile-time arguments among them."""
        # After grid, stream, function, two sets of metadata and two hooks.
        return self.arguments[9:]

    @property
    def compiled(self) -> Any:
        """The compiled kernel: ``compiled[grid](*operands)`` is the same launch."""
        kept = self.launcher.kernel.device_caches[self.launcher.device][0]
        return next(each for each in kept.values() if each.run is self.launcher)


_records: list[list[Launched]] = []


class _Launcher:
    """Stands for the function that hands one compiled kernel to the driver."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.kernel, self.name = src.fn, str(metadata.name)
        self.device = driver.active.get_current_device()

    def __call__(self, *arguments: Any) -> None:
        for record in _records:
            record.append(Launched(self, arguments))


class _Utils:
    """What Triton asks of the CUDA driver for a kernel that it loads."""

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and threads at most."""
        return 1, 1, 64, 0, _THREADS

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES}


class NoDevice:
    """What Triton asks of a driver; ``device`` is the number of the current one."""

    launcher_cls = _Launcher
    utils = _Utils()

    def __init__(self) -> None:
        self.device = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def install() -> NoDevice:
    """Make it Triton's driver, and let tensors on a CPU reach the launchers of a GPU."""
    made = NoDevice()
    driver.set_active(made)
    backend.INTERPRETED = True
    return made


@contextlib.contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Every launch made inside, in order."""
    launches: list[Launched] = []
    _records.append(launches)
    try:
        yield launches
    finally:
        _records.remove(launches)
