"""Averages of models whose rows grow: EMA and SWA by ``torch.optim.swa_utils``.

torch averages element by element. In a table of several sizes an element is another row's as soon
as rows have grown, so an average of such a model first takes the sizes and the places that the
model's rows have (:func:`match_rows`), and only then are numbers averaged, by torch's own code.

    e_avg <- W_k e_avg + b_k              where a row has grown: the hops are those of the average
    e_avg <- e                            where it has shrunk
    e_avg <- decay e_avg + (1 - decay) e  as for every other row
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import swa_utils

from .module import ResizableEmbedding
from .ops.chain import is_tails
from .storage.arena import Arena

__all__ = ["AveragedModel", "match_rows"]


class AveragedModel(swa_utils.AveragedModel):
    """``torch.optim.swa_utils.AveragedModel`` of a model whose rows grow.

    The same arguments, state dict and calls: ``get_ema_multi_avg_fn`` and its like go in,
    ``update_bn`` takes it. A model without rows of several sizes is averaged as by torch's, bit
    for bit.

    Args:
        model: what is averaged; bags, collections and tables that occur twice as well.
        device: where the average lies; default: with the model.
        avg_fn, multi_avg_fn: the rule, of one tensor or of lists of them; default: equal weights.
        use_buffers: buffers are averaged too, those that say where rows lie excepted.

    Notes:
        A row that has grown since the last update is carried up by the average's own hops, which
        leaves the average's output as it is, and is then averaged as any other. With hops that
        are not trained (``chain.requires_grad_(False)``, as goes with ``init="padded"``) the
        output of the average is the average of the outputs; with hops that are, it is that of the
        averaged rows and hops, as of every layer that torch averages.

        A row that is shorter in the model than in the average, after a demotion or a checkpoint,
        begins anew with the model's numbers, and so does one that the average has not. An id that
        lost its row loses its average; if it got a row again before the next update, nothing was
        seen of it, and the average goes on.

    Example:
        >>> import torch
        >>> from torch.optim.swa_utils import get_ema_multi_avg_fn
        >>> emb = ResizableEmbedding(1000, sizes=(2, 4, 8))
        >>> average = AveragedModel(emb, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        >>> average.update_parameters(emb)
        >>> emb.promote(torch.tensor([3, 7])).tolist()
        [True, True]
        >>> average.update_parameters(emb)
        >>> average.module.sizes_of(torch.tensor([3, 7, 8])).tolist()
        [4, 4, 2]
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Match the rows, see :func:`match_rows`, and average as torch does.

        Raises:
            ValueError, RuntimeError: as :func:`match_rows`; nothing is changed.
        """
        match_rows(self.module, model)
        own: Any = _Numbers(self)
        own.module = _Numbers(self.module)
        swa_utils.AveragedModel.update_parameters(own, _Numbers(model))  # type: ignore[arg-type]


class _Numbers:
    """A model as torch's ``update_parameters`` takes one, without the places of rows.

    These are equal already. Averages of integers are rounded, and a copy of what is there would
    have the average check its locations at the next lookup.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def buffers(self) -> Iterator[Tensor]:
        places = {id(t) for m in self._model.modules() if isinstance(m, Arena) for t in m.places}
        return (buffer for buffer in self._model.buffers() if id(buffer) not in places)


def match_rows(averaged: nn.Module, model: nn.Module) -> None:
    """Give every row of ``averaged`` the size and the place that it has in ``model``.

    For averaging loops of one's own, which may add element to element after it. Grown rows are
    carried up, shorter or missing ones take the model's numbers: see :class:`AveragedModel`. While
    no row of the model moves it costs a comparison of two objects per table.

    Args:
        averaged: a copy of ``model``, made whenever; what is changed.
        model: its tables are those of ``averaged``, in the same order. One may be wrapped, as by
            ``DistributedDataParallel``.

    Raises:
        ValueError: other tables; nothing is changed.
        RuntimeError: rows of ``averaged`` would have to move that cannot: in shared memory,
            parametrized or pruned, beyond ``max_elements``; or rows are mixed in one of the two,
            because they moved while element was added to element. Nothing is changed.

    Example:
        >>> import copy, torch
        >>> emb = ResizableEmbedding(10, sizes=(2, 4))
        >>> shadow = copy.deepcopy(emb).requires_grad_(False)
        >>> emb.promote(torch.tensor([3])).tolist()
        [True]
        >>> match_rows(shadow, emb)
        >>> for own, new in zip(shadow.parameters(), emb.parameters()):
        ...     _ = own.lerp_(new.detach(), 0.01)
        >>> shadow.sizes_of(torch.tensor([2, 3])).tolist()
        [2, 4]
    """
    pairs = list(_pairs(averaged, model))
    moved = [(own, rows, other) for own, rows, other in pairs if not rows.lies_as(other)]
    for _, rows, other in moved:
        rows.refuse_matching(other)
    for own, rows, other in moved:
        rows.match(other, own.chain)


def _pairs(
    averaged: nn.Module, model: nn.Module
) -> Iterator[tuple[ResizableEmbedding, Arena, Arena]]:
    """The tables of several sizes, each with its rows in both models."""
    # By their order, as torch pairs parameters: names differ where one of the two is wrapped.
    mine, theirs = (
        [(name, m) for name, m in whole.named_modules() if isinstance(m, ResizableEmbedding)]
        for whole in (averaged, model)
    )
    if len(mine) != len(theirs):
        raise ValueError(f"the average has {len(mine)} tables, and the model {len(theirs)}")
    for (name, own), (_, other) in zip(mine, theirs, strict=True):
        kinds = _kind(own), _kind(other)
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"table {name!r} of the average has {kinds[0]}, that of the model {kinds[1]}"
            )
        rows, others = own.arena, other.arena
        if isinstance(rows, Arena) and isinstance(others, Arena) and not rows.storage.is_meta:
            yield own, rows, others


def _kind(table: ResizableEmbedding) -> str:
    """What must be equal of a table and its average."""
    rows = table.arena
    if not isinstance(rows, Arena):
        return "one size"
    computed = "" if "storage" in rows._parameters else ", computed"
    meta = ", on the meta device" if rows.storage.is_meta else ""
    tails = ", tails" if is_tails(table.chain, rows.sizes) else ""
    return f"{rows.num_rows} rows of the sizes {rows.sizes}{tails}{computed}{meta}"
