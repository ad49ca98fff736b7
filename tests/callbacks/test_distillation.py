"""Distillation: the formula by hand, and a teacher that belongs to nobody's state."""

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.distillation import Distillation, soft_target_loss
from research.learning.module import QuantModule
from research.runs.checkpoint import load_checkpoint
from tests.learning.tiny import CLASSES, LAST, LSQ, StopAt, fit, float_weights, make_module, state, tiny_net

MODEL = tiny_net(dropout=0.25)


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore


def host(checkpoint: Path | None, **settings: Any) -> QuantModule:
    mechanics = {"distillation": {"_target_": "callbacks.distillation.Distillation", **settings}}
    return make_module(mechanics, quantizer=LSQ, model=MODEL, checkpoint=checkpoint)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return float_weights(tmp_path / "float.safetensors", MODEL)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_soft_target_loss_is_the_formula(temperature: float) -> None:
    student, teacher = logits()
    p = torch.exp(teacher / temperature) / torch.exp(teacher / temperature).sum(1, keepdim=True)
    q = torch.exp(student / temperature) / torch.exp(student / temperature).sum(1, keepdim=True)
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_target_loss(student, teacher, temperature), expected, rtol=1e-12, atol=0)


def test_the_square_of_the_temperature_keeps_the_gradient_at_its_size() -> None:
    student, teacher = logits()
    student.requires_grad_(True)
    temperature = 1e6
    gradient = torch.autograd.grad(soft_target_loss(student, teacher, temperature), student)[0]
    centred = [z - z.mean(1, keepdim=True) for z in (student.detach(), teacher)]
    torch.testing.assert_close(gradient, (centred[0] - centred[1]) / (7 * 5), rtol=1e-3, atol=1e-6)


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = (z.requires_grad_(True) for z in logits())
    soft_target_loss(student, teacher, 2.0).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_the_term_is_that_of_the_float_network(weights: Path) -> None:
    module = host(weights, weight=0.5, temperature=3.0)
    fit(module, max_epochs=1, limit_train_batches=1)
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4) % CLASSES)
    evaluation = module.objective(batch)
    teacher = module.initial_network().eval()
    expected = 0.5 * soft_target_loss(evaluation.outputs, teacher(batch[0]), 3.0)
    torch.testing.assert_close(evaluation.terms["distillation"], expected, rtol=0, atol=0)
    torch.testing.assert_close(evaluation.loss, evaluation.terms["task"] + expected, rtol=0, atol=0)


def test_weight_zero_is_plain_training_bit_for_bit(weights: Path) -> None:
    plain = make_module(quantizer=LSQ, model=MODEL, checkpoint=weights)
    fit(plain, max_epochs=2)
    off = host(weights, weight=0.0)
    fit(off, max_epochs=2)
    expected = state(plain)
    assert [name for name, value in state(off).items() if not torch.equal(value, expected[name])] == []


def test_the_teacher_is_in_no_state_optimizer_or_checkpoint(weights: Path, tmp_path: Path) -> None:
    module = host(weights)
    trainer = fit(module, max_epochs=1, folder=tmp_path)
    teacher = module.active[0].teacher
    assert not teacher.training
    theirs = {id(p) for p in teacher.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not theirs & {id(p) for p in module.parameters()}
    assert not theirs & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    plain = make_module(quantizer=LSQ, model=MODEL)
    saved = load_checkpoint(tmp_path / LAST)
    assert saved["state_dict"].keys() == plain.state_dict().keys()
    assert saved["callbacks"].get("distillation", {}) == {}


def test_the_teacher_is_built_again_on_a_resume(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        fit(host(weights), folder=tmp_path, callbacks=(StopAt(3),))
    module = host(weights)
    fit(module, folder=tmp_path, resume=tmp_path / LAST)
    expected = module.initial_network().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.active[0].teacher.state_dict().items())


def test_the_weight_of_the_task_claims_the_task_loss(weights: Path) -> None:
    assert Distillation().claims == frozenset()
    assert Distillation(task_weight=0.0).claims == {"task_loss"}
    module = host(weights, task_weight=0.25)
    fit(module, max_epochs=1, limit_train_batches=1)
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4) % CLASSES)
    module.eval()
    evaluation = module.objective(batch)
    torch.testing.assert_close(evaluation.terms["task"], 0.25 * module.evaluate(batch).loss, rtol=0, atol=0)


def test_a_run_without_float_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="init_from=null: a float teacher needs"):
        fit(host(None), max_epochs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": 0}, "temperature=0"), ({"weight": -1}, "weight=-1"), ({"task_weight": -1}, "task_weight=-1")],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)
