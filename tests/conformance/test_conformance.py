"""Every property holds of the reference and of the optimized layer; with --impl, of the layer that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conformance.examine import FAILS, NOT_OFFERED, examine
from tests.conformance.plugin import factory_of
from tests.conformance.properties import PROPERTIES
from tests.conformance.subject import Subject

OURS = ("reference:MixtureOfAttention", "optimized:MixtureOfAttention")
EXAMPLES, EXAMPLES_OF_OURS = 50, 5  # ours have a suite of their own


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.option.impl
    metafunc.parametrize("spec", OURS if given is None else [given])
    metafunc.parametrize("name", PROPERTIES)


def test_conformance(
    name: str,
    spec: str,
    device: torch.device,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, Any], None],
) -> None:
    ours = pytestconfig.option.impl is None
    examples = pytestconfig.option.max_examples or (EXAMPLES_OF_OURS if ours else EXAMPLES)
    verdict = examine(PROPERTIES[name], Subject(factory_of(spec), device), spec, examples)
    record_property("conformance", verdict.as_dict())
    if verdict.verdict == FAILS:
        pytest.fail(f"{verdict.what}\n\n{verdict.reason}\n\n{verdict.snippet}", pytrace=False)
    assert not (ours and verdict.verdict == NOT_OFFERED), verdict.reason
