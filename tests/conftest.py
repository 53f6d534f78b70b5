"""Fixtures of several files of tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of its own for every test, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESAPN_CACHE", str(folder))
    return folder
