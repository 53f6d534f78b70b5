"""Tests of client libraries, which lie in ``.venv-clients`` alone (``make clients``)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from torch import nn

CLIENTS = (
    *("accelerate", "deepctr_torch", "lightning", "peft"),
    *("recbole", "torch_rechub", "transformers"),
)
if not all(map(find_spec, CLIENTS)):
    collect_ignore_glob = ["*.py"]

QUALITY = pytest.StashKey[list[str]]()


@pytest.fixture
def embeddings(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """``embeddings(kind)``: what ``nn.Embedding(...)`` in a client's code builds from now on."""
    from tests.clients import shims
    from tests.clients.shared import CLASSES

    # Clients write logs and checkpoints where they are.
    monkeypatch.chdir(tmp_path)
    shims.apply(monkeypatch)
    return lambda kind: monkeypatch.setattr(nn, "Embedding", CLASSES[kind])


@pytest.fixture
def quality(request: pytest.FixtureRequest, embeddings):
    """``quality(name, run, epochs)``: rows for the table at the end; see ``quality.measure``."""
    from tests.clients.quality import measure

    rows = request.config.stash.setdefault(QUALITY, [])
    return lambda name, run, epochs: rows.extend(measure(name, run, epochs, embeddings))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if rows := terminalreporter.config.stash.get(QUALITY, []):
        from tests.clients.quality import table

        terminalreporter.section("quality")
        terminalreporter.write("\n".join([*table(rows), ""]))
