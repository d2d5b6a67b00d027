"""All of a transformer but its head: embedding, blocks, and the last norm.

Valid tokens are moved to the front as integers, once, and the result back. So padding is behind all tokens: what is
causal cannot see it, and positions count valid tokens.

Letters: B batch, N tokens of a call, D model dimension, V vocabulary, M mixture layers, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optimized.autoregressive_layout import Order
from optimized.plan import Kind, bind
from optimized.transformer.attentions import Call, Load, Shared
from optimized.transformer.block import EPS, Block
from optimized.transformer.cache import DecoderCache
from optimized.transformer.config import TransformerConfig
from optimized.transformer.rotary import angles_of
from reference import contract
from reference.contract import TokenMask

STD = 0.02  # of the embedding


class Loads(NamedTuple):
    """Of the mixture layers, the first one first: how many tokens of the call each expert took."""

    queries: Int64[Tensor, "M B E"]  # tokens that the expert updated
    candidates: Int64[Tensor, "M B E"]  # tokens that it would have, had it slots for all of them


class Output(NamedTuple):
    """What a trunk returns."""

    hidden: Float[Tensor, "B N D"]  # after the last norm; 0 where masked
    cache: DecoderCache | None
    loads: Loads | None


class Trunk(nn.Module):
    """Hidden states of tokens: see `Decoder` and `Encoder`."""

    causal: bool

    def __init__(
        self,
        config: TransformerConfig,
        *,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, TransformerConfig):
            contract.reject("config", "a TransformerConfig", contract.describe(config), TypeError)
        contract.floating_dtype("dtype", dtype)
        self.config, self.checkpointing = config, contract.flag("checkpointing", checkpointing)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.dim, **where)
        self.blocks = nn.ModuleList(Block(config, kind, self.causal, **where) for kind in config.layers)
        self.norm = nn.RMSNorm(config.dim, EPS, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor did."""
        nn.init.normal_(self.embedding.weight, std=STD)
        part: Any
        for part in (*self.blocks, self.norm):
            part.reset_parameters()

    def forward(
        self,
        tokens: Int64[Tensor, "B N"],
        mask: TokenMask | None = None,
        cache: DecoderCache | None = None,
        use_cache: bool = False,
        return_loads: bool = False,
        last: bool = False,
    ) -> Output:
        """last: the hidden state of each item's last valid token alone, (B, 1, D); 0 where it has none."""
        mask = self._checked(tokens, mask, cache, use_cache, return_loads, last)
        order = None if mask is None else Order.of(mask)
        if order is not None:  # what a masked place holds need not be a token
            tokens = tokens.gather(1, order.indices).masked_fill(~order.here, 0)
        x = self.embedding(tokens)
        if order is not None:  # a NaN of token 0 would be seen by dense attention, times 0
            x = x.masked_fill(~order.here[..., None], 0)
        x = F.dropout(x, self.config.dropout, self.training)
        shared = self._shared(x, order, cache, use_cache, return_loads)
        past = [None] * len(self.blocks) if cache is None else cache.layers
        kept, loads = [], []
        for block, before in zip(self.blocks, past):
            if self.checkpointing and torch.is_grad_enabled():
                x, after, load = checkpoint(block, x, Call(shared, before), use_reentrant=False)
            else:
                x, after, load = block(x, Call(shared, before))
            kept.append(after)
            if load is not None:
                loads.append(load)
        x = self.norm(x)
        if last:
            x = _last(x, order)
        elif order is not None:
            kind = Kind(x.device, x.dtype, ("dispatch",))
            x = order.back(x, bind(kind).dispatch)
        later = self._after(cache, tokens, shared, tuple(kept)) if use_cache else None
        return Output(x, later, _stacked(loads, tokens) if return_loads else None)

    def _checked(
        self, tokens: Any, mask: Any, cache: Any, use_cache: Any, return_loads: Any, last: Any
    ) -> Tensor | None:
        contract.tensor("tokens", tokens, "B", "N", dtypes=(torch.int64,))
        if not tokens.shape[1]:
            contract.reject("tokens", "at least one token", tokens)
        mask = contract.token_mask("mask", mask, tokens)
        for name, value in (("use_cache", use_cache), ("return_loads", return_loads), ("last", last)):
            contract.flag(name, value)
        self._in_vocabulary(tokens, mask)
        if cache is not None:
            if not isinstance(cache, DecoderCache):
                contract.reject("cache", "a DecoderCache, of this model", contract.describe(cache), TypeError)
            cache.require("cache", tokens.shape[0], self.config.layers, tokens.device)
        return mask

    def _in_vocabulary(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Where a look costs nothing, as of masks: on the CPU."""
        if tokens.device.type != "cpu" or not contract._holds_data(tokens):
            return
        vocab_size = getattr(self.embedding, "num_embeddings", self.config.vocab_size)  # it may be resized
        seen = tokens if mask is None else tokens.masked_fill(~mask, 0)
        if seen.numel():
            low, high = (int(v) for v in seen.aminmax())
            if low < 0 or high >= vocab_size:
                contract.reject("tokens", f"numbers in [0, {vocab_size})", f"values from {low} to {high}")

    def _shared(self, x: Tensor, order: Order | None, cache: DecoderCache | None, keep: bool, watch: bool) -> Shared:
        (batch, n), passed = x.shape[:2], 0 if cache is None else cache.passed
        turn, visible = None, None
        if "dense" in self.config.layers:
            position = torch.arange(n, device=x.device)
            if cache is not None:
                position = cache.length[:, None, None] + position  # (B, 1, N): one for all heads
            turn = self._turn(x, position)
            visible = self._visible(x, order, cache)
        count = None
        if keep:
            count = x.new_full((batch,), n, dtype=torch.int64) if order is None else order.mask.sum(1)
        mask = None if order is None else order.here
        table = self._table(x, passed + n)
        return Shared(mask, count, turn, table, visible, self.causal and cache is None, keep, watch)

    def _table(self, x: Tensor, positions: int) -> Tensor | None:
        """Angles of experts, if they rotate."""
        c = self.config
        if "mixture" not in c.layers or not c.mixture_rotary:
            return None
        dim_head = c.mixture.get("dim_head", c.dim_head)
        return angles_of(torch.arange(positions, device=x.device), dim_head, c.rotary_base)

    def _turn(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin by which dense layers rotate."""
        angles = angles_of(position, self.config.dim_head, self.config.rotary_base)
        wide = torch.promote_types(x.dtype, torch.float32)
        return angles.cos().to(wide), angles.sin().to(wide)

    def _visible(self, x: Tensor, order: Order | None, cache: DecoderCache | None) -> Tensor | None:
        """Which columns a token of a dense layer sees, where the order of the tokens does not tell it.

        A token that is none sees something all the same, so that its row is finite and leaves no NaN in a gradient.
        """
        n = x.shape[1]
        if not self.causal:
            return None if order is None else (order.here | (torch.arange(n, device=x.device) == 0))[:, None, None]
        if cache is None or (n == 1 and order is None and cache.there is None):
            return None
        before = torch.ones(n, cache.passed + n, dtype=torch.bool, device=x.device).tril(cache.passed)
        there = _columns(cache, None if order is None else order.here, x.shape[0], n, x.device)
        return before if there is None else (before & (there[:, None] | before.triu(cache.passed)))[:, None]

    def _after(
        self, cache: DecoderCache | None, tokens: Tensor, shared: Shared, layers: tuple[Any, ...]
    ) -> DecoderCache:
        assert shared.count is not None
        n = tokens.shape[1]
        if cache is None:
            return DecoderCache(shared.count, shared.mask, n, layers)
        there = _columns(cache, shared.mask, tokens.shape[0], n, tokens.device)
        return DecoderCache(cache.length + shared.count, there, cache.passed + n, layers)


def _columns(cache: DecoderCache, here: Tensor | None, batch: int, n: int, device: torch.device) -> Tensor | None:
    """Which of the columns held, and of n new ones, are of valid tokens, (B, L + N); None: all."""
    if cache.there is None and here is None:
        return None
    parts = (cache.there, cache.passed), (here, n)
    ones = [torch.ones(batch, width, dtype=torch.bool, device=device) if t is None else t for t, width in parts]
    return torch.cat(ones, 1)


def _last(x: Tensor, order: Order | None) -> Tensor:
    if order is None:
        return x[:, -1:]
    count = order.mask.sum(1)
    at = (count - 1).clamp_min(0)[:, None, None].expand(-1, 1, x.shape[2])
    return x.gather(1, at).masked_fill((count == 0)[:, None, None], 0)


def _stacked(loads: list[Load], tokens: Tensor) -> Loads:
    if not loads:
        nothing = tokens.new_zeros(0, tokens.shape[0], 0)
        return Loads(nothing, nothing)
    queries, candidates = zip(*loads)
    return Loads(torch.stack(queries), torch.stack(candidates))
