"""Faults of the combination: the kernel, its operator, and PyTorch's form."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/kernels/combine.py": {
        "combine-kernel-rows-of-other-experts": edit(
            "row = (e * batch + b) * k + slot", "row = (b * experts + e) * k + slot", "BobMcDear/attorch#14"
        ),
        "combine-kernel-mask-of-item-0": edit(
            "    if HAS_MASK:\n        shown = tl.load(mask_ptr + token).to(tl.int32)\n    for start",
            "    if HAS_MASK:\n        shown = tl.load(mask_ptr + position).to(tl.int32)\n    for start",
            "fla-org/flash-linear-attention#1115",
        ),
        "combine-kernel-local-does-not-count": edit(
            "mask=inside, other=0.0).to(DTYPE)\n                terms += 1\n",
            "mask=inside, other=0.0).to(DTYPE)\n",
            "combination",
        ),
        "combine-kernel-gradient-not-averaged": edit(
            "        share /= tl.maximum(terms, 1).to(DTYPE)\n", "", "lucidrains/CoLT5-attention#8", "combination"
        ),
        "combine-kernel-gradient-count-without-local": edit(
            "    if AVERAGE:\n        terms = tl.full((), 1 if HAS_LOCAL else 0, tl.int32)\n",
            "    if AVERAGE:\n        terms = tl.full((), 0, tl.int32)\n",
            "combination",
        ),
        "combine-kernel-score-gradient-of-the-last-piece": edit(
            "dot += tl.sum(g * y)", "dot = tl.sum(g * y)", "lucidrains/CoLT5-attention#8", "tail mask"
        ),
        "combine-kernel-gradient-of-masked-slots": edit(
            "taken = tl.load(slots_ptr + place).to(tl.int32)", "taken = tl.full((), 1, tl.int32)", "trymirai/lalamo#310"
        ),
        "combine-kernel-gradient-of-masked-tokens": edit(
            "    if HAS_MASK:\n        taken = tl.where(tl.load(mask_ptr + b * n + position) != 0, taken, 0)\n",
            "",
            "trymirai/lalamo#310",
        ),
        "combine-kernel-null-gradient-of-one-token": edit(
            "total += tl.where((terms == 0)[:, None], g, 0.0)",
            "total = tl.where((terms == 0)[:, None], g, 0.0)",
            "unslothai/unsloth#4533",
        ),
        "combine-kernel-tail-of-tokens": edit(
            "chunks = cdiv(batch * n, CHUNK)", "chunks = max(batch * n // CHUNK, 1)", "pytorch/pytorch#176793"
        ),
        "combine-kernel-gradient-strided": edit(
            "g, y, inverse = g.contiguous(), y.contiguous(), inverse.contiguous()",
            "y, inverse = y.contiguous(), inverse.contiguous()",
            "ROCm/TransformerEngine#623",
        ),
        "combine-kernel-gradient-dtype": edit(
            "dnull = torch.empty_like(null, memory_format=torch.contiguous_format)",
            "dnull = torch.empty_like(null, dtype=partial.dtype, memory_format=torch.contiguous_format)",
            "precision",
        ),
    },
    "optimized/kernels/partial_sums.py": {
        "sums-second-group-with-the-rows-of-the-first": edit(
            "        rows = rows_1\n", "", "BobMcDear/attorch#14", "stride and layout"
        ),
        "sums-of-the-last-tile": edit("total += tl.load(", "total = tl.load(", "lucidrains/CoLT5-attention#8"),
        "sums-beyond-the-rows": edit("mask=(row < end)[:, None] &", "mask=(row >= 0)[:, None] &", "tail mask"),
        "sums-a-part-beyond-the-rows": edit("tl.minimum(rows, (part + 1) * share)", "(part + 1) * share", "tail mask"),
        "sums-of-parts-rounded": edit(
            "partial.new_empty(groups, parts, width)",
            "one.out.new_empty(groups, parts, width)",
            "precision",
        ),
        "sums-every-part-from-the-first-row": edit(
            "range(part * share, end, ROWS)", "range(0, end, ROWS)", "stride and layout"
        ),
        "sums-last-columns-lost": edit("cdiv(width, columns)", "max(width // columns, 1)", "tail mask"),
        "sums-rows-side-by-side": edit(
            "row[:, None].to(tl.int64) * stride", "row[:, None].to(tl.int64) * width", "stride and layout"
        ),
    },
    "optimized/ops/mixture.py": {
        "at-once-score-gradient-dropped": edit(
            'q_picked=found.pop("scores", None), logits', "q_picked=None, logits", "lucidrains/CoLT5-attention#8"
        ),
        "at-once-null-gradient-dropped": edit(
            'wrt="x q_tokens kv_tokens q_gamma kv_gamma w_q w_kv w_out null_kv null",',
            'wrt="x q_tokens kv_tokens q_gamma kv_gamma w_q w_kv w_out null_kv",',
            "unslothai/unsloth#4533",
        ),
        "at-once-never-averaged": edit('"average": a.average', '"average": False', "combination"),
        "at-once-lengths-without-a-mask": edit("if a.mask is not None:", "if False:", "masked tokens leak"),
        "at-once-positions-of-the-queries": edit(
            "for t in (q_indices, kv_indices))", "for t in (q_indices, q_indices))", "rotary"
        ),
    },
    "optimized/kernels/launch.py": {
        "launch-arithmetic-in-float32": edit(
            "    return tl.float64 if dtype == torch.float64 else tl.float32\n", "    return tl.float32\n", "precision"
        ),
        "launch-widest-block-halved": edit(
            "MAX_BLOCK_D = 4096",
            "MAX_BLOCK_D = 2048",
            "configuration",
            equivalent="only speed: longer rows are read in pieces of any size",
        ),
    },
    "optimized/ops/combine.py": {
        "combine-fake-of-another-dtype": edit(
            "a.y.new_empty(a.y.shape[1], a.inverse.shape[-1], a.y.shape[-1], dtype=a.dtype)",
            "a.y.new_empty(a.y.shape[1], a.inverse.shape[-1], a.y.shape[-1])",
            "AMD-AGI/Primus-Turbo#362",
        ),
        "combine-gradient-strided-unlike-its-fake": edit(
            "dots.transpose(0, 1).to(a.scores.dtype).contiguous()",
            "dots.transpose(0, 1).to(a.scores.dtype)",
            "AMD-AGI/Primus-Turbo#362",
        ),
        "combine-score-gradient-dropped": edit(
            "dots = (rows * a.y.to(wide)).masked_fill_(hidden, 0).sum(-1)",
            "dots = 0 * (rows * a.y.to(wide)).masked_fill_(hidden, 0).sum(-1)",
            "lucidrains/native-sparse-attention-pytorch#31",
        ),
        "combine-null-gradient-dropped": edit(
            'found["null"] = torch.where(count == 0, g, 0)',
            'found["null"] = torch.zeros_like(g)',
            "unslothai/unsloth#4533",
        ),
        "mixture-local-does-not-count": edit(
            "return routed if a.local is None else routed + 1", "return routed", "combination"
        ),
        "mixture-average-over-nothing": edit("out /= count.clamp_min(1)", "out /= count", "combination"),
        "mixture-null-token-where-the-sum-is-zero": edit(
            "out = torch.where(count == 0, a.null",
            "out = torch.where((out == 0).all(-1, keepdim=True), a.null",
            "combination",
        ),
        "mixture-masked-outputs-multiplied": edit(
            "out.masked_fill_(~a.mask[..., None], 0)",
            "out = out * a.mask[..., None]",
            "fla-org/flash-linear-attention#77",
        ),
        "combine-masked-gradients-multiplied": edit(
            "g.to(wide).masked_fill(~a.mask[..., None], 0)",
            "g.to(wide) * a.mask[..., None]",
            "fla-org/flash-linear-attention#77",
        ),
        "mixture-sums-in-the-models-dtype": edit(
            "return torch.promote_types(torch.promote_types(a.y.dtype, a.scores.dtype), torch.float32)",
            "return a.y.dtype",
            "precision",
        ),
    },
}
