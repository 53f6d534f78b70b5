"""Quality over the settings that were tried: a panel a setting, a point a trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .schedule import Listed
from .space import SETTINGS

__all__ = ["draw"]

_LEAST = 1e-5


def draw(path: Path, tuned: Sequence[Listed], title: str) -> None:
    """Draw what each trial lost on the first order to the method's best one there.

    Trials that were stopped have no validation loss and are left out, as are settings that no
    method varied.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [n for n in SETTINGS if any(n in walk for m in tuned for walk in m.settings.values())]
    columns = min(len(names), 4) or 1
    rows = -(-len(names) // columns) or 1
    figure = Figure(figsize=(3.2 * columns, 2.9 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, name in zip(panels, names, strict=False):
        for index, listed in enumerate(tuned):
            walks = [w[listed.orders[0]] for w in listed.walks.values() if listed.orders[0] in w]
            walks = [walk for walk in walks if not walk.stopped and name in walk.settings]
            best = min((walk.loss for walk in walks), default=0.0)
            panel.plot(
                [max(float(walk.settings[name]), SETTINGS[name].low) for walk in walks],
                [max(walk.loss - best, _LEAST) for walk in walks],
                "o" if index < 10 else "^",
                color=f"C{index % 10}",
                markersize=4,
                alpha=0.7,
                label=listed.method,
            )
        panel.set(xscale="log", yscale="log", xlabel=name)
    for panel in list(panels)[len(names) :]:
        panel.set_axis_off()
    first = figure.axes[0]
    first.set_ylabel("loss less the method's best")
    figure.suptitle(title)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6) or 1)
    figure.savefig(path, dpi=110)
