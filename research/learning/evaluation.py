"""Evaluations and objectives: what one look at a batch gives, and the functions that give it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

State = Mapping[str, Tensor]
"""Parameters and buffers by their name in the network, to be used in place of its own for one evaluation."""

Network = Callable[..., Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the objective on one batch.

    Attributes:
        batch: the batch, as the data module gave it.
        loss: scalar to be minimised; the sum of ``terms`` until a mechanic replaces it.
        outputs: what the network returned (classification: logits (N, classes)).
        terms: scalar loss terms by name, weights included; ``task`` is the task's own.
        taps: outputs of tapped modules by module name.
    """

    batch: Any
    loss: Tensor
    outputs: Any
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    taps: Mapping[str, Tensor] = field(default_factory=dict)

    def plus(self, name: str, term: Tensor) -> Evaluation:
        """The same with one more term (0-dim) in the loss."""
        return replace(self, loss=self.loss + term, terms={**self.terms, name: term})


class Objective(Protocol):
    """``batch -> Evaluation``; ``state`` replaces parameters and buffers of the network for this evaluation alone."""

    def __call__(self, batch: Any, state: State | None = None) -> Evaluation:
        """Evaluate ``batch``."""
        ...


def cloned_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers of ``net``: as ``state``, they keep an evaluation from moving any statistic."""
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


@contextmanager
def same_noise(device: torch.device) -> Iterator[Callable[[], None]]:
    """Let several evaluations of a step draw the same noise from the default generator.

    Yields a function that rewinds the generator to the state it had on entry; call it before every evaluation but the
    first. Afterwards the generator stands where a single evaluation would have left it.
    """
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        yield lambda: torch.cuda.set_rng_state(state, device)
    else:
        state = torch.get_rng_state()
        yield lambda: torch.set_rng_state(state)


class _Asked(nn.Module):
    """Calls a function, as a forward pass, so that `functional_call` can call it with other tensors in ``net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, function: Callable[[], Result]) -> Result:
        return function()


def under_state(net: nn.Module, state: State, function: Callable[[], Result]) -> Result:
    """What ``function()`` makes of ``net`` while that has the tensors of ``state`` in place of its own."""
    found: Result = functional_call(_Asked(net), {f"net.{name}": tensor for name, tensor in state.items()}, (function,))
    return found


def gradient_loss(value: Tensor, gradients: Mapping[Tensor, Tensor]) -> Tensor:
    """A scalar with the value ``value`` and the given gradients: ``value + <p, g> - sg<p, g>``.

    Turns any combination of gradients into a loss for one ordinary backward pass.

    Args:
        value: scalar; detached.
        gradients: gradient by parameter, each of the parameter's shape; detached.
    """
    inner = torch.stack([(parameter * gradient.detach()).sum() for parameter, gradient in gradients.items()]).sum()
    return value.detach() + (inner - inner.detach())
