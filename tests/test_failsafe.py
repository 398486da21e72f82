"""Whatever of ours breaks: the load succeeds, the original report is printed, and one line says so."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

import tiedquiet
from tests.checkpoints import Printed, gpt2, save
from tests.compat import cases
from tiedquiet import patch, proof, report, ties

# Each function that a load runs, in any mode, with the module where its caller looks it up.
FUNCTIONS = [
    (ties, "_pairs"),
    (ties, "_matches"),
    (proof, "groups"),
    (proof, "begin"),
    (proof, "settle"),
    (proof, "_record"),
    (proof, "_survey"),
    (proof, "_now"),
    (proof, "_tensor_at"),
    (proof, "_fingerprints"),
    (proof, "_fingerprint"),
    (proof, "_readable"),
    (proof, "_compare"),
    (proof, "_changed"),
    (proof, "_judge"),
    (proof, "_judge_one"),
    (proof, "_same"),
    (proof, "_merged"),
    (proof, "_repair"),
    (proof, "_differ"),
    (report, "confirmation"),
    (report, "loud_lines"),
    (report, "unproven_lines"),
    (report, "_where"),
    (report, "_pairs"),
    (report, "_join"),
    (report, "_explain"),
    (report, "say"),
    (report, "is_main_process"),
    (patch, "_left_empty"),
    (patch, "_bind"),
    (patch, "_conclude"),
    (patch, "_fold"),
    (patch, "_plan_report"),
]
CASES = ("shares_a_module", "OverridesTieWeights", "t5_two_different_members_without_the_source", "gpt2_flag_off")


class Broken(Exception):
    """Injected."""


def breaks(*_: Any, **__: Any) -> Any:
    raise Broken("injected")


def test_every_function_of_a_load_is_in_the_list() -> None:
    listed = {name for _, name in FUNCTIONS} | {"check", "_judged", "_aside", "_once", "_is_failing", "_plan_resume"}
    around = {"_on_load", "_on_report", "_on_resume", "wrap", "unwrap", "_wrap", "_unwrap", "_swap_copies"}
    around |= {"inert_because", "warn_if_inert"}
    for module in (ties, proof, report, patch):
        own = {
            n
            for n, f in vars(module).items()
            if callable(f) and getattr(f, "__module__", "") == module.__name__ and not isinstance(f, type)
        }
        assert own <= listed | around, own - listed - around


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=[f"{m.__name__}.{n}" for m, n in FUNCTIONS])
def test_an_exception_in_any_function_leaves_the_load_and_its_report_alone(
    module: Any, name: str, tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def breaks(*_: Any, **__: Any) -> Any:
        called.append(name)
        raise Broken("injected")

    for case in CASES:
        cls, _ = cases.CASES[case](tmp_path / case)
        with tiedquiet.enable("off"):
            cls.from_pretrained(tmp_path / case)
        original = printed.report
        for how in ("on", "repair", "strict"):
            printed.records.clear()
            before = len(called)
            with monkeypatch.context() as broken, tiedquiet.enable(how):
                broken.setattr(module, name, breaks)
                try:
                    model = cls.from_pretrained(tmp_path / case)
                except tiedquiet.TieError:
                    assert how == "strict"
                    continue
            assert model.training is False
            if len(called) > before:
                assert printed.report == original
                assert any("stood aside" in line and "Broken" in line for line in printed.loud)
        printed.records.clear()
    assert called, "no load runs it: it proves nothing"


@pytest.mark.parametrize("name", ["_plan_resume", "_bind", "_conclude"])
def test_a_resume_survives_too(name: str, tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2LMHeadModel(gpt2())
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    result = model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, strict=False)
    monkeypatch.setattr(patch, name, breaks)
    trainer._issue_warnings_after_load(result)
    assert any("lm_head.weight" in line for line in printed.of("transformers.trainer"))
    assert any("stood aside" in line for line in printed.loud)


def test_a_loud_line_that_cannot_be_said_does_not_stop_the_load(
    tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path, flag=False)
    monkeypatch.setattr(report, "say", breaks)
    GPT2LMHeadModel.from_pretrained(tmp_path)
    assert printed.shows("lm_head.weight")


def test_even_the_line_that_says_so_may_fail(tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    monkeypatch.setattr(proof, "settle", breaks)
    monkeypatch.setattr(report.log, "warning", breaks)
    cls.from_pretrained(tmp_path)
    assert printed.shows("lm_head.weight")


def test_a_seam_that_cannot_be_wrapped_is_left(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    tiedquiet.disable()
    monkeypatch.setattr(patch, "_wrap", breaks)
    with tiedquiet.enable("on"):
        assert patch._wrapped == {}
    assert any("stood aside" in line for line in printed.of("tiedquiet", logging.WARNING))
