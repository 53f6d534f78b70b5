"""A count that devices keep."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DeviceCount"]


class DeviceCount:
    """A number on every device that counts, whose sum is the count.

    Its tensors are no buffers: they are not saved, not broadcast, and a GPU is waited for in
    :meth:`total` only. A copy starts with the count of the original and goes on by itself.

    Args:
        count: of the original.

    Example:
        >>> count = DeviceCount()
        >>> count.prepare(torch.device("cpu")).add_(3)
        tensor(3)
        >>> count.total()
        3
    """

    def __init__(self, count: int = 0) -> None:
        self._before = count
        self._on: dict[torch.device, Tensor] = {}

    def __reduce__(self) -> tuple[type[DeviceCount], tuple[int]]:
        return type(self), (self.total(),)

    def total(self) -> int:
        """The count so far; waits for the devices."""
        return self._before + sum(int(count) for count in self._on.values())

    def prepare(self, device: torch.device) -> Tensor:
        """The number of ``device``, int64, which is made where there is none; of meta, nothing."""
        if device.type == "meta":
            return torch.zeros((), dtype=torch.int64, device=device)
        if device not in self._on:
            with torch.inference_mode(False):
                self._on[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._on[device]
