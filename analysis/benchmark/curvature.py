"""Seconds of a Hessian-vector product: our operator beside a double backward written by hand, float and quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from analysis.benchmark.interleaved import Clock, interleaved, ratios
from analysis.benchmark.networks import REFERENCE, Way, build_step
from research.curvature.batches import FixedBatches
from research.curvature.operators import CurvatureOperator
from research.curvature.surface import Surface
from research.quant.layers import QuantLayer

BY_HAND = "double backward by hand"
Product = Callable[[], Tensor]


def images_of(count: int, batch_size: int, device: str) -> FixedBatches:
    """``count`` synthetic 32x32 images in batches."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (count,), generator=generator).to(device)
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return FixedBatches(tuple((x.contiguous(memory_format=torch.channels_last), y) for x, y in pairs))


def weights_of(net: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of all convolutions and linear layers, by parameter name."""
    return {f"{name}.weight": layer.weight for name, layer in net.named_modules() if isinstance(layer, QuantLayer)}


def by_hand(net: nn.Module, batches: FixedBatches, direction: dict[str, Tensor]) -> Tensor:
    """The Hessian by the latent weights times ``direction``, flat, as anybody would write it."""
    weights = [net.get_parameter(name) for name in direction]
    total = [torch.zeros_like(weight) for weight in weights]
    for images, labels in batches:
        loss = nn.functional.cross_entropy(net(images), labels)
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        found = torch.autograd.grad(gradients, weights, list(direction.values()))
        for sum_, part in zip(total, found, strict=True):
            sum_ += part * (len(labels) / batches.samples)
    return torch.cat([part.reshape(-1) for part in total])


def products(way: Way, images: int, batch_size: int, device: str) -> dict[str, Product]:
    """Products of a network's Hessian with one vector, by name; the two surfaces of a float network are the same."""
    net = build_step(way, batch_size, device).module.net.eval()
    batches = images_of(images, batch_size, device)
    generator = torch.Generator().manual_seed(3)
    direction = {
        name: torch.randn(weight.shape, generator=generator).to(device) for name, weight in weights_of(net).items()
    }
    flat = torch.cat([part.reshape(-1) for part in direction.values()])

    def operator(surface: Surface, keep_graphs: bool = False) -> Product:
        found = CurvatureOperator("hessian", net, _loss, batches, surface, kinds=("weight",), keep_graphs=keep_graphs)
        return lambda: found.matvec(flat)

    return {
        BY_HAND: lambda: by_hand(net, batches, direction),
        "surface=latent": operator("latent"),
        "surface=quantized": operator("quantized"),
        "surface=quantized, graphs kept": operator("quantized", keep_graphs=True),
    }


def _loss(network: Callable[..., Any], batch: Any) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(network(images), labels)


def measure(rounds: int, images: int, batch_size: int, model: str, device: str, clock: Clock) -> dict[str, Any]:
    """By network and way: ``ms`` a product, ``ratio`` to the double backward by hand, quartiles of its rounds."""
    found = {}
    for name, way in (("float", Way(32, model=model)), ("W4A4 LSQ", Way(4, REFERENCE, model=model))):
        seconds = interleaved(products(way, images, batch_size, device), rounds, warmup=1, clock=clock)
        found[name] = ratios(seconds, BY_HAND)
    return found
