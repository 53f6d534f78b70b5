"""Compile every kernel without a GPU and print registers and spills as JSON.

    python tests/compile_kernels.py sm [sm ...]

Run as its own process: under ``TRITON_INTERPRET=1`` the kernels are Python functions, not
compilable.
"""

from __future__ import annotations

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

from esapn_kernels import launch, lookup, resize

PAPER, AWKWARD, WIDE = (2, 4, 8, 16, 64, 128), (1, 3, 5, 33), (7, 128, 512)
LAYOUTS = (
    ("paper", PAPER, torch.float32, "*i32"),
    ("paper", PAPER, torch.float32, "*i64"),
    ("paper", PAPER, torch.bfloat16, "*i32"),
    ("paper", PAPER, torch.float16, "*i32"),
    ("awkward", AWKWARD, torch.float32, "*i32"),
    ("wide", WIDE, torch.float32, "*i32"),
    ("wide", WIDE, torch.bfloat16, "*i32"),
)
ROWS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
N_IDS = (500, 1 << 20)
PAGE = 4096


def cases() -> list[dict[str, Any]]:
    """Every kernel at every shipped launch choice: row dtype, index widths, sizes, batch."""
    found = {}
    for name, sizes, dtype, index in LAYOUTS:
        for n_ids in N_IDS:
            for case in _cases(name, sizes, dtype, ROWS[dtype], n_ids, index):
                found[case["name"]] = case
    return list(found.values())


def _cases(name, sizes, dtype, row, n_ids, index):
    label = f"{name}-{row[1:]}-{index[1:]}"
    place = {"row_start_ptr": index, "page_level_ptr": "*i8"}
    shared = lookup.kernel_constants(sizes, PAGE, dtype)
    yield _case(
        lookup._lookup_fwd_kernel,
        label,
        launch.choose_fwd(n_ids, sizes[-1], dtype),
        shared,
        {
            "ids_ptr": "*i64",
            "storage_ptr": row,
            "composed_ptr": "*fp32",
            **place,
            "out_ptr": row,
            "n_ids": "i32",
            "n_rows": "i32",
        },
    )
    yield _case(
        lookup._lookup_bwd_rows_kernel,
        label,
        launch.choose_bwd_rows(n_ids, sizes[-1], dtype),
        shared,
        {
            "sorted_start_ptr": index,
            "order_ptr": "*i64",
            "grad_out_ptr": row,
            "composed_ptr": "*fp32",
            "page_level_ptr": "*i8",
            "grad_storage_ptr": row,
            "n_ids": "i32",
        },
    )
    yield _case(
        lookup._lookup_bwd_chain_kernel,
        label,
        launch.choose_bwd_chain(n_ids, sizes[-1], dtype),
        shared,
        {
            "ids_ptr": "*i64",
            "storage_ptr": row,
            "grad_out_ptr": row,
            **place,
            "partial_ptr": "*fp32",
            "n_ids": "i32",
            "n_rows": "i32",
        },
    )
    config = launch.choose_promote(n_ids, sizes[-1], dtype)
    moved = {"old_start_ptr": "*i64", "new_start_ptr": "*i64", "level_ptr": "*i64"}
    yield _case(
        resize._promote_kernel,
        label,
        config,
        shared,
        {"storage_ptr": row, "chain_ptr": row, **moved, "n_rows": "i32"},
    )
    yield _case(
        resize._fill_rows_kernel,
        label,
        config,
        {"SIZES": tuple(sizes)},
        {
            "storage_ptr": row,
            "start_ptr": "*i64",
            "level_ptr": "*i64",
            "value": "fp32",
            "n_rows": "i32",
        },
    )


def _case(kernel, label, config, shared, types):
    blocks = lookup.block_constants(config)
    options = {k: blocks.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")}
    tile = "x".join(str(v) for v in blocks.values())
    known = {**shared, **blocks}
    constants = {n: known[n] for n in kernel.arg_names if n not in types}
    name = f"{kernel.__name__}[{label}-{tile}-w{options['num_warps']}]"
    return {
        "name": name,
        "kernel": kernel,
        "types": types,
        "constants": constants,
        "options": options,
    }


def compile_case(case: dict[str, Any], sm: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one kernel for one target."""
    kernel, types = case["kernel"], case["types"]
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    # Pointers and tensors' allocations are 16-byte aligned, as at a real launch.
    aligned = [(i,) for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(n),): v for n, v in case["constants"].items()},
        {key: [["tt.divisibility", 16]] for key in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=case["options"])
    usage = resource_usage(binary.asm["cubin"])
    return {"case": case["name"], "sm": sm, "shared": binary.metadata.shared, **usage}


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


if __name__ == "__main__":
    targets = [int(a) for a in sys.argv[1:]] or [90]
    print(json.dumps([compile_case(case, sm) for sm in targets for case in cases()]))
