"""Curvature matrices of a network at a stated surface, as linear operators on a flat vector.

Evaluation mode; no state of the network moves; batches count by their sizes; quantizers whose rule depends on the
upstream gradient use the plain straight-through estimator, and the record says which. The operators are those of
hessian-eigenthings, whose algorithms run on them (`research.curvature.spectrum`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from hessian_eigenthings.operators.base import CurvatureOperator as LibraryOperator
from torch import Tensor, nn

from research.curvature.batches import FixedBatches, check_buffers, check_repeatable
from research.curvature.constants import constants
from research.curvature.displacement import displaced
from research.curvature.products import (
    HessianGraph,
    Moves,
    Product,
    fisher_product,
    ggn_product,
    hessian_graph,
    hessian_product,
)
from research.curvature.sharpness import Loss, shares
from research.curvature.surface import WEIGHTS, Surface, leaves, replaced_rules
from research.learning.evaluation import Network
from research.learning.perturbation import named_gradients
from research.quant.double_backward import fast_double_backward
from research.quant.kinds import Kind
from research.quant.passes import surrogate_gradients

PRODUCTS: dict[str, Product] = {"hessian": hessian_product, "ggn": ggn_product, "fisher": fisher_product}


class CurvatureOperator(LibraryOperator):  # type: ignore[misc]
    """A symmetric matrix over the selected tensors of a network, known by its products; see `hessian`, `ggn`, `fisher`.

    Args:
        kind: ``hessian``, ``ggn`` or ``fisher``.
        net: an eager network; not to be trained while the operator is in use.
        loss: ``loss(network, batch)``, a mean of one term per sample.
        batches: the data, on any device.
        surface: by which tensors the loss is differentiated.
        select: names or glob patterns of modules; None takes the whole network.
        kinds: kinds of parameters.
        keep_graphs: of a Hessian, keep the first backward pass of every batch for all products: they take little more
            than half the time, and memory grows with the number of samples instead of the size of a batch.

    Attributes:
        loss_value: the mean loss at the network itself.
        unused: selected parameters that the loss does not depend on; they are left out.
        replaced: quantizers with the plain straight-through estimator in place of their own rule.
        products: how often the matrix was multiplied.

    Raises:
        ValueError: a compiled network, a loss that is not repeatable, nothing selected, or nothing used.
    """

    def __init__(
        self,
        kind: str,
        net: nn.Module,
        loss: Loss,
        batches: FixedBatches,
        surface: Surface = "quantized",
        select: str | Sequence[str] | None = None,
        kinds: Collection[Kind] = WEIGHTS,
        keep_graphs: bool = False,
    ) -> None:
        if kind not in PRODUCTS:
            raise ValueError(f"operator={kind}: use one of {', '.join(PRODUCTS)}")
        require_eager(net)
        moves = leaves(net, surface, select, kinds)
        example = next(iter(moves.values()))
        self.kind, self.net, self.loss, self.surface = kind, net, loss, surface
        self.batches = batches.to(example.device, example.dtype)
        self.loss_value = check_repeatable(net, loss, self.batches)
        self.replaced = replaced_rules(net)
        self.select = [select] if isinstance(select, str) else select
        self.kinds = tuple(kinds)
        used = self._used(moves)
        self.unused = [name for name in moves if name not in used]
        self.shapes = {name: move.shape for name, move in moves.items() if name in used}
        self.layout = _layout(self.shapes)
        self.products = 0
        self._device, self._dtype = example.device, example.dtype
        self.keep_graphs = keep_graphs and kind == "hessian"
        self._graphs: list[HessianGraph] = []
        self._buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def device(self) -> torch.device:
        """Where products are made."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """That of the network's parameters."""
        return self._dtype

    @property
    def settings(self) -> dict[str, Any]:
        """What the operator is, in plain values: part of every record."""
        return {
            "operator": self.kind,
            "surface": self.surface,
            "select": None if self.select is None else list(self.select),
            "kinds": list(self.kinds),
            "data": {**self.batches.settings, "samples": self.batches.samples},
            "dtype": str(self.dtype).removeprefix("torch."),
            "size": self.size,
            "loss": self.loss_value,
            "replaced": self.replaced,
            "unused": self.unused,
        }

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector (size,) as tensors by parameter name."""
        return {name: vector[part].reshape(self.shapes[name]) for name, part in self.layout.items()}

    def matvec(self, v: Tensor) -> Tensor:
        """The matrix times ``v`` (size,), over all batches.

        Raises:
            ValueError: the product is not finite, or a buffer of the network moved.
        """
        self.products += 1
        direction, total = self.split(v), torch.zeros_like(v)
        fast = fast_double_backward(self.net) if self.kind == "hessian" else nullcontext()
        with constants(self.net), fast:
            for index, (batch, share) in enumerate(shares(self.batches)):
                found = self._batch_product(index, batch, direction)
                total += share * torch.cat([found[name].reshape(-1) for name in self.layout])
        check_buffers(self.net, self._buffers)
        if not bool(total.isfinite().all()):
            raise ValueError(f"operator={self.kind}: a product is not finite; the network's weights are too large")
        return total

    def _batch_product(self, index: int, batch: Any, direction: Moves) -> dict[str, Tensor]:
        if not self.keep_graphs:
            return PRODUCTS[self.kind](self._evaluate, self.loss, batch, direction)
        if index == len(self._graphs):
            self._graphs.append(hessian_graph(self._evaluate, self.loss, batch, direction))
        return self._graphs[index].times(direction)

    def _evaluate(self, moves: Moves, function: Callable[[Network], Tensor]) -> Tensor:
        with displaced(self.net, self.surface, moves) as network, surrogate_gradients(self.net):
            return function(network)

    def _used(self, moves: Moves) -> set[str]:
        variables = {name: move.clone().requires_grad_() for name, move in moves.items()}
        with constants(self.net):
            value = self._evaluate(variables, lambda network: self.loss(network, self.batches[0]))
        used = set(named_gradients(value, variables)) if value.requires_grad else set()
        if not used:
            raise ValueError(
                f"surface={self.surface}: the loss depends on none of {', '.join(moves)}; use surface=quantized"
            )
        return used


hessian = partial(CurvatureOperator, "hessian")
"""The Hessian of the mean loss; arguments as for `CurvatureOperator`, but for the first."""

ggn = partial(CurvatureOperator, "ggn")
"""The generalised Gauss-Newton matrix: the Hessian less the curvature of the network itself."""

fisher = partial(CurvatureOperator, "fisher")
"""The empirical Fisher matrix: the mean outer product of the gradients of single samples, at the true labels."""


def require_eager(net: nn.Module) -> None:
    """Raise ValueError for a compiled network: its backward has no derivative."""
    if any(module._compiled_call_impl is not None for module in net.modules()) or hasattr(net, "_orig_mod"):
        raise ValueError("compile=network: a compiled network has no second derivative; measure its plain_copy()")


def asymmetry(operator: LibraryOperator, seed: int = 0) -> float:
    """``|u'Av - v'Au| / |u'Av|`` for two Gaussian vectors: 0 up to rounding for every true curvature."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
            for _ in range(2))  # fmt: skip
    forth, back = torch.dot(u, operator.matvec(v)), torch.dot(v, operator.matvec(u))
    return float((forth - back).abs() / forth.abs())


def _layout(shapes: Mapping[str, torch.Size]) -> dict[str, slice]:
    layout, start = {}, 0
    for name, shape in shapes.items():
        layout[name] = slice(start, start + shape.numel())
        start += shape.numel()
    return layout
