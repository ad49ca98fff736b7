"""One process of a two-process fit with every registered mechanic: ``python -m tests.conformance.ddp FOLDER``.

The launcher sets what Lightning reads of the environment. Each rank writes its final state and the decisions that its
mechanics drew; the one process that the test compares with calls ``train`` itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from research.learning.mechanic import Mechanic
from research.learning.module import QuantModule
from tests.conformance.registry import MECHANICS
from tests.learning.tiny import fit, make_module, tiny_net

MODEL = tiny_net(batchnorm=False)
STEPS = 4


class Drawing(Mechanic):
    """Keeps a number per step in a weight-shaped buffer, as a mechanic with decisions would."""

    slug = "drawing"

    def attach(self, module: QuantModule) -> None:
        state = torch.nn.Module()
        state.register_buffer("drawn", torch.zeros(8))
        module.mechanics[self.slug] = state

    def after_step(self, module: QuantModule) -> None:
        step = module.progress.step
        module.mechanics[self.slug].drawn[step - 1] = torch.rand((), generator=self.rng(step))  # type: ignore[index, operator]


def train(name: str, checkpoint: Path, **trainer: Any) -> dict[str, Tensor]:
    """Parameters and buffers after a short fit with the case ``name``, and with a mechanic that draws decisions."""
    case = MECHANICS[name]
    mechanics = {**case.mechanics, "drawing": {"_target_": "tests.conformance.ddp.Drawing"}}
    module = make_module(mechanics, model=MODEL, quantizer=case.quantizer, checkpoint=checkpoint)
    trainer |= {"max_epochs": case.epochs, "limit_train_batches": STEPS // case.epochs, "limit_val_batches": 0}
    fit(module, precision="64-true", **trainer)  # what differs is no rounding
    return {name: tensor for name, tensor in module.state_dict().items() if "train_" not in name and "val_" not in name}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
    for name in MECHANICS:
        print(name, file=sys.stderr, flush=True)  # the last one stands above a traceback
        torch.save(train(name, folder / "float.safetensors", devices=2, strategy="ddp"), folder / f"{name}.{rank}.pt")
