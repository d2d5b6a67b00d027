"""One declaration makes an operator: schema, fake, gradient, batching rule, FLOPs, and its way past the dispatcher.

An operator is a class of plain functions. They take the arguments as one namespace, by the names of the schema:

    @operator(
        "(Tensor x, Tensor w, float scale) -> (Tensor y, Tensor norms)",
        wrt="x w",             # arguments that have gradients
        gradients_of="y",      # results that pass one on; the others are not differentiable
        saves="x w norms",     # arguments and results that the backward reads
    )
    class project:
        def forward(a): ...             # the results, in the order of the schema
        def fake(a): ...                # the same of empty tensors; sizes may be SymInt
        def backward(a, g, needs): ...  # {"x": dx, "w": dw}; a: what was saved; g: gradients of results, or None
        def flops(a, out): ...          # of matrix products; optional, as is backward_flops(a, out)
        def infer(a): ...               # the first result alone, in less memory; optional
        def unseen(a): ...              # as forward, but where the backward alone has all results but the first: what
                                        # it does not read of these may be anything; optional

`needs.x` says whether anybody asks for the gradient of x: what nobody asks for is not computed. The result is called as
`project(x, w, scale)`, by position or name, or as `project.first`, which returns the first result alone; `project.raw`
is the computation alone, for operators that contain it (`project.body` its functions), and `project.backward` the
operator of the gradient. Both are in torch.ops.moa, the latter as project_backward. Empty results may be one tensor.

Operators are not twice differentiable, nor in forward mode, and say so by an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from optimized.ops import flops

_ORDINARY = (Tensor, torch.nn.Parameter)
_ERROR, _SAME = "error", "same"


OPERATORS: dict[str, Operator] = {}  # all of them by name, those of gradients too


class Arguments(SimpleNamespace):
    """Arguments and results of an operator by name."""


def is_plain(tensors: Sequence[Any]) -> bool:
    """Whether a call by the dispatcher would come to the same: no mode that looks on, and ordinary tensors with data.

    Those that a level of torch.func or torch.autograd.grad(is_grads_batched=True) batches have no data of their own.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    try:
        for t in tensors:
            if t is not None:
                if type(t) not in _ORDINARY or t.is_meta:
                    return False
                t.data_ptr()
    except RuntimeError:
        return False
    return True


class Operator:
    """A registered operator; see the top of this file.

    folds: for the batching rule, the place of the batch dimension in tensors, by name, where every tensor has one: the
    new dimension is folded into it. Without, the rule is one call for each item. draws: the argument that is a
    probability of dropout. alike: arguments of `wrt` that are not saved, and what is saved of their shape and dtype.
    """

    def __init__(
        self,
        body: Any,
        name: str,
        schema: str,
        *,
        wrt: str = "",
        gradients_of: str = "",
        saves: str = "",
        folds: dict[str, int] | None = None,
        draws: str = "",
        alike: dict[str, str] | None = None,
    ) -> None:
        parsed = torch._C.parse_schema(f"moa::{name}{schema}")
        self.name, self.__doc__ = name, body.__doc__
        self.names = tuple(argument.name for argument in parsed.arguments)
        self.results = tuple(result.name for result in parsed.returns)
        self.body = body  # for operators that contain this one, too
        self._defaults = {a.name: a.default_value for a in parsed.arguments if a.has_default_value()}
        self._folds, self._draws = folds, draws
        self.wrt, self.gradients_of, self.saves = wrt.split(), gradients_of.split(), saves.split()
        self.alike = {name: name for name in self.wrt} | (alike or {})
        self._needs: dict[int, Arguments] = {}  # by the bits
        arguments = schema.rpartition("->")[0].strip()
        # As written: a parsed schema tells SymInt from int no more.
        types = {n: part.split()[0] for n, part in zip(self.names, arguments[1:-1].split(","))}
        self.constants = [n for n in self.names if not types[n].startswith("Tensor")]
        there = (*self.names, *self.results)
        self._tensors = _picker(self.names, [n for n in self.names if types[n].startswith("Tensor")])
        self._wrt_places = [there.index(name) for name in self.wrt]
        self._saved = _picker(there, self.saves)
        self._kept = _picker(there, self.constants)
        self._passing = _picker(self.results, self.gradients_of)
        self._stopping = _picker(self.results, [name for name in self.results if name not in self.gradients_of])
        self._asked = _picker(self.names, self.wrt)
        unnamed = ", ".join("Tensor" for _ in self.results)
        single = len(self.results) == 1 and not schema.rpartition("->")[2].strip().startswith("(")
        self.op = custom_op(
            f"moa::{name}",
            lambda *args: _apart(self._run(args)),
            mutates_args=(),
            schema=f"{arguments} -> {unnamed if single else f'({unnamed})'}",
            tags=(torch.Tag.nondeterministic_seeded,) if draws else (),
        )
        self.op.register_fake(lambda *args: _apart(body.fake(self._bind(args))))
        self.backward: Operator | None = None
        if self.wrt:
            self.backward = self._make_backward(types)
        self._register_gradient()
        self.op.register_vmap(self._rule(self.op))
        self._count_flops()
        OPERATORS[name] = self

    # --- calls -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._call(self._positional(args, named), False)

    def first(self, *args: Any, **named: Any) -> Tensor:
        """The first result, the only one that passes a gradient on; the others are not made tensors of autograd's."""
        return self._call(self._positional(args, named), True)

    def _call(self, args: tuple, first: bool) -> Any:
        forward_mode = forward_ad._current_level >= 0
        if torch.compiler.is_compiling():
            if forward_mode:
                self._refuse("forward-mode differentiation")
            return _of(self.op(*args), first)
        transformed = torch._C._functorch.maybe_current_level() is not None
        if transformed and self._draws and args[self.names.index(self._draws)]:
            args = _as_randomness_says(self.name, args)
        if forward_mode or transformed:
            return _of(self._function.apply(*args), first)
        tensors = self._tensors(args)
        if not is_plain(tensors):
            return _of(self.op(*args), first)
        if torch.is_grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return (self._direct_first if first else self._direct)(*args)
        return self._run(args, self._infer) if first else self._run(args)

    def raw(self, *args: Any, **named: Any) -> Any:
        """The computation alone, for operators that contain it; in the dtypes that it is given, under autocast too."""
        return self._run(self._positional(args, named))

    def _run(self, args: tuple, body: Callable[[Arguments], Any] | None = None) -> Any:
        bound = self._bind(args)
        body = self.body.forward if body is None else body
        if not torch._C._is_any_autocast_enabled():
            return body(bound)
        with torch._C._DisableAutocast():
            return body(bound)

    def _infer(self, a: Arguments) -> Tensor:
        infer = getattr(self.body, "infer", None)
        return _of(self.body.forward(a), True) if infer is None else infer(a)

    # Each call binds names once in either direction, on the host, which may be what a GPU waits for: no dict is built
    # to be thrown away, and places are looked up once for all calls.

    def _positional(self, args: tuple, named: dict[str, Any]) -> tuple:
        if len(args) == len(self.names):
            return args
        given = {**self._defaults, **named}
        return (*args, *(given[name] for name in self.names[len(args) :]))

    def _bind(self, args: Sequence[Any]) -> Arguments:
        bound = Arguments()
        bound.__dict__.update(zip(self.names, args))
        return bound

    # --- gradient ----------------------------------------------------------------------------------------------------

    def _make_backward(self, types: dict[str, str]) -> Operator:
        """Its arguments: gradients of results, saved tensors, constants, and one bit for each gradient wanted."""
        arguments = [f"Tensor? d_{name}" for name in self.gradients_of]
        arguments += [f"{types.get(name, 'Tensor')} {name}" for name in (*self.saves, *self.constants)]
        returns = ", ".join(f"Tensor d_{name}" for name in self.wrt)
        return Operator(
            _Backward(self, self.body), f"{self.name}_backward", f"({', '.join(arguments)}, int needs) -> ({returns})"
        )

    def _register_gradient(self) -> None:
        setup, backward = (self._setup, self._run_backward) if self.wrt else (_nothing, self._refuse_twice)
        self.op.register_autograd(backward, setup_context=setup)

        def refuse_tangent(ctx: Any, *tangents: Any) -> Any:
            self._refuse("forward-mode differentiation")

        op = self.op
        self._function = _function(
            self.name,
            {
                "forward": lambda *args: op(*args),
                "setup_context": setup,
                "backward": backward,
                "jvp": refuse_tangent,
                "vmap": self._rule(self),
            },
        )
        directly = self._run_backward_directly if self.wrt else self._refuse_twice
        self._direct, self._direct_first = (
            _apply_of(_function(self.name, {"forward": self._computing(setup, first), "backward": directly}))
            for first in (False, True)
        )

    def _computing(self, setup: Callable[..., None], first: bool) -> Callable[..., Any]:
        unseen = getattr(self.body, "unseen", None) if first else None

        def compute(ctx: Any, *args: Any) -> Any:
            # Not by setup_context, for which PyTorch inspects the signature at every call.
            output = self._run(args, unseen)
            if first and isinstance(output, tuple):
                setup(ctx, args, output, output[:1])
                return output[0]
            setup(ctx, args, output)
            return output

        return compute

    def _setup(self, ctx: Any, inputs: tuple, output: Any, returned: tuple | None = None) -> None:
        results = output if isinstance(output, tuple) else (output,)
        if returned is None:
            ctx.mark_non_differentiable(*self._stopping(results))
        there = (*inputs, *results)
        ctx.save_for_backward(*self._saved(there))
        ctx.constants = self._kept(there)
        ctx.set_materialize_grads(False)  # zeros as large as all that is saved

    def _run_backward(self, ctx: Any, *grads: Tensor | None) -> tuple:
        given, needs = self._asked_of(ctx, grads)
        if not needs:
            return (None,) * len(self.names)
        assert self.backward is not None
        found = self.backward(*given, *ctx.saved_tensors, *ctx.constants, needs)
        if isinstance(found, Tensor):  # the only one
            found = (found,)
        return self._by_place(dict(zip(self.wrt, found)), needs)

    def _run_backward_directly(self, ctx: Any, *grads: Tensor | None) -> tuple:
        """The same by the body, where the operator would come to that, too."""
        given, needs = self._asked_of(ctx, grads)
        if not needs:
            return (None,) * len(self.names)
        if torch.is_grad_enabled() or not is_plain(given):
            return self._run_backward(ctx, *grads)
        a, g = Arguments(), Arguments()
        a.__dict__.update(zip(self.saves, ctx.saved_tensors))
        a.__dict__.update(zip(self.constants, ctx.constants))
        g.__dict__.update(zip(self.gradients_of, given))
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.maybe_clear_saved_tensors()  # a body may let go of what it has read
        wanted = self._needs_of(needs)
        if not torch._C._is_any_autocast_enabled():
            return self._by_place(self.body.backward(a, g, wanted), needs)
        with torch._C._DisableAutocast():
            return self._by_place(self.body.backward(a, g, wanted), needs)

    def _asked_of(self, ctx: Any, grads: tuple) -> tuple[tuple, int]:
        """Gradients of the results that pass one on, and a bit for each gradient wanted: none where none is given."""
        given = self._passing(grads) if len(grads) > 1 else (*grads, *[None] * (len(self.gradients_of) - 1))
        needs = 0
        for i, want in enumerate(self._asked(ctx.needs_input_grad)):
            needs |= want << i
        for g in given:
            if g is not None:
                return given, needs
        return given, 0

    def _by_place(self, found: dict[str, Tensor], needs: int) -> tuple:
        """Those that are wanted, None for all other arguments."""
        gradients: list[Tensor | None] = [None] * len(self.names)
        for i, place in enumerate(self._wrt_places):
            if needs >> i & 1:
                gradients[place] = found[self.wrt[i]]
        return tuple(gradients)

    def _needs_of(self, bits: int) -> Arguments:
        found = self._needs.get(bits)
        if found is None:
            found = self._needs[bits] = Arguments(**{name: bool(bits >> i & 1) for i, name in enumerate(self.wrt)})
        return found

    def _refuse(self, what: str) -> None:
        name = self.name.removesuffix("_backward")
        raise RuntimeError(f"moa::{name}: {what} is not supported; reference.MixtureOfAttention supports it")

    def _refuse_twice(self, ctx: Any, *grads: Any) -> Any:
        self._refuse("double backward" if self.name.endswith("_backward") else "a gradient")

    # --- batching ----------------------------------------------------------------------------------------------------

    def _rule(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fold(info: Any, in_dims: tuple, *args: Any) -> tuple:
            assert self._folds is not None
            folded = []
            for name, arg, dim in zip(self.names, args, in_dims):
                if isinstance(arg, Tensor):
                    place, repeats = self._folds[name], info.batch_size if dim is None else -1
                    arg = arg.unsqueeze(0) if dim is None else arg.movedim(dim, 0)
                    arg = arg.expand(repeats, *arg.shape[1:]).movedim(0, place).flatten(place, place + 1)
                folded.append(arg)
            out = call(*folded)
            places = tuple(self._folds[name] for name in self.results)
            if isinstance(out, Tensor):
                return out.unflatten(places[0], (info.batch_size, -1)), places[0]
            return tuple(o.unflatten(p, (info.batch_size, -1)) for o, p in zip(out, places)), places

        def loop(info: Any, in_dims: tuple, *args: Any) -> tuple:
            drawing = self._draws and args[self.names.index(self._draws)]
            same = drawing and info.randomness == _SAME
            if drawing and info.randomness == _ERROR:
                _refuse_random(self.name)
            devices = sorted({a.device.index for a in args if isinstance(a, Tensor) and a.is_cuda}) if same else []
            results = []
            for i in range(info.batch_size):
                item = [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims)]
                # The draws of all items but the last are undone, so that equal items get equal masks.
                with torch.random.fork_rng(devices, enabled=bool(same) and i + 1 < info.batch_size):
                    results.append(call(*item))
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])

        return loop if self._folds is None else fold

    # --- counting ----------------------------------------------------------------------------------------------------

    def _count_flops(self) -> None:
        count = getattr(self.body, "flops", None)

        def formula(*args: Any, out_val: Any = None, **named: Any) -> int:
            if count is None:
                return 0
            return int(count(self._bind(self._positional(args, named)), out_val))

        flops.count(getattr(torch.ops.moa, self.name), formula)


class _Backward:
    """The body of a backward operator, from that of its forward."""

    def __init__(self, forward: Operator, body: Any) -> None:
        self._of, self._body = forward, body
        self._gradients = [(name, f"d_{name}") for name in forward.gradients_of]
        self.__doc__ = f"Gradients of moa::{forward.name}; empty where nobody asks for one."

    def _split(self, a: Arguments) -> tuple[Arguments, Arguments, Arguments]:
        g, there = Arguments(), a.__dict__
        for name, gradient in self._gradients:
            g.__dict__[name] = there[gradient]
        return a, g, self._of._needs_of(a.needs)

    def forward(self, a: Arguments) -> Tensor | tuple[Tensor, ...]:
        bound = self._split(a)
        found, needs = self._body.backward(*bound), bound[2].__dict__
        given = bound[1].__dict__.values()
        made = [found[name] if needs[name] else self._nothing(a) for name in self._of.wrt]
        # A gradient may be the given one; a result of an operator may not.
        return _only([t.clone() if any(t is g for g in given) else t for t in made])

    def fake(self, a: Arguments) -> Tensor | tuple[Tensor, ...]:
        needs = self._split(a)[2].__dict__
        return _only(
            [
                torch.empty_like(getattr(a, self._of.alike[name]), memory_format=torch.contiguous_format)
                if needs[name]
                else self._nothing(a)
                for name in self._of.wrt
            ]
        )

    def flops(self, a: Arguments, out: Any) -> int:
        count = getattr(self._body, "backward_flops", None)
        return 0 if count is None else int(count(*self._split(a)))

    def _nothing(self, a: Arguments) -> Tensor:
        """On the device of one that is always there: the first differentiable argument."""
        first = getattr(a, self._of.alike[self._of.wrt[0]])
        assert isinstance(first, Tensor)
        return first.new_empty(0)


def _of(results: Any, first: bool) -> Any:
    return results[0] if first and isinstance(results, tuple) else results


def _apart(results: Any) -> Any:
    """As the dispatcher wants them: no two results are one tensor."""
    if isinstance(results, Tensor):
        return results
    seen: set[int] = set()
    apart = []
    for t in results:
        apart.append(t.new_empty(t.shape) if id(t) in seen else t)
        seen.add(id(t))
    return tuple(apart)


def operator(schema: str, **declared: Any) -> Callable[[type], Operator]:
    """Make an `Operator` of a class of functions; see the top of this file."""

    def make(body: type) -> Operator:
        for name in ("forward", "infer", "unseen", "fake", "backward", "flops", "backward_flops"):
            if name in vars(body):
                setattr(body, name, staticmethod(vars(body)[name]))
        return Operator(body, body.__name__, schema, **declared)

    return make


def _only(results: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """As PyTorch has the results of an operator: a single one without a tuple."""
    return tuple(results) if len(results) > 1 else results[0]


def _picker(there: Sequence[str], names: Sequence[str]) -> Callable[[Sequence[Any]], tuple]:
    """Of values in the order of `there`, those of some names, as a tuple."""
    places = [there.index(name) for name in names]
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1)) if places else itemgetter(slice(0, 0))


def _function(name: str, methods: dict[str, Callable[..., Any]]) -> Any:
    return type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in methods.items()})


def _apply_of(function: Any) -> Callable[..., Any]:
    """`apply` without what torch.func needs of it, for calls outside of torch.func."""
    return super(torch.autograd.Function, function).apply


def _nothing(ctx: Any, inputs: tuple, output: Any, returned: tuple | None = None) -> None:
    """Nothing to keep for a backward that only refuses."""


def _refuse_random(name: str) -> None:
    raise RuntimeError(
        f"moa::{name}: vmap: called random operation while in randomness error mode; expected randomness='different' or"
        " 'same', or the layer in eval mode"
    )


def _as_randomness_says(name: str, args: tuple) -> tuple:
    """Arguments of a draw under vmap: none may happen under "error", and under "different" each item has its own.

    Where no argument is batched, PyTorch would not ask a batching rule at all.
    """
    from torch._C import _functorch as functorch

    for interpreter in functorch.get_interpreter_stack() or []:
        if interpreter.key() != functorch.TransformType.Vmap:
            continue
        vmap = functorch.CVmapInterpreterPtr(interpreter)
        if vmap.randomness() == functorch.RandomnessType.Error:
            _refuse_random(name)
        level = interpreter.level()
        if vmap.randomness() == functorch.RandomnessType.Different and not any(
            _is_batched_at(a, level) for a in args if isinstance(a, Tensor)
        ):
            first = next(i for i, a in enumerate(args) if isinstance(a, Tensor))
            wide = args[first].expand(vmap.batchSize(), *args[first].shape)
            args = (*args[:first], functorch._add_batch_dim(wide, 0, level), *args[first + 1 :])
    return args


def _is_batched_at(t: Tensor, level: int) -> bool:
    from torch._C import _functorch as functorch

    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t) and functorch.maybe_get_level(t) == level:
            return True
        t = functorch.get_unwrapped(t)
    return False
