"""The policy of SAMQ: an LSTM that draws one width per layer, and its loss (zhuang-group/SAQ)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

START = 0.1


class Policy(nn.Module):
    """Draws the picks of one layer after another; each one is the next input of an LSTM cell.

    ``h_l, c_l = cell(e_l, (h_{l-1}, c_{l-1}))``, ``logits_l = head(h_l)``, with ``e_l`` the embedding of the pick
    before; ``e_1``, ``h_0`` and ``c_0`` are zero. It is on the CPU in float32, wherever the network is.

    Args:
        decisions: how many picks there are.
        choices: between how many candidates each is.
        hidden: size of the state and of the embeddings.
    """

    def __init__(self, decisions: int, choices: int, hidden: int = 64) -> None:
        super().__init__()
        self.decisions = decisions
        place: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        with torch.random.fork_rng(devices=[]):  # an initialisation that the next one replaces is nobody's noise
            self.embedding = nn.Embedding(choices, hidden, **place)
            self.cell = nn.LSTMCell(hidden, hidden, **place)
            self.head = nn.Linear(hidden, choices, **place)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw every parameter uniformly from -0.1 to 0.1."""
        for parameter in self.parameters():
            parameter.uniform_(-START, START, generator=generator)

    def forward(self, picks: Tensor) -> Tensor:
        """Logits (n, decisions, choices) of every decision, given the picks (n, decisions) before it."""
        return self._unroll(len(picks), lambda step, logits: picks[:, step])[1]

    @torch.no_grad()
    def sample(self, generator: torch.Generator, count: int = 1, among: int | None = None) -> Tensor:
        """Independent draws, (count, decisions).

        Args:
            generator: of the draws.
            count: how many.
            among: take the first so many candidates only, with probabilities in proportion; None: all.
        """

        def drawn(step: int, logits: Tensor) -> Tensor:
            return torch.multinomial(torch.softmax(logits[:, :among], -1), 1, generator=generator)[:, 0]

        return self._unroll(count, drawn)[0]

    @torch.no_grad()
    def most_probable(self) -> Tensor:
        """The most probable pick of every layer after the most probable ones before it, (decisions,)."""
        return self._unroll(1, lambda step, logits: logits.argmax(-1))[0][0]

    def _unroll(self, count: int, choose: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Picks (count, decisions) by ``choose(step, logits)``, and the logits that they are from."""
        entry = hidden = cell = self.head.weight.new_zeros(count, self.head.in_features)
        picks, logits = [], []
        for step in range(self.decisions):
            hidden, cell = self.cell(entry, (hidden, cell))
            logits.append(self.head(hidden))
            picks.append(choose(step, logits[-1]))
            entry = self.embedding(picks[-1])
        return torch.stack(picks, 1), torch.stack(logits, 1)


def log_probability(logits: Tensor, picks: Tensor) -> Tensor:
    """``sum_l log p_l(pick_l)``, (n,); logits (n, decisions, choices), picks (n, decisions)."""
    return torch.log_softmax(logits, -1).gather(-1, picks[..., None])[..., 0].sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """``sum_l H(p_l)`` in nats, (n,); logits (n, decisions, choices)."""
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum((-1, -2))


def policy_loss(logits: Tensor, picks: Tensor, cost: Tensor | float, beta: float) -> Tensor:
    """``cost log p - beta H``, (n,): its gradient is REINFORCE's for minimising the expected cost, plus an entropy.

    Args:
        logits: (n, decisions, choices).
        picks: (n, decisions).
        cost: of the picks, a number without gradient, (n,) or one.
        beta: factor of the entropy.
    """
    return log_probability(logits, picks) * cost - beta * entropy(logits)
