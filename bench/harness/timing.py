"""Regions timed in turns, each from cold caches where the device allows it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .table import Row, fill

CPU_SECONDS = 8.0  # of timing per workload on a CPU, where the repeats are not given
CPU_REPEATS = 50
COPIED = {"cpu": 1 << 26, "cuda": 1 << 28}  # elements, more than the caches hold


def _nothing(turn: int) -> Any:
    return None


@dataclass
class Entry:
    """A row to measure.

    Attributes:
        row: where the times go.
        region: what is timed, of the number of the call and what ``prepare`` gave.
        prepare: what comes before it and is not timed, of the number of the turn.
        around: a context that the region runs in, entered outside the timing.
        calls: of the region in a turn; a sample is the time of one.
    """

    row: Row
    region: Callable[[int, Any], Any]
    prepare: Callable[[int], Any] = _nothing
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    calls: int = 1


class Timer:
    """Times regions on one device.

    Attributes:
        clock: what a CPU is timed by, in seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock: Callable[[], float] = time.perf_counter
        self.cuda = device.type == "cuda"
        self.flush_bytes = 0
        self._source = torch.arange(COPIED[device.type], dtype=torch.float32, device=device)
        self._target = self._source.clone()
        if self.cuda:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush_bytes = max(2 * l2, 1 << 28)
            self._flush = torch.empty(self.flush_bytes // 4, device=device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, region: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds that ``region`` takes, and its result."""
        if not self.cuda:
            begin = self.clock()
            result = region()
            return 1e3 * (self.clock() - begin), result
        self._flush.fill_(1.0)
        start, end = self._events
        start.record()
        result = region()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), result

    def sample(self, entry: Entry, turn: int) -> float:
        """Milliseconds of a call of ``entry`` in one turn."""
        prepared = entry.prepare(turn)
        first, last = turn * entry.calls, (turn + 1) * entry.calls - 1

        def calls() -> Any:
            for call in range(first, last):
                entry.region(call, prepared)
            # Given back, so that its memory is freed outside the timing.
            return entry.region(last, prepared)

        with entry.around():
            return self.time(calls)[0] / entry.calls

    def copy_rates(self) -> list[float]:
        """GB/s of some copies larger than the caches, bytes read plus bytes written."""
        times = [self.time(lambda: self._target.copy_(self._source))[0] for _ in range(8)]
        return [2 * self._source.nbytes / ms / 1e6 for ms in times]

    def measure(self, entries: Sequence[Entry], repeats: int | None) -> list[Row]:
        """Time every entry once per turn, in alternating order, and fill the rows.

        ``repeats``: of every entry; ``None``: as many as fit ``CPU_SECONDS``, 3 to 50.
        """
        begin = time.perf_counter()
        for entry in entries:
            self.sample(entry, 0)
        if repeats is None:
            fitting = int(CPU_SECONDS / (time.perf_counter() - begin + 1e-9))
            repeats = min(max(fitting, 3), CPU_REPEATS)
        copies = self.copy_rates()
        samples: list[list[float]] = [[] for _ in entries]
        for turn in range(repeats):
            order = range(len(entries))
            for i in order if turn % 2 else reversed(order):
                samples[i].append(self.sample(entries[i], turn))
        copy = statistics.median(copies + self.copy_rates())
        for entry, times in zip(entries, samples, strict=True):
            fill(entry.row, times, copy)
        return [entry.row for entry in entries]
