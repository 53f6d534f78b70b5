"""Microseconds of every kernel of a training step and of a promotion, on a GPU.

    python bench/kernels.py [--ids 500 65536 1048576] [--scale 20] [--out FILE.json]

The paper's table with --scale times its rows, uniform ids, random rows and gradients.

    forward      builds the graph
    dense step   forward, backward with a dense gradient of the table
    adam step    forward, backward with Adam fused into it, torch's Adam on the hops
    deferred     the same with the rows' gradients collected in backward, and a step after it
    promotion    distinct rows below the largest size, Adam's moments with them, on a fresh copy

Of a case: microseconds a call of all kernels together, as torch.profiler has them; of the host, a
wall clock around many calls without synchronising; of both, until the GPU is done with these calls.
Then the fewest bytes (harness/roof.py) over the kernels' time, and that over a large copy's rate.
Of a kernel: microseconds and launches a call, and the share of the memory's bandwidth that
results/static-VERSION.json PREDICTS for it, for a busy and for an idle memory, where it has it.

--out is written anew after every case; "complete" in it says whether all of them are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from harness.command import Parser, at_least, output, record, seed, write_result
from harness.promotions import Ready
from harness.providers import Ours, make_ids, make_table_spec
from harness.roof import (
    DIM,
    PAPER_ROWS,
    SIZES,
    Looked,
    dense_backward_bytes,
    forward_bytes,
    promotion_bytes,
    sparse_step_bytes,
)
from harness.static import label
from harness.timing import Timer
from harness.updates import Step, deferred_step, fused_step
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from esapn_kernels import ResizableEmbedding
from esapn_kernels.info import collect
from esapn_kernels.ops.backend import INTERPRETED

BATCHES = (500, 65_536, 1_048_576)
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """What is measured at one number of ids.

    Attributes:
        calls: a number of calls to make, prepared.
        fewest_bytes: that one of them can move.
        part: of it, as the static figures name kernels.
        repeats: calls to warm up, turns of the clock, calls in each, calls in the profiler.
    """

    name: str
    ids: int
    calls: Callable[[int], list[Call]]
    fewest_bytes: int
    part: str = ""
    repeats: tuple[int, int, int, int] = (3, 5, 20, 8)


class Bench:
    """One table on one device, and the cases on it."""

    def __init__(self, scale: int, device: torch.device, seed: int, rehearse: bool) -> None:
        torch.manual_seed(seed)
        self.device, self.rehearse = device, rehearse
        self.generator = torch.Generator().manual_seed(seed)
        rows = {size: 4 if rehearse else scale * count for size, count in PAPER_ROWS.items()}
        self.spec = make_table_spec("paper", rows, self.generator)

    @cached_property
    def ours(self) -> Ours:
        ours = Ours(self.spec, self.device)
        ours.module.backend = "triton"
        return ours

    @cached_property
    def adam(self) -> Step:
        """Rows stepped inside backward; its steps are small."""
        return self._settled(fused_step(Ours(self.spec, self.device), "adam"))

    @cached_property
    def deferred(self) -> Step:
        """Rows stepped after backward."""
        return self._settled(deferred_step(Ours(self.spec, self.device), "adam"))

    def _settled(self, step: Step) -> Step:
        self.module(step).backend = "triton"
        step.settle()
        return step

    @staticmethod
    def module(step: Step) -> ResizableEmbedding:
        assert isinstance(step.holder, Ours)
        return step.holder.module

    def batches(self, n_ids: int) -> tuple[list[Tensor], Tensor]:
        """Four batches of ids, and a gradient."""
        ids = [make_ids(self.spec, "uniform", n_ids, self.generator) for _ in range(4)]
        return [i.to(self.device) for i in ids], torch.randn(n_ids, DIM, device=self.device)

    def growing(self, n_ids: int) -> Tensor:
        """Distinct ids of rows that can grow, as many as there are."""
        small = (self.spec.sizes < SIZES[-1]).nonzero()[:, 0]
        return small[torch.randperm(len(small), generator=self.generator)[:n_ids]].to(self.device)

    def cases(self, n_ids: int) -> Iterator[Case]:
        batches, grad = self.batches(n_ids)
        looked = Looked.of(batches[0].cpu(), self.spec.sizes)
        ours = self.ours
        forward = forward_bytes(looked)
        dense = dense_backward_bytes(looked, ours.grad_elements)

        def both(ids: Tensor) -> None:
            ours.backward(ours(ids), grad)

        def calls(of: Callable[[Tensor], Any], number: int) -> list[Call]:
            return [partial(of, batches[i % len(batches)]) for i in range(number)]

        def adam(ids: Tensor) -> None:
            self.adam(ids, grad)

        yield Case("forward", n_ids, partial(calls, ours), forward)
        yield Case("dense step", n_ids, partial(calls, both), forward + dense)

        def deferred(ids: Tensor) -> None:
            self.deferred(ids, grad)

        stepped = sparse_step_bytes(looked, "adam")
        yield Case("adam step", n_ids, partial(calls, adam), stepped, "adam")
        yield Case("deferred", n_ids, partial(calls, deferred), stepped)
        ids = self.growing(n_ids)
        counts = [int((self.spec.sizes[ids.cpu()] == size).sum()) for size in SIZES]

        def promotions(number: int) -> list[Call]:
            made = [Ready.copy_of(ours, len(ids) + 1) for _ in range(number)]
            for ready in made:  # what is allocated once is there
                ready.promote(ids[:1])
            return [partial(ready.promote, ids) for ready in made]

        moved = promotion_bytes(counts)
        yield Case("promotion", len(ids), promotions, moved, repeats=(1, 3, 4, 4))

    def once(self, n_ids: int) -> None:
        """Every kernel at least once, the step before and after a promotion."""
        batches, grad = self.batches(n_ids)
        self.adam(batches[0], grad)
        self.module(self.adam).promote(self.growing(n_ids))
        self.adam(batches[0], grad)
        self.deferred(batches[0], grad)
        self.ours.backward(self.ours(batches[1]), grad)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(case: Case, turns: int, number: int, device: torch.device) -> tuple[float, float]:
    """Microseconds a call of the host alone, and until the GPU is done; medians of the turns."""
    host, both = [], []
    for _ in range(turns):
        calls = case.calls(number)
        synchronize(device)
        begin = time.perf_counter()
        for call in calls:
            call()
        queued = time.perf_counter()
        synchronize(device)
        host.append(1e6 * (queued - begin) / number)
        both.append(1e6 * (time.perf_counter() - begin) / number)
        calls.clear()  # copies of the table, before there are new ones
    return statistics.median(host), statistics.median(both)


def profiled(calls: Sequence[Call], device: torch.device) -> list[dict[str, Any]]:
    """Microseconds and launches a call of every kernel, copy and fill, the longest first.

    On a CPU, in a rehearsal, operators stand for kernels.
    """
    cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for call in calls:
            call()
        synchronize(device)
    times: dict[str, list[float]] = {}
    for event in found.events() or ():
        if not cuda:
            times.setdefault(event.name, []).append(event.self_cpu_time_total)
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    rows = [
        {"kernel": name, "us": sum(each) / len(calls), "launches": len(each) / len(calls)}
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def measure(case: Case, copy: float, shares: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """The record of a case; ``copy`` is the rate of a large copy in GB/s."""
    warm, turns, number, traced = (0, 1, 1, 1) if bench.rehearse else case.repeats
    for call in case.calls(warm):
        call()
    host, both = clock(case, turns, number, bench.device)
    kernels = profiled(case.calls(traced), bench.device)
    total = sum(row["us"] for row in kernels)
    for row in kernels:
        row["predicted_share_busy_idle"] = shares.get(label(row["kernel"], case.part, case.ids))
    rate = case.fewest_bytes / total / 1e3 if total else None
    return {
        "case": case.name,
        "ids": case.ids,
        "kernels_us": total,
        "host_us": host,
        "host_and_gpu_us": both,
        "fewest_bytes": case.fewest_bytes,
        "gb_per_s": rate,
        "share_of_copy": rate and rate / copy,
        "kernels": kernels,
    }


def predictions(triton: str | None, device: torch.device) -> dict[str, Any]:
    """The predicted shares by the static figures' names, empty where there are none."""
    path = RESULTS / f"static-{triton}.json"
    if device.type != "cuda" or not path.exists():
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {
        row["kernel"]: row["passes"][0]["predicted_share_busy_idle"]
        for row in rows
        if row["sm"] == 10 * major + minor and row["passes"]
    }


def headline(case: dict[str, Any]) -> str:
    """One line of a case, without its kernels."""
    rate = "the profiler saw no kernel"
    if case["gb_per_s"] is not None:
        rate = f"{case['gb_per_s']:,.0f} GB/s, {case['share_of_copy']:.1%} of a copy"
    return (
        f"{case['case']}, {case['ids']:,} ids: kernels {case['kernels_us']:,.1f} us, "
        f"host {case['host_us']:,.1f} us, both {case['host_and_gpu_us']:,.1f} us a call; "
        f"at least {case['fewest_bytes'] / 1e6:,.2f} MB, {rate}"
    )


def lines(case: dict[str, Any]) -> list[str]:
    """The case as text."""
    text = [headline(case), f"  {'us':>10}{'launches':>10}  {'kernel':<66}predicted share"]
    for row in case["kernels"]:
        shares = row["predicted_share_busy_idle"]
        predicted = "" if shares is None else f"{shares[0]:.0%} - {shares[1]:.0%}"
        name = row["kernel"][:64]
        text.append(f"  {row['us']:>10.1f}{row['launches']:>10.1f}  {name:<66}{predicted}".rstrip())
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; a mistake ends the process with one line."""
    parser = Parser("bench/kernels.py", __doc__)
    add = parser.add_argument
    add("--ids", type=at_least(1), nargs="+", default=BATCHES, metavar="N", help="batch sizes")
    add("--scale", type=at_least(1), default=20, metavar="N", help="times the paper's rows")
    add("--seed", type=seed, default=0, metavar="S", help="of tables, rows and ids")
    add("--out", type=output, metavar="FILE.json", help="write the result as JSON")
    add("--once", action="store_true", help="run every kernel, measure nothing")
    add("--rehearse", action="store_true", help="interpreted, a tiny table: the times say nothing")
    args = parser.parse_args(argv)
    if args.rehearse and not INTERPRETED:
        parser.error("argument --rehearse: needs TRITON_INTERPRET=1")
    if not args.rehearse and INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not timed")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: kernels are timed on a GPU")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and returns the exit status."""
    args = parse(argv)
    device = torch.device("cpu" if args.rehearse else "cuda")
    if args.rehearse:
        sys.path.insert(0, str(ROOT))
        from tests.interpreter import speed_up

        speed_up()
    bench = Bench(args.scale, device, args.seed, args.rehearse)
    if args.once:
        for n_ids in args.ids:
            bench.once(n_ids)
        synchronize(device)
        print("every kernel has run")
        return 0
    info = collect()
    shares = predictions(info["triton"], device)
    copy = statistics.median(Timer(device).copy_rates())
    found: list[dict[str, Any]] = []

    def save(complete: bool) -> None:
        if args.out is not None:
            result = record(
                "kernels",
                complete=complete,
                rehearsal=args.rehearse,
                seed=args.seed,
                rows=len(bench.spec),
                copy_gb_per_s=copy,
                provenance=info,
                cases=found,
            )
            write_result(args.out, result)

    save(complete=False)
    print(f"{len(bench.spec):,} rows; a large copy: {copy:,.0f} GB/s", flush=True)
    for n_ids in args.ids:
        for case in bench.cases(n_ids):
            found.append(measure(case, copy, shares, bench))
            save(complete=False)
            print("\n".join(["", *lines(found[-1])]), flush=True)
    save(complete=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
