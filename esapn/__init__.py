"""ESAPN: embedding sizes searched by reinforcement learning on a stream (SIGIR 2020).

    from esapn import SearchConfig, SizeSearch

adds the search to a model of one's own (see :class:`SizeSearch`); ``python -m esapn`` runs it, and
what it is compared with, on rating data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import SearchConfig

if TYPE_CHECKING:
    from .search import SizeSearch

__all__ = ["SearchConfig", "SizeSearch"]


def __getattr__(name: str) -> Any:
    # Imported at its first use: the command line's help needs no torch.
    if name == "SizeSearch":
        from .search import SizeSearch

        return SizeSearch
    raise AttributeError(f"module 'esapn' has no attribute '{name}'")
