"""Fixtures of several files of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine takes its time to draw examples and to try them.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of its own for every test, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESAPN_CACHE", str(folder))
    return folder
