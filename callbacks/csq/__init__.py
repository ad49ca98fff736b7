"""CSQ: bits per layer from gates on the bit planes of the weights, sigmoids that harden while training goes on."""

from callbacks.csq.mechanic import CSQ

__all__ = ["CSQ"]
