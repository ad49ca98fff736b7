"""Networks and data small enough for dense curvature matrices, which are made here by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from research.curvature.batches import FixedBatches
from research.curvature.surface import Surface
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.layers import quant_layers
from research.quant.passes import surrogate_gradients
from research.quant.quantizers import quantizer_class
from research.quant.recipe import Recipe

WEIGHTS = ("0.weight", "4.weight")
CUTS = (5, 2)  # unequal batches


def crossentropy(network: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(network(batch[0]), batch[1])


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(CUTS), 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(sum(CUTS)) % 3


def small_batches(cuts: Sequence[int] = CUTS) -> FixedBatches:
    x, y = samples()
    return FixedBatches(tuple(zip(x.split(list(cuts)), y.split(list(cuts)), strict=True)))


def small_net(name: str | None = "lsq", bits: int = 3, widths: Sequence[int] = ()) -> nn.Sequential:
    """conv - batch-norm - tanh - flatten - fc, 42 weights, float64; all of it quantized by ``name``, None: float."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )  # fmt: skip
    recipe: dict[str, Any] = {}
    if name is not None:
        slot = {"name": name, "bits": min(bits, quantizer_class(name).max_bits)}
        options = {"alpha": 2.0} if name == "pact" else {}
        recipe = {"weight": slot, "input": {**slot, "options": options}, "widths": list(widths)}
    convert(net, Recipe.from_config(recipe), "0", "4")
    with torch.no_grad():
        for weight in (net[0].weight, net[4].weight):
            weight.mul_(3)
    net.double()
    calibrate(net, [samples()[0]])
    return net.eval()


def dequantized(net: nn.Module) -> nn.Module:
    """A copy whose weights are the de-quantized ones, as plain parameters."""
    by_hand = copy.deepcopy(net)
    for _, layer in quant_layers(by_hand):
        weight = layer.quantized_weight().detach()
        layer.weight_quantizer = None
        layer.weight.data.copy_(weight)
    return by_hand


def at_surface(net: nn.Module, surface: Surface) -> nn.Module:
    """The network whose plain parameters are the variables of ``surface``."""
    return dequantized(net) if surface == "quantized" else net


def flat_loss(net: nn.Module, names: Sequence[str] = WEIGHTS) -> tuple[Any, Tensor]:
    """The mean loss over all samples as a function of some parameters, flat, and where they are."""
    own = dict(net.named_parameters())
    shapes = [own[name].shape for name in names]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        values = {name: p.reshape(s) for name, p, s in zip(names, pieces, shapes, strict=True)}
        with surrogate_gradients(net):
            return crossentropy(lambda x: functional_call(net, values, (x,)), samples())

    return loss, torch.cat([own[name].detach().flatten() for name in names])


def dense_hessian(net: nn.Module, surface: Surface, names: Sequence[str] = WEIGHTS) -> Tensor:
    loss, point = flat_loss(at_surface(net, surface), names)
    return torch.autograd.functional.hessian(loss, point, vectorize=True)


def matrix(operator: Any) -> Tensor:
    """All products with unit vectors."""
    return torch.stack([operator.matvec(row) for row in torch.eye(operator.size, dtype=operator.dtype)])


def vectors(size: int, count: int = 4) -> Tensor:
    """A few Gaussian vectors (count, size)."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def products(operator: Any) -> Tensor:
    """Products with `vectors`, for operators whose whole matrix takes too long."""
    return torch.stack([operator.matvec(v) for v in vectors(operator.size)])
