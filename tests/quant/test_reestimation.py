"""Re-estimating batch-norm in networks whose training mode draws noise or moves state of its own."""

import torch
from torch import Tensor, nn

from research.quant.batchnorm import reestimate_batchnorm
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.recipe import Recipe

SLOT = {"name": "lq_nets", "bits": 2}


def noisy_net() -> nn.Sequential:
    """Dropout in front of every batch-norm but the first, LQ-Nets weights and inputs behind it; in training mode."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(4, 5, 3, bias=False), nn.Dropout2d(0.5), nn.BatchNorm2d(5)),
    )
    convert(net, Recipe(weight=SLOT, input=SLOT), "0", "4")
    calibrate(net, images())
    return net.train()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(3)]


def test_only_batchnorm_is_in_training_mode() -> None:
    net, training = noisy_net(), dict[str, set[bool]]()
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda m, _, name=name: training.setdefault(name, set()).add(m.training))
    reestimate_batchnorm(net, images())
    assert {name for name, flags in training.items() if flags != {False}} == {"1", "6"}
    assert {"3", "5", "4.weight_quantizer", "4.input_quantizer"} <= set(training)
    assert all(module.training for module in net.modules())


def test_the_statistics_are_those_without_dropout_and_no_basis_moves() -> None:
    net = noisy_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    reestimate_batchnorm(net, images())
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{norm}.running_{what}" for norm in (1, 6) for what in ("mean", "var")}
    net.eval()
    net[1].train()
    net[1].momentum = 0.0
    outputs = [net[:5](x) for x in images()]
    for name, values in (("mean", [y.mean((0, 2, 3)) for y in outputs]), ("var", [y.var((0, 2, 3)) for y in outputs])):
        torch.testing.assert_close(getattr(net[6], f"running_{name}"), torch.stack(values).mean(0))
