"""Mechanic: what a paper adds to training, as a Lightning callback with a few verbs of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from research.data.images import keyed_generator
from research.learning.evaluation import Evaluation, Objective

if TYPE_CHECKING:
    from research.learning.module import QuantModule

Stage = Literal["inner", "middle", "outer"]
Claim = Literal["weight_quantizer", "codes", "weight_update", "bits", "task_loss", "evaluations", "batchnorm"]
STAGES: tuple[Stage, ...] = ("inner", "middle", "outer")
CLAIMS: tuple[Claim, ...] = (
    "weight_quantizer",
    "codes",
    "weight_update",
    "bits",
    "task_loss",
    "evaluations",
    "batchnorm",
)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with optimizer options of their own.

    Args:
        parameters: new learnables, or existing ones, which are thereby claimed from their default group.
        options: optimizer options that differ from the run's (``lr``, ``weight_decay`` ...); with the run's optimizer
            also ``lr_factor``, a multiple of its ``lr``.
        optimizer: ``{_target_: torch.optim.Adam, ...}`` for a different optimizer, None for the run's.
    """

    parameters: Sequence[nn.Parameter]
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None


class Mechanic(Callback):
    """Base of all training mechanics. Every verb is optional; Lightning's hooks are there as well.

    Built by the host module from plain hyper-parameters, so that a checkpoint alone rebuilds it. Tensors that must
    survive live in ``module.mechanics[slug]`` as buffers or parameters; counters and private optimizers in
    ``state_dict()``. The names ``log`` and ``log_dict`` belong to Lightning.

    Attributes:
        slug: the paper's name, the same everywhere.
        stage: where ``wrap_objective`` stands among the others: inner wraps first.
        claims: what only one mechanic may own (see ``CLAIMS``).
        taps: glob patterns of modules whose outputs go into ``evaluation.taps``.
        needs_double_backward: second derivatives are taken, of evaluations inside ``twice_differentiable(net)``
            (`research.learning.double_backward`): the network is not compiled, and no quantizer may have a
            gradient-dependent rule.
        precisions: precisions the mechanic is right in.
        ddp: ``exact`` if several processes equal one on the same global batch (batch-norm aside), else
            ``per_replica``.
    """

    slug: ClassVar[str]
    stage: Stage = "middle"
    claims: frozenset[Claim] = frozenset()
    taps: tuple[str, ...] = ()
    needs_double_backward: bool = False
    precisions: tuple[str, ...] = ("32", "bf16")
    ddp: Literal["exact", "per_replica"] = "exact"
    module: QuantModule

    def bind(self, module: QuantModule) -> None:
        """Called by the host before ``attach``; afterwards ``self.module`` is the host."""
        self.module = module

    @property
    def state_key(self) -> str:
        """Key of ``state_dict()`` in checkpoints: the slug."""
        return self.slug

    def rng(self, step: int) -> torch.Generator:
        """A CPU generator for decisions of ``step``: the same on all ranks, in all passes, after every resume."""
        return keyed_generator(self.module.progress.seed, self.slug, step)

    def attach(self, module: QuantModule) -> None:
        """Find layers (none: raise ValueError), fill slots, register state of final shape. No data, no files."""

    def prepare(self, module: QuantModule, loader: Any) -> None:
        """Whatever needs data, once, on a fresh run, after pretrained weights and range calibration."""

    def parameter_groups(self, module: QuantModule) -> Sequence[ParameterGroup]:
        """Learnables with optimizer options of their own."""
        return ()

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """Scalar terms to add to the loss, by name. The owner of ``task_loss`` may return ``task`` to replace it."""
        return {}

    def wrap_objective(self, objective: Objective) -> Objective:
        """Decorate the objective; composed once per fit."""
        return objective

    def after_step(self, module: QuantModule) -> None:
        """After each real optimizer step: tracking, freezing, clamps, bit re-allocation."""

    def finalise(self, net: nn.Module) -> Mapping[str, nn.Module] | None:
        """Turn training-time state of ``net`` (a copy) into exact quantized state, in place; pure and idempotent.

        Returns:
            None, or several named deployments made from ``net``.
        """
        return None
