"""Operators registered with PyTorch under torch.ops.moa, one file per stage.

Each has a fake kernel (torch.compile sees no break), a gradient written by hand, and a batching rule (torch.vmap). None
is differentiable twice or in forward mode; they say so by an error.
"""

from optimized.ops.attention import attend, attention, attention_backward
from optimized.ops.combine import combine, combine_backward, merge_experts
from optimized.ops.expert_attention import attend_by_experts, expert_attention, expert_attention_backward
from optimized.ops.gather_norm import gather, gather_norm, gather_norm_backward
from optimized.ops.rotary import rotary, rotary_tables, turn
from optimized.ops.routed_rows import Solver, route_and_gather, routed_rows, routed_rows_backward
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
from optimized.ops.window_attention import attend_in_window, window_attention, window_attention_backward
