"""Knowledge distillation: soft targets (Hinton, Vinyals, Dean 2015, arXiv 1503.02531) and matched features.

With ``loss: cross_entropy`` and ``task_weight: 0`` it is the label-free form of N2UQ (arXiv 2111.14826) and SDQ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.deploy import load_artifact
from research.learning.evaluation import Evaluation
from research.learning.mechanic import Claim, Mechanic
from research.learning.module import QuantModule
from research.learning.taps import Taps
from research.models import load_float_checkpoint
from research.results import artifact_places
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder
from research.targets import resolve_target

LOSSES = ("kl", "cross_entropy")


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


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``-T^2 sum_c softmax(teacher / T)_c log softmax(student / T)_c``, mean over the batch.

    With T = 1 the loss of N2UQ's official code and of SDQ (equation 9). It differs from `soft_target_loss` by the
    teacher's entropy alone; the gradient is the same. Arguments as there.
    """
    targets = F.softmax(teacher.detach() / temperature, dim=1)
    return F.cross_entropy(student / temperature, targets) * temperature**2


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Mean over the taps of the mean squared difference of their elements; 0-dim.

    FitNets' hint loss (Romero et al. 2015, arXiv 1412.6550) up to a factor, without its regressor: shapes agree.

    Args:
        student: features by name of their module.
        teacher: features by the same names, of the same shapes; no gradient flows into them.
    """
    errors = [F.mse_loss(student[name].float(), features.detach().float()) for name, features in teacher.items()]
    return torch.stack(errors).mean()


class Distillation(Mechanic):
    """Add a loss against the outputs of a teacher, and one against its features.

    The teacher is no part of the host's state: it is rebuilt at the start of every fit, resumed ones included. Of a
    teacher of its own name a checkpoint holds the digest, and a resume with another one is refused.

    Args:
        weight: of the soft-target term; 0 (without features) is plain training, bit for bit.
        temperature: of both softmaxes.
        task_weight: of the task's own term; other than 1 it claims ``task_loss``, 0 trains without labels.
        loss: ``kl``, or ``cross_entropy``, the same but for the teacher's entropy, a constant.
        feature_weight: of the feature term.
        taps: glob patterns of the modules whose outputs are features, in student and teacher alike.
        teacher: None, the float network that the run started from (``init_from``); else a run folder (its deployed
            network), a training checkpoint (``.ckpt``), or float weights (``.safetensors``). A relative path is looked
            for in the working directory, then beside the file of ``init_from``.
        teacher_model: architecture of float weights in ``teacher`` where it is not the student's, such as
            ``research.models.resnet56``; it is given the student's options.
    """

    slug = "distillation"

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        task_weight: float = 1.0,
        loss: Literal["kl", "cross_entropy"] = "kl",
        feature_weight: float = 0.0,
        taps: Sequence[str] = (),
        teacher: str | None = None,
        teacher_model: str | None = None,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"callbacks.distillation.temperature={temperature}: use a number above 0")
        if weight < 0 or task_weight < 0:
            raise ValueError(f"callbacks.distillation: weight={weight}, task_weight={task_weight}: use 0 or more")
        if loss not in LOSSES:
            raise ValueError(f"callbacks.distillation.loss={loss}: use {' or '.join(LOSSES)}")
        if feature_weight < 0 or (feature_weight > 0 and not taps):
            raise ValueError(
                f"callbacks.distillation: feature_weight={feature_weight}, taps={list(taps)}: use 0, or more than 0 "
                "and taps such as ['layer?']"
            )
        if teacher_model is not None and teacher is None:
            raise ValueError(
                f"callbacks.distillation.teacher_model={teacher_model}: of which weights? Give teacher=FILE.safetensors"
            )
        self.weight = weight
        self.temperature = temperature
        self.task_weight = task_weight
        self.soft_loss = soft_target_loss if loss == "kl" else soft_cross_entropy
        self.feature_weight = feature_weight
        self.taps = tuple(taps) if feature_weight else ()
        self.source = teacher
        self.teacher_model = teacher_model
        claims: set[Claim] = set() if task_weight == 1.0 else {"task_loss"}
        self.claims = frozenset(claims)
        self._teacher: list[nn.Module] = []
        self._teacher_taps: list[Taps] = []
        self._digest: str | None = None
        self._resumed: str | None = None

    @property
    def teacher(self) -> nn.Module:
        """The teacher, in evaluation mode."""
        return self._teacher[0]

    @teacher.setter
    def teacher(self, net: nn.Module) -> None:
        self._teacher = [net.eval().requires_grad_(False)]
        try:
            self._teacher_taps = [Taps(net, self.taps)] if self.taps else []
        except ValueError as error:
            raise ValueError(f"callbacks.distillation.taps: the teacher: {error}") from None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the teacher.

        Raises:
            ValueError: see `build_teacher`, or a resumed run had another one.
        """
        if not self._teacher:
            with torch.random.fork_rng(devices=[]):  # the random initialisation it replaces is nobody's noise
                net = self.build_teacher()
            self._digest = None if self.source is None else _digest(net)
            if self._resumed not in (None, self._digest):
                raise ValueError(
                    f"callbacks.distillation.teacher={self.source}: the interrupted run had another teacher than is "
                    "there now; use another name="
                )
            self.teacher = net.to(pl_module.device, self.module.network_dtype)

    def state_dict(self) -> dict[str, Any]:
        """The digest of a teacher with a name of its own; that of ``init_from`` is told by the run."""
        return {} if self._digest is None else {"teacher": self._digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the digest for when the teacher is built."""
        self._resumed = state_dict["teacher"]

    def build_teacher(self) -> nn.Module:
        """The network that ``teacher`` names; nothing is unpickled, and configs may name allowed classes only.

        Raises:
            ValueError: nothing there, or nothing that can be read as a teacher.
        """
        if self.source is None:
            return self.module.initial_network()
        path = self.find(self.source)
        try:
            if path.is_dir():
                return load_artifact(next(iter(artifact_places(RunFolder.existing(path)).values())))
            if path.suffix == ".ckpt":
                load_checkpoint(path)  # verifies the file
                return QuantModule.load_from_checkpoint(path, map_location="cpu", weights_only=True).plain_copy()
            net = self.float_teacher()
            load_float_checkpoint(net, path)
        except ValueError as error:
            raise ValueError(f"callbacks.distillation.teacher={self.source}: {error}") from error
        return net

    def float_teacher(self) -> nn.Module:
        """A fresh network of the architecture of ``teacher_model``."""
        if self.teacher_model is None:
            return self.module.float_network()
        config = {**self.module.hparams["model"], "_target_": self.teacher_model}
        net: nn.Module = resolve_target(config, key="callbacks.distillation.teacher_model")
        return net

    def find(self, source: str) -> Path:
        """Where ``source`` is: as given, or beside the file that the run started from."""
        start = self.module.checkpoint
        places = [Path(source), *([start.parent / source] if start is not None else [])]
        for place in places:
            if place.exists():
                return place
        raise ValueError(
            f"callbacks.distillation.teacher={source}: nothing at {', '.join(map(str, places))}; give a run folder, a "
            ".ckpt or a .safetensors file, or null for the network of init_from"
        )

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``distillation``, ``features`` if they are weighted, and ``task`` if it is weighted."""
        terms: dict[str, Tensor] = {}
        if self.weight or self.feature_weight:
            images: Any = evaluation.batch[0]
            with torch.no_grad():
                logits = self.teacher(images).float()
            _agree("outputs", evaluation.outputs, logits)
            terms["distillation"] = self.weight * self.soft_loss(evaluation.outputs, logits, self.temperature)
        for taps in self._teacher_taps:
            features = taps.take()
            for name, feature in features.items():
                _agree(name, evaluation.taps.get(name), feature)
            terms["features"] = self.feature_weight * feature_loss(evaluation.taps, features)
        if self.task_weight != 1.0:
            terms["task"] = self.task_weight * evaluation.terms["task"]
        return terms


def _digest(net: nn.Module) -> str:
    """SHA-256 of the names and values in a network's state."""
    found = hashlib.sha256()
    for name, value in net.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _agree(name: str, student: Tensor | None, teacher: Tensor) -> None:
    if student is None or student.shape != teacher.shape:
        found = "none" if student is None else tuple(student.shape)
        raise ValueError(
            f"callbacks.distillation: {name} of the teacher have shape {tuple(teacher.shape)}, the student's {found}: "
            "use a teacher for the same classes and taps that both have alike"
        )
