"""Faults that a CPU can't tell from the original: kernels it does not run, sizes it does not reach."""

from functools import partial

from .. import mutant
from ..mutant import Edits

edit = partial(mutant.edit, device="cuda")

EDITS: Edits = {
    "optimized/kernels/selection.py": {
        "select-kernel-row-of-32-bits": edit(
            "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "fla-org/flash-linear-attention#1080"
        ),
    },
    "optimized/kernels/long_selection.py": {
        "long-select-row-of-32-bits": edit(
            '    """turn: that of the last digit."""\n    row = tl.program_id(0).to(tl.int64)',
            '    """turn: that of the last digit."""\n    row = tl.program_id(0)',
            "fla-org/flash-linear-attention#1080",
        ),
    },
    "optimized/kernels/coordinate_descent.py": {
        "descent-kernel-row-of-32-bits": edit(
            "    row = tl.program_id(0).to(tl.int64)\n    s_ptr += row * n\n    scores_ptr += row * n\n",
            "    row = tl.program_id(0)\n    s_ptr += row * n\n    scores_ptr += row * n\n",
            "databricks/megablocks#186",
        ),
    },
    "optimized/kernels/combine.py": {
        "combine-kernel-token-of-32-bits": edit(
            "token = tl.program_id(0).to(tl.int64)  # (b, n)",
            "token = tl.program_id(0)  # (b, n)",
            "thu-ml/SageAttention#386",
        ),
        "combine-kernel-unmasked-store": edit(
            "total.to(out_ptr.dtype.element_ty), mask=inside)",
            "total.to(out_ptr.dtype.element_ty))",
            "lucidrains/native-sparse-attention-pytorch#33",
        ),
    },
    "optimized/kernels/null_slot.py": {
        "null-kernel-item-of-32-bits": edit(
            "(program // heads // chunks).to(tl.int64)", "program // heads // chunks", "sgl-project/sglang#20389"
        ),
    },
    "optimized/kernels/rotary.py": {
        "rotary-kernel-slot-of-32-bits": edit(
            "slot = tl.program_id(0).to(tl.int64)", "slot = tl.program_id(0)", "pytorch/pytorch#190857"
        ),
    },
    "reference/contract.py": {
        "routes-read-while-capturing": edit(
            "return not (t.is_cuda and torch.cuda.is_current_stream_capturing())",
            "return True",
            "NVIDIA/Megatron-LM#1598",
        ),
    },
    "optimized/attention/torch_efficient.py": {
        "efficient-draw-on-the-host-while-capturing": edit(
            'device=q.device if captured else "cpu"',
            'device="cpu"',
            "thu-ml/SageAttention#371",
            equivalent="With dropout the kernel itself returns where its draw came from, on "
            "the GPU while capturing; this stands in for it where nothing was "
            "drawn, and nothing reads it.",
        ),
        "efficient-lse-padding-of-the-other-sign": edit(
            "(rows, heads, -(-length // LSE_BLOCK) * LSE_BLOCK), math.inf)",
            "(rows, heads, -(-length // LSE_BLOCK) * LSE_BLOCK), -math.inf)",
            "pytorch/pytorch#176793",
        ),
    },
    "optimized/attention/calls.py": {
        "attention-scale-of-the-padded-dimension": edit(
            "out, lse, state = adapter.forward(*qkv, setting)",
            "out, lse, state = adapter.forward(*qkv, replace(setting, scale=qkv[0].shape[-1] ** -0.5))",
            "intel/ipex-llm#12619",
        ),
    },
    "optimized/attention/flash_attn_4.py": {
        "flash-4-alignment-of-8": edit(
            "    alignment = 32\n", "    alignment = 8\n", "triton-lang/triton#621", "configuration"
        ),
        "flash-4-hidden-keys-unwritten": edit(
            "            dk.zero_()\n            dv.zero_()\n",
            "            dk.zero_()\n",
            "Dao-AILab/flash-attention#2324",
        ),
    },
    "optimized/attention/lengths.py": {
        "offsets-one-key-too-many": edit(
            "torch.stack((k_starts[:-1] + lengths, k_starts[1:]), 1)",
            "torch.stack(((k_starts[:-1] + lengths + 1).minimum(k_starts[1:]), k_starts[1:]), 1)",
            "pytorch/pytorch#191937",
        ),
    },
    "optimized/attention/flash_attn_2.py": {
        "flash-2-backward-not-deterministic": edit(
            '"deterministic": torch.are_deterministic_algorithms_enabled(),',
            '"deterministic": False,',
            "Dao-AILab/flash-attention#2033",
            "configuration",
        ),
        "flash-2-dropout-drawn-again": edit(
            '"rng_state": state if setting.dropout else None,',
            '"rng_state": torch.zeros_like(state) if setting.dropout else None,',
            "Dao-AILab/flash-attention#1251",
        ),
    },
    "optimized/attention/torch_flash.py": {
        "torch-flash-dropout-drawn-again": edit(
            "draw = state if setting.dropout else",
            "draw = torch.zeros_like(state) if setting.dropout else",
            "pytorch/pytorch#197563",
        ),
    },
    "optimized/attention/flex_window.py": {
        "flex-window-one-short": edit("(i - j <= window)", "(i - j < window)", "huggingface/transformers#39408"),
    },
    "optimized/attention/banded.py": {
        "local-rows-of-padding-see-nothing": edit(
            "return seen.logical_or_(offset == 0)",
            "return seen",
            "pytorch/pytorch#103963",
            equivalent="PyTorch's kernels return zeros for a row that sees nothing, and "
            "gradients of 0: seen with its efficient and its plain attention in "
            "every dtype (torch 2.11, H200).",
        ),
    },
    "optimized/attention/torch_cudnn.py": {
        "cudnn-in-deterministic-mode": edit(
            (
                "        if torch.are_deterministic_algorithms_enabled():\n"
                '            return "its backward is not deterministic"\n'
            ),
            "",
            "Dao-AILab/flash-attention#2033",
        ),
        "cudnn-half-a-tile-not-handed-over": edit(
            "return keys % TILE == TILE // 2", "return keys % TILE == 0", "choice of backend"
        ),
    },
    "optimized/attention/__init__.py": {
        "flash-window-takes-a-mask": edit(
            'return library.ADAPTER.obstacle(r) or ("takes no mask" if r.masked else None)',
            "return library.ADAPTER.obstacle(r)",
            "choice of backend",
        ),
    },
    "optimized/attention/interface.py": {
        "window-sides-swapped": edit(
            "return self.window, 0 if self.causal and self.window >= 0 else self.window",
            "return 0 if self.causal and self.window >= 0 else self.window, self.window",
            "jax-ml/jax#39576",
        ),
    },
}
