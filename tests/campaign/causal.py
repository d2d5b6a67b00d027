"""Cases of the strictly causal layer: the properties of `test_causal_dtypes` and `test_autoregressive`.

Against the reference with selections of its own, in every dtype; the law, in every dtype; and in float64 against the
definition, called in pieces, with caches that are cropped and reordered, and in steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_autoregressive as definition  # noqa: E402
import test_causal_dtypes as dtypes  # noqa: E402
from hypothesis import assume  # noqa: E402
from test_causal_dtypes import MASKS, ODD, CausalCase, causal_cases  # noqa: E402

import optimized  # noqa: E402
import reference  # noqa: E402

from .chunks import Drawn, Lane, inner, named, truth, whole, word  # noqa: E402
from .kind import Setting  # noqa: E402

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is asked for anything
OWN, LAW = "own selections", "law"
DTYPES = ("float64", "float32", "bfloat16", "float16")
SMALL = 20  # tokens and keys that an oracle with loops is asked for


def against_the_oracle(case: CausalCase, setting: Setting) -> None:
    assume(max(case.n, case.options["num_routed_key_values"]) <= SMALL)
    inner(definition.test_the_oracle)(optimized, case, setting.device)


def in_pieces(case: CausalCase, setting: Setting) -> None:
    """Values, gradients through the cache, and routes."""
    drawn = case, list(case.lengths)
    inner(definition.test_any_pieces_are_the_whole)(optimized, drawn, setting.device)
    inner(definition.test_routes_of_pieces)(optimized, drawn, setting.device)


def cropped(case: CausalCase, setting: Setting) -> None:
    inner(definition.test_select_and_crop)(optimized, (case, list(case.lengths)), case.back, case.seed, setting.device)


def in_steps(case: CausalCase, setting: Setting) -> None:
    inner(definition.test_steps_in_place)(setting.kernels, case, case.tokens, setting.device)


def hard_in_steps(case: CausalCase, setting: Setting) -> None:
    inner(definition.test_hard_scores_of_a_solver_with_a_cache)(optimized, case, setting.device)


def padded(case: CausalCase, setting: Setting) -> None:
    inner(definition.test_padding_anywhere)(optimized, case, min(case.tokens, 4), setting.device)


SIGMOID, COUPLED = ("sigmoid",), ("iterative", "exact")
# By name: who computes, solvers that are drawn, and whether a token may be odd.
EXACT: dict[str, tuple[Callable[[CausalCase, Setting], None], tuple[str, ...], bool]] = {
    "definition": (against_the_oracle, definition.SOLVERS, False),  # which spoils a token itself
    "pieces": (in_pieces, SIGMOID, True),
    "crop and select": (cropped, SIGMOID, True),
    "steps": (in_steps, definition.SOLVERS, True),
    "hard scores": (hard_in_steps, COUPLED, False),
    "padding": (padded, definition.SOLVERS, False),
}


class Causal(Drawn):
    NAME = "causal"
    CASE = CausalCase
    LANES = (
        *(Lane(name, dtype) for name in (OWN, LAW) for dtype in DTYPES),
        *(Lane(name, "float64") for name in EXACT),
    )
    LEVELS: ClassVar = {
        "property": (OWN, LAW, *EXACT),
        "dtype": DTYPES,
        "length": ("0", "below W", "W", "jW - 1", "jW", "jW + 1", "between"),
        "block": ("1", "2 - 5", "8 and more"),
        "window": ("W > w + 1", "W = w + 1", "W = w", "W < w"),
        "queries": ("1", "below W", "every token"),
        "keys": ("1", "below W", "W", "below N", "N and more"),
        "capacity": ("1.0", "1.3", "2.0"),
        "batch": ("1", "2"),
        "experts": ("1", "2", "3"),
        "heads": ("1", "2"),
        "local heads": ("None", "1", "3"),
        "solver": definition.SOLVERS,
        "straight through": ("False", "True"),
        "cosine": ("False", "True"),
        "mask": ("none", *MASKS),
        "rotary": ("False", "True"),
        "average": ("False", "True"),
        "prenorm": ("False", "True"),
        "ties": ("False", "True"),
        "odd token": ODD,
        "pieces": ("none", "1", "2 - 4", "more"),
    }

    def cases(self, lane: Lane) -> Any:
        _, solvers, odd = EXACT.get(lane.name, (None, definition.SOLVERS, lane.name == LAW))
        solvers = SIGMOID if lane.name == OWN and lane.dtype in ("bfloat16", "float16") else solvers
        return causal_cases(solvers=solvers, odd=odd)

    def check(self, lane: Lane, case: CausalCase, setting: Setting) -> None:
        if lane.name == OWN:
            test = inner(dtypes.test_optimized_matches_where_nothing_is_close)
            test(setting.kernels, case, getattr(torch, lane.dtype), setting.device)
        elif lane.name == LAW:
            with deterministic():
                test = inner(dtypes.test_later_tokens_change_nothing_in_any_dtype)
                test(setting.kernels, None, case, getattr(torch, lane.dtype), setting.device)
                if lane.dtype == "float64" and case.odd == "none":
                    test = inner(definition.test_later_tokens_change_no_gradient_of_parameters)
                    test(optimized, None, case, case.cut, setting.device)
        else:
            EXACT[lane.name][0](case, setting)

    def names(self, lane: Lane, case: CausalCase) -> tuple[str, ...]:
        if lane.name == OWN:  # what the property makes of it
            case = replace(case, ties=False)
            case = case.for_half() if lane.dtype in ("bfloat16", "float16") else case
        if lane.name == "padding":
            case = replace(case, masked=False)
        o, n = case.options, case.n
        width, keys, window = o["routed_window_size"], o["num_routed_key_values"], o["local_attn_window_size"]
        length = "0" if n == 0 else "below W" if n < width else "W"
        if n > width:
            place = {width - 1: "jW - 1", 0: "jW", 1: "jW + 1"}
            length = place.get(n % width, "between") if width > 1 else "jW"
        remembered = "1" if keys == 1 else "below W" if keys < width else "W" if keys == width else "below N"
        return (
            lane.name,
            lane.dtype,
            length,
            self.LEVELS["block"][(width > 1) + (width > 5)],
            self.LEVELS["window"][0 if width > window + 1 else 1 + (width <= window) + (width < window)],
            "every token" if o["num_routed_queries"] >= width else "1" if o["num_routed_queries"] == 1 else "below W",
            "N and more" if keys >= max(n, 2) and keys > width else remembered,
            str(o["capacity_factor"]),
            *map(str, (case.batch, o["num_experts"], o["heads"], o["local_attn_heads"])),
            o["solver"],
            str(o["straight_through"]),
            str(o["cosine_sim_routing"]),
            case.mask if case.masked else "none",
            *map(str, (case.rotary, o["average_routed"], o["prenorm"], case.ties)),
            case.odd,
            self.LEVELS["pieces"][sum(len(case.lengths) > most for most in (0, 1, 4))],
        )

    def expected(self, name: str, value: Any) -> str | None:
        if name in ("mask", "odd"):
            return word(value, MASKS if name == "mask" else ODD)
        if name in ("masked", "rotary", "ties"):
            return truth(value)
        if name == "options":
            return named(value, "options of the layer")
        if name in ("back", "cut"):
            return None if type(value) is float and 0 <= value <= 1 else "a float from 0 to 1"
        if name == "lengths":
            fits = isinstance(value, tuple) and not any(whole(n, 0) for n in value)
            return None if fits else "a tuple of integers >= 0"
        return whole(value, 1 if name in ("batch", "tokens") else 0)

    def validate(self, case: CausalCase) -> None:
        absent = sorted(causal_options() - case.options.keys())
        if absent:
            raise ValueError(f"options: expected {', '.join(absent)} too, got {case.options!r}")
        if case.lengths and sum(case.lengths) != case.n:
            raise ValueError(f"lengths: expected a sum of {case.n} tokens, got {case.lengths!r}")
        reference.MixtureOfAutoregressiveAttention(**case.options, device="meta")


def causal_options() -> set[str]:
    """That every case tells, for its levels."""
    sizes = {"dim", "dim_head", "heads", "local_attn_heads", "num_experts", "num_routed_queries"}
    sizes |= {"num_routed_key_values", "local_attn_window_size", "routed_window_size", "capacity_factor"}
    return sizes | {"solver", "straight_through", "cosine_sim_routing", "average_routed", "prenorm"}


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, without NaN in new memory."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


KIND = Causal()
