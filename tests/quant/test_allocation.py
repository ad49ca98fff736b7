"""Bit allocations: from networks and tables, into networks, tables and files; what does not fit is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from research.quant.allocation import Allocation, LayerBits
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.passes import passes
from research.quant.recipe import Recipe, Table, table_to_plain
from research.runs.allocation import read_allocation, read_table, write_allocation
from research.runs.records import read_config

MIXED = Allocation({"0": (8, 8), "4": (3, 2)})


def converted(bits: int = 4, **recipe) -> tuple[nn.Sequential, Table]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    slot = {"name": "lsq", "bits": bits, "init": "mse"}
    table = convert(net, Recipe(**{"weight": slot, "input": slot, **recipe}), "0", "4")
    calibrate(net, [images()])
    return net.eval(), table


def images() -> torch.Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_an_allocation_is_an_immutable_mapping():
    layers = {"a": (2, 4), "b": (32, 0)}
    allocation = Allocation(layers)
    layers["a"] = (8, 8)
    assert allocation["a"] == LayerBits(weight=2, input=4) and str(allocation["a"]) == "W2A4"
    assert list(allocation) == ["a", "b"] and len(allocation) == 2
    with pytest.raises(TypeError):
        allocation["a"] = (8, 8)  # type: ignore[index]
    same = Allocation({"b": (32, 0), "a": (2, 4)})
    assert same == allocation and hash(same) == hash(allocation) and allocation != Allocation({"a": (2, 4)})
    assert allocation.metrics() == {"bits/a.weight": 2, "bits/a.input": 4, "bits/b.weight": 32, "bits/b.input": 0}


@pytest.mark.parametrize("width", [9, -1, 31, 2.5, True, "4"])
def test_what_is_no_width(width):
    with pytest.raises(ValueError, match=rf"^allocation\.a\.input={width}: use 0 to 8, or 32 for float$"):
        Allocation({"a": (2, width)})


def test_the_widths_of_a_network():
    assert Allocation.of(converted()[0]) == Allocation({"0": (4, 4), "4": (4, 4)})
    assert Allocation.of(converted(weight=None)[0]) == Allocation({"0": (32, 4), "4": (32, 4)})
    net, _ = converted()
    with (
        passes(net, bits={"4.weight_quantizer": torch.tensor([[2.0], [2.0], [4.0], [4.0]])}),
        pytest.raises(ValueError, match=r"^allocation\.4\.weight: it has \[2\.0, 4\.0\] bits"),
    ):
        Allocation.of(net)


def test_a_pass_at_an_allocation():
    net, _ = converted()
    with passes(net, bits=MIXED.widths(net)):
        assert Allocation.of(net) == MIXED
        inside = net(images())
    assert Allocation.of(net) == Allocation({"0": (4, 4), "4": (4, 4)})
    assert not torch.equal(net(images()), inside)


def test_an_applied_allocation_is_part_of_the_state():
    net, _ = converted()
    with passes(net, bits=MIXED.widths(net)):
        expected = net(images())
    MIXED.apply(net)
    assert torch.equal(net(images()), expected)
    fresh, _ = converted()
    fresh.load_state_dict(net.state_dict())
    assert Allocation.of(fresh) == MIXED and torch.equal(fresh(images()), expected)


def test_into_a_table_and_back(tmp_path: Path):
    _, base = converted()
    allocation = Allocation({"0": (8, 32), "4": (3, 0)})
    table = allocation.table(base)
    assert Allocation.from_table(table) == allocation
    assert table["0"]["input"] is None and table["4"]["weight"].with_bits(4) == base["4"]["weight"]
    write_allocation(tmp_path / "allocation.yaml", allocation, base)
    assert read_allocation(tmp_path / "allocation.yaml") == allocation
    assert read_table(tmp_path / "allocation.yaml") == table
    recipe = Recipe.from_config({"table": read_config(tmp_path / "allocation.yaml")})
    assert recipe.resolve(["0", "4"], "0", "4") == table
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    convert(net, recipe, "0", "4")
    assert Allocation.of(net) == allocation


def test_files_that_are_no_allocation(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file; use the allocation.yaml or table.yaml"):
        read_allocation(tmp_path / "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("conv1: {weight: null}\n")
    with pytest.raises(ValueError, match="conv1 has .*: a layer has weight, input and maybe output"):
        read_allocation(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("conv1: {weight: {bits: 12}, input: null}\n")
    with pytest.raises(ValueError, match=r"a\.yaml: conv1\.weight\.bits=12"):
        read_allocation(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"0": (4, 4), "5": (4, 4)}, r"^allocation\.5: the network has no such layer; it has 0, 4$"),
        ({"0": (4, 4)}, r"^allocation: 4 is missing; give widths for 4$"),
        ({"0": (4, 4), "4": (1, 4)}, r"^allocation\.4\.weight=1: lsq takes 2 to 8 bits there, or 0$"),
        ({"0": (4, 4), "4": (4, 32)}, r"^allocation\.4\.input=32: lsq takes 1 to 8 bits there, or 0$"),
    ],
)
def test_an_allocation_of_another_network(layers, message):
    net, _ = converted()
    before = Allocation.of(net)
    for use in (Allocation(layers).widths, Allocation(layers).apply):
        with pytest.raises(ValueError, match=message):
            use(net)
    assert Allocation.of(net) == before


def test_slots_without_a_quantizer():
    net, base = converted(input=None)
    with pytest.raises(ValueError, match=r"^allocation\.0\.input=8: there is no quantizer; use 32$"):
        MIXED.widths(net)
    with pytest.raises(ValueError, match=r"^allocation\.0\.input=8: the recipe has no quantizer there; use 32$"):
        MIXED.table(base)
    assert Allocation({"0": (8, 32), "4": (2, 32)}).widths(net) == {"0.weight_quantizer": 8, "4.weight_quantizer": 2}
    assert table_to_plain(base)["0"]["input"] is None


def test_a_network_with_a_state_per_width():
    net, _ = converted(widths=(2, 4))
    narrow = Allocation({"0": (4, 4), "4": (2, 2)})
    with passes(net, bits=narrow.widths(net)):
        assert Allocation.of(net) == narrow
    with pytest.raises(ValueError, match=r"no PerWidth for width 8: quantizer\.widths has 2, 4"):
        MIXED.widths(net)
    with pytest.raises(ValueError, match=r"0\.weight_quantizer has a state for each of quantizer\.widths"):
        narrow.apply(net)
