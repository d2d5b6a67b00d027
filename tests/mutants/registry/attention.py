"""Faults of the attention operator, of the merged null slot, of the CPU's adapters, and of routed attention."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/kernels/attention.py": {
        "attention-kernel-fade-forgotten": edit(
            "return higher, total, _product(_rounded(p, v_ptr), v, out * fade[:, None],",
            "return higher, total, _product(_rounded(p, v_ptr), v, out,",
            "log-sum-exp and scale",
        ),
        "attention-kernel-sum-of-what-is-kept": edit(
            "    total = total * fade + tl.sum(p, 1)\n    if DROPOUT:\n"
            "        p = tl.where(_kept(bits_ptr, i, here, start, words, BLOCK_N), p, 0.0)\n",
            "    if DROPOUT:\n        p = tl.where(_kept(bits_ptr, i, here, start, words, BLOCK_N), p, 0.0)\n"
            "    total = total * fade + tl.sum(p, 1)\n",
            "dropout",
        ),
        "attention-kernel-length-of-row-0": edit(
            "    k_ptr += row * k_r + h * k_h\n    v_ptr += row * v_r + h * v_h\n"
            "    whole_blocks = end // BLOCK_N * BLOCK_N\n    for start in range(0, whole_blocks, BLOCK_N):\n"
            "        at_k, at_v = tl.cast(start, tl.int64) * k_l, tl.cast(start, tl.int64) * v_l\n        top",
            "    if HAS_LENGTHS:\n        end = tl.load(lengths_ptr)\n"
            "    k_ptr += row * k_r + h * k_h\n    v_ptr += row * v_r + h * v_h\n"
            "    whole_blocks = end // BLOCK_N * BLOCK_N\n    for start in range(0, whole_blocks, BLOCK_N):\n"
            "        at_k, at_v = tl.cast(start, tl.int64) * k_l, tl.cast(start, tl.int64) * v_l\n        top",
            "fla-org/flash-linear-attention#1115",
        ),
        "attention-kernel-null-slot-of-another-expert": edit(
            "        at = (row // rows_per_null * heads + h) * DIM\n        null_k, null_v, z = _null_slot(\n"
            "            null_k_ptr, null_v_ptr, keep_ptr + item * queries, at, i, here, DIM, DTYPE, DROPOUT, BLOCK_D\n"
            "        )\n        top",
            "        at = h * DIM\n        null_k, null_v, z = _null_slot(\n"
            "            null_k_ptr, null_v_ptr, keep_ptr + item * queries, at, i, here, DIM, DTYPE, DROPOUT, BLOCK_D\n"
            "        )\n        top",
            "expert mix-up",
        ),
        "attention-kernel-null-slot-always-kept": edit(
            "dnull_v = tl.sum((p0 * z)[:, None] * dout.to(DTYPE), 0) / kept",
            "dnull_v = tl.sum(p0[:, None] * dout.to(DTYPE), 0) / kept",
            "dropout",
        ),
        "attention-kernel-delta-not-scaled": edit(
            "delta = tl.sum(dout.to(DTYPE) * out.to(DTYPE), 1) * kept",
            "delta = tl.sum(dout.to(DTYPE) * out.to(DTYPE), 1)",
            "dropout",
        ),
        "attention-kernel-other-bits-backward": edit(
            "(tl.reshape(spread, (BLOCK_N, i.shape[0])) & bit[:, None]) != 0",
            "(tl.reshape(spread, (BLOCK_N, i.shape[0])) & bit[:, None]) == 0",
            "dropout",
        ),
        "attention-kernel-values-gradient-undropped": edit(
            "dv = _product(_rounded(dropped, dout_ptr), dout, dv, HALF, DTYPE)",
            "dv = _product(_rounded(p, dout_ptr), dout, dv, HALF, DTYPE)",
            "dropout",
        ),
        "attention-kernel-keys-gradient-unscaled": edit(
            "dk * (from_bits(scale_bits).to(DTYPE) / kept)", "dk / kept", "log-sum-exp and scale"
        ),
        "attention-kernel-hidden-keys-have-gradients": edit(
            "dv = tl.where(shown[:, None], dv / kept, 0.0)", "dv = dv / kept", "trymirai/lalamo#310"
        ),
    },
    "optimized/kernels/keep.py": {
        "keep-kernel-null-slot-as-the-first-key": edit(
            "numbers_ptr + 3 * queries + i, mask=here", "numbers_ptr + 2 * queries + i, mask=here", "dropout"
        ),
        "keep-kernel-digits-reversed": edit("(t >> digit) & 1", "(t >> (7 - digit)) & 1", "dropout"),
        "keep-kernel-share-rounded-down": edit(
            "t = whole + (((a & 0xFFFFFF) + rest) >> 24)", "t = whole + (a & 0)", "dropout"
        ),
        "keep-kernel-all-kept-is-none": edit("    less = tl.where(t >= 256, -1, less)\n", "", "dropout"),
        "keep-kernel-one-draw-for-all-heads": edit(
            "numbers_ptr += item * (4 * queries + 2 * DIGITS * words)", "numbers_ptr += 0 * item", "dropout"
        ),
    },
    "optimized/kernels/null_slot.py": {
        "null-kernel-lse-of-base-2": edit(
            "merged_lse = top + tl.log(total)", "merged_lse = top + tl.log2(total)", "vllm-project/vllm#47079"
        ),
        "null-kernel-lse-off-by-ln-2": edit(
            "merged_lse = top + tl.log(total)", "merged_lse = top + tl.log(total * 2)", "pytorch/pytorch#181645"
        ),
        "null-kernel-weights-by-the-lse": edit(
            "    p0 /= total\n    rest /= total\n",
            "    p0 = tl.exp(s0 - merged_lse)\n    rest = tl.exp(lse - merged_lse)\n",
            "precision",
        ),
        "null-kernel-lse-of-empty-rows": edit(
            '    if HAS_LENGTHS:\n        lse = tl.where(tl.load(lengths_ptr + row) > 0, lse, -float("inf"))\n',
            "",
            "microsoft/onnxruntime#28904",
        ),
        "null-kernel-dropout-forward-only": edit(
            "    if HAS_KEEP:\n"
            "        z *= tl.load(keep_ptr + item * length + rows, mask=rows < length, other=0.0).to(DTYPE)\n",
            "",
            "Dao-AILab/flash-attention#1251",
        ),
        "null-kernel-without-delta": edit(
            " - p0 * tl.sum(dout * out, 1)) / root", ") / root", "triton-lang/triton#5660"
        ),
        "null-kernel-gradient-unscaled": edit(
            " - p0 * tl.sum(dout * out, 1)) / root", " - p0 * tl.sum(dout * out, 1))", "log-sum-exp and scale"
        ),
        "null-kernel-gradient-of-other-experts": edit(
            "Sum(found, 2 * groups, rows // groups * chunks)",
            "Sum(found, 2 * groups, chunks)",
            "BobMcDear/attorch#14",
        ),
        "null-kernel-lse-past-the-end": edit(
            'mask=rows < length, other=float("inf")).to(DTYPE)',
            "mask=rows < length, other=0.0).to(DTYPE)",
            "thu-ml/SpargeAttn#124",
            "tail mask",
            equivalent="q and dout are 0 in lanes past the end, so p0 is 1 there and each of its products is 0",
        ),
        "null-kernel-tail-of-queries": edit(
            "        chunks = cdiv(length, _rows(dim))\n",
            "        chunks = max(length // _rows(dim), 1)\n",
            "pytorch/pytorch#158212",
        ),
    },
    "optimized/kernels/launch.py": {
        "launch-strides-kept": edit(
            "return None if t is None else t.contiguous()", "return t", "Dao-AILab/flash-attention#355"
        ),
        "launch-lookup-ignores-alignment": edit("exact.append(address % 16)", "exact.append(0)", "stride and layout"),
        "launch-partial-sums-in-the-models-dtype": edit(
            "return torch.promote_types(dtype, torch.float32)", "return dtype", "precision"
        ),
    },
    "optimized/attention/calls.py": {
        "attention-lengths-of-the-first-rows": edit(
            "else t.split(MOST_ROWS) for t in (visible.lengths",
            "else t.flip(0).split(MOST_ROWS) for t in (visible.lengths",
            "fla-org/flash-linear-attention#1115",
        ),
        "attention-lse-without-keys": edit(
            "q.new_full((rows, heads, length), -math.inf, dtype",
            "q.new_full((rows, heads, length), 0.0, dtype",
            "Dao-AILab/flash-attention#2562",
        ),
        "attention-rows-unaligned": edit(
            "aligned = _side_by_side if adapter.alignment == 1 else _aligned",
            "aligned = _side_by_side",
            "ROCm/aiter#5067",
        ),
    },
    "optimized/ops/null_slot.py": {
        "merge-lse-of-base-2": edit(
            "merged_lse = torch.logaddexp(lse, null_logits)",
            "merged_lse = torch.logaddexp2(lse, null_logits)",
            "sgl-project/sglang#33064",
        ),
        "merge-lse-of-empty-rows": edit(
            ("    if lengths is not None:\n        lse = torch.where(lengths[:, None, None] > 0, lse, -math.inf)\n"),
            "",
            "microsoft/onnxruntime#28904",
        ),
        "merge-output-of-empty-rows": edit(
            "out = torch.where((lse > -math.inf).transpose(1, 2)[..., None], out, 0).to(lse.dtype)",
            "out = out.to(lse.dtype)",
            "Dao-AILab/flash-attention#442",
        ),
        "merge-null-logit-unscaled": edit(
            "(products.sum(-1) * q.shape[-1] ** -0.5)", "products.sum(-1)", "log-sum-exp and scale"
        ),
        "merge-null-logit-in-the-models-dtype": edit(
            "products = q.to(wide) * _per_row(null_k, q)[:, None].to(wide)",
            "products = (q * _per_row(null_k, q)[:, None]).to(wide)",
            "precision",
        ),
        "merge-null-of-another-expert": edit(
            "return null.repeat_interleave(q.shape[0] // null.shape[0], 0)",
            "return null.repeat(q.shape[0] // null.shape[0], 1, 1)",
            "BobMcDear/attorch#14",
        ),
        "merge-dq-without-the-null-slot": edit(
            "dq = (dq.to(wide) + ds[..., None] * k0).to(dq.dtype).contiguous()",
            "dq = dq.contiguous()",
            "lucidrains/native-sparse-attention-pytorch#31",
        ),
        "merge-gradient-without-delta": edit(
            "(kept * (dout * v0).sum(-1) - p0 * (dout * out.to(wide)).sum(-1))",
            "(kept * (dout * v0).sum(-1))",
            "triton-lang/triton#5660",
        ),
        "merge-dropout-forward-only": edit(
            "kept = p0 if keep is None else p0 * keep.transpose(1, 2)", "kept = p0", "Dao-AILab/flash-attention#1251"
        ),
    },
    "optimized/ops/attention.py": {
        "null-gradient-dropped": edit('wrt="q k v null_k null_v",', 'wrt="q k v",', "unslothai/unsloth#4533"),
        "null-dropout-not-rescaled": edit(
            "(draws >= setting.dropout).to(lse.dtype) / (1 - setting.dropout)",
            "(draws >= setting.dropout).to(lse.dtype)",
            "dropout",
        ),
        "null-dropout-same-for-all-heads": edit(
            "torch.rand(lse.shape, dtype=lse.dtype, device=q.device)",
            "torch.rand(lse[:, :1].shape, dtype=lse.dtype, device=q.device).expand_as(lse)",
            "Dao-AILab/flash-attention#314",
        ),
        "attention-lse-differentiable": edit(
            'gradients_of="out",', 'gradients_of="out lse",', "Dao-AILab/flash-attention#1817"
        ),
        "attention-fake-lse-in-the-models-dtype": edit(
            "a.q.new_empty(rows, heads, length, dtype=torch.promote_types(a.q.dtype, torch.float32))",
            "a.q.new_empty(rows, heads, length)",
            "AMD-AGI/Primus-Turbo#362",
        ),
    },
    "optimized/ops/operator.py": {
        "operator-fake-of-the-gradients-strided": edit(
            "torch.empty_like(getattr(a, self._of.alike[name]), memory_format=torch.contiguous_format)",
            "torch.empty_like(getattr(a, self._of.alike[name]))",
            "AMD-AGI/Primus-Turbo#362",
        ),
    },
    "optimized/attention/math.py": {
        "math-one-hidden-key-seen": edit(
            "(key >= visible.lengths[rows, None])", "(key > visible.lengths[rows, None])", "thu-ml/SpargeAttn#124"
        ),
        "math-row-without-keys": edit(".masked_fill_(hopeless[..., None], 0)", "", "Dao-AILab/flash-attention#442"),
        "math-gradient-of-rows-without-keys": edit(
            "lse.masked_fill(lse == -math.inf, 0)[..., None]", "lse[..., None]", "pytorch/pytorch#103963"
        ),
        "math-weights-by-the-lse": edit(
            "p = torch.softmax(s, -1, out=s)", "p = s.sub_(s.logsumexp(-1, keepdim=True)).exp_()", "precision"
        ),
        "math-dropout-forward-only": edit("@ dropped).mT", "@ p).mT", "Dao-AILab/flash-attention#1251"),
        "math-dropout-not-rescaled": edit("attended /= 1 - setting.dropout", "attended /= 1", "dropout"),
        "math-products-in-half": edit(
            "torch.matmul(mine, k[tile[:2]].mT, out=s)",
            "s = (mine.bfloat16() @ k[tile[:2]].mT.bfloat16()).to(q.dtype)",
            "precision",
        ),
        "math-mask-of-the-first-tile": edit(
            "torch.arange(length, device=device)[queries, None]",
            "torch.arange(queries.stop - queries.start, device=device)[:length, None]",
            "tail mask",
        ),
        "math-gradient-of-the-last-tile": edit("dk[heads] +=", "dk[heads] =", "tail mask"),
    },
    "optimized/attention/draws.py": {
        "draws-same-for-all-heads": edit(
            "numbers.random_(-(2**31), None)",
            "numbers.copy_(numbers[:, :1].clone().random_(-(2**31), None))",
            "Dao-AILab/flash-attention#314",
        ),
        "draws-of-a-fixed-seed": edit(
            "numbers.random_(-(2**31), None)",
            "numbers.random_(-(2**31), None, generator=torch.Generator(numbers.device).manual_seed(0))",
            "Dao-AILab/flash-attention#314",
        ),
        "draws-same-for-all-tiles": edit(
            "(t[..., tile[2], None] for t in (m, a, c))",
            "(t[..., : t[..., tile[2]].shape[-1], None] for t in (m, a, c))",
            "Dao-AILab/flash-attention#314",
        ),
        "draws-hash-of-sums": edit(
            "torch.mul(m | 1, b, out=x).add_(a)  # one addcmul, of two that are expanded, would not be vectorized\n"
            "    torch.bitwise_right_shift(x, 16, out=shifted)\n    torch.addcmul(shifted, x, n | 1, out=x)\n",
            "torch.add(a, b, out=x)\n"
            "    torch.bitwise_right_shift(x, 16, out=shifted)\n    torch.add(shifted, x, alpha=FACTOR, out=x)\n",
            "dropout",
        ),
        "draws-threshold-rounded-down": edit("(a & 0xFFFF) + rest", "(a & 0) + rest", "dropout"),
        "draws-threshold-of-other-sign": edit("(whole - 2**15)", "whole", "dropout"),
    },
    "optimized/attention/bias.py": {
        "bias-one-hidden-key-seen": edit(
            "device=q.device) < visible.lengths[:, None])",
            "device=q.device) <= visible.lengths[:, None])",
            "thu-ml/SpargeAttn#124",
        ),
        "bias-finite-sentinel": edit(
            "masked_fill_(~seen, -math.inf)", "masked_fill_(~seen, -50.0)", "flashinfer-ai/flashinfer#4401"
        ),
        "bias-large-finite-sentinel": edit(
            "masked_fill_(~seen, -math.inf)", "masked_fill_(~seen, -1e4)", "flashinfer-ai/flashinfer#4401"
        ),
    },
    "optimized/routed_attention.py": {
        "pack-scores-left-behind": edit(
            "indices, mask, scores = (t.gather(-1, order) for t in (routes.indices, routes.mask, scores))",
            "indices, mask = (t.gather(-1, order) for t in (routes.indices, routes.mask))\n    scores = routes.scores",
            "masked rows and sentinels",
        ),
        "query-scores-dropped": edit(
            "y = y.transpose(0, 1) * torch.where(q_routes.mask, q_routes.scores, 0)[..., None]",
            "y = y.transpose(0, 1)",
            "lucidrains/CoLT5-attention#8",
        ),
        "masked-query-slots-not-zero": edit(
            "return torch.where(q_routes.mask[..., None], y, 0).to(x.dtype)",
            "return y.to(x.dtype)",
            "trymirai/lalamo#310",
        ),
        "dropout-in-eval": edit("self.dropout if self.training else 0.0", "self.dropout", "dropout"),
    },
    "optimized/attention/torch_flash_cpu.py": {
        "flash-cpu-ignores-dropout": edit(
            'return "no dropout on the CPU" if r.dropout else None', "return None", "dropout"
        ),
    },
    "optimized/ops/expert_attention.py": {
        "experts-null-gradient-dropped": edit(
            'wrt="queries keys_values scores w_q w_kv w_out null_kv",',
            'wrt="queries keys_values scores w_q w_kv w_out",',
            "unslothai/unsloth#4533",
        ),
    },
}
