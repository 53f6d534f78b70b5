"""Checkpoints: killed, cut short, flipped, full disks, foreign files; and a resume bit for bit."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import os
import pickle
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from esapn.run import checkpoint
from esapn.run.checkpoint import CheckpointError, load, rng_state, save, set_rng_state

ROOT = Path(__file__).resolve().parents[3]

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX calls")


def state(step: int) -> dict:
    return {"weight": torch.full((1000,), float(step)), "step": step}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sealed(path: Path, payload: bytes) -> None:
    """A file whose digest is right, whatever it holds."""
    path.write_bytes(checkpoint.header(hashlib.sha256(payload).hexdigest(), len(payload)))
    with path.open("ab") as file:
        file.write(payload)


# Saving and loading


def test_what_is_saved_comes_back(tmp_path):
    shared = torch.arange(6.0)
    everything = {
        "tensors": [shared, nn.Parameter(torch.ones(2)), torch.tensor(3, dtype=torch.int8)],
        "again": shared,
        "numbers": (1, 2.5, True, None, 2**80, 1 + 2j),
        "text": {"a": "é\n", 3: b"\x00", (1, 2): set("ab")},
        "ordered": collections.OrderedDict(a=1),
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
        "empty": [{}, [], (), torch.empty(0)],
    }
    path = save(tmp_path / "new" / "folder", 1234, everything)
    assert path == tmp_path / "new" / "folder" / "step-000001234.pt"
    found = load(path.parent)
    assert (found.step, found.path, found.passed_over) == (1234, path, [])
    tensors = [found.state.pop("tensors"), everything.pop("tensors")]
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    again = found.state.pop("again")
    assert again.data_ptr() == tensors[0][0].data_ptr()
    assert torch.equal(again, everything.pop("again"))
    (*empty, tensor), (*expected, _) = found.state.pop("empty"), everything.pop("empty")
    assert empty == expected and tensor.shape == (0,)
    assert found.state == everything
    assert type(found.state["ordered"]) is collections.OrderedDict


def test_no_checkpoint_is_none(tmp_path):
    assert load(tmp_path / "missing") is None
    assert load(tmp_path) is None
    (tmp_path / "notes.txt").write_text("mine")
    assert load(tmp_path) is None


class Wild:
    pass


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"a": [1, Wild()]}, r"state\['a'\]\[1\]"),
        ({"a": np.float64(1.0)}, r"state\['a'\].*numpy.float64"),
        ({"a": collections.defaultdict(int)}, "defaultdict"),
        ({frozenset(): 1}, "a key of state.*frozenset"),
        ({"a": len}, "builtin_function"),
    ],
)
def test_what_could_not_be_read_again_is_refused(tmp_path, wrong, where):
    with pytest.raises(TypeError, match=where):
        save(tmp_path, 1, wrong)
    assert names(tmp_path) == []


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        save(tmp_path, -1, {})
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save(tmp_path, 1, {}, keep=0)


def test_rotation_leaves_foreign_files_alone(tmp_path):
    foreign = ["notes.txt", "step-1.pt", "step-0000000001.pt", "step-000000001.pt.bak", "model.pt"]
    foreign += ["xstep-000000001.pt", "step-000000001.pt.tmp2", "other.tmp"]
    for name in foreign:
        (tmp_path / name).write_text(name)
    folder = "step-000000000.pt"
    (tmp_path / folder).mkdir()
    (tmp_path / "step-000000007.pt.tmp").write_text("stale")
    for step in (1, 2, 1_000_000_000, 1_000_000_001):
        save(tmp_path, step, state(step), keep=3)
    kept = ["step-000000002.pt", "step-1000000000.pt", "step-1000000001.pt"]
    assert names(tmp_path) == sorted([*foreign, folder, *kept])
    assert all((tmp_path / name).read_text() == name for name in foreign)
    found = load(tmp_path)
    assert (found.step, found.passed_over) == (1_000_000_001, [])
    save(tmp_path, 1_000_000_002, state(0), keep=1)
    assert names(tmp_path) == sorted([*foreign, folder, "step-1000000002.pt"])


def test_later_steps_are_not_counted(tmp_path):
    """A run that passed over a damaged file must not lose what it saves after that."""
    for step in (10, 20):
        save(tmp_path, step, state(step))
    (tmp_path / "step-000000020.pt").write_bytes(b"")
    for step in (11, 12):
        save(tmp_path, step, state(step), keep=1)
    assert names(tmp_path) == ["step-000000012.pt", "step-000000020.pt"]
    assert load(tmp_path).step == 12
    save(tmp_path, 20, state(20), keep=1)
    found = load(tmp_path)
    assert (found.step, found.passed_over) == (20, [])
    assert names(tmp_path) == ["step-000000020.pt"]


def test_large_tensors_are_not_copied(tmp_path):
    writes = []

    class Watching(checkpoint.Hashing):
        def write(self, data):
            writes.append(memoryview(data).nbytes)
            return super().write(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Hashing", Watching)
        save(tmp_path, 1, {str(i): torch.full((2**18,), float(i)) for i in range(8)})
    assert max(writes) <= 2**20 and sum(writes) > 2**23


# Damage


def test_files_cut_short(tmp_path):
    save(tmp_path, 1, state(1))
    path = save(tmp_path, 2, state(2))
    whole = path.read_bytes()
    header = checkpoint.HEADER_BYTES
    for length in (1, 10, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        found = load(tmp_path)
        assert torch.equal(found.state["weight"], state(1)["weight"])
        (line,) = found.passed_over
        known = len(whole) if length >= header else "unknown"
        assert line == f"{path.name}: cut short, {length} of {known} bytes"
    path.write_bytes(whole + b"\0")
    assert load(tmp_path).passed_over[0].startswith(f"{path.name}: damaged")
    path.write_bytes(b"")
    assert load(tmp_path).passed_over == [f"{path.name}: is empty"]
    path.write_bytes(whole)
    assert load(tmp_path).step == 2


def test_one_flipped_bit_is_found(tmp_path):
    """Every bit of the header, and bits all over the rest."""
    save(tmp_path, 1, state(1))
    path = save(tmp_path, 2, state(2))
    whole = path.read_bytes()
    header = 8 * checkpoint.HEADER_BYTES
    rest = random.Random(0).sample(range(header, 8 * len(whole)), 200)
    for bit in [*range(header), *rest, 8 * len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = load(tmp_path)
        assert found.step == 1
        assert len(found.passed_over) == 1 and found.passed_over[0].startswith(path.name)


def test_none_is_good(tmp_path):
    (tmp_path / "step-000000001.pt").write_bytes(b"")
    (tmp_path / "step-000000002.pt").write_bytes(os.urandom(5000))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"no good checkpoint in {tmp_path}: step-000000002.pt: is no checkpoint, or one of another "
        "version; step-000000001.pt: is empty"
    )


def test_a_file_under_another_name(tmp_path):
    save(tmp_path, 1, state(1))
    save(tmp_path, 5, state(5)).rename(tmp_path / "step-000000009.pt")
    found = load(tmp_path)
    assert found.step == 1
    assert found.passed_over == ["step-000000009.pt: holds another step than its name says"]


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_no_code_runs(tmp_path):
    """Right digests over pickles that run code, as torch's two formats and as a bare pickle."""
    mark = tmp_path / "mark"
    folder = tmp_path / "run"
    save(folder, 1, state(1))
    payload = {"step": 2, "state": {"bomb": Bomb(mark)}}
    for step, zipped in ((2, True), (3, False)):
        torch.save(
            {**payload, "step": step}, tmp_path / "bomb", _use_new_zipfile_serialization=zipped
        )
        sealed(folder / f"step-{step:09d}.pt", (tmp_path / "bomb").read_bytes())
    sealed(folder / "step-000000004.pt", pickle.dumps(payload))
    sealed(folder / "step-000000005.pt", b"garbage")
    sealed(folder / "step-000000006.pt", b"")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("archive/nothing", "")
    sealed(folder / "step-000000007.pt", (tmp_path / "zip").read_bytes())
    torch.save([1], tmp_path / "list")
    sealed(folder / "step-000000008.pt", (tmp_path / "list").read_bytes())
    found = load(folder)
    assert found.step == 1
    assert len(found.passed_over) == 7
    assert found.passed_over[-1] == "step-000000002.pt: holds more than plain data"
    assert found.passed_over[0] == "step-000000008.pt: holds no state"
    assert all("\n" not in line for line in found.passed_over)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # so that the absence above says something


def test_short_memory_is_not_damage(tmp_path, monkeypatch):
    save(tmp_path, 1, state(1))

    def fail(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError, match="step-000000001.pt"):
        load(tmp_path)


# What the system refuses


def refused(folder: Path, step: int, why: str, stands: str) -> None:
    before = names(folder)
    with pytest.raises(CheckpointError) as caught:
        save(folder, step, state(step))
    assert str(caught.value) == f"cannot save {folder}/step-{step:09d}.pt: {why}; {stands}"
    assert names(folder) == before


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_call_that_fails(tmp_path, monkeypatch, call):
    save(tmp_path, 1, state(1))

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = Path if call == "mkdir" else os
    monkeypatch.setattr(where, call, fail)
    refused(tmp_path, 2, "No space left on device", "step-000000001.pt still stands")
    monkeypatch.undo()
    assert load(tmp_path).step == 1


def test_a_full_disk(tmp_path, monkeypatch):
    """Every write fails in turn; the damaged newest is not what still stands."""
    save(tmp_path, 1, state(1))
    save(tmp_path, 2, state(2)).write_bytes(b"garbage")

    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= 1
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    room = 0
    while room < 200:

        def limited(path, mode, room=room):
            return Full(open(path, mode), room) if mode == "wb" else open(path, mode)

        monkeypatch.setattr(checkpoint, "open", limited, raising=False)
        try:
            save(tmp_path, 3, state(3))
            break
        except CheckpointError as error:
            assert str(error).endswith("No space left on device; step-000000001.pt still stands")
        assert names(tmp_path) == ["step-000000001.pt", "step-000000002.pt"]
        room += 1
    assert 10 < room < 200
    assert load(tmp_path).step == 3


@posix
def test_a_full_device(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    save(tmp_path, 1, state(1))

    def full(path, mode):
        return open("/dev/full" if mode == "wb" else path, mode)

    monkeypatch.setattr(checkpoint, "open", full, raising=False)
    refused(tmp_path, 2, "No space left on device", "step-000000001.pt still stands")


@posix
def test_a_file_larger_than_allowed(tmp_path):
    """A true write of the system's that stops in the middle of the file."""
    import resource

    save(tmp_path, 1, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large; step-000000001.pt still stands"):
            save(tmp_path, 2, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-000000001.pt"]
    assert load(tmp_path).step == 1


@contextlib.contextmanager
def no_privileges():
    """Not root, whom no mode of a folder stops."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@posix
def test_folders_without_permission():
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        folder = Path(top) / "run"
        save(folder, 1, state(1))
        folder.chmod(0o555)
        with no_privileges():
            refused(folder, 2, "Permission denied", "step-000000001.pt still stands")
            assert load(folder).step == 1
        folder.chmod(0o000)
        with no_privileges():
            with pytest.raises(CheckpointError) as caught:
                load(folder)
            assert str(caught.value) == f"cannot read {folder}: Permission denied"
            with pytest.raises(CheckpointError, match="denied; no checkpoint stands$"):
                save(folder, 2, state(2))
        folder.chmod(0o755)
        path = save(folder, 2, state(2))
        path.chmod(0o000)
        with no_privileges():
            found = load(folder)
        assert found.step == 1
        assert found.passed_over == [f"{path.name}: cannot be read, Permission denied"]


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="; no checkpoint stands$"):
        save(tmp_path / "file", 1, {})
    with pytest.raises(CheckpointError, match="^cannot read .*file"):
        load(tmp_path / "file")


def test_an_old_file_that_cannot_be_removed(tmp_path, monkeypatch):
    save(tmp_path, 1, state(1))

    def fail(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, state(2), keep=1)
    assert str(caught.value) == (
        f"cannot remove {tmp_path}/step-000000001.pt: Permission denied; "
        "step-000000002.pt was saved and stands"
    )
    assert load(tmp_path).step == 2


def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    """Only EINVAL and its like, from a folder, pass."""
    true = os.fsync

    def fsync(descriptor, code):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        true(descriptor)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to tell a folder's descriptor by")
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor, errno.EINVAL))
    save(tmp_path, 1, state(1))
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor, errno.EIO))
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 2, state(2))


@pytest.mark.parametrize("room", [0, 1, 5])
def test_an_interrupt_while_writing(tmp_path, monkeypatch, room):
    """Ctrl-C comes out as itself, not as torch's words for a write that failed."""
    save(tmp_path, 1, state(1))

    class Interrupted:
        def __init__(self, sha256=hashlib.sha256):
            self.true, self.calls = sha256(), 0

        def update(self, data):
            if self.calls == room:
                raise KeyboardInterrupt
            self.calls += 1
            self.true.update(data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.hashlib, "sha256", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, state(2))
    assert names(tmp_path) == ["step-000000001.pt"]


# Killed

# Importing torch takes seconds: one process imports it and forks those that are killed.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from esapn.run import checkpoint

torch.set_num_threads(1)
folder = Path(sys.argv[1])


def work(first, log, stop):
    # Die at the stop-th call of the system: right before it or right after it.
    calls = [0]

    def deadly(call):
        def wrapper(*args, **kwargs):
            calls[0] += 1
            if calls[0] == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            calls[0] += 1
            if calls[0] == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapper

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    Path.unlink = deadly(Path.unlink)
    step = first
    while True:
        checkpoint.save(folder, step, {"values": torch.full((300_000,), step), "step": step})
        os.write(log, b"%d\\n" % step)
        step += 1


for line in sys.stdin:
    first, stop = map(int, line.split())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        work(first, write, stop)
    os.close(write)
    if not stop:
        time.sleep(random.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read) as log:
        done = log.read().split()
    print(done[-1] if done else first - 1, flush=True)
"""


@posix
def test_killed_at_any_moment(tmp_path):
    """What was saved last is there, or the next one, whole; never a damaged file."""
    save(tmp_path, 0, {"values": torch.full((300_000,), 0), "step": 0})
    script = [sys.executable, "-c", KILLED, str(tmp_path)]
    begun, unfinished = 1, 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(script, **pipes) as server:
        for stop in [*range(1, 13), *[0] * 25]:
            print(begun, stop, file=server.stdin, flush=True)
            done = int(server.stdout.readline())
            unfinished += any(name.endswith(".tmp") for name in names(tmp_path))
            found = load(tmp_path)
            assert found.passed_over == []
            assert found.step in (done, done + 1)
            assert found.state["step"] == found.step
            assert torch.equal(found.state["values"], torch.full((300_000,), found.step))
            begun = found.step + 1
        server.stdin.close()
    assert server.returncode == 0
    assert unfinished >= 2  # killed before and after the first fsync
    save(tmp_path, begun, state(begun))
    assert len(names(tmp_path)) == 2


# Generators


def test_generators_go_on(tmp_path):
    def draw():
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        return [*numbers, *torch.randn(3).tolist()]

    draw()  # leaves half a pair of normal numbers behind
    save(tmp_path, 1, {"rng": rng_state()})
    first = [draw() for _ in range(300)]
    set_rng_state(load(tmp_path).state["rng"])
    assert [draw() for _ in range(300)] == first


@pytest.mark.cuda
def test_generators_of_devices_go_on(tmp_path, device):
    torch.rand(3, device=device)
    save(tmp_path, 1, {"rng": rng_state()})
    first = torch.rand(1000, device=device)
    set_rng_state(load(tmp_path).state["rng"])
    assert torch.equal(torch.rand(1000, device=device), first)
