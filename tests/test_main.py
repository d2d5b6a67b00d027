"""`python -m optimized`: what it prints, when it passes, fails and refuses, and that a broken stage is named."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from rich.console import Console

import optimized
import reference
from optimized.prove import arguments, decisions, interpreter, job, setup
from optimized.prove import text as texts
from optimized.prove.kernels import STAGES as KERNEL_STAGES
from optimized.prove.kernels import Compared
from optimized.prove.stages import Proof, prove
from tests.faults.operators import OPERATORS

SMALL = ("--dim", "16", "--heads", "1", "--experts", "2", "--window", "9", "--device", "cpu")
STAGES = (
    "routing logits",
    "routing scores",
    "selection",
    "routed attention",
    "local attention",
    "combination",
    "layer output",
    "gradients (x)",
    "gradients (parameters)",
    "gradients (routers)",
)
KERNELS = ("routing", "dispatch", "both at once", "experts", "combination")
LINES = """It is a truth universally acknowledged, that a single man in possession of a good fortune,
must be in want of a wife. "My dear Mr. Bennet," said his lady to him one day, "have you heard ...?"
"""


def run(*argv: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = job.main(argv)
    return status, printed.getvalue()


def table(printed: str, columns: int) -> list[list[str]]:
    """Cells of the one table with that many columns."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[:1] == "│")
    return [row for row in rows if len(row) == columns]


def verdicts(printed: str) -> dict[str, str]:
    """Worst / budget by stage and dtype. A GPU's backends have long names: a row is two lines then."""
    wide = {f"{row[0]} {row[2]}": row[3] for row in table(printed, 8)}
    lines = iter(table(printed, 4))
    return wide or {f"{first[0]} {second[0].split(', ')[-1]}": first[1] for first, second in zip(lines, lines)}


def kernel_verdicts(printed: str) -> dict[str, str]:
    return {row[0]: row[4] for row in table(printed, 5)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains nothing at these sizes, and on a busy machine waiting for it takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def short_excerpt() -> Iterator[None]:
    """Still several blocks of every kernel; the process of its own has as many tokens as users'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "EXCERPT", 64)
        yield


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the kernels, which take the longest."""
    monkeypatch.setattr(job, "run_kernels", lambda setup: ("not run", [], None))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"Chapter {i}. {LINES}" for i in range(12)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def passed(book: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run in two dtypes prints, and its plot."""
    image = tmp_path_factory.mktemp("plot") / "map.png"
    status, printed = run(book, *SMALL, "--tokens", "9999", "--dtype", "float32", "bfloat16", "--plot", str(image))
    assert status == 0, printed
    return printed, image


def test_every_stage_is_within_budget(passed: tuple[str, Path]) -> None:
    found = verdicts(passed[0])
    assert list(found) == [f"{stage} {dtype}" for dtype in ("float32", "bfloat16") for stage in STAGES]
    for stage, verdict in found.items():
        if stage.startswith("selection"):
            assert re.fullmatch(r"identical|\d+ near ties", verdict)
        else:
            assert 0 < float(verdict) <= 1, stage
    assert re.search(r"^PASS  20 rows within budget", passed[0], re.MULTILINE)
    assert "FAIL" not in passed[0]


def test_output_describes_the_run(passed: tuple[str, Path], book: str) -> None:
    printed = re.sub(r"\s+", " ", passed[0])
    n = len(texts.read(Path(book), 9999).tokens)
    assert f"all {n} tokens (fewer than the 9999 asked for)" in printed
    assert f"2 experts, {n // 8} slots" in printed
    assert f"torch {torch.__version__}" in printed
    assert "routing torch, dispatch torch, routed_attention" in printed  # from optimized.explain
    assert re.search(rf"expert 2 │ {n // 8} │ {n // 8} │ \d+ │ \d+ % │ \w+", printed)
    assert "superscripts" in printed
    assert "²" in printed
    counts = dict(re.findall(r"(\d): (\d+)", printed[printed.index("number of experts") :]))
    assert sum(int(count) for count in counts.values()) == n
    assert sum(int(experts) * int(count) for experts, count in counts.items()) == 2 * (n // 8)


def test_plot(passed: tuple[str, Path]) -> None:
    data = passed[1].read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


@pytest.mark.usefixtures("no_kernels")
def test_colours(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal words are coloured; with --no-color no colour is left."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    colour = re.compile(r"\x1b\[[\d;]*38;")
    status, printed = run(book, *SMALL, "--tokens", "256")
    assert status == 0
    assert colour.search(printed)
    assert "several" in printed
    status, printed = run(book, *SMALL, "--tokens", "256", "--no-color")
    assert status == 0
    assert not colour.search(printed)
    assert "superscripts" in printed


def test_kernels_equal_pytorch(book: str, device: torch.device) -> None:
    """In the process itself here, where Triton interprets already, or on the GPU."""
    status, printed = run(book, *SMALL, "--device", device.type)
    assert status == 0, printed
    assert kernel_verdicts(printed) == dict.fromkeys(KERNELS, "pass")
    rows = len(verdicts(printed))  # of one dtype on the CPU, of two on a GPU
    assert rows == (10 if device.type == "cpu" else 20)
    assert re.search(
        rf"^PASS  {rows} rows within budget, kernels of {len(KERNELS)} stages equal PyTorch's, ", printed, re.MULTILINE
    )
    where = "an excerpt: the first 64 tokens" if device.type == "cpu" else "compiled, all"
    assert where in re.sub(r"\s+", " ", printed)
    for stage, _, values, gradients, _ in table(printed, 5):
        assert 0 <= float(values) < 1e-12, stage
        assert 0 < float(gradients) < 1e-12, stage


def test_kernels_in_a_process_of_their_own(book: str) -> None:
    """As users have it: Triton compiles in the main process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(optimized.__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "optimized", book, *SMALL, "--tokens", "256", "--no-color"]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        assert "(not run: Triton's interpreter fails here" in re.sub(r"\s+", " ", done.stdout)
    else:
        assert kernel_verdicts(done.stdout) == dict.fromkeys(KERNELS, "pass")
        assert "the first 96 tokens" in re.sub(r"\s+", " ", done.stdout)


def test_an_interpreter_that_fails_is_reported(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 with NumPy 2.4 or newer."""
    monkeypatch.setattr(interpreter, "CHILD", "print('\"Triton is out of order\"')")
    monkeypatch.setattr(interpreter, "obstacle", lambda *_: "needs TRITON_INTERPRET=1")
    status, printed = run(book, *SMALL, "--tokens", "256")
    assert status == 0
    assert "(not run: Triton is out of order)" in re.sub(r"\s+", " ", printed)
    assert kernel_verdicts(printed) == {}


@pytest.mark.parametrize(
    ("fault", "stages"),
    [
        ("the gradient of the descent is NaN", ["routing", "both at once"]),
        ("gathered tokens a billionth too large", ["dispatch", "both at once"]),
        ("a gradient of the null slot a percent off", ["experts"]),
    ],
)
def test_a_wrong_kernel_is_named(fault: str, stages: list[str], book: str, device: torch.device) -> None:
    prepared = setup.prepare(*arguments.parse((book, *SMALL, "--tokens", "256", "--device", device.type)))
    with OPERATORS[fault].put_in():
        _, rows, broken = interpreter.run_kernels(prepared)
    assert broken is None
    assert [row.stage for row in rows if not row.equal] == stages


def test_a_wrong_kernel_fails_the_job(book: str, device: torch.device) -> None:
    with OPERATORS["half of the sum over experts"].put_in():
        status, printed = run(book, *SMALL, "--tokens", "256", "--device", device.type)
    assert status == 1
    assert kernel_verdicts(printed) == {**dict.fromkeys(KERNELS, "pass"), "combination": "FAIL"}
    assert "kernels of combination: unlike PyTorch's" in printed
    if device.type == "cpu":  # on a GPU the layer's own call takes the kernel too
        assert "FAIL" not in verdicts(printed).values()
        assert re.search(r"^FAIL  1 of 15 rows", printed, re.MULTILINE)


def test_kernels_that_do_not_run_fail_the_job(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "CHILD", "raise SystemExit('no such luck')")
    monkeypatch.setattr(job, "run_kernels", lambda setup: ("child", *interpreter._run_in_child(setup)))
    status, printed = run(book, *SMALL, "--tokens", "256")
    assert status == 1
    assert "kernels: their process ended with 1\nno such luck" in printed
    assert re.search(r"^FAIL  1 of 11 rows", printed, re.MULTILINE)


LAYER = {"layer output", "gradients (x)", "gradients (parameters)", "gradients (routers)"}
ROUTED = {"gradients (x)", "gradients (routers)"}


@pytest.mark.parametrize(
    ("fault", "stage", "others"),
    [
        ("the last expert is dropped", "combination", LAYER),
        ("RMSNorm without the root of D", "routed attention", LAYER),
        ("the band is one too wide", "local attention", LAYER),
        ("the least are picked", "selection", set()),
        ("scores a percent too small", "routing scores", ROUTED),
        ("logits a thousandth too large", "routing logits", ROUTED | {"routing scores"}),
    ],
)
@pytest.mark.usefixtures("no_kernels")
def test_a_broken_stage_is_named(fault: str, stage: str, others: set[str], book: str) -> None:
    """The stage fails, and beside it at most what is computed from it: decisions and inputs are the oracle's."""
    with OPERATORS[fault].put_in():
        status, printed = run(book, *SMALL, "--tokens", "256")
    assert status == 1
    failed = {row.removesuffix(" float32") for row, verdict in verdicts(printed).items() if verdict == "FAIL"}
    assert stage in failed
    assert failed <= others | {stage}
    assert re.search(rf"^FAIL  {len(failed)} of 10 rows", printed, re.MULTILINE)
    assert "PASS" not in printed


def routes(logits: list[float], k: int) -> reference.Routes:
    s = torch.tensor(logits, dtype=torch.float64)[None, None]
    indices, mask = reference.select(s, k)
    return reference.Routes(indices, mask, mask.double(), s)


def test_selection_may_differ_only_within_rounding() -> None:
    exact = routes([1.0, 3.0, 2.0, 2.0 - 1e-9], 2)
    pair = (exact, exact)
    assert decisions.check_selection(pair, pair) == ("identical", None)
    rounded = routes([1.0, 3.0, 2.0, 2.0 + 1e-9], 2)
    assert decisions.check_selection((exact, rounded), pair) == ("2 near ties", None)
    for fault, message in (
        (rounded._replace(logits=exact.logits), "chosen otherwise"),
        (exact._replace(indices=exact.indices.flip(-1)), "declared order"),
        (exact._replace(scores=0.5 * exact.scores), "straight-through"),
        (exact._replace(mask=~exact.mask), "masked"),
    ):
        verdict, failure = decisions.check_selection((exact, fault), pair)
        assert verdict == "FAIL"
        assert failure.startswith("selection key_value")
        assert message in failure


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nowhere/book.txt"], "FILE: expected a readable UTF-8 file, got /nowhere/book.txt"),
        (["--tokens", "0"], "argument --tokens: expected an integer from 1 to 2147483647, got '0'"),
        (["--slots", "many"], "argument --slots: expected an integer from 1 to 2147483647, got 'many'"),
        (["--window", "12345678901234567890"], "argument --window: expected an integer from 1 to 2147483647, got"),
        (["--heads", "9" * 5000], "argument --heads: expected an integer from 1 to 2147483647, got"),
        (
            ["--seed", str(2**64)],
            "argument --seed: expected an integer from -9223372036854775808 to 184467440737095516",
        ),
        (["--seed", "0.5"], "got '0.5'"),
        (["--tokens", "256", "--dim", "2000000"], "--tokens, --dim, --experts: expected what fits into"),
        (["--tokens", "256", "--experts", "2000000000"], "GiB of memory, got 256 tokens, D 256 and 2000000000 experts"),
        (["--tokens", "255"], "--tokens: expected at least 256, got 255"),
        (["--dim", "60", "--heads", "4"], "--dim: expected a multiple of 2 H = 8, got 60"),
        (["--tokens", "600", "--slots", "301"], "--slots: expected at most half of the 600 tokens, got 301"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--plot", "map.gif"], "--plot: expected a name that ends in .png, .pdf, .svg, got map.gif"),
        (["--plot", "/nowhere/map.png"], "--plot: expected a file in an existing folder, got /nowhere/map.png"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["/nowhere/\x1b[31mbook\r"], "FILE: expected a readable UTF-8 file, got /nowhere/\\x1b[31mbook\\r"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        job.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_unusable_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("Three words only", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (short, "FILE: expected at least 256 tokens, got 3"),
        (binary, "expected a readable UTF-8 file"),
    ):
        with pytest.raises(SystemExit) as stop:
            job.main([str(path)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A FIFO, read or drawn to, would wait for ever; a folder in the picture's place would be found after all work."""
    pipe, folder = tmp_path / "pipe.png", tmp_path / "map.png"
    os.mkfifo(pipe)
    folder.mkdir()
    for argv, message in (
        ([pipe], f"FILE: expected a readable UTF-8 file, got {pipe}: not a regular file"),
        ([folder], f"FILE: expected a readable UTF-8 file, got {folder}: not a regular file"),
        (["--plot", pipe], f"--plot: expected a file, got {pipe}, which is something else"),
        (["--plot", folder], f"--plot: expected a file, got {folder}, which is something else"),
    ):
        with pytest.raises(SystemExit) as stop:
            job.main(list(map(str, argv)))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_plot_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (tmp_path, os.W_OK))
    with pytest.raises(SystemExit) as stop:
        job.main(["--plot", str(tmp_path / "map.png")])
    assert stop.value.code == 2
    assert "--plot: expected a file that may be written" in capsys.readouterr().err


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        job.main(["--plot", "map.png"])
    assert stop.value.code == 2
    assert "[plots]" in capsys.readouterr().err


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        job.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "got 'cuda' without CUDA" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(book: str) -> None:
    """float32 and bfloat16 by default."""
    status, printed = run(book, "--dim", "64", "--experts", "2")
    assert status == 0, printed
    assert len(verdicts(printed)) == 20
    assert kernel_verdicts(printed) == dict.fromkeys(KERNELS, "pass")
    assert "compiled, all" in printed


def test_help_states_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        job.main(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for option in vars(arguments.parse([])[0]):
        assert (f"--{option}".replace("_", "-") if option != "file" else "FILE") in text
    assert text.count("default:") == 10


def test_default_text_is_long_enough() -> None:
    text = texts.read(None, 8192)
    assert len(text.tokens) == len(text.spaced) == 8192
    assert text.more
    assert len(set(text.tokens)) > 1000


def tokenized(text: str, limit: int) -> texts.Text:
    return texts.tokenize("", io.StringIO(text), limit)


def test_tokens() -> None:
    text = tokenized("Don't  stop -- ever (he\nsaid)!!", 8)
    assert text.tokens == ["Don't", "stop", "--", "ever", "(", "he", "said", ")"]
    assert text.spaced == [False, True, True, True, True, False, True, False]
    assert text.more
    assert not tokenized("one two ", 2).more
    assert tokenized("", 2).tokens == []


def test_tokens_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An apostrophe, a run of marks, white space and a token that is cut, across every place where a block may end."""
    text = "it's 'twas'  o'er'' ...!!!! \n\n\u2003 a'b'c'd' rock'n'roll " + "x" * 9 + "." * 9
    monkeypatch.setattr(texts, "MAX_TOKEN", 5)
    whole = tokenized(text, 99)
    assert whole.tokens[-4:] == ["xxxxx", "xxxx", ".....", "...."]
    for size in range(1, len(text)):
        monkeypatch.setattr(texts, "BLOCK", size)
        assert tokenized(text, 99) == whole
        assert tokenized(text, 7).tokens == whole.tokens[:7]


@pytest.mark.parametrize("unit", ["many words ", "a!", "?", "x", "o'", "\u2003\n"])
def test_memory_is_by_the_tokens_asked_for(unit: str, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("first " + unit * (2**22 // len(unit)), encoding="utf-8")
    tracemalloc.start()
    try:
        text = texts.read(path, 256)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert text.tokens[0] == "first"
    assert len(text.tokens) == (1 if unit.isspace() else 256)
    assert taken < 2**21, "half of a byte for each character"


@pytest.mark.usefixtures("no_kernels")
def test_control_characters_are_shown(tmp_path: Path) -> None:
    """Of the text and its name: none reaches the terminal."""
    path = tmp_path / "\x1b[2Jname.txt"
    path.write_text("\x1b]0;title\x07 \x9b31m red\u202e dogs\u200b bark\x7f " * 40, encoding="utf-8")
    status, printed = run(str(path), *SMALL, "--tokens", "256", "--no-color")
    assert status == 0, printed
    assert all(c.isprintable() or c == "\n" for c in printed)
    printed = re.sub("[ \n\u2070-\u209f\u00b2\u00b3\u00b9]", "", printed)
    for shown in ("\\x1b[2Jname.txt", "\\x1b", "\\x07", "\\x9b", "\\u202e", "\\u200b", "\\x7f"):
        assert shown in printed


@pytest.fixture(scope="module")
def proof(book: str) -> Proof:
    args, text = arguments.parse([book, *SMALL, "--tokens", "256"])
    return prove(setup.prepare(args, text), "float32", lambda what: None)


@pytest.mark.parametrize("width", [120, 100, 80, 72, 60, 40, 24])
def test_no_cell_is_cut(width: int, proof: Proof, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name and figure stands in one piece at every width: as a table where there is room, else one to a line."""
    compared = [Compared(stage, what, 1.5e-15, 2.5e-15) for stage, what in KERNEL_STAGES]
    monkeypatch.setattr(job, "run_kernels", lambda setup: ("where", compared, None))
    monkeypatch.setattr(job, "prove", lambda *given: proof)
    monkeypatch.setattr(
        job, "make_console", lambda color: Console(width=width, no_color=True, highlight=False, file=sys.stdout)
    )
    status, printed = run(book, *SMALL, "--tokens", "256")
    assert status == 0, printed
    assert "\u2026" not in printed
    assert max(map(len, printed.splitlines())) <= width
    joined = re.sub(r"[\u2500-\u257f\s]+", " ", printed)
    cells = ["1.5e-15", "2.5e-15", "pass"]
    cells += [cell for row in proof.rows for cell in (row.stage, row.backend, row.dtype, row.verdict)]
    cells += [f"{m.milliseconds:.1f}" for row in proof.rows if row.measured for m in row.measured]
    cells += [cell for pair in KERNEL_STAGES for cell in pair]
    assert [cell for cell in cells if cell not in joined] == []
    tables = sum(line.startswith("\u2521") for line in printed.splitlines())
    assert tables == 3 if width >= 80 else tables < 3 if width >= 60 else tables == 0


def test_embedding_tells_all_tokens_apart() -> None:
    tokens = ["routing", "router", "tree", "routing", ",", "tree"] * 50
    x = texts.embed(tokens, 32, seed=0)
    assert x.shape == (300, 32)
    assert len(x.bfloat16().unique(dim=0)) == 300
    assert torch.equal(x, texts.embed(tokens, 32, seed=0))
    assert not torch.equal(x, texts.embed(tokens, 32, seed=1))
    routing, router, tree = x[:3] - texts.embed(["x"] * 3, 32, seed=0)
    near = torch.cosine_similarity(routing, router, dim=0)
    assert near > torch.cosine_similarity(routing, tree, dim=0) + 0.1
