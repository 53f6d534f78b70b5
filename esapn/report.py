"""What a run leaves: the printed result, the memory table, ``result.json`` and ``run.png``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from esapn_kernels import info

from .config import SearchConfig
from .data import Ratings, Stream
from .search import SearchResult

__all__ = ["memory_table", "result_lines", "save"]


def result_lines(config: SearchConfig, result: SearchResult) -> str:
    """Test measures of a run in a few lines."""
    test = result.test
    loss = "MSE" if config.task == "binary" else "cross-entropy"
    parts = [f"accuracy {test['accuracy']:.4f}", f"{loss} {test['loss']:.4f}"]
    if config.task == "binary":
        parts += [f"log loss {test['log_loss']:.4f}", f"AUC {test['auc']:.4f}"]
    name = f"{config.method} ({config.mode})" if config.method == "esapn" else config.method
    return (
        f"{name}, {config.task}, {config.order} order, seed {config.seed}\n"
        f"test part, prequential, {test['events']:,} events: {', '.join(parts)}\n"
        f"{result.cpu_seconds:.1f} CPU s, {result.wall_seconds:.1f} s"
    )


def memory_table(memory: Mapping[str, Mapping[str, Any]]) -> str:
    """IDs that ended at each size, as published, then the bytes really allocated.

    ``dims`` is the sum of the rows' sizes, ``of fixed`` its share of IDs x d_n.
    """
    sizes = list(next(iter(memory.values()))["rows_per_size"])
    fixed_size = int(sizes[-1])
    lines = [
        f"{'IDs at size':<12}"
        + "".join(f"{size:>9}" for size in sizes)
        + f"{'dims':>12}{'IDs x ' + sizes[-1]:>14}{'of fixed':>10}"
    ]
    for name, side in memory.items():
        counts = side["rows_per_size"]
        dims = sum(int(size) * count for size, count in counts.items())
        fixed = sum(counts.values()) * fixed_size
        row = "".join(f"{count:>9,}" for count in counts.values())
        lines.append(f"{name:<12}{row}{dims:>12,}{fixed:>14,}{dims / fixed:>10.2%}")
    parts = ("payload", "slack", "locations", "chain", "serving", "fixed")
    lines += ["", f"{'bytes':<12}" + "".join(f"{part:>13}" for part in parts) + f"{'of fixed':>10}"]
    totals = {part: sum(side[part] for side in memory.values()) for part in parts}
    for name, side in [*memory.items(), ("both", totals)]:
        row = "".join(f"{side[part]:>13,}" for part in parts)
        lines.append(f"{name:<12}{row}{side['serving'] / side['fixed']:>10.2%}")
    optimizer = sum(side["optimizer"] for side in memory.values())
    lines.append(f"optimizer state while training: {optimizer:,} bytes")
    return "\n".join(lines)


def save(
    out: Path, config: SearchConfig, ratings: Ratings, stream: Stream, result: SearchResult
) -> None:
    """Write ``result.json`` (settings, data, versions, measures, memory, log) and ``run.png``."""
    record = {
        "config": config.to_json(),
        "data": {
            "name": ratings.name,
            "sha256": ratings.checksum,
            "events": len(ratings.rating),
            "users": ratings.n_users,
            "items": ratings.n_items,
            "train_events": stream.n_train,
        },
        "test": result.test,
        "train": result.train,
        "memory": result.memory,
        "cpu_seconds": result.cpu_seconds,
        "wall_seconds": result.wall_seconds,
        "log": result.log,
        "info": info.collect(),
    }
    (out / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    _plot(out / "run.png", config, stream, result)


def _plot(path: Path, config: SearchConfig, stream: Stream, result: SearchResult) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (quality, size), (histogram, frequency) = figure.subplots(2, 2)
    events = [line["events"] for line in result.log]

    loss_name = "MSE" if config.task == "binary" else "cross-entropy"
    quality.plot(events, [line["loss"] for line in result.log], color="C0")
    quality.set(xlabel="events", ylabel=loss_name, title="Prequential loss and accuracy")
    quality.yaxis.label.set_color("C0")
    right = quality.twinx()
    right.plot(events, [line["accuracy"] for line in result.log], color="C1")
    right.set_ylabel("accuracy", color="C1")
    quality.axvline(stream.n_train, color="grey", linestyle=":")
    quality.annotate(
        " test part", (stream.n_train, 1.0), xycoords=("data", "axes fraction"), va="top"
    )

    for color, name in enumerate(("user", "item")):
        mean = [line[f"mean_{name}_size"] for line in result.log]
        size.plot(events, mean, color=f"C{color}", label=f"mean {name} size")
    size.set(xlabel="events", ylabel="numbers per row", title="Mean size", ylim=(0, None))
    size.legend()

    sizes = config.row_sizes
    for k, name in enumerate(("user", "item")):
        counts = list(result.memory[name]["rows_per_size"].values())
        place = [i + 0.4 * k - 0.2 for i in range(len(sizes))]
        histogram.bar(place, counts, width=0.4, color=f"C{k}", label=name)
    histogram.set_xticks(range(len(sizes)), [str(d) for d in sizes])
    histogram.set(xlabel="size", ylabel="IDs", title="IDs that ended at each size")
    histogram.legend()

    for color, name in enumerate(("user", "item")):
        x, y = _size_by_frequency(getattr(result.search.model, name), getattr(stream, name))
        frequency.plot(x, y, marker="o", color=f"C{color}", label=name)
    frequency.set_xscale("log", base=2)
    frequency.set(xlabel="events of the ID", ylabel="mean size", title="Size by frequency")
    frequency.set_ylim(0, None)
    frequency.legend()
    for axes in (quality, size):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=110)


def _size_by_frequency(embedding: Any, ids: torch.Tensor) -> tuple[list[int], list[float]]:
    """Mean final size of the IDs seen [1, 2), [2, 4), [4, 8), ... times."""
    count = torch.bincount(ids, minlength=embedding.num_embeddings).cpu()
    sizes = embedding.sizes_of().double().cpu()
    bucket = torch.log2(count.clamp(min=1)).long()
    x, y = [], []
    for b in range(int(bucket.max()) + 1):
        mine = (bucket == b) & (count > 0)
        if mine.any():
            x.append(2**b)
            y.append(sizes[mine].mean().item())
    return x, y
