"""Compile every kernel without a GPU and print registers and spills as JSON.

    python tests/kernels/compile_kernels.py [--write FOLDER] [--only REGEX] sm [sm ...]

What is compiled is what the launchers launch. Run as its own process: under ``TRITON_INTERPRET=1``
the kernels are Python functions, not compilable. ``--write`` keeps TTGIR, PTX and cubin of every
case.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.kernels.launches import Launch, calls, recorded

PAPER, AWKWARD, WIDE = (2, 4, 8, 16, 64, 128), (1, 3, 5, 33), (7, 128, 512)
LAYOUTS = (
    ("paper", PAPER, torch.float32, torch.int32),
    ("paper", PAPER, torch.float32, torch.int64),
    ("paper", PAPER, torch.bfloat16, torch.int32),
    ("paper", PAPER, torch.float16, torch.int32),
    ("paper", PAPER, torch.float64, torch.int32),
    ("awkward", AWKWARD, torch.float32, torch.int32),
    ("wide", WIDE, torch.float32, torch.int32),
    ("wide", WIDE, torch.bfloat16, torch.int32),
)
# Ungrouped and sorted in one program, of either length; grouped, and the most programs.
N_IDS = (500, 2000, 1 << 16, 1 << 20)


def cases() -> dict[str, Launch]:
    """Every kernel at every shipped launch choice: row dtype, index widths, sizes, batch."""
    found: dict[str, Launch] = {}
    seen = set()
    for name, sizes, dtype, index in LAYOUTS:
        full = (sizes, dtype, index) == (PAPER, torch.float32, torch.int32)
        for n_ids in N_IDS:
            for part, call in calls(sizes, dtype, index, n_ids, full=full):
                # Insertion and freeing are parts of promotion: one layout of them suffices.
                if part in ("insert", "free") and not full:
                    continue
                with recorded() as launches:
                    call()
                for each in launches:
                    what = repr((each.name, each.types, each.constants, each.options))
                    if what not in seen:
                        seen.add(what)
                        label = f"{name}-{str(dtype)[6:]}-{str(index)[6:]}-{n_ids}-{part}"
                        found[f"{each.name}[{label}]"] = each
    return found


def compile_launch(case: Launch, sm: int) -> Any:
    """What Triton makes of one launch for one target."""
    kernel = case.kernel
    signature = {n: case.types.get(n, "constexpr") for n in kernel.arg_names}
    # Pointers and tensors' allocations are 16-byte aligned, as at a real launch.
    aligned = [(i,) for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(n),): v for n, v in case.constants.items()},
        {key: [["tt.divisibility", 16]] for key in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=case.options)


def compile_case(name: str, case: Launch, sm: int, folder: Path | None = None) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and threads of one kernel for one target."""
    binary = compile_launch(case, sm)
    if folder is not None:
        file = folder / f"{re.sub(r'[^-a-z0-9_]+', '_', name)}.sm_{sm}"
        for kind in ("ttgir", "ptx"):
            file.with_name(f"{file.name}.{kind}").write_text(binary.asm[kind], encoding="utf-8")
        file.with_name(file.name + ".cubin").write_bytes(binary.asm["cubin"])
    usage = resource_usage(binary.asm["cubin"])
    threads = 32 * binary.metadata.num_warps
    return {"case": name, "sm": sm, "shared": binary.metadata.shared, "threads": threads, **usage}


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump reads from the binary: registers a thread, stack (spills) and local bytes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="REGEX", help="names of cases")
    parser.add_argument(
        "--share", default="1/1", metavar="I/N", help="the I-th of N shares of them"
    )
    parser.add_argument("sm", type=int, nargs="*", default=[90])
    args = parser.parse_args()
    if args.write is not None:
        args.write.mkdir(parents=True, exist_ok=True)
    index, shares = map(int, args.share.split("/"))
    chosen = [(name, case) for name, case in cases().items() if re.search(args.only, name)]
    results = [
        compile_case(name, case, sm, args.write)
        for name, case in chosen[index - 1 :: shares]
        for sm in args.sm
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
