"""A remembered result is given again only while nothing that it was made of has changed."""

import copy
import pickle

import pytest
import torch

from research.quant.kernels import BLOCK
from research.quant.latest import Latest
from research.quant.passes import passes
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.lsq import LSQ


def test_made_once_while_the_tensors_stay_as_they_are() -> None:
    latest, made = Latest[int](), iter(range(100))
    first, second = torch.ones(2), torch.ones(2)

    def get(*made_of: object) -> int:
        return latest.get(made_of, lambda: next(made))

    assert [get(first, 1), get(first, 1)] == [0, 0]
    assert get(first, 2) == 1, "another number"
    assert get(second, 2) == 2, "an equal tensor, but another one"
    second.add_(1)
    assert [get(second, 2), get(second, 2)] == [3, 3], "written to"
    with torch.inference_mode():
        untracked = torch.ones(2)
    assert [get(untracked), get(untracked)] == [4, 5]
    learned = torch.ones(2, requires_grad=True)
    assert [get(learned), get(learned)] == [6, 7]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda latest: pickle.loads(pickle.dumps(latest))])
def test_copies_remember_nothing(copied: object) -> None:
    latest, x = Latest[int](), torch.ones(2)
    latest.get([x], lambda: 1)
    assert callable(copied)
    assert copied(latest).get([x], lambda: 2) == 2


@pytest.mark.parametrize("elements", [10, BLOCK + 1])
def test_a_quantizers_fast_path_follows_its_width_and_its_sign(elements: int) -> None:
    q, x = LSQ(QuantizerSpec("lsq", 4, False), (), None, "input"), torch.linspace(-3, 30, elements)
    other = LSQ(QuantizerSpec("lsq", 3, True), (), None, "input")

    def agrees() -> bool:
        q.kernels = None
        reference = q(x)
        q.kernels = "eager"
        return torch.equal(q(x), reference)

    assert agrees() and float(q(x).detach().max()) == 15
    with passes(q, bits=2):
        assert agrees() and float(q(x).detach().max()) == 3
    assert agrees() and float(q(x).detach().max()) == 15
    q.load_state_dict(other.state_dict())
    assert agrees() and float(q(x).detach().min()) == -3
    q.signed.fill_(False)
    assert agrees() and float(q(x).detach().max()) == 7
