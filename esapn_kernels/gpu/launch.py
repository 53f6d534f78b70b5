"""Launch choices and compile-time arguments as pure functions of shapes and dtypes.

Nothing here looks at a device. Choices are made once for the same shapes, and shared: what they
hold must not be written to.

Every choice compiles for sm_80, sm_90 and sm_100 without spilling (a test holds that for every
kernel). The reasons stand beside the numbers: counts of bytes, products and registers, as Triton
3.7.1 takes them for sm_90 where nothing else is said. None has been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from ..ops.backend import tl

__all__ = [
    "FwdConfig",
    "GroupConfig",
    "GroupedConfig",
    "LaunchConfig",
    "alignments",
    "block_constants",
    "cdiv",
    "choose_bwd",
    "choose_compose",
    "choose_few_runs",
    "choose_fwd",
    "choose_fwd_grouped",
    "choose_group",
    "choose_promote",
    "choose_row_step",
    "choose_scan",
    "groups_ids",
    "kernel_constants",
]


@dataclass(frozen=True)
class LaunchConfig:
    """One kernel's tile and warps."""

    block_rows: int
    block_k: int
    block_dim: int
    num_warps: int
    num_stages: int = 2


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _block_dim(dim: int, limit: int) -> int:
    return min(max(_next_power_of_2(dim), 16), limit)


def _precision(dtype: torch.dtype) -> str:
    """``tf32x3`` keeps fp32 accuracy; plain ``tf32`` only where torch itself is told to use it."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def cdiv(n: int, block: int) -> int:
    """How many blocks hold ``n``. (Triton's own, called on the host, takes 2 us.)"""
    return -(-n // block)


def kernel_constants(sizes: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Any]:
    """Compile-time arguments that the kernels of this package share."""
    return _kernel_constants(sizes, dtype, _precision(dtype))


@lru_cache
def _kernel_constants(
    sizes: tuple[int, ...], dtype: torch.dtype, precision: str
) -> Mapping[str, Any]:
    return {
        "SIZES": sizes,
        "DIM": sizes[-1],
        "ACC": accumulator(dtype),
        "PRECISION": precision,
    }


@lru_cache
def block_constants(config: LaunchConfig) -> Mapping[str, Any]:
    """Tile sizes and launch options as keyword arguments of a launch.

    ``enable_fp_fusion`` is explicit because Triton's default is about to change.
    """
    return {
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_K": config.block_k,
        "BLOCK_DIM": config.block_dim,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


@dataclass(frozen=True)
class PassConfig:
    """One pass over tiles of runs: its programs, tile sizes and warps."""

    programs: int
    blocks: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    maxnreg: int | None = None

    @cached_property
    def constants(self) -> Mapping[str, Any]:
        """As keyword arguments of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return {**self.blocks, **options, "enable_fp_fusion": True}


@dataclass(frozen=True)
class BwdConfig:
    """The gradient's passes.

    ``walk``: of a run the first occurrence and 32 more are summed beside those of the tile's other
    runs, 4 at a time, or 2; what is left in pieces of 32, whole stretches of 256 positions before.
    """

    sums: PassConfig
    chain: PassConfig
    rows: PassConfig
    walk: tuple[int, int, int, int]


SCAN = {"BLOCK": 1024, "num_warps": 8, "enable_fp_fusion": True}
"""Launches over positions, a number or two each: four to a thread, eight would spill on sm_80."""

_FEW = (
    {"LOG_BLOCK": 10, "num_warps": 8, "maxnreg": 128, "enable_fp_fusion": True},
    {"LOG_BLOCK": 11, "num_warps": 16, "maxnreg": 128, "enable_fp_fusion": True},
)


def choose_few_runs(n_ids: int) -> Mapping[str, Any] | None:
    """Constants and options of the one program that sorts a small batch; None for a larger one.

    A bitonic network, 55 steps for 1,024 keys of 8 bytes and 66 for 2,048, in place of the radix
    sort's launches and three more. 4,096 keys would spill. One position must be left.
    """
    return _FEW[0] if n_ids < 1024 else _FEW[1] if n_ids < 2048 else None


def pad(dim: int) -> int:
    """The power of two, at least 16, that holds ``dim`` columns."""
    return max(_next_power_of_2(dim), 16)


@lru_cache
def pads(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """:func:`pad` of every size."""
    return tuple(pad(d) for d in sizes)


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's type of sums and products: fp32, fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@lru_cache
def choose_bwd(
    n_ids: int,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    rule: str = "gradient",
    far: bool = False,
) -> BwdConfig:
    """Tiles of 16 runs for the sums: few lanes wait for the longest.

    168 registers a thread leave room for three blocks of four warps a multiprocessor. Without the
    bound the compiler takes 201 for the rows' products and 96, spilling, for the sums; 128 spills a
    few bytes in some rules. In fp64 the rows' products take 8 warps; rules with moments spill under
    any bound, the others do without one (Triton 3.6). The sums and the chain's take up to 196.
    Sums of more than 128 columns, which go in blocks, would spill too.

    Stages: at five the chain's pass waits with four groups of copies on their way; at two it waits
    for all of them in every tile. The rows' keep all four column steps in flight, of 32 runs where
    registers allow: that also reads the maps half as often. Row-wise Adagrad, Adam in 16 bits and
    rows of more than one block of columns hold more per row: 32 would spill.

    Every program takes an equal share of the tiles. Those of the chain's gradient write up to
    ``(d_{n-2} + 1) D`` partial sums each (33 KB in the default sizes): at most 512 of them, and
    eight tiles each where there are enough, keep that under a tenth of the gradient's bytes. Up to
    512 ids a program takes a whole level, 32 tiles at most, and no launch adds partial sums.

    ``far``: row starts take 8 bytes.
    """
    wide = dtype == torch.float64
    block_dim = _block_dim(sizes[-1], 64 if wide else 128)
    block_k = 32 if wide else 64
    half = min(block_dim, 32 if wide else 64)
    tiles = -(-n_ids // 16) + len(sizes)
    whole = n_ids <= 512
    few = max(len(sizes) - 1, 1) if whole else min(tiles, max(264, min(tiles // 8, 512)))
    lean = rule in ("gradient", "collect", "sgd", "adagrad")
    many = lean or (rule == "adam" and dtype == torch.float32)
    many &= not wide and max(sizes[:-1], default=0) <= block_k
    # Four masked or unaligned rows a lane would spill, and so would either Adam's with far starts.
    lanes = 2 if block_dim != sizes[-1] or (far and rule.endswith("adam")) else 4
    walk = (32, lanes, 256, 32)
    sums = {"WALK": walk, "BLOCK_ROWS": 16, "BLOCK_DIM": block_dim}
    chain = {"WHOLE": whole, "BLOCK_ROWS": 16, "BLOCK_K": block_k, "BLOCK_DIM": half}
    rows = {
        "BLOCK_ROWS": 32 if many else 16,
        "BLOCK_K": block_k,
        "BLOCK_N": min(block_dim, 32),
    }
    return BwdConfig(
        PassConfig(min(tiles, 4096), sums, 4, maxnreg=224 if wide or sizes[-1] > 128 else 168),
        PassConfig(few, chain, 4, num_stages=5, maxnreg=224 if wide else 168),
        PassConfig(min(tiles, 4096), rows, 8, num_stages=3, maxnreg=128 if lean else None)
        if wide
        else PassConfig(min(tiles, 4096), rows, 4, num_stages=6, maxnreg=168),
        walk,
    )


@lru_cache
def choose_row_step(sizes: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Any]:
    """Tiles of 16 rows by 32 columns: of a row, its gradient and its state 4 numbers a thread each.

    With 64 columns Adam would spill under this bound. Without a bound the assembler spills 8 bytes
    in one of the rules.
    """
    columns = _block_dim(sizes[-1], 16 if dtype == torch.float64 else 32)
    options = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
    return {"BLOCK_ROWS": 16, "BLOCK_D": columns, **options}


@lru_cache
def alignments(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Per level, the largest power of two that divides the start of each of its rows.

    Rows stand ``d`` apart from the start of a page, whose length is a power of two, d at least.
    Four fp32 or eight 16-bit numbers then move as one vector of 16 bytes.

    >>> alignments((2, 3, 12, 128))
    (2, 1, 4, 128)
    """
    return tuple(d & -d for d in sizes)


@dataclass(frozen=True)
class FwdConfig:
    """Tiles of ids by output columns; sizes go in steps of ``block_k``."""

    block_rows: int
    block_k: int
    block_dim: int
    num_warps: int

    def constants(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Any]:
        """As keyword arguments of a launch."""
        return _forward_constants(self, sizes, dtype, _precision(dtype))


@lru_cache
def _forward_constants(
    config: FwdConfig, sizes: tuple[int, ...], dtype: torch.dtype, precision: str
) -> Mapping[str, Any]:
    return {
        "SIZES": sizes,
        "ALIGN": alignments(sizes),
        "PADDED": tuple(min(pad(d), config.block_k) for d in sizes),
        "DIM": sizes[-1],
        "ACC": accumulator(dtype),
        "PRECISION": precision,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_DIM": config.block_dim,
        "num_warps": config.num_warps,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


@dataclass(frozen=True)
class GroupedConfig(FwdConfig):
    """Tiles of rows of one size, for ``programs`` that stay."""

    programs: int
    maxnreg: int | None = None

    def constants(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Any]:
        """As keyword arguments of a launch."""
        bound = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {**super().constants(sizes, dtype), **bound}


@lru_cache
def choose_fwd(dim: int, dtype: torch.dtype) -> FwdConfig:
    """Tiles of ids by tiles of output columns."""
    if dtype == torch.float64:
        return FwdConfig(16, 16, _block_dim(dim, 64), 4)
    # Small tiles, for small batches: 500 ids fill 32 programs rather than 8. 128 registers.
    block_dim = _block_dim(dim, 128)
    return FwdConfig(16, 32, block_dim, 8 if block_dim == 128 else 4)


@lru_cache
def choose_promote(dim: int, dtype: torch.dtype, down: bool = False) -> LaunchConfig:
    """Rows are few and every hop has its own shape: one modest tile for all.

    Tiles 64 columns wide spill beside the fills of four states, and so do 32 of fp64 on the way
    down.
    """
    if dtype == torch.float64:
        return LaunchConfig(16, 16, _block_dim(dim, 16 if down else 32), 4)
    return LaunchConfig(16, 32, _block_dim(dim, 32), 4)


@lru_cache
def choose_scan(n_levels: int) -> Mapping[str, int]:
    """Constants and options of the one program that ranks rows.

    Its steps follow one another, so long ones: 512 threads, 4 positions each (8 spill), that share
    all registers.
    """
    levels = max(_next_power_of_2(n_levels), 2)
    return {"LEVELS": levels, "BLOCK_IDS": 2048, "num_warps": 16, "maxnreg": 128}


@lru_cache
def choose_compose(dim: int, dtype: torch.dtype) -> LaunchConfig:
    """Latency decides: narrow blocks of columns for many programs, long steps for few of them."""
    if dtype == torch.float64:
        return LaunchConfig(16, 16, 16, 4)
    return LaunchConfig(32, 64, 16, 4)


@dataclass(frozen=True)
class GroupConfig:
    """Counting sort: ``programs`` that each take ``stretch`` ids, ``levels`` padded one-hots."""

    programs: int
    stretch: int
    levels: int
    block_rows: int
    block_counts: int
    num_warps: int = 4

    def constants(self) -> dict[str, Any]:
        """As keyword arguments of a launch."""
        return {
            "L": self.levels,
            "BLOCK_ROWS": self.block_rows,
            "num_warps": self.num_warps,
            "enable_fp_fusion": True,
        }


@lru_cache
def choose_group(n_ids: int, n_levels: int) -> GroupConfig:
    """At most 512 programs: every one reads the counts of all (16 KB for six levels).

    A tile holds 4,096 one-hot numbers, 32 registers a thread; its level count is padded to hold
    ids that have no row, and the end.
    """
    levels = _next_power_of_2(n_levels + 2)
    block_rows = max(min(512, 4096 // levels), 16)
    tiles = max(-(-n_ids // block_rows), 1)
    stretch = -(-tiles // 512) * block_rows
    programs = max(-(-n_ids // stretch), 1)
    return GroupConfig(programs, stretch, levels, block_rows, max(min(512, 2048 // levels), 1))


@lru_cache
def choose_fwd_grouped(n_ids: int, sizes: tuple[int, ...], dtype: torch.dtype) -> GroupedConfig:
    """Tiles of 32 rows and 8 warps, bound to 128 registers: two programs share a multiprocessor.

    Left to themselves Triton 3.6 and 3.9 take 156 and 161. Sizes above 64 that are carried to more
    than 128 would spill. In fp64 the assembler of Triton 3.9 spills 8 bytes at 80 registers, unless
    it is told of more.

    With 4 warps the same tile takes 255 registers, with 64 rows it spills on sm_100. 2,048 programs
    are 7 to 10 waves on 108 to 148 multiprocessors: the last one is not worth asking the device for
    its size. Every level may end in a tile that is not full, and so may the ids without a row.
    """
    registers: int | None
    if dtype == torch.float64:
        block_rows, block_k, block_dim, num_warps = 16, 16, _block_dim(sizes[-1], 64), 4
        registers = 168
    else:
        block_rows, block_k, block_dim, num_warps = 32, 32, _block_dim(sizes[-1], 128), 8
        registers = 128 if sizes[-1] <= 128 else None
    tiles = -(-n_ids // block_rows) + len(sizes)
    return GroupedConfig(block_rows, block_k, block_dim, num_warps, min(tiles, 2048), registers)


def groups_ids(n_ids: int, sizes: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a forward groups ids by level first: more than 8,192, by latencies of memory.

    Computed for an H100 from what ``bench/static.py`` counts, 0.35 us a round trip. Ungrouped, two
    blocks a multiprocessor take 4,224 ids at once and 11 round trips, 3.9 us; the next 4,224 follow
    them. Grouped, all ids take three round trips to be counted, three to be placed and three
    for the rows, 3.2 us, and 2 us for each of two launches more: as much as two waves. A row then
    meets its own map only, a sixth of the products where all sizes are equally frequent.

    One size needs no products at all. fp64 always groups: in the ungrouped kernel Triton 3.6 and
    3.7 pick products of 64-bit numbers that sm_80 and sm_90 do not have, and fail to compile.
    """
    return len(sizes) > 1 and (dtype == torch.float64 or n_ids > 8192)
