"""The search cell: one tensor, several candidate quantizers, of which a training step executes one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from callbacks.ssps.formulas import carried, relaxed_pick
from research.quant.quantizers import Delegating, Quantizer
from research.quant.widths import picked_state

Grad = Literal["all", "sampled"]
GRADS: tuple[Grad, ...] = get_args(Grad)


class Candidate(nn.Module):
    """One candidate of a cell, as a module, so that it can run with the state of another.

    Args:
        quantizer: at the candidate's width, with a range of its own.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor, rounding: bool) -> Tensor:
        """``x`` through the quantizer, same shape."""
        return self.quantizer.fake_quantize(x, rounding)


class SearchCell(Delegating):
    """Candidate widths of one weight or input, each with a range of its own, and trained logits of their choice.

    In training the tensor is what the picked candidate makes of it, with the derivatives of that one; the logits get
    the straight-through gradient of the pick. In evaluation it is what the most probable candidate makes of it, of
    equal ones the widest; ``bits`` is the width of that. Once the cell is fixed, training takes that one too.

    Args:
        source: the quantizer to take the place of; candidates are copies of it.
        widths: of the candidates, ascending, two or more.
        grad: ``all``: every candidate quantizes the tensor for the gradient of its logit; ``sampled``: the picked one
            alone.

    Attributes:
        alpha: logits, (n,) parameter.
        noise: added to the log-probabilities before the greatest is picked, (n,); set by the mechanic.
        tau: temperature of the gradient, 0-dim; set by the mechanic.
        fixed: boolean buffer.
        widths: of the candidates, (n,).
    """

    choice_parameters = ("alpha",)
    alpha: nn.Parameter
    noise: Tensor
    tau: Tensor
    fixed: Tensor
    widths: Tensor

    def __init__(self, source: Quantizer, widths: Sequence[int], grad: Grad) -> None:
        super().__init__(source.spec, source.shape, source.channel_axis, source.role)
        self.grad = grad
        self.candidates = nn.ModuleList(Candidate(copy.deepcopy(source)) for _ in widths)
        for quantizer, width in zip(self.quantizers, widths, strict=True):
            quantizer.bits.fill_(width)
        self.alpha = nn.Parameter(torch.zeros(len(widths)))
        self.register_buffer("noise", torch.zeros(len(widths)))
        self.register_buffer("tau", torch.ones(()))
        self.register_buffer("fixed", torch.tensor(False))
        self.register_buffer("widths", torch.tensor([float(width) for width in widths]), persistent=False)
        self.follow()

    # -- the choice --------------------------------------------------------------------------------------------

    @property
    def quantizers(self) -> list[Quantizer]:
        """The candidates' quantizers, ascending in width."""
        return [candidate.quantizer for candidate in self.candidates]  # type: ignore[misc]

    @property
    def index(self) -> Tensor:
        """The candidate of evaluation, 0-dim integer."""
        return (self.widths == self.bits).to(torch.int64).argmax()

    @property
    def present(self) -> Quantizer:
        """The quantizer of evaluation."""
        return self.quantizers[int(self.index)]

    @property
    def probabilities(self) -> Tensor:
        """``softmax(alpha)``, one-hot where the cell is fixed, (n,); differentiable."""
        return torch.where(self.fixed, self._one_hot(self.index), torch.softmax(self.alpha, 0))

    @property
    def expected_bits(self) -> Tensor:
        """The expected width."""
        return (self.probabilities * self.widths).sum()

    @property
    def soft(self) -> Tensor:
        """The relaxed pick, (n,)."""
        return relaxed_pick(self.alpha, self.noise, self.tau)

    @property
    def pick(self) -> Tensor:
        """The candidate that training executes, 0-dim integer."""
        return torch.where(self.fixed, self.index, self.soft.argmax())

    def _one_hot(self, index: Tensor) -> Tensor:
        return (torch.arange(len(self.widths), device=index.device) == index).to(self.alpha.dtype)

    @torch.no_grad()
    def follow(self) -> None:
        """After a step of ``alpha``: let ``bits`` be the most probable width, of equal ones the widest."""
        best = len(self.widths) - 1 - self.alpha.flip(0).argmax()
        self.bits.copy_(torch.where(self.fixed, self.bits, self.widths[best]))

    @torch.no_grad()
    def fix(self, index: int) -> None:
        """End with this candidate."""
        self.bits.copy_(self.widths[index])
        self.fixed.fill_(True)

    # -- a quantizer -------------------------------------------------------------------------------------------

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """What the picked candidate makes of ``x`` in training, the present one in evaluation."""
        if not self.training:
            return self._at(self.index, x, rounding)
        pick = self.pick
        value = self._at(pick, x, rounding)
        shares = torch.where(self.fixed, self.soft.detach(), self.soft)
        if self.grad == "sampled":
            return carried(value, shares.index_select(0, pick.reshape(1)), [value])
        with torch.no_grad():
            branches = [candidate(x, rounding) for candidate in self.candidates]
        return carried(value, shares, branches)

    def _at(self, index: Tensor, x: Tensor, rounding: bool) -> Tensor:
        """``x`` through candidate ``index``, which is no number, so that a compiled network keeps its graph."""
        state = picked_state(self.candidates, index.reshape(1))
        value: Tensor = functional_call(self.candidates[0], state, (x, rounding))
        return value

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise every candidate from the same data."""
        for quantizer in self.quantizers:
            quantizer.initialise(x)
        self.signed.copy_(self.present.signed)
        self.initialised.fill_(True)
