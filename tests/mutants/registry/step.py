"""Faults of the decoding step by our kernels, and of who gets it."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/kernels/step_tokens.py": {
        "step-tokens-of-item-0": edit("raw = tl.load(x_ptr + b * dim", "raw = tl.load(x_ptr", "batch mix-up"),
        "step-routers-swapped": edit("r = tl.where(first[None, :], r, more)", "r = r + more * 0", "expert mix-up"),
        "step-place-of-the-token-before": edit(
            "at = (b * experts * width + place)[:, None]",
            "at = (b * experts * width + tl.maximum(place - 1, 0))[:, None]",
            "window",
        ),
        "step-angle-of-the-next-token": edit(
            "angle = length.to(tl.float64)", "angle = (length + 1).to(tl.float64)", "local-attention 1.11.2 (6)"
        ),
        "step-angles-beyond-the-table": edit(
            "row = tl.minimum(length, positions - 1)", "row = tl.minimum(length, positions - 2)", "rotary"
        ),
        "step-mean-counts-the-padding": edit(
            "apart = tl.where(inside, x - mean, 0.0)", "apart = x - mean", "flagos-ai/FlagGems#3716"
        ),
    },
    "optimized/kernels/step_products.py": {
        "step-scale-of-expert-0": edit(
            "mean, rate, gamma_ptr, e * dim,", "mean, rate, gamma_ptr, 0 * e,", "BobMcDear/attorch#14"
        ),
        "step-queries-of-expert-0": edit(
            "gamma_ptr, w_q_ptr + e * expert_columns * dim", "gamma_ptr, w_q_ptr", "BobMcDear/attorch#14"
        ),
        "step-rates-of-the-other-norm": edit(
            "tl.where(local, batch, 2 * batch)", "tl.where(local, 2 * batch, batch)", "log-sum-exp and scale"
        ),
        "step-norm-without-its-mean": edit("x = (x - mean) * rate", "x = x * rate", "log-sum-exp and scale"),
    },
    "optimized/kernels/step_attention.py": {
        "step-window-sees-one-more": edit(
            "held = tl.minimum(tl.load(length_ptr + b), window)",
            "held = tl.minimum(tl.load(length_ptr + b), window + 1)",
            "huggingface/transformers#39408",
        ),
        "step-empty-slots-count": edit(
            "seen = tl.load(positions_ptr + at, mask=seen, other=-1) >= 0",
            "seen = tl.load(positions_ptr + at, mask=seen, other=-1) >= -1",
            "masked rows and sentinels",
        ),
        "step-slots-past-the-end": edit(
            "end = tl.minimum(first + share, slots)", "end = first + share", "pytorch/pytorch#158212"
        ),
        "step-null-slot-in-every-part": edit(
            "        if part == 0:\n            null =", "        if part >= 0:\n            null =", "mass"
        ),
        "step-new-key-in-every-part": edit("    if part == 0:\n        k =", "    if part >= 0:\n        k =", "mass"),
        "step-capacity-one-less": edit("<= capacity, taken", "< capacity, taken", "tail mask"),
        "step-candidates-to-come": edit(
            'mask=at <= place, other=float("nan")', 'mask=at < width, other=float("nan")', "causality"
        ),
        "step-null-tokens-in-the-first-block": edit(
            "tl.where(tl.load(length_ptr + b) >= width, 2, 0)",
            "tl.where(tl.load(length_ptr + b) >= 0, 2, 0)",
            "combination",
        ),
        "step-values-unscored": edit("(p * score)[:, None] * values", "p[:, None] * values", "combination"),
        "step-what-is-large-is-seen": edit(
            'total = tl.where(tl.max(large, 0) > 0, float("nan"), total)',
            "total = total + 0 * tl.max(large, 0)",
            "fla-org/flash-linear-attention#77",
        ),
    },
    "optimized/kernels/step_output.py": {
        "step-parts-without-their-maxima": edit(
            "share = tl.exp2(tl.load(sums_ptr + 2 * at, mask=readable, other=0.0) - most)",
            "share = tl.exp2(tl.load(sums_ptr + 2 * at, mask=readable, other=0.0) * 0)",
            "log-sum-exp and scale",
        ),
        "step-average-in-the-first-block": edit(
            "tl.where((later > 0)[:, None], out / ", "tl.where((later >= 0)[:, None], out / ", "combination"
        ),
        "step-null-token-of-expert-0": edit(
            "tl.load(null_ptr + e * channels + column", "tl.load(null_ptr + column", "expert mix-up"
        ),
        "step-what-is-not-taken-is-read": edit(
            "tl.where(taken[:, None], _whole(part, PRODUCT) * score[:, None], more)",
            "_whole(part, PRODUCT) * score[:, None] + more",
            "masked tokens leak",
        ),
        "step-counts-no-token": edit("length + 1, mask=shown", "length, mask=shown", "in-place modification"),
    },
    "optimized/autoregressive_step.py": {
        "step-past-the-hooks": edit(
            "return _obstacle_of_modules(layer) or _obstacle_of_tensors",
            "return _obstacle_of_tensors",
            "choice of backend",
        ),
        "step-past-autocast": edit("if plan.dtype != x.dtype:", "if False:", "precision"),
        "step-of-two-dtypes": edit("t.dtype != x.dtype for", "t.dtype == torch.int8 for", "precision"),
        "step-past-a-choice": edit(
            "if near is not None and not near.startswith",
            "if near is None and not str(near).startswith",
            "choice of backend",
        ),
        "step-of-a-solver": edit('!= "sigmoid":', '== "none":', "configuration"),
        "step-drops-nothing": edit("if attn.probability():", "if False:", "dropout"),
        "step-buffers-of-any-layout": edit("all(t.is_contiguous() for t in held)", "True", "stride and layout"),
    },
}
