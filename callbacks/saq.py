"""SAQ: sharpness-aware quantization (Liu, Cai, Zhuang, arXiv 2111.12273; zhuang-group/SAQ).

The training rule; the configuration generator is `callbacks.samq`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from research.learning.evaluation import Evaluation, Objective, State, cloned_buffers, same_noise, under_state
from research.learning.mechanic import Claim, Mechanic
from research.learning.perturbation import (
    asam_perturbation,
    average_over_processes,
    moved_parameters,
    named_gradients,
    qasam_perturbation,
    sam_perturbation,
)
from research.quant.kinds import BIASES, RANGES, Kind, parameter_kinds
from research.quant.layers import QuantLayer, quant_layers
from research.quant.passes import weight_leaves

if TYPE_CHECKING:
    from research.learning.module import QuantModule
    from research.models.structure import FloatModel

CASES = (1, 2, 3)
Layers = Literal["all", "ends"]
NORMS: tuple[Kind, ...] = ("norm_weight", "norm_bias")
LAYERS: tuple[Layers, ...] = get_args(Layers)


class SAQ(Mechanic):
    """Minimise the loss at the worst point of a ball around the *quantized* weights.

    Two evaluations a step. The first gives gradients, from which one joint perturbation ``e`` of norm ``rho`` follows;
    the second is the step's loss. Where ``e`` of a layer's weight comes from and goes to is the case:

    1. from the gradient at the latent weight, added behind the quantizer: ``L(Q(w) + e(w))``;
    2. from the gradient at the latent weight, added to it: ``L(Q(w + e(w)))``, SAM around quantization;
    3. from the gradient at the quantized weight, added behind the quantizer: ``L(Q(w) + e(Q(w)))``, SAQ.

    In cases 1 and 3 latent weights never move. Everything else that is perturbed moves where it stands, in every case:
    biases of the layers always, batch-norms and trained ranges by the options. The first evaluation counts for metrics
    (but the loss, which is the second's) and statistics; both see the same noise.

    Args:
        case: 1, 2 or 3, as above.
        rho: radius; 0 is plain training, bit for bit.
        adaptive: the adaptive form (QASAM; in case 2 ASAM).
        eta: its offset.
        include_bn: perturb batch-norm weights and biases.
        include_input_ranges: perturb what input (and output) quantizers learn.
        include_weight_ranges: perturb what weight quantizers learn.
        statistics: ``counted`` (only the first evaluation moves batch-norm statistics) or ``all``.
        sync_perturbation: average the first gradient over processes, so that several processes equal one; off, every
            process perturbs by its own share, as the official code does.
        layers: ``all``, or ``ends``: of the layers the first and the last alone; batch-norms by their option.
    """

    slug = "saq"
    stage = "outer"
    claims: frozenset[Claim] = frozenset({"evaluations"})

    def __init__(
        self,
        case: int = 3,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.01,
        include_bn: bool = True,
        include_input_ranges: bool = True,
        include_weight_ranges: bool = False,
        statistics: Literal["counted", "all"] = "counted",
        sync_perturbation: bool = False,
        layers: Layers = "all",
    ) -> None:
        if case not in CASES:
            raise ValueError(f"callbacks.saq.case={case}: use 1, 2 or 3 (SAQ)")
        if rho < 0:
            raise ValueError(f"callbacks.saq.rho={rho}: use 0 or more")
        if eta < 0:
            raise ValueError(f"callbacks.saq.eta={eta}: use 0 or more, such as 0.01")
        if statistics not in ("counted", "all"):
            raise ValueError(f"callbacks.saq.statistics={statistics}: use counted or all")
        if layers not in LAYERS:
            raise ValueError(f"callbacks.saq.layers={layers}: use {' or '.join(LAYERS)}")
        self.case = case
        self.rho = rho
        self.adaptive = adaptive
        self.eta = eta
        self.kinds: set[Kind] = {"weight", "bias"}
        if include_bn:
            self.kinds |= {"norm_weight", "norm_bias"}
        if include_input_ranges:
            self.kinds.add("input_range")
        if include_weight_ranges:
            self.kinds.add("weight_range")
        self.statistics = statistics
        self.sync_perturbation = sync_perturbation
        self.layers: Layers = layers
        self.ddp = "exact" if sync_perturbation else "per_replica"

    def attach(self, module: QuantModule) -> None:
        """Refuse a network without quantized weights."""
        if all(layer.weight_quantizer is None for _, layer in quant_layers(module.net)):
            raise ValueError("callbacks.saq: the network has no quantized weights to perturb, use e.g. quantizer=lsq")

    def gradients(self, loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient of ``loss`` at every leaf that it depends on, by name; averaged over processes if asked to."""
        gradients = named_gradients(loss, leaves)
        if self.sync_perturbation:
            average_over_processes(gradients)
        return gradients

    def perturbation(
        self, gradients: Mapping[str, Tensor], points: Mapping[str, Tensor], plain: Collection[str]
    ) -> dict[str, Tensor]:
        """The step's perturbation by parameter name, without gradient.

        Args:
            gradients: first gradients by name.
            points: where they were taken, by name.
            plain: names that the adaptive form does not adapt: of biases; in case 2 of ranges, vectors aside.
        """
        if not self.adaptive:
            return sam_perturbation(gradients, self.rho)
        if self.case == 2:
            return asam_perturbation(gradients, points, self.rho, self.eta, plain)
        return qasam_perturbation(gradients, points, plain, self.rho, self.eta)

    def perturbed(self, net: FloatModel) -> tuple[list[str], dict[str, Kind]]:
        """The layers whose weights are perturbed, and the kinds of all perturbed parameters by name."""
        layers = [name for name, _ in quant_layers(net)]
        kinds = {name: kind for name, kind in parameter_kinds(net).items() if kind in self.kinds}
        if self.layers == "all":
            return layers, kinds
        ends = [name for name in layers if name in (net.structure().first, net.structure().last)]
        inside = tuple(f"{name}." for name in ends)
        return ends, {name: kind for name, kind in kinds.items() if kind in NORMS or name.startswith(inside)}

    def wrap_objective(self, objective: Objective) -> Objective:
        """The loss at the perturbed point, with outputs and terms of the unperturbed evaluation."""
        net = self.module.net
        layers, kinds = self.perturbed(net)
        plain = {name for name, kind in kinds.items() if kind in (RANGES if self.case == 2 else BIASES)}
        trained = {name: has_trained_weight(layer) for name, layer in quant_layers(net)}

        def sharpness_aware(batch: Any, state: State | None = None) -> Evaluation:
            given = dict(state or {})
            with same_noise(self.module.device) as rewind:
                before = cloned_buffers(net)
                with weight_leaves(net) as offsets:
                    first = objective(batch, state)
                own = dict(net.named_parameters())
                leaves: dict[str, Tensor] = {name: own[name] for name in kinds if own[name].requires_grad}
                if self.case == 3:
                    leaves |= {f"{layer}.weight": offsets[layer] for layer in layers if trained[layer]}
                start = {**own, **given}
                points = {**start, **quantized_at(net, given)} if self.adaptive and self.case == 3 else start
                moves = self.perturbation(self.gradients(first.loss, leaves), points, plain)
                behind: dict[str, Tensor] = {}
                if self.case != 2:
                    behind = {layer: moves.pop(f"{layer}.weight") for layer in offsets if f"{layer}.weight" in moves}
                moved = moved_parameters(net, state, moves)
                buffers = before if self.statistics == "counted" else {}
                rewind()
                with weight_leaves(net, behind):
                    second = objective(batch, {**given, **buffers, **moved})
            return Evaluation(batch, second.loss, first.outputs, first.terms, first.taps)

        return sharpness_aware


def has_trained_weight(layer: QuantLayer) -> bool:
    """Whether training moves a layer's weight: the latent one, or the parameters of a quantizer that holds it."""
    quantizer = layer.weight_quantizer
    if quantizer is not None and quantizer.owns_weight:
        return any(parameter.requires_grad for parameter in quantizer.parameters())
    return bool(layer.weight.requires_grad)


@torch.no_grad()
def quantized_at(net: nn.Module, state: State) -> dict[str, Tensor]:
    """The quantized weights of ``net`` under ``state``, by the name of the latent weight."""
    layers = list(quant_layers(net))
    return under_state(net, state, lambda: {f"{name}.weight": layer.quantized_weight() for name, layer in layers})
