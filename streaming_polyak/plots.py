"""Figures, drawn with matplotlib (the extra "plots"), which is imported when a figure is asked for.

Colours are those of Okabe and Ito, told apart by colour-blind readers; line styles and markers tell them apart in
black and white too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streaming_polyak.files.storage import Storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    {"color": "#E69F00", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
)
_RAW: dict[str, Any] = {"color": "0.55", "linestyle": "-", "marker": ""}


def scatter(path: Path, panels: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], title: str) -> None:
    """Draws labelled points in the plane, a panel each.

    Args:
        path: the PNG file, replaced if it exists.
        panels: by title: points of shape (rows, 2) and int labels of shape (rows,).
        title: above all panels.
    """
    figure, axes = _figure(len(panels), title, width=4.2 * len(panels), height=4.2, share=True)
    for axis, (name, (points, labels)) in zip(axes, panels.items(), strict=True):
        for label, style in zip(np.unique(labels), _STYLES, strict=False):
            rows = points[labels == label]
            axis.scatter(
                rows[:, 0], rows[:, 1], s=14, alpha=0.7, color=style["color"], marker=style["marker"],
                label=f"class {label}", linewidths=0,
            )  # fmt: skip
        axis.set(title=name, xlabel="feature 1", ylabel="feature 2")
        axis.set_aspect("equal", adjustable="box")
    _finish(figure, axes[0], path)


def curves(
    path: Path,
    epochs: Sequence[int],
    panels: Mapping[str, Mapping[str, NDArray[np.float64]]],
    title: str,
    *,
    mark: tuple[float, str] | None = None,
    from_epoch: Mapping[str, int] | None = None,
) -> None:
    """Draws scores over epochs, a panel each.

    Args:
        path: the PNG file, replaced if it exists.
        epochs: the numbers on the horizontal axis.
        panels: by label of the vertical axis: lines by name, each of shape (epochs,), or (runs, epochs) of which the
            mean is drawn. The first is grey, with a band of one standard deviation; epochs with NaN are left out.
        title: above all panels.
        mark: a dotted vertical line at an epoch, and its legend entry.
        from_epoch: by panel, the first epoch shown (and scaled to).
    """
    figure, axes = _figure(len(panels), title, width=5.4 * len(panels), height=4.2)
    x = np.asarray(epochs)
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        shown = x >= (from_epoch or {}).get(label, x[0])
        for (name, values), style in zip(lines.items(), (_RAW, *_STYLES), strict=False):
            runs = np.atleast_2d(values)[:, shown]
            begun = ~np.isnan(runs).any(axis=0)
            mean, deviation = runs[:, begun].mean(axis=0), runs[:, begun].std(axis=0)
            style = {**style, "marker": style["marker"] if begun.sum() <= 60 else ""}
            axis.plot(x[shown][begun], mean, label=name, markevery=3, markersize=4, linewidth=1.4, **style)
            if len(runs) > 1 and style["color"] == _RAW["color"]:  # more bands would hide one another
                band = (mean - deviation, mean + deviation)
                axis.fill_between(x[shown][begun], *band, color="0.9", linewidth=0, label=f"{name} ± 1 deviation")
        if mark is not None:
            axis.axvline(mark[0], color="0.2", linestyle=":", linewidth=1, label=mark[1])
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.25)
    _finish(figure, axes[0], path)


def last_n(
    path: Path, singles: Sequence[float], averages: Mapping[str, Sequence[float]], title: str, score: str
) -> None:
    """Draws the score of single members as dots and of the averages of the last n as lines.

    Args:
        path: the PNG file, replaced if it exists.
        singles: score of the n-th member from the newest on, for n = 1, 2, ...
        averages: by name, score of the average of the last n members, for the same n.
        title: of the figure.
        score: label of the vertical axis.
    """
    figure, (axis,) = _figure(1, title, width=6.4, height=4.4)
    n = np.arange(1, len(singles) + 1)
    axis.plot(n, singles, "o", color="0.6", markersize=9, label="single: n-th newest member")
    for (name, values), style in zip(averages.items(), _STYLES, strict=False):
        axis.plot(n, values, label=f"average of the last n: {name}", linewidth=1.5, markersize=4.5, **style)
    axis.set(xlabel="n, counted from the newest member", ylabel=score)
    axis.set_xticks(n if len(n) <= 20 else n[:: len(n) // 10])
    axis.margins(y=0.12)
    axis.grid(alpha=0.25)
    _finish(figure, axis, path)


def _figure(panels: int, title: str, *, width: float, height: float, share: bool = False) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib. Install it with: pip install 'streaming_polyak[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharex=share, sharey=share)
    figure.suptitle(title)
    return figure, list(axes.flat)


def _finish(figure: Figure, axis: Axes, path: Path) -> None:
    """Puts the legend of `axis` below all panels, where it hides nothing, and writes the figure."""
    handles, labels = axis.get_legend_handles_labels()
    columns = len(labels) if len(labels) < 4 else -(-len(labels) // 2)
    columns = min(columns, max(1, int(figure.get_figwidth() / 2.8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    # Without the format, savefig appends a suffix where there is none.
    Storage().commit(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"), overwrite=True)
