"""Taps: outputs of inner modules, collected by the host for mechanics that declare them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn


class Taps:
    """Forward hooks on the modules that glob ``patterns`` name; ``collected`` holds the latest outputs by name.

    Raises:
        ValueError: a pattern that names no module.
    """

    def __init__(self, net: nn.Module, patterns: Iterable[str]) -> None:
        self.collected: dict[str, Tensor] = {}
        names: list[str] = []
        for pattern in patterns:
            matched = [name for name, _ in net.named_modules() if name and fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(f"tap {pattern!r} names no module of the network: see print(net) for names")
            names += [name for name in matched if name not in names]
        self.handles = [net.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.collected[name] = output

        return hook

    def take(self) -> dict[str, Tensor]:
        """What has been collected since the last call."""
        taken = dict(self.collected)
        self.collected.clear()
        return taken

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
