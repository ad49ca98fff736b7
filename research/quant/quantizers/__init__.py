"""Quantizers by name, and how a specification becomes a module."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from research.quant.quantizers.base import MODES, Mode, Quantizer, QuantizerSpec, Role
from research.quant.quantizers.delegating import Delegating

REGISTRY: dict[str, str] = {
    "minmax": "research.quant.quantizers.minmax.MinMax",
    "lsq": "research.quant.quantizers.lsq.LSQ",
    "lsq_plus": "research.quant.quantizers.lsq_plus.LSQPlus",
    "pact": "research.quant.quantizers.pact.PACT",
    "dorefa": "research.quant.quantizers.dorefa.DoReFa",
    "ewgs": "research.quant.quantizers.ewgs.EWGS",
    "liq": "research.quant.quantizers.liq.LIQ",
    "n2uq": "research.quant.quantizers.n2uq.N2UQ",
    "lq_nets": "research.quant.quantizers.lq_nets.LQNets",
    "binary": "research.quant.quantizers.binary.Binary",
    "rq": "research.quant.quantizers.rq.RQ",
    "srq": "research.quant.quantizers.srq.SRQ",
}


def quantizer_class(name: str) -> type[Quantizer]:
    """The Quantizer class registered as ``name``, or the one a dotted path names.

    Raises:
        ValueError: unknown name, or something that is no Quantizer.
    """
    path = REGISTRY.get(name, name)
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"quantizer.*.name={name!r} is unknown: use one of {', '.join(REGISTRY)}") from None
    if not (isinstance(found, type) and issubclass(found, Quantizer)):
        raise ValueError(f"quantizer.*.name={name!r} is no Quantizer: use one of {', '.join(REGISTRY)}")
    return found


def build_quantizer(spec: QuantizerSpec, shape: Sequence[int], channel_axis: int | None, role: Role) -> Quantizer:
    """Build the quantizer that ``spec`` asks for.

    Raises:
        ValueError: unknown quantizer, options that it does not have, or a weight whose negative half has no codes.
    """
    cls = quantizer_class(spec.name)
    try:
        quantizer = cls(spec, shape, channel_axis, role, **spec.options)
    except TypeError as error:
        raise ValueError(f"quantizer.{role}.options={spec.options}: {spec.name} says {error}") from None
    if role == "weight" and not quantizer.signed and quantizer.zero_point is None:
        raise ValueError(
            f"quantizer.weight.signed=false: without a zero point {spec.name} has no codes below 0, use auto"
        )
    return quantizer


__all__ = [
    "MODES",
    "REGISTRY",
    "Delegating",
    "Mode",
    "Quantizer",
    "QuantizerSpec",
    "Role",
    "build_quantizer",
    "quantizer_class",
]
