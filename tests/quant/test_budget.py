"""Budgets: the worked costs of ResNet-20, what is feasible, and the parts that a solver adds up."""

import random
from functools import cache

import pytest
import torch

from research.models import resnet20
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, Counts, budgets_from_config, cost_metrics, require_budgets
from research.quant.cost import LayerCost
from research.quant.cost_convention import CostConvention

KINDS = ("average_bits", "size", "bops", "activation_memory", "activation_max")
ENDS = ("conv1", "fc")


@cache
def counts() -> Counts:
    return Counts.of(resnet20(shortcut="A"), (3, 32, 32), *ENDS)


def choices(*widths: int, ends: int = 8) -> dict[str, list[LayerBits]]:
    """All layers at ``widths``, weight and input alike, both ends fixed."""
    return {
        layer.name: [LayerBits(b, b) for b in ((ends,) if layer.name in ENDS else widths)] for layer in counts().layers
    }


def alike(width: int, ends: int = 8) -> Allocation:
    return Allocation({name: options[0] for name, options in choices(width, ends=ends).items()})


def test_the_mixed_example_of_resnet20():
    stages = {"layer1": (4, 4), "layer2": (3, 4), "layer3": (2, 4)}
    mixed = Allocation({layer.name: stages.get(layer.name.split(".")[0], (8, 8)) for layer in counts().layers})
    assert Budget("size", 1e9).cost(counts(), mixed) == 621440
    assert Budget("bops", 1e9).cost(counts(), mixed) == 514367488
    assert Budget("average_bits", 3).cost(counts(), mixed) == pytest.approx(2.3159, abs=5e-5)
    assert Budget("activation_memory", 1e9).cost(counts(), mixed) == 4 * (187456 - 3072 - 64) + 8 * (3072 + 64)
    assert Budget("activation_max", 1e9).cost(counts(), mixed) == 4 * 16384


@pytest.mark.parametrize(
    ("kind", "convention", "low", "high"),
    [
        ("size", {}, 543104, 1077632),
        ("size", {"first_last": "fp"}, 568832, 1103360),
        ("average_bits", {}, 543104 / 268336, 1077632 / 268336),
        ("average_bits", {"first_last": "excluded"}, 2, 4),
        ("bops", {"first_last": "excluded"}, 4 * 40108032, 16 * 40108032),
        ("activation_memory", {"first_last": "excluded"}, 2 * 184320, 4 * 184320),
        ("activation_max", {}, 2 * 16384, 4 * 16384),
    ],
)
def test_what_is_feasible_between_2_and_4_bits(kind, convention, low, high):
    stated = CostConvention(**convention)
    assert Budget(kind, 1.0, stated).feasible(counts(), choices(2, 3, 4)) == pytest.approx((low, high), rel=1e-15)
    assert Budget(kind, low, stated).met(counts(), alike(2))
    assert not Budget(kind, low * (1 - 1e-9), stated).met(counts(), alike(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "convention",
    [
        {},
        {"first_last": "excluded", "form": "uniq"},
        {"first_last": "fixed8", "count_sign_bit": True, "input_bits": None},
        {"count_biases": True, "count_ranges": True, "count_norms": True},
    ],
)
def test_the_shares_of_the_layers_make_up_the_cost(kind, convention):
    random_bits = random.Random(0)
    widths = [LayerBits(w, a) for w in (0, 2, 3, 8, 32) for a in (2, 4, 32)]
    free = {layer.name: random_bits.sample(widths, random_bits.randint(1, 5)) for layer in counts().layers}
    probe = Budget(kind, 1.0, CostConvention(**convention))
    shares = probe.shares(counts(), free)
    for _ in range(3):
        picks = {name: random_bits.randrange(len(options)) for name, options in free.items()}
        allocation = Allocation({name: free[name][pick] for name, pick in picks.items()})
        at_cost = Budget(kind, probe.cost(counts(), allocation), CostConvention(**convention))
        taken = [shares[name][pick] for name, pick in picks.items()]
        assert (sum(taken) if probe.additive else max(taken)) == pytest.approx(at_cost.limit(counts()), rel=1e-12)
        assert at_cost.met(counts(), allocation)


def test_scales_and_norms_count_where_the_convention_says_so():
    layer = LayerCost("a", 10, 10, 5, 5, 2, 3, 7, torch.tensor(4.0), torch.tensor(4.0))
    own = Counts((layer,), "a", "a", norm_parameters=2)
    allocation = Allocation({"a": (4, 4)})
    assert Budget("size", 1, CostConvention()).cost(own, allocation) == 40
    whole = CostConvention(count_biases=True, count_ranges=True, count_norms=True)
    assert Budget("size", 1, whole).cost(own, allocation) == 40 + 32 * (3 + 7 + 2)
    nothing = Budget("size", 1, CostConvention(first_last="excluded"))
    with pytest.raises(ValueError, match=r"^budget\.convention\.first_last=excluded: no layer is left"):
        nothing.cost(own, allocation)


def test_a_budget_that_cannot_be_met_says_what_can():
    free = choices(2, 3, 4)
    with pytest.raises(ValueError, match=r"^budget\.value=2: feasible are 2\.024 to 4\.016 bits per weight$"):
        Budget("average_bits", 2).require(counts(), free)
    with pytest.raises(ValueError, match=r"^budget\[1\]\.value=500000: feasible are 543104 to 1077632 bits of all"):
        Budget("size", 500000, key="budget[1]").require(counts(), free)
    Budget("average_bits", 2.024).require(counts(), free)  # the value that the message names
    Budget("size", 543104).require(counts(), free)


def test_a_finished_search_is_held_against_its_budgets():
    require_budgets([Budget("average_bits", 4.02), Budget("size", 1077632)], counts(), alike(4))
    with pytest.raises(ValueError, match=r"^budget\.value=1077631: the widths cost 1077632 bits of all weights$"):
        require_budgets([Budget("size", 1077631)], counts(), alike(4))
    with pytest.raises(ValueError, match=r"^allocation\.0: the network has no such layer"):
        Budget("size", 1).met(counts(), Allocation({"0": (4, 4)}))


def test_costs_are_logged_by_their_kind():
    budgets = [Budget("average_bits", 3), Budget("size", 1e6), Budget("average_bits", 4)]
    assert cost_metrics(budgets, lambda budget: 2 * budget.value) == {
        "cost/average_bits": 6, "cost/size": 2e6, "cost/average_bits_2": 8,
    }  # fmt: skip


def test_from_the_configuration():
    config = {"kind": "size", "value": 805008, "convention": {"first_last": "excluded"}}
    (budget,) = budgets_from_config(config)
    assert budget == Budget("size", 805008, CostConvention(first_last="excluded")) and budget.key == "budget"
    both = budgets_from_config([config, {"kind": "bops", "value": 1e8}])
    assert [budget.key for budget in both] == ["budget[0]", "budget[1]"]
    assert both[1].convention == CostConvention()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "speed", "value": 1}, r"^budget\.kind=speed: use one of average_bits, size, bops, activation_memory"),
        ({"kind": "size", "value": 0}, r"^budget\.value=0: use a positive number of bits of all weights"),
        ({"kind": "size", "value": "3kB"}, r"^budget\.value=3kB"),
        ({"kind": "size", "value": True}, r"^budget\.value=True"),
        ({"kind": "size"}, r"^budget=\{'kind': 'size'\}: use \{kind: average_bits, value: 3\}"),
        ({"kind": "size", "value": 1, "unit": "kB"}, r"^budget=.*'unit'"),
        ({"kind": "size", "value": 1, "convention": {"ends": 1}}, r"^budget\.convention\.ends is unknown"),
        ({"kind": "size", "value": 1, "convention": {"first_last": 8}}, r"^budget\.convention\.first_last=8: use one"),
        ({"kind": "size", "value": 1, "convention": "all"}, r"^budget\.convention=all: use settings"),
        ([{"kind": "size", "value": -1}], r"^budget\[0\]\.value=-1"),
        ([], r"^budget=\[\]: use"),
        (3, r"^budget=3: use"),
    ],
)
def test_a_malformed_budget(config, message):
    with pytest.raises(ValueError, match=message):
        budgets_from_config(config)
