"""Student and critic as two adapters on one frozen base, which without them is the teacher: what lets 14 B fit."""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiedquiet.distill.options import put

# Every product of a block. Their scale, alpha / rank, is 1, so a file of adapters needs no word on it.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
AUTHORS = {  # what Wan's authors call what diffusers calls otherwise
    "attn1.": "self_attn.", "attn2.": "cross_attn.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "o.",
    "ffn.net.0.proj.": "ffn.0.", "ffn.net.2.": "ffn.2.",
}  # fmt: skip
FILE = "pytorch_lora_weights.safetensors"


def lora(rank: int) -> LoraConfig:
    """What peft calls an adapter: low-rank updates (arXiv:2106.09685) of `TARGETS`, zero as they begin."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)


def file_name(expert: str) -> str:
    """Where a pipeline's folder has an expert's adapter; the first is found by `pipe.load_lora_weights(folder)`."""
    return FILE if expert == "transformer" else f"{expert}_lora_weights.safetensors"


class Adapter:
    """A frozen transformer under one of its adapters, or under none, as a model of its own.

    Args:
        base: the transformer, shared with the other adapters.
        name: of the adapter; None is the transformer itself.
    """

    def __init__(self, base: WanTransformer3DModel, name: str | None) -> None:
        self.base, self.name, self.dtype, self.blocks = base, name, base.dtype, base.blocks

    def add(self, rank: int, seed: int, begun: Path | None = None) -> "Adapter":
        """Make the adapter, in float32, from a seed of its own or as a file has it."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are what is wanted
            torch.manual_seed(seed)
            self.base.add_adapter(lora(rank), self.name)
        if begun:
            set_peft_model_state_dict(self.base, load_file(begun), self.name)
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        return self

    def activate(self) -> None:
        """Before a forward pass; and before a backward pass, which asks for gradients and may compute again."""
        if self.name is None:
            self.base.disable_adapters()
        else:
            self.base.enable_adapters()
            self.base.set_adapter(self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the transformer's."""
        self.activate()
        return self.base(*args, **kwargs)

    def parameters(self) -> Iterator[Tensor]:
        """The adapter's own."""
        return (p for name, p in self.base.named_parameters() if f".{self.name}." in name)

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter alone, for a checkpoint."""
        return dict(get_peft_model_state_dict(self.base, adapter_name=self.name))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        set_peft_model_state_dict(self.base, state, self.name)

    def save(self, place: Path) -> None:
        """Write it beside its place and move it there."""
        with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent) as beside:
            (Path(beside) / place.name).mkdir()
            save_file({n: t.contiguous() for n, t in self.state_dict().items()}, Path(beside) / place.name / FILE)
            put(Path(beside) / place.name, place)


def with_lora(
    model: WanTransformer3DModel, state: dict[str, Tensor], prefix: str | None = None
) -> WanTransformer3DModel:
    """A transformer under an adapter."""
    model.load_lora_adapter(state, prefix=prefix)
    return model


def name_of_authors(name: str) -> str:
    """The name that Wan's authors, and so ComfyUI, have for what diffusers calls `name`.

    ComfyUI looks for its own names below `diffusion_model.` (`model_lora_keys_unet` of comfy/lora.py), and diffusers
    converts them when it loads them (`_convert_non_diffusers_wan_lora_to_diffusers`), but has nothing to convert back.
    """
    for ours, theirs in AUTHORS.items():
        name = name.replace(ours, theirs)
    return f"diffusion_model.{name}"


def write_lora(trained: Mapping[str, Path], target: Path, dtype: torch.dtype) -> None:
    """Write the experts' adapters under the names that both `WanPipeline.load_lora_weights` and ComfyUI read.

    Args:
        trained: the folders that `Adapter.save` wrote, by the names of the experts.
        target: the folder, which exists.
        dtype: to write them in.
    """
    for expert, folder in trained.items():
        state = {name_of_authors(n): t.to(dtype).contiguous() for n, t in load_file(folder / FILE).items()}
        save_file(state, target / file_name(expert), metadata={"format": "pt"})
