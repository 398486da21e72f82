"""The ways: which tensors a file holds, and what is changed about it, its config and the class that loads it."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.census.models import Saved, flag_off

# The ways: which tensors a file holds (None where a way does not apply), and what is changed about it

Tensors = dict[str, Any]


def as_saved(saved: Saved) -> Tensors | None:
    return saved.file


def of_a_composite(saved: Saved) -> Tensors | None:
    inner = [v for v in saved.config.values() if isinstance(v, dict) and v.get("model_type")]
    return saved.file if inner else None


def under_a_target_s_name(saved: Saved) -> Tensors | None:
    file = dict(saved.file)
    for key, value in saved.file.items():
        own = saved.name_in_model(key, value)
        targets = [name for name in sorted(saved.group_of(own or "")) if name in saved.meant and name != own]
        name = saved.name_in_file(targets[0]) if targets else None
        if name and name not in saved.file:
            file[name] = file.pop(key)
    return file if file.keys() != saved.file.keys() else None


def base_model_s_file(saved: Saved) -> Tensors | None:
    from safetensors.torch import load_file

    base = saved.model.base_model
    if base is saved.model:
        return None
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors"))


def two_ends_that_differ(saved: Saved) -> Tensors | None:
    import torch

    file = dict(saved.file)
    for group in saved.groups:
        absent = [name for name in sorted(group) if name in saved.meant and name not in saved.file]
        name = saved.name_in_file(absent[0]) if absent else None
        if name and name not in file and saved.state[absent[0]].is_floating_point():
            file[name] = torch.randn(saved.state[absent[0]].shape) * 0.1 + 0.01
    return file if len(file) > len(saved.file) else None


def without_any_end(saved: Saved) -> Tensors | None:
    tied = {name for group in saved.groups for name in group}
    return {key: value for key, value in saved.file.items() if saved.name_in_model(key, value) not in tied}


def without_biases(saved: Saved) -> Tensors | None:
    """A missing sibling: the initialiser is then called for a module of which the weight was loaded."""
    tied = {name for group in saved.groups for name in group}
    return {
        key: value
        for key, value in saved.file.items()
        if not (key.endswith(".bias") and key in saved.state and key not in tied)
    }


def in_bfloat16(saved: Saved) -> Tensors | None:
    import torch

    return {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in saved.file.items()}


def other_vocabulary(config: dict[str, Any]) -> None:
    for name, value in config.items():
        if isinstance(value, dict):
            other_vocabulary(value)
        elif re.fullmatch(r"(\w+_)?vocab_size", name) and type(value) is int and value and name != "type_vocab_size":
            config[name] = value + 8


def flag_off_at_the_top(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False


def one_file(file: Tensors, folder: Path) -> None:
    from safetensors.torch import save_file

    whole = {key: value.contiguous() for key, value in file.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


def shards(file: Tensors, folder: Path) -> None:
    from safetensors.torch import save_file

    halves = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(file.items())[i::2]) for i in (0, 1)}
    for name, half in halves.items():
        save_file(half, folder / name, {"format": "pt"})
    weights = {key: name for name, half in halves.items() for key in half}
    index = {"metadata": {"total_size": sum(v.nbytes for v in file.values())}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bin_file(file: Tensors, folder: Path) -> None:
    import torch

    torch.save(file, folder / "pytorch_model.bin")


def subclass(cls: type[Any]) -> type[Any]:
    """What a user derives from a class of transformers."""
    return type(f"Users{cls.__name__}", (cls,), {"__doc__": "A user's."})


def subclass_of_version_4(cls: type[Any]) -> type[Any]:
    """The same in the manner of version 4: an initialiser that writes through `.data`, a table made in `__init__`."""
    import torch
    from torch import nn

    class Users(cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_buffer("table", torch.arange(1.0, 9.0), persistent=False)

        def _init_weights(self, module: Any) -> None:
            super()._init_weights(module)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data.normal_(std=0.02)

    return Users


def as_it_comes(saved: Saved, folder: Path) -> dict[str, Any]:
    return {}


def as_type(name: str) -> Callable[[Saved, Path], dict[str, Any]]:
    def options(saved: Saved, folder: Path) -> dict[str, Any]:
        import torch

        return {"dtype": getattr(torch, name)}

    return options


def mismatches_allowed(saved: Saved, folder: Path) -> dict[str, Any]:
    return {"ignore_mismatched_sizes": True}


def partly_on_disk(saved: Saved, folder: Path) -> dict[str, Any] | None:
    """Every block that has a member of a tie stays on disk, the others come into memory."""
    places: dict[str, str] = {}
    tied = {name for group in saved.groups for name in group}

    def place(name: str, module: Any) -> None:
        prefix = f"{name}." if name else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        # accelerate's hooks are those of modules: one with a tied parameter of its own goes there as a whole.
        is_tied = any(prefix + key in tied for key, _ in own)
        if name and not any(key.startswith(prefix) for key in tied):
            places[name] = "cpu"
        elif name and (is_tied or not any(True for _ in module.children())):
            places[name] = "disk"
        else:
            places.update((prefix + key, "cpu") for key, _ in own)
            for child, part in module.named_children():
                place(prefix + child, part)

    place("", saved.model)
    if {*places.values()} != {"cpu", "disk"}:
        return None
    return {"device_map": places, "offload_folder": str(folder / "offloaded")}


class Way(NamedTuple):
    """How a checkpoint is written and loaded.

    `tensors` is what the file holds (None where the way does not apply), `change` what config.json says besides, `load`
    the arguments of `from_pretrained`, `cls` the class that is asked to load it.
    """

    tensors: Callable[[Saved], Tensors | None]
    change: Callable[[dict[str, Any]], None] = lambda config: None
    write: Callable[[Tensors, Path], None] = one_file
    load: Callable[[Saved, Path], dict[str, Any] | None] = as_it_comes
    cls: Callable[[type[Any]], type[Any]] = lambda cls: cls

    @property
    def is_flag_off(self) -> bool:
        return self.change in (flag_off, flag_off_at_the_top)


WAYS = {
    "as saved": Way(as_saved),
    "flag off": Way(as_saved, flag_off),
    "flag off at the top only": Way(of_a_composite, flag_off_at_the_top),
    "under a target's name": Way(under_a_target_s_name),
    "under a target's name, flag off": Way(under_a_target_s_name, flag_off),
    "base model's file": Way(base_model_s_file),
    "two ends that differ": Way(two_ends_that_differ),
    "no end of a tie": Way(without_any_end),
    ".bin": Way(as_saved, write=bin_file),
    "float32 into bfloat16": Way(as_saved, load=as_type("bfloat16")),
    "bfloat16 into float32": Way(in_bfloat16, load=as_type("float32")),
    "another vocabulary": Way(as_saved, other_vocabulary, load=mismatches_allowed),
    "partly on disk": Way(as_saved, load=partly_on_disk),
    "a user's subclass, shards": Way(as_saved, write=shards, cls=subclass),
    "a user's subclass of version 4, no biases": Way(without_biases, cls=subclass_of_version_4),
}
