"""The reference's layer with one thing wrong at a time: for every property of `tests/conformance` one that breaks it,
and little else. Where a function alone can have the same fault, the fault's package has it there too.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import reference
from reference import MixtureOfAttention, Routes
from tests.faults.fault import Fault, named, package

Arguments = dict[str, Any]
Given = dict[str, Any]  # arguments of forward by name; x among them
Spoil = Callable[[MixtureOfAttention, Arguments], Any]
Functions = Mapping[str, Callable[..., Any]]
Attended = tuple[Tensor, Tensor, Routes, Routes, Tensor | None]


@dataclass(frozen=True)
class LayerFault(Fault):
    """Builds the reference and spoils it. breaks: the properties that must report it, and no other may.

    functions: in place of the reference's, by name, with the same fault.
    """

    spoil: Spoil
    breaks: frozenset[str]
    functions: Functions = field(default_factory=dict)

    def __call__(self, dim: int, **arguments: Any) -> nn.Module:
        layer = MixtureOfAttention(dim, **arguments)
        self.spoil(layer, arguments)
        return layer

    def package(self) -> ModuleType:
        return package(self, self.functions)


LAYERS: dict[str, LayerFault] = {}


class breaks:
    """A decorator, which registers a fault by the function's name with the properties that it breaks.

    The function spoils a layer, given its constructor's arguments. That of `breaks(...).arguments` changes what forward
    is given (a dict, or None for no change), of `.output` what it returns but for routes, of `.attention` what routed
    attention is given; `.local` is in the place of `reference.local_attention`.
    """

    def __init__(self, *properties: str, why: str, functions: Functions | None = None) -> None:
        self.properties, self.why, self.functions = properties, why, functions or {}

    def __call__(self, spoil: Spoil) -> Spoil:
        return self._register(spoil, spoil)

    def _register(self, function: Callable[..., Any], spoil: Spoil, **functions: Callable[..., Any]) -> Any:
        name = named(function)
        LAYERS[name] = LayerFault(name, self.why, spoil, frozenset(self.properties), {**self.functions, **functions})
        return function

    def arguments(self, change: Callable[[Given, Any], Given | None]) -> Any:
        def spoil(layer: MixtureOfAttention, arguments: Arguments) -> None:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Given) -> tuple[tuple[()], Given]:
                given = by_name(args, kwargs)
                return (), change(given, layer) or given

            layer.register_forward_pre_hook(hook, with_kwargs=True)

        return self._register(change, spoil)

    def output(self, change: Callable[[Tensor, Given, Any], Tensor]) -> Any:
        def spoil(layer: MixtureOfAttention, arguments: Arguments) -> None:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Given, out: Any) -> Any:
                given = by_name(args, kwargs)
                return (change(out[0], given, layer), out[1]) if isinstance(out, tuple) else change(out, given, layer)

            layer.register_forward_hook(hook, with_kwargs=True)

        return self._register(change, spoil)

    def attention(self, change: Callable[..., Attended]) -> Any:
        def attend(*args: Any, rotary_emb: Tensor | None = None, **options: Any) -> Tensor:
            *changed, angles = change(*args, rotary_emb)
            return reference.routed_attention(*changed, rotary_emb=angles, **options)

        def spoil(layer: MixtureOfAttention, arguments: Arguments) -> None:
            layer.attn.register_forward_pre_hook(
                lambda _, args, kwargs: (change(*args, **kwargs), {}), with_kwargs=True
            )

        return self._register(change, spoil, routed_attention=attend)

    def local(self, function: Callable[..., Tensor]) -> Any:
        def forward(local: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
            norm = local.norm
            return function(
                x,
                local.window_size,
                mask,
                w_qkv=local.to_qkv.weight,
                w_out=local.to_out.weight,
                heads=local.heads,
                norm_weight=None if norm is None else norm.weight,
                norm_bias=None if norm is None else norm.bias,
            )

        def spoil(layer: MixtureOfAttention, arguments: Arguments) -> None:
            if layer.local_attn is not None:
                layer.local_attn.forward = types.MethodType(forward, layer.local_attn)

        return self._register(function, spoil, local_attention=function)


def by_name(args: tuple[Any, ...], kwargs: Given) -> Given:
    return {"x": args[0], **kwargs} if args else kwargs


def without(*names: str) -> Callable[[Given], Given]:
    return lambda given: {name: v for name, v in given.items() if name not in names}


def routed(layer: MixtureOfAttention, given: Given) -> bool:
    """Whether there is a choice of queries."""
    return given["x"].shape[1] > (given.get("num_routed_queries") or layer.config.num_routed_queries)


# Interface


@breaks("documented_examples_run", why="zetascale 2.8.8 (1)")
def four_experts_are_a_type_error(layer: MixtureOfAttention, arguments: Arguments) -> None:
    if arguments["num_experts"] == 4:
        raise TypeError("unexpected keyword argument 'num_routed'")


@breaks("state_dict_has_the_names_and_shapes", why="configuration")
def a_parameter_too_many(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.register_parameter("temperature", nn.Parameter(torch.ones_like(layer.attn.null_kv[:, 0])))


@breaks("device_and_dtype_at_construction", why="configuration")
def dtype_is_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.float()


@breaks("inputs_are_left_alone", why="in-place modification")
def the_mask_is_overwritten(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def with_a_mask_of_its_own(_: nn.Module, args: tuple[Any, ...], kwargs: Given) -> tuple[tuple[()], Given]:
        """The computation, its gradient included, is right."""
        given = by_name(args, kwargs)
        layer.overwritten = given.get("mask")
        return (), given | ({"mask": given["mask"].clone()} if given.get("mask") is not None else {})

    def spoil(_: nn.Module, args: object, kwargs: object, out: Any) -> None:
        if layer.overwritten is not None:
            layer.overwritten.logical_not_()

    layer.register_forward_pre_hook(with_a_mask_of_its_own, with_kwargs=True)
    layer.register_forward_hook(spoil, with_kwargs=True)


# Attention


VALUES = (
    "one_expert_equals_the_reference",
    "norms_have_unit_rms",
    "gradients_of_attention",
    "routers_have_no_gradient_without_a_choice",
    "experts_have_their_own_weights",
    "rotary_positions_are_those_of_the_tokens",
    "context_is_attended_to",
    "gradients_reach_the_routers",
    "local_attention_is_kept_where_all_tokens_are_routed",
    "experts_are_summed_where_all_tokens_are_routed",
    "average_routed_divides_by_the_number_of_terms",
    "without_a_visible_key_the_null_slot_is_left",
    "soft_scores_scale_queries_and_values",
    "cosine_routing_ignores_the_norms",
    "the_exact_solver_returns_the_limit",
    "route_block_size_routes_from_every_block",
    "routing_tokens_can_be_passed_at_forward",
    "slots_can_be_overridden_at_forward",
    "every_dtype",
    "every_dtype_with_average_routed",
    "eval_ignores_dropout",
)  # compare routed attention with the reference


@breaks(*VALUES, why="log-sum-exp and scale")
def outputs_are_a_percent_off(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.attn.register_forward_hook(lambda _, args, y: 1.01 * y)


def with_an_eighth_of_the_norms(*args: Any, **options: Any) -> Tensor:
    eighths = {name: options[name] / 8 for name in ("gamma", "context_gamma") if options.get(name) is not None}
    return reference.routed_attention(*args, **options | eighths)


@breaks("norms_have_unit_rms", why="zetascale 2.8.8 (2)", functions={"routed_attention": with_an_eighth_of_the_norms})
def norms_scale_by_the_wrong_power(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """By 1 / D too little. (Here by 1 / 8, which rounds nothing.)"""

    def scale(attn: Any, by: float) -> None:
        for norm in (attn.norm, attn.context_norm):
            if norm is not None:
                norm.gamma.data *= by

    layer.attn.register_forward_pre_hook(lambda attn, args: scale(attn, 1 / 8))
    layer.attn.register_forward_hook(lambda attn, args, y: scale(attn, 8))


@breaks("gradients_of_attention", why="missing gradient")
def queries_have_no_gradient(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.attn.to_q.weight.register_hook(torch.zeros_like)


@breaks("routers_have_no_gradient_without_a_choice", why="straight-through").output
def routers_have_a_gradient_without_a_choice(out: Tensor, given: Given, layer: Any) -> Tensor:
    token = layer.query_router.routing_token
    return out if routed(layer, given) or token is None else out + (token - token.detach()).sum()


@breaks("experts_have_their_own_weights", why="expert mix-up")
def experts_share_a_null_slot(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(attn: Any, args: tuple[Any, ...]) -> None:
        attn.null_kv.data[:] = attn.null_kv.data[:, :1].clone()

    layer.attn.register_forward_pre_hook(change)


@breaks("experts_read_their_own_tokens", why="mixture-of-attention 0.0.25 (3)").attention
def experts_are_mixed(
    x: Tensor, context: Tensor, q_routes: Routes, kv_routes: Routes, rotary_emb: Tensor | None
) -> Attended:
    """Keys and values of an expert come from another one's tokens."""
    moved = (t.roll(1, dims=1) for t in (kv_routes.indices, kv_routes.mask, kv_routes.scores))
    return x, context, q_routes, Routes(*moved, kv_routes.logits), rotary_emb


@breaks("rotary_positions_are_those_of_the_tokens", why="rotary").attention
def rotary_positions_are_off_for_keys_and_queries(*given: Any) -> Attended:
    *others, rotary = given
    return *others, None if rotary is None else rotary.flip(0) * 0.5


@breaks("context_is_attended_to", why="tail mask").arguments
def context_is_cut_to_the_length_of_x(given: Given, layer: Any) -> Given:
    n = given["x"].shape[1]
    return given | {name: given[name][:, :n] for name in ("context", "context_mask") if given.get(name) is not None}


@breaks("gradients_reach_the_routers", why="missing gradient")
def scores_of_the_iterative_solver_have_no_gradient(layer: MixtureOfAttention, arguments: Arguments) -> None:
    if layer.query_router.options.solver == "iterative":
        layer.query_router.register_forward_hook(lambda _, args, r: r._replace(scores=r.scores.detach()))


# Batch


@breaks("no_items_and_no_tokens_are_legal", why="empty input").arguments
def empty_inputs_raise(given: Given, layer: Any) -> None:
    if not given["x"].numel():
        raise RuntimeError("cannot reshape tensor of 0 elements")


@breaks("batch_items_are_isolated", why="colt5-attention 0.11.2 (15)").attention
def batch_items_are_mixed(x: Tensor, context: Tensor, q_routes: Routes, *others: Any) -> Attended:
    item = torch.arange(x.shape[0], device=x.device) // q_routes.indices.shape[1]
    return x[item], context[item], q_routes, *others


@breaks("batch_size_changes_nothing", why="batch mix-up").output
def outputs_grow_with_the_batch(out: Tensor, given: Given, layer: Any) -> Tensor:
    return out * (1 + 0.01 * (given["x"].shape[0] - 1))


# Combination


@breaks("local_attention_is_kept_where_all_tokens_are_routed", why="mixture-of-attention 0.0.25 (4)")
def local_attention_is_thrown_away(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """Where N <= K."""
    if layer.local_attn is not None:
        k = layer.config.num_routed_queries
        layer.local_attn.register_forward_hook(lambda _, args, out: out * 0 if out.shape[1] <= k else out)


@breaks("experts_are_summed_where_all_tokens_are_routed", why="mixture-of-attention 0.0.25 (4)").output
def experts_are_averaged_unasked(out: Tensor, given: Given, layer: Any) -> Tensor:
    """Where N <= K."""
    return out if layer.config.average_routed or routed(layer, given) else out / layer.config.num_experts


@breaks("average_routed_divides_by_the_number_of_terms", why="combination").output
def the_mean_counts_one_expert_too_few(out: Tensor, given: Given, layer: Any) -> Tensor:
    asked = layer.config.average_routed and not routed(layer, given)
    return out * layer.config.num_experts / max(layer.config.num_experts - 1, 1) if asked else out


@breaks("tokens_of_no_expert_become_the_null_token", why="combination").arguments
def tokens_of_no_expert_become_zero(given: Given, layer: Any) -> None:
    if layer.null_routed_token is not None:
        layer.null_routed_token.data.zero_()


# Local attention


@breaks(
    "local_attention_sees_exactly_its_window",
    "local_attention_sees_no_padding",
    "local_attention_scores_depend_on_i_minus_j",
    why="huggingface/transformers#39408",
).local
def the_window_is_one_too_wide(x: Tensor, window_size: int, *mask: Tensor | None, **weights: Any) -> Tensor:
    """No layer with a wrong window can agree on more than one window."""
    return reference.local_attention(x, window_size + 1, *mask, **weights)


@breaks("local_attention_sees_no_padding", why="local-attention 1.11.2 (5)").local
def padding_keys_are_seen(x: Tensor, window_size: int, mask: Tensor | None = None, **weights: Any) -> Tensor:
    """N is padded to a multiple of the window."""
    extra = -x.shape[1] % window_size if mask is None else 0
    padded = nn.functional.pad(x, (0, 0, 0, extra))
    return reference.local_attention(padded, window_size, mask, **weights)[:, : x.shape[1]]


@breaks("local_attention_scores_depend_on_i_minus_j", why="local-attention 1.11.2 (6)").local
def positions_are_a_window_off(x: Tensor, window_size: int, *mask: Tensor | None, **weights: Any) -> Tensor:
    """Scores depend on i - j + w."""
    heads, (q, kv) = weights["heads"], weights["w_qkv"].tensor_split([weights["w_out"].shape[1]])
    d = q.shape[0] // heads
    frequency = 10000.0 ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
    q = rotate(q.unflatten(0, (heads, d)).mT, (window_size * frequency).repeat(2)).mT.flatten(0, 1)
    return reference.local_attention(x, window_size, *mask, **weights | {"w_qkv": torch.cat((q, kv))})


def rotate(t: Tensor, angles: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return t * angles.cos().to(t.dtype) + torch.cat((-second, first), dim=-1) * angles.sin().to(t.dtype)


@breaks("gradients_of_local_attention", why="missing gradient")
def the_bias_of_the_local_norm_has_no_gradient(layer: MixtureOfAttention, arguments: Arguments) -> None:
    if layer.local_attn is not None and layer.local_attn.norm is not None:
        layer.local_attn.norm.bias.register_hook(torch.zeros_like)


# Masks


@breaks(
    "masked_tokens_take_no_part",
    "content_of_masked_tokens_does_not_matter",
    "masked_padding_changes_nothing",
    "an_item_without_valid_tokens_is_zero",
    why="masked tokens leak",
).arguments
def the_mask_is_ignored(given: Given, layer: Any) -> Given:
    return without("mask")(given)


@breaks("masked_tokens_take_no_part", why="masked tokens leak").output
def masked_tokens_are_not_zero(out: Tensor, given: Given, layer: Any) -> Tensor:
    mask = given.get("mask")
    return out if mask is None else out + (~mask & mask.any(dim=1, keepdim=True))[..., None].to(out.dtype)


@breaks("masked_padding_changes_nothing", why="masked tokens leak").output
def padding_counts_in_a_mean(out: Tensor, given: Given, layer: Any) -> Tensor:
    mask = given.get("mask")
    return out if mask is None else out * (1 + (~mask).to(out.dtype).mean(dim=1)[:, None, None])


@breaks("an_item_without_valid_tokens_is_zero", why="masked rows and sentinels").output
def an_item_without_valid_tokens_is_nan(out: Tensor, given: Given, layer: Any) -> Tensor:
    mask = given.get("mask")
    return out if mask is None else out.masked_fill(~mask.any(dim=1)[:, None, None], torch.nan)


@breaks(
    "masked_context_takes_no_part", "without_a_visible_key_the_null_slot_is_left", why="masked tokens leak"
).arguments
def the_context_mask_is_ignored(given: Given, layer: Any) -> Given:
    return without("context_mask")(given)


@breaks("masked_context_takes_no_part", why="masked tokens leak").output
def masked_context_has_a_gradient(out: Tensor, given: Given, layer: Any) -> Tensor:
    mask = given.get("context_mask")
    if mask is None:
        return out
    hidden = given["context"] * ~mask[..., None]
    return out + (hidden - hidden.detach()).sum()


@breaks("without_a_visible_key_the_null_slot_is_left", why="masked rows and sentinels").output
def without_a_visible_key_nothing_is_left(out: Tensor, given: Given, layer: Any) -> Tensor:
    mask = given.get("context_mask")
    return out if mask is None else out * mask.any(dim=1)[:, None, None]


# Routing


def with_options(layer: MixtureOfAttention, **changed: Any) -> None:
    for router in (layer.query_router, layer.key_value_router):
        router.options = replace(router.options, **changed)


@breaks("soft_scores_scale_queries_and_values", why="straight-through")
def soft_scores_are_dropped(layer: MixtureOfAttention, arguments: Arguments) -> None:
    options = layer.query_router.options
    if options.solver == "iterative" and not options.cosine_sim_routing:
        with_options(layer, straight_through=True)


@breaks("cosine_routing_ignores_the_norms", why="configuration")
def cosine_routing_is_a_dot_product(layer: MixtureOfAttention, arguments: Arguments) -> None:
    with_options(layer, cosine_sim_routing=False)


@breaks("the_exact_solver_returns_the_limit", why="configuration")
def the_exact_solver_iterates(layer: MixtureOfAttention, arguments: Arguments) -> None:
    with_options(layer, solver="iterative")


def route_without_blocks(*args: Any, route_block_size: int | None = None, **options: Any) -> Routes:
    return reference.route(*args, **options)


@breaks(
    "route_block_size_routes_from_every_block",
    why="colt5-attention 0.11.2 (9)",
    functions={"route": route_without_blocks},
)
def blocks_are_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """There, they raise."""
    with_options(layer, route_block_size=None)


@breaks("routing_tokens_can_be_passed_at_forward", why="colt5-attention 0.11.2 (11)")
def forward_has_no_routing_tokens(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def forward(self: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return MixtureOfAttention.forward(self, x, mask=mask)

    if arguments.get("learned_routing_tokens"):
        layer.forward = types.MethodType(forward, layer)


@breaks("slots_can_be_overridden_at_forward", why="configuration").arguments
def overrides_are_ignored(given: Given, layer: Any) -> Given:
    return without("num_routed_queries", "num_routed_key_values")(given)


@breaks("returned_routes_can_be_given_back", why="configuration").arguments
def given_routes_are_ignored(given: Given, layer: Any) -> Given:
    return without("routes")(given)


# Precision


def refuse_half(given: Given) -> None:
    if given["x"].dtype in (torch.bfloat16, torch.float16):
        raise RuntimeError("expected scalar type Float")


@breaks("every_dtype", "the_output_has_the_dtype_of_x", why="precision").arguments
def half_precision_raises(given: Given, layer: Any) -> None:
    if layer.local_attn is None and not layer.config.average_routed:
        refuse_half(given)


@breaks("every_dtype_with_local_attention", why="mixture-of-attention 0.0.25 (13)").arguments
def half_precision_raises_with_local_attention(given: Given, layer: Any) -> None:
    if layer.local_attn is not None:
        refuse_half(given)


@breaks("every_dtype_with_average_routed", why="precision").output
def the_mean_is_float32(out: Tensor, given: Given, layer: Any) -> Tensor:
    return out.to(torch.promote_types(out.dtype, torch.float32)) if layer.config.average_routed else out


# Calls


@breaks("eval_ignores_dropout", why="dropout").arguments
def dropout_never_stops(given: Given, layer: Any) -> None:
    layer.attn.train(layer.attn.dropout > 0)


@breaks("dropout_differs_between_calls", why="Dao-AILab/flash-attention#314").arguments
def dropout_draws_the_same_mask(given: Given, layer: Any) -> None:
    torch.manual_seed(0)


@breaks("forward_is_deterministic", why="stale saved tensor").output
def every_second_call_rounds_otherwise(out: Tensor, given: Given, layer: Any) -> Tensor:
    layer.calls = getattr(layer, "calls", 0) + 1
    return out * (1 + 2.0**-22) if layer.calls % 2 == 0 else out


@breaks("a_deep_copy_computes_the_same", why="in-place modification")
def a_deep_copy_shares_parameters(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.__deepcopy__ = types.MethodType(lambda self, memo: copy.copy(self), layer)


@breaks("strides_do_not_matter", why="stride and layout").arguments
def strides_are_ignored(given: Given, layer: Any) -> Given | None:
    x = given["x"]
    if x.is_contiguous():
        return None
    packed = torch.empty(x.shape).stride()
    return given | {"x": x.as_strided(x.shape, packed, x.storage_offset())}
