"""The keys of a training config: each mistake is one line with its key, and the shipped configs have none."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from research.arguments import check_arguments
from research.config import plain
from research.models import resnet8
from research.quant.recipe import Recipe, make_spec
from research.settings import check_training, unused_beside_table

CONF = Path(__file__).resolve().parent.parent / "conf"


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose("train", list(overrides)))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return composed("callbacks=[sam,distillation]")


MISTAKES: dict[str, tuple[Any, str]] = {
    "foo": (1, "foo: training got an unexpected keyword argument 'foo'; it takes name, seed"),
    "seed": ("abc", "seed='abc': use an integer"),
    "init_from": (3, "init_from=3: use a text or null"),
    "channels_last": ("no", "channels_last='no': use true or false"),
    "optimizer": (None, "optimizer=None: use a mapping"),
    "optimizer.lr": ("fast", "optimizer.lr='fast': use a number"),
    "optimizer.nesterov": (1, "optimizer.nesterov=1: use true or false"),
    "optimizer.norm.lrr": (1, "optimizer.norm.lrr: torch.optim.SGD got an unexpected keyword argument 'lrr'"),
    "optimizer.quantizer.lr_factor": ("x", "optimizer.quantizer.lr_factor='x': use a number"),
    "scheduler.warmup": ("long", "scheduler.warmup='long': use a number"),
    "scheduler.foo": (1, "scheduler.foo: scheduler got an unexpected keyword argument 'foo'; it takes name"),
    "checkpoint.foo": (1, "checkpoint.foo: checkpoint got an unexpected keyword argument 'foo'; it takes every_n"),
    "checkpoint.mode": ("up", "checkpoint.mode='up': use min or max"),
    "calibration.batches": (2.5, "calibration.batches=2.5: use an integer"),
    "finalise.weights": ("foo", "finalise.weights='foo': use last or best"),
    "deploy.onnx": ("yes", "deploy.onnx='yes': use true or false"),
    "paths.runs": (None, "paths.runs=None: use a text"),
    "logger.wandb.foo": (1, "logger.wandb.foo: logger.wandb got an unexpected keyword argument 'foo'; it takes mode"),
    "trainer.foo": (1, "trainer.foo: trainer got an unexpected keyword argument 'foo'; it takes accelerator"),
    "trainer.callbacks": ([], "trainer.callbacks cannot be set"),
    "trainer.max_epochs": ("ten", "trainer.max_epochs='ten': use an integer or null"),
    "callbacks.foo": (1, "callbacks.foo=1: use the settings of a mechanic"),
}  # fmt: skip


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config with other values at dotted keys."""
    result = copy.deepcopy(config)
    for key, value in changes.items():
        *path, last = key.split(".")
        section = result
        for name in path:
            section = section[name]
        section[last] = value
    return result


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_is_named(key: str, config: dict[str, Any]) -> None:
    value, message = MISTAKES[key]
    with pytest.raises(ValueError) as caught:
        check_training(changed(config, {key: value}))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


BEST = {"finalise.weights": "best", "checkpoint.monitor": "val/accuracy"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed=-1: use an integer from 0 to 4294967295"),
        ({"calibration.batch_size": 0}, "calibration={batches: 2, batch_size: 0}: use 1 or more of both"),
        ({"checkpoint.every_n_steps": 0}, "checkpoint.every_n_steps=0: use a positive number, or null"),
        ({"checkpoint.monitor": "val/loss"}, "checkpoint.mode=max would keep the worst val/loss; use checkpoint.mode="),
        (
            {"checkpoint.monitor": "val/accuracy", "checkpoint.mode": "min"},
            "checkpoint.mode=min would keep the worst val/accuracy; use checkpoint.mode=max",
        ),
        ({**BEST, "trainer.limit_val_batches": 0}, "finalise.weights=best: trainer.limit_val_batches=0 validates noth"),
        (
            {**BEST, "trainer.max_epochs": 0},
            "finalise.weights=best: with trainer.check_val_every_n_epoch=1 nothing is validated in 0 epochs; use final",
        ),
        ({"optimizer.lr": -1}, "optimizer: Invalid learning rate: -1"),
        ({"optimizer.norm": 3}, "optimizer.norm=3: use a mapping"),
        ({"scheduler.final": -1}, "scheduler.final=-1: use 0 or more"),
        ({"scheduler.gamma": 0.5}, "scheduler.gamma: the cosine schedule has none; leave it out, or choose another"),
        ({"scheduler.name": "step"}, "scheduler.final: the step schedule has none"),
        ({"trainer.log_every_n_steps": 0}, "trainer.log_every_n_steps=0: use 1 or more"),
        ({"trainer.val_check_interval": 0}, "trainer.val_check_interval=0: use a part of an epoch such as 0.5"),
        ({"trainer.gradient_clip_val": -1}, "trainer.gradient_clip_val=-1: use 0 or more, or null"),
    ],
)
def test_a_value_that_cannot_be_meant(changes: dict[str, Any], message: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        check_training(changed(config, changes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_can_be_meant_passes(config: dict[str, Any]) -> None:
    check_training(changed(config, {**BEST, "trainer.gradient_clip_val": 1}))
    check_training(changed(config, {"checkpoint.monitor": "val/loss", "checkpoint.mode": "min"}))
    check_training(changed(config, {"checkpoint.monitor": "probe/trace", "checkpoint.mode": "min"}))


def test_a_key_that_was_taken_out_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^training: training missing a required argument: 'seed'; it takes"):
        check_training({key: value for key, value in config.items() if key != "seed"})


@pytest.mark.parametrize("override", ["optimizer=adamw", "scheduler=step", "data=cifar10", "debug=short"])
def test_shipped_configs_pass(override: str, config: dict[str, Any]) -> None:
    check_training(config)
    check_training(composed(override))


def test_options_of_a_typed_dictionary_are_arguments_like_others() -> None:
    check_arguments(resnet8, {"num_classes": 10, "width": 4, "shortcut": "B"}, key="model")
    with pytest.raises(ValueError, match=r"^model\.width='wide': use an integer$"):
        check_arguments(resnet8, {"width": "wide"}, key="model")
    with pytest.raises(ValueError, match=r"^model\.shortcut='C': use A or B$"):
        check_arguments(resnet8, {"shortcut": "C"}, key="model")
    with pytest.raises(ValueError, match=r"^model\.foo: resnet8 got an unexpected keyword argument 'foo'; .*width"):
        check_arguments(resnet8, {"foo": 1}, key="model")
    with pytest.raises(ValueError, match=r"^model\.width=None: use an integer$"):
        check_arguments(resnet8, {"width": None}, key="model")


def test_elements_of_lists_have_types_too() -> None:
    def measure(seeds: int | list[int], cuts: Sequence[float] = (), pairs: tuple[str, ...] | None = None) -> None: ...

    check_arguments(measure, {"seeds": [0, 1], "cuts": [1, 0.5], "pairs": []}, key="")
    with pytest.raises(ValueError, match=r"^seeds=\[0, 'a'\]: use an integer or a list, each an integer$"):
        check_arguments(measure, {"seeds": [0, "a"]}, key="")
    with pytest.raises(ValueError, match=r"^cuts=\[None\]: use a list, each a number$"):
        check_arguments(measure, {"seeds": 0, "cuts": [None]}, key="")
    with pytest.raises(ValueError, match=r"^pairs=\[3\]: use a list, each a text or null$"):
        check_arguments(measure, {"seeds": 0, "pairs": [3]}, key="")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"rules": 3}, r"quantizer\.rules=3: use a list of entries"),
        ({"rules": [3]}, r"quantizer\.rules=\[3\]: use a list of entries"),
        ({"rules": [{"match": "(", "weight": None}]}, r"quantizer\.rules\[0\]\.match='\(' is no regular expression"),
        ({"widths": 3}, r"quantizer\.widths=3: use a list of bits"),
    ],
)
def test_the_form_of_a_recipe(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Recipe.from_config(part)


def test_a_slot_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"^quantizer\.weight\.granularity='row': use one of tensor, channel$"):
        make_spec({"granularity": "row"}, "quantizer.weight")


def test_what_a_table_stands_in_place_of(config: dict[str, Any]) -> None:
    replaced = ["quantizer.bits=3", "+quantizer.weight.options.a=1", "~quantizer.rules"]
    kept = ["quantizer=lsq", "quantizer.table=a.yaml", "quantizer.replace=[]", "quantizer.fold_bn=2", "optimizer.lr=1"]
    with_table = {**config, "quantizer": {**config["quantizer"], "table": {}}}
    assert unused_beside_table(with_table, [*kept, *replaced]) == replaced
    assert unused_beside_table(config, [*kept, *replaced]) == []
