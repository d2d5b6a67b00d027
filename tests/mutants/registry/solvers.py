"""Faults of the two solvers: kernels, what rows share, PyTorch's forms, and the router's use of them."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/kernels/coordinate_descent.py": {
        "descent-kernel-largest-of-the-last-block": edit(
            "top = tl.maximum(top, tl.max(s))", "top = tl.max(s)", "log-sum-exp and scale"
        ),
        "descent-kernel-nan-of-the-first-block": edit(
            "            top = tl.maximum(top, tl.max(s))\n"
            "            poisoned = tl.maximum(poisoned, tl.max((s != s).to(tl.int32)))\n",
            "            top = tl.maximum(top, tl.max(s))\n",
            "masked rows and sentinels",
        ),
        "descent-kernel-last-temperature": edit(
            "rate = 1.0 / temperature_of(n_iters, eps_bits",
            "rate = 1.0 / temperature_of(n_iters - 1, eps_bits",
            "mass",
        ),
        "descent-kernel-cools-too-late": edit(
            "        hot *= cooling\n        temperature = tl.maximum(hot, coldest).to(dtype)\n",
            "        temperature = tl.maximum(hot, coldest).to(dtype)\n        hot *= cooling\n",
            "mass",
        ),
        "descent-kernel-counts-strictly": edit(
            "total, count = sum_both(tl.exp((tl.minimum(s, bound) - peak) * rate), (s >= bound)",
            "total, count = sum_both(tl.exp((tl.minimum(s, bound) - peak) * rate), (s > bound)",
            "ties and signed zeros",
        ),
        "descent-kernel-peak-is-the-bound": edit(
            "peak = tl.minimum(top, bound)", "peak = bound", "fla-org/flash-linear-attention#1214"
        ),
        "descent-kernel-mask-of-item-0": edit(
            "    if HAS_MASK:\n        mask_ptr += row // experts * n\n"
            "    dtype: tl.constexpr = s_ptr.dtype.element_ty\n    log_k",
            "    dtype: tl.constexpr = s_ptr.dtype.element_ty\n    log_k",
            "fla-org/flash-linear-attention#1115",
        ),
        "descent-kernel-gradient-of-saturated": edit(
            "tl.where(valid & (s >= -a), 0.0, grad * scores / temperature)",
            "grad * scores / temperature",
            "lucidrains/CoLT5-attention#8",
        ),
        "descent-kernel-sum-of-the-last-chunk": edit(
            "        da += tl.sum(ds)\n", "        da = tl.sum(ds)\n", "lucidrains/CoLT5-attention#8", "tail mask"
        ),
        "descent-kernel-steps-not-carried": edit(
            "later_steps = tl.sum(tl.where(lanes == SCALARS - 1, product, 0.0))",
            "later_steps = tl.sum(tl.where(lanes == 0, product, 0.0))",
            "fla-org/flash-linear-attention#1140",
        ),
        "descent-kernel-factor-without-count": edit(
            "factor = count * tl.exp((following - mine) / temperature) * inverse_k",
            "factor = tl.exp((following - mine) / temperature) * inverse_k",
            "lucidrains/CoLT5-attention#8",
        ),
        "descent-kernel-factor-of-another-step": edit(
            "temperature = temperature_of(t + 1, eps_bits",
            "temperature = temperature_of(t, eps_bits",
            "stale saved tensor",
        ),
        "descent-kernel-dlogits-of-masked-dropped": edit(
            "    ds = tl.where(valid, ds, 0.0)\n    if HAS_DLOGITS:\n"
            "        ds += tl.load(dlogits_ptr + row * n + mine, mask=mine < n, other=0.0)\n",
            "    if HAS_DLOGITS:\n"
            "        ds += tl.load(dlogits_ptr + row * n + mine, mask=mine < n, other=0.0)\n"
            "    ds = tl.where(valid, ds, 0.0)\n",
            "pytorch/pytorch#188302",
        ),
        "descent-kernel-nan-is-saturated": edit(
            '        scores = tl.where(poisoned > 0, float("nan"), scores)\n        tl.store(scores_ptr',
            "        tl.store(scores_ptr",
            "NaN order",
        ),
        "descent-kernel-rates-by-every-row": edit(
            "mask=t >= tl.where(row == 0, 1, n_iters)",
            "mask=t >= 1",
            "configuration",
            equivalent="all rows store the same bits at the same place",
        ),
        "descent-kernel-zero-times-infinity": edit(
            "tl.where(count > 0, factor, 0.0)", "factor", "fla-org/flash-linear-attention#1214"
        ),
        "descent-kernel-block-alone": edit(
            "                totals += tl.exp(", "                totals = tl.exp(", "pytorch/pytorch#153799"
        ),
        "descent-kernel-first-part-alone": edit(
            "da = tl.sum(tl.load(sums_ptr + row * PARTS + each, mask=each < parts, other=0.0))",
            "da = tl.load(sums_ptr + row * PARTS)",
            "lucidrains/CoLT5-attention#8",
            "tail mask",
        ),
        "descent-kernel-parts-overlap": edit(
            "tl.minimum(part * length + length, n), BLOCK)", "n, BLOCK)", "lucidrains/CoLT5-attention#8", "tail mask"
        ),
    },
    "optimized/kernels/long_descent.py": {
        "long-descent-largest-of-the-last-block": edit(
            "top = tl.maximum(top, tl.max(s))", "top = tl.max(s)", "log-sum-exp and scale"
        ),
        "long-descent-peak-is-the-bound": edit(
            "peak = tl.minimum(top, bound)", "peak = bound", "fla-org/flash-linear-attention#1214"
        ),
        "long-descent-sums-of-another-step": edit(
            "left = (t % 2 * rows + row) * CHUNKS + each", "left = row * CHUNKS + each", "stale saved tensor"
        ),
        "long-descent-cools-too-early": edit("bits[t - 1], bits[t], length", "bits[t], bits[t], length", "mass"),
        "long-descent-poison-is-forgotten": edit(
            "        a = tl.where(earlier != earlier, earlier, a)\n", "", "NaN order"
        ),
        "long-descent-scores-of-poisoned-rows": edit(
            "                scores = tl.where(a != a, a, scores)\n", "", "NaN order"
        ),
        "long-descent-poison-of-the-last-block": edit(
            "poisoned = tl.maximum(poisoned, tl.max((s != s).to(tl.int32)))",
            "poisoned = tl.max((s != s).to(tl.int32))",
            "pytorch/pytorch#153799",
        ),
        "long-descent-tokens-of-the-last-block": edit(
            "found += tl.sum(valid.to(tl.int32))",
            "found = tl.sum(valid.to(tl.int32))",
            "lucidrains/CoLT5-attention#8",
            "tail mask",
        ),
        "long-descent-totals-of-the-last-block": edit(
            "totals += tl.exp(", "totals = tl.exp(", "pytorch/pytorch#153799"
        ),
        "long-descent-counts-of-the-last-block": edit(
            "counts += (s >= bound)", "counts = (s >= bound)", "lucidrains/CoLT5-attention#8", "tail mask"
        ),
        "long-descent-mask-of-item-0": edit(
            "        mask_ptr += row // experts * n\n", "        mask_ptr += 0\n", "fla-org/flash-linear-attention#1115"
        ),
    },
    "optimized/kernels/temperature.py": {
        "temperature-of-zero-steps": edit("decay = tl.exp2(t * tl.log2(", "decay = tl.exp2((t + 1) * tl.log2(", "mass"),
        "temperature-below-its-least": edit(
            "return tl.maximum(from_bits(eps_init_bits) * decay, from_bits(eps_bits)).to(DTYPE)",
            "return (from_bits(eps_init_bits) * decay).to(DTYPE)",
            "log-sum-exp and scale",
        ),
    },
    "optimized/kernels/sigmoid.py": {
        "sigmoid-gradient-of-the-score-itself": edit("(p * (1 - p))", "(p * p)", "lucidrains/CoLT5-attention#8"),
        "sigmoid-gradient-of-a-nan-nobody-picked": edit(
            "mask=taken, other=0.0))", "mask=inside, other=0.0))", "masked rows and sentinels"
        ),
        "sigmoid-gradient-of-the-other-group": edit(
            "grad_0, grad_1, inverse_0, inverse_1, row, experts",
            "grad_0, grad_0, inverse_0, inverse_1, row, experts",
            "BobMcDear/attorch#14",
        ),
        "sigmoid-gradient-of-logits-dropped": edit(
            "        ds += tl.load(dlogits_ptr", "        ds = tl.load(dlogits_ptr", "Dao-AILab/flash-attention#1817"
        ),
        "sigmoid-gradient-of-the-first-block": edit(
            "mine = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)", "mine = tl.arange(0, BLOCK)", "tail mask"
        ),
    },
    "optimized/kernels/capped_simplex.py": {
        "capped-kernel-mass-of-all": edit(
            "left = tl.maximum(k - above.to(dtype), 0.0)", "left = k", "PythonOT/POT#394", "mass"
        ),
        "capped-kernel-peak-of-the-last-chunk": edit(
            "peak = tl.maximum(peak, tl.max(tl.where(saturated, -infinity, s)))",
            "peak = tl.max(tl.where(saturated, -infinity, s))",
            "pytorch/pytorch#153799",
        ),
        "capped-kernel-gradient-without-mean": edit(
            "ds = w * (grad - mean) / eps", "ds = w * grad / eps", "tenstorrent/tt-metal#53204"
        ),
        "capped-kernel-gradient-without-eps": edit(
            "ds = w * (grad - mean) / eps", "ds = w * (grad - mean)", "log-sum-exp and scale"
        ),
        "capped-kernel-gradient-of-saturated": edit(
            "return tl.where(s <= threshold, scores, 0.0), grad", "return scores, grad", "PythonOT/POT#394"
        ),
        "capped-kernel-poisoned-gradient": edit(
            "    if PICKED:\n        grad = tl.where(scores != scores, 0.0, grad)  # picked scores that were "
            "set to NaN are constants\n",
            "",
            "NaN order",
        ),
        "capped-kernel-moment-of-the-last-chunk": edit(
            "moment += tl.sum(w * grad)", "moment = tl.sum(w * grad)", "lucidrains/CoLT5-attention#8", "tail mask"
        ),
    },
    "optimized/kernels/rows.py": {
        "rows-masked-lanes-are-zero": edit(
            'other=-float("inf")), valid', "other=0.0), valid", "flagos-ai/FlagGems#3716"
        ),
        "rows-mass-of-the-first-item": edit(
            "tl.where(row % experts < group, mass_0_bits, mass_1_bits)",
            "tl.where(row < group, mass_0_bits, mass_1_bits)",
            "fla-org/flash-linear-attention#1115",
        ),
        "rows-gradient-of-another-item": edit(
            "place = row // experts * group + expert % group",
            "place = row // experts + expert % group",
            "fla-org/flash-linear-attention#1115",
        ),
        "rows-gradient-width-of-the-first-group": edit(
            "            width = k_1.to(tl.int64)\n", "", "BobMcDear/attorch#14"
        ),
        "rows-gradient-at-minus-one": edit("        valid = offsets >= 0\n", "", "vllm-project/vllm#48371"),
        "rows-gradient-strided": edit(
            "grads = tuple([grad.contiguous() for grad in grads])", "grads = tuple(grads)", "ROCm/TransformerEngine#623"
        ),
    },
    "optimized/kernels/launch.py": {
        "launch-numbers-in-float32": edit(
            'return struct.unpack("<q", struct.pack("<d", value))[0]',
            'value = struct.unpack("<f", struct.pack("<f", value))[0]\n'
            '    return struct.unpack("<q", struct.pack("<d", value))[0]',
            "precision",
        ),
    },
    "optimized/ops/coordinate_descent.py": {
        "descent-temperature": edit("eps_init * eps_decay**t, eps", "eps_init * eps_decay ** (t + 1), eps", "mass"),
        "descent-counts-strictly": edit(
            "counts[t] = (s >= bound).sum(-1)", "counts[t] = (s > bound).sum(-1)", "ties and signed zeros"
        ),
        "descent-masked-of-poisoned-rows": edit(
            "        scores.masked_fill_(~mask[:, None], 0)  # exp(-inf) = 0 already, but for rows poisoned by a NaN\n",
            "        pass\n",
            "fla-org/flash-linear-attention#77",
        ),
        "descent-first-step-without-nan": edit(
            "            a[0].masked_fill_(s.isnan().any(-1), math.nan)  # the first step does not look at s\n",
            "            pass\n",
            "NaN order",
        ),
        "descent-masked-gradient-multiplied": edit(
            "        grad = grad.masked_fill(~mask[:, None], 0)  # it may be NaN there, and 0 * NaN is NaN\n    ds =",
            "        grad = grad * mask[:, None]\n    ds =",
            "pytorch/pytorch#196678",
        ),
        "descent-gradient-of-saturated": edit(
            "    ds.masked_fill_(s >= bound[-1], 0)\n", "", "lucidrains/CoLT5-attention#8"
        ),
        "descent-carries-too-much": edit(
            "share = counts[t] * ((a[t] - a[t - 1]) / eps_t).exp() / k",
            "share = counts[t] * ((a[t] - a[t - 1]) / eps_t).exp()",
            "lucidrains/CoLT5-attention#8",
        ),
        "solvers-fill-in-place": edit(
            "logits.masked_fill(~mask[:, None], -math.inf)",
            "logits.masked_fill_(~mask[:, None], -math.inf)",
            "linkedin/Liger-Kernel#1305",
        ),
        "solvers-gradient-in-place": edit(
            "    grad = grad.contiguous()\n    if mask is not None:\n        grad = grad.masked_fill(~mask",
            "    grad = grad.contiguous()\n    if mask is not None:\n        grad = grad.masked_fill_(~mask",
            "linkedin/Liger-Kernel#1305",
        ),
        "descent-batching-of-the-iterates": edit('"a": 1, "counts": 1}', '"a": 0, "counts": 0}', "transforms"),
        "descent-zero-times-infinity": edit(
            "da = da * torch.where(counts[t] > 0, share, 0)", "da = da * share", "fla-org/flash-linear-attention#1214"
        ),
    },
    "optimized/ops/capped_simplex.py": {
        "capped-equals-are-cut-off": edit("free = s <= threshold\n", "free = s < threshold\n", "ties and signed zeros"),
        "capped-count-in-float32": edit(
            "(s > threshold).sum(-1, keepdim=True).to(s.dtype)", "(s > threshold).sum(-1, keepdim=True)", "precision"
        ),
        "capped-saturated-rows-divide-by-zero": edit(
            " / w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)",
            " / w.sum(-1, keepdim=True)",
            "deep-spin/entmax#32",
        ),
        "capped-gradient-without-mean": edit(
            "ds = w * (grad.contiguous() - mean) / eps",
            "ds = w * grad.contiguous() / eps",
            "tenstorrent/tt-metal#53204",
        ),
        "capped-threshold-differentiable": edit(
            'gradients_of="scores",', 'gradients_of="scores threshold",', "Dao-AILab/flash-attention#1817"
        ),
    },
    "optimized/ops/solver.py": {
        "mass-beyond-the-row": edit(
            "float(min(k * self.ratio, logits.shape[-1]))",
            "float(k * self.ratio)",
            "NVIDIA-NeMo/Automodel#3035",
            "mass",
        ),
    },
    "optimized/ops/router_logits.py": {
        "router-in-the-models-dtype": edit(
            "torch.promote_types(torch.promote_types(x.dtype, tokens.dtype), torch.float32)",
            "torch.promote_types(x.dtype, tokens.dtype)",
            "precision",
        ),
        "router-masked-tokens-multiplied": edit(
            "x = x.masked_fill(~mask[..., None], 0)", "x = x * mask[..., None]", "fla-org/flash-linear-attention#77"
        ),
        "router-cosine-unscaled": edit(
            "norms.clamp_min(1e-12)[..., None] * scale, tokens",
            "norms.clamp_min(1e-12)[..., None], tokens",
            "log-sum-exp and scale",
        ),
    },
}
