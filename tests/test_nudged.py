"""What the main job's budgets know of rounding, and that no legal options and no text make it fail a right layer."""

from __future__ import annotations

import contextlib
import io
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import reference
from optimized.prove import arguments, job, measure, setup, stages
from optimized.prove.nudged import DRAWS, NUDGE, Nudged
from reference.local_attention import rotary_angles

pytestmark = pytest.mark.cpu


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def scale(call: Callable[..., Tensor], *given: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """As `stages.fraction` has it."""
    exact, found = call(*given), []
    for draw in range(DRAWS):
        rounding = Nudged(dtype, draw)
        moved = [rounding.nudge(t, rounding.wide) for t in given]
        with rounding:
            found.append((call(*moved) - exact).abs().max().item() / NUDGE)
    return max(found)


def test_terms_that_cancel_are_seen() -> None:
    """A sum of 1e6, 1 and -1e6: the error is one of 1e6."""
    terms = torch.tensor([1e6, 1.0, -1e6], dtype=torch.float64).repeat(32, 1)
    assert 1e6 <= scale(lambda t: t.sum(-1), terms) <= 4e6
    assert 1e6 <= scale(lambda t: t @ torch.ones(3, 1, dtype=torch.float64), terms) <= 4e6


def test_a_cold_exponential_is_seen() -> None:
    """Of the solver: a relative error of a logit becomes one that is |s| / eps times as large, in values and gradients.

    Where cosines are about 1 the logits hardly change with the tokens, and still are rounded themselves.
    """
    s, eps = 8 + 0.05 * normal(1, 1, 256), 0.03
    size = s.abs().max().item() / eps
    values = scale(lambda t: reference.coordinate_descent(t, 30.0, eps=eps), s)
    assert 0.3 * size <= values <= 40 * size
    token, x = torch.tensor([[1.0, 1e-4]], dtype=torch.float64), torch.tensor([1.0, 0.0]).double().repeat(256, 1)
    x[:, 1] = torch.linspace(-0.1, 0.1, 256)
    options = reference.contract.RouterOptions(cosine_sim_routing=True)
    seen = scale(lambda x, r: reference.routing.routing_logits(x[None], r, options), x, token)
    assert seen >= 0.5 * options.cosine_sim_scale


def test_keys_that_are_alike_are_seen() -> None:
    """The gradient of a softmax over equal values is 0: what is left is the error of a flash backward's delta."""
    heads, keys, d = 4, 64, 8
    key, value = normal(d), normal(d)
    g = normal(heads, 16, d)

    def gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.detach().requires_grad_()
        return torch.autograd.grad((q @ k.mT).softmax(-1) @ v, q, g)[0]

    given = normal(heads, 16, d), key.expand(heads, keys, d).clone(), value.expand(heads, keys, d).clone()
    terms = ((g * value).sum(-1, keepdim=True) * key).abs().max().item()
    assert gradient(*given).abs().max() <= 1e-10 * terms
    assert terms / 2 <= scale(gradient, *given) <= 8 * terms


def test_the_norm_of_a_token_whose_channels_are_alike_is_seen() -> None:
    """(x - mean) / std: an error of x is |x| / std times as large."""
    for apart in (1e-1, 1e-2):
        x = torch.tensor([3.0, 3.0 + apart, 3.0, 3.0 - apart], dtype=torch.float64).repeat(32, 1)
        std = x.std(-1, correction=0).max().item()
        seen = scale(lambda x: torch.nn.functional.layer_norm(x, (4,)), x)
        assert 1 / std <= seen <= 16 / std


def test_what_is_well_conditioned_stays_tight() -> None:
    """Else faults would go unseen; and angles, which all parties have in float64, do not move."""
    x, w = normal(64, 32), normal(32, 32)
    assert scale(lambda x, w: (x @ w).softmax(-1) @ w, x, w) <= 32 * (x @ w).softmax(-1).matmul(w).abs().max()
    assert scale(lambda x: x, x) == pytest.approx(x.abs().max().item())
    exact = rotary_angles(300, 8, torch.device("cpu")).cos()
    with Nudged(torch.float32, 0):
        assert torch.equal(rotary_angles(300, 8, torch.device("cpu")).cos(), exact)


def test_routers_are_not_taken_for_half_precision() -> None:
    """They compute in float32 whatever the dtype: else a cold solver would leave bfloat16 no bound on gradients."""
    s = 8 + 0.05 * normal(1, 1, 256)

    def solve(s: Tensor) -> Tensor:
        return reference.coordinate_descent(s, 30.0)

    assert scale(solve, s, dtype=torch.bfloat16) == pytest.approx(2**-16 * scale(solve, s), rel=0.01)
    assert scale(lambda x: x @ x.mT, normal(8, 8), dtype=torch.bfloat16) >= 1


@pytest.mark.usefixtures("once")
def test_ordinary_runs_keep_tight_budgets(tmp_path: Path) -> None:
    """No budget is so large that a right result takes next to nothing of it, in any dtype."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=400)), encoding="utf-8")
    options = "--dim 32 --heads 2 --experts 2 --slots 50 --window 9 --device cpu"
    argv = [str(path), *options.split()]
    args, text = arguments.parse(argv)
    for name in arguments.DTYPES:
        proof = stages.prove(setup.prepare(args, text), name, lambda what: None)
        rows = {row.stage: row.verdict for row in proof.rows if row.stage != "selection"}
        assert [stage for stage, verdict in rows.items() if not 0.01 <= float(verdict) <= 1] == [], (name, rows)


PROSE = "it is a truth universally acknowledged that single man in possession of good fortune must be want wife"
WORDS = PROSE.split()
TEXTS: dict[str, Callable[[random.Random, int], list[str]]] = {
    "one word": lambda r, n: ["word"] * n,
    "two letters": lambda r, n: [r.choice("ab") for _ in range(n)],
    "a period": lambda r, n: (r.sample(WORDS, r.randint(2, 16)) * n)[:n],
    "letters": lambda r, n: [chr(97 + r.randrange(26)) for _ in range(n)],
    "punctuation": lambda r, n: [r.choice(".,!?a") for _ in range(n)],
    "runs": lambda r, n: [word for _ in range(n) for word in [r.choice(WORDS)] * 8][:n],
    "prose": lambda r, n: [r.choice(WORDS) for _ in range(n)],
}


def draw(index: int) -> tuple[str, list[str]]:
    """A text, and options that are legal for it: the small and the repetitive more often than users would."""
    r = random.Random(index)
    words = TEXTS[r.choice(list(TEXTS))](r, r.choice([256, 257, 300, 400]))
    heads = r.choice([1, 1, 2, 4, 8])
    options = {
        "dim": 2 * heads * r.choice([1, 1, 2, 4, 8]),
        "heads": heads,
        "experts": r.choice([1, 1, 2, 4, 7]),
        "slots": r.choice([1, 2, 3, 16, 32, 100, 128]),
        "window": r.choice([1, 2, 5, 64, 1000]),
        "seed": r.randrange(1000),
        "dtype": r.choice(["float32", "float32", "bfloat16", "float16"]),
    }
    return " ".join(words), [word for name, value in options.items() for word in (f"--{name}", str(value))]


def failures(text: str, options: list[str], tmp_path: Path) -> list[str]:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    args, read = arguments.parse([str(path), "--device", "cpu", *options])
    proof = stages.prove(setup.prepare(args, read), args.dtype[0], lambda what: None)
    return [f"{options}: {row.stage}: {row.failure}" for row in proof.rows if row.failure]


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage is computed once, not to be timed."""
    monkeypatch.setattr(stages, "measure", lambda call, device: measure.Measured(call(), 0.0, None))


@pytest.mark.usefixtures("once")
def test_no_false_alarm(tmp_path: Path) -> None:
    """A sample of what `test_no_false_alarm_in_hundreds` draws."""
    assert [failure for index in range(12) for failure in failures(*draw(index), tmp_path)] == []


@pytest.mark.nightly
@pytest.mark.usefixtures("once")
def test_no_false_alarm_in_hundreds(tmp_path: Path) -> None:
    assert [failure for index in range(12, 400) for failure in failures(*draw(index), tmp_path)] == []


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["word"], "--dim 2 --heads 1 --experts 1 --slots 128 --window 1000 --seed 535"),  # cosines of 1, a cold solver
        (["word"], "--dim 4 --heads 1 --experts 4 --slots 128 --window 1000 --seed 158"),  # keys that are alike
        (["a", "b", "b"], "--dim 2 --heads 1 --experts 1 --slots 100 --window 5 --seed 861 --dtype bfloat16"),
        (["a", "b"], "--dim 64 --heads 8 --experts 1 --window 5 --seed 683 --dtype bfloat16"),
        (WORDS[:5], "--dim 8 --heads 4 --experts 1 --slots 100 --window 64 --seed 377 --dtype float16"),
    ],
)
@pytest.mark.usefixtures("once")
def test_repetitive_texts_and_few_channels_pass(words: list[str], options: str, tmp_path: Path) -> None:
    text = " ".join(words * math.ceil(256 / len(words)))
    assert failures(text, options.split(), tmp_path) == []


@pytest.mark.usefixtures("once")
def test_a_zero_gradient_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the solver saturates on all that is picked no gradient reaches a router: the job says so and passes."""
    monkeypatch.setattr(job, "run_kernels", lambda setup: ("not run", [], None))
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 20), encoding="utf-8")
    printed = io.StringIO()
    argv = [str(path), "--dim", "16", "--heads", "1", "--experts", "1", "--slots", "1", "--device", "cpu"]
    with contextlib.redirect_stdout(printed):
        status = job.main(argv)
    text = re.sub(r"[\u2500-\u257f\s]+", " ", printed.getvalue())
    assert status == 0, text
    zeros = re.findall(r"(?:query|key_value)_router.routing_token: expected zeros", text)
    assert zeros, text
    assert ("gradients (routers) torch float32 zeros" in text) == (len(zeros) == 2)
    assert "Announced to the comparison, gradients (routers), float32: " in text
