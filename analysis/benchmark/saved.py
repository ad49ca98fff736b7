"""Memory that autograd graphs keep for their backward passes, counted tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class _Kept:
    """What a graph holds in place of a tensor, until it lets go of it."""

    def __init__(self, tensor: Tensor, memory: SavedMemory) -> None:
        self.tensor, self.memory = tensor, memory
        storage = tensor.untyped_storage()
        self.place, self.size = storage.data_ptr(), storage.nbytes()
        memory.add(self.place, self.size)

    def __del__(self) -> None:
        self.memory.remove(self.place, self.size)


class SavedMemory:
    """Counts, within it, what graphs keep: shared memory once, tensors that are there anyway not at all.

    Args:
        present: tensors that do not count.

    Attributes:
        kept: bytes that live graphs keep now.
        peak: the most that they kept at any time.
    """

    def __init__(self, present: Iterable[Tensor]) -> None:
        self.present = {tensor.untyped_storage().data_ptr() for tensor in present}
        self.uses: Counter[int] = Counter()
        self.kept = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> SavedMemory:
        self.hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hooks.__exit__(kind, error, trace)

    def add(self, place: int, size: int) -> None:
        """One more graph node keeps the storage at ``place``."""
        if place not in self.present:
            self.uses[place] += 1
            self.kept += size if self.uses[place] == 1 else 0
            self.peak = max(self.peak, self.kept)

    def remove(self, place: int, size: int) -> None:
        """One node less does."""
        if place not in self.present:
            self.uses[place] -= 1
            self.kept -= size if self.uses[place] == 0 else 0

    def _pack(self, tensor: Tensor) -> _Kept:
        return _Kept(tensor, self)
