"""The same products by another library: curvlinops-for-pytorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from research.curvature.operators import CurvatureOperator
from research.curvature.surface import SURFACES, Surface
from tests.curvature.small import WEIGHTS, at_surface, crossentropy, products, small_batches, small_net, vectors

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed; .ci/run installs it")
OTHERS = {"hessian": "HessianLinearOperator", "ggn": "GGNLinearOperator", "fisher": "EFLinearOperator"}


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("kind", OTHERS)
def test_products_agree_with_curvlinops(kind: str, surface: Surface) -> None:
    by_hand, batches = at_surface(small_net(), surface), small_batches()
    parameters = [dict(by_hand.named_parameters())[name] for name in WEIGHTS]
    other = getattr(curvlinops, OTHERS[kind])(by_hand, nn.CrossEntropyLoss(), parameters, list(batches))
    expected = (other @ vectors(42).T).T
    found = products(CurvatureOperator(kind, small_net(), crossentropy, batches, surface))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
