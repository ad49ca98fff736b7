"""Random generator states of python, numpy and torch as plain containers and tensors."""

import logging
import random
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """The states of all global generators (CUDA: one per visible device), loadable with `weights_only=True`."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    return {
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "position": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "cached_gaussian": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned.

    A state that was taken without CUDA, or on another number of devices, leaves the CUDA generators as they are, and a
    warning says so.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gaussian"]))
    torch.set_rng_state(state["torch"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) == devices:
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    else:
        log.warning(
            "random generators of %d CUDA devices were saved and there are %d here: the run goes on, not bit for bit",
            len(state["cuda"]),
            devices,
        )
