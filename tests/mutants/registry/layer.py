"""Faults of the layer's own code, of the choice of backends, and of checks that guard data."""

from ..mutant import Mutant

MIXTURE = "optimized/mixture.py"
BACKENDS = "optimized/backends.py"
VALIDATION = "optimized/validation.py"

MUTANTS = (
    Mutant(
        "injected-routes-of-masked-tokens",
        MIXTURE,
        "routes._replace(mask=routes.mask & tokens.gather(-1, routes.indices))",
        "routes",
        "masked tokens leak",
        "trymirai/lalamo#310: padded tokens leak",
    ),
    Mutant(
        "slots-of-the-other-side",
        MIXTURE,
        "return k_q, k_kv",
        "return k_q, k_q",
        "configuration",
    ),
    Mutant(
        "explained-with-dropout-in-eval",
        MIXTURE,
        "dropout = self.dropout if self.training else 0.0",
        "dropout = self.dropout",
        "choice of backend",
    ),
    Mutant(
        "backend-gives-way",
        BACKENDS,
        "    backend = _by_name(stage, name)\n    reason = backend.obstacle(request)\n    if reason is not None:\n",
        "    backend = _by_name(stage, name)\n    reason = backend.obstacle(request)\n    if reason is not None:\n"
        "        return next(b for b in REGISTRY[stage] if b.obstacle(request) is None)\n",
        "choice of backend",
    ),
    Mutant(
        "backend-not-restored",
        BACKENDS,
        "        _chosen.update(self._previous)\n",
        "        self._previous.clear()\n",
        "choice of backend",
    ),
    Mutant(
        "routes-repeat-a-token-apart",
        VALIDATION,
        "if (indices.sort(dim=-1).values.diff(dim=-1) == 0).any():",
        "if (indices.diff(dim=-1) == 0).any():",
        "validation",
    ),
    Mutant("routes-one-past-the-end", VALIDATION, "low < 0 or high >= n", "low < 0 or high > n", "validation"),
    Mutant(
        "routes-negative-index",
        VALIDATION,
        "low < 0 or high >= n",
        "high >= n",
        "validation",
        "vllm-project/vllm#48371: index -1",
    ),
    Mutant(
        "mask-of-integers",
        VALIDATION,
        "x.shape[dim], dtypes=(torch.bool,), beside=x",
        "x.shape[dim], dtypes=(torch.bool, torch.uint8), beside=x",
        "validation",
    ),
    Mutant(
        "rotary-gradient-ignored",
        VALIDATION,
        "    if rotary_emb.requires_grad:\n"
        '        reject("rotary_emb", "angles that need no gradient", "requires_grad=True")\n',
        "",
        "validation",
        "Dao-AILab/flash-attention#1817: a gradient silently zero",
    ),
    Mutant("dropout-of-everything", VALIDATION, "lambda v: 0 <= v < 1)", "lambda v: 0 <= v <= 1)", "validation"),
    Mutant(
        "autocast-of-float64",
        VALIDATION,
        "torch.is_autocast_enabled(value.device.type) and torch.float64 not in (value.dtype, other.dtype)",
        "torch.is_autocast_enabled(value.device.type)",
        "validation",
    ),
    Mutant(
        "batch-of-the-context",
        MIXTURE,
        'validation.tensor("context", context, x.shape[0], "M", self.dim_context',
        'validation.tensor("context", context, "B", "M", self.dim_context',
        "validation",
    ),
)
