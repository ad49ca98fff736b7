"""Binary quantizers: IR-Net's official layer and estimator, and what standardising promises."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from research.quant.convert import convert
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.quant.quantizers.binary import (
    Binary,
    active_limit,
    capped_estimator,
    decaying_sign,
    magnitude_quantile,
    mean_magnitude,
    standardised,
)
from research.quant.ranges import power_of_two
from research.quant.recipe import Recipe

Golden = dict[str, np.ndarray]
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def fields(golden: Golden, tag: str) -> dict[str, Tensor]:
    prefix = f"{tag}_"
    return {key.removeprefix(prefix): torch.from_numpy(a) for key, a in golden.items() if key.startswith(prefix)}


def make(shape: tuple[int, ...] = (), role: str = "weight", **options: Any) -> Binary:
    granularity = "channel" if role == "weight" else "tensor"
    spec = QuantizerSpec("binary", 1, granularity=granularity, options=options)
    quantizer = build_quantizer(spec, shape, 0 if role == "weight" else None, role).double()
    assert isinstance(quantizer, Binary)
    return quantizer


def test_golden_estimator(golden: Callable[[str], Golden]) -> None:
    for tag in ("ede_early", "ede_mid", "ede_late"):
        v = fields(golden("dir_net"), tag)
        x = v["x"].requires_grad_()
        y = decaying_sign(x, v["t"], v["k"], sign_zero=0)
        assert torch.equal(y, v["y"])
        torch.testing.assert_close(torch.autograd.grad(y, x, v["upstream"])[0], v["grad_x"], **EXACT)
    assert decaying_sign(torch.zeros(1), torch.ones(1), torch.ones(1)) == 1, "a binary value is never 0"


@pytest.mark.parametrize("tag", ["conv_a", "conv_b"])
def test_golden_layer(golden: Callable[[str], Golden], tag: str) -> None:
    v = fields(golden("dir_net"), tag)
    scale = power_of_two(mean_magnitude(standardised(v["w"], 0), 0))
    torch.testing.assert_close(standardised(v["w"], 0), v["w_std"], **EXACT)
    assert torch.equal(scale.flatten(), v["scale"])
    net = nn.Sequential(nn.Conv2d(3, 5, 3, int(v["stride"]), int(v["padding"]), bias=False)).double()
    recipe = {slot: {"name": "binary", "bits": 1, "options": {"sign_zero": 0}} for slot in ("weight", "input")}
    recipe["weight"]["granularity"] = "channel"
    convert(net, Recipe.from_config(recipe), "0", "0")
    layer, x = net.double()[0], v["x"].requires_grad_()
    layer.weight.data.copy_(v["w"])
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.t.fill_(v["t"])
        quantizer.k.fill_(v["k"])
    y = net(x)
    y.backward(v["upstream"])
    for found, expected in ((y, v["y"]), (x.grad, v["grad_x"]), (layer.weight.grad, v["grad_w"])):
        torch.testing.assert_close(found, expected, **EXACT)


def test_1_standardised_filters_and_their_invariance() -> None:
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    u = standardised(w, 0)
    torch.testing.assert_close(u.mean((1, 2, 3)), torch.zeros(4).double(), atol=1e-14, rtol=0)
    torch.testing.assert_close(u.std((1, 2, 3)), torch.ones(4).double())
    assert torch.equal(make(w.shape)(2.5 * w + 0.7), make(w.shape)(w))


def test_2_scales_of_known_distributions() -> None:
    share = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    gauss = torch.special.ndtri(share)
    laplace = -torch.sign(share - 0.5) * torch.log1p(-2 * (share - 0.5).abs())
    magnitudes = [float(mean_magnitude(standardised(w))) for w in (gauss, laplace, laplace**3)]
    assert magnitudes[:2] == pytest.approx([0.798, 0.707], abs=2e-3)
    scales = [float(power_of_two(torch.tensor(m))) for m in magnitudes]
    assert scales[0] == 1 and scales[2] <= 0.5
    assert (power_of_two(mean_magnitude(standardised(torch.randn(500, 4), 0), 0)) <= 1).all()


def test_3_entropy_of_the_signs() -> None:
    def entropy(w: Tensor) -> float:
        p = (w > 0).double().mean()
        return float(-torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)) / float(np.log(2))

    half = torch.randn(500, dtype=torch.float64)
    w = 1 + 0.5 * torch.cat([half, -half])
    assert entropy(standardised(w)) == pytest.approx(1.0, abs=1e-12)
    assert entropy(w) < 0.4


def test_6_a_small_t_is_the_identity() -> None:
    x, t = torch.randn(50, dtype=torch.float64, requires_grad=True), torch.tensor(1e-3)
    (grad,) = torch.autograd.grad(decaying_sign(x, t, 1 / t).sum(), x)
    assert ((grad - 1).abs() <= 1.01 * (t * x).square() + 1e-7).all()


def test_7_gradients_know_of_shift_and_scale() -> None:
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(make(w.shape)(w), w, torch.randn_like(w))
    assert grad.abs().max() > 1e-2
    assert grad.sum((1, 2, 3)).abs().max() < 1e-12
    assert (grad * (w - w.mean((1, 2, 3), keepdim=True))).sum((1, 2, 3)).abs().max() < 1e-12


def test_the_cap_keeps_a_share_of_gradients() -> None:
    u = torch.randn(1000, dtype=torch.float64) + 3
    quantile = magnitude_quantile(u, 0.1)
    assert int((u.abs() <= quantile).sum()) == 100
    t, k = capped_estimator(torch.tensor(10.0), quantile, 0.1)
    slope = 1 - torch.tanh(t * u.abs()).square()
    assert 1 < t < 10 and k == 1
    assert int((slope >= 0.1 - 1e-9).sum()) >= 100
    for early in (0.01, 1.0):
        assert float(capped_estimator(torch.tensor(early).double(), quantile, 0.1)[0]) == pytest.approx(early)
    near, _ = capped_estimator(torch.tensor(10.0), torch.tensor(0.5, dtype=torch.float64), 0.1)
    assert float(near) == pytest.approx(active_limit(0.1) / 0.5) and active_limit(0.1) == pytest.approx(1.818, abs=1e-3)


def test_an_input_keeps_a_running_quantile_in_training_only() -> None:
    quantizer = make(role="input")
    quantizer.active_share, quantizer.active_slope = 0.5, 0.1
    first, second = torch.tensor([-1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([-5.0, 6.0, 7.0, 8.0]).double()
    quantizer.eval()(first)
    assert quantizer.quantile == 0
    quantizer.train()(first)
    assert quantizer.quantile == 2
    quantizer(second)
    assert float(quantizer.quantile) == pytest.approx(0.9 * 2 + 0.1 * 6)


def test_xnor_is_the_sign_times_the_mean_magnitude() -> None:
    w = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.sign(w) * w.abs().mean(1, keepdim=True)
    torch.testing.assert_close(make(w.shape, form="xnor")(w), expected, **EXACT)


@pytest.mark.parametrize(("count", "value"), [(27, 0.1), (576, 0.7), (9, 0.05), (4, 0.3)])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_filter_of_equal_numbers_has_a_finite_scale_of_at_most_one(
    count: int, value: float, granularity: str
) -> None:
    w = torch.full((2, count), value, requires_grad=True)
    spec = QuantizerSpec("binary", 1, granularity=granularity)
    quantizer = build_quantizer(spec, w.shape, 0, "weight")
    quantizer.initialise(w)
    assert quantizer.scale.isfinite().all() and (quantizer.scale <= 1).all()
    out = quantizer(w)
    assert out.dtype == torch.float32 and out.isfinite().all() and (out.abs() <= 1).all()
    out.square().sum().backward()
    assert w.grad is not None and w.grad.isfinite().all()


def test_what_it_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="bits=2: binary has at most 1"):
        build_quantizer(QuantizerSpec("binary", 2), (4, 3), 0, "weight")
    with pytest.raises(ValueError, match="form=sign: use libra or xnor"):
        make((4, 3), form="sign")
    with pytest.raises(ValueError, match="sign_zero=-1"):
        make((4, 3), sign_zero=-1)
    with pytest.raises(ValueError, match="one weight has no spread"):
        make((4, 1, 1, 1))
    with pytest.raises(ValueError, match="model.activation=hardtanh, or bits=32"):
        make(role="input").initialise(torch.rand(5))
