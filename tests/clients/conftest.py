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
def quality(record_property, embeddings):
    """``quality(name, run, epochs)``: rows for the table at the end; see ``quality.measure``."""
    from tests.clients.quality import measure

    return lambda *run, **options: record_property("quality", measure(*run, embeddings, **options))


@pytest.fixture
def within_budgets(record_property, embeddings):
    """``within_budgets(name, run)``: rows for the second table; see ``quality.measure_within``."""
    from tests.clients.quality import measure_within

    return lambda *run: record_property("budgets", measure_within(*run, embeddings))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = sorted(terminalreporter.getreports("passed"), key=lambda report: report.nodeid)
    properties = [dict(report.user_properties) for report in passed]
    if not any(properties):
        return
    from tests.clients.quality import BUDGETS, RUNS, lines

    for kind, columns in {"quality": RUNS, "budgets": BUDGETS}.items():
        if rows := [row for found in properties for row in found.get(kind, ())]:
            terminalreporter.section(kind)
            terminalreporter.write("\n".join([*lines(columns, rows), ""]))
