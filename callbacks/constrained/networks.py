"""One set of weights as two networks: what tells the high-precision pass from a low-precision one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from research.learning.evaluation import State
from research.quant.layers import QuantLayer, quantizers
from research.quant.passes import passes, rebound
from research.quant.quantizers import Mode
from research.quant.widths import PerWidth, SwitchableBatchNorm2d


def norms_at(net: nn.Module, width: int | None) -> dict[str, _BatchNorm]:
    """The batch-norms, by name, that ``net`` runs with at a width of ``quantizer.widths``; None: as it stands."""
    left_out: list[str] = []
    for name, module in net.named_modules():
        if isinstance(module, SwitchableBatchNorm2d):
            key = module.selected if width is None else module.key(width)
            left_out += [f"{name}.by_width.{other}" for other in module.by_width if other != key]
    return {
        name: module for name, module in net.named_modules() if isinstance(module, _BatchNorm) and name not in left_out
    }


def frozen_state(net: nn.Module, given: State, trained: Mapping[str, _BatchNorm]) -> dict[str, Tensor]:
    """``given`` with every parameter of ``net`` as a constant, but for those of the batch-norms ``trained``."""
    kept = {f"{name}.{leaf}" for name, norm in trained.items() for leaf, _ in norm.named_parameters(recurse=False)}
    constants = {name: given.get(name, p).detach() for name, p in net.named_parameters() if name not in kept}
    return {**given, **constants}


@contextmanager
def at_width(net: nn.Module, width: int | None) -> Iterator[None]:
    """Run ``net`` at a width of ``quantizer.widths`` with the batch-norms of that width; None: as it stands."""
    if width is None:
        yield
        return
    bits = {name: width for name, quantizer in quantizers(net) if isinstance(quantizer, PerWidth)}
    with passes(net, bits=bits, batchnorm=width):
        yield


class LayerRecord:
    """Quantized inputs and outputs of layers, kept while ``recording`` by hooks that do nothing otherwise.

    Args:
        layers: the layers by name.
    """

    def __init__(self, layers: Mapping[str, QuantLayer]) -> None:
        self.on = False
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.handles = []
        for name, layer in layers.items():
            self.handles.append(layer.register_forward_hook(self._keep(name, layer.input_quantizer is None)))
            if layer.input_quantizer is not None:
                self.handles.append(layer.input_quantizer.register_forward_hook(self._keep_input(name)))

    def _keep(self, name: str, with_input: bool) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.on:
                self.outputs[name] = output
                if with_input:
                    self.inputs[name] = inputs[0]

        return hook

    def _keep_input(self, name: str) -> Any:
        def hook(quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.on:
                self.inputs[name] = output

        return hook

    @contextmanager
    def recording(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Keep what flows inside the block: ``(inputs, outputs)`` by layer; forgotten at its end."""
        self.on = True
        try:
            yield self.inputs, self.outputs
        finally:
            self.on = False
            self.inputs.clear()
            self.outputs.clear()

    def remove_from(self, net: nn.Module) -> None:
        """Take the hooks off a copy of the network."""
        for module in net.modules():
            for handle in self.handles:
                module._forward_hooks.pop(handle.id, None)


def output_of(layer: QuantLayer, name: str, z: Tensor, mode: Mode, state: State) -> Tensor:
    """What ``layer`` makes of its quantized input ``z`` with its weights in ``mode``.

    Args:
        layer: the layer.
        name: its name in the network.
        z: quantized input.
        mode: ``relax`` or ``identity``.
        state: parameters to be used in place of the network's own, by their name there.
    """
    with rebound(layer, "input_quantizer", None), passes(layer, mode=mode):
        own = {leaf: state[f"{name}.{leaf}"] for leaf, _ in layer.named_parameters() if f"{name}.{leaf}" in state}
        y: Tensor = functional_call(layer, own, (z,))
    return y


def broadcast(modules: Sequence[nn.Module]) -> None:
    """Give every process the state that these modules have in the first; alone nothing happens."""
    if torch.distributed.is_initialized():
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                torch.distributed.broadcast(tensor.data, 0)
