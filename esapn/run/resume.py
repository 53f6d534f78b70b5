"""A run goes on from its newest good checkpoint, if that is of the same settings and data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError, SearchConfig
from . import checkpoint
from .loop import Run

__all__ = ["Saver", "check_origin", "resume_or_start", "save_checkpoint"]

# Settings that one run may change between two of its parts: where its data lie, where it runs.
PLACES = ("data", "device")


def check_origin(
    path: Path,
    held_config: Mapping[str, Any],
    held_checksum: str,
    config: SearchConfig,
    checksum: str,
) -> None:
    """Compare the origin of a checkpoint or record with the run that it is to stand for.

    Args:
        path: the file, for the message.
        held_config: the settings that it holds, as JSON values; one that it lacks, since it is
            newer, counts as its default.
        held_checksum: SHA-256 of the data that it was made on.
        config: the settings of the run.
        checksum: SHA-256 of the run's data.

    Raises:
        ConfigError: other data, or other settings than ``PLACES``; the message names them.
    """
    if held_checksum != checksum:
        raise ConfigError(f"{path}: was made on other data (sha256 {held_checksum[:12]}...)")
    held, now = SearchConfig.complete(held_config), config.to_json()
    keys = sorted({*held, *now} - set(PLACES))
    changed = [
        f"{key} {held.get(key)} -> {now.get(key)}" for key in keys if held.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{path}: was made with other settings ({', '.join(changed)}); use another --out"
        )


def resume_or_start(run: Run, folder: Path, checksum: str) -> list[str]:
    """Load the newest good checkpoint in ``folder``, if there is one, into ``run``.

    Args:
        run: a run at its first batch.
        folder: where :func:`save_checkpoint` wrote.
        checksum: SHA-256 of the run's data.

    Returns:
        Lines for the user: checkpoints passed over, and the event at which the run goes on.

    Raises:
        ConfigError: the checkpoint is of other settings or other data; ``run`` is as it was.
        CheckpointError: there are checkpoints, and none is good.
    """
    found = checkpoint.load(folder)
    if found is None:
        return []
    held = found.state
    if not held.keys() >= {"checksum", "config", "run", "rng"}:
        raise ConfigError(f"{found.path}: is no checkpoint to go on from")
    check_origin(found.path, held["config"], held["checksum"], run.config, checksum)
    run.load_state_dict(held["run"])
    checkpoint.set_rng_state(held["rng"])
    return [*found.passed_over, f"resumed at event {run.measures.seen:,} from {found.path.name}"]


def save_checkpoint(run: Run, folder: Path, checksum: str) -> None:
    """Write the state of ``run`` and of the generators, with its settings and its data's digest."""
    state = {
        "config": run.config.to_json(),
        "checksum": checksum,
        "run": run.state_dict(),
        "rng": checkpoint.rng_state(),
    }
    checkpoint.save(folder, run.index, state)


class Saver:
    """A ``pause`` of ``Run.walk`` that saves a checkpoint when ``seconds`` have passed.

    The end of a run is not saved: its result is written instead.
    """

    def __init__(self, folder: Path, checksum: str, seconds: float) -> None:
        self.folder = folder
        self.checksum = checksum
        self.seconds = seconds
        self.latest = time.monotonic()

    def __call__(self, run: Run) -> None:
        if time.monotonic() - self.latest < self.seconds or run.done:
            return
        save_checkpoint(run, self.folder, self.checksum)
        self.latest = time.monotonic()
