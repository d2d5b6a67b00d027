"""What the layer costs if everything but the library calls were free, measured part by part in the same run.

Forward: the batched products q (E, B K, D) x (D, H d), kv and out, the fastest attention that runs here on
(E B, K, H, d), and one copy of x, which reads as much as the layer must read and writes as much as it must write. With
local attention its two products and its fastest windowed attention too. Of the causal layer: keys and values of tokens
that are ever remembered, and Kq queries of every block that has a memory. Forward and backward: the products of both
gradients and the fastest backward of an attention besides; still one copy. Caches are cold and the host is ahead, so
that parts of a few microseconds are not measured too long; all of this is in favour of the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attentions import FULL, WINDOWED, UnavailableError, attention
from .competitors import BOTH, FORWARD
from .measure import Clock, time_call
from .shapes import Case

BUDGET_MS = 15.0


class Floor:
    """Measured parts are kept: many cases of a run share them."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.device, self.clock = device, clock
        self.known: dict[tuple[Any, ...], Any] = {}

    def of(self, case: Case) -> dict[str, Any]:
        """{direction: {"ms": sum, "parts": {name: ms}}}. Raises UnavailableError without any attention."""
        rows, inner = case.experts * case.batch, case.inner
        queries, keys = case.taken, case.taken
        if case.causal:
            rows, queries, keys = rows * case.blocks, case.queries, case.admitted
        asked, read = (count * case.batch for count in (queries * (case.blocks if case.causal else 1), keys))
        widths = {"q": (asked, case.dim, inner), "kv": (read, case.dim, 2 * inner), "out": (asked, inner, case.dim)}
        forward, backward = self.products(case, case.experts, widths)
        shape = (rows, queries, case.taken, case.heads, case.dim_head)
        self._add_attention(forward, backward, "attention", FULL, shape, case.dtype, None)
        if case.window is not None:
            tokens, inner = case.batch * case.n, case.dense_heads * case.dim_head
            widths = {"local qkv": (tokens, case.dim, 3 * inner), "local out": (tokens, inner, case.dim)}
            first, second = self.products(case, 1, widths)
            forward, backward = forward | first, backward | second
            shape = (case.batch, case.n, case.n, case.dense_heads, case.dim_head)
            window = case.window, case.causal
            self._add_attention(forward, backward, "local attention", WINDOWED, shape, case.dtype, window)
        forward["copy"] = self._part(("copy", case.batch * case.n * case.dim, case.dtype), self._copy)
        both = forward | {f"{name} backward": ms for name, ms in backward.items()}
        return {name: {"ms": sum(parts.values()), "parts": parts} for name, parts in ((FORWARD, forward), (BOTH, both))}

    def products(
        self, case: Case, batch: int, widths: dict[str, tuple[int, int, int]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Milliseconds of the batched products and of those of their gradients, by name. widths: rows, from, to."""
        forward, backward = {}, {}
        for name, (rows, fan_in, fan_out) in widths.items():
            shapes = ((rows, fan_in, fan_out), (rows, fan_out, fan_in), (fan_in, rows, fan_out))  # y = x w, dx, dw
            y, dx, dw = (self._part(("product", batch, *s, case.dtype), self._product) for s in shapes)
            forward[name], backward[name] = y, dx + dw
        return forward, backward

    def ceilings(self) -> dict[str, float]:
        """What the device reaches: TFLOP/s of a square bfloat16 product, TB/s of a copy of 1 GiB."""
        product = self._product(1, 8192, 8192, 8192, "bfloat16")
        return {"product_tflops": 2 * 8192**3 / product / 1e9, "copy_tbs": 2**31 / self._copy(2**29, "bfloat16") / 1e9}

    def _part(self, key: tuple[Any, ...], measure: Callable[..., Any]) -> Any:
        if key not in self.known:
            self.known[key] = measure(*key[1:])
        return self.known[key]

    def _time(self, call: Callable[[], Any]) -> float:
        return time_call(call, self.clock, budget_ms=BUDGET_MS, lead=True).p50

    def _random(self, *shape: int, dtype: str) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=getattr(torch, dtype))

    def _product(self, batch: int, m: int, k: int, n: int, dtype: str) -> float:
        a, b = self._random(batch, m, k, dtype=dtype), self._random(batch, k, n, dtype=dtype)
        out = torch.empty(batch, m, n, device=self.device, dtype=a.dtype)
        return self._time(lambda: torch.bmm(a, b, out=out))

    def _copy(self, elements: int, dtype: str) -> float:
        source = self._random(elements, dtype=dtype)
        out = torch.empty_like(source)
        return self._time(lambda: out.copy_(source))

    def _add_attention(
        self, forward: dict[str, float], backward: dict[str, float], part: str, names: tuple[str, ...],
        shape: tuple[int, ...], dtype: str, window: tuple[int, bool] | None,
    ) -> None:  # fmt: skip
        """The fastest of each direction, by its name."""
        found = self._part(("attention", names, shape, dtype, window), self._attentions)
        for index, parts in enumerate((forward, backward)):
            name = min(found, key=lambda name: found[name][index])
            parts[f"{part} ({name})"] = found[name][index]

    def _attentions(
        self, names: tuple[str, ...], shape: tuple[int, ...], dtype: str, window: tuple[int, bool] | None
    ) -> dict[str, tuple[float, float]]:
        """Milliseconds forward and backward of those that run. shape: rows, queries, keys, heads, channels. window: its
        size, and whether it is causal.
        """
        found, reasons = {}, []
        rows, asked, keys, *rest = shape
        q, k, v = (self._random(rows, n, *rest, dtype=dtype).requires_grad_() for n in (asked, keys, keys))
        reach, causal = window or (None, False)
        dout = torch.randn_like(q)
        for name in names:
            try:
                attend = attention(name, window=reach, causal=causal)
                out = attend(q, k, v)
                second = self._time(lambda out=out: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
                with torch.no_grad():
                    first = self._time(lambda attend=attend: attend(q, k, v))
                found[name] = first, second
            except Exception as error:  # most of them serve some dtypes and devices only
                reasons.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        if not found:
            raise UnavailableError("; ".join(reasons))
        return found
