"""The registry covers what there is, and refuses what it does not know."""

from pathlib import Path

import pytest

from research.learning.mechanic import CLAIMS, STAGES
from research.settings import PRECISIONS
from tests.conformance.registry import CONF, DECLARED, FIRST, MECHANICS, Declared, read_declared, recipe


def test_every_mechanic_is_covered_and_only_mechanics_are_declared() -> None:
    mechanics = {path.stem for path in (CONF / "callbacks").glob("*.yaml")}
    assert set(FIRST) == mechanics
    assert {path.stem for path in DECLARED.iterdir()} <= mechanics


@pytest.mark.parametrize("name", MECHANICS)
def test_a_class_declares_itself_in_known_words(name: str) -> None:
    mechanic = MECHANICS[name].build()
    assert mechanic.slug == MECHANICS[name].slug
    assert mechanic.stage in STAGES
    assert mechanic.claims <= set(CLAIMS)
    assert set(mechanic.precisions) <= set(PRECISIONS) and mechanic.precisions
    assert mechanic.ddp in ("exact", "per_replica")


def test_a_mechanic_without_a_file_runs_with_its_own_settings(tmp_path: Path) -> None:
    assert read_declared(tmp_path / "absent.yaml") == Declared()


def test_unknown_keys_fail(tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("variant: [{}]\n")
    with pytest.raises(TypeError, match="variant"):
        read_declared(tmp_path / "typo.yaml")


def test_a_recipe_is_resolved_at_one_width() -> None:
    found = recipe("ewgs")
    assert found["weight"]["bits"] == found["input"]["bits"] == 4
    assert found["rules"] == []
