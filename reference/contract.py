"""What both packages share: the checks of arguments, and the types that carry what was checked.

No arithmetic. Every refusal is made before any work and reads `argument: expected ..., got ...`. Sizes and other
integers may be symbolic (torch.SymInt), tensors fake, on the meta device, traced or batched: only `routes`, and masks
of integers, are looked at for their values, and only where there are any.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, Protocol, TypeAlias, cast, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Of tokens; the contract makes it bool of (B, N).
TokenMask: TypeAlias = Bool[Tensor, "#B N"] | Integer[Tensor, "#B N"]
ContextMask: TypeAlias = Bool[Tensor, "#B M"] | Integer[Tensor, "#B M"]


class Routes(NamedTuple):
    """What a router decided. Within a row, indices are distinct: valid tokens ascending, then masked ones."""

    indices: Int64[Tensor, "B E K"]
    mask: Bool[Tensor, "B E K"]  # False: the slot holds a masked token and takes part in nothing
    scores: Float[Tensor, "B E K"]
    logits: Float[Tensor, "B E N"]  # of all tokens; 0 where masked

    @property
    def load(self) -> Int64[Tensor, "B E"]:
        """Number of valid tokens that each expert received."""
        return self.mask.sum(dim=-1)


# Refusals


def reject(argument: str, expected: str, value: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `argument: expected ..., got ...`; a string stands as it is, other values are described."""
    raise error(f"{argument}: expected {expected}, got {value if isinstance(value, str) else describe(value)}")


def describe(value: object) -> str:
    """Tensors by dtype, shape, device and unusual layout; other values by their repr, shortened."""
    if isinstance(value, Tensor):
        if value.is_nested:  # which may have no shape to ask for
            return f"{value.dtype}, nested, on {value.device}"
        layout = "" if value.layout is torch.strided else f" in layout {value.layout}"
        return f"{value.dtype} of shape {tuple(value.shape)}{layout} on {value.device}"
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"{type(value).__name__} too long to be written"
    return text if len(text) <= 100 else f"{type(value).__name__} {text[:80]}..."


def integer(argument: str, value: Any, least: int) -> int:
    """A Python int, or the symbolic integer that was given, which stays symbolic."""
    symbolic = isinstance(value, torch.SymInt)  # apart, lest a type checker take it for an int no more
    if symbolic:
        torch._check(value >= least, lambda: f"{argument}: expected an integer >= {least}, got {value}")
        return value
    if not _of_type(value, int, np.integer):
        reject(argument, f"an integer >= {least}", describe(value), TypeError)
    if value < least:
        reject(argument, f"an integer >= {least}", value)
    if not torch.compiler.is_compiling() and value >= 1 << 63:  # traced, it would bound a size that is free
        reject(argument, f"an integer >= {least} and < 2**63", value)
    return int(value)


def _of_type(value: Any, *types: type) -> bool:
    """Python's or NumPy's own: other numbers, fractions say, may do as they like. To NumPy a duration is an integer."""
    return isinstance(value, types) and not isinstance(value, (bool, np.timedelta64))


def positive_int(argument: str, value: Any) -> int:
    return integer(argument, value, least=1)


def number(argument: str, value: Any, expected: str, holds: Callable[[float], bool]) -> float:
    symbolic = isinstance(value, (torch.SymInt, torch.SymFloat))  # apart, as in `integer`
    if symbolic:
        torch._check(holds(value), lambda: f"{argument}: expected {expected}, got {value}")
        return value
    if not _of_type(value, int, float, np.integer, np.floating):
        reject(argument, expected, describe(value), TypeError)
    # Comparisons, which torch.compile takes of symbols too.
    if isinstance(value, int) and not -sys.float_info.max <= value <= sys.float_info.max:
        reject(argument, expected, value)
    double = float(value)  # what it holds of a long double counts
    if not -math.inf < double < math.inf or not holds(double):
        reject(argument, expected, value)
    return double


def span(dtype: torch.dtype) -> tuple[float, float]:
    """Where a temperature, a scale or a mass may lie: beyond, a solver would round it to 0 or get inf, and NaN.

    The least is a normal number; the most stays finite times the logarithm of any number of tokens.
    """
    info = torch.finfo(dtype)  # asked for, not kept: to torch.compile a constant, where a global may be a symbol
    return info.tiny, info.max / 64


def positive(argument: str, value: Any) -> float:
    low, high = span(torch.float64)
    return number(argument, value, f"a finite number > 0, in [{low:.2g}, {high:.2g}]", lambda v: low <= v <= high)


def probability(argument: str, value: Any) -> float:
    return number(argument, value, "a number in [0, 1)", lambda v: 0 <= v < 1)


def flag(argument: str, value: Any) -> bool:
    if not isinstance(value, bool):
        reject(argument, "True or False", describe(value), TypeError)
    return value


def floating_dtype(argument: str, value: Any) -> None:
    """None, or a dtype that parameters may have."""
    if value is not None and value not in FLOATING:
        reject(argument, "float64, float32, float16 or bfloat16", value, TypeError)


def tensor(
    argument: str,
    value: Any,
    *shape: int | str,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    beside: Tensor | None = None,
    dtype_of: tuple[str, Tensor] | None = None,
) -> None:
    """Type, dtype, rank and sizes (a letter stands for a free size), device of `beside`, dtype of `dtype_of`.

    Under autocast `dtype_of` is not asked for: the operations convert.
    """
    if not isinstance(value, Tensor):
        reject(argument, f"a tensor of shape ({', '.join(map(str, shape))})", describe(value), TypeError)
    ordinary(argument, value)
    if value.dtype not in dtypes:
        reject(argument, f"dtype {' or '.join(map(str, dtypes))}", value, TypeError)
    fits = value.ndim == len(shape)
    for size, actual in zip(shape, value.shape):
        fits = fits and (isinstance(size, str) or size == actual)
    if not fits:
        reject(argument, f"shape ({', '.join(map(str, shape))})", value)
    if beside is not None and value.device != beside.device:
        reject(argument, f"device {beside.device}", value)
    if dtype_of is not None:
        _same_dtype(argument, value, *dtype_of)


def _same_dtype(argument: str, value: Tensor, name: str, other: Tensor) -> None:
    if _dtypes_clash(value, other):
        reject(argument, f"dtype {other.dtype}, that of {name}", value, TypeError)


def _dtypes_clash(value: Tensor, other: Tensor) -> bool:
    """Whether they differ, and autocast does not reconcile them: it leaves float64 alone, and knows no meta device."""
    if value.dtype == other.dtype:
        return False
    if value.is_meta or torch.float64 in (value.dtype, other.dtype):
        return True
    return not torch.is_autocast_enabled(value.device.type)


def beside_parameters(argument: str, value: Tensor, parameter: Tensor | None, what: str) -> None:
    """Device and dtype of a tensor beside a parameter (None: nothing to compare with) of the module that asks.

    To be called in the forward of the module that owns the parameter, and nowhere above: FSDP casts a module's inputs
    and gathers its parameters right before that.
    """
    if parameter is not None:
        ordinary(what, parameter)
        if value.device != parameter.device:
            reject(argument, f"device {parameter.device}", value)
        _same_dtype(argument, value, what, parameter)


def ordinary(argument: str, value: Tensor) -> None:
    """Dense: neither sparse, of MKL-DNN nor nested. No DTensor: the layer computes with the tensors of one process."""
    if value.is_nested or value.layout is not torch.strided:
        reject(argument, "a dense tensor (of layout torch.strided, not nested)", value, TypeError)
    if type(value) is Tensor or type(value) is nn.Parameter or not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor  # costs a second, and ordinary tensors never come here

    if isinstance(value, DTensor):
        reject(argument, "an ordinary tensor (`.to_local()` or `.full_tensor()` gives one)", "a DTensor", TypeError)


# What a module reads of its own


# Classes of modules that compute with what they are given, and names of their parameters that must have its dtype.
Classes = Mapping[type[nn.Module], tuple[str, ...]]


def parameters(module: nn.Module, x: Tensor, classes: Classes) -> None:
    """The one rule about parameters, for the forward of a module, which is given x; raises TypeError or ValueError.

    All are dense and on x's device. Matrices and routing tokens have x's dtype, which autocast reconciles unless one is
    float64. Scales of norms, null keys and values, and the null token may have any floating dtype: the layer converts.

    So for the modules inside too, as far as they are of `classes` and take what they are given. One that is of another
    class (FSDP makes its own, adapters do), or has a forward pre-hook or a replaced forward, may cast it, and may have
    no parameters yet: neither that one nor what it contains is looked at.
    """
    read = _read(module, classes)
    for name, parameter, same_dtype in read:
        # Asked here, since a call for each parameter takes the host longer than all else that is checked.
        if type(parameter) is not nn.Parameter or parameter.layout != torch.strided or parameter.is_nested:
            ordinary(name, parameter)
        if parameter.device != x.device or (same_dtype and parameter.dtype != x.dtype and _dtypes_clash(parameter, x)):
            _blame(read, x)


def takes_as_given(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether nothing stands between a caller of the module and the forward of `cls`."""
    state = module.__dict__
    return type(module) is cls and not (
        state["_forward_pre_hooks"] or "forward" in state or nn.modules.module._global_forward_pre_hooks
    )


def _read(module: nn.Module, classes: Classes) -> list[tuple[str, Tensor, bool]]:
    """Name, value, and whether it must have the dtype of what the module is given; computed ones are left out."""
    found: list[tuple[str, Tensor, bool]] = []
    waiting, hooked = [("", module)], bool(nn.modules.module._global_forward_pre_hooks)
    while waiting:
        prefix, module = waiting.pop(0)
        names = classes.get(type(module), ())
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.append((prefix + name, parameter, name in names))
        for name, child in module._modules.items():
            if child is None or type(child) not in classes or hooked:
                continue
            state = child.__dict__  # as in `takes_as_given`, whose call takes the host longer than what it does
            if not (state["_forward_pre_hooks"] or "forward" in state):
                waiting.append((f"{prefix}{name}.", child))
    return found


def _blame(read: list[tuple[str, Tensor, bool]], x: Tensor) -> None:
    """x, where all parameters agree on something else; otherwise the first that differs from it."""
    read = [entry for entry in read if not is_traceable_wrapper_subclass(entry[1])]  # quantised, say: it converts
    for name, parameter, _ in read:
        if parameter.device != x.device:
            if len({p.device for _, p, _ in read}) == 1:
                reject("x", f"device {parameter.device}, that of the layer's parameters", x)
            reject(name, f"device {x.device}, that of x", parameter)
    bound = [(name, parameter) for name, parameter, same_dtype in read if same_dtype]
    for name, parameter in bound:
        if _dtypes_clash(parameter, x):
            if len({p.dtype for _, p in bound}) == 1:
                reject("x", f"dtype {parameter.dtype}, that of the layer's parameters", x, TypeError)
            reject(name, f"dtype {x.dtype}, that of x", parameter, TypeError)


# Arguments that several functions have


def token_mask(argument: str, mask: Any, x: Tensor, n: int | None = None) -> Tensor | None:
    """The mask as (B, N) bool, where N is x's second size, or n; None if there is none.

    Given as (B, N), or (1, N) for all batch items; of bool, or of integers, as tokenizers give it: 1 valid, 0 padding.
    Integers other than these are refused where a look at them costs nothing: on the CPU, where they hold data. On
    another device the host would have to wait for it; there, and in tracing, whatever is not 0 is valid.
    """
    if mask is None:
        return None
    batch, n = x.shape[0], x.shape[1] if n is None else n
    tensor(argument, mask, "B", n, dtypes=MASKS, beside=x)
    if mask.shape[0] != batch and mask.shape[0] != 1:
        reject(argument, f"shape ({batch}, {n}) or (1, {n})", mask)
    if mask.dtype != torch.bool:
        if mask.device.type == "cpu" and _holds_data(mask) and mask.numel():
            low, high = (int(v) for v in mask.aminmax())
            if low < 0 or high > 1:
                reject(argument, "True and False, or 1 and 0", f"values from {low} to {high}")
        mask = mask != 0
    return mask if mask.shape[0] == batch else mask.expand(batch, -1)


def routing_tokens(argument: str, tokens: Any, x: Tensor, experts: int | str, dim: int) -> None:
    """(E, D), or (B, E, D) with one set for each batch item."""
    batched = isinstance(tokens, Tensor) and not tokens.is_nested and tokens.ndim == 3
    shape = (x.shape[0], experts, dim) if batched else (experts, dim)
    tensor(argument, tokens, *shape, beside=x, dtype_of=("x", x))
    if tokens.shape[-2] == 0:
        reject(argument, "at least one expert", tokens)


def held_or_given_tokens(argument: str, tokens: Any, x: Tensor, experts: int, dim: int, *, given: bool) -> None:
    """Routing tokens of a call: none where the router holds its own, else (E, D) or (B, E, D).

    given: learned_routing_tokens=True, the router holds none.
    """
    if not given:
        if tokens is not None:
            reject(argument, "None, since learned_routing_tokens=False", tokens)
    elif tokens is None:
        reject(argument, "a tensor, since learned_routing_tokens=True", None)
    else:
        routing_tokens(argument, tokens, x, experts, dim)


def routes(argument: str, value: Any, batch: int, experts: int, n: int, beside: Tensor) -> None:
    """Shapes and dtypes, and that indices lie in [0, n) and are distinct within a row.

    The last two read the indices; where these hold no data that can be read (`_holds_data`), they are the caller's
    promise.
    """
    if not (isinstance(value, Routes)):
        reject(argument, "Routes(indices, mask, scores, logits)", describe(value), TypeError)
    indices, mask, scores, _ = value
    tensor(f"{argument}.indices", indices, batch, experts, "K", dtypes=(torch.int64,), beside=beside)
    tensor(f"{argument}.mask", mask, *indices.shape, dtypes=(torch.bool,), beside=beside)
    tensor(f"{argument}.scores", scores, *indices.shape, beside=beside)
    if _holds_data(indices) and indices.numel():
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= n:
            reject(f"{argument}.indices", f"token positions in [0, {n})", f"values from {low} to {high}")
        if (indices.sort(dim=-1).values.diff(dim=-1) == 0).any():
            reject(f"{argument}.indices", "distinct positions within each (batch, expert)", "a repeated position")


def _holds_data(t: Tensor) -> bool:
    """False on the meta device, for fake tensors, under torch.compile, make_fx and functorch, and in a CUDA graph."""
    if torch.compiler.is_compiling() or t.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return False
    if type(t) is not Tensor or torch._C._len_torch_dispatch_stack():
        from torch._guards import detect_fake_mode
        from torch._subclasses.functional_tensor import FunctionalTensor
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        if detect_fake_mode((t,)) is not None or get_proxy_mode() is not None or isinstance(t, FunctionalTensor):
            return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def rotary(rotary_emb: Any, x: Tensor, dim_head: int) -> Tensor | None:
    """The first N rows of angles (at least N, d) of any floating dtype, without gradient; None if there are none."""
    if rotary_emb is None:
        return None
    n = x.shape[1]
    tensor("rotary_emb", rotary_emb, "N", dim_head, beside=x)
    if rotary_emb.shape[0] < n:
        reject("rotary_emb", f"shape ({n}, {dim_head}), or more rows", rotary_emb)
    if rotary_emb.requires_grad:
        reject("rotary_emb", "angles that need no gradient", "requires_grad=True")
    if dim_head % 2:
        reject("dim_head", "an even number with rotary embeddings", dim_head)
    return rotary_emb[:n]


# The stages as functions: what is returned replaces the argument.


def route_input(x: Any, tokens: Any, k: Any, mask: Any, random_route: Any, generator: Any) -> Tensor | None:
    """The mask."""
    tensor("x", x, "B", "N", "D")
    routing_tokens("tokens", tokens, x, "E", x.shape[2])
    positive_int("k", k)
    mask = token_mask("mask", mask, x)
    randomness(x, random_route, generator)
    return mask


def randomness(x: Tensor, random_route: Any, generator: Any) -> None:
    """`random_route` is a flag, and `generator` belongs to it and to x's kind of device."""
    flag("random_route", random_route)
    if generator is not None and not (random_route and isinstance(generator, torch.Generator)):
        reject("generator", "a torch.Generator, with random_route=True only", describe(generator))
    if generator is not None and generator.device.type != x.device.type:
        reject("generator", f"a generator on {x.device}", f"one on {generator.device}")


def select_input(logits: Any, k: Any, mask: Any) -> Tensor | None:
    """The mask."""
    tensor("logits", logits, "B", "E", "N")
    positive_int("k", k)
    mask = token_mask("mask", mask, logits, logits.shape[2])
    if k > logits.shape[-1]:
        reject("k", f"at most N = {logits.shape[-1]}", k)
    return mask


def solver_input(logits: Any, k: Any, mask: Any) -> Tensor | None:
    """The mask."""
    tensor("logits", logits, "B", "E", "N")
    low, _ = span(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    number("k", k, f"a finite number > 0, in [{low:.2g}, 2**63)", lambda v: low <= v < 1 << 63)
    return token_mask("mask", mask, logits, logits.shape[2])


def solvable(options: RouterOptions, dtype: torch.dtype) -> None:
    """Numbers that only float64 holds, for logits of another dtype: these are computed in float32."""
    if options.beyond_float32 is not None and dtype != torch.float64:
        (low, high), name = span(torch.float32), options.beyond_float32
        expected = f"a number in [{low:.2g}, {high:.2g}], since scores are computed in float32"
        reject(name, expected, getattr(options, name))


def attention_input(
    x: Any,
    context: Any,
    q_routes: Any,
    kv_routes: Any,
    null_kv: Any,
    weights: dict[str, Any],
    rotary_emb: Any,
    dropout: Any,
) -> Tensor | None:
    """Of `routed_attention`: the angles. weights: w_q, w_kv, w_out, gamma, context_gamma."""
    tensor("x", x, "B", "N", "D")
    tensor("context", context, x.shape[0], "M", "Dc", beside=x, dtype_of=("x", x))
    tensor("null_kv", null_kv, 2, "E", "H", "d", beside=x)
    if 0 in null_kv.shape:
        reject("null_kv", "at least one expert, head and channel", null_kv)
    _, experts, heads, dim_head = null_kv.shape
    inner, dim, dim_context = heads * dim_head, x.shape[2], context.shape[2]
    for name, *sizes in (("w_q", inner, dim), ("w_kv", 2 * inner, dim_context), ("w_out", dim, inner)):
        tensor(name, weights[name], experts, *sizes, beside=x, dtype_of=("x", x))
    for name, size in (("gamma", dim), ("context_gamma", dim_context)):
        if weights[name] is not None:
            tensor(name, weights[name], experts, size, beside=x)
    routes("q_routes", q_routes, x.shape[0], experts, x.shape[1], x)
    routes("kv_routes", kv_routes, x.shape[0], experts, context.shape[1], x)
    angles = rotary(rotary_emb, x, dim_head)
    if rotary_emb is not None and context.shape[1] != x.shape[1]:
        reject("rotary_emb", "self-attention (a context as long as x)", rotary_emb)
    probability("dropout", dropout)
    return angles


def local_input(x: Any, window_size: Any, mask: Any, causal: Any, heads: Any, weights: dict[str, Any]) -> Tensor | None:
    """Of `local_attention`: the mask. weights: w_qkv, w_out, norm_weight, norm_bias."""
    tensor("x", x, "B", "N", "D")
    positive_int("window_size", window_size)
    mask = token_mask("mask", mask, x)
    flag("causal", causal)
    positive_int("heads", heads)
    dim = x.shape[2]
    tensor("w_out", weights["w_out"], dim, "H*d", beside=x, dtype_of=("x", x))
    inner = weights["w_out"].shape[1]
    if inner == 0 or inner % (2 * heads):
        reject("w_out", f"H*d columns with H = {heads} and an even d (rotary embedding)", weights["w_out"])
    tensor("w_qkv", weights["w_qkv"], 3 * inner, dim, beside=x, dtype_of=("x", x))
    for name in ("norm_weight", "norm_bias"):
        if weights[name] is not None:
            tensor(name, weights[name], dim, beside=x)
    if weights["norm_bias"] is not None and weights["norm_weight"] is None:
        reject("norm_bias", "None, since norm_weight is None", weights["norm_bias"])
    return mask


def combine_input(
    y: Any, q_routes: Any, n: Any, local: Any, average_routed: Any, null_routed_token: Any, mask: Any
) -> Tensor | None:
    """The mask."""
    tensor("y", y, "B", "E", "Kq", "D")
    n = integer("n", n, least=0)
    batch, experts, _, dim = y.shape
    routes("q_routes", q_routes, batch, experts, n, y)
    tensor("y", y, *q_routes.indices.shape, dim)
    flag("average_routed", average_routed)
    if local is not None:
        tensor("local", local, batch, n, dim, beside=y)
    if null_routed_token is not None:
        tensor("null_routed_token", null_routed_token, dim, beside=y)
    return token_mask("mask", mask, y, n)


# What a layer is told when it is made


@dataclass(frozen=True)
class RouterOptions:
    """What a router can be told.

    straight_through: scores are exactly 1 and pass their gradient to the soft scores; else the soft scores themselves.
    solver: "iterative", n_iters steps of coordinate descent at temperatures max(eps_init * eps_decay**t, eps), or
        "exact", its limit at eps. Their mass is min(K * fetch_k_ratio, N). "sigmoid": the sigmoid of each logit, which
        couples no tokens, has a gradient also where N <= K, and takes none of these options. The logits of raw dot
        products are soon so large that it is 1 in float32; cosine_sim_routing bounds them.
    cosine_sim_routing, cosine_sim_scale: logits are scaled cosines in place of dot products.
    learned_routing_tokens: the module holds no routing tokens, the caller passes them at forward.
    route_block_size: pick evenly from blocks of so many tokens.

    eps, eps_init and cosine_sim_scale are normal numbers of the dtype of the scores, and no more than 1/64 of the
    largest: a call in float32 refuses others.

    Raises TypeError or ValueError naming the option.
    """

    beyond_float32: ClassVar[str | None] = None  # of an object: name of an option that is

    straight_through: bool = True
    n_iters: int = 20
    fetch_k_ratio: float = 9 / 8
    eps: float = 0.03
    eps_init: float = 4.0
    eps_decay: float = 0.7
    solver: str = "iterative"
    cosine_sim_routing: bool = False
    cosine_sim_scale: float = 8.0
    learned_routing_tokens: bool = False
    route_block_size: int | None = None

    def __post_init__(self) -> None:
        flag("straight_through", self.straight_through)
        flag("cosine_sim_routing", self.cosine_sim_routing)
        flag("learned_routing_tokens", self.learned_routing_tokens)
        # Numbers of NumPy and the like become Python's: Triton takes no others.
        numbers = {
            "n_iters": positive_int("n_iters", self.n_iters),
            "fetch_k_ratio": number("fetch_k_ratio", self.fetch_k_ratio, "a finite number >= 1", lambda v: v >= 1),
            "eps": positive("eps", self.eps),
            "eps_init": positive("eps_init", self.eps_init),
            "eps_decay": number("eps_decay", self.eps_decay, "a number in (0, 1]", lambda v: 0 < v <= 1),
            "cosine_sim_scale": positive("cosine_sim_scale", self.cosine_sim_scale),
        }
        if self.solver not in ("iterative", "exact", "sigmoid"):
            reject("solver", "'iterative', 'exact' or 'sigmoid'", describe(self.solver))
        if self.route_block_size is not None:
            numbers["route_block_size"] = positive_int("route_block_size", self.route_block_size)
        for name, value in numbers.items():
            object.__setattr__(self, name, value)
        low, high = span(torch.float32)
        for name in ("eps", "eps_init", "cosine_sim_scale"):
            if not low <= numbers[name] <= high:
                object.__setattr__(self, "beyond_float32", name)

    @staticmethod
    def of_module(options: dict[str, Any]) -> RouterOptions:
        return _router_options(options, _OPTIONS)

    @staticmethod
    def of_stage(options: dict[str, Any]) -> RouterOptions:
        """For `route`, to which routing tokens are always passed."""
        return _router_options(options, _OPTIONS_OF_STAGE)


# Once, since no graph of torch.compile holds the fields of a class.
_OPTIONS = tuple(field.name for field in fields(RouterOptions))
_OPTIONS_OF_STAGE = tuple(name for name in _OPTIONS if name != "learned_routing_tokens")


def _router_options(options: dict[str, Any], names: tuple[str, ...]) -> RouterOptions:
    for unknown in options.keys() - set(names):
        reject("router_options", f"names among {', '.join(names)}", describe(unknown), TypeError)
    for name in ("n_iters", "fetch_k_ratio", "eps", "eps_init", "eps_decay"):
        if options.get("solver") == "sigmoid" and name in options:
            reject(name, "no option of a solver with solver='sigmoid', which solves nothing", options[name])
    return RouterOptions(**options)


@dataclass(frozen=True)
class Config:
    """The constructor's arguments of a layer, checked; numbers are Python's. To be made by `Config.of`."""

    dim: int
    num_routed_queries: int
    num_routed_key_values: int
    num_experts: int
    dim_context: int
    local_attn_window_size: int | None = None  # None: no local attention
    dim_head: int = 64
    heads: int = 8
    dropout: float = 0.1
    use_triton: bool = True
    flash_attn: bool = True
    prenorm: bool = True
    average_routed: bool = False
    options: RouterOptions = field(default_factory=RouterOptions)

    @classmethod
    def of(cls, **arguments: Any) -> Config:
        """From the constructor's arguments by name, less device and dtype; names unknown here are router options.

        Raises TypeError or ValueError naming the argument.
        """
        checked = {name: check(name, arguments.pop(name)) for name, check in _CHECKS.items() if name in arguments}
        dim_context = arguments.pop("dim_context", None)
        local, window = flag("local_attn", arguments.pop("local_attn", False)), "local_attn_window_size"
        window_size = arguments.pop(window, None)
        options = RouterOptions.of_module(arguments)
        dim_context = checked["dim"] if dim_context is None else positive_int("dim_context", dim_context)
        if local:
            window_size = positive_int(window, window_size)
        elif window_size is not None:
            reject(window, "None without local_attn=True", window_size)
        config = cls(**checked, dim_context=dim_context, local_attn_window_size=window_size, options=options)
        if local and config.dim_head % 2:
            reject("dim_head", "an even number with local attention (rotary embedding)", config.dim_head)
        if local and config.dim_context != config.dim:
            reject("dim_context", f"dim = {config.dim} with local_attn (self-attention only)", config.dim_context)
        return config


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "dim": positive_int,
    "num_routed_queries": positive_int,
    "num_routed_key_values": positive_int,
    "num_experts": positive_int,
    "dim_head": positive_int,
    "heads": positive_int,
    "dropout": probability,
    "use_triton": flag,
    "flash_attn": flag,
    "prenorm": flag,
    "average_routed": flag,
}


# Attributes of a layer


def of_config(name: str) -> Any:
    """A property: what the constructor was given, which a layer can't be told anew."""
    return property(lambda layer: getattr(layer.config, name), doc=f"As the constructor was given {name}.")


def checked_dropout() -> Any:
    """A property of the module that drops: a probability, checked when it is assigned."""

    def assign(module: nn.Module, value: Any) -> None:
        module.__dict__["_dropout"] = probability("dropout", value)

    return property(
        lambda module: module.__dict__["_dropout"], assign, doc="A number in [0, 1), from the next call on."
    )


def dropout_within(cls: type[nn.Module]) -> Any:
    """A property of the layer: `dropout` of the modules of `cls` that its `attn` is, or wraps."""

    def found(layer: Any) -> list[Any]:
        attn = layer.attn
        return [attn] if isinstance(attn, cls) else [m for m in attn.modules() if isinstance(m, cls)]

    def read(layer: Any) -> float:
        modules = found(layer)
        return modules[0].dropout if modules else layer.config.dropout

    def assign(layer: Any, value: Any) -> None:
        probability("dropout", value)
        modules = found(layer)
        if not modules:
            reject("attn", f"a {cls.__name__}, to set its dropout", type(layer.attn).__name__, TypeError)
        for module in modules:
            module.dropout = value

    return property(read, assign, doc="Probability of dropping a weight of the routed attention, in training.")


# What a layer is told when it is called


@runtime_checkable
class Forward(Protocol):
    """A layer's `forward` and call, to a type checker: routes are returned where return_routes is True."""

    @overload
    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        num_routed_queries: int | None = None,
        num_routed_key_values: int | None = None,
        rotary_emb: Tensor | None = None,
        query_routing_tokens: Tensor | None = None,
        key_value_routing_tokens: Tensor | None = None,
        routes: tuple[Routes, Routes] | None = None,
        return_routes: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        num_routed_queries: int | None = None,
        num_routed_key_values: int | None = None,
        rotary_emb: Tensor | None = None,
        query_routing_tokens: Tensor | None = None,
        key_value_routing_tokens: Tensor | None = None,
        routes: tuple[Routes, Routes] | None = None,
        *,
        return_routes: Literal[True],
    ) -> tuple[Tensor, tuple[Routes, Routes]]: ...

    @overload
    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        num_routed_queries: int | None = None,
        num_routed_key_values: int | None = None,
        rotary_emb: Tensor | None = None,
        query_routing_tokens: Tensor | None = None,
        key_value_routing_tokens: Tensor | None = None,
        routes: tuple[Routes, Routes] | None = None,
        return_routes: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Routes, Routes]]: ...


def as_forward(function: Callable[..., Tensor | tuple[Tensor, tuple[Routes, Routes]]]) -> Forward:
    """The function itself, with the type of `Forward`."""
    return cast(Forward, function)


class Side(NamedTuple):
    """One side of a call, queries or keys/values."""

    x: Tensor  # (B, N, D), or the context (B, M, Dc)
    mask: Tensor | None  # (B, N) bool, whatever was given
    k: int  # tokens that every expert picks
    tokens: Tensor | None  # routing tokens that the caller passed: (E, D) or (B, E, D)


class Call(NamedTuple):
    """A checked call. In self-attention both sides hold the same x and mask."""

    queries: Side
    keys_values: Side
    rotary_emb: Tensor | None  # (N, d)
    routes: tuple[Routes, Routes] | None
    return_routes: bool


def whole_sequence() -> None:
    """No call inside of PyTorch's `context_parallel()`: it cuts x, and each part would be routed as if alone."""
    if torch.compiler.is_compiling():
        return
    if str(getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", "")).startswith("torch.distributed"):
        reject(
            "x", "a call outside of torch's context_parallel() (optimized.parallel.ContextParallel shards a sequence)",
            "one inside, whose tokens are a part of the sequence", RuntimeError,
        )  # fmt: skip


def _like_a_mask(context: Any, x: Tensor) -> bool:
    """Passed by position, where the context has its place."""
    if not isinstance(context, Tensor) or context.is_nested or context.dtype not in MASKS or context.ndim != 2:
        return False
    return context.shape[1] == x.shape[1] and (context.shape[0] == x.shape[0] or context.shape[0] == 1)


def check_call(config: Config, given: dict[str, Any]) -> Call:
    """All checks of a layer's call that parameters take no part in; `given` are forward's arguments by name.

    Raises TypeError or ValueError naming the argument.
    """
    x, context, decided = given["x"], given["context"], given["routes"]
    whole_sequence()
    tensor("x", x, "B", "N", config.dim)
    # What is not there is not checked: a call of a check takes the host longer than what it does.
    mask = given["mask"]
    mask = mask if mask is None else token_mask("mask", mask, x)
    if context is None:
        if config.dim_context != config.dim:
            reject("context", f"a tensor (B, M, {config.dim_context}), since dim_context != dim", None)
        if given["context_mask"] is not None:
            reject("context_mask", "None without context", given["context_mask"])
        context, context_mask = x, mask
    else:
        if _like_a_mask(context, x):
            reject(
                "context", f"shape ({x.shape[0]}, M, {config.dim_context}) (did you mean mask=?)", context, TypeError
            )
        if config.local_attn_window_size is not None:
            reject("context", "None with local_attn=True (self-attention only)", context)
        tensor("context", context, x.shape[0], "M", config.dim_context, beside=x, dtype_of=("x", x))
        context_mask = token_mask("context_mask", given["context_mask"], context)
        if given["rotary_emb"] is not None:
            reject("rotary_emb", "None with a context (self-attention only)", given["rotary_emb"])
    angles = given["rotary_emb"]
    angles = angles if angles is None else rotary(angles, x, config.dim_head)
    if given["return_routes"] is not False:
        flag("return_routes", given["return_routes"])
    if decided is not None:
        if not (isinstance(decided, (tuple, list)) and len(decided) == 2):
            reject("routes", "a pair (query routes, key/value routes)", decided, TypeError)
        for i, t in enumerate((x, context)):
            routes(f"routes[{i}]", decided[i], x.shape[0], config.num_experts, t.shape[1], x)
        decided = (decided[0], decided[1])

    def side(t: Tensor, mask: Tensor | None, name: str, tokens_name: str, dim: int) -> Side:
        k, tokens = given[name], given[tokens_name]
        if decided is None:
            by_caller = config.options.learned_routing_tokens
            if by_caller or tokens is not None:
                held_or_given_tokens(tokens_name, tokens, x, config.num_experts, dim, given=by_caller)
            if config.options.beyond_float32 is not None:
                solvable(config.options, x.dtype)
        elif tokens is not None:
            reject(tokens_name, "None with injected routes", tokens)
        return Side(t, mask, getattr(config, name) if k is None else positive_int(name, k), tokens)

    return Call(
        side(x, mask, "num_routed_queries", "query_routing_tokens", config.dim),
        side(context, context_mask, "num_routed_key_values", "key_value_routing_tokens", config.dim_context),
        angles,
        decided,
        given["return_routes"],
    )
