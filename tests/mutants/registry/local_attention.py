"""Faults of local attention: window, causality, padding, rotary tables, norm."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/attention/banded.py": {
        "local-window-one-short": edit(
            "band = (offset >= -self.before) & (offset <= self.after)",
            "band = (offset > -self.before) & (offset <= self.after)",
            "huggingface/transformers#39408",
        ),
        "local-window-by-or": edit(
            "band = (offset >= -self.before) & (offset <= self.after)",
            "band = (offset >= -self.before) | (offset <= self.after)",
            "lucidrains/local-attention#5",
        ),
        "local-causal-sees-the-next": edit("0 if causal else before", "1 if causal else before", "jax-ml/jax#39576"),
        "local-causal-ignored": edit("0 if causal else before", "before", "Dao-AILab/flash-attention#581"),
        "local-padding-keys-attended": edit(
            "keys = ((key >= 0) & (key < self.n))", "keys = (key >= 0)", "pytorch/pytorch#158212"
        ),
        "local-window-not-capped": edit(
            "before = min(window, n - 1)",
            "before = window",
            "configuration",
            equivalent="only memory: keys beyond the sequence are padding, and hidden",
        ),
        "local-block-of-one-token": edit(
            "min(max(before, MIN_BLOCK), MAX_BLOCK, n)",
            "min(max(before, 1), MAX_BLOCK, n)",
            "configuration",
            equivalent="only time and memory: the band is cut elsewhere",
        ),
    },
    "optimized/local_attention.py": {
        "local-hooked-with-the-mask-of-the-neighbours": edit(
            "ops.window.first(qkv, mask, self.window_size",
            "ops.window.first(qkv, None if mask is None else mask.roll(1, -1), self.window_size",
            "masked tokens leak",
        ),
        "local-masked-content": edit(
            "return layer_norm(_hide(x, mask), weight, bias, eps)",
            "return layer_norm(x, weight, bias, eps)",
            "trymirai/lalamo#310",
        ),
        "local-masked-output": edit(
            "    return _hide(y.to(x.dtype), mask)\n\n\nEPS", "    return y.to(x.dtype)\n\n\nEPS", "trymirai/lalamo#310"
        ),
        "local-norm-bias-dropped": edit(
            "bias = None if bias is None else bias.to(inner)",
            "bias = None if bias is None else 0 * bias.to(inner)",
            "Dao-AILab/flash-attention#1817",
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
    "optimized/ops/window.py": {
        "window-band-one-short": edit(
            "banded.forward(library, q, k, v, banded.Band(a.window, a.causal",
            "banded.forward(library, q, k, v, banded.Band(a.window - 1, a.causal",
            "huggingface/transformers#39408",
        ),
    },
}
