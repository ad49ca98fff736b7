from typing import Any

import pytest
import torch

from research.targets import find_target, resolve_target

REFUSED = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "torch.hub.load",
    "torch.load",
    "torch.os.system",
    "torch.nn.modules.module.functools.partial",
    "torch.nn.Module.load_state_dict",
    "torch.utils.data.DataLoader",
    "torch.tensor",
    "torch.nn.functional.relu",
    "torch.multiprocessing.Process",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.loggers.wandb.os.remove",
    "research.runs.files.atomic_write_bytes",
    "research.runs.folder.RunFolder.existing",
    "research.runs.environment.subprocess.run",
    "torch._C._jit_init",
    "torch.utils.collect_env.main",
]


@pytest.mark.parametrize("target", REFUSED)
def test_refused_from_a_run_folder_by_name_and_key(target: str) -> None:
    with pytest.raises(ValueError, match=rf"^model._target_={target} is refused in a config of a run folder"):
        resolve_target({"_target_": target}, key="model")


def test_a_refused_target_deep_inside_is_found_before_anything_is_built() -> None:
    config = {"_target_": "torch.nn.Sequential", "a": [{"_target_": "os.system", "command": "true"}]}
    with pytest.raises(ValueError, match=r"^model\.a\[0\]\._target_=os.system is refused"):
        resolve_target(config, key="model")


def test_refused_packages_are_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr("research.targets.importlib.import_module", fail)
    with pytest.raises(ValueError, match="refused"):
        find_target("antigravity.Class")


@pytest.mark.parametrize(
    "target",
    ["torch.nn.ReLU", "torch.optim.lr_scheduler.StepLR", "torchmetrics.MeanMetric",
     "lightning.pytorch.callbacks.Timer", "lightning.pytorch.loggers.CSVLogger",
     "lightning.pytorch.LightningDataModule"],
)  # fmt: skip
def test_allowed_from_a_run_folder(target: str) -> None:
    assert find_target(target).__name__ == target.rpartition(".")[2]


def test_functions_of_the_house_are_allowed_by_where_they_are_defined(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import callbacks

    (tmp_path / "probe_mechanic.py").write_text(
        "from os import system\nfrom subprocess import Popen\ndef schedule(start):\n    return start + 1\n"
    )
    monkeypatch.setattr(callbacks, "__path__", [*callbacks.__path__, str(tmp_path)])
    assert resolve_target({"_target_": "callbacks.probe_mechanic.schedule", "start": 1}) == 2
    for imported in ("system", "Popen"):
        with pytest.raises(ValueError, match="refused"):
            find_target(f"callbacks.probe_mechanic.{imported}")


def test_nested_targets_positional_arguments_and_plain_values() -> None:
    network = resolve_target({"_target_": "torch.nn.TransformerEncoderLayer", "d_model": 4, "nhead": 2,
                              "dim_feedforward": 8, "activation": {"_target_": "torch.nn.GELU"}})  # fmt: skip
    assert isinstance(network.activation, torch.nn.GELU)
    optimizer = resolve_target({"_target_": "torch.optim.SGD", "lr": 0.5}, network.parameters(), key="optimizer")
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert resolve_target({"a": [1, {"b": None}]}) == {"a": [1, {"b": None}]}


def test_the_users_own_config_may_name_anything() -> None:
    assert resolve_target({"_target_": "math.gcd"}, 4, 6, trusted=True) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "torch.nn.Nothing"}, "model._target_=torch.nn.Nothing: torch.nn has no Nothing"),
        ({"_target_": "nowhere.Thing"}, "model._target_=nowhere.Thing: there is no package nowhere"),
        ({"_target_": "Thing"}, "model._target_='Thing' is no dotted path"),
        ({"_target_": "torch.nn.Linear", "in_features": 1}, "torch.nn.Linear missing a required argument: 'out_feat"),
        ({"_target_": "torch.nn.ReLU", "bits": 4}, "torch.nn.ReLU got an unexpected keyword argument 'bits'; it takes"),
        ({"_target_": "math.pi"}, "model._target_=math.pi is no class or function"),
    ],
)
def test_mistakes_are_one_line_with_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_target(config, trusted=True, key="model")
    assert message in str(caught.value) and "model" in str(caught.value) and "\n" not in str(caught.value)
