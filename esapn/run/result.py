"""What a run leaves: the printed result, the memory table, ``result.json`` and ``run.png``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

from esapn_kernels import info

from ..config import SearchConfig
from ..data.ratings import SIDES, Ratings
from ..data.stream import Stream
from ..jsonfile import write_json
from .loop import RunResult

__all__ = [
    "describe_data",
    "forget_peak",
    "memory_table",
    "peak_rss",
    "plot",
    "record",
    "result_lines",
    "save",
]


def result_lines(config: SearchConfig, result: RunResult) -> str:
    """Test measures of a run in a few lines."""
    test = result.test
    loss = "MSE" if config.task == "binary" else "cross-entropy"
    parts = [f"accuracy {test['accuracy']:.4f}", f"{loss} {test['loss']:.4f}"]
    if config.task == "binary":
        parts += [f"log loss {test['log_loss']:.4f}"]
    if "auc" in test:
        parts += [f"AUC {test['auc']:.4f}"]
    early = f"stopped early, after {result.run.measures.seen:,} events; "
    return (
        f"{config.method} ({config.mode}), {config.task}, {config.order} order, "
        f"seed {config.seed}\n"
        f"{early if result.stopped_early else ''}test part, prequential, "
        f"{test['events']:,} events: {', '.join(parts) if test['events'] else 'none'}\n"
        f"{result.cpu_seconds:.1f} CPU s, {result.wall_seconds:.1f} s"
    )


def memory_table(memory: Mapping[str, Mapping[str, Any]]) -> str:
    """IDs that ended at each size, as published, then the bytes really allocated.

    ``dims`` is the sum of the rows' sizes, ``of fixed`` its share of IDs x the largest size.
    """
    lines = []
    if sizes := list(next(iter(memory.values()))["rows_per_size"]):
        lines.append(
            f"{'IDs at size':<12}"
            + "".join(f"{size:>9}" for size in sizes)
            + f"{'dims':>12}{'IDs x largest':>14}{'of fixed':>10}"
        )
        for name, side in memory.items():
            counts = side["rows_per_size"]
            dims = sum(int(size) * count for size, count in counts.items())
            fixed = side["fixed"] // 4
            row = "".join(f"{count:>9,}" for count in counts.values())
            lines.append(f"{name:<12}{row}{dims:>12,}{fixed:>14,}{dims / fixed:>10.2%}")
        lines.append("")
    parts = ("payload", "slack", "locations", "chain", "serving", "fixed")
    lines += [f"{'bytes':<12}" + "".join(f"{part:>13}" for part in parts) + f"{'of fixed':>10}"]
    totals = {part: sum(side[part] for side in memory.values()) for part in parts}
    for name, side in [*memory.items(), ("both", totals)]:
        row = "".join(f"{side[part]:>13,}" for part in parts)
        lines.append(f"{name:<12}{row}{side['serving'] / side['fixed']:>10.2%}")
    optimizer = sum(side["optimizer"] for side in memory.values())
    lines.append(f"optimizer state while training: {optimizer:,} bytes")
    budgets = [side["budget"] for side in memory.values() if side.get("budget") is not None]
    if budgets:
        refused = sum(side["refused"] for side in memory.values())
        lines.append(f"budget {sum(budgets):,} bytes; rows refused for want of room: {refused:,}")
    return "\n".join(lines)


def describe_data(ratings: Ratings, stream: Stream) -> dict[str, Any]:
    """What a run was made on, as JSON values."""
    return {
        "name": ratings.name,
        "sha256": ratings.checksum,
        "events": len(ratings.rating),
        "users": ratings.n_users,
        "items": ratings.n_items,
        "train_events": stream.n_train,
        "counts": ratings.counts,
    }


def record(
    config: SearchConfig, ratings: Ratings, stream: Stream, result: RunResult
) -> dict[str, Any]:
    """Everything that is kept of a run, as JSON values: settings, data, versions and measures."""
    events = result.run.measures.seen
    return {
        "config": config.to_json(),
        "data": describe_data(ratings, stream),
        "test": result.test,
        "train": result.train,
        "memory": result.memory,
        "bytes": result.bytes,
        "by_frequency": result.by_frequency,
        "sizes_by_frequency": result.sizes_by_frequency,
        "cpu_seconds": result.cpu_seconds,
        "wall_seconds": result.wall_seconds,
        "events_per_second": events / max(result.wall_seconds, 1e-9),
        "peak_rss": peak_rss(),
        "stopped_early": result.stopped_early,
        "log": result.log,
        "info": info.collect(),
    }


def forget_peak() -> None:
    """Let :func:`peak_rss` begin anew, where Linux allows it: a process may make many runs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int | None:
    """The most memory that this process held, in bytes, since :func:`forget_peak`."""
    with contextlib.suppress(OSError, StopIteration):
        # Of this process alone; getrusage's is at least that of the process which started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    if resource is None:
        return None
    # In bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save(
    out: Path, config: SearchConfig, ratings: Ratings, stream: Stream, result: RunResult
) -> None:
    """Write ``result.json`` (see :func:`record`) and ``run.png``."""
    write_json(out / "result.json", record(config, ratings, stream, result))
    plot(out / "run.png", config, stream, result)


def plot(path: Path, config: SearchConfig, stream: Stream, result: RunResult) -> None:
    """A page of four: quality and mean sizes over the events, sizes at the end, by frequency."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (quality, size), (histogram, frequency) = figure.subplots(2, 2)
    events = [line["events"] for line in result.log]
    # One line of the log is a point, which a line without markers does not show.
    marker = "o" if len(events) == 1 else ""

    loss_name = "MSE" if config.task == "binary" else "cross-entropy"
    quality.plot(events, [line["loss"] for line in result.log], color="C0", marker=marker)
    quality.set(xlabel="events", ylabel=loss_name, title="Prequential loss and accuracy")
    quality.yaxis.label.set_color("C0")
    right = quality.twinx()
    right.plot(events, [line["accuracy"] for line in result.log], color="C1", marker=marker)
    right.set_ylabel("accuracy", color="C1")
    quality.axvline(stream.n_train, color="grey", linestyle=":")
    quality.annotate(
        " test part", (stream.n_train, 1.0), xycoords=("data", "axes fraction"), va="top"
    )

    for color, name in enumerate(SIDES):
        mean = [line[f"mean_{name}_size"] for line in result.log]
        size.plot(events, mean, color=f"C{color}", marker=marker, label=f"mean {name} size")
    size.set(xlabel="events", ylabel="numbers per row", title="Mean size", ylim=(0, None))
    size.legend()

    sizes = list(result.memory["user"]["rows_per_size"])
    for k, name in enumerate(SIDES):
        counts = list(result.memory[name]["rows_per_size"].values())
        place = [i + 0.4 * k - 0.2 for i in range(len(sizes))]
        histogram.bar(place, counts, width=0.4, color=f"C{k}", label=name)
    histogram.set_xticks(range(len(sizes)), sizes)
    histogram.set(xlabel="size", ylabel="IDs", title="IDs that ended at each size")

    for color, (name, buckets) in enumerate(result.sizes_by_frequency.items()):
        x, y = [b["from"] for b in buckets], [b["mean_size"] for b in buckets]
        frequency.plot(x, y, marker="o", color=f"C{color}", label=name)
    frequency.set_xscale("log", base=2)
    frequency.set(xlabel="events of the ID", ylabel="mean size", title="Size by frequency")
    frequency.set_ylim(0, None)
    if sizes:
        histogram.legend()
    if result.sizes_by_frequency:
        frequency.legend()
    for axes in (quality, size):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=110)
