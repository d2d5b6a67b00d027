"""The reference's strictly causal layer with one thing wrong at a time: for every property of
`tests/conformance/causal` one that breaks it, and little else.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from reference import MixtureOfAutoregressiveAttention, autoregressive
from reference.autoregressive import Laid, Memory
from reference.autoregressive_cache import Cache
from reference.autoregressive_contract import AutoregressiveConfig
from tests.conformance.causal.subject import FEATURES
from tests.faults import layers
from tests.faults.fault import Fault, named
from tests.faults.layers import Arguments, Given, by_name, without
from tests.noise.layers import _of_its_own_window, _of_the_best_in_all, _of_the_sequence

Layer = MixtureOfAutoregressiveAttention

# Properties that report kinds of faults together.
WHOLE = "output_and_gradients_equal_the_reference"
LAW = (
    "no_token_sees_a_later_one",
    "no_token_sees_a_later_one_that_is_not_finite",
    "gradients_of_the_past_take_no_later_token",
    "a_prefix_has_the_output_of_the_whole",
)
QUERIES = (
    "queries_reach_the_threshold_of_the_block_before",
    "the_first_of_too_many_candidates_are_queries",
    "the_exact_solver_scores_what_is_picked",
)
MEMORY = ("an_expert_remembers_the_k_best_tokens", "experts_remember_tokens_of_their_own")
LOCAL = (
    "local_attention_sees_w_tokens_and_itself",
    "local_attention_scores_depend_on_i_minus_j",
    "gradients_of_local_attention",
    "local_attention_has_heads_of_its_own",
)
ATTENTION = (
    "an_expert_attends_over_the_blocks_before",
    "norms_have_unit_rms",
    "gradients_of_attention",
    "gradients_reach_the_routers",
    "experts_have_their_own_weights",
    "rotary_positions_are_those_of_the_tokens",
    "average_routed_divides_by_the_number_of_terms",
    "every_dtype_is_as_exact_as_it_can_be",
)
MASKS = (
    "masked_tokens_anywhere_change_nothing",
    "content_of_masked_tokens_does_not_matter",
    "masked_tokens_have_no_output_and_no_gradient",
    "an_item_without_valid_tokens_is_zero",
)
GOING_ON = ("a_cache_can_be_reordered", "a_cache_can_be_cropped")
IN_PIECES = ("decoding_in_any_pieces_is_the_whole", "masked_tokens_do_not_advance_a_cache")


@dataclass(frozen=True)
class CausalFault(Fault):
    """Builds the reference and spoils it. breaks: the properties that are about it. also: others that report it, as a
    wrong value shows in whatever is computed of it; no more may."""

    features: ClassVar[tuple[str, ...]] = FEATURES

    spoil: Callable[[Layer, Arguments], Any]
    breaks: frozenset[str]
    also: frozenset[str]

    def __call__(self, dim: int, **arguments: Any) -> nn.Module:
        layer = Layer(dim, **arguments)
        self.spoil(layer, arguments)
        return layer


CAUSAL: dict[str, CausalFault] = {}


class breaks(layers.breaks):
    """As that of `layers`. `.instead_of(name)`: of a function of `reference.autoregressive`; `.cache`: what is returned
    in place of a cache, given what forward was given."""

    def __init__(self, *properties: str, why: str, also: tuple[str, ...] = ()) -> None:
        super().__init__(*properties, why=why)
        self.also = also

    def _register(self, function: Callable[..., Any], spoil: Any, **functions: Callable[..., Any]) -> Any:
        name = named(function)
        CAUSAL[name] = CausalFault(name, self.why, spoil, frozenset(self.properties), frozenset(self.also))
        return function

    def instead_of(self, name: str) -> Callable[[Callable[..., Any]], Any]:
        def register(function: Callable[..., Any]) -> Any:
            return self._register(function, lambda layer, arguments: patch(layer, **{name: function}))

        return register

    def cache(self, change: Callable[[Cache, Given], Cache]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Given, out: Any) -> Any:
            return (out[0], change(out[1], by_name(args, kwargs))) if isinstance(out, tuple) else out

        def spoil(layer: Layer, arguments: Arguments) -> None:
            layer.register_forward_hook(hook, with_kwargs=True)

        return self._register(change, spoil)


def patch(layer: Layer, **functions: Callable[..., Any]) -> None:
    """Its forward computes with these in place of the functions of its module."""

    def forward(self: Layer, *args: Any, **given: Any) -> Any:
        with mock.patch.multiple(autoregressive, **functions):
            return Layer.forward(self, *args, **given)

    layer.forward = types.MethodType(forward, layer)


# The functions that a fault takes the place of.
combine, queries_of = autoregressive.combine, autoregressive.queries_of
remember, rotary_angles_at, thresholds_of = (
    autoregressive.remember, autoregressive.rotary_angles_at, autoregressive.thresholds_of,
)  # fmt: skip


# The law


@breaks(
    "no_token_sees_a_later_one",
    "gradients_of_the_past_take_no_later_token",
    why="causality",
    also=(*QUERIES, *IN_PIECES, *LAW, WHOLE),
).instead_of("thresholds_of")
def the_threshold_is_of_the_own_block(*given: Any) -> tuple[Tensor, Tensor]:
    """The best of a block are its queries, as in mixture-of-attention 0.0.25."""
    return _of_its_own_window(*given)


@breaks(
    "no_token_sees_a_later_one",
    "queries_reach_the_threshold_of_the_block_before",
    why="causality",
    also=(*GOING_ON, *IN_PIECES, *LAW, *QUERIES, WHOLE),
).instead_of("thresholds_of")
def the_threshold_is_of_the_sequence(*given: Any) -> tuple[Tensor, Tensor]:
    return _of_the_sequence(*given)


@breaks(
    "no_token_sees_a_later_one",
    "an_expert_remembers_the_k_best_tokens",
    why="causality",
    also=(
        *GOING_ON,
        *IN_PIECES,
        *LAW,
        WHOLE,
        "experts_remember_tokens_of_their_own",
        "the_exact_solver_scores_what_is_picked",
        "the_later_of_two_equal_logits_is_remembered",
        "a_cache_is_a_value",
    ),
).instead_of("remember")
def the_best_of_the_sequence_are_remembered(*given: Any) -> Memory:
    """And masked afterwards."""
    return _of_the_best_in_all(*given)


@breaks(
    "no_token_sees_a_later_one",
    "an_expert_attends_over_the_blocks_before",
    why="causality",
    also=(*QUERIES, *MEMORY, *GOING_ON, *IN_PIECES, *LAW, *ATTENTION, WHOLE),
).instead_of("remember")
def a_block_is_remembered_too_early(laid: Laid, past: Cache, c: AutoregressiveConfig) -> Memory:
    """By its own queries."""
    width, length = c.routed_window_size, laid.there.shape[1]
    longer = Laid(nn.functional.pad(laid.x, (0, 0, 0, width)), *(nn.functional.pad(t, (0, width)) for t in laid[1:]))
    found = remember(longer, past, c)
    places, mask, positions, poisoned = (t[:, :, 1:] for t in found)
    return Memory(places.clamp_max(c.num_routed_key_values + length - 1), mask, positions, poisoned)


@breaks("no_token_sees_a_later_one_that_is_not_finite", why="fla-org/flash-linear-attention#77").output
def later_tokens_are_multiplied_by_zero(out: Tensor, given: Given, layer: Any) -> Tensor:
    """0 times NaN is NaN."""
    return out + 0 * given["x"].sum(1, keepdim=True)


@breaks("gradients_of_the_past_take_no_later_token", why="causality", also=(WHOLE,)).arguments
def a_gradient_takes_all_tokens(given: Given, layer: Any) -> None:
    """Of the null tokens."""
    mean = given["x"].detach().mean() if given["x"].numel() else 0.0
    hook = getattr(layer, "of_the_call_before", None)
    if hook is not None:
        hook.remove()
    layer.of_the_call_before = layer.null_tokens.register_hook(lambda g: g + mean)


@breaks(
    "a_prefix_has_the_output_of_the_whole",
    why="tail mask",
    also=(
        *QUERIES,
        *LOCAL,
        *ATTENTION,
        *GOING_ON,
        *IN_PIECES,
        WHOLE,
        "masked_tokens_anywhere_change_nothing",
        "a_sequence_within_a_block_is_legal",
        "tokens_that_an_expert_leaves_get_its_null_token",
    ),
).output
def outputs_shrink_with_the_length(out: Tensor, given: Given, layer: Any) -> Tensor:
    return out / (1 + 0.01 * out.shape[1])


# Interface


@breaks("the_documented_example_runs", why="configuration")
def a_window_must_be_given(layer: Layer, arguments: Arguments) -> None:
    if arguments["routed_window_size"] is None:
        raise TypeError("unsupported operand type(s) for //: 'int' and 'NoneType'")


@breaks("state_dict_has_the_names_and_shapes", why="configuration", also=("every_parameter_has_a_gradient",))
def a_causal_parameter_too_many(layer: Layer, arguments: Arguments) -> None:
    layer.register_parameter("temperature", nn.Parameter(torch.ones_like(layer.attn.null_kv[:, 0])))


@breaks("device_and_dtype_at_construction", why="configuration")
def dtype_of_a_causal_layer_is_ignored(layer: Layer, arguments: Arguments) -> None:
    layer.float()


@breaks("inputs_are_left_alone", why="in-place modification")
def tokens_are_overwritten(layer: Layer, arguments: Arguments) -> None:
    """In their last digit, after the call."""

    def forward(self: Layer, x: Tensor, *args: Any, **given: Any) -> Any:
        out = Layer.forward(self, x.clone(), *args, **given)
        x.data.mul_(1 + 2.0**-22)
        return out

    layer.forward = types.MethodType(forward, layer)


@breaks("no_items_and_no_tokens_are_legal", why="empty input").arguments
def empty_sequences_raise(given: Given, layer: Any) -> None:
    if not given["x"].numel() and not given.get("use_cache"):
        raise RuntimeError("cannot reshape tensor of 0 elements")


@breaks(
    "a_sequence_within_a_block_is_legal",
    why="empty input",
    also=("every_parameter_has_a_gradient", "a_prefix_has_the_output_of_the_whole"),
).arguments
def less_than_a_block_raises(given: Given, layer: Any) -> None:
    short = given["x"].shape[1] in range(1, layer.config.routed_window_size)
    if short and not given.get("use_cache"):
        raise RuntimeError("expected at least a block of tokens")


@breaks(
    "every_token_may_be_a_query",
    why="configuration",
    also=(
        *MEMORY,
        *ATTENTION,
        *MASKS,
        *GOING_ON,
        *IN_PIECES,
        WHOLE,
        "local_attention_sees_w_tokens_and_itself",
        "local_attention_scores_depend_on_i_minus_j",
        "gradients_of_local_attention",
        "the_later_of_two_equal_logits_is_remembered",
        "the_first_block_is_local_attention_alone",
        "the_exact_solver_scores_what_is_picked",
        "a_cache_is_a_value",
    ),
).arguments
def whole_blocks_of_queries_raise(given: Given, layer: Any) -> None:
    """As in mixture-of-attention 0.0.25, where there are several blocks."""
    several = given["x"].shape[1] > 2 * layer.config.routed_window_size
    if layer.config.everybody and several:
        raise RuntimeError("sizes of tensors must match except in dimension 1")


@breaks("every_parameter_has_a_gradient", why="unslothai/unsloth#4533")
def nothing_routed_is_no_gradient(layer: Layer, arguments: Arguments) -> None:
    """Where there is one block, local attention is returned early."""

    def forward(self: Layer, x: Tensor, *args: Any, **given: Any) -> Any:
        early = [] if x.shape[1] > self.config.routed_window_size else [self.null_tokens, *self.attn.parameters()]
        try:
            for p in early:
                p.requires_grad_(False)
            return Layer.forward(self, x, *args, **given)
        finally:
            for p in early:
                p.requires_grad_(True)

    layer.forward = types.MethodType(forward, layer)


# Batch


@breaks(
    "batch_items_are_isolated",
    why="batch mix-up",
    also=(
        WHOLE,
        "an_item_without_valid_tokens_is_zero",
        "decoding_in_any_pieces_is_the_whole",
        *GOING_ON,
    ),
).instead_of("remember")
def items_remember_for_one_another(*given: Any) -> Memory:
    return Memory(*(t.roll(1, 0) for t in remember(*given)))


@breaks("batch_size_changes_nothing", why="batch mix-up", also=(WHOLE,)).output
def causal_outputs_grow_with_the_batch(out: Tensor, given: Given, layer: Any) -> Tensor:
    return out * (1 + 0.01 * (given["x"].shape[0] - 1))


# Local attention


def local_output(layer: Layer, change: Callable[[Tensor], Tensor]) -> None:
    layer.local_attn.register_forward_hook(lambda _, args, found: (change(found[0]), *found[1:]))


@breaks(
    "local_attention_sees_w_tokens_and_itself",
    why="huggingface/transformers#39408",
    also=(*GOING_ON, *IN_PIECES, WHOLE, "average_routed_divides_by_the_number_of_terms"),
)
def the_window_is_one_short(layer: Layer, arguments: Arguments) -> None:
    layer.local_attn.window_size -= 1


@breaks(
    "no_token_sees_a_later_one",
    "local_attention_sees_w_tokens_and_itself",
    why="jax-ml/jax#39576",
    also=(
        *IN_PIECES,
        *LAW,
        *LOCAL,
        WHOLE,
        "average_routed_divides_by_the_number_of_terms",
        "a_sequence_within_a_block_is_legal",
        "masked_tokens_anywhere_change_nothing",
    ),
)
def the_window_is_a_token_ahead(layer: Layer, arguments: Arguments) -> None:
    local_output(layer, lambda out: torch.cat((out[:, 1:], out[:, -1:]), 1))


@breaks(
    "local_attention_scores_depend_on_i_minus_j", why="rotary", also=(WHOLE, "local_attention_has_heads_of_its_own")
).instead_of("rotary_angles_at")
def local_angles_are_halved(position: Tensor, dim: int) -> Tensor:
    return rotary_angles_at(position, dim) / 2


@breaks("gradients_of_local_attention", why="missing gradient")
def the_bias_of_the_causal_norm_has_no_gradient(layer: Layer, arguments: Arguments) -> None:
    if layer.local_attn.norm is not None:
        layer.local_attn.norm.bias.register_hook(torch.zeros_like)


@breaks("local_attention_has_heads_of_its_own", why="configuration")
def local_heads_are_those_of_the_experts(layer: Layer, arguments: Arguments) -> None:
    layer.local_attn.heads = layer.config.heads


# Attention


@breaks("an_expert_attends_over_the_blocks_before", WHOLE, why="log-sum-exp and scale", also=(*QUERIES, *ATTENTION))
def experts_are_a_percent_off(layer: Layer, arguments: Arguments) -> None:
    layer.attn.register_forward_hook(lambda _, args, found: (1.01 * found[0], *found[1:]))


@breaks("norms_have_unit_rms", why="zetascale 2.8.8 (2)", also=(WHOLE,))
def norms_of_the_causal_layer_are_an_eighth(layer: Layer, arguments: Arguments) -> None:
    layers.LAYERS["norms scale by the wrong power"].spoil(layer, arguments)


@breaks("gradients_of_attention", why="missing gradient", also=(WHOLE,))
def causal_queries_have_no_gradient(layer: Layer, arguments: Arguments) -> None:
    layer.attn.to_q.weight.register_hook(torch.zeros_like)


@breaks("gradients_reach_the_routers", why="missing gradient", also=(WHOLE, "gradients_of_attention"))
def scores_have_no_gradient(layer: Layer, arguments: Arguments) -> None:
    for router in (layer.query_router, layer.key_value_router):
        router.register_forward_hook(lambda _, args, logits: logits.detach())


@breaks(
    "experts_have_their_own_weights", why="expert mix-up", also=(WHOLE, "average_routed_divides_by_the_number_of_terms")
)
def causal_experts_share_a_null_slot(layer: Layer, arguments: Arguments) -> None:
    layers.LAYERS["experts share a null slot"].spoil(layer, arguments)


@breaks("rotary_positions_are_those_of_the_tokens", why="rotary").arguments
def rotary_angles_are_halved(given: Given, layer: Any) -> Given:
    return given | ({"rotary_emb": given["rotary_emb"] / 2} if given.get("rotary_emb") is not None else {})


@breaks(
    "the_first_block_is_local_attention_alone",
    why="combination",
    also=(WHOLE, "average_routed_divides_by_the_number_of_terms"),
).instead_of("combine")
def the_first_block_gets_null_tokens(*given: Any) -> Tensor:
    _, _, _, past, null_tokens, c = given
    out = combine(*given)
    position = past.length[:, None] + torch.arange(out.shape[1], device=out.device)
    return out + torch.where((position < c.routed_window_size)[..., None], null_tokens.sum(0), 0)


@breaks("average_routed_divides_by_the_number_of_terms", why="combination").output
def the_causal_mean_counts_one_too_few(out: Tensor, given: Given, layer: Any) -> Tensor:
    c = layer.config
    return out * (c.num_experts + 1) / c.num_experts if c.average_routed else out


@breaks("the_exact_solver_scores_what_is_picked", why="configuration")
def the_exact_solver_is_a_sigmoid(layer: Layer, arguments: Arguments) -> None:
    layer.config = replace(layer.config, options=replace(layer.config.options, solver="sigmoid"))


# Queries


@breaks("the_first_of_too_many_candidates_are_queries", why="tail mask").instead_of("queries_of")
def a_slot_too_few(laid: Laid, past: Cache, limits: Any, c: AutoregressiveConfig, token: Tensor) -> Any:
    """The last of a block's candidates that have one goes without."""
    q = queries_of(laid, past, limits, c, token)
    last = q.mask & (q.mask.cumsum(-1) == c.capacity) & torch.tensor(not c.everybody)
    return q._replace(mask=q.mask & ~last.to(q.mask.device))


@breaks("tokens_that_an_expert_leaves_get_its_null_token", why="expert mix-up", also=(WHOLE,)).instead_of("combine")
def null_tokens_are_those_of_another_expert(*given: Any) -> Tensor:
    *others, null_tokens, c = given
    return combine(*others, null_tokens.roll(1, 0), c)


# Memory


def ranks_of(laid: Laid, past: Cache, memory: Memory) -> Tensor:
    """Key/value logits of what is remembered, infinite in empty places."""
    logits = torch.cat((past.logits, laid.kv_logits), -1).detach()[:, :, None]
    found = logits.expand(-1, -1, memory.places.shape[2], -1).gather(-1, memory.places)
    return found.masked_fill(~memory.mask, torch.inf)


@breaks(
    "an_expert_remembers_the_k_best_tokens",
    why="window",
    also=(
        *IN_PIECES,
        *GOING_ON,
        WHOLE,
        "experts_remember_tokens_of_their_own",
        "the_exact_solver_scores_what_is_picked",
    ),
).instead_of("remember")
def the_worst_is_forgotten_a_token_early(laid: Laid, past: Cache, c: AutoregressiveConfig) -> Memory:
    """K - 1 are left."""
    memory = remember(laid, past, c)
    rank = ranks_of(laid, past, memory)
    start = past.start[:, None] + c.routed_window_size * torch.arange(rank.shape[2], device=rank.device)
    full = (start > c.num_routed_key_values)[:, None, :, None]
    mask = memory.mask & ~(full & (rank == rank.amin(-1, keepdim=True)))
    return memory._replace(mask=mask, positions=memory.positions.masked_fill(~mask, -1))


@breaks("the_later_of_two_equal_logits_is_remembered", why="pytorch/pytorch#150012").instead_of("remember")
def the_earlier_of_two_is_remembered(laid: Laid, past: Cache, c: AutoregressiveConfig) -> Memory:
    return remember(laid._replace(kv_logits=laid.kv_logits - 1e-6 * laid.position[:, None]), past, c)


@breaks(
    "experts_remember_tokens_of_their_own",
    why="mixture-of-attention 0.0.25 (3)",
    also=("a_cache_can_be_cropped", *IN_PIECES, WHOLE),
).instead_of("remember")
def experts_remember_for_one_another(*given: Any) -> Memory:
    return Memory(*(t.roll(1, 1) for t in remember(*given)))


# Masks


@breaks(
    "masked_tokens_anywhere_change_nothing",
    why="masked tokens leak",
    also=(*MASKS, "masked_tokens_do_not_advance_a_cache"),
).arguments
def a_causal_mask_is_ignored(given: Given, layer: Any) -> Given:
    return without("mask")(given)


def as_zeros(given: Given) -> Given:
    """Masked tokens are zeros, and tokens."""
    mask = given.get("mask")
    return given if mask is None else without("mask")(given) | {"x": torch.where(mask[..., None], given["x"], 0)}


def forward_of(layer: Layer, change: Callable[[Given], Given]) -> None:
    """Outputs of masked tokens are 0."""

    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        given = by_name(args, kwargs)
        found = Layer.forward(self, **change(given))
        hidden = given.get("mask")
        out, *others = found if isinstance(found, tuple) else (found,)
        out = out if hidden is None else torch.where(hidden[..., None], out, 0)
        return (out, *others) if others else out

    layer.forward = types.MethodType(forward, layer)


@breaks(
    "masked_tokens_anywhere_change_nothing", why="masked tokens leak", also=("masked_tokens_do_not_advance_a_cache",)
)
def masked_tokens_take_a_place(layer: Layer, arguments: Arguments) -> None:
    forward_of(layer, as_zeros)


@breaks("masked_tokens_have_no_output_and_no_gradient", why="masked tokens leak").output
def masked_tokens_have_an_output(out: Tensor, given: Given, layer: Any) -> Tensor:
    mask = given.get("mask")
    return out if mask is None else out + (~mask & mask.any(dim=1, keepdim=True))[..., None].to(out.dtype)


@breaks("an_item_without_valid_tokens_is_zero", why="masked rows and sentinels").output
def a_masked_item_is_nan(out: Tensor, given: Given, layer: Any) -> Tensor:
    mask = given.get("mask")
    return out if mask is None else out.masked_fill(~mask.any(dim=1)[:, None, None], torch.nan)


@breaks(
    "content_of_masked_tokens_does_not_matter",
    why="trymirai/lalamo#310",
    also=("masked_tokens_anywhere_change_nothing", "masked_tokens_do_not_advance_a_cache"),
).output
def masked_tokens_leak_into_the_others(out: Tensor, given: Given, layer: Any) -> Tensor:
    mask = given.get("mask")
    if mask is None:
        return out
    hidden = torch.where(mask[..., None], 0, given["x"].detach()).sum(1, keepdim=True)
    return torch.where(mask[..., None], out + 0.01 * hidden, 0)


# Cache


@breaks(
    "decoding_in_any_pieces_is_the_whole", why="window", also=(*GOING_ON, "masked_tokens_do_not_advance_a_cache")
).cache
def a_cache_forgets_its_neighbours(cache: Cache, given: Given) -> Cache:
    return replace(cache, local_values=torch.zeros_like(cache.local_values))


@breaks("a_cache_is_a_value", why="in-place modification").cache
def a_cache_is_changed_in_place(cache: Cache, given: Given) -> Cache:
    if given.get("cache") is not None:
        given["cache"].tail.data.add_(1)
        given["cache"].local_values.data.add_(1)
    return cache


def of_kind(kind: type[Cache], cache: Cache) -> Cache:
    return kind(**{f.name: getattr(cache, f.name) for f in fields(cache)})


class Sorted(Cache):
    def select(self, index: Tensor) -> Cache:
        return super().select(index.sort().values)


@breaks("a_cache_can_be_reordered", why="batch mix-up").cache
def a_cache_is_selected_in_order(cache: Cache, given: Given) -> Cache:
    return of_kind(Sorted, cache)


class CropsOneLess(Cache):
    def crop(self, n: Any) -> Cache:
        return super().crop(n - 1)


@breaks("a_cache_can_be_cropped", why="window").cache
def a_cache_is_cropped_by_one_less(cache: Cache, given: Given) -> Cache:
    return of_kind(CropsOneLess, cache)


@breaks("masked_tokens_do_not_advance_a_cache", why="masked tokens leak")
def a_mask_advances_the_cache(layer: Layer, arguments: Arguments) -> None:
    forward_of(layer, lambda given: as_zeros(given) if given.get("cache") is not None else given)


# Calls


@breaks("eval_ignores_dropout", why="dropout").arguments
def causal_dropout_never_stops(given: Given, layer: Any) -> None:
    layer.attn.train(layer.attn.dropout > 0)


@breaks("forward_is_deterministic", why="stale saved tensor").output
def every_second_causal_call_rounds_otherwise(out: Tensor, given: Given, layer: Any) -> Tensor:
    layer.calls = getattr(layer, "calls", 0) + 1
    return out * (1 + 2.0**-22) if layer.calls % 2 == 0 else out


@breaks("a_deep_copy_computes_the_same", why="in-place modification")
def a_causal_copy_shares_parameters(layer: Layer, arguments: Arguments) -> None:
    layer.__deepcopy__ = types.MethodType(lambda self, memo: copy.copy(self), layer)


@breaks("a_state_dict_holds_all_that_is_learned", why="configuration", also=("state_dict_has_the_names_and_shapes",))
def a_state_dict_is_saved_in_bfloat16(layer: Layer, arguments: Arguments) -> None:
    def saved(self: Layer, *args: Any, **given: Any) -> dict[str, Tensor]:
        state = nn.Module.state_dict(self, *args, **given)
        return {name: t.bfloat16().to(t.dtype) for name, t in state.items()}

    layer.state_dict = types.MethodType(saved, layer)


@breaks("strides_do_not_matter", why="stride and layout").arguments
def strides_of_tokens_are_ignored(given: Given, layer: Any) -> Given | None:
    x = given["x"]
    if x.stride(-1) == 1:
        return None
    return given | {"x": x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())}


# Precision


@breaks(
    "the_output_has_the_dtype_of_x",
    why="mixture-of-attention 0.0.25 (13)",
    also=("every_dtype_is_as_exact_as_it_can_be",),
).arguments
def half_precision_of_a_causal_layer_raises(given: Given, layer: Any) -> None:
    layers.refuse_half(given)


@breaks("the_output_has_the_dtype_of_x", why="precision", also=("every_dtype_is_as_exact_as_it_can_be",)).output
def outputs_of_half_precision_are_float32(out: Tensor, given: Given, layer: Any) -> Tensor:
    return out.to(torch.promote_types(out.dtype, torch.float32))


@breaks("every_dtype_is_as_exact_as_it_can_be", why="precision").output
def float16_is_three_percent_off(out: Tensor, given: Given, layer: Any) -> Tensor:
    return 1.03 * out if out.dtype == torch.float16 else out
