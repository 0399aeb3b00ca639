"""The curves of runs as one picture, from their stats.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.files import write_whole
from .run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
HELD_OUT = "validation/"
LEFT_OUT = {"images", "skipped", f"{HELD_OUT}s"}
WINDOW = 25  # lines in the running mean that is drawn over the bare curve


def plot(runs: Sequence[Path], file: Path):
    """Write a PNG: a panel for each kind of number, a colour for each run, held-out losses dashed."""
    stats = {str(run): RunFolder(Path(run)).stats() for run in runs}
    for run, lines in stats.items():
        if not lines:
            raise FileError(run, "no statistics here (stats.jsonl)", "Give the folder of a run that has begun")
    sheet = figure(stats)
    write_whole(file, partial(sheet.savefig, format="png", dpi=120))


def figure(stats: dict[str, list[dict[str, Any]]]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise WPlusError("drawing curves needs matplotlib: pip install matplotlib") from e
    names = panels(stats)
    rows = -(-len(names) // COLUMNS)
    sheet = Figure((5 * COLUMNS, 3 * rows), layout="constrained")
    for name, axes in zip(names, sheet.subplots(rows, COLUMNS, squeeze=False).flat, strict=False):
        axes.set(title=name, xlabel="images")
        for color, (run, lines) in enumerate(stats.items()):
            draw(axes, name, run, lines, f"C{color % 10}")
        axes.grid(alpha=0.3)
    for axes in sheet.axes[len(names) :]:
        axes.remove()
    sheet.axes[0].legend(fontsize="small")
    return sheet


def panels(stats: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The names of the numbers, in the order in which they come; a held-out loss is in the panel of its own."""
    names = (k for lines in stats.values() for line in lines for k in line if k not in LEFT_OUT)
    return list(dict.fromkeys(k.removeprefix(HELD_OUT) for k in names))


def draw(axes: Axes, name: str, run: str, lines: list[dict[str, Any]], color: str):
    x, y = curve(lines, name)
    axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(x, running_mean(y), color=color, label=run)
    x, y = curve(lines, HELD_OUT + name)
    axes.plot(x, y, color=color, linestyle="--", marker="o", markersize=3, label=f"{run}, held out" if x else None)


def curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["images"], line[name]) for line in lines if name in line]
    return [x for x, _ in points], [y for _, y in points]


def running_mean(y: list[float]) -> list[float]:
    return [sum(part) / len(part) for i in range(len(y)) if (part := y[max(0, i - WINDOW + 1) : i + 1])]
