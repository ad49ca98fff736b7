"""How a step's gradient depends on the value (LSQ, figure 2): ``python -m analysis.figures.lsq_step_gradient``.

For the step ``s = 1`` of an unsigned 2-bit quantizer: LSQ's gradient jumps at every rounding threshold; the clip's of
PACT (here of ``s = alpha / 3``) is zero below the clip; one that only rescales the data before rounding, as QIL's
does, ramps towards the clip whatever the thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, panels, plain, styles
from research.quant.clipping import clip_codes
from research.quant.quantizers import Quantizer, QuantizerSpec
from research.quant.quantizers.lsq import LSQ
from research.quant.quantizers.pact import PACT
from research.quant.ste import round_ste

BITS, QMAX = 2, 3
CURVES = ("LSQ", "PACT", "scaling only (QIL-like)")


def gradients(v: Tensor) -> dict[str, Tensor]:
    """``d v_hat / d s`` of every value by name of the curve, at s = 1.

    Args:
        v: values (N,).
    """
    spec = QuantizerSpec("lsq", BITS, signed=False)
    found = {}
    lsq = LSQ(spec, (), None, "input", gradient_factor=False).double()
    pact = PACT(spec, (), None, "input", alpha=float(QMAX)).double()
    found["LSQ"] = _derivative(lsq, "raw_scale", v)
    found["PACT"] = QMAX * _derivative(pact, "alpha", v)
    step = torch.ones_like(v, requires_grad=True)
    rescaled = round_ste(clip_codes(v / step, torch.tensor(0.0), torch.tensor(float(QMAX))))
    found["scaling only (QIL-like)"] = torch.autograd.grad(rescaled.sum(), step)[0]
    return found


def _derivative(quantizer: Quantizer, name: str, v: Tensor) -> Tensor:
    """Derivative of every quantized value to one parameter, 0-dim."""
    value = quantizer.get_parameter(name).detach()
    tangents: Tensor = torch.func.jvp(
        lambda changed: torch.func.functional_call(quantizer, {name: changed}, v), (value,), (torch.ones_like(value),)
    )[1]
    return tangents


def draw(rows: Sequence[Row]) -> Drawn:
    """Output and gradient against the value; the runs play no part."""
    v = torch.linspace(-1, 5, 241, dtype=torch.float64)
    found = gradients(v)
    figure, (left, right) = panels(1, 2)
    left.plot(v, torch.clamp(torch.round(v), 0, QMAX), "k", label="all three")
    left.plot(v, v.clamp(0, QMAX), color="0.6", ls="--", label="before rounding")
    left.set_xlabel("value v / s")
    left.set_ylabel("quantized value / s")
    left.legend()
    look = styles(CURVES)
    for name, curve in found.items():
        right.plot(v, curve, label=name, **plain(look[name]))
    right.set_xlabel("value v / s")
    right.set_ylabel("d(quantized value) / ds")
    right.set_ylim(-3.4, 5)
    right.legend(loc="upper left")
    return Drawn(figure, ("value", *CURVES), list(zip(v.tolist(), *(found[n].tolist() for n in CURVES), strict=True)))


if __name__ == "__main__":
    figure_script(draw, __file__)
