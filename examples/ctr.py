"""Click prediction from several categorical fields: nn.Embedding, then its name changed.

Fields of very different cardinality, ids as skewed as real ones, labels from a hidden model. With
--embedding resizable rows grow by their counts within --budget: a line before the loop. With
--embedding searched a policy per field decides (ESAPN): three lines of the loop. Which predicts
better depends on --init-std: try 1 and 0.05.

python examples/ctr.py --embedding plain
python examples/ctr.py --embedding resizable
python examples/ctr.py --embedding searched
"""

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from esapn import SearchConfig, SizeSearch
from esapn_kernels import ResizableEmbedding
from esapn_kernels.grow import ByCounts

FIELDS = {
    "user": 20_000,
    "item": 5_000,
    "seller": 800,
    "city": 300,
    "category": 60,
    "device": 12,
    "weekday": 7,
    "is_new": 2,
}
KINDS = ("plain", "resizable", "searched")


def events(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids ``[n, fields]`` and clicks ``[n]``: a factorisation machine over hidden vectors."""
    rng = np.random.default_rng(seed)
    columns, vectors, biases = [], [], []
    for rows in FIELDS.values():
        rank = np.minimum((rows + 1) ** rng.random(n) - 1, rows - 1).astype(np.int64)
        column = rng.permutation(rows)[rank]  # Zipf over shuffled ids
        columns.append(column)
        vectors.append(rng.normal(0, 0.3, (rows, 8))[column])
        biases.append(rng.normal(0, 0.4, rows)[column])
    total, squares = np.sum(vectors, axis=0), np.sum(np.square(vectors), axis=0)
    logit = np.sum(biases, axis=0) + 0.5 * (np.square(total) - squares).sum(1) - 1.0
    clicks = rng.random(n) < 1 / (1 + np.exp(-logit))
    return torch.from_numpy(np.stack(columns, axis=1)), torch.from_numpy(clicks).float()


def embedding(kind: str, rows: int, dim: int, init_std: float) -> nn.Module:
    """The swap: one constructor for the other."""
    if kind != "plain":
        return ResizableEmbedding(rows, dim, init_std=init_std)
    plain = nn.Embedding(rows, dim)
    nn.init.normal_(plain.weight, std=init_std)
    return plain


class ClickModel(nn.Module):
    """A table per field; their rows side by side into a small MLP."""

    def __init__(self, kind: str, dim: int, init_std: float) -> None:
        super().__init__()
        self.tables = nn.ModuleList(embedding(kind, n, dim, init_std) for n in FIELDS.values())
        self.mlp = nn.Sequential(nn.Linear(len(FIELDS) * dim, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: Tensor) -> Tensor:
        rows = [table(column) for table, column in zip(self.tables, ids.unbind(1), strict=True)]
        return self.mlp(torch.cat(rows, dim=1))[:, 0]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embedding", choices=KINDS, default="resizable")
    parser.add_argument(
        "--budget", default="50%", help="of resizable: as '1 MB' or '50%%' of plain"
    )
    parser.add_argument("--init-std", type=float, default=1.0, help="rows start as N(0, std^2)")
    parser.add_argument("--events", type=int, default=200_000, help="events of the stream")
    parser.add_argument("--dim", type=int, default=16, help="width of the embeddings")
    parser.add_argument("--batch", type=int, default=500, help="events in a batch")
    parser.add_argument("--seed", type=int, default=0, help="of the events and the model")
    options = parser.parse_args(arguments)
    if min(options.events, options.dim, options.batch) < 1:
        parser.error("--events, --dim and --batch must be at least 1")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    if not 0 < options.init_std < float("inf"):
        parser.error("--init-std must be a positive number")

    torch.manual_seed(options.seed)
    model = ClickModel(options.embedding, options.dim, options.init_std)
    if options.embedding == "resizable":
        try:
            ByCounts(model, budget=options.budget)
        except ValueError as error:
            parser.error(str(error))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    search = None
    if options.embedding == "searched":
        tables: Any = zip(FIELDS, model.tables, strict=True)
        search = SizeSearch(dict(tables), SearchConfig())
    ids, clicks = events(options.events, options.seed)
    logits = []
    for batch, target in zip(ids.split(options.batch), clicks.split(options.batch), strict=True):
        if search is not None:
            search.grow(dict(zip(FIELDS, batch.unbind(1), strict=True)))
        logit = model(batch)  # predicted before it is learnt
        logits.append(logit.detach())
        loss = nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
        optimizer.zero_grad()
        loss.mean().backward()
        if search is not None:
            search.learn(loss)
        optimizer.step()

    half = options.events // 2
    logit, target = torch.cat(logits)[half:], clicks[half:]
    found = {
        "log_loss": float(nn.functional.binary_cross_entropy_with_logits(logit, target)),
        "auc": float(binary_auroc(logit.sigmoid(), target.long())),
        "bytes": float(sum(_bytes(table) for table in model.tables)),
    }
    print(
        f"{options.embedding}: second half of {options.events:,} events, predicted before learnt: "
        f"log loss {found['log_loss']:.4f}, AUC {found['auc']:.4f}; "
        f"tables take {found['bytes']:,.0f} bytes"
    )
    return found


def _bytes(table: nn.Module) -> int:
    if isinstance(table, ResizableEmbedding):
        return table.memory_report().serving
    return sum(p.numel() * p.element_size() for p in table.parameters())


if __name__ == "__main__":
    main()
