"""Unwritten memory: what was allocated while a model was loaded, and what happened to each of its elements.

Torch tells what it writes to. What is written without it shows in the marks: in memory that has just been allocated,
and in no other, up to 64 elements get a value that nobody computes, and whoever fills the memory writes over them.
"""

from collections.abc import Callable, Collection, Iterable
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

    def add(self, tensor: torch.Tensor, is_fresh: bool = True) -> None:
        """Add memory that was allocated and not yet written.

        Args:
            tensor: what lies in it.
            is_fresh: nothing at all lies there yet, so that it may be marked.
        """
        for piece in plain(tensor):
            address, storage = _address(piece), StorageWeakRef(piece.untyped_storage())
            self._forget(address)
            self._known[address] = storage, version_of(piece)
            is_whole = piece.is_contiguous() and not piece.storage_offset()
            if is_fresh and is_whole and piece.is_cpu and not (piece.is_inference() or piece.is_quantized):
                self._marks[address] = _Marks(piece, storage)

    def take_marks_off(self, tensor: torch.Tensor | None = None) -> None:
        """Put back what was under the marks that are left in a tensor's memory, or in any, whoever has that now."""
        for address in list(self._marks) if tensor is None else addresses_of(tensor):
            if (marks := self._marks.pop(address, None)) is not None:
                marks.take_off(self._written.get(address))

    def lift_marks(self, tensors: Iterable[torch.Tensor]) -> "list[tuple[int, _Marks, torch.Tensor]]":
        """Take marks off memory that is about to be read, so that what is made of it is the same as without them.

        Returns:
            Address, marks, and which of them were lifted: for `lay_marks`.
        """
        lifted = []
        for address in {address for tensor in tensors for address in addresses_of(tensor)}:
            if (marks := self._marks.pop(address, None)) is not None:
                lifted.append((address, marks, marks.take_off(self._written.get(address))))
        return lifted

    def lay_marks(self, lifted: "list[tuple[int, _Marks, torch.Tensor]]") -> None:
        """Put marks on again that were lifted."""
        for address, marks, which in lifted:
            marks.put_on(which)
            self._marks[address] = marks

    def add_computed(self, tensor: torch.Tensor) -> None:
        """Add what was computed from unwritten memory, unless it is a view of that."""
        if self._known.keys().isdisjoint(addresses_of(tensor)):
            self.add(tensor, is_fresh=False)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether some of a tensor's elements have no values: nothing wrote to them, through torch or without it."""
        return bool(self._known) and any(map(self._lacks_values, plain(tensor)))

    def note_written(self, tensor: torch.Tensor, likewise: Callable[[torch.Tensor], object] | None = None) -> None:
        """Note that torch wrote values to a tensor.

        Args:
            tensor: what it wrote to.
            likewise: sets to True, of a map of the tensor's elements, those that it wrote; None if it wrote them all.
        """
        for piece in filter(self._is_known, plain(tensor)):
            address, elements = _address(piece), _elements(piece)
            written = self._written.get(address)
            if likewise is None and piece.is_contiguous() and piece.numel() >= elements:
                self._marks.pop(address, None)  # none is left, and what looks like one is a value
                self._forget(address)
                continue
            # Through a view of another element size, or in an unknown part of it: after that nothing is claimed.
            if (written is not None and written.numel() != elements) or (likewise and piece is not tensor):
                self._forget(address)
                continue
            if written is None:
                written = self._written[address] = torch.zeros(elements, dtype=torch.bool, device="cpu")
            (likewise or _fill)(written.as_strided(*_layout(piece)))

    def note_unwritten(self, tensor: torch.Tensor) -> None:
        """Note that torch wrote to a tensor what has no values either."""
        for piece in plain(tensor):
            address, elements = _address(piece), _elements(piece)
            written = self._written.get(address)
            if not self._is_known(piece):
                self.add(piece, is_fresh=False)
                written = torch.ones(elements, dtype=torch.bool, device="cpu")
            if written is not None and written.numel() == elements:
                written.as_strided(*_layout(piece)).fill_(False)
                self._written[address] = written

    def _forget(self, address: int) -> None:
        if (marks := self._marks.pop(address, None)) is not None:
            marks.take_off(self._written.get(address))
        self._known.pop(address, None)
        self._written.pop(address, None)

    def _is_known(self, piece: torch.Tensor) -> bool:
        storage, _ = self._known.get(_address(piece), (None, 0))
        return storage is not None and not storage.expired()

    def _lacks_values(self, piece: torch.Tensor) -> bool:
        if not self._is_known(piece):
            return False
        address, elements = _address(piece), _elements(piece)
        written, marks = self._written.get(address), self._marks.get(address)
        # By another thread, in places that the marks alone tell of.
        is_written_elsewhere = address not in self._changed and version_of(piece) != self._known[address][1]
        if written is not None and written.numel() != elements:
            return False  # a view of another element size
        if written is not None and bool(written.as_strided(*_layout(piece)).all()):
            return False
        if marks is None or marks.size != piece.element_size():
            return not is_written_elsewhere
        is_left = marks.are_left(piece.untyped_storage())
        own = torch.ones_like(is_left)
        if piece.numel() < elements:
            inside = torch.zeros(elements, dtype=torch.bool, device="cpu")
            inside.as_strided(*_layout(piece)).fill_(True)
            own = inside[:: marks.step]
        if written is not None:
            own = own & ~written[:: marks.step]
        number, left = int(own.sum()), int((is_left & own).sum())
        # A single byte can have the value of a mark by accident.
        return not (number or is_written_elsewhere) or left > (number // 8 if piece.element_size() == 1 else 0)


class _Marks:
    """Elements of memory without values, evenly spaced, that were given a value.

    Where torch itself fills such memory with NaN (`torch.utils.deterministic.fill_uninitialized_memory`), that will do.
    """

    def __init__(self, piece: torch.Tensor, storage: StorageWeakRef) -> None:
        self._storage, self._elements = storage, piece.numel()
        self.step, self.size = -(-self._elements // _MARKS), piece.element_size()
        places = self._places(piece.untyped_storage())
        self._before = self._value = places.clone()
        fills = getattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        if not (piece.is_floating_point() and fills and torch.are_deterministic_algorithms_enabled()):
            self._value = torch.full_like(places, _BYTE)
            places.copy_(self._value)

    def are_left(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """For each of them whether nobody wrote over it."""
        return (self._places(storage) == self._value).all(1)

    def take_off(self, written: torch.Tensor | None) -> torch.Tensor:
        """Put back what lay there, where nobody wrote over it.

        Args:
            written: for each element whether torch wrote to it: if so, what looks like a mark is a value.

        Returns:
            For each mark whether it was taken off.
        """
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None or storage.nbytes() < self._elements * self.size:
            return torch.zeros(0, dtype=torch.bool, device="cpu")  # that memory is gone
        is_left = self.are_left(storage)
        if written is not None and written.numel() == self._elements:
            is_left &= ~written[:: self.step]
        self._places(storage)[is_left] = self._before[is_left]
        return is_left

    def put_on(self, which: torch.Tensor) -> None:
        """Put those on again that were taken off from memory that is in use."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        self._places(storage)[which] = self._value[which]

    def _places(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Their bytes, through a tensor of its own, so that torch does not count what is written here."""
        memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        return memory[: self._elements * self.size].view(-1, self.size)[:: self.step]


def _fill(written: torch.Tensor) -> None:
    written.fill_(True)


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
