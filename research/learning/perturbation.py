"""Worst-case perturbations of a given radius: the gradients, one joint norm over all tensors, the moved parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from research.learning.evaluation import State
from research.quant.kinds import RANGES, parameter_kinds
from research.quant.processes import process_count

EPS = 1e-12


def joint_norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of all tensors together, in float32 or wider; 0-dim."""
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors.values()]
    return torch.stack([tensor.square().sum() for tensor in wide]).sum().sqrt()


def named_gradients(loss: Tensor, leaves: Mapping[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    """Gradients of ``loss`` (0-dim) by name, of the leaves that it depends on."""
    found = torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def perturbed_parameters(net: nn.Module) -> dict[str, Tensor]:
    """What SAM and its kin move, by name: every trained parameter but those that choose a width.

    The loss of a search has a penalty whose gradient would take most of the radius; and the draw of a width, which both
    evaluations share, would change with its probability.
    """
    kinds = parameter_kinds(net)
    return {name: p for name, p in net.named_parameters() if p.requires_grad and kinds[name] != "choice"}


def range_names(net: nn.Module) -> set[str]:
    """Names of the parameters of quantizers."""
    return {name for name, kind in parameter_kinds(net).items() if kind in RANGES}


def average_over_processes(gradients: Mapping[str, Tensor]) -> None:
    """Replace every gradient by its mean over all processes, in place; alone it stays as it is."""
    if process_count() > 1:
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient)
            gradient /= process_count()


def moved_parameters(net: nn.Module, state: State | None, moves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of ``net``, or those that ``state`` has in their place, plus ``moves``; by name, the moved ones."""
    start = {**dict(net.named_parameters()), **(state or {})}
    return {name: start[name] + move for name, move in moves.items()}


def sam_perturbation(gradients: Mapping[str, Tensor], rho: float) -> dict[str, Tensor]:
    """``rho * g / ||g||_2`` (SAM, equation 2 with p = 2), the norm over all parameters together.

    Args:
        gradients: gradient by parameter name.
        rho: radius, in units of the parameters.
    """
    factor = rho / (joint_norm(gradients) + EPS)
    return {name: gradient * factor for name, gradient in gradients.items()}


def asam_perturbation(
    gradients: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    rho: float,
    eta: float,
    plain: Collection[str] = (),
) -> dict[str, Tensor]:
    """``rho * T^2 g / ||T g||_2`` with ``T = |w| + eta`` for weights (ndim > 1) and 1 for the rest (ASAM, equation 9).

    Args:
        gradients: gradient by parameter name.
        parameters: parameter by the same names.
        rho: radius, in units relative to the parameters.
        eta: keeps the normalisation off zero.
        plain: names that are no weights whatever their shape, such as a quantizer's scale per channel.
    """
    operator = {
        name: torch.ones_like(g) if g.ndim < 2 or name in plain else parameters[name].detach().abs() + eta
        for name, g in gradients.items()
    }
    scaled = {name: operator[name] * gradient for name, gradient in gradients.items()}
    factor = rho / (joint_norm(scaled) + EPS)
    return {name: operator[name] * gradient * factor for name, gradient in scaled.items()}


def qasam_perturbation(
    gradients: Mapping[str, Tensor], points: Mapping[str, Tensor], plain: Collection[str], rho: float, eta: float
) -> dict[str, Tensor]:
    """``rho * p^2 g / ||(|p| + eta) g||_2``; for ``plain`` tensors 1 in place of both factors.

    SAQ's adaptive form as its official code has it (zhuang-group/SAQ, QASAM): unlike ASAM's, the perturbation itself
    has no ``eta``, so a tensor's zeros stay where they are.

    Args:
        gradients: gradient by name.
        points: where the gradients were taken, by the same names; the quantized weight of a quantized layer.
        plain: names that are not adapted (biases).
        rho: radius, in units relative to the points.
        eta: keeps the norm off zero.
    """
    sizes = {
        name: torch.ones_like(g) if name in plain else points[name].detach().abs() for name, g in gradients.items()
    }
    scaled = {name: g if name in plain else (sizes[name] + eta) * g for name, g in gradients.items()}
    factor = rho / (joint_norm(scaled) + EPS)
    return {name: sizes[name].square() * g * factor for name, g in gradients.items()}
