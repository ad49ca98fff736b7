"""A weight quantizer of two widths, of which training draws one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from callbacks.sdq.formulas import LEAST, Choice, mixture, share_of_higher
from research.quant.quantizers import Delegating, Quantizer


class StochasticWidth(Delegating):
    """Two quantizers of one weight at neighbouring widths and the probability of the higher one.

    In training the weight is ``share * higher(w) + (1 - share) * lower(w)`` with a share from `share_of_higher`, in
    evaluation what the more probable of the two makes of it; ``bits`` is the width in evaluation. Ranges that the
    quantizers learn are their own.

    Args:
        source: the quantizer to take the place of; it becomes the higher one, a copy of it the lower.
        bits: the two widths, the higher one first.
        start: probability of the higher width at first, and again after every step down.
        tau: temperature of the draw.
        choice: ``sample`` or ``interpolate``.

    Attributes:
        beta: the probability, 0-dim parameter.
        undecided: boolean buffer; False: the weight has the higher width.
        noise: of the draw, 0-dim; set by the mechanic.
    """

    choice_parameters = ("beta",)
    beta: nn.Parameter
    undecided: Tensor
    noise: Tensor

    def __init__(self, source: Quantizer, bits: tuple[int, int], start: float, tau: float, choice: Choice) -> None:
        super().__init__(source.spec, source.shape, source.channel_axis, source.role)
        self.higher, self.lower = source, copy.deepcopy(source)
        self.start, self.tau, self.choice = start, tau, choice
        self.beta = nn.Parameter(torch.tensor(float(start)))
        self.register_buffer("undecided", torch.tensor(True))
        self.register_buffer("noise", torch.zeros(()))
        for quantizer, width in zip((self.higher, self.lower), bits, strict=True):
            quantizer.bits.fill_(width)
        self.follow()

    @property
    def present(self) -> Quantizer:
        """The quantizer of evaluation."""
        return self.higher if torch.equal(self.bits, self.higher.bits) else self.lower

    @property
    def certainty(self) -> Tensor:
        """Probability of the higher width, 1 where it is decided; 0-dim, differentiable."""
        return torch.where(self.undecided, self.beta, torch.ones_like(self.beta))

    @property
    def expected_bits(self) -> Tensor:
        """The expected width."""
        return mixture(self.certainty, self.higher.bits, self.lower.bits)

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """The drawn mixture in training, the present quantizer's value in evaluation."""
        if self.training:
            drawn = share_of_higher(self.beta, self.noise, self.tau, self.choice)
            share = torch.where(self.undecided, drawn, torch.ones_like(drawn))
        else:
            share = (self.bits == self.higher.bits).to(self.beta.dtype)
        return mixture(share, self.higher.fake_quantize(x, rounding), self.lower.fake_quantize(x, rounding))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise both from the same weights."""
        self.higher.initialise(x)
        self.lower.initialise(x)
        self.initialised.fill_(True)

    @torch.no_grad()
    def follow(self) -> None:
        """After a step of ``beta``: keep it off 0 and 1, and let ``bits`` be the more probable width."""
        self.beta.clamp_(LEAST, 1 - LEAST)
        self.bits.copy_(torch.where(self.certainty < 0.5, self.lower.bits, self.higher.bits))

    @torch.no_grad()
    def step_down(self, following: int | None, w: Tensor) -> None:
        """The lower width becomes the higher one, with its range; ``following`` is the new lower one, None: decided.

        Args:
            following: a width below the lower one; its range is initialised from the weight.
            w: the weight.
        """
        self.higher.load_state_dict(self.lower.state_dict())
        if following is None:
            self.undecided.fill_(False)
        else:
            self.lower.bits.fill_(following)
            self.lower.initialise(w)
        self.beta.fill_(self.start)
        self.follow()

    @torch.no_grad()
    def decide(self, width: int, w: Tensor) -> None:
        """End with ``width``; a range that neither quantizer has is initialised from the weight ``w``."""
        if width != int(self.higher.bits):
            if width == int(self.lower.bits):
                self.step_down(None, w)
            else:
                self.higher.bits.fill_(width)
                self.higher.initialise(w)
        self.undecided.fill_(False)
        self.follow()
