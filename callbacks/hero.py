"""HERO: Hessian-enhanced robust optimisation (Yang, Yang, Gong, Chen, DAC 2022, arXiv 2111.11986).

The formulas are those of the official code (Xiaoxuan-Yang/HERO), which differ from the paper's as we recall them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from research.learning.double_backward import layer_weights, twice_differentiable
from research.learning.evaluation import Evaluation, Objective, State, cloned_buffers, same_noise
from research.learning.mechanic import Claim, Mechanic
from research.learning.perturbation import (
    EPS,
    joint_norm,
    moved_parameters,
    named_gradients,
    perturbed_parameters,
    sam_perturbation,
)

if TYPE_CHECKING:
    from research.learning.module import QuantModule

UNPENALISED = ("bias", "bn")
"""Parts of names that the official code leaves out of the penalty."""


def hero_perturbation(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor], radius: float, adaptive: bool = True
) -> dict[str, Tensor]:
    """``h W^2 g / (||  |W| g  ||_2 + 1e-12)`` element by element, or ``h g / (||g||_2 + 1e-12)`` (official code).

    One norm over all tensors together; a parameter that is zero never moves in the adaptive form.

    Args:
        gradients: gradient by parameter name.
        parameters: parameter by the same names, same shapes.
        radius: ``h``; relative to the parameters if ``adaptive``, else in their units.
        adaptive: the first form.
    """
    if not adaptive:
        return sam_perturbation(gradients, radius)
    weights = {name: parameters[name].detach().abs() for name in gradients}
    factor = radius / (joint_norm({name: weights[name] * gradient for name, gradient in gradients.items()}) + EPS)
    return {name: weights[name].square() * gradient * factor for name, gradient in gradients.items()}


def curvature_penalty(perturbed: Iterable[Tensor], clean: Iterable[Tensor], form: str = "mean_square") -> Tensor:
    """How far the gradient moves between two points, summed over tensors; 0-dim, differentiable in ``perturbed``.

    ``mean_square`` (official code): the mean of ``(g* - g)^2`` over a tensor's elements. ``norm`` (the paper's, as we
    recall it): ``||g* - g||_2`` of the tensor. ``g* - g`` is, to first order, the Hessian times the perturbation.

    Args:
        perturbed: gradients ``g*`` at the perturbed point, with their graph.
        clean: gradients ``g`` at the point itself, same shapes; constants.
        form: ``mean_square`` or ``norm``.
    """
    moves = [after - before.detach() for after, before in zip(perturbed, clean, strict=True)]
    if form == "norm":
        return torch.stack([torch.linalg.vector_norm(move) for move in moves]).sum()
    return torch.stack([move.square().mean() for move in moves]).sum()


class HERO(Mechanic):
    """Minimise the loss at adversarially perturbed parameters plus a penalty on how far its gradient moved there.

    With ``W* = W + e``, ``e`` constant, the step's loss is ``L(W*) + strength * penalty(dL/dW at W*, dL/dW at W)``; the
    ordinary backward pass of it gives ``g*`` and the penalty's Hessian-vector product at once. The first of the two
    evaluations counts for the other metrics and for statistics; both see the same noise.

    Args:
        radius: ``h``, size of the perturbation; 0 is plain training, bit for bit.
        strength: lambda, weight of the penalty; 0 is SAM at this perturbed point and builds no second-order graph.
        adaptive: perturb in proportion to the squared parameters; ``radius`` is then relative.
        warmup_epochs: epochs without the penalty at the start, of steps at the perturbed point.
        penalty: ``mean_square`` (official code) or ``norm`` (the paper's, as recalled).
        tensors: what is penalised: ``modules`` (weights of convolutions and linear layers) or ``names`` (the official
            rule: every parameter without ``bias`` and ``bn`` in its name).
        statistics: ``counted`` (only the first evaluation moves batch-norm statistics) or ``all``.
    """

    slug = "hero"
    stage = "outer"
    claims: frozenset[Claim] = frozenset({"evaluations"})
    needs_double_backward = True
    ddp = "per_replica"

    def __init__(
        self,
        radius: float = 0.5,
        strength: float = 5.0,
        adaptive: bool = True,
        warmup_epochs: int = 1,
        penalty: Literal["mean_square", "norm"] = "mean_square",
        tensors: Literal["modules", "names"] = "modules",
        statistics: Literal["counted", "all"] = "counted",
    ) -> None:
        for key, value in (("radius", radius), ("strength", strength), ("warmup_epochs", warmup_epochs)):
            if value < 0:
                raise ValueError(f"callbacks.hero.{key}={value}: use 0 or more")
        if penalty not in ("mean_square", "norm"):
            raise ValueError(f"callbacks.hero.penalty={penalty}: use mean_square or norm")
        if tensors not in ("modules", "names"):
            raise ValueError(f"callbacks.hero.tensors={tensors}: use modules or names")
        if statistics not in ("counted", "all"):
            raise ValueError(f"callbacks.hero.statistics={statistics}: use counted or all")
        self.radius = radius
        self.strength = strength
        self.needs_double_backward = radius > 0 and strength > 0
        self.adaptive = adaptive
        self.warmup_epochs = warmup_epochs
        self.penalty = penalty
        self.tensors = tensors
        self.statistics = statistics
        self.penalised: frozenset[str] = frozenset()

    def attach(self, module: QuantModule) -> None:
        """Find the penalised tensors."""
        if self.tensors == "modules":
            names = layer_weights(module.net)
        else:
            trained = [name for name, parameter in module.net.named_parameters() if parameter.requires_grad]
            names = [name for name in trained if not any(part in name for part in UNPENALISED)]
        if not names:
            raise ValueError(f"callbacks.hero.tensors={self.tensors}: no trained parameter to penalise; drop hero")
        self.penalised = frozenset(names)

    @property
    def penalising(self) -> bool:
        """Whether the present step has the penalty."""
        return self.strength > 0 and self.module.progress.epoch >= self.warmup_epochs

    def wrap_objective(self, objective: Objective) -> Objective:
        """``L(W*) + strength * penalty``, with outputs and terms of the unperturbed evaluation and the term ``hero``.

        While the penalty acts there are two more terms to look at, no part of the loss: the norms ``hero_gradient`` of
        ``g*`` and ``hero_move`` of ``g* - g``, over all parameters.
        """

        def curvature_penalised(batch: Any, state: State | None = None) -> Evaluation:
            if self.radius == 0:
                return objective(batch, state)
            module = self.module
            with same_noise(module.device) as rewind:
                before = cloned_buffers(module.net)
                first = objective(batch, state)
                parameters = perturbed_parameters(module.net)
                clean = named_gradients(first.loss, parameters)
                perturbation = hero_perturbation(clean, parameters, self.radius, self.adaptive)
                rewind()
                moved = moved_parameters(module.net, state, perturbation)
                buffers = before if self.statistics == "counted" else {}
                with twice_differentiable(module.net) if self.penalising else nullcontext():
                    second = objective(batch, {**(state or {}), **buffers, **moved})
            if not self.penalising:
                terms = {**first.terms, "hero": torch.zeros_like(second.loss)}
                return Evaluation(batch, second.loss, first.outputs, terms, first.taps)
            perturbed = named_gradients(second.loss, {name: parameters[name] for name in clean}, create_graph=True)
            names = [name for name in clean if name in self.penalised]
            moves = curvature_penalty([perturbed[n] for n in names], [clean[n] for n in names], self.penalty)
            hero = self.strength * moves
            terms = {
                **first.terms,
                "hero": hero,
                "hero_gradient": joint_norm({name: perturbed[name].detach() for name in clean}),
                "hero_move": joint_norm({name: perturbed[name].detach() - clean[name] for name in clean}),
            }
            return Evaluation(batch, second.loss + hero, first.outputs, terms, first.taps)

        return curvature_penalised
