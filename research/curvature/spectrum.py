"""Spectral quantities of a curvature operator: extreme eigenvalues, trace, block traces, spectral density.

The algorithms are those of hessian-eigenthings; what is added are the guards: enough Lanczos steps, residuals from real
products, standard errors, marks on what has not converged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from hessian_eigenthings.algorithms.lanczos import lanczos
from hessian_eigenthings.algorithms.spectral_density import spectral_density as library_density
from hessian_eigenthings.algorithms.trace import hutch_plus_plus
from hessian_eigenthings.operators.base import CurvatureOperator as LibraryOperator
from torch import Tensor

from research.curvature.estimates import Eigenvalues, SpectralDensity, Subspace, Trace
from research.curvature.hutchinson import block_samples
from research.curvature.operators import CurvatureOperator
from research.curvature.replay import Replay, counted
from research.curvature.surface import owners

Which = Literal["LM", "LA", "SA"]
WHICH: tuple[Which, ...] = get_args(Which)
FIRST_STEPS, MORE_STEPS = 15, 5


def top_eigenvalues(
    operator: LibraryOperator,
    k: int = 5,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
    progress: bool = True,
    which: Which = "LM",
) -> Eigenvalues:
    """The k extreme eigenvalues by Lanczos with full reorthogonalisation, extended until all have converged.

    An eigenvalue of multiplicity m appears once: Lanczos from one vector sees one of its eigenvectors.

    Args:
        operator: a symmetric operator.
        k: how many; fewer come back from a matrix with fewer distinct ones.
        tolerance: relative residual below which a value counts as converged.
        max_iterations: most products; what has not converged then is returned and marked.
        seed: of the first vector.
        progress: a bar, on terminals.
        which: greatest magnitude (LM), greatest (LA) or smallest (SA).

    Raises:
        ValueError: an option out of its range.
    """
    if which not in WHICH:
        raise ValueError(f"which={which}: use one of {', '.join(WHICH)}")
    if not 1 <= k <= operator.size:
        raise ValueError(f"k={k}: the operator has {operator.size} eigenvalues; use 1..{operator.size}")
    if tolerance <= 0 or max_iterations < k:
        raise ValueError(f"tolerance={tolerance:g} max_iterations={max_iterations}: use 1e-3 and {max(k, 100)}")
    most = min(max_iterations, operator.size)
    steps = min(max(FIRST_STEPS, 2 * k), most)
    with counted(operator, "eigenvalues", most, progress) as watched:
        replay = Replay(watched)
        while True:
            replay.rewind()
            found = lanczos(replay, k=k, max_iter=steps, tol=tolerance, reorthogonalize=True, which=which, seed=seed)
            residuals = _residuals(replay, found.eigenvalues, found.eigenvectors)
            if steps == most or found.iterations < steps or max(residuals) < tolerance:
                break
            steps = min(steps + MORE_STEPS, most)
    values = tuple(float(value) for value in found.eigenvalues)
    return Eigenvalues(values, residuals, tolerance, int(found.iterations), seed, found.eigenvectors, replay.explored())


def _residuals(replay: Replay, values: Tensor, vectors: Tensor) -> tuple[float, ...]:
    """``|Hv - lambda v| / |lambda|`` of every pair, at unit length of ``v``."""
    floor = torch.finfo(values.dtype).tiny
    return tuple(
        float((replay.product(v) - value * v).norm() / v.norm() / max(abs(float(value)), floor))
        for value, v in zip(values, vectors, strict=True)
    )


def trace(
    operator: LibraryOperator,
    probes: int = 30,
    seed: int = 0,
    progress: bool = True,
    known: Subspace | None = None,
) -> Trace:
    """The trace: exact on a subspace that holds the great eigenvalues, by Hutchinson's estimator on the rest.

    Without a ``known`` subspace this is Hutch++ (Meyer, Musco, Musco, Woodruff 2021), which spends a third of the
    probes on a sketch of one and a third on the operator there. The vectors that Lanczos multiplied span a better one
    (`Eigenvalues.explored`), and every probe then goes into the rest. The standard error is that of the rest, from the
    spread of its samples.

    Args:
        operator: a symmetric operator.
        probes: products.
        seed: of the probes.
        progress: a bar, on terminals.
        known: a subspace where the operator is known; chosen without these probes, or the estimate is biased.

    Raises:
        ValueError: too few probes for a standard error.
    """
    least = 6 if known is None else 2
    if probes < least:
        raise ValueError(f"probes={probes}: use {least} or more, such as 30; the standard error needs two samples")
    if known is None:
        with counted(operator, "trace", 3 * (probes // 3), progress) as watched:
            found = hutch_plus_plus(watched, num_matvecs=probes, seed=seed)
        return Trace(found.estimate, found.stderr, 3 * (probes // 3), seed)
    generator = torch.Generator().manual_seed(seed)
    samples = torch.empty(probes, dtype=torch.float64)
    with counted(operator, "trace", probes, progress) as watched:
        for index in range(probes):
            signs = torch.randint(0, 2, (operator.size,), generator=generator) * 2 - 1
            rest = known.without(signs.to(operator.device, operator.dtype))
            samples[index] = torch.dot(rest, watched.matvec(rest))
    mean = mean_trace(samples, seed)
    return Trace(known.trace + mean.value, mean.standard_error, probes, seed)


def block_traces(
    operator: CurvatureOperator,
    probes: int = 30,
    seed: int = 0,
    progress: bool = True,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Trace]:
    """The traces of diagonal blocks, all from the same products (Hutchinson).

    Args:
        operator: of a network.
        probes: products.
        seed: of the probes.
        progress: a bar, on terminals.
        groups: parameter names by block; None makes a block of every module that holds parameters: a layer, and a
            quantizer where its ranges are among the variables.

    Raises:
        ValueError: too few probes for a standard error.
    """
    if probes < 2:
        raise ValueError(f"probes={probes}: use 2 or more, such as 30; the standard error needs two samples")
    names = list(operator.layout)
    with counted(operator, "block traces", probes, progress) as watched:

        def product(signs: list[Tensor]) -> list[Tensor]:
            return list(operator.split(watched.matvec(torch.cat([z.reshape(-1) for z in signs]))).values())

        tensors = list(
            operator.split(torch.empty(operator.size, dtype=operator.dtype, device=operator.device)).values()
        )
        samples = block_samples(product, tensors, probes, torch.Generator().manual_seed(seed))
    column = {name: samples[:, index] for index, name in enumerate(names)}
    blocks = owners(names) if groups is None else groups
    return {
        block: mean_trace(torch.stack([column[name] for name in members]).sum(0), seed)
        for block, members in blocks.items()
    }


def mean_trace(samples: Tensor, seed: int) -> Trace:
    """The mean of independent samples of a trace, (probes,), with its standard error."""
    error = float(samples.std() / len(samples) ** 0.5)
    return Trace(float(samples.mean()), error, len(samples), seed)


def spectral_density(
    operator: LibraryOperator,
    runs: int = 4,
    steps: int = 60,
    points: int = 1000,
    width: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SpectralDensity:
    """The density of the eigenvalues by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017).

    Args:
        operator: a symmetric operator.
        runs: random vectors.
        steps: Lanczos steps, and products, for each.
        points: of the grid.
        width: of the Gaussian kernel, in units of the eigenvalues; None: the range of the spectrum over ``steps``.
        seed: of the random vectors.
        progress: a bar, on terminals.

    Raises:
        ValueError: an option out of its range.
    """
    if runs < 1 or steps < 2 or points < 2:
        raise ValueError(f"runs={runs} steps={steps} points={points}: use 4, 60 and 1000")
    steps = min(steps, operator.size)
    with counted(operator, "spectral density", runs * steps, progress) as watched:
        found = library_density(
            watched, num_runs=runs, lanczos_steps=steps, num_grid_points=points, sigma=width, seed=seed
        )
    return SpectralDensity(found.grid.cpu(), found.density.cpu(), float(found.sigma), runs, steps, seed)
