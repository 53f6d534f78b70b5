"""Rows that come and go a million times: what is allocated, and what a move costs.

    python bench/churn.py [--rows 50000] [--moves 1000000] [--ids 500] [--out FILE.json]

On a CPU, one thread, sizes 2 to 128, padded hops, fp32.

    level    random rows go up, and as many of the sizes above go down: every size keeps its rows
    tide     a random half of the table goes up a size, a call at a time, then a random half down,
             and so on: pages empty and fill; the second line takes a step of compaction after
             every call, over as many rows as the call moved

For each tenth of the moves: microseconds a move (the median of its calls); and at its end the bytes
of the rows, those of the pages that hold them, and those allocated. Choosing the rows is not timed,
a step of compaction is. Printed are the first tenth and the last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from harness.command import Parser, at_least, output, record, seed, write_result
from torch import Tensor

from esapn_kernels import ResizableEmbedding
from esapn_kernels.info import collect

SIZES = (2, 4, 8, 16, 64, 128)
TENTHS = 10
Call = Callable[[], int]
Move = Callable[[Tensor], Tensor]


def table(rows: int, generator: torch.Generator) -> ResizableEmbedding:
    """As many rows of every size, in random order."""
    sizes = torch.tensor(SIZES)[torch.randint(len(SIZES), (rows,), generator=generator)]
    return ResizableEmbedding(rows, sizes=SIZES, initial_size=sizes, init="padded")


def some(ids: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return ids[torch.randperm(len(ids), generator=generator)[:count]]


def level_calls(module: ResizableEmbedding, ids: int, generator: torch.Generator) -> Iterator[Call]:
    """Calls that leave the number of rows of every size as it is."""
    last = len(SIZES) - 1
    while True:
        level = module.arena.level()
        up = some((level < last).nonzero()[:, 0], ids, generator)
        leaving, stays = level[up], torch.ones_like(level, dtype=torch.bool)
        stays[up] = False
        down = torch.cat(
            [
                some(
                    ((level == k + 1) & stays).nonzero()[:, 0],
                    int((leaving == k).sum()),
                    generator,
                )
                for k in range(last)
            ]
        )

        def call(up: Tensor = up, down: Tensor = down) -> int:
            return int(module.promote(up).sum()) + int(module.demote(down).sum())

        yield call


def tide_calls(module: ResizableEmbedding, ids: int, generator: torch.Generator) -> Iterator[Call]:
    """Half of the rows go up, then half of them down, and so on."""
    rows = torch.arange(module.num_embeddings)
    while True:
        for move in (module.promote, module.demote):
            for batch in some(rows, len(rows) // 2, generator).split(ids):

                def call(move: Move = move, batch: Tensor = batch) -> int:
                    return int(move(batch).sum())

                yield call


def measure(
    module: ResizableEmbedding, calls: Iterator[Call], moves: int, compacts: int
) -> list[dict[str, Any]]:
    """A row for each tenth of the moves; ``compacts``: rows that a step of compaction looks at."""
    lines: list[dict[str, Any]] = []
    done, times = 0, []
    while len(lines) < TENTHS:
        call = next(calls)
        begin = time.perf_counter()
        moved = call()
        if compacts:
            module.compact(compacts)
        elapsed = time.perf_counter() - begin
        done += moved
        if moved:
            times.append(1e6 * elapsed / moved)
        if done >= (len(lines) + 1) * moves / TENTHS:
            report, layout = module.memory_report(), module.arena.layout
            page = layout.page * module.arena.storage.element_size()
            lines.append(
                {
                    "moves": done,
                    "microseconds": statistics.median(times),
                    "payload": report.payload,
                    "pages": page * int((layout.page_level >= 0).sum()),
                    "allocated": report.payload + report.slack,
                }
            )
            times = []
    return lines


CASES = {
    "level": (level_calls, False),
    "tide": (tide_calls, False),
    "tide, compacted": (tide_calls, True),
}


def lines(cases: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table: of every case the first tenth of the moves and the last."""
    columns = f"{'us a move':>11}{'MB of rows':>12}{'of pages':>10}{'allocated':>11}"
    text = [f"{'':<18}{'moves':>11}{columns}"]
    for name, rows in cases.items():
        for row in (rows[0], rows[-1]):
            text.append(
                f"{name:<18}{row['moves']:>11,}{row['microseconds']:>11.2f}"
                f"{row['payload'] / 1e6:>12.2f}{row['pages'] / 1e6:>10.2f}"
                f"{row['allocated'] / 1e6:>11.2f}"
            )
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/churn.py", __doc__)
    add = parser.add_argument
    add("--rows", type=at_least(100), default=50_000, metavar="N", help="of the table")
    add("--moves", type=at_least(10), default=1_000_000, metavar="N", help="rows moved in a case")
    add("--ids", type=at_least(1), default=500, metavar="N", help="ids in a call")
    add("--seed", type=seed, default=0, metavar="S", help="of sizes, rows and ids")
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = {}
    try:
        for name, (calls, compacts) in CASES.items():
            generator = torch.Generator().manual_seed(args.seed)
            torch.manual_seed(args.seed)
            module = table(args.rows, generator)
            steps = calls(module, args.ids, generator)
            cases[name] = measure(module, steps, args.moves, args.ids if compacts else 0)
    finally:
        torch.set_num_threads(threads)
    print(f"{args.rows:,} rows of sizes 2 to 128, {args.ids} ids a call, fp32, CPU, one thread")
    print("\n".join(lines(cases)))
    if args.out is not None:
        settings = {"rows": args.rows, "moves": args.moves, "ids": args.ids, "seed": args.seed}
        write_result(args.out, record("churn", **settings, provenance=collect(), cases=cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
