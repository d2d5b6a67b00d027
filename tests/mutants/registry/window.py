"""Faults of our kernels of local attention: the sliding window, and the norm before it."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/kernels/window.py": {
        "window-kernel-sides-exchanged": edit(
            "    first = i - before\n", "    first = i - after\n", "Dao-AILab/flash-attention#581"
        ),
        "window-kernel-one-short": edit("<= (before + after)", "< (before + after)", "window"),
        "window-kernel-signed": edit(
            ".to(tl.uint32, bitcast=True) <= (before + after).to(tl.uint32)", " <= (before + after)", "window"
        ),
        "window-kernel-masked-query-sees-others": edit(
            "first = tl.where(valid_i, first, FAR)", "first = first", "masked tokens leak"
        ),
        "window-kernel-masked-key-is-seen": edit("last = tl.where(valid_j, j, -FAR)", "last = j", "masked tokens leak"),
        "window-kernel-nobody-sees-itself": edit(
            "seen = seen | (i == j)", "seen = seen", "Dao-AILab/flash-attention#442"
        ),
        "window-kernel-queries-before-the-block-lost": edit(
            "range(tl.maximum(first - after, 0) // BLOCK_M * BLOCK_M, end, BLOCK_M)",
            "range(first // BLOCK_M * BLOCK_M, end, BLOCK_M)",
            "missing gradient",
        ),
        "window-kernel-last-block-not-cut": edit(" & (j + BLOCK_N <= n)\n", "\n", "tail mask"),
        "window-kernel-cut-a-token-late": edit(
            "(j - i >= BLOCK_M - 1 - before)", "(j - i >= BLOCK_M - 2 - before)", "window"
        ),
        "window-kernel-ends-before-its-keys": edit(
            "end = tl.minimum(n, first + BLOCK_N + before)", "end = tl.minimum(n, first + BLOCK_N + after)", "causality"
        ),
        "window-kernel-lse-base-2": edit(
            "(top + tl.log2(total)) * LN_2", "top + tl.log2(total)", "log-sum-exp and scale"
        ),
        "window-kernel-sum-does-not-fade": edit(
            "total = total * fade + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", "fla-org/flash-linear-attention#1214"
        ),
        "window-kernel-gradient-turned-on": edit(
            "second * cos2 - first * sin1", "second * cos2 + first * sin1", "rotary"
        ),
        "window-kernel-keys-turned-from-zero": edit(
            "dk = _turned_back(dk, j, here,", "dk = _turned_back(dk, j - first, here,", "rotary"
        ),
        "window-kernel-keys-gradient-unscaled": edit(
            "_rounded(p * (dp - delta[None, :]) * scale, q_ptr)",
            "_rounded(p * (dp - delta[None, :]), q_ptr)",
            "log-sum-exp and scale",
        ),
        "window-kernel-mask-of-item-0": edit(
            "    mask_ptr += b * n\n    j = first", "    j = first", "fla-org/flash-linear-attention#1115"
        ),
        "window-kernel-gradients-strides-of-the-input": edit(
            "(*_numbers(q, v, band), *dq.stride()[:3])", "(*_numbers(q, v, band), *q.stride()[:3])", "stride and layout"
        ),
        "window-kernel-values-strided-as-queries": edit("*v.stride()[:3]", "*q.stride()[:3]", "stride and layout"),
        "window-kernel-causal-ignored": edit(
            "return cls(before, 0 if causal else before, mask)", "return cls(before, before, mask)", "causality"
        ),
    },
    "optimized/kernels/layer_norm.py": {
        "norm-kernel-padding-in-the-variance": edit(
            "apart = tl.where(inside[None, :], x - mean[:, None], 0.0)", "apart = x - mean[:, None]", "tail mask"
        ),
        "norm-kernel-eps-beside-the-root": edit(
            "rate = 1.0 / tl.sqrt(tl.sum(apart * apart, 1) / dim + from_bits(eps_bits).to(DTYPE))",
            "rate = 1.0 / (tl.sqrt(tl.sum(apart * apart, 1) / dim) + from_bits(eps_bits).to(DTYPE))",
            "precision",
        ),
        "norm-kernel-mean-of-h-forgotten": edit(
            "(h - (tl.sum(h, 1) / dim)[:, None] - z * along[:, None])", "(h - z * along[:, None])", "missing gradient"
        ),
        "norm-kernel-masked-rows-read": edit(
            "x = tl.load(x_ptr + at, mask=shown[:, None] & inside[None, :], other=0.0).to(DTYPE)\n        mean",
            "x = tl.load(x_ptr + at, mask=there, other=0.0).to(DTYPE)\n        mean",
            "fla-org/flash-linear-attention#77",
        ),
        "norm-kernel-bias-of-shown-rows-only": edit(
            "        db += g\n", "        db += tl.where(shown[:, None], g, 0.0)\n", "missing gradient"
        ),
        "norm-kernel-last-chunk-lost": edit(
            "chunks = cdiv(rows, CHUNK)", "chunks = max(rows // CHUNK, 1)", "tail mask"
        ),
        "norm-kernel-bias-gradient-of-the-weight": edit(
            "Sum(out, 1, chunks, i * chunks * dim)", "Sum(out, 1, chunks)", "stride and layout"
        ),
    },
    "optimized/ops/layer_norm.py": {
        "norm-bias-gradient-in-the-weights-dtype": edit(
            "a.bias.dtype if needs.bias", "a.weight.dtype if needs.bias", "precision"
        ),
        "norm-fake-in-the-models-dtype": edit(
            "row = a.x.new_empty(a.x.shape[:-1], dtype=kind)", "row = a.x.new_empty(a.x.shape[:-1])", "fake tensors"
        ),
        "norm-rows-of-any-stride": edit(
            "rows = a.mean[..., None].contiguous(), a.rate[..., None].contiguous()",
            "rows = a.mean[..., None], a.rate[..., None]",
            "stride and layout",
        ),
    },
}
