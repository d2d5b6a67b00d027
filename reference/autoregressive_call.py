"""What a strictly causal layer is told when it is called, checked before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference import contract
from reference.autoregressive_cache import Cache
from reference.autoregressive_contract import AutoregressiveConfig
from reference.contract import flag, reject


def check_call(
    config: AutoregressiveConfig, x: Any, mask: Any, rotary_emb: Any, cache: Any, use_cache: Any, return_routes: Any
) -> Tensor | None:
    """The mask (B, N); raises TypeError or ValueError naming the argument."""
    contract.whole_sequence()
    contract.tensor("x", x, "B", "N", config.dim)
    mask = contract.token_mask("mask", mask, x)
    flag("use_cache", use_cache)
    flag("return_routes", return_routes)
    contract.solvable(config.options, x.dtype)
    if cache is not None:
        if not isinstance(cache, Cache):
            reject("cache", "a Cache, as this layer returns it", contract.describe(cache), TypeError)
        _continues(config, cache, x)
        if (rotary_emb is not None) != cache.rotary:
            had = "a table, as in the calls before" if cache.rotary else "None, as in the calls before"
            reject("rotary_emb", had, rotary_emb)
        hard = config.options.straight_through and not torch.is_grad_enabled()
        if config.options.solver != "sigmoid" and not hard:
            reject(
                "cache",
                "None, or solver='sigmoid', or straight_through=True without gradients: "
                f"soft scores of solver={config.options.solver!r} take the logits of all tokens before",
                "a Cache",
            )
    if rotary_emb is not None:
        passed = x.shape[1] + (0 if cache is None else cache.passed)
        contract.tensor("rotary_emb", rotary_emb, "P", config.dim_head, beside=x)
        if rotary_emb.requires_grad:
            reject("rotary_emb", "a tensor without gradient", rotary_emb)
        if rotary_emb.shape[0] < passed:
            reject("rotary_emb", f"at least {passed} rows, as many as tokens were passed", rotary_emb)
    return mask


def _continues(config: AutoregressiveConfig, cache: Cache, x: Tensor) -> None:
    """Whether the cache is of a layer of this shape, and of x's batch, dtype and device.

    And not cast on its way: wrappers that compute in half precision, FSDP's among them, round every tensor they find in
    an argument, and a memory that is ranked by rounded logits is another one.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, expected, given in (
        ("sizes (D, W, w, E, K, H, d, h) =", cache.made_for(config), cache.sizes()),
        ("batch", x.shape[0], cache.length.shape[0]),
        ("dtype", x.dtype, cache.tail.dtype),
        ("logits in", wide, cache.logits.dtype),
        ("device", x.device, cache.tail.device),
    ):
        if expected != given:
            reject("cache", f"one for {name} {expected}", f"one for {given}")
