"""Prequential measures, kept on the device and read when the run asks for them.

Every batch is predicted and recorded before it is learnt from. Over the events of a part:

    accuracy = mean [predicted label == label]         loss = mean of MSE or cross-entropy
    log loss = mean of -log p(label)                    AUC: area under the ROC curve (binary)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import predictions

__all__ = ["Prequential"]


class Prequential:
    """Loss, correctness, log loss and score of every event of a stream, in order.

    Args:
        n_events: events of the stream.
        device: where they are kept: 4 floats an event.
    """

    def __init__(self, n_events: int, device: torch.device | str | None = None) -> None:
        self.loss = torch.zeros(n_events, device=device)
        self.correct = torch.zeros(n_events, dtype=torch.bool, device=device)
        self.log_loss = torch.zeros(n_events, device=device)
        self.score = torch.zeros(n_events, device=device)
        self.seen = 0

    def record(self, logits: Tensor, target: Tensor, loss: Tensor) -> None:
        """Record the next ``len(target)`` events."""
        part = slice(self.seen, self.seen + len(target))
        self.loss[part] = loss
        self.correct[part] = predictions(logits) == target
        if logits.shape[1] == 1:
            z = logits[:, 0]
            self.score[part] = z
            self.log_loss[part] = F.binary_cross_entropy_with_logits(z, target, reduction="none")
        else:
            self.log_loss[part] = loss
        self.seen += len(target)

    def window(self, n_events: int) -> tuple[float, float]:
        """Mean loss and accuracy of the last ``n_events`` events."""
        part = slice(max(self.seen - n_events, 0), self.seen)
        both = torch.stack([self.loss[part].mean(), self.correct[part].float().mean()])
        loss, accuracy = both.tolist()
        return loss, accuracy

    def summary(self, start: int, stop: int, target: Tensor) -> dict[str, float]:
        """Measures of the events ``[start, stop)``; ``target`` are their labels."""
        part = slice(start, stop)
        result = {
            "events": stop - start,
            "accuracy": self.correct[part].double().mean().item(),
            "loss": self.loss[part].double().mean().item(),
            "log_loss": self.log_loss[part].double().mean().item(),
        }
        if target.is_floating_point():
            from torchmetrics.functional.classification import binary_auroc

            score = torch.sigmoid(self.score[part].double())
            result["auc"] = binary_auroc(score, target.long()).item()
        return result
