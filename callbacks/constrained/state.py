"""What constrained learning keeps in checkpoints: multipliers, slacks, and a second set of batch-norms."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from callbacks.constrained.lagrangian import dual_ascent


class ConstraintState(nn.Module):
    """Multipliers of W low-precision networks with L layers, and the batch-norms of the high-precision network.

    Args:
        eps: bounds (W, L + 1), the output's last.
        norms: batch-norms to copy, by name in the network.

    Attributes:
        duals: multipliers (W, L + 1); layers start at 0, the output at 1 (official code).
        slacks: of the last dual step (W, L + 1).
        final_duals: multipliers (L,) by which layers were selected; 0 before.
        selected: whether they were.
    """

    duals: Tensor
    slacks: Tensor
    eps: Tensor
    final_duals: Tensor
    selected: Tensor

    def __init__(self, eps: Sequence[Sequence[float]], norms: Mapping[str, _BatchNorm]) -> None:
        super().__init__()
        bounds = torch.tensor(eps)
        self.register_buffer("eps", bounds)
        self.register_buffer("duals", torch.zeros_like(bounds))
        self.duals[:, -1] = 1
        self.register_buffer("slacks", torch.zeros_like(bounds))
        self.register_buffer("final_duals", torch.zeros_like(bounds[0, :-1]))
        self.register_buffer("selected", torch.tensor(False))
        self.norms = nn.ModuleDict({name.replace(".", "/"): copy.deepcopy(norm) for name, norm in norms.items()})

    def named_norms(self) -> Iterator[tuple[str, nn.Module]]:
        """The batch-norms by their name in the network."""
        for key, norm in self.norms.items():
            yield key.replace("/", "."), norm

    def network_state(self) -> dict[str, Tensor]:
        """The batch-norms' tensors by their name in the network: as ``state``, they take the place of its own."""
        return {
            f"{name}.{leaf}": tensor
            for name, norm in self.named_norms()
            for leaf, tensor in [*norm.named_parameters(), *norm.named_buffers()]
        }

    @torch.no_grad()
    def dual_step(self, slacks: Tensor, lr: float) -> None:
        """Keep the slacks and move the multipliers by them."""
        self.slacks.copy_(slacks)
        self.duals.copy_(dual_ascent(self.duals, slacks, lr))
