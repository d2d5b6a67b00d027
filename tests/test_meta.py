"""Of the suite itself, read as source: numbers are compared by the comparator or exactly, and nothing passes idly."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
FOLDERS = ("campaign", "conformance", "faults", "parallel", "programs")
FILES = sorted([*TESTS.glob("*.py"), *(p for folder in FOLDERS for p in (TESTS / folder).rglob("*.py"))])
TOLERANT = {"allclose", "assert_close", "assert_allclose", "isclose", "approx", "assert_almost_equal"}
SIZES = {"abs", "norm", "vector_norm"}
ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
MARKS = {"skip", "skipif", "xfail", "importorskip"}

# Why a tolerance of its own is right there.
ORACLE = "float64 on either side, from the definition or by another way that it allows: 1e-11 to 1e-8 of the largest"
IDENTITY = "float64: two computations that are equal but for the order of rounding, to 1e-8 or less"
BY_HAND = "float64, or a factor: a value that the test knows in closed form"
ANOTHER_METHOD = "another derivative, or finite differences, whose own error is larger than any rounding"
CANCELS = "what cancels to nothing, relative to the terms that cancelled: no oracle to be relative to"
KINK = "on which side of a kink a logit lies: a margin, no result"
BOUND = "an inequality, with a margin for rounding"
STATISTICS = "of random draws: a bound on deviations, not on rounding"
UPSTREAM = "re-enacts a public package's defect in float64: the error is of order 1"
SAME_LAYER = "whether the same numbers are held, in float32: 1e-4, where others differ by order 1"
AUTOCAST = "autocast chooses dtypes by operation: no baseline does the same"
THEIRS = "of somebody else's kernel or layer"
GPU_ATOMICS = "gradients of flash kernels, which add up atomically"
NO_TENSOR = "numbers of a report"
WRONG_ON_PURPOSE = "that a result is wrong, or another"

TOLERANCES: dict[str, str] = {
    "test_autoregressive.py::same": ORACLE,
    "test_autoregressive.py::check_decisions": ORACLE,
    "test_autoregressive.py::test_a_cache_is_constant_in_size_and_never_changed": "no tolerance, but NaN equals NaN",
    "programs/test_causal.py::test_half_precision": AUTOCAST,
    "programs/test_causal.py::test_a_hook_changes_what_comes_of_it": WRONG_ON_PURPOSE,
    "test_sigmoid.py::test_routes": ORACLE,
    "test_sigmoid.py::test_every_chosen_logit_has_a_gradient": IDENTITY,
    "test_sigmoid.py::test_the_layer_by_definition": ORACLE,
    "test_sigmoid.py::test_optimized_matches": ORACLE,
    "test_sigmoid.py::test_a_compiled_layer_is_the_eager_one": IDENTITY,
    "programs/layers.py::assert_same": IDENTITY,
    "test_operators.py::test_a_token_far_from_all_others_that_experts_took": "float64: a few operations",
    "test_operators.py::test_tokens_that_the_last_experts_alone_took": "float64: a few operations",
    "test_operators.py::test_cosine_routing_of_less_than_the_least_norm": "float64: a few operations",
    "parallel/cases.py::assert_equal": "float64: sums over ranks in another order, to 1e-12 of the largest",
    "test_modules.py::assert_agrees": IDENTITY,
    "test_modules.py::test_hooks_change_the_result": WRONG_ON_PURPOSE,
    "test_modules.py::test_replaced_router_decides": WRONG_ON_PURPOSE,
    "test_modules.py::test_attached_to_a_projection": WRONG_ON_PURPOSE,
    "test_modules.py::test_each_router_has_its_own_options": WRONG_ON_PURPOSE,
    "test_modules.py::test_randomness_of_vmap": WRONG_ON_PURPOSE,
    "test_modules.py::test_bias_put_on_a_projection": WRONG_ON_PURPOSE,
    "test_attention.py::check_shifted": CANCELS,
    "test_memory_attention.py::check_close": ORACLE,
    "test_memory_attention.py::test_some_blocks_at_a_time": IDENTITY,
    "test_memory_attention.py::test_other_dtypes": "some units in the last place of the largest: cases.py has budgets",
    "test_memory_attention.py::test_many_blocks_on_a_gpu": "the same, of longer sums",
    "test_memory_attention.py::test_dropout_drops_as_many_as_it_says": STATISTICS,
    "test_window.py::check_against_all_pairs": IDENTITY,
    "test_window.py::test_logits_far_from_zero": CANCELS,
    "test_attention.py::test_null_slot_takes_queries_in_any_order_of_memory": IDENTITY,
    "test_modules.py::test_large_angles_of_float64": "that an error is a small part of another",
    "test_routing.py::test_gradient_of_logits_of_a_compiled_router": IDENTITY,
    "test_mixture.py::test_returned_routes_at_the_edge_of_a_choice": IDENTITY,
    "test_nudged.py::test_a_cold_exponential_is_seen": "of a budget's scale, not of a result: its order of magnitude",
    "test_nudged.py::test_keys_that_are_alike_are_seen": "the same, and what is left in float64 of a zero",
    "test_nudged.py::test_what_is_well_conditioned_stays_tight": "of a budget's scale, which random signs make vary",
    "test_modules.py::test_norms_round_once": "of half precision: half a unit in the last place, not a budget",
    "test_local_attention.py::test_wide_window_is_full_attention": IDENTITY,
    "test_local_attention.py::test_padding_changes_nothing": IDENTITY,
    "test_local_attention.py::test_one_operator_for_a_windowed_kernel": IDENTITY,
    "test_mixture.py::test_token_permutation_equivariance": IDENTITY,
    "test_mixture.py::test_expert_relabelling": IDENTITY,
    "test_mixture.py::test_batch_invariance_with_injected_routes": IDENTITY,
    "test_mixture.py::test_padding_changes_nothing": IDENTITY,
    "test_mixture.py::test_average_divides_by_the_number_of_terms": IDENTITY,
    "test_mixture.py::test_returned_routes_reproduce_the_output": IDENTITY,
    "test_mixture.py::test_x_as_its_own_context": IDENTITY,
    "test_mixture.py::test_context_without_tokens": IDENTITY,
    "test_mixture.py::test_a_hook_on_each_submodule": IDENTITY,
    "test_mixture.py::test_norms_of_two_dtypes": SAME_LAYER,
    "test_mixture.py::test_more_items_than_a_grid_is_wide": SAME_LAYER,
    "test_operators.py::check_forms": IDENTITY,
    "test_operators.py::test_a_cotangent_of_nan_where_a_window_is_nan": IDENTITY,
    "test_operators.py::test_straight_through_has_the_gradient_of_soft_scores": IDENTITY,
    "test_operators.py::check_gradient": IDENTITY,
    "test_operators.py::test_each_result_passes_its_gradient_on": IDENTITY,
    "test_operators.py::test_one_graph_for_all_lengths": IDENTITY,
    "test_operators.py::test_gradient_of_a_temperature_that_falls": CANCELS,
    "test_rows.py::test_solvers_are_pytorchs": IDENTITY,
    "test_rows.py::test_solvers_beyond_their_blocks": IDENTITY,
    "test_rows.py::test_long_rows_descend_as_any": IDENTITY,
    "test_rows.py::test_parts_of_a_row_sum_its_first_gradient": IDENTITY,
    "test_local_attention.py::test_rotary_tables": BY_HAND,
    "test_mixture.py::test_combination_counts_by_hand": BY_HAND,
    "test_operators.py::test_rotation_by_hand": BY_HAND,
    "test_large.py::test_rotary_tables": BY_HAND,
    "test_operators.py::test_combination_and_its_gradients": BY_HAND,
    "test_operators.py::test_batching_rules": IDENTITY,
    "test_operators.py::test_vmap_over_inputs": IDENTITY,
    "test_operators.py::test_vmap_over_parameters": IDENTITY,
    "test_operators.py::test_gradients_per_sample": IDENTITY,
    "test_routed_attention.py::test_linear_in_the_values": IDENTITY,
    "test_routed_attention.py::test_order_of_the_slots": IDENTITY,
    "test_routed_attention.py::test_rotation_depends_on_differences": IDENTITY,
    "test_routed_attention.py::test_dropout_equals_the_reference_given_its_mask": IDENTITY,
    "test_routing.py::test_exact_solver_ignores_a_shift_the_iterates_do_not": IDENTITY,
    "test_validation.py::test_strides_are_legal": IDENTITY,
    "test_local_attention.py::test_probabilities_sum_to_one": BY_HAND,
    "test_routed_attention.py::test_probabilities_sum_to_one": BY_HAND,
    "test_routed_attention.py::test_null_slot_alone": BY_HAND,
    "test_routing.py::test_exact_solver_solves_the_mass_equation": BY_HAND,
    "test_routing.py::test_exact_gradient_at_a_kink": BY_HAND,
    "test_attention.py::test_dropout_given_the_kernels_own_draw": BY_HAND,
    "test_draws.py::test_tiles_are_what_all_is_at_once": IDENTITY,
    "test_draws.py::test_the_share_that_is_dropped": STATISTICS,
    "test_draws.py::test_no_two_queries_and_no_two_keys_are_related": STATISTICS,
    "test_operators.py::test_forward_mode_is_refused_or_right": ANOTHER_METHOD,
    "test_operators.py::test_double_backward_is_refused_or_right": ANOTHER_METHOD,
    "runs.py::compare": CANCELS,
    "test_routing.py::check_gradient": CANCELS,
    "test_routing.py::test_exact_gradient_matches": CANCELS,
    "test_rows.py::test_picked_backward_is_the_dense_one": CANCELS,
    "test_routing.py::test_descent_gradient_matches": KINK,
    "test_routing.py::test_iterative_tends_to_exact": BOUND,
    "test_boundaries.py::test_local_attention_around_its_blocks": IDENTITY,
    "test_completeness.py::check_gradient": IDENTITY,
    "test_poison.py::test_stages_take_every_layout": IDENTITY,
    "test_poison.py::check_layouts": IDENTITY,
    "test_proofs.py::test_certificate_of_the_exact_solver": BOUND,
    "test_proofs.py::test_certificate_of_the_exact_solvers_gradient": BOUND,
    "test_routing.py::test_mass_error_never_grows": BOUND,
    "test_routing.py::test_twenty_iterations_are_far_from_the_limit": BOUND,
    "test_backends.py::test_meta_construction_and_reset": BOUND,
    "test_routed_attention.py::test_dropout_is_unbiased_and_fresh": STATISTICS,
    "test_public_defects.py::test_defect_10_negative_control": STATISTICS,
    "test_public_defects.py::test_defect_02_unit_rms": UPSTREAM,
    "test_public_defects.py::test_defect_04_one_combination_rule": UPSTREAM,
    "test_public_defects.py::test_defect_05_padding_invariance": UPSTREAM,
    "test_public_defects.py::test_defect_06_relative_position": UPSTREAM,
    "test_public_defects.py::test_defect_15_batch_isolation_and_invariance": UPSTREAM,
    "test_backends.py::test_state_dict_both_ways": SAME_LAYER,
    "test_backends.py::test_copies": SAME_LAYER,
    "test_backends.py::test_subsets_of_gradients": SAME_LAYER,
    "test_gpu_lane.py::test_layer_with_other_numbers_of_warps": SAME_LAYER,
    "test_backends.py::test_autocast": AUTOCAST,
    "conformance/subject.py::assert_unchanged": THEIRS,
    "test_benchmarks.py::flex_pairs": THEIRS,
    "test_benchmarks.py::test_counts_of_the_causal_layer": NO_TENSOR,
    "test_docs.py::test_the_causal_layer_is_used_as_its_page_says": SAME_LAYER,
    "test_noise.py::test_a_model_learns": STATISTICS,
    "test_noise.py::test_the_optimized_layer_trains_as_the_reference": SAME_LAYER,
    "test_learning.py::test_the_leaking_control_is_that_of_the_noise": IDENTITY,
    "test_learning.py::test_losses_from_prefixes": "whether two losses are one, in float32: what leaks is apart",
    "test_learning.py::test_the_report": NO_TENSOR,
    "programs/test_fast_calls.py::close": SAME_LAYER,
    "test_train.py::test_two_processes_are_one": "float32 sums over processes in another order, and an optimizer",
    "test_train.py::test_ways_of_one_loss": "the same, over parts of a batch",
    "test_benchmarks.py::test_graphs_have_the_gradients_of_an_eager_call": SAME_LAYER,
    "campaign/oracles.py::cap": BY_HAND,
    "test_campaign.py::test_drift_bounds_the_iterates": BOUND,
    "test_mixture.py::test_both_routers_at_once": IDENTITY,
    "test_campaign.py::test_rows_of_many_cases_are_solved_as_if_alone": IDENTITY,
    "test_campaign.py::test_solver_gradients_are_those_of_autograd": IDENTITY,
    "test_campaign.py::test_fractions_are_those_of_the_comparator": NO_TENSOR,
    "test_cuda_graphs.py::assert_equal_eager": GPU_ATOMICS,
    "test_benchmarks.py::test_counts_of_the_specification": NO_TENSOR,
    "test_benchmarks.py::test_pairs_of_a_window": NO_TENSOR,
    "test_benchmarks.py::test_profile_of_three_calls": NO_TENSOR,
    "test_benchmarks.py::test_ceilings_are_in_their_units": NO_TENSOR,
    "test_interpreter.py::test_bfloat16_arithmetic_is_that_of_its_bits": WRONG_ON_PURPOSE,
    "test_nudged.py::test_routers_are_not_taken_for_half_precision": BY_HAND,
}

# Where gradients are made with no cotangent but ones, and why.
PLAIN_ONES = {
    "test_autoregressive.py::test_every_parameter_has_a_gradient": "that there is a gradient: no values",
    "test_backends.py::test_inputs_are_left_alone_and_calls_repeat": "that a backward leaves inputs alone: no values",
    "test_backends.py::test_backends_are_chosen_once_for_a_kind_of_call": "how often backends are chosen: no values",
    "test_operators.py::counts_of_a_layer": "FLOPs: no values",
    "test_local_attention.py::test_memory_is_linear_in_the_length": "sizes of tensors: no values",
    "test_validation.py::test_edges_are_legal": "that there is a gradient, and its shape: no values",
}

# Where the negation of an order is asserted, which a NaN would pass.
NEGATED_ORDERS = {
    "test_compilation.py::test_defect_08_compiles_for_every_dtype": "bytes, as integers",
    "test_proofs.py::test_certificate_of_the_exact_solvers_gradient": "which rows fit: counts, as integers",
    "test_nudged.py::test_ordinary_runs_keep_tight_budgets": "of what a list keeps: a NaN is kept",
}

# Where a test is skipped, and why.
SKIPS = {"conformance/test_conformance.py::test_conformance": "what somebody else's layer does not offer"}

Rule = Callable[[ast.AST], Iterator[int]]


class Site(NamedTuple):
    """Where something was found: file::outermost function or class, and the line."""

    where: str
    line: int


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Outermost definitions, methods by their own names, and what lies outside of any."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                name = f".{inner.name}" if isinstance(inner, ast.FunctionDef) else ""
                yield node.name + name, inner
        else:
            yield getattr(node, "name", "<module>"), node


def name_of(node: ast.AST) -> str:
    """Of what is called: the last part of a dotted name."""
    function = node.func if isinstance(node, ast.Call) else node
    return getattr(function, "attr", getattr(function, "id", ""))


def calls(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(n, ast.Call) and name_of(n) in names for n in ast.walk(node))


def sized(function: ast.AST) -> set[str]:
    """Local names that hold an absolute value or a norm."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and calls(node.value, SIZES):
            found |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def conditions(function: ast.AST) -> Iterator[ast.expr]:
    """What is asserted, or decides about raising."""
    for node in ast.walk(function):
        raises = isinstance(node, ast.If) and any(isinstance(n, ast.Raise) for n in node.body)
        if raises or isinstance(node, ast.Assert):
            yield node.test


def tolerances(function: ast.AST) -> Iterator[int]:
    """Lines of tolerant functions, and of orders between a size and something else."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and name_of(node) in TOLERANT:
            yield node.lineno
    held = sized(function)
    for condition in conditions(function):
        for node in ast.walk(condition):
            if isinstance(node, ast.Compare) and any(isinstance(op, ORDER) for op in node.ops):
                inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                if calls(node, SIZES) or inside & held:
                    yield node.lineno


def plain_ones(function: ast.AST) -> Iterator[int]:
    """Lines where what is differentiated is a plain sum, or the cotangent is ones."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr == "backward":
            of, given = node.func.value, node.args[:1]
        elif node.func.attr == "grad" and name_of(node.func.value) == "autograd":
            of, given = node.args[0], node.args[2:3]
        else:
            continue
        if calls(given[0], {"ones", "ones_like"}) if given else plain_sum(of):
            yield node.lineno


def plain_sum(node: ast.AST) -> bool:
    """x.sum() of an x that is no square, power or product."""
    if not (isinstance(node, ast.Call) and name_of(node) == "sum" and isinstance(node.func, ast.Attribute)):
        return False
    x = node.func.value
    return not (name_of(x) in {"square", "pow", "sin", "exp"} or isinstance(x, ast.BinOp))


def negated_orders(function: ast.AST) -> Iterator[int]:
    for condition in conditions(function):
        for node in ast.walk(condition):
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
                inside = (n for n in ast.walk(node) if isinstance(n, ast.Compare))
                if any(isinstance(op, ORDER) for n in inside for op in n.ops):
                    yield node.lineno


def raised_orders(function: ast.AST) -> Iterator[int]:
    """`if error > bound: raise` lets a NaN through."""
    for node in ast.walk(function):
        if isinstance(node, ast.If) and any(isinstance(n, ast.Raise) for n in node.body):
            inside = (n for n in ast.walk(node.test) if isinstance(n, ast.Compare))
            if any(isinstance(op, ORDER) for n in inside for op in n.ops):
                yield node.lineno


def with_itself(function: ast.AST) -> Iterator[int]:
    """Equal expressions on both sides. With a call in them they are two runs, which may differ."""
    for node in ast.walk(function):
        pair: list[ast.expr] = []
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            pair = [node.left, node.comparators[0]]
        elif isinstance(node, ast.Call) and name_of(node) in TOLERANT | {"check", "check_identical", "equal"}:
            pair = node.args[:2]
        alike = len(pair) == 2 and ast.dump(pair[0]) == ast.dump(pair[1])
        if alike and not any(isinstance(n, ast.Call) for n in ast.walk(pair[0])):
            yield node.lineno


def constants(function: ast.AST) -> Iterator[int]:
    """Asserted constants: a literal, a tuple that is never empty, a string in place of a condition."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and isinstance(node.test, (ast.Constant, ast.Tuple, ast.JoinedStr, ast.Lambda)):
            yield node.lineno


def marks(function: ast.AST) -> Iterator[int]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in MARKS:
            yield node.lineno


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def found_by(rule: Rule, source: str, file: str) -> list[Site]:
    return [Site(f"{file}::{name}", line) for name, node in functions(parsed(source)) for line in rule(node)]


def everywhere(rule: Rule) -> list[Site]:
    sites = []
    for path in FILES:
        sites += found_by(rule, path.read_text(), path.relative_to(TESTS).as_posix())
    return sites


def unknown_and_dead(rule: Rule, allowed: dict[str, str]) -> tuple[list[Site], set[str]]:
    """Sites that are in no list, and entries of the list without a site."""
    sites = everywhere(rule)
    return [site for site in sites if site.where not in allowed], allowed.keys() - {site.where for site in sites}


LISTED = [(tolerances, TOLERANCES), (plain_ones, PLAIN_ONES), (negated_orders, NEGATED_ORDERS), (marks, SKIPS)]
NEVER = [raised_orders, with_itself, constants]


@pytest.mark.parametrize(("rule", "allowed"), LISTED, ids=[rule.__name__ for rule, _ in LISTED])
def test_exceptions_are_listed_with_a_reason(rule: Rule, allowed: dict[str, str]) -> None:
    """Other than by `check`, `compare`, `check_identical`, `torch.equal` and `==`: where, and why."""
    unknown, dead = unknown_and_dead(rule, allowed)
    assert unknown == [], "compare with harness.check or check_identical, or list it here with a reason"
    assert dead == set(), "listed, but no longer there"
    assert all(allowed.values())


@pytest.mark.parametrize("rule", NEVER, ids=[rule.__name__ for rule in NEVER])
def test_never(rule: Rule) -> None:
    assert everywhere(rule) == []


def test_conftest_skips_nothing() -> None:
    """It deselects, and says so."""
    assert found_by(marks, (TESTS.parent / "conftest.py").read_text(), "conftest.py") == []


EXAMPLES: list[tuple[Rule, str, str]] = [
    (tolerances, "torch.testing.assert_close(a, b)", "check(a, b, c, stage='logits')"),
    (tolerances, "assert np.allclose(a, b)", "assert torch.equal(a, b)"),
    (tolerances, "assert x == pytest.approx(3)", "assert x == 3"),
    (tolerances, "assert (a - b).abs().max() <= 1e-3", "assert (a == b).all()"),
    (tolerances, "error = (a - b).norm()\n    assert error < 0.1", "size = a.norm()\n    check(a, b, c, scale=size)"),
    (tolerances, "if (a - b).abs().max() > 1: raise AssertionError", "if a > 1: raise AssertionError"),
    (plain_ones, "layer(x).sum().backward()", "layer(x).square().sum().backward()"),
    (plain_ones, "torch.autograd.grad(out.sum(), x)", "torch.autograd.grad((out * g).sum(), x)"),
    (plain_ones, "torch.autograd.grad(out, x, torch.ones_like(out))", "torch.autograd.grad(out, x, g)"),
    (plain_ones, "out.backward(torch.ones(3))", "out.backward(g)"),
    (negated_orders, "assert not (error > 1)", "assert error <= 1"),
    (negated_orders, "assert not (error > 1).any()", "assert not (a == b).any()"),
    (raised_orders, "if error > 1: raise AssertionError", "if a != b: raise AssertionError"),
    (with_itself, "assert torch.equal(a, a)", "assert torch.equal(a, b)"),
    (with_itself, "assert a == a", "assert f(x) == f(x)"),
    (with_itself, "check_identical(out.grad, out.grad)", "check_identical(layer(x), layer(x))"),
    (constants, "assert (a, 'message')", "assert a, 'message'"),
    (constants, "assert True", "assert a"),
    (marks, "pytest.skip('no')", "pytest.raises(ValueError)"),
    (marks, "request.applymarker(pytest.mark.xfail)", "request.applymarker(pytest.mark.slow)"),
]


@pytest.mark.parametrize(
    ("rule", "bad", "good"), EXAMPLES, ids=[bad.splitlines()[-1].strip() for _, bad, _ in EXAMPLES]
)
def test_the_rules_see_what_they_should(rule: Rule, bad: str, good: str) -> None:
    found = found_by(rule, f"def test_it():\n    {bad}\n", "t.py")
    assert [site.where for site in found] == ["t.py::test_it"]
    assert found_by(rule, f"def test_it():\n    {good}\n", "t.py") == []


def test_a_run_writes_its_report(tmp_path: Path) -> None:
    """What only the end of a run does, no test does."""
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_testing.py",
        "-k",
        "test_identical",
        "--report",
        report,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["outcomes"]["passed"] == 1
    assert {"optimized", "tests"} <= found["hashes"].keys()
    assert [row["property"] for row in found["properties"]] == ["test_identical"]


@pytest.mark.parametrize("path", sorted((TESTS / "reports").glob("*.json")), ids=lambda path: path.stem)
def test_reports_name_no_place_on_a_machine(path: Path) -> None:
    """A package that is a parameter is named, not shown by its repr, which tells where it lies."""
    assert "<module" not in path.read_text()
