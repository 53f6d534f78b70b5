"""The package of an earlier checkout beside the present one, in one process.

Both have the same name and register operators under it, so the earlier one is imported as
``esapn_kernels_before``: an import hook reads its sources and replaces the name in them.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import decode_source, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor

from .providers import Ours, TableSpec
from .updates import Step, fused_step

PACKAGE = "esapn_kernels"
BEFORE = "esapn_kernels_before"


class _Loader(SourceFileLoader):
    """Compiles a source with the name replaced; no bytecode is read or written."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = re.sub(rf"\b{PACKAGE}\b", BEFORE, decode_source(self.get_data(path)))
        code: CodeType = self.source_to_code(source.encode(), path)
        return code


class _Finder(MetaPathFinder):
    """Finds the modules of :data:`BEFORE` under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        first, *rest = fullname.split(".")
        if first != BEFORE:
            return None
        folder = self.root.joinpath(PACKAGE, *rest)
        file, places = folder / "__init__.py", [str(folder)]
        if file.is_file():
            loader = _Loader(fullname, str(file))
            return spec_from_file_location(
                fullname, file, loader=loader, submodule_search_locations=places
            )
        file = folder.with_suffix(".py")
        if not file.is_file():
            return None
        return spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))


def checkout(text: str) -> Path:
    """The ``type`` of a flag that names a checkout with the package in it."""
    root = Path(text).resolve()
    if not (root / PACKAGE / "__init__.py").is_file():
        raise ArgumentTypeError(f"no {PACKAGE} package in {text}")
    return root


def load(root: Path) -> ModuleType:
    """Import the package of the checkout at ``root`` as :data:`BEFORE`; once in a process.

    Raises:
        ImportError: it needs what is not installed here.
    """
    sys.meta_path.insert(0, _Finder(root))
    return import_module(BEFORE)


class Before(Ours):
    """The same table in the earlier package."""

    name = "before"

    def __init__(self, table: TableSpec, package: ModuleType) -> None:
        make: Any = package.ResizableEmbedding
        super().__init__(table, torch.device("cpu"), make=make)

    @property
    def row_start(self) -> Tensor:
        """Where every row begins, which arenas have given under two names."""
        arena: Any = self.module.arena
        starts: Tensor = arena.layout.row_start if hasattr(arena, "layout") else arena.locations[0]
        return starts


def step_before(table: TableSpec, package: ModuleType, rule: str) -> Step:
    """Rows stepped inside the backward of the earlier package."""
    optimizers = import_module(f"{package.__name__}.optim")
    return fused_step(Before(table, package), rule, "before", optimizers)
