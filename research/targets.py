"""Objects from config: `{_target_: "package.Class", **arguments}`, with an allow-list for configs of run folders."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.loggers import Logger

from research.arguments import check_arguments

ALLOWED_PACKAGES = ("torch", "lightning", "torchmetrics", "research", "callbacks")
"""Top-level packages that a config of a run folder may name."""

ALLOWED_BASES = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torchmetrics.Metric,
    pl.Callback,
    pl.LightningDataModule,
    Logger,
)
"""A class that such a config names derives from one of these ..."""

ALLOWED_MODULES = ("research.models", "research.learning.tasks", "callbacks")
"""... or, as a function may too, is defined in one of these."""


def resolve_target(config: Any, *arguments: Any, trusted: bool = False, key: str = "config") -> Any:
    """Build the object that a plain config describes; nested mappings and lists with `_target_` are built first.

    `arguments` go to the outermost target, before its keywords (the parameters of an optimizer). `trusted` is for what
    the user typed; a config read from a run folder may only name the allowed classes and functions. Raises ValueError
    naming `key` for a target that is unknown or refused, and for arguments that it does not take.
    """
    if isinstance(config, list):
        return [resolve_target(item, trusted=trusted, key=f"{key}[{i}]") for i, item in enumerate(config)]
    if not isinstance(config, Mapping):
        return config
    keywords = {
        name: resolve_target(value, trusted=trusted, key=f"{key}.{name}")
        for name, value in config.items()
        if name != "_target_"
    }
    if "_target_" not in config:
        return keywords
    target = find_target(config["_target_"], trusted=trusted, key=key)
    check_arguments(target, keywords, *arguments, key=key, name=config["_target_"])
    try:
        return target(*arguments, **keywords)
    except ValueError as error:
        if str(error).startswith(key):
            raise
        raise ValueError(f"{key}: {error}") from error


def find_target(path: str, trusted: bool = False, key: str = "config") -> Any:
    """The class or function at a dotted path, not called. Raises ValueError where it is unknown or refused."""
    parts = path.split(".") if isinstance(path, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{key}._target_={path!r} is no dotted path; use package.module.Name")
    if not trusted and (parts[0] not in ALLOWED_PACKAGES or any(part.startswith("_") for part in parts)):
        raise ValueError(_refusal(path, key))
    found = _lookup(parts, path, key)
    if not trusted and not _allowed(found):
        raise ValueError(_refusal(path, key))
    if not callable(found):
        raise ValueError(f"{key}._target_={path} is no class or function")
    return found


def _lookup(parts: list[str], path: str, key: str) -> Any:
    """Import the longest prefix that is a module, then walk its attributes."""
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                continue
            raise ValueError(f"{key}._target_={path} needs the package {error.name}, which is not installed") from error
        for part in parts[length:]:
            if not hasattr(found, part):
                raise ValueError(f"{key}._target_={path}: {name} has no {part}")
            found = getattr(found, part)
        return found
    raise ValueError(f"{key}._target_={path}: there is no package {parts[0]}")


def _allowed(found: Any) -> bool:
    """Whether a config of a run folder may call this: judged by what it is, since a path may pass through anything."""
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return False
    home = found.__module__
    if any(home == module or home.startswith(module + ".") for module in ALLOWED_MODULES):
        return True
    return inspect.isclass(found) and issubclass(found, ALLOWED_BASES) and home.split(".")[0] in ALLOWED_PACKAGES


def _refusal(path: str, key: str) -> str:
    return (
        f"{key}._target_={path} is refused in a config of a run folder; allowed are modules, optimizers, schedulers, "
        f"metrics, callbacks, loggers and data modules of {', '.join(ALLOWED_PACKAGES)}"
    )
