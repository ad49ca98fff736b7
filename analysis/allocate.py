"""Bits per layer from a finished run: ``python -m analysis.allocate run=DIR method=hessian_trace
budget.kind=average_bits budget.value=3 [bits=[2,3,4,8]] [output=allocation.yaml]``.

``uniform`` takes one width for all layers, ``hessian_trace`` the curvature of the loss at each layer times its
quantization error (HAWQ-V2), ``greedy`` the rise of the loss when one layer alone is quantized; the last two go through
one integer linear programme. ``shuffled`` gives the widths of a found allocation (``table=FILE``) to other layers:
what the choice of the layers was worth. Sensitivities are kept in the run folder as the measurement ``sensitivity``. A
training takes the result as ``quantizer.table=allocation.yaml``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from omegaconf import OmegaConf
from torch import Tensor, nn

from analysis.cli import REQUIRED, script
from analysis.subject import DATA, Subject, listed, use_threads
from research.curvature.batches import FixedBatches
from research.curvature.operators import CurvatureOperator
from research.curvature.progress import progress
from research.curvature.sharpness import mean_loss
from research.curvature.spectrum import block_traces
from research.error_line import CONF
from research.learning.finalise import SINGLE
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Choices, Counts, budgets_from_config
from research.quant.calibrate import calibrate
from research.quant.ilp import allocate, total
from research.quant.layers import quant_layers
from research.quant.recipe import FLOAT_BITS, Recipe, Table, table_to_plain
from research.quant.sensitivity import (
    ELSEWHERE,
    candidates,
    hessian_sensitivities,
    perturbation_sensitivities,
    weight_errors,
    with_quantizers,
    without_quantizers,
)
from research.quant.shuffled import shuffled
from research.quant.uniform import uniform
from research.results import finished_network, recorded_data, starting_network, weights_place
from research.runs.allocation import read_allocation, read_table, write_allocation
from research.runs.folder import RunFolder
from research.runs.measurements import measured
from research.runs.records import read_config
from research.targets import resolve_target

KIND = "sensitivity"
METHODS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "shuffled": (),
    "hessian_trace": ("images", "batch_size", "operator", "probes", "seed"),
    "greedy": ("images", "batch_size", "elsewhere"),
}
"""What can be asked for, and the options that its sensitivities depend on."""

DEFAULTS: dict[str, Any] = {
    "run": REQUIRED,
    "method": REQUIRED,
    "budget": REQUIRED,
    "bits": [2, 3, 4, 8],
    "input_bits": "same",
    "first_last": 8,
    "quantizer": None,
    "deployment": SINGLE,
    "initial": False,
    "table": None,
    "elsewhere": "float",
    "operator": "hessian",
    "probes": 30,
    "seed": 0,
    "images": 512,
    "batch_size": 128,
    "threads": None,
    "output": "allocation.yaml",
    "data": DATA,
    "checkpoints": os.environ.get("FLATBIT_CHECKPOINTS", "checkpoints"),
}


class Options(TypedDict):
    """Types of the options, see `main`."""

    bits: int | list[int]
    input_bits: int | Literal["same"]
    first_last: int | None
    quantizer: str | None
    deployment: str
    initial: bool
    table: str | None
    elsewhere: str
    operator: str
    probes: int
    seed: int
    images: int
    batch_size: int
    threads: int | None
    data: str
    checkpoints: str


class Network:
    """A network of a run, with what the choice of its widths needs.

    Args:
        folder: a finished run with its weights.
        options: those of the script.

    Attributes:
        net: as finished, or the float network that the run started from.
        weights: the file of its weights.
        base: which quantizer each slot gets.
        fixed: names of the layers that are not searched.
        choices: candidates by layer.
        counts: what costs are computed from.
    """

    def __init__(self, folder: RunFolder, options: Mapping[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.net: nn.Module
        if options["initial"]:
            paths = {"checkpoints": options["checkpoints"], "runs": str(folder.path.parents[1])}
            self.net, self.weights = starting_network(folder, paths)
        else:
            self.net = finished_network(folder, options["deployment"])
            self.weights = weights_place(folder, options["deployment"])
        structure = self.net.structure()  # type: ignore[operator]
        self.base = base_table(folder, options["quantizer"], self.net, structure.first, structure.last)
        ends = (structure.first, structure.last)
        self.fixed = () if options["first_last"] is None else ends
        self.choices = choices_of(
            self.base, listed("bits", options["bits"]), options["input_bits"], options["first_last"], ends
        )
        self.data = recorded_data(folder, {"data": options["data"]})
        shape = (self.data.in_channels, self.data.image_size, self.data.image_size)
        widest = Allocation({name: max(options) for name, options in self.choices.items()})
        self.latent = without_quantizers(self.net)
        self.uncalibrated = candidates(self.latent, self.base, self.choices)  # refuses what a quantizer does not take
        self.counts = Counts.of(with_quantizers(self.latent, widest.table(self.base)), shape, *ends)

    @cached_property
    def subject(self) -> Subject:
        """The network with its task and the images to measure on."""
        task = resolve_target(read_config(self.folder.config_path)["task"], key="task")
        batches = FixedBatches.of(self.data, self.options["images"], self.options["batch_size"])
        return Subject(self.net, task, batches)

    @cached_property
    def candidates(self) -> dict[LayerBits, nn.Module]:
        """Calibrated networks, one for each candidate."""
        inputs: list[Tensor] = [batch[0] for batch in self.subject.batches]
        for net in self.uncalibrated.values():
            calibrate(net, inputs)
        return self.uncalibrated

    def sensitivities(self, method: str) -> dict[str, dict[LayerBits, float]]:
        """What each candidate of each layer costs, from the run folder or measured and kept there."""
        plain = json.dumps(table_to_plain(self.base), sort_keys=True)
        settings = {
            "deployment": "initial" if self.options["initial"] else self.options["deployment"],
            "method": method,
            "candidates": {name: [str(bits) for bits in options] for name, options in self.choices.items()},
            "quantizers": hashlib.sha256(plain.encode()).hexdigest()[:10],
            **{key: self.options[key] for key in METHODS[method]},
        }
        record = measured(self.folder, KIND, settings, self.weights, lambda: self._measure(method))
        kept = record["values"]["sensitivities"]
        return {name: {bits: kept[name][str(bits)] for bits in options} for name, options in self.choices.items()}

    def _measure(self, method: str) -> dict[str, Any]:
        start = time.perf_counter()
        further: dict[str, Any] = {}
        if method == "greedy":
            found = perturbation_sensitivities(
                self.latent, self.candidates, self.choices, self._loss, self.options["elsewhere"],
                lambda names: progress(names, "layers"),
            )  # fmt: skip
        else:
            operator = CurvatureOperator(
                self.options["operator"], self.net, self.subject.loss, self.subject.batches, "quantized"
            )
            traces = block_traces(operator, self.options["probes"], self.options["seed"])
            further["traces"] = {name: estimate.record() for name, estimate in traces.items()}
            values = {name: traces[name].value for name in self.choices}
            weights = {name: layer.weight.numel() for name, layer in quant_layers(self.net)}
            found = hessian_sensitivities(values, weights, weight_errors(self.candidates, self.choices))
        plain = {name: {str(bits): value for bits, value in options.items()} for name, options in found.items()}
        return {"sensitivities": plain, **further, "seconds": round(time.perf_counter() - start, 1)}

    def _loss(self, net: nn.Module) -> float:
        return mean_loss(net, self.subject.loss, self.subject.batches)


def base_table(folder: RunFolder, quantizer: str | None, net: nn.Module, first: str, last: str) -> Table:
    """Which quantizer each slot of each layer gets: those of a recipe in ``conf/quantizer``, or those of the run.

    Raises:
        ValueError: no such recipe, or a run without quantizers and no recipe.
    """
    names = [name for name, _ in quant_layers(net)]
    if quantizer is None:
        table = read_table(folder.table_path)
        if all(slots["weight"] is None for slots in table.values()):
            raise ValueError("quantizer=null: the run is float, so say which quantizer to choose for: quantizer=lsq")
        return table
    path = CONF / "quantizer" / f"{quantizer}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"quantizer={quantizer} is unknown; use one of {known}")
    config = OmegaConf.to_container(OmegaConf.create({"quantizer": OmegaConf.load(path)}), resolve=True)
    assert isinstance(config, dict)
    return Recipe.from_config(config["quantizer"]).resolve(names, first, last)


def choices_of(
    base: Table, bits: list[Any], input_bits: Any, first_last: int | None, ends: tuple[str, str]
) -> dict[str, list[LayerBits]]:
    """The candidates of every layer.

    Args:
        base: which quantizers there are; a slot without one stays float.
        bits: candidate widths of the weights.
        input_bits: ``same`` as the weights, or a width.
        first_last: width of the first and of the last layer; None searches them as all others.
        ends: names of the two.

    Raises:
        ValueError: not a width.
    """
    if input_bits != "same" and (not isinstance(input_bits, int) or input_bits < 1):
        raise ValueError(f"input_bits={input_bits}: use same, or one width such as 8")
    if first_last is not None and first_last < 1:
        raise ValueError(f"first_last={first_last}: use one width such as 8, or null to search these layers too")
    found = {}
    for name, slots in base.items():
        fixed = first_last if name in ends else None
        follows = fixed is not None or input_bits == "same"
        options = [
            LayerBits(
                FLOAT_BITS if slots["weight"] is None else width,
                FLOAT_BITS if slots["input"] is None else width if follows else input_bits,
            )
            for width in (bits if fixed is None else [fixed])
        ]
        found[name] = list(dict.fromkeys(options))
        for option in options:
            Allocation({name: option})  # refuses what is no width
    return found


def chosen(of: Network, method: str, budgets: list[Budget]) -> Allocation:
    """The allocation of a method, within the budgets."""
    choices: Choices = of.choices
    if method == "uniform":
        return uniform(choices, of.counts, budgets)
    if method == "shuffled":
        found = read_allocation(Path(of.options["table"]))
        found.require_layers(choices)
        free = [name for name in found if name not in of.fixed]
        return shuffled(found, free, of.counts, budgets, of.options["seed"])
    for budget in budgets:
        budget.require(of.counts, choices)
    sensitivities = of.sensitivities(method)
    allocation = allocate(sensitivities, of.counts, budgets)
    print(f"{method}: summed sensitivity {total(sensitivities, allocation):.4g}")
    return allocation


def report(of: Network, allocation: Allocation, budgets: list[Budget]) -> str:
    """The widths of every layer and what they cost, as text."""
    width = max(len(name) for name in allocation)
    lines = [f"{name:{width}}  {bits}" for name, bits in allocation.items()]
    for budget in budgets:
        cost, ends = budget.cost(of.counts, allocation), budget.feasible(of.counts, of.choices)
        lines.append(f"{budget.kind} {cost:.6g} of {budget.value:.6g}, feasible {budget.shown(*ends)}")
    return "\n".join(lines)


def main(run: str, method: str, budget: Any, output: str, **options: Unpack[Options]) -> None:
    """Choose the widths, print them and write them.

    Args:
        run: folder of a finished run.
        method: ``uniform``, ``shuffled``, ``hessian_trace`` or ``greedy``.
        budget: ``{kind: ..., value: ..., convention: {...}}`` or a list of such, see `research.quant.budget`.
        output: the file, for ``quantizer.table=``.
        options: see `DEFAULTS`: candidate ``bits`` of the weights, ``input_bits`` (``same``, or one width), width of
            ``first_last`` (null: searched too), ``quantizer`` (of ``conf/quantizer``; null: the run's own),
            ``deployment``, or ``initial`` for the float network that the run started from; ``table`` and ``seed`` of
            ``shuffled``; ``elsewhere`` (float, widest) of ``greedy``; ``operator``, ``probes`` and ``seed`` of
            ``hessian_trace``; ``images`` and ``batch_size``; ``threads``; folders ``data`` and ``checkpoints``.
    """
    for key, value, allowed in (("method", method, METHODS), ("elsewhere", options["elsewhere"], ELSEWHERE)):
        if value not in allowed:
            raise ValueError(f"{key}={value}: use one of {', '.join(allowed)}")
    if (method == "shuffled") != (options["table"] is not None):
        raise ValueError(
            f"table={options['table']}: method=shuffled needs the allocation.yaml to shuffle, no other one"
        )
    budgets = budgets_from_config(budget)
    use_threads(options["threads"])
    of = Network(RunFolder.existing(run), options)
    allocation = chosen(of, method, budgets)
    print(report(of, allocation, budgets))
    write_allocation(Path(output), allocation, of.base)
    recipe = options["quantizer"]
    also = ", all else as in the run" if recipe is None else f" quantizer={recipe}"
    print(f"wrote {output}: train with quantizer.table={output}{also}")


if __name__ == "__main__":
    script(main, DEFAULTS)
