"""Passes: the only way to run a network at other widths, in other modes, or with weight offsets.

Tensors are rebound for the length of a ``with`` block, never written in place: several passes at different widths
can share one backward, and a compiled network keeps its graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from research.quant.fused import Kernels
from research.quant.layers import quant_layers, quantizers
from research.quant.quantizers import MODES, Mode, Quantizer
from research.quant.widths import PerWidth, SwitchableBatchNorm2d

Bits = int | Tensor
BATCHNORM = ("batch", "running")


@contextmanager
def passes(
    net: nn.Module,
    bits: Bits | Mapping[str, Bits] | None = None,
    mode: Mode | Mapping[str, Mode] | None = None,
    batchnorm: str | int | None = None,
) -> Iterator[None]:
    """Run ``net`` in another way inside the block; everything is restored at its end, also after an error.

    Args:
        net: a converted network.
        bits: a width for every quantizer, or widths by quantizer name (``layer1.0.conv1.weight_quantizer``); an int or
            a tensor (scalar, or per channel in the shape of a per-channel scale, such as ``(C, 1, 1, 1)``).
        mode: a mode for every quantizer, or modes by role (``weight``, ``input``, ``output``).
        batchnorm: ``batch`` (batch statistics), ``running`` (running statistics, which stay as they are), or the key
            of a switchable batch-norm (a width of ``quantizer.widths``).

    Raises:
        ValueError: a name, mode, role or key that the network does not have.
    """
    with ExitStack() as stack:
        found = dict(quantizers(net))
        if bits is not None:
            named: Mapping[str, Bits] = bits if isinstance(bits, Mapping) else dict.fromkeys(found, bits)
            _known(named, found, "quantizer")
            for name, width in named.items():
                stack.enter_context(_width(found[name], width))
        if mode is not None:
            modes: Mapping[str, Mode] = mode if isinstance(mode, Mapping) else dict.fromkeys(_roles(found), mode)
            _known({value: None for value in modes.values()}, dict.fromkeys(MODES), "mode")
            _known(modes, dict.fromkeys(("weight", "input", "output")), "role")
            for quantizer in found.values():
                if quantizer.role in modes:
                    stack.enter_context(rebound(quantizer, "mode", modes[quantizer.role]))
        if batchnorm is not None:
            _enter_batchnorm(stack, net, batchnorm)
        yield


@contextmanager
def weight_leaves(net: nn.Module, values: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Offer the quantized weights as leaves: every quantized layer gets a ``weight_offset`` inside the block.

    Args:
        net: a converted network.
        values: offsets by layer name (shape of the weight); zeros that require a gradient where left out.

    Yields:
        The offsets by layer name. ``torch.autograd.grad(loss, offsets.values())`` is the gradient at the de-quantized
        weights, without the straight-through estimator and its clipping mask.
    """
    layers = dict(quant_layers(net))
    _known(values or {}, layers, "layer")
    with ExitStack() as stack:
        offsets = {}
        for name, layer in layers.items():
            given = None if values is None else values.get(name)
            offset = torch.zeros_like(layer.weight, requires_grad=True) if given is None else given
            stack.enter_context(rebound(layer, "weight_offset", offset))
            offsets[name] = offset
        yield offsets


def _known(names: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"passes: no {what} {name!r}; there are {', '.join(map(str, known)) or 'none'}")


def _roles(found: Mapping[str, Quantizer]) -> set[str]:
    return {str(quantizer.role) for quantizer in found.values()}


@contextmanager
def rebound(owner: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    """Bind ``owner.attribute`` to ``value`` inside the block; what was the class's, such as a method, is so again."""
    inherited = attribute not in owner.__dict__ and hasattr(type(owner), attribute)
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, before)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own training flag afterwards."""
    flags = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def use_kernels(net: nn.Module, kernels: Kernels | None) -> None:
    """From now on ``net`` takes the fast path (`research.quant.fused`) wherever it has one; None: the reference."""
    for _, quantizer in quantizers(net):
        quantizer.kernels = kernels


@contextmanager
def surrogate_gradients(net: nn.Module) -> Iterator[None]:
    """Inside the block Hessians exist: every quantizer takes the path that has all derivatives, and those whose
    derivative depends on the upstream gradient the plain straight-through estimator."""
    with ExitStack() as stack:
        for quantizer in (module for module in net.modules() if isinstance(module, Quantizer)):  # also inside another
            stack.enter_context(rebound(quantizer, "kernels", "affine"))
            if quantizer.backward == "gradient_dependent":
                stack.enter_context(rebound(quantizer, "plain_ste", True))
        yield


@contextmanager
def _width(quantizer: Quantizer, width: Bits) -> Iterator[None]:
    if isinstance(quantizer, PerWidth):
        key = quantizer.key(width)
        with rebound(quantizer, "selected", key), rebound(quantizer, "bits", quantizer.by_width[key].bits):
            yield
        return
    bits = width if isinstance(width, Tensor) else torch.full_like(quantizer.bits, float(width))
    with rebound(quantizer, "bits", bits):
        yield


def _enter_batchnorm(stack: ExitStack, net: nn.Module, batchnorm: str | int) -> None:
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if batchnorm in BATCHNORM:
        for norm in norms:
            stack.enter_context(rebound(norm, "training", batchnorm == "batch"))
        return
    switchable = [module for module in net.modules() if isinstance(module, SwitchableBatchNorm2d)]
    if not switchable:
        raise ValueError(f"passes: batchnorm={batchnorm!r} needs quantizer.widths; else use one of {BATCHNORM}")
    for norms_by_width in switchable:
        stack.enter_context(rebound(norms_by_width, "selected", norms_by_width.key(batchnorm)))
