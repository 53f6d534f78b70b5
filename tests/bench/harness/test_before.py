"""An earlier package beside the present one: its names, its operators and what it leaves behind."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import before

import esapn_kernels

INIT = """
from esapn_kernels.inner.numbers import VALUE
from .inner import NAME
import torch
SPELLED = "esapn_kernels, esapn_kernels_extra, esapn-kernels"

@torch.library.custom_op("esapn_kernels::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    return 3 * x
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a package of two modules."""
    inner = tmp_path / before.PACKAGE / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text(INIT)
    (inner / "__init__.py").write_text("NAME = __name__\n")
    (inner / "numbers.py").write_text("import esapn_kernels.inner\nVALUE = 7\n")
    return tmp_path


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No other test finds the hook or what came through it."""
    finders = sys.meta_path[:]
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == before.BEFORE]:
        del sys.modules[name]


def test_the_name_is_replaced_in_the_sources(root: Path, forgotten: Any) -> None:
    package: Any = before.load(before.checkout(str(root)))
    assert package.__name__ == before.BEFORE and package.VALUE == 7
    assert package.NAME == "esapn_kernels_before.inner"
    assert package.SPELLED == "esapn_kernels_before, esapn_kernels_extra, esapn-kernels"
    assert f"{before.BEFORE}.inner.numbers" in sys.modules
    # The present package is what it was.
    assert sys.modules[before.PACKAGE] is esapn_kernels
    assert not any(name.startswith(f"{before.PACKAGE}.inner") for name in sys.modules)
    assert torch.ops.esapn_kernels_before.thrice(torch.ones(2)).tolist() == [3, 3]
    assert not hasattr(torch.ops.esapn_kernels, "thrice")


def test_no_bytecode_lies_beside_the_sources(root: Path, forgotten: Any, monkeypatch: Any) -> None:
    """It would be taken for that of the package under its own name."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before.load(root)
    assert not list(root.rglob("__pycache__"))


def test_missing_modules_are_import_errors(root: Path, forgotten: Any) -> None:
    (root / before.PACKAGE / "__init__.py").write_text("from .missing import x\n")
    with pytest.raises(ModuleNotFoundError, match=f"{before.BEFORE}.missing"):
        before.load(root)


def test_a_checkout_has_the_package(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=f"no {before.PACKAGE} package in {tmp_path}"):
        before.checkout(str(tmp_path))
