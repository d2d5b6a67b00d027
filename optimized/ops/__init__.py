"""Operators registered with PyTorch under torch.ops.moa, one file per stage.

Each has a fake kernel (torch.compile sees no break), a gradient written by hand, and a batching rule (torch.vmap). None
is differentiable twice or in forward mode; they say so by an error.
"""

from optimized.ops.attention import attend, attention, attention_backward
from optimized.ops.combine import combine, combine_backward, merge_experts
from optimized.ops.gather_norm import gather, gather_norm, gather_norm_backward
from optimized.ops.rotary import rotary, scale_values, turn, value_score, value_score_backward
from optimized.ops.router_logits import project, router_logits, router_logits_backward
from optimized.ops.selection import inverse_map, select
from optimized.ops.solvers import (
    cap,
    capped_simplex,
    capped_simplex_backward,
    coordinate_descent,
    coordinate_descent_backward,
    descend,
)
from optimized.ops.tokens import collect, dispatch, gather_tokens, scatter_tokens
