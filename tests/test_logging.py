"""Visible by default, obedient to ordinary logging configuration, rank 0 only."""

import pytest

from tests.doors.test_wrapping import run
from tests.programs import LINE, LOAD


def test_visible_by_default_and_leaves_the_logger_as_it_was() -> None:
    done = run(
        "import tiedquiet\n"
        + LOAD
        + "import logging\nlog = logging.getLogger('tiedquiet')\nassert not log.handlers and log.level == 0"
    )
    (line,) = [line for line in done.stderr.splitlines() if LINE in line]
    assert line.startswith("[tiedquiet] INFO Overrides from ")
    assert "LOAD REPORT" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "seen"),
    [
        ("logging.basicConfig(level=logging.INFO)", True),
        ("logging.basicConfig(level=logging.WARNING)", False),
        ("logging.basicConfig(level=logging.INFO); logging.getLogger('tiedquiet').setLevel(logging.ERROR)", False),
        ("logging.getLogger('tiedquiet').setLevel(logging.WARNING)", False),
        ("logging.getLogger('tiedquiet').addHandler(logging.NullHandler())", False),
        ("logging.getLogger('tiedquiet').disabled = True", False),
        ("logging.disable(logging.INFO)", False),
        ("logging.getLogger('tiedquiet').addFilter(lambda record: False)", False),
        ("import transformers; transformers.logging.set_verbosity_error()", False),
        (
            "import transformers; transformers.logging.set_verbosity_error(); logging.basicConfig(level=logging.INFO)",
            False,
        ),
        (
            "import transformers; transformers.logging.set_verbosity_error(); logging.getLogger('tiedquiet').setLevel(logging.INFO)",
            True,
        ),
    ],
)
def test_ordinary_configuration_decides(setup: str, seen: bool) -> None:
    done = run(f"import logging; {setup}\nimport tiedquiet\n" + LOAD)
    assert (LINE in done.stderr) is seen
    assert "LOAD REPORT" not in done.stderr


@pytest.mark.parametrize(("rank", "seen"), [("0", True), ("1", False)])
def test_only_rank_0_speaks(rank: str, seen: bool) -> None:
    done = run("import tiedquiet\n" + LOAD, RANK=rank)
    assert (LINE in done.stderr) is seen
    assert "LOAD REPORT" not in done.stderr


@pytest.mark.parametrize(("rank", "seen"), [(0, True), (1, False)])
def test_an_initialised_process_group_decides(rank: int, seen: bool) -> None:
    group = f"import torch.distributed as d\nd.is_initialized = lambda: True\nd.get_rank = lambda: {rank}\n"
    done = run("import tiedquiet\nfrom tiedquiet.words import say\n" + group + "say(20, 'hello')")
    assert ("hello" in done.stderr) is seen


def test_no_line_is_lost_between_two_threads() -> None:
    code = """
import logging, sys, threading, time
import tiedquiet
from tiedquiet.words import say
class Slow(logging.Filter):
    def filter(self, record):
        time.sleep(0.001)  # another thread's turn, in the middle of a line
        return True
logging.getLogger("tiedquiet").addFilter(Slow())
threads = [threading.Thread(target=lambda n=n: [say(20, f"line {n}.{i}.") for i in range(50)]) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    done = run("import tiedquiet\n" + code)
    assert sorted(done.stderr.split()[3::4]) == sorted(f"{n}.{i}." for n in range(4) for i in range(50))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_failure_is_told_by_rank_0_alone(rank: str) -> None:
    fail = "import tiedquiet.proof.judge\ndef fails(*_, **__): raise KeyError('injected')\ntiedquiet.proof.judge.survey = fails\n"
    done = run("import tiedquiet\n" + LOAD.replace("path = ", fail + "path = "), RANK=rank)
    assert ("goes on without it: KeyError" in done.stderr) is (rank == "0")
    assert "LOAD REPORT" in done.stderr
