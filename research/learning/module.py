"""QuantModule: the LightningModule that hosts a quantized network, its task and its mechanics."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import MeanMetric

from research.learning.composition import check_composition, compose_objective, ordered, plan
from research.learning.double_backward import require_second_derivatives
from research.learning.epoch_metrics import EpochMetrics
from research.learning.evaluation import Evaluation, Objective, State
from research.learning.execution import COMPILE, choose_execution, execute_as
from research.learning.hooks import skip_empty_hooks
from research.learning.mechanic import Mechanic
from research.learning.optim import build_optimizer, build_scheduler
from research.learning.recompute import recomputed_activations
from research.learning.taps import Taps
from research.learning.tasks import Task
from research.models import load_float_checkpoint
from research.models.structure import FloatModel
from research.quant.compiler import has_compiler
from research.quant.convert import convert
from research.quant.passes import use_kernels
from research.quant.recipe import Recipe, Table, format_table
from research.runs.rng import rng_state, set_rng_state
from research.targets import resolve_target

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands. ``step`` counts optimizer steps, ``total`` is their number in the whole run (0: unknown)."""

    step: int = 0
    total: int = 0
    epoch: int = 0
    seed: int = 0


class QuantModule(pl.LightningModule):
    """Host of a network, rebuilt from plain hyper-parameters alone, mechanics included.

    Args:
        model: ``{_target_: research.models.resnet20, ...}``.
        quantizer: plain recipe (see ``research.quant.recipe.Recipe``); None keeps every layer float.
        task: ``{_target_: research.learning.tasks.Classification, ...}``.
        optimizer: ``{_target_: torch.optim.SGD, lr: ..., norm: {...}, quantizer: {...}}``.
        scheduler: ``{name: cosine, ...}``.
        mechanics: ``{slug: {_target_: ..., ...}}``.
        precision: ``32`` or ``bf16``; what the Trainer runs in, for the mechanics' check.
        compile: ``none``, ``quantizers``, ``network`` or ``auto`` (see ``research.learning.execution``).
        recompute: keep no activation that follows from a batch-norm's input; eager networks only.
        channels_last: keep the network's 4-D parameters in channels-last memory format.
        seed: the run's seed.
        checkpoint: float weights to start from (a safetensors file); not a hyper-parameter, used by fresh runs and
            teachers only.
        trusted: whether ``_target_`` may name anything; not a hyper-parameter. Configs that the user typed are
            trusted, those read from checkpoints and run folders are not.
    """

    net: FloatModel
    objective: Objective
    prepared: Tensor

    def __init__(
        self,
        model: Mapping[str, Any],
        task: Mapping[str, Any],
        quantizer: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        mechanics: Mapping[str, Mapping[str, Any]] | None = None,
        precision: str = "32",
        compile: str = "none",
        recompute: bool = False,
        channels_last: bool = True,
        seed: int = 0,
        checkpoint: Path | None = None,
        trusted: bool = False,
    ) -> None:
        super().__init__()
        if compile not in COMPILE:
            raise ValueError(f"compile={compile}: use one of {', '.join(COMPILE)}")
        if recompute and compile in ("network", "auto"):
            raise ValueError(f"recompute=true: a compiled network decides itself what it keeps, not with {compile=!s}")
        self.save_hyperparameters(ignore=["trusted", "checkpoint"])
        self.checkpoint = checkpoint
        self.trusted = trusted
        self.recipe = Recipe.from_config(quantizer)
        self.task: Task = resolve_target(task, trusted=trusted, key="task")
        self.active: list[Mechanic] = ordered(
            [_mechanic(slug, config, trusted) for slug, config in (mechanics or {}).items()]
        )
        check_composition(self.active, precision, compile == "network")
        self.mechanics = nn.ModuleDict()
        self.progress = Progress(seed=seed)
        self.table: Table = {}
        self.taps: Taps | None = None
        self.execution = "execution: chosen when the length of the run is known"
        self.register_buffer("prepared", torch.tensor(False))
        self.training_metrics = EpochMetrics(self.task.metrics("train/"))
        self.val_loss = MeanMetric()
        self.val_metrics = self.task.metrics("val/")
        self._restored_rng: list[Any] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the name of the running hook, which Lightning notes forty times a step, without a check."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # -- construction ------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """The mechanics, for the Trainer."""
        skip_empty_hooks([self, *self.active])
        return list(self.active)

    def configure_model(self) -> None:
        """Build and convert the network and attach the mechanics; reads neither data nor files."""
        if hasattr(self, "net"):
            return
        self.net = self.float_network()
        structure = self.net.structure()
        self.table = convert(
            self.net,
            self.recipe,
            structure.first,
            structure.last,
            conv_bn=structure.conv_bn,
            build_module=lambda config: resolve_target(config, trusted=self.trusted, key="quantizer.replace"),
        )
        for mechanic in self.active:
            mechanic.bind(self)
            mechanic.attach(self)
        for mechanic in self.active:
            if mechanic.needs_double_backward:
                require_second_derivatives(self.net, mechanic.slug)
        if self.hparams["channels_last"]:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        patterns = [pattern for mechanic in self.active for pattern in mechanic.taps]
        self.taps = Taps(self.net, patterns) if patterns else None
        self.objective = compose_objective(self.evaluate, self.active)
        self._ddp_params_and_buffers_to_ignore = [
            f"mechanics.{name}" for name, buffer in self.mechanics.named_buffers() if buffer.ndim > 0
        ]
        if self.hparams["compile"] != "auto":  # which has to know the length of the run
            self._execute(0)

    def _execute(self, steps: int) -> None:
        """Run the network from now on as ``compile`` says for a run of ``steps`` optimizer steps."""
        execution = choose_execution(self.hparams["compile"], steps, self.active, has_compiler())
        self.execution = execute_as(self.net, execution, self.active)

    def float_network(self) -> FloatModel:
        """A fresh float network of the run's architecture, randomly initialised."""
        net = resolve_target(self.hparams["model"], trusted=self.trusted, key="model")
        if not isinstance(net, FloatModel):
            raise ValueError(f"model._target_={self.hparams['model']['_target_']}: use a model of research.models")
        return net

    def initial_network(self) -> FloatModel:
        """A float network with the weights that the run starts from (``checkpoint``).

        Raises:
            ValueError: there is no checkpoint, or it is missing, damaged or of another architecture.
        """
        if self.checkpoint is None:
            raise ValueError("init_from=null: a float teacher needs the weights to start from, e.g. init_from=FILE")
        with torch.random.fork_rng(devices=[]):  # the random initialisation it replaces is nobody's noise
            net = self.float_network()
        load_float_checkpoint(net, self.checkpoint)
        return net

    def describe(self) -> str:
        """The resolved per-layer table, the plan of mechanics and how the network runs, as text."""
        return f"{format_table(self.table)}\n{plan(self.active)}\n{self.execution}"

    def configure_optimizers(self) -> Any:
        """The (composite) optimizer and its per-step schedule."""
        optimizer = build_optimizer(self.net, self.hparams["optimizer"] or {}, self.active, self)
        total = self.trainer.estimated_stepping_batches
        # that made the loaders, before a resume's position in the epoch is known: let Lightning make them again
        self.trainer.fit_loop._combined_loader = None
        if math.isinf(total):
            raise ValueError("trainer.max_epochs=-1: schedules need the length of the run; use e.g. max_epochs=100")
        self.progress.total = int(total)
        if self.hparams["compile"] == "auto":
            self._execute(self.progress.total)
            log.info(self.execution)
        scheduler = build_scheduler(optimizer, self.hparams["scheduler"] or {"name": "constant"}, self.progress.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, batch: Any, state: State | None = None) -> Evaluation:
        """The task's evaluation of the network, with the one term ``task``."""

        def net(*inputs: Tensor) -> Any:
            return self.net(*inputs) if state is None else functional_call(self.net, dict(state), inputs)

        keeping = recomputed_activations(self.net) if self.hparams["recompute"] else nullcontext()
        with keeping:
            outputs, loss = self.task.evaluate(net, batch)
        taps = self.taps.take() if self.taps is not None else {}
        return Evaluation(batch=batch, loss=loss, outputs=outputs, terms={"task": loss}, taps=taps)

    def forward(self, x: Tensor) -> Any:
        """What the network makes of ``x``."""
        return self.net(x)

    def placed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A batch from outside the Trainer's loop, on the network's device, floating-point tensors in its dtype."""
        return [
            tensor.to(self.device, self.network_dtype if tensor.is_floating_point() else None) for tensor in tensors
        ]

    @property
    def network_dtype(self) -> torch.dtype:
        """Of the network's parameters: float32, or float64 with ``precision: 64-true`` of a Trainer."""
        return next(self.net.parameters()).dtype

    # -- training ----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Restore the generators of a resumed run; a fresh one gives every rank its own noise.

        Raises:
            ValueError: the checkpoint is of another number of processes.
        """
        if self._restored_rng is None:
            if self.global_rank > 0:
                torch.manual_seed(self.hparams["seed"] + self.global_rank)
        elif len(self._restored_rng) != self.trainer.world_size:
            raise ValueError(
                f"trainer.devices: {len(self._restored_rng)} processes wrote the checkpoint and "
                f"{self.trainer.world_size} would go on, with other batches and noise; use as many as before"
            )
        else:
            set_rng_state(self._restored_rng[self.global_rank])
            self._restored_rng = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep ``progress`` up to date."""
        self.progress.step, self.progress.epoch = self.global_step, self.current_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The composed objective's loss."""
        evaluation = self.objective(batch)
        self.training_metrics.add(evaluation.loss, evaluation.outputs, self.task.targets(batch))
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = {f"train/step/{name}": value.detach() for name, value in evaluation.terms.items()}
            self.log_dict({**values, "train/step/loss": evaluation.loss.detach()}, on_step=True, on_epoch=False)
        return evaluation.loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One real optimizer step, then every mechanic's ``after_step``."""
        super().optimizer_step(*args, **kwargs)
        self.progress.step = self.global_step + 1  # Lightning counts the step after this hook
        for mechanic in self.active:
            mechanic.after_step(self)

    def on_train_epoch_end(self) -> None:
        """Log and clear the epoch's training loss and metrics."""
        self.log_dict(self.training_metrics.compute(), on_step=False, on_epoch=True, sync_dist=True)
        self.training_metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the validation loss and metrics; mechanics take no part."""
        evaluation = self.evaluate(batch)
        targets = self.task.targets(batch)
        self.val_loss.update(evaluation.loss, weight=len(targets))
        self.val_metrics.update(evaluation.outputs, targets)

    def on_validation_epoch_end(self) -> None:
        """Log and clear the validation loss and metrics."""
        values = {"val/loss": self.val_loss.compute(), **self.val_metrics.compute()}
        self.log_dict(values, prog_bar=True, sync_dist=True)
        self.val_loss.reset()
        self.val_metrics.reset()

    # -- checkpoints -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of every rank's random generators."""
        states: list[Any] = [rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint["rng"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the generators' states until the fit starts."""
        self._restored_rng = checkpoint["rng"]

    def plain_copy(self) -> FloatModel:
        """A deep copy of the network as it stands: eager, no hooks, in evaluation mode."""
        taps = self.taps.handles if self.taps is not None else []
        net = copy.deepcopy(self.net)
        for handle in taps:
            for module in net.modules():
                module._forward_hooks.pop(handle.id, None)
        use_kernels(net, None)
        return net.eval()


# Lightning asks for it at every step; without this, 40 microseconds to find it again
QuantModule.training_step.__signature__ = inspect.signature(QuantModule.training_step)  # type: ignore[attr-defined]


def _mechanic(slug: str, config: Mapping[str, Any], trusted: bool) -> Mechanic:
    mechanic = resolve_target(config, trusted=trusted, key=f"callbacks.{slug}")
    if not isinstance(mechanic, Mechanic):
        raise ValueError(f"callbacks.{slug}._target_={config.get('_target_')}: use a Mechanic")
    if mechanic.slug != slug:
        raise ValueError(f"callbacks.{slug} holds the mechanic {mechanic.slug}: name the key {mechanic.slug}")
    return mechanic
