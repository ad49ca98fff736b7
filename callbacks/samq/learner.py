"""What trains the policy: REINFORCE by an Adam of its own, on the CPU, and all that has to be saved of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from callbacks.samq.policy import Policy, entropy, policy_loss

BETAS, WEIGHT_DECAY = (0.5, 0.999), 5e-4


class Learner:
    """A policy and its optimizer.

    Args:
        policy: to train, in place.
        lr: learning rate of Adam (betas 0.5 and 0.999, weight decay 5e-4, as in the official code).
        beta: factor of the entropy.
        momentum: of the moving average of costs that is subtracted from a cost; 0: none.

    Attributes:
        updates: steps so far.
        baseline: the moving average; None before the first step.
    """

    def __init__(self, policy: Policy, lr: float, beta: float, momentum: float) -> None:
        self.policy, self.beta, self.momentum = policy, beta, momentum
        self.adam = torch.optim.Adam(policy.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.updates = 0
        self.baseline: float | None = None

    @torch.enable_grad()
    def step(self, picks: Tensor, cost: float) -> float:
        """Make the policy draw picks (1, decisions) of a high cost less often; its entropy before the step."""
        past = cost if self.baseline is None else self.baseline
        logits = self.policy(picks)
        self.adam.zero_grad()
        torch.autograd.backward(policy_loss(logits, picks, cost - past if self.momentum else cost, self.beta).sum())
        self.adam.step()
        self.baseline = self.momentum * past + (1 - self.momentum) * cost
        self.updates += 1
        return float(entropy(logits.detach()))

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain containers and tensors."""
        return {
            "policy": self.policy.state_dict(),
            "adam": self.adam.state_dict(),
            "updates": self.updates,
            "baseline": self.baseline,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.policy.load_state_dict(state_dict["policy"])
        self.adam.load_state_dict(state_dict["adam"])
        self.updates, self.baseline = state_dict["updates"], state_dict["baseline"]
