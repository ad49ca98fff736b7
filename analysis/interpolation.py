"""Loss and accuracy on the line between two finished runs: ``python -m analysis.interpolation one=DIR other=DIR``.

Both are runs of one architecture; ``one`` is at 0, ``other`` at 1. Kept in the folder of ``one`` as the measurement
``interpolation``; drawn as PDF and PNG with the data as CSV.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from analysis.cli import REQUIRED, script
from analysis.collect import Row
from analysis.figures.base import Drawn, find, panels, save
from analysis.subject import DATA, names, run_folder, subject
from research.curvature.interpolation import LEVELS, interpolation
from research.results import weights_place
from research.runs.measurements import Measurement, measured

KIND = "interpolation"
DEFAULTS: dict[str, Any] = {
    "one": REQUIRED,
    "other": REQUIRED,
    "level": "latent",
    "start": -0.5,
    "end": 1.5,
    "points": 21,
    "images": 512,
    "batch_size": 128,
    "output": "figures",
    "data": DATA,
}


def line(start: float, end: float, points: int) -> list[float]:
    """``points`` equally spaced positions from ``start`` to ``end``, and both ends 0 and 1 where they are missing.

    Raises:
        ValueError: fewer than two points, or a line that does not hold both ends.
    """
    if points < 2:
        raise ValueError(f"points={points}: use 2 or more, such as 21")
    if start > 0 or end < 1:
        raise ValueError(f"start={start:g} end={end:g}: the runs lie at 0 and 1; use -0.5 and 1.5")
    step = (end - start) / (points - 1)
    return sorted({0.0, 1.0, *(round(start + index * step, 9) for index in range(points))})


def measure_interpolation(one: Row, other: Row, settings: dict[str, Any], data: str) -> Measurement:
    """The line between two deployments, from the first one's run folder or measured and kept there.

    Args:
        one: the deployment at 0, as ``collect`` gives it.
        other: the deployment at 1.
        settings: ``level``, ``start``, ``end``, ``points``, ``images`` and ``batch_size``.
        data: folder of the data sets.

    Returns:
        The measurement; its values are ``rows`` of ``{t, loss, accuracy}`` and ``barrier``, the greatest loss between
        the ends less the greater loss of both.
    """
    folders = [run_folder(row) for row in (one, other)]
    weights = [weights_place(folder, row["name"]) for folder, row in zip(folders, (one, other), strict=True)]
    if not weights[1].is_file():
        raise ValueError(f"other={folders[1].path}: {weights[1].name} is missing, so nothing can be measured")

    def measure() -> dict[str, Any]:
        ends = [
            subject(folder, row["name"], settings["images"], settings["batch_size"], data)
            for folder, row in zip(folders, (one, other), strict=True)
        ]
        along = line(settings["start"], settings["end"], settings["points"])
        rows = interpolation(ends[0].net, ends[1].net, ends[0].task, ends[0].batches, along, settings["level"])
        at = {row["t"]: row["loss"] for row in rows}
        between = max(loss for t, loss in at.items() if 0 <= t <= 1)
        return {"rows": rows, "barrier": between - max(at[0.0], at[1.0])}

    whole = {
        "deployment": one["name"],
        "surface": "perturbation",
        "part": "train",
        **settings,
        "other": f"{other['experiment']}/{other['hash']}/{other['name']}",
        "other_subject": hashlib.sha256(weights[1].read_bytes()).hexdigest(),
    }
    return measured(folders[0], KIND, whole, weights[0], measure)


def draw(one: Row, other: Row, found: Measurement) -> Drawn:
    """Loss and accuracy against the position, the runs themselves marked."""
    figure, axes = panels(1, 2, width=3.4, height=2.8)
    rows = found["values"]["rows"]
    places = [row["t"] for row in rows]
    ends = names([one, other])
    for axis, key, unit, factor in (
        (axes[0], "loss", "training loss (nats)", 1),
        (axes[1], "accuracy", "training accuracy (%)", 100),
    ):
        values = [factor * row[key] for row in rows]
        axis.plot(places, values, "-k", linewidth=1.2)
        for place, marker, name in ((0.0, "o", ends[0]), (1.0, "s", ends[1])):
            axis.plot(place, values[places.index(place)], marker, color="black", markersize=6, label=name)
        axis.set_xlabel("position t (0: first run, 1: second run)")
        axis.set_ylabel(unit)
    figure.suptitle(f"{found['settings']['level']} weights interpolated", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return Drawn(figure, ("t", "loss", "accuracy"), [(row["t"], row["loss"], row["accuracy"]) for row in rows])


def main(
    one: str,
    other: str,
    level: str,
    start: float,
    end: float,
    points: int,
    images: int,
    batch_size: int,
    output: str,
    data: str,
) -> None:
    """Measure and draw.

    Args:
        one: the run folder at 0.
        other: the run folder at 1.
        level: ``latent`` (latent weights and ranges interpolated, then quantized) or ``quantized`` (de-quantized
            weights interpolated).
        start: first position, 0 or less.
        end: last position, 1 or more.
        points: positions between them; 0 and 1 are always measured.
        images: training images.
        batch_size: images at a time.
        output: folder for ``interpolation_<level>.{pdf,png,csv}``.
        data: folder of the data sets.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level}: use one of {', '.join(LEVELS)}")
    line(start, end, points)
    rows = [_single(key, path) for key, path in (("one", one), ("other", other))]
    settings = {
        "level": level, "start": float(start), "end": float(end), "points": points, "images": images,
        "batch_size": batch_size,
    }  # fmt: skip
    found = measure_interpolation(rows[0], rows[1], settings, data)
    for row in found["values"]["rows"]:
        print(f"t {row['t']:6.3f}  loss {row['loss']:.4g}  accuracy {row['accuracy']:.4f}")
    print(f"barrier {found['values']['barrier']:.4g}")
    pdf, *_ = save(draw(rows[0], rows[1], found), Path(output), f"interpolation_{level}")
    print(f"wrote {pdf}, .png and .csv")


def _single(key: str, path: str) -> Row:
    rows = find(path)
    if len(rows) != 1:
        raise ValueError(f"{key}={path}: {len(rows)} deployments there; name the folder of a run with one")
    return rows[0]


if __name__ == "__main__":
    script(main, DEFAULTS)
