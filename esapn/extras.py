"""What is said when packages that are optional are not installed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def needs(what: str, packages: Sequence[str]) -> str:
    """Say that ``what`` needs ``packages``; ends with a command that can be pasted as it stands.

    Example:
        >>> needs("a download", ["pooch", "tqdm"])
        "a download needs pooch and tqdm; to install: pip install 'esapn-kernels[train]'"
    """
    *others, last = packages
    names = f"{', '.join(others)} and {last}" if others else last
    # TensorBoard is in no extra.
    extras = {"tensorboard": "tensorboard", "optuna": "esapn-kernels[tune]"}
    parts = {extras.get(name, "esapn-kernels[train]"): None for name in packages}
    return f"{what} needs {names}; to install: {shlex.join(['pip', 'install', *parts])}"
