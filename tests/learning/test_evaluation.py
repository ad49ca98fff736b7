import torch
from torch import nn
from torch.func import functional_call

from research.learning.evaluation import cloned_buffers, gradient_loss, same_noise


def test_cloned_buffers_keep_every_statistic_in_place() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    x = torch.randn(8, 3)
    clones = cloned_buffers(net)
    y = functional_call(net, clones, (x,))
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert int(clones["1.num_batches_tracked"]) == 1, "the clones moved in the buffers' place"
    assert torch.equal(y, net(x))
    assert int(net[1].num_batches_tracked) == 1


def test_same_noise_gives_every_evaluation_one_draw_and_consumes_it_once() -> None:
    torch.manual_seed(3)
    expected, following = torch.rand(4), torch.rand(4)
    torch.manual_seed(3)
    with same_noise(torch.device("cpu")) as rewind:
        first = torch.rand(4)
        rewind()
        second = torch.rand(4)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert torch.equal(torch.rand(4), following)


def test_gradient_loss_has_the_value_and_exactly_the_given_gradients() -> None:
    one, other = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))
    gradients = {one: torch.randn(3, 2), other: torch.randn(5, requires_grad=True)}
    value = torch.tensor(1.25, requires_grad=True)
    loss = gradient_loss(value, gradients)
    assert loss.item() == 1.25
    loss.backward()
    assert torch.equal(one.grad, gradients[one])
    assert torch.equal(other.grad, gradients[other].detach())
    assert value.grad is None
    assert gradients[other].grad is None


def test_gradient_loss_is_multiplied_like_any_loss() -> None:
    weight, gradient = nn.Parameter(torch.randn(4)), torch.randn(4)
    (gradient_loss(torch.tensor(2.0), {weight: gradient}) / 4).backward()
    assert torch.equal(weight.grad, gradient / 4)
