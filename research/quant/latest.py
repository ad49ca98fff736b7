"""The last result of a computation, for as long as what it was made of stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Latest(Generic[T]):
    """Remembers one result. Copies and pickles of it remember nothing."""

    def __init__(self) -> None:
        self._state: list[Any] = []
        self._tensors: list[Tensor] = []
        self._value: T | None = None

    def __reduce__(self) -> tuple[type[Latest[T]], tuple[()]]:
        return type(self), ()

    def get(self, made_of: Sequence[Any], make: Callable[[], T]) -> T:
        """``make()``, or what it gave last if the tensors in ``made_of`` are the same ones, not written to since, and
        everything else in it is equal. Nothing is remembered where a tensor's changes cannot be known, where it has a
        graph, and while a compiler looks.
        """
        tensors = [item for item in made_of if isinstance(item, Tensor)]
        if torch.compiler.is_compiling() or any(tensor.is_inference() or tensor.requires_grad for tensor in tensors):
            return make()
        state = [item for item in made_of if not isinstance(item, Tensor)]
        state += [version for tensor in tensors for version in (id(tensor), tensor._version)]
        if self._value is None or state != self._state:
            self._state, self._tensors, self._value = state, tensors, make()  # the tensors are kept: ids stay theirs
        return self._value
