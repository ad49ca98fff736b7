import pytest
import torch
from torch import Tensor, nn

from research.learning.mechanic import Mechanic
from research.learning.taps import Taps
from tests.learning.tiny import make_module


class Tapping(Mechanic):
    slug = "tapping"
    taps = ("relu", "*1")


TAPPING = {"tapping": {"_target_": "tests.learning.test_taps.Tapping"}}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_taps_collect_by_pattern_and_forget_when_taken() -> None:
    model = net()
    taps = Taps(model, ["1", "[01]"])
    x = torch.randn(3, 4)
    model(x)
    taken = taps.take()
    assert list(taken) == ["0", "1"], "each module once, although two patterns name it"
    assert torch.equal(taken["1"], model[1](model[0](x)))
    taps.take()
    assert taps.take() == {}
    taps.remove()
    model(x)
    assert taps.take() == {}


def test_a_pattern_without_a_module_is_an_error() -> None:
    with pytest.raises(ValueError, match="tap 'layer9.*' names no module"):
        Taps(net(), ["layer9.*"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_host_puts_taps_into_the_evaluation(compiled: bool) -> None:
    module = make_module(TAPPING, quantizer={})
    if compiled:
        module.net.compile(backend="aot_eager", fullgraph=True)
    batch = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    evaluation = module.objective(batch)
    assert sorted(evaluation.taps) == ["bn1", "conv1", "relu"]
    features: Tensor = evaluation.taps["relu"]
    expected = module.net.fc(module.net.flatten(module.net.pool(features)))
    torch.testing.assert_close(evaluation.outputs, expected)
    gradient = torch.autograd.grad(features.square().sum(), module.net.bn1.bias)[0]
    torch.testing.assert_close(gradient, 2 * features.sum((0, 2, 3)))


def test_a_plain_copy_has_no_hooks() -> None:
    module = make_module(TAPPING)
    copy = module.plain_copy()
    assert all(not part._forward_hooks for part in copy.modules())
    copy(torch.randn(2, 3, 8, 8))
    assert module.taps is not None
    assert module.taps.take() == {}
