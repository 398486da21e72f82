"""Where each element of a file's tensors went: a library's own renaming and splitting, followed without values.

What a library makes of tensors on meta lies in a memory that is one of theirs (a view, whatever its form), or was
copied together from such. Both can be done once more with the values that the file has, or with numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tiedquiet.gate.trace import tensors_in

_COPIES = ("_to_copy", "clone")  # each element stays where it is; a cast is the comparison's business
_JOINS = ("cat", "stack")
Tensors = Mapping[str, torch.Tensor]


class _Made(NamedTuple):
    """A memory that was copied together: by what, of what, and in which form."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    size: torch.Size
    stride: tuple[int, ...]


class Moves(TorchDispatchMode):
    """In force while a library turns tensors of a file into those of a model.

    Args:
        tensors: those of the file, by name; on meta, contiguous, each in a memory of its own.
    """

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: list[torch.Tensor] = list(tensors.values())  # or their memory might be given to others
        self._roots = {_memory(tensor): name for name, tensor in tensors.items()}
        self._types = {_memory(tensor): tensor.dtype for tensor in tensors.values()}
        self._made: dict[int, _Made] = {}
        self._computed: dict[int, frozenset[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = frozenset().union(*(self.of(tensor) for tensor in tensors_in((args, kwargs))))
        for tensor in tensors_in(result) if sources else ():
            place, name = _memory(tensor), func.overloadpacket.__name__
            is_known = bool(self.of(tensor))
            if is_known and not func._schema.is_mutable:
                continue  # a view
            self._kept.append(_alias(tensor))
            self._types.setdefault(place, tensor.dtype)
            if name in _COPIES + _JOINS:
                given, options = tree_map(_alias, (args, kwargs or {}))
                self._made[place] = _Made(func, given, options, tensor.size(), tensor.stride())
            else:
                self._computed[place] = self.of(tensor) | sources
        return result

    def of(self, tensor: torch.Tensor) -> frozenset[str]:
        """The names of the file's tensors that it was made of."""
        place = _memory(tensor)
        if place in self._computed:
            return self._computed[place]
        if place in self._made:
            made = self._made[place]
            return frozenset().union(*(self.of(one) for one in tensors_in((made.arguments, made.options))))
        return frozenset([self._roots[place]] if place in self._roots else ())

    def is_moved(self, tensor: torch.Tensor) -> bool:
        """Whether all of it was moved there from the file, and nothing was computed."""
        place = _memory(tensor)
        if place in self._computed or tensor.dtype is not self._types.get(place):
            return False
        return place in self._roots or all(self.is_moved(one) for one in tensors_in(self._made[place].arguments))

    def is_whole(self, tensor: torch.Tensor) -> bool:
        """Whether it is one tensor of the file as it is, at most cast or reshaped."""
        place = _memory(tensor)
        if place in self._roots:
            return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
        made = self._made[place]
        has_its_form = (tensor.size(), tensor.stride()) == (made.size, made.stride)
        return made.function.overloadpacket.__name__ in _COPIES and has_its_form and self.is_whole(made.arguments[0])

    def moved(self, tensor: torch.Tensor, values: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Move values as the library moved the tensors of the file to this one.

        Args:
            tensor: a tensor that was moved.
            values: for the name of a tensor of the file, one of its shape.
        """
        place = _memory(tensor)
        form = tensor.size(), tensor.stride(), tensor.storage_offset()
        if place in self._roots:
            whole = values(self._roots[place])
            return (
                whole if self.is_whole(tensor) and whole.shape == tensor.shape else whole.reshape(-1).as_strided(*form)
            )
        made = self._made[place]
        if made.function.overloadpacket.__name__ in _COPIES:
            again = self.moved(made.arguments[0], values)
        else:
            parts = [self.moved(part, values) for part in made.arguments[0]]
            again = made.function(parts, *made.arguments[1:], **made.options)
        if form[:2] == (made.size, made.stride):
            return again
        return torch.empty_strided(made.size, made.stride, dtype=again.dtype).copy_(again).as_strided(*form)


class Arrived(NamedTuple):
    """How many elements of a tensor of the file are in the model, and in how many places in all."""

    elements: int
    places: int


def arrived(moves: Moves, headers: Tensors, moved: Iterable[torch.Tensor]) -> Iterator[tuple[str, Arrived]]:
    """For each tensor of a file how much of it arrived.

    Args:
        moves: what followed them.
        headers: the tensors of the file.
        moved: the tensors that were made of these and are in the model, each of which was moved.
    """
    takers: dict[str, list[torch.Tensor]] = {}
    for tensor in moved:
        for name in moves.of(tensor):
            takers.setdefault(name, []).append(tensor)
    for name, own in sorted(takers.items()):
        count = headers[name].numel()
        if len(own) == 1 and moves.is_whole(own[0]):
            yield name, Arrived(count, count)
            continue
        has, places = torch.zeros(count + 1, dtype=torch.bool), 0
        for tensor in own:
            numbers = moves.moved(tensor, partial(_numbers, headers, name)).reshape(-1)
            has[numbers] = True
            places += int((numbers < count).sum())
        yield name, Arrived(int(has[:count].sum()), places)


def _numbers(headers: Tensors, name: str, of: str) -> torch.Tensor:
    """The place of each element in a tensor of the file; in place of other tensors one that it does not have."""
    count, header = headers[name].numel(), headers[of]
    return torch.arange(count).reshape(header.shape) if of == name else torch.full(header.shape, count)


def _alias(value: Any) -> Any:
    """The same memory, whatever `.data` of the tensor is set to."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
