"""Faults of the moves between tokens and slots, of the norm, of rotations, and of how operators are registered."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/ops/tokens.py": {
        "dispatch-masked-slots-multiplied": edit(
            "rows.masked_fill_(~mask.transpose(0, 1)[..., None], 0)",
            "rows * mask.transpose(0, 1)[..., None]",
            "fla-org/flash-linear-attention#77",
            "masked rows and sentinels",
        ),
        "collect-slot-0-of-the-unrouted": edit(
            ".masked_fill_((slot < 0)[..., None], 0)", "", "vllm-project/vllm#48371"
        ),
        "collect-sums-in-the-models-dtype": edit(
            "wide = torch.promote_types(y.dtype, torch.float32)",
            "wide = y.dtype",
            "evintunador/triton_docs_tutorials#6",
        ),
        "collect-scores-of-one-item": edit(
            "out += y[e][rows, slot.clamp_min(0)]",
            "out += y[e][:1].expand_as(y[e])[rows, slot.clamp_min(0)]",
            "pytorch/pytorch#139462",
        ),
        "dispatch-fake-of-another-shape": edit(
            "return x.new_empty(experts, batch, slots, x.shape[-1])",
            "return x.new_empty(batch, experts, slots, x.shape[-1])",
            "AMD-AGI/Primus-Turbo#362",
        ),
    },
    "optimized/ops/registration.py": {
        "registration-tangents-dropped": edit(
            "if forward_mode or torch._C._functorch.maybe_current_level() is not None:",
            "if torch._C._functorch.maybe_current_level() is not None:",
            "Dao-AILab/flash-attention#1817",
            "transforms",
        ),
        "registration-first-input-decides": edit(
            "any(isinstance(a, Tensor) and a.requires_grad for a in args)",
            "args[0].requires_grad",
            "pytorch/pytorch#188302",
        ),
        "registration-dispatch-modes-overlooked": edit(
            "    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():\n"
            "        return False\n",
            "",
            "shawntan/scattermoe#12",
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
        "rotary-gradient-turns-on": edit("not ctx.transposed)", "ctx.transposed)", "rotary"),
        "rotary-gradient-at-other-positions": edit(
            "ctx.save_for_backward(cos, sin, positions)", "ctx.save_for_backward(cos, sin, None)", "stale saved tensor"
        ),
        "rotary-fake-strided": edit(
            "def _(t, cos, sin, positions, transposed):  # type: ignore[no-untyped-def]\n"
            "    return torch.empty_like(t, memory_format=torch.contiguous_format)",
            "def _(t, cos, sin, positions, transposed):  # type: ignore[no-untyped-def]\n"
            "    return torch.empty_like(t)",
            "AMD-AGI/Primus-Turbo#362",
        ),
    },
    "optimized/routed_attention.py": {
        "norm-by-the-inverse-root": edit("x.shape[-1] ** 0.5", "x.shape[-1] ** -0.5", "log-sum-exp and scale"),
        "norm-floor-added": edit(".clamp_min(1e-12)", ".add(1e-6)", "precision"),
        "norm-gamma-of-expert-0": edit("scale[:, None, None]", "scale[:1, None, None]", "BobMcDear/attorch#14"),
        "norm-gamma-without-gradient": edit(
            "scale = gamma.squeeze(-1)", "scale = gamma.detach().squeeze(-1)", "unslothai/unsloth#4533"
        ),
        "norm-in-the-models-dtype": edit(
            "wide = x.to(torch.promote_types(x.dtype, torch.float32))", "wide = x", "precision"
        ),
        "rotate-by-slot": edit("(table if positions is None else table[positions])", "table[: t.shape[1]]", "rotary"),
        "rotate-other-half-negated": edit("sign[:half] = -1", "sign[half:] = -1", "rotary"),
        "rotate-tables-in-the-models-dtype": edit(
            "cos, sin = cos.to(wide), sin.to(wide)", "cos, sin = cos.to(t.dtype), sin.to(t.dtype)", "precision"
        ),
    },
}
