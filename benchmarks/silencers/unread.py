"""Checkpoints whose tensors are there, and are not read as they are meant: `never_read` of situations.py.

Models of one layer, with values of their own for every tensor, so that none is right by accident.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from benchmarks.silencers.situations import Made, Situation
from tests.checkpoints import state_of

FILE = "model.safetensors"
ADAPTER = "default"
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "bos_token_id": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 2, "tie_word_embeddings": False}
TOKENS = torch.randint(3, 60, (8, 8), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def write(model: Any, folder: Path, change: Callable[[str], str] = str) -> dict[str, Any]:
    """Save a model, its tensors under other names; returns what it holds, under its own."""
    state = state_of(model)
    model.save_pretrained(folder)
    tensors = {change(key): value for key, value in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, {"format": "pt"})
    return state


def with_info(model: Any, output_loading_info: bool) -> Any:
    """What neither a `Trainer` nor peft hands out is empty."""
    return (model, {}) if output_loading_info else model


# The Trainer


def trainer_of(model: Any, folder: Path, **how: Any) -> Trainer:
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), max_steps=2, save_steps=1, learning_rate=1e-2, **quiet, **how)
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA)


def resume(folder: Path) -> Made:
    """LLaVA, resumed where its training had ended: not one step follows."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SMALL), image_token_index=63)
    write(LlavaForConditionalGeneration(config), folder / "base")
    trainer_of(LlavaForConditionalGeneration.from_pretrained(folder / "base"), folder).train()
    checkpoint = folder / "checkpoint-2"

    def load(output_loading_info: bool = False) -> Any:
        model = LlavaForConditionalGeneration.from_pretrained(folder / "base")
        trainer_of(model, folder).train(resume_from_checkpoint=str(checkpoint))
        return with_info(model, output_loading_info)

    return load, LlavaForConditionalGeneration.from_pretrained(checkpoint).state_dict()


def best_model(folder: Path) -> Made:
    """Mixtral, whose first step counts as its best one: `load_best_model_at_end` has to go back to it."""
    how = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    write(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)), folder / "base")

    def load(output_loading_info: bool = False) -> Any:
        model = MixtralForCausalLM.from_pretrained(folder / "base")
        trainer_of(model, folder, load_best_model_at_end=True, **how).train()
        return with_info(model, output_loading_info)

    load()
    return load, MixtralForCausalLM.from_pretrained(folder / "checkpoint-1").state_dict()


# `from_pretrained`


def prefix(folder: Path) -> Made:
    stored = write(llama(), folder, lambda key: f"module.{key}")
    return lambda **more: LlamaForCausalLM.from_pretrained(folder, **more), stored


class MyTextModel(CLIPTextModel):
    """A user's subclass, for which some releases rename nothing."""


def clip() -> CLIPTextConfig:
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return CLIPTextConfig(**size, num_attention_heads=2, max_position_embeddings=8, bos_token_id=1, eos_token_id=2)


CLIP_KEY = next(key for key in CLIPTextModel(clip()).state_dict() if key.endswith("token_embedding.weight"))


def subclass(folder: Path) -> Made:
    """A file of CLIP's text model as they are published."""
    stored = write(CLIPTextModel(clip()), folder, lambda key: f"text_model.{key.removeprefix('text_model.')}")
    return lambda **more: MyTextModel.from_pretrained(folder, **more), stored


CODED = "model.layers.0.mlp.gate_proj.weight"


def codes(folder: Path) -> Made:
    stored = write(llama(), folder)
    tensors = load_file(folder / FILE)
    tensors[f"{CODED}_scale"] = tensors[CODED].abs().max() / 448
    tensors[CODED] = (tensors[CODED] / tensors[f"{CODED}_scale"]).to(torch.float8_e4m3fn)
    save_file(tensors, folder / FILE, {"format": "pt"})
    return lambda **more: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **more), stored


NORM = "model.norm.weight"


def two_shards(folder: Path) -> Made:
    stored = write(llama(), folder)
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    first, *rest = sorted(tensors)
    save_file({key: tensors[key] for key in rest}, folder / names[0], {"format": "pt"})
    save_file({first: tensors[first], NORM: tensors[NORM] + 1}, folder / names[1], {"format": "pt"})
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(rest, names[0]), first: names[1]}}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    return lambda **more: LlamaForCausalLM.from_pretrained(folder, **more), stored


# Adapters


def adapter(folder: Path) -> Made:
    """A LoRA adapter of a model whose layers have another name."""
    from peft import LoraConfig, PeftModel, get_peft_model

    write(llama(), folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    state_of(model)
    stored = model.get_base_model().state_dict()
    model.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = {key.replace("model.layers", "decoder.layers"): value for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})

    def load(output_loading_info: bool = False) -> Any:
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        loaded = PeftModel.from_pretrained(base, folder / "adapter").get_base_model()
        return with_info(loaded, output_loading_info)

    return load, {key: value.clone() for key, value in stored.items()}


# All of them


def never_read() -> dict[str, Situation]:
    """What the files hold, and nothing reads as it is meant."""
    head, experts = "lm_head.weight", "model.layers.0.mlp.experts.down_proj"
    lora = f"model.layers.0.self_attn.q_proj.lora_B.{ADAPTER}.weight"
    return {
        "resume, converted class": Situation(resume, {head: None}, head),
        "best model, converted class": Situation(best_model, {experts: None}, experts),
        "unmapped prefix": Situation(prefix, {head: None}, head),
        "subclass without renaming": Situation(subclass, {CLIP_KEY: None}, CLIP_KEY),
        "adapter matches nothing": Situation(adapter, {lora: None}, lora),
        "codes without scale": Situation(codes, {CODED: None}, CODED),
        "one name in two shards": Situation(two_shards, {NORM: None}, NORM, True),
    }
