"""Visible by default, obedient to ordinary logging configuration, rank 0 only."""

import sys

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


LOSES = LOAD.replace(
    "Overrides.from_pretrained(path)", "GPT2LMHeadModel.from_pretrained(path, tie_word_embeddings=False)"
)
LOSS = "tiedquiet] WARNING GPT2LMHeadModel from "
ROOT = "dict(version=1, handlers={'h': {'class': 'logging.StreamHandler'}}, root={'level': 'INFO', 'handlers': ['h']}"


RAISES = "h = logging.Handler(); logging.root.addHandler(h)  # whose `emit` raises"


@pytest.mark.slow
@pytest.mark.parametrize("ci", ["", "true"])
@pytest.mark.parametrize(
    "setup",
    [
        "logging.basicConfig(level=logging.CRITICAL, format='[%(name)s] %(levelname)s %(message)s')",
        f"import logging.config; logging.config.dictConfig({ROOT}))",
        f"import logging.config, transformers.modeling_utils; logging.config.dictConfig({ROOT}, loggers={{'transformers': {{}}}}))",
        "h = logging.StreamHandler(); h.setLevel(logging.ERROR); logging.root.addHandler(h)",
        "logging.root.addHandler(logging.NullHandler())",
        RAISES,
        "logging.getLogger('tiedquiet').addFilter(lambda record: 1 / 0)",
    ],
)
def test_what_is_lost_is_seen_where_the_row_is(setup: str, ci: str) -> None:
    """A row is printed under each of these, since transformers has a level and a handler of its own."""
    if ci and setup == RAISES:
        pytest.skip(
            "where CI is set, transformers' records go to the root's handlers, too, and its load ends in this one"
        )
    code = f"import logging, transformers, tiedquiet\nfrom transformers import AutoModel\n{setup}\n" + LOSES
    done = run(code, CI=ci)
    assert "LOAD REPORT" in done.stderr
    assert done.stderr.count("untied, values are NOT from the checkpoint") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "seen"),
    [
        ("logging.disable(logging.WARNING)", False),
        ("transformers.logging.set_verbosity_error()", False),
        ("logging.getLogger('tiedquiet').setLevel(logging.ERROR)", False),
        ("logging.getLogger('tiedquiet').addHandler(logging.NullHandler())", False),
        ("logging.getLogger('tiedquiet').addFilter(lambda record: False)", False),
        ("transformers.logging.set_verbosity_error(); logging.getLogger('tiedquiet').setLevel(logging.WARNING)", True),
    ],
)
def test_it_is_silenced_by_name_or_with_transformers(setup: str, seen: bool) -> None:
    done = run(f"import logging, transformers, tiedquiet\n{setup}\n" + LOSES)
    assert (LOSS in done.stderr) is seen


def test_a_filter_may_put_another_record_in_its_place() -> None:
    """From Python 3.12 on; before, what it returns says no more than whether to go on."""
    code = """
import copy, logging, sys
import tiedquiet
from tiedquiet.words import say
def hide(record):
    hidden = copy.copy(record)
    hidden.msg = record.msg.replace("secret", "***")
    return hidden
logging.getLogger("tiedquiet").addFilter(hide)
say(30, "the secret path")
"""
    assert ("secret" in run(code).stderr) is (sys.version_info < (3, 12))


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
