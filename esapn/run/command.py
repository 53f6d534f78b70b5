"""``python -m esapn search``: one run, from its arguments to its files."""

from __future__ import annotations

import argparse
import shutil
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..cli import check_extras, check_least, load, make_folder, say_counts
from ..config import ConfigError, SearchConfig
from ..data.ratings import Ratings
from ..data.stream import Stream
from . import checkpoint
from .loop import Run, check_budget, device_of, stream_of
from .result import memory_table, result_lines, save
from .resume import Saver, resume_or_start

__all__ = ["search"]


def search(args: argparse.Namespace) -> int:
    """Make the run, print its result and write its files; returns the exit status."""
    check_extras(*(["tensorboard"] if args.tensorboard else []))
    config, ratings, stream = _prepare(args)
    torch.set_num_threads(args.threads)
    run = Run(config, stream)
    checkpoints = args.out / "checkpoints"
    _start(run, checkpoints, ratings.checksum, resume=args.resume)
    print(
        f"{ratings.name}: {len(ratings.rating):,} events, {ratings.n_users:,} users, "
        f"{ratings.n_items:,} items; test part from event {stream.n_train:,} on; "
        f"{stream.user.device}"
    )
    say_counts(ratings)
    saver = Saver(checkpoints, ratings.checksum, args.checkpoint_seconds)

    def pause(run: Run) -> None:
        if args.keep_best:
            _keep_best(run, args.out / "best")
        saver(run)

    with closing(_Progress(run, args.out / "tensorboard" if args.tensorboard else None)) as bar:
        result = run.walk(bar.show, pause)
    print(result_lines(config, result))
    print()
    print(memory_table(result.memory))
    save(args.out, config, ratings, stream, result)
    shutil.rmtree(checkpoints, ignore_errors=True)
    print(f"\nwrote {args.out / 'result.json'} and {args.out / 'run.png'}")
    return 0


def _prepare(args: argparse.Namespace) -> tuple[SearchConfig, Ratings, Stream]:
    """Settings, data and folder: every mistake of the user's shows before anything is learnt."""
    values = {f.name: getattr(args, f.name) for f in fields(SearchConfig)}
    config = SearchConfig(**{**values, "sizes": tuple(args.sizes)})
    device_of(config.device)
    check_least(1, threads=args.threads)
    check_least(0, checkpoint_seconds=args.checkpoint_seconds)
    ratings = load(args, [config.task])
    stream = stream_of(config, ratings)
    check_budget(config, stream)
    # Last: a run that is refused leaves no folder.
    make_folder(args.out, "result.json")
    return config, ratings, stream


def _start(run: Run, folder: Path, checksum: str, *, resume: bool) -> None:
    """Go on from the newest checkpoint in ``folder``; without ``resume`` there must be none."""
    if resume:
        for line in resume_or_start(run, folder, checksum):
            print(line)
    elif any(folder.glob("step-*.pt")):
        raise ConfigError(
            f"{folder} holds an unfinished run: --resume goes on with it, "
            "another --out or removing the folder starts afresh"
        )


def _keep_best(run: Run, folder: Path) -> None:
    """Save the run if its latest window is its best one so far."""
    if run.best["line"] != len(run.log) - 1:
        return
    best = checkpoint.save(folder, run.index, run.state_dict(), keep=1)
    # Of an earlier run: a later step would be taken for the better one.
    for stale in set(best.parent.glob("step-*.pt")) - {best}:
        stale.unlink()


class _Progress:
    """The bar of a run, and its log for TensorBoard in ``folder``, if there is one."""

    def __init__(self, run: Run, folder: Path | None) -> None:
        from tqdm import tqdm

        self.writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder))
        self.bar = tqdm(
            total=len(run.stream.bounds), initial=run.index, unit="batch", mininterval=0.5
        )

    def show(self, done: int, line: dict[str, Any]) -> None:
        """A ``progress`` of ``Run.walk``."""
        self.bar.set_postfix_str(
            f"loss {line['loss']:.4f} acc {line['accuracy']:.4f} mean size "
            f"{line['mean_user_size']:.1f} / {line['mean_item_size']:.1f}",
            refresh=False,
        )
        self.bar.update(done - self.bar.n)
        if self.writer is None:
            return
        for name, value in line.items():
            if not isinstance(value, list) and name != "events":
                self.writer.add_scalar(name, value, line["events"])

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
