"""Operators around an operator: one that shows how far a measurement is, one that never computes a product twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hessian_eigenthings.operators.base import CurvatureOperator as LibraryOperator
from torch import Tensor
from tqdm import tqdm

from research.curvature.estimates import Subspace


class Around(LibraryOperator):  # type: ignore[misc]
    """An operator with the products of another one."""

    def __init__(self, operator: LibraryOperator) -> None:
        self.operator = operator

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self.operator.size)

    @property
    def device(self) -> torch.device:
        """Where products are made."""
        device: torch.device = self.operator.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products."""
        dtype: torch.dtype = self.operator.dtype
        return dtype

    def matvec(self, v: Tensor) -> Tensor:
        """The other's product."""
        product: Tensor = self.operator.matvec(v)
        return product


class Replay(Around):
    """Keeps its products in order: an algorithm that is started again with more steps pays for the new ones only.

    Attributes:
        inputs: vectors (size,) that were multiplied, in order.
        outputs: their products.
    """

    def __init__(self, operator: LibraryOperator) -> None:
        super().__init__(operator)
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        """The next product is the first one again."""
        self._next = 0

    def matvec(self, v: Tensor) -> Tensor:
        """The kept product where ``v`` is the vector that was multiplied in this place before, else a new one."""
        place, self._next = self._next, self._next + 1
        if place < len(self.inputs) and torch.equal(v, self.inputs[place]):
            self.inputs[place] = v  # the algorithm keeps this one; let go of the equal one
            return self.outputs[place]
        del self.inputs[place:], self.outputs[place:]
        self.inputs.append(v)
        self.outputs.append(super().matvec(v))
        return self.outputs[place]

    def explored(self) -> Subspace:
        """The span of the ``inputs``, if these are orthonormal."""
        along = (torch.dot(u, product) for u, product in zip(self.inputs, self.outputs, strict=True))
        return Subspace(torch.stack(self.inputs), sum(float(value) for value in along))

    def product(self, v: Tensor) -> Tensor:
        """The product with a combination of orthonormal ``inputs``, from theirs alone."""
        return torch.stack([torch.dot(u, v) for u in self.inputs]) @ torch.stack(self.outputs)


class _Counted(Around):
    def __init__(self, operator: LibraryOperator, bar: tqdm[None]) -> None:
        super().__init__(operator)
        self.bar = bar

    def matvec(self, v: Tensor) -> Tensor:
        product = super().matvec(v)
        self.bar.update()
        return product


@contextmanager
def counted(operator: LibraryOperator, label: str, products: int, progress: bool = True) -> Iterator[LibraryOperator]:
    """``operator`` with a bar over its ``products`` on standard error, if ``progress`` and where that is a terminal."""
    with tqdm(total=products, desc=label, unit="product", leave=False, disable=None if progress else True) as bar:
        yield _Counted(operator, bar)
