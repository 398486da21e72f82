"""What is done to a file: first to what it holds, then to its names and to how it lies in its folder.

Each tensor keeps the name that it had before it was renamed, so where it belongs is known without any rule for names.
"""

import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from benchmarks import tiny_models
from benchmarks.census.models import Saved, fingerprint
from benchmarks.census.ways import Tensors, base_model_s_file, bin_file, one_file

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "base_model.model.", "module.model.", "transformer.", "student.")
MIDDLE = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
AFTER = (r"^(\w+)\.", r"^(.*?\.\d+)\.", r"^(\w+\.\w+)\.", r"^(.*)\.(?=\w+$)")
LEAVES = {"weight": ("kernel", "w", "gamma"), "bias": ("b", "beta", "shift")}
WORDS = ("block", "proj", "ln_f", "adapter", "classifier", "score", "extra", "norm")

# What a file holds


class Original:
    """What a file holds before its names are changed.

    Attributes:
        saved: the class that reads it, and its model.
        file: the tensors.
        state: the values that a model of this class should have from it. What the file has nothing for has others.
        names: for each name of the state whose values the file has as they are, the name there.
        architecture: the class that saved it.
        kinds: what was done.
    """

    def __init__(self, saved: Saved, kinds: list[str], rng: random.Random) -> None:
        self.saved, self.file, self.state = saved, dict(saved.file), dict(saved.state)
        self.architecture, self.is_own = saved.cls.__name__, True
        # In the order of the table: another file comes before what is done to its values.
        self.kinds = [kind for kind in CONTENTS if kind in kinds and CONTENTS[kind](self, rng)]
        if self.is_own:
            self.names = names_of(self.state, self.file)


def names_of(state: Tensors, file: Tensors) -> dict[str, str]:
    by_value = {fingerprint(value): name for name, value in file.items()}
    found = {key: by_value.get(fingerprint(value)) for key, value in state.items()}
    # Of buffers that have the same values each is its own.
    return {key: key if key in file else name for key, name in found.items() if name is not None}


def _of_base_model(original: Original, rng: random.Random) -> bool:
    file = base_model_s_file(original.saved) if original.is_own else None
    if file is not None:
        original.file, original.architecture = file, type(original.saved.model.base_model).__name__
    return file is not None


def _of_another_class(original: Original, rng: random.Random) -> bool:
    """One of the same module and configuration: what it has of the same name is ours, but for the base's prefix."""
    cls = original.saved.cls
    classes = tiny_models.classes_with_modules(importlib.import_module(cls.__module__))
    others = [other for other in classes if other.config_class is cls.config_class and other is not cls]
    try:
        other = Saved(rng.choice(others), needs_ties=False)
    except Exception:
        return False
    ours, theirs = (f"{one.base_model_prefix}." for one in (cls, other.cls))
    # All of ours may be a module of it, and the other way round.
    around = [f"{name}." for name, module in other.model.named_modules() if type(module) is cls]
    inside = [f"{name}." for name, module in original.saved.model.named_modules() if type(module) is other.cls]
    names, original.names = names_of(other.state, other.file), {}
    original.is_own, original.file, original.architecture = False, dict(other.file), other.cls.__name__
    for key, value in original.state.items():
        removed = (key.removeprefix(start) for start in (*inside, ours))
        for name in (*(start + key for start in around), key, theirs + key, *removed):
            if name in other.state and other.state[name].shape == value.shape:
                original.state[key] = other.state[name]
                original.names.update({key: names[name]} if name in names else {})
                break
    return True


def _cast(original: Original, rng: random.Random, dtype: torch.dtype) -> bool:
    for tensors in (original.file, original.state):
        tensors.update((name, value.to(dtype)) for name, value in tensors.items() if value.is_floating_point())
    return True


def _swap(original: Original, rng: random.Random) -> bool:
    """Give two layers each other's values: nobody can tell."""
    file, names = original.file, names_of(original.state, original.file)
    alike: dict[Any, list[str]] = {}
    for name in sorted(set(names.values())):
        alike.setdefault((file[name].shape, file[name].dtype, name.rpartition(".")[2]), []).append(name)
    pairs = [names for names in alike.values() if len(names) > 1]
    if not pairs or not original.is_own:
        return False
    one, two = rng.sample(rng.choice(pairs), 2)
    file[one], file[two] = file[two], file[one]
    original.state |= {key: file[name] for key, name in names.items() if name in (one, two)}
    return True


CONTENTS: dict[str, Callable[[Original, random.Random], bool]] = {
    "the base model's file": _of_base_model,
    "another class's file": _of_another_class,
    "bfloat16": partial(_cast, dtype=torch.bfloat16),
    "float16": partial(_cast, dtype=torch.float16),
    "two layers swapped": _swap,
}

# Under which names


class Part(NamedTuple):
    """A tensor of a file.

    Attributes:
        value: it.
        of: the name that it had before its file was changed; None if it was put there.
        beside: the name of the one beside which it was put under another prefix: the only one, if that is dropped.
    """

    value: Any
    of: str | None = None
    beside: str | None = None


class File:
    """A file whose names are being changed: its tensors, and what a second shard has under a name of the first."""

    def __init__(self, parts: dict[str, Part]) -> None:
        self.parts, self.again = parts, dict[str, Part]()

    def rename(self, names: dict[str, str]) -> bool:
        after = [names.get(name, name) for name in self.parts]
        if not names or len(set(after)) < len(after) or after == list(self.parts):
            return False
        self.parts = dict(zip(after, self.parts.values(), strict=True))
        return True

    def some(self, rng: random.Random) -> list[str]:
        """A few tensors, or all of a part of the model."""
        if rng.random() < 0.5:
            return rng.sample(list(self.parts), min(len(self.parts), rng.randint(1, 3)))
        start = self.prefix(rng)
        return [name for name in self.parts if name.startswith(start)]

    def prefix(self, rng: random.Random) -> str:
        path = rng.choice(list(self.parts)).split(".")[:-1]
        return ".".join([*path[: rng.randint(1, max(len(path), 1))], ""]) if path else ""

    @property
    def commonest(self) -> str:
        return Counter(f"{name.partition('.')[0]}." for name in self.parts if "." in name).most_common(1)[0][0]


def _drop(file: File, rng: random.Random) -> bool:
    gone = file.some(rng)
    left = {name: part for name, part in file.parts.items() if name not in gone}
    # Or a second copy, which the file may have as well, would be all that there is.
    is_some = any(part.of is not None for part in left.values())
    file.parts = left if is_some else file.parts
    return is_some


def _rename(file: File, rng: random.Random) -> bool:
    names = {}
    for name in file.some(rng):
        path, _, last = name.rpartition(".")
        names[name] = f"{path}.{rng.choice(LEAVES.get(last, ('value',)))}".lstrip(".")
    return file.rename(names)


def _rename_module(file: File, rng: random.Random) -> bool:
    words = sorted({part for name in file.parts for part in name.split(".")[:-1] if not part.isdecimal()})
    old, new = rng.choice(words or [""]), rng.choice(WORDS)
    return file.rename({name: ".".join(new if p == old else p for p in name.split(".")) for name in file.parts})


def _add(file: File, rng: random.Random) -> bool:
    prefix = rng.choice(PREFIXES)
    return file.rename({name: prefix + name for name in file.parts})


def _take_off(file: File, rng: random.Random) -> bool:
    prefix = file.commonest
    return file.rename({name: name.removeprefix(prefix) for name in file.parts})


def _replace(file: File, rng: random.Random) -> bool:
    old, new = file.commonest, rng.choice(PREFIXES)
    return file.rename({name: new + name.removeprefix(old) for name in file.parts if name.startswith(old)})


def _put_inside(file: File, rng: random.Random) -> bool:
    part, after = rng.choice(MIDDLE), rng.choice(AFTER)
    return file.rename({name: re.sub(after, rf"\1.{part}.", name, count=1) for name in file.parts})


def _of_a_part(file: File, rng: random.Random) -> bool:
    old = file.prefix(rng)
    new = rng.choice((*PREFIXES, old + rng.choice(MIDDLE) + ".", ""))
    return file.rename({name: new + name.removeprefix(old) for name in file.parts if name.startswith(old)})


def _other(value: Any) -> Any:
    return torch.randn(value.shape).to(value.dtype) * 0.1 + 0.5 if value.is_floating_point() else value + 1


def _under_two_names(file: File, rng: random.Random, is_equal: bool) -> bool:
    prefix, old = rng.choice(PREFIXES), file.commonest
    for name in file.some(rng):
        part = file.parts[name]
        new = prefix + (name if rng.random() < 0.5 else name.removeprefix(old))
        file.parts.setdefault(new, part if is_equal else Part(_other(part.value), None, part.of))
    return True


def _junk(file: File, rng: random.Random) -> bool:
    shapes = [part.value for part in file.parts.values()]
    for number in range(rng.choice((1, 2, 5, 30))):
        where = rng.choice(("head", "ema", f"extra.{number}", f"{rng.choice(WORDS)}.{rng.choice(WORDS)}"))
        name = f"{where}.{rng.choice(('weight', 'bias'))}"
        file.parts.setdefault(name, Part(_other(rng.choice(shapes))))
    return True


def _copy_of_all(file: File, rng: random.Random) -> bool:
    prefix = rng.choice(("ema.", "teacher.", "old."))
    file.parts |= {prefix + name: Part(_other(part.value)) for name, part in file.parts.items()}
    return True


def _other_rows(file: File, rng: random.Random) -> bool:
    several = [name for name, part in file.parts.items() if part.value.dim() and len(part.value)]
    size, to_all = rng.choice(sorted({len(file.parts[name].value) for name in several})), rng.random() < 0.5
    names = [name for name in several if len(file.parts[name].value) == size]
    for name in names if to_all else names[:1]:
        value, of, _ = file.parts[name]
        grown = torch.cat([value, value[:1], value[:1]]) if rng.random() < 0.5 or size < 2 else value[:-1]
        file.parts[name] = Part(grown, of)
    return True


NAMES: dict[str, Callable[[File, random.Random], bool]] = {
    "dropped": _drop,
    "renamed": _rename,
    "a module renamed": _rename_module,
    "prefix added": _add,
    "prefix taken off": _take_off,
    "prefix replaced": _replace,
    "part in the middle": _put_inside,
    "prefix of a part": _of_a_part,
    "under two names": partial(_under_two_names, is_equal=True),
    "under two names, other values": partial(_under_two_names, is_equal=False),
    "junk": _junk,
    "another copy of all": _copy_of_all,
    "other rows": _other_rows,
}
LAYOUTS = ("shards", "a shard that no index names", "one name in two shards", "one name in two that differ", ".bin")


def write(file: File, layout: str, rng: random.Random, folder: Path) -> set[str]:
    """Write it; returns the names that a loader has no way to."""
    whole = {name: part.value.clone() for name, part in file.parts.items()}
    if layout in ("", ".bin"):
        (bin_file if layout else one_file)(whole, folder)
        return set()
    for name in file.some(rng) if layout.startswith("one name") else ():
        file.again[name] = Part(_other(file.parts[name].value)) if "differ" in layout else file.parts[name]
    places = {name: rng.randint(1, 2) for name in sorted(whole)}
    for number in (1, 2):
        shard = {name: value.contiguous() for name, value in whole.items() if places[name] == number}
        shard |= {name: p.value.clone().contiguous() for name, p in file.again.items() if places[name] != number}
        save_file(shard, folder / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
    hidden = {name for name, number in places.items() if number == 2} if "no index" in layout else set()
    weights = {n: f"model-0000{number}-of-00002.safetensors" for n, number in places.items() if n not in hidden}
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return hidden
