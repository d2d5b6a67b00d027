"""Every property holds of the reference and of the optimized layer; with --impl, of the layer that it names.

Somebody else's layer is examined in a process of its own, and what it does not offer is skipped; ours offer everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conformance.examine import FAILS, NOT_OFFERED, examine
from tests.conformance.plugin import EXAMINER
from tests.conformance.sets import SETS
from tests.conformance.subject import factory_of

OURS = {
    False: ("reference:MixtureOfAttention", "optimized:MixtureOfAttention"),
    True: ("tests.conformance.causal.ours:Reference",),
}
EXAMPLES, EXAMPLES_OF_OURS = 50, 5  # ours have a suite of their own


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    layers = OURS if option.impl is None else {option.causal: (option.impl,)}
    pairs = [(spec, causal) for causal, specs in layers.items() for spec in specs]
    asked = [(spec, causal, name) for spec, causal in pairs for name in SETS[causal].properties]
    metafunc.parametrize(("spec", "causal", "name"), asked, ids=[f"{spec}-{name}" for spec, _, name in asked])


def test_conformance(
    name: str,
    causal: bool,
    spec: str,
    device: torch.device,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, Any], None],
) -> None:
    ours = pytestconfig.option.impl is None
    examples = pytestconfig.option.max_examples or (EXAMPLES_OF_OURS if ours else EXAMPLES)
    if ours:
        properties, subject = SETS[causal]
        verdict = examine(properties[name], subject(factory_of(spec, subject.FEATURES), device), spec, examples)
    else:
        verdict = pytestconfig.stash[EXAMINER].examine(name, examples)
    record_property("conformance", verdict.as_dict())
    if verdict.verdict == FAILS:
        pytest.fail(f"{verdict.what}\n\n{verdict.reason}\n\n{verdict.snippet}", pytrace=False)
    if verdict.verdict == NOT_OFFERED:
        assert not ours, verdict.reason
        pytest.skip(f"not offered: {verdict.reason}")
