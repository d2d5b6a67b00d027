"""The classes of bugs that this layer can have, and the public bugs that faults re-enact."""

from __future__ import annotations

CLASSES = (
    "missing gradient",
    "stride and layout",
    "tail mask",
    "uninitialised output",
    "masked rows and sentinels",
    "masked tokens leak",
    "32-bit index",
    "log-sum-exp and scale",
    "window",
    "causality",
    "configuration",
    "stale saved tensor",
    "dropout",
    "ties and signed zeros",
    "NaN order",
    "empty input",
    "fake tensors",
    "expert mix-up",
    "batch mix-up",
    "precision",
    "host synchronisation",
    "rotary",
    "in-place modification",
    "straight-through",
    "mass",
    "combination",
    "transforms",
    "choice of backend",
    "validation",
)

# By repository and thread, or by release and (number in the table of README.md): its class, and what went wrong.
PUBLIC = {
    "AMD-AGI/Primus-Turbo#362": ("fake tensors", "fake tensors unlike the real ones, in their strides too"),
    "BobMcDear/attorch#14": ("expert mix-up", "all heads read head 0"),
    "Dao-AILab/flash-attention#1251": ("dropout", "dropout of forward and backward differ"),
    "Dao-AILab/flash-attention#1817": ("missing gradient", "gradient through a second output silently zero"),
    "Dao-AILab/flash-attention#2033": ("choice of backend", "a race"),
    "Dao-AILab/flash-attention#2324": ("uninitialised output", "gradients of padding unwritten"),
    "Dao-AILab/flash-attention#2562": ("empty input", "zero-length sequences"),
    "Dao-AILab/flash-attention#314": ("dropout", "consecutive calls share one mask"),
    "Dao-AILab/flash-attention#355": ("stride and layout", "a gradient that is not contiguous"),
    "Dao-AILab/flash-attention#442": ("masked rows and sentinels", "fully masked rows"),
    "Dao-AILab/flash-attention#581": ("causality", "alignment of the causal mask"),
    "NVIDIA-NeMo/Automodel#3035": ("tail mask", "top-k of more than there are"),
    "NVIDIA/Megatron-LM#1598": ("host synchronisation", "host synchronisation breaks CUDA graphs"),
    "PythonOT/POT#394": ("missing gradient", "wrong gradient at a constraint, which is lost"),
    "ROCm/TransformerEngine#623": ("stride and layout", "gradient of stride 0"),
    "ROCm/aiter#5067": ("stride and layout", "unaligned views"),
    "colt5-attention 0.11.2 (7)": ("missing gradient", "the Triton gradient of coordinate descent is wrong"),
    "colt5-attention 0.11.2 (9)": ("configuration", "route_block_size raises IndexError with several blocks"),
    "colt5-attention 0.11.2 (11)": ("configuration", "learned_routing_tokens can't be used from the layer"),
    "colt5-attention 0.11.2 (15)": ("batch mix-up", "item b gets the tokens of item b // E"),
    "databricks/megablocks#186": ("32-bit index", "int32 offsets"),
    "deep-spin/entmax#32": ("masked rows and sentinels", "peaked scores"),
    "evintunador/triton_docs_tutorials#6": ("precision", "low precision by default"),
    "fla-org/flash-linear-attention#1080": ("32-bit index", "int32 offsets"),
    "fla-org/flash-linear-attention#1115": ("batch mix-up", "missing batch offset"),
    "fla-org/flash-linear-attention#1140": ("missing gradient", "wrong across chunks"),
    "fla-org/flash-linear-attention#1214": ("log-sum-exp and scale", "exponentials out of range"),
    "fla-org/flash-linear-attention#77": ("masked tokens leak", "NaN spreads"),
    "flagos-ai/FlagGems#3716": ("tail mask", "masked loads feed reductions"),
    "flashinfer-ai/flashinfer#4401": ("masked rows and sentinels", "finite sentinel"),
    "huggingface/transformers#39408": ("window", "window off by one"),
    "intel/ipex-llm#12619": ("log-sum-exp and scale", "scale after head-dim padding"),
    "jax-ml/jax#39576": ("causality", "window sees the future"),
    "linkedin/Liger-Kernel#1305": ("in-place modification", "in-place gradients"),
    "local-attention 1.11.2 (5)": ("masked tokens leak", "padding keys take softmax mass, N no multiple of the window"),
    "local-attention 1.11.2 (6)": ("rotary", "queries rotated a window too far: scores depend on i - j + w"),
    "lucidrains/CoLT5-attention#8": ("missing gradient", "Triton coordinate descent: partial sums, gradients are lost"),
    "lucidrains/local-attention#5": ("window", "`and` for `or` in the exact window"),
    "lucidrains/native-sparse-attention-pytorch#31": ("missing gradient", "a term of the gradient"),
    "lucidrains/native-sparse-attention-pytorch#33": ("tail mask", "unmasked store"),
    "microsoft/onnxruntime#28904": ("masked rows and sentinels", "masked row is the mean of v"),
    "mixture-of-attention 0.0.25 (3)": ("expert mix-up", "chunk over grouped channels: keys, values mixed"),
    "mixture-of-attention 0.0.25 (4)": ("combination", "N <= K: no local attention, experts averaged unasked"),
    "mixture-of-attention 0.0.25 (13)": ("precision", "bfloat16 with local attention raises"),
    "pytorch/pytorch#103963": ("masked rows and sentinels", "NaN of fully masked rows"),
    "pytorch/pytorch#139462": ("batch mix-up", "wrong for batch > 0"),
    "pytorch/pytorch#150012": ("ties and signed zeros", "ties differ with the size"),
    "pytorch/pytorch#153799": ("tail mask", "wrong only beyond a block"),
    "pytorch/pytorch#158212": ("tail mask", "the last block: keys past the end"),
    "pytorch/pytorch#176793": ("tail mask", "gradients past the last query and block"),
    "pytorch/pytorch#181645": ("log-sum-exp and scale", "off by ln 2"),
    "pytorch/pytorch#188302": ("missing gradient", "only one input needs a gradient"),
    "pytorch/pytorch#190857": ("32-bit index", "int32 offsets"),
    "pytorch/pytorch#191937": ("masked tokens leak", "number of keys"),
    "pytorch/pytorch#196678": ("masked rows and sentinels", "NaN gradient of masked rows"),
    "pytorch/pytorch#197563": ("dropout", "seed read before it is filled"),
    "sgl-project/sglang#20389": ("32-bit index", "int32 offsets"),
    "sgl-project/sglang#33064": ("log-sum-exp and scale", "base of the lse"),
    "shawntan/scattermoe#12": ("transforms", "compilation fails"),
    "tenstorrent/tt-metal#53204": ("missing gradient", "dx subtracts the mean twice"),
    "thu-ml/SageAttention#371": ("host synchronisation", "graph replay stale"),
    "thu-ml/SageAttention#386": ("32-bit index", "int32 offsets"),
    "thu-ml/SpargeAttn#124": ("masked tokens leak", "padding: lanes past the end"),
    "tile-ai/tilelang#2461": ("uninitialised output", "elements that nobody writes"),
    "triton-lang/triton#5660": ("missing gradient", "wrong gradient of attention with causal=False"),
    "triton-lang/triton#621": ("tail mask", "heads beyond a fixed number, head dimension hard-coded"),
    "trymirai/lalamo#310": ("masked tokens leak", "padded tokens leak through the scatter"),
    "unslothai/unsloth#10617": ("missing gradient", "RMSNorm backward, wrong in 254 of 472 layouts"),
    "unslothai/unsloth#4533": ("missing gradient", "gradient of a weight None"),
    "vllm-project/vllm#47079": ("log-sum-exp and scale", "base-2 lse in a base-e merge"),
    "vllm-project/vllm#48371": ("masked rows and sentinels", "index -1"),
    "vllm-project/vllm-xpu-kernels#453": ("ties and signed zeros", "tokens dropped, all but one"),
    "zetascale 2.8.8 (1)": ("validation", "the documented examples raise TypeError"),
    "zetascale 2.8.8 (2)": ("log-sum-exp and scale", "RMSNorm scales by D**-0.5 instead of D**0.5"),
}


def classify(why: str, bug: str = "") -> tuple[str, str]:
    """Class and public bug ("own": none) of a fault. why: a class, or a public bug, of its class unless `bug` differs.

    Raises ValueError where either is unknown.
    """
    public = why if why in PUBLIC else "own"
    found = bug or PUBLIC.get(why, (why,))[0]
    if found not in CLASSES or (bug and public == "own"):
        raise ValueError(f"why: expected a class of bugs or a public bug, got {why!r} of {bug!r}")
    return found, public


def described(public: str) -> str:
    """A public bug as reports name it."""
    return f"{public}: {PUBLIC[public][1]}" if public in PUBLIC else public
