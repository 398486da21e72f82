"""The census of every class (`--all`): classes without a tie, and what it found in them."""

import pytest

from benchmarks import tiny_models
from benchmarks.census import loads
from benchmarks.census.ways import WAYS
from tests.test_census import VERSION_4, wrong
from tiedquiet.proof import unread


def test_a_class_without_a_tie_counts_where_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loads, "WAYS", {"as saved": WAYS["as saved"], "under a target's name": WAYS["under a target's name"]}
    )
    module = "transformers.models.vit.modeling_vit"
    assert module not in tiny_models.modules_with_ties("^ViTModel$")
    assert module in tiny_models.modules_with_ties("^ViTModel$", among="")
    assert loads.census_of_module(module, "^ViTModel$", set()) == []
    saved, no_tie, resumed = loads.census_of_module(module, "^ViTModel$", set(), every=True)
    assert saved["tensors"] > 0
    assert no_tie["reason"] == "does not apply"
    assert resumed["told"] == resumed["lost"]
    assert not wrong([saved, resumed])


@pytest.mark.slow
def test_two_tensors_that_transformers_mixes_up_are_unread_and_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    pixio = pytest.importorskip("transformers.models.pixio.modeling_pixio")
    both = "as saved", "bfloat16 into float32", "resume"
    monkeypatch.setattr(loads, "WAYS", {way: WAYS[way] for way in both if way != "resume"})
    lines = list(loads.census_of_class(pixio.PixioBackbone, needs_ties=False))
    assert [line["way"] for line in lines] == list(both)
    for line in lines:
        assert line["verdicts"]["unread"] >= 2
    assert not wrong(lines)
    monkeypatch.setattr(unread.crossing, "crossed", lambda *_: {})
    for line in loads.census_of_class(pixio.PixioBackbone, needs_ties=False):
        assert line["missed"]


@pytest.mark.slow
def test_a_row_of_the_padding_that_another_token_has_is_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

    monkeypatch.setattr(loads, "WAYS", {way: WAYS[way] for way in ("as saved", VERSION_4)})
    lines = list(loads.census_of_class(ChineseCLIPTextModel, needs_ties=False))
    assert not wrong(lines)
    assert [line["way"] for line in lines if "overwritten" in line["verdicts"]] == ["as saved", VERSION_4]
