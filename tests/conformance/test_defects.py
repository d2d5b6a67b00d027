"""Every property can fail, and says what is wrong and nothing else: `defects.py` against all properties."""

from __future__ import annotations

import functools
from dataclasses import replace

import hypothesis
import pytest
import torch

from tests.conformance.defects import DEFECTS
from tests.conformance.examine import FAILS, examine
from tests.conformance.properties import PROPERTIES
from tests.conformance.subject import NotOffered, Subject
from tests.strategies import LayerCase

pytestmark = pytest.mark.cpu  # what is shown is the suite's, not the layer's


@functools.cache
def drawn(name: str) -> LayerCase:
    """A configuration of a property, not its smallest."""
    found: list[LayerCase] = []

    @hypothesis.settings(max_examples=8, derandomize=True, database=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(PROPERTIES[name].cases)
    def record(case: LayerCase) -> None:
        found.append(case)

    record()
    # 16 items of the documented size take as long as everything else together.
    return replace(found[-1], batch=min(found[-1].batch, 3))


def fails(name: str, subject: Subject) -> bool:
    try:
        PROPERTIES[name].check(subject, drawn(name))
    except NotOffered:
        return False
    except Exception:
        return True
    return False


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_reported_by_its_properties(name: str, device: torch.device) -> None:
    defect = DEFECTS[name]
    for broken in defect.breaks:
        assert examine(PROPERTIES[broken], Subject(defect, device), "", 20, shrink=False).verdict == FAILS, broken


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_reported_by_no_other_property(name: str, device: torch.device) -> None:
    subject = Subject(DEFECTS[name], device)
    others = [other for other in PROPERTIES if other not in DEFECTS[name].breaks]
    assert [other for other in others if fails(other, subject)] == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", DEFECTS)
def test_matrix_of_defects_and_properties(name: str, device: torch.device) -> None:
    """The same with more and other configurations."""
    subject = Subject(DEFECTS[name], device)
    examined = (examine(p, subject, "", 50, shrink=False) for p in PROPERTIES.values())
    assert {v.name for v in examined if v.verdict == FAILS} == DEFECTS[name].breaks


def test_every_property_can_fail() -> None:
    assert set(PROPERTIES) == frozenset().union(*(defect.breaks for defect in DEFECTS.values()))
