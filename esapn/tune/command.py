"""``python -m esapn tune``: from its arguments to the settings chosen.

DIR/tune.json       what is tuned, and on which data
DIR/trials.csv      every walk, as soon as it is made
DIR/settings.json   the settings chosen, and by how much
DIR/tuning.png      quality over the settings tried
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from esapn_kernels import info

from ..cli import SHARED, check_extras, check_least, make_folder
from ..config import ConfigError, SearchConfig
from ..data.ratings import Ratings
from ..jsonfile import write_json
from ..methods import method_settings
from ..run.loop import check_budget, device_of, stream_of
from ..run.processes import at_once, pool
from . import trials
from .choice import DEFAULT, choose, lines
from .figure import draw
from .folder import Chosen, candidates, check_header, chosen_in, keep_header
from .schedule import Listed, Tuning
from .space import ranges
from .walk import QUARTERS, Job, Part, Walked, config_of, part_of, walk

__all__ = ["DEFAULT_METHODS", "tune"]

DEFAULT_METHODS = (
    *("fixed-2", "fixed-4", "fixed-8", "fixed-16", "fixed-64", "fixed-128"),
    *("counts-6.25%", "counts-6.25%,hops=tails", "esapn", "esapn-dwell-0.5", "darts", "autoemb"),
    *("thresholds-16", "power-1"),
)


def tune(args: argparse.Namespace) -> int:
    """Make the walks that have no line yet, then choose; returns the exit status."""
    check_extras("scipy", *([] if args.check else ["optuna"]))
    check_least(1, trials=args.trials, orders=args.orders)
    check_least(0, workers=args.workers)
    processes = at_once(args.workers, device_of(args.device))
    part = _part(args)
    # Before the data are read: a setting out of range is found at once.
    SearchConfig(**part.settings)
    checked = chosen_in(args.check)
    orders = _orders(args, checked)
    tuned = _methods(args, part, orders, checked)
    ratings = part_of(part)
    _check_part(ratings, part, tuned, orders)
    header = _header(args, part, ratings, orders, list(checked))
    check_header(args.out, header)
    path = args.out / "trials.csv"
    _take(path, tuned)
    make_folder(args.out, path.name)
    keep_header(args.out, header)
    trials.mend(path)
    _walk_all(path, tuned, part, processes)
    _finish(args.out, tuned, header, default=DEFAULT if checked else "0")
    return 0


def _orders(args: argparse.Namespace, checked: Mapping[str, Chosen]) -> list[int]:
    """A check's begin after those that the settings were chosen on.

    Raises:
        ConfigError: some are those that they were chosen on, or out of range.
    """
    seen = {order for chosen in checked.values() for order in chosen.orders}
    first = args.first_order
    if first is None:
        first = max(seen, default=-1) + 1
    found = list(range(first, first + args.orders))
    if not 0 <= first <= found[-1] < 2**32:
        raise ConfigError(f"--first-order must lie between 0 and 2^32 - {args.orders}, got {first}")
    if again := sorted(seen & set(found)):
        raise ConfigError(f"--first-order {first}: settings were chosen on order {again[0]}")
    return found


def _methods(
    args: argparse.Namespace, part: Part, orders: list[int], checked: Mapping[str, Chosen]
) -> list[Listed]:
    """Every method with what it will walk.

    Raises:
        ConfigError: an unknown method, one without settings to tune, or settings out of range.
    """
    known = next(iter(checked.values())).methods if checked else DEFAULT_METHODS
    tuned: list[Listed] = []
    for method in dict.fromkeys(args.methods or known):
        config = config_of(part, method, {}, orders[0])
        spans = ranges(config, method_settings(method)[1])
        if not spans:
            raise ConfigError(f"--methods: there is nothing to tune in '{method}'")
        if not checked:
            tuned.append(Tuning(method, config, spans, trials=args.trials, orders=orders))
            continue
        listed = candidates(method, {name: getattr(config, name) for name in spans}, checked)
        for settings in listed.values():
            config_of(part, method, settings, orders[0])
        tuned.append(Listed(method, listed, orders))
    return tuned


def _check_part(
    ratings: Ratings, part: Part, tuned: Sequence[Listed], orders: Sequence[int]
) -> None:
    """Refuse a part that is too short for quarters, and budgets that do not hold the rows."""
    configs = {listed.method: config_of(part, listed.method, {}, orders[0]) for listed in tuned}
    stream = stream_of(next(iter(configs.values())), ratings)
    if stream.n_train < (QUARTERS - 1) * stream.bounds.batch_size:
        raise ConfigError(
            f"{ratings.name}: {len(ratings.rating)} events to train on are less than one batch a "
            f"quarter: --batch-size {stream.bounds.batch_size} is too large"
        )
    for method, config in configs.items():
        try:
            check_budget(config, stream)
        except ConfigError as error:
            raise ConfigError(f"--methods {method}: {error}") from None


def _take(path: Path, tuned: Sequence[Listed]) -> None:
    """Take the walks of a file, which are not made again; those of other trials are left alone.

    Raises:
        ConfigError: a walk has other settings than its trial has now.
    """
    of = {listed.method: listed for listed in tuned}
    for walked in trials.read(path):
        listed = of.get(walked.method)
        if listed is None or walked.order not in listed.orders or not listed.has(walked.trial):
            continue
        if not listed.fits(walked):
            raise ConfigError(
                f"{path}: '{walked.trial}' of {walked.method} has other settings by now; "
                "use another --out"
            )
        listed.add(walked)


def _part(args: argparse.Namespace) -> Part:
    names = [name for name in SHARED if name != "log_every"]
    common = {name: getattr(args, name) for name in names} | {"task": args.task}
    common["sizes"] = tuple(args.sizes)
    options = {n: getattr(args, n) for n in ("archive", "url", "cache", "malformed")}
    options = {name: value for name, value in options.items() if value is not None}
    options["five_classes"] = args.task == "multiclass"
    return Part(tuple(common.items()), tuple(options.items()))


def _header(
    args: argparse.Namespace,
    part: Part,
    ratings: Ratings,
    orders: Sequence[int],
    checked: Sequence[str],
) -> dict[str, Any]:
    common = {n: list(v) if isinstance(v, tuple) else v for n, v in part.common}
    return {
        "data": {
            "name": ratings.name,
            "sha256": ratings.checksum,
            "train_events": len(ratings.rating),
            "users": ratings.n_users,
            "items": ratings.n_items,
        },
        "common": common,
        "orders": list(orders),
        "check": list(checked),
        "command": shlex.join(["python", "-m", "esapn", *sys.argv[1:]]),
        "info": info.collect(),
    }


def _walk_all(path: Path, tuned: Sequence[Listed], part: Part, processes: int) -> None:
    """The walks that are left, in processes of their own, under a bar."""
    from tqdm import tqdm

    of = {listed.method: listed for listed in tuned}
    layout = "{l_bar}{bar}| {n}/{total} walks [{elapsed}<{remaining}]{postfix}"
    with tqdm(bar_format=layout, initial=_made(tuned), total=_total(tuned)) as bar:

        def ended(walked: Walked) -> None:
            trials.append(path, walked)
            of[walked.method].add(walked)
            bar.total = _total(tuned)
            bar.set_postfix_str(f"{walked.method} {walked.trial}", refresh=False)
            bar.update(_made(tuned) - bar.n)

        with pool(processes) as executor:
            running: set[Future[Walked]] = set()
            while True:
                while len(running) < processes and (job := _next(tuned)) is not None:
                    running.add(executor.submit(walk, job, part))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    ended(future.result())


def _next(tuned: Sequence[Listed]) -> Job | None:
    """Of the method that is furthest from its end."""
    for listed in sorted(tuned, key=lambda listed: listed.begun / max(listed.total, 1)):
        if (job := listed.next()) is not None:
            return job
    return None


def _made(tuned: Sequence[Listed]) -> int:
    return sum(len(walks) for listed in tuned for walks in listed.walks.values())


def _total(tuned: Sequence[Listed]) -> int:
    return sum(listed.total for listed in tuned)


def _finish(out: Path, tuned: Sequence[Listed], header: Mapping[str, Any], *, default: str) -> None:
    """Choose, write and say what was chosen."""
    choices = [c for listed in tuned if (c := choose(listed, default)) is not None]
    lost = [listed.method for listed in tuned if listed.method not in {c.method for c in choices}]
    names = ("data", "common", "orders", "check", "command")
    content = {name: header[name] for name in names}
    content["methods"] = {choice.method: choice.to_json() for choice in choices}
    write_json(out / "settings.json", content)
    task, data = header["common"]["task"], header["data"]["name"]
    draw(out / "tuning.png", tuned, f"{data}, {task}: validation loss over the settings tried")
    print("\n".join(lines(choices)))
    for method in lost:
        print(f"{method}: no trial ended with a finite loss")
    print(f"wrote {out / 'settings.json'}, {out / 'trials.csv'} and {out / 'tuning.png'}")
