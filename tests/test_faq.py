"""docs/faq.md: code of version 4 crashes as the page says, and its cure cures it. Run on each release by tests/compat."""

import re
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


@pytest.mark.parametrize("title", CRASHES)
def test_what_crashes_is_cured(title: str) -> None:
    (code,), (diff,) = fenced(CRASHES[title], "python"), fenced(CRASHES[title], "diff")
    with pytest.raises((AttributeError, TypeError), match=re.escape(title.strip("`"))):
        exec(code, {"__name__": "modelling"})
    scope: dict[str, Any] = {"__name__": "modelling"}
    exec(cured(code, diff), scope)
    assert tiedquiet.check(scope["model"]).ok


def test_the_usual_answer_leaves_the_head_random() -> None:
    code = fenced(CRASHES["`'list' object has no attribute 'keys'`"], "python")[0]
    scope: dict[str, Any] = {"__name__": "modelling"}
    exec(code.replace('["lm_head.weight"]', "None"), scope)
    (finding,) = tiedquiet.check(scope["model"]).findings
    assert finding.verdict is tiedquiet.Verdict.UNTIED
