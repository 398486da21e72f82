"""`python -m tests.idioms [RELEASE ...]`: how public modelling files initialise, compute and tie, and what comes of it.

Each idiom is a class of ours, written after what is met in modelling files on the Hub, and says how its checkpoint is
made. What a load of it loses is never written here: `truth` reads it from the bytes of the file, from the memory of
the loaded model, and from a model of the class that was built on the CPU without any loading.

The command prints a table of idioms and releases: what transformers printed, what tiedquiet says, what is true.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init

import tiedquiet
from tests.checkpoints import printing
from tiedquiet import Proof, Verdict

RELEASES = ("5.0.0", "5.2.0", "5.3.0", "5.13.1", "5.24.0")


class IdiomConfig(PretrainedConfig):
    model_type = "idiom"

    def __init__(
        self,
        vocab_size: int = 24,
        hidden_size: int = 8,
        padding_idx: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **rest: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.padding_idx = padding_idx
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **rest)


@dataclass(frozen=True)
class Idiom:
    """A class and how its checkpoint is made; all keys are stored but the missing ones.

    Attributes:
        cls: the class to save and to load.
        missing: keys that the file does not have.
        config: changes to the configuration.
        filled: stored keys whose values are one constant.
        different: stored keys of aliases that get values of their own all the same.
        architectures: what the file says it is; the class itself if None.
        dtype: what it is loaded as; the file is float32.
        blind: it writes without torch, where no watch can see it.
    """

    cls: type["Tiny"]
    missing: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    filled: dict[str, float] = field(default_factory=dict)
    different: tuple[str, ...] = ()
    architectures: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None
    blind: bool = False

    def save(self, folder: Path) -> dict[str, torch.Tensor]:
        """Write the checkpoint; returns what the file holds."""
        model = self.build()
        generator = torch.Generator().manual_seed(7)
        values: dict[int, torch.Tensor] = {}
        file = {}
        for key, tensor in model.state_dict(keep_vars=True).items():
            if key in self.missing:
                continue
            drawn = torch.randn(tensor.shape, generator=generator) * 0.3 + 0.1
            value = drawn.to(tensor.dtype) if tensor.is_floating_point() else tensor.detach().clone()
            value = value if key in self.different else values.setdefault(tensor.data_ptr(), value)
            file[key] = torch.full_like(value, self.filled[key]) if key in self.filled else value.clone()
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = list(self.architectures or (self.cls.__name__,))
        # Releases differ in which of their defaults they write down.
        config["tie_word_embeddings"] = self.config.get("tie_word_embeddings", False)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(file, folder / "model.safetensors", {"format": "pt"})
        return load_file(folder / "model.safetensors")

    def build(self) -> "Tiny":
        """The class as it is without any loading: parameters drawn, buffers right."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype or default)
        try:
            return self.cls(IdiomConfig(**self.config)).eval()
        finally:
            torch.set_default_dtype(default)

    def load(self, folder: Path) -> tuple["Tiny", set[str]]:
        """`from_pretrained`; returns the model and what is reported missing."""
        torch.manual_seed(11)
        model, info = self.cls.from_pretrained(folder, output_loading_info=True, dtype=self.dtype or torch.float32)
        return model, set(info["missing_keys"])


IDIOMS: dict[str, Idiom] = {}
CONFIRMED = {Verdict.TIED, Verdict.COPIED}
LOUD = {Verdict.UNTIED, Verdict.OVERWRITTEN, Verdict.UNWRITTEN, Verdict.AMBIGUOUS}


def idiom(name: str = "", **how: Any) -> Callable[[type[Any]], type[Any]]:
    def register(cls: type[Any]) -> type[Any]:
        assert (name or cls.__name__) not in IDIOMS
        IDIOMS[name or cls.__name__] = Idiom(cls, **how)
        return cls

    return register


HEADLESS = {"missing": ("head.weight",), "config": {"tie_word_embeddings": True}}


class Part(nn.Module):
    """A weight beside a non-persistent buffer: no release takes such a module for loaded in full."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, config.hidden_size))
        self.register_buffer("mask", torch.empty(config.hidden_size), persistent=False)
        self.reset()

    def reset(self) -> None:
        init.copy_(self.mask, torch.arange(self.mask.shape[0], device=self.mask.device) % 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.mask.to(x.dtype)


class ScaledEmbedding(nn.Embedding):
    """Gemma 3 and BART: an embedding that owns a buffer."""

    def __init__(self, *sizes: int, padding_idx: int | None = None) -> None:
        super().__init__(*sizes, padding_idx)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale.to(self.weight.dtype)


@idiom("good citizen")
@idiom("good citizen in bfloat16", dtype=torch.bfloat16)
@idiom("good citizen, lin.bias missing", missing=("lin.bias",))
@idiom("good citizen, head missing and not to be tied", missing=("head.weight",), architectures=("TinyModel",))
class Tiny(PreTrainedModel):
    """Written right for version 5; the idioms below change one thing each."""

    config_class = IdiomConfig
    base_model_prefix = "model"
    embedding: type[nn.Embedding] = nn.Embedding

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = self.embedding(config.vocab_size, config.hidden_size, padding_idx=config.padding_idx)
        self.lin = nn.Linear(config.hidden_size, config.hidden_size)
        self.part = Part(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.add(config)
        self.post_init()

    def add(self, config: Any) -> None:
        """What a subclass has besides."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, Part)):
            init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, Part):
            module.reset()
        if isinstance(module, ScaledEmbedding):
            init.constant_(module.scale, 2.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """What a subclass computes besides."""
        return x

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.part(self.lin(self.embed(ids)))))


# Initialisers


@idiom()
@idiom("EverythingThroughData in bfloat16", dtype=torch.bfloat16)
@idiom("EverythingThroughData, lin.bias missing", missing=("lin.bias",))
class EverythingThroughData(Tiny):
    """GPT-NeoX and nearly every file of version 4."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, Part):
            module.weight.data.normal_(mean=0.0, std=0.02)
            module.reset()


@idiom()
@idiom("BesideABuffer in bfloat16", dtype=torch.bfloat16)
class BesideABuffer(Tiny):
    """A module that owns a weight and a causal mask: the smallest loss that no release prevents."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data.normal_()


@idiom(missing=("lin.bias",))
class MissingSibling(Tiny):
    """Adapters and heads with a bias of their own: the weight goes with the bias that the file lacks."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.uniform_(-0.1, 0.1)
            if module.bias is not None:
                module.bias.data.zero_()
        else:
            super()._init_weights(module)


@idiom()
class ZeroesReservedRows(Tiny):
    """Reserved tokens start at zero: a slice of an embedding."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data[-3:].zero_()


@idiom(config={"padding_idx": 1})
class ZeroesAnotherRow(Tiny):
    """One row, and not the padding row."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data[2].zero_()


@idiom(config={"padding_idx": 1})
@idiom("ZeroesThePaddingRow in bfloat16", config={"padding_idx": 1}, dtype=torch.bfloat16)
@idiom("ZeroesThePaddingRow, tied", config={"padding_idx": 1, "tie_word_embeddings": True}, missing=("head.weight",))
class ZeroesThePaddingRow(Tiny):
    """As transformers does for Kosmos 2, up to 5.20.2; this is a user's class, and the file has other values there."""

    embedding = ScaledEmbedding
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx].zero_()


@idiom(config={"pad_token_id": 3})
class ZeroesThePadTokenOfTheConfig(Tiny):
    """The row of a token that only the config calls padding."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data[self.config.pad_token_id].zero_()


@idiom(config={"padding_idx": 1})
class DrawsAndZeroesThePaddingRow(Tiny):
    """BERT of version 4: the padding row is zeroed again, and the rest is drawn anew."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)
            module.weight.data[module.padding_idx].zero_()


@idiom()
class Halves(Tiny):
    """BEiT: scaled by depth where it lies."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data.div_(math.sqrt(2.0))


@idiom()
class InPlaceUnderNoGrad(Tiny):
    """Files that come from plain PyTorch."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            with torch.no_grad():
                module.weight.copy_(torch.eye(module.weight.shape[0]))


@idiom()
class SwapsData(Tiny):
    """Mamba and others: `.data` becomes another tensor."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data = torch.randn_like(module.weight)


@idiom()
class ReplacesTheParameter(Tiny):
    """The parameter itself becomes another."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight = nn.Parameter(torch.eye(module.weight.shape[0]))


@idiom()
class SwapsDataAndReplaces(Tiny):
    """Both, one after the other."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data = torch.randn_like(module.weight)
            module.weight = nn.Parameter(module.weight.data)


@idiom()
class TorchInit(Tiny):
    """`torch.nn.init` on the parameter: transformers guards it, and nothing is lost."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Part, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)


@idiom()
class TorchInitOnData(Tiny):
    """`torch.nn.init` on `.data`: the guard looks for a flag that only the parameter has."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            nn.init.xavier_uniform_(module.weight.data)


@idiom()
class TorchInitOnSlices(Tiny):
    """Fused projections, initialised part by part."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            nn.init.orthogonal_(module.weight[:4])
            nn.init.zeros_(module.weight[4:])


def trunc_normal(tensor: torch.Tensor, std: float = 0.02) -> torch.Tensor:
    with torch.no_grad():
        tensor.uniform_(-0.9, 0.9).erfinv_().mul_(std * math.sqrt(2.0))
    return tensor


@idiom()
class TruncatedByHand(Tiny):
    """timm's `trunc_normal_`, copied into the file: a helper writes."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            trunc_normal(module.weight)


@idiom()
class WritesOut(Tiny):
    """`out=` has no underscore."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            torch.eye(module.weight.shape[0], out=module.weight.data)


@idiom()
@idiom("WritesMany, one of them missing", missing=("lin.weight",))
class WritesMany(Tiny):
    """One operation over a list of parameters."""

    def add(self, config: Any) -> None:
        self.register_buffer("cache", torch.empty(0), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            torch._foreach_mul_([self.lin.weight.data, self.part.weight.data], 0.5)


@idiom()
class WritesItsDiagonal(Tiny):
    """Decay matrices and recurrent weights: a strided part of a transposed view."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data.t().diagonal().fill_(1.0)


@idiom(filled={"part.weight": 1.0})
class TheSameValuesAgain(Tiny):
    """A norm whose ones are ones again: written, and nothing lost."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            module.weight.data.fill_(1.0)


@idiom()
class WritesAndRestores(Tiny):
    """A probe of the layer that leaves it as it was."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part):
            kept = module.weight.detach().clone()
            module.weight.data.zero_()
            module.weight.data.copy_(kept)


@idiom()
class ResetsRunningStatistics(Tiny):
    """Vision and audio towers: `reset_running_stats` writes over stored buffers."""

    def add(self, config: Any) -> None:
        self.norm = nn.BatchNorm1d(config.hidden_size)
        self.norm.register_buffer("seen", torch.zeros(1), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.BatchNorm1d):
            init.zeros_(module.seen)
            module.reset_parameters()

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@idiom(missing=("gate",))
class DerivesFromWhatIsStored(Tiny):
    """Adapters that start from the weight they adapt: a missing parameter computed from a stored one."""

    def add(self, config: Any) -> None:
        self.gate = nn.Parameter(torch.zeros(config.hidden_size))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.gate.data.copy_(self.lin.weight.data.mean(dim=0))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate


@idiom()
class WritesThroughNumpy(Tiny):
    """JAX ports: no operation of torch writes, but one reaches for the memory."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part) and not module.weight.is_meta:
            module.weight.data.numpy()[:] = 0.0


@idiom(blind=True)
class WritesToAnAddress(Tiny):
    """Foreign kernels: nothing of torch is called at all, and no watch sees it."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part) and not module.weight.is_meta:
            ctypes.memset(module.weight.data_ptr(), 0, module.weight.nbytes)


# Buffers


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


@idiom()
class FilledInPart(Tiny):
    """Tables whose special rows are left to `__init__`."""

    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.arange(12.0).view(4, 3), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.table[1:].copy_(torch.arange(3.0, 12.0).view(3, 3))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table.sum()


@idiom()
class ComputesFromWhatNobodyWrote(FilledInPart):
    """Rotary tables that the initialiser makes of frequencies that only `__init__` computed."""

    def add(self, config: Any) -> None:
        self.register_buffer("inv", torch.arange(1.0, 4.0), persistent=False)
        for name in ("table", "sines", "turned"):
            self.register_buffer(name, torch.zeros(4, 3), persistent=False)
        self.fill()

    def fill(self) -> None:
        angles = torch.outer(torch.arange(4.0), self.inv)
        self.table.copy_(torch.cat([angles.cos()[:2], angles.cos()[2:]]))
        self.sines = angles.sin() * 2
        self.turned.zero_().add_(self.sines.flip(0)[torch.tensor([0, 2, 1, 3])])

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.fill()


@idiom()
class BufferThroughDlpack(FilledInPart):
    """Filled through another tensor of the same memory."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            torch.from_dlpack(self.table).copy_(torch.arange(12.0).view(4, 3))


@idiom()
class BufferByAThread(FilledInPart):
    """Filled by another thread, which torch does not count."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            thread = threading.Thread(target=lambda: self.table.data.copy_(torch.arange(12.0).view(4, 3)))
            thread.start()
            thread.join()


@idiom()
class ZerosThroughNumpy(FilledInPart):
    """Zeros where fresh memory is zero already."""

    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.zeros(1 << 20), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            self.table.numpy().fill(0)


class Merging(nn.Linear):
    """loralib's: what was trained beside a weight is added to it in evaluation."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.low = nn.Parameter(torch.zeros(size))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if not mode and not self.merged and not self.weight.is_meta:
            self.weight.data += torch.outer(self.low, self.low)
            self.merged = True
        return self


@idiom()
class MergesInEval(Tiny):
    """`from_pretrained` calls `eval()` last."""

    def add(self, config: Any) -> None:
        self.lin = Merging(config.hidden_size)


@idiom()
class WritesAfterReading(Tiny):
    """Overrides the function that reads, and writes once it has read."""

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._load_pretrained_model(model, *args, **kwargs)
        model.lin.weight.data.zero_()
        return result


@idiom()
class WritesBeforeTheReport(Tiny):
    """Overrides the function that finishes, and writes before it does."""

    @staticmethod
    def _finalize_model_loading(model: Any, *args: Any, **kwargs: Any) -> Any:
        model.lin.weight.data.zero_()
        return PreTrainedModel._finalize_model_loading(model, *args, **kwargs)

    @staticmethod
    def _finalize_load_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:  # 5.0.0
        model.lin.weight.data.zero_()
        return PreTrainedModel._finalize_load_state_dict(model, *args, **kwargs)


@idiom()
class WritesInItsOwnFromPretrained(Tiny):
    """Overrides `from_pretrained` itself."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        result = super().from_pretrained(*args, **kwargs)
        (result[0] if isinstance(result, tuple) else result).part.weight.data[3:].mul_(2)
        return result


@idiom()
class FilledInTwoSteps(FilledInPart):
    """Sines at even places, cosines at odd ones: in full, in two strided steps."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            right = torch.arange(12.0).view(4, 3)
            self.table[0::2].copy_(right[0::2])
            self.table.data[1::2] = right[1::2]


@idiom()
class FilledThroughATransposedView(FilledInPart):
    """Every place is written, through a view that is not contiguous."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table.t().copy_(torch.arange(12.0).view(4, 3).t())


@idiom()
class BufferAssigned(FilledInPart):
    """The initialiser computes the table and puts it in the buffer's place."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table = torch.arange(12.0).view(4, 3)


@idiom()
class BufferDataSwapped(FilledInPart):
    """The same through `.data`."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table.data = torch.arange(12.0).view(4, 3)


@idiom()
class BufferFromNumpy(FilledInPart):
    """T5X and JAX ports: the table is made by numpy and copied in."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.table.data.copy_(torch.from_numpy(torch.arange(12.0).view(4, 3).numpy()))


@idiom()
class BufferThroughNumpy(FilledInPart):
    """The same without an operation of torch."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self and not self.table.is_meta:
            self.table.data.numpy()[:] = torch.arange(12.0).view(4, 3).numpy()


@idiom()
class BufferRegisteredAgain(FilledInPart):
    """Llama of version 4: the cache is registered again whenever it is computed."""

    def _init_weights(self, module: nn.Module) -> None:
        Tiny._init_weights(self, module)
        if module is self:
            self.register_buffer("table", torch.arange(12.0).view(4, 3), persistent=False)


@idiom()
class OneTableTwoNames(Tiny):
    """Layers that share the rotary table of the first: transformers makes one of the two anew."""

    def add(self, config: Any) -> None:
        self.first, self.second = Rotary(config.hidden_size), Rotary(config.hidden_size)
        self.second.inv_freq = self.first.inv_freq

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Rotary):
            init.copy_(module.inv_freq, rotary(self.config.hidden_size))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


@idiom()
class NothingToFill(Tiny):
    """Caches that start empty, or not at all."""

    def add(self, config: Any) -> None:
        self.register_buffer("cache", torch.empty(0), persistent=False)
        self.register_buffer("later", None, persistent=False)
        self.register_buffer("prefix", torch.zeros(0, config.hidden_size), persistent=False)


@idiom(missing=("gate",))
class AParameterNobodyKnows(Tiny):
    """A bare parameter that is set in `__init__` and that no initialiser knows."""

    def add(self, config: Any) -> None:
        self.gate = nn.Parameter(torch.ones(config.hidden_size))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate


@idiom(missing=("gate",))
class AParameterInitialisedInPart(AParameterNobodyKnows):
    """Of a fused parameter one half is initialised."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.ones_(self.gate[:4])


# Ties


@idiom(**HEADLESS)
@idiom("Declares in bfloat16", **HEADLESS, dtype=torch.bfloat16)
@idiom("Declares, both ends stored", config={"tie_word_embeddings": True}, different=("head.weight",))
@idiom("Declares, neither end stored", missing=("head.weight", "embed.weight"), config={"tie_word_embeddings": True})
@idiom("Declares, stored under the target's name", missing=("embed.weight",), config={"tie_word_embeddings": True})
@idiom("Declares, the flag off", missing=("head.weight",))
@idiom("Declares, the flag off, a base model's file", missing=("head.weight",), architectures=("TinyModel",))
class Declares(Tiny):
    """Written right for version 5."""

    _tied_weights_keys: Any = {"head.weight": "embed.weight"}  # noqa: RUF012


class Overrides(Tiny):
    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = self.embed.weight


@idiom(**HEADLESS)
class DeclaresNone(Overrides):
    """Ties in `tie_weights`, and tells nobody: the commonest source of a false row."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class DeclaresEmpty(Overrides):
    """The same with an empty dict."""

    _tied_weights_keys: Any = {}  # noqa: RUF012


@idiom(missing=("head.weight",))
class DeclaresAList(Overrides):
    """The declaration of version 4, which 5 takes only while the flag is false."""

    _tied_weights_keys: Any = ["head.weight"]  # noqa: RUF012


@idiom(**HEADLESS)
class DeclaresByProperty(Tiny):
    """Composite models: the declaration is computed."""

    @property
    def _tied_weights_keys(self) -> Any:
        return {"head.weight": "embed.weight"}

    @_tied_weights_keys.setter
    def _tied_weights_keys(self, _: Any) -> None:
        pass


@idiom(**HEADLESS)
class AskedForByTheConfigAlone(Tiny):
    """`_tied_weights_keys = None`, the usual answer to the crash over a list: the head stays random."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class DoesNothing(Declares):
    """`tie_weights` is emptied because it crashed."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        pass


@idiom(**HEADLESS)
class TiesInInit(Tiny):
    """nanoGPT: tied in `__init__`, where version 5 has only placeholders."""

    def add(self, config: Any) -> None:
        self.embed.weight = self.head.weight


@idiom(missing=("twin.weight",))
class TwinOfInit(Tiny):
    """Two layers tied in `__init__`, declared by nobody."""

    def add(self, config: Any) -> None:
        self.twin = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.twin.weight = self.lin.weight

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.twin(x)


@idiom(**HEADLESS)
class TiesTheWrongWay(Tiny):
    """nanoGPT's order in `tie_weights`: what was loaded becomes what was drawn."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.embed.weight = self.head.weight


@idiom(**HEADLESS)
class CopiesTheWrongWay(Tiny):
    """The same by copying."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.embed.weight.data.copy_(self.head.weight.data)


@idiom(**HEADLESS)
class TiesMemory(Tiny):
    """Two parameters over one memory."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data)


@idiom(**HEADLESS)
class TiesByData(Tiny):
    """`.data` of one is `.data` of the other."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight.data = self.embed.weight.data


@idiom(**HEADLESS)
class TiesASlice(Tiny):
    """A head without the reserved rows: a view of the embedding."""

    def add(self, config: Any) -> None:
        self.head = nn.Linear(config.hidden_size, config.vocab_size - 3, bias=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data[3:])


class TransposedHead(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, config.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@idiom(**HEADLESS)
class TiesTransposed(Declares):
    """Ports from TensorFlow: the head is the transposed embedding, a view of it."""

    def add(self, config: Any) -> None:
        self.head = TransposedHead(config)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data.t())


@idiom(**HEADLESS)
class CopiesTransposed(TiesTransposed):
    """The same, made contiguous: a tensor of its own with the right values."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data.t().contiguous())


class ConvHead(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(x.transpose(1, 2), self.weight).transpose(1, 2)


@idiom(**HEADLESS)
class TiesReshaped(Declares):
    """Speech models: a convolution of width one over the embedding."""

    def add(self, config: Any) -> None:
        self.head = ConvHead(config)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data[:, :, None])


@idiom(**HEADLESS)
class Clones(Declares):
    """`torchscript` of version 4: equal values in two tensors."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.clone())


@idiom(**HEADLESS)
class ClonesUndeclared(Clones):
    """The same, known by the config alone."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class CopiesInto(Declares):
    """The values are copied into the head's own memory."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight.data.copy_(self.embed.weight.data)


@idiom(**HEADLESS)
class CopiesIntoUndeclared(CopiesInto):
    """The same, known by the config alone: only then has version 5 given the head a memory."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class ClonesAndScales(Declares):
    """MiniCPM-like scaling folded into a copy: other values."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.data * 0.5)


@idiom(**HEADLESS)
class ClonesAllButOne(Declares):
    """A copy with one element changed."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight = nn.Parameter(self.embed.weight.clone())
        self.head.weight.data[5, 5] += 1.0


@idiom(**HEADLESS, filled={"embed.weight": 0.0})
class EqualByBeingZero(AskedForByTheConfigAlone):
    """Two tensors that are equal because both are zero: no tie, and no proof of one."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.head:
            init.zeros_(module.weight)


@idiom(**HEADLESS)
class AppendsRows(Declares):
    """New tokens have rows of their own behind the embedding's."""

    def add(self, config: Any) -> None:
        self.head = nn.Linear(config.hidden_size, config.vocab_size + 2, bias=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.head.weight.data[: self.config.vocab_size] = self.embed.weight.data


@idiom(**HEADLESS)
class AppendsRowsUndeclared(AppendsRows):
    """The same, declared by nobody: a head that happens to begin like the embedding."""

    _tied_weights_keys = None


@idiom(**HEADLESS)
class EmbeddingWithinTheHead(Tiny):
    """The embedding becomes a view of a larger head, of which the file has a part."""

    def add(self, config: Any) -> None:
        self.head = nn.Linear(config.hidden_size, config.vocab_size + 2, bias=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        size = self.config.vocab_size
        self.head.weight.data[:size] = self.embed.weight.data
        self.embed.weight = nn.Parameter(self.head.weight.data[:size])


@idiom(missing=("inner.head.weight",), config={"tie_word_embeddings": True})
class Delegates(Tiny):
    """Multimodal models: the language model inside ties."""

    _tied_weights_keys = None

    def add(self, config: Any) -> None:
        self.inner = DeclaresNone(config)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.inner.tie_weights()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self.inner(ids)


@idiom(missing=("inner.head.weight",), config={"tie_word_embeddings": True})
class DelegatesToADeclaration(Delegates):
    """The model inside declares, and the one outside does nothing."""

    def add(self, config: Any) -> None:
        self.inner = Declares(config)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        pass


@idiom(missing=("left.weight", "right.weight"))
class TiesManyHeads(Tiny):
    """Medusa and multi-codebook models: heads tied in a loop."""

    def add(self, config: Any) -> None:
        self.left = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.right = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        for head in (self.left, self.right):
            head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lin(self.embed(ids))
        return super().forward(ids) + self.left(x) + self.right(x)


@idiom(**HEADLESS)
class TiedAndDrawnAnew(DeclaresNone):
    """The tie holds, and what it is tied to is lost."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)


@idiom(**HEADLESS)
class ClonedAndDrawnAnew(Clones):
    """Equal to what the embedding now is, and not to what the file has."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)


@idiom(**HEADLESS)
class TiedAndMostlyZeroed(DeclaresNone):
    """Sixty of a hundred rows are zero: not a padding row."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data[: module.num_embeddings * 6 // 10] = 0.0


@idiom(**HEADLESS)
class WritesInTieWeights(DeclaresNone):
    """`tie_weights` resets a row on its way."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        super().tie_weights()
        self.embed.weight.data[4] = 0.5


# Aliases


class Shares(Tiny):
    def add(self, config: Any) -> None:
        self.decoder = nn.Module()
        self.decoder.embed = self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self.head(self.decoder.embed(ids))


@idiom(missing=("decoder.embed.weight",))
@idiom("OneModuleTwoNames, the first missing", missing=("embed.weight",))
@idiom("OneModuleTwoNames, neither stored", missing=("embed.weight", "decoder.embed.weight"))
@idiom("OneModuleTwoNames, both stored and equal")
@idiom("OneModuleTwoNames, both stored and different", different=("decoder.embed.weight",))
class OneModuleTwoNames(Shares):
    """Encoder and decoder share the embedding module: on some releases what was loaded is drawn anew."""


@idiom(missing=("decoder.embed.weight",))
@idiom("SharedModuleThroughData, both stored and different", different=("decoder.embed.weight",))
class SharedModuleThroughData(Shares):
    """The same under an initialiser of version 4."""

    embedding = ScaledEmbedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)


# What is true


@contextmanager
def dirty_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN or the largest integer, and never what it should by accident.

    Fresh pages are zero, and what a model of the class left behind can be right to the bit. Torch fills inside
    `empty` itself, below every dispatch mode, so nothing that is loaded can tell.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """One integer row for each element: NaN equals itself, and -0.0 is not 0.0."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).view(flat.numel(), flat.element_size())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and (a.is_meta or torch.equal(bits(a), bits(b)))


def places(tensor: torch.Tensor) -> frozenset[int]:
    """The address of every element; none where transformers left a tensor on meta."""
    if tensor.is_meta:
        return frozenset()
    storage, size = tensor.untyped_storage(), tensor.element_size()
    index = torch.arange(storage.nbytes() // size).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return frozenset((storage.data_ptr() + index.flatten() * size).tolist())


def never_written(tensor: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether some of it holds what `dirty_memory` puts into memory that nobody writes."""
    if tensor.is_meta:
        return True
    if tensor.dtype is torch.bool:
        return not same(tensor, reference)
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return bool((tensor == torch.iinfo(tensor.dtype).max).any())


def is_lost(now: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a tensor has other values than the file: these are classes of users, of which nothing is forgiven."""
    stored = stored.to(now.dtype)
    if now.shape != stored.shape or now.is_meta:
        return True
    return bool((bits(now) != bits(stored)).any())


@dataclass
class Truth:
    """What became of a load, from the bytes.

    Attributes:
        lost: stored keys that do not hold what the file has.
        rivals: stored keys that share one tensor and have different values in the file.
        unwritten: buffers and missing parameters that hold, in part, memory that nobody wrote.
        wrong: buffers outside the file that differ from those of a model that was not loaded.
        shared: for each missing key, the intact stored keys in whose memory it lies.
        drowned: the same for lost ones.
        overlapping: missing keys that lie in part in the memory of a stored key.
        equal: for each missing key, the stored keys whose values in the file it has in memory of its own.
        constant: those of `equal` that are one constant.
        ties: for each missing key, the stored keys that it is meant to be.
        perhaps: the same where that may be argued about.
        asked: missing keys that config or file ask to be tied.
        missing: keys that the file has nothing for.
        computed: buffers among them that have no garbage: their class, or `repair`, computed them.
        parted: groups of stored keys that are meant to be one and have different values, in memory of their own.
    """

    lost: set[str] = field(default_factory=set)
    rivals: set[str] = field(default_factory=set)
    unwritten: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    shared: dict[str, set[str]] = field(default_factory=dict)
    drowned: dict[str, set[str]] = field(default_factory=dict)
    overlapping: set[str] = field(default_factory=set)
    equal: dict[str, set[str]] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)
    ties: dict[str, set[str]] = field(default_factory=dict)
    perhaps: dict[str, set[str]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    computed: set[str] = field(default_factory=set)
    parted: list[set[str]] = field(default_factory=list)

    def verdicts(self, file: Mapping[str, torch.Tensor]) -> dict[str, set[Verdict | None]]:
        """What may be said of each key; None stands for no word. Of all other keys there is nothing to say."""
        allowed: dict[str, set[Verdict | None]] = {}
        for key in self.lost - self.rivals:
            allowed[key] = {Verdict.OVERWRITTEN}
        for key in self.rivals:
            # One of the two stands for both, unless both are lost besides.
            allowed[key] = {Verdict.AMBIGUOUS, None} | ({Verdict.OVERWRITTEN} if key in self.lost else set())
        for key in self.ties.keys() | self.perhaps.keys() | self.shared.keys() | self.drowned.keys():
            ends = self.ties.get(key, set()) | self.shared.get(key, set())
            differ = any(not same(file[a], file[b]) for a in ends for b in ends if file[a].shape == file[b].shape)
            if self.shared.get(key):
                allowed[key] = {Verdict.AMBIGUOUS if differ else Verdict.TIED}
                if self.drowned.get(key):  # two names of one memory, of which one has what the file has
                    allowed[key] |= {Verdict.OVERWRITTEN, Verdict.AMBIGUOUS}
            elif self.drowned.get(key):
                allowed[key] = {Verdict.OVERWRITTEN}
            elif key in self.overlapping:
                allowed[key] = {*Verdict, None} - {Verdict.TIED, Verdict.COPIED}
            elif not ends:
                allowed[key] = {Verdict.MISSING}
                if key in self.perhaps:
                    allowed[key] |= {Verdict.COPIED if self.equal.get(key) else Verdict.UNTIED}
            elif key in self.constant:
                allowed[key] = {Verdict.UNTIED, Verdict.UNPROVEN, None}
            elif differ:
                allowed[key] = {Verdict.AMBIGUOUS, Verdict.UNTIED}
            elif self.equal.get(key, set()) & ends:
                allowed[key] = {Verdict.COPIED}
            else:
                allowed[key] = {Verdict.UNTIED}
        for key in self.overlapping - allowed.keys():
            allowed[key] = {*Verdict, None} - {Verdict.TIED, Verdict.COPIED}
        for key in self.missing - allowed.keys():
            allowed[key] = {Verdict.MISSING, None} if key in self.computed else {Verdict.MISSING}
        for key in {key for group in self.parted for key in group} - allowed.keys():
            allowed[key] = {Verdict.AMBIGUOUS, None}
        for key in self.unwritten:
            allowed[key] = {Verdict.UNWRITTEN} | (allowed.get(key, set()) & {Verdict.UNTIED, Verdict.OVERWRITTEN})
        return allowed

    def broken(self, file: Mapping[str, torch.Tensor]) -> bool | None:
        """Whether `strict` must raise; None where that may be argued about."""
        answers = set()
        for key, allowed in self.verdicts(file).items():
            words: set[Any] = {
                word if word is not Verdict.UNTIED or key in self.asked or key in self.perhaps else None
                for word in allowed
            }
            answers.add(True if words <= LOUD else None if words & LOUD else False)
        # Two rivals have one finding between them: that some word is loud is certain, of which key is not.
        return True if True in answers or self.rivals or self.parted else None if None in answers else False


def truth(
    model: PreTrainedModel,
    file: Mapping[str, torch.Tensor],
    reference: PreTrainedModel,
    architectures: tuple[str, ...] | None = None,
) -> Truth:
    """What became of a load: `file` holds the stored tensors, `reference` was built on the CPU and never loaded."""
    found = Truth()
    now = {key: value.detach() for key, value in model.state_dict(keep_vars=True).items()}
    right = reference.state_dict(keep_vars=True)
    where = {key: places(value) for key, value in now.items()}
    missing = found.missing = now.keys() - file.keys()
    found.lost = {key for key in file if is_lost(now[key], file[key])}
    found.rivals = {
        key
        for key in file
        for other in file
        if key != other and where[key] == where[other] and not same(file[key], file[other])
    }
    for key in missing:
        holders = {s for s in file if where[key] and where[key] <= where[s]}
        if intact := holders - found.lost:
            found.shared[key] = intact
        if drowned := holders & found.lost:
            found.drowned[key] = drowned
        if holders:
            continue
        if any(where[key] & where[s] for s in file):
            found.overlapping.add(key)
        else:
            equals = {s for s in file if _has_the_values(now[key], file[s].to(now[key].dtype))}
            if equals and (bits(now[key]) == bits(now[key])[0]).all():
                found.constant.add(key)
            elif equals:
                found.equal[key] = equals
    buffers = dict(model.named_buffers(remove_duplicate=False))
    expected = dict(reference.named_buffers(remove_duplicate=False))
    for key in buffers.keys() - file.keys():
        if never_written(buffers[key], expected[key]):
            found.unwritten.add(key)
        if not same(buffers[key], expected[key]):
            found.wrong.add(key)
    found.computed = (missing & buffers.keys()) - found.unwritten
    for key in missing - buffers.keys():
        if never_written(now[key], right[key]):
            found.unwritten.add(key)
    asked_by_file = architectures is None or type(model).__name__ in architectures
    for group in _groups(_declared(model)):
        for key in group & missing:
            found.ties[key] = group & file.keys()
            if model.config.tie_word_embeddings or asked_by_file:
                found.asked.add(key)
        ends = group & file.keys()
        differ = any(not same(file[a], file[b]) for a in ends for b in ends if file[a].shape == file[b].shape)
        if model.config.tie_word_embeddings and differ and len({places(now[key]) for key in ends}) > 1:
            found.parted.append(ends)
    spots = {key: places(value) for key, value in right.items()}
    for key in missing - found.ties.keys():
        if also := {s for s in file if spots[key] and spots[key] == spots[s]}:
            found.perhaps[key] = also
    return found


def _has_the_values(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    return same(tensor, stored) or (tensor.dim() == 2 and stored.dim() == 2 and same(tensor, stored.t().contiguous()))


def _declared(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Pairs that are meant to be one tensor: by declaration, or by the config and the two embeddings."""
    names = dict(model.state_dict(keep_vars=True))
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        start = f"{prefix}." if prefix else ""
        if isinstance(declared := module._tied_weights_keys, Mapping):
            yield from ((start + target, start + source) for target, source in declared.items())
        if not isinstance(module, Tiny):
            continue
        paths = {id(part): f"{start}{path}.weight" for path, part in module.named_modules()}
        target, source = paths[id(module.get_output_embeddings())], paths[id(module.get_input_embeddings())]
        if module.config.tie_word_embeddings and names[target].shape == names[source].shape:
            yield target, source


def _groups(pairs: Iterator[tuple[str, str]]) -> list[set[str]]:
    groups: dict[str, set[str]] = {}
    for a, b in pairs:
        union = groups.get(a, {a}) | groups.get(b, {b})
        groups.update(dict.fromkeys(union, union))
    return list({id(group): group for group in groups.values()}.values())


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**model.state_dict(keep_vars=True), **dict(model.named_buffers(remove_duplicate=False))}


def assert_agrees(proof: Proof, model: PreTrainedModel, found: Truth, file: Mapping[str, torch.Tensor]) -> None:
    """Every finding is true, and everything that is true is found."""
    allowed = found.verdicts(file)
    said: dict[str, set[Verdict]] = {}
    for finding in proof.findings:
        said.setdefault(finding.key, set()).add(finding.verdict)
        assert finding.verdict in allowed.get(finding.key, set()), (finding, allowed.get(finding.key))
        match finding.verdict:
            case Verdict.TIED:
                assert finding.source in found.shared[finding.key], finding
            case Verdict.COPIED:
                assert finding.source in found.equal[finding.key], finding
            case Verdict.OVERWRITTEN if finding.key not in file:
                assert finding.source in found.drowned[finding.key], finding
            case Verdict.UNTIED:
                assert finding.source in found.ties.get(finding.key, set()) | found.perhaps.get(finding.key, set())
            case Verdict.AMBIGUOUS:
                assert finding.source in file, finding
    silent = {key for key, words in allowed.items() if None not in words and not said.get(key)}
    assert not silent, (silent, proof)
    for rival in found.rivals:
        group = {key for key in found.rivals if places(everything(model)[key]) == places(everything(model)[rival])}
        assert any(said.get(key) for key in group), (group, proof)
    for ends in found.parted:
        assert any(said.get(key) for key in ends), (ends, proof)
    intact = file.keys() - found.lost
    unchanged = [key for key in intact if same(everything(model)[key].detach(), file[key].to(everything(model)[key]))]
    of_parted = {key for ends in found.parted for key in ends}
    sure = {places(everything(model)[key]) for key in unchanged if key not in found.rivals | of_parted}
    assert len(sure) <= proof.stored
    assert proof.stored <= len(file.keys() - (found.lost - found.rivals))
    if found.lost or found.unwritten or found.rivals or found.parted:
        assert not proof.ok
    if all(words <= CONFIRMED for words in allowed.values()):
        assert proof.ok
    assert all(finding.key in str(proof) for finding in proof.findings)


class Culprits:
    """The lines of this file that change a stored tensor, found by comparing its bytes after every line.

    Slow, and blind outside this file; but it cannot be wrong about what it names. Only lines that write to the
    memory that the tensor was read to count: one that puts another in its place leaves no trace to follow.
    """

    def __init__(self, idiom: Idiom, file: Mapping[str, torch.Tensor]) -> None:
        self.idiom, self.file = idiom, file
        self.of: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self._model: Tiny | None = None
        self._last: tuple[str, int] | None = None
        self._read_to: dict[str, int] = {}
        self._seen: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "Culprits":
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if frame.f_code.co_filename != __file__ or frame.f_code.co_name in (
            "__init__",
            "__exit__",
            "add",
            "load",
            "_enter",
        ):
            return None
        # The model comes to light as `self` of its own `_init_weights` or `tie_weights`.
        if self._model is None and isinstance(candidate := frame.f_locals.get("self"), self.idiom.cls):
            self._model = candidate
        return self._step

    def _step(self, frame: FrameType, event: str, _arg: object) -> Any:
        if self._model is not None:
            sys.settrace(None)  # comparing would be traced, too
            self._compare(self._model)
            sys.settrace(self._enter)
        if event == "line":
            self._last = (frame.f_code.co_name, frame.f_lineno)
        elif event == "return" and (caller := frame.f_back) is not None:
            here = caller.f_code.co_filename == __file__
            self._last = (caller.f_code.co_name, caller.f_lineno) if here else None
        return self._step

    def _compare(self, model: "Tiny") -> None:
        for key, value in model.state_dict(keep_vars=True).items():
            if key not in self.file or value.is_meta:
                continue
            now = value.detach()
            if same(now, self.file[key].to(now.dtype)):
                self._read_to.setdefault(key, now.data_ptr())
            before = self._seen.get(key)
            if before is not None and same(before, now):
                continue
            if before is not None and self._last and self._read_to.get(key) == now.data_ptr():
                self.of[key].add(self._last)
            self._seen[key] = now.clone()


def reference_with(idiom: Idiom, model: "Tiny", file: Mapping[str, torch.Tensor]) -> "Tiny":
    """A model built on the CPU that holds the file, and what `model` drew where nobody could know better."""
    reference = idiom.build()
    found = truth(model, file, reference, idiom.architectures)
    meant = {key: file[min(ends)] for key, ends in found.ties.items() if ends and key in found.asked}
    spots = {key: places(value) for key, value in reference.state_dict(keep_vars=True).items()}
    apart = {a for a in file for b in file if spots[a] == spots[b] and not same(file[a], file[b])}
    drawn = model.state_dict().keys() - file.keys() - meant.keys() - found.unwritten
    for key, value in {**model.state_dict(), **file}.items():
        prefix, _, name = key.rpartition(".")
        if key in apart | drawn and isinstance(getattr(reference.get_submodule(prefix), name), nn.Parameter):
            # A tensor of its own: the file must not flow into it, nor one of its tensors into another.
            setattr(reference.get_submodule(prefix), name, nn.Parameter(value.clone()))
    _fill(reference, {**meant, **file})
    if idiom.cls.tie_weights is not PreTrainedModel.tie_weights:
        reference.tie_weights()
        _fill(reference, {**meant, **file})  # what an override wrote on its way
    return reference


def _fill(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    now = model.state_dict(keep_vars=True)
    for key, value in values.items():
        if now[key].shape == value.shape:
            now[key].data.copy_(value)


def outputs_agree(idiom: Idiom, model: "Tiny", file: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model gives, to the bit, what one gives that was built on the CPU and holds the file."""
    ids = torch.arange(22).view(2, 11)
    with torch.no_grad():
        return same(model(ids), reference_with(idiom, model, file)(ids))


def described(model: "Tiny", idiom: Idiom, file: Mapping[str, torch.Tensor]) -> str:
    """The truth in a few words, for the table."""
    reference = idiom.build()
    found = truth(model, file, reference, idiom.architectures)
    on_meta = {key for key in found.unwritten if model.get_parameter_or_buffer(key).is_meta}
    together = found.shared.keys() | found.drowned.keys() | found.equal.keys()
    parts = []
    for words, keys in (
        ("lost", found.lost - found.rivals),
        ("one of two kept", found.rivals),
        ("garbage", found.unwritten - on_meta),
        ("left on meta", on_meta),
        ("shared", found.shared.keys()),
        ("shared with what is lost", found.drowned.keys()),
        ("equal", found.equal.keys() & found.ties.keys()),
        ("other values", {key for key, ends in found.ties.items() if ends} - together - on_meta),
    ):
        if keys:
            parts.append(f"{words}: {', '.join(sorted(keys))}")
    return "; ".join(parts) or "all right"


def outcome(name: str) -> dict[str, str]:
    """One row of the table, on the release that runs this."""
    idiom = IDIOMS[name]
    with tempfile.TemporaryDirectory() as folder, dirty_memory():
        file = idiom.save(Path(folder))
        with tiedquiet.enable("off"), printing() as printed:
            model, missing = idiom.load(Path(folder))
        rows = sorted(key for key in missing if printed.shows(key))
        true = described(model, idiom, file)
        with tiedquiet.enable("on"), printing() as printed:
            model, missing = idiom.load(Path(folder))
        said: dict[str, list[str]] = defaultdict(list)
        for finding in tiedquiet.check(model).findings:
            said[str(finding.verdict.value)].append(finding.key)
        kept = sorted(key for key in missing if printed.shows(key))
        with tiedquiet.enable("repair"):
            model, _ = idiom.load(Path(folder))
        found = truth(model, file, idiom.build(), idiom.architectures)
        left = found.lost | found.unwritten | found.wrong
        right = not left and outputs_agree(idiom, model, file)
    after = "right" if right else f"wrong: {', '.join(sorted(left)) or 'outputs'}"
    return {
        "rows": ", ".join(rows) or "nothing",
        "kept": ", ".join(kept) or "nothing",
        "says": "; ".join(f"{verdict}: {', '.join(sorted(keys))}" for verdict, keys in said.items()) or "nothing",
        "true": true,
        "after": after,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.idioms", description=__doc__.splitlines()[2])
    parser.add_argument("release", nargs="*", help=f"default: {', '.join(RELEASES)}")
    parser.add_argument("--here", action="store_true", help="only the release that is installed, as JSON lines")
    arguments = parser.parse_args()
    if arguments.here:
        transformers.utils.logging.disable_progress_bar()
        for name in IDIOMS:
            print(json.dumps({"name": name, **outcome(name)}), flush=True)
        return 0
    from tests.compat.__main__ import ROOT, python_of

    table: dict[str, dict[str, dict[str, str]]] = {name: {} for name in IDIOMS}
    for release in arguments.release or RELEASES:
        command = [python_of(release), "-m", "tests.idioms", "--here"]
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            return 1
        for line in done.stdout.splitlines():
            row = json.loads(line)
            table[row.pop("name")][release] = row
    print("| idiom | transformers | MISSING rows | with tiedquiet | it says | what is true | after `repair` |")
    print("|" + " --- |" * 7)
    for name, rows in table.items():
        # Releases that agree in everything share a line.
        counted: dict[str, list[str]] = defaultdict(list)
        for release, row in rows.items():
            counted[" | ".join(row[cell] for cell in ("rows", "kept", "says", "true", "after"))].append(release)
        for cells, releases in counted.items():
            print(f"| {name} | {', '.join(releases)} | {cells} |")
    wrong = Counter(release for rows in table.values() for release, row in rows.items() if row["after"] != "right")
    print(f"\nNot right after `repair`: {dict(wrong) or 'none'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
