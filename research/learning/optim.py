"""Optimizers: parameter groups, several optimizers as one, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from research.learning.mechanic import Mechanic, ParameterGroup
from research.quant.output_scale import OutputScale
from research.quant.quantizers import Quantizer
from research.targets import resolve_target

Group = dict[str, Any]


class Composite(Optimizer):
    """Several optimizers as one: Lightning's automatic optimization, schedules and clipping see a single optimizer.

    Args:
        optimizers: optimizers over disjoint parameters; ``param_groups`` are theirs, one after another.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate ``closure`` once, then step every optimizer."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of every optimizer, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every optimizer."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()


def default_groups(net: nn.Module, config: Mapping[str, Any]) -> list[Group]:
    """Parameter groups of a network: weights; norms and biases; quantizer parameters.

    Args:
        net: a converted network.
        config: ``optimizer`` settings: ``lr``, ``weight_decay`` for weights; ``norm`` and ``quantizer`` hold what
            differs for the other two, options or ``lr_factor``, a multiple of ``lr`` (norms and biases are not decayed
            unless ``norm.weight_decay`` says so; a quantizer's own declaration, such as LSQ's undecayed scale, wins
            over ``quantizer.weight_decay``).

    Returns:
        Groups with ``name``, ``params`` and options; frozen parameters are left out, empty groups too.
    """
    owned = _quantizer_options(net)
    weights: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    quantizers: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    for parameter in net.parameters():
        if not parameter.requires_grad:
            continue
        if parameter in owned:
            quantizers.setdefault(tuple(sorted(owned[parameter].items())), []).append(parameter)
        elif parameter.ndim > 1:
            weights.append(parameter)
        else:
            norms.append(parameter)
    groups: list[Group] = [
        {"name": "weight", "params": weights},
        {"name": "norm", "params": norms, "weight_decay": 0.0, **(config.get("norm") or {})},
    ]
    for options, parameters in quantizers.items():
        groups.append({"name": "quantizer", "params": parameters, **(config.get("quantizer") or {}), **dict(options)})
    return [_with_lr(group, config) for group in groups if group["params"]]


def _with_lr(group: Group, config: Mapping[str, Any]) -> Group:
    if "lr_factor" in group:
        group["lr"] = config["lr"] * group.pop("lr_factor")
    return group


def _quantizer_options(net: nn.Module) -> dict[nn.Parameter, dict[str, float]]:
    options: dict[nn.Parameter, dict[str, float]] = {}
    for module in net.modules():
        if isinstance(module, OutputScale):
            options[module.output_scale] = {}
        if isinstance(module, Quantizer):
            for name, parameter in module.named_parameters(recurse=False):
                options[parameter] = module.parameter_options.get(name, {})
    return options


def build_optimizer(net: nn.Module, config: Mapping[str, Any], mechanics: Sequence[Mechanic], module: Any) -> Optimizer:
    """The optimizer of a run: default groups less what mechanics claim, plus the mechanics' groups.

    Args:
        net: a converted network.
        config: ``{_target_: ..., lr: ..., weight_decay: ..., norm: {...}, quantizer: {...}}``.
        mechanics: all mechanics of the run.
        module: the host, handed to ``parameter_groups``.

    Raises:
        ValueError: two mechanics list one parameter.
    """
    settings = {key: value for key, value in config.items() if key not in ("norm", "quantizer")}
    claimed: dict[nn.Parameter, str] = {}
    own: list[tuple[str, ParameterGroup]] = []
    for mechanic in mechanics:
        for group in mechanic.parameter_groups(module):
            for parameter in group.parameters:
                if parameter in claimed:
                    raise ValueError(
                        f"callbacks.{mechanic.slug} and callbacks.{claimed[parameter]} both want to optimise one "
                        f"parameter of shape {tuple(parameter.shape)}: drop one of them"
                    )
                claimed[parameter] = mechanic.slug
            own.append((mechanic.slug, group))
    groups = default_groups(net, config)
    for default in groups:
        default["params"] = [parameter for parameter in default["params"] if parameter not in claimed]
    shared = [group for group in groups if group["params"]]
    shared += [_with_lr(_named(slug, group), config) for slug, group in own if group.optimizer is None]
    optimizers: list[Optimizer] = []
    if shared:
        optimizers.append(resolve_target(settings, shared, trusted=True, key="optimizer"))
    for slug, group in own:
        if group.optimizer is not None:
            optimizers.append(resolve_target(group.optimizer, [_named(slug, group)], trusted=True, key=slug))
    return optimizers[0] if len(optimizers) == 1 else Composite(optimizers)


def _named(slug: str, group: ParameterGroup) -> Group:
    return {"name": slug, "params": list(group.parameters), **group.options}


class Schedule:
    """Learning-rate factor by optimizer step, 1 at the peak.

    Args:
        name: ``cosine`` (to ``final``, without restart), ``linear`` (to ``final``), ``step`` (times ``gamma`` at every
            milestone) or ``constant``.
        total: optimizer steps of the whole run.
        warmup: fraction of the run over which the factor first rises linearly to 1.
        final: factor at the end.
        milestones: fractions of the run.
        gamma: factor of a milestone.
    """

    OPTIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "cosine": ("final",), "linear": ("final",), "step": ("milestones", "gamma"), "constant": (),
    }  # fmt: skip
    """The schedules, and what each reads beside ``warmup``."""

    def __init__(
        self,
        name: str,
        total: int,
        warmup: float = 0.0,
        final: float = 0.0,
        milestones: Sequence[float] = (0.5, 0.75),
        gamma: float = 0.1,
    ) -> None:
        if name not in self.OPTIONS:
            raise ValueError(f"scheduler.name={name!r}: use one of {', '.join(self.OPTIONS)}")
        if not 0.0 <= warmup < 1.0:
            raise ValueError(f"scheduler.warmup={warmup}: use a fraction of the run from 0 to below 1")
        if not all(0 <= fraction <= 1 for fraction in milestones):
            raise ValueError(f"scheduler.milestones={list(milestones)}: use fractions of the run, from 0 to 1")
        if final < 0:
            raise ValueError(f"scheduler.final={final}: use 0 or more")
        self.name, self.total, self.final, self.gamma = name, total, final, gamma
        self.warmup_steps = int(warmup * total)
        self.milestones = [int(fraction * total) for fraction in milestones]

    def require_used(self, given: Iterable[str]) -> None:
        """Raise ValueError where one of the ``given`` options is of another schedule."""
        for option in given:
            if option not in ("name", "warmup", *self.OPTIONS[self.name]):
                raise ValueError(
                    f"scheduler.{option}: the {self.name} schedule has none; leave it out, or choose another schedule "
                    "with scheduler=NAME, which brings its own options"
                )

    def __call__(self, step: int) -> float:
        """The factor at optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total - self.warmup_steps))
        if self.name == "cosine":
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.name == "linear":
            return 1 + (self.final - 1) * progress
        if self.name == "step":
            return float(self.gamma ** sum(step >= milestone for milestone in self.milestones))
        return 1.0


def build_scheduler(optimizer: Optimizer, config: Mapping[str, Any], total: int) -> LambdaLR:
    """A per-step schedule for all groups of ``optimizer``.

    Raises:
        ValueError: unknown schedule or setting.
    """
    try:
        schedule = Schedule(total=total, **config)
    except TypeError as error:
        raise ValueError(f"scheduler={dict(config)}: {error}") from None
    return LambdaLR(optimizer, schedule)
