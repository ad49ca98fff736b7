"""Why codes oscillate, on one weight: ``python -m analysis.figures.oscillation_toy [steps=N] [lr=X]``.

The toy regression of Nagel et al. (ICML 2022, arXiv 2203.11086): ``min_w E[(x w* - x q(w))^2] / 2`` with ``q(w) = s
round(w / s)``. Left: the latent weight against the step, by rule; it never settles with the straight-through estimator.
Right: how often the code jumps back, against the distance ``d`` of ``w*`` to the grid, and the line ``2 d / s``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from analysis.collect import Row
from analysis.figures.base import Drawn, figure_script, panels, plain, styles
from research.quant.oscillation import start, track

Rule = Literal["ste", "ewgs", "dampening"]
LABELS: dict[Rule, str] = {"ste": "straight-through", "ewgs": "EWGS, δ = 0.2", "dampening": "dampening, λ = 0.5"}
SHOWN, SHOWN_LR = 60, 0.1
"""Steps and learning rate on the left, where single steps are to be seen."""
DELTA, STRENGTH, MOMENTUM = 0.2, 0.5, 0.01


class Toy(NamedTuple):
    """Trajectories of several problems at once, each (steps, problems).

    Attributes:
        latent: w.
        codes: round(w / s).
        frequency: exponential average of oscillations a step.
    """

    latent: Tensor
    codes: Tensor
    frequency: Tensor


def toy_regression(
    optimum: Tensor, steps: int, lr: float, rule: Rule = "ste", scale: float = 1.0, momentum: float = MOMENTUM
) -> Toy:
    """Gradient descent on the toy regression with ``E[x^2] = 1``, from the optimum.

    ``w <- w - lr g`` with ``g = q(w) - w*`` (``ste``), ``g (1 + delta sign(g) (w / s - round(w / s)))`` (``ewgs``) or
    ``g + 2 lambda (w - q(w))`` (``dampening``).

    Args:
        optimum: w*, (problems,).
        steps: number of steps.
        lr: learning rate, much smaller than ``scale``.
        rule: what stands in for the derivative of ``q``.
        scale: s.
        momentum: m of the frequency.
    """
    w, seen = optimum.double().clone(), []
    state = start(torch.round(w / scale), torch.float64)
    for _ in range(steps):
        codes = torch.round(w / scale)
        state = track(state, codes, momentum)
        seen.append((w, codes, state.frequency))
        gradient = scale * codes - optimum
        if rule == "ewgs":
            gradient = gradient * (1 + DELTA * torch.sign(gradient) * (w / scale - codes))
        elif rule == "dampening":
            gradient = gradient + 2 * STRENGTH * (w - scale * codes)
        w = w - lr * gradient
    return Toy(*(torch.stack(values) for values in zip(*seen, strict=True)))


def draw(rows: Sequence[Row], steps: int = 4000, lr: float = 0.01) -> Drawn:
    """Latent weights over time and the frequency of oscillation; the runs play no part.

    Args:
        rows: not looked at.
        steps: of each toy run on the right.
        lr: its learning rate.
    """
    if steps < 10 or lr <= 0:
        raise ValueError(f"steps={steps} lr={lr}: use 10 steps or more and a positive rate, such as 4000 and 0.01")
    distances = torch.linspace(0.02, 0.5, 25)
    last = steps // 4
    found = toy_regression(distances, steps, lr).frequency[-last:].mean(0)
    figure, (left, right) = panels(1, 2)
    look = styles(LABELS)
    for rule, label in LABELS.items():
        toy = toy_regression(torch.tensor([0.2]), min(steps, SHOWN), SHOWN_LR, rule)
        left.plot(toy.latent[:, 0], label=label, **plain(look[rule]))
    left.axhline(0.5, color="0.5", lw=0.6)
    left.set_xlabel(f"step, learning rate {SHOWN_LR:g}")
    left.set_ylabel("latent weight / s, w* = 0.2 s")
    left.legend()
    right.plot(distances, found, "ok", markersize=3, label="measured")
    right.plot(distances, 2 * distances, color="0.5", lw=0.8, label="2 d / s")
    right.set_xlabel("distance d of w* to the grid / s")
    right.set_ylabel("oscillations a step")
    right.legend()
    return Drawn(figure, ("distance", "frequency"), list(zip(distances.tolist(), found.tolist(), strict=True)))


if __name__ == "__main__":
    figure_script(draw, __file__)
