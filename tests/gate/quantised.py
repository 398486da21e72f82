"""Tiny real checkpoints in quantised form: written by the packages themselves, or as the format's description says."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TorchAoConfig,
)

from tests.checkpoints import state_of

Make = Callable[[str], Path]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
BLOCK = 32  # rows and columns of a float8 block


def plain(folder: Path, model: Any = None) -> Path:
    """A checkpoint in bfloat16, of a Llama if nothing else is given."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if model is None else model
    state_of(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def configured(package: str, **more: Any) -> Any:
    """The configuration with which transformers quantises by a package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(package)
        if package == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
        return BitsAndBytesConfig(**more)


def _by(package: str, **more: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        config = configured(package, **more)
        source = plain(folder / "plain")
        model = LlamaForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu", dtype="auto")
        model.save_pretrained(folder)

    return make


def _compressed(scheme: str) -> Callable[[Path], None]:
    """Codes of eight bits and one scale a row, or of four bits, packed, and one scale for 32 of a row."""

    def make(folder: Path) -> None:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            apply_quantization_config,
            preset_name_to_scheme,
        )

        model = LlamaForCausalLM.from_pretrained(plain(folder / "plain"))
        group = preset_name_to_scheme(scheme, ["Linear"])
        if group.weights.group_size:
            group.weights.group_size = 32
        apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]))
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                groups = module.weight.reshape(*module.weight_scale.shape, -1).abs().amax(-1)
                module.weight_scale.data = (groups / (2 ** (group.weights.num_bits - 1) - 1)).to(torch.bfloat16)
                module.quantization_status = QuantizationStatus.FROZEN
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

    return make


def _add_config(folder: Path, **quantisation: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


def _float8(folder: Path, model: Any = None) -> None:
    """Float8 codes and one scale for each block, as DeepSeek's and Qwen's files have them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(plain(folder, model) / "model.safetensors").items():
        if "_proj" in name:
            rows, columns = (size // BLOCK for size in weight.shape)
            blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = blocks / scale[:, None, :, None]
            tensors[name] = codes.reshape(weight.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _add_config(folder, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], modules_to_not_convert=["lm_head"])


def _float8_experts(folder: Path) -> None:
    more = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 16}
    _float8(folder, Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **more)))


def _float4(folder: Path) -> None:
    """Blocks of 32 codes of four bits and one exponent each, as gpt-oss's files have them."""
    more = {"intermediate_size": 64, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    more |= {"layer_types": ["full_attention"]}  # type: ignore[dict-item]
    plain(folder, GptOssForCausalLM(GptOssConfig(**{**SIZES, **more})))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, (experts, columns, rows // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _add_config(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])


def _four_bits(method: str, **more: Any) -> Callable[[Path], None]:
    """Codes and zero points of four bits, eight to a number, and one scale for 32 of a row: what gptqmodel reads."""

    def make(folder: Path) -> None:
        pytest.importorskip("gptqmodel")
        pytest.importorskip("optimum")
        random, group, tensors = np.random.default_rng(0), 32, {}
        for name, weight in load_file(plain(folder) / "model.safetensors").items():
            if "_proj" not in name:
                tensors[name] = weight.half()
                continue
            rows, columns = weight.shape
            shape = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
            of = {"qweight": random.integers(-(2**31), 2**31, shape, np.int32)}
            zeros = random.integers(0, 15, (columns // group, rows // 8, 8)) << np.arange(0, 32, 4)
            of["qzeros"] = zeros.sum(-1).astype(np.uint32).view(np.int32)
            of["scales"] = random.uniform(0.001, 0.01, (columns // group, rows)).astype(np.float16)
            if method == "gptq":
                of["g_idx"] = (np.arange(columns) // group).astype(np.int32)
            tensors |= {name.replace("weight", part): torch.from_numpy(values) for part, values in of.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        _add_config(folder, quant_method=method, bits=4, group_size=group, **more)

    return make


class Gguf:
    """A GGUF file in the making: every matrix in the next of some types."""

    def __init__(self, folder: Path, arch: str, types: tuple[str, ...]) -> None:
        self.gguf = pytest.importorskip("gguf")
        folder.mkdir(exist_ok=True)
        self.writer = self.gguf.GGUFWriter(folder / "model.gguf", arch)
        self._types, self._random = types, np.random.default_rng(0)
        self._count = 0

    def about(self, **numbers: Any) -> None:
        for name, number in numbers.items():
            getattr(self.writer, f"add_{name}")(number)
        self.writer.add_token_list([f"t{i}" for i in range(64)])
        self.writer.add_tokenizer_model("llama")

    def add(self, name: str, *shape: int) -> None:
        values = self._random.standard_normal(shape, np.float32)
        if len(shape) == 1 or name.endswith(".conv"):
            return self.writer.add_tensor(f"{name}.weight", values)
        kind = getattr(self.gguf.GGMLQuantizationType, self._types[self._count % len(self._types)])
        self._count += 1
        try:
            codes = self.gguf.quants.quantize(values, kind)
        except NotImplementedError:  # the package reads this type, and does not write it; any finite numbers will do
            block, size = self.gguf.GGML_QUANT_SIZES[kind]
            codes = self._random.integers(0, 256, (shape[0], shape[1] // block * size), np.uint8) & 0x3B
        return self.writer.add_tensor(f"{name}.weight", codes, raw_dtype=kind)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def _gguf(*types: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = Gguf(folder, "llama", types)
        file.about(context_length=64, embedding_length=256, block_count=1, feed_forward_length=256, head_count=4, head_count_kv=2, vocab_size=64, rope_dimension_count=64, layer_norm_rms_eps=1e-5, name="x")  # fmt: skip
        file.add("token_embd", 64, 256)
        file.add("output", 64, 256)
        file.add("output_norm", 256)
        for name, rows in {"attn_q": 256, "attn_k": 128, "attn_v": 128, "attn_output": 256, "ffn_gate": 256, "ffn_up": 256, "ffn_down": 256}.items():  # fmt: skip
            file.add(f"blk.0.{name}", rows, 256)
        file.add("blk.0.attn_norm", 256)
        file.add("blk.0.ffn_norm", 256)
        file.close()

    return make


def _gguf_of_transformers(folder: Path) -> None:
    """Of a kind that transformers unpacks by itself, since 5.24."""
    file = Gguf(folder, "lfm2", ("Q4_K", "Q8_0"))
    file.about(context_length=64, embedding_length=256, block_count=2, feed_forward_length=256, head_count=4, head_count_kv=[0, 2], shortconv_l_cache=3, rope_freq_base=1e4, layer_norm_rms_eps=1e-5)  # fmt: skip
    file.add("token_embd", 64, 256)
    file.add("token_embd_norm", 256)
    file.add("blk.0.shortconv.in_proj", 768, 256)
    file.add("blk.0.shortconv.out_proj", 256, 256)
    file.add("blk.0.shortconv.conv", 256, 3)
    for name, rows in {"attn_q": 256, "attn_k": 128, "attn_v": 128, "attn_output": 256}.items():
        file.add(f"blk.1.{name}", rows, 256)
    file.add("blk.1.attn_q_norm", 64)
    file.add("blk.1.attn_k_norm", 64)
    for layer in range(2):
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            file.add(f"blk.{layer}.{name}", 256, 256)
        file.add(f"blk.{layer}.attn_norm", 256)
        file.add(f"blk.{layer}.ffn_norm", 256)
    file.close()


MAKERS: dict[str, Callable[[Path], None]] = {
    "bitsandbytes, 8 bits": _by("bitsandbytes", load_in_8bit=True),
    "bitsandbytes, 4 bits": _by("bitsandbytes", load_in_4bit=True),
    "bitsandbytes, 4 bits twice": _by(
        "bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "torchao": _by("torchao"),
    "compressed-tensors": _compressed("W8A8"),
    "compressed-tensors, 4 bits": _compressed("W4A16"),
    "fp8": _float8,
    "fp8 experts": _float8_experts,
    "mxfp4": _float4,
    "gptq": _four_bits("gptq", desc_act=False, sym=True, checkpoint_format="gptq"),
    "gptq of version 2": _four_bits("gptq", desc_act=True, sym=False, checkpoint_format="gptq_v2"),
    "awq": _four_bits("awq", zero_point=True, version="gemm", modules_to_not_convert=["lm_head"]),
    "gguf": _gguf("Q8_0", "Q4_0", "Q5_1"),
    "gguf, k": _gguf("Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "F16"),
    "gguf of transformers": _gguf_of_transformers,
}
