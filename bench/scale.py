"""What tables with rows of their own sizes take and send on many ranks: computed, and counted.

    python bench/scale.py [--ids 1e9] [--world 64] [--zipf 1.05 0.8] [--events 1e11 2e10]
        [--tables 1] [--lookups 212992] [--scale 1] [--optimizer rowwise_adagrad] [--comm bf16]
        [--no-dedup] [--no-growth] [--out FILE.json]
    python bench/scale.py --check [--out FILE.json]

The first computes, for tables sharded by ``esapn_kernels.sharded``, the bytes of a GPU, the bytes
that a rank sends in a step, and the time of a step without its dense part. It needs no GPU and no
TorchRec. The id of popularity rank r comes with a chance in proportion to r^-zipf, an id that came
f times has the largest size d <= scale sqrt(f), and f is what is expected after so many events;
``harness.sharded`` has the formulae.

``--check`` needs the environment of ``make sharded``. It trains on 2 and 4 ranks over gloo on a
CPU, ids ~ u^3, and holds the model against every collective of every rank; beside it stands what
Linux says that the processes wrote. It fails where a part differs by more than 2 %, or a rank sends
more than 1.3 times the mean.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

from harness.command import Parser, at_least, output, record, write_result
from harness.roof import DIM, STATE
from harness.sharded import (
    COMMS,
    Job,
    Machine,
    Traffic,
    memory,
    memory_traffic,
    own_width,
    times,
    wire,
)

from esapn_kernels.info import collect
from esapn_kernels.sharded.placement import Placement

WITHIN = 0.02
EVEN = 1.3


def describe(job: Job, machine: Machine) -> dict[str, Any]:
    """Everything that is printed and written of a job."""
    count = job.traffic.count
    rows = {size: float(count[job.row_size == size].sum()) for size in job.sizes}
    all_ids = job.traffic.ids
    least, most = job.owned
    ways = [
        {
            "dedup": dedup,
            "comm": comm,
            "sent": sum(wire(other).values()),
            "largest": other.owned[1] * job.world,
            "seconds": times(other, machine)["sum"],
        }
        for dedup in (True, False)
        for comm in COMMS
        for other in [replace(job, dedup=dedup, comm=comm)]
    ]
    held = {
        name: memory(replace(job, optimizer=name))
        for name in ("sgd", "rowwise_adagrad", "adagrad", "adam")
    }
    sent = wire(job)
    return {
        "rows_per_size": {size: job.tables * n for size, n in rows.items()},
        "mean_size": sum(size * n for size, n in rows.items()) / all_ids,
        "asked": job.asked,
        "asked_mean_size": job.asked_size,
        "owned": {"least": least * job.world, "most": most * job.world},
        "memory": held,
        "sent": sent,
        "sent_sum": sum(sent.values()),
        "own_width": own_width(job),
        "memory_traffic": memory_traffic(job),
        "seconds": times(job, machine),
        "ways": ways,
    }


Cell = Callable[[dict[str, Any]], str]


def lines(jobs: Sequence[dict[str, Any]], dim: int) -> list[str]:
    """The readable table: a line a number, a column a job."""

    def line(name: str, cell: Cell) -> str:
        return f"{name:<44}" + "".join(f"{cell(job):>14}" for job in jobs)

    def size(*keys: str, unit: float = 1e9, digits: int = 2) -> Cell:
        def cell(job: dict[str, Any]) -> str:
            value: Any = job
            for key in keys:
                if key not in value:
                    return "-"
                value = value[key]
            return f"{value / unit:,.{digits}f}"

        return cell

    first = jobs[0]
    text = [
        line("", lambda job: f"Zipf {job['zipf']:g}"),
        line("lookups of all ranks so far", lambda job: f"{job['events']:.0e}"),
        line("mean size of all rows", size("mean_size", unit=1)),
        line("mean size of the rows asked for", size("asked_mean_size", unit=1)),
        line("ids asked for, of a rank and step", size("asked", unit=1, digits=0)),
        line("ids of the busiest owner over the mean", size("owned", "most", unit=1)),
        "memory of a GPU, GB",
    ]
    optimizer = first["optimizer"]
    parts = [name for name in first["memory"][optimizer] if name not in ("total", "fixed")]
    named = {"optimizer": f"optimizer, {optimizer}", "noted": "noted, at most"}
    text += [
        line("  " + named.get(name, name), size("memory", optimizer, name, digits=3))
        for name in parts
    ]
    for name in first["memory"]:

        def both(job: dict[str, Any], name: str = name) -> str:
            held = job["memory"][name]
            return f"{held['total'] / 1e9:.2f} / {held['fixed'] / 1e9:.2f}"

        text.append(line(f"  all with {name} / rows of {dim}", both))
    text.append("sent by a rank in a step, MB")
    text += [line("  " + name, size("sent", name, unit=1e6, digits=3)) for name in first["sent"]]
    text += [
        line("  all", size("sent_sum", unit=1e6, digits=1)),
        line(
            "  ids and rows of their own width (not built)", size("own_width", unit=1e6, digits=1)
        ),
        "moved by the memory of the busiest GPU in a step, MB",
    ]
    text += [
        line("  " + name, size("memory_traffic", name, unit=1e6, digits=1))
        for name in first["memory_traffic"]
    ]
    text.append("time of a step without its dense part, ms")
    text += [
        line(
            "  " + {"ahead": "sum, ids sent ahead"}.get(name, name),
            size("seconds", name, unit=1e-3),
        )
        for name in first["seconds"]
    ]
    text.append("other ways: MB sent, busiest owner over the mean, ms")
    for i, way in enumerate(first["ways"]):
        name = f"  {'distinct ids' if way['dedup'] else 'every lookup'}, {way['comm']}"

        def cell(job: dict[str, Any], i: int = i) -> str:
            way = job["ways"][i]
            return f"{way['sent'] / 1e6:.0f} {way['largest']:.2f} {1e3 * way['seconds']:.2f}"

        text.append(line(name, cell))
    return text


def checked(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was counted beside the model, a line a run; ``rows`` are of ``harness.wire``."""
    text = [
        f"{'ranks':<7}{'ids sent':<10}{'comm':<6}{'growth':<8}{'model, B':>12}{'counted, B':>12}"
        f"{'counted/model':>15}{'worst part':>22}{'written/model':>15}{'rank/mean':>11}"
    ]
    for row in rows:
        part, ratio = row["worst"]
        written = "-" if row["written"] is None else f"{row['written']:.4f}"
        text.append(
            f"{row['world']:<7}{'distinct' if row['dedup'] else 'all':<10}{row['comm']:<6}"
            f"{'on' if row['growth'] else 'off':<8}{row['model']:>12,.0f}{row['counted']:>12,.0f}"
            f"{row['ratio']:>15.4f}{f'{part} {ratio:.4f}':>22}{written:>15}"
            f"{row['uneven']:>11.3f}"
        )
    return text


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a run of the check is not: within 2 % of the model, in all parts, and even."""
    found = []
    for row in rows:
        what = f"{row['world']} ranks, dedup {row['dedup']}, {row['comm']}, growth {row['growth']}"
        part, ratio = row["worst"]
        if abs(row["ratio"] - 1) > WITHIN or abs(ratio - 1) > WITHIN:
            found.append(f"{what}: {part} is {ratio:.4f} of the model, all {row['ratio']:.4f}")
        if row["uneven"] > EVEN:
            found.append(f"{what}: a rank sends {row['uneven']:.2f} times the mean")
    return found


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """The ``type`` of a flag whose value lies in ``[least, most]``."""

    def real(text: str) -> float:
        value = float(text)
        if not (least <= value <= most and math.isfinite(value)):
            limit = f"at least {least:g}" if math.isinf(most) else f"in [{least:g}, {most:g}]"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value

    real.__name__ = "float"
    return real


def whole(least: int) -> Callable[[str], int]:
    """The ``type`` of a flag whose value is an integer, which may be written as ``1e9``."""

    def integer(text: str) -> int:
        value = float(text)
        if not value.is_integer():
            raise ValueError
        return at_least(least)(str(int(value)))

    integer.__name__ = "int"
    return integer


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/scale.py", __doc__)
    add = parser.add_argument
    add("--ids", type=whole(1), default=10**9, metavar="N", help="rows of all tables together")
    add("--world", type=at_least(1), default=64, metavar="W", help="GPUs")
    add("--tables", type=at_least(1), default=1, metavar="T", help="tables, alike")
    add("--lookups", type=whole(1), default=8192 * 26, help="of a GPU and step, over all tables")
    add(
        "--zipf", type=number(0, 4), nargs="+", default=[1.05, 0.8], help="exponents of the traffic"
    )
    add(
        "--events",
        type=number(0),
        nargs="+",
        default=[1e11, 2e10],
        help="lookups of all GPUs so far, for every exponent or one for all",
    )
    add("--scale", type=number(1e-3), default=1.0, help="s of the rule d <= s sqrt(count)")
    add("--optimizer", choices=STATE, default="rowwise_adagrad", help="of the rows")
    add("--comm", choices=COMMS, default="bf16", help="of outputs between GPUs")
    add("--no-dedup", action="store_true", help="an id travels as often as it comes")
    add("--no-growth", action="store_true", help="rows stay, and nothing is counted")
    add("--every", type=at_least(1), default=50, help="steps between moves of rows")
    machine = Machine()
    add("--nic", type=number(1), default=machine.nic, help="assumed: bytes/s of a network card")
    add(
        "--efficiency",
        type=number(1e-3, 1),
        default=machine.efficiency,
        help="assumed: part of it that collectives reach",
    )
    add("--hbm", type=number(1), default=machine.hbm, help="assumed: bytes/s of a GPU's memory")
    add("--latency", type=number(0), default=machine.latency, help="assumed: s of a collective")
    add(
        "--check",
        action="store_true",
        help="count the bytes of runs on 2 and 4 ranks; goes with --out alone",
    )
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    if args.check and find_spec("torchrec") is None:
        parser.error("--check needs TorchRec, which `make sharded` installs in .venv-sharded")
    if len(args.events) == 1:
        args.events *= len(args.zipf)
    if len(args.events) != len(args.zipf):
        parser.error(f"--events needs one number, or {len(args.zipf)}, as --zipf has")
    if args.ids < args.tables * args.world:
        parser.error(f"--ids must be at least --tables x --world, {args.tables * args.world}")
    if args.lookups < args.tables:
        parser.error(f"--lookups must be at least --tables, {args.tables}")
    try:
        Placement(args.ids // args.tables, args.world)
    except ValueError as error:
        parser.error(f"--ids: {error}")
    return args


def jobs_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the command line asks for, a job for every exponent."""
    machine = Machine(args.nic, args.efficiency, args.hbm, args.latency)
    found = []
    for zipf, events in zip(args.zipf, args.events, strict=True):
        job = Job(
            Traffic.zipf(args.ids // args.tables, zipf),
            args.world,
            args.lookups,
            args.tables,
            events,
            scale=args.scale,
            comm=args.comm,
            dedup=not args.no_dedup,
            growth=not args.no_growth,
            optimizer=args.optimizer,
            every=args.every,
        )
        about = {"zipf": zipf, "events": events, "optimizer": args.optimizer}
        found.append({**about, **describe(job, machine)})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    result: dict[str, Any] = {"provenance": collect()}
    status = 0
    if args.check:
        from harness.wire import ProcessException, check

        rows = []
        print(checked([])[0])
        for world in (2, 4):
            try:
                found = check(world)
            except ProcessException as error:
                reason = str(error).strip().splitlines()[-1]
                print(f"bench/scale.py: error: {world} ranks: {reason}", file=sys.stderr)
                return 1
            print("\n".join(checked(found)[1:]), flush=True)
            rows += found
        for failure in failures(rows):
            print(f"bench/scale.py: error: {failure}", file=sys.stderr)
            status = 1
        result |= {"check": rows}
    else:
        jobs = jobs_of(args)
        machine = Machine(args.nic, args.efficiency, args.hbm, args.latency)
        print(f"computed: {args.ids:,} ids in {args.tables} tables on {args.world} GPUs, ", end="")
        print(f"{args.lookups:,} lookups of a GPU and step")
        print(
            f"assumed: {args.nic:g} B/s of a network card x {args.efficiency:g}, {args.hbm:g} B/s "
            f"of memory, {args.latency:g} s of a collective"
        )
        print("\n".join(lines(jobs, DIM)))
        settings = {k: v for k, v in vars(args).items() if k not in ("check", "out")}
        result |= {"settings": settings, "assumed": asdict(machine), "jobs": jobs}
    if args.out is not None:
        write_result(args.out, record("scale", **result))
    return status


if __name__ == "__main__":
    sys.exit(main())
