"""Numbers move to other memory; the system takes the pages of the old back as they go.

Where something else holds the old memory it stays whole: a state dict, ``detach()``, ``.data``, a
slice, an array of numpy. All of these count as holders of torch's storage; what does not say how
many it has, or belongs to others (an array that a tensor was made of, a file), is only copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.backend import manages_memory, native
from .followers import Follower

__all__ = [
    "is_alone",
    "is_followed_alone",
    "move_into",
    "replace_follower",
    "replace_parameter",
    "run_all",
]

_LEAST = 64 << 20
"""Bytes from which on memory is worth giving back in pieces."""

_ATTEMPTS = 8
"""How often something may be raised while an arena is in pieces."""

_count_holders: Any = getattr(torch._C, "_storage_Use_Count", None)


def _holders(tensor: Tensor) -> tuple[int, int]:
    """References to the storage of ``tensor``, torch's and Python's; this function's among them."""
    storage = tensor.untyped_storage()
    return _count_holders(storage._cdata), sys.getrefcount(storage)


def _references(follower: Follower) -> tuple[int, int, int, int]:
    """References to the tensor of ``follower``, torch's and Python's, and to its storage."""
    tensor: Any = follower.tensor
    return tensor._use_count(), sys.getrefcount(tensor), *_holders(tensor)


def is_alone(tensor: Tensor, views: int = 0) -> bool:
    """Whether ``tensor`` and so many views of it, all of them tensors, alone hold its memory."""
    if _count_holders is None:
        return False
    # What the same references are of a tensor that is known to be alone.
    lone = torch.empty(1, device="cpu")
    kept = [lone[:] for _ in range(views)]
    return _holders(tensor) == _holders(lone) and len(kept) == views


def is_followed_alone(follower: Follower) -> bool:
    """Whether an optimizer's state alone holds the tensor of ``follower``, and that its memory."""
    if _count_holders is None:
        return False
    state = {"": torch.empty(1, device="cpu")}
    return _references(follower) == _references(Follower("", state[""], 0.0, lambda _: None))


def move_into(new: Tensor, old: Tensor, *data: Tensor, alone: bool) -> bool:
    """Copy ``old`` to ``new``, as far as both go.

    Args:
        data: what ``old.data`` becomes, in turn, where the memory of ``old`` is lost.
        alone: nothing else holds that memory, which may be lost.

    Returns:
        Whether it was.
    """
    if alone and _gives_back(old, new) and _move(new, old, data):
        return True
    count = min(old.numel(), new.numel())
    new[:count] = old.detach()[:count]
    return False


def replace_parameter(parameter: Tensor, storage: Tensor, data: list[Tensor], moves: bool) -> None:
    """``parameter.data`` becomes each of ``data``; ``storage`` is the last. May be repeated.

    Args:
        moves: the parameter's numbers move to the beginning of ``storage``.
    """
    if moves and move_into(storage, parameter, *data, alone=is_alone(parameter)):
        return
    for tensor in data:
        parameter.data = tensor


def replace_follower(follower: Follower, value: Tensor, moves: bool) -> None:
    """Put ``value`` in the place of the follower's tensor; else as :func:`replace_parameter`."""
    if moves:
        # An inference tensor would not outlive its memory: no view of it could be taken.
        alone = not follower.tensor.is_inference() and is_followed_alone(follower)
        if move_into(value, follower.tensor, value, alone=alone):
            return
    follower.replace(value)


def run_all(steps: list[Callable[[], None]]) -> None:
    """Run ``steps``, the last first, and drop each; each may be repeated.

    Between two of them an arena is in pieces, and copies take long. What a signal's handler raises
    meanwhile (Ctrl-C) is raised in the end.

    Raises:
        BaseException: as raised; where a step fails again and again, at once.
    """
    raised: list[BaseException] = []
    while steps:
        try:
            steps[-1]()
            steps.pop()
        except BaseException as error:
            raised.append(error)
            if len(raised) > _ATTEMPTS:
                raise
    if raised:
        raise raised[0]


def _gives_back(old: Tensor, new: Tensor) -> bool:
    """Whether the memory of ``old`` is the system's, and much."""
    storage = old.untyped_storage()
    return (
        manages_memory()
        and old.is_cpu
        and old.dtype == new.dtype
        and old.nbytes >= _LEAST
        and old.nbytes == storage.nbytes()
        and old.is_contiguous()
        and storage.resizable()  # arrays and files that tensors were made of are not
        and not old.is_pinned()
    )


def _move(new: Tensor, old: Tensor, data: tuple[Tensor, ...]) -> bool:
    """Move; ``old`` takes ``data``. False, and nothing done, where a thread holds ``old``."""
    storage = old.untyped_storage()
    alone, _ = _holders(torch.empty(1, device="cpu"))
    source, target = old.data_ptr(), new.data_ptr()
    counted = _count_holders, storage._cdata, alone
    count = min(old.nbytes, new.nbytes)
    return native.move_memory(*counted, target, source, count, old, *data)
