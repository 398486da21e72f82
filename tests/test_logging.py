"""Visible by default, obedient to ordinary logging configuration, rank 0 only."""

import pytest

from tests.test_patch import run

LOAD = """
import sys, tempfile
from pathlib import Path
import transformers
from tests.compat.cases import CASES
path = Path(tempfile.mkdtemp())
cls, _ = CASES["DeclaresNothing"](path)
transformers.logging.disable_progress_bar()
cls.from_pretrained(path)
"""
LINE = "reported missing but tied to what was loaded: lm_head.weight is transformer.wte.weight"


def test_visible_by_default_and_leaves_the_logger_as_it_was() -> None:
    done = run(
        "import tiedquiet\n"
        + LOAD
        + "import logging\nlog = logging.getLogger('tiedquiet')\nassert not log.handlers and log.level == 0"
    )
    (line,) = [line for line in done.stderr.splitlines() if LINE in line]
    assert line.startswith("[tiedquiet] INFO DeclaresNothing from ")
    assert "LOAD REPORT" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("setup", "seen"),
    [
        ("logging.basicConfig(level=logging.INFO)", True),
        ("logging.basicConfig(level=logging.WARNING)", False),
        ("logging.basicConfig(level=logging.INFO); logging.getLogger('tiedquiet').setLevel(logging.ERROR)", False),
        ("logging.getLogger('tiedquiet').setLevel(logging.WARNING)", False),
        ("logging.getLogger('tiedquiet').addHandler(logging.NullHandler())", False),
        ("logging.getLogger('tiedquiet').disabled = True", False),
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
    code = f"import torch.distributed as d\nfrom unittest.mock import patch\nd.is_initialized = lambda: True\nd.get_rank = lambda *_: {rank}\n"
    done = run(
        "import tiedquiet\nfrom tiedquiet.report import say\n"
        + code.replace("from unittest.mock import patch\n", "")
        + "say(20, 'hello')"
    )
    assert ("hello" in done.stderr) is seen
