"""Unwritten memory: what was allocated while a model was loaded, and what happened to each of its bytes.

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
        # By the address of the storage object, which is no other's as long as there is a weak reference to it.
        self._known: dict[int, _Unwritten] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, tensor: torch.Tensor, is_fresh: bool = True) -> None:
        """Add memory that was allocated and not yet written.

        Args:
            tensor: what lies in it.
            is_fresh: nothing at all lies there yet, so that it may be marked.
        """
        for piece in plain(tensor):
            self._forget(_address(piece))
            self._known[_address(piece)] = _Unwritten(piece, is_fresh)

    def take_marks_off(self, tensor: torch.Tensor | None = None) -> None:
        """Put back what was under the marks that are left in a tensor's memory, or in any, whoever has that now."""
        for address in list(self._known) if tensor is None else addresses_of(tensor):
            if (known := self._known.get(address)) is not None:
                known.take_marks_off()

    def lift_marks(self, tensors: Iterable[torch.Tensor]) -> "list[tuple[_Unwritten, torch.Tensor]]":
        """Take marks off memory that is about to be read, so that what is made of it is the same as without them.

        Returns:
            Memory, and which of its marks were lifted: for `lay_marks`.
        """
        found = map(self._known.get, {address for tensor in tensors for address in addresses_of(tensor)})
        return [(known, known.lift_marks()) for known in found if known is not None]

    def lay_marks(self, lifted: "list[tuple[_Unwritten, torch.Tensor]]") -> None:
        """Put marks on again that were lifted."""
        for known, which in lifted:
            known.lay_marks(which)

    def add_computed(self, tensor: torch.Tensor) -> None:
        """Add what was computed from unwritten memory, unless it is a view of that."""
        if self._known.keys().isdisjoint(addresses_of(tensor)):
            self.add(tensor, is_fresh=False)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether some of a tensor's elements have no values: nothing wrote to them, through torch or without it.

        Not to be asked where the watch sees it, which would lift the marks that are looked at.
        """
        return any(map(self._lacks_values, plain(tensor)))

    def note_written(self, tensor: torch.Tensor, likewise: Callable[[torch.Tensor], object] | None = None) -> None:
        """Note that torch wrote values to a tensor.

        Args:
            tensor: what it wrote to.
            likewise: sets to True, of a map of the tensor's elements, those that it wrote; None if it wrote them all.
        """
        for piece in plain(tensor):
            if (known := self._of(piece)) is None:
                continue
            if likewise is None and _is_whole(piece):
                del self._known[_address(piece)]  # no mark is left, and what looks like one is a value
            elif likewise is None or piece is tensor:
                known.note_written(piece, likewise)
            else:
                self._forget(_address(piece))  # in an unknown part of it: after that nothing is claimed

    def note_unwritten(self, tensor: torch.Tensor) -> None:
        """Note that torch wrote to a tensor what has no values either."""
        for piece in plain(tensor):
            if (known := self._of(piece)) is None:
                self.add(piece, is_fresh=False)
                known = self._known[_address(piece)]
                known.written = known.map_of_bytes(True)
            known.note_unwritten(piece)

    def _forget(self, address: int) -> None:
        if (known := self._known.pop(address, None)) is not None:
            known.take_marks_off()

    def _of(self, piece: torch.Tensor) -> "_Unwritten | None":
        """What is known of the memory that a plain tensor lies in; of what was given another size nothing is."""
        known = self._known.get(_address(piece))
        return known if known is not None and known.nbytes == piece.untyped_storage().nbytes() else None

    def _lacks_values(self, piece: torch.Tensor) -> bool:
        known = self._of(piece)
        # By another thread, in places that the marks alone tell of.
        return known is not None and known.lacks_values(
            piece, _address(piece) not in self._changed and version_of(piece) != known.version
        )


class _Unwritten:
    """Memory that was allocated, and to which torch has not written, or not everywhere.

    Attributes:
        nbytes: how large it is.
        version: torch's count of writes to it, when it was allocated.
        written: for each of its bytes whether torch wrote to it; None if it did nowhere.
    """

    def __init__(self, piece: torch.Tensor, is_fresh: bool) -> None:
        storage = piece.untyped_storage()
        self._storage, self.nbytes, self.version = StorageWeakRef(storage), storage.nbytes(), version_of(piece)
        self.written: torch.Tensor | None = None
        # Marks are elements that are evenly spaced.
        self._size, self._step = piece.element_size(), -(-piece.numel() // _MARKS)
        self._under_marks: torch.Tensor | None = None
        if is_fresh and _is_whole(piece) and piece.is_cpu:
            places = self._places(storage)
            self._under_marks = places.clone()
            places.fill_(_BYTE)

    def lift_marks(self) -> torch.Tensor:
        """Put back what lay under the marks, where nobody wrote over them; returns for each whether that was done."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if self._under_marks is None or storage is None or storage.nbytes() < self.nbytes:
            return torch.zeros(0, dtype=torch.bool, device="cpu")
        places = self._places(storage)
        is_left = self._are_marked(places)
        if self.written is not None:
            is_left &= ~self._at_marks(self.written).any(1)  # what torch wrote and looks like a mark is a value
        places[is_left] = self._under_marks[is_left]
        return is_left

    def lay_marks(self, which: torch.Tensor) -> None:
        """Put on again those that were lifted from memory that is in use."""
        if len(which):
            self._places(torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata))[which] = _BYTE

    def take_marks_off(self) -> None:
        """Lift the marks for good."""
        self.lift_marks()
        self._under_marks = None

    def note_written(self, piece: torch.Tensor, likewise: Callable[[torch.Tensor], object] | None) -> None:
        """Note that torch wrote values to a part of it; `likewise` is that of `Placeholders.note_written`."""
        if self.written is None:
            self.written = self.map_of_bytes(False)
        written = _bytes_of(piece, self.written)
        if likewise is None:
            written.fill_(True)
        else:
            likewise(which := torch.zeros(piece.shape, dtype=torch.bool, device="cpu"))
            written.masked_fill_(which[..., None], True)

    def note_unwritten(self, piece: torch.Tensor) -> None:
        """Note that torch wrote to a part of it what has no values either."""
        if self.written is not None:
            _bytes_of(piece, self.written).fill_(False)

    def lacks_values(self, piece: torch.Tensor, is_written_elsewhere: bool) -> bool:
        """Whether some elements of a part of it have none.

        Args:
            piece: the part.
            is_written_elsewhere: another thread wrote, in places that the marks alone tell of.
        """
        if self.written is not None and bool(_bytes_of(piece, self.written).all()):
            return False
        if self._under_marks is None:
            return not is_written_elsewhere
        is_left = self._are_marked(self._places(piece.untyped_storage()))
        own = torch.ones_like(is_left)
        if piece.nbytes < self.nbytes:
            inside = self.map_of_bytes(False)
            _bytes_of(piece, inside).fill_(True)
            own = self._at_marks(inside).any(1)
        if self.written is not None:
            own = own & ~self._at_marks(self.written).any(1)
        number, left = int(own.sum()), int((is_left & own).sum())
        # A single byte can have the value of a mark by accident.
        return not (number or is_written_elsewhere) or left > (number // 8 if self._size == 1 else 0)

    def map_of_bytes(self, value: bool) -> torch.Tensor:
        """A map of all its bytes."""
        return torch.full((self.nbytes,), value, device="cpu")

    def _places(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The bytes of the marks, through a tensor of its own, so that torch does not count what is written there."""
        return self._at_marks(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage))

    def _at_marks(self, of_bytes: torch.Tensor) -> torch.Tensor:
        return of_bytes[: self.nbytes].view(-1, self._size)[:: self._step]

    def _are_marked(self, places: torch.Tensor) -> torch.Tensor:
        return (places == _BYTE).all(1)


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
    pieces = plain(tensor)
    if pieces or isinstance(tensor, tuple) or type(tensor) not in ORDINARY:
        return list(map(_address, pieces))
    return [_address(tensor)] if tensor.layout is torch.strided and not tensor.is_meta else []


def _is_whole(piece: torch.Tensor) -> bool:
    """Whether a plain tensor is all of the memory that it lies in."""
    return piece.is_contiguous() and piece.nbytes == piece.untyped_storage().nbytes()


def _bytes_of(piece: torch.Tensor, of_memory: torch.Tensor) -> torch.Tensor:
    """What a map of all bytes of a memory has for those of a plain tensor in it: its shape, and their number."""
    size = piece.element_size()
    strides = [size * stride for stride in piece.stride()]
    return of_memory.as_strided((*piece.shape, size), (*strides, 1), size * int(piece.storage_offset()))
