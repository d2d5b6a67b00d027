"""A process that runs chunks: requests come on stdin and tallies go to stdout, a line of JSON each."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time

import torch

from .kind import DRAWN, Kind, Setting, warm_up
from .tally import Tally


def kind_of(name: str) -> Kind:
    """Imported when needed: those that hypothesis draws bring the tests with them."""
    module = importlib.import_module(f".{name}", __package__)
    return module.KIND if name in DRAWN else module


def run_chunk(name: str, chunk: int | None, setting: Setting) -> Tally:
    """No chunk: examples of an earlier run that failed."""
    start = time.perf_counter()
    kind = kind_of(name)
    tally = kind.run_kept(setting) if chunk is None else kind.run(chunk * kind.CHUNK, kind.CHUNK, setting)
    tally.seconds = time.perf_counter() - start
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", nargs="*", default=[], help="kinds whose kernels are compiled at once")
    parser.add_argument("--share", type=int, default=0, help="of --of that this process compiles")
    parser.add_argument("--of", type=int, default=1)
    given = parser.parse_args()
    setting = Setting(torch.device(given.device), given.kernels, given.seed)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    for name in given.warm:
        warm_up(kind_of(name), given.share, given.of, setting)
    for line in sys.stdin:
        request = json.loads(line)
        tally = run_chunk(request["kind"], request["chunk"], setting)
        answers.write(json.dumps(tally.json()) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
