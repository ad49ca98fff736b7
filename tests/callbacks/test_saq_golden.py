"""Golden steps of SAQ's official classes, through the real host and LIQ."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from research.learning.module import QuantModule
from research.models.structure import FloatModel, Structure
from research.quant.layers import quantized_weights
from tests.callbacks.saq_host import TASK, Record, saq
from tests.learning.tiny import make_module, state

RANGES = {"weight_clip_value": "weight_quantizer.raw_clip", "activation_clip_value": "input_quantizer.raw_clip"}
Arrays = dict[str, np.ndarray]


class GoldenNet(FloatModel):
    """conv1 - bn1 - relu - conv2 - bn2 - relu - mean - fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.fc = nn.ReLU(), nn.Linear(4, 5)

    def structure(self) -> Structure:
        return Structure(blocks=(), conv_bn=(("conv1", "bn1"), ("conv2", "bn2")), first="conv1", last="fc")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        y: Tensor = self.fc(x.mean(dim=(2, 3)))
        return y


def golden_host(arrays: Arrays, mechanics: dict[str, Any]) -> QuantModule:
    """The golden network with its first parameters: first layer 8 bit on float inputs, 4 bit, 8 bit."""
    module = make_module(
        mechanics,
        model={"_target_": "tests.callbacks.test_saq_golden.GoldenNet"},
        quantizer={
            "weight": {"name": "liq", "bits": 4},
            "input": {"name": "liq", "bits": 4},
            "rules": [
                {"match": "@first", "weight": {"bits": 8}, "input": {"bits": 32}},
                {"match": "@last", "weight": {"bits": 8}, "input": {"bits": 8}},
            ],
        },
        task=TASK,
    ).double()
    with torch.no_grad():
        for name, parameter in module.net.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[f"p0.{golden_name(name)}"]).reshape(parameter.shape))
    return module


def golden_name(name: str) -> str:
    for theirs, ours in RANGES.items():
        name = name.replace(ours, theirs)
    return name


def close(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(
        found.detach().reshape(expected.shape), torch.from_numpy(np.asarray(expected)), rtol=1e-8, atol=1e-12
    )


CASES: dict[str, dict[str, Any]] = {
    "case3": {"case": 3},
    "case3_asam": {"case": 3, "adaptive": True},
    "sam": {"case": 2, "include_weight_ranges": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_golden_step(name: str, golden: Callable[[str], Arrays]) -> None:
    arrays = golden("saq")
    rho, lr = arrays["hparams_rho_lr"]
    module = golden_host(arrays, saq(rho=float(rho), **CASES[name]))
    record = Record(module)
    batch = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    start = state(module.net)
    evaluation = record.objective(batch)
    close(evaluation.terms["task"], arrays[f"{name}.loss_clean"])
    close(evaluation.loss, arrays[f"{name}.loss_pert"])
    compared = 0
    for key, move in record.moves.items():
        layer, _, leaf = key.rpartition(".")
        if f"{name}.eps.{layer}" in arrays and leaf == "weight":
            close(move, arrays[f"{name}.eps.{layer}"])
        else:
            close(start[key] + move, arrays[f"{name}.p_pert.{golden_name(key)}"])
        compared += 1
    assert compared == sum(key.startswith((f"{name}.eps.", f"{name}.p_pert.")) for key in arrays)
    optimizer = torch.optim.SGD(module.net.parameters(), lr=lr)
    evaluation.loss.backward()
    for key, parameter in module.net.named_parameters():
        close(parameter.grad, arrays[f"{name}.grad_pert.{golden_name(key)}"])
    optimizer.step()
    for key, parameter in module.net.named_parameters():
        close(parameter, arrays[f"{name}.p_after.{golden_name(key)}"])


def test_the_golden_gradients_at_the_quantized_weights(golden: Callable[[str], Arrays]) -> None:
    arrays = golden("saq")
    module = golden_host(arrays, saq())
    record = Record(module)
    record.objective((torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])))
    for layer, weight in quantized_weights(module.net).items():
        close(weight, arrays[f"case3.qweight.{layer}"])
        close(record.gradients[f"{layer}.weight"], arrays[f"case3.grad_qweight.{layer}"])
    norm = torch.cat([gradient.flatten() for gradient in record.gradients.values()]).norm()
    close(norm, arrays["case3.grad_norm"])
    assert not any(key.endswith("weight_quantizer.raw_clip") for key in record.gradients)


def test_the_golden_plain_step(golden: Callable[[str], Arrays]) -> None:
    arrays = golden("saq")
    module = golden_host(arrays, {})
    loss = module.objective((torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]))).loss
    close(loss, arrays["sgd.loss_clean"])
    loss.backward()
    for key, parameter in module.net.named_parameters():
        close(parameter.grad, arrays[f"grad_clean.{golden_name(key)}"])
        with torch.no_grad():
            close(parameter - arrays["hparams_rho_lr"][1] * parameter.grad, arrays[f"sgd.p_after.{golden_name(key)}"])
