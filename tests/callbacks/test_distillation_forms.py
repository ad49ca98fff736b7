"""Distillation: the label-free form against golden vectors, matched features, and where a teacher may come from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from callbacks.distillation import Distillation, feature_loss, soft_cross_entropy, soft_target_loss
from research.deploy import save_artifact
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.runs.checkpoint import load_checkpoint
from research.runs.folder import RunFolder
from research.runs.records import write_config, write_summary
from tests.learning.tiny import CLASSES, LAST, LSQ, RESNET, fit, float_weights, make_module

BATCH = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(4) % CLASSES)


def host(checkpoint: Path | None, **settings: Any) -> QuantModule:
    mechanics = {"distillation": {"_target_": "callbacks.distillation.Distillation", **settings}}
    return make_module(mechanics, quantizer=LSQ, model=RESNET, checkpoint=checkpoint)


def begun(module: QuantModule) -> QuantModule:
    fit(module, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_weights(tmp_path_factory.mktemp("float") / "float.safetensors", RESNET)


@pytest.mark.parametrize("name", ["n2uq", "sdq"])
def test_golden(golden: Callable[[str], dict[str, np.ndarray]], name: str) -> None:
    case = {k.removeprefix("kd_"): torch.from_numpy(v) for k, v in golden(name).items() if k.startswith("kd_")}
    student = case["student"].requires_grad_()
    loss = soft_cross_entropy(student, case["teacher"], 1.0)
    torch.testing.assert_close(loss, case["loss"], rtol=1e-8, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], case["grad_student"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_both_losses_differ_by_the_teachers_entropy(temperature: float) -> None:  # n2uq check 9, sdq check 7
    student, teacher = (torch.randn(6, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    probabilities = (teacher / temperature).softmax(1)
    entropy = -(temperature**2) * (probabilities * probabilities.log()).sum(1).mean()
    torch.testing.assert_close(soft_cross_entropy(teacher, teacher, temperature), entropy)
    losses = [function(student, teacher, temperature) for function in (soft_cross_entropy, soft_target_loss)]
    torch.testing.assert_close(losses[0] - losses[1], entropy)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(*gradients)
    if temperature == 1.0:
        torch.testing.assert_close(gradients[0], (student.softmax(1) - probabilities) / 6)
    same = torch.autograd.grad(soft_cross_entropy(teacher, teacher.detach().clone(), temperature), teacher)[0]
    assert float(same.abs().max()) < 1e-12


def test_the_label_free_form_does_not_see_the_labels(weights: Path) -> None:
    module = begun(host(weights, task_weight=0.0, loss="cross_entropy")).eval()
    net = dict(module.net.named_parameters())
    gradients = []
    for labels in (BATCH[1], BATCH[1].flip(0)):
        evaluation = module.objective((BATCH[0], labels))
        assert float(evaluation.terms["task"]) == 0
        gradients.append(torch.autograd.grad(evaluation.loss, net["fc.weight"])[0])
    assert torch.equal(*gradients) and bool(gradients[0].any())
    expected = soft_cross_entropy(evaluation.outputs, module.initial_network().eval()(BATCH[0]), 1.0)
    torch.testing.assert_close(evaluation.loss, expected)


def test_the_feature_loss_is_a_mean_of_mean_squares() -> None:
    student = {"a": torch.randn(2, 3, requires_grad=True), "b": torch.randn(2, 4, 5), "other": torch.randn(1)}
    teacher = {"a": torch.randn(2, 3, requires_grad=True), "b": torch.randn(2, 4, 5)}
    expected = ((student["a"] - teacher["a"]).square().mean() + (student["b"] - teacher["b"]).square().mean()) / 2
    found = feature_loss(student, teacher)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert bool(student["a"].grad.any()) and teacher["a"].grad is None


def test_features_are_those_of_the_tapped_modules(weights: Path) -> None:
    module = begun(host(weights, weight=0.0, feature_weight=0.5, taps=["layer[12]", "relu"])).eval()
    features: list[dict[str, Tensor]] = []
    for net in (module.net, module.initial_network().eval()):
        kept: dict[str, Tensor] = {}
        for name in ("relu", "layer1", "layer2"):
            net.get_submodule(name).register_forward_hook(lambda m, i, y, name=name, kept=kept: kept.update({name: y}))
        net(BATCH[0])
        features.append(kept)
    evaluation = module.objective(BATCH)
    torch.testing.assert_close(evaluation.terms["features"], 0.5 * feature_loss(*features))
    assert float(evaluation.terms["features"]) > 0
    torch.testing.assert_close(evaluation.loss, evaluation.terms["task"] + evaluation.terms["features"])
    assert module.active[0].taps and Distillation(taps=["layer1"]).taps == (), "none are kept without a weight"


def test_a_teacher_from_weights_of_its_own_architecture(weights: Path) -> None:
    other = {**RESNET, "_target_": "research.models.resnet20"}
    path = float_weights(weights.parent / "teacher.safetensors", other, seed=3)
    settings = {"teacher": path.name, "teacher_model": "research.models.resnet20"}  # found beside init_from's
    module = begun(host(weights, **settings))
    expected = make_module(quantizer={}, model=other, checkpoint=path).initial_network().eval()(BATCH[0])
    assert torch.equal(module.active[0].teacher(BATCH[0]), expected)
    start = [make_module(quantizer=LSQ, model=RESNET).net, host(weights, **settings).net]
    assert torch.equal(*(net.conv1.weight for net in start)), "the teacher draws none of the student's numbers"


def test_a_resume_with_another_teacher_of_that_name_is_refused(weights: Path, tmp_path: Path) -> None:
    def named() -> QuantModule:
        return host(weights, teacher="teacher.safetensors")

    teacher = float_weights(weights.parent / "teacher.safetensors", RESNET, seed=3)
    was = teacher.read_bytes()
    fit(named(), max_epochs=1, folder=tmp_path)
    saved = load_checkpoint(tmp_path / LAST)["callbacks"]["distillation"]
    assert list(saved) == ["teacher"] and len(saved["teacher"]) == 64
    float_weights(teacher, RESNET, seed=4)
    message = "^callbacks.distillation.teacher=teacher.safetensors: the interrupted run had another teacher"
    with pytest.raises(ValueError, match=message):
        fit(named(), max_epochs=2, folder=tmp_path, resume=tmp_path / LAST)
    teacher.write_bytes(was)
    fit(named(), max_epochs=2, folder=tmp_path, resume=tmp_path / LAST)


def test_a_teacher_from_a_training_checkpoint(weights: Path, tmp_path: Path) -> None:
    run = make_module(quantizer=LSQ, model=RESNET, checkpoint=weights)
    fit(run, max_epochs=1, limit_val_batches=0, folder=tmp_path)
    module = begun(host(None, teacher=str(tmp_path / LAST)))
    assert torch.equal(module.active[0].teacher(BATCH[0]), run.plain_copy()(BATCH[0]))


@pytest.fixture
def finished(weights: Path, tmp_path: Path) -> tuple[RunFolder, torch.nn.Module]:
    """The parts of a finished run's folder that a teacher is read from, and its network."""
    run = begun(make_module(quantizer=LSQ, model=RESNET, checkpoint=weights))
    net = finalise(run)["final"]
    folder = RunFolder.of(tmp_path, "teacher", {"seed": 0})
    folder.path.mkdir(parents=True)
    write_config(folder.config_path, {"seed": 0})
    save_artifact(net, RESNET, folder.artifact)
    write_summary(folder, 0, [{"name": "final", "accuracy": 0.5}])
    return folder, net


def test_a_teacher_from_a_run_is_its_deployed_network(finished: tuple[RunFolder, torch.nn.Module]) -> None:
    folder, net = finished
    module = begun(host(None, teacher=str(folder.path)))
    assert torch.equal(module.active[0].teacher(BATCH[0]), net(BATCH[0]))


def test_what_is_no_teacher_is_refused(finished: tuple[RunFolder, torch.nn.Module], weights: Path) -> None:
    folder, _ = finished
    prefix = "^callbacks.distillation.teacher={}: "
    with pytest.raises(ValueError, match=prefix.format("absent") + "nothing at absent, "):
        begun(host(weights, teacher="absent"))
    folder.summary_path.unlink()
    with pytest.raises(ValueError, match=prefix.format(folder.path) + ".*not finished"):
        begun(host(weights, teacher=str(folder.path)))
    shutil.copy(weights, broken := folder.path / "broken.ckpt")
    with pytest.raises(ValueError, match=prefix.format(broken) + ".*(corrupt|truncated)"):
        begun(host(weights, teacher=str(broken)))
    save_file({"a": torch.zeros(1)}, other := folder.path / "other.safetensors")
    with pytest.raises(ValueError, match=prefix.format(other) + ".*it has no tensor"):
        begun(host(weights, teacher=str(other)))
    with pytest.raises(ValueError, match="callbacks.distillation.teacher_model._target_=os.system is refused"):
        begun(host(weights, teacher=str(weights), teacher_model="os.system"))


def test_teachers_that_do_not_fit_are_refused(weights: Path) -> None:
    module = host(weights, feature_weight=1.0, taps=["layer1"])
    mechanic = module.active[0]
    with pytest.raises(ValueError, match="callbacks.distillation.taps: the teacher: tap 'layer1' names no module"):
        mechanic.teacher = torch.nn.Flatten()
    mechanic.teacher = make_module(quantizer={}, model={**RESNET, "num_classes": 7}).net
    with pytest.raises(ValueError, match=r"outputs of the teacher have shape \(4, 7\), the student's \(4, 4\)"):
        module.objective(BATCH)
    mechanic.teacher = make_module(quantizer={}, model={**RESNET, "width": 6}).net
    with pytest.raises(ValueError, match=r"layer1 of the teacher have shape \(4, 6, 8, 8\)"):
        module.objective(BATCH)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"loss": "mse"}, "loss=mse"), ({"feature_weight": 1.0}, "feature_weight=1.0"), ({"feature_weight": -1}, "=-1")],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.distillation.*{message}"):
        Distillation(**settings)
