"""Parts of a loaded model that a program moves, or puts in from another load, which proves what it read."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

import tiedquiet
from tests.doors.renamed import BERT, verdicts, written
from tests.doors.test_copies import rewritten
from tiedquiet import Proof, Verdict

HEAD = "cls.predictions.decoder.weight"
NORM = "bert.embeddings.LayerNorm.weight"


@pytest.fixture
def whole(tmp_path: Path) -> Any:
    written(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "whole")
    return BertForMaskedLM.from_pretrained(tmp_path / "whole")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another base model's folder, with other values."""
    written(BertModel(BertConfig(**BERT)), tmp_path / "other")
    return tmp_path / "other"


def changes(proof: Proof) -> dict[str, tuple[Verdict, str]]:
    return {f.key: (f.verdict, f.why) for f in proof.findings if f.since}


@pytest.mark.filterwarnings("ignore:`torch.jit")  # what torch.compile imports
def test_a_part_that_was_loaded_by_itself_is_proven_by_its_own_load(whole: Any, other: Path) -> None:
    before = tiedquiet.check(whole)
    whole.bert = BertModel.from_pretrained(other, add_pooling_layer=False)
    proof = tiedquiet.check(whole)
    assert changes(proof) == {HEAD: (Verdict.UNTIED, "it was tied when it was loaded, and is not any more")}
    assert "the load was sound, with 1 change since\n" in str(proof)
    whole.tie_weights()
    assert tiedquiet.check(whole) == before, "as many tensors, and the same ties"
    assert tiedquiet.check(whole.half()).ok
    dense = whole.bert.encoder.layer[0].output
    dense.dense = torch.nn.Sequential(dense.dense)
    assert tiedquiet.check(whole).ok, "a layer around one that was read there"
    part, whole.bert = whole.bert, torch.compile(whole.bert)
    assert tiedquiet.check(whole) == tiedquiet.check(copy.deepcopy(whole))
    assert (tiedquiet.check(whole).ok, tiedquiet.check(whole).total) == (True, before.total)
    whole.bert = part
    whole.bert.embeddings.LayerNorm.weight = torch.nn.Parameter(torch.ones(16))
    replaced = (Verdict.UNPROVEN, "it was read, and has since been replaced by another tensor")
    assert changes(tiedquiet.check(whole)) == {NORM: replaced}


def test_what_the_part_s_own_load_did_not_read_is_not_proven_by_it(whole: Any, other: Path) -> None:
    rewritten(other, lambda tensors: {n: v for n, v in tensors.items() if n != NORM.removeprefix("bert.")})
    whole.bert = BertModel.from_pretrained(other, add_pooling_layer=False)
    assert changes(tiedquiet.check(whole)).keys() == {HEAD, NORM}


@pytest.mark.parametrize("has_pooler", [True, False])
def test_what_the_part_has_besides_is_counted_too(has_pooler: bool, whole: Any, other: Path) -> None:
    if not has_pooler:
        rewritten(other, lambda tensors: {n: v for n, v in tensors.items() if "pooler" not in n})
    before = tiedquiet.check(whole)
    whole.bert = BertModel.from_pretrained(other)
    whole.tie_weights()
    proof, pooler = tiedquiet.check(whole), {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert {key for key, verdict in verdicts(whole).items() if verdict is Verdict.MISSING} == pooler - {
        key for key in pooler if has_pooler
    }
    assert (proof.stored, proof.total) == (before.stored + 2 * has_pooler, before.total + 2)


def test_a_part_with_new_values_is_no_part_that_was_loaded(whole: Any) -> None:
    whole.bert = BertModel(BertConfig(**BERT), add_pooling_layer=False)
    assert changes(tiedquiet.check(whole)).keys() == {HEAD, *(key for key in whole.state_dict() if "bert." in key)}


def test_layers_that_changed_places_are_no_layers_with_another_around(whole: Any) -> None:
    attention = whole.bert.encoder.layer[0].attention.self
    attention.query, attention.key = torch.nn.Sequential(attention.key), torch.nn.Sequential(attention.query)
    moved = (Verdict.UNPROVEN, "it was read, and has since been moved to another place in the model")
    at = "bert.encoder.layer.0.attention.self"
    assert changes(tiedquiet.check(whole)) == {
        f"{at}.{name}.{leaf}": moved for name in ("query", "key") for leaf in ("weight", "bias")
    }


def test_an_embedding_that_was_taken_out_is_left_in_the_head_that_is_tied_to_it(whole: Any) -> None:
    del whole.bert.embeddings.word_embeddings
    assert tiedquiet.check(whole).ok


def test_a_new_head_in_the_place_of_one_that_was_tied(whole: Any) -> None:
    old = whole.cls.predictions.decoder
    whole.cls.predictions.decoder = torch.nn.Sequential(torch.nn.Linear(16, 64, bias=False))
    put_in = (Verdict.MISSING, "it was put in since, and no load of it was seen")
    assert changes(tiedquiet.check(whole)) == {"cls.predictions.decoder.0.weight": put_in}
    whole.cls.predictions.decoder = torch.nn.Sequential(old, torch.nn.LayerNorm(64))
    assert tiedquiet.check(whole).ok, "what a wrapper adds to a layer that was read does not count"
