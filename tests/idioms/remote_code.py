"""Rotary tables, masks and heads as well-known files of remote code have them."""

import math
from typing import Any

import torch
from torch import nn

from tests.idioms.initialisers import EverythingThroughData
from tests.idioms.tiny import Part, Tiny, idiom


def rotary(width: int, base: float = 10000.0) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


class Rotary(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.inv_freq.repeat_interleave(2)
        return x * angles.cos().to(x.dtype)


@idiom()
@idiom("InternLM2 in bfloat16", dtype=torch.bfloat16)
class InternLM2(Tiny):
    """InternLM 2 and MiniCPM: the rotary table is computed in `__init__`."""

    def add(self, config: Any) -> None:
        self.rotary = Rotary(config.hidden_size)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.rotary(x)


class CachedRotary(nn.Module):
    def __init__(self, width: int, length: int = 16) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary(width), persistent=False)
        angles = torch.outer(torch.arange(length).float(), self.inv_freq).repeat(1, 2)
        self.register_buffer("cos_cached", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin_cached", angles.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        return x * self.cos_cached[:length].to(x.dtype) + x.flip(-1) * self.sin_cached[:length].to(x.dtype)


@idiom()
class StableLM(Tiny):
    """StableLM-epoch and Ling: sines and cosines cached in `__init__`."""

    def add(self, config: Any) -> None:
        self.rotary = CachedRotary(config.hidden_size)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.rotary(x)


class CausalAttention(nn.Module):
    def __init__(self, width: int, length: int = 16) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        mask = torch.tril(torch.ones((length, length), dtype=torch.bool))
        self.register_buffer("bias", mask[None], persistent=False)
        self.register_buffer("masked_bias", torch.tensor(-1e4), persistent=False)
        self.rotary = CachedRotary(width, length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.c_attn(x).chunk(3, dim=-1)
        scores = self.rotary(query) @ self.rotary(key).transpose(1, 2)
        allowed = self.bias[:, : x.shape[1], : x.shape[1]]
        scores = torch.where(allowed, scores, self.masked_bias.to(scores.dtype))
        return self.c_proj(scores.softmax(-1) @ value)


@idiom()
class CodeShell(Tiny):
    """CodeShell: causal mask and rotary cache computed in `__init__`."""

    def add(self, config: Any) -> None:
        self.attention = CausalAttention(config.hidden_size)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x)


@idiom()
class Qwen1(CodeShell):
    """Qwen 1: buffers as CodeShell, everything through `.data`, and a projection that is rescaled by its name."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, (nn.Embedding, Part)):
            module.weight.data.normal_(mean=0.0, std=0.02)
        for name, p in module.named_parameters():
            if name == "c_proj.weight":
                p.data.normal_(mean=0.0, std=(0.02 / math.sqrt(2 * 12)))


@idiom()
class RescalesByName(CodeShell):
    """GPT-2 and its descendants: the model rescales what one of its parts holds."""

    def add(self, config: Any) -> None:
        super().add(config)
        self.register_buffer("cache", torch.empty(0), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            for name, p in self.named_parameters():
                if name.endswith("c_proj.weight"):
                    p.data.normal_(mean=0.0, std=0.001)


@idiom()
class MixFormer(CodeShell):
    """phi-1: MixFormer's blocks in a sequence, which initialise themselves through `.data`."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()


class NormHead(nn.Module):
    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((vocab, width)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


@idiom(config={"padding_idx": 0})
class Baichuan2(EverythingThroughData):
    """Baichuan 2: a head that normalises itself, slopes and future mask from `__init__`."""

    def add(self, config: Any) -> None:
        self.head = NormHead(config.hidden_size, config.vocab_size)
        self.register_buffer("future_mask", torch.triu(torch.full((16, 16), float("-inf")), 1), persistent=False)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        return (x @ x.transpose(1, 2) + self.future_mask[:length, :length].to(x.dtype)).softmax(-1) @ x


@idiom()
class BufferAndWriteInOneModule(Tiny):
    """Both at once: the weight is drawn anew and the mask beside it never computed."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Part):
            module.weight.data.normal_()


@idiom()
class ManyTypes(Tiny):
    """Tables of every kind that files compute in `__init__`."""

    def add(self, config: Any) -> None:
        steps = torch.arange(1, 13)
        # Names without digits: transformers and tiedquiet fold those that differ in a number alone.
        types = {"long": torch.int64, "int": torch.int32, "char": torch.int8, "byte": torch.uint8}
        types |= {"half": torch.float16, "brain": torch.bfloat16, "double": torch.float64}
        for name, dtype in types.items():
            self.register_buffer(f"table_{name}", steps.to(dtype), persistent=False)
        self.register_buffer("position_ids", steps.expand(1, -1), persistent=False)
        self.register_buffer("even", steps % 2 == 0, persistent=False)
        self.register_buffer("freqs_cis", torch.polar(torch.ones(12), steps.float()), persistent=False)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum(
            table.abs().double().mean() for table in self.buffers(recurse=False) if table.dtype != torch.bool
        )


@idiom(missing=("attention.masked_bias",))
class MaskThatTheFileLacks(CodeShell):
    """GPT-2 files from before a mask was stored: a buffer in the state dict that the checkpoint does not have."""

    def add(self, config: Any) -> None:
        super().add(config)
        self.attention.register_buffer("masked_bias", torch.tensor(-1e4), persistent=True)
