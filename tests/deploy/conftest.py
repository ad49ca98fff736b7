"""Small calibrated networks with batch-norm statistics that are not the trivial ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import research.models
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.recipe import Recipe

EIGHT = {"name": "lsq", "bits": 8, "granularity": "tensor", "options": {}}
EDGES = [{"match": edge, "weight": EIGHT, "input": EIGHT} for edge in ("@first", "@last")]


def uneven(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net


def make(
    model: str, quantizer: Mapping[str, Any], size: int = 16, batch: int = 16, **options: Any
) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A calibrated network in evaluation mode, its model config, and a batch that it was not calibrated on."""
    torch.manual_seed(0)
    net = uneven(getattr(research.models, model)(**options))
    structure = net.structure()
    recipe = Recipe.from_config({"rules": EDGES, **quantizer})
    convert(net, recipe, structure.first, structure.last, conv_bn=structure.conv_bn)
    calibrate(net, [torch.randn(batch, 3, size, size)])
    return net.eval(), {"_target_": f"research.models.{model}", **options}, torch.randn(batch, 3, size, size)


@pytest.fixture(scope="session")
def quantized() -> Callable[..., tuple[nn.Module, dict[str, Any], Tensor]]:
    return make


@pytest.fixture(scope="session")
def uneven_norms() -> Callable[[nn.Module], nn.Module]:
    return uneven
