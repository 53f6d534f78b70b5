"""Prequential measures, summed on the device; the host reads them once a window.

Every batch is predicted and recorded before it is learnt from. Over the events of a part:

    accuracy = mean [predicted label == label]         loss = mean of MSE or cross-entropy
    log loss = mean of -log p(label)                    AUC: area under the ROC curve (binary)

and, of the test part, loss and accuracy by how often the event's user, and its item, was seen so
far (the published cold-start figures). Sums in fp64; of single events only the test part's scores
are kept, 4 bytes each, for the AUC.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.ratings import SIDES
from ..models.two_tower import predictions

__all__ = ["NUM_BUCKETS", "Prequential"]

# Of running frequencies: [1, 2), [2, 4), [4, 8), ...
NUM_BUCKETS = 31


class Prequential(nn.Module):
    """Measures of a stream's train part, test part and latest window.

    Args:
        n_train: events before this index train; where a batch begins.
        n_events: events of the stream.
        device: where the sums are kept.

    Example:
        >>> measures = Prequential(n_train=2, n_events=4)
        >>> seen = torch.ones(2, 2, dtype=torch.int32)
        >>> for label in (1.0, 0.0):
        ...     target = torch.full((2,), label)
        ...     measures.record(torch.full((2, 1), 3.0), target, (0.95 - target).square(), seen)
        >>> measures.summary("train")["accuracy"], measures.summary("test")["accuracy"]
        (1.0, 0.0)
    """

    sums: Tensor
    recent: Tensor
    buckets: Tensor
    score: Tensor

    def __init__(
        self, n_train: int, n_events: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.n_train = n_train
        self.seen = 0
        double: dict[str, Any] = {"dtype": torch.float64, "device": device}
        # Columns: events, loss, correct, log loss; rows: train, test.
        self.register_buffer("sums", torch.zeros(2, 4, **double))
        self.register_buffer("recent", torch.zeros(4, **double))
        self.register_buffer("buckets", torch.zeros(2, NUM_BUCKETS, 4, **double))
        self.register_buffer("score", torch.zeros(n_events - n_train, device=device))

    def record(self, logits: Tensor, target: Tensor, loss: Tensor, frequency: Tensor) -> None:
        """Record the next ``B`` events, all of one part.

        Args:
            logits: ``[B, n_outputs]``.
            target, loss: ``[B]``.
            frequency: int ``[2, B]``, events so far of their users and of their items.
        """
        start = self.seen
        self.seen += len(target)
        log_loss = loss
        if logits.shape[1] == 1:
            z = logits[:, 0]
            log_loss = F.binary_cross_entropy_with_logits(z, target, reduction="none")
            if start >= self.n_train:
                self.score[start - self.n_train : self.seen - self.n_train] = z
        right = predictions(logits) == target
        values = torch.stack([torch.ones_like(loss), loss, right.to(loss.dtype), log_loss], dim=1)
        each = values.double()
        total = each.sum(0)
        self.sums[int(start >= self.n_train)] += total
        self.recent += total
        if start >= self.n_train:
            bucket = torch.log2(frequency.double()).long().clamp(max=NUM_BUCKETS - 1)
            for side in range(len(SIDES)):
                self.buckets[side].index_add_(0, bucket[side], each)

    def window(self) -> tuple[float, float]:
        """Mean loss and accuracy of the events since the last call."""
        events, loss, right, _ = self.recent.tolist()
        self.recent.zero_()
        return loss / max(events, 1), right / max(events, 1)

    def summary(self, part: str, labels: Tensor | None = None) -> dict[str, float]:
        """Measures of ``train`` or ``test``; with the test part's labels (float) its AUC too."""
        events, loss, right, log_loss = self.sums[int(part == "test")].tolist()
        n = max(events, 1)
        result = {
            "events": int(events),
            "accuracy": right / n,
            "loss": loss / n,
            "log_loss": log_loss / n,
        }
        if labels is not None and len(labels) and labels.is_floating_point():
            from torchmetrics.functional.classification import binary_auroc

            score = torch.sigmoid(self.score[: len(labels)].double())
            result["auc"] = binary_auroc(score, labels.long()).item()
        return result

    def by_frequency(self) -> dict[str, list[dict[str, Any]]]:
        """Loss and accuracy of the test events of every bucket of running frequency, per side."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name, side in zip(SIDES, self.buckets.tolist(), strict=True):
            found[name] = [
                {
                    "from": 2**k,
                    "to": 2 ** (k + 1),
                    "events": int(events),
                    "loss": loss / events,
                    "accuracy": right / events,
                }
                for k, (events, loss, right, _) in enumerate(side)
                if events
            ]
        return found

    def get_extra_state(self) -> dict[str, int]:
        """The position, which is no tensor."""
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Load what :meth:`get_extra_state` gave."""
        self.seen = state["seen"]
