"""Training: the host of a quantized network, its tasks, mechanics, their composition and the optimizers."""
