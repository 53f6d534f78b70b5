"""What counting and moving cost in training: rows that grow within a budget, and rows that stay.

    python bench/growth.py [--events 200000] [--budget 50%] [--every 50] [--out FILE.json]
    python bench/growth.py --search PATH [--budget 6.25%] [--every 20] [--out FILE.json]

The model of examples/ctr.py, its eight fields, batches of 500 events, torch's Adam; or, with
--search, the tuned search's recommender on the ratings of PATH, as `python -m esapn search --mode
tuned --method counts` trains it. On a CPU, one thread. At the beginning of every piece of 100 steps
another model takes its numbers and sizes, and another optimizer the state; those rows stay. Both
train on the same batches, a step of each in alternating order.

    step      CPU milliseconds a step of the model whose rows move
    moving    of it, spent after the optimizer's step: ids are counted, and rows move
    share     of moving, of the step
    beside    the step over the other model's, piece by piece: also hooks that note ids, and what
              moves make slower elsewhere
    memory    MiB of the process at the end of the part; 0 where there is no /proc

Measured are the first million events and the last, or halves of a shorter stream. Ids of the model
of examples/ctr.py are Zipf over shuffled ids and clicks are coins: what is learnt plays no part.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness.command import Parser, at_least, output, record, seed, write_result
from harness.process import memory
from torch import Tensor, nn

from esapn.config import SearchConfig
from esapn.data.load import load_ratings
from esapn.data.ratings import DataError
from esapn.data.stream import Stream
from esapn.run.loop import Run, check_budget, stream_of
from esapn_kernels.grow import ByCounts, Growth
from esapn_kernels.info import collect

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from ctr import FIELDS, ClickModel  # noqa: E402

BATCH = 500
DIM = 16
PIECE = 100  # steps
MEASURED = 1_000_000  # events at the beginning, and as many at the end
GOAL = 1.1  # beside


Batch = tuple[Tensor, Tensor]


def batches(count: int, generator: torch.Generator) -> Iterator[Batch]:
    """Ids ``[BATCH, fields]`` and clicks ``[BATCH]``."""
    shuffled = [torch.randperm(rows, generator=generator) for rows in FIELDS.values()]
    for _ in range(count):
        columns = []
        for ids in shuffled:
            draws = torch.rand(BATCH, generator=generator, dtype=torch.float64)
            ranks = ((len(ids) + 1) ** draws - 1).long().clamp(max=len(ids) - 1)
            columns.append(ids[ranks])
        yield torch.stack(columns, 1), (torch.rand(BATCH, generator=generator) < 0.3).float()


class Clicks:
    """The model of examples/ctr.py; with a budget its rows move."""

    growth: Growth | None = None

    def __init__(self, budget: str = "", every: int = 1) -> None:
        self.model = ClickModel("resizable", DIM, 1.0)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        if budget:
            self.growth = ByCounts(self.model, budget, every=every)

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        ids, clicks = batch
        self.optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(self.model(ids), clicks).backward()
        self.optimizer.step()

    def follow(self, other: Clicks) -> None:
        """Take numbers, sizes and state of the other."""
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(other.optimizer.state_dict())


class Search:
    """A run of the search by counts; its stream has the batches."""

    def __init__(self, config: SearchConfig, stream: Stream, moves: bool) -> None:
        self.run = Run(config, stream)
        self.growth = self.run.growth
        if self.growth is not None and not moves:
            self.growth.remove()

    def step(self, batch: Batch | None) -> None:
        """Walk to the next batch."""
        self.run.step()

    def follow(self, other: Search) -> None:
        """Take everything that the other's future depends on."""
        self.run.load_state_dict(other.run.state_dict())


class Moving:
    """Adds up the CPU time of counting and moving."""

    def __init__(self, growth: Growth) -> None:
        self.seconds, self._step = 0.0, growth.step
        growth.step = self.step  # type: ignore[method-assign]

    def step(self, names: Iterable[str] | None = None) -> None:
        """See ``Growth.step``."""
        begin = time.process_time()
        self._step(names)
        self.seconds += time.process_time() - begin


def measure(
    build: Callable[[bool], Any], stream: Iterable[Batch | None], steps: int, measured: int
) -> list[dict[str, Any]]:
    """A row for the first ``measured`` of all steps, and one for the last.

    Args:
        build: makes what trains; its rows move, or stay.
        stream: the batches, so many as there are steps.
    """
    moving = build(True)
    trained = {"step": moving}
    spent = Moving(moving.growth)
    parts: dict[str, list[dict[str, float]]] = {"first": [], "last": []}
    resident: dict[str, int] = {}
    piece = dict.fromkeys(("step", "still", "moving"), 0.0)
    for step, batch in enumerate(stream):
        part = "first" if step < measured else "last"
        since = step if part == "first" else step - (steps - measured)
        if since < 0:
            moving.step(batch)
            continue
        if since % PIECE == 0:
            trained["still"] = build(False)
            trained["still"].follow(moving)
            piece = dict.fromkeys(piece, 0.0)
        spent.seconds = 0.0
        for name in ("step", "still") if step % 2 else ("still", "step"):
            begin = time.process_time()
            trained[name].step(batch)
            piece[name] += time.process_time() - begin
        piece["moving"] += spent.seconds
        if since % PIECE == PIECE - 1:
            parts[part].append(piece)
            resident[part] = memory().get("rss_mib", 0)
    return [
        {"part": part, "events": measured * BATCH, "memory_mib": resident[part], **summary(pieces)}
        for part, pieces in parts.items()
    ]


def summary(pieces: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means a step, the share of moving, and the ratio piece by piece."""
    ratios = [piece["step"] / piece["still"] for piece in pieces]
    sums = {name: sum(piece[name] for piece in pieces) for name in ("step", "moving")}
    return {
        "step_ms": 1e3 * sums["step"] / (PIECE * len(pieces)),
        "moving_ms": 1e3 * sums["moving"] / (PIECE * len(pieces)),
        "share": sums["moving"] / sums["step"],
        "beside": statistics.median(ratios),
        "p20": statistics.quantiles(ratios, n=5)[0],
        "p80": statistics.quantiles(ratios, n=5)[3],
    }


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table, and whether the goal is met."""
    text = [f"{'':<8}{'events':>10}{'step, ms':>10}{'moving, ms':>12}{'share':>8}{'beside':>8}"]
    text[0] += f"   {'p20 - p80':<12}{'memory, MiB':>11}"
    for row in rows:
        met = "met" if row["beside"] <= GOAL else "missed"
        text.append(
            f"{row['part']:<8}{row['events']:>10,}{row['step_ms']:>10.2f}{row['moving_ms']:>12.2f}"
            f"{row['share']:>8.1%}{row['beside']:>8.2f}   {row['p20']:.2f} - {row['p80']:.2f} "
            f"{row['memory_mib']:>11,}   at most {GOAL:g}: {met}"
        )
    return text


def parser() -> Parser:
    """The command line."""
    parser = Parser("bench/growth.py", __doc__)
    add = parser.add_argument
    least = 4 * PIECE * BATCH  # two pieces at the beginning, and two at the end
    add("--events", type=at_least(least), default=200_000, metavar="N", help="of the stream")
    add("--search", metavar="PATH", help="ratings, as --data of the search, in place of clicks")
    add("--budget", default="50%", help="bytes, or a part of the plain tables")
    add("--every", type=at_least(1), default=50, metavar="N", help="steps between moves")
    add("--seed", type=seed, default=0, metavar="S", help="of rows and ids")
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    return parser


def of_clicks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of examples/ctr.py's model.

    Raises:
        ValueError: the budget does not hold its rows.
    """
    torch.manual_seed(args.seed)
    Clicks(args.budget)
    steps = args.events // BATCH
    return measure(
        lambda moves: Clicks(args.budget if moves else "", args.every),
        batches(steps, torch.Generator().manual_seed(args.seed)),
        steps,
        min(MEASURED // BATCH, steps // 2),
    )


def of_search(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the search's recommender.

    Raises:
        DataError: ratings that cannot be read, or too few.
        ValueError: a setting that cannot be used.
    """
    more = {"method": "counts", "budget": args.budget, "move_every": args.every}
    config = SearchConfig.of_mode("tuned", data=args.search, seed=args.seed, **more)
    stream = stream_of(config, load_ratings(args.search))
    check_budget(config, stream)
    steps = len(stream.user) // BATCH
    half = min(MEASURED // BATCH, steps // 2) // PIECE * PIECE
    if half < 2 * PIECE:
        raise ValueError(f"{args.search}: {4 * PIECE * BATCH:,} events are the least")
    return measure(lambda moves: Search(config, stream, moves), [None] * (2 * half), 2 * half, half)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    command = parser()
    args = command.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = of_clicks(args) if args.search is None else of_search(args)
    except (DataError, ValueError) as error:
        command.error(str(error))
    finally:
        torch.set_num_threads(threads)
    trained = f"{args.events:,} events" if args.search is None else Path(args.search).name
    print(f"{trained}, budget {args.budget}, rows move every {args.every} steps")
    print("\n".join(lines(rows)))
    if args.out is not None:
        about = {"events": args.events} if args.search is None else {"search": trained}
        result = record(
            "growth",
            **about,
            budget=args.budget,
            every=args.every,
            seed=args.seed,
            provenance=collect(),
            rows=rows,
        )
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
