"""Faults of the clients themselves, with any embedding, and what makes the clients run here.

Plain and ours alike get every shim; no test has one of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import requests


def apply(patch: pytest.MonkeyPatch) -> None:
    """Mend what the clients' models could not be built without."""
    # RecBole 1.2.1: Config looks up names in NumPy that NumPy 2 removed, so no model can be built.
    for old, new in {"float_": "float64", "complex_": "complex128", "unicode_": "str_"}.items():
        patch.setattr(np, old, getattr(np, new), raising=False)
    # deepctr-torch 0.3.0: every model starts a thread that looks for newer releases over the
    # network, at an address that the tests must not depend on.
    patch.setattr(requests, "get", _no_network)


def _no_network(url: str) -> None:
    raise requests.ConnectionError(url)
