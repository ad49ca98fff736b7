"""Second derivatives: how a network is run for them, which tensors a gradient penalty is about, and which networks
have none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from research.quant.double_backward import fast_double_backward
from research.quant.passes import surrogate_gradients
from research.quant.quantizers import Quantizer


@contextmanager
def twice_differentiable(net: nn.Module) -> Iterator[None]:
    """Inside the block evaluations of ``net`` have second derivatives, for ``create_graph=True``.

    The quantizers and the convolutions are in forms whose second derivatives are right and fast.
    """
    with surrogate_gradients(net), fast_double_backward(net):
        yield


def layer_weights(net: nn.Module) -> list[str]:
    """Names of the trained weights of all convolutions and linear layers, quantized ones included, by definition."""
    return [
        f"{name}.weight"
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.requires_grad
    ]


def require_second_derivatives(net: nn.Module, slug: str) -> None:
    """Refuse a network with a quantizer whose derivative depends on the upstream gradient: it has no second one.

    The host asks for every mechanic that ``needs_double_backward``, once all mechanics are attached.

    Raises:
        ValueError: naming the first such quantizer and the mechanic ``slug`` that needs more.
    """
    for name, module in net.named_modules():
        if isinstance(module, Quantizer) and module.backward == "gradient_dependent":
            raise ValueError(
                f"callbacks.{slug}: the derivative of {name} ({type(module).__name__}) depends on the upstream "
                "gradient and has no second one; use one with a surrogate, such as plain lsq, or quantizer=float"
            )
