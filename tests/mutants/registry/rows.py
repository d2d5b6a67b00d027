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
            "factors = from_bits(scale_bits).to(DTYPE) / clamped_norm(tl.sqrt(tl.sum(r_squares, 0)))",
            "factors = from_bits(scale_bits).to(DTYPE) / clamped_norm(tl.sum(r_squares, 0))",
            "log-sum-exp and scale",
        ),
        "routing-token-gradient-without-cosine-term": edit(
            "other=0.0) - along * r\n", "other=0.0) - 0.0 * along * r\n", "lucidrains/CoLT5-attention#8"
        ),
        "routing-token-gradient-across-the-first-tokens": edit(
            "        r_0 = r_1\n", "", "lucidrains/CoLT5-attention#8"
        ),
        "routing-token-gradient-across-the-last-channels": edit(
            "        dots += r", "        dots = r", "missing gradient"
        ),
        "routing-token-gradient-across-less-than-the-least-norm": edit(
            "directed = length > norm_floor(length)", "directed = length > 0.0", "masked rows and sentinels"
        ),
        "routing-token-gradient-across-what-has-no-direction": edit(
            "tl.where(directed, square, 1.0)", "square", "masked rows and sentinels"
        ),
        "routing-token-gradient-of-the-last-item": edit(
            "(batch, chunks) if r.ndim == 3 else (1, batch * chunks)",
            "(batch, chunks) if r.ndim == 3 else (1, chunks)",
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
            "tl.load(norms_ptr + token, mask=valid, other=1.0))\n"
            "        gamma = tl.load(gamma_0 + e * dim + channels, mask=inside, other=0.0).to(DTYPE)\n        y",
            "tl.load(norms_ptr + b, mask=valid, other=1.0))\n"
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
    "optimized/kernels/router_gradient.py": {
        "router-gradient-of-the-last-expert": edit(
            "total += weight[:, None]", "total = weight[:, None]", "lucidrains/CoLT5-attention#8"
        ),
        "router-gradient-without-cosine-term": edit(
            "total -= x * slope[:, None]", "total -= 0.0 * x * slope[:, None]", "lucidrains/CoLT5-attention#8"
        ),
        "router-gradient-of-masked-tokens": edit(
            "    total = tl.where(shown[:, None], total, 0.0)\n", "", "trymirai/lalamo#310"
        ),
        "router-gradient-tokens-of-the-first-item": edit(
            "(b * item_rows + e) * dim", "e * dim", "fla-org/flash-linear-attention#1115"
        ),
        "router-gradient-of-no-length-turned": edit(
            "tl.where(norm > norm_floor(norm), moment", "tl.where(norm == norm, moment", "precision"
        ),
        "router-gradient-logits-of-another-item": edit(
            "at = (b * experts + e) * n + position", "at = e * n + position", "batch mix-up"
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
            "            slope += tl.where(norm > norm_floor(norm), moment * inverse_norm * inverse_norm, 0.0)\n",
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
            "more = _slots_of(inverse_0, b, position, n, first, experts, EXPERTS)\n",
            "more = _slots_of(inverse_0, b, position, n, first, 0 * experts, EXPERTS)\n",
            "pytorch/pytorch#153799",
        ),
        "token-gradient-counts-the-first-32-experts": edit(
            "        count += tl.sum((_slots_of(inverse_0",
            "        count += 0 * tl.sum((_slots_of(inverse_0",
            "pytorch/pytorch#153799",
        ),
        "token-gradient-reads-what-nobody-took": edit(
            "    reads = count\n", "    reads = count + 1\n", "masked rows and sentinels"
        ),
        "token-gradient-router-of-the-first-32-experts": edit(
            "        for first in range(0, tl.where(shown > 0, router_experts, 0), EXPERTS):\n",
            "        for first in range(0, tl.where(shown > 0, 1, 0), EXPERTS):\n",
            "pytorch/pytorch#153799",
        ),
    },
    "optimized/ops/gather_norm.py": {
        "gather-gradient-without-norm": edit(
            "rows = (TakenRows(g.rows, a.inverse, a.gamma),)",
            "rows = (TakenRows(g.rows, a.inverse, None),)",
            "unslothai/unsloth#10617",
        ),
        "gather-gradient-without-norm-by-pytorch": edit(
            "input_gradient(a.x, a.norms, (group,), (g.rows,))",
            "input_gradient(a.x, a.norms, (group._replace(gamma=None),), (g.rows,))",
            "unslothai/unsloth#10617",
        ),
    },
    "optimized/ops/router_logits.py": {
        "logits-gradient-by-gradients-for-logits": edit(
            "RouterGradient(g.logits, a.logits, a.tokens, a.factors)",
            "RouterGradient(g.logits, g.logits, a.tokens, a.factors)",
            "stale saved tensor",
        ),
        "logits-gradient-by-gradients-for-logits-by-pytorch": edit(
            "input_gradient(g.logits, a.x, a.tokens, a.mask, a.logits, a.norms, a.factors)",
            "input_gradient(g.logits, a.x, a.tokens, a.mask, g.logits, a.norms, a.factors)",
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
            "            tl.store(g_ptr + g_tile, (g * score).to(g_ptr.dtype.element_ty), mask=scaled)\n",
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
            "state = solver.solve(logits, a.mask, ks, True)",
            "state = solver.solve(logits, a.mask, (a.k_q, a.k_q), True)",
            "mass",
        ),
        "rows-gradient-of-logits-dropped": edit(
            "solver.picked_backward(grads, inverses, own,",
            "solver.picked_backward(grads, inverses, None,",
            "Dao-AILab/flash-attention#1817",
        ),
        "rows-gradients-of-routing-tokens-exchanged": edit(
            "part = side.of(stacked, -2) if len(asked) == 2 else stacked",
            "part = stacked.chunk(2, -2)[int(side.first)] if len(asked) == 2 else stacked",
            "missing gradient",
        ),
        "rows-straight-through-as-soft-scores": edit(
            "select_groups(logits, a.mask, ks, soft, solver.straight_through, solver.sigmoid)",
            "select_groups(logits, a.mask, ks, solver.solve(logits, a.mask, ks, True)[0], False, solver.sigmoid)",
            "straight-through",
        ),
        "rows-sigmoid-without-gradient-where-all-are-taken": edit(
            "chooses = [solver.sigmoid or n > side.k for", "chooses = [n > side.k for", "missing gradient"
        ),
        "rows-gradient-of-logits-dropped-by-pytorch": edit(
            "return dlogits if own is None else dlogits.add_(own)",
            "return dlogits",
            "Dao-AILab/flash-attention#1817",
        ),
    },
    "optimized/ops/expert_attention.py": {
        "experts-values-scaled-in-the-saved-tensor": edit(
            "        if not unit:\n            return kernel.value_score(v, scores)\n        kernel",
            "        kernel",
            "stale saved tensor",
        ),
        "experts-gradient-of-scaled-values": edit(
            "scaled = v if a.unit_scores else scale(v, a.scores, False, a.triton)", "scaled = v", "stale saved tensor"
        ),
        "experts-rotation-not-transposed": edit(
            "rotate_into(k, k, (a.cos, a.sin, a.k_positions), transposed, a.triton)",
            "rotate_into(k, k, (a.cos, a.sin, a.k_positions), False, a.triton)",
            "rotary",
        ),
        "experts-keys-at-the-queries-positions": edit(
            "(a.cos, a.sin, a.k_positions)", "(a.cos, a.sin, None)", "rotary"
        ),
        "experts-keys-and-values-exchanged": edit(
            "k, v = kv.unbind(2)\n        _turn",
            "v, k = kv.unbind(2)\n        _turn",
            "mixture-of-attention 0.0.25 (3)",
        ),
    },
    "optimized/ops/window.py": {
        "window-operator-one-short": edit(
            "reach = min(a.window, max", "reach = min(a.window - 1, max", "huggingface/transformers#39408"
        ),
        "window-operator-gradient-not-causal": edit(
            "rows = banded.Band(a.window, a.causal, a.mask)",
            "rows = banded.Band(a.window, False, a.mask)",
            "triton-lang/triton#5660",
            "causality",
        ),
        "window-operator-not-rotated-back": edit(
            "rotate_into(dq, turned, turned_by, True, a.triton)",
            "rotate_into(dq, turned, turned_by, False, a.triton)",
            "rotary",
        ),
    },
    "optimized/ops/solver.py": {
        "both-routers-mass-not-capped": edit(
            "return masses if len(masses) > 1 else masses[0]",
            "return tuple(float(k * self.ratio) for k in ks) if len(masses) > 1 else masses[0]",
            "mass",
        ),
    },
    "optimized/mixture.py": {
        "both-routers-exchanged": edit(
            "q_routes = Routes(q_indices, q_slots, q_scores, q_logits)",
            "q_routes = Routes(q_indices, q_slots, q_scores, kv_logits)",
            "expert mix-up",
        ),
        "own-context-taken-for-self-attention": edit(
            "if kv.x is not q.x or kv.mask is not q.mask:", "if kv.x is not q.x:", "masked tokens leak"
        ),
        "unit-scores-of-injected-routes": edit(
            "unit = call.routes is None and _straight", "unit = _straight", "straight-through"
        ),
    },
    "optimized/ops/operator.py": {
        "operator-unseen-results-shown": edit(
            'getattr(self.body, "unseen", None) if first else None',
            'getattr(self.body, "unseen", None)',
            "uninitialised output",
        ),
        "operator-constant-in-forward-mode": edit(
            (
                "        def refuse_tangent(ctx: Any, *tangents: Any) -> Any:\n"
                '            self._refuse("forward-mode differentiation")\n'
            ),
            (
                "        def refuse_tangent(ctx: Any, *tangents: Any) -> Any:\n"
                "            return (None,) * len(self.results) if len(self.results) > 1 else None\n"
            ),
            "transforms",
        ),
    },
}
