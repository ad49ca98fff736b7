"""The probe of curvature: Hessian quantities of the network in training, measured without changing anything."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.cadence import check_every, due
from callbacks.fixed_images import fixed_images
from research.curvature.batches import FixedBatches
from research.curvature.displacement import gradient_at
from research.curvature.operators import CurvatureOperator, hessian
from research.curvature.sharpness import saq_sharpness
from research.curvature.spectrum import top_eigenvalues, trace
from research.curvature.surface import SURFACES, Surface
from research.learning.mechanic import Mechanic
from research.learning.perturbation import EPS
from research.quant.layers import quant_layers

if TYPE_CHECKING:
    from research.learning.evaluation import Network
    from research.learning.module import QuantModule

log = logging.getLogger(__name__)

QUANTITIES = ("top_eigenvalue", "trace", "hessian_norm", "gradient_norm", "saq_sharpness")
UNCONVERGED = "_unconverged"
"""Behind the name of an eigenvalue whose residual is not below the tolerance."""
GRADIENTS_PER_PRODUCT = 3.1
"""Time of a Hessian-vector product, in gradients on as many images; see docs/concepts/measuring.md."""


class CurvatureProbe(Mechanic):
    """Logs curvature on fixed training images every few epochs; training is what it is without, bit for bit.

    Everything is measured on an eager copy of the network in evaluation mode and float32, with generators of its own.
    Logged as ``curvature/<surface>/<quantity>``, with ``curvature/seconds``:

    - ``top_eigenvalue``: the k eigenvalues of greatest magnitude (``top_eigenvalue``, ``eigenvalue_2``, ...) and their
      relative residuals; one that has not converged is logged as ``..._unconverged`` instead.
    - ``trace``, with ``trace_standard_error``.
    - ``gradient_norm``: ``|g|``.
    - ``hessian_norm``: ``|H g| / |g|`` (HERO's figure, as we recall it): how fast the gradient turns on the way uphill.
    - ``saq_sharpness``: rise of the loss at SAQ's perturbation; its surface is ``perturbation``.

    Args:
        every_n_epochs: look after epochs n, 2n, ...
        quantities: of those above.
        surface: ``quantized`` (the derivatives are by the de-quantized weights) or ``latent``.
        images: training images without augmentation, the same ones at every look and for every seed of the run.
        batch_size: of them in one product; memory alone depends on it.
        k: eigenvalues.
        tolerance: relative residual below which an eigenvalue has converged.
        max_iterations: most Lanczos steps.
        probes: products for the trace.
        rho: radius of SAQ's perturbation.
        seed: of Lanczos' first vector and of the probes.
    """

    slug = "curvature_probe"

    def __init__(
        self,
        every_n_epochs: int = 10,
        quantities: Sequence[str] = ("top_eigenvalue", "trace"),
        surface: Surface = "quantized",
        images: int = 256,
        batch_size: int = 128,
        k: int = 1,
        tolerance: float = 1e-3,
        max_iterations: int = 40,
        probes: int = 12,
        rho: float = 0.05,
        seed: int = 0,
    ) -> None:
        check_every(self.slug, "every_n_epochs", every_n_epochs)
        unknown = [quantity for quantity in quantities if quantity not in QUANTITIES]
        if unknown or not quantities:
            raise ValueError(
                f"callbacks.{self.slug}.quantities={list(quantities)}: use some of {', '.join(QUANTITIES)}"
            )
        if surface not in SURFACES:
            raise ValueError(f"callbacks.{self.slug}.surface={surface}: use one of {', '.join(SURFACES)}")
        least = {"k": (k, 1), "max_iterations": (max_iterations, k), "probes": (probes, 6)}
        for key, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"callbacks.{self.slug}.{key}={value}: use {bound} or more")
        for key, number in (("tolerance", tolerance), ("rho", rho)):
            if number <= 0:
                raise ValueError(f"callbacks.{self.slug}.{key}={number}: use more than 0")
        self.every_n_epochs = every_n_epochs
        self.quantities = frozenset(quantities)
        self.surface: Surface = surface
        self.images = images
        self.batch_size = batch_size
        self.k = k
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.probes = probes
        self.rho = rho
        self.seed = seed
        self.batches = FixedBatches(())

    def attach(self, module: QuantModule) -> None:
        """Refuse SAQ's sharpness of a network without quantized weights."""
        quantized = any(layer.weight_quantizer is not None for _, layer in quant_layers(module.net))
        if "saq_sharpness" in self.quantities and not quantized:
            raise ValueError(
                f"callbacks.{self.slug}.quantities: no layer has a quantized weight; leave out saq_sharpness"
            )

    @property
    def products(self) -> int:
        """Most Hessian-vector products at one look."""
        costs = {"top_eigenvalue": self.max_iterations, "trace": self.probes, "hessian_norm": 1}
        return sum(cost for quantity, cost in costs.items() if quantity in self.quantities)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the images, and say what looking at them costs."""
        self.batches = fixed_images(trainer, self.module, self.slug, self.images, self.batch_size)
        source: Any = trainer.datamodule  # type: ignore[attr-defined]
        trained = trainer.num_training_batches * source.batch_size / trainer.world_size
        share = self.products * GRADIENTS_PER_PRODUCT * self.images / trained
        log.info(
            "callbacks.%s: looks every %d epochs, with up to %d Hessian-vector products on %d images: each time about "
            "as long as %.2g epochs of plain training",
            self.slug,
            self.every_n_epochs,
            self.products,
            self.images,
            share,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look and log; where the loss or a product is not finite, warn instead."""
        if not due(trainer, self.every_n_epochs):
            return
        start = time.perf_counter()
        try:
            values = self.look(self.module)
        except ValueError as error:
            log.warning(
                "callbacks.%s: nothing measured after epoch %d: %s", self.slug, trainer.current_epoch + 1, error
            )
            values = {}
        values["curvature/seconds"] = time.perf_counter() - start
        pl_module.log_dict(trainer.strategy.broadcast(values))

    def look(self, module: QuantModule) -> dict[str, float]:
        """All quantities of the network as it stands, by the name they are logged under."""
        net = module.plain_copy()

        def loss(network: Network, batch: Any) -> Tensor:
            return module.task.evaluate(network, batch)[1]

        operator = hessian(net, loss, self.batches, self.surface)
        found: dict[str, float] = {}
        if "top_eigenvalue" in self.quantities:
            found |= self.eigenvalues(operator)
        if "trace" in self.quantities:
            estimate = trace(operator, self.probes, self.seed, progress=False)
            found |= {"trace": estimate.value, "trace_standard_error": estimate.standard_error}
        if self.quantities & {"gradient_norm", "hessian_norm"}:
            gradient = flat_gradient(operator)
            length = float(gradient.norm())
            if "gradient_norm" in self.quantities:
                found["gradient_norm"] = length
            if "hessian_norm" in self.quantities:
                found["hessian_norm"] = float(operator.matvec(gradient / (length + EPS)).norm())
        values = {f"curvature/{self.surface}/{name}": value for name, value in found.items()}
        if "saq_sharpness" in self.quantities:
            rise = saq_sharpness(net, loss, self.batches, self.rho).rise
            values["curvature/perturbation/saq_sharpness"] = rise
        return values

    def eigenvalues(self, operator: CurvatureOperator) -> dict[str, float]:
        """Eigenvalues and their residuals by name, what has not converged marked."""
        found = top_eigenvalues(operator, self.k, self.tolerance, self.max_iterations, self.seed, progress=False)
        values = {}
        for rank, (value, residual, done) in enumerate(
            zip(found.values, found.residuals, found.converged, strict=True)
        ):
            name = f"eigenvalue_{rank + 1}" if rank else "top_eigenvalue"
            values[name if done else f"{name}{UNCONVERGED}"] = value
            values[f"{name}_residual"] = residual
        return values


def flat_gradient(operator: CurvatureOperator) -> Tensor:
    """Gradient of the operator's loss by its variables, (size,)."""
    zeros = operator.split(torch.zeros(operator.size, dtype=operator.dtype, device=operator.device))
    _, gradient = gradient_at(operator.net, operator.loss, operator.batches, operator.surface, zeros)
    return torch.cat([part.reshape(-1) for part in gradient.values()])
