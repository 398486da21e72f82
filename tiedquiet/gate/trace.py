"""What was made from what: each tensor that a library makes from a file's keeps the names of its sources."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_OF_SHAPE = ("_like", "new_")  # such operations take no values of what they are given


class Trace(TorchDispatchMode):
    """In force while a library renames, splits, merges and scales the tensors of a file.

    Args:
        tensors: those of the file, by name; each in a memory of its own.

    Attributes:
        asked: names of those that Python asked for as a number.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: set[str] = set()
        self._names: dict[int, frozenset[str]] = {}
        self._kept: list[torch.Tensor] = []  # or their memory might be given to others
        for name, tensor in tensors.items():
            self._note(tensor, frozenset([name]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        sources = frozenset().union(*(self.of(tensor) for tensor in tensors_in((args, kwargs))))
        if name == "_local_scalar_dense":
            self.asked |= sources
        elif sources and not (name.endswith(_OF_SHAPE[0]) or name.startswith(_OF_SHAPE[1])):
            for tensor in tensors_in(result):
                self._note(tensor, sources)
        return result

    def of(self, tensor: torch.Tensor) -> frozenset[str]:
        """The names of the file's tensors that it was made of."""
        return self._names.get(tensor.untyped_storage()._cdata, frozenset())

    def _note(self, tensor: torch.Tensor, sources: frozenset[str]) -> None:
        self._kept.append(tensor)
        self._names[tensor.untyped_storage()._cdata] = self.of(tensor) | sources


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a call was given, or gave."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
