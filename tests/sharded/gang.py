"""Processes that are the ranks of a process group, and run cases together."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import multiprocessing as mp
import os
import tempfile
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from typing import Any

WAIT = datetime.timedelta(seconds=20)
"""How long a rank waits for another in a collective."""


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

    def run(self, case: str, **arguments: Any) -> list[Any]:
        """What ``case`` of ``cases.py``, or ``"module:case"`` of another, returns on every rank.

        Raises:
            AssertionError: it raised on a rank; the traceback of the first that did.
        """
        for pipe in self._pipes:
            pipe.send((case, arguments))
        results: dict[int, Any] = {}
        failures = []
        open_pipes = dict(zip(self._pipes, range(self.world), strict=True))
        while open_pipes:
            for pipe in wait(list(open_pipes)):
                rank = open_pipes.pop(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "the process ended"
                if good:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}: {value}")
        if failures:
            self.close()
            raise AssertionError(failures[0])
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.terminate()

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=dist.FileStore(store, world), timeout=WAIT
    )
    with contextlib.suppress(EOFError):
        while True:
            case, arguments = pipe.recv()
            module, _, name = case.rpartition(":")
            try:
                cases = importlib.import_module(f"tests.sharded.{module or 'cases'}")
                pipe.send((True, getattr(cases, name)(**arguments)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
