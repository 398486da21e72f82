"""A folder's files of weights: which one a loader reads, which others there are, which must not be opened."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tiedquiet.gate.diagnosis import damaged_index
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.source import MOST, Source, is_inside, read_json
from tiedquiet.proof import pickles
from tiedquiet.proof.files import COMPRESSED, is_compressed

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
_OF_MODELS = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model\b.*\.(?:safetensors|bin)$")
_SHARD = re.compile(r"-\d+-of-\d+$")
# Of each process a part (transformers/distributed/checkpoint.py), which `from_pretrained` reads before all others.
_OF_PROCESSES = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_MOST_SHARDS = 10_000  # each is looked for several times, and the largest published checkpoints have a few hundred
OF_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def has_weights(folder: Path) -> bool:
    """Whether a folder has a file of the names under which models are saved; none if it may not be read."""
    return any(_OF_MODELS.match(path.name) for path in folder.glob("*"))


def of_variant(names: Sequence[str], variant: str) -> tuple[str, ...]:
    """The names of a variant's files: `model.fp16.safetensors`, `model.safetensors.index.fp16.json`."""
    return tuple(
        ".".join((*name.split(".")[:-1], *([variant] if variant else ()), name.split(".")[-1])) for name in names
    )


def variants_in(source: Source, part: str, names: Sequence[str]) -> list[str]:
    """The variants of which a folder on this machine holds weights; an empty one if some have none."""
    found = {"" for name in names if source.is_local and source.file(name, part) is not None}
    for start, _, end in (name.rpartition(".") for name in names) if source.is_local else ():
        files = [path.name for path in source.folder(part).glob(f"{start}.*.{end}")]
        found |= {name[len(start) + 1 : -len(end) - 1] for name in files}
    return sorted(name for name in found if "." not in name and not _SHARD.search(name))


def has_variant(source: Source, part: str, variant: str) -> bool:
    """Whether a part of a pipeline has weights of a variant; diffusers reads those of the others without it."""
    names = of_variant((*OF_TRANSFORMERS, *OF_DIFFUSERS), variant)
    safe = [name for name in names if ".safetensors" in name]
    return any(source.file(name, part) is not None for name in (names if source.is_local else safe))


def only_of_variants(label: str, found: Sequence[str], asked: str) -> str:
    """Why a folder has no weights to read although it has others."""
    there = " and ".join(f"of variant {name}" if name else "without a variant" for name in found)
    others = [name for name in found if name]
    do = f"--variant {others[0]} reads them" if others else "leave out --variant"
    return f"{label} has weights {there} and none {f'of variant {asked}' if asked else 'without one'}; {do}"


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
    """The weights that a folder holds, in a loader's order; nothing is read of them but a header's length.

    Args:
        source: a folder, or a model on the hub, of which only indices are fetched.
        part: the part of a pipeline.
        names: those that a loader looks for, in its order.
        trust: open a pickle with any torch.

    Raises:
        CannotCheck: what is read first is damaged, is outside the folder, or must not be opened.
    """
    found: list[Weights] = []
    for name in names:
        if not source.is_local and not name.endswith(".json"):
            continue
        try:
            if (path := source.file(name, part)) is not None:
                found.append(_weights(source, part, path, name))
        except CannotCheck:
            if not found:
                raise  # what lies beside it, nobody reads
    if found and found[0].is_pickle and not trust and (reason := pickles_are_unsafe()):
        raise CannotCheck(f"{source.folder(part)}: {found[0].name} is a pickle, and {reason}")
    return found


def refuse_distributed(source: Source, part: str) -> None:
    """Raise CannotCheck if the installed transformers would read the parts that processes have saved by themselves."""
    from transformers import distributed

    if not source.is_local or not hasattr(distributed, "consolidate_distributed_checkpoint"):
        return
    folder = source.folder(part)
    if shards := sorted(path.name for path in folder.glob("shard-*") if _OF_PROCESSES.match(path.name)):
        raise CannotCheck(
            f"{folder}: {shards[0]} is a part of a distributed checkpoint, which tiedquiet does not inspect; make it "
            "whole with transformers.distributed.consolidate_distributed_checkpoint, in a folder with its config.json, "
            "and check that"
        )


def pickles_are_unsafe() -> str:
    """Why a pickle must not be opened with the installed torch, as a clause; empty if it may be."""
    reason = pickles.unsafe()
    return reason and f"{reason}, or trust the file with --trust-pickle"


def _weights(source: Source, part: str, path: Path, name: str) -> Weights:
    is_pickle = ".safetensors" not in name
    if not name.endswith(".json"):
        check_header(path)
        return Weights(name, (path,), is_pickle)
    index = read_json(path)
    if reason := damaged_index(index):
        raise CannotCheck(f"{path} is damaged: {reason}")
    shards: list[Any] = list(dict.fromkeys(index["weight_map"].values()))
    if len(shards) > _MOST_SHARDS:
        raise CannotCheck(f"{path} names more than {_MOST_SHARDS:,} files")
    for shard in shards:
        if not is_inside(shard):
            raise CannotCheck(f"{path} names {shard}, which points outside the folder")
        if not is_pickle and not shard.endswith(".safetensors"):
            raise CannotCheck(f"{path} names {shard}, which is not a safetensors file")
    files = [source.file(shard, part) for shard in shards] if source.is_local else []
    for file in files:
        if file is not None:
            check_header(file)
    return Weights(name, tuple(file for file in files if file is not None), is_pickle)


def check_header(path: Path) -> None:
    """Raise CannotCheck where a file must not be read: its header is too long, it is compressed, or half there.

    aria2 makes a file as long as it will be, and fills it in any order.
    """
    if path.with_name(f"{path.name}.aria2").exists():
        raise CannotCheck(f"{path} has not been downloaded to its end: {path.name}.aria2 lies beside it")
    if path.suffix == ".safetensors":
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
        except OSError as error:
            raise CannotCheck(f"{path} cannot be read: {error.strerror}") from error
        if MOST < length <= path.stat().st_size:
            raise CannotCheck(f"{path} has a header of {length:,} bytes, and the format allows {MOST:,}")
    elif is_compressed(str(path)):
        raise CannotCheck(f"{path} {COMPRESSED}")
