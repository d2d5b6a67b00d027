"""The benchmark's own code on the CPU: counts, timers, report, tables and plots. Its figures are not looked at here."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import __main__ as command
from benchmarks import flops, session
from benchmarks.attentions import BLOCK, Flex, UnavailableError, attention, near, some_blocks
from benchmarks.competitors import BOTH, DIRECTIONS, FORWARD, Replayed, Steps, enter
from benchmarks.floor import Floor
from benchmarks.measure import CpuClock, Profile, host_ms, interleaved, peak_bytes, summarise, time_call
from benchmarks.session import FLOOR, Job, Session, jobs
from benchmarks.shapes import Case, cases
from benchmarks.stages import ORDER, own_kernels, stage_of
from harness import check_identical
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import optimized

ROOT = Path(optimized.__file__).parent.parent
CPU = torch.device("cpu")
SMALL = Case(
    "small", "fixed K", batch=2, n=40, dim=32, heads=2, experts=2, slots=16, dim_head=8, dtype="float32",
    competitors=("optimized", "reference", "dense"),
)  # fmt: skip
EVERYONE = (
    "optimized", "reference", "dense", "upstream", "dense flash-attn 2", "dense flash-attn 4", "optimized graph",
    "optimized deterministic", "optimized routed_attention=math", "optimized routed_attention=torch_cudnn", "nobody",
)  # fmt: skip
QUICK = {"budget_ms": 1.0, "least": 2, "most": 3}


class FakeClock:
    """A device whose calls take what they say; records what happened."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def flush(self, lead: bool = False) -> None:
        self.log.append("flush")
        self.now += 1000.0  # must not be counted

    def mark(self) -> float:
        return self.now

    def between(self, start: float, end: float) -> float:
        assert self.log[-1] == "wait", "read before the device was waited for"
        return end - start

    def wait(self) -> None:
        self.log.append("wait")

    def call(self, *durations: float) -> Any:
        """A call that takes these in turn, the last for ever."""
        left = list(durations)

        def run() -> None:
            self.log.append("call")
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


# --- counts ----------------------------------------------------------------------------------------------------------


def test_counts_of_the_specification() -> None:
    """8k: projections 137 GFLOP, attention 69; forward and backward 653."""
    case = next(case for case in cases("cuda") if case.name == "8k")
    parts = flops.layer(case)
    assert round(parts["projections"] / 1e9) == 137
    assert round(parts["attention"] / 1e9) == 69
    del parts["router"]
    assert round(flops.total(parts, BOTH) / 1e9) == pytest.approx(653, abs=1)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("competitor", ["dense", "reference"])
def test_counts_against_pytorchs_own(competitor: str, direction: str) -> None:
    """Of the products that PyTorch sees; it does not count the scores that a flash backward computes again."""
    case = replace(SMALL, n=16)  # all tokens are taken: no router
    written_out = sdpa_kernel(SDPBackend.MATH)
    with enter(competitor, case, CPU) as steps, FlopCounterMode(display=False) as counter, written_out:
        steps.direction(direction)()
    parts = flops.dense(case) if competitor == "dense" else flops.layer(case)
    counted = flops.total(parts, direction) - (0.5 * parts["attention"] if direction == BOTH else 0.0)
    null_key = counter.get_total_flops() / counted
    assert 1 <= null_key <= 1.1


def test_pairs_of_a_window() -> None:
    for n, window in ((1, 3), (7, 2), (7, 6), (7, 60), (30, 4)):
        at = np.arange(n)
        assert flops.pairs(n, window) == (abs(at[:, None] - at) <= window).sum()
        back = at[:, None] - at
        assert flops.pairs(n, window, causal=True) == ((back >= 0) & (back <= window)).sum()


def test_counts_of_the_causal_layer() -> None:
    """By hand, at 8k: 275 GFLOP of local projections, 34 of the window, 65 of rows and queries, 17 of attention."""
    case = next(case for case in cases("cuda") if case.name == "causal 8k")
    assert flops.of("optimized", case, FORWARD) == pytest.approx(392e9, rel=0.01)
    assert flops.of("dense", case, FORWARD) == pytest.approx(825e9, rel=0.01)


def test_a_causal_case_is_run() -> None:
    small = replace(SMALL, name="causal", window=8, queries=4, local_heads=4, group="causal")
    report = Session(CPU, None, effort=QUICK).run(jobs([small], [], []))
    assert {row["competitor"] for row in report["rows"]} == set(SMALL.competitors)
    assert all(row.get("p50", 0) > 0 for row in report["rows"]), report["rows"]


def test_what_a_causal_layer_is_compared_with_is_causal() -> None:
    small = replace(SMALL, window=8, queries=4, local_heads=4)
    with enter("dense", small, CPU) as steps, torch.no_grad():
        x = steps.x.clone()
        x[:, 20:] += 1
        check_identical(steps.call(x)[:, :20], steps.call(steps.x)[:, :20])


# --- timers ----------------------------------------------------------------------------------------------------------


def test_timing_excludes_the_flush_and_the_first_calls() -> None:
    clock = FakeClock()
    cleared = []
    timing = time_call(clock.call(50.0, 7.0), clock, before=lambda: cleared.append(1), least=5, most=5)
    assert timing == (7.0, 7.0, 7.0, 5)
    assert len(cleared) == clock.log.count("call")
    assert clock.log.count("flush") == 5
    timed = clock.log[clock.log.index("flush") :]
    assert timed == ["flush", "call"] * 5 + ["wait"], "something waits between repetitions"


def test_percentiles() -> None:
    clock = FakeClock()
    warm = [0.0] * 4
    timing = time_call(clock.call(*warm, *range(1, 12)), clock, least=11, most=11)
    assert timing == (3.0, 6.0, 9.0, 11)


def test_interleaved_calls_take_turns() -> None:
    clock = FakeClock()
    first, second = interleaved([clock.call(3.0), clock.call(5.0)], clock, least=4, most=4)
    assert (first.p50, second.p50) == (3.0, 5.0)


def test_host_time_does_not_wait_between_calls() -> None:
    clock = FakeClock()
    assert host_ms(clock.call(1.0), clock, launches=200) >= 0
    assert clock.log == (["wait"] + ["call"] * 3) * 5 + ["wait"]


def test_peak_is_above_what_was_there() -> None:
    there = torch.ones(1000)
    assert peak_bytes(lambda: there * there + there * there, CPU) == 3 * 4000


class FakeEvent:
    def __init__(self, name: str, duration_ns: int, device: DeviceType = DeviceType.CUDA, annotation: bool = False):
        self.fields = name, duration_ns, device, annotation

    def name(self) -> str:
        return self.fields[0]

    def duration_ns(self) -> int:
        return self.fields[1]

    def device_type(self) -> DeviceType:
        return self.fields[2]

    def is_user_annotation(self) -> bool:
        return self.fields[3]


def test_profile_of_three_calls() -> None:
    events = [
        FakeEvent("_logits_kernel", 2_000_000), FakeEvent("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", 4_000_000),
        FakeEvent("Memcpy DtoD (Device -> Device)", 1_000_000),
    ] * 3  # fmt: skip
    events += [FakeEvent("cudaLaunchKernel", 9, DeviceType.CPU), FakeEvent("## a region ##", 9, annotation=True)]
    profile = summarise(events, 3)
    assert (profile.kernels, profile.copies) == (2, 1)
    assert profile.stage_ms == pytest.approx({"router": 2.0, "GEMM": 4.0, "copies": 1.0})


def test_every_kernel_of_ours_has_a_stage() -> None:
    assert own_kernels()
    assert set(own_kernels().values()) <= set(ORDER)


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("_tokens_gradient_kernel", "dx"),
        ("_select_kernel_0d1d2d", "selection"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "GEMM"),
        ("Memset (Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>", "other"),
    ],
)
def test_stage_of_a_kernel(kernel: str, stage: str) -> None:
    assert stage_of(kernel) == stage


# --- cases and competitors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_named_once(device: str) -> None:
    names = [case.name for case in cases(device)]
    assert len(set(names)) == len(names)
    found = jobs(cases(device), [], [])
    assert len({(job.case.name, job.competitor) for job in found}) == len(found)
    assert [job.rank for job in found] == sorted(job.rank for job in found)


def test_patterns_choose() -> None:
    found = jobs(cases("cuda"), ["8k", "N * K 1024"], ["optimized", FLOOR])
    assert {job.competitor for job in found} == {"optimized", FLOOR}
    assert len(found) == 2 * (1 + 8)


@pytest.mark.parametrize("window", [None, 5], ids=["routed", "local"])
@pytest.mark.parametrize("mask", ["none", "holes"])
@pytest.mark.parametrize("competitor", ["optimized", "reference", "dense", "optimized deterministic"])
def test_competitors_give_every_gradient(competitor: str, mask: str, window: int | None) -> None:
    case = replace(SMALL, mask=mask, window=window)
    with enter(competitor, case, CPU) as steps:
        steps.forward()
        assert all(leaf.grad is None for leaf in steps.leaves)
        steps.both()
        assert all(leaf.grad is not None for leaf in steps.leaves)
        steps.clear()
        assert all(leaf.grad is None for leaf in steps.leaves)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_replay_computes_what_the_eager_step_does() -> None:
    """All but the capture itself, which tests/test_cuda_graphs.py shows on a GPU."""
    with enter("optimized", SMALL, CPU) as eager:
        replayed = Replayed(eager)
        eager.both()
        expected = [leaf.grad for leaf in eager.leaves]
        replayed.dout = eager.dout
        for grad, found in zip(expected, replayed._run_both()):
            check_identical(found, grad)
        assert replayed._run_forward().grad_fn is None


@pytest.mark.cpu
@pytest.mark.parametrize("mode", ["graph", "graphed", "reduce-overhead"])
def test_graphs_need_cuda(mode: str) -> None:
    with pytest.raises(UnavailableError, match="CUDA"), enter(f"optimized {mode}", SMALL, CPU):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["graph", "graphed"])
def test_graphs_have_the_gradients_of_an_eager_call(mode: str, device: torch.device) -> None:
    """Up to the order of sums, which the attention's backward does not promise."""
    case = replace(SMALL, dtype="bfloat16", n=256, dim=64)
    with enter("optimized", case, device) as eager, enter(f"optimized {mode}", case, device) as recorded:
        recorded.x.detach().copy_(eager.x.detach())
        recorded.dout.copy_(eager.dout)
        recorded.both()
        eager.both()
        graph = isinstance(recorded, Replayed)
        found = recorded.graphs[BOTH][1] if graph else [leaf.grad for leaf in recorded.leaves]
        for got, leaf in zip(found, eager.leaves, strict=True):
            assert got is not None
            assert (got - leaf.grad).float().norm() <= 0.02 * leaf.grad.float().norm() + 1e-6


class FakeGraph:
    """In place of torch.cuda: what is captured is called, a replay is counted."""

    made: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1


def test_a_graph_is_captured_once_for_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(FakeGraph, "made", [])
    calls = []
    with enter("dense", SMALL, CPU) as eager:
        run = eager.call
        eager.call = lambda x: (calls.append(1), run(x))[1]
        steps = Replayed(eager)
        for direction in (FORWARD, FORWARD, BOTH, BOTH, BOTH):
            steps.direction(direction)()
    assert [graph.replays for graph in FakeGraph.made] == [2, 3]
    assert len(calls) == 2 * 4, "three warm calls and the captured one"


def flex_pairs(attend: Flex, n: int, seen: Tensor) -> None:
    """Whether attention is that over the pairs seen (N, N)."""
    from torch.nn.attention.flex_attention import flex_attention

    attend.compiled = flex_attention  # compiled, it is only faster
    q, k, v = torch.randn(3, 2, n, 2, 16).unbind()
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=seen)
    torch.testing.assert_close(attend(q, k, v), expected.transpose(1, 2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_window_sees_the_window() -> None:
    at = torch.arange(20)
    back = at[:, None] - at
    flex_pairs(Flex(near(3)), 20, back.abs() <= 3)
    flex_pairs(Flex(near(3, causal=True)), 20, (back >= 0) & (back <= 3))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_blocks_see_as_many_keys_as_the_layer() -> None:
    n, keys = 4 * BLOCK, 2 * BLOCK
    at = torch.arange(n)
    sees = some_blocks(keys)(n, CPU)
    seen = sees(at, at, at[:, None], at)
    assert (seen.sum(-1) == keys).all()
    flex_pairs(Flex(some_blocks(keys)), n, seen)


def test_windows_of_the_libraries_are_asked_for() -> None:
    with pytest.raises(UnavailableError, match="no window"):
        attention("sdpa", window=3)
    with pytest.raises(UnavailableError, match="no dropout"):
        attention("torch varlen", dropout=0.1)
    with pytest.raises(UnavailableError, match="no attention named"):
        attention("flex")


# --- the run and its report ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over everybody, small; one case fails in the backward."""
    out = tmp_path_factory.mktemp("benchmarks") / "benchmarks-cpu.json"
    small = replace(SMALL, competitors=EVERYONE)
    shapes = [
        small,
        replace(SMALL, name="long", n=80),
        replace(SMALL, name="windowed", group="fixed K, local", window=4),
    ]
    Session(CPU, out, effort=QUICK).run(jobs(shapes, [], []))
    return out


def test_everybody_has_two_rows(report_file: Path) -> None:
    report = json.loads(report_file.read_text())
    assert report["complete"]
    for competitor in EVERYONE:
        rows = [r for r in report["rows"] if (r["case"], r["competitor"]) == ("small", competitor)]
        assert [row["direction"] for row in rows] == list(DIRECTIONS)
        for row in rows:
            if competitor in ("optimized", "reference", "dense", "optimized routed_attention=math"):
                assert row["p20"] <= row["p50"] <= row["p80"]
                assert row["peak_mib"] > 0
                assert row["tflops"] > 0
                assert ("over_floor" in row) == (competitor != "dense")
            elif competitor != "optimized deterministic":
                assert row.get("reason") or row["p50"] > 0  # where the package is installed
    assert report["floors"]["small"][BOTH]["ms"] > report["floors"]["small"][FORWARD]["ms"] > 0
    # flash-attn 2 is missing, or refuses the CPU.
    assert "flash-attn 2" in report["floors"]["windowed"]["reason"]


@pytest.mark.parametrize("competitor", ["optimized", "reference"])
def test_a_gpus_rows_have_kernels_and_host_time(competitor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of a GPU, with the CPU's clock and a profile made up."""
    made_up = Profile(20, 2, {"GEMM": 0.1}, {"nvjet": 3.0})
    ceilings = {"product_tflops": 792.0, "copy_tbs": 3.02}
    monkeypatch.setattr(session, "profile_kernels", lambda call, clock, before: made_up)
    monkeypatch.setattr(session, "peak_bytes", lambda call, device: 2**20)
    monkeypatch.setattr(Floor, "ceilings", lambda floor: ceilings)
    monkeypatch.setattr(Session, "_free", lambda running: None)
    running = Session(CPU, None, effort=QUICK)
    with enter(competitor, SMALL, CPU) as steps:
        monkeypatch.setattr(session, "enter", lambda *given: contextlib.nullcontext(steps))
        running.device = SimpleNamespace(type="cuda")
        report = running.run([Job(replace(SMALL, detail=True), competitor)])
    assert report["ceilings"] == ceilings
    for row in report["rows"]:
        assert (row["kernels"], row["copies"], row["peak_mib"]) == (20, 2, 1.0)
        assert row["host_ms"] > 0
        assert ("names" in row) == (competitor == "optimized")


def test_ceilings_are_in_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    floor = Floor(CPU, CpuClock())
    monkeypatch.setattr(Floor, "_product", lambda *given: 2.0)
    monkeypatch.setattr(Floor, "_copy", lambda *given: 1.0)
    assert floor.ceilings() == pytest.approx({"product_tflops": 549.755813888, "copy_tbs": 2.147483648})


def test_failures_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(steps: Steps) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Steps, "both", both)
    rows = Session(CPU, None, effort=QUICK).run([Job(SMALL, "dense")])["rows"]
    assert "p50" in rows[0]
    assert rows[1]["reason"] == "out of memory"


def test_a_lost_device_ends_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Session(CPU, None, effort=QUICK)

    def wait() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(running.clock, "wait", wait)
    rows = running.run([Job(SMALL, "dense"), Job(SMALL, FLOOR), Job(SMALL, "optimized")])["rows"]
    assert "illegal" in rows[0]["reason"]
    assert [row["reason"][:27] for row in rows[-2:]] == ["skipped: the device was los"] * 2


def test_a_spent_budget_is_told(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    Session(CPU, out, budget=0.0, effort=QUICK).run([Job(SMALL, FLOOR), Job(SMALL, "dense")])
    report = json.loads(out.read_text())
    assert all(row["reason"].startswith("skipped: 0 of 0 s") for row in [report["floors"]["small"], *report["rows"]])


def test_the_report_is_on_disk_after_each_competitor(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    seen = []

    def note(job: Job, said: str) -> None:
        seen.append((len(json.loads(out.read_text())["rows"]), json.loads(out.read_text())["complete"]))

    Session(CPU, out, effort=QUICK).run([Job(SMALL, "dense"), Job(SMALL, "reference")], note)
    assert seen == [(2, False), (4, False)]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(command, "cases", lambda device: [SMALL])
    monkeypatch.setitem(session.EFFORT, "cpu", QUICK)
    out = tmp_path / "report.json"
    words = ["tests.benchmarks", "--device", "cpu", "--out", str(out), "--competitors", "optimized", "dense"]
    monkeypatch.setattr("sys.argv", words)
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "optimized" in said
    assert "reference" not in said
    assert len(json.loads(out.read_text())["rows"]) == 4
    monkeypatch.setattr("sys.argv", [*words, "--cases", "unheard of"])
    assert command.main() == 2


# --- tables and plots ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_benchmarks", ROOT / "docs" / "benchmarks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_of_a_run(documents: ModuleType, report_file: Path, tmp_path: Path) -> None:
    cpu, gpu = json.loads(report_file.read_text()), as_of_a_gpu(json.loads(report_file.read_text()))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n")
    for folder in ("generated", "pictures"):
        (tmp_path / folder).mkdir()
    documents.render([gpu, cpu], tmp_path, readme)
    for name in documents.PLOTS:
        assert (tmp_path / "pictures" / name).stat().st_size > 10_000, name
    text = (tmp_path / "generated" / "benchmarks.md").read_text()
    for row in cpu["rows"]:
        assert row["competitor"] in text
        assert row.get("reason", "") in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(line) for line in table.splitlines()}) == 1, f"not aligned:\n{table}"
    said = readme.read_text()
    assert said.startswith("before\n")
    assert said.endswith("after\n")
    assert "old" not in said
    assert "small" in said
    assert "forward / forward+backward; dropout 0, no mask.*" in said
    assert text.count("*forward / forward+backward; dropout 0, no mask.*") == 2


def test_captions_say_dropout_and_mask(documents: ModuleType, report_file: Path) -> None:
    """Of the cases that a table shows, and of no others."""
    report = as_of_a_gpu(json.loads(report_file.read_text()))
    shown = [case for case in report["cases"].values() if case["group"] == "standard"]
    hidden = [case for case in report["cases"].values() if case["group"] != "standard"]
    for case in hidden:
        case |= {"dropout": 0.5, "mask": "holes"}
    assert "; dropout 0, no mask.*" in documents.readme_table(report)
    shown[0] |= {"dropout": 0.25, "mask": "holes"}
    assert "; dropout 0.25, mask with holes.*" in documents.readme_table(report)
    report["cases"]["another"] = {**shown[0], "dropout": 0.0, "mask": "none"}
    assert "; dropout 0 or 0.25, mask with holes or no mask.*" in documents.section(report)
    assert "dropout 0.5" not in documents.readme_table(report)


def as_of_a_gpu(report: dict[str, Any]) -> dict[str, Any]:
    """With what only a GPU tells."""
    report |= {"device": "cuda", "ceilings": {"product_tflops": 792.0, "copy_tbs": 3.02}}
    for name, case in report["cases"].items():
        case["group"] = "standard" if name == "small" else "sweep K = N/8"
    for row in report["rows"]:
        if "p50" in row:
            row |= {"kernels": 20, "copies": 1, "host_ms": 0.2, "stage_ms": dict.fromkeys(ORDER, row["p50"] / 20)}
    return report


def test_documents_without_a_run(documents: ModuleType, tmp_path: Path) -> None:
    assert documents.load(tmp_path) == []


def test_stages_have_colours(documents: ModuleType) -> None:
    assert set(documents.STAGES) == set(ORDER)
