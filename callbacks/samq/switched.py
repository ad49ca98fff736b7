"""Quantizers and batch-norms whose width a buffer says: it changes from step to step, the graph does not.

The tensors of all copies are stacked and those of the present width taken from the stack. So every copy takes part in
every evaluation, as `DistributedDataParallel` wants it, and one that is not at work has a gradient of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from research.quant.kernels import UniformGrid
from research.quant.quantizers import Delegating, Quantizer, build_quantizer
from research.quant.widths import SwitchableBatchNorm2d, picked_state, width_key


class _Asked(nn.Module):
    """Answers for a quantizer, as a forward pass, so that `functional_call` can ask it under the state of another."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, name: str, *arguments: Any) -> Any:
        found = getattr(self.quantizer, name)
        return found(*arguments) if arguments else found


class SwitchedQuantizer(Delegating):
    """One quantizer for each of several widths; ``bits``, which must be one of them, says which one is at work.

    Args:
        source: the quantizer to take the place of; candidates are quantizers of its kind, with ranges of their own.
        widths: of the candidates, ascending; the widest is at work at first.
    """

    def __init__(self, source: Quantizer, widths: Sequence[int]) -> None:
        shape, axis, role = source.shape, source.channel_axis, source.role
        super().__init__(source.spec.with_bits(widths[-1]), shape, axis, role)
        self.midrise = source.midrise
        self.by_width = nn.ModuleDict(
            {str(width): build_quantizer(source.spec.with_bits(width), shape, axis, role) for width in widths}
        )
        self._asked = (_Asked(self.by_width[str(widths[0])]),)  # in a tuple: a reference, no submodule

    @property
    def quantizers(self) -> list[Quantizer]:
        """The candidates, ascending in width."""
        return list(self.by_width.values())  # type: ignore[arg-type]

    @property
    def present(self) -> Quantizer:
        """The quantizer at work."""
        quantizer = self.by_width[width_key(self, self.by_width, self.bits)]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def ask(self, name: str, *arguments: Any) -> Any:
        """An attribute of the quantizer at work, or what its method of this name returns; without a new graph."""
        widths = torch.stack([quantizer.bits for quantizer in self.quantizers])
        state = picked_state(self.quantizers, (widths == self.bits).to(torch.int64).argmax().reshape(1))
        named = {f"quantizer.{leaf}": tensor for leaf, tensor in state.items()}
        return functional_call(self._asked[0], named, (name, *arguments))

    @property
    def scale(self) -> Tensor:
        """Its scale."""
        scale: Tensor = self.ask("scale")
        return scale

    @property
    def raw_scale(self) -> Tensor:  # type: ignore[override]
        """What it is made of."""
        raw: Tensor = self.ask("raw_scale")
        return raw

    def fused_grid(self, x: Tensor) -> UniformGrid | None:
        """Its fast path."""
        grid: UniformGrid | None = self.ask("fused_grid", x) if self.mode == "quantize" else None
        return grid

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Quantize at the present width."""
        value: Tensor = self.ask("fake_quantize", x, rounding)
        return value

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise every candidate from the same data."""
        for quantizer in self.quantizers:
            quantizer.initialise(x)
        self.signed.copy_(self.present.signed)
        self.initialised.fill_(True)


class SwitchedBatchNorm2d(SwitchableBatchNorm2d):
    """One batch-norm per width of the convolution before it, all copies of ``norm``; ``bits`` says which is at work.

    Only that one has a gradient other than zero, and running statistics that move.

    Args:
        norm: with affine parameters and running statistics of a fixed momentum.
        widths: ascending; the widest is at work at first.
    """

    bits: Tensor

    def __init__(self, norm: nn.BatchNorm2d, widths: Sequence[int]) -> None:
        super().__init__(norm, widths, widths[-1])
        self.register_buffer("bits", torch.tensor(float(widths[-1])))
        self.widths = tuple(float(width) for width in sorted(widths))

    @property
    def present(self) -> nn.BatchNorm2d:
        """The batch-norm at work."""
        norm = self.by_width[self.key(self.bits)]
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the affine parameters and the statistics of the present width."""
        norms: list[nn.BatchNorm2d] = list(self.by_width.values())  # type: ignore[arg-type]
        chosen = torch.stack([self.bits == width for width in self.widths])
        state = picked_state(norms, chosen.to(torch.int64).argmax().reshape(1))
        mean, var, first = state["running_mean"], state["running_var"], norms[0]
        assert first.momentum is not None
        y = F.batch_norm(x, mean, var, state["weight"], state["bias"], first.training, first.momentum, first.eps)
        if first.training:
            with torch.no_grad():
                for norm, at_work in zip(norms, chosen, strict=True):
                    assert norm.running_mean is not None and norm.running_var is not None
                    assert norm.num_batches_tracked is not None
                    norm.running_mean.copy_(torch.where(at_work, mean, norm.running_mean))
                    norm.running_var.copy_(torch.where(at_work, var, norm.running_var))
                    norm.num_batches_tracked += at_work
        return y
