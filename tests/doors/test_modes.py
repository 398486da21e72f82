"""What `off`, `on` and `repair` do with each verdict, through the real `from_pretrained`."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, T5ForConditionalGeneration

import tiedquiet
from tests.checkpoints import Printed, gpt2, holds, save, t5
from tests.compat import cases
from tiedquiet import Finding, Verdict
from tiedquiet.words import explanations


def verdicts(model: torch.nn.Module) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in tiedquiet.check(model).findings}


def test_on_drops_exactly_the_proven_rows_and_keeps_the_others(tmp_path: Path, printed: Printed) -> None:
    keys = [
        key
        for key in cases.DeclaresNothing(gpt2()).state_dict()
        if key not in ("lm_head.weight", "transformer.ln_f.bias")
    ]
    save(cases.DeclaresNothing(gpt2()), tmp_path, keys, extra=torch.ones(2))
    _, info = cases.DeclaresNothing.from_pretrained(tmp_path, output_loading_info=True)
    assert not printed.shows("lm_head.weight")
    assert printed.shows("transformer.ln_f.bias")
    assert "UNEXPECTED" in printed.report
    assert printed.confirmed == [
        f"DeclaresNothing from {tmp_path}: reported missing but tied to what was loaded: lm_head.weight is transformer.wte.weight"
    ]
    assert set(info["missing_keys"]) == {"lm_head.weight", "transformer.ln_f.bias"}, "the caller's info is untouched"


def test_off_prints_what_transformers_prints(tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    with tiedquiet.enable("off"):
        cls.from_pretrained(tmp_path)
    assert printed.shows("lm_head.weight")
    assert printed.of("tiedquiet") == []


def test_many_keys_are_folded_into_one_line(tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES["TiesManyHeads"](tmp_path)
    cls.from_pretrained(tmp_path)
    (line,) = printed.confirmed
    assert "heads.{0, 1, 2}.weight is transformer.wte.weight" in line


@pytest.mark.usefixtures("process_group")
def test_a_process_that_is_sent_its_weights_later_is_left_in_peace(
    tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP's RAM-efficient loading leaves all but the first process of a machine empty."""
    save(T5ForConditionalGeneration(t5()), tmp_path / "model")
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    with tiedquiet.enable("strict"):
        T5ForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert printed.of("tiedquiet") == []


def test_more_kinds_of_keys_than_one_reads_are_counted() -> None:
    from tiedquiet.words import confirmation

    found = [Finding(f"{c}.weight", Verdict.TIED, "shared.weight") for c in "abcdefghij"]
    assert confirmation(found, [], list).endswith("h.weight is shared.weight and 2 more")


def test_untied_is_explained_with_its_flag(tmp_path: Path, printed: Printed) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path, flag=False)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    (line,) = printed.loud
    assert "untied" in line
    assert "lm_head.weight is not transformer.wte.weight, because GPT2Config.tie_word_embeddings is false" in line
    assert "TIEDQUIET=repair" in line
    proof = tiedquiet.check(model)
    assert [(f.key, f.source, f.verdict) for f in proof.findings] == [
        ("lm_head.weight", "transformer.wte.weight", Verdict.UNTIED)
    ]
    assert not proof.ok
    assert "untied lm_head.weight (transformer.wte.weight) because" in str(proof)
    assert "the load was not sound" in str(proof)


def test_untied_by_an_override_names_it(tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES["DoesNothing"](tmp_path)
    cls.from_pretrained(tmp_path)
    assert re.search(
        r"because DoesNothing.tie_weights \(.*cases.py:\d+\) does not tie it\. .*=repair or fix that method;",
        printed.loud[0],
    )


def test_the_cure_is_that_of_the_finding() -> None:
    why = "because Model.tie_weights (/src/accelerate/modeling.py:3) does not tie it"
    (line,) = explanations(
        [Finding("head.weight", Verdict.UNTIED, "embed.weight", why, True, "Mend that method")], list
    )
    assert "does not tie it. Mend that method; " in line


def test_untied_without_a_cause_says_that_the_config_asks_for_it(tmp_path: Path, printed: Printed) -> None:
    class Parts(GPT2LMHeadModel):
        def _adjust_missing_and_unexpected_keys(self, *args: Any, **kwargs: Any) -> Any:
            self.lm_head.weight = torch.nn.Parameter(torch.ones(64, 16))
            return super()._adjust_missing_and_unexpected_keys(*args, **kwargs)

    save(GPT2LMHeadModel(gpt2()), tmp_path)
    Parts.from_pretrained(tmp_path)
    assert "lm_head.weight is not transformer.wte.weight, although its config asks for it. If" in printed.loud[0]
    assert "set TIEDQUIET=repair; ignore this" in printed.loud[0]


def test_what_the_config_asks_for_and_nobody_declares_is_said_so(tmp_path: Path, printed: Printed) -> None:
    class Undeclared(GPT2LMHeadModel):
        _tied_weights_keys = None

    save(GPT2LMHeadModel(gpt2()), tmp_path)
    Undeclared.from_pretrained(tmp_path)
    why = "although its config asks for it, because Undeclared._tied_weights_keys does not declare it"
    assert f"lm_head.weight is not transformer.wte.weight, {why}. If" in printed.loud[0]
    assert "set TIEDQUIET=repair or declare it there;" in printed.loud[0]


def test_the_flag_is_the_cause_when_the_source_is_the_missing_end_too(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    keys = [key for key in model.state_dict() if key != "transformer.wte.weight"]
    save(model, tmp_path, keys, flag=False)
    GPT2LMHeadModel.from_pretrained(tmp_path)
    assert "transformer.wte.weight is not lm_head.weight, because GPT2Config.tie_word_embeddings is" in printed.loud[0]


class TiesAsItsClassDoes(GPT2LMHeadModel):
    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)


@pytest.mark.parametrize("cls", [GPT2LMHeadModel, TiesAsItsClassDoes])
def test_two_loads_at_once_are_named_as_the_cause(cls: Any, tmp_path: Path, printed: Printed) -> None:
    """Transformers swaps `PreTrainedModel.tie_weights` for an empty function while it builds a model, and so puts back
    another thread's empty one. From 5.1.0 on, where the function has a name that tells.
    """
    initialization = pytest.importorskip("transformers.initialization")
    if not hasattr(initialization, "no_tie_weights"):
        pytest.skip("this release empties it under another name")
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    with initialization.no_tie_weights():
        cls.from_pretrained(tmp_path)
    assert "because two models were loaded at once in two threads" in printed.loud[0]
    assert "set TIEDQUIET=repair or load one after the other;" in printed.loud[0]


@pytest.mark.parametrize("name", ["gpt2_flag_off", "Clones", "DoesNothing", "umt5_as_wan_stores_it"])
def test_repair_ties_what_is_untied_and_confirms(name: str, tmp_path: Path, printed: Printed) -> None:
    cls, stored = cases.CASES[name](tmp_path)
    with tiedquiet.enable("repair"):
        model = cls.from_pretrained(tmp_path)
    assert set(verdicts(model).values()) == {Verdict.TIED}
    assert not printed.report
    assert not printed.loud
    assert all("not tied by transformers, repaired: " in line for line in printed.confirmed)
    for found in tiedquiet.check(model).findings:
        assert holds(model.get_parameter(found.key), stored[str(found.source)])
    model.save_pretrained(tmp_path / "again")
    with tiedquiet.enable("repair"):
        again = cls.from_pretrained(tmp_path / "again")
    for found in tiedquiet.check(model).findings:
        assert torch.equal(again.get_parameter(found.key), stored[str(found.source)])


@pytest.mark.parametrize("why", ["shape", "dtype", "ambiguous", "rivals"])
def test_repair_leaves_what_it_cannot_tie_safely(why: str, tmp_path: Path, printed: Printed) -> None:
    if why == "rivals":
        cls = _TiesNothing
        keys = [k for k in cls(t5()).state_dict() if k not in ("shared.weight", "encoder.embed_tokens.weight")]
        save(cls(t5()), tmp_path, keys, flag=True)
    elif why == "ambiguous":
        cls, _ = cases.CASES["t5_two_different_members_without_the_source"](tmp_path)
    else:
        cls = {"shape": _OtherShape, "dtype": _OtherType}[why]
        save(GPT2LMHeadModel(gpt2()), tmp_path, flag=False)
    with tiedquiet.enable("repair"):
        model = cls.from_pretrained(tmp_path)
    assert not any("repaired" in line for line in printed.confirmed)
    assert set(verdicts(model).values()) != {Verdict.TIED}
    assert printed.loud


class _TiesNothing(T5ForConditionalGeneration):
    def tie_weights(self, *_: object, **__: object) -> None:
        pass


class _OtherShape(GPT2LMHeadModel):
    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.lm_head = torch.nn.Linear(16, 65, bias=False)


class _OtherType(GPT2LMHeadModel):
    def tie_weights(self, *_: object, **__: object) -> None:
        self.lm_head.to(torch.float64)


class _LosesWhatItLoaded(GPT2LMHeadModel):
    def tie_weights(self, *_: object, **__: object) -> None:
        if not self.transformer.wte.weight.is_meta:
            self.transformer.wte.weight.data.normal_()


def test_repair_does_not_touch_a_module_with_a_second_stored_name(tmp_path: Path, printed: Printed) -> None:
    class Aliased(GPT2LMHeadModel):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.head = torch.nn.Linear(16, 64, bias=False)
            self.lm_head = self.head

    model = Aliased(gpt2(tie_word_embeddings=False))
    keys = [key for key in model.state_dict() if key != "lm_head.weight"]
    stored = save(model, tmp_path, keys, flag=False)
    with tiedquiet.enable("repair"):
        model = Aliased.from_pretrained(tmp_path)
    assert model.head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    assert not any("is now" in line for line in printed.confirmed)
    assert stored["head.weight"].shape == model.head.weight.shape


@pytest.mark.parametrize("word", ["2", "loud", "repair!"])
def test_a_wrong_mode_names_the_valid_ones(word: str) -> None:
    with pytest.raises(ValueError, match=r"is not a mode of tiedquiet; valid values: 0, off, .*repair, strict"):
        tiedquiet.enable(word)


@pytest.mark.parametrize(
    ("word", "expected"), [("1", "on"), ("TRUE", "on"), ("", "on"), (" repair ", "repair"), ("No", "off")]
)
def test_the_words_of_the_environment(word: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiedquiet import mode

    monkeypatch.setenv("TIEDQUIET", word)
    with tiedquiet.enable():
        assert mode.current() == expected
    assert mode.current() == "on"
