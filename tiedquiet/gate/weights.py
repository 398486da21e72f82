"""The files of a folder that hold weights: which one a loader reads, what lies beside it, what must not be opened."""

from pathlib import Path
from typing import Any, NamedTuple

from tiedquiet.gate.diagnosis import MOST, CannotCheck, damaged_index
from tiedquiet.gate.source import Source, is_inside, read_json
from tiedquiet.proof import pickles

# In the order in which a loader looks for them.
OF_TRANSFORMERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OF_DIFFUSERS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
OF_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


class Weights(NamedTuple):
    """One form in which a folder holds weights.

    Attributes:
        name: the file, or the index of several.
        files: where they lie.
        is_pickle: whether it is not safetensors.
    """

    name: str
    files: tuple[Path, ...]
    is_pickle: bool


def weights_of(source: Source, part: str, names: tuple[str, ...], trust: bool) -> list[Weights]:
    """The weights that a folder holds, that which a loader reads first; nothing is read of them but a header's length.

    Args:
        source: a folder, or a model on the hub, of which only indices are fetched.
        part: the part of a pipeline.
        names: those that a loader looks for, in its order.
        trust: open a pickle with any torch.

    Raises:
        CannotCheck: what is read first is damaged, leads out of the folder, or must not be opened.
    """
    found: list[Weights] = []
    for name in names:
        if not source.is_local and not name.endswith(".json"):
            continue
        path = source.file(name, part)
        try:
            if path is not None:
                found.append(_weights(source, part, path, name))
        except CannotCheck:
            if not found:
                raise  # what lies beside it, nobody reads
    if found and found[0].is_pickle and not trust and (reason := pickles_are_unsafe()):
        raise CannotCheck(f"{source.folder(part)}: {found[0].name} is a pickle, and {reason}")
    return found


def pickles_are_unsafe() -> str:
    """Why a pickle must not be opened with the installed torch, as a clause; empty where it may be."""
    reason = pickles.unsafe()
    return reason and f"{reason}, or trust the file with --trust-pickle"


def _weights(source: Source, part: str, path: Path, name: str) -> Weights:
    is_pickle = ".safetensors" not in name
    if not name.endswith(".json"):
        _check_header(path)
        return Weights(name, (path,), is_pickle)
    index = read_json(path)
    if reason := damaged_index(index):
        raise CannotCheck(f"{path} is damaged: {reason}")
    shards: list[Any] = list(dict.fromkeys(index["weight_map"].values()))
    for shard in shards:
        if not is_inside(shard):
            raise CannotCheck(f"{path} names {shard}, which leads out of the folder")
        if not is_pickle and not shard.endswith(".safetensors"):
            raise CannotCheck(f"{path} names {shard}, which is not a safetensors file")
    files = [source.file(shard, part) for shard in shards] if source.is_local else []
    for file in files:
        if file is not None:
            _check_header(file)
    return Weights(name, tuple(file for file in files if file is not None), is_pickle)


def _check_header(path: Path) -> None:
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if MOST < length <= path.stat().st_size:
            raise CannotCheck(f"{path} has a header of {length:,} bytes, and the format allows {MOST:,}")
