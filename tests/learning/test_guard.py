"""A loss that is no number stops the run before it reaches weights or checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from research.learning.guard import NonFiniteGuard
from research.learning.mechanic import Mechanic
from research.learning.module import QuantModule
from research.runs.checkpoint import load_checkpoint
from tests.learning.tiny import LAST, StopAt, differences, fit, make_module, state


class Poison(Mechanic):
    """Makes the loss of one step infinite or NaN."""

    slug = "poison"

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def loss_terms(self, evaluation: Any) -> dict[str, torch.Tensor]:
        return {"poison": torch.tensor(self.value if self.module.progress.step == self.step else 0.0)}


def poisoned(step: int, value: float) -> QuantModule:
    return make_module({"poison": {"_target_": "tests.learning.test_guard.Poison", "step": step, "value": value}})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_step_is_named_and_the_last_good_state_kept(tmp_path: Path, value: float) -> None:
    module = poisoned(3, value)
    with pytest.raises(ValueError, match="not finite at step 3; the last good state is kept in .*/last.ckpt"):
        fit(module, folder=tmp_path)
    assert all(bool(torch.isfinite(value).all()) for value in state(module.net).values())
    saved = load_checkpoint(tmp_path / LAST)
    assert saved["global_step"] == 2
    healthy = make_module({"poison": {"_target_": "tests.learning.test_guard.Poison", "step": -1, "value": 0.0}})
    with pytest.raises(RuntimeError, match="stopped"):
        fit(healthy, folder=tmp_path / "healthy", callbacks=(StopAt(3),))
    expected = load_checkpoint(tmp_path / "healthy" / LAST)
    for part in ("state_dict", "optimizer_states"):
        assert differences(saved[part], expected[part]) == []


def test_a_healthy_run_passes() -> None:
    assert fit(poisoned(99, float("nan")), max_epochs=1).global_step == 4


def test_a_run_without_checkpoint_does_not_claim_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite at step 0; no checkpoint had been due before"):
        fit(poisoned(0, float("nan")), folder=tmp_path)


def test_what_an_accelerator_remembered_stops_the_next_checkpoint(tmp_path: Path) -> None:
    module = make_module()
    trainer = fit(module, max_epochs=1, folder=tmp_path)
    guard = NonFiniteGuard()
    guard.on_save_checkpoint(trainer, module, {})
    guard._first_bad = torch.tensor(17)
    with pytest.raises(ValueError, match="not finite at step 17"):
        guard.on_save_checkpoint(trainer, module, {})


def test_weights_that_a_step_made_infinite_are_not_saved(tmp_path: Path) -> None:
    module = make_module()
    trainer = fit(module, max_epochs=1, folder=tmp_path)
    with torch.no_grad():
        module.net.fc.bias[0] = torch.inf
    with pytest.raises(ValueError, match="net.fc.bias is not finite at step 3; the last good state is kept"):
        trainer.save_checkpoint(tmp_path / LAST)
