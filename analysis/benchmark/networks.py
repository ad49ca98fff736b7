"""Training steps of one network as float and as quantized network, in every way that they can be run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from analysis.train_config import train_config
from research.config import build_module
from research.learning.execution import Execution, execute_as
from research.learning.module import QuantModule
from research.learning.recompute import Recorder, recomputed_activations
from research.quant.calibrate import calibrate
from research.quant.passes import use_kernels
from research.runs.memory import keep_freed_memory

REFERENCE = "reference"
"""Beside the executions of a run: eager in the detach form, as a network without a fast path would run."""


@dataclass(frozen=True)
class Way:
    """One way to run one network.

    Attributes:
        bits: of weights and inputs, the first and the last layer 8; 32 is the float network.
        execution: ``none``, ``quantizers``, ``network`` or ``reference``.
        bf16: under autocast.
        channels_last: memory format.
        recompute: activations made again in the backward pass.
        model: of conf/model.
    """

    bits: int = 4
    execution: Execution | str = "none"
    bf16: bool = False
    channels_last: bool = True
    recompute: bool = False
    model: str = "resnet20"

    @property
    def name(self) -> str:
        """In words, for tables."""
        ways = {"none": "eager", "quantizers": "eager, quantizers compiled", "network": "compiled", REFERENCE: "eager"}
        parts = ["float" if self.bits == 32 else f"W{self.bits}A{self.bits} LSQ", ways[self.execution]]
        parts += ["detach form"] if self.execution == REFERENCE else []
        parts += [text for text, on in (("bf16", self.bf16), ("recomputed", self.recompute)) if on]
        return ", ".join(parts)


@dataclass
class Step:
    """A network, its optimizer and one batch; calling it is one training step."""

    way: Way
    module: QuantModule
    images: Tensor
    labels: Tensor
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.module.net.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        """The forward pass."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.way.bf16):
            return torch.nn.functional.cross_entropy(self.module.net(self.images), self.labels)

    def forward(self) -> tuple[Tensor, Recorder | None]:
        """The forward pass as training runs it, and what recomputation kept, if it is on."""
        keeping: AbstractContextManager[Any] = (
            recomputed_activations(self.module.net) if self.way.recompute else nullcontext()
        )
        with keeping as recorder:
            return self.loss(), recorder

    def __call__(self) -> None:
        """Forward, backward and optimizer step."""
        loss, _ = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def config_of(way: Way) -> dict[str, Any]:
    """The plain training config of a way's network."""
    overrides = [f"model={way.model}", "data=synthetic", f"channels_last={str(way.channels_last).lower()}"]
    overrides += ["quantizer=float"] if way.bits == 32 else ["quantizer=lsq", f"quantizer.bits={way.bits}"]
    return train_config(overrides)


def build_step(way: Way, batch_size: int, device: str = "cpu") -> Step:
    """A step on one batch of synthetic 32x32 images; the same weights and the same batch for every way."""
    keep_freed_memory()  # as every training
    torch.manual_seed(0)
    module = build_module(config_of(way)).to(device)
    module.train()
    images = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    if way.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=device) % 10
    calibrate(module.net, [images])
    if way.execution == REFERENCE:
        use_kernels(module.net, None)
    else:
        execute_as(module.net, way.execution, ())  # type: ignore[arg-type]
    return Step(way, module, images, labels)
