"""docs/faq.md: code of version 4 crashes as the page says, and its cure cures it. Run on each release by tests/compat."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2LMHeadModel

import tiedquiet
from benchmarks.tiny_models import tiny
from tests.checkpoints import Printed, gpt2
from tests.pages import ROOT, fenced, sections

CRASHES = {
    title: text
    for title, text in sections(ROOT / "docs" / "faq.md").items()
    if fenced(text, "python") and fenced(text, "diff")
}


def cured(code: str, diff: str) -> str:
    """A program with its lines changed as a diff without line numbers says."""
    lines = diff.splitlines()
    old = "\n".join(line[1:] for line in lines if line[:1] in " -")
    new = "\n".join(line[1:] for line in lines if line[:1] in " +")
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
    with pytest.raises((AttributeError, TypeError, RuntimeError), match=re.escape(title.strip("`"))):
        model_of(code)
    assert tiedquiet.check(model_of(cured(code, diff))).ok


def test_the_usual_answer_leaves_the_head_random(model_of: Callable[[str], Any]) -> None:
    code = fenced(CRASHES["`'list' object has no attribute 'keys'`"], "python")[0]
    (finding,) = tiedquiet.check(model_of(code.replace('["lm_head.weight"]', "None"))).findings
    assert finding.verdict is tiedquiet.Verdict.UNTIED


def test_a_plain_attribute_is_filled_by_repair(model_of: Callable[[str], Any]) -> None:
    page = CRASHES["`is not on the expected device`"]
    with tiedquiet.enable("repair"):
        model = model_of(fenced(page, "python")[0])
    assert model.angles.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_an_index_or_a_matrix_on_meta_crashes_nowhere() -> None:
    for compute in (lambda it: torch.ones(3, 2)[it.long()[0]], lambda it: torch.ones(3, 2) @ it):
        assert not compute(torch.empty(2, 3, device="meta")).is_meta


def test_a_log_level_silences_and_changes_nothing_else(tmp_path: Path, printed: Printed) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with tiedquiet.enable("on"):
            untied = GPT2LMHeadModel.from_pretrained(tmp_path, tie_word_embeddings=False)
        with tiedquiet.enable("repair"):
            repaired = GPT2LMHeadModel.from_pretrained(tmp_path, tie_word_embeddings=False)
        with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError):
            GPT2LMHeadModel.from_pretrained(tmp_path, tie_word_embeddings=False)
    finally:
        transformers.logging.set_verbosity(before)
    assert not printed.report
    (finding,) = tiedquiet.check(untied).findings
    assert finding.verdict is tiedquiet.Verdict.UNTIED
    assert repaired.lm_head.weight is repaired.transformer.wte.weight


def test_the_renaming_that_a_subclass_does_not_get(tmp_path: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration, conversion_mapping

    if "is_custom_code" not in Path(conversion_mapping.__file__).read_text():
        pytest.skip("this release renames for every class")

    class MyQwen(Qwen2VLForConditionalGeneration):
        pass

    def missing(cls: Any) -> set[str]:
        return set(cls.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"])

    tiny(Qwen2VLForConditionalGeneration).save_pretrained(tmp_path)
    assert not missing(Qwen2VLForConditionalGeneration)
    assert missing(MyQwen)
    page = sections(ROOT / "docs" / "faq.md")["My own subclass reports rows that the class itself does not"]
    exec(fenced(page, "python")[0])
    assert not missing(MyQwen)
