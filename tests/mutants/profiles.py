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
    ("test_rows.py", "test_routing.py", "test_operators.py"),
    "((select or poison) and (triton or masked) and not (groups and float64) and not batching) or route_matches",
    interpreted=True,
    examples=60,
)
DESCENT = Profile(
    ("test_rows.py", "test_routing.py", "test_operators.py"),
    "(triton and (iterative or descent or temperature or equality) and not (none_valid and 45)) "
    "or (coordinate_descent and masked and opcheck)",
    interpreted=True,
)
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
COMBINE = Profile(
    ("test_mixture.py", "test_operators.py"),
    "(triton and (counts or hidden or unrouted or (injected and float64))) or (combin and (opcheck or gradients))",
    interpreted=True,
)
ATTENTION = Profile(
    ("test_mixture.py", "test_attention.py", "test_operators.py", "test_routed_attention.py"),
    "without_tokens or test_attention.py or (attention and opcheck) "
    "or (test_routed_attention.py and (dropout or null or order))",
    interpreted=True,
    examples=20,
)
ROTARY = Profile(
    ("test_operators.py", "test_routed_attention.py", "test_local_attention.py"),
    "rotation or rotary_tables or (rotary and (opcheck or leave)) or (triton and (matches or gradcheck))",
    interpreted=True,
    examples=40,
)
LAUNCH = Profile(
    ("test_launch.py", "test_rows.py", "test_attention.py", "test_operators.py", "test_mixture.py"),
    "(triton and (picked and 9- or (gradcheck and not routed_rows) or test_dropout or hidden or rounds_once "
    "or (injected and float64))) or layout_changes or test_launch",
    interpreted=True,
)
LOGITS = Profile(
    ("test_operators.py", "test_mixture.py"),
    "(whole_stages and (router_logits or routed_rows)) or own_context or nan_routing or both_routers",
    interpreted=True,
)
GATHER = Profile(
    ("test_operators.py", "test_mixture.py", "test_boundaries.py"),
    "(whole_stages and (gather_norm or routed_rows)) or own_context or nan_routing or experts-65 or channels-4097",
    interpreted=True,
)
EXPERTS = Profile(
    ("test_operators.py", "test_mixture.py", "test_routed_attention.py", "test_poison.py"),
    "(whole_stages and expert) or own_context or (expert_attention and opcheck and masked) or null or masked_lanes "
    "or value_scores",
    interpreted=True,
)
WINDOW = Profile(
    ("test_local_attention.py", "test_operators.py"),
    "one_operator or (whole_stages and window) or (window_attention and opcheck and masked)",
    interpreted=True,
)
ROUTER = Profile(
    ("test_mixture.py", "test_routing.py", "test_operators.py", "test_backends.py"),
    "both_routers or (not triton and not test_mixture and (test_routing "
    "or (opcheck and (select or coordinate or capped)) or (gradcheck and not batched) or refuse_higher "
    "or plain_call or threshold or autocast or (batching and (coordinate or capped) and plain)))",
    interpreted=True,
)
TOKENS = Profile(
    ("test_operators.py", "test_mixture.py"),
    "dispatch or collect or moves or transposed or test_mixture",
)
REGISTRATION = Profile(
    ("test_operators.py", "test_backends.py"),
    "plain_call or refuse or (gradcheck and not batching) or (test_backends and (gradients or forms))",
)
LOCAL = Profile(("test_local_attention.py", "test_public_defects.py"))
LAYER = Profile(
    ("test_mixture.py", "test_routed_attention.py", "test_backends.py", "test_validation.py"),
    "both_routers or callers_routes or (not triton and not checkpoint)",
    interpreted=True,
)
BACKENDS = Profile(("test_backends.py", "test_validation.py", "test_attention.py"))
VALIDATION = Profile(("test_validation.py",))

PROFILES = {
    "optimized/kernels/selection.py": SELECTION,
    "optimized/kernels/coordinate_descent.py": DESCENT,
    "optimized/kernels/capped_simplex.py": CAPPED,
    "optimized/kernels/rows.py": ROWS,
    "optimized/kernels/launch.py": LAUNCH,
    "optimized/kernels/combine.py": COMBINE,
    "optimized/kernels/null_slot.py": ATTENTION,
    "optimized/kernels/router_logits.py": LOGITS,
    "optimized/kernels/gather_norm.py": GATHER,
    "optimized/kernels/token_gradient.py": GATHER,
    "optimized/kernels/value_score.py": EXPERTS,
    "optimized/ops/gather_norm.py": GATHER,
    "optimized/ops/router_logits.py": LOGITS,
    "optimized/ops/routed_rows.py": LOGITS,
    "optimized/ops/expert_attention.py": EXPERTS,
    "optimized/ops/window_attention.py": WINDOW,
    "optimized/kernels/rotary.py": ROTARY,
    "optimized/ops/selection.py": ROUTER,
    "optimized/ops/solvers.py": ROUTER,
    "optimized/ops/tokens.py": TOKENS,
    "optimized/ops/registration.py": REGISTRATION,
    "optimized/ops/rotary.py": ROTARY,
    "optimized/ops/combine.py": COMBINE,
    "optimized/ops/attention.py": ATTENTION,
    "optimized/attention/math.py": ATTENTION,
    "optimized/attention/torch_flash_cpu.py": ATTENTION,
    "optimized/routing.py": ROUTER,
    "optimized/local_attention.py": LOCAL,
    "optimized/routed_attention.py": LAYER,
    "optimized/mixture.py": LAYER,
    "optimized/backends.py": BACKENDS,
    "optimized/validation.py": VALIDATION,
}
# Of faults that take a GPU to show.
LARGE = Profile(("test_large.py",), "test_large")
ADAPTERS = "hidden_keys or bitwise or kernels_own_draw or test_lengths"
PROFILES_ON_GPU = {
    "optimized/kernels/selection.py": LARGE,
    "optimized/kernels/coordinate_descent.py": LARGE,
    "optimized/kernels/combine.py": Profile(
        ("test_large.py", "test_poison.py"), "(test_large.py or uninitialised) and combine"
    ),
    "optimized/kernels/null_slot.py": LARGE,
    "optimized/kernels/rotary.py": LARGE,
    "optimized/validation.py": Profile(("test_cuda_graphs.py",), "every_input and routes"),
    "optimized/attention/torch_efficient.py": Profile(
        ("test_cuda_graphs.py", "test_attention.py"),
        "(every_attention_backend or draws_anew or test_lengths) and efficient",
    ),
    "optimized/ops/attention.py": Profile(
        ("test_attention.py",), "test_every_key and torch- and float16 and not flash_attn_4"
    ),
    "optimized/attention/__init__.py": Profile(("test_attention.py",), "test_windows or hidden_keys", examples=10),
    "optimized/attention/lengths.py": Profile(
        ("test_attention.py",), "test_lengths and torch- and (torch_flash or flash_attn_2)"
    ),
    "optimized/attention/flash_attn_4.py": Profile(("test_attention.py",), "hidden_keys and flash_attn_4"),
    "optimized/attention/flash_attn_2.py": Profile(("test_attention.py",), f"({ADAPTERS}) and flash_attn_2"),
    "optimized/attention/torch_flash.py": Profile(("test_attention.py",), f"({ADAPTERS}) and torch_flash"),
    "optimized/attention/flex_window.py": Profile(
        ("test_local_attention.py",), "test_optimized_matches and flex and torch", examples=20
    ),
    "optimized/local_attention.py": Profile(
        ("test_local_attention.py",), "masked_tokens or padding or (test_optimized_matches and efficient)"
    ),
    "optimized/backends.py": Profile(
        ("test_attention.py", "test_local_attention.py"),
        "bitwise or (test_optimized_matches and not flex and not banded and torch)",
        examples=20,
    ),
}


def profile_of(file: str, device: str = "cpu") -> Profile:
    return (PROFILES if device == "cpu" else PROFILES_ON_GPU)[file]
