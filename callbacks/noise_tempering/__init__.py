"""Noise tempering: error-aware noise that decays, and error-aware gradient scaling, for LSQ quantizers."""

from callbacks.noise_tempering.mechanic import NoiseTempering
from callbacks.noise_tempering.quantizer import TemperedLSQ

__all__ = ["NoiseTempering", "TemperedLSQ"]
