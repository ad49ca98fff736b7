"""Activations made again in the backward pass: outputs of ``ReLU(BatchNorm(y))`` are not kept, ``y`` is kept anyway.

Batch-norm keeps its input for its own backward pass; what follows from it point by point need not be kept as well.
The result is bit for bit the same, at the price of one batch-norm forward per activation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Kept:
    """One tensor that the backward pass will ask for: the tensor itself, or how to make it again."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.recipe: Callable[[], Tensor] | None = None
        self.alive: weakref.ref[Tensor] | None = None
        self.uses = 1

    def release(self, output: Tensor, recipe: Callable[[], Tensor]) -> None:
        """Keep ``recipe`` in place of the tensor, whose live form is ``output``."""
        self.tensor, self.recipe, self.alive = None, recipe, weakref.ref(output)

    def holds(self) -> bool:
        """Whether the memory is still this tensor's: kept here, or alive elsewhere."""
        return self.tensor is not None or (self.alive is not None and self.alive() is not None)

    def value(self) -> Tensor:
        """The tensor; made once for all that ask, and let go after the last."""
        if self.recipe is None:
            assert self.tensor is not None
            return self.tensor
        self.uses -= 1
        value = self.tensor if self.tensor is not None else self.recipe()
        self.tensor = value if self.uses > 0 else None
        return value


class Recorder:
    """What the autograd graph of one forward pass keeps, by address."""

    def __init__(self) -> None:
        self.kept: weakref.WeakValueDictionary[tuple[Any, ...], _Kept] = weakref.WeakValueDictionary()
        self.normalised: dict[int, tuple[weakref.ref[Tensor], nn.BatchNorm2d, Tensor]] = {}

    @staticmethod
    def address(tensor: Tensor) -> tuple[Any, ...]:
        """Where a tensor is and how it lies there."""
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    def saved_bytes(self, without: Collection[int]) -> int:
        """Bytes that the graph keeps at the moment, but for tensors at the addresses ``without`` (parameters)."""
        stores = {
            kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes()
            for kept in self.kept.values()
            if kept.tensor is not None and kept.tensor.data_ptr() not in without
        }
        return sum(stores.values())

    def pack(self, tensor: Tensor) -> _Kept:
        """Called by autograd for each tensor that it keeps."""
        address = self.address(tensor)
        found = self.kept.get(address)
        if found is not None and found.holds():
            found.uses += 1
            return found
        kept = self.kept[address] = _Kept(tensor)
        return kept

    def unpack(self, kept: _Kept) -> Tensor:
        """Called by autograd when it needs the tensor."""
        return kept.value()

    def after_norm(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Remember where a normalised tensor came from."""
        assert isinstance(module, nn.BatchNorm2d)
        if module.training and output.requires_grad:
            self.normalised[id(output)] = weakref.ref(output), module, inputs[0].detach()

    def after_relu(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Let go of an activation that follows from a batch-norm's input."""
        reference, norm, source = self.normalised.pop(id(inputs[0]), (None, None, None))
        kept = self.kept.get(self.address(output))
        if reference is None or reference() is not inputs[0] or kept is None:
            return
        assert norm is not None and source is not None
        weight, bias, eps = norm.weight.detach(), norm.bias.detach(), norm.eps

        def again() -> Tensor:
            with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
                return torch.relu(nn.functional.batch_norm(source, None, None, weight, bias, True, 0.0, eps))

        kept.release(output, again)


@contextmanager
def recomputed_activations(net: nn.Module) -> Iterator[Recorder]:
    """Inside the block, forward passes of ``net`` keep no output of a ReLU that follows a batch-norm in training.

    For eager networks; nothing else changes, and the gradients are bit for bit those without.

    Args:
        net: any network whose activations and norms are modules.
    """
    recorder = Recorder()
    with ExitStack() as stack:
        for module in net.modules():
            if type(module) is nn.BatchNorm2d and module.affine:
                stack.callback(module.register_forward_hook(recorder.after_norm).remove)
            elif type(module) is nn.ReLU and not module.inplace:
                stack.callback(module.register_forward_hook(recorder.after_relu).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack))
        yield recorder
