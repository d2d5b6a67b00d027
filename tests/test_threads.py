"""Launches of several threads at once, as of data parallelism by threads, or of a server."""

from __future__ import annotations

import threading

import pytest
import torch

from optimized.kernels.value_score import value_score


@pytest.mark.interpreted
def test_threads_may_launch_at_once(device: torch.device) -> None:
    """Triton's interpreter puts functions of its own in the place of triton.language's until a launch is over: another
    thread's launch, or a probe that is asked once and for all, failed meanwhile. Compiled kernels share what was found.
    """
    v, scores, wrong = torch.rand(2, 6, 2, 4, device=device), torch.rand(1, 2, 6, device=device), []
    barrier = threading.Barrier(4)

    def work() -> None:
        try:
            barrier.wait(60)
            for _ in range(20):
                if not torch.equal(value_score(v, scores), expected):
                    wrong.append("another result")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    expected = value_score(v, scores)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
