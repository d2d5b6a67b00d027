"""The cache that transformers' `generate` carries along: a place for the decoder's own, which no call changes."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from transformers import Cache

from optimized.transformer import DecoderCache
from reference.contract import reject


class MixtureOfAttentionCache(Cache):
    """Empty at first; a call of the model with it puts what it remembers there."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.value: DecoderCache | None = None

    def __len__(self) -> int:
        return 0 if self.value is None else len(self.value.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens passed so far, masked ones included."""
        return 0 if self.value is None else self.value.passed

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.value is None else self.value.length.shape[0]

    @property
    def is_compileable(self) -> bool:
        """Dense layers grow."""
        return False

    @property
    def is_croppable(self) -> bool:
        """A window, and what experts remember, let go of what they do not need."""
        return False

    def reset(self) -> None:
        self.value = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.value is not None:
            self.value = self.value.select(indices.to(self.value.length.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.value is not None:
            items = torch.arange(self.batch_size, device=self.value.length.device)
            self.value = self.value.select(items.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            reject("tokens_to_remove", "0, since what a window or an expert let go is gone", tokens_to_remove)

    def update(self, *args: object, **options: object) -> NoReturn:
        reject("cache", "a cache that layers of other models do not write to", type(self).__name__, TypeError)
