"""Counts what Triton would compile, in a process without a GPU: import it first.

Launchers take the path of a GPU with tensors on a CPU, and Triton makes its real cache keys for
sm_90; a hook notes every new one in place of compiling.
"""

from __future__ import annotations

from typing import Any

import triton

from bench.harness import no_device

marks: dict[str, list[list[str]]] = {}
_seen: set[Any] = set()
_new: list[str] = []


def _note(*, key: Any, fn: Any, **_: Any) -> bool:
    if (fn.name, key) not in _seen:
        _seen.add((fn.name, key))
        _new.append(fn.name)
    return True  # stands for "compiled already": nothing is compiled or run


def begin(name: str) -> None:
    """Marks that follow are of ``name``, which begins with nothing compiled."""
    marks[name] = []
    _seen.clear()
    _new.clear()


def mark() -> None:
    """Note what is new since the last call."""
    list(marks.values())[-1].append(sorted(_new))
    _new.clear()


no_device.install()
triton.knobs.runtime.jit_cache_hook = _note
