"""Constrained learning for quantization: primal-dual training without a gradient through the quantizer."""

from callbacks.constrained.mechanic import Constrained
from callbacks.constrained.quantizer import MeanMagnitudeDoReFa

__all__ = ["Constrained", "MeanMagnitudeDoReFa"]
