"""Tests of client libraries, which lie in ``.venv-clients`` alone (``make test-clients``)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from torch import nn

CLIENTS = ("accelerate", "deepctr_torch", "lightning", "recbole", "torch_rechub", "transformers")
if not all(map(find_spec, CLIENTS)):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def embeddings(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """``embeddings(kind)``: what ``nn.Embedding(...)`` in a client's code builds from now on."""
    from tests.clients.shared import CLASSES

    # Clients write logs and checkpoints where they are.
    monkeypatch.chdir(tmp_path)
    return lambda kind: monkeypatch.setattr(nn, "Embedding", CLASSES[kind])
