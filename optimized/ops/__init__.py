"""Operators registered with PyTorch under torch.ops.moa, one file per stage.

Each has a fake kernel (torch.compile sees no break), a gradient written by hand, and a batching rule (torch.vmap). None
is differentiable twice or in forward mode; they say so by an error.
"""

from typing import TYPE_CHECKING

from optimized.ops.causal_window import seen_in_window
from optimized.ops.layer_norm import MOST_CHANNELS as MOST_NORM_CHANNELS
from optimized.ops.operator import Operator
from optimized.ops.rotary import rotary_tables
from optimized.ops.rows import inverse_map
from optimized.ops.solver import Solver

if TYPE_CHECKING:  # mypy does not see that the decorator makes an Operator of a class
    attention: Operator
    blend: Operator
    candidates: Operator
    capped_simplex: Operator
    causal_window: Operator
    combine: Operator
    coordinate_descent: Operator
    expert_attention: Operator
    gather_norm: Operator
    gathered: Operator
    layer_norm: Operator
    memory: Operator
    memory_attention: Operator
    memory_experts: Operator
    mixture: Operator
    pick: Operator
    rotary: Operator
    routed_rows: Operator
    router_logits: Operator
    select: Operator
    taken_rows: Operator
    window: Operator
    window_attention: Operator
else:
    from optimized.ops.attention import attention
    from optimized.ops.blend import blend
    from optimized.ops.candidates import candidates
    from optimized.ops.capped_simplex import capped_simplex
    from optimized.ops.causal_window import causal_window
    from optimized.ops.combine import combine
    from optimized.ops.coordinate_descent import coordinate_descent
    from optimized.ops.expert_attention import expert_attention
    from optimized.ops.gather_norm import gather_norm
    from optimized.ops.gathered import gathered
    from optimized.ops.layer_norm import layer_norm
    from optimized.ops.memory import memory
    from optimized.ops.memory_attention import memory_attention
    from optimized.ops.memory_experts import memory_experts
    from optimized.ops.mixture import mixture
    from optimized.ops.pick import pick
    from optimized.ops.rotary import rotary
    from optimized.ops.routed_rows import routed_rows
    from optimized.ops.router_logits import router_logits
    from optimized.ops.select import select
    from optimized.ops.taken_rows import taken_rows
    from optimized.ops.window import window, window_attention
