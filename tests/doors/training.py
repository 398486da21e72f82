"""Tiny models that the Trainer trains and resumes, and what their checkpoints hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

import tiedquiet

ROOT = Path(__file__).parents[2]


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "bos_token_id": 1}


SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 2, "pad_token_id": 0}


TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}


TOKENS = torch.randint(3, 60, (16, 8), generator=torch.Generator().manual_seed(0))


EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}


EVALUATED |= {"save_strategy": "steps", "greater_is_better": True}


DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))


def llava() -> Any:
    tower = CLIPVisionConfig(**TOWER, image_size=16, patch_size=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=LlamaConfig(**SMALL), image_token_index=63)
    )


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))


def qwen3_moe() -> Any:
    how = {"moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **how))


# What each has of how many, and what a plain resume leaves as it was.
LOSSY: dict[Callable[[], Any], Callable[[str], bool]] = {
    llava: lambda key: True,
    mixtral: lambda key: ".mlp." in key,
    qwen3_moe: lambda key: ".mlp.experts." in key,
}


def trainer_of(model: Any, folder: Path, steps: int = 2, **how: Any) -> Trainer:
    arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "save_steps": 2, **how}
    given = TrainingArguments(output_dir=str(folder), max_steps=steps, **arguments)
    return Trainer(model, given, train_dataset=DATA, eval_dataset=DATA)


def resumed(build: Callable[[], Any], folder: Path, checkpoint: Path | None = None) -> Any:
    model = type(build()).from_pretrained(folder / "base")
    trainer_of(model, folder)._load_from_checkpoint(str(checkpoint or folder / "checkpoint-2"))
    return model


def state(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def right(build: Callable[[], Any], checkpoint: Path) -> dict[str, torch.Tensor]:
    with tiedquiet.enable("off"):
        return state(type(build()).from_pretrained(checkpoint))


def differing(model: Any, truth: dict[str, torch.Tensor]) -> set[str]:
    now = model.state_dict()
    assert now.keys() == truth.keys()
    return {key for key in truth if not torch.equal(now[key], truth[key])}
