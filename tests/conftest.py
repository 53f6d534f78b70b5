"""Fixtures of several files of tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine takes its time to draw examples and to try them.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(params=["few", "many"])
def batches(request, monkeypatch) -> str:
    """Both ways through the gradient: few ids take one program to sort, many take all launches."""
    from esapn_kernels.gpu import launch

    if request.param == "many":
        choose = launch.choose_bwd

        def of_many(*args):
            config = choose(*args)
            chain = replace(
                config.chain, programs=7, blocks={**config.chain.blocks, "WHOLE": False}
            )
            return replace(config, chain=chain)

        monkeypatch.setattr(launch, "choose_bwd", of_many)
        monkeypatch.setattr(launch, "choose_few_runs", lambda n_ids: None)
    return str(request.param)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of its own for every test, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESAPN_CACHE", str(folder))
    return folder
