"""What `check` says of a Trainer's checkpoint: how much of it the installed Trainer would read on resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from tests.checkpoints import gpt2
from tests.gate.test_check import check
from tests.gate.test_compare import mixtral


def trained(model: Any, folder: Path) -> Path:
    """The checkpoint of one step of a real Trainer."""
    data = [{"input_ids": torch.arange(4, 10), "labels": torch.arange(4, 10)}] * 2
    how = {"max_steps": 1, "save_steps": 1, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    Trainer(model, TrainingArguments(str(folder), use_cpu=True, **how), train_dataset=data).train()
    return folder / "checkpoint-1"


def read_by_load_state_dict(cls: Any, folder: Path) -> tuple[int, int]:
    """What the Trainer does, done here: how many of the file's tensors are read, and how many there are."""
    stored = load_file(folder / "model.safetensors")
    result = cls(AutoConfig.from_pretrained(folder)).load_state_dict(stored, strict=False)
    return len(stored) - len(result.unexpected_keys), len(stored)


def test_a_checkpoint_that_the_trainer_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(GPT2LMHeadModel(gpt2()), tmp_path)
    read, stored = read_by_load_state_dict(GPT2LMHeadModel, folder)
    assert read == stored
    capsys.readouterr()
    for options in ([], ["--resume"]):
        assert check(folder, *options) == 0
        assert f"  Trainer would read {read} of {stored} tensors on resume\n" in capsys.readouterr().out


def test_a_checkpoint_of_which_the_trainer_loses_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(mixtral(), tmp_path)
    read, stored = read_by_load_state_dict(MixtralForCausalLM, folder)
    assert read < stored
    said = f"Trainer would read {read} of {stored} tensors on resume; TIEDQUIET=repair reads all"
    capsys.readouterr()
    assert check(folder) == 0
    assert f"  {said}\n" in capsys.readouterr().out
    assert check(folder, "--resume", "--json") == 1
    (component,) = json.loads(capsys.readouterr().out)["components"]
    assert [(f["verdict"], f["why"]) for f in component["findings"]] == [("unread", said)]
    assert component["held"] == component["tensors"]
    assert check(folder, "--resume") == 1
    assert "1 unread" in capsys.readouterr().out


def test_of_an_adapter_peft_reads_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    folder = trained(peft.get_peft_model(base, config), tmp_path / "run")
    capsys.readouterr()
    check(folder)
    assert "Trainer" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["model", "pipeline", "gguf"])
def test_resume_is_asked_of_a_trainer_s_checkpoint(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "pipeline":
        (tmp_path / "model_index.json").write_text("{}")
    elif kind == "gguf":
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
    else:
        GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    capsys.readouterr()
    assert check(tmp_path, "--resume") == 2
    says = f"tiedquiet: {tmp_path} has no trainer_state.json, so it is not a Trainer's checkpoint; leave out --resume\n"
    assert capsys.readouterr().err == says
