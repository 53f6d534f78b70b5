"""Tanh by way of the sigmoid, which torch computes several times as fast on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Tanh", "tanh"]


class _Tanh(torch.autograd.Function):
    """``y = 2 sigmoid(2x) - 1``, ``dL/dx = (1 - y^2) dL/dy``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = (x + x).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        found: Tensor = torch.ops.aten.tanh_backward.default(gradient, y)
        return found


def tanh(x: Tensor) -> Tensor:
    """``tanh(x)``, within ``2 finfo(x.dtype).eps``.

    Example:
        >>> tanh(torch.tensor([-100.0, 0.0, 0.5]))
        tensor([-1.0000,  0.0000,  0.4621])
    """
    y: Tensor = _Tanh.apply(x) if x.device.type == "cpu" else torch.tanh(x)
    return y


class Tanh(nn.Tanh):
    """``nn.Tanh`` by :func:`tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        """``tanh(input)``."""
        return tanh(input)
