"""Ids that are no plain tensor: nested ones, and those of a graph that ``torch.fx`` traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_leaf", "look_up_nested"]


def as_leaf(module: nn.Module, *inputs: Any) -> Any:
    """``module(*inputs)`` as one node of the graph that ``torch.fx`` traces, as of torch's own.

    Args:
        module: a module of the model that is traced.
        inputs: what it is called with; the first is an ``fx.Proxy``.

    Raises:
        TypeError: ``module`` is itself what is traced.
    """
    tracer: Any = inputs[0].tracer
    if tracer.root is module:
        raise TypeError(
            f"torch.fx does not trace {type(module).__name__} itself: trace a module that holds it"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})


def look_up_nested(ids: Any, outputs: Callable[[Tensor], Tensor]) -> Tensor:
    """The outputs of nested ids, nested alike.

    Args:
        ids: a nested tensor, jagged or strided.
        outputs: the lookup, ``[R]`` to ``[R, D]``, or other ids, ``[R]`` to ``[R]``.

    Example:
        >>> parts = [torch.tensor([1, 2]), torch.tensor([3])]
        >>> ids = torch.nested.nested_tensor(parts, layout=torch.jagged)
        >>> [y.tolist() for y in look_up_nested(ids, lambda x: 10 * x[:, None]).unbind()]
        [[[10], [20]], [[30]]]
    """
    if ids.layout == torch.jagged:
        rows = outputs(ids.values())
        return torch.nested.nested_tensor_from_jagged(rows, ids.offsets(), ids.lengths())
    parts = ids.unbind()
    rows = outputs(torch.cat([part.reshape(-1) for part in parts]))
    found = rows.split([part.numel() for part in parts])
    shapes = [(*part.shape, *rows.shape[1:]) for part in parts]
    return torch.nested.as_nested_tensor(
        [part.view(shape) for part, shape in zip(found, shapes, strict=True)]
    )
