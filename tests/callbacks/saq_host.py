"""A host with SAQ in float64, small enough to check by hand, and a record of what the mechanic does in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from research.learning.evaluation import Evaluation
from research.learning.module import QuantModule
from research.models.structure import FloatModel, Structure
from research.quant.calibrate import calibrate
from tests.learning.tiny import CLASSES, make_module

TASK = {"_target_": "tests.callbacks.test_sam.Float64", "num_classes": CLASSES}


class WeightsOnly(FloatModel):
    """Two layers without biases and batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.ReLU()
        self.flatten, self.fc = nn.Flatten(1), nn.Linear(36, CLASSES, bias=False)

    def structure(self) -> Structure:
        return Structure(blocks=(), conv_bn=(), first="conv1", last="fc")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.flatten(self.relu(self.conv1(x))))
        return y


class Unused(WeightsOnly):
    """Has a layer and a batch-norm that the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)


def saq(**settings: Any) -> dict[str, Any]:
    return {"saq": {"_target_": "callbacks.saq.SAQ", **settings}}


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(6) % CLASSES


def liq(bits: int, normalise: bool | str, clip: float | None = None) -> dict[str, Any]:
    return {"weight": {"name": "liq", "bits": bits, "options": {"normalise": normalise, "clip": clip}}}


def host(mechanics: dict[str, Any], **changes: Any) -> QuantModule:
    """A calibrated host in float64."""
    module = make_module(mechanics, **{"task": TASK, **changes}).double()
    calibrate(module.net, [images()[0]])
    return module


def weights_only(recipe: Mapping[str, Any], **settings: Any) -> QuantModule:
    """A host whose only parameters are latent weights and their ranges."""
    return host(saq(**settings), quantizer=recipe, model={"_target_": "tests.callbacks.saq_host.WeightsOnly"})


class Record:
    """What the mechanic of a host computes: gradients, points and perturbation of a step, and the states it evaluates.

    The perturbation is by parameter name; ``w.weight`` is what layer ``w`` gets, in front of or behind the quantizer.
    """

    def __init__(self, module: QuantModule) -> None:
        (self.mechanic,) = module.active
        self.module = module
        self.states: list[Mapping[str, Tensor] | None] = []
        self.losses: list[Tensor] = []
        formula = self.mechanic.perturbation

        def perturbation(gradients: Any, points: Any, plain: Any) -> Any:
            self.gradients, self.plain = dict(gradients), set(plain)
            found = formula(gradients, points, plain)
            self.moves = dict(found)
            return found

        self.mechanic.perturbation = perturbation

        def evaluate(batch: Any, state: Mapping[str, Tensor] | None = None) -> Evaluation:
            self.states.append(state)
            evaluation = module.evaluate(batch, state)
            self.losses.append(evaluation.loss)
            return evaluation

        self.objective = self.mechanic.wrap_objective(evaluate)

    @property
    def norm(self) -> float:
        return float(torch.cat([move.flatten() for move in self.moves.values()]).norm())
