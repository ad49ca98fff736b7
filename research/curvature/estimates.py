"""Estimates of spectral quantities, each with what says how far to trust it; a doubtful value is never given bare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Subspace:
    """A subspace on which an operator A is known exactly.

    Attributes:
        basis: orthonormal vectors q (number, size).
        trace: of the operator on it, the sum of ``q' A q``.
    """

    basis: Tensor = field(repr=False)
    trace: float

    def without(self, vector: Tensor) -> Tensor:
        """The part of ``vector`` (size,) that is orthogonal to the subspace."""
        return vector - (self.basis @ vector) @ self.basis


@dataclass(frozen=True)
class Eigenvalues:
    """Extreme eigenvalues of a curvature operator, in decreasing order of what was asked for.

    Attributes:
        values: the eigenvalues found.
        residuals: relative residuals ``|Hv - lambda v| / |lambda|`` of each, from products with the operator: some
            eigenvalue lies within ``residual * |lambda|`` of the value.
        tolerance: residual below which a value counts as converged.
        iterations: Lanczos steps, one product each.
        seed: of the first vector.
        vectors: unit eigenvectors (number, size).
        explored: all that was multiplied on the way.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    tolerance: float
    iterations: int
    seed: int
    vectors: Tensor = field(repr=False, compare=False)
    explored: Subspace = field(repr=False, compare=False)

    @property
    def converged(self) -> tuple[bool, ...]:
        """Which values may be used."""
        return tuple(residual < self.tolerance for residual in self.residuals)

    def record(self) -> dict[str, Any]:
        """Plain values; every eigenvalue stands beside its residual and its mark."""
        found = zip(self.values, self.residuals, self.converged, strict=True)
        return {
            "values": [{"value": v, "residual": r, "converged": done} for v, r, done in found],
            "tolerance": self.tolerance,
            "iterations": self.iterations,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        return ", ".join(shown(v, done) for v, done in zip(self.values, self.converged, strict=True))


def shown(value: float, converged: bool) -> str:
    """An eigenvalue as text, marked where it has not converged."""
    return f"{value:.4g}" if converged else f"~{value:.3g} (not converged)"


@dataclass(frozen=True)
class Trace:
    """A stochastic estimate of a trace.

    Attributes:
        value: the estimate.
        standard_error: of ``value``, from the spread of its samples.
        probes: products with the operator.
        seed: of the probes.
    """

    value: float
    standard_error: float
    probes: int
    seed: int

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "probes": self.probes,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class SpectralDensity:
    """Smoothed density of the eigenvalues, a probability density.

    Attributes:
        grid: eigenvalues, ascending (points,).
        density: share of eigenvalues per unit (points,).
        width: standard deviation of the Gaussian that stands for each node; finer structure is not resolved.
        runs: random vectors averaged over.
        steps: Lanczos steps of each.
        seed: of the random vectors.
    """

    grid: Tensor = field(repr=False)
    density: Tensor = field(repr=False)
    width: float
    runs: int
    steps: int
    seed: int

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "grid": self.grid.tolist(),
            "density": self.density.tolist(),
            "width": self.width,
            "runs": self.runs,
            "steps": self.steps,
            "seed": self.seed,
        }
