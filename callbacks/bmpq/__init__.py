"""BMPQ: bits per layer from the gradients of the weights' bits, by an integer programme while training goes on."""

from callbacks.bmpq.max_scale import MaxScale
from callbacks.bmpq.mechanic import BMPQ

__all__ = ["BMPQ", "MaxScale"]
