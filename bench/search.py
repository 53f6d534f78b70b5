"""The search step on ragged rows against an all-sizes implementation of the same step.

    python bench/search.py [--data PATH] [--task binary|multiclass] [--seed S] [--out FILE]
    python bench/search.py --long 20000000 [--mode paper|tuned] [--dwell C] [--out FILE]

Both walk the whole stream in one process and one thread, in turns of ``--turn`` batches, on the
same events, with the same settings, policy network, optimizer (Adam, fused) and initialisation.

The baseline is the usual way to write this search, in the published alternation: a full table for
every candidate size; every size looked up and carried to the largest for every row, BatchNorm and
tanh of all of them, a one-hot sum that selects; a prediction under sampled sizes for the policies,
who see every event, and a second one for the recommender; dense Adam on all tables.
``--baseline lean`` grants it what ours does beyond storage: one prediction for both steps, and
selection before BatchNorm and tanh. The figure is the ratio of CPU seconds, turn by turn.

``--long EVENTS`` has no baseline: one whole search on a synthetic stream of so many events. The
figures are the time per event of the last million over that of the first (medians over the log's
windows, the first few left out), and the memory of the process when training begins and at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esapn.config import MODES, ConfigError, SearchConfig
from esapn.data.load import load_ratings
from esapn.data.ratings import DataError
from esapn.data.stream import NUM_CLASSES, Batch, Stream, build_stream
from esapn.models.two_tower import event_losses
from esapn.policy import LossHistory, Policy, policy_loss, reward, sample_actions
from esapn.run.loop import Run
from esapn.run.metrics import Prequential
from esapn_kernels import info


class AllSizesSide(nn.Module):
    """A full table per size, the hops between them, and the size index of every ID."""

    level: Tensor

    def __init__(self, n: int, config: SearchConfig, lean: bool) -> None:
        super().__init__()
        sizes = config.sizes
        self.tables = nn.ModuleList(nn.Embedding(n, d) for d in sizes)
        self.hops = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norm = nn.BatchNorm1d(sizes[-1])
        self.register_buffer("level", torch.zeros(n, dtype=torch.int64))
        self.lean = lean
        for parameter in self.tables.parameters():
            nn.init.normal_(parameter, 0.0, config.init_std)

    def forward(self, ids: Tensor, level: Tensor) -> Tensor:
        chosen = nn.functional.one_hot(level, len(self.tables)).float()
        total = torch.zeros(())
        for k, table in enumerate(self.tables):
            h = table(ids)
            for hop in self.hops[k:]:
                h = hop(h)
            h = h if self.lean else torch.tanh(self.norm(h))
            total = total + chosen[:, k : k + 1] * h
        return torch.tanh(self.norm(total)) if self.lean else total

    @torch.no_grad()
    def write_promoted(self, ids: Tensor) -> None:
        """Write the next size's row of ``ids``; their levels stay."""
        level = self.level[ids]
        for k, hop in enumerate(self.hops):
            mine = ids[level == k]
            self.tables[k + 1].get_parameter("weight")[mine] = hop(self.tables[k](mine))


class AllSizesModel(nn.Module):
    """The two-tower recommender of ``esapn.models.two_tower`` on all-sizes sides."""

    def __init__(self, stream: Stream, config: SearchConfig, lean: bool) -> None:
        super().__init__()
        self.user = AllSizesSide(stream.n_users, config, lean)
        self.item = AllSizesSide(stream.n_items, config, lean)
        dim = config.sizes[-1]
        self.inference = nn.Sequential(
            nn.BatchNorm1d(2 * dim),
            nn.Linear(2 * dim, config.hidden),
            nn.BatchNorm1d(config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, 1 if config.task == "binary" else NUM_CLASSES),
        )

    def forward(self, batch: Batch, levels: Sequence[Tensor]) -> Tensor:
        towers = [self.user(batch.user, levels[0]), self.item(batch.item, levels[1])]
        logits: Tensor = self.inference(torch.cat(towers, dim=1))
        return logits


class AllSizesSearch:
    """The algorithm of ``esapn.search``, every size computed for every row."""

    def __init__(self, config: SearchConfig, stream: Stream, lean: bool) -> None:
        torch.manual_seed(config.seed)
        self.stream = stream
        self.lean = lean
        self.n_levels = len(config.sizes)
        self.model = AllSizesModel(stream, config, lean)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.measures = Prequential(stream.n_train, len(stream.user))
        self.index = 0
        self.sides = []
        for name, n in (("user", stream.n_users), ("item", stream.n_items)):
            policy = Policy(self.n_levels, max_frequency=config.max_frequency)
            optimizer = torch.optim.Adam(policy.parameters(), lr=config.policy_lr, fused=True)
            history = LossHistory(n, config.history)
            self.sides.append((name, getattr(self.model, name), policy, optimizer, history))

    def step(self) -> None:
        batch = self.stream.batch(self.index)
        self.index += 1
        if not self.lean:
            choices = self._choose(batch)
            with torch.no_grad():
                levels = [level + grow.long() for _, _, grow, _, level in choices]
                loss = event_losses(self.model(batch, levels), batch.target)
            self._update_policies(batch, choices, loss)
        choices = self._choose(batch)
        levels = []
        for (name, side, *_), (_, _, grow, _, _) in zip(self.sides, choices, strict=True):
            ids = getattr(batch, name)
            side.level[ids[grow]] += 1
            levels.append(side.level[ids])
        logits = self.model(batch, levels)
        loss = event_losses(logits, batch.target)
        frequency = torch.stack([batch.user_freq, batch.item_freq])
        self.measures.record(logits.detach(), batch.target, loss.detach(), frequency)
        if self.lean:
            self._update_policies(batch, choices, loss.detach())
        for name, _, _, _, history in self.sides:
            ids, keep = getattr(batch, name), getattr(batch, f"{name}_keep")
            history.record(ids, getattr(batch, f"{name}_freq"), loss.detach(), keep)
        loss.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _choose(self, batch: Batch) -> list[tuple[Tensor, ...]]:
        """Per side: logits, actions, who grows, who decides, levels; writes the promoted rows."""
        choices: list[tuple[Tensor, ...]] = []
        for name, side, policy, _, _ in self.sides:
            ids, last = getattr(batch, name), getattr(batch, f"{name}_last")
            level = side.level[ids]
            decides = last & (level < self.n_levels - 1)
            logits = policy(getattr(batch, f"{name}_freq"), level)
            action = sample_actions(logits.detach(), torch.rand(len(ids)))
            grow = decides & action.bool()
            side.write_promoted(ids[grow])
            choices.append((logits, action, grow, decides, level))
        return choices

    def _update_policies(
        self, batch: Batch, choices: Sequence[tuple[Tensor, ...]], loss: Tensor
    ) -> None:
        for (name, _, _, optimizer, history), (logits, action, _, decides, _) in zip(
            self.sides, choices, strict=True
        ):
            baseline, seen = history.mean(getattr(batch, name))
            optimizer.zero_grad()
            policy_loss(logits, action, reward(baseline, loss, seen), decides).backward()
            optimizer.step()


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


def memory() -> dict[str, int]:
    """MiB of the process: the most it ever took, and what it takes now (where ``/proc`` says)."""
    import resource  # not on Windows, where the comparison runs all the same

    unit = 2**20 if sys.platform == "darwin" else 2**10
    found = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return found
    return {**found, "rss_mib": pages * resource.getpagesize() // 2**20}


def walk_long(config: SearchConfig, stream: Stream) -> dict[str, Any]:
    """Walk the stream once, as ``python -m esapn search`` does; time of every window of the log."""
    run = Run(config, stream)
    start = memory()
    clocks = [(0, time.process_time(), time.perf_counter())]

    def progress(done: int, line: dict[str, Any]) -> None:
        clocks.append((line["events"], time.process_time(), time.perf_counter()))

    result = run.walk(progress)
    windows = [
        {"events": b[0] - a[0], "us_cpu": (b[1] - a[1]) * 1e6, "us": (b[2] - a[2]) * 1e6}
        for a, b in zip(clocks, clocks[1:], strict=False)
    ]
    part = min(1_000_000, len(stream.user) // 4)
    n = max(part // (config.log_every * config.batch_size), 1)
    warm_up = min(max(n // 10, 1), len(windows) - 1)
    # The last window may be a few batches only.
    parts = {"first": windows[warm_up : warm_up + n], "last": windows[-n - 1 : -1] or windows[-1:]}
    us = {
        name: {
            key: statistics.median(w[key] / w["events"] for w in part) for key in ("us", "us_cpu")
        }
        for name, part in parts.items()
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/search.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", default="synthetic", help="as for python -m esapn search")
    parser.add_argument("--events", type=int, default=50_000, help="of the synthetic stream")
    parser.add_argument("--task", choices=("binary", "multiclass"), default="binary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turn", type=int, default=20, help="batches per turn")
    parser.add_argument("--baseline", choices=("full", "lean"), default="full")
    parser.add_argument("--long", type=int, metavar="EVENTS", help="one search, so many events")
    parser.add_argument("--mode", choices=tuple(MODES), default="paper", help="with --long")
    parser.add_argument("--dwell", type=float, default=0.0, help="with --long")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if args.turn < 1:
            raise ConfigError(f"--turn must be at least 1, got {args.turn}")
        if args.long is not None and args.data != "synthetic":
            raise ConfigError(f"--long walks the synthetic stream, not {args.data}")
        events = args.events if args.long is None else args.long
        if args.long is None and (args.mode != "paper" or args.dwell):
            raise ConfigError("--mode and --dwell go with --long")
        config = SearchConfig.of_mode(
            args.mode,
            data=args.data,
            task=args.task,
            seed=args.seed,
            events=events,
            dwell=args.dwell,
        )
        ratings = load_ratings(args.data, events=events, seed=args.seed)
        stream = build_stream(ratings, task=args.task, seed=args.seed)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.touch()
    except (DataError, ValueError, OSError) as error:
        print(f"bench/search.py: error: {error}", file=sys.stderr)
        return 2
    about = {
        "config": config.to_json() | {"data": ratings.name},
        "sha256": ratings.checksum,
        "info": info.collect(),
    }
    # The stream has the events: training does not hold them twice.
    del ratings
    if args.long is None:
        result = compare(config, stream, args.baseline == "lean", args.turn)
        result |= {"baseline": args.baseline, **about}
        print_comparison(result, args.turn)
    else:
        result = walk_long(config, stream) | about
        print_long(result)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
