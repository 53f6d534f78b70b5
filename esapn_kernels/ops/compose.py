"""Composition of the chain: from ``n - 1`` hops to one affine map for every level.

The chain is affine, so carrying a row of level ``k`` to the last level is one product,

    y = M_k e + c_k,    M_k = W_{n-2} ... W_k,    M_{n-1} = I,    c_{n-1} = 0

with y in R^D and D = d_{n-1}, the largest size. Written row-wise and with the bias as one more
input column that is always 1, hop ``k`` is the block ``T_k = [W_k | b_k]^T`` of shape
``[d_k + 1, d_{k+1}]`` and the composed map is

    A_k = T_k A'_{k+1} + [0; c_{k+1}]      A_k = [M_k | c_k]^T, shape [d_k + 1, D]; A' without c

``composed`` stacks A_0 ... A_{n-2}: K = sum_{k<n-1} (d_k + 1) rows of D numbers, 99 x 128 for the
default sizes. Every kernel reads this one operand: a row of level ``k`` meets the block that begins
at ``chain.operand_offsets(sizes)[k]``.

Both directions are recursions whose columns never meet, so one launch does either, a program per
block of columns:

    A_k = T_k A'_{k+1} + [0; c_{k+1}]                               k = n-2 ... 0, columns of D
    R_{j+1} = dA_{j+1} A'_{k+1}^T + [T_j^T R_j; r_j],  dT_k = R_k  j = 0 ... k,  columns of d_{k+1}

R_j is ``G_j A'_{k+1}^T`` with G_j the gradient of A_j from all hops before it, r_j its last row;
carrying the product in place of G_j leaves no sum across programs. Nothing is summed by atomics.
On a CPU a loop over the hops carries G_j itself.
A bias is added, never multiplied by a 1 among zeros, and rows of zeros take part in no product: a
hop that is not finite spreads no further than through the rows that pass it.

Tails (:mod:`.chain`) are expanded first, and their gradient, columns of ``dT_k``, is gathered last.
The native kernels do both as they go, without the products of the fixed part unless tails are of 16
bits.

Costs ``2 sum (d_k + 1) d_{k+1} D`` FLOP once per weight version (0.4 MFLOP for the default
sizes), against 18,768 FLOP per row of size 2 for the chain itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu import compose as cpu
from ..cpu import native as native_cpu
from ..gpu.compose import launch_compose, launch_compose_bwd
from .backend import NATIVE_ERROR, native, runs_native
from .chain import compute_dtype, full_chain, gather_tails, operand_offsets
from .checks import is_opaque

__all__ = ["ComposedCache", "compose", "compose_bwd", "same_bytes"]


@torch.library.custom_op("esapn_kernels::compose", mutates_args=())
def compose_op(chain: Tensor, sizes: Sequence[int], backend: str) -> Tensor:
    """Composition by a kernel as an opaque operator, for ``torch.compile``."""
    return _compose(chain, sizes, backend)


@compose_op.register_fake
def _(chain, sizes, backend):
    dtype = compute_dtype(chain.dtype)
    return chain.new_empty(operand_offsets(sizes)[-1], sizes[-1], dtype=dtype)


@torch.library.custom_op("esapn_kernels::compose_bwd", mutates_args=())
def compose_bwd_op(
    grad_composed: Tensor, chain: Tensor, composed: Tensor, sizes: Sequence[int], backend: str
) -> Tensor:
    """Its reverse, likewise."""
    return _compose_bwd(grad_composed, chain, composed, sizes, backend)


@compose_bwd_op.register_fake
def _(grad_composed, chain, composed, sizes, backend):
    return torch.empty_like(chain)


def _compose(chain: Tensor, sizes: Sequence[int], backend: str) -> Tensor:
    if runs_native(backend):
        return native_cpu.compose(chain, sizes)
    chain = full_chain(chain.detach(), sizes)
    if backend == "triton":
        return launch_compose(chain.contiguous(), sizes)
    return cpu.compose(chain, sizes)


def _compose_bwd(
    grad_composed: Tensor, chain: Tensor, composed: Tensor, sizes: Sequence[int], backend: str
) -> Tensor:
    if runs_native(backend):
        return native_cpu.compose_bwd(grad_composed, chain, composed, sizes)
    full = full_chain(chain.detach(), sizes)
    if backend == "triton":
        grad = launch_compose_bwd(grad_composed.contiguous(), full.contiguous(), composed, sizes)
    else:
        grad = cpu.compose_bwd(grad_composed, full, composed, sizes)
    return grad if full.numel() == chain.numel() else gather_tails(grad, sizes)


def _is_traced(chain: Tensor, backend: str) -> bool:
    """Whether an operator stands for a kernel; torch calls are traced as they are."""
    return backend in ("triton", "native") and (is_opaque(chain) or torch.jit.is_tracing())


def compose(chain: Tensor, sizes: Sequence[int], *, backend: str = "torch") -> Tensor:
    """Compose the packed chain into one affine map per level; no gradient is recorded.

    Args:
        chain: packed hops, ``[sum_k (d_k + 1) d_{k+1}]``, or tails, ``[sum_k (d_k + 1) (d_{k+1} -
            d_k)]``; any float dtype.
        sizes: increasing sizes ``d_0 < ... < d_{n-1}``.
        backend: ``triton`` for one launch, ``native`` for one call, ``torch`` (and ``reference``)
            for a product per hop.

    Returns:
        ``[K, D]``, fp32 (fp64 for an fp64 chain), blocks ``[M_k | c_k]^T`` one below the other.

    Example:
        >>> compose(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))
        tensor([[1., 2.],
                [3., 4.]])
    """
    if _is_traced(chain, backend):
        return compose_op(chain.detach().contiguous(), sizes, backend)
    return _compose(chain, sizes, backend)


def compose_bwd(
    grad_composed: Tensor,
    chain: Tensor,
    composed: Tensor,
    sizes: Sequence[int],
    *,
    backend: str = "torch",
) -> Tensor:
    """Gradient of the packed chain from that of ``composed``; no gradient is recorded.

    With G_0 = dA_0: ``dT_k = G_k A'_{k+1}^T`` and ``G_{k+1} = dA_{k+1} + T_k^{+T} G_k``.

    Args:
        grad_composed: ``[K, D]``, dtype of ``composed``; may be used as scratch.
        chain, sizes, backend: as for :func:`compose`.
        composed: what :func:`compose` gave for them.

    Returns:
        Shape and dtype of ``chain``.

    Example:
        >>> chain = torch.tensor([2.0, 0.0, 3.0, 0.0])  # 3 (2 x + 0) + 0, all sizes 1
        >>> compose_bwd(torch.tensor([[1.0], [0.0], [0.0], [0.0]]), chain,
        ...             compose(chain, (1, 1, 1)), (1, 1, 1))
        tensor([3., 0., 2., 0.])
    """
    if _is_traced(chain, backend):
        operands = (grad_composed.contiguous(), chain.detach().contiguous(), composed, sizes)
        return compose_bwd_op(*operands, backend)
    return _compose_bwd(grad_composed, chain, composed, sizes, backend)


class ComposedCache:
    """:func:`compose` of the chain last seen, kept where a look at the chain is cheap: on a CPU.

    The chain's numbers are compared, which takes far less than to compose them (see
    ``bench/overhead.py``): its version counter would miss what is written through ``chain.data``.
    A copy of the cache is empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[str, Sequence[int], Tensor, Tensor] | None = None

    def __call__(self, chain: Tensor, sizes: Sequence[int], backend: str = "torch") -> Tensor:
        """``compose(chain, sizes)``, not to be written to; chain on a CPU, in plain eager code."""
        if self._kept is not None:
            kept_backend, kept_sizes, seen, composed = self._kept
            if kept_backend == backend and kept_sizes == sizes and same_bytes(seen, chain):
                return composed
        if torch.is_inference_mode_enabled():
            # What it made could not be saved for a backward outside of it.
            with torch.inference_mode(False):
                return self._renew(chain, sizes, backend)
        return self._renew(chain, sizes, backend)

    def _renew(self, chain: Tensor, sizes: Sequence[int], backend: str) -> Tensor:
        # What is composed is what is compared, should another thread write to the chain.
        seen = chain.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        composed = compose(seen, sizes, backend=backend)
        self._kept = backend, sizes, seen, composed
        return composed

    def bytes(self) -> int:
        """Bytes of what is kept."""
        return 0 if self._kept is None else sum(tensor.nbytes for tensor in self._kept[2:])

    def __reduce__(self) -> tuple[type[ComposedCache], tuple[()]]:
        return ComposedCache, ()


def same_bytes(seen: Tensor, chain: Tensor) -> bool:
    """Whether a contiguous copy of a chain still has its numbers; both on a CPU."""
    if seen.dtype != chain.dtype or seen.numel() != chain.numel():
        return False
    if NATIVE_ERROR is None and chain.is_contiguous() and not chain.is_neg():
        return native.equal_bytes(seen.data_ptr(), chain.data_ptr(), seen.nbytes)
    # As integers: a number that is none differs from itself.
    present = chain.detach().resolve_neg().contiguous()
    return torch.equal(seen.view(torch.uint8), present.view(torch.uint8))
