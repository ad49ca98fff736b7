"""DropBits: bits of semi-relaxed quantizers are dropped at random, and layers learn how many they keep."""

from callbacks.drop_bits.mechanic import DropBits

__all__ = ["DropBits"]
