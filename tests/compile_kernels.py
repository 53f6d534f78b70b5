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

from esapn_kernels import chain_grad, compose, group, launch, lookup_bwd, lookup_fwd, resize, runs
from esapn_kernels.update import RULES

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
    for case in _forward_cases("paper-fp64-i32", PAPER, torch.float64, "*fp64", 500, "*i32"):
        found[case["name"]] = case
    return list(found.values())


def _cases(name, sizes, dtype, row, n_ids, index):
    label = f"{name}-{row[1:]}-{index[1:]}"
    yield from _forward_cases(label, sizes, dtype, row, n_ids, index)
    yield from _backward_cases(label, sizes, dtype, row, n_ids, index)
    for action in ("promote", "insert", "free"):
        # Insertion and freeing are parts of promotion: two layouts of them suffice.
        if action == "promote" or (name, dtype) == ("paper", torch.float32):
            yield from _resize_cases(f"{label}-{action}", sizes, dtype, row, n_ids, index, action)
    yield _case(
        resize._fill_rows_kernel,
        label,
        launch.choose_promote(n_ids, sizes[-1], dtype),
        {"SIZES": tuple(sizes), "DIM": sizes[-1], "VALUE": 0.25},
        {"target_ptr": row, "start_ptr": "*i64", "level_ptr": "*i64", "n_rows": "i32"},
    )


def _forward_cases(label, sizes, dtype, row, n_ids, index):
    wide = "*fp64" if dtype == torch.float64 else "*fp32"
    grouping = launch.choose_group(n_ids, len(sizes))
    shared = {
        **launch.kernel_constants(sizes, PAGE, dtype),
        "ALIGN": launch.alignments(sizes, PAGE),
        "N": len(sizes),
        "BLOCK_COUNTS": grouping.block_counts,
        "CHAIN": compose.chain_numel(sizes),
    }
    types = {
        "ids_ptr": "*i64",
        "row_start_ptr": index,
        "page_level_ptr": "*i8",
        "found_ptr": index,
        "counts_ptr": "*i32",
        "order_ptr": "*i32",
        "start_ptr": index,
        "level_begin_ptr": "*i32",
        "storage_ptr": row,
        "out_ptr": row,
        "chain_ptr": row,
        "grad_chain_ptr": row,
        **dict.fromkeys(("composed_ptr", "grad_composed_ptr", "scratch_ptr"), wide),
        **dict.fromkeys(("n_ids", "n_rows", "stretch", "n_programs"), "i32"),
    }
    # As launched on a GPU: kernels that look at ids assert that they are in range.
    asserting = {"debug": True, "sanitize_overflow": False}
    small = launch.block_constants(launch.choose_fwd(n_ids, sizes[-1], dtype)) | asserting
    if not launch.groups_ids(1, sizes, dtype):
        yield _case(lookup_fwd._lookup_fwd_kernel, label, small, shared, types)
    grouped = launch.choose_fwd_grouped(n_ids, sizes, dtype).constants(sizes, PAGE, dtype)
    yield _case(lookup_fwd._lookup_grouped_kernel, label, grouped, shared, types)
    if dtype == torch.float32:
        halved = types | {"out_ptr": "*bf16"}
        yield _case(lookup_fwd._lookup_fwd_kernel, f"{label}-bf16", small, shared, halved)
        yield _case(lookup_fwd._lookup_grouped_kernel, f"{label}-bf16", grouped, shared, halved)
    sort = grouping.constants()
    yield _case(group._group_count_kernel, label, sort | asserting, shared, types)
    yield _case(group._group_place_kernel, label, sort, shared, types)
    composing = compose._constants(sizes, dtype)
    yield _case(compose._compose_kernel, label, composing, shared, types)
    yield _case(compose._compose_bwd_kernel, label, composing, shared, types)


def _resize_cases(label, sizes, dtype, row, n_ids, index, action):
    take, give = action != "free", action != "insert"
    scan = {**launch.choose_scan(len(sizes)), "num_stages": 2, "enable_fp_fusion": True}
    shared = {
        **launch.kernel_constants(sizes, PAGE, dtype),
        "N_LEVELS": len(sizes),
        "LEVELS": scan["LEVELS"],
        "TAKE": take,
        "GIVE": give,
        "MASKED": action == "promote",
        "HOP": int(take and give),
        "NOBODY": resize.NOBODY,
        # Gradient and Adam's moments, and one more; the step that last touched an id.
        "FRESH": (0.0, 0.0, 0.0, 0.5) if take else (),
        "FRESH_ID": (0.0,) if take else (),
    }
    types = {
        "ids_ptr": "*i64",
        "mask_ptr": "*u8",
        "row_start_ptr": index,
        "page_level_ptr": "*i8",
        "owner_ptr": "*i32",
        "plan_ptr": "*i64",
        "moved_ptr": "*u8",
        "free_pages_ptr": "*i32",
        "free_count_ptr": "*i64",
        "free_base_ptr": "*i64",
        "storage_ptr": row,
        "chain_ptr": row,
        "per_id_ptr": "*i32",
        **{f"state{i}_ptr": "*fp32" for i in range(4)},
        **dict.fromkeys(("n_ids", "n_rows", "target"), "i32"),
    }
    for column in ("group", "first", "rank", "old_start", "new_start", "free_rows"):
        types[f"{column}_ptr"] = index
    claim = {**scan, "BLOCK_IDS": resize.CLAIM_IDS, "num_warps": 4}
    move = launch.block_constants(launch.choose_promote(n_ids, sizes[-1], dtype))
    move["maxnreg"] = resize.MOVE_REGISTERS
    for kernel, config in (
        (resize._claim_kernel, claim),
        (resize._scan_kernel, scan),
        (resize._move_kernel, move),
    ):
        used = {n: t for n, t in types.items() if n in kernel.arg_names}
        yield _case(kernel, label, config, shared, used)


def _backward_cases(label, sizes, dtype, row, n_ids, index):
    config = launch.choose_bwd(n_ids, sizes, dtype)
    capacity = 1 << 24 if index == "*i32" else 1 << 33
    layout = runs.key_layout(capacity, sizes, PAGE)
    key = "*i32" if layout[3] else "*i64"
    known = launch.kernel_constants(sizes, PAGE, dtype)
    known.update(N_LEVELS=len(sizes), KEY=layout, PADS=tuple(launch.pad(d) for d in sizes))
    found = {"key_ptr": key, "count_ptr": "*i32", "n_ids": "i32"}
    places = {"ids_ptr": "*i64", "row_start_ptr": index, "page_level_ptr": "*i8", "n_rows": "i32"}
    yield _case(runs._key_kernel, label, launch.SCAN, known, {**found, **places})
    yield _case(runs._run_count_kernel, label, launch.SCAN, known, found)
    where = {
        "ids_ptr": "*i64",
        "key_ptr": key,
        "order_ptr": "*i64",
        "run_begin_ptr": "*i32",
        "run_start_ptr": index,
        "run_first_ptr": "*i32",
        "level_begin_ptr": "*i32",
        "grad_out_ptr": row,
    }
    yield _case(runs._run_begin_kernel, label, launch.SCAN, known, {**found, **where})
    hot, stretch = config.walk[2:]
    small = {"num_warps": 4, "enable_fp_fusion": True}
    blocks = {**config.chain.blocks, "HOT": hot, "STRETCH": stretch, **small}
    hot_types = {**where, "hot_ptr": "*fp32", "n_ids": "i32"}
    yield _case(runs._hot_kernel, label, blocks, known, hot_types)
    tables = {
        "hot_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "composed_ptr": "*fp32",
        "partial_ptr": "*fp32",
        "grad_composed_ptr": "*fp32",
        "storage_ptr": row,
        "target_ptr": row,
        "moment_ptr": "*fp32",
        "square_ptr": "*fp32",
        "clock_ptr": "*fp64",
        "lr_ptr": "*fp64",
        "n_programs": "i32",
    }
    yield _case(chain_grad._chain_sum_kernel, label, blocks, known, {**where, **tables})
    yield _case(
        chain_grad._chain_kernel, label, config.chain.constants(), known, {**where, **tables}
    )
    # Rules differ in what follows the products: all for one layout of either kind, two elsewhere.
    full = label in ("paper-fp32-i32", "wide-fp32-i32")
    for rule in ("gradient", *RULES) if full else ("gradient", "adam"):
        known["RULE"] = (rule, 0.9, 0.999, -0.152, -0.00144, 1e-8)
        tables["per_id_ptr"] = "*i32" if rule == "adam" else "*fp32"
        for kernel, choice in (
            (lookup_bwd._sums_kernel, config.sums),
            (lookup_bwd._rows_kernel, config.rows),
        ):
            types = {**where, **tables}
            yield _case(kernel, f"{label}-{rule}", choice.constants(), known, types)


def _case(kernel, label, config, shared, types):
    blocks = dict(config) if isinstance(config, dict) else launch.block_constants(config)
    names = ("num_warps", "num_stages", "enable_fp_fusion", "debug", "sanitize_overflow", "maxnreg")
    options = {name: blocks.pop(name) for name in names if name in blocks}
    known = {**shared, **blocks}
    types = {name: types[name] for name in kernel.arg_names if name in types}
    constants = {name: known[name] for name in kernel.arg_names if name not in types}
    tile = "x".join(
        str(constants[name]) for name in blocks if name in constants and "BLOCK" in name
    )
    return {
        "name": f"{kernel.__name__}[{label}-{tile}-w{options['num_warps']}]",
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
