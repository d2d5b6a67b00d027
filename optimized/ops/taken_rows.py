"""The gather of `routed_rows` alone, for decisions that were made elsewhere; its gradient is that of `routed_rows`.

Letters: B batch, N tokens, D dimension, E experts, Kq and Kkv slots.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optimized.ops.gather_norm import Taken, gather
from optimized.ops.operator import operator


@operator(
    "(Tensor x, Tensor norms, Tensor? q_gamma, Tensor? kv_gamma, Tensor q_indices, Tensor q_slots, Tensor q_inverse,"
    " Tensor kv_indices, Tensor kv_slots, Tensor kv_inverse, bool triton) -> (Tensor queries, Tensor keys_values)"
)
class taken_rows:
    """Rows (E, B, Kq, D) and (E, B, Kkv, D) of x (B, N, D), as of `gather_norm`; both sides have gamma, or none."""

    def forward(a: Any) -> Any:
        q = Taken(a.q_indices, a.q_slots, a.q_inverse, a.q_gamma)
        kv = Taken(a.kv_indices, a.kv_slots, a.kv_inverse, a.kv_gamma)
        if a.q_gamma is not None and a.q_gamma.dtype != a.kv_gamma.dtype:  # one kernel reads either
            return tuple(gather(a.x, a.norms, (group,), a.triton)[0] for group in (q, kv))
        return gather(a.x, a.norms, (q, kv), a.triton)

    def fake(a: Any) -> tuple[Tensor, Tensor]:
        batch, experts, k_q = a.q_indices.shape
        shape = experts, batch, a.kv_indices.shape[2], a.x.shape[2]
        return a.x.new_empty(experts, batch, k_q, a.x.shape[2]), a.x.new_empty(shape)
