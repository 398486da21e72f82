"""The census (benchmarks/census.py): a sample that shows every form of declaration, and that it sees what is wrong."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiedquiet.load import Load

from benchmarks import census, tiny_models
from tiedquiet import Finding, Verdict

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
""".split()  # noqa: SIM905


ALL = {way for way in census.WAYS if way != "flag off at the top only"}  # which is for composites


def wrong(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if any(line.get(what) for what in census.COUNTED)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore")  # what building odd configurations warns of is not what is tested
def test_no_true_row_is_hidden_and_no_verdict_is_wrong(name: str) -> None:
    cls: Any = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    tried = [line for line in census.census_of_class(cls) if "reason" not in line]
    assert len(tried) >= 8
    assert wrong(tried) == []


@pytest.fixture(scope="module")
def gpt2() -> dict[str, dict[str, Any]]:
    return {line["way"]: line for line in census.census_of_class(transformers.GPT2LMHeadModel)}


def test_every_way_is_tried_and_finds_what_it_is_for(gpt2: dict[str, dict[str, Any]]) -> None:
    assert {way for way, line in gpt2.items() if "reason" not in line} == ALL
    assert wrong(list(gpt2.values())) == []
    assert {way: line["verdicts"] for way, line in gpt2.items() if way in ALL} == {
        **{way: {"tied": 1} for way in ALL},
        "flag off": {"untied": 1},
        "under a target's name, flag off": {"untied": 1},
        "two ends that differ": {},
        "no end of a tie": {"absent": 2},
        "another vocabulary": {"absent": 2},
        "a user's subclass of version 4, no biases": {"tied": 1, "unwritten": 1},
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
    saved = census.Saved(transformers.GPT2LMHeadModel)
    ways = census.WAYS
    file = ways["bfloat16 into float32"].tensors(saved)
    assert file is not None
    assert {value.dtype for value in file.values()} == {torch.bfloat16}
    assert ways["bfloat16 into float32"].load(saved, tmp_path) == {"dtype": torch.float32}
    assert ways["float32 into bfloat16"].load(saved, tmp_path) == {"dtype": torch.bfloat16}
    options = ways["partly on disk"].load(saved, tmp_path)
    assert options is not None
    assert {key for key, place in options["device_map"].items() if place == "disk"} == {"transformer.wte", "lm_head"}
    config = {"vocab_size": 128, "text_config": {"vocab_size": 64, "type_vocab_size": 2}}
    ways["another vocabulary"].change(config)
    assert config == {"vocab_size": 136, "text_config": {"vocab_size": 72, "type_vocab_size": 2}}
    assert ways["another vocabulary"].load(saved, tmp_path) == {"ignore_mismatched_sizes": True}
    users = ways["a user's subclass, shards"].cls(saved.cls)
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
    monkeypatch.setattr(census, "WAYS", {way: census.WAYS[way] for way in ways})
    return list(census.census_of_class(cls))


VERSION_4 = "a user's subclass of version 4, no biases"


def test_the_census_sees_a_shim_that_confirms_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def confirm(self: Load, model: Any, key: str, *_: Any) -> Finding:
        return Finding(key, Verdict.TIED, key)

    monkeypatch.setattr(Load, "_judge_parted", confirm)
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "flag off")
    assert line["hidden_wrongly"] == ["lm_head.weight"]
    assert line["missed"] == [["lm_head.weight", "tied", "untied"]]


@pytest.mark.parametrize(("judge", "verdict"), [("_judge_stored", "overwritten"), ("_judge_placeholders", "unwritten")])
def test_the_census_sees_a_shim_that_misses_a_loss(judge: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (right,) = lines_of(transformers.BertForMaskedLM, monkeypatch, VERSION_4)
    assert right["missed"] == []
    monkeypatch.setattr(Load, judge, lambda *_: {})
    (line,) = lines_of(transformers.BertForMaskedLM, monkeypatch, VERSION_4)
    assert {true for _, _, true in line["missed"]} == {verdict}


def test_the_census_sees_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "transformer.wpe.weight"
    monkeypatch.setattr(Load, "_judge_stored", lambda *_: {key: Finding(key, Verdict.OVERWRITTEN, key)})
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "as saved")
    assert line["false_alarms"] == [[key, "overwritten", None]]


def test_the_census_sees_a_wrong_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiedquiet.load.asks_for_ties", lambda model: True)
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "flag off")
    assert [key for key, *_ in line["cause_wrong"]] == ["lm_head.weight"]


def test_the_census_sees_a_wrong_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def confirm(self: Load, key: str, *_: Any) -> Finding:
        return Finding(key, Verdict.TIED, "transformer.wpe.weight")

    monkeypatch.setattr(Load, "_judge_follower", confirm)
    (line,) = lines_of(transformers.GPT2LMHeadModel, monkeypatch, "as saved")
    assert [key for key, *_ in line["cause_wrong"]] == ["lm_head.weight"]


def test_the_census_sees_a_culprit_that_did_not_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiedquiet.watch._culprit", lambda: "by Somebody.else (nowhere.py:1)")
    (line,) = lines_of(transformers.BertForMaskedLM, monkeypatch, VERSION_4)
    assert line["cause_wrong"]


@pytest.mark.slow
def test_releases_make_one_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.compat.__main__.python_of", lambda release: sys.executable)
    arguments = ["5.0.0", "5.2.0", "--only", "^GPT2LMHeadModel$", "--jobs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["census.py", *arguments])
    assert census.main() == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| transformers | classes | loads |")
    assert set(rule) <= set("|-: ")
    assert [row.split(" | ")[:3] for row in rows] == [[f"| {transformers.__version__}", "1", str(len(ALL))]] * 2
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["configuration"]["processor_seconds"] > 0
    assert content["results"]["disagreements"] == []
    assert content["results"]["total"]["loads"] == len(ALL)
    assert path.with_suffix(".md").exists()
