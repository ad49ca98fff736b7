"""How much each layer minds each width: by curvature (HAWQ-V2), and by trying it out one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn

from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Choices
from research.quant.convert import fill_slots
from research.quant.layers import SLOTS, QuantLayer, quant_layers
from research.quant.passes import rebound
from research.quant.recipe import Table

Elsewhere = Literal["float", "widest"]
ELSEWHERE: tuple[Elsewhere, ...] = ("float", "widest")


def without_quantizers(net: nn.Module) -> nn.Module:
    """A copy of a converted network whose layers compute with their latent weights and float inputs."""
    net = copy.deepcopy(net).eval()
    for _, layer in quant_layers(net):
        for slot in SLOTS:
            setattr(layer, slot, None)
    return net


def with_quantizers(net: nn.Module, table: Table) -> nn.Module:
    """A copy of a network of `without_quantizers` with the quantizers of a table, not calibrated yet.

    Raises:
        ValueError: a width that a quantizer does not take, naming layer and slot.
    """
    net = copy.deepcopy(net)
    for name, layer in quant_layers(net):
        try:
            fill_slots(layer, table[name])
        except ValueError as error:
            raise ValueError(f"allocation.{name}: {error}") from None
    return net


def candidates(net: nn.Module, base: Table, choices: Choices) -> dict[LayerBits, nn.Module]:
    """For every candidate, a copy of ``net`` in which each layer that may has it, and others their first; not
    calibrated yet.

    Args:
        net: a network of `without_quantizers`.
        base: which quantizer each slot has.
        choices: candidates by layer.

    Raises:
        ValueError: a candidate that a quantizer does not take, naming layer and slot.
    """
    found: dict[LayerBits, nn.Module] = {}
    for bits in dict.fromkeys(bits for options in choices.values() for bits in options):
        widths = {name: bits if bits in options else options[0] for name, options in choices.items()}
        found[bits] = with_quantizers(net, Allocation(widths).table(base))
    return found


@torch.no_grad()
def weight_errors(nets: Mapping[LayerBits, nn.Module], choices: Choices) -> dict[str, dict[LayerBits, float]]:
    """``||Q(w) - w||^2`` of every layer at each of its candidates; ``nets`` as `candidates` gives them."""
    found: dict[str, dict[LayerBits, float]] = {}
    for name, options in choices.items():
        layers = {bits: _layer(nets[bits], name) for bits in options}
        found[name] = {
            bits: float((layer.quantized_weight() - layer.float_weight()).double().square().sum())
            for bits, layer in layers.items()
        }
    return found


def hessian_sensitivities(
    traces: Mapping[str, float], weights: Mapping[str, int], errors: Mapping[str, Mapping[LayerBits, float]]
) -> dict[str, dict[LayerBits, float]]:
    """``Tr(H_l) / N_l * ||Q(w_l) - w_l||^2`` (HAWQ-V2, Dong et al. 2020): twice the rise of the loss, if the
    Hessian of a layer were its mean eigenvalue. A trace whose estimate is negative counts as 0.

    Args:
        traces: of the Hessian's diagonal block of each layer's weights.
        weights: number of each layer's weights.
        errors: squared errors of the quantized weights by candidate.
    """
    return {
        name: {bits: max(traces[name], 0.0) / weights[name] * error for bits, error in options.items()}
        for name, options in errors.items()
    }


def perturbation_sensitivities(
    net: nn.Module,
    nets: Mapping[LayerBits, nn.Module],
    choices: Choices,
    loss: Callable[[nn.Module], float],
    elsewhere: Elsewhere = "float",
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> dict[str, dict[LayerBits, float]]:
    """The rise of the loss when one layer alone goes to a candidate, weight and input together.

    Args:
        net: a network of `without_quantizers`; it stays as it is.
        nets: as `candidates` gives them, of this network.
        choices: candidates by layer; where there is only one, the rise is 0 by definition.
        loss: mean loss of a network on fixed data.
        elsewhere: what all other layers are: ``float``, or at their ``widest`` candidate.
        progress: wraps the names of the layers that are tried.
    """
    if elsewhere not in ELSEWHERE:
        raise ValueError(f"elsewhere={elsewhere}: use one of {', '.join(ELSEWHERE)}")
    widest = {name: max(options) for name, options in choices.items()} if elsewhere == "widest" else {}
    found = {name: dict.fromkeys(options, 0.0) for name, options in choices.items()}
    with torch.no_grad(), filled(net, nets, widest):
        reference = loss(net)
        for name in progress([name for name, options in choices.items() if len(options) > 1]):
            for bits in choices[name]:
                with filled(net, nets, {name: bits}):
                    found[name][bits] = loss(net) - reference
    return found


@contextmanager
def filled(net: nn.Module, nets: Mapping[LayerBits, nn.Module], chosen: Mapping[str, LayerBits]) -> Iterator[None]:
    """Inside the block the chosen layers of ``net`` have the slots that they have in the network of that candidate."""
    with ExitStack() as stack:
        for name, bits in chosen.items():
            layer, source = _layer(net, name), _layer(nets[bits], name)
            for slot in SLOTS:
                stack.enter_context(rebound(layer, slot, getattr(source, slot)))
        yield


def _layer(net: nn.Module, name: str) -> QuantLayer:
    layer = net.get_submodule(name)
    assert isinstance(layer, QuantLayer)
    return layer
