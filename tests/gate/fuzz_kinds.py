"""More of what `tests.gate.fuzz` spoils: LoRA files, modules of sentence-transformers, GGUF, quantised ones,
variants, single files.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, GPT2Model
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from tests.checkpoints import gpt2
from tests.doors.test_from_pretrained import wan_pipeline
from tests.gate import originals
from tests.gate.quantised import MAKERS

Change = Callable[[Random, Any], Any]
PATTERNS = (
    "(a+)+b",
    "([a-z0-9_.]+)+!",
    "(.*.*.*.*)*x",
    "to_q",
    ".*",
    "[",
    "(?P<",
    "re:(\\\\w+.?)+$",
    "re:.*",
    "\\\\",
    "(" * 200,
)


class Kind(NamedTuple):
    """A sound folder, what `check` is given, and what is spoilt of it beyond the common."""

    folder: Path
    arguments: Callable[[Path], list[str]] = lambda folder: [str(folder)]
    spoil: Callable[[Random, Path, Change], None] | None = None


def make(top: Path) -> list[Kind]:
    """The sound folders, as far as the packages for them are installed."""
    top.mkdir()
    found = [_sentences(top / "sentences"), *_variants(top)]
    for kind in MAKERS:
        with suppress(pytest.skip.Exception):
            folder = top / kind.replace(" ", "_").replace(",", "")
            folder.mkdir()
            MAKERS[kind](folder)
            found.append(Kind(folder, spoil=None if "gguf" in kind else _change_quantisation))
    GPT2LMHeadModel(gpt2()).save_pretrained(top / "any_method")
    found.append(Kind(top / "any_method", spoil=_any_method))
    with suppress(ImportError):
        found.append(_lora(top / "lora"))
    return found


def make_single(top: Path) -> list[Kind]:
    """Sound single files, each in a folder `weights` next to that of its config."""
    import diffusers

    models = originals.sd_pipeline(top / "sd" / "config")
    tensors = originals.stable_diffusion(*models)
    wan_pipeline(top / "wan" / "whole")
    (top / "wan" / "whole" / "transformer").rename(top / "wan" / "config")
    shutil.rmtree(top / "wan" / "whole")
    wan = originals.wan(diffusers.WanTransformer3DModel.from_pretrained(top / "wan" / "config"))
    (top / "wan" / "config" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copytree(top / "wan", top / "pickle")
    for name in ("wan", "sd", "pickle"):
        (top / name / "weights").mkdir()
    save_file(wan, top / "wan" / "weights" / "x.safetensors")
    save_file(tensors, top / "sd" / "weights" / "x.safetensors")
    torch.save({"state_dict": wan}, top / "pickle" / "weights" / "x.ckpt")

    def given(folder: Path) -> list[str]:
        return [str(next(folder.glob("weights/*"), folder)), "--config", str(folder / "config")]

    return [Kind(folder, given) for folder in sorted(top.iterdir())]


def _sentences(folder: Path) -> Kind:
    GPT2Model(gpt2()).save_pretrained(folder / "0_Transformer")
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    configs: dict[str, dict[str, Any]] = {
        "1_Pooling": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
        "2_Dense": {"in_features": 8, "out_features": 4, "bias": True, "activation_function": "torch.nn.Tanh"},
        "3_LayerNorm": {"dimension": 4},
        "4_Normalize": {},
    }
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    for number, (name, config) in enumerate(configs.items(), 1):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        kind = f"sentence_transformers.models.{name.partition('_')[2]}"
        modules.append({"idx": number, "name": str(number), "path": name, "type": kind})
    save_file(
        {"linear.weight": torch.ones(4, 8), "linear.bias": torch.ones(4)}, folder / "2_Dense" / "model.safetensors"
    )
    save_file({"norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}, folder / "3_LayerNorm" / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(modules))
    return Kind(folder)


def _variants(top: Path) -> list[Kind]:
    def given(folder: Path) -> list[str]:
        return [str(folder), "--variant", "fp16"]

    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(top / "variant", variant="fp16", max_shard_size="8KB")
    model.save_pretrained(top / "variant_pipe" / "model", variant="fp16", max_shard_size="8KB")
    index = {"_class_name": "P", "model": ["transformers", "GPT2LMHeadModel"]}
    (top / "variant_pipe" / "model_index.json").write_text(json.dumps(index))
    return [Kind(top / "variant", given), Kind(top / "variant_pipe", given)]


def _change_quantisation(random: Random, folder: Path, changed: Change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    own = changed(random, config.get("quantization_config"))
    if random.random() < 0.2 and isinstance(own, dict):
        key = random.choice(("ignore", "modules_to_not_convert", "llm_int8_skip_modules", "dynamic", "x"))
        own[key] = random.choice(([random.choice(PATTERNS)], random.choice(PATTERNS), {random.choice(PATTERNS): {}}))
    path.write_text(json.dumps({**config, "quantization_config": own}), encoding="utf-8", errors="surrogatepass")


def _any_method(random: Random, folder: Path, changed: Change) -> None:
    """A quantization_config of any method that transformers knows, whether its package is installed or not."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    own: Any = {"quant_method": random.choice(sorted(map(str, AUTO_QUANTIZATION_CONFIG_MAPPING)))}
    with suppress(Exception):
        own = {**AUTO_QUANTIZATION_CONFIG_MAPPING[own["quant_method"]]().to_dict(), **own}
        own = json.loads(json.dumps(own, default=str))
    for _ in range(random.randrange(3)):
        own = changed(random, own)
    place = random.choice(("quantization_config", "compression_config"))
    path.write_text(json.dumps({**config, place: own}), encoding="utf-8", errors="surrogatepass")


def _lora(folder: Path) -> Kind:
    import diffusers
    import peft

    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "ffn_dim": 8}
    model = diffusers.WanTransformer3DModel(**sizes, out_channels=4, text_dim=8, freq_dim=8)
    model.save_pretrained(folder / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    model.add_adapter(config)
    tensors = {f"transformer.{k}": t.contiguous() for k, t in peft.get_peft_model_state_dict(model).items()}
    about = {f"transformer.{key}": value for key, value in config.to_dict().items()}
    about = {key: sorted(value) if isinstance(value, set) else value for key, value in about.items()}
    save_file(tensors, folder / "some.safetensors", {"lora_adapter_metadata": json.dumps(about, default=str)})
    return Kind(folder, lambda folder: [str(folder), "--lora", str(folder / "some.safetensors")], _change_metadata)


def _change_metadata(random: Random, folder: Path, changed: Change) -> None:
    path = folder / "some.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {})["lora_adapter_metadata"])
    if random.random() < 0.5:
        key = random.choice(("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"))
        pattern = random.choice(PATTERNS)
        about[f"transformer.{key}"] = random.choice(
            (pattern, [pattern], {pattern: random.choice((1, 2, -1, 1e9, "x"))})
        )
    else:
        about = changed(random, about)
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(about)})
