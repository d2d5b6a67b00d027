"""The layer under test beside the reference: built, called and compared."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import reference
from reference.contract import RouterOptions
from reference.testing import assert_matches
from tests.strategies import LayerCase, cotangent

# Attention logits of these small cases stay below this. exp makes a relative error of a logit as many times as large.
LOGIT_SIZE = 8.0
DEFAULTS = {"dim_context": None, "average_routed": False, "prenorm": True}


EXPECTED = "--impl: expected module:callable, a MixtureOfAttention or a function that makes one"
UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


# What a layer may do without, by the argument that asks for it; or the parameters of the reference. The sizes, and the
# numbers of heads, experts and slots, every layer is told at construction; the slots of a call are a feature.
SIZES = ("dim", "num_routed_queries", "num_routed_key_values", "num_experts", "dim_head", "heads")
CALLS = ("mask", "context", "context_mask", "rotary_emb", *SIZES[1:3], "return_routes", "routes")
BUILDS = ("dim_context", "dropout", "prenorm", "average_routed", "local_attn", "device", "dtype")
OPTIONS = tuple(f.name for f in fields(RouterOptions))
FEATURES = ("state_dict", *CALLS, *BUILDS, *OPTIONS)
PART_OF = {
    "local_attn_window_size": "local_attn",
    "query_routing_tokens": "learned_routing_tokens",
    "key_value_routing_tokens": "learned_routing_tokens",
    "use_cache": "cache",
}


class NotOffered(Exception):  # noqa: N818 (a verdict, not an error)
    """The layer does not have what the property is about, and does not claim to. An adapter may raise it too.

    lacks: one of FEATURES, if it is about one.
    """

    def __init__(self, reason: str = "", lacks: str | None = None) -> None:
        super().__init__(reason)
        self.lacks = PART_OF.get(lacks or "", lacks)


def factory_of(spec: str, known: Collection[str] = FEATURES) -> Callable[..., nn.Module]:
    """The callable that module:callable names. known: features that it may say it has.

    Raises ValueError, whatever the import raises.
    """
    module, name = split(spec)
    try:
        found = getattr(importlib.import_module(module), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit and pytest.importorskip are no Exceptions
        raise ValueError(f"{EXPECTED}, got {spec!r} ({describe(error)})") from error
    if not callable(found):
        raise ValueError(f"{EXPECTED}, got {spec!r}, which is {found!r}")
    features = getattr(found, "features", None)
    if features is not None and (isinstance(features, str) or not isinstance(features, Collection)):
        raise ValueError(f"features of {spec}: expected a set of names, got {features!r}")
    for name in features or ():
        if name not in known:
            raise ValueError(f"features of {spec}: expected names among {', '.join(known)}, got {name!r}")
    return found


def split(spec: str) -> tuple[str, str]:
    """Module and callable. Raises ValueError."""
    module, _, name = spec.partition(":")
    if not (module and name.isidentifier()):
        raise ValueError(f"{EXPECTED}, got {spec!r}")
    return module, name


def describe(error: BaseException) -> str:
    """What it says, and its type unless it is an AssertionError."""
    try:
        text = str(error)
    except Exception as another:
        text = f"(its text raises {type(another).__name__})"
    if not isinstance(error, AssertionError):
        text = f"{type(error).__name__}: {text}"
    return printable(text)


def printable(text: str) -> str:
    """Of control characters and halves of surrogate pairs, their escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Subject:
    """A factory that takes the constructor arguments of ORACLE, and where to run its layers.

    SIZES: arguments that every layer is told. DEFAULTS: those that are left out unless they are something else.
    """

    ORACLE: ClassVar[type[nn.Module]] = reference.MixtureOfAttention
    FEATURES: ClassVar[tuple[str, ...]] = FEATURES
    SIZES: ClassVar[tuple[str, ...]] = SIZES
    DEFAULTS: ClassVar[dict[str, Any]] = DEFAULTS

    factory: Callable[..., nn.Module]
    device: torch.device | str = "cpu"

    @property
    def features(self) -> frozenset[str] | None:
        """Those of FEATURES that the factory says it has: it is asked for no others. None: it says nothing."""
        declared = getattr(self.factory, "features", None)
        return None if declared is None else frozenset(declared)

    def build(
        self,
        case: LayerCase,
        state: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        **arguments: Any,
    ) -> nn.Module:
        """A layer in eval mode, with `state` loaded."""
        layer = self.construct(case, **arguments).to(self.device, dtype).eval()
        if state is not None:
            load(layer, {name: t.to(self.device, dtype) for name, t in state.items()})
        return layer

    def build_any(self, case: LayerCase, state: dict[str, Tensor], **arguments: Any) -> nn.Module:
        """For what holds whatever the parameters are: a layer with `state` loaded, or with its own if it takes no such.

        Its own are the same in every build.
        """
        torch.manual_seed(case.seed)
        layer = self.build(case, **arguments)
        if self.features is None or "state_dict" in self.features:
            with contextlib.suppress(NotOffered):
                load(layer, {name: t.to(self.device, torch.float32) for name, t in state.items()})
        return layer

    def construct(self, case: LayerCase, **arguments: Any) -> nn.Module:
        """What the constructor makes. An argument that it does not take: NotOffered."""
        given = self._given(case.arguments() | arguments)
        if self.features is not None and "dropout" in set(self.FEATURES) - self.features:
            given.pop("dropout", None)  # 0 in every case, and eval mode
        return ask("constructor", self.factory, self.factory, given.pop("dim"), **given)

    def asked_by(self, case: LayerCase) -> set[str]:
        """Those of FEATURES that a case asks for."""
        given = self._given(case.arguments()).keys() | case.inputs().keys() - {"x"}
        if case.arguments()["dropout"] == 0.0:
            given.discard("dropout")
        return {PART_OF.get(name, name) for name in given.difference(self.SIZES)}

    def _given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: v for name, v in arguments.items() if name not in self.DEFAULTS or v != self.DEFAULTS[name]}

    def move(self, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments of forward on the device, in the dtype; angles stay float32, masks bool."""
        return {name: self._moved(name, v, dtype) for name, v in inputs.items()}

    def _moved(self, name: str, v: Any, dtype: torch.dtype) -> Any:
        if not isinstance(v, Tensor):
            return v
        return v.to(self.device, dtype if v.is_floating_point() and name != "rotary_emb" else v.dtype, copy=True)


def load(layer: nn.Module, state: dict[str, Tensor]) -> None:
    """Buffers that are the layer's own may be missing; `state_dict_has_the_names_and_shapes` looks at the rest."""
    try:
        unexpected = layer.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:
        if "size mismatch for" not in str(error):
            raise
        raise NotOffered(f"state dict: {error}", "state_dict") from error
    if unexpected:
        raise NotOffered(f"state dict: it has no {', '.join(unexpected)}", "state_dict")


def call(layer: nn.Module, x: Tensor, **inputs: Any) -> Any:
    """An argument that forward does not take: NotOffered."""
    return ask("forward", layer, layer.forward, x, **inputs)


def ask(what: str, function: Callable[..., Any], declared: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """What the function returns. NotOffered: the signature of `declared` has no such argument, or takes it by ** only
    and hands it on to what has none. All else that the function raises goes through, another TypeError too.
    """
    try:
        signature = inspect.signature(declared)
    except (TypeError, ValueError):  # written in C, it shows none
        named: Iterable[str] = ()
    else:
        named = signature.parameters
        try:
            signature.bind(*args, **given)
        except TypeError as error:
            unexpected = UNEXPECTED.search(str(error))
            raise NotOffered(f"{what}: {error}", unexpected and unexpected[1]) from error
    try:
        return function(*args, **given)
    except TypeError as error:
        unexpected = UNEXPECTED.search(str(error))
        if unexpected is None or unexpected[1] not in given or unexpected[1] in named:
            raise
        raise NotOffered(f"{what}: {error}", unexpected[1]) from error


def gradients(layer: nn.Module, inputs: dict[str, Any], seed: int) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output, and gradients of x, context and every parameter under a random cotangent."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", "context") if name in inputs}
    out = call(layer, **{**inputs, **leaves})
    g = cotangent(tuple(out.shape), "dense", seed).to(out.device, out.dtype)
    named = leaves | dict(layer.named_parameters())
    found = torch.autograd.grad(out, list(named.values()), g, allow_unused=True)
    return out.detach(), dict(zip(named, found))


def assert_equals_reference(
    subject: Subject,
    case: LayerCase,
    state: dict[str, Tensor],
    inputs: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    gradients_of: Iterable[str] = (),
    rows: dict[str, slice] | None = None,
    same_as: LayerCase | None = None,
    without: Iterable[str] = (),
    **arguments: Any,
) -> None:
    """Output, and gradients of the named inputs and parameters, against the float64 reference.

    rows: of a parameter's gradient, where only some are to be compared. same_as: what the reference is built from, if
    not from `case`; without: arguments of forward that it then doesn't get. arguments: of the layer's constructor.
    """
    layer = subject.build(case, state, dtype, **arguments)
    state, inputs = ({n: _rounded(t, dtype) for n, t in d.items()} for d in (state, inputs))
    low = torch.float32 if dtype == torch.float64 else dtype
    oracles = []
    for precision in (torch.float64, low):
        oracle = subject.ORACLE(**(same_as or case).arguments(), device=subject.device, dtype=precision)
        oracle.load_state_dict({name: t.to(subject.device, precision) for name, t in state.items()})
        given = {name: v for name, v in inputs.items() if name not in without}
        oracles.append(gradients(oracle.eval(), subject.move(given, precision), case.seed))
    out, found = gradients(layer, subject.move(inputs, dtype), case.seed)
    (exact, wanted), (baseline, plain) = oracles
    assert out.dtype == dtype, f"the output is {out.dtype}, x is {dtype}"
    precise = dtype in (torch.float32, torch.float64)
    scale = LOGIT_SIZE * exact.abs().max().item() if precise else 0.0
    expect = None if exact.any() else "zeros"
    assert_matches(out, exact, baseline, stage="mixture", name="output", expect=expect, scale=scale)
    largest = max((g.abs().max().item() for g in wanted.values() if g is not None), default=0.0)
    for name in gradients_of:
        if name not in found:
            raise NotOffered(f"named_parameters: there is no {name}", "state_dict")
        got, right, base = found[name], wanted[name], plain[name]
        if rows and name in rows:
            got, right, base = (None if t is None else t[rows[name]] for t in (got, right, base))
        if right is None or not right.any():
            assert got is None or not got.any(), f"gradient of {name}: it should have none"
            continue
        assert got is not None, f"gradient of {name}: there is none"
        assert_matches(
            got,
            right,
            base,
            stage="mixture_gradient",
            name=f"gradient of {name}",
            scale=LOGIT_SIZE * largest if precise else 0.0,
        )


def _rounded(t: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(t, Tensor) and t.dtype == torch.float64
    return t.to(dtype).double() if floating else t


def assert_unchanged(after: Tensor, before: Tensor, what: str) -> None:
    """Equal but for rounding: shapes of products may differ between the two, and their order of summation with them."""
    assert after.shape == before.shape, f"{what}: shape {tuple(after.shape)}, before {tuple(before.shape)}"
    if not before.numel():
        return
    size = before.abs().max().item()
    difference = (after - before).abs().max().item()
    # `<=`: a NaN must fail.
    assert difference <= 64 * torch.finfo(before.dtype).eps * max(size, 1.0), f"{what} changed by {difference:.3g}"
