"""The longest step of a large table whose rows grow and shrink, over its median step.

    python bench/stalls.py [--rows 50000000] [--ids 65536] [--steps 200] [--out FILE.json]

On a CPU, sizes 2 to 128, all rows at size 2 at first, fp32, Zipf ids. A step is forward, backward
with Adagrad fused into it, Adam on the hops, promotion of the ids of the batch that have an even
number, demotion of an eighth of those promoted in the step before, and a step of compaction over
65,536 rows. Nothing warms up: the first promotion counts.

    growing     the arena grows when rows find no room: its memory is copied
    reserved    reserve() was called before for all rows that will move
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from harness.command import Parser, at_least, output, record, seed, write_result
from torch import Tensor

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.info import collect

SIZES = (2, 4, 8, 16, 64, 128)
COMPACTED = 1 << 16


def draw(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Ids whose rank has a density of 1 / rank; ranks are spread over the table."""
    rank = (rows ** torch.rand(count, dtype=torch.float64, generator=generator)).long()
    return rank * 2_654_435_761 % rows


def measure(rows: int, ids: int, steps: int, reserved: bool, seed: int) -> dict[str, Any]:
    """Milliseconds of every step, and what moved."""
    torch.manual_seed(seed)
    module = ResizableEmbedding(rows, sizes=SIZES)
    optimizer, hops = optim.Adagrad(module, lr=0.1), torch.optim.Adam([module.chain])
    gradient = torch.randn(ids, SIZES[-1]) / ids
    generator = torch.Generator().manual_seed(seed)
    batches = [draw(rows, ids, generator) for _ in range(steps)]
    if reserved:
        module.reserve(steps * ids)
    shrinks = torch.zeros(0, dtype=torch.int64)
    times, grown, moved = [], 0, 0
    for batch in batches:
        before = module.arena.storage.numel()
        begin = time.perf_counter()
        module(batch).backward(gradient)
        optimizer.step()
        hops.step()
        hops.zero_grad()
        up = module.promote(batch, batch % 2 == 0)
        down = module.demote(shrinks)
        module.compact(COMPACTED)
        times.append(1e3 * (time.perf_counter() - begin))
        moved += int(up.sum()) + int(down.sum())
        shrinks = batch[up][::8]
        grown += module.arena.storage.numel() > before
    return {"milliseconds": times, "grown": grown, "moved": moved}


def lines(cases: dict[str, dict[str, Any]]) -> list[str]:
    """The table."""
    text = [f"{'':<12}{'median ms':>10}{'first':>9}{'longest':>9}{'over median':>13}{'growths':>9}"]
    for name, case in cases.items():
        times = case["milliseconds"]
        middle, longest = statistics.median(times), max(times)
        text.append(
            f"{name:<12}{middle:>10.1f}{times[0]:>9.1f}{longest:>9.1f}{longest / middle:>13.1f}"
            f"{case['grown']:>9}"
        )
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/stalls.py", __doc__)
    add = parser.add_argument
    add("--rows", type=at_least(100), default=50_000_000, metavar="N", help="of the table")
    add("--ids", type=at_least(1), default=65_536, metavar="N", help="ids in a step")
    add("--steps", type=at_least(2), default=200, metavar="N", help="steps")
    add("--seed", type=seed, default=0, metavar="S", help="of rows and ids")
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    cases = {
        name: measure(args.rows, args.ids, args.steps, name == "reserved", args.seed)
        for name in ("growing", "reserved")
    }
    print(f"{args.rows:,} rows, {args.ids:,} ids a step, {args.steps} steps, fp32, CPU")
    print("\n".join(lines(cases)))
    if args.out is not None:
        settings = {"rows": args.rows, "ids": args.ids, "steps": args.steps, "seed": args.seed}
        result = record("stalls", **settings, provenance=collect(), cases=cases)
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
