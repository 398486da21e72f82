"""What a line says to do, done to the letter: it cures, and what cannot cure is not said."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    GPT2LMHeadModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    LlamaForCausalLM,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2
from tests.doors.renamed import BERT, mapping_of, written, wrong
from tests.doors.training import llama, trainer_of
from tests.idioms.tiny import IdiomConfig, Tiny
from tiedquiet import LoadError, Verdict

FILE = "model.safetensors"
STORE_ONE = "Find out which one the model was trained with, and store only that one"
ON_DISK = {"transformer.wpe": "disk", "transformer.wte": "cpu", "transformer.drop": "cpu", "transformer.h": "cpu"}
ON_DISK |= {"transformer.ln_f": "cpu", "lm_head": "cpu"}


def stored(folder: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, folder / FILE, {"format": "pt"})


def untie(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))


def test_a_head_that_was_trained_by_itself(tmp_path: Path, printed: Printed) -> None:
    """LoRA of a head, merged: the config still ties it. To store one of the two would throw away what was learnt."""
    one = written(GPT2LMHeadModel(gpt2()), tmp_path)
    del one["lm_head.weight"]
    both = {**one, "lm_head.weight": one["transformer.wte.weight"] + 1}
    stored(tmp_path, both)
    assert not wrong(GPT2LMHeadModel.from_pretrained(tmp_path), both)
    (line,) = printed.loud
    said = "ambiguous, lm_head.weight is not transformer.wte.weight: the config ties them, but the checkpoint has both"
    cure = f"{STORE_ONE}; or, if with both, set tie_word_embeddings to false throughout config.json"
    assert said in line
    assert line.endswith(f", and they differ. {cure}")
    with tiedquiet.enable("strict"):
        with pytest.raises(LoadError, match=cure):
            GPT2LMHeadModel.from_pretrained(tmp_path)
        stored(tmp_path, one)
        model = GPT2LMHeadModel.from_pretrained(tmp_path)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert not wrong(model, one)
        stored(tmp_path, both)
        untie(tmp_path)
        assert not wrong(GPT2LMHeadModel.from_pretrained(tmp_path), both)


def test_a_flag_that_ties_more_than_the_head_is_left_alone(tmp_path: Path, printed: Printed) -> None:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 8}
    model = BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **heads))
    written(model, tmp_path)
    tensors = load_file(tmp_path / FILE)
    stored(tmp_path, {**tensors, "lm_head.weight": tensors["model.shared.weight"] + 1})
    BartForConditionalGeneration.from_pretrained(tmp_path)
    assert any(line.endswith(STORE_ONE) for line in printed.loud), "the inputs would part as well"


def test_all_that_the_files_have_twice_is_one_line(tmp_path: Path, printed: Printed) -> None:
    tensors = {
        key: value for key, value in written(BertModel(BertConfig(**BERT)), tmp_path).items() if "ids" not in key
    }
    stored(tmp_path, {**tensors, **{f"bert.{key}": value + 1 for key, value in tensors.items()}})
    model = BertModel.from_pretrained(tmp_path)
    (line,) = printed.loud
    assert sum(f.verdict is Verdict.AMBIGUOUS for f in tiedquiet.check(model).findings) == len(tensors)
    key = min(tensors)
    read, left = f"bert.{key}", key
    if not torch.equal(model.state_dict()[key], tensors[key] + 1):
        read, left = left, read
    assert f"{key} has the values of {read}, not of {left}" in line
    assert f"{len(tensors) - 1} more" in line
    assert line.endswith(f": the file has both. {STORE_ONE}")


def test_what_repair_does_not_do_is_not_advised(tmp_path: Path, printed: Printed) -> None:
    """Nothing more is read into a model that is partly on disk."""
    truth = written(GPT2LMHeadModel(gpt2()), tmp_path / "model", lambda key: f"net.{key}")
    how: dict[str, Any] = {"device_map": ON_DISK, "offload_folder": tmp_path / "disk"}
    GPT2LMHeadModel.from_pretrained(tmp_path / "model", **how)
    (line,) = printed.loud
    assert "TIEDQUIET" not in line
    assert " no prefix. Pass key_mapping=" in line
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model", **how, key_mapping=mapping_of(line))
    assert tiedquiet.check(model).ok
    assert not wrong(model, {key: value for key, value in truth.items() if "wpe" not in key})


def test_where_repair_reads_nothing_and_no_mapping_helps(tmp_path: Path, printed: Printed) -> None:
    """Layers that are wrapped one by one: their names have a part in the middle, which no `key_mapping` takes out."""
    part = "_checkpoint_wrapped_module."
    truth = written(
        GPT2LMHeadModel(gpt2(n_layer=2)), tmp_path / "model", lambda key: re.sub(r"(\.h\.\d\.)", rf"\1{part}", key)
    )
    how: dict[str, Any] = {"device_map": ON_DISK, "offload_folder": tmp_path / "disk"}
    GPT2LMHeadModel.from_pretrained(tmp_path / "model", **how)
    (line,) = printed.loud
    assert line.endswith(". Rename them in the file")
    tensors = load_file(tmp_path / "model" / FILE)
    stored(tmp_path / "model", {key.replace(part, ""): value for key, value in tensors.items()})
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model", **how)
    assert tiedquiet.check(model).ok
    assert not wrong(model, {key: value for key, value in truth.items() if "wpe" not in key})


def test_a_part_of_a_composite_is_named(tmp_path: Path, printed: Printed) -> None:
    """A `key_mapping` given to the composite, or to a pipeline, is not for its parts: the line says whose it is."""
    truth = written(BertModel(BertConfig(**BERT)), tmp_path / "encoder", lambda key: f"net.{key}")
    config = BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    written(BertLMHeadModel(config), tmp_path / "decoder")

    def load(**how: Any) -> Any:
        folders = (tmp_path / "encoder", tmp_path / "decoder")
        return EncoderDecoderModel.from_encoder_decoder_pretrained(*map(str, folders), **how).encoder

    load()
    (line,) = printed.loud
    assert " to BertModel.from_pretrained, and " in line
    assert not wrong(load(encoder_key_mapping=mapping_of(line)), truth)


def test_what_is_not_alike_is_tied_by_transformers_alone(tmp_path: Path, printed: Printed) -> None:
    """ImageGPT's head has a row less than its embedding."""
    config = ImageGPTConfig(vocab_size=65, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=True)
    written(ImageGPTForCausalImageModeling(config), tmp_path)
    untie(tmp_path)
    ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    (line,) = printed.loud
    assert ". If it should be one tensor, correct config.json; ignore" in line


class KeepsAList(Tiny):
    def add(self, config: Any) -> None:
        self.tables = [torch.arange(8.0)]


def test_a_list_of_tensors_is_not_filled(tmp_path: Path, printed: Printed) -> None:
    written(KeepsAList(IdiomConfig()), tmp_path)
    cures = []
    for mode in ("on", "repair"):
        with tiedquiet.enable(mode):
            KeepsAList.from_pretrained(tmp_path)
        (line,) = printed.loud
        cures.append(line.rpartition(". ")[2])
        printed.records.clear()
    assert cures == ["Register them as buffers and compute them in _init_weights too"] * 2


def test_a_trainer_s_checkpoint_with_another_name(tmp_path: Path, printed: Printed) -> None:
    """A `key_mapping` given where the base model is loaded changes nothing about what the Trainer reads."""
    llama().save_pretrained(tmp_path / "base")
    truth = written(llama(), tmp_path / "run", lambda key: key.replace("model.norm.", "model.last."))

    def resume(base: str = "base", **how: Any) -> Any:
        model = LlamaForCausalLM.from_pretrained(tmp_path / base, **how)
        printed.records.clear()
        trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path / "run"))
        return model

    assert wrong(resume(), truth) == {"model.norm.weight"}
    (line,) = printed.loud
    assert "model.norm.weight may be model.last.weight, which nothing read. If so, rename it in the file, or" in line
    assert line.endswith("load this checkpoint by from_pretrained with a key_mapping for it")
    assert not wrong(resume("run", key_mapping={r"^model\.last\.": "model.norm."}), truth)
    assert not printed.loud
    tensors = load_file(tmp_path / "run" / FILE)
    stored(tmp_path / "run", {key.replace("last", "norm"): value for key, value in tensors.items()})
    assert not wrong(resume(), truth)
    assert not printed.loud
