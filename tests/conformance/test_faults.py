"""Every property can fail, and says what is wrong and nothing else: `layers.py` and `causal.py` of `tests/faults`
against all properties.
"""

from __future__ import annotations

import pytest
import torch

from tests.conformance.examine import FAILS, examine
from tests.conformance.sets import SETS
from tests.faults.causal import CAUSAL
from tests.faults.layers import LAYERS

pytestmark = pytest.mark.cpu  # what is shown is the suite's, not the layer's


FAULTS = {False: LAYERS, True: CAUSAL}
EACH = pytest.mark.parametrize(
    ("causal", "name"), [(causal, name) for causal, faults in FAULTS.items() for name in faults]
)


@EACH
def test_a_fault_is_reported_by_its_properties(causal: bool, name: str, device: torch.device) -> None:
    (properties, kind), fault = SETS[causal], FAULTS[causal][name]
    for broken in fault.breaks:
        assert examine(properties[broken], kind(fault, device), "", 20, shrink=False).verdict == FAILS, broken


@pytest.mark.nightly
@EACH
def test_matrix_of_faults_and_properties(causal: bool, name: str, device: torch.device) -> None:
    """Each is reported by no other property."""
    (properties, kind), fault = SETS[causal], FAULTS[causal][name]
    examined = (examine(p, kind(fault, device), "", 50, shrink=False) for p in properties.values())
    assert {v.name for v in examined if v.verdict == FAILS} == fault.breaks | getattr(fault, "also", frozenset())


@pytest.mark.parametrize("causal", FAULTS)
def test_every_property_can_fail(causal: bool) -> None:
    assert set(SETS[causal].properties) == frozenset().union(*(fault.breaks for fault in FAULTS[causal].values()))
