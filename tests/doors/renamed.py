"""Checkpoints whose files have the tensors under other names."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    conversion_mapping,
)

import tiedquiet
from tests.checkpoints import state_of
from tiedquiet import Verdict

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2}


TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


BERT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


CLIP = {**BERT, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}


def qwen2(**how: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, **{"tie_word_embeddings": True, **how}))


def wav2vec2() -> Any:
    ears = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(**BERT, **ears, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    )


def with_old_weight_norm(key: str) -> str:
    """What a part of a normed weight was called before torch 2.0."""
    return key.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


def written(model: Any, folder: Path, change: Callable[[str], str] = str, **more: torch.Tensor) -> dict[str, Any]:
    """Save a model, its tensors under other names; returns what the file holds, under the names of the class."""
    state_of(model)  # random values: none is right by accident
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {change(key): value for key, value in tensors.items()} | more
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return {key: value.clone() for key, value in model.state_dict().items()}


def wrong(model: Any, truth: dict[str, torch.Tensor]) -> set[str]:
    now = model.state_dict()
    return {key for key in truth if now[key].shape != truth[key].shape or not torch.equal(now[key], truth[key])}


def stopped_and_repaired(kind: Any, folder: Path) -> Any:
    """What `repair` makes of a load that `strict` stops."""
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match="unread"):
        kind.from_pretrained(folder)
    with tiedquiet.enable("repair"):
        return kind.from_pretrained(folder)


def verdicts(model: Any) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in tiedquiet.check(model).findings}


def mapping_of(line: str) -> dict[str, str]:
    """The `key_mapping` that a line advises, as somebody would paste it."""
    return dict(ast.literal_eval(re.findall(r"key_mapping=(\{.*?\}) to \w+\.from_pretrained", line)[0]))


def register_as(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the call that a line advises, as somebody would paste it; the test's end undoes it."""
    get, register = conversion_mapping.get_checkpoint_conversion_mapping, "register_checkpoint_conversion_mapping"
    get("legacy")  # the cache is made at the first call
    for name in ("_checkpoint_conversion_mapping_cache", "USER_REGISTERED_MAPPINGS"):
        if hasattr(conversion_mapping, name):
            monkeypatch.setattr(conversion_mapping, name, getattr(conversion_mapping, name).copy())
    (call,) = re.findall(rf"call ({register}\(.*\)) of transformers\.conversion_mapping first", line)
    eval(call, {register: getattr(conversion_mapping, register), "get_checkpoint_conversion_mapping": get})


def llava() -> Any:
    tower = CLIPVisionConfig(**TOWER, image_size=16, patch_size=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=LlamaConfig(**SMALL), image_token_index=63)
    )
