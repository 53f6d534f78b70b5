"""What counting and moving cost in training: rows that grow within a budget, and rows that stay.

    python bench/growth.py [--events 200000] [--budget 50%] [--every 50] [--out FILE.json]

The model of examples/ctr.py, its eight fields, batches of 500 events, torch's Adam, on a CPU, one
thread. At the beginning of every piece of 100 steps another model takes its numbers and sizes, and
another optimizer the state; those rows stay. Both train on the same batches, a step of each in
alternating order.

    step      CPU milliseconds a step of the model whose rows move
    moving    of it, spent after the optimizer's step: ids are counted, and rows move
    share     of moving, of the step
    beside    the step over the other model's, piece by piece: also hooks that note ids, and what
              moves make slower elsewhere

Measured are the first million events and the last, or halves of a shorter stream. Ids are Zipf over
shuffled ids and clicks are coins: what is learnt plays no part.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness.command import Parser, at_least, output, record, seed, write_result
from torch import Tensor, nn

from esapn_kernels.grow import ByCounts
from esapn_kernels.info import collect

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from ctr import FIELDS, ClickModel  # noqa: E402

BATCH = 500
DIM = 16
PIECE = 100  # steps
MEASURED = 1_000_000  # events at the beginning, and as many at the end
GOAL = 1.1  # beside


class Timed(ByCounts):
    """Adds up the CPU time of counting and moving."""

    seconds = 0.0

    def step(self, names: Iterable[str] | None = None) -> None:
        begin = time.process_time()
        super().step(names)
        self.seconds += time.process_time() - begin


def batches(count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids ``[BATCH, fields]`` and clicks ``[BATCH]``."""
    shuffled = [torch.randperm(rows, generator=generator) for rows in FIELDS.values()]
    for _ in range(count):
        columns = []
        for ids in shuffled:
            draws = torch.rand(BATCH, generator=generator, dtype=torch.float64)
            ranks = ((len(ids) + 1) ** draws - 1).long().clamp(max=len(ids) - 1)
            columns.append(ids[ranks])
        yield torch.stack(columns, 1), (torch.rand(BATCH, generator=generator) < 0.3).float()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, clicks: Tensor) -> float:
    """One step; CPU seconds."""
    begin = time.process_time()
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(model(ids), clicks).backward()
    optimizer.step()
    return time.process_time() - begin


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = ClickModel("resizable", DIM, 1.0)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def measure(events: int, budget: str, every: int, seed: int) -> list[dict[str, Any]]:
    """A row for the first part of the stream and one for the last."""
    torch.manual_seed(seed)
    model, optimizer = build()
    growth = Timed(model, budget, every=every)
    steps = events // BATCH
    measured = min(MEASURED // BATCH, steps // 2)
    parts: dict[str, list[dict[str, float]]] = {"first": [], "last": []}
    (still, stepping), piece = build(), dict.fromkeys(("step", "still", "moving"), 0.0)
    stream = batches(steps, torch.Generator().manual_seed(seed))
    for step, (ids, clicks) in enumerate(stream):
        part = "first" if step < measured else "last"
        since = step if part == "first" else step - (steps - measured)
        if since < 0:
            train(model, optimizer, ids, clicks)
            continue
        if since % PIECE == 0:
            still, stepping = build()
            still.load_state_dict(model.state_dict())
            stepping.load_state_dict(optimizer.state_dict())
            piece = dict.fromkeys(piece, 0.0)
        growth.seconds = 0.0
        for moving in (True, False) if step % 2 else (False, True):
            trained = (model, optimizer) if moving else (still, stepping)
            piece["step" if moving else "still"] += train(*trained, ids, clicks)
        piece["moving"] += growth.seconds
        if since % PIECE == PIECE - 1:
            parts[part].append(piece)
    return [
        {"part": part, "events": measured * BATCH, **summary(pieces)}
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
    text[0] += "   p20 - p80"
    for row in rows:
        met = "met" if row["beside"] <= GOAL else "missed"
        text.append(
            f"{row['part']:<8}{row['events']:>10,}{row['step_ms']:>10.2f}{row['moving_ms']:>12.2f}"
            f"{row['share']:>8.1%}{row['beside']:>8.2f}   {row['p20']:.2f} - {row['p80']:.2f}   "
            f"at most {GOAL:g}: {met}"
        )
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/growth.py", __doc__)
    add = parser.add_argument
    least = 4 * PIECE * BATCH  # two pieces at the beginning, and two at the end
    add("--events", type=at_least(least), default=200_000, metavar="N", help="of the stream")
    add("--budget", default="50%", help="as of ByCounts: bytes, or a part of plain tables")
    add("--every", type=at_least(1), default=50, metavar="N", help="steps between moves")
    add("--seed", type=seed, default=0, metavar="S", help="of rows and ids")
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    try:
        ByCounts(ClickModel("resizable", DIM, 1.0), args.budget)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = measure(args.events, args.budget, args.every, args.seed)
    finally:
        torch.set_num_threads(threads)
    print(f"{args.events:,} events, budget {args.budget}, rows move every {args.every} steps")
    print("\n".join(lines(rows)))
    if args.out is not None:
        result = record(
            "growth",
            events=args.events,
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
