"""Faults of the layer's own code, of the choice of backends, and of checks that guard data."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/routing.py": {
        "injected-routes-of-masked-tokens": edit(
            "routes._replace(mask=routes.mask & tokens.gather(-1, routes.indices), scores=scores)",
            "routes._replace(scores=scores)",
            "trymirai/lalamo#310",
        ),
        "undecided-tokens-without-gradient": edit(
            "return made._replace(scores=with_zero_gradient(made.scores, own))", "return made", "unslothai/unsloth#4533"
        ),
    },
    "optimized/mixture.py": {
        "slots-of-the-other-side": edit(
            "return call.queries.k, call.keys_values.k,", "return call.queries.k, call.queries.k,", "configuration"
        ),
        "dropout-where-the-whole-layer-trains": edit(
            "dropout=self.dropout if attn.training else 0.0",
            "dropout=self.dropout if attn.training and self.training else 0.0",
            "dropout",
        ),
        "explained-with-dropout-in-eval": edit(
            "dropout=self.dropout if attn.training else 0.0",
            "dropout=self.dropout",
            "choice of backend",
        ),
        "options-of-the-query-router-for-both": edit(
            "(torch.compiler.is_compiling() or ours.options != theirs.options)",
            "torch.compiler.is_compiling()",
            "configuration",
        ),
        "fused-with-a-context": edit(
            (
                "        if kv.x is not q.x or kv.mask is not q.mask:\n"
                '            return "keys and values come from a context"\n'
            ),
            "",
            "masked tokens leak",
        ),
        "fused-with-injected-routes": edit(
            '        if call.routes is not None:\n            return "routes are injected"\n', "", "configuration"
        ),
    },
    "reference/contract.py": {
        "batch-of-the-context": edit(
            'tensor("context", context, x.shape[0], "M", config.dim_context',
            'tensor("context", context, "B", "M", config.dim_context',
            "validation",
        ),
        "routes-repeat-a-token-apart": edit(
            "if (indices.sort(dim=-1).values.diff(dim=-1) == 0).any():",
            "if (indices.diff(dim=-1) == 0).any():",
            "validation",
        ),
        "routes-one-past-the-end": edit("low < 0 or high >= n", "low < 0 or high > n", "validation"),
        "routes-negative-index": edit("low < 0 or high >= n", "high >= n", "vllm-project/vllm#48371", "validation"),
        "mask-of-any-integers": edit("if low < 0 or high > 1:", "if low < 0:", "validation"),
        "mask-of-integers-by-their-lowest-bit": edit("mask = mask != 0", "mask = (mask & 1).bool()", "validation"),
        "mask-of-another-batch": edit("if mask.shape[0] != batch and mask.shape[0] != 1:", "if False:", "validation"),
        "rotary-last-rows": edit("return rotary_emb[:n]", "return rotary_emb[rotary_emb.shape[0] - n :]", "validation"),
        "parameters-of-submodules-unseen": edit('waiting.append((f"{prefix}{name}.", child))', "pass", "validation"),
        "parameters-of-those-that-cast": edit(
            'if not (state["_forward_pre_hooks"] or "forward" in state):',
            'if not ("forward" in state):',
            "validation",
        ),
        "rotary-gradient-ignored": edit(
            "    if rotary_emb.requires_grad:\n"
            '        reject("rotary_emb", "angles that need no gradient", "requires_grad=True")\n',
            "",
            "Dao-AILab/flash-attention#1817",
            "validation",
        ),
        "dropout-of-everything": edit("lambda v: 0 <= v < 1)", "lambda v: 0 <= v <= 1)", "validation"),
        "autocast-of-float64": edit(
            "if value.is_meta or torch.float64 in (value.dtype, other.dtype):",
            "if value.is_meta:",
            "validation",
        ),
        "distributed-tensors-taken": edit(
            "    if isinstance(value, DTensor):\n",
            "    if isinstance(value, DTensor) and not value.ndim:\n",
            "validation",
        ),
    },
    "optimized/plan.py": {
        "backend-gives-way": edit(
            "    backend = _by_name(stage, name)\n    reason = backend.obstacle(request)\n    if reason is not None:\n",
            "    backend = _by_name(stage, name)\n    reason = backend.obstacle(request)\n"
            "    if reason is not None:\n"
            "        return next(b for b in REGISTRY[stage] if b.obstacle(request) is None)\n",
            "choice of backend",
        ),
        "backend-not-restored": edit(
            "        if not close_block(self):\n", "        if self.stages is None:\n", "choice of backend"
        ),
        "plan-of-another-autocast": edit(
            "key = kind, kind.computed_in, torch", "key = kind, kind.dtype, torch", "choice of backend"
        ),
        "plan-of-another-determinism": edit(
            "key = kind, kind.computed_in, torch.are_deterministic_algorithms_enabled()",
            "key = kind, kind.computed_in, False",
            "Dao-AILab/flash-attention#2033",
        ),
        "plans-outlive-a-choice": edit("algorithms_enabled(), chosen\n", "algorithms_enabled()\n", "choice of backend"),
    },
    "optimized/choice.py": {
        "choice-closes-the-outermost": edit(
            "for i in reversed(range(len(blocks))):", "for i in range(len(blocks)):", "choice of backend"
        ),
    },
    "optimized/plain.py": {
        "plain-forward-hooks-overlooked": edit('    "_forward_hooks": "a forward hook",\n', "", "choice of backend"),
        "plain-forward-pre-hooks-overlooked": edit(
            '    "_forward_pre_hooks": "a forward pre-hook",\n', "", "choice of backend"
        ),
        "plain-backward-hooks-overlooked": edit('    "_backward_hooks": "a backward hook",\n', "", "choice of backend"),
        "plain-backward-pre-hooks-overlooked": edit(
            '    "_backward_pre_hooks": "a backward pre-hook",\n', "", "choice of backend"
        ),
        "plain-replaced-forward-overlooked": edit(
            '        if "forward" in state:\n            return module_name, "has a replaced forward"\n',
            "",
            "choice of backend",
        ),
        "plain-parametrization-overlooked": edit(
            "if type(module) is not cls:", "if not isinstance(module, cls):", "choice of backend"
        ),
        "plain-global-hooks-overlooked": edit(
            '        if hooked:\n            return module_name, "meets a hook of all modules"\n',
            "",
            "choice of backend",
        ),
        "plain-tensor-subclass-overlooked": edit(
            "type(parameter) not in _ORDINARY", "not isinstance(parameter, _ORDINARY)", "choice of backend"
        ),
        "plain-bias-overlooked": edit(
            '            if name == "bias" and not bias:\n                return module_name, "has a bias"\n',
            "",
            "choice of backend",
        ),
    },
}
