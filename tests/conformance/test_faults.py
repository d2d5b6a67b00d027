"""Every property can fail, and says what is wrong and nothing else: `tests/faults/layers.py` against all properties."""

from __future__ import annotations

import functools
from dataclasses import replace

import hypothesis
import pytest
import torch

from tests.conformance.examine import FAILS, examine
from tests.conformance.properties import PROPERTIES
from tests.conformance.subject import NotOffered, Subject
from tests.faults.layers import LAYERS
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


@pytest.mark.parametrize("name", LAYERS)
def test_a_fault_is_reported_by_its_properties(name: str, device: torch.device) -> None:
    fault = LAYERS[name]
    for broken in fault.breaks:
        assert examine(PROPERTIES[broken], Subject(fault, device), "", 20, shrink=False).verdict == FAILS, broken


@pytest.mark.parametrize("name", LAYERS)
def test_a_fault_is_reported_by_no_other_property(name: str, device: torch.device) -> None:
    subject = Subject(LAYERS[name], device)
    others = [other for other in PROPERTIES if other not in LAYERS[name].breaks]
    assert [other for other in others if fails(other, subject)] == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", LAYERS)
def test_matrix_of_faults_and_properties(name: str, device: torch.device) -> None:
    """The same with more and other configurations."""
    subject = Subject(LAYERS[name], device)
    examined = (examine(p, subject, "", 50, shrink=False) for p in PROPERTIES.values())
    assert {v.name for v in examined if v.verdict == FAILS} == LAYERS[name].breaks


def test_every_property_can_fail() -> None:
    assert set(PROPERTIES) == frozenset().union(*(fault.breaks for fault in LAYERS.values()))
