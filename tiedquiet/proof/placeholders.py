"""Unwritten memory: what was allocated while a model was loaded, and what happened to each of its elements.

Torch tells what it writes to. What is written without it shows in the marks: in memory that has just been allocated,
and in no other, up to 64 elements get a value that nobody computes, and whoever fills the memory writes over them.
"""

from collections.abc import Collection
from operator import attrgetter

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tiedquiet.proof.memory import ORDINARY, Place, plain

_VERSION = attrgetter("_version")
_MARKS = 64
_BYTE = 0xA5  # of floats it makes -2.87e-16 (half: -0.022), of whole numbers some that is no index, of bool none at all


class Placeholders:
    """Memory without values.

    Args:
        changed: addresses of storages that torch is known to have changed; of all others its count of writes is true.
    """

    def __init__(self, changed: set[int]) -> None:
        self._changed = changed
        # By the address of its storage object: the storage, and torch's count of writes.
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._written: dict[int, torch.Tensor] = {}  # for each element whether it was written
        self._marks: dict[int, _Marks] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    @property
    def has_marks(self) -> bool:
        """Whether any memory was marked."""
        return bool(self._marks)

    def add(self, tensor: torch.Tensor, is_fresh: bool = True) -> None:
        """Add memory that was allocated and not yet written.

        Args:
            tensor: what lies in it.
            is_fresh: nothing at all lies there yet, so that it may be marked.
        """
        for piece in plain(tensor):
            address = _address(piece)
            self._known[address] = StorageWeakRef(piece.untyped_storage()), version_of(piece)
            self._written.pop(address, None)
            self._marks.pop(address, None)
            is_whole = piece.is_contiguous() and not piece.storage_offset()
            if is_fresh and is_whole and piece.is_cpu and not (piece.is_inference() or piece.is_quantized):
                self._marks[address] = _Marks(piece)

    def take_marks_off(self, tensor: torch.Tensor) -> None:
        """Put back what was under the marks that are left, so that no trace remains."""
        for piece in filter(self._is_known, plain(tensor)):
            if (marks := self._marks.pop(_address(piece), None)) is not None:
                marks.take_off(piece)

    def add_computed(self, tensor: torch.Tensor) -> None:
        """Add what was computed from unwritten memory, unless it is a view of that."""
        if self._known.keys().isdisjoint(addresses_of(tensor)):
            self.add(tensor, is_fresh=False)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether some of a tensor's elements have no values: nothing wrote to them, through torch or without it."""
        return bool(self._known) and any(map(self._lacks_values, plain(tensor)))

    def note_written(self, tensor: torch.Tensor) -> None:
        """Note that torch wrote values to a tensor."""
        for piece in filter(self._is_known, plain(tensor)):
            address, elements = _address(piece), _elements(piece)
            written = self._written.get(address)
            # Written whole; or through a view of another element size, after which nothing is claimed.
            if piece.numel() >= elements or (written is not None and written.numel() != elements):
                for what in (self._known, self._written, self._marks):
                    what.pop(address, None)
                continue
            if written is None:
                written = self._written[address] = torch.zeros(elements, dtype=torch.bool, device="cpu")
            written.as_strided(*_layout(piece)).fill_(True)

    def note_unwritten(self, tensor: torch.Tensor) -> None:
        """Note that torch wrote to a tensor what has no values either."""
        for piece in plain(tensor):
            address, elements = _address(piece), _elements(piece)
            written = self._written.get(address)
            if not self._is_known(piece):
                self.add(piece, is_fresh=False)
                written = torch.ones(elements, dtype=torch.bool, device="cpu")
            self._marks.pop(address, None)
            if written is not None and written.numel() == elements:
                written.as_strided(*_layout(piece)).fill_(False)
                self._written[address] = written

    def _is_known(self, piece: torch.Tensor) -> bool:
        address = _address(piece)
        storage, noted = self._known.get(address, (None, 0))
        if storage is None or storage.expired():
            return False
        return address in self._changed or version_of(piece) == noted

    def _lacks_values(self, piece: torch.Tensor) -> bool:
        if not self._is_known(piece):
            return False
        address, elements = _address(piece), _elements(piece)
        written, marks = self._written.get(address), self._marks.get(address)
        if written is not None and written.numel() != elements:
            return False  # a view of another element size
        if written is not None and bool(written.as_strided(*_layout(piece)).all()):
            return False
        if marks is None or marks.size != piece.element_size():
            return True
        is_left = marks.are_left(piece)
        own = torch.ones_like(is_left)
        if piece.numel() < elements:
            inside = torch.zeros(elements, dtype=torch.bool, device="cpu")
            inside.as_strided(*_layout(piece)).fill_(True)
            own = inside[:: marks.step]
        if written is not None:
            own = own & ~written[:: marks.step]
        number, left = int(own.sum()), int((is_left & own).sum())
        # A single byte can have the value of a mark by accident.
        return not number or left > (number // 8 if piece.element_size() == 1 else 0)


class _Marks:
    """Elements of memory without values, evenly spaced, that were given a value.

    Where torch itself fills such memory with NaN (`torch.utils.deterministic.fill_uninitialized_memory`), that will do.
    """

    def __init__(self, piece: torch.Tensor) -> None:
        self.step, self.size = -(-piece.numel() // _MARKS), piece.element_size()
        places = self._places(piece)
        self._before = self._value = places.clone()
        fills = getattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        if not (piece.is_floating_point() and fills and torch.are_deterministic_algorithms_enabled()):
            self._value = torch.full_like(places, _BYTE)
            places.copy_(self._value)

    def are_left(self, piece: torch.Tensor) -> torch.Tensor:
        """For each of them whether nobody wrote over it."""
        return (self._places(piece) == self._value).all(1)

    def take_off(self, piece: torch.Tensor) -> None:
        """Put back what lay there, where nobody wrote over it."""
        is_left = self.are_left(piece)
        self._places(piece)[is_left] = self._before[is_left]

    def _places(self, piece: torch.Tensor) -> torch.Tensor:
        """Their bytes, through a tensor of its own, so that torch does not count what is written here."""
        memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(piece.untyped_storage())
        return memory[: len(memory) // self.size * self.size].view(-1, self.size)[:: self.step]


def version_of(tensor: Place) -> int:
    """How often torch has written to a tensor and its views, in whatever thread; not through `.data`.

    0 where torch does not count.
    """
    if isinstance(tensor, tuple):
        return sum(map(version_of, tensor))
    try:
        return tensor._version
    except RuntimeError:  # of a tensor that was made in inference mode; to ask each whether it was takes twice as long
        return 0


def versions_of(tensors: Collection[Place]) -> list[int]:
    """That of each; asked without a step of Python for each, if all of them tell."""
    try:
        return list(map(_VERSION, tensors))
    except (AttributeError, RuntimeError):
        return list(map(version_of, tensors))


def _address(piece: torch.Tensor) -> int:
    """Of the object that stands for a plain tensor's memory, and tells it from all others while that lives."""
    return int(piece.untyped_storage()._cdata)


def addresses_of(tensor: Place) -> list[int]:
    """Of all memory that a tensor lies in, also where it is a view of no elements: writing to it counts, too."""
    if not isinstance(tensor, tuple) and type(tensor) in ORDINARY:
        is_empty = tensor.layout is torch.strided and not tensor.numel() and not tensor.is_meta
        return [_address(piece) for piece in ([tensor] if is_empty else plain(tensor))]
    return [_address(piece) for piece in plain(tensor)]


def _elements(piece: torch.Tensor) -> int:
    """How many elements the memory has that a plain tensor lies in."""
    return piece.untyped_storage().nbytes() // piece.element_size()


def _layout(piece: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return piece.shape, piece.stride(), int(piece.storage_offset())
