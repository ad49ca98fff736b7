"""Any two mechanics, every set that goes together, every set that the repository names: they train, or say why not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from research.learning.mechanic import CLAIMS
from research.learning.module import QuantModule
from research.quant.layers import quantizers
from tests.conformance.registry import CONF, FIRST, MECHANICS, Case
from tests.learning.tiny import LSQ, RESNET, fit, float_weights, make_data, make_module, tiny_net
from tests.test_config import composed, sweep_jobs

MODEL = tiny_net()
SWEEPS = CONF.parent / "sweeps"
CANDIDATES = [*sorted((CONF / "experiment").glob("*.yaml")), *sorted(SWEEPS.glob("*.yaml"))]
NAMING = [path for path in CANDIDATES if "callbacks" in path.read_text()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_weights(tmp_path_factory.mktemp("float") / "tiny.safetensors", MODEL)


def by_claims(slug: str) -> list[Case]:
    """The first variant with each set of claims."""
    cases: dict[frozenset[Any], Case] = {}
    for case in MECHANICS.values():
        if case.slug == slug:
            cases.setdefault(case.build().claims, case)
    return list(cases.values())


def host(*cases: Case, checkpoint: Path) -> QuantModule:
    """A network with the mechanics of all cases; ValueError where two of them do not go together."""
    mechanics = {slug: config for case in cases for slug, config in case.mechanics.items()}
    recipes = [case.quantizer for case in cases if case.declared.quantizer is not None]
    return make_module(mechanics, model=MODEL, quantizer=recipes[0] if recipes else LSQ, checkpoint=checkpoint)


def steps(module: QuantModule) -> int:
    data = make_data(search=8, options={"train": 48, "test": 16})
    return int(fit(module, data, max_epochs=1, limit_train_batches=2, limit_val_batches=0).global_step)


def derived_twice(module: QuantModule) -> list[str]:
    return [mechanic.slug for mechanic in module.active if mechanic.needs_double_backward]


def gradient_dependent(module: QuantModule) -> list[str]:
    return [name for name, quantizer in quantizers(module.net) if quantizer.backward == "gradient_dependent"]


@pytest.mark.parametrize(("one", "other"), list(combinations(FIRST, 2)))
def test_two_mechanics_train_or_name_their_conflict(one: str, other: str, weights: Path) -> None:
    for cases in product(by_claims(one), by_claims(other)):
        shared = cases[0].build().claims & cases[1].build().claims
        try:
            module = host(*cases, checkpoint=weights)
        except ValueError as refusal:
            assert "\n" not in str(refusal)
            if shared:
                assert f"callbacks.{one} and callbacks.{other} both claim" in str(refusal)
            else:
                assert f"callbacks.{one}" in str(refusal) or f"callbacks.{other}" in str(refusal)
        else:
            assert not shared
            assert not (derived_twice(module) and gradient_dependent(module)), "that has no second derivative"
            assert steps(module) == 2


def test_mechanics_for_different_quantizers_share_a_claim() -> None:
    for one, other in combinations(FIRST.values(), 2):
        if one.declared.quantizer and other.declared.quantizer and one.quantizer != other.quantizer:
            assert one.build().claims & other.build().claims


def representatives(first: Case, checkpoint: Path) -> list[Case]:
    """``first`` and, for every claim that is still free, the first case that goes together with those before it."""
    chosen = [first]
    for case in MECHANICS.values():
        if case.build().claims and case.slug not in [other.slug for other in chosen]:
            try:
                host(*chosen, case, checkpoint=checkpoint)
            except ValueError:
                continue
            chosen.append(case)
    return chosen


def test_one_representative_of_every_claim_trains_with_the_others(weights: Path) -> None:
    owners: dict[str, Case] = {}
    for case in MECHANICS.values():
        for claim in case.build().claims:
            owners.setdefault(claim, case)
    assert owners.keys() <= set(CLAIMS)
    sets = [representatives(owner, weights) for owner in owners.values()]
    assert max(map(len, sets)) > 1
    for cases in sets:
        assert steps(host(*cases, checkpoint=weights)) == 2


def named_sets(path: Path) -> Iterator[dict[str, Any]]:
    """Configs of an experiment or a sweep, one for every set of mechanics that it runs."""
    jobs = sweep_jobs(path) if path.parent == SWEEPS else [[f"experiment={path.stem}"]]
    seen: list[set[str]] = []
    for job in jobs:
        config = composed(job, path.stem, SWEEPS) if path.parent == SWEEPS else composed(job)
        slugs = set(config["callbacks"])
        if slugs and slugs not in seen:
            seen.append(slugs)
            yield config


@pytest.mark.parametrize("path", NAMING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_set_that_an_experiment_or_a_sweep_names_trains(path: Path, tmp_path: Path) -> None:
    checkpoint = float_weights(tmp_path / "float.safetensors", RESNET)
    for config in named_sets(path):
        recipe = {**config["quantizer"], "rules": [], "replace": [], "table": None}
        module = make_module(config["callbacks"], model=RESNET, quantizer=recipe, checkpoint=checkpoint)
        assert steps(module) == 2
