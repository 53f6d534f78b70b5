"""Whether tensors that were loaded or assigned are an arena; whether its memory can be replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ops.backend import host_reads
from ..ops.layout import chunks

__all__ = ["digest", "fault_of", "is_hooked", "is_shared", "version"]


def fault_of(tensors: Mapping[str, Tensor], num_rows: int, sizes: Sequence[int], page: int) -> str:
    """Why ``tensors`` are no arena of ``num_rows`` rows of ``sizes``; empty if they are.

    Reads the device once. Tensors on the meta device have no numbers to check.

    Args:
        tensors: ``storage``, ``row_start``, ``page_level`` and ``row_size``.
        num_rows, sizes, page: of the arena.
    """
    storage, row_start = tensors["storage"], tensors["row_start"]
    page_level, row_size = tensors["page_level"], tensors["row_size"]
    if not storage.is_floating_point():
        return f"storage must be floating-point, got {storage.dtype}"
    if row_start.dtype not in (torch.int32, torch.int64):
        return f"row_start must be int32 or int64, got {row_start.dtype}"
    if page_level.dtype != torch.int8:
        return f"page_level must be int8, got {page_level.dtype}"
    if row_size.dtype != torch.int64:
        return f"row_size must be int64, got {row_size.dtype}"
    if row_start.shape != (num_rows + 1,):
        return f"row_start must be of shape {[num_rows + 1]}, got {list(row_start.shape)}"
    if storage.dim() != 1 or page_level.shape != (storage.numel() // page + 1,):
        return (
            f"storage of shape {list(storage.shape)} does not consist of the pages of {page} "
            f"numbers that page_level of shape {list(page_level.shape)} says"
        )
    if storage.numel() % page:
        return f"storage must consist of pages of {page} numbers, got {storage.numel()}"
    if row_size.is_meta or row_start.is_meta or page_level.is_meta:
        return ""
    if row_size.tolist() != list(sizes):
        return f"row_size must be {list(sizes)}, got {row_size.tolist()}"
    return _misplaced(row_start, page_level, storage.numel(), sizes, page)


@torch.no_grad()
def _misplaced(
    row_start: Tensor, page_level: Tensor, numel: int, sizes: Sequence[int], page: int
) -> str:
    """Why the numbers of ``row_start`` and ``page_level`` are no places of rows."""
    device, last = row_start.device, len(sizes) - 1
    page_level = page_level.to(device)
    dims = torch.tensor(sizes, device=device)
    most = page // sizes[0]  # places in a page, at most
    count = len(row_start) - 1
    # One number per place, and one for whatever has none.
    taken = torch.zeros(numel // page * most + 1, dtype=torch.bool, device=device)
    rows = torch.zeros((), dtype=torch.int64, device=device)
    found = torch.zeros(3, dtype=torch.bool, device=device)
    for part in chunks(count):
        start = row_start[part].long()
        inside = (start >= -1) & (start < numel)
        held = inside & (start >= 0)
        start = torch.where(held, start, -1)
        level = page_level[start // page].long()  # no row: the sink's
        dim = dims[level.clamp(min=0, max=last)]
        slot = start % page
        misfits = (slot % dim != 0) | (slot + dim > page)
        found |= torch.stack([(~inside).any(), (held & (level < 0)).any(), (held & misfits).any()])
        place = torch.where(held, start // page * most + slot // dim, len(taken) - 1)
        taken.index_fill_(0, place, True)
        rows += torch.count_nonzero(held)
    outside, unpaged, between = found
    faults = {
        "row_start and page_level must end with -1": (row_start[-1] != -1) | (page_level[-1] != -1),
        f"page_level must lie between -1 and {last}": (
            (page_level < -1) | (page_level > last)
        ).any(),
        f"row_start must lie between -1 and {numel - 1}, inside storage": outside,
        "a row of row_start lies in a page that page_level says is free": unpaged,
        "a row of row_start begins or ends between two places of its page": between,
        "two rows of row_start lie in one place": torch.count_nonzero(taken[:-1]) != rows,
    }
    faulty = torch.stack(list(faults.values())).tolist()
    return next((why for why, fault in zip(faults, faulty, strict=True) if fault), "")


@torch.no_grad()
def digest(row_start: Tensor) -> Tensor | int:
    """A number that tells one placement of the rows from another; on a GPU still a tensor.

    Any change of one start changes it: a sum with odd factors, which wraps around.
    """
    total = torch.zeros((), dtype=torch.int64, device=row_start.device)
    for part in chunks(len(row_start)):
        odd = torch.arange(2 * part.start + 1, 2 * part.stop, 2, device=row_start.device)
        total = total + odd.mul_(row_start[part]).sum()
    return int(total) if host_reads(total) and type(total) is Tensor else total


def version(tensor: Tensor) -> int:
    """How often ``tensor`` was written to; -1 for an inference tensor, which does not count."""
    try:
        return tensor._version
    except RuntimeError:  # also of one that was given other memory, and is_inference no longer
        return -1


def is_shared(tensors: Sequence[Tensor]) -> bool:
    """Whether other processes of the host may read any of these tensors."""
    return any(t.device.type == "cpu" and t.is_shared() for t in tensors)


def is_hooked(parameter: Tensor) -> bool:
    """Whether autograd's node that accumulates into ``parameter`` has hooks from Python."""
    if not parameter.requires_grad or parameter.is_inference():
        return False  # no node
    with torch.inference_mode(False), torch.enable_grad():
        node = torch.autograd.graph.get_gradient_edge(parameter).node
    for register in (node.register_hook, node.register_prehook):
        # All hooks of a node are in one dictionary, which the handle of a further one shows.
        handle = register(lambda *_: None)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return True
    return False
