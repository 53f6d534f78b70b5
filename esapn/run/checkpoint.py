"""Checkpoints of a run: whole or not there, and found out when damaged.

    folder/step-000001200.pt      ESAPN checkpoint 1 sha256 <64 hex> bytes <20 digits>\\n
           step-000001500.pt      followed by what torch.save wrote, of that digest and length

A checkpoint is written under a temporary name, brought to the disk and renamed, so that a process
killed at any moment leaves the last one as it was. ``load`` gives the newest whose digest is right
and says which it passed over. Only plain data is read (``weights_only``): a file cannot run code.

One process writes to a folder; any number may read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import random
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["Checkpoint", "CheckpointError", "load", "rng_state", "save", "set_rng_state"]

_MAGIC = b"ESAPN checkpoint 2 "
_NAME = re.compile(r"step-(\d{9,})\.pt(\.tmp)?")
_CHUNK = 1 << 20
# Of torch.load(weights_only=True); subclasses, which it refuses, are not among them.
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
    *(Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device, torch.layout),
)


class CheckpointError(UserError):
    """A checkpoint that could not be written, or none that could be read; one line."""


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load` found.

    ``passed_over`` has a line for every newer file that is damaged: its name and why.
    """

    step: int
    state: dict[str, Any]
    path: Path
    passed_over: list[str] = field(default_factory=list)


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write ``step-<step>.pt`` whole or not at all, then remove older ones.

    Args:
        folder: where checkpoints lie; made if it is not there. Other files in it are left alone.
        step: 0 or more. Its checkpoint is replaced if there is one.
        state: tensors, numbers, strings, bytes, ``None``, torch dtypes and devices, in dicts,
            lists, tuples and sets. Tensors are written one by one, not copied as a whole; of a view
            all of the tensor behind it is written.
        keep: of the checkpoints up to ``step``, so many of the newest stay. Those of later steps
            are left alone, damaged or not: they are not of this run's past.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: the folder or the file cannot be written, or an older file not be removed.
            Nothing half-written stays, and the message says which checkpoint still stands.
        TypeError: something in ``state`` could not be read again; nothing is written.
        ValueError: a negative ``step``, or ``keep`` below 1.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = save(Path(folder), 1200, {"weight": torch.ones(2), "epoch": 3})
        ...     found = load(Path(folder))
        >>> path.name, found.step, found.state
        ('step-000001200.pt', 1200, {'weight': tensor([1., 1.]), 'epoch': 3})
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    _check(state, "state")
    path = Path(folder) / _name(step)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # First: they may be what fills the disk.
        for stale, _ in _listed(path.parent, temporary=True):
            stale.unlink(missing_ok=True)
        _write(path, {"step": step, "state": state})
    except OSError as error:
        stands = _standing(path.parent)
        raise CheckpointError(f"cannot save {path}: {_why(error)}; {stands}") from error
    older = [old for old, its in _listed(path.parent) if its <= step][keep:]
    for old in older:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            why = f"cannot remove {old}: {_why(error)}"
            raise CheckpointError(f"{why}; {path.name} was saved and stands") from error
    return path


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, its tensors on the CPU.

    Args:
        folder: where :func:`save` wrote.

    Returns:
        The checkpoint, or ``None`` if the folder holds none, or is not there.

    Raises:
        CheckpointError: there are some but none is good, or the folder cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     nothing = load(Path(folder))
        ...     _ = save(Path(folder), 1, {"loss": 0.5})
        ...     later = save(Path(folder), 2, {"loss": 0.25})
        ...     _ = later.write_bytes(later.read_bytes()[:-1])
        ...     found = load(Path(folder))
        >>> nothing is None, found.step, found.state
        (True, 1, {'loss': 0.5})
        >>> found.passed_over
        ['step-000000002.pt: cut short, ... of ... bytes']
    """
    passed_over: list[str] = []
    try:
        listed = _listed(Path(folder))
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {_why(error)}") from error
    for path, step in listed:
        try:
            return Checkpoint(step, _read(path, step), path, passed_over)
        except _Damage as damage:
            passed_over.append(f"{path.name}: {damage}")
    if passed_over:
        raise CheckpointError(f"no good checkpoint in {folder}: {'; '.join(passed_over)}")
    return None


def rng_state() -> dict[str, Any]:
    """States of the process-wide generators, as :func:`save` takes them.

    Returns:
        ``torch``: of the default CPU generator; ``cuda``: of every device's, if CUDA was used;
        ``python``: of ``random``; ``numpy``: of ``numpy.random``'s legacy functions.

    Example:
        >>> state = rng_state()
        >>> first = torch.rand(3), random.random(), np.random.rand()
        >>> set_rng_state(state)
        >>> again = torch.rand(3), random.random(), np.random.rand()
        >>> torch.equal(first[0], again[0]), first[1:] == again[1:]
        (True, True)
    """
    legacy: Any = np.random.get_state(legacy=False)
    twister = legacy["state"]
    plain = {"key": twister["key"].tolist(), "pos": int(twister["pos"])}
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {**legacy, "state": plain},
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the generators as :func:`rng_state` found them; devices that are not there are left out.

    Args:
        state: from :func:`rng_state`.
    """
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, value in zip(range(devices), state.get("cuda", ()), strict=False):
        torch.cuda.set_rng_state(value, device)


class _Damage(Exception):
    """Why a file is no good checkpoint."""


class Hashing:
    """A file that ``torch.save`` writes to: counts and hashes, and keeps what went wrong.

    An exception would go through torch's C++ and come out as another, without its cause: it is
    raised by :meth:`check`, and what comes after it is thrown away.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.length = 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
                self.length += size
            except BaseException as error:  # KeyboardInterrupt, too, would be another
                self.error = error
        return size

    def flush(self) -> None:
        """Called by torch; the file is flushed once, at the end."""

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def header(digest: str, length: int) -> bytes:
    """The first line of a file."""
    return _MAGIC + f"sha256 {digest} bytes {length:020d}\n".encode()


HEADER_BYTES = len(header("0" * 64, 0))


def _write(path: Path, payload: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(bytes(HEADER_BYTES))
            hashing = Hashing(file)
            torch.save(payload, hashing)  # type: ignore[arg-type]  # needs no more than write
            hashing.check()
            file.seek(0)
            file.write(header(hashing.digest.hexdigest(), hashing.length))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The name reaches the disk as well, where the system can say so of a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _read(path: Path, step: int) -> dict[str, Any]:
    """The state of a file that is whole; raises :class:`_Damage` otherwise."""
    try:
        with open(path, "rb") as file:
            _verify(file)
            file.seek(HEADER_BYTES)
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _Damage(f"cannot be read, {_why(error)}") from error
    except pickle.UnpicklingError as error:
        raise _Damage("holds more than plain data") from error
    except (_Damage, MemoryError):
        raise
    except Exception as error:
        # The file may be as good as ever: an older one must not take its place.
        if "allocate memory" in str(error):
            raise MemoryError(f"no memory for {path}") from error
        raise _Damage(f"cannot be loaded, {type(error).__name__}") from error
    if not isinstance(payload, dict) or not isinstance(payload.get("state"), dict):
        raise _Damage("holds no state")
    if payload.get("step") != step:
        raise _Damage("holds another step than its name says")
    return payload["state"]


def _verify(file: BinaryIO) -> None:
    """Raise :class:`_Damage` unless every byte is as it was written."""
    found = file.read(HEADER_BYTES)
    if not found:
        raise _Damage("is empty")
    if not _MAGIC.startswith(found[: len(_MAGIC)]):
        raise _Damage("is no checkpoint, or one of another version")
    digest, length = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        length += len(chunk)
    if found == header(digest.hexdigest(), length):
        return
    stated = found.split()[-1]
    if len(found) < HEADER_BYTES or (stated.isdigit() and length < int(stated)):
        whole = int(stated) + HEADER_BYTES if len(found) == HEADER_BYTES else "unknown"
        raise _Damage(f"cut short, {length + len(found)} of {whole} bytes")
    raise _Damage("damaged, its bytes are not those of its SHA-256")


def _name(step: int) -> str:
    return f"step-{step:09d}.pt"


def _listed(folder: Path, *, temporary: bool = False) -> list[tuple[Path, int]]:
    """Files with a checkpoint's name (a temporary one's) and their steps, newest first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or bool(match[2]) != temporary or not path.is_file():
                continue
            step = int(match[1])
            if path.name == _name(step) + (match[2] or ""):
                found.append((path, step))
    return sorted(found, key=lambda entry: entry[1], reverse=True)


def _standing(folder: Path) -> str:
    """Which checkpoint a run can go on from, for a message."""
    with contextlib.suppress(OSError):
        for path, _ in _listed(folder):
            with contextlib.suppress(OSError, _Damage), open(path, "rb") as file:
                _verify(file)
                return f"{path.name} still stands"
    return "no checkpoint stands"


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _check(value: Any, where: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would refuse, while there is time."""
    for name, part in _parts(value, where):
        if type(part) not in _PLAIN:
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            raise TypeError(f"{name} cannot be in a checkpoint: {kind}")


def _parts(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Everything in ``value`` that is no container, and what a message calls it."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, part in value.items():
            yield from _parts(key, f"a key of {where}")
            yield from _parts(part, f"{where}[{key!r}]")
    elif kind in (list, tuple, set):
        for index, part in enumerate(value):
            yield from _parts(part, f"{where}[{index}]")
    else:
        yield where, value
