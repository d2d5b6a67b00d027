"""`python -m optimized [FILE]`: the layer on a real text, held against the reference stage by stage.

Three parties compute the same: the reference in float64 (oracle), the reference in the dtype under test (baseline), and
this package. `reference.testing` says how far the last may be from the first. Decisions are compared apart from values:
which tokens are picked, and which scores saturate, are steps of the logits, where rounding may legally go either way.
So they are checked one by one, and then the oracle and the baseline are handed those of the package.

Our Triton kernels are held against PyTorch's own beside it, without a GPU in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

import optimized
import reference
from optimized import _plot, _report, _text, ops
from optimized._measure import Measured, measure
from optimized._report import Compared, Row, picked
from optimized.attention import module_name
from optimized.plan import Request, choose, obstacle
from optimized.mixture import _combine
from optimized.routed_attention import attend_rows, gather, rotate
from optimized.routing import Routes, route_both
from reference.routing import routing_logits
from reference.testing import STAGES, assert_matches

MIN_TOKENS = 256
SIDES = ("query", "key_value")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = 7
OWN = ("routing", "dispatch", "mixture")  # stages with kernels of ours
KERNEL_BOUND = 1e-10  # of relative differences in float64: seen are 1e-14 at most, and mistakes are far above
CHILD = "from optimized.__main__ import interpret; interpret()"
CHILD_SECONDS = 120  # far more than it takes: it hangs


def positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, _text.Text]:
    """Options and text, all checked before any work. Exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="python -m optimized",
        description="Run Mixture of Attention on a text, forward and backward, and hold every stage against the "
        "reference in float64, and our Triton kernels against PyTorch's. Exit status: 0 all within budget, 1 a stage "
        "failed, 2 wrong usage.",
    )
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="UTF-8 text (default: Python's own language reference)")
    add("--tokens", type=positive, default=8192, metavar="N", help="tokens taken from its start (default: %(default)s)")
    add("--dim", type=positive, default=256, metavar="D", help="model dimension (default: %(default)s)")
    add("--heads", type=positive, default=4, metavar="H", help="attention heads of D / H (default: %(default)s)")
    add("--experts", type=positive, default=4, metavar="E", help="experts (default: %(default)s)")
    add("--slots", type=positive, metavar="K", help="tokens that each expert picks (default: N / 8)")
    add("--window", type=positive, default=64, metavar="W", help="window of local attention (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of parameters and word vectors (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    add("--dtype", nargs="+", choices=DTYPES, help="(default: float32, and on cuda bfloat16 too)")
    add("--plot", type=Path, metavar="IMAGE", help="draw the routing map (.png, .pdf, .svg); needs matplotlib")
    add("--no-color", action="store_true", help="mark routed words by numbers in place of colours")
    args = parser.parse_args(argv)

    if args.dim % (2 * args.heads):
        parser.error(f"--dim: expected a multiple of 2 H = {2 * args.heads}, got {args.dim}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a device that is there, got 'cuda' without CUDA")
    if args.plot is not None and (reason := _plot.obstacle(args.plot)):
        parser.error(f"--plot: {reason}")
    try:
        text = _text.read(args.file, args.tokens)
    except ImportError:
        parser.error("FILE: expected a file, since this Python comes without pydoc_data.topics")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"FILE: expected a readable UTF-8 file, got {args.file}: {error}")
    n = len(text.tokens)
    if text.total < MIN_TOKENS:
        parser.error(f"FILE: expected at least {MIN_TOKENS} tokens, got {text.total} in {text.name}")
    if n < MIN_TOKENS:
        parser.error(f"--tokens: expected at least {MIN_TOKENS}, got {args.tokens}")
    args.slots = args.slots or n // 8
    # Near N nothing is left to choose, and the solver sits on its kinks.
    if args.slots > n // 2:
        parser.error(f"--slots: expected at most half of the {n} tokens, got {args.slots}")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.device.type == "cuda" else ["float32"])
    return args, text


@dataclass(frozen=True)
class Setup:
    """What all parties share: arguments of the layer, float32 state dict, input and cotangent (1, N, D)."""

    arguments: dict[str, Any]
    state: dict[str, Tensor]
    x: Tensor
    cotangent: Tensor
    device: torch.device


def prepare(args: argparse.Namespace, text: _text.Text) -> Setup:
    arguments = {
        "dim": args.dim,
        "heads": args.heads,
        "dim_head": args.dim // args.heads,
        "num_experts": args.experts,
        "num_routed_queries": args.slots,
        "num_routed_key_values": args.slots,
        "local_attn": True,
        "local_attn_window_size": args.window,
        "cosine_sim_routing": True,
        "dropout": 0.0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        state = reference.MixtureOfAttention(**arguments).state_dict()
        for name, t in state.items():
            if "norm" in name:
                t += 0.1 * torch.randn_like(t)  # ones and zeros would hide a scale or bias that is not applied
        cotangent = torch.randn(1, len(text.tokens), args.dim)
    return Setup(arguments, state, _text.embed(text.tokens, args.dim, args.seed)[None], cotangent, args.device)


class Decision(NamedTuple):
    """Of one router: the picked tokens (1, E, K), and which tokens saturate at each step of the solver (T, 1, E, N)."""

    indices: Tensor
    mask: Tensor
    saturated: Tensor


class Party:
    """An implementation in a dtype, on data rounded to the dtype under test."""

    def __init__(self, package: ModuleType, dtype: torch.dtype, under_test: torch.dtype, setup: Setup) -> None:
        def cast(t: Tensor) -> Tensor:
            return t.to(under_test).to(setup.device, dtype)

        self.package = package
        self.layer = package.MixtureOfAttention(**setup.arguments, device=setup.device, dtype=dtype)
        self.layer.load_state_dict({name: cast(t) for name, t in setup.state.items()})
        self.x = cast(setup.x).requires_grad_()
        self.cotangent = cast(setup.cotangent)
        self.routers = (self.layer.query_router, self.layer.key_value_router)
        self.slots = self.layer.num_routed_queries
        options = self.layer.query_router.options
        self.mass = min(self.slots * options.fetch_k_ratio, self.x.shape[1])
        self.solver = {name: getattr(options, name) for name in ("n_iters", "eps", "eps_init", "eps_decay")}

    def route(self) -> list[Any]:
        return [router(self.x, self.slots) for router in self.routers]

    def soft_scores(self, routes: list[Any]) -> list[Tensor]:
        return [self.package.coordinate_descent(r.logits, self.mass, **self.solver) for r in routes]

    def fixed(self, decision: Decision) -> Any:
        """Routes with these tokens, score 1 and no gradient."""
        wide = torch.promote_types(self.x.dtype, torch.float32)
        scores = decision.mask.to(wide)
        return self.package.Routes(
            decision.indices, decision.mask, scores, scores.new_zeros(decision.saturated[0].shape)
        )

    def replayed(self, router: Any, decision: Decision) -> Any:
        """The reference's routes with these decisions handed over; the scores carry the graph to the router."""
        logits = routing_logits(self.x, router.routing_token, router.options)
        soft = reference.coordinate_descent(logits, self.mass, saturated=decision.saturated, **self.solver)
        soft = soft.gather(-1, decision.indices)
        return reference.Routes(decision.indices, decision.mask, 1 + (soft - soft.detach()), logits)

    def routed_attention(self, decisions: list[Decision]) -> Tensor:
        attn, experts = self.layer.attn, self.layer.num_experts
        per_expert = {
            name: layer.weight.squeeze(-1).unflatten(0, (experts, -1))
            for name, layer in (("w_q", attn.to_q), ("w_kv", attn.to_kv), ("w_out", attn.to_out))
        }
        return self.package.routed_attention(
            self.x,
            self.x,
            *map(self.fixed, decisions),
            **per_expert,
            null_kv=attn.null_kv.squeeze(3),
            gamma=attn.norm.gamma.squeeze(-1),
            context_gamma=attn.context_norm.gamma.squeeze(-1),
        )

    def local_attention(self) -> Tensor:
        local = self.layer.local_attn
        return self.package.local_attention(
            self.x,
            local.window_size,
            w_qkv=local.to_qkv.weight,
            w_out=local.to_out.weight,
            heads=self.layer.heads,
            norm_weight=local.norm.weight,
            norm_bias=local.norm.bias,
        )

    def combine(self, y: Tensor, local: Tensor, decision: Decision) -> Tensor:
        dtype, n = self.x.dtype, self.x.shape[1]
        return self.package.combine(y.to(dtype), self.fixed(decision), n, local=local.to(dtype))

    def forward(self, decisions: list[Decision] | None = None) -> Tensor:
        """With its own routers, or with decisions handed over."""
        if decisions is None:
            return self.layer(self.x)
        return self.layer(self.x, routes=tuple(map(self.replayed, self.routers, decisions)))

    def warm_up(self) -> None:
        """A short run, so that nothing measured later has to load code."""
        slots = MIN_TOKENS // 4
        x = self.x[:, :MIN_TOKENS]
        self.layer(x, num_routed_queries=slots, num_routed_key_values=slots).sum().backward()
        self.layer.zero_grad()
        self.x.grad = None

    def backward(self, decisions: list[Decision] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Output, and gradients of x and all parameters."""
        leaves = {"x": self.x, **dict(self.layer.named_parameters())}
        out = self.forward(decisions)
        return out.detach(), dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), self.cotangent)))


def fraction(stage: str, *groups: dict[str, Tensor]) -> tuple[str, str | None]:
    """Verdict and failure for tensors by name: actual, oracle, baseline."""
    used = {}
    failures = []
    for name in groups[0]:
        try:
            used[name] = assert_matches(*(group[name] for group in groups), stage=stage, name=name).fraction
        except AssertionError as error:
            failures.append(str(error))
    if failures:
        return "FAIL", "\n".join(failures)
    return f"{max(used.values()):.2f}", None


def by_side(values: Iterable[Tensor]) -> dict[str, Tensor]:
    return dict(zip(SIDES, values))


def check_selection(actual: Sequence[Any], exact: Sequence[Any]) -> tuple[str, str | None]:
    """The oracle's choice but for tokens within rounding of the last place, and by the declared rule."""
    near = 0
    for side, mine, theirs in zip(SIDES, actual, exact):
        slots = mine.indices.shape[-1]
        differ = picked(mine) != picked(theirs)
        # A token and the K-th largest may each have moved by this much.
        error = (mine.logits.double() - theirs.logits).abs().amax(-1, keepdim=True)
        last = theirs.logits.topk(slots).values[..., -1:]
        wrong = differ & ~((theirs.logits - last).abs() <= 2 * error)
        if wrong.any():
            return "FAIL", f"selection {side}: {int(wrong.sum())} tokens chosen otherwise than their logits say"
        if not torch.equal(mine.indices, reference.select(mine.logits, slots)[0]):
            return "FAIL", f"selection {side}: not in the declared order, or ties not broken by it"
        if not mine.mask.all() or not (mine.scores == 1).all():
            return "FAIL", f"selection {side}: a slot is masked, or its straight-through score is not 1"
        near += int(differ.sum())
    return (f"{near} near ties" if near else "identical"), None


def decide(party: Party, routes: Sequence[Any], exact: Sequence[Any]) -> tuple[list[Decision], str | None]:
    """The package's decisions, and what is wrong with its saturated sets, if anything.

    s >= -a_t may differ from the oracle's where s is within the error that the budget of the scores allows for.
    """
    decisions, failure = [], None
    for side, mine, theirs in zip(SIDES, routes, exact):
        sets, gaps = [], []
        for logits in (mine.logits.detach(), theirs.logits.detach()):
            _, a, _ = torch.ops.moa.coordinate_descent(logits, None, party.mass, **party.solver)
            gaps.append(logits + a[..., None])
            sets.append(logits >= -a[..., None])
        gap = gaps[1][sets[0] != sets[1]].abs()
        size = 1 + party.solver["eps_init"] * math.log(party.x.shape[1]) + theirs.logits.abs().max().item()
        bound = STAGES["scores"].floor * torch.finfo(mine.logits.dtype).eps * size
        if not (gap <= bound).all():
            failure = (
                f"routing scores {side}: a token {gap.max().item():.3g} away from a kink of the solver changed sides"
            )
        decisions.append(Decision(mine.indices, mine.mask, sets[0]))
    return decisions, failure


class Proof(NamedTuple):
    """rows: one for each stage. routes: the package's, without graph. soft: its query soft scores (1, E, N), which aim
    at a sum of mass. backends: of the layer's own call, in words.
    """

    rows: list[Row]
    routes: tuple[Routes, Routes]
    soft: Tensor
    mass: float
    backends: str


def prove(setup: Setup, name: str, tick: Callable[[str], None]) -> Proof:
    """Compare all stages in one dtype. `tick` is told what comes next, STEPS times."""
    dtype = DTYPES[name]
    oracle, baseline = (Party(reference, d, dtype, setup) for d in (torch.float64, dtype))
    actual = Party(optimized, dtype, dtype, setup)
    rows: list[Row] = []

    def compare(call: Callable[[Party], Any]) -> tuple[list[Any], tuple[Measured, Measured]]:
        """Results of the three parties, actual first, and the figures of (reference, optimized)."""
        base, mine = (measure(partial(call, party), setup.device) for party in (baseline, actual))
        return [mine.value, call(oracle), base.value], (base, mine)

    def handed(party: Party) -> list[Decision] | None:
        return None if party is actual else decisions

    def add(stage: str, part: str, result: tuple[str, str | None], measured: Any = None) -> None:
        rows.append(Row(stage, backends[part].backend, name, *result, measured))

    tick("warming up")
    for party in (baseline, actual):
        party.warm_up()
    backends = optimized.explain(actual.layer, actual.x).stages
    own_call = ", ".join(f"{part} {report.backend}" for part, report in backends.items())
    with torch.no_grad():
        tick("routing")
        routes, measured = compare(Party.route)
        logits = [by_side(r.logits for r in pair) for pair in routes]
        add("routing logits", "routing", fraction("logits", *logits))
        soft = [by_side(party.soft_scores(pair)) for party, pair in zip((actual, oracle, baseline), routes)]
        decisions, failure = decide(actual, *routes[:2])
        result = fraction("scores", *soft)
        add("routing scores", "routing", ("FAIL", failure) if failure and not result[1] else result)
        add("selection", "routing", check_selection(*routes[:2]), measured)

        tick("routed attention")
        injected = tuple(map(actual.fixed, decisions))
        # Injected routes may hold masked slots, which not every backend can hide.
        backends = optimized.explain(actual.layer, actual.x, routes=injected).stages
        y, measured = compare(lambda party: party.routed_attention(decisions))
        add("routed attention", "routed_attention", fraction("routed_attention", *({"y": t} for t in y)), measured)
        tick("local attention")
        local, measured = compare(Party.local_attention)
        add("local attention", "local_attention", fraction("local_attention", *({"y": t} for t in local)), measured)
        tick("combination")
        terms = [exact.to(dtype) for exact in (y[1], local[1])]
        del y, local
        out, measured = compare(lambda party: party.combine(*terms, decisions[0]))
        add("combination", "mixture", fraction("combine", *({"out": t} for t in out)), measured)

        tick("layer, forward")
        forward = [measure(partial(party.forward, handed(party)), setup.device) for party in (baseline, actual)]
    tick("layer, forward and backward")
    runs, measured = compare(lambda party: party.backward(handed(party)))
    add("layer output", "mixture", fraction("mixture", *({"out": out} for out, _ in runs)), forward)
    routers = [parameter for parameter in setup.state if "router" in parameter]
    for title, stage, names in (
        ("gradients (x)", "mixture_gradient", ["x"]),
        ("gradients (parameters)", "mixture_gradient", [p for p in setup.state if p not in routers]),
        ("gradients (routers)", "router_gradient", routers),
    ):
        add(title, "mixture", fraction(stage, *({n: gradients[n] for n in names} for _, gradients in runs)))
    rows[-1].measured = measured
    return Proof(rows, tuple(routes[0]), soft[0]["query"], actual.mass, own_call)


def compare_kernels(setup: Setup, backend: str) -> list[Compared]:
    """Every stage with kernels of ours, by them and by PyTorch from the same inputs; in float64, where rounding hides
    nothing and no logit is within it of a kink.
    """
    party = Party(optimized, torch.float64, torch.float64, setup)
    layer, attn, x, n = party.layer, party.layer.attn, party.x, party.x.shape[1]
    with optimized.use_backends(**dict.fromkeys(OWN, "torch")), torch.no_grad():
        routes, inverse = layer.query_router.decide(x, party.slots)
        rows = gather(x, routes, inverse, None, triton=False)
    positions = routes.indices.transpose(0, 1).flatten(0, 1)
    cos, sin = ops.rotary_tables(n, layer.dim_head, x.device, x.dtype)
    routers, ks = (layer.query_router, layer.key_value_router), (party.slots, party.slots)
    attention = module_name(choose("routed_attention", Request(x.device, x.dtype, layer.dim_head)).name, x.device)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_()

    def by_triton() -> bool:
        return choose("dispatch", Request(x.device, x.dtype)).triton

    gamma = leaf(attn.norm.gamma)
    weights = [leaf(t) for t in (attn.to_q.weight, attn.to_kv.weight, attn.to_out.weight, attn.null_kv)]
    spread = torch.linspace(0.5, 1, routes.scores.numel(), dtype=x.dtype, device=x.device)
    scores, local = leaf(spread.view_as(routes.scores)), leaf(x)
    y, queries, keys_values = leaf(rows), leaf(rows), leaf(rows)
    q = leaf(rows.flatten(0, 1).unflatten(-1, (layer.heads, -1)))

    def route() -> tuple[Tensor, ...]:
        found = layer.query_router(x, party.slots)
        return found.logits, found.indices.double(), found.scores

    def dispatch() -> tuple[Tensor, ...]:
        return gather(x, routes, inverse, gamma, by_triton()), rotate(q, cos, sin, positions, by_triton())

    def route_all() -> tuple[Tensor, ...]:
        if by_triton():
            *found, q_routes, kv_routes, _ = route_both(x, routers, (None, None), (gamma, gamma), ks, None)
        else:
            decided = [router.decide(x, k) for router, k in zip(routers, ks)]
            found = [gather(x, *decision, gamma, triton=False) for decision in decided]
            q_routes, kv_routes = (taken for taken, _ in decided)
        return *found, q_routes.scores, kv_routes.scores

    def attend() -> tuple[Tensor, ...]:
        scored = routes._replace(scores=scores)
        settings = None, 0.0, False, False, True, by_triton()
        return (attend_rows(queries, keys_values, routes, scored, *weights, *settings),)

    def combine() -> tuple[Tensor, ...]:
        return (_combine(y, routes._replace(scores=scores), inverse, local, False, None, None, x.dtype),)

    def run(call: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], name: str) -> tuple[tuple[Tensor, ...], ...]:
        with optimized.use_backends(**dict.fromkeys(OWN, name)):
            outs = call()
            graph = [out for out in outs if out.requires_grad]
            generator = torch.Generator(x.device).manual_seed(0)
            cotangents = [torch.empty_like(out).normal_(generator=generator) for out in graph]
            return outs, torch.autograd.grad(graph, leaves, cotangents)

    found = []
    for stage, what, call, leaves in (
        ("routing", "logits, solver, selection", route, [x, layer.query_router.routing_token]),
        ("dispatch", "gather and norm, rotation", dispatch, [x, gamma, q]),
        ("both at once", "both routers, their rows", route_all, [x, gamma, *(r.routing_token for r in routers)]),
        ("experts", f"value scores, null slot of {attention}", attend, [queries, keys_values, scores, *weights]),
        ("combination", "sum over the experts", combine, [y, scores, local]),
    ):
        pairs = zip(run(call, leaves, backend), run(call, leaves, "torch"))
        found.append(Compared(stage, what, *(max_difference(mine, theirs) for mine, theirs in pairs)))
    return found


def max_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over the largest element; NaN if there is one anywhere."""
    found = [(a - b).detach().abs().max() / b.detach().abs().max() for a, b in zip(actual, expected)]
    return float(torch.stack(found).max())


def run_kernels(setup: Setup) -> tuple[str, list[Compared], str | None]:
    """Where and on what our kernels ran, what was found, and what went wrong with the run itself."""
    if obstacle("routing", "triton", Request(setup.device, torch.float64)) is None:
        return f"compiled, all {setup.x.shape[1]} tokens", compare_kernels(setup, "triton"), None
    excerpt = min(MIN_TOKENS, max(640 // setup.arguments["num_experts"], 64))
    slots = dict.fromkeys(("num_routed_queries", "num_routed_key_values"), excerpt // 8)
    x, cotangent = setup.x[:, :excerpt], setup.cotangent[:, :excerpt]
    small = replace(setup, arguments=setup.arguments | slots, x=x, cotangent=cotangent, device=torch.device("cpu"))
    where = f"in Triton's interpreter, an excerpt: the first {excerpt} tokens, {excerpt // 8} slots"
    why_not = obstacle("routing", "triton_interpreted", Request(small.device, torch.float64))
    if why_not is None:
        return where, compare_kernels(small, "triton_interpreted"), None
    if why_not == "needs TRITON_INTERPRET=1":
        found, broken = _run_in_child(small)
        if not isinstance(found, str):
            return where, found, broken
        why_not = found
    return f"not run: {why_not}", [], None


def _run_in_child(setup: Setup) -> tuple[list[Compared] | str, str | None]:
    """What it found, or why it can't run; and what went wrong. Triton decides at its import whether it interprets."""
    data = io.BytesIO()
    names = ("arguments", "state", "x", "cotangent")
    torch.save({name: getattr(setup, name) for name in names}, data)
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", CHILD]
    try:
        done = subprocess.run(
            command, input=data.getvalue(), env=environment, capture_output=True, check=True, timeout=CHILD_SECONDS
        )
        found = json.loads(done.stdout.splitlines()[-1])
        return found if isinstance(found, str) else [Compared(*row) for row in found], None
    except subprocess.TimeoutExpired:
        return [], f"kernels: not done within {CHILD_SECONDS} s"
    except subprocess.CalledProcessError as error:
        return [], f"kernels: their process ended with {error.returncode}\n{error.stderr.decode()[-2000:]}"


def interpret() -> None:
    """The child's side: a setup from standard input, the rows to standard output."""
    setup = Setup(**torch.load(io.BytesIO(sys.stdin.buffer.read())), device=torch.device("cpu"))
    why_not = obstacle("routing", "triton_interpreted", Request(setup.device, torch.float64))
    print(json.dumps(why_not or compare_kernels(setup, "triton_interpreted")))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every row is within its budget or bound, else 1. Raises SystemExit(2) for wrong usage."""
    args, text = parse(argv)
    started = time.perf_counter()
    console = _report.make_console(not args.no_color)
    console.print(_report.header(args, text))
    console.print()
    setup = prepare(args, text)
    proofs = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=STEPS * len(args.dtype) + 1)
        for name in args.dtype:

            def tick(what: str, name: str = name) -> None:
                progress.update(task, description=f"{what}, {name}", advance=1)

            proofs.append(prove(setup, name, tick))
        tick("kernels", "float64")
        where, kernels, broken = run_kernels(setup)
    rows = [row for proof in proofs for row in proof.rows]
    console.print(_report.results(rows, args.device))
    for own in dict.fromkeys(proof.backends for proof in proofs):
        names = ", ".join(name for name, proof in zip(args.dtype, proofs) if proof.backends == own)
        console.print(f"Backends of the layer's own call, {names}: {own}")
    console.print()
    console.print(_report.kernels(kernels, where, KERNEL_BOUND))
    console.print()
    _report.show_routing(console, text, proofs[0].routes)
    if args.plot is not None:
        queries, keys_values = proofs[0].routes
        _plot.draw(args.plot, text, queries, keys_values, proofs[0].soft[0], proofs[0].mass)
        console.print(f"Routing map: {args.plot}", markup=False)
    failures = [row.failure for row in rows if row.failure]
    failures += [f"kernels of {row.stage}: unlike PyTorch's" for row in kernels if not row.within(KERNEL_BOUND)]
    failures += [broken] if broken else []
    for failure in failures:
        console.print(f"\n{failure}", style="red", markup=False)
    seconds = time.perf_counter() - started
    if failures:
        total = len(rows) + len(kernels) + bool(broken)
        console.print(f"\n[bold red]FAIL[/]  {len(failures)} of {total} rows, {seconds:.1f} s")
        return 1
    equal = f", kernels of {len(kernels)} stages equal PyTorch's" * bool(kernels)
    console.print(f"\n[bold green]PASS[/]  {len(rows)} rows within budget{equal}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
