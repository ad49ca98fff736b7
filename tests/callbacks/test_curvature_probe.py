"""The probe of curvature: its numbers are those of the dense Hessian, and what is doubtful is marked."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.curvature_probe import QUANTITIES, CurvatureProbe
from research.curvature.batches import FixedBatches
from research.curvature.sharpness import saq_sharpness
from research.learning.module import QuantModule
from research.models.structure import FloatModel
from research.quant.layers import quant_layers
from research.quant.passes import weight_leaves
from tests.learning.tiny import fit, float_weights, make_data, make_module, tiny_net

IMAGES = 8
SMALL = {"every_n_epochs": 1, "images": IMAGES, "batch_size": 6, "max_iterations": 40, "tolerance": 1e-4, "probes": 6}
HESSIAN = "curvature/quantized"


def config(**options: Any) -> dict[str, Any]:
    return {"curvature_probe": {"_target_": "callbacks.curvature_probe.CurvatureProbe", **SMALL, **options}}


def probe(module: QuantModule) -> CurvatureProbe:
    (mechanic,) = module.active
    assert isinstance(mechanic, CurvatureProbe)
    return mechanic


def trained(**options: Any) -> QuantModule:
    module = make_module(config(**options))
    fit(module, max_epochs=1)
    return module


def dense_hessian(module: QuantModule, batches: FixedBatches) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the mean loss over all images by the quantized weights, in float64."""
    net = module.plain_copy().double()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with weight_leaves(net) as zeros:
        shapes = {name: zero.shape for name, zero in zeros.items()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        moves = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        with weight_leaves(net, moves):
            return nn.functional.cross_entropy(net(inputs.double()), targets)

    origin = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(origin), origin)
    return gradient, torch.autograd.functional.hessian(loss, origin)


def test_the_logged_numbers_are_those_of_the_dense_hessian() -> None:
    module = make_module(config(quantities=QUANTITIES, k=2, probes=60))
    metrics = fit(module, max_epochs=1).callback_metrics
    logged = {name: float(value) for name, value in metrics.items() if name.startswith("curvature/")}
    assert logged.pop("curvature/seconds") > 0
    gradient, matrix = dense_hessian(module, probe(module).batches)
    first, second = sorted(torch.linalg.eigvalsh(matrix).tolist(), key=abs, reverse=True)[:2]
    assert logged.pop(f"{HESSIAN}/top_eigenvalue") == pytest.approx(first, rel=1e-4)
    assert logged.pop(f"{HESSIAN}/eigenvalue_2") == pytest.approx(second, rel=1e-4)
    assert logged.pop(f"{HESSIAN}/top_eigenvalue_residual") < 1e-4
    assert logged.pop(f"{HESSIAN}/eigenvalue_2_residual") < 1e-4
    error = logged.pop(f"{HESSIAN}/trace_standard_error")
    assert abs(logged.pop(f"{HESSIAN}/trace") - float(matrix.trace())) < 3 * error + 1e-3 * abs(float(matrix.trace()))
    assert logged.pop(f"{HESSIAN}/gradient_norm") == pytest.approx(float(gradient.norm()), rel=1e-4)
    length = float((matrix @ gradient).norm() / gradient.norm())
    assert logged.pop(f"{HESSIAN}/hessian_norm") == pytest.approx(length, rel=1e-4)
    net, loss = module.plain_copy(), lambda network, batch: module.task.evaluate(network, batch)[1]
    rise = saq_sharpness(net, loss, probe(module).batches, probe(module).rho).rise
    assert logged.pop("curvature/perturbation/saq_sharpness") == pytest.approx(rise)
    assert logged == {}


def test_an_eigenvalue_that_has_not_converged_is_not_logged_under_its_name() -> None:
    module = trained(quantities=["top_eigenvalue"], max_iterations=2)
    found = probe(module).look(module)
    assert found.keys() == {f"{HESSIAN}/top_eigenvalue_unconverged", f"{HESSIAN}/top_eigenvalue_residual"}
    assert found[f"{HESSIAN}/top_eigenvalue_residual"] > 1e-4


def test_the_surface_is_in_the_name_and_clipped_weights_tell_the_two_apart() -> None:
    found = {}
    for surface in ("quantized", "latent"):
        module = trained(quantities=["gradient_norm"], surface=surface)
        for _, layer in quant_layers(module.net):
            layer.weight_quantizer.raw_scale.data /= 8  # type: ignore[union-attr]
        found |= probe(module).look(module)
    assert found.keys() == {"curvature/quantized/gradient_norm", "curvature/latent/gradient_norm"}
    assert found["curvature/latent/gradient_norm"] < 0.9 * found["curvature/quantized/gradient_norm"]


@pytest.mark.parametrize("quantities", [["top_eigenvalue"], ["trace"], ["hessian_norm"], ["saq_sharpness"]])
def test_a_look_leaves_no_trace_and_repeats_exactly(quantities: list[str]) -> None:
    module = trained(quantities=quantities)
    module.train()
    module.objective(make_data().calibration_batches(1, 8)[0]).loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    generator = torch.get_rng_state()
    first, again = probe(module).look(module), probe(module).look(module)
    assert first == again
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in module.named_parameters() if p.grad is not None)
    assert all(part.training for part in module.net.modules())


def test_a_compiled_network_is_measured_as_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FloatModel, "compile", lambda net, **options: nn.Module.compile(net, backend="eager"))
    data = make_data()
    data.setup()
    found = []
    for compiled in ("none", "network"):
        module = make_module(config(quantities=["hessian_norm"]), compile=compiled)
        assert (module.net._compiled_call_impl is not None) == (compiled == "network")
        probe(module).batches = FixedBatches.of(data, IMAGES, 6)
        found.append(probe(module).look(module))
    assert found[0] == found[1]


def test_the_cost_is_stated_before_training_and_paid_every_n_epochs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="callbacks.curvature_probe")
    module = make_module(config(every_n_epochs=2, quantities=["trace", "hessian_norm"]))
    looks: list[int] = []
    mechanic = probe(module)
    mechanic.look = lambda host: looks.append(host.progress.step) or {}  # type: ignore[method-assign, func-returns-value]
    metrics = fit(module, max_epochs=5).callback_metrics
    assert looks == [8, 16]
    assert "curvature/seconds" in metrics
    # 7 products of 3.1 gradients on 8 images, an epoch of 4 steps of 8
    assert f"looks every 2 epochs, with up to 7 Hessian-vector products on {IMAGES} images" in caplog.text
    assert f"each time about as long as {7 * 3.1 * 8 / 32:.2g} epochs of plain training" in caplog.text


def test_a_network_without_a_finite_loss_is_warned_of_and_trains_on(caplog: pytest.LogCaptureFixture) -> None:
    module = trained()
    mechanic = probe(module)

    def broken(host: QuantModule) -> dict[str, float]:
        with torch.no_grad():
            host.net.fc.bias.fill_(float("inf"))
        return CurvatureProbe.look(mechanic, host)

    mechanic.look = broken  # type: ignore[method-assign]
    metrics = fit(module, max_epochs=1, limit_val_batches=0).callback_metrics
    assert [name for name in metrics if name.startswith("curvature/")] == ["curvature/seconds"]
    assert "callbacks.curvature_probe: nothing measured after epoch 1: curvature: the loss is" in caplog.text


def test_a_float_network_has_everything_but_saqs_sharpness(tmp_path: Any) -> None:
    module = make_module(config(), quantizer={}, checkpoint=float_weights(tmp_path / "float.safetensors", tiny_net()))
    assert f"{HESSIAN}/trace" in fit(module, max_epochs=1).callback_metrics
    with pytest.raises(ValueError, match=r"^callbacks.curvature_probe.quantities: .*leave out saq_sharpness$"):
        make_module(config(quantities=["saq_sharpness"]), quantizer={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0: use 1 or more"),
        ({"quantities": ["tracee"]}, r"quantities=\['tracee'\]: use some of top_eigenvalue, trace"),
        ({"quantities": []}, r"quantities=\[\]: use some of"),
        ({"surface": "perturbation"}, "surface=perturbation: use one of quantized, latent"),
        ({"k": 0}, "k=0: use 1 or more"),
        ({"k": 5, "max_iterations": 4}, "max_iterations=4: use 5 or more"),
        ({"probes": 5}, "probes=5: use 6 or more"),
        ({"tolerance": 0.0}, "tolerance=0.0: use more than 0"),
        ({"rho": -1.0}, "rho=-1.0: use more than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^callbacks\.curvature_probe\.{message}"):
        CurvatureProbe(**options)


def test_more_images_than_there_are_is_refused_before_training() -> None:
    module = make_module(config(images=999))
    with pytest.raises(ValueError, match=r"^callbacks\.curvature_probe\.images=999 .*has 32 images; use 1\.\.32"):
        fit(module, max_epochs=1)
    assert module.progress.step == 0
