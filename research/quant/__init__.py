"""Numbers: what a tensor becomes. Tensors and modules only: no Lightning, no Hydra, no I/O."""
