"""A mechanic with every verb, a private optimizer on search data included."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from research.learning.evaluation import Evaluation, Objective
from research.learning.mechanic import Mechanic, ParameterGroup
from research.learning.module import QuantModule


class State(nn.Module):
    """What the mechanic keeps: a learnable of the run, a learnable of its own, and a record of decisions."""

    drawn: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.tensor(0.5))
        self.private = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("drawn", torch.zeros(8))
        self.register_buffer("seen", torch.tensor(0))


class EveryVerb(Mechanic):
    slug = "every_verb"
    taps = ("conv1",)

    def attach(self, module: QuantModule) -> None:
        self.state = State()
        module.mechanics[self.slug] = self.state
        self.adam = torch.optim.Adam([self.state.private], lr=0.1)
        self.steps = 0

    def prepare(self, module: QuantModule, loader: Any) -> None:
        self.state.seen += sum(len(labels) for _, labels in loader)

    def parameter_groups(self, module: QuantModule) -> list[ParameterGroup]:
        return [ParameterGroup([self.state.learned], optimizer={"_target_": "torch.optim.Adam", "lr": 0.1})]

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        return {"every_verb": self.state.learned * evaluation.taps["conv1"].square().mean()}

    def wrap_objective(self, objective: Objective) -> Objective:
        def weighted(batch: Any, state: Any = None) -> Evaluation:
            evaluation = objective(batch, state)
            return replace(evaluation, loss=evaluation.loss * (1 + self.state.private.detach()))

        return weighted

    def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
        """A step of the private optimizer, on the search part."""
        batches = list(trainer.datamodule.search_dataloader())
        images, _ = batches[self.steps % len(batches)]
        (self.state.private * images.std() - 1).square().backward()
        self.adam.step()
        self.adam.zero_grad()
        self.steps += 1

    def after_step(self, module: QuantModule) -> None:
        step = module.progress.step
        self.state.drawn[step - 1] = torch.rand((), generator=self.rng(step))

    def finalise(self, net: nn.Module) -> None:
        nn.init.zeros_(net.fc.bias)  # type: ignore[union-attr, arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        self.adam.load_state_dict(state_dict["adam"])
