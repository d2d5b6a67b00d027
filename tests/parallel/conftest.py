"""One set of processes for all tests of a worker: to start them takes longer than what they do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from programs.ranks import Ranks, several_ranks

MOST = 4


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with several_ranks(MOST) as processes:
        yield processes
