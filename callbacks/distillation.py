"""Knowledge distillation from a float teacher, by soft targets (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.learning.evaluation import Evaluation
from research.learning.mechanic import Claim, Mechanic


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch (section 2 of the paper).

    Args:
        student: logits (N, classes).
        teacher: logits (N, classes); no gradient flows into them.
        temperature: T > 0; 1 is the form that LSQ (Esser et al. 2020, section 3.7) uses.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


class Distillation(Mechanic):
    """Add the soft-target loss against the float network that the run started from (``init_from``).

    The teacher is no part of the host's state: it is rebuilt at the start of every fit, resumed ones included.

    Args:
        weight: of the soft-target term; 0 is plain training, bit for bit.
        temperature: of both softmaxes.
        task_weight: of the task's own term; other than 1 it claims ``task_loss``.
    """

    slug = "distillation"

    def __init__(self, weight: float = 1.0, temperature: float = 1.0, task_weight: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(f"callbacks.distillation.temperature={temperature}: use a number above 0")
        if weight < 0 or task_weight < 0:
            raise ValueError(f"callbacks.distillation: weight={weight}, task_weight={task_weight}: use 0 or more")
        self.weight = weight
        self.temperature = temperature
        self.task_weight = task_weight
        claims: set[Claim] = set() if task_weight == 1.0 else {"task_loss"}
        self.claims = frozenset(claims)
        self._teacher: list[nn.Module] = []

    @property
    def teacher(self) -> nn.Module:
        """The float teacher, in evaluation mode."""
        return self._teacher[0]

    @teacher.setter
    def teacher(self, net: nn.Module) -> None:
        self._teacher = [net.eval().requires_grad_(False)]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the teacher from the run's float weights."""
        if not self._teacher:
            self.teacher = self.module.initial_network().to(pl_module.device)

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``distillation``, and ``task`` if it is weighted."""
        images: Any = evaluation.batch[0]
        with torch.no_grad():
            logits = self.teacher(images).float()
        terms = {"distillation": self.weight * soft_target_loss(evaluation.outputs, logits, self.temperature)}
        if self.task_weight != 1.0:
            terms["task"] = self.task_weight * evaluation.terms["task"]
        return terms
