"""Quality over the settings that were tried: a panel a setting, a point a trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .schedule import Listed
from .space import SETTINGS

__all__ = ["draw"]

# Differences in loss below are noise, those above are all bad.
_LEAST, _MOST = 3e-5, 3e-3


def draw(path: Path, tuned: Sequence[Listed], title: str) -> None:
    """Draw a panel a setting, with a line of points a method: its trials on the first order.

    The darker a point, the less its loss is above that of the method's best trial, which has a
    ring. Where dark points lie close together the setting matters; where they lie everywhere it
    does not. Stopped trials have no validation loss and are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    names = [n for n in SETTINGS if any(n in walk for m in tuned for walk in m.settings.values())]
    columns = min(len(names), 4) or 1
    rows = -(-len(names) // columns) or 1
    size = (3.2 * columns + 1.5, rows * (0.8 + 0.22 * len(tuned)) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    shades = {"cmap": "inferno", "norm": LogNorm(_LEAST, _MOST, clip=True)}
    for panel, name in zip(panels, names, strict=False):
        for line, listed in enumerate(tuned):
            # The best last: on top.
            points = sorted(_points(listed, name), key=lambda point: -point[1])
            if not points:
                continue
            x, lost = zip(*points, strict=True)
            y = [line] * len(x)
            panel.scatter(x, y, c=[max(v, _LEAST) for v in lost], s=22, **shades)
            panel.scatter(x[-1], line, s=70, facecolors="none", edgecolors="black")
        panel.set(xscale="log", xlabel=name)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(axis="y", alpha=0.2)
    panels[0].set_yticks(range(len(tuned)), [listed.method for listed in tuned])
    panels[0].set_ylim(len(tuned) - 0.5, -0.5)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    if drawn := [c for panel in panels for c in panel.collections if c.get_array() is not None]:
        figure.colorbar(drawn[0], ax=panels, label="loss less the method's best", extend="both")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _points(listed: Listed, name: str) -> list[tuple[float, float]]:
    """A setting's values in the trials that ended, and what they lost on the first order."""
    walks = [walks[k] for walks in listed.walks.values() for k in listed.orders[:1] if k in walks]
    ended = [walk for walk in walks if not walk.stopped and name in walk.settings]
    best = min((walk.loss for walk in ended), default=0.0)
    return [
        (max(float(walk.settings[name]), SETTINGS[name].low), walk.loss - best) for walk in ended
    ]
