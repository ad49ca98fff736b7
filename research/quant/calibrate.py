"""Calibration: quantizer ranges from the weights and from what flows through the network on a few batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from research.quant.layers import QuantLayer, quant_layers, quantizers
from research.quant.output_scale import OutputScale
from research.quant.passes import evaluating, passes, rebound
from research.quant.quantizers import Mode, Quantizer


@torch.no_grad()
def calibrate(
    net: nn.Module,
    batches: Sequence[Tensor],
    quantize_weights_first: bool = False,
    sequential: bool = False,
    force: bool = False,
) -> list[str]:
    """Initialise every quantizer that is not initialised yet; nothing else of ``net`` moves.

    Weight quantizers see the weight itself. The others see what reaches them while the network runs in evaluation
    mode (batch-norm on its running statistics). Last, everything quantizing, an `OutputScale` is set where a quantizer
    of its layer was. Under DDP give every rank the same batches.

    Args:
        net: a converted network with its pretrained weights.
        batches: network inputs on the device of ``net``.
        quantize_weights_first: quantize the weights while inputs are observed, instead of using the float ones.
        sequential: one quantizer at a time in order of execution, those before it already quantizing; costs one run
            over the batches for each.
        force: initialise again what is initialised already.

    Returns:
        Names of the quantizers that were initialised.

    Raises:
        ValueError: a quantizer whose layer the forward pass never uses, or that refuses the data, naming it.
    """
    pending = {name: quantizer for name, quantizer in quantizers(net) if force or not quantizer.initialised}
    weights = {layer.weight_quantizer: layer for _, layer in quant_layers(net) if layer.weight_quantizer is not None}
    observing = dict(pending)
    for name, quantizer in pending.items():
        if quantizer in weights:
            quantizer.initialise(weights[quantizer].float_weight())
            del observing[name]
    if observing:
        _initialise_observed(net, batches, observing, quantize_weights_first, sequential)
    _initialise_output_scales(net, batches, set(pending.values()))
    return list(pending)


def _initialise_observed(
    net: nn.Module,
    batches: Sequence[Tensor],
    observing: dict[str, Quantizer],
    quantize_weights_first: bool,
    sequential: bool,
) -> None:
    modes: dict[str, Mode] = {
        "weight": "quantize" if quantize_weights_first else "identity",
        "input": "identity",
        "output": "identity",
    }
    with evaluating(net), passes(net, mode=modes), ExitStack() as stack:
        if not sequential:
            _observe(net, batches, observing)
            return
        order = _order_of_use(net, batches, observing)
        for name in [*order, *(name for name in observing if name not in order)]:
            _observe(net, batches, {name: observing[name]})
            stack.enter_context(rebound(observing[name], "mode", "quantize"))


def _initialise_output_scales(net: nn.Module, batches: Sequence[Tensor], fresh: set[Quantizer]) -> None:
    """Set the output scales of the layers with ``fresh`` quantizers, in order of execution, from the first batch."""
    scaled = [
        (name, layer)
        for name, layer in quant_layers(net)
        if isinstance(layer.output_quantizer, OutputScale) and fresh & {layer.weight_quantizer, layer.input_quantizer}
    ]
    if not scaled:
        return
    if not batches:
        raise ValueError(f"{scaled[0][0]}.output_quantizer: calibration: an output scale needs a batch of data")
    with evaluating(net), passes(net, mode="quantize"), ExitStack() as stack:
        for _, layer in scaled:
            stack.callback(layer.register_forward_pre_hook(_keep_magnitude).remove)
        net(batches[0])


def _keep_magnitude(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Set the scale of a layer that is about to run so that its output has the float layer's mean magnitude."""
    assert isinstance(layer, QuantLayer) and isinstance(layer.output_quantizer, OutputScale)
    (x,) = inputs
    quantized = x if layer.input_quantizer is None else layer.input_quantizer(x)
    layer.output_quantizer.initialise(
        layer.operate(x, layer.float_weight()), layer.operate(quantized, layer.quantized_weight())
    )


def _observe(net: nn.Module, batches: Sequence[Tensor], observing: dict[str, Quantizer]) -> None:
    """Run the batches with these quantizers observing, then initialise them from what they saw."""
    with ExitStack() as stack:
        for quantizer in observing.values():
            stack.enter_context(rebound(quantizer, "mode", "observe"))
        for batch in batches:
            net(batch)
    for name, quantizer in observing.items():
        try:
            quantizer.initialise_from_observed()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _order_of_use(net: nn.Module, batches: Sequence[Tensor], observing: dict[str, Quantizer]) -> list[str]:
    """Names in the order in which the forward pass of the first batch calls them."""
    order: list[str] = []
    with ExitStack() as stack:
        for name, quantizer in observing.items():
            handle = quantizer.register_forward_hook(lambda *_, name=name: order.append(name))
            stack.callback(handle.remove)
        for batch in batches[:1]:
            net(batch)
    return order
