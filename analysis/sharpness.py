"""How far the training loss of finished runs rises in a ball: ``python -m analysis.sharpness runs=GLOB rho=[0.1,0.2]``.

At worst (``form=worst``, projected gradient ascent), at the point of SAM (``one_step``), or on average over random
directions (``average``), in a ball of the given norm (``norm=plain|relative|adaptive|filter``). Kept in each run folder
as the measurement ``sharpness``, one for each radius; drawn as PDF and PNG with the data as CSV.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from analysis.cli import REQUIRED, script
from analysis.collect import Row
from analysis.figures.base import Drawn, find, panels, save, styles
from analysis.subject import DATA, Subject, listed, names, run_folder, subject
from research.curvature.displacement import SITES
from research.curvature.radius import NORMS, average_case, worst_case
from research.results import weights_place
from research.runs.measurements import Measurement, measured

KIND = "sharpness"
DEFAULTS: dict[str, Any] = {
    "runs": REQUIRED,
    "rho": [0.05, 0.1, 0.2, 0.5],
    "form": "worst",
    "norm": "plain",
    "site": "quantized",
    "steps": 10,
    "directions": 20,
    "kinds": ["weight"],
    "images": 512,
    "batch_size": 128,
    "seed": 0,
    "output": "figures",
    "data": DATA,
}
Form = Literal["worst", "one_step", "average"]
FORMS: tuple[Form, ...] = get_args(Form)
FORM_WORDS = {"worst": "greatest rise found", "one_step": "rise after one ascent step", "average": "mean rise"}
UNITS = {
    "plain": "units of the weights",
    "relative": "norms of all weights",
    "adaptive": "relative to each weight",
    "filter": "norms of each filter",
}


def values_of(of: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """One measurement: ``clean`` loss and ``rise`` (``standard_error`` and ``worst`` of random directions too)."""
    shared = {"norm": settings["norm"], "site": settings["site"], "kinds": settings["kinds"]}
    if settings["form"] == "average":
        average = average_case(
            of.net, of.loss, of.batches, settings["rho"], directions=settings["directions"], seed=settings["seed"],
            **shared,
        )  # fmt: skip
        return {
            "clean": average.clean,
            "rise": average.rise,
            "standard_error": average.standard_error,
            "worst": average.worst,
        }
    found = worst_case(of.net, of.loss, of.batches, settings["rho"], steps=settings["steps"], **shared)
    return {"clean": found.clean, "rise": found.rise, "gradient_norm": found.gradient_norm}


def measure_sharpness(row: Row, settings: dict[str, Any], radii: Sequence[float], data: str) -> list[Measurement]:
    """The sharpness of a deployment at each radius, from its run folder or measured and kept there.

    Args:
        row: a deployment as ``collect`` gives it.
        settings: ``form``, ``norm``, ``site``, ``kinds``, ``images``, ``batch_size``, and ``steps`` or ``directions``
            and ``seed``.
        radii: in the units of the norm.
        data: folder of the data sets.
    """
    folder = run_folder(row)
    loaded: list[Subject] = []

    def of() -> Subject:
        if not loaded:
            loaded.append(subject(folder, row["name"], settings["images"], settings["batch_size"], data))
        return loaded[0]

    found = []
    for rho in radii:
        whole = {"deployment": row["name"], "surface": "perturbation", "part": "train", **settings, "rho": float(rho)}
        weights = weights_place(folder, row["name"])
        found.append(measured(folder, KIND, whole, weights, lambda whole=whole: values_of(of(), whole)))  # type: ignore[misc]
    return found


def draw(rows: Sequence[Row], found: Sequence[Sequence[Measurement]]) -> Drawn:
    """The rise against the radius, a line for each run.

    Args:
        rows: deployments.
        found: their measurements, of equal settings but for the radius.
    """
    figure, (axis,) = panels(1, 1, width=4.8, height=3.2)
    labels = names(rows)
    known = styles(labels)
    settings = found[0][0]["settings"]
    table: list[tuple[Any, ...]] = []
    for row, label, records in zip(rows, labels, found, strict=True):
        radii = [record["settings"]["rho"] for record in records]
        rises = [record["values"]["rise"] for record in records]
        errors = [record["values"].get("standard_error", 0.0) for record in records]
        axis.errorbar(radii, rises, errors if any(errors) else None, label=label, capsize=2, **known[label])
        table += [
            (row["experiment"], row["hash"], row["name"], rho, record["values"]["clean"], rise, error)
            for rho, record, rise, error in zip(radii, records, rises, errors, strict=True)
        ]
    if all(line[5] > 0 for line in table):
        axis.set_yscale("log")
    axis.set_xlabel(f"radius ρ ({UNITS[settings['norm']]})")
    axis.set_ylabel(f"{FORM_WORDS[settings['form']]} of the loss (nats)")
    axis.set_title(f"{settings['site']} weights displaced, {settings['images']} training images")
    axis.legend()
    return Drawn(figure, ("experiment", "hash", "deployment", "rho", "clean", "rise", "standard_error"), table)


def main(
    runs: str,
    rho: list[float] | float,
    form: str,
    norm: str,
    site: str,
    steps: int,
    directions: int,
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
        rho: radius, or a list of them.
        form: ``worst``, ``one_step`` or ``average``.
        norm: ``plain``, ``relative``, ``adaptive`` or ``filter``: what counts as far.
        site: ``quantized`` (displaced behind the weight quantizer) or ``latent`` (before it).
        steps: gradients of the ascent, for ``worst``.
        directions: random directions, for ``average``.
        kinds: which parameters are displaced: ``weight``, ``bias``, ``norm_weight``, ``norm_bias``.
        images: training images that the loss is the mean over.
        batch_size: images at a time.
        seed: of the random directions.
        output: folder for ``sharpness_<form>_<norm>_<site>.{pdf,png,csv}``.
        data: folder of the data sets.
    """
    for key, value, allowed in (("form", form, FORMS), ("norm", norm, NORMS), ("site", site, SITES)):
        if value not in allowed:
            raise ValueError(f"{key}={value}: use one of {', '.join(allowed)}")
    radii = sorted(listed("rho", rho))
    settings: dict[str, Any] = {
        "form": form, "norm": norm, "site": site, "kinds": listed("kinds", kinds), "images": images,
        "batch_size": batch_size,
    }  # fmt: skip
    settings |= {
        "worst": {"steps": steps},
        "one_step": {"steps": 1},
        "average": {"directions": directions, "seed": seed},
    }[form]
    rows = find(runs)
    found = []
    for row, name in zip(rows, names(rows), strict=True):
        found.append(measure_sharpness(row, settings, radii, data))
        for record in found[-1]:
            values = record["values"]
            error = f" ± {values['standard_error']:.2g}" if "standard_error" in values else ""
            rises = f"rise {values['rise']:.4g}{error}"
            print(f"{name}: rho {record['settings']['rho']:g}, loss {values['clean']:.4g}, {rises}", flush=True)
    pdf, *_ = save(draw(rows, found), Path(output), f"sharpness_{form}_{norm}_{site}")
    print(f"wrote {pdf}, .png and .csv")


if __name__ == "__main__":
    script(main, DEFAULTS)
