"""Curvature of finished runs: ``python -m analysis.curvature runs=GLOB [surface=quantized] [operator=hessian] [k=5]``.

The k greatest eigenvalues with their residuals and the trace with its standard error, of each deployment, at a stated
surface, on training images that are the same for every run of one data set; with ``initial=true`` also of the float
network that each run started from. Kept in the run folder as the measurements ``curvature``, and on demand
``layer_curvature``, ``quantizer_curvature`` and ``spectral_density``; logged to the run's W&B folder. What has not
converged is marked everywhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch

from analysis.cli import REQUIRED, script
from analysis.collect import Row, collect
from analysis.subject import DATA, Subject, listed, run_folder, use_threads
from research.curvature.batches import FixedBatches
from research.curvature.estimates import shown
from research.curvature.operators import CurvatureOperator
from research.curvature.quantizer_traces import quantizer_traces
from research.curvature.spectrum import block_traces, spectral_density, top_eigenvalues, trace
from research.results import finished_network, recorded_data, starting_network, weights_place
from research.runs.folder import RunFolder
from research.runs.logger import finish_wandb, wandb_logger
from research.runs.measurements import Measurement, measured
from research.runs.records import read_config
from research.targets import resolve_target

INITIAL = "initial"
"""Stands for a deployment's name: the float network that the run started from."""

DEFAULTS: dict[str, Any] = {
    "runs": REQUIRED,
    "deployment": None,
    "initial": False,
    "surface": "quantized",
    "operator": "hessian",
    "kinds": ["weight"],
    "images": 512,
    "batch_size": 128,
    "k": 5,
    "tolerance": 1e-3,
    "max_iterations": 100,
    "probes": 16,
    "block_probes": 30,
    "seeds": [0, 1],
    "density": False,
    "density_runs": 4,
    "density_steps": 60,
    "per_layer": False,
    "per_quantizer": False,
    "keep_graphs": True,
    "threads": None,
    "wandb": "offline",
    "data": DATA,
    "checkpoints": os.environ.get("FLATBIT_CHECKPOINTS", "checkpoints"),
}


class Options(TypedDict):
    """Types of the options, see `main`."""

    deployment: str | None
    initial: bool
    surface: str
    operator: str
    kinds: str | list[str]
    images: int
    batch_size: int
    k: int
    tolerance: float
    max_iterations: int
    probes: int
    block_probes: int
    seeds: int | list[int]
    density: bool
    density_runs: int
    density_steps: int
    per_layer: bool
    per_quantizer: bool
    keep_graphs: bool
    threads: int | None
    wandb: Literal["offline", "online", "disabled"]
    data: str
    checkpoints: str


SHARED = ("surface", "operator", "kinds", "images", "batch_size")
"""Options that every measurement depends on."""

PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "per_layer": ("layer_curvature", ("block_probes",)),
    "per_quantizer": ("quantizer_curvature", ("block_probes",)),
    "density": ("spectral_density", ("density_runs", "density_steps")),
}
"""What is measured on demand: kind of the measurement, and the further options that it depends on."""


class Measured:
    """One network of a run, which is only built where something has not been measured yet.

    Args:
        folder: the run.
        name: a deployment, or ``initial``.
        options: those of the script.
    """

    def __init__(self, folder: RunFolder, name: str, options: Mapping[str, Any]) -> None:
        self.folder, self.name, self.options = folder, name, options
        self.new: dict[str, float] = {}
        self._operator: CurvatureOperator | None = None
        paths = {"checkpoints": options["checkpoints"], "runs": str(folder.path.parents[1])}
        self._initial = starting_network(folder, paths) if name == INITIAL else None
        self.weights = weights_place(folder, name) if self._initial is None else self._initial[1]

    @property
    def operator(self) -> CurvatureOperator:
        """The curvature operator."""
        if self._operator is None:
            options = self.options
            data = recorded_data(self.folder, {"data": options["data"]})
            net = finished_network(self.folder, self.name) if self._initial is None else self._initial[0]
            task = resolve_target(read_config(self.folder.config_path)["task"], key="task")
            subject = Subject(net, task, FixedBatches.of(data, options["images"], options["batch_size"]))
            self._operator = CurvatureOperator(
                options["operator"],
                subject.net,
                subject.loss,
                subject.batches,
                options["surface"],
                kinds=options["kinds"],
                keep_graphs=options["keep_graphs"],
            )
        return self._operator

    def measurement(
        self, kind: str, keys: Sequence[str], seed: int, values: Callable[[], Mapping[str, Any]]
    ) -> Measurement:
        """A measurement from the run folder, or a new one, with what it was taken on and how long it took."""

        def measure() -> dict[str, Any]:
            start = time.perf_counter()
            found = {"taken_on": self.operator.settings, **values()}
            self.new |= flat_values(found, self._prefix(seed))
            return {**found, "threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - start, 1)}

        chosen = {key: self.options[key] for key in (*SHARED, *keys)}
        settings = {"deployment": self.name, **chosen, "seed": seed}
        return measured(self.folder, kind, settings, self.weights, measure)

    def spectrum(self, seed: int) -> Measurement:
        """Eigenvalues and trace."""
        options = self.options

        def values() -> dict[str, Any]:
            found = top_eigenvalues(self.operator, options["k"], options["tolerance"], options["max_iterations"], seed)
            top = found.record()
            return {
                "eigenvalues": top["values"],
                "iterations": top["iterations"],
                "trace": trace(self.operator, options["probes"], seed, known=found.explored).record(),
            }

        return self.measurement("curvature", ("k", "tolerance", "max_iterations", "probes"), seed, values)

    def part(self, option: str, seed: int) -> Measurement:
        """What an option of `PARTS` asks for."""
        kind, keys = PARTS[option]

        def values() -> dict[str, Any]:
            operator, probes = self.operator, self.options["block_probes"]
            if option == "density":
                runs, steps = self.options["density_runs"], self.options["density_steps"]
                return spectral_density(operator, runs, steps, seed=seed).record()
            if option == "per_layer":
                found = block_traces(operator, probes, seed)
            else:
                found = quantizer_traces(operator.net, operator.loss, operator.batches, probes, seed)
            return {"traces": {block: estimate.record() for block, estimate in found.items()}}

        return self.measurement(kind, keys, seed, values)

    def _prefix(self, seed: int) -> str:
        return f"curvature/{self.options['surface']}/{self.options['operator']}/{self.name}/seed{seed}"


def flat_values(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Numbers to log, by name; an eigenvalue that has not converged says so in its own."""
    found = {}
    for rank, entry in enumerate(values.get("eigenvalues", ())):
        name = f"{prefix}/eigenvalue_{rank + 1}" if rank else f"{prefix}/top_eigenvalue"
        found[name if entry["converged"] else f"{name}_unconverged"] = entry["value"]
        found[f"{name}_residual"] = entry["residual"]
    traces = {"trace": values["trace"]} if "trace" in values else {}
    traces |= {f"trace/{block}": entry for block, entry in values.get("traces", {}).items()}
    for name, entry in traces.items():
        found[f"{prefix}/{name}"] = entry["value"]
        found[f"{prefix}/{name}_standard_error"] = entry["standard_error"]
    return found


def log_to_wandb(folder: RunFolder, values: Mapping[str, float], mode: str) -> None:
    """Put ``values`` into the summary of the run's own W&B run."""
    project = read_config(folder.config_path)["logger"]["wandb"]["project"]
    logger = wandb_logger(folder, {}, mode, project)
    if logger is not None:
        logger.experiment.summary.update(dict(values))
        finish_wandb(logger, folder)


def networks(rows: Sequence[Row], deployment: str | None, initial: bool) -> Iterator[tuple[RunFolder, str]]:
    """Run folder and name of every network to measure.

    Raises:
        ValueError: no run has such a deployment.
    """
    chosen = [row for row in rows if deployment in (None, row["name"])]
    if not chosen:
        there = ", ".join(dict.fromkeys(row["name"] for row in rows))
        raise ValueError(f"deployment={deployment}: the runs have {there}; use one of them")
    for index, row in enumerate(chosen):
        folder = run_folder(row)
        if initial and (index == 0 or chosen[index - 1]["path"] != row["path"]):
            yield folder, INITIAL
        yield folder, row["name"]


def line(folder: RunFolder, name: str, record: Measurement) -> str:
    """A row of the table: what was measured, and what came out."""
    values, settings = record["values"], record["settings"]
    eigenvalues = ", ".join(shown(entry["value"], entry["converged"]) for entry in values["eigenvalues"])
    estimate = values["trace"]
    return (
        f"{folder.experiment}/{folder.hash} {name:8} {settings['surface']:9} {settings['operator']:7} "
        f"seed {settings['seed']}  eigenvalues {eigenvalues}  "
        f"trace {estimate['value']:.4g} ± {estimate['standard_error']:.2g}  {values['seconds'] / 60:.1f} min"
    )


def block_lines(record: Measurement) -> list[str]:
    """A line for every block of ``layer_curvature`` and ``quantizer_curvature``, greatest trace first."""
    traces = sorted(record["values"]["traces"].items(), key=lambda entry: -entry[1]["value"])
    return [f"    {name:40} trace {t['value']:.4g} ± {t['standard_error']:.2g}" for name, t in traces]


def main(runs: str, **options: Unpack[Options]) -> None:
    """Measure what has not been measured, keep it, log it and print it.

    Args:
        runs: glob over run folders.
        options: see `DEFAULTS`: ``deployment`` (None: all), ``initial``, ``surface`` (quantized, latent), ``operator``
            (hessian, ggn, fisher), ``kinds`` of parameters, ``images`` and ``batch_size``, ``k`` eigenvalues to
            ``tolerance`` within ``max_iterations``, ``probes`` of the trace, ``seeds`` of the estimators; for more
            ``per_layer``, ``per_quantizer`` (``block_probes`` each) and ``density`` (``density_runs`` of
            ``density_steps``); ``keep_graphs`` (faster, with memory for all images at once); ``threads``; ``wandb``
            (offline, online, disabled); folders ``data`` and ``checkpoints``.
    """
    options["kinds"] = listed("kinds", options["kinds"])
    seeds = listed("seeds", options["seeds"])
    use_threads(options["threads"])
    for folder, name in networks(collect(runs), options["deployment"], options["initial"]):
        subject = Measured(folder, name, options)
        for seed in seeds:
            record = subject.spectrum(seed)
            print(line(folder, name, record), flush=True)
            for option in PARTS:
                if options[option]:
                    further = subject.part(option, seed)
                    print(f"  {further['kind']}: {Path(folder.path).name}/{folder.measurements.name}")
                    if option != "density":
                        print("\n".join(block_lines(further)), flush=True)
        if subject.new:
            log_to_wandb(folder, subject.new, options["wandb"])


if __name__ == "__main__":
    script(main, DEFAULTS)
