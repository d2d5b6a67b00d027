"""Self-attention without local attention as one operator: routed rows, attention of the experts, combination.

It computes nothing of its own. One operator in place of three, since to bind arguments, to keep tensors for the
backward and to enter autograd takes the host as long as the kernels of a short sequence run.
Letters: B batch, N tokens, D dimension, E experts, R = E B rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.ops.combine import combine
from optimized.ops.expert_attention import expert_attention
from optimized.ops.operator import Arguments, operator
from optimized.ops.routed_rows import routed_rows
from optimized.ops.solver import SOLVER

_rows: Any = routed_rows  # an Operator each
_experts: Any = expert_attention
_combine: Any = combine
_ROUTED, _ATTENDED = _rows.results, ("y", "q", "kv", "attended", "lse", "keep", "state")
_READ = ("queries", "keys_values", *_ATTENDED[1:])  # by the backward of the attention alone


@operator(
    "(Tensor x, Tensor q_tokens, Tensor kv_tokens, Tensor? q_gamma, Tensor? kv_gamma, Tensor w_q, Tensor w_kv,"
    " Tensor w_out, Tensor null_kv, Tensor? null, Tensor? mask, Tensor? cos, Tensor? sin, SymInt k_q, SymInt k_kv,"
    f" SymInt? block, float? scale, {SOLVER}, float dropout, bool average, str backend, bool triton,"
    f" bool triton_combines) -> (Tensor out, {', '.join(f'Tensor {name}' for name in (*_ROUTED, *_ATTENDED))})",
    wrt="x q_tokens kv_tokens q_gamma kv_gamma w_q w_kv w_out null_kv null",
    gradients_of="out",
    saves="x q_tokens kv_tokens q_gamma kv_gamma w_q w_kv w_out null_kv null mask cos sin"
    f" {' '.join((*_ROUTED, *_ATTENDED))}",
    draws="dropout",
)
class mixture:
    """out (B, N, D) of x (B, N, D), then the results of `routed_rows` and of `expert_attention` for the backward.

    In one dtype: x, matrices w_q, w_kv, w_out, null_kv. null (D numbers): in place of tokens that nobody took. cos, sin
    (N, d): of the rotary angles at the tokens' positions. average, triton_combines: as of `combine`; the others as of
    these two operators.
    """

    def forward(a: Any) -> Any:
        rows = _rows.body.forward(a)
        attended = _experts.body.forward(_attention(a, *rows))
        return _combined(a, attended[0], *rows), *rows, *attended

    def infer(a: Any) -> Tensor:
        rows = list(_rows.body.forward(a))
        there = _attention(a, *rows)
        rows[:2] = None, None
        y = _experts.body.forward(there)[0]
        del there
        return _combined(a, y, *rows)

    def fake(a: Any) -> Any:
        rows = _rows.body.fake(a)
        return a.x.new_empty(a.x.shape), *rows, *_experts.body.fake(_attention(a, *rows))

    def backward(a: Any, g: Any, needs: Any) -> dict[str, Tensor]:
        # What has been read is let go, so that no more is held than by three operators.
        there, asked = vars(a), _asked(needs)
        of = _attention(a, *[there[name] for name in _ROUTED])
        read = {name: there.pop(name) for name in _READ}
        vars(of).update(read, out=read.pop("attended"))
        del read
        scores, routing = a.q_picked, {"indices": a.q_indices, "slots": a.q_slots, "inverse": a.q_inverse}
        combined = Arguments(y=there.pop("y"), scores=scores, local=None, **_combination(a), **routing)
        wanted = Arguments(y=any(vars(asked).values()), scores=asked.scores, local=False, null=needs.null)
        found = _combine.body.backward(combined, g, wanted)
        del combined
        gradients = Arguments(q_picked=found.pop("scores", None), logits=None)
        if wanted.y:
            found |= _experts.body.backward(of, Arguments(y=found.pop("y")), asked)
        del of
        for side, name in (("queries", "queries"), ("keys_values", "keys_values"), ("kv_picked", "scores")):
            vars(gradients)[side] = found.pop(name, None)
        return found | _rows.body.backward(a, gradients, needs)

    def flops(a: Any, out: Any) -> int:
        return _rows.body.flops(a, out[1:]) + _experts.body.flops(_sizes(a, out[1], out[2]), None)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        sizes = _sizes(a, a.queries, a.keys_values)
        return _rows.body.backward_flops(a, g, needs) + _experts.body.backward_flops(sizes, g, _asked(needs))


def _attention(a: Any, queries: Tensor, keys_values: Tensor, q_picked: Tensor, kv_picked: Tensor, *rest: Any) -> Any:
    """Arguments of `expert_attention`, from the results of `routed_rows`."""
    _, q_indices, _, _, kv_indices, kv_slots, *_ = rest
    lengths, q_positions, k_positions = None, None, None
    if a.mask is not None:
        lengths = kv_slots.sum(-1, dtype=torch.int32).t().flatten()
    if a.cos is not None:
        q_positions, k_positions = (t.transpose(0, 1).flatten(0, 1) for t in (q_indices, kv_indices))
    return Arguments(
        **vars(_sizes(a, queries, keys_values)), scores=kv_picked, lengths=lengths, cos=a.cos, sin=a.sin,
        q_positions=q_positions, k_positions=k_positions, dropout=a.dropout, unit_scores=a.straight_through,
        backend=a.backend, triton=a.triton,
    )  # fmt: skip


def _sizes(a: Any, queries: Tensor, keys_values: Tensor) -> Any:
    """All that FLOPs depend on."""
    return Arguments(queries=queries, keys_values=keys_values, w_q=a.w_q, w_kv=a.w_kv, w_out=a.w_out, null_kv=a.null_kv)


def _asked(needs: Any) -> Any:
    """Which gradients of `expert_attention` somebody needs."""
    routed = needs.x or needs.q_tokens or needs.kv_tokens
    return Arguments(
        queries=needs.x or needs.q_gamma, keys_values=needs.x or needs.kv_gamma, scores=routed, w_q=needs.w_q,
        w_kv=needs.w_kv, w_out=needs.w_out, null_kv=needs.null_kv,
    )  # fmt: skip


def _combination(a: Any) -> dict[str, Any]:
    return {"null": a.null, "mask": a.mask, "average": a.average, "dtype": a.x.dtype, "triton": a.triton_combines}


def _combined(a: Any, y: Tensor, *rows: Any) -> Tensor:
    return _combine.body.forward(Arguments(y=y, scores=rows[2], inverse=rows[7], local=None, **_combination(a)))
