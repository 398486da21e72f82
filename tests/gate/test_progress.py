"""The bar of a check: on a real terminal, and nowhere else."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2
from tests.pages import ROOT
from tiedquiet.gate import progress

# The command, with a bar that does not wait.
AT_ONCE = """
import sys
from tiedquiet.__main__ import main
from tiedquiet.gate import progress
progress._DELAY, progress._EVERY = 0, 0.001
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A pseudo-terminal of 80 columns, its end for a program, and what was written there."""

    def __init__(self) -> None:
        self.leader, self.follower = pty.openpty()
        fcntl.ioctl(self.follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.text = ""

    def read_until(self, pattern: str) -> None:
        while not re.search(pattern, self.text):
            ready, _, _ = select.select([self.leader], [], [], 60)
            assert ready, f"no {pattern!r} in {self.text!r}"
            self._read()

    def rest(self) -> str:
        while select.select([self.leader], [], [], 0)[0]:
            self._read()
        return self.text

    def line(self) -> str:
        """What a user sees after the last line feed: each carriage return begins it again."""
        seen = ""
        for part in self.rest().rpartition("\n")[2].split("\r"):
            seen = part + seen[len(part) :]
        return seen.strip()

    def _read(self) -> None:
        self.text += os.read(self.leader, 1 << 16).decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal()
    yield made
    os.close(made.follower)
    os.close(made.leader)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0)
    monkeypatch.setattr(progress, "_EVERY", 0.001)


@contextmanager
def read(terminal: Terminal) -> Iterator[None]:
    """Read what is written there meanwhile: a program waits for a terminal that nobody reads."""
    over = threading.Event()

    def reading() -> None:
        while not over.is_set():
            terminal.rest()
            over.wait(0.01)

    thread = threading.Thread(target=reading)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run(folder: Path, *arguments: str, stderr: int) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k != "TIEDQUIET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AT_ONCE, "check", str(folder), *arguments]
    return subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr, timeout=120)


@pytest.mark.usefixtures("at_once")
def test_it_says_what_is_done_and_is_gone_when_that_is(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    with os.fdopen(os.dup(terminal.follower), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.shown(True):
            progress.loading("unet\x1b[2J")
            terminal.read_until(r"loading unet\\x1b\[2J \[00:0\d\]")
            progress.comparing(4_000_000_000)
            terminal.read_until(r"comparing unet\\x1b\[2J   0%\| +\| 0.00/4.00G ")
            progress.compared(1_000_000_000)
            progress.compared(2_000_000_000)
            terminal.read_until(r" 75%\|.*\| 3.00G/4.00G \[00:0\d, .*B/s\]")
            progress.comparing(0)
            terminal.read_until(r"0.00/0.00")
            assert terminal.line()
        assert terminal.line() == ""
        assert "\n" not in terminal.text
        assert not any(thread.name == "tiedquiet-progress" for thread in threading.enumerate())


def test_it_waits_for_two_seconds(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress._DELAY == 2
    with os.fdopen(os.dup(terminal.follower), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "_DELAY", 3600)
        with progress.shown(True):
            progress.loading("unet")
            progress.comparing(1)
            progress.compared(1)
        assert terminal.rest() == ""


@pytest.mark.usefixtures("at_once")
def test_a_terminal_that_goes_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    stream = os.fdopen(terminal.follower, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress.shown(True):
        progress.loading("unet")
        terminal.read_until("loading")
        os.close(terminal.leader)  # and at its end the bar is cleared
    with suppress(OSError):
        stream.close()


@pytest.mark.slow
def test_the_command_on_a_terminal_and_in_a_pipe(terminal: Terminal, tmp_path: Path) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    verdict = "GPT2LMHeadModel: 16 of 16 tensors hold the file's bytes"
    with read(terminal):
        done = run(tmp_path, stderr=terminal.follower)
    assert (done.returncode, done.stdout.startswith(verdict)) == (0, True)
    assert f"loading {tmp_path}"[:30] in terminal.rest()
    assert terminal.line() == ""
    for arguments in (["--json"], ["--quiet"]):
        terminal.text = ""
        assert run(tmp_path, *arguments, stderr=terminal.follower).returncode == 0
        assert terminal.rest() == ""
    done = run(tmp_path, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr, done.stdout.startswith(verdict)) == (0, "", True)


def test_a_terminal_that_cannot_draw_over_a_line_gets_none(
    terminal: Terminal, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with os.fdopen(os.dup(terminal.follower), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.shown(True):
            assert progress._shown.get() is None
            progress.loading("unet")
    assert terminal.rest() == ""
