"""Mistakes of a user: one line each, with the word that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["UserError", "check_least", "did_you_mean"]


class UserError(ValueError):
    """A mistake of the user's; one line, which the command line prints in place of a traceback."""


def check_least(error: type[UserError], least: float, **values: float) -> None:
    """Raise ``error`` for the first of ``values`` that is below ``least``, or NaN.

    >>> check_least(UserError, 1, events=0)
    Traceback (most recent call last):
    esapn.errors.UserError: events must be at least 1, got 0
    """
    for name, value in values.items():
        if not value >= least:
            raise error(f"{name} must be at least {least}, got {value}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a mistyped word or flag; empty if no known one is close.

    >>> did_you_mean("--row-lt", ["--row-lr", "--lr", "--tower"])
    '; did you mean --row-lr?'
    >>> did_you_mean("--frobnicate", ["--row-lr", "--lr", "--tower"])
    ''
    """
    # Without the dashes, which all flags have in common.
    names = {name.lstrip("-"): name for name in known}
    close = get_close_matches(word.lstrip("-"), names, n=1, cutoff=0.65)
    return f"; did you mean {names[close[0]]}?" if close else ""
