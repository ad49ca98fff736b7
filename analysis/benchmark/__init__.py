"""benchmark: what training and running a quantized network costs, as ratios measured in one interleaved run."""
