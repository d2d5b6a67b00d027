"""The sets of properties: of a layer that sees all tokens, and of one that is strictly causal (`--causal`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tests.conformance import causal
from tests.conformance.causal.subject import CausalSubject
from tests.conformance.properties import PROPERTIES
from tests.conformance.registry import Property
from tests.conformance.subject import Subject


class PropertySet(NamedTuple):
    """subject: what its properties are asked of."""

    properties: Mapping[str, Property]
    subject: type[Subject]


SETS = {False: PropertySet(PROPERTIES, Subject), True: PropertySet(causal.PROPERTIES, CausalSubject)}
