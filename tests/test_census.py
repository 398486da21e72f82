"""The census (`python -m benchmarks.census`): a sample that shows every form of declaration, and that it sees what is wrong."""

import gc
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks import tiny_models
from benchmarks.census import loads, resume
from benchmarks.census.__main__ import main
from benchmarks.census.models import Saved, asks
from benchmarks.census.report import COUNTED, summarise, table_of_resumes
from benchmarks.census.ways import WAYS
from tiedquiet import Finding, Verdict
from tiedquiet.doors import folder, resumed, trainer
from tiedquiet.proof import judge, missing
from tiedquiet.proof.files import Checkpoint

SAMPLE = """
    LlamaForCausalLM GPT2LMHeadModel Gemma3ForConditionalGeneration Qwen2VLForConditionalGeneration OPTForCausalLM
    WhisperForConditionalGeneration Blip2ForConditionalGeneration LlavaForConditionalGeneration FSMTModel
    AlbertForMaskedLM BertForMaskedLM BertForPreTraining BartModel BartForConditionalGeneration XLMRobertaForMaskedLM
    T5ForConditionalGeneration T5EncoderModel UMT5EncoderModel UMT5ForConditionalGeneration MT5ForConditionalGeneration
    LongT5ForConditionalGeneration M2M100ForConditionalGeneration LEDForConditionalGeneration SeamlessM4TModel
    FlavaForPreTraining UdopModel BarkFineModel MarianModel MarianMTModel ZambaModel DebertaForMaskedLM
    IdeficsForVisionText2Text SamModel DFineForObjectDetection RTDetrV2ForObjectDetection DabDetrForObjectDetection
    DeformableDetrForObjectDetection Deimv2ForObjectDetection GroundingDinoForObjectDetection
    MMGroundingDinoForObjectDetection IBertForMaskedLM PPDocLayoutV3Model T5Gemma2Model FunnelForMaskedLM
    MixtralForCausalLM Kosmos2ForConditionalGeneration Qwen2_5OmniThinkerForConditionalGeneration
""".split()  # noqa: SIM905


LOADS = {way for way in WAYS if way != "flag off at the top only"}  # which is for composites
ALL = LOADS | {"resume"}


def wrong(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if any(line.get(what) for what in COUNTED)]


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """The Trainer collects garbage after each shard; it need not walk over every module of transformers anew."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore")  # what building odd configurations warns of is not what is tested
def test_no_true_row_is_hidden_and_no_verdict_is_wrong(name: str) -> None:
    cls: Any = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    tried = [line for line in loads.census_of_class(cls) if "reason" not in line]
    assert len(tried) >= 8
    assert wrong(tried) == []


@pytest.fixture(scope="module")
def gpt2() -> dict[str, dict[str, Any]]:
    return {line["way"]: line for line in loads.census_of_class(transformers.GPT2LMHeadModel)}


def test_every_way_is_tried_and_finds_what_it_is_for(gpt2: dict[str, dict[str, Any]]) -> None:
    assert {way for way, line in gpt2.items() if "reason" not in line} == ALL
    assert wrong(list(gpt2.values())) == []
    assert {way: line["verdicts"] for way, line in gpt2.items() if way in ALL} == {
        **{way: {"tied": 1} for way in ALL},
        "flag off": {"untied": 1},
        "under a target's name, flag off": {"untied": 1},
        "base model's file": {"tied": 1},
        "two ends that differ": {"ambiguous": 1},
        "no end of a tie": {"missing": 2},
        "another vocabulary": {"missing": 2},
        "a user's subclass of version 4, no biases": {"tied": 1, "missing": 13, "unwritten": 1},
    }
    # All of them hold the embedding but these, and no other tensor is left out of what is compared.
    counts = {way: line["tensors"] for way, line in gpt2.items() if way in ALL}
    assert counts["no end of a tie"] == counts["another vocabulary"] == counts["as saved"] - 1
    assert counts["two ends that differ"] == counts["as saved"] + 1
    assert (
        counts["float32 into bfloat16"]
        == counts["bfloat16 into float32"]
        == counts["partly on disk"]
        == counts["as saved"]
    )


def test_what_the_added_ways_load(tmp_path: Path) -> None:
    saved = Saved(transformers.GPT2LMHeadModel)
    file = WAYS["bfloat16 into float32"].tensors(saved)
    assert file is not None
    assert {value.dtype for value in file.values()} == {torch.bfloat16}
    assert WAYS["bfloat16 into float32"].load(saved, tmp_path) == {"dtype": torch.float32}
    assert WAYS["float32 into bfloat16"].load(saved, tmp_path) == {"dtype": torch.bfloat16}
    options = WAYS["partly on disk"].load(saved, tmp_path)
    assert options is not None
    assert {key for key, place in options["device_map"].items() if place == "disk"} == {"transformer.wte", "lm_head"}
    config = {"vocab_size": 128, "text_config": {"vocab_size": 64, "type_vocab_size": 2}}
    WAYS["another vocabulary"].change(config)
    assert config == {"vocab_size": 136, "text_config": {"vocab_size": 72, "type_vocab_size": 2}}
    assert WAYS["another vocabulary"].load(saved, tmp_path) == {"ignore_mismatched_sizes": True}
    users = WAYS["a user's subclass, shards"].cls(saved.cls)
    assert issubclass(users, saved.cls)
    assert users is not saved.cls


def test_a_class_that_only_carries_a_tied_model_is_found() -> None:
    module = importlib.import_module("transformers.models.bark.modeling_bark")
    assert module.BarkModel in tiny_models.classes_that_may_carry(module)
    assert module.BarkModel not in tiny_models.declaring_classes(module)
    assert tiny_models.modules_with_ties("^BarkModel$") == [module.__name__]
    with pytest.raises(tiny_models.NoTies):
        tiny_models.tiny(transformers.GPT2ForSequenceClassification)


def lines_of(cls: Any, monkeypatch: pytest.MonkeyPatch, *ways: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(loads, "WAYS", {way: WAYS[way] for way in ways if way != "resume"})
    return [line for line in loads.census_of_class(cls) if line["way"] in ways]


VERSION_4 = "a user's subclass of version 4, no biases"


def test_the_census_sees_a_shim_that_confirms_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missing, "_judge_parted", lambda _, key, *more: Finding(key, Verdict.TIED, key))
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "flag off")
    assert line["hidden_wrongly"] == ["lm_head.weight"]
    assert line["missed"] == [["lm_head.weight", "tied", "untied"]]


@pytest.mark.parametrize(
    ("room", "nothing", "verdict"),
    [("judge_stored", ({}, set(), set()), "overwritten"), ("judge_placeholders", {}, "unwritten")],
)
def test_the_census_sees_a_shim_that_misses_a_loss(
    room: str, nothing: object, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (right,) = lines_of(transformers.BertForMaskedLM, monkeypatch, VERSION_4)
    assert right["missed"] == []
    monkeypatch.setattr(judge, room, lambda *_: nothing)
    (line,) = lines_of(transformers.BertForMaskedLM, monkeypatch, VERSION_4)
    assert {true for _, _, true in line["missed"]} == {verdict}


def test_the_census_sees_a_shim_that_lets_two_stored_ends_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "judge_two_ends", lambda *_: ())
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "two ends that differ")
    assert line["missed"] == [["lm_head.weight", None, "ambiguous"]]


def test_the_census_sees_a_shim_that_says_nothing_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "judge_missing", lambda *_: ())
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "no end of a tie")
    assert [(ours, true) for _, ours, true in line["verdict_wrong"]] == [(None, "missing")] * 2


def test_the_census_sees_a_shim_that_does_not_look_into_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = getattr(transformers, "Qwen2_5OmniThinkerForConditionalGeneration", None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no Qwen2.5-Omni")
    (right,) = lines_of(cls, monkeypatch, "a user's subclass, shards")
    assert right["verdicts"]["unread"]
    assert wrong([right]) == []
    monkeypatch.setattr("tiedquiet.proof.unread.note_unread", lambda *_: None)
    (line,) = lines_of(cls, monkeypatch, "a user's subclass, shards")
    assert {true for _, _, true in line["missed"]} == {"unread"}
    assert len(line["missed"]) == right["verdicts"]["unread"]


def say_overwritten(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    found = {key: Finding(key, Verdict.OVERWRITTEN, key, "by nobody", True)}
    monkeypatch.setattr(judge, "judge_stored", lambda *_: (found, set(), set()))


def test_the_census_sees_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "transformer.wpe.weight"
    say_overwritten(monkeypatch, key)
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "as saved")
    assert line["false_alarms"] == [[key, "overwritten", None]]


def test_the_census_sees_a_wrong_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiedquiet.proof.survey.asks_for_ties", lambda model: True)
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "flag off")
    assert [key for key, *_ in line["cause_wrong"]] == ["lm_head.weight"]


def test_the_census_sees_a_wrong_source(monkeypatch: pytest.MonkeyPatch) -> None:
    wpe = "transformer.wpe.weight"
    monkeypatch.setattr(missing, "_judge_follower", lambda key, *more: Finding(key, Verdict.TIED, wpe))
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "as saved")
    assert [key for key, *_ in line["cause_wrong"]] == ["lm_head.weight"]


def test_the_census_sees_a_culprit_that_did_not_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiedquiet.proof.watch._culprit", lambda: ("by Somebody.else (nowhere.py:1)", "somebody"))
    (line,) = lines_of(transformers.BertForMaskedLM, monkeypatch, VERSION_4)
    assert line["cause_wrong"]


def test_a_tie_is_asked_for_only_where_somebody_can_ask() -> None:
    from transformers import LlamaConfig, LlavaConfig, T5Config

    assert asks(LlamaConfig(tie_word_embeddings=True))
    assert not asks(LlamaConfig(tie_word_embeddings=False))
    assert not asks(T5Config(tie_word_embeddings=False))  # which sets it in any case
    assert asks(T5Config())  # and tells by another that the file has it
    inside = LlavaConfig(text_config=LlamaConfig(tie_word_embeddings=False), tie_word_embeddings=True)
    assert not asks(inside)


# The resume


@pytest.mark.parametrize("write", [resume.by_trainer, resume.in_shards, resume.as_bin])
@pytest.mark.parametrize(
    ("cls", "has_lost"),
    [
        (transformers.GPT2LMHeadModel, False),
        (transformers.MixtralForCausalLM, True),
        (transformers.LlavaForConditionalGeneration, True),
        (transformers.MarianMTModel, False),  # it computes its positions, which are in no file
    ],
)
def test_what_a_resume_loses_is_told_and_repaired(cls: Any, has_lost: bool, write: Any) -> None:
    line = resume.census_of_resume(Saved(cls), write)
    assert {what: line[what] for what in COUNTED if line.get(what)} == {}
    assert bool(line["lost"]) is has_lost
    assert (line["told"], line["left"]) == (line["lost"], 0)
    assert line["tensors"] > line["rows_false"] >= (not has_lost)


def test_the_census_sees_a_trainer_s_door_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "found_in", lambda *_: Checkpoint({}))
    (line,) = lines_of(transformers.MixtralForCausalLM, monkeypatch, "resume")
    assert len(line["missed"]) == line["lost"] == 6
    assert line["told"] == 0
    assert line["strict_wrong"] == ["raised None"]
    assert line["left"] == 6
    assert wrong([line]) == [line]


def test_the_census_sees_a_door_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_judge", lambda *_: None)
    (line,) = lines_of(transformers.LlavaForConditionalGeneration, monkeypatch, "resume")
    assert len(line["missed"]) == line["lost"] == line["tensors"]


def test_the_census_sees_a_repair_that_only_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumed, "copy_in_place", lambda *_: True)
    (line,) = lines_of(transformers.MixtralForCausalLM, monkeypatch, "resume")
    assert line["missed"] == []
    assert len(line["not_repaired"]) == line["left"] == 6


def test_the_census_sees_a_repair_that_leaves_the_optimizer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    read = trainer.read_folder

    def anew(of: Any, *more: Any, **named: Any) -> Any:
        found = read(of, *more, **named)
        of.model.lm_head.weight = torch.nn.Parameter(of.model.lm_head.weight.detach().clone())
        return found

    monkeypatch.setattr(trainer, "read_folder", anew)
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "resume")
    assert line["other_objects"] == ["lm_head.weight"]


def test_the_census_sees_a_false_alarm_of_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    say_overwritten(monkeypatch, "transformer.wpe.weight")
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "resume")
    assert line["false_alarms"] == [["transformer.wpe.weight", "overwritten", None]]
    assert "LoadError" in line["strict_wrong"][0]


def test_the_census_sees_a_wrong_source_of_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    note = resumed.note_unread

    def elsewhere(reading: Any, made: Any, *more: Any) -> None:
        origins = {key: origin._replace(names=("lm_head.weight",)) for key, origin in made.origins.items()}
        note(reading, made._replace(origins=origins), *more)

    monkeypatch.setattr(resumed, "note_unread", elsewhere)
    (line,) = lines_of(transformers.MixtralForCausalLM, monkeypatch, "resume")
    assert len(line["cause_wrong"]) == line["lost"]


def test_the_census_hears_whether_a_true_row_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = trainer._judge

    def hide(model: Any, folder: str, loaded: Any) -> Any:
        outcome = judged(model, folder, loaded)
        outcome.arguments = {"load_result": loaded._replace(missing_keys=[])}
        return outcome

    monkeypatch.setattr(trainer, "_judge", hide)
    (line,) = lines_of(transformers.MixtralForCausalLM, monkeypatch, "resume")
    assert len(line["hidden_wrongly"]) == line["rows_true"] > 0
    assert line["kept_wrongly"] == []


def test_a_class_that_transformers_does_not_resume_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("size mismatch for lm_head.weight")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "load_state_dict", refuse)
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "resume")
    assert line["reason"].startswith("transformers does not resume it: RuntimeError: size mismatch")
    summary = summarise([line])
    assert summary["resumed"]["classes"] == 0
    assert "size mismatch" in "".join(summary["unloaded"])


def test_the_table_has_a_row_for_each_class_that_loses() -> None:
    line = {"class": "X", "way": "resume", "tensors": 9, "lost": 6, "told": 6, "left": 1}
    clean = {**line, "class": "Y", "lost": 0, "told": 0, "left": 0}
    lines = table_of_resumes([clean, line])
    assert "| 2 | 1 | 1 | 0 | 18 | 6 | 6 | 1 |" in lines
    assert lines[-1] == "| X | 6 | 9 | 6 | 1 |"


@pytest.mark.slow
def test_releases_make_one_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.compat.__main__.python_of", lambda release: sys.executable)
    arguments = ["5.0.0", "5.2.0", "--only", "^GPT2LMHeadModel$", "--jobs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["census", *arguments])
    assert main() == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| transformers | classes | loads |")
    assert set(rule) <= set("|-: ")
    assert [row.split(" | ")[:3] for row in rows] == [[f"| {transformers.__version__}", "1", str(len(ALL))]] * 2
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["configuration"]["processor_seconds"] > 0
    assert content["results"]["disagreements"] == []
    assert content["results"]["total"]["loads"] == len(ALL)
    assert "| resume | 1 | 1 |" in path.with_suffix(".md").read_text()
