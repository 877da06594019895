"""The pictures of the examples: loss by step, the ways down a narrow valley, and accuracies of many workers.

The colours, from the palettes of Okabe & Ito and of Tol, can be told apart by colour-blind people; each optimizer
also has a line style or a panel of its own, so that the pictures survive a black and white printer. They are drawn
on a `Figure` directly: pyplot would look for a display.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

INK = "#333333"
PALE = "#b8b8b8"
STYLES = {
    "sgd": ("#0072B2", "-"),
    "momentum": ("#D55E00", "--"),
    "rmsprop": ("#009E73", "-."),
    "adam": ("#AA4499", (0, (1, 1))),
}
ORDER = [*STYLES.values(), ("#56B4E9", (0, (5, 1, 1, 1, 1, 1)))]
SIZE = 12  # points, of all text but titles
SETTLED = 1e-3  # f below this: the minimum is reached, as far as one can see


def loss_curves(curves: dict[str, list[float]], path: Path) -> Path:
    """Draws the loss of each optimizer after 0, 1, 2, … steps, on a logarithmic scale."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.add_subplot()
    for name, losses in curves.items():
        colour, line = STYLES[name]
        axes.plot(losses, color=colour, linestyle=line, linewidth=2, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, max(map(len, curves.values())) - 1)
    axes.set_ylim(top=3)
    axes.grid(color=PALE, linewidth=0.5, alpha=0.6)
    label(axes, "step", "cross-entropy of the training set")
    axes.legend(fontsize=SIZE, frameon=False, handlelength=3)
    axes.set_title("Handwritten digits, one softmax layer, four optimizers", fontsize=SIZE + 2, color=INK, loc="left")
    return save(figure, path)


def ravine(paths: dict[str, np.ndarray], curvature: np.ndarray, path: Path) -> Path:
    """Draws a panel for each optimizer: the contours of ½ Σ curvature · point², and the points of its path."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    points = np.concatenate(list(paths.values()))
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.08 * (high - low)
    for panel, (name, walked) in zip(panels.flat, paths.items(), strict=True):
        contours(panel, curvature, low - margin, high + margin)
        walk(panel, name, walked, curvature)
        label(panel, "x" if panel in panels[-1] else "", "y" if panel in panels[:, 0] else "")
    figure.suptitle("Down the ravine: f = (x² + 30 y²) / 2", fontsize=SIZE + 3, color=INK)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=SIZE, frameon=False)
    return save(figure, path)


def accuracies(curves: dict[str, list[tuple[float, float]]], title: str, x: str, path: Path) -> Path:
    """Draws the accuracy (0 to 1) on the test images, by whatever `x` is."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.add_subplot()
    for (name, points), (colour, line) in zip(curves.items(), ORDER, strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, linewidth=2, label=name)
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color=PALE, linewidth=0.5, alpha=0.6)
    label(axes, x, "accuracy on the test images")
    axes.legend(fontsize=SIZE, frameon=False, handlelength=3, loc="center right")
    axes.set_title(title, fontsize=SIZE + 2, color=INK, loc="left")
    return save(figure, path)


def contours(axes: Axes, curvature: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    x, y = np.meshgrid(np.linspace(low[0], high[0], 300), np.linspace(low[1], high[1], 300))
    height = (curvature[0] * x**2 + curvature[1] * y**2) / 2
    levels = np.geomspace(0.05, height.max(), 11)
    axes.contourf(x, y, height, levels=[0, *levels], cmap="Greys", alpha=0.2, norm="symlog")
    axes.contour(x, y, height, levels=levels, colors=PALE, linewidths=0.7)


def walk(axes: Axes, name: str, walked: np.ndarray, curvature: np.ndarray) -> None:
    colour, _ = STYLES[name]
    axes.plot(*walked.T, color=colour, linewidth=1.6, marker="o", markersize=3.5)
    axes.plot(*walked[0], "s", color=INK, markersize=9, linestyle="none", label="start")
    axes.plot(0, 0, "*", color="white", markeredgecolor=INK, markersize=16, linestyle="none", label="minimum")
    axes.set_title(f"{name}: {outcome(walked, curvature)}", fontsize=SIZE + 1, color=colour, fontweight="bold")


def outcome(walked: np.ndarray, curvature: np.ndarray) -> str:
    heights = walked**2 @ curvature / 2
    unsettled = np.flatnonzero(heights >= SETTLED)
    steps = unsettled[-1] + 1 if unsettled.size else 0
    if steps == len(walked):
        return f"f = {heights[-1]:.2g} after {len(walked) - 1} steps"
    return f"f < {SETTLED:g} from step {steps} on"


def label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=SIZE, color=INK)
    axes.set_ylabel(y, fontsize=SIZE, color=INK)
    axes.tick_params(labelsize=SIZE - 1, colors=INK)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
