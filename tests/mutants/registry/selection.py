"""Faults of the selection: the kernel, PyTorch's form, and routing around it."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/kernels/slots.py": {
        "select-kernel-nan-ranks-first": edit(
            "key = tl.where(s != s, lowest + 2, key)", "key = tl.where(s != s, ones, key)", "NaN order"
        ),
        "select-kernel-signed-zeros-differ": edit(
            "    bits = tl.where(s == 0, 0, bits)  # -0.0 ties with 0.0\n", "", "ties and signed zeros"
        ),
        "select-kernel-negatives-reversed": edit(
            "key = tl.where(bits < 0, bits ^ ones, bits)", "key = bits", "ties and signed zeros"
        ),
        "select-kernel-masked-poison": edit(
            "key = tl.where(valid, key, lowest + 1)", "key = tl.where(valid, key, lowest + 2)", "trymirai/lalamo#310"
        ),
        "select-kernel-one-equal-too-few": edit("(same <= room)", "(same < room)", "vllm-project/vllm-xpu-kernels#453"),
        "select-kernel-equals-and-larger-ones": edit(
            "return above + (total & 0xFFFF), equal + (total >> 16)",
            "return above + (total & 0xFFFF), equal + (total & 0xFFFF)",
            "pytorch/pytorch#150012",
        ),
        "select-kernel-masked-in-between": edit(
            "slot = tl.where(chosen & ~valid, k - room + same, over + between) - 1",
            "slot = over + tl.minimum(same, room) - 1",
            "masked rows and sentinels",
        ),
        "select-kernel-inverse-of-masked": edit(
            "tl.where(chosen & valid, slot, -1), mask=inside",
            "tl.where(chosen, slot, -1), mask=inside",
            "trymirai/lalamo#310",
        ),
        "select-kernel-inverse-unwritten": edit(
            "tl.where(chosen & valid, slot, -1), mask=inside",
            "tl.where(chosen & valid, slot, -1), mask=chosen",
            "tile-ai/tilelang#2461",
        ),
        "select-kernel-inverse-of-the-other-group": edit("        inverse_0 = inverse_1\n", "", "BobMcDear/attorch#14"),
        "select-kernel-unit-scores-hide-nan": edit(
            'tl.store(picked_ptr + slot, tl.where(poisoned > 0, float("nan"), picked), mask=chosen)',
            "tl.store(picked_ptr + slot, picked, mask=chosen)",
            "straight-through",
        ),
        "select-kernel-unit-scores-of-masked": edit(
            "picked = valid.to(picked_ptr.dtype.element_ty)",
            "picked = chosen.to(picked_ptr.dtype.element_ty)",
            "straight-through",
        ),
        "select-kernel-sigmoid-of-masked": edit(
            "tl.where(valid, soft, 0.0), mask=chosen", "soft, mask=chosen", "masked tokens leak"
        ),
        "select-kernel-straight-through-sigmoid-hides-nan": edit(
            "soft = tl.where(soft == soft, 1.0, soft)", "soft = tl.where(valid, 1.0, 0.0)", "NaN order"
        ),
        "select-kernel-straight-through-sigmoid-is-soft": edit(
            "        if UNIT:\n            soft = tl.where(soft == soft, 1.0, soft)\n", "", "straight-through"
        ),
    },
    "optimized/kernels/selection.py": {
        "select-kernel-low-bits-undecided": edit(
            "while (shift >= 0) & (found != k):", "while (shift > 0) & (found != k):", "ties and signed zeros"
        ),
        "select-kernel-masked-are-all-in": edit(
            "all_in = (found == k) & (least > lowest + 1)", "all_in = found == k", "masked rows and sentinels"
        ),
        "select-kernel-scores-strided": edit(
            "s if scores is None else scores.contiguous()",
            "s if scores is None else scores",
            "unslothai/unsloth#10617",
            "stride and layout",
        ),
    },
    "optimized/kernels/long_selection.py": {
        "long-select-least-key-left-out": edit(
            "return tl.where(all_in, least - 1, least), tl.where(",
            "return least, tl.where(",
            "ties and signed zeros",
        ),
        "long-select-chunk-before-forgotten": edit("each < chunk, table", "each < chunk - 1, table", "tail mask"),
        "long-select-keys-that-begin-otherwise": edit(
            ">> (shift + DIGIT).to(key_type)) == 0", ">> shift.to(key_type)) == 0", "ties and signed zeros"
        ),
        "long-select-masked-are-all-in": edit(
            "(least != 0) & (least != 1)", "(least != 0)", "masked rows and sentinels"
        ),
        "long-select-chunks-before-by-the-last-digit": edit(
            "            before += more\n    tl.store(before_ptr",
            "            before = more\n    tl.store(before_ptr",
            "stale saved tensor",
        ),
        "long-select-poison-of-the-last-block": edit(
            "poisoned = tl.maximum(poisoned, tl.max((key == lowest + 2).to(tl.int32)))",
            "poisoned = tl.max((key == lowest + 2).to(tl.int32))",
            "pytorch/pytorch#153799",
        ),
        "long-select-poison-of-the-own-chunk": edit(
            "poisoned = tl.max(tl.load(nan_ptr + row * CHUNKS + each, mask=each < chunks, other=0))",
            "poisoned = tl.load(nan_ptr + row * CHUNKS + chunk)",
            "NaN order",
        ),
        "long-select-scores-strided": edit(
            "s if scores is None else scores.contiguous()",
            "s if scores is None else scores",
            "unslothai/unsloth#10617",
            "stride and layout",
        ),
    },
    "optimized/ops/select.py": {
        "select-one-equal-too-few": edit(
            "(equal.cumsum(-1) <= room)", "(equal.cumsum(-1) < room)", "vllm-project/vllm-xpu-kernels#453"
        ),
        "select-signed-zeros-differ": edit("floats = logits + 0.0", "floats = logits", "ties and signed zeros"),
        "select-nan-ranks-first": edit(
            "logits.isnan(), torch.iinfo(torch.int64).min + 1",
            "logits.isnan(), torch.iinfo(torch.int64).max",
            "NaN order",
        ),
        "select-masked-ties-with-nan": edit(
            "key = key.masked_fill(~mask[:, None], torch.iinfo(torch.int64).min)",
            "key = key.masked_fill(~mask[:, None], torch.iinfo(torch.int64).min + 1)",
            "NaN order",
        ),
        "select-inverse-of-masked": edit(
            "inverse = torch.where(valid, slot, -1)", "inverse = torch.where(chosen, slot, -1)", "trymirai/lalamo#310"
        ),
        "select-fake-of-another-dtype": edit(
            "torch.empty_like(a.logits, dtype=torch.int32, memory",
            "torch.empty_like(a.logits, dtype=torch.int64, memory",
            "fake tensors",
        ),
    },
    "optimized/ops/rows.py": {
        "inverse-map-of-masked": edit(
            "return empty.scatter(-1, indices, torch.where(mask, slots, -1))",
            "return empty.scatter(-1, indices, slots.expand_as(indices))",
            "trymirai/lalamo#310",
        ),
    },
    "optimized/ops/pick.py": {
        "blocks-nan-of-one-block-alone-is-constant": edit(
            "(inverse < 0) | _poisoned(logits, mask), 0)",
            "(inverse < 0) | (_poisoned(logits, mask) & logits.isnan()), 0)",
            "NaN order",
        ),
        "sigmoid-constant-where-all-are-taken": edit(
            "(a.logits.shape[-1] <= a.k and not Solver.of(a).sigmoid)", "a.logits.shape[-1] <= a.k", "missing gradient"
        ),
        "sigmoid-a-nan-is-every-slots": edit(
            "if solver is not None and not sigmoid:", "if solver is not None:", "NaN order"
        ),
        "sigmoid-gradient-of-the-score": edit("(soft * (1 - soft))", "soft", "straight-through"),
        "sigmoid-gradient-of-what-nobody-picked": edit(
            "    return dense.masked_fill_(inverse < 0, 0)\n", "    return dense\n", "masked tokens leak"
        ),
        "blocks-mass-of-the-whole-row": edit(
            "soft, *rest = solver.solve(folded, _folded(part, mask), (part.k,), triton)",
            "soft, *rest = solver.solve(folded, _folded(part, mask), (sum(p.slots for p in parts),), triton)",
            "mass",
        ),
        "blocks-short-block-is-scored": edit(
            "if part.takes_all:  # without a solver, hence without state",
            "if not part.length:",
            "NVIDIA-NeMo/Automodel#3035",
        ),
        "blocks-masked-slots-in-between": edit(
            "    indices, taken, inverse = place(chosen, mask, slots)\n",
            (
                "    indices, taken, inverse = place(chosen, None, slots)\n"
                "    if mask is not None:\n"
                "        inverse = inverse.masked_fill(~mask[:, None], -1)\n"
                "        taken = mask[:, None].expand_as(logits).gather(-1, indices)\n"
            ),
            "masked rows and sentinels",
        ),
    },
    "optimized/ops/blocks.py": {
        "blocks-fake-of-an-empty-row": edit(
            "least = torch.sym_min(n, min(k, 2))", "least = torch.sym_min(n + 1, min(k, 2))", "fake tensors"
        ),
        "blocks-last-block-at-the-start": edit(
            "rows[..., self.start : self.start + self.length * self.count]",
            "rows[..., : self.length * self.count]",
            "fla-org/flash-linear-attention#1115",
            "tail mask",
        ),
        "blocks-tail-without-slots-in-the-fake": edit(
            "slots = n // block * torch.sym_min(each, block) + torch.sym_min(each, n % block)",
            "slots = n // block * torch.sym_min(each, block)",
            "AMD-AGI/Primus-Turbo#362",
        ),
    },
    "optimized/routing.py": {
        "compiled-order-of-one-token-more-than-slots": edit(
            "later = n * min(max(n - k, 0), 1)",
            "later = n * min(max(n - k - 1, 0), 1)",
            "masked rows and sentinels",
        ),
        "order-of-all-tokens-not-restored": edit(
            "if mask is None or (not torch.compiler.is_compiling() and n > k):",
            "if mask is None or not torch.compiler.is_compiling():",
            "masked rows and sentinels",
        ),
    },
}
