"""docs/faq.md: code of version 4 crashes as the page says, and its cure cures it. Run on each release by tests/compat."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiedquiet
from tests.pages import ROOT, fenced, sections

CRASHES = {
    title: text
    for title, text in sections(ROOT / "docs" / "faq.md").items()
    if fenced(text, "python") and fenced(text, "diff")
}


def cured(code: str, diff: str) -> str:
    """A program with its lines changed as a diff without line numbers says."""
    lines = diff.splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert code.count(old) == 1
    return code.replace(old, new)


@pytest.fixture
def model_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Runs a program as a module that has a file, which transformers 5.0.0 to 5.2.0 look for, and gives its `model`."""

    def model_of(code: str) -> Any:
        (tmp_path / "modelling.py").write_text(code)
        spec = importlib.util.spec_from_file_location("modelling", tmp_path / "modelling.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "modelling", module)
        spec.loader.exec_module(module)
        return module.model

    return model_of


@pytest.mark.parametrize("title", CRASHES)
def test_what_crashes_is_cured(title: str, model_of: Callable[[str], Any]) -> None:
    (code,), (diff,) = fenced(CRASHES[title], "python"), fenced(CRASHES[title], "diff")
    with pytest.raises((AttributeError, TypeError), match=re.escape(title.strip("`"))):
        model_of(code)
    assert tiedquiet.check(model_of(cured(code, diff))).ok


def test_the_usual_answer_leaves_the_head_random(model_of: Callable[[str], Any]) -> None:
    code = fenced(CRASHES["`'list' object has no attribute 'keys'`"], "python")[0]
    (finding,) = tiedquiet.check(model_of(code.replace('["lm_head.weight"]', "None"))).findings
    assert finding.verdict is tiedquiet.Verdict.UNTIED
