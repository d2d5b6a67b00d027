"""The taxonomy and the faults are in step: no class and no public bug without one, and none of another name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutants.registry import MUTANTS

from tests.faults.fault import Fault
from tests.faults.registry import FAULTS
from tests.faults.taxonomy import CLASSES, PUBLIC, classify, described

DIFFERENCES = Path(__file__).parents[2] / "docs" / "differences.md"


def test_every_public_bug_is_re_enacted() -> None:
    assert {m.public for m in MUTANTS} | {classify(f.why)[1] for f in FAULTS.values()} == {*PUBLIC, "own"}
    assert {bug for bug, _ in PUBLIC.values()} <= set(CLASSES)


def test_numbers_are_those_of_the_list() -> None:
    """Of the packages whose defects docs/differences.md lists."""
    rows = re.findall(r"^\| ([\d, ]+) \| ", DIFFERENCES.read_text(), re.MULTILINE)
    listed = {number for row in rows for number in row.split(", ")}
    numbers = {found[1] for found in map(re.compile(r" \((\d+)\)$").search, PUBLIC) if found}
    assert numbers <= listed
    assert listed - numbers == {"8", "10"}, "what does not compile or raises is not re-enacted"


def test_names_are_unique_and_reasons_known() -> None:
    assert {fault.name for fault in FAULTS.values()} == set(FAULTS)
    with pytest.raises(ValueError, match="name: expected that of no other fault, got 'zeros'"):
        Fault("zeros", "mass")
    for why, bug in (("bad luck", ""), ("mass", "tail mask"), ("deep-spin/entmax#32", "bad luck")):
        with pytest.raises(ValueError, match="why: expected a class of bugs or a public bug, got"):
            classify(why, bug)


def test_a_public_bug_has_its_class_and_words() -> None:
    assert classify("deep-spin/entmax#32") == ("masked rows and sentinels", "deep-spin/entmax#32")
    assert classify("deep-spin/entmax#32", "mass") == ("mass", "deep-spin/entmax#32")
    assert classify("mass") == ("mass", "own")
    assert described("deep-spin/entmax#32") == "deep-spin/entmax#32: peaked scores"
    assert described("own") == "own"
