"""Slices of the training loss around finished runs: ``python -m analysis.landscape runs=GLOB [dimensions=1]``.

Along one or two random directions, filter-normalised (Li et al. 2018): the same directions for all runs of one
architecture. The loss is evaluated ``points`` times, in two dimensions ``points`` squared times. Kept in each run
folder as the measurement ``landscape``; drawn as PDF and PNG with the data as CSV.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from analysis.cli import REQUIRED, script
from analysis.collect import Row
from analysis.figures.base import Drawn, find, panels, save, styles
from analysis.subject import DATA, listed, names, run_folder, subject
from research.curvature.landscape import DIMENSIONS, filter_normalised_directions, landscape, positions
from research.results import weights_place
from research.runs.measurements import Measurement, measured

KIND = "landscape"
DEFAULTS: dict[str, Any] = {
    "runs": REQUIRED,
    "site": "quantized",
    "dimensions": 1,
    "span": 1.0,
    "points": 21,
    "kinds": ["weight"],
    "images": 512,
    "batch_size": 128,
    "seed": 0,
    "output": "figures",
    "data": DATA,
}
COLUMNS = 3
LEVELS = 12
LOGARITHMIC = 20.0
"""Greatest over least loss from which on the loss axis of a 1-D slice is logarithmic."""


def measure_landscape(row: Row, settings: dict[str, Any], data: str) -> Measurement:
    """The slice of a deployment, from its run folder or measured and kept there.

    Args:
        row: a deployment as ``collect`` gives it.
        settings: ``site``, ``dimensions``, ``span``, ``points``, ``kinds``, ``images``, ``batch_size`` and ``seed``.
        data: folder of the data sets.

    Returns:
        The measurement; its values are ``clean`` (the network's loss), ``positions``, ``losses`` (lists, nested in two
        dimensions, the first direction outside), ``minimum`` (least loss) and ``minimum_at`` (its
        positions; the network's own where none is lower).
    """
    folder, options = run_folder(row), settings

    def measure() -> dict[str, Any]:
        along = positions(options["span"], options["points"])
        of = subject(folder, row["name"], options["images"], options["batch_size"], data)
        directions = filter_normalised_directions(
            of.net, options["dimensions"], options["seed"], options["site"], options["kinds"]
        )
        losses = landscape(of.net, of.loss, of.batches, directions, along, options["site"])
        if not losses.isfinite().all():
            raise ValueError(f"span={options['span']:g}: the loss is not finite everywhere; use a smaller one")
        middle = (len(along) // 2,) * losses.ndim
        least = middle if losses[middle] == losses.min() else np.unravel_index(int(losses.argmin()), losses.shape)
        return {
            "clean": losses[middle].item(),
            "positions": along,
            "losses": losses.tolist(),
            "minimum": losses.min().item(),
            "minimum_at": [along[int(index)] for index in least],
        }

    whole = {"deployment": row["name"], "surface": "perturbation", "part": "train", **options}
    return measured(folder, KIND, whole, weights_place(folder, row["name"]), measure)


def draw(rows: Sequence[Row], found: Sequence[Measurement]) -> Drawn:
    """A line for each run in one dimension, a contour map for each in two.

    Args:
        rows: deployments.
        found: their slices, of equal settings.
    """
    return (draw_lines if found[0]["settings"]["dimensions"] == 1 else draw_maps)(rows, found)


def draw_lines(rows: Sequence[Row], found: Sequence[Measurement]) -> Drawn:
    """1-D slices in one panel."""
    figure, (axis,) = panels(1, 1, width=4.8, height=3.2)
    labels = names(rows)
    known = styles(labels)
    table: list[tuple[Any, ...]] = []
    for row, label, record in zip(rows, labels, found, strict=True):
        values = record["values"]
        axis.plot(values["positions"], values["losses"], label=label, **known[label])
        table += [(*_identity(row), x, y) for x, y in zip(values["positions"], values["losses"], strict=True)]
    losses = [line[-1] for line in table]
    if min(losses) > 0 and max(losses) > LOGARITHMIC * min(losses):
        axis.set_yscale("log")
    axis.set_xlabel("position along the direction (filter norms)")
    axis.set_ylabel("training loss (nats)")
    axis.set_title(_title(found))
    axis.legend()
    return Drawn(figure, ("experiment", "hash", "deployment", "position", "loss"), table)


def draw_maps(rows: Sequence[Row], found: Sequence[Measurement]) -> Drawn:
    """2-D slices, a panel each, with the same levels, on a logarithmic grey scale; a star marks the least loss.

    Raises:
        ValueError: the loss is the same at all points.
    """
    columns = min(COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure, axes = panels(lines, columns, width=3.0, height=2.9)
    losses = [np.array(record["values"]["losses"]) for record in found]
    low, high = min(map(np.min, losses)), max(map(np.max, losses))
    if low == high:
        raise ValueError(f"span={found[0]['settings']['span']:g}: the loss is {low:.4g} everywhere; use a larger one")
    scale = LogNorm(low, high)
    levels = np.geomspace(low, high, LEVELS)
    table: list[tuple[Any, ...]] = []
    for axis, row, label, record, loss in zip(axes, rows, names(rows), found, losses, strict=False):
        along = record["values"]["positions"]
        shades = axis.contourf(along, along, loss.T, levels, cmap="Greys", norm=scale)
        axis.contour(along, along, loss.T, levels, colors="black", linewidths=0.4)
        axis.axhline(0, color="0.4", linewidth=0.6, linestyle=":")
        axis.axvline(0, color="0.4", linewidth=0.6, linestyle=":", label="the network, at (0, 0)")
        axis.plot(*record["values"]["minimum_at"], "*k", markerfacecolor="white", markersize=11, label="least loss")
        axis.set_aspect("equal")
        axis.set_xlabel("direction 1 (filter norms)")
        axis.set_ylabel("direction 2 (filter norms)")
        ends = [along[0], 0, along[-1]]
        axis.set_xticks(ends, [f"{x:g}" for x in ends])
        axis.set_yticks(ends, [f"{x:g}" for x in ends])
        axis.set_title(label.replace(", ", "\n", 1))
        table += [(*_identity(row), x, y, loss[i, j].item()) for i, x in enumerate(along) for j, y in enumerate(along)]
    for axis in axes[len(rows) :]:
        axis.remove()
    bar = figure.colorbar(shades, ax=axes[: len(rows)], label="training loss (nats)", shrink=0.9)
    bar.set_ticks(LogLocator(subs=(1, 2, 5)).tick_values(low, high))
    bar.ax.set_ylim(low, high)
    bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(_title(found), fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return Drawn(figure, ("experiment", "hash", "deployment", "x", "y", "loss"), table)


def _identity(row: Row) -> tuple[str, str, str]:
    return row["experiment"], row["hash"], row["name"]


def _title(found: Sequence[Measurement]) -> str:
    settings = found[0]["settings"]
    return f"{settings['site']} weights displaced, {settings['images']} training images"


def main(
    runs: str,
    site: str,
    dimensions: int,
    span: float,
    points: int,
    kinds: list[str] | str,
    images: int,
    batch_size: int,
    seed: int,
    output: str,
    data: str,
) -> None:
    """Measure and draw.

    Args:
        runs: run folders, globs over them, or folders of experiments, separated by commas.
        site: ``quantized`` (displaced behind the weight quantizer) or ``latent`` (before it).
        dimensions: 1 or 2 directions.
        span: farthest position; 1 moves every filter by its own norm.
        points: positions on every axis, odd; in two dimensions their square is measured.
        kinds: which parameters are displaced: ``weight``, ``bias``, ``norm_weight``, ``norm_bias``.
        images: training images that the loss is the mean over.
        batch_size: images at a time.
        seed: of the directions.
        output: folder for ``landscape_<dimensions>d_<site>.{pdf,png,csv}``.
        data: folder of the data sets.
    """
    if dimensions not in DIMENSIONS:
        raise ValueError(f"dimensions={dimensions}: use 1 or 2")
    positions(span, points)
    settings = {
        "site": site, "dimensions": dimensions, "span": float(span), "points": points, "kinds": listed("kinds", kinds),
        "images": images, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    rows = find(runs)
    found = []
    for row, name in zip(rows, names(rows), strict=True):
        found.append(measure_landscape(row, settings, data))
        values = found[-1]["values"]
        place = ", ".join(f"{x:g}" for x in values["minimum_at"])
        print(f"{name}: loss {values['clean']:.4g}, least {values['minimum']:.4g} at ({place})", flush=True)
    pdf, *_ = save(draw(rows, found), Path(output), f"landscape_{dimensions}d_{site}")
    print(f"wrote {pdf}, .png and .csv")


if __name__ == "__main__":
    script(main, DEFAULTS)
