"""Every property can fail, and says what is wrong and nothing else: `tests/faults/layers.py` against all properties."""

from __future__ import annotations

import pytest
import torch

from tests.conformance.examine import FAILS, examine
from tests.conformance.properties import PROPERTIES
from tests.conformance.subject import Subject
from tests.faults.layers import LAYERS

pytestmark = pytest.mark.cpu  # what is shown is the suite's, not the layer's


@pytest.mark.parametrize("name", LAYERS)
def test_a_fault_is_reported_by_its_properties(name: str, device: torch.device) -> None:
    fault = LAYERS[name]
    for broken in fault.breaks:
        assert examine(PROPERTIES[broken], Subject(fault, device), "", 20, shrink=False).verdict == FAILS, broken


@pytest.mark.nightly
@pytest.mark.parametrize("name", LAYERS)
def test_matrix_of_faults_and_properties(name: str, device: torch.device) -> None:
    """Each is reported by no other property."""
    subject = Subject(LAYERS[name], device)
    examined = (examine(p, subject, "", 50, shrink=False) for p in PROPERTIES.values())
    assert {v.name for v in examined if v.verdict == FAILS} == LAYERS[name].breaks


def test_every_property_can_fail() -> None:
    assert set(PROPERTIES) == frozenset().union(*(fault.breaks for fault in LAYERS.values()))
