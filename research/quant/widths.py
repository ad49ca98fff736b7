"""State per width: one quantizer, one batch-norm for every width that a network is to be run at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from research.quant.quantizers import Delegating, Quantizer, QuantizerSpec, Role, build_quantizer


def width_key(owner: nn.Module, children: nn.ModuleDict, width: Any) -> str:
    """The key of ``width`` among ``children`` (keys are written integers).

    Raises:
        ValueError: no state for this width.
    """
    value = width if isinstance(width, str) else int(width)
    if str(value) not in children:
        raise ValueError(f"no {type(owner).__name__} for width {value}: quantizer.widths has {', '.join(children)}")
    return str(value)


def picked_state(copies: Iterable[nn.Module], index: Tensor) -> dict[str, Tensor]:
    """Parameters and buffers of one of several alike modules, by name; differentiable.

    Args:
        copies: modules with the same names and shapes.
        index: of the one, (1,) int64: no number, so that a compiled network keeps its graph.
    """
    states = [{**dict(each.named_parameters()), **dict(each.named_buffers())} for each in copies]
    return {name: torch.stack([each[name] for each in states]).index_select(0, index)[0] for name in states[0]}


class PerWidth(Delegating):
    """One quantizer for each of several widths; ``passes(bits=...)`` selects.

    Args:
        spec: specification at the default width, which must be among ``widths``.
        shape: shape of the tensor to quantize.
        channel_axis: axis of per-channel scales.
        role: which slot the quantizer fills.
        widths: all widths with a state of their own.
    """

    def __init__(
        self, spec: QuantizerSpec, shape: Sequence[int], channel_axis: int | None, role: Role, widths: Sequence[int]
    ) -> None:
        super().__init__(spec, shape, channel_axis, role)
        self.by_width = nn.ModuleDict(
            {str(width): build_quantizer(spec.with_bits(width), shape, channel_axis, role) for width in sorted(widths)}
        )
        self.selected = self.key(spec.bits)
        self.backward, self.output_scale = self.present.backward, self.present.output_scale  # type: ignore[misc]

    def key(self, width: Any) -> str:
        """The key of ``width``; ValueError if there is none."""
        return width_key(self, self.by_width, width)

    @property
    def present(self) -> Quantizer:
        """The selected quantizer."""
        quantizer = self.by_width[self.selected]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    @property
    def expected_bits(self) -> Tensor:
        """The selected quantizer's bits."""
        return self.present.expected_bits

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise the quantizer of every width from the same data."""
        for quantizer in self.by_width.values():
            assert isinstance(quantizer, Quantizer)
            quantizer.initialise(x)
        self.initialised.fill_(True)


class SwitchableBatchNorm2d(nn.Module):
    """One ``BatchNorm2d`` per width (Yu et al. 2019, slimmable networks), all copies of ``norm``."""

    def __init__(self, norm: nn.BatchNorm2d, widths: Sequence[int], selected: int) -> None:
        super().__init__()
        self.by_width = nn.ModuleDict()
        for width in sorted(widths):
            copy = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
            copy.load_state_dict(norm.state_dict())
            self.by_width[str(width)] = copy
        self.selected = self.key(selected)

    def key(self, width: Any) -> str:
        """The key of ``width``; ValueError if there is none."""
        return width_key(self, self.by_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the selected width's statistics and affine parameters."""
        normalised: Tensor = self.by_width[self.selected](x)
        return normalised
