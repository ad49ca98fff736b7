"""Every parameter of a converted network has one kind, by what it is for."""

from torch import nn

from research.models import resnet8
from research.quant.convert import convert
from research.quant.kinds import parameter_kinds
from research.quant.recipe import Recipe

LSQ = {slot: {"name": "lsq", "bits": 4} for slot in ("weight", "input", "output")}


def test_kinds_follow_the_place_of_a_parameter() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(4, 2))
    convert(net, Recipe.from_config(LSQ), "0", "4")
    assert parameter_kinds(net) == {
        "0.weight": "weight",
        "0.bias": "bias",
        "0.input_quantizer.raw_scale": "input_range",
        "0.weight_quantizer.raw_scale": "weight_range",
        "0.output_quantizer.raw_scale": "input_range",
        "1.weight": "norm_weight",
        "1.bias": "norm_bias",
        "2.weight": "other",
        "4.weight": "weight",
        "4.bias": "bias",
        "4.input_quantizer.raw_scale": "input_range",
        "4.weight_quantizer.raw_scale": "weight_range",
        "4.output_quantizer.raw_scale": "input_range",
    }


def test_ranges_per_width_and_folded_norms_keep_their_kinds() -> None:
    for more in ({"widths": [2, 4]}, {"fold_bn": 3}):
        net = resnet8(width=4)
        structure = net.structure()
        recipe = Recipe.from_config({**LSQ, "output": None, **more})
        convert(net, recipe, structure.first, structure.last, conv_bn=structure.conv_bn)
        kinds = parameter_kinds(net)
        assert kinds.keys() == {name for name, _ in net.named_parameters()}
        assert set(kinds.values()) == {"weight", "bias", "norm_weight", "norm_bias", "weight_range", "input_range"}
