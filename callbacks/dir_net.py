"""DIR-Net and IR-Net: what training does for binary weights and inputs.

IR-Net: Qin, Gong, Liu, Shen, Wei, Yu, Song, CVPR 2020, arXiv 1909.10788; htqin/IR-Net. DIR-Net: Qin, Zhang, Gong, Ding,
Xu, Liu, IJCV 2023, arXiv 2109.12338, of which only the abstract could be read: what goes beyond IR-Net is a
reconstruction, see docs/methods/dir_net.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from research.learning.evaluation import Evaluation
from research.learning.mechanic import Claim, Mechanic
from research.learning.taps import Taps
from research.models.structure import FloatModel
from research.quant.layers import QuantConv2d, quant_layers, quantizers
from research.quant.quantizers.binary import Binary, active_limit

if TYPE_CHECKING:
    from research.learning.module import QuantModule

DTE = ("ede", "distribution_sensitive")
TINY = 1e-8


def estimator_schedule(progress: float, t_min: float, t_max: float) -> tuple[float, float]:
    """``t = t_min (t_max / t_min)^progress``, ``k = max(1 / t, 1)`` (IR-Net's code).

    Args:
        progress: epoch over the number of epochs, from 0 and below 1.
        t_min, t_max: bounds of ``t``, above 0; ``t_max`` is never reached.
    """
    t = t_min * (t_max / t_min) ** progress
    return t, max(1 / t, 1.0)


def active_share(u: Tensor, t: Tensor, slope: float) -> Tensor:
    """Share of the elements of ``u`` where ``k tanh(t u)`` keeps the share ``slope`` of its derivative; 0-dim."""
    active = u.detach().abs() * t <= active_limit(slope)
    return active.to(u.dtype).mean()


def attention(features: Tensor) -> Tensor:
    """Mean over channels of the squared features (N, C, H, W), flat and of unit length: (N, H W)."""
    energy = features.float().square().mean(dim=1).flatten(1)
    flat: Tensor = energy / (torch.linalg.vector_norm(energy, dim=1, keepdim=True) + TINY)
    return flat


def representation_loss(student: Iterable[Tensor], teacher: Iterable[Tensor]) -> Tensor:
    """Sum over layers of the batch's mean ``||attention(student) - attention(teacher)||^2``; a reconstruction.

    Args:
        student, teacher: features (N, C, H, W) of the same layers; none of the teacher's has a gradient.
    """
    distances = [
        (attention(one) - attention(other.detach())).square().sum(dim=1).mean()
        for one, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).sum()


class DIRNet(Mechanic):
    """Sharpen the estimator of all binary quantizers over the run, and hold representations to a float network's.

    With ``dte: ede, beta: 0`` this is IR-Net. The teacher is the float network that the run starts from
    (``init_from``), no part of the host's state.

    Args:
        t_min, t_max: of the schedule, set in front of every epoch; equal: a constant estimator.
        dte: ``ede`` (IR-Net), or ``distribution_sensitive``: the schedule never leaves less than a share ``eps`` of a
            tensor a gradient.
        eps: that share; 0 is ``ede``.
        delta: what counts as a gradient, as a share of the greatest derivative.
        beta: weight of the distance between representations, at the ends of the network's blocks, or, where it states
            none, behind its convolutions; 0 builds no teacher.
    """

    slug = "dir_net"
    claims: frozenset[Claim] = frozenset({"weight_quantizer"})

    def __init__(
        self,
        t_min: float = 0.1,
        t_max: float = 10.0,
        dte: Literal["ede", "distribution_sensitive"] = "distribution_sensitive",
        eps: float = 0.1,
        delta: float = 0.1,
        beta: float = 1.0,
    ) -> None:
        if not 0 < t_min <= t_max:
            raise ValueError(f"callbacks.dir_net: t_min={t_min}, t_max={t_max}: use 0 < t_min <= t_max")
        if dte not in DTE:
            raise ValueError(f"callbacks.dir_net.dte={dte}: use one of {', '.join(DTE)}")
        if not 0 <= eps < 1:
            raise ValueError(f"callbacks.dir_net.eps={eps}: use a share from 0 to below 1, such as 0.1")
        if not 0 < delta < 1:
            raise ValueError(f"callbacks.dir_net.delta={delta}: use a share between 0 and 1, such as 0.1")
        if beta < 0:
            raise ValueError(f"callbacks.dir_net.beta={beta}: use 0 or more")
        self.t_min, self.t_max = t_min, t_max
        self.eps = eps if dte == "distribution_sensitive" else 0.0
        self.delta = delta
        self.beta = beta
        self.ddp = "per_replica" if self.eps else "exact"  # an input's quantile is that of the first process
        self._teacher: list[nn.Module] = []
        self._teacher_taps: list[Taps] = []

    def attach(self, module: QuantModule) -> None:
        """Find the binary quantizers and the layers to compare."""
        self.quantizers = {name: q for name, q in quantizers(module.net) if isinstance(q, Binary)}
        if not self.quantizers:
            raise ValueError("callbacks.dir_net: the network has no binary quantizer to train, use quantizer=binary")
        for quantizer in self.quantizers.values():
            quantizer.active_share, quantizer.active_slope = self.eps, self.delta
        if self.beta:
            self.taps = _places(module.net)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the teacher from the run's float weights."""
        if self.beta and not self._teacher:
            teacher = (
                self.module.initial_network()
                .to(pl_module.device, self.module.network_dtype)
                .eval()
                .requires_grad_(False)
            )
            self._teacher.append(teacher)
            self._teacher_taps.append(Taps(teacher, self.taps))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set ``t`` and ``k`` of every binary quantizer; they are part of checkpoints."""
        t, k = estimator_schedule(trainer.global_step / self.module.progress.total, self.t_min, self.t_max)
        for quantizer in self.quantizers.values():
            quantizer.t.fill_(t)
            quantizer.k.fill_(k)

    def loss_terms(self, evaluation: Evaluation) -> Mapping[str, Tensor]:
        """``representation``, if it has a weight."""
        if not self.beta:
            return {}
        with torch.no_grad():
            self._teacher[0](evaluation.batch[0])
        (taps,) = self._teacher_taps
        features = taps.take()
        return {"representation": self.beta * representation_loss(_at(evaluation.taps, features), features.values())}

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``t``, and of every layer the share of weights that keeps a gradient."""
        pl_module.log("dir_net/t", next(iter(self.quantizers.values())).t)
        for name, layer in quant_layers(self.module.net):
            if isinstance(layer.weight_quantizer, Binary):
                u = layer.weight_quantizer.transform(layer.float_weight())
                t, _ = layer.weight_quantizer.estimator(u)
                pl_module.log(f"dir_net/active_share/{name}", active_share(u, t, self.delta))


def _places(net: FloatModel) -> tuple[str, ...]:
    """Patterns of the modules whose outputs are compared."""
    names = net.structure().blocks or [name for name, layer in quant_layers(net) if isinstance(layer, QuantConv2d)]
    if not names:
        raise ValueError("callbacks.dir_net.beta: the network has no block and no convolution to compare, use 0")
    return tuple(names)


def _at(taps: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    return [taps[name] for name in names]
