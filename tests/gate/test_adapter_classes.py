"""Adapters: the class that each was made for, which may have another head than its base model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests.checkpoints import gpt2
from tests.gate.test_check import check, config_of
from tests.gate.test_pipeline import components, wan

__all__ = ["wan"]  # the fixture
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_an_adapter_of_a_pipeline(wan: Path, tmp_path: Path, line: Callable[..., str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(wan)}))
    assert line(tmp_path / "adapter").endswith(f"not available: {wan} is a pipeline of several models")


def adapter_of(base: Any, made_for: Any, folder: Path, task: str | None, target: str, **options: Any) -> Path:
    peft = pytest.importorskip("peft")
    base.save_pretrained(folder / "base")
    model = made_for.from_pretrained(folder / "base", **options)
    heads = None if task else ["classifier", "pre_classifier"]
    turned = target == "c_attn"
    config = peft.LoraConfig(task_type=task, target_modules=[target], modules_to_save=heads, fan_in_fan_out=turned)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def is_read(made_for: Any, folder: Path, **options: Any) -> bool:
    """Whether `from_pretrained` reads all of an adapter: some releases do not read the heads that peft saves."""
    stored = load_file(folder / "adapter_model.safetensors").values()
    read = made_for.from_pretrained(folder, **options).state_dict().values()
    return all(any(torch.equal(tensor, own) for own in read) for tensor in stored)


@pytest.mark.parametrize(
    ("made_for", "task"),
    [
        (BertForSequenceClassification, "SEQ_CLS"),
        (BertForTokenClassification, "TOKEN_CLS"),
        (BertForQuestionAnswering, "QUESTION_ANS"),
        (BertForMaskedLM, "FEATURE_EXTRACTION"),
    ],
)
def test_an_adapter_with_a_head_of_its_own(
    made_for: Any, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BertConfig(**SMALL, vocab_size=64, max_position_embeddings=16)
    base = BertModel if made_for is BertForSequenceClassification else BertForMaskedLM
    folder = adapter_of(base(config), made_for, tmp_path, task, "query")
    status = 0 if is_read(made_for, folder) else 1
    capsys.readouterr()
    assert check(folder, "--json") == status
    found = components(capsys)["."]
    assert found["class"] == made_for.__name__
    assert not any("has no place" in finding["why"] for finding in found["findings"])


def test_an_adapter_that_names_its_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = DistilBertForMaskedLM(DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=64))
    kind = DistilBertForSequenceClassification
    folder = adapter_of(base, kind, tmp_path, None, "q_lin")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == kind.__name__
    status = 0 if is_read(kind, folder) else 1
    capsys.readouterr()
    assert check(folder, "--json") == status
    assert components(capsys)["."]["class"] == kind.__name__
    for name in ("DistilBertModel", "NoSuchModel", {}):  # a base model is in every class; what is none, names nothing
        config["auto_mapping"] = {"base_model_class": name, "parent_library": "os"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert check(folder, "--json") == 1
        assert components(capsys)["."]["class"] == "DistilBertForMaskedLM"


def test_a_head_that_an_adapter_s_file_has_under_the_base_s_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter whose names lack peft's prefix (`get_peft_model_state_dict` gives such ones) is read all the same."""
    kind = DistilBertForSequenceClassification
    base = kind(DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=64))
    folder = adapter_of(base, kind, tmp_path, None, "q_lin")
    file = folder / "adapter_model.safetensors"
    tensors = {key.removeprefix("base_model.model."): value + 1 for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert tensors.keys() & base.state_dict().keys()
    status = 0 if is_read(kind, folder) else 1
    capsys.readouterr()
    assert check(folder, "--json") == status
    assert not [one for one in components(capsys)["."]["findings"] if one["verdict"] == "overwritten"]


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_biases_that_an_adapter_s_file_has_under_the_base_s_names(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    kind = DistilBertForMaskedLM
    kind(DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=64)).save_pretrained(
        tmp_path / "base"
    )
    config = peft.LoraConfig(target_modules=["q_lin"], bias="all")
    peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key.replace("base_model.model.", prefix): value + 1 for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert bool(tensors.keys() & load_file(tmp_path / "base" / "model.safetensors").keys()) == (not prefix)
    status = 0 if is_read(kind, tmp_path / "adapter") else 1
    capsys.readouterr()
    assert check(tmp_path / "adapter", "--json") == status
    assert not [one for one in components(capsys)["."]["findings"] if one["verdict"] == "overwritten"]


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
def test_as_many_labels_as_the_adapter_has(config: Any, labels: int, tmp_path: Path, line: Callable[..., str]) -> None:
    """A reward model's has one, and the config of its base model says nothing, which means two."""
    small = config(**SMALL, vocab_size=64, max_position_embeddings=16)
    head = RobertaForSequenceClassification if config is RobertaConfig else BertForTokenClassification
    task = "SEQ_CLS" if config is RobertaConfig else "TOKEN_CLS"
    folder = adapter_of(AutoModel.from_config(small), head, tmp_path, task, "query", num_labels=labels)
    status = 0 if is_read(head, folder, num_labels=labels) else 1
    assert check(folder) == status
    if status:
        return
    name = "adapter_model.safetensors"
    stored = load_file(folder / name)
    last = max(key for key in stored if "classifier" in key and key.endswith("weight"))
    save_file({**stored, last: torch.zeros(1_000_001, 1)}, folder / name, {"format": "pt"})
    assert "is 1000001 by 1 in the file and 2 by 16 in the model" in line(folder)


def test_a_language_model_s_adapter_goes_by_the_base_s_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter_of(GPT2LMHeadModel(gpt2()), GPT2LMHeadModel, tmp_path, "CAUSAL_LM", "c_attn")
    config_of(tmp_path / "base", architectures=["GPT2DoubleHeadsModel"])
    capsys.readouterr()
    assert check(folder, "--json") == 1
    assert components(capsys)["."]["class"] == "GPT2DoubleHeadsModel"
