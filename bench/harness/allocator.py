"""Which memory a benchmark on a CPU measures with: glibc's allocator, pinned or as it comes.

glibc takes blocks above a threshold from the kernel and gives them back when they are freed, so
that every use of one faults its pages in anew. The threshold moves with what was freed, up to 32
MiB: an output of exactly that size is above it for ever, and its page faults cost several times its
lookup. ``warm`` keeps freed memory in the process, whatever its size; ``default`` is a process as
it comes.
"""

from __future__ import annotations

import os
import platform
import sys

import torch

_PINNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
KINDS = ("warm", "default")


def has_glibc() -> bool:
    """Whether the variables mean anything here."""
    return platform.libc_ver()[0] == "glibc"


def environment(kind: str) -> dict[str, str]:
    """The variables of this process, with those of one of :data:`KINDS`."""
    kept = {name: value for name, value in os.environ.items() if name not in _PINNED}
    return kept | _PINNED if kind == "warm" else kept


def enter(kind: str) -> None:
    """Run this command anew with the variables of ``kind``, unless they are set already."""
    wanted = environment(kind)
    if has_glibc() and wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def touch(size: int) -> None:
    """Have ``size`` bytes of freed memory in the process, as one that has run for a while.

    A freed block serves an equal request only where nothing small lies at its edge by then; till
    holes of all sizes are there, requests would be served by memory that was never touched.
    """
    torch.empty(size // 4).fill_(1.0)


def page_faults(size: int = 1 << 25) -> float | None:
    """Of a block of ``size`` bytes that is written and freed, once others were before it."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    counts = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(size // 4).fill_(1.0)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sum(counts[1:]) / len(counts[1:])


def describe(kind: str) -> str:
    """The allocator, what it is told, and what it does with an output of 32 MiB."""
    name = " ".join(platform.libc_ver()) if has_glibc() else "the platform's own"
    told = [f"{key}={os.environ[key]}" for key in (*_PINNED, "LD_PRELOAD") if key in os.environ]
    faults = page_faults()
    seen = "" if faults is None else f"; {faults:,.0f} page faults in an output of 32 MiB"
    return f"allocator, {kind}: {name}, {' '.join(told) or 'no variables'}{seen}"
