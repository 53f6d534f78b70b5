"""Launch choices as pure functions of shapes and dtypes: nothing here looks at a device.

The tiles are the largest that compile for sm_80, sm_90 and sm_100 without spilling (a test holds
that for every kernel); the reasons stand beside the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LaunchConfig", "choose_bwd_chain", "choose_bwd_rows", "choose_fwd", "choose_promote"]


@dataclass(frozen=True)
class LaunchConfig:
    """One kernel's tile and warps; ``splits``: number of partial sums (chain gradient only)."""

    block_rows: int
    block_k: int
    block_dim: int
    num_warps: int
    num_stages: int = 2
    splits: int = 1


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _block_dim(dim: int, limit: int) -> int:
    return min(max(_next_power_of_2(dim), 16), limit)


def choose_fwd(n_ids: int, dim: int, dtype: torch.dtype) -> LaunchConfig:
    """Tiles of ids by tiles of output columns."""
    if dtype == torch.float64:
        return LaunchConfig(16, 16, _block_dim(dim, 64), 4)
    # Small batches get small tiles: 500 ids fill 32 programs rather than 8. The larger tile spills
    # with 4 warps (255 registers at tf32x3), not with 8.
    if n_ids <= 4096:
        return LaunchConfig(16, 32, _block_dim(dim, 128), 4)
    return LaunchConfig(32, 32, _block_dim(dim, 128), 8)


def choose_bwd_rows(n_ids: int, dim: int, dtype: torch.dtype) -> LaunchConfig:
    """Tiles of sorted occurrences; one tile of columns holds the default ``d_n`` whole."""
    if dtype == torch.float64:
        return LaunchConfig(16, 16, _block_dim(dim, 64), 4)
    return LaunchConfig(16, 32, _block_dim(dim, 128), 4)


def choose_bwd_chain(n_ids: int, dim: int, dtype: torch.dtype) -> LaunchConfig:
    """At most 128 partial sums: about one program per multiprocessor for every block of K."""
    if dtype == torch.float64:
        return LaunchConfig(16, 16, _block_dim(dim, 64), 4, splits=_splits(n_ids, 16))
    return LaunchConfig(32, 32, _block_dim(dim, 128), 4, splits=_splits(n_ids, 32))


def _splits(n_ids: int, block_rows: int) -> int:
    return min(max(-(-n_ids // block_rows), 1), 128)


def choose_promote(n_ids: int, dim: int, dtype: torch.dtype) -> LaunchConfig:
    """Rows are few and every hop has its own shape: one modest tile for all."""
    return LaunchConfig(16, 16 if dtype == torch.float64 else 32, _block_dim(dim, 64), 4)
