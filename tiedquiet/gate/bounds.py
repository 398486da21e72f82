"""What a config may ask for: to make a model of layers without end takes years before a file is read."""

import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy

from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.source import entries

_Part = TypeVar("_Part")
# How configs end the name of their number.
_LAYERS = re.compile(r"(?:layers?|depths?|blocks|block_count)(?:_per_\w+)?$")
_NUMBERS = re.compile(r"^n(?:um)?_|depths?$|blocks$|_per_")  # where a list has numbers; else those of single layers
_MOST_OF_A_KEY = 100  # letters
_MOST_PARTS = 100  # each is loaded, also where several are in one folder
_MOST_LAYERS = 10_000
_MOST_REPLICATED = 1_000  # layers, by an adapter: that takes the square of their number
_MOST_DIGITS = 3  # of the iterations of a singular value decomposition (`pissa_niter_16`)
MOST_LABELS = 1_000_000  # transformers makes a name for each
_MOST_NUMBERS = 1_000_000_000  # besides those that the files may have: of a byte, codes of two bits are four
_MOST_OF_A_BYTE = 64
_BYTES_OF_A_NUMBER = 8  # in float64, as tables are computed
_MOST_VALUES = 3_000_000  # the largest vocabularies, with scores, types and merges, are half as many
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value of each kind in a GGUF file
_STRING, _ARRAY = 8, 9
_WHOLE, _SIGNED = (0, 1, 2, 3, 4, 5, 10, 11), (1, 3, 5, 11)
_MOST_TENSORS = 250_000  # the published models with the most experts have half as many


def check_size(label: str, file: str, config: dict[str, Any]) -> None:
    """Raise where a config asks for layers or labels without end.

    Args:
        label: how a line about the model begins.
        file: where its config is.
        config: it.

    Raises:
        CannotCheck: it does.
    """
    asks = f"{label}: {file} asks for more than"
    # Those of labels are numbers; and a search in a long one would take the square of its length.
    for key, value in ((str(key)[-_MOST_OF_A_KEY:], value) for key, value in entries(config)):
        add_up = sum if _NUMBERS.search(key) else max
        if _LAYERS.search(key) and add_up([0, *_numbers(value)]) > _MOST_LAYERS:
            raise CannotCheck(f"{asks} {_MOST_LAYERS:,} layers ({key})")
        if key == "num_labels" and max([0, *_numbers(value)]) > MOST_LABELS:
            raise CannotCheck(f"{asks} {MOST_LABELS:,} labels ({key})")


def check_adapter(label: str, file: str, adapter: dict[str, Any]) -> None:
    """Raise CannotCheck where an adapter asks for work without end.

    Args:
        label: how a line about it begins.
        file: where its config is.
        adapter: it; of one in a LoRA file, each key has the component before it.
    """
    check_size(label, file, adapter)
    for key, value in ((str(key).rpartition(".")[2], value) for key, value in adapter.items()):
        if key == "layer_replication" and isinstance(value, list):
            spans = [pair for pair in value if isinstance(pair, list) and [type(end) for end in pair] == [int, int]]
            if sum(max(end - start, 0) for start, end in spans) > _MOST_REPLICATED:
                raise CannotCheck(f"{label}: {file} asks for more than {_MOST_REPLICATED:,} layers ({key})")
        if key == "init_lora_weights" and len(str(value).partition("_niter_")[2]) > _MOST_DIGITS:
            raise CannotCheck(f"{label}: {file} asks for too many iterations ({key})")


def parts_of(file: str, parts: Iterable[_Part]) -> list[_Part]:
    """All parts that an index names.

    Raises:
        CannotCheck: they are without end.
    """
    found = list(islice(parts, _MOST_PARTS + 1))
    if len(found) > _MOST_PARTS:
        raise CannotCheck(f"{file} names more than {_MOST_PARTS:,} parts")
    return found


def check_gguf(path: Path) -> None:
    """Raise CannotCheck where a GGUF file asks for layers without end, or has such values: each is read seven times."""
    if not path.is_file():
        return  # to open a pipe would never end
    torn = (struct.error, ValueError, OSError, RecursionError)  # the load says what is wrong
    with suppress(*torn), path.open("rb") as file:
        magic, tensors, entries = _numbers_of(file, "<4s4xQQ")
        if magic != b"GGUF":
            return
        left = _MOST_VALUES
        if tensors > _MOST_TENSORS:
            raise CannotCheck(f"{path} has more than {_MOST_TENSORS:,} tensors")
        for _ in range(entries):
            length = _numbers_of(file, "<Q")[0]
            file.seek(max(length - _MOST_OF_A_KEY, 0), 1)
            key = file.read(min(length, _MOST_OF_A_KEY)).decode(errors="replace")
            kind = _numbers_of(file, "<I")[0]
            if _LAYERS.search(key) and _largest(file, kind) > _MOST_LAYERS:
                raise CannotCheck(f"{path} asks for more than {_MOST_LAYERS:,} layers ({key})")
            left -= _skip(file, kind, 1, left)
            if left < 0:
                raise CannotCheck(f"{path} has more than {_MOST_VALUES:,} values in its metadata")


def _largest(file: BinaryIO, kind: int) -> int:
    """The largest of the whole numbers that come next, 0 if none do; the file stays where it is."""
    start, many = file.tell(), 1
    if kind == _ARRAY:  # transformers takes one with a single number for that number
        kind, many = _numbers_of(file, "<IQ")
    whole = range(min(many, _MOST_LAYERS) if kind in _WHOLE else 0)
    found = [int.from_bytes(file.read(_BYTES[kind]), "little", signed=kind in _SIGNED) for _ in whole]
    file.seek(start)
    return max([0, *found])


def _skip(file: BinaryIO, kind: int, many: int, most: int) -> int:
    """Go past so many values of a kind, and count them; what is beyond the most is left."""
    count = many
    if count > most:
        return count  # no file is so large that one could go past them
    if kind in _BYTES:
        file.seek(_BYTES[kind] * many, 1)
        return count
    for _ in range(many):
        if kind == _ARRAY:
            inner, length = _numbers_of(file, "<IQ")
            count += _skip(file, inner, length, most - count)
        elif kind == _STRING:
            file.seek(_numbers_of(file, "<Q")[0], 1)
        else:
            raise ValueError(kind)
        if count > most:
            break
    return count


def _numbers_of(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


@contextmanager
def bounded(stored: int = 0) -> Iterator[None]:
    """Stop what makes modules without end: a config asks for experts, codebooks or stages by any name, and of any size.

    Args:
        stored: how many bytes the files have; 0 where that is not known.
    """
    made, asked, most = count(1), 0, _most_numbers(stored)

    def look(module: torch.nn.Module, name: str, tensor: Any) -> None:
        nonlocal asked
        if module._parameters.get(name) is not None or module._buffers.get(name) is not None or tensor is None:
            return  # a loader puts another in the place of each
        if isinstance(tensor, torch.nn.Parameter) and next(made) > _MOST_TENSORS:
            raise RuntimeError(f"its config asks for more than {_MOST_TENSORS:,} tensors")
        asked += 0 if is_lazy(tensor) else tensor.numel()
        if stored and asked > most:
            raise RuntimeError(f"its config asks for more than {most:,} numbers, and its files have {stored:,} bytes")

    handles = (
        hooks.register_module_parameter_registration_hook(look),
        hooks.register_module_buffer_registration_hook(look),
    )
    try:
        with roomy(stored):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def roomy(stored: int) -> Iterator[None]:
    """Stop what takes memory without end by any other way: tables of positions, masks, lists of a config's own.

    Linux counts what is the process's own: neither files that are mapped to be read, nor what a GPU has reserved.

    Args:
        stored: how many bytes the files have; 0 where that is not known: then nothing is limited.

    Raises:
        RuntimeError: it took more.
    """
    most = _BYTES_OF_A_NUMBER * _most_numbers(stored)
    try:
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (ImportError, OSError):  # another system, which does not count that
        stored = 0
    if not stored:
        yield
        return
    before, hardest = resource.getrlimit(resource.RLIMIT_DATA)
    limit = taken + most if before == resource.RLIM_INFINITY else min(before, taken + most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hardest))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            told = f"{most:,} bytes of memory, the limit for files of this size"
            raise RuntimeError(f"it takes more than {told}, or more than there is") from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hardest))


def size_of(files: Iterable[str | Path]) -> int:
    """How many bytes these files have together."""
    return sum(os.stat(path).st_size for path in files)


def _most_numbers(stored: int) -> int:
    return _MOST_NUMBERS + _MOST_OF_A_BYTE * stored


def _numbers(value: object) -> list[int]:
    """A number, or those of a list at any depth."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif type(one) is int and one > 0:
            found.append(one)
    return found
