"""BSQ: bits per layer from a group lasso on the bit planes of the weights."""

from callbacks.bsq.mechanic import BSQ

__all__ = ["BSQ"]
