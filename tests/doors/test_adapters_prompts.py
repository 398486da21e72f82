"""Adapters that consist of prompts, which peft reads by code of its own, and of a head that was trained with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.test_adapters import FILE, SMALL, rename
from tiedquiet import LoadError, Verdict

peft = pytest.importorskip("peft")

PROMPTS = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
KINDS: dict[str, Callable[[], Any]] = {
    "prompts": lambda: peft.PromptTuningConfig(**PROMPTS),
    "prefixes": lambda: peft.PrefixTuningConfig(**PROMPTS),
    "computed": lambda: peft.PromptEncoderConfig(**PROMPTS, encoder_hidden_size=8),
    "of several tasks": lambda: peft.MultitaskPromptTuningConfig(**PROMPTS, num_tasks=2),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    Qwen2ForCausalLM(Qwen2Config(**SMALL)).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForSequenceClassification"], "pad_token_id": 0}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


def base_of(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base)


def trained(base: Path, kind: str, adapter: str = "default") -> Any:
    """A model with prompts and a head that were trained, which lie in `adapter` beside its base."""
    with tiedquiet.enable("off"):
        model = peft.get_peft_model(base_of(base), KINDS[kind](), adapter)
        for value in model.parameters():
            if value.requires_grad:
                torch.nn.init.normal_(value)
        model.save_pretrained(base.parent / "adapter")
    return model


def by_peft(base: Path) -> Any:
    return peft.PeftModel.from_pretrained(base_of(base), base.parent / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_beside_them_is_held(kind: str, base: Path, printed: Printed) -> None:
    trained(base, kind)
    printed.records.clear()
    with tiedquiet.enable("strict"):
        model = by_peft(base)
    held = model.base_model.score.modules_to_save["default"].weight
    assert torch.equal(held, load_file(base.parent / "adapter" / FILE)["base_model.score.weight"])
    proof = tiedquiet.check(model)
    assert proof.ok, proof
    assert not printed.loud


@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_too_many(kind: str, base: Path) -> None:
    trained(base, kind)
    tensors = load_file(base.parent / "adapter" / FILE)
    save_file({**tensors, "stranger": torch.ones(2)}, base.parent / "adapter" / FILE, {"format": "pt"})
    of = f"{len(tensors)} of {len(tensors) + 1} tensors of the adapter were read; the model has no place for stranger"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=of):
        by_peft(base)


def test_a_task_s_own_that_the_file_lacks(base: Path, printed: Printed) -> None:
    trained(base, "of several tasks")
    rename(base.parent / "adapter", lambda name: None if name == "prefix_task_cols" else name)
    printed.records.clear()
    proof = tiedquiet.check(by_peft(base))
    assert {finding.verdict for finding in proof.findings} == {Verdict.MISSING}
    (line,) = printed.loud
    assert "missing, 1 of 4 tensors of the adapter is not in its files" in line
    assert line.endswith(": prefix_task_cols")
    rename(base.parent / "adapter", lambda name: f"module.{name}" if name == "prefix_task_rows" else name)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"no place for module\.prefix_task_rows"):
        by_peft(base)


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_a_trainer_gives_prompts_to_an_encoder(adapter: str, base: Path, tmp_path: Path) -> None:
    """With a head beside them. The best model's, of another name than `default`, it does not find."""
    model = trained(base, "computed", adapter)
    run = Trainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[]))
    run.state.best_model_checkpoint = str(base.parent / "adapter")
    with torch.no_grad():
        model.prompt_encoder[adapter].embedding.weight.zero_()
        model.base_model.score.modules_to_save[adapter].weight.zero_()
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread, prompt_embeddings of the adapter"):
        run._load_best_model() if adapter == "mine" else run._load_from_checkpoint(str(base.parent / "adapter"))
    assert not tiedquiet.check(model).ok
