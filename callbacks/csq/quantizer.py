"""The weight quantizer of CSQ in training: bit planes with a gate on each, all of them sigmoids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from callbacks.csq.planes import hard_codes, plane_weights, soft_weight, spans, split
from callbacks.csq.search import PlaneWeight
from research.quant.quantizers.lsq import LSQ


class GatedPlanes(PlaneWeight):
    """``W = s sum_b c_b (h(p_b) - h(n_b)) h(m_b)`` with p, n, m, s trained; h is a sigmoid.

    Nothing is rounded, so ``quantize`` and ``relax`` are the same. The exact weight has the digits
    ``1[p_b > 0] - 1[n_b > 0]`` of the open planes; its codes are in units of the last open plane.

    Args:
        source: the LSQ quantizer to take the place of.
        planes: N.
        logit: digits 0 and 1 start at the logits ``-logit`` and ``logit``; None: at 0 and 1, as in the official code.

    Attributes:
        gates: m, (N,).
        beta: inverse temperature, 0-dim.
        hard: whether the gates are those of ``mask``, and no longer ``h(m)``.
        mask: 1 for an open plane, else 0, (N,).
    """

    choice_parameters = ("gates",)
    weights: Tensor
    beta: Tensor
    hard: Tensor
    mask: Tensor

    def __init__(self, source: LSQ, planes: int, logit: float | None = None) -> None:
        super().__init__(source, planes)
        self.logit = logit
        self.gates = nn.Parameter(torch.zeros(planes))
        self.register_buffer("weights", plane_weights(planes).float(), persistent=False)
        self.register_buffer("beta", torch.ones(()))
        self.register_buffer("hard", torch.tensor(False))
        self.register_buffer("mask", torch.ones(planes))

    def open_gates(self) -> Tensor:
        """The gates' values, (N,): ``h(m)``, or the mask."""
        return torch.where(self.hard, self.mask, torch.sigmoid(self.beta * self.gates))

    def opened(self) -> Tensor:
        """Which planes count as open now, boolean (N,): an undecided gate does."""
        return torch.where(self.hard, self.mask > 0, self.gates.detach() >= 0)

    def scale_of(self, opened: Tensor) -> Tensor:
        """The value of the last open plane, 0-dim: distance of neighbouring values of the exact weight."""
        scale: Tensor = self.magnitude / (2**self.planes - 1) * torch.exp2(behind_last(opened))
        return scale

    @property
    def scale(self) -> Tensor:
        """`scale_of` the planes that are open now."""
        return self.scale_of(self.opened())

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """The soft weight."""
        gates = self.open_gates()
        weight = soft_weight(self.positive, self.negative, gates, self.magnitude, self.beta, self.weights)
        return weight.reshape(self.shape)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Codes of the exact weight with the planes that are open now (int32)."""
        return self.codes_of(self.opened())

    @torch.no_grad()
    def codes_of(self, opened: Tensor) -> Tensor:
        """Codes of the exact weight with these planes, boolean (N,), in units of the last of them (int32)."""
        codes = hard_codes(self.positive, self.negative, opened).reshape(self.shape)
        return codes >> behind_last(opened).to(torch.int32)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Split the digits of ``x``."""
        *stacks, scale = split(x, self.planes)
        for digits, parameter in zip(stacks, (self.positive, self.negative), strict=True):
            logits = digits if self.logit is None else self.logit * (2 * digits - 1)
            parameter.copy_(logits.reshape(parameter.shape))
        self.raw_scale.copy_(scale)
        self.initialised.fill_(True)

    @torch.no_grad()
    def settle_bits(self) -> None:
        """Make ``bits`` the width of the exact weight's codes."""
        span = spans(self.opened()[None])[0]
        self.bits.copy_(torch.where(span > 0, span + 1, 0))

    @torch.no_grad()
    def keep_one(self) -> None:
        """Let the greatest gate be undecided, not closed, where all are closed: else the layer would be lost."""
        self.gates.copy_(torch.where(self.gates == self.gates.amax(), self.gates.clamp(min=0), self.gates))

    @torch.no_grad()
    def fix(self, opened: Tensor) -> None:
        """From now on the gates are these, boolean (N,)."""
        self.mask.copy_(opened)
        self.hard.fill_(True)
        self.settle_bits()

    @torch.no_grad()
    def distance(self) -> tuple[Tensor, Tensor]:
        """``||W_soft - W_hard||^2`` and ``||W_hard||^2``, 0-dim."""
        hard = self.dequantize(self.codes_of(self.opened()))
        return (self.fake_quantize(hard) - hard).square().sum(), hard.square().sum()


def behind_last(opened: Tensor) -> Tensor:
    """How many planes lie behind the last open one, 0-dim; 0 if none is open."""
    return opened.flip(0).to(torch.int32).argmax()
