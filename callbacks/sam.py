"""Sharpness-aware minimisation: SAM and its adaptive form ASAM, as a decorator of the objective.

SAM: Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, arXiv 2010.01412. ASAM: Kwon, Kim, Park, Choi, ICML 2021,
arXiv 2102.11600.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from research.learning.evaluation import Evaluation, Objective, State, cloned_buffers, same_noise
from research.learning.mechanic import Claim, Mechanic
from research.learning.perturbation import (
    asam_perturbation,
    average_over_processes,
    moved_parameters,
    named_gradients,
    perturbed_parameters,
    range_names,
    sam_perturbation,
)

if TYPE_CHECKING:
    from research.learning.module import QuantModule


class SAM(Mechanic):
    """Minimise the loss at the worst point of a ball around the latent parameters (but those that choose a width).

    Two evaluations a step: the gradient at the parameters gives the perturbation, the loss at the perturbed parameters
    is the step's loss. The first counts for the other metrics and for statistics; both see the same noise.

    Args:
        rho: radius of the ball; 0 is plain training, bit for bit.
        adaptive: ASAM.
        eta: ASAM's offset.
        statistics: ``counted`` (only the first evaluation moves batch-norm statistics) or ``all``.
        sync_perturbation: average the first gradient over processes, so that all ranks perturb alike and several
            processes equal one; off, every process perturbs by its own share (the papers' m-sharpness).
    """

    slug = "sam"
    stage = "outer"
    claims: frozenset[Claim] = frozenset({"evaluations"})

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.01,
        statistics: Literal["counted", "all"] = "counted",
        sync_perturbation: bool = False,
    ) -> None:
        if rho < 0:
            raise ValueError(f"callbacks.sam.rho={rho}: use 0 or more")
        if eta < 0:
            raise ValueError(f"callbacks.sam.eta={eta}: use 0 or more, such as 0.01")
        if statistics not in ("counted", "all"):
            raise ValueError(f"callbacks.sam.statistics={statistics}: use counted or all")
        self.rho = rho
        self.adaptive = adaptive
        self.eta = eta
        self.statistics = statistics
        self.sync_perturbation = sync_perturbation
        self.ddp = "exact" if sync_perturbation else "per_replica"

    def perturbation(self, module: QuantModule, loss: Tensor) -> dict[str, Tensor]:
        """The step's perturbation by parameter name, without gradient."""
        parameters = perturbed_parameters(module.net)
        gradients = named_gradients(loss, parameters)
        if self.sync_perturbation:
            average_over_processes(gradients)
        if self.adaptive:
            return asam_perturbation(gradients, parameters, self.rho, self.eta, range_names(module.net))
        return sam_perturbation(gradients, self.rho)

    def wrap_objective(self, objective: Objective) -> Objective:
        """``loss(w + perturbation(w))``, with outputs and terms of the unperturbed evaluation."""

        def sharpness_aware(batch: Any, state: State | None = None) -> Evaluation:
            module = self.module
            with same_noise(module.device) as rewind:
                before = cloned_buffers(module.net)
                first = objective(batch, state)
                perturbation = self.perturbation(module, first.loss)
                rewind()
                moved = moved_parameters(module.net, state, perturbation)
                buffers = before if self.statistics == "counted" else {}
                second = objective(batch, {**(state or {}), **buffers, **moved})
            return Evaluation(batch, second.loss, first.outputs, first.terms, first.taps)

        return sharpness_aware
