"""The processes that train one network together."""

import torch


def process_count() -> int:
    """How many share every batch of a data-parallel run; 1 where there is no process group."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1
