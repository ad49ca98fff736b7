"""Settings that are right one by one and wrong together: one line that says what to change."""

from pathlib import Path

import pytest

from research.train import main as train
from tests.test_bad_input import TINY, command

COMBINATIONS: dict[str, tuple[list[str], list[str]]] = {
    "two owners of one thing": (
        ["callbacks=[sam]", "+callbacks.rival._target_=tests.test_bad_input.Rival"],
        ["callbacks.rival and callbacks.sam both claim evaluations: drop one of them, e.g. '~callbacks.sam'"],
    ),
    "a monitor that nobody logs": (
        ["checkpoint.monitor=val/acc"],
        ["checkpoint.monitor=val/acc is not logged in validation; use one of: val/accuracy, val/loss"],
    ),
    "a monitor without validation": (
        ["checkpoint.monitor=val/accuracy", "data.validation=0"],
        ["checkpoint.monitor=val/accuracy: data.validation=0", "use data.validation=1000"],
    ),
    "the best of no validation": (
        ["checkpoint.monitor=val/accuracy", "finalise.weights=best", "trainer.check_val_every_n_epoch=5"],
        ["finalise.weights=best: with trainer.check_val_every_n_epoch=5 nothing is validated in 3 epochs; use 1 to 3"],
    ),
    "an end before the first validation": (
        ["checkpoint.monitor=val/accuracy", "finalise.weights=best", "trainer.max_steps=3"],
        ["finalise.weights=best: trainer.max_steps=3 ends before the first validation, after", "finalise.weights=last"],
    ),
    "a run that never got to its validation": (
        [
            "checkpoint.monitor=val/accuracy",
            "finalise.weights=best",
            "trainer.max_steps=3",
            "+trainer.limit_train_batches=100",
        ],
        ["finalise.weights=best: the run ended before its first validation; train with finalise.weights=last"],
    ),
    "a network for other weights' teacher": (
        ["callbacks=[distillation]", "callbacks.distillation.teacher_model=research.models.resnet56"],
        ["callbacks.distillation.teacher_model=research.models.resnet56: of which weights? Give teacher="],
    ),
    "a wrong option of a mechanic's mechanic": (
        ["callbacks=[noise_tempering]", "+callbacks.noise_tempering.hessian.foo=1"],
        ["callbacks.noise_tempering.hessian.foo: HessianScale got an unexpected keyword argument"],
    ),
    "a width that is none": (
        ["callbacks=[bmpq]", "callbacks.bmpq.input_bits=0"],
        ["callbacks.bmpq.input_bits=0: use same, or one width"],
    ),
    "a convention that is none": (
        ["callbacks=[bmpq]", "+callbacks.bmpq.budget.convention.input_bits=eight"],
        ["callbacks.bmpq.budget.convention.input_bits=eight: use 1 to 32"],
    ),
    "a quantizer that ONNX has not": (
        ["quantizer=lq_nets", "deploy.onnx=true"],
        ["LQNets (mode quantize, grid codebook) has no form in ONNX's QuantizeLinear; use deploy.onnx=false"],
    ),
    "a teacher without weights": (["callbacks=[distillation]"], ["init_from=null: ", "init_from=FILE"]),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_a_wrong_combination(case: str, tmp_path: Path) -> None:
    overrides, parts = COMBINATIONS[case]
    line = command(train, *TINY, f"paths.runs={tmp_path}", *overrides).refusal()
    assert all(part in line for part in parts), line
