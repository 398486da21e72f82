"""Files whose names differ in more than one way, or in one that means nothing; and advice that breaks nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertForPreTraining,
    AlbertForSequenceClassification,
    BeitForMaskedImageModeling,
    BeitModel,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    VideoLlavaConfig,
    VideoLlavaModel,
)

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.renamed import (
    BERT,
    SMALL,
    TOWER,
    llava,
    mapping_of,
    stopped_and_repaired,
    verdicts,
    written,
    wrong,
)
from tests.gate.test_compare import mixtral
from tiedquiet import Verdict


def users(model: Any) -> Any:
    """A class of the user's, which transformers gives no renaming, or another one."""
    return type(f"Users{type(model).__name__}", (type(model),), {"__module__": __name__})


def test_what_one_rule_leaves_another_may_fit(tmp_path: Path) -> None:
    """The class's renaming is not applied, and part of the files' names have another prefix."""
    truth = written(llava(), tmp_path, lambda key: key.replace("vision_tower.", "image_encoder."))
    kind = users(llava())
    lost = wrong(loaded := kind.from_pretrained(tmp_path), truth)
    assert {key for key, verdict in verdicts(loaded).items() if verdict is Verdict.UNREAD} == lost != set()
    repaired = stopped_and_repaired(kind, tmp_path)
    assert not wrong(repaired, truth)
    assert tiedquiet.check(repaired).ok


@pytest.mark.parametrize("prefix", ["module.", "transformer."])
@pytest.mark.parametrize("build", [llava, mixtral, lambda: mixtral().model])
def test_a_prefix_before_names_that_are_renamed_for_another_class(build: Any, prefix: str, tmp_path: Path) -> None:
    truth = written(build(), tmp_path, lambda key: prefix + key)
    repaired = stopped_and_repaired(users(build()), tmp_path)
    assert not wrong(repaired, truth)
    assert tiedquiet.check(repaired).ok


def test_several_parts_one_of_which_has_an_end_of_a_tie(tmp_path: Path) -> None:
    """No end of it was read, so none is needed; and the part that it lies in is whole with it alone."""
    model = BertForMaskedLM(BertConfig(**BERT))
    truth = written(model, tmp_path, lambda key: key.replace("bert.embeddings", "emb").replace("bert.encoder", "enc"))
    repaired = stopped_and_repaired(type(model), tmp_path)
    assert not wrong(repaired, truth)
    assert tiedquiet.check(repaired).ok


def test_advice_leaves_alone_what_was_read(tmp_path: Path, printed: Printed) -> None:
    """`language_model.` is the prefix of the head, and of all of the language model, which was read as it is."""
    truth, kind = written(llava(), tmp_path), users(llava())
    lost = wrong(kind.from_pretrained(tmp_path), truth)
    for line in (line for line in printed.loud if "key_mapping=" in line):
        assert not wrong(kind.from_pretrained(tmp_path, key_mapping=mapping_of(line)), truth)
    assert len(printed.loud) == bool(lost), "5.0 to 5.3 give a subclass the mapping of its class"


def test_advice_about_a_prefix_that_has_to_be_added(tmp_path: Path, printed: Printed) -> None:
    """The base model was read, under names that transformers renames."""
    sizes: dict[str, Any] = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=8))
    truth = written(model, tmp_path, lambda key: key.removeprefix("decode_head."))
    type(model).from_pretrained(tmp_path)
    (line,) = printed.loud
    assert not wrong(type(model).from_pretrained(tmp_path, key_mapping=mapping_of(line)), truth)
    assert not wrong(stopped_and_repaired(type(model), tmp_path), truth)


def test_advice_keeps_the_key_mapping_that_was_given(tmp_path: Path, printed: Printed) -> None:
    """The one that is advised takes its place."""
    model = BertModel(BertConfig(**BERT))
    truth = written(model, tmp_path, lambda key: re.sub("^encoder", "layers", re.sub("^embeddings", "words", key)))
    BertModel.from_pretrained(tmp_path, key_mapping={"^layers": "encoder"})
    (line,) = printed.loud
    assert not wrong(BertModel.from_pretrained(tmp_path, key_mapping=mapping_of(line)), truth)


def test_a_file_that_fits_two_halves_of_a_model_is_read_into_neither(tmp_path: Path, printed: Printed) -> None:
    """Names of one tower, which its class has under no prefix, and two towers that they fit."""
    tower = CLIPVisionConfig(**TOWER, image_size=16, patch_size=8)
    model = VideoLlavaModel(VideoLlavaConfig(vision_config=tower, text_config=LlamaConfig(**SMALL)))
    written(model.video_tower, tmp_path, lambda key: key.removeprefix("vision_model."))
    model.config.save_pretrained(tmp_path)
    with tiedquiet.enable("repair"):
        model = VideoLlavaModel.from_pretrained(tmp_path)
    assert verdicts(model) == dict.fromkeys(model.state_dict(), Verdict.MISSING)
    assert not printed.confirmed


@pytest.mark.parametrize(
    ("saved", "kind", "lacks"),
    [
        (AlbertForSequenceClassification, AlbertForPreTraining, "sop_classifier.classifier.weight"),
        (BeitModel, BeitForMaskedImageModeling, "layernorm.weight"),
    ],
)
def test_one_module_of_another_class_is_no_other_name(saved: Any, kind: Any, lacks: str, tmp_path: Path) -> None:
    """`classifier` has two rows as well, and the pooler has a norm of the same size; all else was read by its name."""
    size = {**BERT, "embedding_size": 16, "image_size": 8, "patch_size": 4}
    written(saved(saved.config_class(**size)), tmp_path)
    for mode in ("on", "repair"):
        with tiedquiet.enable(mode):
            assert verdicts(kind.from_pretrained(tmp_path))[lacks] is Verdict.MISSING


@pytest.mark.parametrize("kind", [BertModel, BertForTokenClassification])
def test_the_head_of_another_class_is_not_read_into_the_base_model(kind: Any, tmp_path: Path) -> None:
    """It has a layer and a norm of the very shapes that the base model lacks, and nothing else."""
    lacking = "encoder.layer.0.attention.output."
    truth = written(BertForMaskedLM(BertConfig(**BERT)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if lacking not in key}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    how = {"add_pooling_layer": False} if kind is BertModel else {}  # the file has none
    with tiedquiet.enable("repair"):
        model = kind.from_pretrained(tmp_path, **how)
    found = {key: verdict for key, verdict in verdicts(model).items() if lacking in key}
    assert len(found) == 4
    assert set(found.values()) == {Verdict.MISSING}
    head = truth["cls.predictions.transform.dense.weight"]
    (ours,) = (value for key, value in model.state_dict().items() if key.endswith(f"{lacking}dense.weight"))
    assert ours.shape == head.shape
    assert not torch.equal(ours, head)


def test_a_part_of_the_base_model_is_not_taken_for_the_head_of_another_class(tmp_path: Path) -> None:
    model = BertForMaskedLM(BertConfig(**{**BERT, "num_hidden_layers": 2}))
    truth = written(model, tmp_path, lambda key: key.replace("bert.encoder.layer.1.", "trunk.layer.1."))
    lost = {key for key in truth if "layer.1." in key}
    found = verdicts(BertForTokenClassification.from_pretrained(tmp_path))
    assert {key for key, verdict in found.items() if verdict is Verdict.UNREAD} == lost
    repaired = stopped_and_repaired(BertForTokenClassification, tmp_path)
    assert all(torch.equal(repaired.state_dict()[key], truth[key]) for key in lost)
