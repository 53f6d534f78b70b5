"""What several files of tests need."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import torch

from esapn.data.ratings import DataError


def refusal(call, *args, **options) -> str:
    """The one line that a mistake in the data gives."""
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def install_command(message: str) -> list[str]:
    """The words of the command that ends a message about packages; pip must understand them."""
    why, found, command = message.strip().partition("; to install: ")
    assert found and why and "pip install" not in why, message
    words = shlex.split(command)
    assert words[:2] == ["pip", "install"] and len(words) > 2, message
    # Quoted where a shell would take brackets for a pattern, and nothing else among the words.
    assert shlex.join(words) == command, message
    assert all(re.fullmatch(r"[a-z0-9-]+(\[[a-z]+\])?", word) for word in words[2:]), message
    return words


def same(one: Any, two: Any, where: str = "", ignoring: tuple[str, ...] = ()) -> None:
    """Nested state, tensor by tensor and bit by bit; keys of ``ignoring`` aside."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            if key not in ignoring:
                same(one[key], two[key], f"{where}.{key}", ignoring)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for k, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{where}[{k}]", ignoring)
    else:
        assert one == two, where
