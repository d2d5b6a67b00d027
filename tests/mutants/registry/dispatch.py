"""Faults of the moves between tokens and slots, of the norm, of rotations, and of how operators are registered."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/ops/rows.py": {
        "dispatch-masked-slots-multiplied": edit(
            "return rows.masked_fill_(~slots.transpose(0, 1)[..., None], 0)",
            "return rows * slots.transpose(0, 1)[..., None]",
            "fla-org/flash-linear-attention#77",
            "masked rows and sentinels",
        ),
        "collect-slot-0-of-the-unrouted": edit(
            ".masked_fill_((slot < 0)[..., None], 0)", "", "vllm-project/vllm#48371"
        ),
        "collect-rows-of-one-item": edit(
            "out += rows[e][items, slot.clamp_min(0)]",
            "out += rows[e][:1].expand_as(rows[e])[items, slot.clamp_min(0)]",
            "pytorch/pytorch#139462",
        ),
    },
    "optimized/ops/combine.py": {
        "collect-sums-in-the-models-dtype": edit(
            "out = add_rows(a.y.to(wide) * _by_slot(a.scores).to(wide), a.inverse)",
            "out = add_rows((a.y.to(wide) * _by_slot(a.scores).to(wide)).to(a.y.dtype), a.inverse).to(wide)",
            "evintunador/triton_docs_tutorials#6",
        ),
    },
    "optimized/ops/gather_norm.py": {
        "dispatch-fake-of-another-shape": edit(
            "a.x.new_empty(experts, batch, k, a.x.shape[-1]), norms",
            "a.x.new_empty(batch, experts, k, a.x.shape[-1]), norms",
            "AMD-AGI/Primus-Turbo#362",
        ),
        "norm-by-the-inverse-root": edit(
            "return _gamma(gamma, x) * x.shape[-1] ** 0.5",
            "return _gamma(gamma, x) * x.shape[-1] ** -0.5",
            "log-sum-exp and scale",
        ),
        "norm-in-the-models-dtype": edit(
            "return t.to(torch.promote_types(t.dtype, torch.float32))", "return t", "precision"
        ),
    },
    "optimized/ops/operator.py": {
        "registration-tangents-dropped": edit(
            "if forward_mode or transformed:", "if transformed:", "Dao-AILab/flash-attention#1817", "transforms"
        ),
        "registration-first-input-decides": edit(
            "if t is not None and t.requires_grad:",
            "if args[0].requires_grad:",
            "pytorch/pytorch#188302",
        ),
        "registration-dispatch-modes-overlooked": edit(
            "    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():\n"
            "        return False\n",
            "",
            "shawntan/scattermoe#12",
        ),
        "operator-all-results-differentiable": edit(
            "ctx.mark_non_differentiable(*self._stopping(results))",
            "pass",
            "Dao-AILab/flash-attention#1817",
        ),
        "operator-compiled-tangents-dropped": edit(
            '            if forward_mode:\n                self._refuse("forward-mode differentiation")\n',
            "",
            "Dao-AILab/flash-attention#1817",
            "transforms",
        ),
        "operator-needs-shifted": edit("bool(bits >> i & 1)", "bool(bits >> (i + 1) & 1)", "pytorch/pytorch#188302"),
        "operator-same-randomness-draws-anew": edit(
            "enabled=bool(same) and i + 1 < info.batch_size", "enabled=False", "transforms"
        ),
        "operator-random-under-error": edit(
            "def _refuse_random(name: str) -> None:\n    raise RuntimeError(",
            "def _refuse_random(name: str) -> None:\n    RuntimeError(",
            "transforms",
        ),
        "operator-different-randomness-shares-a-draw": edit(
            "vmap.randomness() == functorch.RandomnessType.Different and not any(",
            "vmap.randomness() == functorch.RandomnessType.Same and not any(",
            "Dao-AILab/flash-attention#314",
            "transforms",
        ),
    },
    "optimized/kernels/rotary.py": {
        "rotary-kernel-turns-back": edit("        if TRANSPOSED:\n", "        if not TRANSPOSED:\n", "rotary"),
        "rotary-kernel-one-half-for-both": edit(
            "second = t2 * cos2 - t1 * sin1", "second = t2 * cos2 - t1 * sin2", "rotary"
        ),
        "rotary-kernel-positions-of-row-0": edit(
            "position = tl.load(positions_ptr + slot)",
            "position = tl.load(positions_ptr + place)",
            "fla-org/flash-linear-attention#1115",
        ),
        "rotary-kernel-strided": edit(
            "t = t if t.stride(-1) == 1 else t.contiguous()", "t = t.detach()", "Dao-AILab/flash-attention#355"
        ),
        "rotary-kernel-first-heads-again": edit(
            "h = start + tl.arange(0, BLOCK_H)", "h = tl.arange(0, BLOCK_H)", "triton-lang/triton#621"
        ),
        "rotary-kernel-in-float32": edit("DTYPE=arithmetic(t.dtype)", "DTYPE=tl.float32", "precision"),
    },
    "optimized/ops/rotary.py": {
        "rotary-gradient-turns-on": edit(
            "a.positions, not a.transposed, a.triton)", "a.positions, a.transposed, a.triton)", "rotary"
        ),
        "rotary-gradient-at-other-positions": edit(
            "rotary.raw(g.out, a.cos, a.sin, a.positions,",
            "rotary.raw(g.out, a.cos, a.sin, None,",
            "stale saved tensor",
        ),
        "rotary-fake-strided": edit(
            "return torch.empty_like(a.t, memory_format=torch.contiguous_format)",
            "return torch.empty_like(a.t)",
            "AMD-AGI/Primus-Turbo#362",
        ),
        "rotate-by-slot": edit(
            "at = slice(t.shape[1]) if positions is None else positions", "at = slice(t.shape[1])", "rotary"
        ),
        "rotate-other-half-negated": edit(
            "torch.addcmul(t1 * cos1, t2, sin1, value=-1), torch.addcmul(t2 * cos2, t1, sin2)",
            "torch.addcmul(t1 * cos1, t2, sin1), torch.addcmul(t2 * cos2, t1, sin2, value=-1)",
            "rotary",
        ),
    },
    "optimized/routed_attention.py": {
        "norm-floor-added": edit(".clamp_min(1e-12)", ".add(1e-6)", "precision"),
        "norm-gamma-of-expert-0": edit("scale[:, None, None]", "scale[:1, None, None]", "BobMcDear/attorch#14"),
        "norm-gamma-without-gradient": edit(
            "scale = gamma.squeeze(-1)", "scale = gamma.detach().squeeze(-1)", "unslothai/unsloth#4533"
        ),
        "rotate-tables-in-the-models-dtype": edit(
            "angles.cos().to(wide), angles.sin().to(wide)",
            "angles.cos().to(plan.dtype), angles.sin().to(plan.dtype)",
            "precision",
        ),
        "norm-module-by-the-inverse-root": edit(
            "rows.shape[-1] ** 0.5", "rows.shape[-1] ** -0.5", "zetascale 2.8.8 (2)"
        ),
        "norm-module-in-the-models-dtype": edit(
            "wide = rows.to(torch.promote_types(rows.dtype, torch.float32))", "wide = rows", "precision"
        ),
        "rotate-angles-not-promoted": edit(
            "angles = rotary_emb.to(torch.promote_types(rotary_emb.dtype, wide))", "angles = rotary_emb", "precision"
        ),
    },
}
