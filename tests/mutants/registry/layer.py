"""Faults of the layer's own code, of the choice of backends, and of checks that guard data."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/mixture.py": {
        "injected-routes-of-masked-tokens": edit(
            "routes._replace(mask=routes.mask & tokens.gather(-1, routes.indices))", "routes", "trymirai/lalamo#310"
        ),
        "slots-of-the-other-side": edit("return k_q, k_kv", "return k_q, k_q", "configuration"),
        "explained-with-dropout-in-eval": edit(
            "dropout = self.dropout if self.training else 0.0", "dropout = self.dropout", "choice of backend"
        ),
        "batch-of-the-context": edit(
            'validation.tensor("context", context, x.shape[0], "M", self.dim_context',
            'validation.tensor("context", context, "B", "M", self.dim_context',
            "validation",
        ),
    },
    "optimized/backends.py": {
        "backend-gives-way": edit(
            "    backend = _by_name(stage, name)\n    reason = backend.obstacle(request)\n    if reason is not None:\n",
            "    backend = _by_name(stage, name)\n    reason = backend.obstacle(request)\n"
            "    if reason is not None:\n"
            "        return next(b for b in REGISTRY[stage] if b.obstacle(request) is None)\n",
            "choice of backend",
        ),
        "backend-not-restored": edit(
            "        _chosen.update(self._previous)\n", "        self._previous.clear()\n", "choice of backend"
        ),
    },
    "optimized/validation.py": {
        "routes-repeat-a-token-apart": edit(
            "if (indices.sort(dim=-1).values.diff(dim=-1) == 0).any():",
            "if (indices.diff(dim=-1) == 0).any():",
            "validation",
        ),
        "routes-one-past-the-end": edit("low < 0 or high >= n", "low < 0 or high > n", "validation"),
        "routes-negative-index": edit("low < 0 or high >= n", "high >= n", "vllm-project/vllm#48371", "validation"),
        "mask-of-integers": edit(
            "x.shape[dim], dtypes=(torch.bool,), beside=x",
            "x.shape[dim], dtypes=(torch.bool, torch.uint8), beside=x",
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
            "torch.is_autocast_enabled(value.device.type) and torch.float64 not in (value.dtype, other.dtype)",
            "torch.is_autocast_enabled(value.device.type)",
            "validation",
        ),
    },
}
