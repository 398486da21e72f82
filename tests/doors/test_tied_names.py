"""A tied weight that the files have under the name of its other end alone, which the model that is loaded lacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartModel,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.renamed import TOWER, mapping_of, qwen2, stopped_and_repaired, verdicts, written
from tiedquiet import Verdict

EMBEDDING = "model.decoder.embed_tokens.weight"


@pytest.mark.parametrize("cls", [Qwen2Model, Qwen2ForSequenceClassification])
@pytest.mark.parametrize("flag", [True, False])
def test_the_end_that_another_class_ties_and_stores(cls: Any, flag: bool, tmp_path: Path, printed: Printed) -> None:
    """`save_model` of safetensors keeps the first of two names: `lm_head.weight`, which a model with no head ignores."""
    truth = written(qwen2(tie_word_embeddings=flag), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert tiedquiet.check(Qwen2ForCausalLM.from_pretrained(tmp_path)).ok == flag
    printed.records.clear()
    (key,) = (name for name, tensor in cls.from_pretrained(tmp_path).named_parameters() if tensor.shape == (64, 32))
    found = verdicts(cls.from_pretrained(tmp_path))
    if not flag:  # then the file has nothing for it
        assert found[key] is Verdict.MISSING
        return
    assert found[key] is Verdict.UNREAD
    assert (
        f"{key} is lm_head.weight there, because Qwen2ForCausalLM, which saved the checkpoint, ties" in printed.loud[0]
    )
    models = cls.from_pretrained(tmp_path, key_mapping=mapping_of(printed.loud[0])), stopped_and_repaired(cls, tmp_path)
    for model in models:
        assert torch.equal(model.get_parameter(key), truth["model.embed_tokens.weight"])
        assert key not in verdicts(model)


def bart() -> BartConfig:
    halves = {
        f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    return BartConfig(vocab_size=64, d_model=16, max_position_embeddings=8, **halves)


@pytest.mark.parametrize("saved", [BartForConditionalGeneration, BartModel])
def test_the_end_that_the_base_model_of_another_class_ties_and_stores(
    saved: Any, tmp_path: Path, printed: Printed
) -> None:
    """A decoder by itself has no `shared`; `encoder-decoder` models are built of such."""
    stored = next(v for key, v in written(saved(bart()), tmp_path).items() if key.endswith("shared.weight"))
    model = BartForCausalLM.from_pretrained(tmp_path)
    assert verdicts(model) == {EMBEDDING: Verdict.UNREAD, "lm_head.weight": Verdict.MISSING}
    (line,) = printed.loud
    assert f"because {saved.__name__}, which saved the checkpoint, ties the two and stores one of them" in line
    mapped = BartForCausalLM.from_pretrained(tmp_path, key_mapping=mapping_of(line))
    for model in (mapped, stopped_and_repaired(BartForCausalLM, tmp_path)):
        assert verdicts(model) == {"lm_head.weight": Verdict.TIED}
        assert torch.equal(model.get_parameter(EMBEDDING), stored)


def test_a_decoder_of_another_model_s_file_in_a_composite(tmp_path: Path) -> None:
    size = {**TOWER, "hidden_size": 16, "image_size": 8, "patch_size": 4}
    written(ViTModel(ViTConfig(**size)), tmp_path / "encoder")
    truth = written(BartForConditionalGeneration(bart()), tmp_path / "decoder")
    with tiedquiet.enable("repair"):
        model = VisionEncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    assert torch.equal(model.get_parameter(f"decoder.{EMBEDDING}"), truth["model.shared.weight"])
    assert tiedquiet.check(model).ok


def test_an_end_that_is_there_is_not_looked_for(tmp_path: Path) -> None:
    """Older releases stored each end."""
    written(BartForConditionalGeneration(bart()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {EMBEDDING: tensors["model.shared.weight"] + 1}
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("strict"):
        model = BartForCausalLM.from_pretrained(tmp_path)
    assert verdicts(model) == {"lm_head.weight": Verdict.TIED}
    assert torch.equal(model.get_parameter("lm_head.weight"), more[EMBEDDING])
