"""SSPS's settings: what it refuses and how."""

from typing import Any

import pytest

from callbacks.ssps import SSPS
from tests.callbacks.searches import THREE, on_residual, only_mechanic
from tests.learning.tiny import LSQ, RESNET, make_module


def ssps(**options: Any) -> dict[str, Any]:
    return {"ssps": {"_target_": "callbacks.ssps.SSPS", "budget": THREE, "bits": [2, 3, 4, 8], **options}}


@pytest.mark.parametrize(("total", "span"), [(100, (10, 60)), (3910, (391, 2346)), (4, (0, 2)), (2, (0, 1))])
def test_when_the_warm_up_and_the_search_end(total: int, span: tuple[int, int]) -> None:
    assert SSPS(budget=THREE).span(total) == span


def test_input_widths_without_input_quantizers_are_named(caplog: pytest.LogCaptureFixture) -> None:
    on_residual(ssps(input_bits=[2, 4]), {"weight": LSQ["weight"]})
    assert "callbacks.ssps.input_bits=[2, 4]: no searched layer quantizes its input" in caplog.text
    caplog.clear()
    assert len(only_mechanic(on_residual(ssps(input_bits=[2, 4])), SSPS).cells) == 12 and not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [0, 2]}, "bits"),
        ({"bits": []}, "bits"),
        ({"input_bits": []}, "input_bits"),
        ({"grad": "one"}, "grad=one"),
        ({"pick": "best"}, "pick=best"),
        ({"certainty": "variance"}, "certainty=variance"),
        ({"tau_end": 0.0}, "tau_end=0.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"ramp": 2.0}, "ramp=2.0"),
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": 0.7}, " warmup=0.7, until=0.6"),
        ({"until": 1.0}, " warmup=0.1, until=1.0"),
        ({"budget": {"kind": "bits", "value": 3}}, "budget.kind=bits"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.ssps[.:]{message}"):
        SSPS(**{"budget": THREE, **options})


@pytest.mark.parametrize(
    ("quantizer", "options", "message"),
    [
        ({}, {}, "no quantized weight"),
        ({**LSQ, "weight": {"name": "ewgs", "bits": 4}}, {}, "EWGS"),
        ({**LSQ, "input": {"name": "ewgs", "bits": 4}}, {"input_bits": [2, 4]}, "the input quantizer EWGS"),
        ({**LSQ, "widths": [2, 4]}, {}, r"quantizer.widths=\[\]"),
        ({**LSQ}, {"bits": [1, 2]}, "lsq takes 2 to 8 bits"),
    ],
)
def test_networks_that_it_cannot_search_are_refused(
    quantizer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"callbacks.ssps[.:].*{message}"):
        make_module(ssps(**options), model=RESNET, quantizer=quantizer)
