"""Faults of the rows that experts take: router logits, gather and norm, value scores, gradients of tokens, and of the
operators of whole stages.
"""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/kernels/router_logits.py": {
        "logits-read-masked-tokens": edit(
            "        shown = tl.load(mask_ptr + b * n + rows, mask=shown, other=0) != 0\n    x_ptr += (b",
            "        shown = tl.load(mask_ptr + rows, mask=shown, other=0) != 0\n    x_ptr += (b",
            "fla-org/flash-linear-attention#1115",
        ),
        "logits-routing-tokens-of-item-0": edit(
            "r_ptr += (b * item_rows + here[None, :])", "r_ptr += here[None, :]", "fla-org/flash-linear-attention#1115"
        ),
        "logits-scale-of-cosine-squared": edit(
            "factors = from_bits(scale_bits).to(DTYPE) / tl.maximum(tl.sqrt(tl.sum(r_squares, 0)), 1e-12)",
            "factors = from_bits(scale_bits).to(DTYPE) / tl.maximum(tl.sum(r_squares, 0), 1e-12)",
            "log-sum-exp and scale",
        ),
        "routing-token-gradient-without-cosine-term": edit(
            "        dr -= torch.where(squares > 1e-24, moment * r / squares.clamp_min(1e-24), 0)\n",
            "",
            "lucidrains/CoLT5-attention#8",
        ),
        "routing-token-gradient-of-the-last-item": edit(
            "partial.sum(1) if r.ndim == 3 else partial.sum((0, 1))",
            "partial.sum(1) if r.ndim == 3 else partial[-1].sum(0)",
            "lucidrains/CoLT5-attention#8",
        ),
        "routing-token-gradient-reads-masked-tokens": edit(
            "        keep = (here < experts)[:, None] & shown[None, :]\n",
            "        keep = (here < experts)[:, None] & (rows < n)[None, :]\n        shown = rows < n\n",
            "trymirai/lalamo#310",
        ),
    },
    "optimized/kernels/gather_norm.py": {
        "gather-tokens-of-item-0": edit(
            "    token = b * n + index\n    channels = tl.program_id(1)",
            "    token = index\n    channels = tl.program_id(1)",
            "colt5-attention 0.11.2 (15)",
        ),
        "gather-gamma-of-expert-0": edit(
            "        gamma = tl.load(gamma_0 + e * dim + channels, mask=inside, other=0.0).to(DTYPE)\n        y = ",
            "        gamma = tl.load(gamma_0 + channels, mask=inside, other=0.0).to(DTYPE)\n        y = ",
            "BobMcDear/attorch#14",
        ),
        "gather-norm-of-the-slot": edit(
            "tl.load(norms_ptr + token, mask=valid, other=1.0), 1e-12)\n"
            "        gamma = tl.load(gamma_0 + e * dim + channels, mask=inside, other=0.0).to(DTYPE)\n        y",
            "tl.load(norms_ptr + b, mask=valid, other=1.0), 1e-12)\n"
            "        gamma = tl.load(gamma_0 + e * dim + channels, mask=inside, other=0.0).to(DTYPE)\n        y",
            "stride and layout",
        ),
        "gather-norm-by-d-to-the-minus-half": edit(
            "        root = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE)\n        r = ",
            "        root = 1.0 / tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE)\n        r = ",
            "zetascale 2.8.8 (2)",
        ),
        "gather-masked-slots-read-their-token": edit(
            "    index = tl.load(indices_ptr + place, mask=valid, other=0)\n",
            "    valid = inside\n    index = tl.load(indices_ptr + place, mask=inside, other=0)\n",
            "trymirai/lalamo#310",
        ),
        "gather-second-group-one-slot-short": edit(
            "        out_0 = out_1\n        if HAS_NORM:\n            gamma_0 = gamma_1\n        k_0 = k_1\n",
            "        out_0 = out_1\n        if HAS_NORM:\n            gamma_0 = gamma_1\n        k_0 = k_1 - 1\n",
            "stride and layout",
        ),
        "gamma-gradient-of-queries-for-both": edit("        g_0 = g_1\n", "", "unslothai/unsloth#4533"),
        "gamma-gradient-without-the-norm": edit(
            "total += products * r[:, None]", "total += products", "unslothai/unsloth#10617"
        ),
        "dots-of-the-second-group-at-the-first": edit(
            "        dots_ptr += tl.cast(experts, tl.int64) * batch * k_0\n", "", "stride and layout"
        ),
    },
    "optimized/kernels/token_gradient.py": {
        "token-gradient-without-norm-term": edit(
            "scale * ((dot * inverse_norm) * inverse_norm), 0.0)", "0.0 * dot, 0.0)", "unslothai/unsloth#10617"
        ),
        "token-gradient-norm-term-twice": edit(
            "        total -= x * slope\n", "        total -= 2 * x * slope\n", "tenstorrent/tt-metal#53204"
        ),
        "token-gradient-of-one-group": edit(
            "    if GROUPS > 1:\n        total, dot",
            "    if GROUPS > 2:\n        total, dot",
            "lucidrains/CoLT5-attention#8",
        ),
        "token-gradient-of-the-last-expert": edit(
            "        total += g\n", "        total = g\n", "vllm-project/vllm-xpu-kernels#453", "missing gradient"
        ),
        "token-gradient-rows-of-other-items": edit(
            "row = (e * batch + b) * k + slot", "row = e * batch * k + slot", "fla-org/flash-linear-attention#1115"
        ),
        "token-gradient-without-the-router": edit(
            "                total += weight * tl.load(row",
            "                total += 0.0 * weight * tl.load(row",
            "lucidrains/CoLT5-attention#8",
        ),
        "token-gradient-without-cosine-term": edit(
            "            slope += tl.where(norm > 1e-12, moment * inverse_norm * inverse_norm, 0.0)\n",
            "            slope += 0.0 * moment\n",
            "lucidrains/CoLT5-attention#8",
        ),
        "token-gradient-router-of-masked-tokens": edit(
            "        shown = tl.load(mask_ptr + token).to(tl.int32)\n",
            "        shown = 1 + 0 * tl.load(mask_ptr + token).to(tl.int32)\n",
            "trymirai/lalamo#310",
        ),
        "token-gradient-first-channel-block-of-dots": edit(
            "            for block in range(channel_blocks):\n",
            "            for block in range(1):\n",
            "pytorch/pytorch#153799",
        ),
        "token-gradient-of-the-first-32-experts": edit(
            "            more = _slots_of(inverse_0, b, position, n, first, experts, EXPERTS)\n",
            "            more = _slots_of(inverse_0, b, position, n, first, 0 * experts, EXPERTS)\n",
            "pytorch/pytorch#153799",
        ),
        "token-gradient-counts-the-first-32-experts": edit(
            "            count += tl.sum((_slots_of(inverse_0",
            "            count += 0 * tl.sum((_slots_of(inverse_0",
            "pytorch/pytorch#153799",
        ),
        "token-gradient-router-of-the-first-32-experts": edit(
            "        for first in range(0, tl.where(shown > 0, router_experts, 0), EXPERTS):\n",
            "        for first in range(0, tl.where(shown > 0, 1, 0), EXPERTS):\n",
            "pytorch/pytorch#153799",
        ),
    },
    "optimized/ops/gather_norm.py": {
        "gather-gradient-without-norm": edit(
            "(TakenRows(grad, inverse, gamma),)", "(TakenRows(grad, inverse, None),)", "unslothai/unsloth#10617"
        ),
    },
    "optimized/ops/router_logits.py": {
        "logits-gradient-by-gradients-for-logits": edit(
            "RouterGradient(grad, logits, tokens, factors)",
            "RouterGradient(grad, grad, tokens, factors)",
            "stale saved tensor",
        ),
    },
    "optimized/kernels/value_score.py": {
        "value-score-of-another-expert": edit(
            "    return (row % batch * experts + row // batch) * length + slot % length\n",
            "    return slot\n",
            "BobMcDear/attorch#14",
        ),
        "value-score-gradient-not-scaled": edit(
            "        tl.store(g_ptr + tile, (g * score).to(g_ptr.dtype.element_ty), mask=scaled)\n",
            "",
            "lucidrains/CoLT5-attention#8",
        ),
        "value-score-gradient-of-some-heads": edit(
            "        dot += g * v\n", "        dot = g * v\n", "lucidrains/CoLT5-attention#8"
        ),
        "value-score-in-place-ignores-nan": edit(
            "left = (scores != 1).to(tl.int32)", "left = ((scores < 1) | (scores > 1)).to(tl.int32)", "NaN order"
        ),
        "value-score-in-place-first-of-32": edit(
            "    for _ in range(tl.sum(left)):\n",
            "    for _ in range(tl.minimum(tl.sum(left), 1)):\n",
            "vllm-project/vllm-xpu-kernels#453",
            "tail mask",
        ),
    },
    "optimized/ops/routed_rows.py": {
        "rows-mass-of-queries-for-both": edit(
            "        masses = self.q_mass, self.kv_mass\n        if",
            "        masses = self.q_mass, self.q_mass\n        if",
            "mass",
        ),
        "rows-gradient-of-logits-dropped": edit(
            "    dlogits = solver.backward(picked, inverses, dlogits, logits, mask, solved)\n",
            "    dlogits = solver.backward(picked, inverses, None, logits, mask, solved)\n",
            "Dao-AILab/flash-attention#1817",
        ),
        "rows-gradients-of-routing-tokens-exchanged": edit(
            "    dq_tokens, dkv_tokens = (", "    dkv_tokens, dq_tokens = (", "missing gradient"
        ),
        "rows-straight-through-as-soft-scores": edit(
            "(k_q, k_kv), None, unit=True)", "(k_q, k_kv), solver.solve(logits, mask)[0])", "straight-through"
        ),
    },
    "optimized/ops/expert_attention.py": {
        "experts-values-scaled-in-the-saved-tensor": edit(
            "        if not unit:\n            return kernel.value_score(v, scores)\n        kernel",
            "        kernel",
            "stale saved tensor",
        ),
        "experts-gradient-of-scaled-values": edit(
            "    scaled = v if unit_scores else _scale(v, scores, False, triton)\n",
            "    scaled = v\n",
            "stale saved tensor",
        ),
        "experts-rotation-not-transposed": edit(
            "        rotate_into(dk, dk, cos, sin, k_positions, True, triton)\n",
            "        rotate_into(dk, dk, cos, sin, k_positions, False, triton)\n",
            "rotary",
        ),
        "experts-keys-at-the-queries-positions": edit(
            "        rotate_into(k, k, cos, sin, k_positions, False, triton)\n",
            "        rotate_into(k, k, cos, sin, None, False, triton)\n",
            "rotary",
        ),
        "experts-keys-and-values-exchanged": edit(
            "    k, v = kv.unbind(2)\n    if cos",
            "    v, k = kv.unbind(2)\n    if cos",
            "mixture-of-attention 0.0.25 (3)",
        ),
    },
    "optimized/ops/window_attention.py": {
        "window-operator-one-short": edit(
            "None, None, None, 0.0, window, causal, backend, False)",
            "None, None, None, 0.0, window - 1, causal, backend, False)",
            "huggingface/transformers#39408",
        ),
        "window-operator-gradient-not-causal": edit(
            "out, lse.contiguous(), nothing, nothing, 0.0, window, causal, backend,",
            "out, lse.contiguous(), nothing, nothing, 0.0, window, False, backend,",
            "triton-lang/triton#5660",
            "causality",
        ),
        "window-operator-keys-not-rotated-back": edit(
            "    rotate_into(dk, dk, cos, sin, None, True, triton)\n", "", "rotary"
        ),
    },
    "optimized/routing.py": {
        "both-routers-mass-not-capped": edit(
            "*(float(min(k * options.fetch_k_ratio, n)) for k in ks),",
            "*(float(k * options.fetch_k_ratio) for k in ks),",
            "mass",
        ),
        "both-routers-exchanged": edit(
            "    q_routes = Routes(q_indices, q_slots, q_scores, q_logits)\n",
            "    q_routes = Routes(q_indices, q_slots, q_scores, kv_logits)\n",
            "expert mix-up",
        ),
        "constant-in-forward-mode-too": edit(
            "    return torch.autograd.forward_ad._current_level < 0 and torch._C", "    return torch._C", "transforms"
        ),
    },
    "optimized/mixture.py": {
        "own-context-taken-for-self-attention": edit(
            "context is x and context_mask is mask", "context is x", "masked tokens leak"
        ),
        "unit-scores-of-injected-routes": edit(
            "unit_scores = routes is None and (no_choice", "unit_scores = (no_choice", "straight-through"
        ),
    },
}
