"""The files that a Trainer resumes from: shards, pickles, an index that lies, names of another class."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2
from tests.doors.renamed import verdicts, wav2vec2, with_old_weight_norm, written
from tests.doors.test_trainer_overrides import SaysNothing
from tests.doors.training import differing, llama, llava, mixtral, resumed, right, state, trainer_of
from tiedquiet import LoadError, Verdict


def split(checkpoint: Path, to: Path, kind: str, prefix: str = "") -> Path:
    """The same checkpoint in two shards, or as pickles."""
    to.mkdir()
    tensors = {prefix + key: value for key, value in load_file(checkpoint / "model.safetensors").items()}
    (to / "config.json").write_text((checkpoint / "config.json").read_text())
    if kind == "whole.bin":
        torch.save(tensors, to / "pytorch_model.bin")
        return to
    end = kind.rpartition(".")[2]
    stem = "model" if end == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{number}-of-00002.{end}" for number in (1, 2)]
    keys = sorted(tensors)
    for name, some in zip(names, (keys[::2], keys[1::2]), strict=True):
        part = {key: tensors[key].clone() for key in some}
        if end == "safetensors":
            save_file(part, to / name, {"format": "pt"})
        else:
            torch.save(part, to / name)
    index = {"metadata": {}, "weight_map": {key: names[i % 2] for i, key in enumerate(keys)}}
    (to / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return to


@pytest.mark.parametrize("kind", ["shards.safetensors", "shards.bin", "whole.bin"])
def test_shards_and_pickles(kind: str, runs: Any, tmp_path: Path) -> None:
    folder = runs(mixtral)
    checkpoint = split(folder / "checkpoint-2", tmp_path / "checkpoint-2", kind)
    assert tiedquiet.check(resumed(mixtral, folder, checkpoint)).unread == 6
    with tiedquiet.enable("repair"):
        model = resumed(mixtral, folder, checkpoint)
    assert differing(model, right(mixtral, folder / "checkpoint-2")) == set()
    assert tiedquiet.check(model).ok


def test_an_older_file_beside_a_newer_pickle(runs: Any, tmp_path: Path, printed: Printed) -> None:
    folder = runs(llama)
    checkpoint = shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    tensors = load_file(checkpoint / "model.safetensors")
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    os.utime(checkpoint / "model.safetensors", (0, 0))
    printed.records.clear()
    assert tiedquiet.check(resumed(llama, folder, checkpoint)).ok, "the two hold the same"
    assert not printed.loud
    torch.save({key: value + 1 for key, value in tensors.items()}, checkpoint / "pytorch_model.bin")
    proof = tiedquiet.check(resumed(llama, folder, checkpoint))
    assert [(f.key, f.verdict) for f in proof.findings if f.verdict is not Verdict.TIED] == [("", Verdict.AMBIGUOUS)]
    assert any("pytorch_model.bin beside it is newer and was not" in line for line in printed.loud)


def test_an_index_that_promises_what_no_shard_has(runs: Any, tmp_path: Path, printed: Printed) -> None:
    folder = runs(llama)
    checkpoint = split(folder / "checkpoint-2", tmp_path / "checkpoint-2", "shards.safetensors")
    shard = checkpoint / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    gone = next(key for key in sorted(tensors) if "mlp" in key)
    save_file({key: value for key, value in tensors.items() if key != gone}, shard, {"format": "pt"})
    printed.records.clear()
    proof = tiedquiet.check(resumed(llama, folder, checkpoint))
    assert [(f.key, f.verdict) for f in proof.findings if f.key != "lm_head.weight"] == [(gone, Verdict.MISSING)]
    assert not proof.ok


@pytest.mark.parametrize("kind", ["shards.safetensors", "shards.bin"])
def test_an_index_that_lacks_what_a_shard_has(kind: str, runs: Any, tmp_path: Path, printed: Printed) -> None:
    """It is read along with the shard, although Trainer calls it missing."""
    folder = runs(llama)
    checkpoint = split(folder / "checkpoint-2", tmp_path / "checkpoint-2", kind)
    (path,) = checkpoint.glob("*.index.json")
    index = json.loads(path.read_text())
    lacking = next(key for key in sorted(index["weight_map"]) if "mlp" in key)
    del index["weight_map"][lacking]
    path.write_text(json.dumps(index))
    printed.records.clear()
    with tiedquiet.enable("strict"):
        model = resumed(llama, folder, checkpoint)
    assert differing(model, right(llama, folder / "checkpoint-2")) == set()
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.missing) == (True, 0)
    assert not printed.of("transformers.trainer")
    assert any("already holds what the checkpoint stores" in line and lacking in line for line in printed.confirmed)


class Drops(LlamaForCausalLM):
    """Reads all but its norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        drop = lambda module, tensors, prefix, *_: tensors.pop(f"{prefix}weight")  # noqa: E731
        self.model.norm.register_load_state_dict_pre_hook(drop)


def test_what_the_file_has_and_the_model_s_own_code_leaves_out(runs: Any, printed: Printed) -> None:
    folder = runs(llama)
    model = Drops.from_pretrained(folder / "base")
    printed.records.clear()
    trainer_of(model, folder)._load_from_checkpoint(str(folder / "checkpoint-2"))
    found = {f.key: f.verdict for f in tiedquiet.check(model).findings if f.verdict is not Verdict.TIED}
    assert found == {"model.norm.weight": Verdict.MISSING}
    assert "model.norm.weight" in printed.of("transformers.trainer")[0]
    assert not any("model.norm.weight" in line for line in printed.confirmed)


def test_one_name_in_two_shards(runs: Any, tmp_path: Path, printed: Printed) -> None:
    folder = runs(llama)
    checkpoint = split(folder / "checkpoint-2", tmp_path / "checkpoint-2", "shards.safetensors")
    first, second = sorted(checkpoint.glob("*.safetensors"))
    key, other = next(iter(load_file(first))), load_file(second)
    save_file({**other, key: load_file(first)[key] + 1}, second, {"format": "pt"})
    printed.records.clear()
    proof = tiedquiet.check(resumed(llama, folder, checkpoint))
    assert {f.key: f.verdict for f in proof.findings}[key] is Verdict.AMBIGUOUS
    told = f"different values: {key}: {second.name}, which was read last, has other values than {first.name}"
    assert told in printed.loud[-1]
    assert not proof.ok


@pytest.mark.parametrize(("old", "new"), [("", "module."), ("", "_orig_mod."), ("model.", "transformer.model.")])
def test_another_prefix(old: str, new: str, runs: Any, tmp_path: Path, printed: Printed) -> None:
    """As a training script writes it that forgets to unwrap its model."""
    folder = runs(llama)
    tensors = load_file(folder / "checkpoint-2" / "model.safetensors")
    renamed = {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in tensors.items()}
    (tmp_path / "c").mkdir()
    save_file(renamed, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    printed.records.clear()
    proof = tiedquiet.check(resumed(llama, folder, tmp_path / "c"))
    assert proof.unread == len(renamed.keys() - tensors.keys())
    assert "key_mapping" not in printed.loud[0], "a Trainer takes none"
    with tiedquiet.enable("repair"):
        model = resumed(llama, folder, tmp_path / "c")
    assert differing(model, right(llama, folder / "checkpoint-2")) == set()
    assert tiedquiet.check(model).ok
    with tiedquiet.enable("strict"):  # what it holds already, nothing has to read
        trainer_of(model, folder)._load_from_checkpoint(str(tmp_path / "c"))
    assert tiedquiet.check(model).ok


def other_values(model: Any) -> Any:
    for tensor in model.state_dict().values():
        tensor.add_(1)
    return model


def segformer() -> Any:
    """With a batch norm, whose count no loader calls missing, and in newer releases with names that are renamed."""
    how: dict[str, Any] = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8]}
    how |= {"num_attention_heads": [1], "mlp_ratios": [1], "patch_sizes": [3], "strides": [2], "decoder_hidden_size": 8}
    return SegformerForSemanticSegmentation(SegformerConfig(**how))


@pytest.mark.parametrize("kind", [Trainer, SaysNothing])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_batch_norm_s_count(prefix: str, kind: Any, tmp_path: Path) -> None:
    """All that the files have under a prefix has to fit, and torch does not call the count missing."""
    segformer().save_pretrained(tmp_path)
    trained = other_values(segformer())
    trained.save_pretrained(tmp_path / "c")
    truth, file = right(segformer, tmp_path / "c"), tmp_path / "c" / "model.safetensors"
    tensors = load_file(file)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    lost = len(tensors) if prefix else len(tensors.keys() - truth.keys())

    def resumed() -> Any:
        model = SegformerForSemanticSegmentation.from_pretrained(tmp_path)
        kind(model, TrainingArguments(str(tmp_path), use_cpu=True))._load_from_checkpoint(str(tmp_path / "c"))
        return model

    assert tiedquiet.check(resumed()).unread == lost
    with tiedquiet.enable("repair"):
        model = resumed()
    assert differing(model, truth) == set()
    assert tiedquiet.check(model).unread == 0
    save_file({n: t for n, t in load_file(file).items() if "num_batches" not in n}, file, {"format": "pt"})
    with tiedquiet.enable("repair"):
        proof = tiedquiet.check(model := resumed())
    assert differing(model, truth) == {name for name in truth if "num_batches" in name}
    assert {f.verdict for f in proof.findings} <= {Verdict.UNPROVEN}, "from_pretrained does not call it missing either"


def tied_llava() -> Any:
    model = llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    return model


def test_what_is_claimed_for_one_key_is_no_likely_one_of_another(runs: Any, tmp_path: Path, printed: Printed) -> None:
    """The tied head has the shape of the embedding, which the file has under two more changes of its name."""
    folder = runs(tied_llava)
    shutil.copytree(folder / "checkpoint-2", tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    save_file(
        {f"module.{key}": v for key, v in tensors.items()}, tmp_path / "c" / "model.safetensors", {"format": "pt"}
    )
    printed.records.clear()
    proof = tiedquiet.check(resumed(tied_llava, folder, tmp_path / "c"))
    assert proof.unread == len(tensors)
    assert not any("perhaps" in line for line in printed.loud), printed.loud
    with tiedquiet.enable("repair"):
        model = resumed(tied_llava, folder, tmp_path / "c")
    assert differing(model, right(tied_llava, folder / "checkpoint-2")) == set()


def test_a_model_loaded_with_a_key_mapping_of_its_own(tmp_path: Path, printed: Printed) -> None:
    """Transformers saves it under the names that the mapping undoes; the class alone does not know them."""
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    mapping = {"^transformer.blocks": "transformer.h", "^words": "transformer.wte"}  # more than one prefix
    renamed = {
        key.replace("transformer.h.", "transformer.blocks.").replace("transformer.wte.", "words."): value
        for key, value in tensors.items()
    }
    save_file(renamed, tmp_path / "base" / "model.safetensors", {"format": "pt"})

    def load() -> Any:
        return GPT2LMHeadModel.from_pretrained(tmp_path / "base", key_mapping=mapping)

    trained = load()
    for parameter in trained.parameters():
        parameter.data.normal_()
    trained.save_pretrained(tmp_path / "checkpoint-1")
    if not any("blocks" in key for key in load_file(tmp_path / "checkpoint-1" / "model.safetensors")):
        pytest.skip("this release saves it under the model's own names")
    truth, model = state(trained), load()
    with tiedquiet.enable("repair"):
        trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert differing(model, truth) == set()
    trainer_of(load(), tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    (line,) = printed.loud
    assert line.endswith(" that from_pretrained loaded from this checkpoint, with the same key_mapping")
    with tiedquiet.enable("strict"):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-1", key_mapping=mapping)
        trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert differing(model, truth) == set()


def test_what_a_module_renames_while_it_is_read_is_read(tmp_path: Path) -> None:
    """Weight norm takes its old names by itself: `load_state_dict` has a place for them, and calls them read."""
    truth = written(wav2vec2(), tmp_path / "c", lambda key: with_old_weight_norm(key).replace("lm_head.", "head."))
    model = wav2vec2()
    trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path / "c"))
    assert differing(model, truth) == {"lm_head.weight", "lm_head.bias"}
    assert verdicts(model) == dict.fromkeys(("lm_head.weight", "lm_head.bias"), Verdict.MISSING)


def test_a_name_in_two_shards_that_the_model_does_not_have(runs: Any, tmp_path: Path) -> None:
    folder = runs(llama)
    checkpoint = split(folder / "checkpoint-2", tmp_path / "checkpoint-2", "shards.safetensors")
    for number, shard in enumerate(sorted(checkpoint.glob("*.safetensors"))):
        save_file({**load_file(shard), "more": torch.tensor([float(number)])}, shard, {"format": "pt"})
    assert tiedquiet.check(resumed(llama, folder, checkpoint)).ok


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:TypedStorage:UserWarning")
def test_a_tensor_too_many_that_cannot_be_on_meta(runs: Any, tmp_path: Path, printed: Printed) -> None:
    checkpoint = split(runs(llama) / "checkpoint-2", tmp_path / "checkpoint-2", "whole.bin")
    more = {"more": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}
    torch.save({**torch.load(checkpoint / "pytorch_model.bin"), **more}, checkpoint / "pytorch_model.bin")
    printed.records.clear()
    assert tiedquiet.check(resumed(llama, runs(llama), checkpoint)).ok
    assert not printed.loud


@pytest.mark.parametrize(
    ("build", "prefix", "name", "key"),
    [
        (mixtral, "", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        (llava, "", "language_model.lm_head.weight", "lm_head.weight"),  # which a tie would have, had it no name there
        (llama, "module.", "model.norm.weight", "model.norm.weight"),
    ],
)
def test_a_renamed_name_in_two_shards(build: Any, prefix: str, name: str, key: str, runs: Any, tmp_path: Path) -> None:
    """Nothing tells which of the two values is right, so `repair` takes neither."""
    folder = runs(build)
    checkpoint = split(folder / "checkpoint-2", tmp_path / "checkpoint-2", "shards.safetensors", prefix)
    first, second = sorted(checkpoint.glob("*.safetensors"))
    if prefix + name not in load_file(first):
        first, second = second, first
    value = load_file(first)[prefix + name]
    save_file({**load_file(second), prefix + name: value + 1}, second, {"format": "pt"})
    with tiedquiet.enable("repair"):
        model = resumed(build, folder, checkpoint)
    before = state(type(model).from_pretrained(folder / "base"))
    assert torch.equal(model.state_dict()[key], before[key])
    proof = tiedquiet.check(model)
    assert {f.key: f.verdict for f in proof.findings if f.verdict is not Verdict.TIED} == {key: Verdict.AMBIGUOUS}
    assert differing(model, right(build, folder / "checkpoint-2")) == {key}, "all else was read"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="ambiguous"):
        resumed(build, folder, checkpoint)


class OwnLlava(LlavaForConditionalGeneration):
    """A class of the user's, for which transformers renames less than for the one that it extends."""


def test_the_checkpoint_of_the_class_that_the_user_s_own_extends(runs: Any, printed: Printed) -> None:
    folder = runs(llava)
    truth = right(llava, folder / "checkpoint-2")
    model = OwnLlava(llava().config)
    printed.records.clear()
    with tiedquiet.enable("repair"):
        trainer_of(model, folder)._load_from_checkpoint(str(folder / "checkpoint-2"))
    assert differing(model, truth) == set()
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.stored) == (True, proof.total)
    assert not printed.loud
    assert not printed.of("transformers.trainer")
