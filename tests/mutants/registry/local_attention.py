"""Faults of local attention: window, causality, padding, rotary tables, norm."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/local_attention.py": {
        "local-window-one-short": edit(
            "band = (offset >= -w) & (offset <= after)",
            "band = (offset > -w) & (offset <= after)",
            "huggingface/transformers#39408",
        ),
        "local-window-by-or": edit(
            "band = (offset >= -w) & (offset <= after)",
            "band = (offset >= -w) | (offset <= after)",
            "lucidrains/local-attention#5",
        ),
        "local-causal-sees-the-next": edit(
            "after = 0 if causal else w", "after = 1 if causal else w", "jax-ml/jax#39576"
        ),
        "local-causal-ignored": edit("after = 0 if causal else w", "after = w", "Dao-AILab/flash-attention#581"),
        "local-padding-keys-attended": edit(
            "inside = ((key >= 0) & (key < n))[None]", "inside = (key >= 0)[None]", "pytorch/pytorch#158212"
        ),
        "local-masked-content": edit(
            "hidden = x if mask is None else x.masked_fill(~mask[..., None], 0)", "hidden = x", "trymirai/lalamo#310"
        ),
        "local-masked-output": edit(
            "    return out if mask is None else out.masked_fill(~mask[..., None], 0)",
            "    return out",
            "trymirai/lalamo#310",
        ),
        "local-norm-bias-dropped": edit(
            "bias = None if norm_bias is None else norm_bias.to(inner)",
            "bias = None if norm_bias is None else 0 * norm_bias.to(inner)",
            "Dao-AILab/flash-attention#1817",
        ),
        "local-window-not-capped": edit(
            "window = min(window_size, max(n - 1, 0))",
            "window = window_size",
            "configuration",
            equivalent="only memory: keys beyond the sequence are padding, and hidden",
        ),
        "local-block-of-one-token": edit(
            "block = min(max(w, MIN_BLOCK), MAX_BLOCK, n)",
            "block = min(max(w, 1), MAX_BLOCK, n)",
            "configuration",
            equivalent="only time and memory: the band is cut elsewhere",
        ),
    },
    "optimized/ops/rotary.py": {
        "local-angles-in-float32": edit(
            "frequency = torch.arange(0, dim_head, 2, device=device, dtype=torch.float64)",
            "frequency = torch.arange(0, dim_head, 2, device=device, dtype=torch.float32)",
            "precision",
        ),
        "local-angles-interleaved": edit(
            "angles.cos().to(dtype).repeat(1, 2), angles.sin().to(dtype).repeat(1, 2)",
            "angles.cos().to(dtype).repeat_interleave(2, 1), angles.sin().to(dtype).repeat_interleave(2, 1)",
            "rotary",
        ),
        "local-positions-from-one": edit(
            "torch.outer(torch.arange(n, device=device, dtype=torch.float64)",
            "torch.outer(torch.arange(1, n + 1, device=device, dtype=torch.float64)",
            "rotary",
        ),
    },
}
