"""Constrained learning for quantization (Hounie, Elenter, Ribeiro, ICASSP 2023, arXiv 2210.15623; ihounie/con-qat)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.constrained.lagrangian import Distance, output_distance, proximity
from callbacks.constrained.networks import LayerRecord, at_width, broadcast, frozen_state, norms_at, output_of
from callbacks.constrained.selection import candidates, largest, ranked, within
from callbacks.constrained.state import ConstraintState
from callbacks.fixed_images import fixed_images
from research.curvature.batches import FixedBatches
from research.learning.evaluation import Evaluation, Objective, State, same_noise
from research.learning.mechanic import Claim, Mechanic, ParameterGroup
from research.learning.perturbation import average_over_processes
from research.quant.allocation import Allocation
from research.quant.batchnorm import reestimate_batchnorm, running_norms
from research.quant.budget import Budget, Counts, budgets_from_config, cost_metrics, require_budgets
from research.quant.calibrate import calibrate
from research.quant.conv_bn import QuantConvBn2d
from research.quant.layers import QuantLayer, quant_layers, quantizers
from research.quant.passes import evaluating, passes
from research.quant.quantizers.base import MAX_BITS, Quantizer
from research.runs.allocation import ALLOCATION, write_allocation
from research.runs.logger import written_folders

if TYPE_CHECKING:
    from research.learning.module import QuantModule

log = logging.getLogger(__name__)
High = Literal["relax", "identity"]
ByWidth = float | Mapping[int, float]


class Constrained(Mechanic):
    """Train the network in high precision, by primal descent and dual ascent, so that its quantized form stays close.

    ``L = CE(f, y) + sum_l lambda_l (d_l - eps_layer) + lambda_out (CE(f_q, softmax(f)) - eps_out)``: ``f`` has the
    weights in high precision, ``f_q`` the same weights quantized and batch-norms of its own, ``d_l`` compares the two
    outputs of layer l on the same quantized input. Gradients flow through the high-precision side and, of the low one,
    into the batch-norms alone. Multipliers move after every epoch, by the mean slacks of a fixed set of images.

    The network itself is ``f_q``: what is validated and deployed. With ``quantizer.widths`` there is one ``f_q``, one
    row of multipliers for each width.

    Args:
        layerwise: constrain the layers too; off, the output alone.
        eps_layer: most that the distance of a layer may be; or one number for each of ``quantizer.widths``.
        eps_out: most that the soft cross-entropy of the outputs may be; in the same way.
        dual_lr: step of the multipliers.
        distance: ``squared`` or ``absolute``, of a layer's outputs.
        clip: compare outputs clipped to [0, 1], the low ones rounded to the width of the layer's input.
        high: ``relax``: transformed and clipped but not rounded; ``identity``: latent weights, float inputs, and
            ranges that stay as calibrated.
        attach_inputs: let the layers' distances reach the batch-norms in front of them; of no effect on weights.
        images, batch_size: training images, not augmented, of the dual step: at most so many as an epoch has.
        budget: choose layers for high precision within it (see `research.quant.budget`).
        keep: choose so many layers, in place of a budget.
        high_bits: width of the chosen layers.
        select_at: when, as a fraction of the run, at the end of an epoch.
    """

    slug = "constrained"

    def __init__(
        self,
        layerwise: bool = True,
        eps_layer: ByWidth = 1 / 255,
        eps_out: ByWidth = 0.1,
        dual_lr: float = 0.01,
        distance: Distance = "squared",
        clip: bool = True,
        high: High = "relax",
        attach_inputs: bool = True,
        images: int = 1280,
        batch_size: int = 128,
        budget: Any = None,
        keep: int | None = None,
        high_bits: int = 8,
        select_at: float = 0.7,
    ) -> None:
        key = f"callbacks.{self.slug}"
        for name, eps in (("eps_layer", eps_layer), ("eps_out", eps_out)):
            if any(value < 0 for value in (eps.values() if isinstance(eps, Mapping) else [eps])):
                raise ValueError(f"{key}.{name}={eps}: use 0 or more")
        if dual_lr < 0:
            raise ValueError(f"{key}.dual_lr={dual_lr}: use 0 or more")
        if keep is not None and (budget is not None or keep < 1):
            raise ValueError(f"{key}.keep={keep}: use 1 or more layers, or null and a budget")
        if not 1 <= high_bits <= MAX_BITS:
            raise ValueError(f"{key}.high_bits={high_bits}: use 1 to {MAX_BITS}")
        if not 0 < select_at <= 1:
            raise ValueError(f"{key}.select_at={select_at}: use a fraction of the run above 0, up to 1")
        self.layerwise = layerwise
        self.eps = (eps_layer, eps_out)
        self.dual_lr = dual_lr
        self.distance: Distance = distance
        self.clip = clip
        self.high: High = high
        self.attach_inputs = attach_inputs
        self.images, self.batch_size = images, batch_size
        self.budgets: list[Budget] = [] if budget is None else budgets_from_config(budget, f"{key}.budget")
        self.keep = keep
        self.high_bits = high_bits
        self.select_at = select_at
        self.selecting = bool(self.budgets) or keep is not None
        claims: set[Claim] = {"evaluations", "batchnorm", "weight_quantizer"}
        self.claims = frozenset(claims | ({"bits"} if self.selecting else set()))
        self.counts: Counts | None = None
        self.batches: FixedBatches | None = None

    # -- state -------------------------------------------------------------------------------------------------

    def attach(self, module: QuantModule) -> None:
        """Find the convolutions to constrain; make multipliers and the batch-norms of the high-precision network."""
        net, key = module.net, f"callbacks.{self.slug}"
        self.layers: dict[str, QuantLayer] = {
            name: layer
            for name, layer in quant_layers(net)
            if isinstance(layer, nn.Conv2d) and layer.weight_quantizer is not None
        }
        if not self.layers:
            raise ValueError(f"{key}: the network has no convolution with quantized weights, use e.g. quantizer=lsq")
        for name, layer in self.layers.items():
            assert layer.weight_quantizer is not None
            if isinstance(layer, QuantConvBn2d):
                raise ValueError(f"{key}: {name} has its batch-norm folded in; use quantizer.fold_bn=none")
            if layer.weight_quantizer.owns_weight:
                raise ValueError(f"{key}: {name} has no latent weight; use a quantizer with one, such as lsq")
        self.widths: list[int | None] = list(module.recipe.widths) or [None]
        if self.selecting and self.widths != [None]:
            raise ValueError(f"{key}: a selection of layers has one width each; use quantizer.widths=[]")
        if self.high == "identity":
            for _, quantizer in quantizers(net):
                quantizer.requires_grad_(False)
        eps = [[*[self._eps(0, width)] * len(self.layers), self._eps(1, width)] for width in self.widths]
        self.state = ConstraintState(eps, norms_at(net, None))
        module.mechanics[self.slug] = self.state
        self.record = LayerRecord(self.layers)

    def _eps(self, which: int, width: int | None) -> float:
        eps, name = self.eps[which], ("eps_layer", "eps_out")[which]
        if not isinstance(eps, Mapping):
            return eps
        if width is None or width not in eps:
            raise ValueError(f"callbacks.{self.slug}.{name}={dict(eps)}: use one number, or one for each width {width}")
        return float(eps[width])

    def prepare(self, module: QuantModule, loader: Any) -> None:
        """Both networks start from the same batch-norms."""
        for name, norm in self.state.named_norms():
            norm.load_state_dict(module.net.get_submodule(name).state_dict())

    def parameter_groups(self, module: QuantModule) -> list[ParameterGroup]:
        """The batch-norms of the high-precision network, with the options of all batch-norms."""
        parameters = [parameter for _, norm in self.state.named_norms() for parameter in norm.parameters()]
        options = {"weight_decay": 0.0, **((module.hparams["optimizer"] or {}).get("norm") or {})}
        return [ParameterGroup(parameters, options)] if parameters else []

    # -- primal ------------------------------------------------------------------------------------------------

    def wrap_objective(self, objective: Objective) -> Objective:
        """The Lagrangian, with outputs of the high-precision network."""

        def lagrangian(batch: Any, state: State | None = None) -> Evaluation:
            given = dict(state or {})
            with same_noise(self.module.device) as rewind:
                with passes(self.module.net, mode=self.high):
                    first = objective(batch, {**given, **self.state.network_state()})
                terms = dict(first.terms)
                loss = first.loss
                for row, width in enumerate(self.widths):
                    rewind()
                    for name, term in self._constraints(batch, given, first.outputs, row, width).items():
                        terms[name] = term
                        loss = loss + term
            return replace(first, loss=loss, terms=terms)

        return lagrangian

    def _constraints(self, batch: Any, given: State, high: Tensor, row: int, width: int | None) -> dict[str, Tensor]:
        """The two weighted sums of slacks at one width, by the name of their term."""
        duals, eps = self.state.duals[row], self.state.eps[row]
        violated = [name for name, dual in zip(self.layers, duals.tolist(), strict=False) if dual > 0]
        distances, output = self._distances(batch, given, high, width, violated)
        suffix = "" if width is None else f"_w{width}"
        terms = {f"constraint_output{suffix}": duals[-1] * (output - eps[-1])}
        if violated:
            index = [list(self.layers).index(name) for name in violated]
            terms[f"constraint_layers{suffix}"] = (duals[index] * (distances - eps[index])).sum()
        return terms

    def _distances(
        self, batch: Any, given: State, high: Tensor, width: int | None, layers: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Distances of the named ``layers`` (n,) and of the outputs (0-dim) between the two networks on ``batch``."""
        net = self.module.net
        with at_width(net, width):
            frozen = frozen_state(net, given, norms_at(net, width))
            with self.record.recording() as (inputs, outputs):
                low = self.module.evaluate(batch, frozen).outputs
                found = [self._layer_distance(name, inputs[name], outputs[name], given) for name in layers]
        return torch.stack(found) if found else high.new_zeros(0), output_distance(low, high)

    def _layer_distance(self, name: str, z: Tensor, low: Tensor, given: State) -> Tensor:
        layer = self.layers[name]
        quantizer = layer.input_quantizer or layer.weight_quantizer
        assert quantizer is not None
        bits = quantizer.bits.max() if self.clip else None
        z = z if self.attach_inputs else z.detach()
        return proximity(output_of(layer, name, z, self.high, given), low, bits, self.distance)

    # -- dual --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the images of the dual step; refuse a selection that cannot be made."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images = min(self.images, len(data.train_dataloader()) * data.batch_size)
        self.batches = fixed_images(trainer, self.module, self.slug, images, self.batch_size)
        net, choices = self.module.net, self._choices()
        selectable = sum(len(options) > 1 for options in choices.values())
        if self.selecting and not selectable and not self.state.selected:
            raise ValueError(
                f"callbacks.{self.slug}.high_bits={self.high_bits}: no constrained layer has fewer bits; use a smaller "
                "quantizer.bits"
            )
        if self.keep is not None and self.keep > selectable and not self.state.selected:
            raise ValueError(
                f"callbacks.{self.slug}.keep={self.keep}: use 1 to {selectable}, the layers with fewer bits"
            )
        try:
            if self.selecting:
                Allocation({name: options[-1] for name, options in choices.items()}).widths(net)
        except ValueError as error:
            raise ValueError(f"callbacks.{self.slug}.high_bits={self.high_bits}: {error}") from None
        if self.budgets:
            structure = net.structure()
            shape = self.batches[0][0].shape[1:]
            self.counts = Counts.of(self.module.plain_copy().cpu(), shape, structure.first, structure.last)
            for budget in self.budgets:
                budget.require(self.counts, choices)

    @torch.no_grad()
    def mean_slacks(self) -> tuple[Tensor, Tensor]:
        """Slacks (widths, layers + 1) and loss of the high-precision network (0-dim) on the images of the dual step.

        Both networks are in evaluation mode and eager; means over all samples, and over processes.
        """
        assert self.batches is not None
        net, layers = self.module.net, list(self.layers) if self.layerwise else []
        found, loss = torch.zeros_like(self.state.duals), torch.zeros_like(self.state.duals[0, 0])
        with evaluating(net), torch.compiler.set_stance("force_eager"):
            for batch in self.batches:
                share = len(batch[1]) / self.batches.samples
                with passes(net, mode=self.high):
                    first = self.module.evaluate(batch, self.state.network_state())
                loss += share * first.loss
                for row, width in enumerate(self.widths):
                    distances, output = self._distances(batch, {}, first.outputs, width, layers)
                    found[row, : len(layers)] += share * distances
                    found[row, -1] += share * output
        found[:, -1] -= self.state.eps[:, -1]
        if self.layerwise:
            found[:, :-1] -= self.state.eps[:, :-1]
        average_over_processes({"slacks": found, "loss": loss})
        return found, loss

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The dual step; the selection of layers when it is due; both logged."""
        slacks, loss = self.mean_slacks()
        pl_module.log("constrained/lagrangian", loss + (self.state.duals * slacks).sum())
        self.state.dual_step(slacks, self.dual_lr)
        for row, width in enumerate(self.widths):
            prefix = "constrained" if width is None else f"constrained/w{width}"
            for column, name in enumerate([*self.layers, "output"]):
                if self.layerwise or name == "output":
                    pl_module.log(f"{prefix}/dual/{name}", self.state.duals[row, column])
                    pl_module.log(f"{prefix}/slack/{name}", slacks[row, column])
        if self.selecting:
            due = trainer.global_step >= round(self.select_at * self.module.progress.total)
            if due and not self.state.selected:
                self._select()
            present = Allocation.of(self.module.net)
            costs = cost_metrics(self.budgets, lambda budget: budget.cost(self._costed, present))
            pl_module.log_dict(present.metrics() | costs)

    # -- selection ---------------------------------------------------------------------------------------------

    @property
    def _costed(self) -> Counts:
        """The counts, of a mechanic with a budget."""
        assert self.counts is not None
        return self.counts

    def _choices(self) -> dict[str, Any]:
        return candidates(Allocation.of(self.module.net), list(self.layers), self.high_bits) if self.selecting else {}

    def _select(self) -> None:
        """Give the chosen layers their width, with ranges and batch-norm statistics that fit it."""
        assert self.batches is not None
        net, choices = self.module.net, self._choices()
        duals = dict(zip(self.layers, self.state.duals[0, :-1].tolist(), strict=True))
        if not any(duals.values()):
            log.warning("callbacks.%s: every layer's multiplier is 0, so that they rank no layer", self.slug)
        if self.keep is not None:
            found = largest(duals, choices, self.keep)
        else:
            found = within(duals, choices, self._costed, self.budgets)
        before = Allocation.of(net)
        found.apply(net)
        changed = [
            quantizer
            for name, layer in quant_layers(net)
            for quantizer, has, had in (
                (layer.weight_quantizer, found[name].weight, before[name].weight),
                (layer.input_quantizer, found[name].input, before[name].input),
            )
            if quantizer is not None and has != had
        ]
        if changed:
            self._fit(changed)
            scales = [layer.output_quantizer for _, layer in quant_layers(net) if layer.output_quantizer is not None]
            broadcast([*changed, *scales, *running_norms(net)])  # output scales are fitted with the ranges
        self.state.final_duals.copy_(self.state.duals[0, :-1])
        self.state.selected.fill_(True)
        chosen = [name for name in ranked(duals) if found[name] != before[name]]
        log.info("constrained: in high precision, largest multiplier first: %s", ", ".join(chosen) or "no layer")

    def _fit(self, changed: list[Quantizer]) -> None:
        """Ranges of the quantizers that changed, and all batch-norm statistics, anew from the dual step's images."""
        assert self.batches is not None
        net, images = self.module.net, [images for images, _ in self.batches]
        with torch.compiler.set_stance("force_eager"):
            for _ in range(2):  # what a range is fitted to came through batch-norms, what they see through the ranges
                for quantizer in changed:
                    quantizer.initialised.fill_(False)
                calibrate(net, images)
                reestimate_batchnorm(net, images)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``allocation.yaml`` into the run folder, where there is one."""
        for folder in written_folders(trainer) if self.selecting else ():
            write_allocation(folder / ALLOCATION, Allocation.of(self.module.net), self.module.table)

    def finalise(self, net: nn.Module) -> None:
        """Take the hooks off; refuse widths that are not within the budgets."""
        self.record.remove_from(net)
        if self.counts is not None:
            require_budgets(self.budgets, self.counts, Allocation.of(net))
