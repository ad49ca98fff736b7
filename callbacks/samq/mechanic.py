"""SAMQ: the configuration generator of SAQ (Liu, Cai, Zhuang, arXiv 2111.12273, first version; zhuang-group/SAQ)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from callbacks.bit_search import BitSearch, EndingSearch
from callbacks.samq.choice import Picks, drawn_near
from callbacks.samq.layers import Switched, leaders, require_switchable, switch
from callbacks.samq.learner import Learner
from callbacks.samq.policy import Policy
from callbacks.samq.switched import SwitchedBatchNorm2d, SwitchedQuantizer
from research.learning.composition import total
from research.learning.mechanic import Claim
from research.learning.perturbation import average_over_processes
from research.quant.allocation import Allocation, LayerBits
from research.quant.budget import Budget, budgets_from_config
from research.quant.layers import replace_module
from research.quant.passes import evaluating
from research.quant.quantizers.base import MAX_BITS
from research.quant.recipe import FLOAT_BITS

if TYPE_CHECKING:
    from research.learning.module import QuantModule

log = logging.getLogger(__name__)
SHARPNESS_AWARE = ("sam", "saq")
Images = Literal["search", "train"]
IMAGES: tuple[Images, ...] = get_args(Images)


class SAMQ(BitSearch):
    """Every step trains one configuration of widths; an LSTM policy learns to draw good ones of the wanted cost.

    All widths of a layer share its weight; each has ranges and a batch-norm of its own. After a warm-up with uniform
    draws the configurations come from the policy, which REINFORCE trains on held-out images behind every epoch:
    ``R = L + strength * ((cost - budget) / unit)^2`` with the run's own objective L in evaluation mode: with
    ``callbacks=[saq,samq]`` the loss at SAQ's perturbed point. At ``until`` the least sharp of several draws close
    below the budget is taken (without SAQ or SAM: the one of the least loss); the rest of the run trains it.

    Args:
        budget: one, see `research.quant.budget`; it is a target: less is penalised too.
        bits: candidate widths; a layer's weight and its input have the same, an input without a quantizer keeps none.
        search_ends: also the first and the last layer, instead of leaving them as they are.
        images: the policy learns and the choice is made on the ``search`` part of the data, or on ``train``.
        policy_batches: of these images, behind every epoch; None: an epoch of them.
        choice_batches: for the choice at the end; None: an epoch of them.
        warmup: part of the run with uniform draws and no training of the policy.
        until: part of the run after which the widths stay.
        strength: lambda, factor of the squared distance from the budget.
        unit: in which that distance is measured, in the budget's own; None: in budgets.
        beta: factor of the policy's entropy.
        baseline: momentum of a moving average of R that is subtracted from it; 0: none.
        lr: learning rate of the policy's Adam.
        hidden: size of the LSTM.
        candidates: how many configurations are compared at the end.
        tolerance: part of the budget by which they may be below it.
        draws: how often the policy is asked for them at most.
    """

    slug = "samq"
    claims: frozenset[Claim] = frozenset({"bits", "weight_quantizer", "batchnorm"})
    state: EndingSearch

    def __init__(
        self,
        budget: Mapping[str, Any],
        bits: Sequence[int] = (2, 3, 4, 5),
        search_ends: bool = False,
        images: Images = "search",
        policy_batches: int | None = None,
        choice_batches: int | None = None,
        warmup: float = 0.1,
        until: float = 0.6,
        strength: float = 45.0,
        unit: float | None = None,
        beta: float = 5e-3,
        baseline: float = 0.0,
        lr: float = 5e-4,
        hidden: int = 64,
        candidates: int = 20,
        tolerance: float = 0.015,
        draws: int = 1000,
    ) -> None:
        key = f"callbacks.{self.slug}"
        self.budgets = budgets_from_config(budget, f"{key}.budget")
        if len(self.budgets) > 1:
            raise ValueError(f"{key}.budget: a target is one budget, not {len(self.budgets)}; use one mapping")
        if not bits or not all(isinstance(b, int) and 1 <= b <= MAX_BITS for b in bits):
            raise ValueError(f"{key}.bits={bits}: use widths from 1 to {MAX_BITS}, such as [2, 3, 4, 5]")
        if images not in IMAGES:
            raise ValueError(f"{key}.images={images}: use {' or '.join(IMAGES)}")
        for name, count in (
            ("policy_batches", policy_batches),
            ("choice_batches", choice_batches),
            ("hidden", hidden),
            ("candidates", candidates),
            ("draws", draws),
        ):
            if count is not None and count < 1:
                raise ValueError(f"{key}.{name}={count}: use 1 or more")
        for name, number in (("strength", strength), ("beta", beta), ("tolerance", tolerance)):
            if number < 0:
                raise ValueError(f"{key}.{name}={number}: use 0 or more")
        for name, positive in (("unit", unit), ("lr", lr)):
            if positive is not None and positive <= 0:
                raise ValueError(f"{key}.{name}={positive}: use more than 0")
        if not 0 <= baseline < 1:
            raise ValueError(f"{key}.baseline={baseline}: use a momentum from 0 to less than 1, such as 0.9")
        if not 0 <= warmup < until < 1:
            raise ValueError(f"{key}: warmup={warmup}, until={until}: use parts of the run, 0 <= warmup < until < 1")
        self.bits = sorted(set(bits))
        self.search_ends = search_ends
        self.images: Images = images
        self.policy_batches, self.choice_batches = policy_batches, choice_batches
        self.warmup, self.until = warmup, until
        self.strength, self.unit = strength, self.budget.value if unit is None else unit
        self.beta, self.momentum, self.lr = beta, baseline, lr
        self.hidden = hidden
        self.candidates, self.tolerance, self.draws = candidates, tolerance, draws
        self._interrupted: Picks | None = None
        self._loader: Any = None

    @property
    def budget(self) -> Budget:
        """The target."""
        return self.budgets[0]

    # -- construction ------------------------------------------------------------------------------------------

    def attach(self, module: QuantModule) -> None:
        """Find the layers and give each a quantizer, an input quantizer and a batch-norm for every width."""
        net = module.net
        self.layers = self.searched_layers(net)
        for name, layer in self.layers.items():
            require_switchable(name, layer)
        self.choices = self.choices_of(net, self._candidates)
        self.start_at_widest(net)
        self.leaders = leaders(net, list(self.layers))
        self.decisions = [name for name in self.layers if name not in self.leaders]
        self.switched: dict[str, list[Switched]] = {}
        if len(self.bits) > 1:
            self.switched = {name: switch(net, name, layer, self.bits) for name, layer in self.layers.items()}
        self.policy = Policy(len(self.decisions), len(self.bits), self.hidden)
        self.policy.initialise(self.rng(-1))
        self.learner = Learner(self.policy, self.lr, self.beta, self.momentum)
        self.present: Picks = (len(self.bits) - 1,) * len(self.decisions)
        self.state = EndingSearch(over=not self.switched)
        module.mechanics[self.slug] = self.state

    def _candidates(self, present: LayerBits) -> list[LayerBits]:
        return [LayerBits(b, FLOAT_BITS if present.input == FLOAT_BITS else b) for b in self.bits]

    # -- configurations ----------------------------------------------------------------------------------------

    def allocation(self, picks: Sequence[int]) -> Allocation:
        """The widths of all layers where the decisions are ``picks``, indices of candidates."""
        picked = dict(zip(self.decisions, picks, strict=True))
        return Allocation(
            {
                name: options[picked[self.leaders.get(name, name)] if name in self.layers else 0]
                for name, options in self.choices.items()
            }
        )

    def use(self, picks: Sequence[int]) -> None:
        """Run the network at these picks from now on."""
        self.present = tuple(picks)
        for name, bits in self.allocation(picks).items():
            for switched in self.switched.get(name, ()):
                switched.bits.fill_(bits.weight)

    def restore(self) -> None:
        """Read the picks that the network runs at from its state."""
        present = Allocation.of(self.module.net)
        self.present = tuple(self.bits.index(present[name].weight) for name in self.decisions)

    def cost(self, picks: Sequence[int]) -> float:
        """What a configuration costs, in the budget's unit."""
        return self.budget.cost(self.counts, self.allocation(picks))

    # -- training the network ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the images that the policy learns on."""
        if bool(self.state.over):
            if self.switched:
                self.restore()
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.images == "search" and data.search == 0:
            raise ValueError(
                "data.search=0: callbacks.samq learns on images held out from training; use data.search=5000, or "
                "callbacks.samq.images=train"
            )
        self._loader = data.search_dataloader() if self.images == "search" else data.train_dataloader()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw a configuration: once a step, whatever is evaluated in it; or end the search."""
        step, steps = trainer.global_step, self.module.progress.total
        if bool(self.state.over):
            return
        if step >= self.last_step(steps):
            self.end(self.rng(step))
            return
        generator = self.rng(step)
        if step < self.warm_steps(steps):
            self.use(torch.randint(len(self.bits), (len(self.decisions),), generator=generator).tolist())
        else:
            self.use(self.policy.sample(generator)[0].tolist())

    def warm_steps(self, total: int) -> int:
        """Optimizer steps of the warm-up, of ``total``."""
        return round(self.warmup * total)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Take the zeros that candidates not at work have for a gradient: no momentum and no decay may move these."""
        present = self.allocation(self.present)
        for name, places in self.switched.items():
            for switched in places:
                for key, copy in switched.by_width.items():
                    if key != str(present[name].weight):
                        for parameter in copy.parameters():
                            parameter.grad = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """While the search goes on, validate what the policy holds the most probable."""
        if trainer.state.fn == TrainerFn.FITTING and not bool(self.state.over):
            self._interrupted = self.present
            self.use(self.policy.most_probable().tolist())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back to the step's configuration."""
        if self._interrupted is not None:
            self.use(self._interrupted)
            self._interrupted = None

    # -- training the policy -----------------------------------------------------------------------------------

    def batches(self, epoch: int, count: int | None) -> Iterator[Any]:
        """The first ``count`` batches of an epoch of the policy's images, where the network is; None: all."""
        self._loader.set_epoch(epoch)
        return (self.module.placed(batch) for batch in islice(self._loader, count))

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The objective's loss at its perturbed point, if there is one, and the loss of the unperturbed terms.

        In evaluation mode and eager; means over the processes.
        """
        with evaluating(self.module.net), torch.compiler.set_stance("force_eager"), torch.enable_grad():
            evaluation = self.module.objective(batch)
        found = {"loss": evaluation.loss.detach().clone(), "plain": total(evaluation.terms).detach().clone()}
        average_over_processes(found)
        return found["loss"], found["plain"]

    def train_policy(self, batches: Iterator[Any], generator: torch.Generator) -> dict[str, float]:
        """One draw and one step of the policy a batch; means over what was drawn, by name."""
        rows = []
        for batch in batches:
            picks = self.policy.sample(generator)
            (drawn,) = picks.tolist()
            self.use(drawn)
            loss, cost = float(self.losses(batch)[0]), self.cost(drawn)
            objective = loss + self.strength * ((cost - self.budget.value) / self.unit) ** 2
            rows.append((objective, loss, cost, self.learner.step(picks, objective)))
        means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        return dict(zip(("objective", "loss", "cost", "entropy"), means, strict=True))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the warm-up train the policy; log the most probable widths, or the decided ones."""
        if not bool(self.state.over):
            if trainer.global_step > self.warm_steps(self.module.progress.total):
                epoch = trainer.current_epoch
                found = self.train_policy(self.batches(epoch, self.policy_batches), self.rng(-2 - epoch))
                pl_module.log_dict({f"{self.slug}/{name}": value for name, value in found.items()})
            self.use(self.policy.most_probable().tolist())
        pl_module.log_dict(self.metrics())

    def state_dict(self) -> dict[str, Any]:
        """The policy, its optimizer, and how far they are."""
        return self.learner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.learner.load_state_dict(state_dict)

    # -- the end -----------------------------------------------------------------------------------------------

    def end(self, generator: torch.Generator) -> None:
        """Decide: of draws close below the budget the one of the least sharpness on held-out images."""
        if not self.learner.updates:
            log.warning("callbacks.samq: the policy has not been trained: no epoch ends between warmup and until")
        drawn = self.near_budget(generator)
        values = self.sharpness(drawn)
        best = min(range(len(drawn)), key=values.__getitem__)
        self.use(drawn[best])
        self.state.over.fill_(True)
        widths = ", ".join(str(self.bits[pick]) for pick in self.present)
        log.info("samq: the search is over; bits %s; cost %s", widths, self.costs(self.found()))
        log.info(
            "samq: %s %.6g, of %d others %.6g to %.6g",
            self.measure,
            values[best],
            len(drawn) - 1,
            min(values),
            max(values),
        )

    def near_budget(self, generator: torch.Generator) -> list[Picks]:
        """The configurations to compare, see `drawn_near`."""
        most = self.budget.value
        least = most * (1 - self.tolerance)
        drawn = drawn_near(self.policy, generator, self.cost, most, least, self.candidates, self.draws, len(self.bits))
        if len(drawn) < self.candidates or self.cost(drawn[-1]) < least:
            log.warning(
                "callbacks.samq: %d draws have fewer than %d configurations of cost %.6g to %.6g; comparing %d, the "
                "nearest below among them", self.draws, self.candidates, least, most, len(drawn),
            )  # fmt: skip
        return drawn

    @property
    def measure(self) -> str:
        """What decides at the end: ``sharpness`` in a run with SAQ or SAM, else ``loss``."""
        return "sharpness" if any(each.slug in SHARPNESS_AWARE for each in self.module.active) else "loss"

    def sharpness(self, configurations: Sequence[Picks]) -> list[float]:
        """Of each configuration the mean rise of the loss to its perturbed point, or without one the loss."""
        batches = list(self.batches(0, self.choice_batches))
        means = []
        for picks in configurations:
            self.use(picks)
            found = [self.losses(batch) for batch in batches]
            values = [loss - plain if self.measure == "sharpness" else loss for loss, plain in found]
            means.append(float(torch.stack(values).mean()))
        return means

    def finalise(self, net: nn.Module) -> None:
        """Put the quantizers and batch-norms of the decided widths in place; refuse an open search, and widths beyond
        the budget.

        Neither in a host that was rebuilt from a configuration alone: its numbers come later.
        """
        self.require_over()
        for name, switched in list(net.named_modules()):
            if isinstance(switched, SwitchedQuantizer | SwitchedBatchNorm2d):
                replace_module(net, name, switched.present)
        if self.is_prepared:
            self.require_within(net)
