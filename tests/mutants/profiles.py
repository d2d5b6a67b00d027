"""Which tests the faults of a file face: the fast profile, at most a minute of one core.

Chosen by the mutated file alone, never by the mutant. Files come in the order in which they are likely to notice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """files of tests/ in their order; keyword: pytest's -k; interpreted: our kernels too, every twentieth example."""

    files: tuple[str, ...]
    keyword: str = ""
    interpreted: bool = False
    examples: int = 30

    def arguments(self) -> list[str]:
        given = [f"tests/{file}" for file in self.files] + [f"--max-examples={self.examples}"]
        given += ["--interpreted"] if self.interpreted else []
        return given + (["-k", self.keyword] if self.keyword else [])


SELECTION = Profile(
    ("test_rows.py", "test_routing.py", "test_operators.py", "test_sigmoid.py"),
    "((select or poison) and (triton or masked) and not (groups and float64) and not batching and not long_rows) "
    "or route_matches or (triton and (its_own or scores_are_1 or chosen_logit))",
    interpreted=True,
    examples=60,
)
DESCENT = Profile(
    ("test_rows.py", "test_routing.py", "test_operators.py"),
    "(triton and (iterative or descent or temperature or equality or parts_of) and not (none_valid and 45)) "
    "or (coordinate_descent and masked and (opcheck or batching))",
    interpreted=True,
)
LONG_SELECTION = Profile(("test_rows.py",), "long_rows_select", interpreted=True)
LONG_DESCENT = Profile(("test_rows.py",), "long_rows_descend or poisons_a_long_row", interpreted=True)
CAPPED = Profile(
    ("test_rows.py", "test_routing.py", "test_operators.py"),
    "(triton and exact) or (capped_simplex and masked)",
    interpreted=True,
)
ROWS = Profile(
    ("test_rows.py", "test_routing.py", "test_operators.py"),
    "(triton and (rows or solver or gradient) and not (select or 45 or whole_stages)) "
    "or (descent and masked and opcheck)",
    interpreted=True,
    examples=60,
)
SIGMOID = Profile(
    ("test_sigmoid.py", "test_cases.py", "test_operators.py", "test_boundaries.py"),
    "(triton and test_sigmoid) or (sigmoid and (is_right or pytorch_form)) or rows-1025",
    interpreted=True,
)
COMBINE = Profile(
    ("test_mixture.py", "test_operators.py", "test_poison.py"),
    "(triton and (counts or hidden or unrouted or (injected and float64))) "
    "or (combin and (opcheck or gradients or of_the_dtypes)) "
    "or (test_poison and layout and combine)",
    interpreted=True,
)
ATTENTION = Profile(
    ("test_draws.py", "test_mixture.py", "test_attention.py", "test_operators.py", "test_routed_attention.py"),
    "test_draws or without_tokens or test_attention.py or (attention and (opcheck or other_results)) "
    "or (test_routed_attention.py and (dropout or null or order))",
    interpreted=True,
    examples=20,
)
ATTENTION_KERNEL = Profile(
    ("test_cases.py",), "is_right and float32 and ((attention and not memory) or keep)", interpreted=True
)
ROTARY = Profile(
    ("test_operators.py", "test_routed_attention.py", "test_local_attention.py", "test_poison.py"),
    "rotation or rotary_tables or (rotary and (opcheck or leave or whole_stages or one_layout)) "
    "or (triton and (matches or (gradcheck and not whole_stages)))",
    interpreted=True,
    examples=40,
)
LAUNCH = Profile(
    ("test_launch.py", "test_poison.py", "test_rows.py", "test_attention.py", "test_operators.py", "test_mixture.py"),
    "(triton and (picked and 9- or (gradcheck and not routed_rows) or test_dropout or hidden or rounds_once "
    "or (injected and float64))) or (layout and triton-combine) or test_launch",
    interpreted=True,
)
LOGITS = Profile(
    ("test_cases.py", "test_operators.py", "test_mixture.py"),
    "(router_logits and (is_right or whole_stages)) or more_channels or (pytorch_form and routed_rows) "
    "or own_context or nan_routing or both_routers",
    interpreted=True,
)
GATHER = Profile(
    ("test_operators.py", "test_mixture.py", "test_boundaries.py"),
    "(whole_stages and gather_norm) or (pytorch_form and routed_rows) or own_context or nan_routing or experts-9 "
    "or experts-65 or far_from_all "
    "or channels-4097",
    interpreted=True,
)
ROUTER_GRADIENT = Profile(
    ("test_cases.py", "test_operators.py", "test_mixture.py"),
    "(is_right and router_gradient and float64) or (router_logits and (pytorch_form or whole_stages)) or least_norm "
    "or nan_routing",
    interpreted=True,
)
EXPERTS = Profile(
    ("test_operators.py", "test_mixture.py", "test_routed_attention.py", "test_poison.py"),
    "(expert and (pytorch_form or only_what or (whole_stages and torch))) or own_context or null or masked_lanes "
    "or (test_routed_attention and optimized_matches and float16 and torch_flash) "
    "or value_scores or (expert_attention and opcheck and masked)",
    interpreted=True,
)
WINDOW = Profile(
    ("test_local_attention.py", "test_operators.py"),
    "one_operator or (whole_stages and window) or (window_attention and opcheck and masked)",
    interpreted=True,
)
WINDOW_KERNEL = Profile(  # every length with every window takes ten minutes to interpret
    ("test_window.py",),
    "not lengths_and_windows",
    interpreted=True,
)
NORM = Profile(("test_cases.py", "test_operators.py"), "layer_norm", interpreted=True)
GATHERED = Profile(
    ("test_mixture.py", "test_operators.py"),
    "own_context or two_dtypes or (injected_routes and bfloat16 and torch) "
    "or (gather_norm and (opcheck or whole_stages or rounds_once))",
    interpreted=True,
)
COMBINATION = Profile(
    ("test_mixture.py", "test_operators.py"),
    "(not triton and (combin or unrouted or average_divides or injected_routes or masked_tokens_take)) "
    "or (combine and (opcheck or only_what))",
)
ROUTER = Profile(
    ("test_routing.py", "test_mixture.py", "test_operators.py"),
    "(test_routing and not triton) or nan_routing or (router_logits and (opcheck or whole_stages))",
    interpreted=True,
)
PICK = Profile(
    ("test_routing.py", "test_public_defects.py", "test_operators.py", "test_sigmoid.py"),
    "route_matches or edge_of_a or straight_through or selection or (defect_09 and not rejected) "
    "or (defect_15 and not rejected) or ((pick or select) and opcheck) or content_of_masked "
    "or set_to_nan or (torch and (test_sigmoid.py or whole_stages and pick and sigmoid))",
)
SOLVERS = Profile(
    ("test_routing.py", "test_operators.py"),
    "(test_routing and not triton and not logits_match) or (test_operators and not triton "
    "and (coordinate_descent or capped_simplex or temperature_that_falls))",
)
ROUTED_ROWS = Profile(
    ("test_routing.py", "test_mixture.py", "test_operators.py"),
    "(test_routing and optimized_route_matches and torch) or both_routers or (torch and (own_routers or edge_of_a)) "
    "or (routed_rows and (pytorch_form or each_result or only_what or (whole_stages and torch))) or decide_nothing",
    interpreted=True,
)
ROUTING = Profile(
    ("test_modules.py", "test_routing.py", "test_mixture.py"),
    "undecided or route_matches or returned_routes or injected_routes or edge_of_a or compiled_rout or default_dtype",
)
MOVES = Profile(
    ("test_mixture.py", "test_operators.py"),
    "(test_mixture and not triton) or (gather_norm or combine or moves) and not triton",
)
OPERATOR = Profile(
    ("test_modules.py", "test_operators.py", "test_backends.py", "test_attention.py"),
    "nobody_lists or randomness or draws or autocast or plain_call or forward_mode or only_the_output "
    "or (other_results and capped_simplex) or (combine and (only_what or opcheck)) "
    "or (test_backends and (gradients or forms))",
)
LOCAL = Profile(
    ("test_local_attention.py", "test_operators.py", "test_mixture.py"),
    "test_local_attention or (window and opcheck) or (hook_on_each and masked)",
)
PLAIN = Profile(
    ("test_backends.py", "test_modules.py"), "why_modules or (test_modules and not without_data and not compiled)"
)
LAYER = Profile(
    ("test_modules.py", "test_mixture.py", "test_routed_attention.py", "test_backends.py", "test_validation.py"),
    "both_routers or callers_routes or unknown_backends or tables_are or beside_nan "
    "or (not triton and (each_router or called_once or half_precision or norms_round)) "
    "or (not triton and (computed_once or large_angles or mode_of_the_module)) "
    "or (not triton and not checkpoint and not test_modules and not test_validation)",
    interpreted=True,
)
PLAN = Profile(
    ("test_choice.py", "test_backends.py", "test_validation.py"),
    "test_choice or test_backends or unknown_backends or cannot_serve",
)
SUMS = Profile(
    ("test_cases.py", "test_boundaries.py"), "(is_right and (partial_sums or combine)) or channels-33", interpreted=True
)
AT_ONCE = Profile(
    ("test_operators.py", "test_mixture.py"),
    "(mixture and (pytorch_form or only_what or (whole_stages and plain))) or (optimized_matches and not triton) "
    "or (test_mixture and (average_divides or padding_changes) and not triton)",
    examples=10,
)
CONTRACT = Profile(("test_validation.py", "test_modules.py"), "test_validation or distributed or half_precision")

REMEMBERED = Profile(
    ("test_causal_selection.py",),
    "triton and (long_blocks or best_of_what or reach_the)",
    interpreted=True,
    examples=20,
)
BY_THRESHOLD = Profile(
    ("test_causal_selection.py", "test_operators.py"),
    "(triton and (long_blocks or reach_the)) or (torch and reach_the) or known_ahead "
    "or (candidates and opcheck and masked)",
    interpreted=True,
    examples=40,
)
MEMORY = Profile(
    ("test_causal_selection.py", "test_operators.py"),
    "best_of_what or (opcheck and memory-float32)",
    interpreted=True,
    examples=40,
)
PLACES = Profile(
    ("test_cases.py", "test_memory_attention.py"),
    "(is_right and memory_places and float64) or drop_several or (test_values and triton and (tiles or remembered))",
    interpreted=True,
)
BLEND = Profile(
    ("test_cases.py", "test_operators.py", "test_boundaries.py"),
    "(is_right and blend and float64) or (blend and (pytorch_form or begin_apart)) or tokens-257 or experts-9",
    interpreted=True,
)
MEMORY_ATTENTION = Profile(
    ("test_memory_attention.py", "test_operators.py"),
    "(test_memory_attention and triton) or (pytorch_form and memory_attention)",
    interpreted=True,
)
MEMORY_ATTENTION_TORCH = Profile(
    ("test_memory_attention.py", "test_operators.py"),
    "(test_memory_attention and not triton) or (memory_attention and (opcheck or whole_stages) and not triton)",
)
ADMITTED = Profile(
    ("test_cases.py", "test_operators.py", "test_boundaries.py"),
    "(is_right and admitted) or (memory_experts and pytorch_form) or key_that_is_not or channels-4097",
    interpreted=True,
)
SCALED = Profile(
    ("test_cases.py", "test_operators.py", "test_boundaries.py"),
    "(scaled_weight and is_right) or (memory_experts and more_digits) or tokens-33",
    interpreted=True,
)
SEEN = Profile(
    ("test_finite.py", "test_cases.py", "test_boundaries.py"),
    "test_finite or (is_right and finite) or queries-65",
    interpreted=True,
)
SHARED_KEYS = Profile(
    ("test_cases.py", "test_memory_attention.py"),
    "(is_right and memory_keys and float) or (test_memory_attention and triton)",
    interpreted=True,
)
STEP = Profile(
    ("test_cases.py", "test_step.py"), "(is_right and step and float) or (test_step.py and not match)", interpreted=True
)
MEMORY_EXPERTS = Profile(
    ("test_operators.py",), "(memory_experts and (gradcheck or pytorch_form)) or key_that_is_not", interpreted=True
)

# Processes start slowly, and their tests are chosen by what two of them see.
SHARDS = Profile(
    ("parallel/test_context.py", "parallel/test_experts.py"),
    "inputs-2 or neighbours-2 or blocks-2 or nan or (divide and 2) or (test_experts.py and one_process and 2)",
)
SPREAD_EXPERTS = Profile(("parallel/test_experts.py",), "2")
CAUSAL_SHARDS = Profile(("parallel/test_causal_layer.py",), "(one_process and 2) or (nan and context)")

PROFILES = {
    "optimized/kernels/admitted.py": ADMITTED,
    "optimized/kernels/admitted_rows.py": ADMITTED,
    "optimized/kernels/scaled_weight.py": SCALED,
    "optimized/kernels/finite.py": SEEN,
    **{f"optimized/kernels/step_{name}.py": STEP for name in ("tokens", "products", "attention", "output")},
    "optimized/autoregressive_step.py": STEP,
    "optimized/kernels/memory_keys.py": SHARED_KEYS,
    "optimized/kernels/memory_tiles.py": MEMORY_ATTENTION,
    "optimized/ops/memory_experts.py": MEMORY_EXPERTS,
    **{
        f"optimized/parallel/{name}.py": SHARDS
        for name in ("collectives", "shards", "routing", "rows", "fused", "mixture")
    },
    "optimized/parallel/experts.py": SPREAD_EXPERTS,
    "optimized/parallel/causal_experts.py": SPREAD_EXPERTS,
    "optimized/parallel/causal.py": CAUSAL_SHARDS,
    "optimized/kernels/ranks.py": REMEMBERED,
    "optimized/kernels/candidates.py": BY_THRESHOLD,
    "optimized/kernels/memory.py": REMEMBERED,
    "optimized/kernels/blend.py": BLEND,
    "optimized/kernels/memory_places.py": PLACES,
    "optimized/kernels/memory_attention.py": MEMORY_ATTENTION,
    "optimized/ops/candidates.py": BY_THRESHOLD,
    "optimized/ops/memory.py": MEMORY,
    "optimized/ops/memory_attention.py": MEMORY_ATTENTION_TORCH,
    "optimized/kernels/selection.py": SELECTION,
    "optimized/kernels/slots.py": SELECTION,
    "optimized/kernels/long_selection.py": LONG_SELECTION,
    "optimized/kernels/coordinate_descent.py": DESCENT,
    "optimized/kernels/long_descent.py": LONG_DESCENT,
    "optimized/kernels/temperature.py": DESCENT,
    "optimized/kernels/capped_simplex.py": CAPPED,
    "optimized/kernels/sigmoid.py": SIGMOID,
    "optimized/kernels/rows.py": ROWS,
    "optimized/kernels/launch.py": LAUNCH,
    "optimized/kernels/combine.py": COMBINE,
    "optimized/kernels/partial_sums.py": SUMS,
    "optimized/kernels/null_slot.py": ATTENTION,
    "optimized/kernels/router_logits.py": LOGITS,
    "optimized/kernels/gather_norm.py": GATHER,
    "optimized/kernels/router_gradient.py": ROUTER_GRADIENT,
    "optimized/kernels/token_gradient.py": GATHER,
    "optimized/kernels/value_score.py": EXPERTS,
    "optimized/kernels/attention.py": ATTENTION_KERNEL,
    "optimized/kernels/keep.py": ATTENTION_KERNEL,
    "optimized/kernels/rotary.py": ROTARY,
    "optimized/kernels/window.py": WINDOW_KERNEL,
    "optimized/kernels/layer_norm.py": NORM,
    "optimized/ops/operator.py": OPERATOR,
    "optimized/ops/router_logits.py": ROUTER,
    "optimized/ops/select.py": PICK,
    "optimized/ops/pick.py": PICK,
    "optimized/ops/blocks.py": PICK,
    "optimized/ops/solver.py": ROUTED_ROWS,
    "optimized/ops/coordinate_descent.py": SOLVERS,
    "optimized/ops/capped_simplex.py": SOLVERS,
    "optimized/ops/routed_rows.py": ROUTED_ROWS,
    "optimized/ops/gather_norm.py": GATHERED,
    "optimized/ops/rows.py": MOVES,
    "optimized/ops/combine.py": COMBINATION,
    "optimized/ops/rotary.py": ROTARY,
    "optimized/ops/attention.py": ATTENTION,
    "optimized/ops/null_slot.py": ATTENTION,
    "optimized/ops/expert_attention.py": EXPERTS,
    "optimized/ops/window.py": WINDOW,
    "optimized/ops/layer_norm.py": NORM,
    "optimized/ops/mixture.py": AT_ONCE,
    "optimized/attention/calls.py": ATTENTION,
    "optimized/attention/bias.py": ATTENTION,
    "optimized/attention/draws.py": ATTENTION,
    "optimized/attention/math.py": ATTENTION,
    "optimized/attention/torch_flash_cpu.py": ATTENTION,
    "optimized/attention/banded.py": LOCAL,
    "optimized/routing.py": ROUTING,
    "optimized/local_attention.py": LOCAL,
    "optimized/routed_attention.py": LAYER,
    "optimized/mixture.py": LAYER,
    "optimized/plain.py": PLAIN,
    "optimized/plan.py": PLAN,
    "optimized/choice.py": PLAN,
    "reference/contract.py": CONTRACT,
}
# Of faults that take a GPU to show.
LARGE = Profile(("test_large.py",), "test_large")
ADAPTERS = "hidden_keys or bitwise or kernels_own_draw or test_lengths"
PROFILES_ON_GPU = {
    "optimized/kernels/selection.py": LARGE,
    "optimized/kernels/long_selection.py": LARGE,
    "optimized/kernels/coordinate_descent.py": LARGE,
    "optimized/kernels/combine.py": Profile(
        ("test_large.py", "test_poison.py"), "(test_large.py or uninitialised) and combine"
    ),
    "optimized/kernels/null_slot.py": LARGE,
    "optimized/kernels/rotary.py": LARGE,
    "reference/contract.py": Profile(("test_cuda_graphs.py",), "every_input and routes"),
    "optimized/attention/torch_efficient.py": Profile(
        ("test_cuda_graphs.py", "test_attention.py"),
        "(every_attention_backend or draws_anew or test_lengths) and efficient",
    ),
    "optimized/attention/calls.py": Profile(
        ("test_attention.py",), "test_every_key and torch- and float16 and not flash_attn_4"
    ),
    "optimized/attention/__init__.py": Profile(
        ("test_local_attention.py",), "test_optimized_matches and not flex and not banded and torch", examples=20
    ),
    "optimized/attention/lengths.py": Profile(
        ("test_attention.py",), "test_lengths and torch- and (torch_flash or flash_attn_2)"
    ),
    "optimized/attention/flash_attn_4.py": Profile(("test_attention.py",), "(hidden_keys or windows) and flash_attn_4"),
    "optimized/attention/flash_attn_2.py": Profile(("test_attention.py",), f"({ADAPTERS}) and flash_attn_2"),
    "optimized/attention/torch_flash.py": Profile(("test_attention.py",), f"({ADAPTERS}) and torch_flash"),
    "optimized/attention/flex_window.py": Profile(
        ("test_local_attention.py",), "test_optimized_matches and flex and torch", examples=20
    ),
    "optimized/attention/banded.py": Profile(
        ("test_local_attention.py",), "masked_tokens or padding or (test_optimized_matches and efficient)"
    ),
    "optimized/attention/torch_cudnn.py": Profile(
        ("test_attention.py", "test_routed_attention.py"),
        "cudnn and (bitwise or negative_logits)",
        examples=20,
    ),
    "optimized/attention/interface.py": Profile(("test_attention.py",), "test_windows"),
}


def profile_of(file: str, device: str = "cpu") -> Profile:
    return (PROFILES if device == "cpu" else PROFILES_ON_GPU)[file]
