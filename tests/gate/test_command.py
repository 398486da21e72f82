"""How the command ends, whatever happens: a status of 0, 1 or 2, and with 2 one line and no more."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2
from tests.gate import fuzz
from tests.gate.test_check import check
from tests.pages import ROOT, sections
from tiedquiet.__main__ import main
from tiedquiet.gate import command, printing
from tiedquiet.gate.report import SCHEMA

# Each of them ended in something else once.
KEPT = (35, 36, 151, 249, 350, 398, 3560, 19725, 21684)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    GPT2LMHeadModel(gpt2()).save_pretrained(folder)
    return folder


def run(*arguments: str, options: tuple[str, ...] = (), **changes: Any) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k != "TIEDQUIET"} | {"PYTHONPATH": str(ROOT)}
    environment |= changes.pop("env", {})
    command = [sys.executable, *options, "-m", "tiedquiet", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **changes}
    return subprocess.run(command, env=environment, text=True, timeout=300, **streams)


@pytest.mark.slow
def test_a_fuzz_ends_in_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    faults: list[str] = []
    more = (*range(fuzz.MORE, fuzz.MORE + 150), *range(fuzz.SINGLE, fuzz.SINGLE + 60))
    numbers = [*KEPT, *range(20_000, 20_300), *more]
    count = fuzz.fuzz(iter(numbers), faults.append)
    assert not faults
    assert sum(count.values()) == len(numbers)
    assert all(count[status] > 10 for status in (0, 1, 2))


# Wrong calls, and a wrong environment


@pytest.mark.slow
@pytest.mark.parametrize("command", [("check", "x"), ("demo",)])
def test_a_word_that_is_no_mode(command: tuple[str, ...]) -> None:
    done = run(*command, env={"TIEDQUIET": "stric"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tiedquiet: TIEDQUIET='stric' is not a mode of tiedquiet; valid values: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_info_never_dies() -> None:
    done = run("info", env={"TIEDQUIET": "stric"})
    assert (done.returncode, done.stderr) == (1, "")
    assert "mode: TIEDQUIET='stric' is not a mode of tiedquiet; valid values: " in done.stdout
    assert "tested with transformers" in done.stdout


@pytest.mark.slow
def test_only_the_command_line_goes_on_with_such_a_word(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TIEDQUIET": "stric"}
    (tmp_path / "tiedquiet").write_text(
        "import tiedquiet, sys; from tiedquiet.__main__ import main; sys.exit(main(['check', 'x']))"
    )
    (tmp_path / "other.py").write_text("import tiedquiet")
    for program, status, says in (
        ("tiedquiet", 2, "tiedquiet: TIEDQUIET='stric' is not"),
        ("other.py", 1, "Traceback"),
    ):
        done = subprocess.run(
            [sys.executable, str(tmp_path / program)], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.startswith(says)) == (status, True), done.stderr


@pytest.mark.slow
def test_without_docstrings_transformers_makes_no_class(good: Path) -> None:
    for arguments in (("check", str(good)), ("info",)):
        done = run(*arguments, options=("-OO",))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "tiedquiet: transformers makes its classes from docstrings, and python -OO drops these; use python -O\n"
        )


@pytest.mark.slow
def test_a_terminal_that_has_no_letters_but_ascii(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "modèle"
    GPT2LMHeadModel.from_pretrained(good).save_pretrained(folder)
    odd = {**load_file(folder / "model.safetensors"), "clé": torch.ones(1)}
    save_file(odd, folder / "model.safetensors", {"format": "pt"})
    done = run("check", str(folder), env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"cl\xe9" in done.stdout
    done = run("check", str(folder / "nowhere"), env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


# Nobody reads it, or somebody has had enough


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_pipe_that_is_closed(name: str, good: Path) -> None:
    """Also for the line on stderr (`2>&1 | head -1`), where Python ends with 1, or with 120 if it tries again."""
    reads, writes = os.pipe()
    os.close(reads)
    done = run("check", str(good), "--json", stdout=writes)
    assert (done.returncode, done.stderr) == (2, "tiedquiet: the output was closed before all of it was written\n")
    assert run("check", str(good / name), stdout=writes, stderr=writes).returncode == 2
    os.close(writes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is full")
def test_a_disk_that_is_full(good: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("check", str(good), stdout=full)
    assert done.returncode == 2
    assert done.stderr == "tiedquiet: the operating system says: [Errno 28] No space left on device\n"


SLOW = """
import time
from pathlib import Path

class Slow:
    @staticmethod
    def from_pretrained(*_, **__):
        Path("ready").touch()
        time.sleep(300)
"""


@pytest.mark.slow
def test_ctrl_c(good: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TIEDQUIET"} | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "slow_one.py").write_text(SLOW)
    command = [sys.executable, "-m", "tiedquiet", "check", str(good), "--class", "slow_one.Slow"]
    # What runs in the background of a shell is born deaf to it.
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (2, "tiedquiet: interrupted\n")


def test_ctrl_c_that_comes_out_as_another_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does amid the imports of transformers."""

    def fail(_: object) -> int:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("Could not import module")

    monkeypatch.setattr(command, "check", fail)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["check", "x"]) == 2
        assert capsys.readouterr().err == "tiedquiet: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` has it
        assert main(["check", "x"]) == 2
        assert "Could not import module" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_there_are_no_signals(good: Path) -> None:
    found: list[int] = []
    thread = Thread(target=lambda: found.append(main(["check", str(good / "nowhere")])))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("a\nb"), r"internal error, please report it: RuntimeError: a\nb"),
        (RecursionError("deep"), "internal error, please report it: RecursionError: deep"),
        (MemoryError(), "internal error, please report it: MemoryError: "),
        (OSError(5, "Input/output error"), "the operating system says: [Errno 5] Input/output error"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit("tiedquiet: no guard"), "no guard"),
        (BrokenPipeError(), "the output was closed before all of it was written"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_whatever_happens(
    error: BaseException, says: str, as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(command, "check", fail)
    assert main(["check", "--dtype", "float16", "x", *["--json"] * as_json]) == 2
    out, err = capsys.readouterr()
    assert err == f"tiedquiet: {says}\n"
    assert bool(out) is as_json
    if as_json:
        report = json.loads(out)
        assert (report["schema"], report["status"], report["components"]) == (SCHEMA, 2, [])
        assert report["error"].replace("\n", r"\n") == says


@pytest.mark.parametrize(
    ("given", "which"),
    [
        ([""], "PATH|HUB_ID"),
        (["x", "--class", ""], "--class"),
        (["x", "--config", ""], "--config"),
        (["x", "--device="], "--device"),
        (["x", "--lora", ""], "--lora"),
        (["x", "--variant", ""], "--variant"),
        (["x", "--revision="], "--revision"),
    ],
)
def test_a_variable_that_is_not_set(given: list[str], which: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *given]) == 2
    assert capsys.readouterr().err == f"tiedquiet: argument {which}: it is empty; see tiedquiet check --help\n"


@pytest.mark.parametrize("asked", [["--help"], ["--version"], ["check", "--help"]])
def test_help_and_version_end_well(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(asked)
    assert stop.value.code == 0
    assert capsys.readouterr().err == ""


def test_output_that_is_not_there(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["check", str(good)]) == 0
    assert main(["check", str(good / "nowhere")]) == 2


# JSON


def test_the_json_is_what_the_page_describes(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = sections(ROOT / "docs" / "check.md")["JSON"]
    described = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert f"`schema` is {SCHEMA}" in page
    check(good, "--json")
    report = json.loads(capsys.readouterr().out)
    (component,) = report["components"]
    (finding,) = component["findings"]
    keys = [
        *report,
        *(f"components[].{key}" for key in component),
        *(f"components[].findings[].{key}" for key in finding),
    ]
    assert sorted(described) == sorted(keys)


# What is printed


@pytest.fixture
def many(good: Path, tmp_path: Path) -> Path:
    GPT2LMHeadModel.from_pretrained(good).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), **{f"extra{i}": torch.ones(1) for i in range(60)}}, path, {"format": "pt"})
    return tmp_path


def test_rows_are_at_most_fifty_of_a_kind(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert check(many) == 1
    out = capsys.readouterr().out.splitlines()
    assert sum("unexpected  " in line for line in out) == 50
    assert "  and 10 more unexpected; --all lists them" in out
    assert any("tied" in line for line in out[1:4])
    assert check(many, "--all") == 1
    assert sum("unexpected  " in line for line in capsys.readouterr().out.splitlines()) == 60


def test_what_is_long_is_cut_and_what_cannot_be_printed_is_escaped() -> None:
    assert printing.printable("a\n\x1b\u202e\ud800é") == r"a\n\x1b\u202e\ud800é"
    assert len(printing.printable("x" * 10_000)) == 2000
    assert printing.printable("abcdef", 5) == "ab..."
    assert printing.printable("a\ufe0f\u115f\u0301") == "a\\ufe0f\\u115f\u0301"  # an accent is seen


@pytest.fixture
def terminal() -> Iterator[Any]:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        yield stream
    os.close(leader)


def test_colour_is_for_terminals_that_want_it(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert printing.coloured("x", "red", terminal) == "\x1b[31mx\x1b[0m"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert printing.coloured("x", "red", terminal) == "x"
    monkeypatch.setattr(sys, "stdout", None)
    assert printing.coloured("x", "red") == "x"


def test_quiet_prints_what_is_not_well(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert check(good, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    GPT2LMHeadModel.from_pretrained(good).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    capsys.readouterr()
    assert check(tmp_path, "--quiet") == 1
    assert "1 untied" in capsys.readouterr().out
