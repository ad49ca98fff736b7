"""The generated page of mechanics: it is what the generator prints now, and what it says holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.mechanics import Entry, main, off_switch, some, verdict
from research.learning.mechanic import Mechanic

ROOT = Path(__file__).resolve().parent.parent
QUANTIZERS = ("dorefa", "ewgs", "float", "lsq", "pact")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_page_is_what_the_generator_prints(tmp_path: Path) -> None:
    main(str(tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text()
    assert text == (ROOT / "docs/mechanics.md").read_text(), "make results writes it anew"
    lines = text.splitlines()
    for slug in (path.stem for path in (ROOT / "conf/callbacks").glob("*.yaml")):
        own = [line for line in lines if line.startswith((f"| {slug} |", f"| [{slug}](", f"| **{slug}** |"))]
        assert len(own) == 2, "a row of declarations and a row of pairs"


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (QUANTIZERS, "all"),
        (("ewgs",), "ewgs"),
        (("ewgs", "lsq"), "ewgs, lsq"),
        (("dorefa", "ewgs", "lsq", "pact"), "all but float"),
        ((), ""),
    ],
)
def test_a_choice_is_told_in_the_fewest_words(chosen: tuple[str, ...], words: str) -> None:
    assert some(chosen, QUANTIZERS) == words


def test_the_off_switch_is_the_declared_one() -> None:
    assert off_switch("sam") == "`rho=0.0`"
    assert off_switch("nothing") == "–"


def entry(slug: str, quantizers: tuple[str, ...], *claims: str) -> Entry:
    mechanic = type(slug, (Mechanic,), {"slug": slug, "claims": frozenset(claims)})()
    return Entry(slug, {}, mechanic, quantizers)


def test_a_pair_shares_a_claim_or_lacks_a_quantizer() -> None:
    one, other = entry("one", ("lsq",), "bits", "codes"), entry("other", ("lsq",), "codes", "bits")
    assert verdict(one, other, {}) == "`bits`, `codes`"
    assert verdict(one, entry("free", ("ewgs",), "task_loss"), {}) == "no quantizer"
