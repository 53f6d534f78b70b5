"""Ragged embeddings that grow: lookup, gradient and promotion of rows stored at their own size."""

from .bag import ResizableEmbeddingBag
from .collection import ResizableEmbeddingCollection
from .module import ResizableEmbedding
from .ops.memory import MemoryReport

__all__ = [
    "MemoryReport",
    "ResizableEmbedding",
    "ResizableEmbeddingBag",
    "ResizableEmbeddingCollection",
    "__version__",
]

__version__ = "0.1.0"
