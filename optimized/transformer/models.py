"""A language model, and its counterpart that looks both ways: a trunk and a head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from optimized.transformer.attentions import Call, Shared
from optimized.transformer.cache import DecoderCache, StaticDecoderCache
from optimized.transformer.config import TransformerConfig
from optimized.transformer.stepping import obstacle_to_steps
from optimized.transformer.trunk import Trunk
from reference import contract
from reference.contract import TokenMask


class _WithHead(Trunk):
    def __init__(
        self,
        config: TransformerConfig,
        *,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, checkpointing=checkpointing, device=device, dtype=dtype)
        self.head = None
        if not config.tied:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False, device=device, dtype=dtype)
            self._reset_head()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor did."""
        super().reset_parameters()
        if getattr(self, "head", None) is not None:  # the trunk is drawn before there is a head
            self._reset_head()

    def _reset_head(self) -> None:
        assert self.head is not None
        nn.init.normal_(self.head.weight, std=self.config.dim**-0.5)

    def _logits(self, hidden: Float[Tensor, "B N D"]) -> Float[Tensor, "B N V"]:
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)


class Decoder(_WithHead):
    """A causal language model: logits of a token depend on it and on tokens before it, and on nothing else.

    A block is x + attention(norm(x)), then x + feed_forward(norm(x)), with RMSNorm and SwiGLU. Attention is dense (with
    rotary positions), local (a causal window), or `MixtureOfAutoregressiveAttention`.

    Args:
        config: a `TransformerConfig`. checkpointing: compute blocks again in the backward, in place of holding what
            they need; `model.checkpointing = True` holds from the next call on.
        device, dtype: of the parameters.
    Initialised: embedding normal of deviation 0.02; matrices that read the sum normal of deviation 1 / sqrt(fan-in),
    those that write to it (to_out) that times 1 / sqrt(2 depth); an untied head 1 / sqrt(D); norms 1; null tokens 0;
    routing tokens, null keys and null values standard normal.
    State: embedding.weight (V, D), blocks.i.attention_norm.weight (D), blocks.i.attention.* (to_qkv.weight and
    to_out.weight, or those of a mixture), blocks.i.feed_forward_norm.weight (D), blocks.i.feed_forward.to_hidden.weight
    (2 hidden, D), blocks.i.feed_forward.to_out.weight (D, hidden), norm.weight (D), head.weight (V, D) where not tied.
    """

    causal = True

    def forward(  # type: ignore[override]
        self,
        tokens: Int64[Tensor, "B N"],
        mask: TokenMask | None = None,
        cache: DecoderCache | None = None,
        use_cache: bool = False,
        return_loads: bool = False,
        last: bool = False,
    ) -> Any:
        """Logits of the token after each, for tokens that begin a sequence or continue that of `cache`.

        Args:
            tokens: (B, N) int64, N >= 1. mask: (B, N) or (1, N), bool or integers 1 and 0; False for padding, wherever
                it stands: it is no token, has no position, and gets logits 0.
            cache: of the call before; it is not changed. use_cache: return one.
            return_loads: return how many tokens each expert took, `Loads`.
            last: logits of each item's last valid token alone, (B, 1, V).
        Returns (B, N, V), or (logits, cache, loads) as far as asked for, in this order. Raises TypeError or ValueError
        naming the argument.
        """
        found = super().forward(tokens, mask, cache, use_cache, return_loads, last)
        results: list[Any] = [self._logits(found.hidden), found.cache, found.loads]
        asked = [True, use_cache, return_loads]
        results = [result for result, wanted in zip(results, asked) if wanted]
        return results[0] if len(results) == 1 else tuple(results)

    @torch.no_grad()
    def step(
        self, tokens: Int64[Tensor, " B"], cache: StaticDecoderCache, border: bool = False
    ) -> Float[Tensor, "B V"]:
        """Logits after one more token of every item, without gradients; the cache is changed in place.

        Args:
            tokens: (B) int64. cache: `DecoderCache.static` makes it.
            border: an item may begin a block with its token (`cache.due()`); right for any mixture of lengths, and more
                work. Without it no item may, and that is not looked at: nothing waits for the device. So a step of
                either kind can be captured in a CUDA graph.
        The model is in evaluation mode, and it, its blocks and their attentions are as they were made
        (`obstacle_to_steps`). Raises TypeError or ValueError naming the argument.
        """
        if not isinstance(cache, StaticDecoderCache):
            said = "a StaticDecoderCache, as `cache.static(room)` makes it"
            contract.reject("cache", said, contract.describe(cache), TypeError)
        contract.tensor("tokens", tokens, "B", dtypes=(torch.int64,))
        contract.flag("border", border)
        cache.require("cache", tokens.shape[0], self.config.layers, tokens.device)
        obstacle = self.obstacle_to_steps()
        if obstacle is not None:
            contract.reject("model", "one that takes steps in place", obstacle)
        if cache.left < 1:
            contract.reject("cache", "one with room for another token", f"one whose {cache.columns} columns are full")
        self._in_vocabulary(tokens, None)
        if border:
            cache.begin_blocks()
        x, turn, visible = self.embedding(tokens[:, None]), None, None
        if "dense" in self.config.layers:
            turn = self._turn(x, cache.length[:, None, None])
            visible = torch.arange(cache.columns, device=x.device) <= cache.length[:, None, None, None]
        shared = Shared(None, None, turn, self._table(x, cache.columns), visible, False, False, False, border)
        for block, buffers in zip(self.blocks, cache.layers):
            x, _, _ = block(x, Call(shared, buffers))
        cache.advance()
        return self._logits(self.norm(x))[:, 0]

    def obstacle_to_steps(self) -> str | None:
        """Why `step` would not compute what a call does; None where it does."""
        return obstacle_to_steps(self, Decoder)


class Encoder(_WithHead):
    """The same blocks looking both ways: dense attention to all, local to both sides, `MixtureOfAttention`.

    Arguments, initialisation and state as of `Decoder`. Mixture layers score by sigmoids of cosines unless told
    otherwise, as those of a decoder do.
    """

    causal = False

    def forward(  # type: ignore[override]
        self,
        tokens: Int64[Tensor, "B N"],
        mask: TokenMask | None = None,
        logits: bool = False,
        return_loads: bool = False,
    ) -> Any:
        """Hidden states of tokens after the last norm, or logits of the tokens themselves.

        Args:
            tokens, mask: as of `Decoder`. logits: apply the head, as to predict masked-out tokens.
            return_loads: return how many tokens each expert took, `Loads`.
        Returns (B, N, D) or, with logits=True, (B, N, V); with return_loads=True (that, loads). Raises TypeError or
        ValueError naming the argument.
        """
        contract.flag("logits", logits)
        found = super().forward(tokens, mask, return_loads=return_loads)
        out = self._logits(found.hidden) if logits else found.hidden
        return (out, found.loads) if return_loads else out
