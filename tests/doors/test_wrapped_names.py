"""Files that have the names of a wrapper: of DDP, of FSDP, of activation checkpointing, of a compiled layer."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    EncoderDecoderModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaModel,
    PreTrainedModel,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2
from tests.doors import training
from tests.doors.renamed import BERT, SMALL, llava, mapping_of, qwen2, stopped_and_repaired, verdicts, written, wrong
from tests.gate.test_compare import mixtral
from tiedquiet import Verdict


def around_layers(inside: str, before: str = "") -> Callable[[str], str]:
    return lambda key: before + re.sub(r"(layers?\.\d+\.)", rf"\1{inside}", key)


WRAPPED = {
    "all of it": around_layers("", "module."),
    "each layer": around_layers("_checkpoint_wrapped_module."),
    "all of it and each layer": around_layers(
        "_fsdp_wrapped_module._checkpoint_wrapped_module.", "_fsdp_wrapped_module."
    ),
}


def bert(kind: Any) -> Any:
    return kind(BertConfig(**BERT))


def assert_cured(kind: Any, folder: Path, truth: dict[str, Any], printed: Printed) -> None:
    """By what the line advises, pasted as it is; and what is saved then is read like any other checkpoint."""
    lost = {key for key, verdict in verdicts(kind.from_pretrained(folder)).items() if verdict is Verdict.UNREAD}
    (line,) = printed.loud
    assert "unread, " in line
    assert lost
    repaired = stopped_and_repaired(kind, folder)
    repaired.save_pretrained(folder / "repaired")
    models = [repaired, kind.from_pretrained(folder / "repaired")]
    if "key_mapping" in line:
        to = f"{kind.__name__}.from_pretrained"
        assert line.endswith(f" to {to}, and save_original_format=False to save_pretrained")
        models.append(kind.from_pretrained(folder, key_mapping=mapping_of(line)))
        models[-1].save_pretrained(folder / "mapped", save_original_format=False)
        models.append(kind.from_pretrained(folder / "mapped"))
    for model in models:
        assert not wrong(model, truth)


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("build", [qwen2, llava, mixtral])
def test_names_of_a_wrapper(build: Any, wrapped: str, tmp_path: Path, printed: Printed) -> None:
    """A LLaVA's are renamed while they are read, to names of another depth, and a Mixtral's merged."""
    truth = written(build(), tmp_path, WRAPPED[wrapped])
    assert_cured(type(build()), tmp_path, truth, printed)


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertModel])
def test_with_the_head_of_another_class(kind: Any, wrapped: str, tmp_path: Path, printed: Printed) -> None:
    """The files have a head that the model lacks, and the model has one, and a pooler, that they lack."""
    saved = written(bert(BertForMaskedLM), tmp_path, WRAPPED[wrapped])
    own = "" if kind is BertModel else "bert."
    truth = {key.replace("bert.", own, 1): value for key, value in saved.items() if key.startswith("bert.")}
    assert_cured(kind, tmp_path, truth, printed)


@pytest.mark.parametrize("build", [qwen2, llava, lambda: bert(BertForSequenceClassification)])
def test_where_the_vocabulary_is_another_as_well(build: Any, tmp_path: Path) -> None:
    """What has another shape has its place under the prefix, and is not read."""
    truth = written(build(), tmp_path, WRAPPED["all of it"])
    config = build().config
    config.get_text_config().vocab_size = 72
    how = {"config": config, "ignore_mismatched_sizes": True}
    others = {key for key, value in truth.items() if len(value) == 64 and value.dim() == 2}
    model = type(build()).from_pretrained(tmp_path, **how)
    assert verdicts(model) == {key: Verdict.MISSING if key in others else Verdict.UNREAD for key in truth}
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match="unread"):
        type(build()).from_pretrained(tmp_path, **how)
    with tiedquiet.enable("repair"):
        model = type(build()).from_pretrained(tmp_path, **how)
    assert verdicts(model) == dict.fromkeys(others, Verdict.MISSING)
    assert wrong(model, truth) == others


def test_where_a_class_has_its_base_model_under_another_name(tmp_path: Path, printed: Printed) -> None:
    """`LlamaForQuestionAnswering` calls it `transformer`, and transformers reads nothing of what the others save."""
    saved = written(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path)
    truth = {key.replace("model.", "transformer.", 1): value for key, value in saved.items() if key != "lm_head.weight"}
    assert_cured(LlamaForQuestionAnswering, tmp_path, truth, printed)


def test_what_a_class_ignores_may_be_what_it_lacks(tmp_path: Path, printed: Printed) -> None:
    """Its pattern for masks, `attn.bias`, is in GPT-2's `c_attn.bias`."""
    truth = written(GPT2Model(gpt2()), tmp_path, WRAPPED["all of it"])
    assert_cured(GPT2Model, tmp_path, truth, printed)
    assert "unread, 16 of 16 tensors" in printed.loud[0]


def test_a_base_model_that_was_not_read_may_have_any_name(tmp_path: Path, printed: Printed) -> None:
    written(bert(BertForMaskedLM), tmp_path, lambda key: key.replace("bert.", "trunk.", 1))
    BertForSequenceClassification.from_pretrained(tmp_path)
    (line,) = printed.loud
    assert (
        "perhaps in the checkpoint under another name: bert.embeddings.LayerNorm.bias may be trunk.embeddings" in line
    )
    printed.records.clear()
    written(bert(BertForMaskedLM), tmp_path)
    BertForSequenceClassification.from_pretrained(tmp_path)
    assert not printed.loud, "a new head and a new pooler"


class Around(PreTrainedModel):
    """It has its base model, and each layer of it, in a module."""

    config_class = LlamaConfig
    base_model_prefix = "inner"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.core = LlamaModel(config)
        for number, layer in enumerate(self.core.layers):
            self.core.layers[number] = torch.nn.ModuleDict({"own": layer})
        self.post_init()


@pytest.mark.parametrize("prefix", ["core.", ""])
def test_a_wrapper_in_the_model(prefix: str, tmp_path: Path, printed: Printed) -> None:
    truth = written(
        Around(LlamaConfig(**SMALL)), tmp_path, lambda key: prefix + key.removeprefix("core.").replace("own.", "")
    )
    if prefix:
        assert_cured(Around, tmp_path, truth, printed)
    else:  # where nothing is inside layers, a prefix is to be added: no look-ahead, of which 5.0 to 5.3 make another
        truth = written(Plain(LlamaConfig(**SMALL)), tmp_path, lambda key: key.removeprefix("core."))
        assert_cured(Plain, tmp_path, truth, printed)


class Plain(PreTrainedModel):
    config_class = LlamaConfig
    base_model_prefix = "inner"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.core = LlamaModel(config)
        self.post_init()


def test_a_mapping_that_is_no_cure_is_not_advised(tmp_path: Path, printed: Printed) -> None:
    """Transformers 5.0 to 5.3 puts a `key_mapping` in the place of the renaming of a LLaVA's names."""
    written(llava(), tmp_path, WRAPPED["all of it"])
    kind = type(llava())
    kind.from_pretrained(tmp_path)
    (line,) = printed.loud
    assert "Set TIEDQUIET=repair to read them" in line
    written(mixtral(), tmp_path / "mixtral", WRAPPED["all of it"])
    printed.records.clear()
    type(mixtral()).from_pretrained(tmp_path / "mixtral")
    assert mapping_of(printed.loud[0]) == {r"^module\.(.+)": r"\1"}


def test_one_tensor_is_not_all_that_it_may_be(tmp_path: Path, printed: Printed) -> None:
    """A decoder's new cross-attention is no pooler, which a decoder lacks."""
    config = BertConfig(**{**BERT, "num_hidden_layers": 2})
    written(BertModel(config), tmp_path)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(str(tmp_path), str(tmp_path))
    assert not printed.loud
    sources = {finding.source for finding in tiedquiet.check(model).findings if finding.verdict is Verdict.MISSING}
    assert "pooler.dense.weight" in sources, "as the file has it, not as the decoder inside would"


@pytest.mark.parametrize(("build", "wrapped"), [(training.llava, "all of it"), (training.llama, "each layer")])
def test_a_run_is_resumed_from_them(build: Any, wrapped: str, runs: Any, tmp_path: Path, printed: Printed) -> None:
    """The very model resumes: its base model alone is not enough."""
    base, given = runs(build) / "base", load_file(runs(build) / "checkpoint-2" / "model.safetensors")
    truth = type(build()).from_pretrained(runs(build) / "checkpoint-2").state_dict()
    save_file({WRAPPED[wrapped](key): value for key, value in given.items()}, tmp_path / "model.safetensors")
    with tiedquiet.enable("repair"):
        trainer = training.trainer_of(model := type(build()).from_pretrained(base), tmp_path / "run")
        trainer._load_from_checkpoint(str(tmp_path))
    assert not wrong(model, truth)
    assert not printed.loud
