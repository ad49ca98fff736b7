from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.curvature.quantized_tensors import block_traces, error_gradient_scales
from research.learning.hessian_scale import HessianScale
from research.learning.module import QuantModule
from research.quant.calibrate import calibrate
from research.quant.layers import quantizers
from research.quant.quantizers import QuantizerSpec, build_quantizer
from tests.learning.tiny import CLASSES, RESNET, fit, make_module, state, tiny_net
from tests.learning.tiny import LSQ as LSQ_RECIPE

EWGS: dict[str, Any] = {"weight": {"name": "ewgs", "bits": 4}, "input": {"name": "ewgs", "bits": 4}}
QUICK = {"_target_": "callbacks.ewgs.EWGSDelta", "every_n_epochs": 1, "batches": 1, "batch_size": 8, "probes": 4}


def deltas(net: nn.Module) -> dict[str, float]:
    return {name: float(quantizer.delta) for name, quantizer in quantizers(net)}  # type: ignore[arg-type]


def before_the_second_epoch(**settings: Any) -> tuple[Any, QuantModule]:
    """A trainer that stands in front of its second epoch, where the mechanic measures."""
    module = make_module({"ewgs": QUICK}, quantizer=EWGS, **settings)
    trainer = fit(module, max_epochs=1)
    trainer.fit_loop.epoch_progress.current.completed = trainer.fit_loop.epoch_progress.current.processed = 1
    return trainer, module


def test_delta_starts_at_zero_and_is_measured_every_n_epochs() -> None:
    first = make_module({"ewgs": QUICK}, quantizer=EWGS)
    fit(first, max_epochs=1)
    assert set(deltas(first.net).values()) == {0.0}
    second = make_module({"ewgs": QUICK}, quantizer=EWGS)
    trainer = fit(second, max_epochs=2)
    found = deltas(second.net)
    assert max(found.values()) > 0 and min(found.values()) >= 0
    assert float(trainer.callback_metrics["ewgs/delta"]) == pytest.approx(sum(found.values()) / len(found))
    sparse = make_module({"ewgs": {**QUICK, "every_n_epochs": 2}}, quantizer=EWGS)
    fit(sparse, max_epochs=2)
    assert set(deltas(sparse.net).values()) == {0.0}


def test_the_measurement_does_not_disturb_training() -> None:
    """Until the new deltas act: everything but them is equal, batch-norm statistics and the generator included."""
    trainer, module = before_the_second_epoch(model=RESNET)
    before, generator = state(module), torch.get_rng_state()
    module.active[0].on_train_epoch_start(trainer, module)
    after = state(module)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith("delta") for name in changed)
    assert torch.equal(torch.get_rng_state(), generator)


def test_dropout_in_the_measurement_is_the_same_on_every_rank_and_leaves_the_generator_alone() -> None:
    trainer, module = before_the_second_epoch(model=tiny_net(dropout=0.25))
    (mechanic,) = module.active
    measured = []
    for rank in range(2):
        torch.manual_seed(rank)
        generator = torch.get_rng_state()
        measured.append(mechanic.scale.measure(trainer, module, mechanic.rng(trainer.global_step)))
        assert torch.equal(torch.get_rng_state(), generator)
    assert measured[0] == measured[1] and max(measured[0].values()) > 0


def test_delta_is_the_measured_strength_in_the_unit_of_the_discretiser() -> None:
    """A weight's is twice as fine as its quantized values: these have a range of 2, an input's one of 1."""
    trainer, module = before_the_second_epoch()
    (mechanic,) = module.active
    strengths = mechanic.scale.measure(trainer, module, mechanic.rng(trainer.global_step))
    mechanic.on_train_epoch_start(trainer, module)
    expected = {name: float(s) * (2 if "weight" in name else 1) for name, s in strengths.items()}
    assert deltas(module.net) == pytest.approx(expected, rel=1e-6)
    assert min(max(value for name, value in expected.items() if role in name) for role in ("weight", "input")) > 0


@pytest.mark.parametrize("role", ["weight", "input"])
def test_a_strength_times_the_unit_scales_the_gradient_by_errors_of_the_quantized_values(role: Any) -> None:
    torch.manual_seed(0)
    quantizer: Any = build_quantizer(QuantizerSpec("ewgs", 2), (40,), None, role).double()
    strength, x = 0.3, torch.rand(40, dtype=torch.float64) * 0.9
    upstream = torch.randn(40, dtype=torch.float64)

    def slope(delta: float) -> Tensor:
        quantizer.delta.fill_(delta)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(quantizer(leaf), leaf, upstream)[0]

    error = quantizer.fake_quantize(x, rounding=False) - quantizer(x)
    expected = slope(0.0) / upstream * (upstream + strength * upstream.abs() * error)
    torch.testing.assert_close(slope(strength * quantizer.unit), expected.detach(), rtol=1e-6, atol=0)


def test_a_network_of_other_quantizers_is_refused() -> None:
    with pytest.raises(ValueError, match="callbacks.ewgs: the network has no ewgs quantizer"):
        make_module({"ewgs": QUICK}, quantizer=LSQ_RECIPE)


@pytest.mark.parametrize("option", ["every_n_epochs", "batches", "batch_size", "probes"])
def test_refusals_name_their_key(option: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.ewgs.{option}=0: use 1 or more"):
        HessianScale("callbacks.ewgs", **{option: 0})


# -- the measurement ------------------------------------------------------------------------------------------------


def quadratic(hessian: Tensor, parts: list[Tensor]) -> Tensor:
    w = torch.cat(parts)
    return w @ hessian @ w / 2


def test_block_traces_of_a_quadratic() -> None:
    torch.manual_seed(0)
    root = torch.randn(9, 9, dtype=torch.float64)
    hessian = root @ root.T
    parts = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (4, 5)]
    gradients = torch.autograd.grad(quadratic(hessian, parts), parts, create_graph=True)
    expected = torch.stack([hessian[:4, :4].trace(), hessian[4:, 4:].trace()])
    found = block_traces(gradients, parts, 4000, 0.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    diagonal = torch.diag(hessian.diagonal())
    gradients = torch.autograd.grad(quadratic(diagonal, parts), parts, create_graph=True)
    exact = block_traces(gradients, parts, 50, 1e-3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=0)


def test_block_traces_stop_when_they_stand_still() -> None:
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(w.square().sum(), w, create_graph=True)
    used = torch.Generator().manual_seed(0)
    block_traces([gradient], [w], 50, 1e-3, used)
    two = torch.Generator().manual_seed(0)
    torch.randint(0, 2, (6,), generator=two)
    torch.randint(0, 2, (6,), generator=two)
    assert torch.equal(used.get_state(), two.get_state()), "a diagonal Hessian needs two probes to know"


def test_error_gradient_scales_are_curvature_over_gradient_at_the_quantized_tensors() -> None:
    """A linear layer and a squared loss: the Hessian at the weights is known."""
    module = make_module(quantizer={"weight": {"name": "ewgs", "bits": 3}})
    net = nn.Sequential(module.net.fc).double()
    layer: Any = net[0]
    layer.weight_quantizer.initialise(layer.weight)
    layer.weight_quantizer.delta.fill_(0.7)
    inputs = [torch.randn(12, 16, dtype=torch.float64) for _ in range(2)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y.square().sum() / len(x)

    expected = []
    for x in inputs:
        gradient = 2 / len(x) * net(x).detach().T @ x  # the output's scale is still 1
        trace = 4 * 2 / len(x) * x.square().sum()
        expected.append(trace / 64 / (3 * gradient.std()))
    generator = torch.Generator().manual_seed(0)
    (found,) = error_gradient_scales(net, loss, inputs, generator, probes=3000, tolerance=0.0).values()
    torch.testing.assert_close(found.double(), torch.stack(expected).mean(), rtol=0.05, atol=0)
    assert not layer.weight_quantizer.plain_ste


def test_a_branch_that_its_norm_has_switched_off_has_no_strength() -> None:
    module = make_module(quantizer=EWGS, model=RESNET)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    norm = module.net.layer1[0].bn2
    norm.weight.requires_grad_(False).zero_()
    calibrate(module.net, [images])

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(batch), torch.arange(8) % CLASSES)

    found = error_gradient_scales(module.plain_copy().train(), loss, [images], torch.Generator().manual_seed(0), 4)
    branch = {name: float(value) for name, value in found.items() if name.startswith("layer1.0.")}
    assert len(branch) == 4 and set(branch.values()) == {0.0}
    assert all(bool(value.isfinite()) for value in found.values()) and max(found.values()) > 0
