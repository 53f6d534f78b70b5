"""Where the tests run: ``--device cpu`` (kernels interpreted) or ``--device cuda`` (compiled)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

# Their doctests run where TorchRec is, see `make test-sharded`.
if importlib.util.find_spec("torchrec") is None:
    collect_ignore = [
        f"esapn_kernels/sharded/{name}.py"
        for name in ("checkpoint", "model_tables", "plan", "sharders", "shards")
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cpu: Triton kernels run interpreted (default); cuda: compiled, on the GPU",
    )
    parser.addoption(
        "--sanitize",
        nargs="?",
        type=float,
        const=1.0,
        default=0.0,
        metavar="FRACTION",
        help="run tests, or this fraction of them, under tests/kernels/sanitizer.py",
    )
    parser.addoption(
        "--count-variants",
        action="store_true",
        help="count what a GPU would compile for the tests that run; see tests/kernels/variants.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Small tensors: a second thread costs more than it brings, and far more on a busy machine.
    torch.set_num_threads(1)
    # Triton reads the variable when @triton.jit decorates: before any test imports the package.
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        with contextlib.suppress(ImportError):
            from tests.interpreter import speed_up

            speed_up()
            if fraction := config.getoption("--sanitize"):
                from tests.kernels.sanitizer import Plugin

                config.pluginmanager.register(Plugin(fraction))
            if config.getoption("--count-variants"):
                from tests.kernels import variants

                config.pluginmanager.register(variants.Plugin())
        return
    os.environ.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device on this machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run with --device cuda")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that this run tests."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation but the reference itself."""
    from esapn_kernels.ops.backend import NATIVE_ERROR, TRITON_ERROR

    reason = {"native": NATIVE_ERROR, "triton": TRITON_ERROR}.get(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same random numbers in every test, and full fp32 products."""
    torch.manual_seed(0)
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def no_waiting() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """``with no_waiting():`` what makes the host wait for the GPU raises there."""
    return _refusing_to_wait


@pytest.fixture(autouse=True)
def sound_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test is blamed for what another did to the GPU of its process."""
    yield
    if request.config.getoption("--device") == "cpu" or not torch.cuda.is_initialized():
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        said = f"{request.node.nodeid} left CUDA unusable: {error}"
        if hasattr(request.config, "workerinput"):
            # pytest-xdist names the test and goes on in a new process.
            print(said, file=sys.stderr, flush=True)
            os._exit(1)
        pytest.exit(said, returncode=1)
    assert not mode, "the test left torch.cuda's synchronisation debug mode changed"


@pytest.fixture(scope="session", autouse=True)
def cached_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into the user's cache, nor does a process that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESAPN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``empty``, ``empty_like`` and ``new_empty`` give NaN: what is never written shows."""

    # Device contexts note, once, which functions allocate: the true ones.
    with torch.device("cpu"):
        torch.empty(0)

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
