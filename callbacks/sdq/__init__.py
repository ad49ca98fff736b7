"""SDQ: bits per layer by stochastic differentiable quantization, a coin per layer between two neighbouring widths."""

from callbacks.sdq.dorefa import ConstantMaxDoReFa
from callbacks.sdq.mechanic import SDQ

__all__ = ["SDQ", "ConstantMaxDoReFa"]
