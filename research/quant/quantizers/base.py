"""The Quantizer interface: what a tensor becomes, as one module with state of final shape from construction on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from research.quant.fused import Kernels, fused_fake_quantize
from research.quant.grid import Grid, code_limits
from research.quant.kernels import UniformGrid
from research.quant.ranges import METHODS
from research.quant.ste import round_ste

Mode = Literal["quantize", "relax", "identity", "observe"]
MODES: tuple[Mode, ...] = ("quantize", "relax", "identity", "observe")
Role = Literal["weight", "input", "output"]
GRANULARITIES = ("tensor", "channel")
MAX_BITS = 8
WIDTHS = f"use an integer from 1 to {MAX_BITS}, or 32 for float"
OBSERVED_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class QuantizerSpec:
    """One quantizer as a recipe states it; plain data.

    Args:
        name: registered name (``lsq``, ``minmax`` ...) or dotted path of a Quantizer class.
        bits: width of the codes, 0 to 8 (32 means no quantizer at all and is handled by the recipe).
        signed: ``True``, ``False`` or ``"auto"``: signed weights; inputs as calibration finds them.
        narrow: leave out the most negative code where codes are signed.
        granularity: ``tensor`` or ``channel`` (one scale per output channel; weights only).
        init: how the range is initialised from data: ``lsq``, ``minmax``, ``mse``, ``percentile``, ``three_sigma``;
            quantizers with an initialisation of their own (DoReFa, PACT, EWGS) do not look at it.
        options: arguments of the quantizer itself.

    Raises:
        ValueError: a value that no quantizer takes.
    """

    name: str = "lsq"
    bits: int = 8
    signed: bool | Literal["auto"] = "auto"
    narrow: bool = False
    granularity: str = "tensor"
    init: str = "lsq"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name={self.name!r}: use the name of a quantizer, such as lsq")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 0 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits={self.bits}: {WIDTHS}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r}: use one of {', '.join(GRANULARITIES)}")
        if self.signed not in (True, False, "auto"):
            raise ValueError(f"signed={self.signed!r}: use true, false or auto")
        if not isinstance(self.narrow, bool):
            raise ValueError(f"narrow={self.narrow!r}: use true or false")
        if self.narrow and self.signed is False:
            raise ValueError("narrow=true: unsigned codes have no negative one to leave out, use signed=true or auto")
        if self.init not in METHODS:
            raise ValueError(f"init={self.init!r}: use one of {', '.join(METHODS)}")

    def with_bits(self, bits: int) -> QuantizerSpec:
        """The same specification at another width."""
        return replace(self, bits=bits)


class Quantizer(nn.Module):
    """A map ``x -> x_hat`` onto a grid, with its codes.

    Subclasses implement ``transform``, ``codes_ste``, ``dequantize`` and ``initialise``; ``forward`` is the same for
    all: ``dequantize(codes_ste(transform(x)))``, so that ``forward(x) == dequantize(codes(x))`` holds exactly.

    Args:
        spec: what the recipe asks for.
        shape: shape of the tensor to quantize; for inputs, whose shape is not known before the data, ``()``.
        channel_axis: axis of the scales with per-channel granularity, None for one scale per tensor.
        role: which slot the quantizer fills.

    Attributes:
        raw_scale: what the scale is made of (`research.quant.kernels.positive`), in quantizers with a `fused_grid`.
        bits: float32 buffer, scalar or one per channel; rebound (never written) by ``passes``.
        signed: boolean buffer; with ``signed: auto`` an input's calibration sets it.
        initialised: boolean buffer, True once the range has been set from data (or restored).
        backward: ``surrogate`` if every derivative is that of a differentiable surrogate (so a Hessian exists),
            ``gradient_dependent`` if the rule depends on the upstream gradient.
        kernels: the kernels of the fast path (`research.quant.fused`) where `fused_grid` allows it; None: the
            reference, which is differentiable any number of times.
        rectified: the input comes through a ReLU: fast paths give numbers up to zero no gradient, so that it may be
            left out (`research.quant.rectified`).
        plain_ste: a gradient-dependent quantizer uses the plain straight-through estimator, and draws no noise.
        output_scale: the values live on a fixed scale, so that the layer gets a trainable `OutputScale`.
        channelwise: per-channel granularity is defined.
        owns_weight: the quantizer holds the parameters of the weight itself; the layer freezes its own.
        parameter_options: optimizer options of own parameters by name, e.g. ``{"scale": {"weight_decay": 0.0}}``.
        choice_parameters: names of own parameters that choose a width, which perturbations of the network leave alone.
        min_bits: least width for which the quantizer is defined, by role.
        max_bits: greatest width for which it is defined.
        midrise: the codes are those of a mid-rise grid, not of a uniform one.
    """

    backward: ClassVar[Literal["surrogate", "gradient_dependent"]] = "surrogate"
    output_scale: ClassVar[bool] = False
    owns_weight: ClassVar[bool] = False
    parameter_options: ClassVar[dict[str, dict[str, float]]] = {}
    choice_parameters: ClassVar[tuple[str, ...]] = ()
    min_bits: ClassVar[dict[str, int]] = {"weight": 1, "input": 1, "output": 1}
    max_bits: ClassVar[int] = MAX_BITS
    channelwise: ClassVar[bool] = True
    midrise: bool = False
    raw_scale: Tensor
    bits: Tensor
    signed: Tensor
    initialised: Tensor

    def __init__(self, spec: QuantizerSpec, shape: Sequence[int], channel_axis: int | None, role: Role) -> None:
        super().__init__()
        if spec.bits and spec.bits < self.min_bits[role]:
            raise ValueError(
                f"quantizer.{role}.bits={spec.bits}: {spec.name} of a {role} needs at least {self.min_bits[role]}"
            )
        if spec.bits > self.max_bits:
            raise ValueError(f"quantizer.{role}.bits={spec.bits}: {spec.name} has at most {self.max_bits}, use that")
        if spec.granularity == "channel" and not self.channelwise:
            raise ValueError(f"quantizer.{role}.granularity=channel: {spec.name} has one range per tensor, use tensor")
        if spec.granularity == "channel" and channel_axis is None:
            raise ValueError(f"quantizer.{role}.granularity=channel: only weights have channels here, use tensor")
        self.spec = spec
        self.role: Role = role
        self.channel_axis = channel_axis if spec.granularity == "channel" else None
        self.shape = tuple(shape)
        self.mode: Mode = "quantize"
        self.plain_ste = False
        self.kernels: Kernels | None = None
        self.rectified = False
        signed = spec.signed if spec.signed != "auto" else role == "weight"
        self.register_buffer("bits", torch.tensor(float(spec.bits)))
        self.register_buffer("signed", torch.tensor(bool(signed)))
        self.register_buffer("initialised", torch.tensor(False))
        self._observed: list[Tensor] = []

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a scale: ``()`` or, per channel, ones but for the channel axis, so that it broadcasts."""
        if self.channel_axis is None:
            return ()
        return tuple(size if axis == self.channel_axis else 1 for axis, size in enumerate(self.shape))

    @property
    def grid(self) -> Grid:
        """The grid of the codes."""
        if self.midrise:
            return Grid("midrise")
        signed = bool(self.signed)
        return Grid("uniform", signed, self.spec.narrow and signed)

    def limits(self) -> tuple[Tensor, Tensor]:
        """``(qmin, qmax)`` at the present width, float32 tensors without gradient."""
        if self.midrise:
            return Grid("midrise").limits(self.bits)
        return code_limits(self.bits, self.signed, self.spec.narrow)

    @property
    def scale(self) -> Tensor:
        """The step between neighbouring codes (positive, float32); differentiable. Codebook grids: the codebook."""
        raise NotImplementedError

    def scale_for(self, x: Tensor) -> Tensor:
        """``scale``, of a quantizer whose scale follows from the tensor itself that for ``x``."""
        return self.scale

    @property
    def zero_point(self) -> Tensor | None:
        """Code of the value zero, or None where it is 0 by construction."""
        return None

    @property
    def expected_bits(self) -> Tensor:
        """Bits as a differentiable tensor, for costs in a search; the hard bits unless a subclass learns them."""
        return self.bits

    def transform(self, x: Tensor) -> Tensor:
        """The differentiable map in front of rounding, clipping included, in units of codes.

        Where there is an integer zero point, it is added by ``codes_ste``, after rounding, as runtimes do.
        """
        raise NotImplementedError

    def codes_ste(self, transformed: Tensor) -> Tensor:
        """Rounded codes whose derivative is that of ``transformed``."""
        return round_ste(transformed)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of ``codes``; differentiable in the scale (and in real-valued ``codes``)."""
        raise NotImplementedError

    def initialise(self, x: Tensor) -> None:
        """Set the range from data ``x`` (weights: the tensor itself), in place, without gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x`` (int32, shape of ``x``)."""
        return torch.round(self.codes_ste(self.transform(self._work(x)))).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """De-quantized ``x`` (same shape and dtype); arithmetic in float32 or wider."""
        if self.mode == "identity":
            return x
        if self.mode == "observe":
            self.observe(x)
            return x
        if self.kernels is not None and (grid := self.fused_grid(x)) is not None:
            return fused_fake_quantize(x, self.raw_scale, grid, self.kernels)
        return self.fake_quantize(self._work(x), rounding=self.mode == "quantize").to(x.dtype)

    def fused_grid(self, x: Tensor) -> UniformGrid | None:
        """What the fast path needs for ``x`` in the present mode, or None: this quantizer has the reference only."""
        return None

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Transform, round (unless ``rounding`` is off: mode ``relax``) and de-quantize ``x``."""
        transformed = self.transform(x)
        return self.dequantize(self.codes_ste(transformed) if rounding else transformed)

    def observe(self, x: Tensor) -> None:
        """Keep an evenly strided sample of ``x`` (at most 2^18 elements) and its extremes for the initialisation.

        The stride has no factor in common with any axis: every column, row and channel is seen alike.
        """
        flat = x.detach().float().reshape(-1)
        stride = max(1, -(-flat.numel() // OBSERVED_ELEMENTS))
        while math.gcd(stride, flat.numel()) > 1:
            stride += 1
        self._observed.append(torch.cat([flat[::stride], flat.amin().view(1), flat.amax().view(1)]))

    def initialise_from_observed(self) -> None:
        """Initialise from everything that mode ``observe`` saw, then forget it."""
        if not self._observed:
            raise ValueError("calibration: an input quantizer saw no data; is its layer used in the forward pass?")
        x = torch.cat(self._observed)
        self._observed.clear()
        self.initialise(x)

    @torch.no_grad()
    def settle_sign(self, x: Tensor) -> None:
        """With ``signed: auto``, make an input's or output's codes signed exactly if its data has negative values."""
        if self.spec.signed == "auto" and self.role != "weight":
            self.signed.fill_(bool((x < 0).any()))

    @staticmethod
    def _work(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    def extra_repr(self) -> str:
        """Short form for ``print(net)``."""
        return f"bits={self.spec.bits}, role={self.role}, granularity={self.spec.granularity}, mode={self.mode}"
