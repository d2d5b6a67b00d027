"""Operators registered with PyTorch under torch.ops.moa, one file per stage.

Each has a fake kernel (torch.compile sees no break), a gradient written by hand, and a batching rule (torch.vmap). None
is differentiable twice or in forward mode; they say so by an error.
"""

from optimized.ops.attention import attention
from optimized.ops.capped_simplex import capped_simplex
from optimized.ops.combine import combine
from optimized.ops.coordinate_descent import coordinate_descent
from optimized.ops.expert_attention import expert_attention
from optimized.ops.gather_norm import gather_norm
from optimized.ops.pick import pick
from optimized.ops.rotary import rotary, rotary_tables
from optimized.ops.routed_rows import routed_rows
from optimized.ops.router_logits import router_logits
from optimized.ops.rows import inverse_map
from optimized.ops.select import select
from optimized.ops.solver import Solver
from optimized.ops.window import window, window_attention
