"""Tests that run torch's class and ours with one size side by side, and compare what they see."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
)

N, D = 7, 4
# For a bag two lines; an id twice in a line, and in both.
IDS = torch.tensor([[3, 3, 0], [6, 1, 3]])


class Make(NamedTuple):
    """Builds a module of ``cls``; ``torch_cls`` is torch's class of its kind."""

    build: Callable[..., nn.Module]
    cls: type[nn.Module]
    torch_cls: type[nn.Module]

    def __call__(self, rows: int = N, dim: int = D, **options: Any) -> Any:
        return self.build(rows, dim, **options)

    @property
    def is_ours(self) -> bool:
        return self.cls is not self.torch_cls

    def from_pretrained(self, table: torch.Tensor, **options: Any) -> Any:
        return self.cls.from_pretrained(table, **options)


def _ours(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda rows, dim, **options: cls(rows, dim, sizes=(dim,), **options)


def _rows_of_a_collection(rows: int, dim: int, **options: Any) -> nn.Module:
    tables = {"first": rows // 2, "second": rows - rows // 2}
    return ResizableEmbeddingCollection(tables, sizes=(dim,), **options).rows


_TORCH = Make(nn.Embedding, nn.Embedding, nn.Embedding)
_TORCH_BAG = Make(nn.EmbeddingBag, nn.EmbeddingBag, nn.EmbeddingBag)
_OURS = Make(_ours(ResizableEmbedding), ResizableEmbedding, nn.Embedding)
_OUR_BAG = Make(_ours(ResizableEmbeddingBag), ResizableEmbeddingBag, nn.EmbeddingBag)
_ROWS = Make(_rows_of_a_collection, ResizableEmbedding, nn.Embedding)

KINDS = {
    "table": (_TORCH, _OURS),
    "bag": (_TORCH_BAG, _OUR_BAG),
    "collection": (_TORCH, _ROWS),
}


def beside(*kinds: str, exact: bool = True) -> Callable[..., Any]:
    """A test of each kind: ``case(make, ...)`` sees of torch's class what it sees of ours.

    What ``case`` returns is compared: tensors bit by bit (else to rounding), other things by
    ``==``. What it asserts holds of both.
    """

    def wrap(case: Callable[..., Any]) -> Callable[..., Any]:
        def test(kind, **arguments):
            found = []
            for make in KINDS[kind]:
                torch.manual_seed(0)
                found.append(case(make, **arguments))
            assert found[0] is not None, "a case returns what is compared"
            same(*found, exact=exact)

        _, *others = inspect.signature(case).parameters.values()
        kind = inspect.Parameter("kind", inspect.Parameter.KEYWORD_ONLY)
        others = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in others]
        test.__signature__ = inspect.Signature([kind, *others])  # type: ignore[attr-defined]
        # Its name, its file, and the marks beneath this one.
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(test, name, getattr(case, name))
        vars(test).update(vars(case))
        return pytest.mark.parametrize("kind", kinds or ("table", "bag"))(test)

    return wrap


def same(theirs: Any, ours: Any, where: str = "", exact: bool = True) -> None:
    """Nested results, tensor by tensor and bit by bit."""
    said = f"{where}: {theirs!r} of torch's, {ours!r} of ours"
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), said
        assert theirs.requires_grad == ours.requires_grad, said
        if theirs.is_nested:
            assert theirs.layout == ours.layout, said
            same(theirs.unbind(), ours.unbind(), where, exact)
        else:
            torch.testing.assert_close(
                ours,
                theirs,
                rtol=0 if exact else None,
                atol=0 if exact else None,
                equal_nan=True,
                msg=lambda m: f"{where}: {m}",
            )
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict) and list(theirs) == list(ours), said
        for key, value in theirs.items():
            same(value, ours[key], f"{where}.{key}", exact)
    elif isinstance(theirs, (list, tuple)):
        assert isinstance(ours, (list, tuple)) and len(theirs) == len(ours), said
        for k, (one, two) in enumerate(zip(theirs, ours, strict=True)):
            same(one, two, f"{where}[{k}]", exact)
    else:
        assert theirs == ours, said


def outcome(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a call gives, or the type of what it raises."""
    try:
        return call(*args, **options)
    except Exception as error:
        return type(error).__name__


def seen(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy of what a tensor holds now."""
    return None if tensor is None else tensor.detach().clone()


def backward(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Output of ``ids``, after a backward pass of its squares; everything has a gradient then."""
    out = module(ids)
    out.square().sum().backward()
    return seen(out)


def trained(module: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Any]:
    """Outputs, and the parameters at last, of some steps that differ in their ids."""
    found: list[Any] = []
    for step in range(steps):
        optimizer.zero_grad()
        found.append(backward(module, (IDS + step) % N))
        optimizer.step()
    return [*found, *(seen(p) for p in module.parameters())]
