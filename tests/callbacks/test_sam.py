"""SAM and ASAM against their formulas, written out by hand in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.sam import SAM, asam_perturbation, sam_perturbation
from research.learning.module import QuantModule
from research.learning.tasks import Classification
from research.quant.calibrate import calibrate
from tests.learning.tiny import CLASSES, LSQ, fit, make_module, state, tiny_net

LR, RHO, ETA = 0.1, 0.3, 0.05


class Float64(Classification):
    """Classification that keeps float64 logits."""

    def evaluate(self, net: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = net(batch[0])
        return logits, self.criterion(logits, batch[1])


def host(**settings: Any) -> QuantModule:
    module = make_module(
        {"sam": {"_target_": "callbacks.sam.SAM", **settings}},
        quantizer={},
        model=tiny_net(batchnorm=False),
        task={"_target_": "tests.callbacks.test_sam.Float64", "num_classes": CLASSES},
    )
    return module.double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(6) % CLASSES


def gradients(net: nn.Module) -> dict[str, Tensor]:
    images, labels = batch()
    names, parameters = zip(*net.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(net(images), labels)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def update_by_hand(net: nn.Module, adaptive: bool) -> None:
    """One step of SGD at the perturbed point, in place."""
    first = gradients(net)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    operator = {n: w.abs() + ETA if adaptive and w.ndim > 1 else torch.ones_like(w) for n, w in weights.items()}
    norm = torch.cat([(operator[name] * g).flatten() for name, g in first.items()]).norm()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter += RHO * operator[name] ** 2 * first[name] / norm
    second = gradients(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weights[name] - LR * second[name])


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_a_step_is_the_formula(adaptive: bool) -> None:
    module, reference = (host(rho=RHO, adaptive=adaptive, eta=ETA) for _ in range(2))
    optimizer = torch.optim.SGD(module.net.parameters(), lr=LR)
    evaluation = module.objective(batch())
    plain = nn.functional.cross_entropy(reference.net(batch()[0]), batch()[1])
    torch.testing.assert_close(evaluation.terms["task"], plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(evaluation.outputs, reference.net(batch()[0]), rtol=1e-12, atol=0)
    assert evaluation.loss.item() > plain.item(), "the loss is that of the perturbed point"
    evaluation.loss.backward()
    optimizer.step()
    update_by_hand(reference.net, adaptive)
    for (name, found), expected in zip(module.net.named_parameters(), reference.net.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=name)


def test_the_perturbation_has_the_length_of_the_radius() -> None:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    moved = sam_perturbation(found, 0.25)
    assert float(torch.cat([m.flatten() for m in moved.values()]).norm()) == pytest.approx(0.25, rel=1e-6)
    parameters = {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}
    adaptive = asam_perturbation(found, parameters, 0.25, 0.1)
    relative = [(adaptive["a"] / (parameters["a"].abs() + 0.1)).flatten(), adaptive["b"]]
    assert float(torch.cat(relative).norm()) == pytest.approx(0.25, rel=1e-6)


def test_a_scale_per_channel_is_no_weight_and_moves_as_one_scale_does() -> None:
    shapes = {"one": (), "each": (3, 1, 1, 1), "weight": (3, 2)}
    parameters = {name: torch.full(shape, 0.2) for name, shape in shapes.items()}
    moves = asam_perturbation({n: torch.ones(s) for n, s in shapes.items()}, parameters, 0.25, 0.1, plain={"each"})
    assert torch.equal(moves["each"], moves["one"].expand(3, 1, 1, 1))
    assert not torch.allclose(moves["weight"], moves["one"])


def test_the_scales_of_quantizers_are_moved_by_their_gradient_alone() -> None:
    recipe = {"weight": {**LSQ["weight"], "granularity": "channel"}, "input": LSQ["input"]}
    module = make_module({"sam": {"_target_": "callbacks.sam.SAM", "adaptive": True}}, quantizer=recipe)
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate(module.net, [images])
    parameters = dict(module.net.named_parameters())
    loss = module.evaluate((images, torch.arange(8) % CLASSES)).loss
    slopes = dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), retain_graph=True), strict=True))
    (sam,) = module.active
    assert isinstance(sam, SAM)
    moves = sam.perturbation(module, loss)
    scale = "conv1.weight_quantizer.raw_scale"
    assert moves[scale].shape == (4, 1, 1, 1)
    factor = moves["fc.bias"].norm() / slopes["fc.bias"].norm()
    for name in (scale, "fc.input_quantizer.raw_scale"):
        torch.testing.assert_close(moves[name], factor * slopes[name], msg=name)


def test_no_gradient_no_perturbation() -> None:
    assert float(sam_perturbation({"a": torch.zeros(3)}, 0.1)["a"].abs().sum()) == 0.0


@pytest.mark.parametrize("adaptive", [False, True])
def test_radius_zero_is_plain_training_bit_for_bit(adaptive: bool) -> None:
    plain = make_module(quantizer=LSQ, model=tiny_net(dropout=0.25))
    fit(plain, max_epochs=2)
    sam = {"sam": {"_target_": "callbacks.sam.SAM", "rho": 0.0, "adaptive": adaptive}}
    flat = make_module(sam, quantizer=LSQ, model=tiny_net(dropout=0.25))
    fit(flat, max_epochs=2)
    expected = state(plain.net)
    assert [name for name, value in state(flat.net).items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize(("statistics", "updates"), [("counted", 1), ("all", 2)])
def test_statistics_count_one_pass_or_all(statistics: str, updates: int) -> None:
    settings: dict[str, Any] = {"quantizer": {}, "model": tiny_net()}
    module = make_module({"sam": {"_target_": "callbacks.sam.SAM", "rho": 5.0, "statistics": statistics}}, **settings)
    images = (torch.randn(8, 3, 8, 8), torch.arange(8) % CLASSES)
    module.objective(images)
    assert int(module.net.bn1.num_batches_tracked) == updates
    plain = make_module(**settings)
    plain.objective(images)
    same = torch.equal(module.net.bn1.running_mean, plain.net.bn1.running_mean)
    assert same == (statistics == "counted")


def test_both_passes_see_one_noise_and_the_next_step_another() -> None:
    sam = {"sam": {"_target_": "callbacks.sam.SAM"}}
    module = make_module(sam, quantizer={}, model=tiny_net(batchnorm=False, dropout=0.5))
    masks: list[Tensor] = []
    module.net.dropout.register_forward_hook(lambda layer, inputs, output: masks.append(output == 0))
    images = (torch.rand(8, 3, 8, 8), torch.arange(8) % CLASSES)
    for _ in range(2):
        module.objective(images)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_a_given_state_is_what_is_perturbed() -> None:
    module, reference = host(rho=RHO), host(rho=RHO)
    shift = {name: torch.full_like(p, 0.05) for name, p in module.net.named_parameters()}
    shifted = {name: p + shift[name] for name, p in module.net.named_parameters()}
    with torch.no_grad():
        for name, parameter in reference.net.named_parameters():
            parameter += shift[name]
    torch.testing.assert_close(module.objective(batch(), shifted).loss, reference.objective(batch()).loss)


@pytest.mark.parametrize(("settings", "message"), [({"rho": -1}, "sam.rho=-1"), ({"statistics": "x"}, "statistics=x")])
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAM(**settings)


def test_the_promise_under_ddp_depends_on_the_shared_perturbation() -> None:
    assert (SAM().ddp, SAM(sync_perturbation=True).ddp) == ("per_replica", "exact")
