"""`tiedquiet.check(model, path)` of a model with an adapter that is not merged: each part by its own folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, MixtralForCausalLM

import tiedquiet
from tests.checkpoints import gpt2
from tests.gate.test_compare import mixtral
from tiedquiet import Verdict

peft = pytest.importorskip("peft")
LORA = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
OF_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"], "init_lora_weights": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path / "base")
    mixtral().save_pretrained(tmp_path / "experts")
    return tmp_path


def adapted(folder: Path, config: Any) -> Any:
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    model.save_pretrained(folder / "adapter")
    return model


def loud(proof: tiedquiet.Proof) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in proof.findings if finding.verdict is not Verdict.TIED}


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (lambda: peft.LoraConfig(**LORA), 2),
        (lambda: peft.LoraConfig(**LORA, use_dora=True), 3),
        (lambda: peft.LoraConfig(**LORA, modules_to_save=["ln_f"]), 4),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), 1),
    ],
    ids=["lora", "dora", "whole modules", "prompts"],
)
def test_both_folders(config: Callable[[], Any], total: int, folder: Path) -> None:
    model = adapted(folder, config())
    proof = tiedquiet.check(model, folder / "adapter")
    assert (proof.ok, proof.stored, proof.total) == (True, total, total)
    assert proof.model.endswith(", adapter default")
    proof = tiedquiet.check(model, folder / "base")
    assert (proof.ok, proof.stored, proof.total, proof.model) == (True, 16, 17, "GPT2LMHeadModel")


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # of an older peft's
def test_experts_that_transformers_merged(folder: Path) -> None:
    base = MixtralForCausalLM.from_pretrained(folder / "experts")
    model = peft.get_peft_model(base, peft.LoraConfig(**OF_EXPERTS))
    model.save_pretrained(folder / "adapter")
    assert tiedquiet.check(model, folder / "adapter").ok
    proof = tiedquiet.check(model, folder / "experts")
    assert (proof.ok, proof.stored) == (True, 21)


def test_what_changed_since(folder: Path) -> None:
    model = adapted(folder, peft.LoraConfig(**LORA))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] += 1
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    assert loud(tiedquiet.check(model, folder / "adapter")) == {name: Verdict.OVERWRITTEN}
    assert loud(tiedquiet.check(model, folder / "base")) == {}
    model.merge_adapter()
    weight = "transformer.h.0.attn.c_attn.weight"
    assert loud(tiedquiet.check(model, folder / "base")) == {weight: Verdict.OVERWRITTEN}


def test_a_file_that_has_other_names_or_types(folder: Path) -> None:
    model = adapted(folder, peft.LoraConfig(**LORA))
    path = folder / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    one, other = sorted(stored)
    save_file({one: stored[one].half(), "x.lora_B.weight": stored[other]}, path)
    proof = tiedquiet.check(model, folder / "adapter")
    assert loud(proof) == {"": Verdict.UNREAD, one: Verdict.OVERWRITTEN, other: Verdict.MISSING}
    assert proof.findings[0].why == "1 of 2 tensors of the files have no place in it: x.lora_B.weight"
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="adapter cannot be read: "):
        tiedquiet.check(model, folder / "adapter")


def test_two_adapters(folder: Path) -> None:
    model = adapted(folder, peft.LoraConfig(**LORA))
    model.add_adapter("second", peft.LoraConfig(**LORA))
    model.save_pretrained(folder / "adapter")
    assert tiedquiet.check(model, folder / "adapter").ok
    model.set_adapter("second")
    assert not tiedquiet.check(model, folder / "adapter").ok
    assert tiedquiet.check(model, folder / "adapter" / "second").model.endswith(", adapter second")
    assert tiedquiet.check(model, folder / "base").ok
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="the model has 2 adapters, default, second; activate one of them"):
        tiedquiet.check(model, folder / "adapter")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_of_a_model_of_diffusers(folder: Path) -> None:
    """They lie in the model itself."""
    pytest.importorskip("diffusers")
    from tests.gate.test_lora import stable_diffusion

    model, _ = stable_diffusion(folder)
    for name in ("first", "second"):
        model.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False), name)
    model.set_adapter("first")
    state = peft.get_peft_model_state_dict(model, adapter_name="first")
    (folder / "adapter").mkdir()
    save_file(
        {f"base_model.model.{name}": t for name, t in state.items()}, folder / "adapter" / "adapter_model.safetensors"
    )
    proof = tiedquiet.check(model, folder / "adapter")
    assert (proof.ok, proof.stored, proof.model) == (True, len(state), "UNet2DConditionModel, adapter first")
    assert tiedquiet.check(model, folder / "unet").ok


def test_a_model_without_one(folder: Path) -> None:
    model = adapted(folder, peft.LoraConfig(**LORA))
    configs = model.peft_config
    merged = model.merge_and_unload()
    merged.peft_config = configs  # as some releases leave it
    with pytest.raises(
        ValueError, match="holds an adapter, and the model has none; check the folder of its base model"
    ):
        tiedquiet.check(merged, folder / "adapter")
    merged.save_pretrained(folder / "merged")
    assert tiedquiet.check(merged, folder / "merged").ok
