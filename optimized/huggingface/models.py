"""The decoder under transformers' conventions: a base model of hidden states, and one with a head.

Letters: B batch, N tokens of a call, P tokens of earlier calls, D model dimension, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from optimized.huggingface.cache import MixtureOfAttentionCache
from optimized.huggingface.config import MixtureOfAttentionConfig
from optimized.transformer import Decoder
from optimized.transformer.trunk import STD, Trunk
from reference import contract


class CausalTrunk(Trunk):
    causal = True


class _Pretrained(PreTrainedModel):
    config: MixtureOfAttentionConfig
    config_class = MixtureOfAttentionConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """As `Decoder` says. What was loaded is left alone by the library."""
        if isinstance(module, Trunk):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=STD)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Every block or none, by PyTorch's non-reentrant kind."""
        if every_n_layers != 1:
            contract.reject("every_n_layers", "1", every_n_layers)
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant"):
            contract.reject("use_reentrant", "False", True)
        if getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            contract.reject("offload", "False", True)
        for module in self.modules():
            if isinstance(module, MixtureOfAttentionModel):
                module.gradient_checkpointing = module.trunk.checkpointing = enable


class MixtureOfAttentionModel(_Pretrained):
    """Hidden states of tokens. State: trunk.*, as of `Decoder`."""

    def __init__(self, config: MixtureOfAttentionConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.trunk = CausalTrunk(config.transformer())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.trunk.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Int64[Tensor, "B N"],
        attention_mask: Tensor | None = None,
        cache: MixtureOfAttentionCache | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm, (B, N, D); 0 where masked.

        Args:
            input_ids: (B, N). attention_mask: (B, P + N), 0 or False for padding anywhere; of tokens of earlier calls
                as those were told.
            cache: what it holds is continued, and it holds this call afterwards. use_cache: begin one (default False).
        Raises TypeError or ValueError naming the argument, for any other argument too.
        """
        _nothing_else(others)
        if cache is not None and not isinstance(cache, MixtureOfAttentionCache):
            contract.reject("cache", "a MixtureOfAttentionCache", type(cache).__name__, TypeError)
        past = None if cache is None else cache.value
        contract.tensor("input_ids", input_ids, "B", "N", dtypes=(torch.int64,))
        keep = cache is not None if use_cache is None else contract.flag("use_cache", use_cache)
        if attention_mask is not None:
            n, passed = input_ids.shape[1], 0 if past is None else past.passed
            contract.tensor("attention_mask", attention_mask, "B", passed + n, dtypes=contract.MASKS, beside=input_ids)
            attention_mask = attention_mask[:, passed:]
        found = self.trunk(input_ids, attention_mask, past, keep)
        if keep:
            cache = MixtureOfAttentionCache() if cache is None else cache
            cache.value = found.cache
        return BaseModelOutputWithPast(last_hidden_state=found.hidden, cache=cache if keep else None)


class MixtureOfAttentionForCausalLM(_Pretrained, GenerationMixin):
    """A language model. State: model.trunk.*, as of `Decoder`, and lm_head.weight (V, D), which `tied` ties."""

    _tied_weights_keys = {"lm_head.weight": "model.trunk.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: MixtureOfAttentionConfig) -> None:
        super().__init__(config)
        self.model = MixtureOfAttentionModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_decoder(cls, decoder: Decoder, **options: Any) -> MixtureOfAttentionForCausalLM:
        """With a copy of the weights. options: of `MixtureOfAttentionConfig`, the special tokens say."""
        if not isinstance(decoder, Decoder):
            contract.reject("decoder", "a Decoder", type(decoder).__name__, TypeError)
        model = cls(MixtureOfAttentionConfig(**decoder.config.to_dict(), **options))
        weight = decoder.embedding.weight
        nn.Module.to(model, weight.device, weight.dtype).train(decoder.training)
        state = {f"model.trunk.{name}": p for name, p in decoder.state_dict().items() if name != "head.weight"}
        state["lm_head.weight"] = weight if decoder.head is None else decoder.head.weight
        model.load_state_dict(state)
        return model

    def to_decoder(self) -> Decoder:
        """With a copy of the weights."""
        weight = self.model.trunk.embedding.weight
        decoder = Decoder(self.config.transformer(), device=weight.device, dtype=weight.dtype)
        head = {} if decoder.head is None else {"head.weight": self.lm_head.weight}
        decoder.load_state_dict({**self.model.trunk.state_dict(), **head})
        return decoder.train(self.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int64[Tensor, "B N"],
        attention_mask: Tensor | None = None,
        cache: MixtureOfAttentionCache | None = None,
        labels: Int64[Tensor, "B N"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token after each, (B, N, V), and with labels their loss.

        Args:
            input_ids, attention_mask, cache, use_cache: as of `MixtureOfAttentionModel`.
            labels: (B, N), the tokens themselves, which the loss shifts; -100 where nothing is asked.
            logits_to_keep: of the last so many places alone, or of those listed; 0 for all.
            num_items_in_batch: that the sum of the losses is divided by, in place of the number of labels.
        Raises TypeError or ValueError naming the argument, for any other argument too.
        """
        found = self.model(input_ids, attention_mask, cache, use_cache, return_dict=True, **others)
        hidden: Float[Tensor, "B N D"] = found.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif contract.integer("logits_to_keep", logits_to_keep, least=0):
            hidden = hidden[:, -logits_to_keep:]
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=found.cache)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *sizes: Any, **others: Any
    ) -> bool:
        """The library would make one of its own kinds; what it returns, nobody reads."""
        kind = generation_config.cache_implementation
        if kind is not None:
            contract.reject("cache_implementation", "None", contract.describe(kind))
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = MixtureOfAttentionCache()
        return True


def _nothing_else(others: dict[str, Any]) -> None:
    """Wrappers pass what every model may know, as None."""
    for name, value in others.items():
        if value is not None and value is not False:
            contract.reject(name, "no such argument", contract.describe(value), TypeError)
