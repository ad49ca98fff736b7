"""Why the form of the straight-through estimator matters: ``python -m analysis.ste_pitfall [page=FILE]``.

One small LSQ network, twice: with rounding in the detach form of `research.quant.ste`, and with the whole quantizer as
one ``autograd.Function`` whose backward uses saved tensors, as is usual. Values and first derivatives are the same,
the Hessians are not. Then finite differences in place of second derivatives, over step sizes. float64, no data.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from analysis.cli import script
from research.curvature.batches import FixedBatches
from research.curvature.displacement import gradient_at
from research.curvature.operators import CurvatureOperator, asymmetry, hessian
from research.curvature.spectrum import top_eigenvalues
from research.quant.calibrate import calibrate
from research.quant.convert import convert
from research.quant.kinds import Kind
from research.quant.layers import quant_layers
from research.quant.quantizers.lsq import LSQ
from research.quant.recipe import Recipe
from research.runs.files import atomic_write_text

PAGE = "docs/concepts/curvature.md"
START, END = "<!-- ste_pitfall: generated -->", "<!-- ste_pitfall: end -->"
WITH_STEPS: tuple[Kind, ...] = ("weight", "weight_range")
EPS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
SAMPLES, SIZES = 64, (12, 12, 3)


class SavedLSQ(torch.autograd.Function):
    """LSQ with the right values and first derivatives, from saved tensors; what not to do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
        """``s round(clip(x / s, qmin, qmax))``."""
        ctx.save_for_backward(x, scale, qmin, qmax)
        return torch.round(torch.clamp(x / scale, qmin, qmax)) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """LSQ's equations 3 and 5."""
        x, scale, qmin, qmax = ctx.saved_tensors
        u = x / scale
        inside = (u >= qmin) & (u <= qmax)
        slope = torch.where(inside, torch.round(u) - u, torch.clamp(u, qmin, qmax))
        return gradients[0] * inside, (gradients[0] * slope).sum(), None, None


class MonolithicLSQ(LSQ):
    """LSQ as one Function."""

    def fake_quantize(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Quantize ``x``; rounding cannot be left out."""
        limits = (limit.to(x.dtype) for limit in self.limits())
        quantized: Tensor = SavedLSQ.apply(x, self.scale, *limits)  # type: ignore[no-untyped-call]
        return quantized


class Finding(NamedTuple):
    """What the experiment gives.

    Attributes:
        gradient_difference: greatest difference between the two forms' first derivatives.
        forms: top eigenvalue and asymmetry by form, weights and steps as variables.
        eigenvalue: the top one by the weights alone.
        differences: its finite-difference stand-in ``v'(g(w + eps v) - g(w - eps v)) / 2 eps``, by eps.
    """

    gradient_difference: float
    forms: dict[str, tuple[float, float]]
    eigenvalue: float
    differences: dict[float, float]


def loss(network: Any, batch: Any) -> Tensor:
    """Cross-entropy, in the network's own dtype."""
    return nn.functional.cross_entropy(network(batch[0]), batch[1])


def problem(monolithic: bool) -> tuple[nn.Module, FixedBatches]:
    """The network, weights at 3 bit, and data that it classifies; the same numbers for both forms."""
    generator = torch.Generator().manual_seed(0)
    inputs, hidden, outputs = SIZES
    net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    weight = {"name": "lsq", "bits": 3, "init": "mse", "options": {"gradient_factor": False}}
    convert(net, Recipe.from_config({"weight": weight}), "0", "2")
    net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(SAMPLES, inputs, generator=generator, dtype=torch.float64)
    calibrate(net, [x])
    y = net(x).argmax(1)
    for _, layer in quant_layers(net):
        if monolithic:
            assert layer.weight_quantizer is not None
            layer.weight_quantizer.__class__ = MonolithicLSQ
    return net.eval(), FixedBatches(((x, y),))


def first_gradient(operator: CurvatureOperator, at: Tensor) -> Tensor:
    """Gradient of the operator's loss by its variables, moved by ``at`` (size,)."""
    moves = operator.split(at)
    _, found = gradient_at(operator.net, operator.loss, operator.batches, operator.surface, moves)
    return torch.cat([found[name].reshape(-1) for name in operator.layout])


def finite_difference(operator: CurvatureOperator, v: Tensor, eps: float) -> float:
    """``v'(g(w + eps v) - g(w - eps v)) / (2 eps)`` for a unit vector."""
    forth, back = first_gradient(operator, eps * v), first_gradient(operator, -eps * v)
    return float(torch.dot(v, forth - back) / (2 * eps))


def experiment() -> Finding:
    """Both forms, and the finite differences."""
    forms, gradients = {}, []
    for name, monolithic in (("detach form", False), ("one Function", True)):
        operator = hessian(*_at(monolithic), "latent", kinds=WITH_STEPS)
        gradients.append(first_gradient(operator, torch.zeros(operator.size, dtype=torch.float64)))
        dense = torch.stack([operator.matvec(row) for row in torch.eye(operator.size, dtype=torch.float64)])
        values = torch.linalg.eigvals(dense)
        forms[name] = (float(values.real[values.abs().argmax()]), asymmetry(operator))
    operator = hessian(*_at(False), "latent")
    top = top_eigenvalues(operator, k=1, tolerance=1e-8, progress=False)
    differences = {eps: finite_difference(operator, top.vectors[0], eps) for eps in EPS}
    return Finding(float((gradients[0] - gradients[1]).abs().max()), forms, top.values[0], differences)


def _at(monolithic: bool) -> tuple[nn.Module, Any, FixedBatches]:
    net, batches = problem(monolithic)
    return net, loss, batches


def markdown(found: Finding) -> str:
    """The two tables."""
    lines = [
        "| quantizer written as | first gradients | top eigenvalue | asymmetry |",
        "| --- | --- | --- | --- |",
    ]
    same = "equal" if found.gradient_difference < 1e-12 else f"differ by {found.gradient_difference:.1g}"
    for name, (value, lopsided) in found.forms.items():
        shown = "rounding" if lopsided < 1e-10 else f"{lopsided:.2f}"
        lines.append(f"| {name} | {same} | {value:.3f} | {shown} |")
    lines += ["", "| step ε | " + " | ".join(f"{eps:g}" for eps in found.differences) + " | true |"]
    lines += ["| --- |" + " --- |" * (len(found.differences) + 1)]
    cells = " | ".join(f"{value:.3f}" for value in found.differences.values())
    lines += [f"| curvature along the top eigenvector | {cells} | {found.eigenvalue:.3f} |"]
    return "\n".join(lines)


def filled(page: str, text: str) -> str:
    """``page`` with ``text`` between the two marker lines.

    Raises:
        ValueError: the page has no such lines.
    """
    if not re.search(f"{START}.*{END}", page, flags=re.DOTALL):
        raise ValueError(f"page=: it has no lines {START} and {END}; put them where the tables go")
    return re.sub(f"{START}.*{END}", lambda _: f"{START}\n{text}\n{END}", page, flags=re.DOTALL)


def main(page: str | None) -> None:
    """Run the experiment and print its tables, or put them into a page.

    Args:
        page: Markdown file with the marker lines; None prints.
    """
    text = markdown(experiment())
    if page is None:
        print(text)
    else:
        atomic_write_text(Path(page), filled(Path(page).read_text(), text))


if __name__ == "__main__":
    script(main, {"page": None})
