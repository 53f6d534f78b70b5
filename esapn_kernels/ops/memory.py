"""What an arena and a table really take."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ArenaBytes", "MemoryReport"]


@dataclass(frozen=True)
class ArenaBytes:
    """Bytes really allocated by an arena.

    ``payload``: rows in use, ``sum_x d(x) * itemsize``. ``slack``: the rest of ``storage`` (free
    rows, page tails, free pages). ``locations``: row starts, page levels, sizes. ``scratch``: once
    rows have moved, what says which places are free (a bit a place on a CPU with native kernels,
    else stacks) and, by the Triton backend, 4 bytes per row; training memory
    like optimizer state, in no checkpoint and not in ``total``. ``composed``: what demotions have
    solved for, kept on a CPU; likewise.
    """

    payload: int
    slack: int
    locations: int
    scratch: int = 0
    composed: int = 0

    @property
    def total(self) -> int:
        """What serving takes."""
        return self.payload + self.slack + self.locations


@dataclass(frozen=True)
class MemoryReport:
    """Bytes really allocated, and what a table of one size would take.

    ``serving`` (what inference needs) = ``payload`` + ``slack`` + ``locations`` + ``chain``;
    ``fixed`` = ``num_embeddings * D * itemsize``, the plain ``nn.Embedding``. Only training takes
    ``optimizer`` (state that follows the rows) and ``scratch`` (which places are free, once rows
    have moved, and 4 bytes per row on a GPU). ``composed`` are products and inverses of the hops
    that a CPU keeps until the hops change: serving is faster with them, and does not need them.
    What a call allocates and frees is in none of them. ``serving`` never exceeds ``budget``, if the
    module has one.
    """

    payload: int
    slack: int
    locations: int
    chain: int
    optimizer: int
    scratch: int
    fixed: int
    rows_per_size: dict[int, int]
    composed: int = 0
    budget: int | None = None

    @property
    def serving(self) -> int:
        return self.payload + self.slack + self.locations + self.chain

    @property
    def ratio(self) -> float:
        """``serving / fixed``."""
        return self.serving / self.fixed if self.fixed else 0.0

    def __str__(self) -> str:
        rows = "  ".join(f"{size}: {count:,}" for size, count in self.rows_per_size.items())
        parts = [
            "payload",
            "slack",
            "locations",
            "chain",
            "serving",
            "fixed",
            "optimizer",
            "scratch",
            "composed",
        ]
        ratios = [f"serving / fixed = {self.ratio:.2%}"]
        if self.budget is not None:
            parts.append("budget")
            ratios.append(f"serving / budget = {self.serving / self.budget:.2%}")
        lines = [f"{name:<10}{getattr(self, name):>15,} B" for name in parts]
        return "\n".join([f"rows by size  {rows}", *lines, *ratios])
