"""The search step on ragged rows against an all-sizes implementation of the same step.

    python bench/search.py [--data PATH] [--task binary|multiclass] [--seed S] [--out FILE]
    python bench/search.py --long 20000000 [--mode paper|tuned] [--dwell C] [--out FILE]

Both walk the whole stream in one process and one thread, in turns of --turn batches, on the same
events, with the same settings, policy network, optimizer (Adam, fused) and initialisation.

The baseline is the search as it is usually written: a full table for every candidate size, every
size looked up and carried to the largest for every row, and a second prediction for the policies
(harness/all_sizes.py). --baseline lean grants it what ours does beyond storage: one prediction for
both steps, selection before BatchNorm and tanh, and the faster tanh. The figure is the ratio of CPU
seconds, turn by turn.

--long EVENTS has no baseline: one whole search on a synthetic stream of so many events. The figures
are the time per event of the last million over that of the first (medians over the log's windows,
the first few left out), and the memory of the process when training begins and at the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.all_sizes import AllSizesSearch
from harness.command import Parser, at_least, check_writable, seed, write_result
from harness.process import memory

from esapn.config import MODES, SearchConfig
from esapn.data.load import load_ratings
from esapn.data.ratings import DataError
from esapn.data.stream import Stream, build_stream
from esapn.run.loop import Run
from esapn_kernels import info


def compare(config: SearchConfig, stream: Stream, lean: bool, turn: int) -> dict[str, Any]:
    """Walk the stream with both, in turns; CPU seconds of every turn, and both qualities."""
    runs: dict[str, Any] = {
        "ragged": Run(config, stream),
        "all-sizes": AllSizesSearch(config, stream, lean),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    steps = len(stream.bounds)
    for begin in range(0, steps, turn):
        order = list(runs) if begin // turn % 2 else list(reversed(runs))
        for name in order:
            start = time.process_time()
            for _ in range(begin, min(begin + turn, steps)):
                runs[name].step()
            seconds[name].append(time.process_time() - start)
    labels = stream.labels(stream.n_train, len(stream.user))
    quality = {n: r.measures.summary("test", labels) for n, r in runs.items()}
    ratios = sorted(a / r for a, r in zip(seconds["all-sizes"], seconds["ragged"], strict=True))
    return {
        "steps": steps,
        "cpu_seconds": {name: sum(s) for name, s in seconds.items()},
        "ms_per_step": {
            name: 1e3 * statistics.median(s[:-1] or s) / turn for name, s in seconds.items()
        },
        "ratio": sum(seconds["all-sizes"]) / sum(seconds["ragged"]),
        "ratio_median": statistics.median(ratios),
        "ratio_p20_p80": [ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]],
        "quality": quality,
    }


def walk_long(config: SearchConfig, stream: Stream) -> dict[str, Any]:
    """Walk the stream once, as ``python -m esapn search`` does; time of every window of the log."""
    run = Run(config, stream)
    start = memory()
    marks = [(0, time.process_time(), time.perf_counter())]

    def progress(done: int, line: dict[str, Any]) -> None:
        marks.append((line["events"], time.process_time(), time.perf_counter()))

    result = run.walk(progress)
    windows = [
        {"events": b[0] - a[0], "us_cpu": (b[1] - a[1]) * 1e6, "us": (b[2] - a[2]) * 1e6}
        for a, b in zip(marks, marks[1:], strict=False)
    ]
    part = min(1_000_000, len(stream.user) // 4)
    n = max(part // (config.log_every * config.batch_size), 1)
    warm_up = min(max(n // 10, 1), len(windows) - 1)
    # The last window may be a few batches only.
    parts = {"first": windows[warm_up : warm_up + n], "last": windows[-n - 1 : -1] or windows[-1:]}
    us = {
        name: {
            key: statistics.median(w[key] / w["events"] for w in some) for key in ("us", "us_cpu")
        }
        for name, some in parts.items()
    }
    return {
        "events": len(stream.user),
        "part": part,
        "events_per_second": len(stream.user) / result.wall_seconds,
        "cpu_seconds": result.cpu_seconds,
        "wall_seconds": result.wall_seconds,
        "us_per_event": us,
        "ratio": us["last"]["us"] / us["first"]["us"],
        "ratio_cpu": us["last"]["us_cpu"] / us["first"]["us_cpu"],
        "memory": {"start": start, "end": memory()},
        "bytes": result.bytes,
        "quality": result.test,
    }


def print_comparison(result: dict[str, Any], turn: int) -> None:
    for name in ("all-sizes", "ragged"):
        quality, cpu = result["quality"][name], result["cpu_seconds"][name]
        print(
            f"{name:<10} {cpu:8.1f} CPU s   {result['ms_per_step'][name]:6.2f} ms/step   "
            f"accuracy {quality['accuracy']:.4f}   loss {quality['loss']:.4f}"
        )
    low, high = result["ratio_p20_p80"]
    print(
        f"all-sizes / ragged: {result['ratio']:.2f} in total, median {result['ratio_median']:.2f} "
        f"[{low:.2f}, {high:.2f}] over turns of {turn} batches\n"
        f"{result['config']['data']}, {result['config']['task']}, {result['steps']} steps, "
        f"{result['baseline']} baseline, 1 thread"
    )


def print_long(result: dict[str, Any]) -> None:
    for name, us in result["us_per_event"].items():
        print(
            f"{name:<5} {result['part']} events: {us['us']:.2f} us an event, "
            f"{us['us_cpu']:.2f} CPU us"
        )
    start, end = result["memory"]["start"], result["memory"]["end"]
    print(
        f"last / first: {result['ratio']:.3f}, {result['ratio_cpu']:.3f} of CPU time\n"
        f"peak RSS {start['peak_rss_mib']} MiB when training began, "
        f"{end['peak_rss_mib']} at the end"
    )
    if "rss_mib" in start:
        print(f"RSS {start['rss_mib']} MiB when training began, {end['rss_mib']} at the end")
    quality = result["quality"]
    print(
        f"{result['events_per_second']:.0f} events/s   accuracy {quality['accuracy']:.4f}   "
        f"loss {quality['loss']:.4f}\n"
        f"synthetic, {result['config']['task']}, {result['events']} events, 1 thread"
    )


def parser() -> Parser:
    """The command line, its flags in groups."""
    parser = Parser("bench/search.py", __doc__)
    tasks = ("binary", "multiclass")
    both = parser.add_argument_group("both")
    both.add_argument("--task", choices=tasks, default="binary", help="what is predicted")
    both.add_argument("--seed", type=seed, default=0, metavar="S", help="of all random numbers")
    both.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    turns = parser.add_argument_group("against the baseline")
    add = turns.add_argument
    add("--data", default="synthetic", metavar="PATH", help="as for python -m esapn search")
    add("--events", type=int, default=50_000, metavar="N", help="of the synthetic stream")
    add("--turn", type=at_least(1), default=20, metavar="N", help="batches per turn")
    add("--baseline", choices=("full", "lean"), default="full", help="what it computes")
    long = parser.add_argument_group("one long search")
    add = long.add_argument
    add("--long", type=at_least(1), metavar="EVENTS", help="so many of the synthetic stream")
    add("--mode", choices=tuple(MODES), default="paper", help="as for python -m esapn search")
    add("--dwell", type=float, default=0.0, metavar="C", help="as for python -m esapn search")
    return parser


def prepare(args: argparse.Namespace) -> tuple[SearchConfig, Stream, dict[str, Any]]:
    """The settings, the stream, and what the result says of them.

    Raises:
        ValueError: flags that exclude each other, or a setting that cannot be used.
        DataError: events that cannot be read, or too few.
        OSError: ``--out`` cannot be written.
    """
    if args.long is None and (args.mode != "paper" or args.dwell):
        raise ValueError("--mode and --dwell go with --long")
    if args.long is not None and args.data != "synthetic":
        raise ValueError(f"--long walks the synthetic stream, not {args.data}")
    events = args.long or args.events
    config = SearchConfig.of_mode(
        args.mode,
        data=args.data,
        task=args.task,
        seed=args.seed,
        events=events,
        dwell=args.dwell,
    )
    five_classes = args.task == "multiclass"
    ratings = load_ratings(args.data, events=events, seed=args.seed, five_classes=five_classes)
    stream = build_stream(ratings, task=args.task, seed=args.seed)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(args.out)
    about = {
        "config": config.to_json() | {"data": ratings.name},
        "sha256": ratings.checksum,
        "info": info.collect(),
    }
    return config, stream, about


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    command = parser()
    args = command.parse_args(argv)
    torch.set_num_threads(1)
    try:
        # The stream has the events: training does not hold the ratings beside them.
        config, stream, about = prepare(args)
    except (DataError, ValueError, OSError) as error:
        command.error(str(error))
    if args.long is None:
        result = compare(config, stream, args.baseline == "lean", args.turn)
        result |= {"baseline": args.baseline, **about}
        print_comparison(result, args.turn)
    else:
        result = walk_long(config, stream) | about
        print_long(result)
    if args.out is not None:
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
