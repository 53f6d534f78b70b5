"""Rows within a budget of bytes, beside plain tables, in one training loop.

A stream of ratings in which few ids have most of the events, every event predicted before it is
learnt: is the rating above 3.5? Compared are a plain table, wide; a plain table of the budget's
bytes; and rows of 2 to 16 numbers that share the budget. Prints what each takes and how well it
predicts, and draws it.

python examples/budget.py --out runs/budget
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esapn.config import SearchConfig
from esapn.data.load import load_ratings
from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.grow import ByCounts

WIDE, NARROW, SIZES = 128, 8, (2, 4, 8, 16)
BATCH = 500
PLAIN, SAME, ROWS = f"nn.Embedding, {WIDE} wide", f"nn.Embedding, {NARROW} wide", "rows, 2 to 16"


class Score(nn.Module):
    """A user's and an item's vectors into a hidden layer, and a probability out of it."""

    def __init__(self, user: nn.Embedding, item: nn.Embedding) -> None:
        super().__init__()
        self.user, self.item = user, item
        width = user.embedding_dim + item.embedding_dim
        self.head = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        pair = torch.cat([self.user(user), self.item(item)], 1)
        score: Tensor = self.head(pair)[:, 0]
        return torch.sigmoid(score)


@dataclass
class Built:
    """A model, what trains it, and the bytes that its tables take to serve."""

    model: Score
    optimizers: list[torch.optim.Optimizer]
    serving: Callable[[], int]


def plain(width: int, users: int, items: int) -> Built:
    """With tables of torch."""
    found = SearchConfig.of_mode("tuned", method="fixed", fixed_size=width)
    tables = [nn.Embedding(n, width) for n in (users, items)]
    for table in tables:
        nn.init.normal_(table.weight, std=found.init_std)
    model = Score(*tables)
    rows = torch.optim.Adagrad(
        [table.weight for table in tables],
        lr=found.row_lr,
        initial_accumulator_value=found.row_accumulator,
    )
    head = torch.optim.Adam(model.head.parameters(), lr=1e-3)
    return Built(model, [rows, head], lambda: sum(table.weight.nbytes for table in tables))


def within(budget: str, users: int, items: int) -> Built:
    """With rows that share ``budget``."""
    found = SearchConfig.of_mode("tuned", method="counts", budget=budget, sizes=SIZES)
    tables = [
        ResizableEmbedding(n, sizes=SIZES, init="padded", init_std=found.init_std)
        for n in (users, items)
    ]
    for table in tables:
        assert table.chain is not None
        table.chain.requires_grad_(False)  # a row that grows appends zeros, which it then learns
    model = Score(*tables)
    ByCounts(model, budget=budget, every=found.move_every, scale=found.count_scale)
    rows = optim.Adagrad(tables, lr=found.row_lr, initial_accumulator_value=found.row_accumulator)
    head = torch.optim.Adam(model.head.parameters(), lr=1e-3)
    # Rows, what says where they lie, and hops.
    return Built(
        model, [rows, head], lambda: sum(table.memory_report().serving for table in tables)
    )


def train(built: Built, user: Tensor, item: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of the predictions before learning, and whether they were right."""
    errors, right = [], []
    for ids in torch.arange(len(user)).split(BATCH):
        score = built.model(user[ids], item[ids])
        error = (score - high[ids]).square()
        errors.append(error.detach())
        right.append((score.detach() > 0.5) == (high[ids] > 0.5))
        error.sum().backward()  # the rates above are for sums over a batch
        for optimizer in built.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat(errors), torch.cat(right)


def draw(path: Path, found: dict[str, dict[str, Any]], events: int) -> None:
    """Bytes at the left, errors over the stream at the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {PLAIN: "#0072B2", SAME: "#56B4E9", ROWS: "#D55E00"}
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    sizes = [one["bytes"] / 1e6 for one in found.values()]
    bars = left.bar(
        ["\n".join(name.split(", ")) for name in found],
        sizes,
        color=[colors[name] for name in found],
        width=0.6,
    )
    left.bar_label(bars, [f"{size:.2f} MB" for size in sizes])
    left.set_ylabel("bytes that serving takes, MB")
    for name, one in found.items():
        parts = one["errors"].split(max(events // 20, 1))
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        right.plot(ends, [float(p.mean()) for p in parts], color=colors[name], label=name)
    right.set(xlabel="events of the stream", ylabel="squared error before learning")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    share = found[ROWS]["bytes"] / found[PLAIN]["bytes"]
    figure.suptitle(
        f"{share:.0%} of the bytes of a table {WIDE} wide, a mean squared error of "
        f"{found[ROWS]['loss']:.4f} in place of {found[PLAIN]['loss']:.4f}"
    )
    figure.savefig(path, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=200_000, help="length of the stream")
    parser.add_argument("--budget", default="50%", help="of tables 16 wide, or bytes as '1 MB'")
    parser.add_argument("--seed", type=int, default=0, help="of the stream and of the models")
    parser.add_argument("--out", type=Path, help="a folder for the figure")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error("--seed must be at least 0")
    if options.events < 4 * BATCH:
        parser.error(f"--events must be at least {4 * BATCH}")
    ratings = load_ratings("synthetic", events=options.events, seed=options.seed)
    users, items = ratings.n_users, ratings.n_items
    user, item = torch.as_tensor(ratings.user).long(), torch.as_tensor(ratings.item).long()
    high = (torch.as_tensor(ratings.rating) > 3.5).float()
    built = {}
    for name in (PLAIN, SAME, ROWS):
        torch.manual_seed(options.seed)
        try:
            if name == ROWS:
                built[name] = within(options.budget, users, items)
            else:
                built[name] = plain(WIDE if name == PLAIN else NARROW, users, items)
        except ValueError as error:
            parser.error(str(error))
    found: dict[str, dict[str, Any]] = {}
    print(f"{options.events:,} events, {users:,} users, {items:,} items; the last quarter:\n")
    print(f"{'':<24}{'bytes':>12}{'share':>9}{'error':>9}{'accuracy':>10}")
    for name in built:
        errors, right = train(built[name], user, item, high)
        last = options.events * 3 // 4
        found[name] = {"bytes": built[name].serving(), "errors": errors}
        found[name] |= {"loss": float(errors[last:].mean())}
        found[name] |= {"accuracy": float(right[last:].float().mean())}
        share = found[name]["bytes"] / found[PLAIN]["bytes"]
        print(
            f"{name:<24}{found[name]['bytes']:>12,}{share:>9.1%}{found[name]['loss']:>9.4f}"
            f"{found[name]['accuracy']:>10.2%}"
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(options.out / "budget.png", found, options.events)
        print(f"\nwrote {options.out / 'budget.png'}")
    return found


if __name__ == "__main__":
    main()
