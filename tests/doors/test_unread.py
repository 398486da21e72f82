"""What the files have under another name or in another form, and `from_pretrained` does not read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlavaForConditionalGeneration,
    MixtralForCausalLM,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2, state_of
from tests.doors.renamed import BERT, llava, mapping_of, qwen2, verdicts, written, wrong
from tests.gate.test_check import check
from tests.gate.test_compare import mixtral
from tests.idioms import Idiom, Tiny
from tiedquiet import LoadError, Verdict

PREFIXES: dict[str, Callable[[str], str]] = {
    "added by DDP": lambda key: f"module.{key}",
    "added by compile and DDP": lambda key: f"_orig_mod.module.{key}",
    "added by PEFT": lambda key: f"base_model.model.{key}",
    "of the trunk": lambda key: "transformer." * key.startswith("model.") + key,
    "replaced": lambda key: re.sub(r"^model\.", "language_model.decoder.", key),
    "removed": lambda key: key.removeprefix("model."),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", PREFIXES.values(), ids=PREFIXES)
def test_another_prefix(change: Callable[[str], str], tied: bool, tmp_path: Path, printed: Printed) -> None:
    truth = written(qwen2(tie_word_embeddings=tied), tmp_path, change)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    lost = wrong(model, truth)
    if not lost:  # transformers adds and removes the prefix of a base model itself
        assert change is PREFIXES["removed"]
        assert tiedquiet.check(model).ok
        return
    found = verdicts(model)
    unread = {key for key, verdict in found.items() if verdict is Verdict.UNREAD}
    assert lost - {"lm_head.weight"} <= unread <= lost
    assert not tiedquiet.check(model).ok
    assert not any("TIEDQUIET=repair or correct config.json" in line for line in printed.loud), "no tie is advised"
    mapping = mapping_of(printed.loud[0])
    assert not wrong(Qwen2ForCausalLM.from_pretrained(tmp_path, key_mapping=mapping), truth), "the cure cures"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        Qwen2ForCausalLM.from_pretrained(tmp_path)
    with tiedquiet.enable("repair"):
        model, info = Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "again")
    assert not wrong(Qwen2ForCausalLM.from_pretrained(tmp_path / "again"), truth), "what was repaired can be saved"


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_part_of_a_composite(part: str, tmp_path: Path, printed: Printed) -> None:
    truth = written(llava(), tmp_path, lambda key: key.replace(f"{part}.", "other."))
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert {k for k, v in verdicts(model).items() if v is Verdict.UNREAD} == info["missing_keys"] == wrong(model, truth)
    assert f"{len(info['missing_keys'])} of {len(truth)} tensors were NOT read" in printed.loud[0]
    assert "LOAD REPORT" in printed.report, "its rows are true, and stay"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with tiedquiet.enable("repair"):
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not wrong(model, {key: value.bfloat16() for key, value in truth.items()})
    assert tiedquiet.check(model).ok


def test_another_head_is_not_taken_for_this_one(tmp_path: Path, printed: Printed) -> None:
    """Two labels, and two ends of a span: the same shapes, and another task."""
    written(BertForSequenceClassification(BertConfig(**BERT, num_labels=2)), tmp_path)
    for how in ("on", "repair", "strict"):
        with tiedquiet.enable(how):
            model = BertForQuestionAnswering.from_pretrained(tmp_path)
        found = tiedquiet.check(model)
        heads = {f.key: (f.verdict, f.source) for f in found.findings}
        assert heads["qa_outputs.weight"] == (Verdict.MISSING, "classifier.weight")
        assert set(heads) == {"qa_outputs.weight", "qa_outputs.bias"}
        assert not found.ok
    assert not [line for line in printed.loud if "may be" in line], "the config names the class that has it"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    BertForQuestionAnswering.from_pretrained(tmp_path)
    assert any("qa_outputs.weight may be classifier.weight" in line for line in printed.loud)
    head = load_file(tmp_path / "model.safetensors")["classifier.weight"]
    assert not torch.equal(model.qa_outputs.weight, head)


@pytest.mark.parametrize("cls", [RobertaModel, RobertaForSequenceClassification])
def test_a_head_of_the_class_that_saved_the_file_is_no_other_name(cls: Any, tmp_path: Path, printed: Printed) -> None:
    """Of `roberta-base` everybody trains a classifier: `classifier.dense` and `lm_head.dense` have one shape."""
    written(RobertaForMaskedLM(RobertaConfig(**BERT)), tmp_path)
    found = verdicts(cls.from_pretrained(tmp_path))
    assert set(found.values()) == {Verdict.MISSING}
    assert any(key.endswith("dense.weight") for key in found)
    assert not [line for line in printed.loud if "may be" in line]
    renamed = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace("word_embeddings", "words"): value for key, value in renamed.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    cls.from_pretrained(tmp_path)
    assert any("word_embeddings.weight may be roberta.embeddings.words.weight" in line for line in printed.loud)


def test_a_base_model_of_which_nothing_was_read(tmp_path: Path, printed: Printed) -> None:
    """In the file of a bi-encoder: the class that saved it explains no name of the encoder."""
    written(RobertaModel(RobertaConfig(**BERT)), tmp_path, lambda key: f"tower.{key}")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if "pooler" not in key} | {"out.weight": torch.ones(3, 16)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BiEncoder"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(verdicts(RobertaModel.from_pretrained(tmp_path)).values()) == {Verdict.MISSING}
    (line,) = printed.loud
    assert "embeddings.LayerNorm.bias may be tower.embeddings.LayerNorm.bias and 20 more of tower.* likewise" in line


@pytest.mark.parametrize("how", ["on", "repair"])
@pytest.mark.parametrize("name", ["output_head.weight", "decoder_out"])
def test_no_head_is_tied_while_the_file_may_have_it(name: str, how: str, tmp_path: Path, printed: Printed) -> None:
    """One renamed head is only likely, or less; but tying it would be wrong."""
    truth = written(qwen2(tie_word_embeddings=False), tmp_path, lambda k: k.replace("lm_head.weight", name))
    with tiedquiet.enable(how):
        model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert wrong(model, truth) == {"lm_head.weight"}
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    (line,) = [line for line in printed.loud if "untied" in line]
    which = f"{name}, which is" if "head" in name else "one of the tensors of its shape that are"
    assert f"Check whether it is {which} in the checkpoint and w" in line


class CopiesItsHead(Qwen2ForCausalLM):
    """Gives it the values of the embedding, in memory of its own."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        self.lm_head.weight = torch.nn.Parameter(self.model.embed_tokens.weight.detach().clone())


def test_a_copy_is_not_confirmed_while_the_file_may_have_it(tmp_path: Path, printed: Printed) -> None:
    written(qwen2(), tmp_path)
    assert verdicts(CopiesItsHead.from_pretrained(tmp_path)) == {"lm_head.weight": Verdict.COPIED}
    for name in ("output_head.weight", "decoder_out"):
        written(qwen2(), tmp_path, **{name: torch.ones(64, 32)})
        printed.records.clear()
        assert verdicts(CopiesItsHead.from_pretrained(tmp_path)) == {"lm_head.weight": Verdict.MISSING}
        assert any(f"lm_head.weight may be {name}" in line for line in printed.loud) is ("head" in name)


@pytest.mark.parametrize(("part", "kind"), [("half", "missing"), ("all", "missing")])
def test_a_file_without_them(part: str, kind: str, tmp_path: Path) -> None:
    truth = written(qwen2(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "layers.1." not in key and part == "half"}
    save_file(kept or {"nothing.weight": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    for how in ("on", "strict"):  # a new part may be meant
        with tiedquiet.enable(how):
            model = Qwen2ForCausalLM.from_pretrained(tmp_path)
        proof = tiedquiet.check(model)
        assert {str(v) for k, v in verdicts(model).items() if k != "lm_head.weight"} == {kind}
        assert not proof.ok
        assert proof.total == len(truth)
        assert proof.missing == len(truth) - len(kept) - (part == "half")


def test_a_head_of_another_size_is_missing(tmp_path: Path) -> None:
    written(BertForSequenceClassification(BertConfig(**BERT, num_labels=3)), tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert verdicts(model) == dict.fromkeys(("classifier.weight", "classifier.bias"), Verdict.MISSING)


SCALES = ["{}.weight_scale", "{}.scale_weight", "{}_scale", "{}_weight_scale_inv", "scales.{}.weight", "scales.{}"]


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8", "int16", "int32", "uint16"])
@pytest.mark.parametrize("form", SCALES)
def test_codes_without_their_scale(kind: str, form: str, tmp_path: Path, printed: Printed) -> None:
    module = "model.layers.0.mlp.gate_proj"
    key, scale = f"{module}.weight", form.format(module)
    written(qwen2(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    coded = {**tensors, key: (tensors[key] * 100).to(getattr(torch, kind)), scale: torch.tensor([0.01])}
    save_file(coded, tmp_path / "model.safetensors", {"format": "pt"})
    assert verdicts(Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))[key] is Verdict.UNREAD
    assert f"codes were read as values, without {scale}" in printed.loud[0]
    assert "TIEDQUIET=repair" not in printed.loud[0], "it cannot"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="codes were read as values"):
        Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    coded[f"other.{scale}"] = coded.pop(scale)  # of another module: float8 may be the numbers themselves
    save_file(coded, tmp_path / "model.safetensors", {"format": "pt"})
    assert tiedquiet.check(Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)).ok is (kind[0] == "f")


def test_codes_of_experts_without_their_scales(tmp_path: Path, printed: Printed) -> None:
    mixtral().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    codes = {
        key: (value * 100).to(torch.int8) for key, value in tensors.items() if ".0.block_sparse_moe.experts." in key
    }
    scales = {f"{key}_scale": torch.tensor([0.01]) for key in codes}
    save_file({**tensors, **codes, **scales}, tmp_path / "model.safetensors", {"format": "pt"})
    experts = {f"model.layers.0.mlp.experts.{part}_proj" for part in ("gate_up", "down")}
    assert verdicts(MixtralForCausalLM.from_pretrained(tmp_path)) == dict.fromkeys(experts, Verdict.UNREAD)
    assert (
        "int8 codes were read as values, without model.layers.0.block_sparse_moe.experts.0.w2.weight_scale"
        in "".join(printed.loud)
    )
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="codes were read as values"):
        MixtralForCausalLM.from_pretrained(tmp_path)
    assert check(tmp_path) == 1


class Steps(GPT2LMHeadModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.post_init()


def test_fractions_in_a_buffer_of_integers(tmp_path: Path) -> None:
    written(Steps(gpt2()), tmp_path, steps=torch.tensor([0.7, 1.2]))
    found = {f.key: (f.verdict, f.why) for f in tiedquiet.check(Steps.from_pretrained(tmp_path)).findings}
    assert found["steps"] == (Verdict.OVERWRITTEN, "by the cast to int64: the file has it as float32")
    written(Steps(gpt2()), tmp_path, steps=torch.tensor([1, 2], dtype=torch.int32))
    assert tiedquiet.check(Steps.from_pretrained(tmp_path)).ok


@pytest.mark.parametrize("kind", ["bin", "bin of old", "state_dict"])
def test_from_a_pickle_and_from_a_state_dict(kind: str, tmp_path: Path) -> None:
    truth = written(qwen2(), tmp_path, lambda key: f"module.{key}")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    how: dict[str, Any] = {}
    if kind.startswith("bin"):
        is_mapped = kind == "bin"
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_mapped)
    else:
        how = {"state_dict": tensors}
    source = None if how else tmp_path
    if source is None:
        how["config"] = qwen2().config
    assert tiedquiet.check(Qwen2ForCausalLM.from_pretrained(source, **how)).unread == len(tensors)
    with tiedquiet.enable("repair"):
        model = Qwen2ForCausalLM.from_pretrained(source, **how)
    assert not wrong(model, truth)


def test_nothing_has_values_on_meta(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    truth = written(qwen2(), tmp_path)
    proof = tiedquiet.check(Qwen2ForCausalLM.from_pretrained(tmp_path, device_map="meta"))
    assert (proof.ok, proof.stored, proof.total) == (False, 0, len(truth))


class Patterns(GPT2LMHeadModel):
    """Ties by patterns that end in a dot and a look-ahead, as PeAudioVideoModel's do."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._tied_weights_keys = {r"left\.(?!own)": r"^right\.(?!own)", "lm_head.weight": "transformer.wte.weight"}
        for side in ("left", "right"):
            setattr(self, side, nn.ModuleDict({"one": nn.Linear(4, 4), "own": nn.Linear(4, 1, bias=False)}))
        self.post_init()


def test_a_pattern_that_ends_in_a_dot_and_a_look_ahead(tmp_path: Path) -> None:
    model = Patterns(gpt2())
    tensors = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("left.one")}
    model.config.tie_word_embeddings = False
    model.config.architectures = ["Patterns"]
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert verdicts(Patterns.from_pretrained(tmp_path)) == dict.fromkeys(
        ("left.one.weight", "left.one.bias"), Verdict.UNTIED
    )
    with tiedquiet.enable("repair"):
        loaded = Patterns.from_pretrained(tmp_path)
    assert loaded.left["one"].weight is loaded.right["one"].weight


class OneTable(BertForMaskedLM):
    """One embedding under two names that nothing declares, and a decoder that is tied to one of them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert.embeddings.position_embeddings = self.bert.embeddings.word_embeddings


def test_what_is_put_back_takes_along_what_follows_it(tmp_path: Path) -> None:
    """5.3.0 initialises such an embedding anew."""
    model = OneTable(BertConfig(**BERT, max_position_embeddings=64))
    state_of(model)
    model.config.save_pretrained(tmp_path)
    tensors = {
        key: value for key, value in model.state_dict().items() if "decoder" not in key and "word_emb" not in key
    }
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("repair"):
        loaded = OneTable.from_pretrained(tmp_path)
    table = loaded.bert.embeddings.word_embeddings.weight
    assert torch.equal(table, tensors["bert.embeddings.position_embeddings.weight"])
    assert loaded.cls.predictions.decoder.weight is table
    assert tiedquiet.check(loaded).ok


class SharesAModule(Tiny):
    """One module under two names; the file has both, and one of them under another prefix."""

    def add(self, config: Any) -> None:
        self.second = self.lin


def test_what_is_stored_under_another_name_is_not_overwritten_by_repair(tmp_path: Path, printed: Printed) -> None:
    Idiom(SharesAModule).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("weight", "bias"):
        tensors[f"layers.lin.{name}"] = tensors.pop(f"lin.{name}") + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("repair"):
        model = SharesAModule.from_pretrained(tmp_path)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(model.second, name), tensors[f"second.{name}"])
    assert not any("read by TIEDQUIET=repair" in line for line in printed.confirmed)


def test_the_base_model_s_own_file_has_its_names_without_the_prefix(tmp_path: Path, printed: Printed) -> None:
    """It has no head, so that what nothing read is no other class's."""
    written(RobertaModel(RobertaConfig(**BERT)), tmp_path, lambda key: key.replace("word_embeddings", "words"))
    RobertaForSequenceClassification.from_pretrained(tmp_path)
    assert any("word_embeddings.weight may be embeddings.words.weight" in line for line in printed.loud)
