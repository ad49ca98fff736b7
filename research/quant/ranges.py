"""Range initialisation: from data to the scale (and zero point) of a uniform grid.

Pure functions. A *range* is a pair ``(low, high)`` of tensors; it has shape ``()`` for a whole tensor, or ones with
the channel axis kept, so that it broadcasts against the data. ``qmin`` and ``qmax`` are the limits of the codes.

The observers' conventions are those of MQBench (Li et al., NeurIPS 2021, arXiv 2111.03759; ModelTC/MQBench,
``mqbench/observer.py``), except `mse_scale`, which searches finer.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
METHODS = ("lsq", "minmax", "mse", "percentile", "three_sigma")
PERCENTILE = 0.99999
COARSE, FINE = 40, 20

Range = tuple[Tensor, Tensor]


def reduced_axes(x: Tensor, channel_axis: int | None) -> tuple[int, ...]:
    """The axes that share one scale: all of them, or all but ``channel_axis``."""
    return tuple(axis for axis in range(x.dim()) if channel_axis is None or axis != channel_axis % x.dim())


def _reduce(values: Tensor, reduction: str, channel_axis: int | None) -> Tensor:
    axes = reduced_axes(values, channel_axis)
    result: Tensor = getattr(torch, reduction)(values, dim=axes, keepdim=channel_axis is not None)
    return result


def minmax_range(x: Tensor, channel_axis: int | None = None) -> Range:
    """Least and greatest value."""
    return _reduce(x, "amin", channel_axis), _reduce(x, "amax", channel_axis)


def ema_minmax(previous: Range | None, current: Range, decay: float = 0.9) -> Range:
    """Running range: the first batch is copied, then ``decay * previous + (1 - decay) * current`` (EMAMinMax)."""
    if previous is None:
        return current
    low, high = (decay * old + (1 - decay) * new for old, new in zip(previous, current, strict=True))
    return low, high


def lsq_scale(x: Tensor, qmax: Tensor, channel_axis: int | None = None) -> Tensor:
    """``2 mean|x| / sqrt(qmax)`` (LSQ, section 2.1)."""
    return 2 * _reduce(x.abs(), "mean", channel_axis) / torch.sqrt(torch.clamp(qmax.to(x.dtype), min=1))


def clipstd_range(x: Tensor, channel_axis: int | None = None, width: float = 2.6, widen: bool = True) -> Range:
    """``mean -+ width * std`` (unbiased std; DSQ). ``widen``: never narrower than min-max, as MQBench's code has it."""
    mean, std = _reduce(x, "mean", channel_axis), _reduce(x, "std", channel_axis)
    low, high = mean - width * std, mean + width * std
    if not widen:
        return low, high
    least, greatest = minmax_range(x, channel_axis)
    return torch.minimum(low, least), torch.maximum(high, greatest)


def three_sigma_range(x: Tensor, channel_axis: int | None = None) -> Range:
    """``mean -+ 3 std`` with the population's std (LSQ+, Bhalgat et al. 2020, weight initialisation)."""
    mean = _reduce(x, "mean", channel_axis)
    spread = 3 * torch.sqrt(_reduce((x - mean).square(), "mean", channel_axis))
    return mean - spread, mean + spread


def percentile_range(x: Tensor, fraction: float = PERCENTILE, channel_axis: int | None = None) -> Range:
    """Min-max clipped to the ``fraction`` quantile of ``|x|`` (the least value not below that share of all)."""
    size = x.numel() if channel_axis is None else x.shape[channel_axis]
    rows = x.abs().reshape(1, -1) if channel_axis is None else x.abs().movedim(channel_axis, 0).reshape(size, -1)
    rank = min(rows.shape[1], max(1, -int(-fraction * rows.shape[1] // 1)))
    clip = rows.kthvalue(rank, dim=1).values
    low, high = minmax_range(x, channel_axis)
    clip = clip.reshape(high.shape)
    return torch.maximum(low, -clip), torch.minimum(high, clip)


def power_of_two(scale: Tensor) -> Tensor:
    """``2^round(log2 scale)``, half to even on the exponent."""
    return torch.exp2(torch.round(torch.log2(scale)))


def affine_from_range(
    low: Tensor, high: Tensor, qmin: Tensor, qmax: Tensor, symmetric: bool, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """``(scale, zero_point)`` of a range, first extended to contain 0 (MQBench).

    Symmetric: ``scale = max(-low, high) / ((qmax - qmin) / 2)`` for signed codes (127.5 at 8 bits, 127 if narrow),
    ``high / qmax`` for unsigned ones; zero point 0. Otherwise ``scale = (high - low) / (qmax - qmin)`` and
    ``zero_point = qmin - round(low / scale)``, clipped to the codes. ``scale >= eps``.
    """
    low, high = torch.clamp(low, max=0), torch.clamp(high, min=0)
    steps = torch.clamp(qmax - qmin, min=1)
    if symmetric:
        scale = torch.where(qmin < 0, torch.maximum(-low, high) / (steps / 2), high / steps)
        return torch.clamp(scale, min=eps), torch.zeros_like(scale)
    scale = torch.clamp((high - low) / steps, min=eps)
    return scale, torch.clamp(qmin - torch.round(low / scale), qmin, qmax)


def quantization_error(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor, channel_axis: int | None = None
) -> Tensor:
    """Mean of ``(x_hat - x)^2`` on the grid, per tensor or channel."""
    codes = (x / scale).round_().clamp_(qmin - zero_point, qmax - zero_point)
    return _reduce(codes.mul_(scale).sub_(x).square_(), "mean", channel_axis)


def mse_range(x: Tensor, qmin: Tensor, qmax: Tensor, symmetric: bool, channel_axis: int | None = None) -> Range:
    """Min-max range times the factor ``1 - 0.01 i`` of least `quantization_error` (MQBench's MSEObserver).

    ``i = 0..94`` per tensor, ``0..79`` per channel; the first of equals.
    """
    low, high = minmax_range(x, channel_axis)
    best = torch.full_like(high, torch.inf)
    factor = torch.ones_like(high)
    for i in range(95 if channel_axis is None else 80):
        shrink = 1.0 - 0.01 * i
        scale, zero_point = affine_from_range(low * shrink, high * shrink, qmin, qmax, symmetric)
        error = quantization_error(x, scale, zero_point, qmin, qmax, channel_axis)
        factor = torch.where(error < best, shrink, factor)
        best = torch.minimum(error, best)
    return low * factor, high * factor


def mse_scale(x: Tensor, qmin: Tensor, qmax: Tensor, channel_axis: int | None = None) -> Tensor:
    """Scale of least ``||x_hat - x||^2`` on a grid without zero point.

    Searches geometrically from the scale that clips nothing down to a hundredth of it, then linearly between the
    neighbours of the best: 60 candidates.
    """
    shorter = torch.where(qmin < 0, torch.minimum(qmax, -qmin), qmax)
    widest = _reduce(x.abs(), "amax", channel_axis) / torch.clamp(shorter, min=1)
    ratio = 0.01 ** (1 / (COARSE - 1))
    zero = torch.zeros_like(widest)
    best, scale = torch.full_like(widest, torch.inf), widest

    def consider(candidate: Tensor) -> None:
        nonlocal best, scale
        candidate = torch.clamp(candidate, min=EPS)
        error = quantization_error(x, candidate, zero, qmin, qmax, channel_axis)
        scale = torch.where(error < best, candidate, scale)
        best = torch.minimum(error, best)

    for i in range(COARSE):
        consider(widest * ratio**i)
    centre = scale
    for i in range(FINE):
        consider(centre * (ratio + (1 / ratio - ratio) * (i + 0.5) / FINE))
    return scale


def refine_offset(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: Tensor,
    qmax: Tensor,
    channel_axis: int | None = None,
    steps: int = 20,
) -> tuple[Tensor, Tensor]:
    """``(scale, offset)`` of lower ``||scale * codes + offset - x||^2`` than those given, by alternating least squares.

    Each step takes the codes for the present pair, then the pair of the linear regression of ``x`` on the codes; the
    error never grows. This solves LSQ+'s initialisation of activations.
    """
    for _ in range(steps):
        codes = torch.clamp(torch.round((x - offset) / scale), qmin, qmax)
        mean_codes, mean_x = _reduce(codes, "mean", channel_axis), _reduce(x, "mean", channel_axis)
        spread = _reduce((codes - mean_codes).square(), "mean", channel_axis)
        slope = _reduce((codes - mean_codes) * (x - mean_x), "mean", channel_axis) / spread
        usable = slope > EPS  # false (or NaN) where all data have one code
        scale = torch.where(usable, slope, scale)
        offset = torch.where(usable, mean_x - slope * mean_codes, offset)
    return scale, offset


def _range(x: Tensor, method: str, channel_axis: int | None) -> Range:
    if method == "minmax":
        return minmax_range(x, channel_axis)
    if method == "percentile":
        return percentile_range(x, channel_axis=channel_axis)
    if method == "three_sigma":
        return three_sigma_range(x, channel_axis)
    raise ValueError(f"quantizer.*.init={method!r}: use one of {', '.join(METHODS)}")


def _work(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def initial_scale(x: Tensor, method: str, qmin: Tensor, qmax: Tensor, channel_axis: int | None = None) -> Tensor:
    """Scale of a grid without zero point for the data ``x``; positive and finite (1 where the data are all zero).

    Args:
        x: the data, any shape.
        method: ``lsq``, ``minmax``, ``mse``, ``percentile``, or ``three_sigma`` (the range's longer side is the most
            negative code, as LSQ+ has it for weights).
        qmin, qmax: limits of the codes; ``qmin == 0`` means unsigned.
        channel_axis: axis with one scale per index, None for one scale.

    Raises:
        ValueError: unknown method.
    """
    x = _work(x)
    if method == "lsq":
        scale = lsq_scale(x, qmax, channel_axis)
    elif method == "mse":
        scale = mse_scale(x, qmin, qmax, channel_axis)
    else:
        low, high = _range(x, method, channel_axis)
        if method == "three_sigma":
            scale = torch.maximum(low.abs(), high.abs()) / torch.clamp(torch.where(qmin < 0, -qmin, qmax), min=1)
        else:
            scale, _ = affine_from_range(low, high, qmin, qmax, symmetric=True)
    return torch.where(scale > EPS, scale, 1.0)


def initial_affine(
    x: Tensor, method: str, qmin: Tensor, qmax: Tensor, channel_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """``(scale, zero_point)`` of an asymmetric grid for the data ``x``; arguments and errors as `initial_scale`."""
    x = _work(x)
    if method == "lsq":
        scale = torch.clamp(lsq_scale(x, qmax, channel_axis), min=EPS)
        low = torch.clamp(minmax_range(x, channel_axis)[0], max=0)
        zero_point = torch.clamp(qmin - torch.round(low / scale), qmin, qmax)
    else:
        low, high = (
            mse_range(x, qmin, qmax, False, channel_axis) if method == "mse" else _range(x, method, channel_axis)
        )
        scale, zero_point = affine_from_range(low, high, qmin, qmax, symmetric=False)
    return torch.where(scale > EPS, scale, 1.0), zero_point
