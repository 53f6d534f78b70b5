"""What a call of the module costs beside nn.Embedding, where the call is the cost: 64 ids.

    python bench/overhead.py [--ids 64] [--turns 40] [--out FILE]

Module against module, on a CPU, eager, one thread. Every turn times a run of calls of each, in
alternating order; ratios are taken turn by turn. In most modes the composed hops of the last call
are used again, as in evaluation, or when a table is looked up several times between two steps;
"hops changed": the hops are written before every call, as after every step of training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness.command import Parser, at_least, output, record, seed, write_result
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding
from esapn_kernels.info import collect

ROWS, DIM = 1000, 128
SIZES = (2, 4, 8, 16, 64, 128)
CALLS = 200  # of each in a turn
GOALS = {
    ("forward", "one size"): 1.5,
    ("forward", "six sizes"): 2.2,
    ("forward, hops changed", "six sizes"): 4.0,
    ("forward and backward", "six sizes"): 2.0,
}


def modules(seed: int) -> dict[str, nn.Module]:
    """A table of one size, ours of that size, and ours with as many rows of every size."""
    torch.manual_seed(seed)
    sizes = torch.tensor(SIZES)[torch.randperm(ROWS) % len(SIZES)]
    return {
        "nn.Embedding": nn.Embedding(ROWS, DIM),
        "one size": ResizableEmbedding(ROWS, DIM, sizes=(DIM,)),
        "six sizes": ResizableEmbedding(ROWS, sizes=SIZES, initial_size=sizes),
    }


def forward(module: nn.Module, ids: Tensor) -> None:
    module(ids)


def forward_changed(module: nn.Module, ids: Tensor) -> None:
    if isinstance(module, ResizableEmbedding) and module.chain is not None:
        module.chain.data.mul_(1.0000001)
    module(ids)


def both(module: nn.Module, ids: Tensor) -> None:
    module.zero_grad()
    module(ids).sum().backward()


MODES: dict[str, tuple[bool, Callable[[nn.Module, Tensor], None]]] = {
    "forward": (True, forward),
    "forward, no_grad": (False, forward),
    "forward, hops changed": (True, forward_changed),
    "forward and backward": (True, both),
}


def measure(ids: Tensor, turns: int, seed: int) -> list[dict[str, Any]]:
    """Microseconds a call, and the ratio to ``nn.Embedding`` turn by turn."""
    tables = modules(seed)
    rows = []
    for mode, (grad, call) in MODES.items():
        samples: dict[str, list[float]] = {name: [] for name in tables}
        with torch.set_grad_enabled(grad):
            for turn in range(-2, turns):  # two to warm up
                for name in list(tables)[:: 1 if turn % 2 else -1]:
                    begin = time.perf_counter()
                    for _ in range(CALLS):
                        call(tables[name], ids)
                    if turn >= 0:
                        samples[name].append(1e6 * (time.perf_counter() - begin) / CALLS)
        for name, times in samples.items():
            ratios = [t / base for t, base in zip(times, samples["nn.Embedding"], strict=True)]
            rows.append(
                {
                    "mode": mode,
                    "module": name,
                    "microseconds": statistics.median(times),
                    "ratio": statistics.median(ratios),
                    "p20": statistics.quantiles(ratios, n=5)[0],
                    "p80": statistics.quantiles(ratios, n=5)[3],
                    "goal": GOALS.get((mode, name)),
                }
            )
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table; the goals beside the rows that have one."""
    text = [f"{'':<24}{'':<14}{'us a call':>10}{'ratio':>8}   p20 - p80"]
    for row in rows:
        spread = f"{row['p20']:.2f} - {row['p80']:.2f}"
        goal = ""
        if row["goal"] is not None:
            met = "met" if row["ratio"] <= row["goal"] else "missed"
            goal = f"at most {row['goal']:g}: {met}"
        text.append(
            f"{row['mode']:<24}{row['module']:<14}{row['microseconds']:>10.1f}"
            f"{row['ratio']:>8.2f}   {spread:<14}{goal}".rstrip()
        )
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/overhead.py", __doc__)
    add = parser.add_argument
    add("--ids", type=at_least(1), default=64, metavar="N", help="ids in a call")
    add("--turns", type=at_least(2), default=40, metavar="N", help="turns of every mode")
    add("--seed", type=seed, default=0, metavar="S", help="of rows and ids")
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(ROWS, (args.ids,), generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = measure(ids, args.turns, args.seed)
    finally:
        torch.set_num_threads(threads)
    print(f"{args.ids} ids of {ROWS} rows, {DIM} wide, fp32, CPU, one thread")
    print("\n".join(lines(rows)))
    if args.out is not None:
        result = record(
            "overhead",
            ids=args.ids,
            turns=args.turns,
            calls=CALLS,
            seed=args.seed,
            provenance=collect(),
            rows=rows,
        )
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
