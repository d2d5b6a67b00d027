"""Our strictly causal layers, which have everything that can be asked for."""

from __future__ import annotations

import reference
from tests.conformance.causal.subject import FEATURES


class Reference(reference.MixtureOfAutoregressiveAttention):
    features = FEATURES
