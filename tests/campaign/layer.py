"""Cases of the whole layer: the properties of `test_mixture`."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_mixture  # noqa: E402
from strategies import COTANGENTS, LAYOUTS, MASKS, VALUES, LayerCase, layer_cases  # noqa: E402

from reference.contract import Config, RouterOptions  # noqa: E402

from .chunks import Drawn, Lane, inner, named, truth, whole, word  # noqa: E402
from .kind import Setting  # noqa: E402

CHOICE = ("N <= K", "K < N <= K * 9/8", "beyond")
INJECTED, OWN = "injected routes", "own routers"


class Layer(Drawn):
    NAME = "layer"
    CASE = LayerCase
    LANES = (
        *(Lane(INJECTED, dtype) for dtype in ("float64", "float32", "bfloat16", "float16")),
        Lane(OWN, "float64"),
    )
    LEVELS: ClassVar = {
        "property": (INJECTED, OWN),
        "dtype": ("float64", "float32", "bfloat16", "float16"),
        "length": ("1", "2 - 16", "17 - 32", "33 and more"),
        "batch": ("1", "2", "3"),
        "experts": ("1", "2", "3"),
        "heads": ("1", "2", "3"),
        "dim_head": ("2", "8", "10"),
        "queries": CHOICE,
        "keys and values": CHOICE,
        "window": ("no local attention", "1 - 5", "more", "all tokens"),
        "context": ("x itself", "another"),
        "rotary": ("False", "True"),
        "prenorm": ("False", "True"),
        "average": ("False", "True"),
        "solver": ("iterative", "exact"),
        "straight through": ("False", "True"),
        "cosine": ("False", "True"),
        "values": VALUES,
        "mask": (*MASKS, "long_suffix"),
        "layout": LAYOUTS,
        "cotangent": COTANGENTS,
    }

    def cases(self, lane: Lane) -> Any:
        return layer_cases(values=("normal",) if lane.name == OWN else VALUES)

    def check(self, lane: Lane, case: LayerCase, setting: Setting) -> None:
        if lane.name == INJECTED:
            test = inner(test_mixture.test_optimized_matches_with_injected_routes)
            test(setting.kernels, case, getattr(torch, lane.dtype), setting.device)
        else:
            inner(test_mixture.test_optimized_matches_with_its_own_routers)(setting.kernels, case, setting.device)

    def names(self, lane: Lane, case: LayerCase) -> tuple[str, ...]:
        if lane.dtype in ("bfloat16", "float16"):  # what the property makes of it
            case = test_mixture.sized_for_half(case)
        n, m = case.n, case.context or case.n
        choices = [CHOICE[(length > k) + (length > k * 9 / 8)] for length, k in ((n, case.k_q), (m, case.k_kv))]
        window = "no local attention"
        if case.window is not None:
            window = "all tokens" if case.window >= n - 1 else "1 - 5" if case.window <= 5 else "more"
        return (
            lane.name,
            lane.dtype,
            self.LEVELS["length"][(n > 1) + (n > 16) + (n > 32)],
            *map(str, (case.batch, case.experts, case.heads, case.dim_head)),
            *choices,
            window,
            "x itself" if case.context is None else "another",
            *map(str, (case.rotary, case.prenorm, case.average)),
            case.options.get("solver", "iterative"),
            str(case.options.get("straight_through", True)),
            str(case.options.get("cosine_sim_routing", False)),
            case.values,
            case.mask,
            case.layout,
            case.cotangent,
        )

    def quantity(self, lane: Lane, stage: str) -> str:
        return stage if lane.name == INJECTED else f"{stage} with its own routers"

    def expected(self, name: str, value: Any) -> str | None:
        words = {"values": VALUES, "mask": (*MASKS, "long_suffix"), "layout": LAYOUTS, "cotangent": COTANGENTS}
        if name in words:
            return word(value, words[name])
        if name == "options":
            return named(value, "options of the routers")
        default = next(f.default for f in fields(LayerCase) if f.name == name)
        if isinstance(default, bool):
            return truth(value)
        return None if value is None and default is None else whole(value, 0 if name == "seed" else 1)

    def validate(self, case: LayerCase) -> None:
        RouterOptions.of_module(case.options)
        Config.of(**case.arguments())


KIND = Layer()
