"""The processes of many runs: one a run, as many at once as there are cores.

A run takes one thread. The processes end with the one that started them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process

from ..config import ConfigError

__all__ = ["at_once", "pool"]


def at_once(workers: int, device: str) -> int:
    """The processes that ``--workers`` stands for on a device; 0: one a core.

    Runs that share one GPU take as long as one after another.
    """
    return workers or (1 if device == "cuda" else _cores())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent process, and end when it has ended.

    A worker that outlived its parent would write the files that the same command, given again,
    writes as well.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def pool(workers: int) -> Iterator[Executor]:
    """So many processes; whatever ends the block ends them.

    Args:
        workers: processes at once.

    Raises:
        ConfigError: a process was killed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    # spawn: a process forked after torch has made threads can hang.
    others = set(active_children())
    found = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_follow_parent
    )
    try:
        yield found
    except BrokenProcessPool:
        raise ConfigError(
            "a run's process was killed (out of memory?); what is finished stays: "
            "the same command goes on"
        ) from None
    except BaseException:
        # The pool would first wait for the runs that workers have begun or hold in their queue.
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
    finally:
        found.shutdown(wait=False, cancel_futures=True)
