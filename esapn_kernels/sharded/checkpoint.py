"""Checkpoints of a model with sharded tables: saved by any number of ranks, loaded by any other."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchrec.distributed.types import ShardedModule

from ..distributed import on_all_ranks
from ..grow import Growth
from .block import Block
from .model_tables import Tables, tables
from .reading import CHANGES, FORMAT, WHOLE, Checkpoint
from .shards import RaggedCollection
from .table import ShardedTable

__all__ = ["load", "save", "save_changes"]


def save(
    model: nn.Module,
    path: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    growth: Growth | None = None,
    extra: dict[str, Any] | None = None,
    wait: bool = True,
) -> Future[None]:
    """Write the tables, the dense part and their optimizers' state, at any step; all ranks call it.

    The folder appears once all ranks have written: a run that ends in between leaves
    ``path + ".part"``, which the next call removes. Rows are written by their owners, each once.

    Args:
        model: what holds sharded tables.
        path: a folder that does not exist, on a disk that all ranks see.
        optimizer: of the dense part and the hops; one of ``torch.optim``, or TorchRec's that wrap
            and combine these.
        growth: what ``tables(model).grow`` gave.
        extra: what JSON takes, such as the number of steps; :func:`load` gives rank 0's back.
        wait: else files are written by another thread, from a copy that this call makes. Training
            may go on; the next call waits for the last.

    Returns:
        Done once the folder is there; its ``result()`` raises what writing raised.

    Raises:
        FileExistsError: the folder exists.
        TypeError: ``extra`` is nothing that JSON takes.
        RuntimeError: another rank raised.
    """
    found = tables(model)
    _writer(found.group).wait()
    with on_all_ranks(found.group):
        path = _new(path)
        json.dumps(extra)
        _refuse_others(model)
        if growth is not None:
            growth.check_saved()
    return _begin(_state(found, model, optimizer, growth, extra), path, found.group, wait)


def save_changes(model: nn.Module, path: str | Path) -> None:
    """Write the rows that changed since the last mark, and the hops, and mark anew.

    ``tables(model).mark()`` sets the first mark, beside a :func:`save`. On a machine that serves,
    :func:`~esapn_kernels.sharded.update` takes what is written to the tables that
    :func:`~esapn_kernels.sharded.read` opened, which then are those of a whole checkpoint. Hops are
    written whole, for every step of training changes them, and with them all outputs.

    Args:
        model, path: as of :func:`save`.

    Raises:
        FileExistsError: the folder exists.
        RuntimeError: no mark was set, or another rank raised; the mark stays.
    """
    found = tables(model)
    _writer(found.group).wait()
    with on_all_ranks(found.group):
        path = _new(path)
    number = next(iter(found.values())).number + 1
    changed = {name: table.changed() for name, table in found.items()}
    about = {
        "format": FORMAT,
        "kind": CHANGES,
        "number": number,
        "tables": {name: _kind(table) for name, table in found.items()},
    }
    state = {"about": _text(about), **_flat("tables", changed)}
    _begin(state, path, found.group, wait=True)
    for table in found.values():
        table.mark(number)


def _refuse_others(model: nn.Module) -> None:
    """Refuse tables that other modules of TorchRec have over the ranks.

    Raises:
        ValueError: there are some: their parts would be taken for one and the same tensor.
    """
    for name, module in model.named_modules():
        if isinstance(module, ShardedModule) and not isinstance(module, RaggedCollection):
            raise ValueError(
                f"{name} is sharded by TorchRec's own kernels: save it by TorchRec's state dict, "
                "and the model without it"
            )


def _new(path: str | Path) -> Path:
    """A folder to write to.

    Raises:
        FileExistsError: it exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists: save to another folder")
    return path


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU; of a tensor that ranks share, its part where it is."""
    tensor = tensor.detach()
    return tensor.clone() if isinstance(tensor, DTensor) else tensor.to("cpu", copy=True)


def _text(about: dict[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)


def _begin(
    state: dict[str, Tensor], path: Path, group: dist.ProcessGroup, wait: bool
) -> Future[None]:
    """Have the state written."""
    part, writer = path.with_name(path.name + ".part"), _writer(group)
    with on_all_ranks(group):
        if dist.get_rank(group) == 0:
            shutil.rmtree(part, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
    done = writer.last = writer.thread.submit(_write, state, part, path, writer.group)
    if wait:
        done.result()
    return done


def load(
    model: nn.Module,
    path: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    growth: Growth | None = None,
) -> Any:
    """Take what :func:`save` wrote, on as many ranks or on others; all ranks call it.

    Rows get the sizes that they had. All is read and checked before the first number changes.

    Args:
        model: as of :func:`save`, sharded over the present ranks.
        path: what :func:`save` was given.
        optimizer, growth: as of :func:`save`; each only if it was given there.

    Returns:
        The ``extra`` of :func:`save`.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: there is no such checkpoint, it is of other
            tables or of another optimizer, its files cannot be read, or rows of their sizes do not
            fit the budget of a rank; on all ranks, and nothing is changed.

    Notes:
        On the ranks that saved, growth goes on as it would have, but for which rows find room where
        it is short. On others, counts and noted lookups are those of the rows, and each rank fits
        sizes to its own budget anew.
    """
    found = tables(model)
    group = found.group
    levels = {name: table.levels_like() for name, table in found.items()}
    with on_all_ranks(group):
        checkpoint = Checkpoint(path, WHOLE)
        about = checkpoint.about
        _refuse_others(model)
        _check(found, about, growth)
        _check_optimizer(model, about["optimizer"], optimizer)
        checkpoint.load({f"tables.{name}.levels": block for name, block in levels.items()})
        for name, table in found.items():
            table.check_levels(levels[name])
    states = {name: table.state_like(levels[name]) for name, table in found.items()}
    counted = {} if growth is None else _growth_like(found, growth)
    dense = {name: torch.empty_like(t, requires_grad=False) for name, t in _dense(model).items()}
    with on_all_ranks(group):
        moments = _moments_like(model, optimizer, checkpoint)
        checkpoint.load(
            {
                **_flat("tables", states),
                **_flat("tables", counted),
                **{f"model.{name}": tensor for name, tensor in dense.items()},
                **{moment.key: moment.tensor for moment in moments},
            }
        )
    with torch.no_grad():
        for name, table in found.items():
            table.load(levels[name], states[name])
            _set(table.optimizer, [about["tables"][name]["settings"]])
        for name, tensor in _dense(model).items():
            tensor.copy_(dense[name])
    for _, one, parameter in _stepped(model, optimizer):
        one.state.pop(parameter, None)
    for moment in moments:
        moment.owner.state.setdefault(moment.parameter, {})[moment.name] = moment.tensor
    if optimizer is not None:
        for one, saved in zip(_parts(optimizer), about["optimizer"], strict=True):
            _set(one, saved["settings"])
    if growth is not None:
        same, rank = about["world"] == dist.get_world_size(group), dist.get_rank(group)
        for name, parts in counted.items():
            numbers = about["tables"][name]["growth"][rank if same else 0]
            rows = {
                key.removeprefix("growth."): _padded(found[name], b) for key, b in parts.items()
            }
            growth.load_row_state(_grown(growth, found[name]), rows, numbers, same=same)
    return about["extra"]


def _state(
    found: Tables,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    growth: Growth | None,
    extra: Any,
) -> dict[str, Tensor]:
    """All that is written, in copies; collective."""
    group, about = found.group, {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, table in found.items():
        states[name] = table.state()
        numbers: list[Any] | None = None
        if growth is not None:
            rows, mine = growth.row_state(_grown(growth, table))
            numbers = [None] * dist.get_world_size(group)
            dist.all_gather_object(numbers, mine, group=group)
            for key, tensor in rows.items():
                states[name][f"growth.{key}"] = table.block(_copy(tensor[: table.count]))
        settings = _settings(table.optimizer)[0]
        about[name] = {**_kind(table), "settings": settings, "growth": numbers}
    groups = None if optimizer is None else _groups(model, optimizer)
    extras = [extra]
    dist.broadcast_object_list(extras, src=dist.get_global_rank(group, 0), group=group)
    whole = {
        "format": FORMAT,
        "kind": WHOLE,
        "world": dist.get_world_size(group),
        "tables": about,
        "optimizer": groups,
        "extra": extras[0],
    }
    state = {
        "about": _text(whole),
        **_flat("tables", states),
        **{f"model.{name}": _copy(tensor) for name, tensor in _dense(model).items()},
    }
    for name, one, parameter in _stepped(model, optimizer):
        for key, value in one.state.get(parameter, {}).items():
            value = value if isinstance(value, Tensor) else torch.tensor(value)
            state[f"optimizer.{name}.{key}"] = _copy(value)
    return state


def _kind(table: ShardedTable) -> dict[str, Any]:
    """What a table and its checkpoint must have in common."""
    return {
        "num_embeddings": table.num_embeddings,
        "sizes": list(table.sizes),
        "dtype": str(table.rows.arena.storage.dtype).removeprefix("torch."),
        "init": table.rows.init,
        "rule": table.optimizer.rule,
    }


def _check(
    found: Tables,
    about: dict[str, Any],
    growth: Growth | None,
) -> None:
    """Refuse a checkpoint of something else.

    Raises:
        ValueError: it is.
    """
    if set(about["tables"]) != set(found):
        raise ValueError(
            f"the checkpoint is of the tables {sorted(about['tables'])}, here are {sorted(found)}"
        )
    for name, table in found.items():
        saved = about["tables"][name]
        for what, here in _kind(table).items():
            if saved[what] != here:
                raise ValueError(f"table {name!r} was saved with {what} {saved[what]}, not {here}")
        if growth is not None:
            if saved["growth"] is None:
                raise ValueError("the checkpoint holds no growth: leave growth out")
            rule = saved["growth"][0]["rule"]
            if rule != type(growth).__name__:
                raise ValueError(f"growth was saved by {rule}, not {type(growth).__name__}")


def _check_optimizer(
    model: nn.Module, saved: list[dict[str, Any]] | None, optimizer: torch.optim.Optimizer | None
) -> None:
    """Refuse state of another optimizer.

    Raises:
        ValueError: it is.
    """
    if optimizer is None:
        return
    if saved is None:
        raise ValueError("the checkpoint holds no optimizer: leave optimizer out")
    here = _groups(model, optimizer)
    kinds = [[part["kind"] for part in parts] for parts in (saved, here)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the optimizer was saved by {kinds[0]}, not {kinds[1]}")
    if [part["names"] for part in saved] != [part["names"] for part in here]:
        raise ValueError("the optimizer that was saved steps other parameters, or in other groups")


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of every optimizer its kind, the parameters' names by group, and the groups' settings."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {
            "kind": type(getattr(one, "_optimizer", one)).__name__,
            "names": [[names.get(id(p)) for p in group["params"]] for group in one.param_groups],
            "settings": _settings(one),
        }
        for one in _parts(optimizer)
    ]


def _flat(prefix: str, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{prefix}.{n}.{key}": part for n, state in states.items() for key, part in state.items()
    }


def _dense(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of all but the sharded tables."""
    sharded = {id(tensor) for table in tables(model).values() for tensor in table.tensors()}
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in every if id(tensor) not in sharded}


def _parts(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that TorchRec's combine."""
    if optimizer is None:
        return []
    if hasattr(optimizer, "optimizers"):
        return [part for _, one in optimizer.optimizers for part in _parts(one)]
    return [optimizer]


def _stepped(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor]]:
    """Names of the parameters that ``optimizer`` steps, and which of its parts does."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for one in _parts(optimizer):
        for group in one.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise ValueError("the optimizer steps a parameter that the model does not hold")
                yield names[id(parameter)], one, parameter


@dataclass(frozen=True)
class _Moment:
    """State of a parameter's optimizer, to be read."""

    key: str
    owner: torch.optim.Optimizer
    parameter: Tensor
    name: str
    tensor: Tensor


def _moments_like(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, checkpoint: Checkpoint
) -> list[_Moment]:
    """Memory for the state of the dense part's optimizer, which may have none yet."""
    found = []
    for name, one, parameter in _stepped(model, optimizer):
        prefix = f"optimizer.{name}."
        for key in checkpoint.entries:
            if not key.startswith(prefix) or "." in key.removeprefix(prefix):
                continue
            shape, dtype = checkpoint.shape(key)
            if shape == parameter.shape:
                tensor = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                # Counters of steps lie on the CPU, but where a CUDA graph reads them.
                on_cpu = not shape and not any(
                    group.get("capturable") or group.get("fused") for group in one.param_groups
                )
                tensor = torch.zeros(
                    shape, dtype=dtype, device="cpu" if on_cpu else parameter.device
                )
            found.append(_Moment(key, one, parameter, key.removeprefix(prefix), tensor))
    return found


_PLAIN = (int, float, str, tuple, list, Tensor, type(None))


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of the parameter groups, as JSON takes them."""
    return [
        {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name != "params" and isinstance(value, _PLAIN)
        }
        for group in optimizer.param_groups
    ]


def _set(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Take the settings back."""
    for group, saved in zip(optimizer.param_groups, groups, strict=False):
        for name, value in saved.items():
            present = group.get(name)
            if isinstance(present, Tensor):
                present.fill_(value)
            else:
                group[name] = tuple(value) if isinstance(present, tuple) else value


def _grown(growth: Growth, table: ShardedTable) -> str:
    """The name that a table has in ``growth``."""
    for name, rows in growth.tables.items():
        if rows is table.rows:
            return name
    raise ValueError("growth is of another model")


def _growth_like(found: Tables, growth: Growth) -> dict[str, dict[str, Tensor]]:
    """Memory for what a rule counts."""
    return {
        name: {
            f"growth.{key}": table.block(_copy(tensor[: table.count]))
            for key, tensor in growth.row_state(_grown(growth, table))[0].items()
        }
        for name, table in found.items()
    }


def _padded(table: ShardedTable, block: Tensor) -> Tensor:
    """A number a row of this rank's memory, which has a row even where it owns none."""
    assert isinstance(block, Block)
    return F.pad(block.local, (0, table.rows.num_embeddings - table.count))


@dataclass
class _Writer:
    """A thread that writes, and a process group of its own: training's may be in use."""

    group: dist.ProcessGroup
    thread: ThreadPoolExecutor
    last: Future[None] | None = None

    def wait(self) -> None:
        """Until nothing is being written; who began it was told what it raised."""
        if self.last is not None:
            concurrent.futures.wait([self.last])


@functools.cache
def _writer(group: dist.ProcessGroup) -> _Writer:
    ranks = dist.get_process_group_ranks(group)
    own = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _Writer(own, ThreadPoolExecutor(1))


def _write(state: dict[str, Any], part: Path, path: Path, group: dist.ProcessGroup) -> None:
    """Write all, then let the folder appear."""
    try:
        dcp.save(state, checkpoint_id=part, process_group=group)
    except CheckpointException as error:
        causes = [str(cause) for cause, _ in error.failures.values()]
        raise RuntimeError(f"{str(path)!r} was not written: {causes[0]}") from None
    with on_all_ranks(group):
        if dist.get_rank(group) == 0:
            part.rename(path)
