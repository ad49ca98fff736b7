import io
import logging
import random

import numpy as np
import pytest
import torch

from research.runs.rng import rng_state, set_rng_state


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]


def test_all_generators_go_on_after_a_weights_only_checkpoint() -> None:
    draw()  # an odd number of normal draws: the cached second one belongs to the state
    buffer = io.BytesIO()
    torch.save(rng_state(), buffer)
    expected = [draw(), draw()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert draw() != expected[0]
    buffer.seek(0)
    set_rng_state(torch.load(buffer, weights_only=True))
    assert [draw(), draw()] == expected


def test_other_devices_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    state, here = rng_state(), len(rng_state()["cuda"])
    with caplog.at_level(logging.WARNING):
        set_rng_state(state)
        assert not caplog.messages
        set_rng_state({**state, "cuda": [torch.zeros(16, dtype=torch.uint8)] * (here + 1)})
    assert f"generators of {here + 1} CUDA devices were saved and there are {here} here" in caplog.text
