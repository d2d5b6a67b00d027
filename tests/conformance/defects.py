"""The reference with one thing wrong at a time: for every property a layer that breaks it, and little else.

Those that public packages have are marked by the number of the table in docs/differences.md.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import reference
from reference import MixtureOfAttention, Routes

Arguments = dict[str, Any]
Defect = Callable[[MixtureOfAttention, Arguments], None]


@dataclass(frozen=True)
class Defective:
    """Builds the reference and spoils it. breaks: the properties that must report it, and no other may."""

    spoil: Defect
    breaks: frozenset[str]

    def __call__(self, dim: int, **arguments: Any) -> nn.Module:
        layer = MixtureOfAttention(dim, **arguments)
        self.spoil(layer, arguments)
        return layer


DEFECTS: dict[str, Defective] = {}


def breaks(*properties: str) -> Callable[[Defect], Defect]:
    def register(spoil: Defect) -> Defect:
        DEFECTS[spoil.__name__] = Defective(spoil, frozenset(properties))
        return spoil

    return register


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

Given = dict[str, Any]  # arguments of forward by name; x among them


def before(layer: nn.Module, change: Callable[[Given], Given | None]) -> None:
    """Changes the arguments of the layer's forward."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Given) -> tuple[tuple[()], Given]:
        given = {"x": args[0], **kwargs} if args else kwargs
        return (), change(given) or given

    layer.register_forward_pre_hook(hook, with_kwargs=True)


def after(layer: nn.Module, change: Callable[[Tensor, Given], Tensor]) -> None:
    """Changes the output of the layer's forward; returned routes stay."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Given, out: Any) -> Any:
        given = {"x": args[0], **kwargs} if args else kwargs
        if isinstance(out, tuple):
            return change(out[0], given), out[1]
        return change(out, given)

    layer.register_forward_hook(hook, with_kwargs=True)


def around_attention(
    layer: MixtureOfAttention, change: Callable[[Tensor, Tensor, Routes, Routes, Tensor | None], tuple[Any, ...]]
) -> None:
    """Changes what routed attention is given: x, context, query and key/value routes, rotary angles."""
    layer.attn.register_forward_pre_hook(lambda _, args: change(*args))


def routed(layer: MixtureOfAttention, given: Given) -> bool:
    """Whether there is a choice of queries."""
    return given["x"].shape[1] > (given.get("num_routed_queries") or layer.num_routed_queries)


# Interface


@breaks("documented_examples_run")
def four_experts_are_a_type_error(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """1: the documented constructor calls raise."""
    if arguments["num_experts"] == 4:
        raise TypeError("unexpected keyword argument 'num_routed'")


@breaks("state_dict_has_the_names_and_shapes")
def a_parameter_too_many(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.register_parameter("temperature", nn.Parameter(torch.ones_like(layer.attn.null_kv[:, 0])))


@breaks("device_and_dtype_at_construction")
def dtype_is_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.float()


@breaks("inputs_are_left_alone")
def the_mask_is_overwritten(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def with_a_mask_of_its_own(given: Given) -> Given:
        """The computation, its gradient included, is right."""
        layer.overwritten = given.get("mask")
        return given | ({"mask": given["mask"].clone()} if given.get("mask") is not None else {})

    def spoil(_: nn.Module, args: object, kwargs: object, out: Any) -> None:
        if layer.overwritten is not None:
            layer.overwritten.logical_not_()

    before(layer, with_a_mask_of_its_own)
    layer.register_forward_hook(spoil, with_kwargs=True)


# Attention


@breaks(*VALUES)
def outputs_are_a_percent_off(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.attn.register_forward_hook(lambda _, args, y: 1.01 * y)


@breaks("norms_have_unit_rms")
def norms_scale_by_the_wrong_power(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """2: by 1 / D too little. (Here by 1 / 8, which rounds nothing.)"""

    def scale(attn: Any, by: float) -> None:
        for norm in (attn.norm, attn.context_norm):
            if norm is not None:
                norm.gamma.data *= by

    layer.attn.register_forward_pre_hook(lambda attn, args: scale(attn, 1 / 8))
    layer.attn.register_forward_hook(lambda attn, args, y: scale(attn, 8))


@breaks("gradients_of_attention")
def queries_have_no_gradient(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.attn.to_q.weight.register_hook(torch.zeros_like)


@breaks("routers_have_no_gradient_without_a_choice")
def routers_have_a_gradient_without_a_choice(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(out: Tensor, given: Given) -> Tensor:
        token = layer.query_router.routing_token
        return out if routed(layer, given) or token is None else out + (token - token.detach()).sum()

    after(layer, change)


@breaks("experts_have_their_own_weights")
def experts_share_a_null_slot(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(attn: Any, args: tuple[Any, ...]) -> None:
        attn.null_kv.data[:] = attn.null_kv.data[:, :1].clone()

    layer.attn.register_forward_pre_hook(change)


@breaks("experts_read_their_own_tokens")
def experts_are_mixed(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """3: keys and values of an expert come from another one's tokens."""

    def change(x: Tensor, context: Tensor, q: Routes, kv: Routes, rotary: Tensor | None) -> tuple[Any, ...]:
        moved = (t.roll(1, dims=1) for t in (kv.indices, kv.mask, kv.scores))
        return x, context, q, Routes(*moved, kv.logits), rotary

    around_attention(layer, change)


@breaks("rotary_positions_are_those_of_the_tokens")
def rotary_positions_are_off_for_keys_and_queries(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(x: Tensor, context: Tensor, q: Routes, kv: Routes, rotary: Tensor | None) -> tuple[Any, ...]:
        return x, context, q, kv, None if rotary is None else rotary.flip(0) * 0.5

    around_attention(layer, change)


@breaks("context_is_attended_to")
def context_is_cut_to_the_length_of_x(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(given: Given) -> Given:
        n = given["x"].shape[1]
        cut = {name: given[name][:, :n] for name in ("context", "context_mask") if given.get(name) is not None}
        return given | cut

    before(layer, change)


@breaks("gradients_reach_the_routers")
def scores_of_the_iterative_solver_have_no_gradient(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """7: the gradient of coordinate descent is wrong."""
    if layer.query_router.options.solver == "iterative":
        layer.query_router.register_forward_hook(lambda _, args, r: r._replace(scores=r.scores.detach()))


# Batch


@breaks("batch_items_are_isolated")
def batch_items_are_mixed(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """15: item b gets the tokens of item b // E."""

    def change(x: Tensor, context: Tensor, q: Routes, kv: Routes, rotary: Tensor | None) -> tuple[Any, ...]:
        item = torch.arange(x.shape[0], device=x.device) // layer.num_experts
        return x[item], context[item], q, kv, rotary

    around_attention(layer, change)


@breaks("batch_size_changes_nothing")
def outputs_grow_with_the_batch(layer: MixtureOfAttention, arguments: Arguments) -> None:
    after(layer, lambda out, given: out * (1 + 0.01 * (given["x"].shape[0] - 1)))


# Combination


@breaks("local_attention_is_kept_where_all_tokens_are_routed")
def local_attention_is_thrown_away(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """4: where N <= K."""
    if layer.local_attn is not None:
        k = layer.num_routed_queries
        layer.local_attn.register_forward_hook(lambda _, args, out: out * 0 if out.shape[1] <= k else out)


@breaks("experts_are_summed_where_all_tokens_are_routed")
def experts_are_averaged_unasked(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """4: where N <= K."""

    def change(out: Tensor, given: Given) -> Tensor:
        averaged = layer.average_routed or routed(layer, given)
        return out if averaged else out / layer.num_experts

    after(layer, change)


@breaks("average_routed_divides_by_the_number_of_terms")
def the_mean_counts_one_expert_too_few(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(out: Tensor, given: Given) -> Tensor:
        asked = layer.average_routed and not routed(layer, given)
        return out * layer.num_experts / max(layer.num_experts - 1, 1) if asked else out

    after(layer, change)


@breaks("tokens_of_no_expert_become_the_null_token")
def tokens_of_no_expert_become_zero(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(mixture: Any, args: tuple[Any, ...]) -> None:
        if mixture.null_routed_token is not None:
            mixture.null_routed_token.data.zero_()

    layer.register_forward_pre_hook(change)


# Local attention


@breaks(
    "local_attention_sees_exactly_its_window",
    "local_attention_sees_no_padding",
    "local_attention_scores_depend_on_i_minus_j",
)
def the_window_is_one_too_wide(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """No layer with a wrong window can agree on more than one window."""
    if layer.local_attn is not None:
        layer.local_attn.window_size += 1


@breaks("local_attention_sees_no_padding")
def padding_keys_are_seen(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """5: N is padded to a multiple of the window, with keys and values of 0. (Exact where queries are 0.)"""

    def change(local: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        w, n = local.window_size, out.shape[1]
        if args[1] is not None:
            return out
        position = torch.arange(-(-n // w) * w, device=out.device)
        near = (position[:n, None] - position).abs() <= w
        return out * (near[:, :n].sum(1) / near.sum(1))[:, None].to(out.dtype)

    if layer.local_attn is not None:
        layer.local_attn.register_forward_hook(change)


@breaks("local_attention_scores_depend_on_i_minus_j")
def positions_are_a_window_off(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """6: scores depend on i - j + w."""

    def forward(local: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, kv = local.to_qkv.weight.tensor_split([local.to_out.weight.shape[1]])
        d = q.shape[0] // local.heads
        angles = reference_angles(local.window_size, d, x)
        q = rotate(q.unflatten(0, (local.heads, d)).mT, angles).mT.flatten(0, 1)
        norm = local.norm
        return reference.local_attention(
            x,
            local.window_size,
            mask,
            w_qkv=torch.cat((q, kv)),
            w_out=local.to_out.weight,
            heads=local.heads,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
        )

    if layer.local_attn is not None:
        layer.local_attn.forward = types.MethodType(forward, layer.local_attn)


def reference_angles(position: int, dim_head: int, like: Tensor) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(0, dim_head, 2, device=like.device, dtype=torch.float64) / dim_head)
    return (position * frequency).repeat(2)


def rotate(t: Tensor, angles: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return t * angles.cos().to(t.dtype) + torch.cat((-second, first), dim=-1) * angles.sin().to(t.dtype)


@breaks("gradients_of_local_attention")
def the_bias_of_the_local_norm_has_no_gradient(layer: MixtureOfAttention, arguments: Arguments) -> None:
    if layer.local_attn is not None and layer.local_attn.norm is not None:
        layer.local_attn.norm.bias.register_hook(torch.zeros_like)


# Masks


@breaks("masked_tokens_take_no_part", "masked_padding_changes_nothing", "an_item_without_valid_tokens_is_zero")
def the_mask_is_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    before(layer, lambda given: {name: v for name, v in given.items() if name != "mask"})


@breaks("masked_tokens_take_no_part")
def masked_tokens_are_not_zero(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(out: Tensor, given: Given) -> Tensor:
        mask = given.get("mask")
        return out if mask is None else out + (~mask & mask.any(dim=1, keepdim=True))[..., None].to(out.dtype)

    after(layer, change)


@breaks("masked_padding_changes_nothing")
def padding_counts_in_a_mean(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(out: Tensor, given: Given) -> Tensor:
        mask = given.get("mask")
        return out if mask is None else out * (1 + (~mask).to(out.dtype).mean(dim=1)[:, None, None])

    after(layer, change)


@breaks("an_item_without_valid_tokens_is_zero")
def an_item_without_valid_tokens_is_nan(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(out: Tensor, given: Given) -> Tensor:
        mask = given.get("mask")
        return out if mask is None else out.masked_fill(~mask.any(dim=1)[:, None, None], torch.nan)

    after(layer, change)


@breaks("masked_context_takes_no_part", "without_a_visible_key_the_null_slot_is_left")
def the_context_mask_is_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    before(layer, lambda given: {name: v for name, v in given.items() if name != "context_mask"})


@breaks("masked_context_takes_no_part")
def masked_context_has_a_gradient(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(out: Tensor, given: Given) -> Tensor:
        mask = given.get("context_mask")
        if mask is None:
            return out
        hidden = given["context"] * ~mask[..., None]
        return out + (hidden - hidden.detach()).sum()

    after(layer, change)


@breaks("without_a_visible_key_the_null_slot_is_left")
def without_a_visible_key_nothing_is_left(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(out: Tensor, given: Given) -> Tensor:
        mask = given.get("context_mask")
        return out if mask is None else out * mask.any(dim=1)[:, None, None]

    after(layer, change)


# Routing


def with_options(layer: MixtureOfAttention, **changed: Any) -> None:
    for router in (layer.query_router, layer.key_value_router):
        router.options = replace(router.options, **changed)


@breaks("soft_scores_scale_queries_and_values")
def soft_scores_are_dropped(layer: MixtureOfAttention, arguments: Arguments) -> None:
    options = layer.query_router.options
    if options.solver == "iterative" and not options.cosine_sim_routing:
        with_options(layer, straight_through=True)


@breaks("cosine_routing_ignores_the_norms")
def cosine_routing_is_a_dot_product(layer: MixtureOfAttention, arguments: Arguments) -> None:
    with_options(layer, cosine_sim_routing=False)


@breaks("the_exact_solver_returns_the_limit")
def the_exact_solver_iterates(layer: MixtureOfAttention, arguments: Arguments) -> None:
    with_options(layer, solver="iterative")


@breaks("route_block_size_routes_from_every_block")
def blocks_are_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """9, which raises."""
    with_options(layer, route_block_size=None)


@breaks("routing_tokens_can_be_passed_at_forward")
def forward_has_no_routing_tokens(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """11."""

    def forward(self: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return MixtureOfAttention.forward(self, x, mask=mask)

    if arguments.get("learned_routing_tokens"):
        layer.forward = types.MethodType(forward, layer)


@breaks("slots_can_be_overridden_at_forward")
def overrides_are_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    slots = ("num_routed_queries", "num_routed_key_values")
    before(layer, lambda given: {name: v for name, v in given.items() if name not in slots})


@breaks("returned_routes_can_be_given_back")
def given_routes_are_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    before(layer, lambda given: {name: v for name, v in given.items() if name != "routes"})


# Precision


def refuse_half(layer: MixtureOfAttention) -> None:
    def change(given: Given) -> None:
        if given["x"].dtype in (torch.bfloat16, torch.float16):
            raise RuntimeError("expected scalar type Float")

    before(layer, change)


@breaks("every_dtype")
def half_precision_raises(layer: MixtureOfAttention, arguments: Arguments) -> None:
    if layer.local_attn is None and not layer.average_routed:
        refuse_half(layer)


@breaks("every_dtype_with_local_attention")
def half_precision_raises_with_local_attention(layer: MixtureOfAttention, arguments: Arguments) -> None:
    """13."""
    if layer.local_attn is not None:
        refuse_half(layer)


@breaks("every_dtype_with_average_routed")
def the_mean_is_float32(layer: MixtureOfAttention, arguments: Arguments) -> None:
    if layer.average_routed:
        after(layer, lambda out, given: out.to(torch.promote_types(out.dtype, torch.float32)))


# Calls


@breaks("eval_ignores_dropout")
def dropout_never_stops(layer: MixtureOfAttention, arguments: Arguments) -> None:
    before(layer, lambda given: layer.attn.train(layer.attn.dropout > 0) and None)


@breaks("dropout_differs_between_calls")
def dropout_draws_the_same_mask(layer: MixtureOfAttention, arguments: Arguments) -> None:
    before(layer, lambda given: torch.manual_seed(0) and None)


@breaks("forward_is_deterministic")
def every_second_call_rounds_otherwise(layer: MixtureOfAttention, arguments: Arguments) -> None:
    calls = [0]

    def change(out: Tensor, given: Given) -> Tensor:
        calls[0] += 1
        return out * (1 + 2.0**-22) if calls[0] % 2 == 0 else out

    after(layer, change)


@breaks("a_deep_copy_computes_the_same")
def a_deep_copy_shares_parameters(layer: MixtureOfAttention, arguments: Arguments) -> None:
    layer.__deepcopy__ = types.MethodType(lambda self, memo: copy.copy(self), layer)


@breaks("strides_do_not_matter")
def strides_are_ignored(layer: MixtureOfAttention, arguments: Arguments) -> None:
    def change(given: Given) -> Given | None:
        x = given["x"]
        if x.is_contiguous():
            return None
        packed = torch.empty(x.shape).stride()
        return given | {"x": x.as_strided(x.shape, packed, x.storage_offset())}

    before(layer, change)
