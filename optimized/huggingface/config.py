"""The configuration that transformers saves beside the weights."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from optimized.transformer import TransformerConfig


class MixtureOfAttentionConfig(PreTrainedConfig):
    """`TransformerConfig`, whose fields it has; heads, hidden and the like answer to the library's names, too.

    Raises TypeError or ValueError naming the argument.
    """

    model_type: ClassVar[str] = "mixture_of_attention"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "heads",
        "head_dim": "dim_head",
        "intermediate_size": "hidden",
        "tie_word_embeddings": "tied",
    }
    # Each block is a unit; the embedding and a head that is tied to it are in that of the model.
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {"trunk.blocks.*": "free_full_weight"}

    vocab_size: int = 32000
    dim: int = 1024
    layers: list[str] = field(default_factory=lambda: ["mixture"] * 12)
    heads: int | None = None
    dim_head: int = 64
    hidden: int | None = None
    window: int | None = 256
    mixture: dict[str, Any] = field(
        default_factory=lambda: {"num_experts": 4, "num_routed_queries": 64, "num_routed_key_values": 512}
    )
    mixture_rotary: bool = False
    rotary_base: float = 10000.0
    tied: bool = True
    dropout: float = 0.0
    package: str = "optimized"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **others: Any) -> None:
        for name, value in self.transformer().to_dict().items():
            setattr(self, name, value)
        super().__post_init__(**others)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    def transformer(self) -> TransformerConfig:
        """What the model is made of."""
        return TransformerConfig(**{f.name: getattr(self, f.name) for f in fields(TransformerConfig)})
