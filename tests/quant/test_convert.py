"""Recipes: rules, tables, outputs, replacements, and what they do to a network."""

import pytest
import torch
from torch import nn

from research.models import resnet8
from research.quant.convert import convert
from research.quant.layers import QuantConv2d, QuantLinear, QuantOutput, quant_layers, quantizers
from research.quant.output_scale import OutputScale
from research.quant.quantizers import QuantizerSpec
from research.quant.quantizers.lsq import LSQ
from research.quant.recipe import Recipe, format_table, table_to_plain
from research.quant.widths import PerWidth, SwitchableBatchNorm2d

SLOT = {"name": "lsq", "bits": 4}


def built(**config) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    net = resnet8()
    return net, convert(net, Recipe.from_config(config), "conv1", "fc")


def weight_bits(table) -> dict[str, int]:
    return {name: 32 if slots["weight"] is None else slots["weight"].bits for name, slots in table.items()}


def test_every_layer_is_replaced_and_names_stay():
    float_net = resnet8()
    keys = set(float_net.state_dict())
    net, table = built(weight=SLOT, input=SLOT)
    layers = dict(quant_layers(net))
    assert list(table) == list(layers)
    assert all(isinstance(layer, QuantConv2d | QuantLinear) for layer in layers.values())
    assert not any(type(module) in (nn.Conv2d, nn.Linear) for module in net.modules())
    assert keys <= set(net.state_dict())
    assert all("_quantizer." in key for key in set(net.state_dict()) - keys)
    missing, unexpected = net.load_state_dict(float_net.state_dict(), strict=False)
    assert not unexpected and all("_quantizer." in key for key in missing)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in float_net.state_dict().items())


@pytest.mark.parametrize("config", [{}, {"widths": [2, 4]}])
def test_values_on_a_fixed_scale_get_an_output_scale(config):
    ewgs = {"name": "ewgs", "bits": 4}
    rules = [{"match": "@first", "output": SLOT}, {"match": "@last", "weight": {"bits": 32}, "input": {"bits": 32}}]
    net, _ = built(weight=ewgs, input=ewgs, rules=rules, **config)
    layers = dict(quant_layers(net))
    assert not isinstance(layers.pop("conv1").output_quantizer, OutputScale)
    assert layers.pop("fc").output_quantizer is None
    assert all(isinstance(layer.output_quantizer, OutputScale) for layer in layers.values())


def test_an_empty_recipe_computes_the_same():
    net, table = built()
    reference = resnet8()
    reference.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(net.eval()(x), reference.eval()(x))
    assert not list(quantizers(net)) and set(weight_bits(table).values()) == {32}


def test_later_rules_win_and_change_only_what_they_name():
    _, table = built(
        weight=SLOT,
        input=SLOT,
        rules=[
            {"match": "layer1.*", "weight": {"bits": 2}},
            {"match": r"layer1\.0\.conv2", "weight": {"bits": 3, "granularity": "channel"}},
            {"match": ".*conv2", "input": {"bits": 5}},
        ],
    )
    assert weight_bits(table)["layer1.0.conv1"] == 2
    spec = table["layer1.0.conv2"]["weight"]
    assert (spec.bits, spec.granularity, spec.name) == (3, "channel", "lsq")
    assert table["layer1.0.conv2"]["input"].bits == 5 and table["layer1.0.conv1"]["input"].bits == 4
    assert weight_bits(table)["layer2.0.conv1"] == 4


def test_first_and_last():
    ends = [{"match": end, "weight": {"bits": 8}, "input": {"bits": 8}} for end in ("@first", "@last")]
    _, table = built(weight=SLOT, input=SLOT, rules=ends)
    assert {name for name, bits in weight_bits(table).items() if bits == 8} == {"conv1", "fc"}


def test_a_rule_matches_the_whole_name():
    with pytest.raises(ValueError, match=r"quantizer.rules\[1\].match='layer1' matches no layer"):
        built(
            weight=SLOT, rules=[{"match": "conv1", "weight": {"bits": 8}}, {"match": "layer1", "weight": {"bits": 8}}]
        )


def test_32_bits_and_null_are_float_slots():
    net, table = built(
        weight=SLOT,
        input=SLOT,
        rules=[{"match": "@first", "weight": {"bits": 32}, "input": {"bits": 32}}, {"match": "@last", "input": None}],
    )
    assert table["conv1"] == {"weight": None, "input": None, "output": None}
    assert net.conv1.weight_quantizer is None and net.conv1.input_quantizer is None
    assert net.fc.input_quantizer is None and net.fc.weight_quantizer is not None


def test_table_round_trip():
    rules = [
        {"match": "@first", "weight": {"bits": 8}},
        {"match": ".*conv2", "weight": None, "output": {**SLOT, "bits": 6}},
    ]
    net, table = built(weight={**SLOT, "options": {"gradient_factor": False}}, input=SLOT, rules=rules)
    plain = table_to_plain(table)
    again, same = built(table=plain)
    assert same == table and table_to_plain(same) == plain
    assert again.state_dict().keys() == net.state_dict().keys()
    assert [(n, q.spec) for n, q in quantizers(again)] == [(n, q.spec) for n, q in quantizers(net)]
    text = format_table(table).splitlines()
    assert text[0].split() == ["layer", "weight", "input", "output"] and len(text) == 1 + len(table)
    assert text[1].split() == ["conv1", "lsq", "8", "lsq", "4", "float"]


def test_a_table_of_another_model():
    _, table = built(weight=SLOT)
    plain = table_to_plain(table)
    plain["head"] = plain.pop("fc")
    with pytest.raises(ValueError, match=r"quantizer.table does not fit this model: missing \['fc'\], .*\['head'\]"):
        built(table=plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wieght": SLOT, "input": SLOT}, "quantizer.table.fc has wieght, input: a layer has weight, input and maybe"),
        ({"weight": SLOT}, "quantizer.table.fc has weight: a layer has"),
        ({"weight": SLOT, "input": None, "output": 8}, "quantizer.table.fc.output=8: use null or settings"),
        ({"weight": {**SLOT, "bits": 9}, "input": None}, "quantizer.table.fc.weight.bits=9: use an integer"),
        (None, "quantizer.table.fc has None: a layer has"),
    ],
)
def test_a_table_with_other_slots(change, message):
    plain = table_to_plain(built(weight=SLOT)[1])
    with pytest.raises(ValueError, match=message):
        built(table={**plain, "fc": change})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight": {"name": "lsq", "bits": -1}}, "quantizer.weight.bits=-1: use an integer from 1 to 8"),
        ({"weight": {"name": "lsq", "bits": 33}}, "quantizer.weight.bits=33: use an integer from 1 to 8"),
        ({"weight": {"name": "lsq", "bits": True}}, "bits=True"),
        ({"weight": {"name": "lsq", "bits": 4.0}}, "bits=4.0"),
        ({"input": {"name": "lsqq", "bits": 4}}, "'lsqq' is unknown: use one of"),
        ({"input": {"name": "torch.nn.Linear", "bits": 4}}, "'torch.nn.Linear'"),
        ({"weight": {"name": "lsq", "bit": 4}}, "quantizer.weight.bit is unknown: use one of name, bits"),
        ({"weight": {**SLOT, "granularity": "row"}}, "granularity='row': use one of tensor, channel"),
        ({"weight": {**SLOT, "signed": "yes"}}, "signed='yes': use true, false or auto"),
        ({"weight": {**SLOT, "signed": False, "narrow": True}}, "narrow=true: unsigned codes have no negative one"),
        ({"weight": {**SLOT, "signed": False}}, "quantizer.weight.signed=false: without a zero point lsq has no codes"),
        ({"weight": {**SLOT, "init": "best"}}, "quantizer.weight.init='best': use one of lsq, minmax, mse"),
        ({"weight": {**SLOT, "options": {"speed": 3}}}, "quantizer.weight.options="),
        ({"input": {**SLOT, "granularity": "channel"}}, "quantizer.input.granularity=channel"),
        ({"weight": "lsq"}, "quantizer.weight='lsq': use null or settings"),
        ({"rules": [{"match": "@last", "input": 8}]}, r"quantizer.rules\[0\].input=8: use null or settings"),
        ({"rules": [{"match": "conv(", "weight": SLOT}]}, r"quantizer.rules\[0\].match='conv\(' is no regular"),
        ({"outputs": [{"match": "*", "quantizer": SLOT}]}, r"quantizer.outputs\[0\].match='\*' is no regular"),
        ({"replace": [{"match": "(", "module": {}}]}, r"quantizer.replace\[0\].match='\(' is no regular"),
        ({"wieght": SLOT}, "quantizer.wieght is unknown: use one of weight, input"),
        ({"rules": [{"match": "fc", "bits": 8}]}, r"quantizer.rules\[0\]=.*a rule has 'match'"),
        ({"rules": [{"weight": SLOT}]}, r"quantizer.rules\[0\]=.*a rule has 'match'"),
        ({"outputs": [{"match": "relu"}]}, r"quantizer.outputs\[0\]=.*exactly the keys"),
        (
            {"outputs": [{"match": "conv1", "quantizer": SLOT}]},
            r"quantizer.outputs\[0\].match='conv1' matches no activ",
        ),
        ({"outputs": [{"match": "relu", "quantizer": {"bits": 32}}]}, r"quantizer.outputs\[0\].quantizer: name a"),
        ({"outputs": [{"match": "relu", "quantizer": 8}]}, r"quantizer.outputs\[0\].quantizer=8: use null or settings"),
        ({"replace": [{"match": "relu", "module": "abc"}]}, r"quantizer.replace\[0\].module='abc': use the class"),
        ({"rules": [{"match": "fc", "weight": {"bits": 9}}]}, r"quantizer.rules\[0\].weight.bits=9: use an integer"),
        ({"weight": {**SLOT, "name": None}}, "quantizer.weight.name=None: use the name of a quantizer"),
        ({"weight": {**SLOT, "options": 3}}, "quantizer.weight.options=3: use null or arguments"),
        ({"table": 3}, "quantizer.table=3: use the table.yaml or allocation.yaml"),
        ({"weight": SLOT, "widths": ["a", 4]}, r"quantizer.widths=\['a', 4\]: use a list of bits"),
        ({"weight": {"name": "lsq"}, "widths": [2, 4]}, r"quantizer.widths=\[2, 4\]: quantizer.bits must be one"),
        ({"weight": SLOT, "widths": [2, 8]}, r"quantizer.widths=\[2, 8\]: quantizer.bits must be one"),
    ],
)
def test_bad_recipes(config, message):
    with pytest.raises(ValueError, match=message):
        built(**config)


def test_outputs():
    net, _ = built(outputs=[{"match": r"layer\d\.0\.add", "quantizer": {**SLOT, "bits": 6}}])
    assert isinstance(net.layer1[0].add, QuantOutput) and isinstance(net.layer3[0].add, QuantOutput)
    assert [name for name, _ in quantizers(net)] == [f"layer{stage}.0.add.output_quantizer" for stage in (1, 2, 3)]
    assert net.layer1[0].add.output_quantizer.role == "output"
    assert net.eval()(torch.randn(1, 3, 16, 16)).shape == (1, 10)


def test_replace():
    torch.manual_seed(0)
    net = resnet8()
    recipe = Recipe.from_config(
        {
            "replace": [{"match": ".*relu.*", "module": {"_target_": "torch.nn.Hardtanh"}}],
            "outputs": [{"match": "relu", "quantizer": SLOT}],
        }
    )
    asked = []

    def build(target):
        asked.append(target)
        return nn.Hardtanh(0.0, 1.0)

    convert(net, recipe, "conv1", "fc", build_module=build)
    assert not any(isinstance(module, nn.ReLU) for module in net.modules())
    assert asked and all(target == {"_target_": "torch.nn.Hardtanh"} for target in asked)
    assert isinstance(net.relu, QuantOutput) and isinstance(net.relu.module, nn.Hardtanh)
    with pytest.raises(ValueError, match=r"quantizer.replace\[0\].match='conv1' matches no activation"):
        convert(resnet8(), Recipe(replace=[("conv1", {})]), "conv1", "fc", build_module=build)


def test_widths():
    net, _ = built(weight=SLOT, input=SLOT, widths=[2, 4], rules=[{"match": "@first", "weight": {"bits": 8}}])
    assert isinstance(net.fc.weight_quantizer, PerWidth) and isinstance(net.fc.input_quantizer, PerWidth)
    assert not isinstance(net.conv1.weight_quantizer, PerWidth) and net.conv1.weight_quantizer.spec.bits == 8
    assert not any(type(module) is nn.BatchNorm2d for name, module in net.named_modules() if "by_width" not in name)
    assert isinstance(net.bn1, SwitchableBatchNorm2d) and net.bn1.selected == "4"
    assert len(list(quantizers(net))) == 2 * len(list(quant_layers(net)))


class Owning(LSQ):
    """A quantizer that holds the parameters of the weight itself."""

    owns_weight = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.plane = nn.Parameter(torch.zeros(self.shape))


def test_a_quantizer_that_owns_the_weight_freezes_it():
    net = nn.Sequential(nn.Linear(3, 2))
    convert(net, Recipe(weight={"name": f"{Owning.__module__}.Owning", "bits": 4}), "0", "0")
    assert not net[0].weight.requires_grad and net[0].weight_quantizer.plane.requires_grad


def test_specifications_are_plain_data():
    assert QuantizerSpec(bits=4).with_bits(2) == QuantizerSpec(bits=2)
    with pytest.raises(ValueError, match="quantizer.weight.bits=1: lsq of a weight needs at least 2"):
        built(weight={"name": "lsq", "bits": 1})
