"""Surfaces: by which tensors the loss of a quantized network is differentiated.

==============  ================================================================================================
``quantized``   the de-quantized weights: zero offsets behind the weight quantizers, so that neither rounding nor
                clipping of the weights plays a part; inputs stay quantized, with their straight-through rule
``latent``      the latent weights, through the straight-through rule twice: a clipped weight has no curvature
==============  ================================================================================================

Other parameters (biases, norms, ranges) are differentiated where they stand, on both surfaces; a float network's
weights too, so that its two surfaces are one. What is measured at a finite distance without any derivative has the
surface ``perturbation`` and is in `research.curvature.sharpness`, `.radius` and `.landscape`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from research.quant.kinds import Kind, parameter_kinds
from research.quant.layers import quantizers

Surface = Literal["quantized", "latent"]
SURFACES: tuple[Surface, ...] = get_args(Surface)
WEIGHTS: tuple[Kind, ...] = ("weight",)


def leaves(
    net: nn.Module,
    surface: Surface = "quantized",
    select: str | Sequence[str] | None = None,
    kinds: Collection[Kind] = WEIGHTS,
) -> dict[str, Tensor]:
    """The variables of a curvature operator: zero moves by parameter name, each in the parameter's shape.

    Args:
        net: a converted or a plain float network.
        surface: where a weight is moved; see the module's table.
        select: names of modules, or glob patterns: only what is in them. None takes the whole network.
        kinds: which parameters; those of a plain network's convolutions and linear layers count as its own.

    Raises:
        ValueError: an unknown surface, a pattern without a match, or nothing of these kinds.
    """
    if surface not in SURFACES:
        raise ValueError(f"surface={surface}: use one of {', '.join(SURFACES)}")
    named = _kinds(net)
    found = {name: parameter for name, parameter in net.named_parameters() if named[name] in kinds}
    if not found:
        raise ValueError(f"kinds={','.join(kinds)}: the network has no such parameters; use kinds=weight")
    if select is not None:
        patterns = [select] if isinstance(select, str) else list(select)
        for pattern in patterns:
            if not any(_within(name, pattern) for name in found):
                modules = ", ".join(owners(found))
                raise ValueError(f"select={pattern}: no module of that name has such parameters; use one of {modules}")
        found = {name: p for name, p in found.items() if any(_within(name, pattern) for pattern in patterns)}
    return {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in found.items()}


def owners(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter names grouped by the module that holds them: by layer, and for ranges by quantizer."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return groups


def replaced_rules(net: nn.Module) -> list[str]:
    """Names of the quantizers without a second derivative, in whose place curvature puts the plain estimator."""
    return [name for name, quantizer in quantizers(net) if quantizer.backward == "gradient_dependent"]


def _kinds(net: nn.Module) -> Mapping[str, Kind]:
    """`parameter_kinds`, with weights and biases of layers that were never converted."""
    kinds = parameter_kinds(net)
    own: tuple[Kind, ...] = ("weight", "bias")
    for name, module in net.named_modules():
        for kind in own:
            key = f"{name}.{kind}" if name else kind
            if isinstance(module, nn.Conv2d | nn.Linear) and kinds.get(key) == "other":
                kinds[key] = kind
    return kinds


def _within(name: str, pattern: str) -> bool:
    """Whether a parameter lies in a module that the pattern names."""
    parts = name.split(".")[:-1]
    return any(fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))
