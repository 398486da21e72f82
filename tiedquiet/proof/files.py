"""What a checkpoint's files hold, tensor by tensor."""

import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tiedquiet.proof import pickles
from tiedquiet.proof.memory import identical

# What a safetensors header calls the types that torch has (https://huggingface.co/docs/safetensors); no model has the
# others, of less than a byte.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

COMPRESSED = "is compressed, and torch maps it and takes the compressed bytes for numbers: save it anew with torch.save"
_SHARD = re.compile(r"\d+(?=-of-\d+\.safetensors$)")


class Checkpoint:
    """The tensors that a load reads from. The files are opened on first use, and each tensor is read on demand.

    Args:
        state_dict: the tensors themselves, if the caller handed them over.
        files: paths of `.safetensors` or `.bin` files, if not.
        base: the prefix that a model with a head puts before the names of its base model.

    Attributes:
        closed: why the files must not be opened, as a clause; empty if they may be.
    """

    def __init__(
        self, state_dict: Mapping[str, Any] | None = None, files: Sequence[str] | None = None, base: str = ""
    ) -> None:
        self.state_dict = state_dict
        self.files = list(files or ())
        self.promised: set[str] = set()  # what an index says that the files have
        self.closed = closed_because(self.files)
        self._base = f"{base}." if base else ""

    @cached_property
    def names(self) -> list[tuple[str, str]]:
        """Each name that a file has, with the path of that file, in order; several files may have the same name.

        Raises:
            Exception: a file cannot be opened.
        """
        if self.state_dict is not None:
            return [(key, "") for key in self.tensors]
        return [(key, path) for path in self.files for key in _names(path)]

    @cached_property
    def headers(self) -> dict[str, torch.Tensor]:
        """Name, shape and type of each tensor that can be on meta, as a tensor there; no value is read.

        Raises:
            Exception: a file cannot be opened.
        """
        if self._is_unparsed:
            return {key: header for key, read in self._shells.items() for header in _on_meta(torch.empty_like, read())}
        return {key: header for path in self.files for key, header in _headers(path)}

    @cached_property
    def count(self) -> int:
        """How many tensors there are, as far as files may be asked; else 0."""
        if self._is_unparsed:
            return len(self._shells) if self.tells else 0
        return sum(map(len, self._types.values()))

    @cached_property
    def elements(self) -> int:
        """How many elements they have, in the same way; else 0. Of files with one type their size tells it at once."""
        if self._is_unparsed:
            return sum(read().numel() for read in self._shells.values()) if self.tells else 0
        if len(self.dtypes) != 1:
            return sum(header.numel() for header in self.headers.values())
        (dtype,) = self.dtypes
        return sum(map(_bytes_in, self.files)) // dtype.itemsize

    @cached_property
    def dtypes(self) -> set[torch.dtype]:
        """The types of the tensors, as far as files may be asked."""
        if self._is_unparsed:
            return {read().dtype for read in self._shells.values()} if self.tells else set()
        return {_TYPES.get(name.decode(), torch.uint8) for names in self._types.values() for name in set(names)}

    @property
    def _is_unparsed(self) -> bool:
        """Whether there is more to this than headers of safetensors files."""
        return self.state_dict is not None or not all(path.endswith(".safetensors") for path in self.files)

    @cached_property
    def _shells(self) -> dict[str, Callable[[], torch.Tensor]]:
        """The same as `tensors`, of which nobody may ask more than shape and type: no values are read."""
        if self.state_dict is not None or all(map(zipfile.is_zipfile, self.files)):
            return self.tensors  # they are there already, or mapped
        return dict(pair for path in self.files for pair in _open(path, and_values=False))

    @cached_property
    def _types(self) -> dict[str, list[bytes]]:
        return {path: _names_of_types(path) for path in self.files}

    @property
    def is_parted(self) -> bool:
        """Whether these are several files, or one of several."""
        return len(self.files) > 1 or any(map(_SHARD.search, self.files))

    @cached_property
    def tells(self) -> bool:
        """Whether names and types can be had: not of what must not be opened, nor of a GGUF file."""
        return not self.closed and not any(path.endswith(".gguf") for path in self.files)

    @cached_property
    def tensors(self) -> dict[str, Callable[[], torch.Tensor]]:
        """What reads each tensor, under the name that the file has for it; of several files, the last counts.

        Raises:
            Exception: a file cannot be opened.
        """
        if self.state_dict is not None:
            return {key: partial(_itself, value) for key, value in self.state_dict.items() if torch.is_tensor(value)}
        return dict(pair for path in self.files for pair in _open(path))

    def twice(self) -> Iterator[tuple[str, str, str]]:
        """Each name that two of the files have with different values, and those files; the second counts."""
        found: dict[str, str] = {}
        contents = cache(lambda path: dict(_open(path)))  # each file is opened once: a pickle is read in full
        for key, path in self.names if len(self.files) > 1 else ():
            if key in found and not identical(contents(found[key])[key](), contents(path)[key]()):
                yield key, Path(found[key]).name, Path(path).name
            found[key] = path

    def unlisted(self) -> "Checkpoint":
        """The shards next to these, of as many, that their index does not name."""
        own = set(map(Path, self.files))
        kinds = {(path.parent, _SHARD.sub("", path.name)) for path in own if _SHARD.search(path.name)}
        beside = [path for folder in {folder for folder, _ in kinds} for path in sorted(folder.iterdir())]
        found = [path for path in beside if path not in own and (path.parent, _SHARD.sub("", path.name)) in kinds]
        # A stranger's folder may have a pipe under such a name, or a link to anywhere; the hub's cache is all links.
        places = {path.resolve().parent for path in own}
        return Checkpoint(None, [str(p) for p in found if p.is_file() and p.resolve().parent in places])

    def is_inside(self, name: str) -> bool:
        """Whether a tensor lies in a mapping that a pickle has in place of one, and not by itself."""
        return getattr(self.tensors.get(name), "func", None) is _inner

    def names_of(self, name: str) -> Iterator[str]:
        """The names that files have for one of the model's tensors, unless they were renamed: its own comes first."""
        for key in dict.fromkeys((name, name.removeprefix(self._base), self._base + name)):
            if key in self.tensors:
                yield key


def closed_because(files: Sequence[str]) -> str:
    """Why files must not be opened, as a clause: one of them is a pickle that this torch does not read safely."""
    pickle = next((path for path in files if not path.endswith((".safetensors", ".gguf"))), None)
    return f"{Path(pickle).name} is a pickle, and {reason}" if pickle and (reason := pickles.unsafe()) else ""


def stamp(path: str) -> tuple[int, int]:
    """What changes when a file is written anew: its size and its time.

    Raises:
        OSError: it is gone.
    """
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def of_folder(folder: str, base: str = "", kind: str = "model") -> Checkpoint:
    """The checkpoint that `Trainer` and peft read from a folder: safetensors before pickle, whole before sharded.

    Args:
        folder: where it is.
        base: the prefix of the base model.
        kind: `model`, or `adapter_model`.

    Raises:
        OSError, ValueError, KeyError: there is none, or its index cannot be read.
    """
    import json

    pickle = "pytorch_model" if kind == "model" else kind
    names = f"{kind}.safetensors", f"{pickle}.bin", f"{kind}.safetensors.index.json", f"{pickle}.bin.index.json"
    path = next((path for name in names if (path := Path(folder, name)).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")
    if path.suffix != ".json":
        return Checkpoint(None, [str(path)], base)
    where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    checkpoint = Checkpoint(None, [str(Path(folder, shard)) for shard in dict.fromkeys(where.values())], base)
    checkpoint.promised = set(where)
    return checkpoint


def found_in(folder: str, base: str = "", kind: str = "model") -> Checkpoint:
    """The same; without any tensor where there is none, or it cannot be read."""
    nothing = Checkpoint({})
    if not folder:
        return nothing  # no folder is named; the current one is another
    try:
        checkpoint = of_folder(folder, base, kind)
        nothing.closed = checkpoint.closed
        checkpoint.names  # noqa: B018 (it opens the files)
    except Exception:
        return nothing
    return checkpoint


def _names_of_types(path: str) -> list[bytes]:
    """What a safetensors header calls the type of each tensor: only that is read, and parsed if it has an escape."""
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    if b"\\" in header:  # `"\u0064type"` is `"dtype"` as well
        with safe_open(path, "pt") as opened:
            return [opened.get_slice(key).get_dtype().encode() for key in opened.keys()]  # noqa: SIM118 (no mapping)
    return re.findall(rb'"dtype"\s*:\s*"(\w+)"', header)


def _bytes_in(path: str) -> int:
    """How many bytes a safetensors file has beside its header."""
    with open(path, "rb") as file:
        return os.path.getsize(path) - 8 - int.from_bytes(file.read(8), "little")


def _names(path: str) -> list[str]:
    if not path.endswith(".safetensors"):
        return [key for key, _ in _open(path, and_values=False)]
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _headers(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            entry = file.get_slice(key)
            kind = _TYPES.get(entry.get_dtype(), torch.uint8)
            yield from ((key, header) for header in _on_meta(torch.empty, entry.get_shape(), dtype=kind))


def _on_meta(make: Callable[..., torch.Tensor], given: Any, **more: Any) -> list[torch.Tensor]:
    """What is made on meta; nothing where that cannot be: quantised and nested tensors, sizes beyond those of torch."""
    try:
        return [make(given, device="meta", **more)]
    except Exception:
        return []


def _open(path: str, and_values: bool = True) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    if path.endswith(".safetensors"):
        file: Any = safe_open(path, "pt")  # mapped until the last reference to it goes
        yield from ((key, partial(file.get_tensor, key)) for key in file.keys())  # noqa: SIM118 (it is no mapping)
        return
    if path.endswith(".gguf"):
        raise ValueError(f"{Path(path).name} is a GGUF file, whose values are changed while they are read")
    if reason := closed_because([path]):
        raise ValueError(reason)
    for key, value in unpickled(path, and_values).items():
        if torch.is_tensor(value):
            yield key, partial(_itself, value)
        elif isinstance(value, Mapping):  # a training script's `{"state_dict": ...}`, of which a loader reads nothing
            yield from (
                (f"{key}.{name}", partial(_inner, part)) for name, part in value.items() if torch.is_tensor(part)
            )


def is_compressed(path: str) -> bool:
    """Whether a pickle has tensors that torch maps as they lie there, compressed, and takes for numbers."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/data/" in one.filename and one.compress_type for one in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):  # torch says what is wrong, or it is of the form before 1.6
        return False


def unpickled(path: str, and_values: bool = True) -> Any:
    """What a pickle holds, mapped where its form allows that.

    Args:
        path: the file.
        and_values: whether to read the values, where they cannot be mapped; else only shapes and types are right.

    Raises:
        Exception: it cannot be read, or wants to run code.
    """
    if is_compressed(path):
        raise ValueError(f"{Path(path).name} {COMPRESSED}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the form before torch 1.6 cannot be mapped
        with nullcontext() if and_values else _without_values():
            return torch.load(path, map_location="cpu", weights_only=True)


def _without_values() -> Any:
    return getattr(torch.serialization, "skip_data", nullcontext)()  # torch calls it a prototype: it may go again


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor  # apart from `_itself` only for `is_inside` to tell the two
