from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.curvature.quantized_tensors import block_traces, error_gradient_scales
from research.learning.hessian_scale import HessianScale
from research.quant.layers import quantizers
from tests.learning.tiny import LSQ as LSQ_RECIPE
from tests.learning.tiny import RESNET, fit, make_module, state

EWGS: dict[str, Any] = {"weight": {"name": "ewgs", "bits": 4}, "input": {"name": "ewgs", "bits": 4}}
QUICK = {"_target_": "callbacks.ewgs.EWGSDelta", "every_n_epochs": 1, "batches": 1, "batch_size": 8, "probes": 4}


def deltas(net: nn.Module) -> dict[str, float]:
    return {name: float(quantizer.delta) for name, quantizer in quantizers(net)}  # type: ignore[arg-type]


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
    module = make_module({"ewgs": QUICK}, quantizer=EWGS, model=RESNET)
    trainer = fit(module, max_epochs=1)
    before, generator = state(module), torch.get_rng_state()
    trainer.fit_loop.epoch_progress.current.completed = trainer.fit_loop.epoch_progress.current.processed = 1
    module.active[0].on_train_epoch_start(trainer, module)
    after = state(module)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith("delta") for name in changed)
    assert torch.equal(torch.get_rng_state(), generator)


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
