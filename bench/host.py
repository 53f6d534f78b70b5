"""What a call costs the host on the Triton path, where the GPU waits for it: 500 ids.

    python bench/host.py [--ids 500] [--turns 40] [--out FILE]

Needs no GPU and times none. Kernels are compiled for sm_90 in this process; the driver under Triton
loads nothing and launches nothing (bench/harness/no_device.py), so what the real one adds to a
launch is missing. Tensors live on the CPU, and torch's own operators (allocation, zeros, the sort,
the check of ids) run there: on a GPU they take about as long to be launched as these take to run
where they are small, and less where they fill a dense gradient. nn.Embedding stands beside it with
the same calls on the same CPU; a fused optimizer's step with its forward and backward alone.

Every turn times a run of calls of each, in alternating order; ratios are taken turn by turn.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from harness.command import Parser, at_least, output, record, seed, write_result
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.info import collect
from esapn_kernels.ops import backend

SIZES = (2, 4, 8, 16, 64, 128)
ROWS = 5000
CALLS = 20  # of each in a turn

Call = Callable[[], Any]


def calls(ids: Tensor, generator: torch.Generator) -> Iterator[tuple[str, Call, Call | None]]:
    """For every line of the table its name, our call, and ``nn.Embedding``'s."""
    dim = SIZES[-1]
    sizes = torch.tensor(SIZES)[torch.randperm(ROWS, generator=generator) % len(SIZES)]
    grad_out = torch.randn(len(ids), dim, generator=generator)

    def ours() -> ResizableEmbedding:
        return ResizableEmbedding(ROWS, sizes=SIZES, initial_size=sizes, backend="triton")

    dense, sgd, adam = ours(), ours(), ours()
    table = nn.Embedding(ROWS, dim)
    # Held: the modules do not keep their optimizers alive.
    _held = optim.SGD(sgd, lr=0.1), optim.Adam(adam, lr=0.1)

    def forward(module: nn.Module) -> Call:
        return lambda: module(ids)

    def forward_alone(module: nn.Module) -> Call:
        def run() -> None:
            with torch.no_grad():
                module(ids)

        return run

    def both(module: nn.Module) -> Call:
        parameters = list(module.parameters())

        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            module(ids).backward(grad_out)

        return run

    yield "forward, no_grad", forward_alone(dense), forward_alone(table)
    yield "forward", forward(dense), forward(table)
    yield "forward and backward, dense", both(dense), both(table)
    yield "forward and backward, SGD", both(sgd), both(table)
    yield "forward and backward, Adam", both(adam), both(table)
    yield "promote, Adam", lambda: adam.promote(ids), None


@contextlib.contextmanager
def timed_launches() -> Iterator[list[float]]:
    """Seconds inside every call of ``launch_kernel`` that is made inside."""
    seconds: list[float] = []
    launch = backend.launch_kernel

    def timed(*args: Any, **known: Any) -> None:
        begin = time.perf_counter()
        launch(*args, **known)
        seconds.append(time.perf_counter() - begin)

    modules = [m for m in list(sys.modules.values()) if vars(m).get("launch_kernel") is launch]
    try:
        for module in modules:
            vars(module)["launch_kernel"] = timed
        yield seconds
    finally:
        for module in modules:
            vars(module)["launch_kernel"] = launch


def seconds_a_call(call: Call) -> float:
    """Of a run of :data:`CALLS` calls."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS


def percentiles(values: Sequence[float], name: str) -> dict[str, float]:
    """The median under ``name``, and its 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {name: statistics.median(values), f"{name}_p20": fifths[0], f"{name}_p80": fifths[3]}


def measure(name: str, ours: Call, theirs: Call | None, turns: int) -> dict[str, Any]:
    """The line of one call: compiled and warm first, then timed, then looked into."""
    from harness.no_device import recorded

    with recorded() as first:
        ours()
    with recorded() as launches:
        ours()
    assert [each.name for each in first] == [each.name for each in launches]
    pair = [call for call in (ours, theirs) if call is not None]
    samples: list[list[float]] = [[] for _ in pair]
    for turn in range(-2, turns):  # two to warm up
        for i in range(len(pair))[:: 1 if turn % 2 else -1]:
            taken = seconds_a_call(pair[i])
            if turn >= 0:
                samples[i].append(taken)
    row: dict[str, Any] = {"call": name, "launches": [each.name for each in launches]}
    row["rule"] = next(filter(None, map(rule, launches)), None)
    row |= percentiles([1e6 * s for s in samples[0]], "us")
    if theirs is not None:
        row |= percentiles([1e6 * s for s in samples[1]], "embedding_us")
        row |= percentiles([a / b for a, b in zip(*samples, strict=True)], "ratio")
    inside, shares, alone = [], [], []
    for _ in range(turns):
        with timed_launches() as seconds:
            taken = seconds_a_call(ours)
        inside.append(1e6 * sum(seconds) / len(seconds))
        shares.append(sum(seconds) / CALLS / taken)
        alone.append(1e6 * seconds_a_call(replay(launches)) / len(launches))
    row |= percentiles(shares, "launch_share")
    row |= percentiles(inside, "launch_us")
    return row | percentiles(alone, "compiled_us")


def rule(launch: Any) -> str | None:
    """What a launch does with the gradient of rows, where it does anything."""
    names = launch.launcher.kernel.arg_names
    return str(launch.operands[names.index("RULE")]) if "RULE" in names else None


def replay(launches: Sequence[Any]) -> Call:
    """The same launches by Triton's ``compiled[grid](*operands)`` alone."""
    prepared = [(each.compiled, each.grid, each.operands) for each in launches]

    def run() -> None:
        for compiled, grid, operands in prepared:
            compiled[grid](*operands)

    return run


LEGEND = """
launches: of Triton's kernels; torch's own operators are not counted
a launch: microseconds in launch_kernel, and in Triton's compiled[grid](*operands) for the same
share: of the call's time that is spent in launch_kernel
"""


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table, and under it the names of the launches."""
    text = [
        f"{'':<29}{'us a call':>10}   {'p20 - p80':<15}{'nn.Embedding':>13}{'ratio':>7}"
        f"{'launches':>10}{'us a launch':>13}{'share':>7}"
    ]
    for row in rows:
        spread = f"{row['us_p20']:.1f} - {row['us_p80']:.1f}"
        theirs = ["-", "-"]
        if "ratio" in row:
            theirs = [f"{row['embedding_us']:.1f}", f"{row['ratio']:.1f}"]
        launch = f"{row['launch_us']:.1f}, {row['compiled_us']:.1f}"
        text.append(
            f"{row['call']:<29}{row['us']:>10.1f}   {spread:<15}{theirs[0]:>13}{theirs[1]:>7}"
            f"{len(row['launches']):>10}{launch:>13}{100 * row['launch_share']:>5.0f} %"
        )
    for row in rows:
        text += ["", f"{row['call']}: {', '.join(row['launches'])}"]
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/host.py", __doc__)
    add = parser.add_argument
    add("--ids", type=at_least(1), default=500, metavar="N", help="ids in a call")
    add("--turns", type=at_least(2), default=40, metavar="N", help="turns of every call")
    add("--seed", type=seed, default=0, metavar="S", help="of rows and ids")
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    if backend.TRITON_ERROR is not None:
        parser.error(backend.TRITON_ERROR)
    if backend.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles the kernels, runs the benchmark and returns the exit status."""
    args = parse(argv)
    import triton
    from harness.no_device import install

    torch.set_num_threads(1)
    # The version in use, which PYTHONPATH may have put before the one that is installed.
    provenance = {**collect(), "triton": triton.__version__}
    install()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(ROWS, (args.ids,), generator=generator)
    rows = [measure(*call, args.turns) for call in calls(ids, generator)]
    sizes = ", ".join(map(str, SIZES))
    print(f"{args.ids} ids of {ROWS} rows of {sizes}; Triton {triton.__version__}, no device")
    print(LEGEND)
    print("\n".join(lines(rows)))
    if args.out is not None:
        result = record(
            "host",
            ids=args.ids,
            table_rows=ROWS,
            sizes=SIZES,
            turns=args.turns,
            calls=CALLS,
            seed=args.seed,
            provenance=provenance,
            rows=rows,
        )
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
