"""Row sizes that tests of kernels share: a GPU compiles every kernel once for each of them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from esapn_kernels.ops.backend import NATIVE_ERROR

Sizes = tuple[int, ...]

PAPER = (2, 4, 8, 16, 64, 128)
"""Rows that move as vectors of up to 16 bytes."""
ODD = (1, 3, 5, 33)
"""Rows that start anywhere."""
SMALL = (2, 3, 8)
"""Where sizes do not matter."""
TINY = (1, 2, 3)
"""Where they do not and numbers are fp64."""

# One below, at and one above whole blocks of 16, 32, 64 and 128, each between others too: the bias
# row behind a size that fills its blocks falls into a block of its own.
FILLED = [(15, 16, 17, 32), (31, 32, 63, 64), (33, 64, 65, 128), (127, 128, 129, 144)]

NEEDS_NATIVE = pytest.mark.skipif(NATIVE_ERROR is not None, reason=str(NATIVE_ERROR))
HOSTS = ["torch", pytest.param("native", marks=NEEDS_NATIVE)]
"""The backends of CPUs."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

LAYOUTS = [
    *((sizes, dtype) for sizes in (PAPER, ODD) for dtype in DTYPES),
    *(((127, 130), dtype) for dtype in (torch.float32, torch.float64)),
    ((2, 512), torch.float32),
    (TINY, torch.float64),
]
"""Sizes and dtypes. Kernels tile 16-bit rows as fp32, and fp64 otherwise."""


def tiled(shapes: Iterable[Sizes] = FILLED) -> list[tuple[Sizes, torch.dtype]]:
    """Sizes about whole blocks with both dtypes that kernels tile by."""
    return [(sizes, dtype) for sizes in shapes for dtype in (torch.float32, torch.float64)]


def compared(
    kernels: Iterable[tuple[Sizes, torch.dtype]],
) -> list[tuple[Sizes, torch.dtype, str]]:
    """``(sizes, dtype, backend)``: torch and native compile nothing: all sizes in all dtypes."""
    kernels = list(kernels)
    every = [(sizes, dtype) for sizes in dict(kernels) for dtype in DTYPES]
    return [
        *((*pair, backend) for pair in every for backend in ("torch", "native")),
        *((sizes, dtype, "triton") for sizes, dtype in kernels),
    ]


def name(value: object) -> str:
    """``2-3-8`` for sizes, ``float32`` for a dtype: a test's id."""
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value).split(".")[-1]
