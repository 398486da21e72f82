"""The files of a plan, and what they hold, read back without tiedquiet."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.fuzz.classes import FuzzConfig, make
from benchmarks.fuzz.draw import keys_of, tied_keys
from benchmarks.fuzz.plan import Plan

Tensors = dict[str, torch.Tensor]


class Files:
    """A checkpoint folder.

    Attributes:
        folder: where it is.
        held: what the files hold for each key of the model: one value, or two where two shards have the name.
        extra: what they hold besides.
        elsewhere: for keys that lie there under another name, that name and the value.
        are_listed: whether the index names every shard.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.extra: Tensors = {}
        tensors = self._values()
        self._write_config()
        names = {key: plan.stored.renamed.get(key, key) for key in tensors}
        parts = self._split({names[key]: value for key, value in tensors.items()})
        self._save(parts)
        read = [self._read(path) for path in self.paths]
        self.held: dict[str, list[torch.Tensor]] = {}
        self.elsewhere: dict[str, tuple[str, torch.Tensor]] = {}
        for key in tensors:
            found = [part[names[key]] for part in read if names[key] in part]
            assert found, "what was written is there"
            if names[key] == key:
                self.held[key] = found
            else:
                self.elsewhere[key] = names[key], found[0]

    @property
    def paths(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".bin"))

    def state_dict(self) -> Tensors:
        """All tensors, under the names that they have in the files."""
        return {name: value for path in self.paths for name, value in self._read(path).items()}

    def _values(self) -> Tensors:
        plan = self.plan
        generator = torch.Generator().manual_seed(plan.seed)
        ends = tied_keys(plan.shape)
        values: Tensors = {}
        for key, tensor in keys_of(plan.shape).items():
            value = torch.rand(tensor.shape, generator=generator) * 2 + 0.5  # nowhere zero, nowhere whole
            if tensor.dtype == torch.int64:
                value = torch.randint(1, 90, tensor.shape, generator=generator)
            elif tensor.dtype == torch.bool:
                value = torch.rand(tensor.shape, generator=generator) < 0.5
            else:
                value = value.to(getattr(torch, plan.stored.dtype))
            odd = plan.stored.odd.get(key)
            if odd in ("int8", "int8 scale"):
                value = torch.randint(-120, 120, tensor.shape, generator=generator, dtype=torch.int8)
                if odd == "int8 scale":
                    self.extra[f"{key}_scale"] = torch.rand(len(value), 1, generator=generator) / 1000
            elif odd == "complex":
                value = torch.complex(value.float(), value.float() / 3)
            elif odd == "huge":
                value = value.float() * 1e9
            elif odd in ("fraction", "whole"):
                value = value.float() + (0.25 if odd == "fraction" else 0)
            if key in ends and plan.stored.equal and ends[0] in values and key not in plan.stored.odd:
                first = values[ends[0]]
                value = first.clone() if first.shape == value.shape else value
            values[key] = value
        second, shared = "second.", plan.shape.shared
        for key in [key for key in values if shared and key.startswith(second)]:
            if plan.stored.equal and key not in plan.stored.odd:
                values[key] = values[f"{shared}.{key.removeprefix(second)}"].clone()
        return {key: value for key, value in values.items() if key not in plan.stored.missing}

    def _write_config(self) -> None:
        shape = self.plan.shape
        config = FuzzConfig(theta=2.0)
        config.pad_token_id, config.eos_token_id = shape.pad, shape.eos
        config.save_pretrained(self.folder)
        path = self.folder / "config.json"
        content = json.loads(path.read_text())
        content.pop("tie_word_embeddings", None)  # releases differ in what they write down
        if shape.ties is not None and shape.ties.flag is not None:
            content["tie_word_embeddings"] = shape.ties.flag
        same = shape.ties is None or shape.ties.architectures
        content["architectures"] = ["Drawn" if same else "AnotherModel"]
        content["dtype"] = self.plan.stored.dtype
        path.write_text(json.dumps(content))

    def _split(self, tensors: Tensors) -> list[Tensors]:
        stored = self.plan.stored
        parts: list[Tensors] = [{} for _ in range(stored.shards)]
        for number, (name, value) in enumerate([*tensors.items(), *self.extra.items()]):
            parts[number % len(parts)][name] = value
        if stored.twice is not None:
            key, differ = stored.twice
            name = stored.renamed.get(key, key)
            place = next(number for number, part in enumerate(parts) if name in part)
            value = parts[place][name]
            other = ~value if value.dtype == torch.bool else value + 1
            parts[(place + 1) % len(parts)][name] = other if differ else value.clone()
            self.index_names = place
        return parts

    def _save(self, parts: list[Tensors]) -> None:
        stem, end = ("pytorch_model", "bin") if self.plan.stored.bin else ("model", "safetensors")
        index: dict[str, str] = {}
        for number, part in enumerate(parts):
            name = f"{stem}-{number + 1:05}-of-{len(parts):05}.{end}" if len(parts) > 1 else f"{stem}.{end}"
            twice = self.plan.stored.twice
            double = self.plan.stored.renamed.get(twice[0], twice[0]) if twice else None
            index.update({key: name for key in part if key != double or number == self.index_names})
            if self.plan.stored.bin:
                torch.save(_views_of_one(part) if self.plan.stored.overlap else part, self.folder / name)
            else:
                save_file(part, self.folder / name, {"format": "pt"})
        self.are_listed = len(parts) == 1 or len(set(index.values())) == len(parts)
        if len(parts) > 1:
            content = {"metadata": {"total_size": 1}, "weight_map": index}
            (self.folder / f"{stem}.{end}.index.json").write_text(json.dumps(content))

    def _read(self, path: Path) -> Tensors:
        return torch.load(path) if path.suffix == ".bin" else load_file(path)


def _views_of_one(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The same tensors, those of one type as views of one storage."""
    found: Tensors = {}
    for dtype in {value.dtype for value in tensors.values()}:
        own = {name: value for name, value in tensors.items() if value.dtype == dtype}
        whole = torch.cat([value.reshape(-1) for value in own.values()])
        place = 0
        for name, value in own.items():
            found[name] = whole[place : place + value.numel()].view(value.shape)
            place += value.numel()
    return {name: found[name] for name in tensors}


def reference(plan: Plan, files: Files, dtype: torch.dtype) -> torch.nn.Module:
    """A model of the class that was built on the CPU and not loaded: what `__init__` computes."""
    config = FuzzConfig.from_pretrained(files.folder)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made: torch.nn.Module = make(plan.shape)(
            config, **({} if plan.way.scale is None else {"scale": plan.way.scale})
        )
        return made
    finally:
        torch.set_default_dtype(kept)
