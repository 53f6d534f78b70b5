"""Processes that are the ranks of a process group, and run cases together."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any


class Gang:
    """``world`` ranks of gloo; forked from a process that has imported everything."""

    def __init__(self, world: int) -> None:
        self.world = world
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.sharded.cases"])
        store = os.path.join(tempfile.mkdtemp(), "store")
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def answers(self, case: str, **arguments: Any) -> Iterator[tuple[int, bool, Any]]:
        """Of every rank, as they come: whether ``case`` ended well, its result or a traceback."""
        for pipe in self._pipes:
            pipe.send((case, arguments))
        waiting: dict[Any, int] = dict(zip(self._pipes, range(self.world), strict=True))
        while waiting:
            for pipe in wait(list(waiting)):
                rank = waiting.pop(pipe)
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "the process ended"
                yield rank, good, value

    def run(self, case: str, **arguments: Any) -> list[Any]:
        """What ``case`` of ``cases.py``, or ``"module:case"`` of another, returns on every rank.

        Raises:
            AssertionError: it raised on a rank; the traceback of the first that did, whose others
                may wait for it, and are ended.
        """
        found: dict[int, Any] = {}
        for rank, good, value in self.answers(case, **arguments):
            if not good:
                self.close()
                raise AssertionError(f"rank {rank}: {value}")
            found[rank] = value
        return [found[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    with contextlib.suppress(EOFError):
        while True:
            case, arguments = pipe.recv()
            module, _, name = case.rpartition(":")
            try:
                cases = importlib.import_module(f"tests.sharded.{module or 'cases'}")
                pipe.send((True, getattr(cases, name)(**arguments)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
