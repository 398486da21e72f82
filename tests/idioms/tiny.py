"""The class that does everything right, and what an idiom is: a class that does one thing differently."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from tiedquiet import Verdict


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
