"""Arguments of the modules: what they stand for, and which are refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops.layout import chunks

__all__ = [
    "check_floating",
    "check_mask",
    "check_sizes",
    "count_from_front",
    "default_sizes",
    "initial_level",
    "level_of",
]

_SIZES = (2, 4, 8, 16, 64, 128)
# A page says its level in an int8.
_MOST = 128


def default_sizes(embedding_dim: int | None) -> Sequence[int]:
    """The paper's sizes; where ``embedding_dim`` is given, those below it and itself.

    >>> default_sizes(None), default_sizes(10)
    ((2, 4, 8, 16, 64, 128), (2, 4, 8, 10))
    """
    if embedding_dim is None:
        return _SIZES
    return (*(d for d in _SIZES if d < embedding_dim), embedding_dim)


def check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """``sizes`` as a tuple.

    Raises:
        ValueError: they are not strictly increasing positive integers, or more than 128.
    """
    sizes = tuple(sizes)
    whole = all(isinstance(d, int) and not isinstance(d, bool) for d in sizes)
    if sizes == (0,):
        return sizes  # torch's class takes rows without numbers, too
    if not sizes or not whole or sizes[0] < 1:
        raise ValueError(f"sizes must be positive integers, got {list(sizes)}")
    if any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"sizes must be strictly increasing, got {list(sizes)}")
    if len(sizes) > _MOST:
        raise ValueError(f"there may be at most {_MOST} sizes, got {len(sizes)}")
    return sizes


def level_of(size: int, sizes: tuple[int, ...]) -> int:
    """The level of a size.

    Raises:
        ValueError: ``size`` is not among ``sizes``.
    """
    if size not in sizes:
        raise ValueError(f"size must be one of {list(sizes)}, got {size}")
    return sizes.index(size)


def initial_level(
    size: int | Tensor | None, sizes: tuple[int, ...], num_rows: int, padding_idx: int | None
) -> int | Tensor:
    """The level of every row at the start: one for all, or int8 ``[N]`` on the CPU.

    Args:
        size: of every row, one for all or an integer tensor ``[N]``; ``None``: the smallest.
        sizes: the candidates.
        num_rows: ``N``.
        padding_idx: this row is of the largest size.

    Raises:
        ValueError: a size that is not among ``sizes``, a tensor of another shape.

    Example:
        >>> initial_level(4, (2, 4), 3, None), initial_level(None, (2, 4), 3, 1).tolist()
        (1, [0, 1, 0])
    """
    level: int | Tensor
    if size is None:
        level = 0
    elif not isinstance(size, Tensor):
        level = level_of(size, sizes)
    else:
        if size.shape != (num_rows,):
            raise ValueError(
                f"initial_size must be one size or [{num_rows}] sizes, got shape {list(size.shape)}"
            )
        known = torch.tensor(sizes, device="cpu")
        level = torch.empty(num_rows, dtype=torch.int8, device="cpu")
        for part in chunks(num_rows):
            wanted = size[part].cpu().contiguous()
            found = torch.searchsorted(known, wanted).clamp(max=len(sizes) - 1)
            if not torch.equal(known[found], wanted.to(known.dtype)):
                raise ValueError(f"initial_size holds sizes that are not among {list(sizes)}")
            level[part] = found
    if padding_idx is not None and len(sizes) > 1:
        if not isinstance(level, Tensor):
            level = torch.full((num_rows,), level, dtype=torch.int8, device="cpu")
        level[padding_idx] = len(sizes) - 1
    return level


def count_from_front(padding_idx: int | None, num_rows: int, refusal: str) -> int | None:
    """``padding_idx`` counted from the front.

    Raises:
        AssertionError: it is out of range; ``refusal`` says so.

    >>> count_from_front(-1, 10, "out of range")
    9
    """
    if padding_idx is None:
        return None
    if not -num_rows <= padding_idx < num_rows:
        raise AssertionError(refusal)
    return padding_idx % num_rows


def check_floating(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that rows of several sizes cannot have.

    Raises:
        RuntimeError: none of fp32, bf16, fp16, fp64; ``None`` is the default dtype.
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise RuntimeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")


def check_mask(mask: Tensor, ids: Tensor) -> None:
    """Refuse what is no mask of ``ids``.

    Raises:
        TypeError: no tensor.
        ValueError: not bool, or of another shape than ``ids``.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of shape {list(ids.shape)}, "
            f"got {mask.dtype} of shape {list(mask.shape)}"
        )
