"""Every file of conf/model builds its network from plain values."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from research.models import FloatModel

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
NAMES = [
    "mobilenet_v2",
    "resnet18",
    "resnet20",
    "resnet20_binary",
    "resnet32",
    "resnet56",
    "resnet8",
    "vgg16_bn",
    "vgg_small",
]


def test_all_networks_have_a_config() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name: str) -> None:
    data = {"num_classes": 7, "in_channels": 1, "image_size": 28}
    config = OmegaConf.create({"data": data, "model": OmegaConf.load(CONF / f"{name}.yaml")})
    plain = OmegaConf.to_container(config, resolve=True)["model"]
    assert plain["_target_"] == f"research.models.{name.removesuffix('_binary')}"
    model = instantiate(plain)
    assert isinstance(model, FloatModel)
    structure = model.structure()
    assert model.get_submodule(structure.last).out_features == 7
    assert model.get_submodule(structure.first).in_channels == 1
