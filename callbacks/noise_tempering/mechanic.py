"""Noise tempering (Wang, Li, Qu, Metze, Strubell 2022, arXiv 2212.05603).

A reconstruction that satisfies the abstract; every choice that it leaves open is a switch.
"""

from __future__ import annotations

import logging
import math
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import nn

from callbacks.noise_tempering.noise import NoiseDist
from callbacks.noise_tempering.quantizer import DeltaLearn, GradScale, NoiseSite, TemperedLSQ, Tempering
from research.arguments import check_arguments
from research.learning.hessian_scale import HessianScale
from research.learning.mechanic import Claim, Mechanic
from research.learning.module import QuantModule
from research.quant.layers import quantizers, replace_module
from research.quant.quantizers.lsq import LSQ

log = logging.getLogger(__name__)
DELTA_LIMIT = 2.0
NEGLIGIBLE = 0.01


def noise_strength(step: int, total: int, lambda_0: float, kappa: float) -> float:
    """``lambda_0 exp(-kappa step / total)``: exponential decay (the paper's abstract); form and constants are ours.

    The geometric form ``lambda_0 (lambda_T / lambda_0)^(step / total)`` is the same with
    ``kappa = log(lambda_0 / lambda_T)``.

    Args:
        step: optimizer steps done.
        total: optimizer steps of the whole run.
        lambda_0: strength at step 0; 1 moves a value to at most its unquantized (clipped) self.
        kappa: decay over the whole run; 0 never decays.
    """
    return lambda_0 * math.exp(-kappa * step / total)


class NoiseTempering(Mechanic):
    """Error-aware noise that decays, and error-aware gradients, on every LSQ quantizer of the network.

    Args:
        lambda_0: initial strength of the noise; 0 is no noise at all.
        kappa: decay of the noise over the run.
        lambda_final: final strength in place of ``kappa`` (geometric form).
        noise_dist: ``uniform``, ``one``, ``bernoulli``, ``gauss``, or ``blind``, which is not error-aware (ablation).
        noise_site: ``forward``, or ``grad`` (ablation: no curvature term).
        grad_scale: ``elementwise`` (EWGS's form, in units of bins) or ``scalar``.
        delta: initial scale of the gradient; None: 0.02 elementwise (0 with ``delta_learn: hessian``, until the first
            measurement), 1 scalar. Elementwise 0 is the plain estimator.
        delta_learn: ``carrier``, ``shared``, ``hessian`` (EWGS's rule, see ``hessian``) or ``fixed``.
        hessian: options of `HessianScale` for ``delta_learn: hessian``.
    """

    slug = "noise_tempering"
    claims: frozenset[Claim] = frozenset({"weight_quantizer"})
    ddp = "per_replica"

    def __init__(
        self,
        lambda_0: float = 1.0,
        kappa: float = 5.0,
        lambda_final: float | None = None,
        noise_dist: NoiseDist = "uniform",
        noise_site: NoiseSite = "forward",
        grad_scale: GradScale = "elementwise",
        delta: float | None = None,
        delta_learn: DeltaLearn = "carrier",
        hessian: dict[str, Any] | None = None,
    ) -> None:
        _one_of("noise_dist", noise_dist, get_args(NoiseDist))
        _one_of("noise_site", noise_site, get_args(NoiseSite))
        _one_of("grad_scale", grad_scale, get_args(GradScale))
        _one_of("delta_learn", delta_learn, get_args(DeltaLearn))
        if lambda_0 < 0 or kappa < 0 or not math.isfinite(kappa):
            raise ValueError(f"callbacks.noise_tempering: lambda_0={lambda_0}, kappa={kappa}: use 0 or more, finite")
        if lambda_final is not None and not 0 < lambda_final <= lambda_0:
            raise ValueError(f"callbacks.noise_tempering.lambda_final={lambda_final}: use more than 0, up to lambda_0")
        if delta is not None and not 0 <= delta <= DELTA_LIMIT:
            raise ValueError(f"callbacks.noise_tempering.delta={delta}: use 0..{DELTA_LIMIT:g}")
        if delta_learn == "shared" and (lambda_0 == 0 or noise_site == "grad"):
            raise ValueError(
                "callbacks.noise_tempering.delta_learn=shared: delta learns from the noise of the forward pass, use "
                "lambda_0 above 0 and noise_site=forward, or delta_learn=carrier"
            )
        if delta_learn == "hessian" and grad_scale == "scalar":
            raise ValueError(
                "callbacks.noise_tempering.delta_learn=hessian: goes with grad_scale=elementwise only, use that"
            )
        if delta is None and grad_scale == "scalar":
            delta = 1.0
        elif delta is None:
            delta = 0.0 if delta_learn == "hessian" else 0.02  # EWGS's rule begins as the plain estimator
        self.lambda_0 = lambda_0
        self.kappa = kappa if lambda_final is None else math.log(lambda_0 / lambda_final)
        self.tempering = Tempering(
            noisy=lambda_0 > 0,
            noise_dist=noise_dist,
            noise_site=noise_site,
            grad_scale=grad_scale,
            delta=delta,
            delta_learn=delta_learn,
        )
        key = "callbacks.noise_tempering.hessian"
        check_arguments(HessianScale, hessian or {}, key, key=key)
        self.hessian = HessianScale(key, **(hessian or {}))

    def attach(self, module: QuantModule) -> None:
        """Put a tempered quantizer in the place of every quantizer; all must be LSQ's."""
        for name, quantizer in quantizers(module.net):
            if type(quantizer) is not LSQ:
                raise ValueError(
                    f"callbacks.noise_tempering: {name} is {type(quantizer).__name__}, which it cannot temper; use "
                    "quantizer=lsq"
                )
        self.quantizers = _replaced(module.net, LSQ, lambda source: TemperedLSQ(source, self.tempering))
        if not self.quantizers:
            raise ValueError("callbacks.noise_tempering: the network has no quantizer to temper, use quantizer=lsq")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of noise that is still there at the end, and of a ``delta`` that is never measured."""
        if self.tempering.delta_learn == "hessian":
            self.hessian.warn_if_never(trainer)
        final = noise_strength(1, 1, self.lambda_0, self.kappa)
        if final > NEGLIGIBLE:
            log.warning(
                "callbacks.noise_tempering: noise of strength %.3g remains at the end (negligible: %g), and batch-norm "
                "statistics belong to the noisy network; use finalise.batchnorm_batches or a larger kappa",
                final,
                NEGLIGIBLE,
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """``delta_learn: hessian``: measure and set ``delta`` where the epoch asks for it."""
        if self.tempering.delta_learn != "hessian":
            return
        measured = self.hessian.measure(trainer, self.module, self.rng(trainer.global_step)) or {}
        for name, quantizer in self.quantizers.items():
            if name in measured:
                quantizer.delta.copy_((measured[name] * quantizer.scale.detach()).clamp(0, DELTA_LIMIT))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the noise's strength."""
        strength = noise_strength(trainer.global_step, self.module.progress.total, self.lambda_0, self.kappa)
        for quantizer in self.quantizers.values():
            quantizer.strength.fill_(strength)

    @torch.no_grad()
    def after_step(self, module: QuantModule) -> None:
        """Keep learned scales of the gradient in 0..2."""
        for quantizer in self.quantizers.values():
            if isinstance(quantizer.delta, nn.Parameter):
                quantizer.delta.clamp_(0, DELTA_LIMIT)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the strength of the noise and the mean scale of the gradient."""
        quantizers = list(self.quantizers.values())
        pl_module.log("noise_tempering/strength", quantizers[0].strength)
        pl_module.log("noise_tempering/delta", torch.stack([q.delta.detach().mean() for q in quantizers]).mean())

    def finalise(self, net: nn.Module) -> None:
        """Put the LSQ quantizers back: no noise, no delta."""
        _replaced(net, TemperedLSQ, TemperedLSQ.plain)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"callbacks.noise_tempering.{name}={value}: use one of {', '.join(known)}")


def _replaced(net: nn.Module, kind: type[nn.Module], make: Any) -> dict[str, Any]:
    """Replace every quantizer of exactly this kind by what ``make`` makes of it; the new ones by name."""
    new = {name: make(quantizer) for name, quantizer in quantizers(net) if type(quantizer) is kind}
    for name, quantizer in new.items():
        replace_module(net, name, quantizer)
    return new
