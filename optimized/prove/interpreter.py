"""Our kernels where they can run: compiled on a GPU, else in Triton's interpreter, on an excerpt."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from optimized.plan import Request, obstacle
from optimized.prove.kernels import Compared, compare_kernels
from optimized.prove.setup import Setup

CHILD = "from optimized.prove.interpreter import interpret; interpret()"
EXCERPT = 96  # tokens: several blocks of every kernel, more than the default window, and no longer than the rest takes


def run_kernels(setup: Setup) -> tuple[str, list[Compared], str | None]:
    """Where and on what our kernels ran, what was found, and what went wrong with the run itself."""
    if obstacle("routing", "triton", Request(setup.device, torch.float64)) is None:
        return f"compiled, all {setup.x.shape[1]} tokens", compare_kernels(setup), None
    slots = dict.fromkeys(("num_routed_queries", "num_routed_key_values"), EXCERPT // 8)
    x, cotangent = setup.x[:, :EXCERPT], setup.cotangent[:, :EXCERPT]
    small = replace(setup, arguments=setup.arguments | slots, x=x, cotangent=cotangent, device=torch.device("cpu"))
    where = f"in Triton's interpreter, an excerpt: the first {EXCERPT} tokens, {EXCERPT // 8} slots"
    why_not = obstacle("routing", "triton_interpreted", Request(small.device, torch.float64))
    if why_not is None:
        return where, compare_kernels(small), None
    if why_not == "needs TRITON_INTERPRET=1":
        found, broken = _run_in_child(small)
        if not isinstance(found, str):
            return where, found, broken
        why_not = found
    return f"not run: {why_not}", [], None


def _run_in_child(setup: Setup) -> tuple[list[Compared] | str, str | None]:
    """What it found, or why it can't run; and what went wrong. Triton decides at its import whether it interprets."""
    data = io.BytesIO()
    names = ("arguments", "state", "x", "cotangent")
    torch.save({name: getattr(setup, name) for name in names}, data)
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", CHILD]
    try:
        done = subprocess.run(command, input=data.getvalue(), env=environment, capture_output=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        return found if isinstance(found, str) else [Compared(*row) for row in found], None
    except subprocess.CalledProcessError as error:
        return [], f"kernels: their process ended with {error.returncode}\n{error.stderr.decode()[-2000:]}"


def interpret() -> None:
    """The child's side: a setup from standard input, the rows to standard output."""
    if importlib.util.find_spec("triton"):
        from optimized.prove import lookups

        lookups.look_up_once()
    setup = Setup(**torch.load(io.BytesIO(sys.stdin.buffer.read())), device=torch.device("cpu"))
    why_not = obstacle("routing", "triton_interpreted", Request(setup.device, torch.float64))
    print(json.dumps(why_not or compare_kernels(setup)))
