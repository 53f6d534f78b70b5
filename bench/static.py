"""What the compiler makes of the kernels of a training step and of a promotion. Needs no GPU.

    python bench/static.py [--sm 90] [--dtype float32] [--only REGEX] [--out FILE]

Every kernel as it is launched, in the paper's sizes: registers, spills, shared memory, blocks a
multiprocessor, widths of loads and stores, loads in flight, round trips to memory, and the share of
the memory's bandwidth that Little's law allows. The last is a prediction, not a measurement;
bench/harness/static.py has the formulas. Another version of Triton is taken from PYTHONPATH.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.command import Parser, output, record, write_result
from harness.static import (
    COPY,
    LOADS,
    STORES,
    TARGETS,
    TOOLS,
    blocks_per_multiprocessor,
    disassemble,
    in_flight_bytes,
    label,
    parse_sass,
    passes,
    widths,
)

from esapn_kernels.info import collect
from esapn_kernels.ops.backend import INTERPRETED, TRITON_ERROR

ROOT = Path(__file__).resolve().parents[1]
# The launchers' calls on a GPU that is not there are the tests'.
sys.path.insert(0, str(ROOT))

SIZES = (2, 4, 8, 16, 64, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Batches, and the operators in them whose kernels are meant; "to": the forward.
BATCHES = (
    (1 << 20, ("to", "compose", "sgd", "adam")),
    (500, ("to", "sgd")),
    (2000, ("sgd",)),
    (10_240, ("promote",)),
)


def launches(dtype: torch.dtype) -> dict[str, Any]:
    """The launches by the name of their line; what two operators launch alike stands once."""
    from tests.kernels.launches import TYPES, calls, recorded

    found: dict[str, Any] = {}
    seen = []
    for n_ids, parts in BATCHES:
        for part, call in calls(SIZES, dtype, torch.int32, n_ids):
            name = "to" if part == f"to-{TYPES[dtype]}" else part
            if name not in parts:
                continue
            with recorded() as made:
                call()
            for each in made:
                if each not in seen:
                    seen.append(each)
                    found.setdefault(label(each.name, name, n_ids), each)
    return found


def measure(name: str, launch: Any, sm: int, tools: Path) -> dict[str, Any]:
    """The line of one kernel for one architecture."""
    from tests.kernels.compile_kernels import compile_launch, resource_usage

    target = TARGETS[sm]
    binary = compile_launch(launch, sm)
    usage = resource_usage(binary.asm["cubin"])
    threads = 32 * binary.metadata.num_warps
    programs = math.prod(launch.grid)
    shared = binary.metadata.shared
    blocks = blocks_per_multiprocessor(target, usage["registers"], shared, threads)
    resident = min(blocks, programs / target.multiprocessors)
    sass = parse_sass(
        disassemble(binary.asm["cubin"], tools / "nvdisasm"), ROOT / "esapn_kernels" / "gpu"
    )
    found = []
    for each in passes(sass):
        flying = in_flight_bytes(each, threads, resident)
        shares = None
        if flying is not None:
            needed = (target.busy_bytes, target.idle_bytes)
            shares = [round(min(flying / n, 1.0), 4) for n in needed]
        found.append(
            {
                "instructions": each.instructions,
                "round_trips": each.round_trips,
                "waits": ", ".join(each.waits),
                "loads_in_flight": each.in_flight,
                "groups_left": each.groups_left,
                "loaded_bytes": each.loaded * threads,
                "stored_bytes": each.stored * threads,
                "bytes_in_flight": flying,
                "predicted_share_busy_idle": shares,
            }
        )
    return {
        "kernel": name,
        "sm": sm,
        "programs": programs,
        "threads": threads,
        "registers": usage["registers"],
        "spilled_bytes": usage["stack"] + usage["local"],
        "shared_bytes": shared,
        "blocks_per_multiprocessor": blocks,
        "loads_without_a_name": sum(not x.pointer for x in sass if x.kind in (*LOADS, COPY)),
        "loads_by_bits": widths(sass, LOADS),
        "copies_by_bits": widths(sass, (COPY,)),
        "stores_by_bits": widths(sass, STORES),
        "passes": found,
    }


HEADINGS = (
    "kernel",
    "programs",
    "threads",
    "registers",
    "spilled B",
    "shared KiB",
    "blocks",
    "loads, copies",
    "stores",
    "in flight",
    "left",
    "trips",
    "KiB",
    "share",
)


LEGEND = """
programs: of a step of 1,048,576 ids, of a promotion of 10,240; blocks: that fit on a multiprocessor
loads, copies and stores: instructions by bits a thread, in the whole kernel
of the pass that moves most bytes: loads in flight at most, groups of copies that a wait leaves,
round trips to memory, KiB in flight a multiprocessor, and the share of the memory's bandwidth that
these allow, PREDICTED for a busy and for an idle memory
"""


def cells(row: dict[str, Any]) -> list[str]:
    """A line's texts, under :data:`HEADINGS`."""

    def by_bits(*kinds: str) -> str:
        found: dict[int, int] = {}
        for kind in kinds:
            for bits, n in row[kind].items():
                found[int(bits)] = found.get(int(bits), 0) + n
        return ", ".join(f"{n} x {bits}" for bits, n in sorted(found.items(), reverse=True)) or "-"

    first = row["passes"][0]
    flying, shares = first["bytes_in_flight"], first["predicted_share_busy_idle"]
    return [
        row["kernel"],
        f"{row['programs']:,}",
        str(row["threads"]),
        str(row["registers"]),
        str(row["spilled_bytes"]),
        f"{row['shared_bytes'] / 1024:.1f}",
        str(row["blocks_per_multiprocessor"]),
        by_bits("loads_by_bits", "copies_by_bits"),
        by_bits("stores_by_bits"),
        str(first["loads_in_flight"]),
        "-" if first["groups_left"] is None else str(first["groups_left"]),
        f"{first['round_trips']:g}",
        "-" if flying is None else f"{flying / 1024:.1f}",
        "-" if shares is None else f"{100 * shares[0]:.0f}-{100 * shares[1]:.0f} %",
    ]


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table in Markdown, one for every architecture."""
    text: list[str] = []
    for sm in dict.fromkeys(row["sm"] for row in rows):
        target = TARGETS[sm]
        needed = f"{target.busy_bytes / 1024:.0f} KiB busy, {target.idle_bytes / 1024:.1f} KiB idle"
        table = [list(HEADINGS), *(cells(row) for row in rows if row["sm"] == sm)]
        table.insert(1, ["---"] * len(HEADINGS))
        text += ["", f"sm_{sm}; share PREDICTED for {target.device}, which needs {needed}", ""]
        text += ["| " + " | ".join(line) + " |" for line in table]
    return text[1:]


def pattern(text: str) -> re.Pattern[str]:
    """The ``type`` of ``--only``."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None


def versions(tools: Path) -> dict[str, str]:
    """``{"ptxas": "12.8.93"}``, and of the one beside it for newer architectures."""
    found = {}
    for tool in sorted(tools.glob("ptxas*")):
        said = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=True)
        found[tool.name] = said.stdout.partition(", V")[2].split()[0]
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/static.py", __doc__)
    add = parser.add_argument
    add("--sm", type=int, nargs="+", choices=tuple(TARGETS), default=list(TARGETS), metavar="SM")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of rows and output")
    add("--only", type=pattern, default="", metavar="REGEX", help="names of kernels")
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    if TRITON_ERROR is not None:
        parser.error(TRITON_ERROR)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    import triton

    args.tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [tool for tool in TOOLS if not os.access(args.tools / tool, os.X_OK)]
    if missing:
        parser.error(f"Triton {triton.__version__} has no {', '.join(missing)} in {args.tools}")
    args.triton = triton.__version__
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles the kernels, prints the table and returns the exit status."""
    args = parse(argv)
    chosen = {k: v for k, v in launches(DTYPES[args.dtype]).items() if args.only.search(k)}
    rows = [measure(*each, sm, args.tools) for sm in args.sm for each in chosen.items()]
    print(f"Triton {args.triton}, {args.dtype}, sizes {', '.join(map(str, SIZES))}; nothing timed")
    print(LEGEND)
    print("\n".join(lines(rows)))
    if args.out is not None:
        # The version in use, which PYTHONPATH may have put before the one that is installed.
        provenance = {**collect(), "triton": args.triton, "ptxas": versions(args.tools)}
        devices = {
            sm: {**vars(TARGETS[sm]), "idle_bytes": TARGETS[sm].idle_bytes} for sm in args.sm
        }
        result = record(
            "static",
            dtype=args.dtype,
            sizes=SIZES,
            devices=devices,
            provenance=provenance,
            rows=rows,
        )
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
