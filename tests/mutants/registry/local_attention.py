"""Faults of local attention: window, causality, padding, rotary tables, norm."""

from ..mutant import Mutant

FILE = "optimized/local_attention.py"

MUTANTS = (
    Mutant(
        "local-window-one-short",
        FILE,
        "band = (offset >= -w) & (offset <= after)",
        "band = (offset > -w) & (offset <= after)",
        "window",
        "huggingface/transformers#39408: window off by one",
    ),
    Mutant(
        "local-window-by-or",
        FILE,
        "band = (offset >= -w) & (offset <= after)",
        "band = (offset >= -w) | (offset <= after)",
        "window",
        "lucidrains/local-attention#5: `and` for `or` in the exact window",
    ),
    Mutant(
        "local-causal-sees-the-next",
        FILE,
        "after = 0 if causal else w",
        "after = 1 if causal else w",
        "causality",
        "jax-ml/jax#39576: window sees the future",
    ),
    Mutant(
        "local-causal-ignored",
        FILE,
        "after = 0 if causal else w",
        "after = w",
        "causality",
        "Dao-AILab/flash-attention#581: alignment of the causal mask",
    ),
    Mutant(
        "local-padding-keys-attended",
        FILE,
        "inside = ((key >= 0) & (key < n))[None]",
        "inside = (key >= 0)[None]",
        "tail mask",
        "pytorch/pytorch#158212: keys past the end",
    ),
    Mutant(
        "local-masked-content",
        FILE,
        "hidden = x if mask is None else x.masked_fill(~mask[..., None], 0)",
        "hidden = x",
        "masked tokens leak",
        "trymirai/lalamo#310: padded tokens leak",
    ),
    Mutant(
        "local-masked-output",
        FILE,
        "    return out if mask is None else out.masked_fill(~mask[..., None], 0)",
        "    return out",
        "masked tokens leak",
        "trymirai/lalamo#310: padded tokens leak",
    ),
    Mutant(
        "local-angles-in-float32",
        "optimized/ops/rotary.py",
        "frequency = torch.arange(0, dim_head, 2, device=device, dtype=torch.float64)",
        "frequency = torch.arange(0, dim_head, 2, device=device, dtype=torch.float32)",
        "precision",
    ),
    Mutant(
        "local-angles-interleaved",
        "optimized/ops/rotary.py",
        "angles.cos().to(dtype).repeat(1, 2), angles.sin().to(dtype).repeat(1, 2)",
        "angles.cos().to(dtype).repeat_interleave(2, 1), angles.sin().to(dtype).repeat_interleave(2, 1)",
        "rotary",
    ),
    Mutant(
        "local-positions-from-one",
        "optimized/ops/rotary.py",
        "torch.outer(torch.arange(n, device=device, dtype=torch.float64)",
        "torch.outer(torch.arange(1, n + 1, device=device, dtype=torch.float64)",
        "rotary",
    ),
    Mutant(
        "local-norm-bias-dropped",
        FILE,
        "bias = None if norm_bias is None else norm_bias.to(inner)",
        "bias = None if norm_bias is None else 0 * norm_bias.to(inner)",
        "missing gradient",
        "Dao-AILab/flash-attention#1817: gradient silently zero",
    ),
    Mutant(
        "local-window-not-capped",
        FILE,
        "window = min(window_size, max(n - 1, 0))",
        "window = window_size",
        "configuration",
        equivalent="only memory: keys beyond the sequence are padding, and hidden",
    ),
    Mutant(
        "local-block-of-one-token",
        FILE,
        "block = min(max(w, MIN_BLOCK), MAX_BLOCK, n)",
        "block = min(max(w, 1), MAX_BLOCK, n)",
        "configuration",
        equivalent="only time and memory: the band is cut elsewhere",
    ),
)
