"""The policy of SAMQ against vectors of the official code, and what it draws."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from callbacks.samq.choice import drawn_near
from callbacks.samq.learner import Learner
from callbacks.samq.policy import Policy, entropy, log_probability, policy_loss

Arrays = dict[str, np.ndarray]
OFFICIAL = {"embedding": "bit_embedding", "cell": "lstm", "head": "weight_bits_linear"}


def official(name: str) -> str:
    """The official name of a parameter."""
    owner, _, leaf = name.partition(".")
    return f"{OFFICIAL[owner]}.{leaf}"


def policy(decisions: int, choices: int, hidden: int = 64, seed: int = 0) -> Policy:
    made = Policy(decisions, choices, hidden)
    made.initialise(torch.Generator().manual_seed(seed))
    return made


def uniform(decisions: int, choices: int) -> Policy:
    """A policy with zero weights."""
    made = Policy(decisions, choices)
    for parameter in made.parameters():
        parameter.data.zero_()
    return made


def test_the_golden_policy(golden: Callable[[str], Arrays]) -> None:
    arrays = golden("saq")
    choices = arrays["ctrl.bits_choice"].tolist()
    picks = torch.tensor([[choices.index(b) for b in arrays["ctrl.sampled_bits"].tolist()]])
    made = Policy(picks.shape[1], len(choices), arrays["ctrl.bit_embedding.weight"].shape[1]).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[f"ctrl.{official(name)}"]))
    logits = made(picks)
    cost, beta = arrays["ctrl.cost_beta"].tolist()
    policy_loss(logits, picks, cost, beta).sum().backward()
    found = {
        "probs": torch.softmax(logits[0], -1),
        "logp_sum": log_probability(logits, picks),
        "entropy_sum": entropy(logits),
        **{f"grad.{official(name)}": parameter.grad for name, parameter in made.named_parameters()},
    }
    for name, value in found.items():
        expected = torch.from_numpy(arrays[f"ctrl.{name}"])
        torch.testing.assert_close(value.detach(), expected, rtol=1e-8, atol=1e-13, msg=name)
    assert len(found) == 3 + sum(name.startswith("ctrl.grad.") for name in arrays)


@pytest.mark.parametrize(("layers", "choices"), [(4, 4), (18, 3)])
def test_zero_weights_draw_uniformly(layers: int, choices: int) -> None:  # check 8, the policy's part
    made = uniform(layers, choices)
    picks = made.sample(torch.Generator().manual_seed(0), 500)
    logits = made(picks[:1])
    assert float(entropy(logits).detach()) == pytest.approx(layers * math.log(choices))
    assert float(log_probability(logits, picks[:1]).detach()) == pytest.approx(-layers * math.log(choices))
    shares = torch.bincount(picks.flatten(), minlength=choices) / picks.numel()
    torch.testing.assert_close(shares, torch.full((choices,), 1 / choices), rtol=0, atol=0.04)


def test_parameters_start_within_a_tenth_and_draw_nothing_from_the_default_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made = policy(5, 4, hidden=128)
    assert torch.equal(torch.get_rng_state(), before)
    values = torch.cat([parameter.detach().flatten() for parameter in made.parameters()])
    assert float(values.abs().max()) <= 0.1
    assert float(values.std()) == pytest.approx(0.2 / math.sqrt(12), rel=0.02)


def test_draws_follow_the_probabilities_that_the_draws_before_them_lead_to() -> None:
    made = policy(2, 2, hidden=8)
    for parameter in made.parameters():
        parameter.data.mul_(15)  # far from uniform
    picks = made.sample(torch.Generator().manual_seed(0), 20000)
    seen = torch.bincount(2 * picks[:, 0] + picks[:, 1], minlength=4) / len(picks)
    every = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    expected = log_probability(made(every), every).detach().exp()
    assert float(expected.sum()) == pytest.approx(1.0)
    assert float(expected.max() - expected.min()) > 0.2
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.015)


def test_the_most_probable_picks_are_the_greatest_logits_one_after_another() -> None:
    made = policy(6, 4, hidden=16)
    best = made.most_probable()
    assert torch.equal(made(best[None]).argmax(-1)[0], best)


def test_few_candidates_can_be_drawn_among() -> None:
    picks = uniform(3, 4).sample(torch.Generator().manual_seed(0), 200, among=2)
    assert set(picks.flatten().tolist()) == {0, 1}


def summed(picks: torch.Tensor) -> float:
    return 1.0 + float(picks.sum())


def test_the_learner_finds_cheap_picks_and_goes_on_from_its_state() -> None:
    generator, learner = torch.Generator().manual_seed(0), Learner(policy(3, 3, 16), 0.02, 5e-3, 0.9)
    resumed = Learner(policy(3, 3, 16, seed=9), 0.02, 5e-3, 0.9)
    for step in range(150):
        if step == 100:
            resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
            again = torch.Generator()
            again.set_state(generator.get_state())
        picks = learner.policy.sample(generator)
        learner.step(picks, summed(picks))
    assert learner.policy.most_probable().tolist() == [0, 0, 0]
    assert float(entropy(learner.policy(picks)).detach()) < 1.0
    for _ in range(50):
        picks = resumed.policy.sample(again)
        resumed.step(picks, summed(picks))
    assert (resumed.updates, resumed.baseline) == (150, learner.baseline)
    for one, other in zip(resumed.policy.parameters(), learner.policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("momentum", "advantages"), [(0.0, (3.0, 5.0)), (0.5, (0.0, 2.0))])
def test_a_moving_average_of_costs_is_subtracted_where_it_is_wanted(
    momentum: float, advantages: tuple[float, float]
) -> None:
    learner, picks = Learner(policy(2, 2, 4), 1e-9, 0.0, momentum), torch.tensor([[0, 1]])
    for cost, advantage in zip((3.0, 5.0), advantages, strict=True):
        learner.step(picks, cost)
        (expected,) = torch.autograd.grad(
            advantage * log_probability(learner.policy(picks), picks).sum(), [learner.policy.head.bias]
        )
        torch.testing.assert_close(learner.policy.head.bias.grad, expected, rtol=1e-4, atol=1e-7)
    assert learner.baseline == (5.0 if momentum == 0 else 4.0)


def test_the_learner_takes_the_steps_of_the_official_adam() -> None:
    learner, reference = (Learner(policy(3, 3, 4), 0.05, 5e-3, 0.0) for _ in range(2))
    parameters, picks = list(reference.policy.parameters()), torch.tensor([[0, 2, 1]])
    adam = torch.optim.Adam(parameters, lr=0.05, betas=(0.5, 0.999), weight_decay=5e-4)
    for cost in (3.0, -1.0, 2.0):
        learner.step(picks, cost)
        adam.zero_grad()
        policy_loss(reference.policy(picks), picks, cost, 5e-3).sum().backward()
        adam.step()
    for found, expected in zip(learner.policy.parameters(), parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def near(made: Policy, most: float, least: float, count: int, draws: int) -> list[tuple[int, ...]]:
    return drawn_near(made, torch.Generator().manual_seed(1), sum, most, least, count, draws, 3)


def test_configurations_close_below_the_budget_are_taken_as_they_are_drawn() -> None:
    made = uniform(6, 3)
    found = near(made, 6, 5, 4, 1000)
    order = list(dict.fromkeys(map(tuple, made.sample(torch.Generator().manual_seed(1), 100).tolist())))
    assert found == [picks for picks in order if 5 <= sum(picks) <= 6][:4]


def test_where_few_are_close_the_nearest_below_are_taken() -> None:
    found = near(uniform(6, 3), 3.5, 3.2, 3, 150)
    assert [sum(picks) for picks in found] == [3, 3, 3] and len(set(found)) == 3


def test_where_none_is_within_the_budget_narrow_candidates_are_drawn() -> None:
    assert near(uniform(40, 3), 25, 24, 2, 60) and near(uniform(40, 3), 0, 0, 2, 20) == [(0,) * 40]
    with pytest.raises(ValueError, match="no configuration costs -1 or less"):
        near(uniform(40, 3), -1, -2, 2, 20)
