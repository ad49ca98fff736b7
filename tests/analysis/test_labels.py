"""What runs are called, and which may be compared."""

from pathlib import Path

from analysis.collect import collect
from analysis.columns import widths
from analysis.labels import method_name, setting

RECORDS = Path(__file__).parents[2] / "docs/results/records"


def test_networks_of_one_recipe_and_of_tables_are_of_different_settings() -> None:
    even = collect(str(RECORDS / "lsq_resnet20_cifar10_w3a3/*"))
    tables = collect(str(RECORDS / "allocation_retrained/*"))
    assert {setting(row) for row in even} == {f"resnet20, cifar10, W3A3, {epochs} epochs" for epochs in (8, 10, 15)}
    assert {widths(row) for row in even} == {(3, 3)} and {widths(row) for row in tables} == {None}
    assert {method_name(row) for row in (*even, *tables)} == {"LSQ"}
    found = {setting(row) for row in tables}
    assert len(found) == 11 and "resnet20, cifar10, widths from greedy, 10 epochs" in found


def test_a_search_says_so_and_measuring_mechanics_are_no_part_of_a_method() -> None:
    (row, *_) = collect(str(RECORDS / "bmpq_resnet20_cifar10_w3/*"))
    assert (method_name(row), setting(row)) == ("LSQ + BMPQ", "resnet20, cifar10, widths from bmpq, 10 epochs")
    (row, *_) = collect(str(RECORDS / "oscillation_tracker_resnet20_cifar10_w2a2/*"))
    assert (method_name(row), setting(row)) == ("LSQ", "resnet20, cifar10, W2A2, 10 epochs")
    (row, *_) = collect(str(RECORDS / "sam_resnet20_cifar10_float/*"))
    assert (method_name(row), setting(row)) == ("SAM", "resnet20, cifar10, float, 10 epochs")
