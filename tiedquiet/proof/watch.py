"""The watch: from the end of reading to the report it sees what torch writes, and where.

It notes writes to memory that holds stored values, with the line of code that wrote and what was there before, and
memory that was allocated and never written since. A stored tensor is copied only once somebody reaches for it, which
loading a well-behaved model never does.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode, _push_mode
from torch.utils._pytree import tree_map

from tiedquiet.proof.memory import Memory, plain

_aten = torch.ops.aten
_EMPTY = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)
_COPY = (_aten.clone, _aten._to_copy, _aten.copy_, _aten.constant_pad_nd)  # the last pads a bias by nothing
_MOST_KEPT = 1 << 30  # bytes of main memory for values that are about to be overwritten; anything beyond counts as lost
_NOT_THE_CULPRIT = {"torch", "tiedquiet", "contextlib", "copy", "functools"}


@dataclass
class Write:
    """Somebody reached for a stored tensor.

    Attributes:
        by: the function, file and line that wrote the most at once; while none was seen to, what last reached for it.
        size: how many elements that was.
        before: the values as they were read, in main memory; None where they were too many to keep.
    """

    by: str
    size: int
    before: torch.Tensor | None

    @property
    def was_seen(self) -> bool:
        """Whether a write was seen."""
        return self.size > 0


class _Operation(NamedTuple):
    """What has to be known of an operator: the arguments that it changes, by place and name, and what it makes."""

    changes: tuple[tuple[int, str], ...]
    writes: bool  # to their memory
    returns_only_these: bool
    makes_empty: bool
    copies: bool
    reaches: bool


@cache
def _operation(func: Any) -> _Operation | None:
    """None for what neither changes a tensor nor makes empty memory."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None

    def is_written(value: Any) -> bool:
        return value.alias_info is not None and value.alias_info.is_write

    changes = tuple((place, a.name) for place, a in enumerate(schema.arguments) if is_written(a))
    packet = func.overloadpacket
    known = _Operation(
        changes,
        bool(changes) and torch.Tag.inplace_view not in func.tags,
        all(map(is_written, schema.returns)),
        packet in _EMPTY and not changes,
        packet in _COPY,
        # `.data`, `.detach()` and `.numpy()`: the way to write to a tensor behind torch's back.
        packet is _aten.detach,
    )
    return known if any((changes, *known[3:])) else None


class Watch(TorchDispatchMode):
    """Sees the torch operations of this thread while it is entered and open.

    Args:
        stored: the tensors that the checkpoint delivered, by name.
        protect: let no write to them through.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise the first operation imports torch._dynamo, which takes a second. Where that is there already,
        # compiled code may run under the watch: `_hide_from_dynamo`.
        return False

    def __init__(self, stored: Mapping[str, torch.Tensor], protect: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.writes: dict[str, Write] = {}
        self.open = True
        self.was_entered = False
        self.error: Exception | None = None
        self._stored = stored
        self._protect = protect
        self._memory: Memory | None = None
        self._kept = 0
        # What torch had counted of writes to them, and which storages were changed under the watch: of these, the count
        # tells nothing any more of other threads.
        self._versions = {name: _version(tensor) for name, tensor in stored.items()}
        self._changed: set[int] = set()
        self._elsewhere: set[str] = set()
        # Memory without values, by the address of its storage object, with the version that it had, and a mark for each
        # element that was written.
        self._placeholders: dict[int, tuple[StorageWeakRef, int]] = {}
        self._written: dict[int, torch.Tensor] = {}
        self._samples: dict[int, torch.Tensor] = {}  # what lay in memory that may be written to without torch

    # Not the base class's, which also sets flags of the whole process that two loads in two threads would leave on.
    def __enter__(self) -> "Watch":
        self.was_entered = True
        if "torch._dynamo" in sys.modules:
            _hide_from_dynamo()
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = args, kwargs
        operation: _Operation | None = None
        written: list[torch.Tensor] = []
        stand_ins: dict[int, torch.Tensor] = {}
        try:
            operation = _operation(func) if self.open else None
            if operation is not None:
                changed = _changed(operation, args, kwargs)
                written = changed if operation.writes else []
                protected = self._look_at_stored(operation, written, args)
                self._changed.update(address for tensor in changed for address in _addresses(tensor))
                if protected and len(protected) == len(written) and operation.returns_only_these:
                    return _returned(func, written)
                if protected:  # it must run for its other arguments, or for what else it returns
                    stand_ins = {id(tensor): tensor.clone() for tensor in protected}
                    call = tree_map(lambda value: stand_ins.get(id(value), value), call)
        except Exception as error:
            self.give_up(error)
            call = args, kwargs
        result = func(*call[0], **call[1])
        if operation is not None:
            try:
                self._look_at_placeholders(operation, written, args, result)
                if stand_ins:
                    back = {id(stand_ins[id(tensor)]): tensor for tensor in written if id(tensor) in stand_ins}
                    result = tree_map(lambda value: back.get(id(value), value), result)
            except Exception as error:
                self.give_up(error)
        return result

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Look away from code that is known to write nothing, where no other mode was entered since."""
        entered = _get_current_dispatch_mode() is self
        if entered:
            _pop_mode()
        try:
            yield
        finally:
            if entered:
                _push_mode(self)

    def add_placeholder(self, tensor: torch.Tensor) -> None:
        """Treat the memory of a tensor as allocated and not yet written."""
        for piece in plain(tensor):
            self._placeholders[_address(piece)] = StorageWeakRef(piece.untyped_storage()), _version(piece)

    def is_unwritten(self, tensor: torch.Tensor) -> bool:
        """Whether some of the tensor's memory was allocated under the watch and has not been written since."""
        for piece in plain(tensor) if self._placeholders else ():
            if self._is_placeholder(piece):
                address = _address(piece)
                marks, sample = self._written.get(address), self._samples.get(address)
                if sample is not None and not torch.equal(sample, _sample(piece)):
                    continue  # by numpy, say
                if marks is None:
                    return True
                if marks.numel() == piece.untyped_storage().nbytes() // piece.element_size():
                    own = marks.as_strided(piece.shape, piece.stride(), piece.storage_offset())
                    if not own.all():
                        return True
        return False

    def was_written_elsewhere(self, name: str) -> bool:
        """Whether torch counted writes to a stored tensor that were not made under the watch."""
        tensor = self._stored[name]
        return name in self._elsewhere or (
            _version(tensor) != self._versions[name] and self._changed.isdisjoint(_addresses(tensor))
        )

    def give_up(self, error: Exception) -> None:
        """From here on nothing is known; the program goes on."""
        self.open, self.error = False, error

    def _look_at_stored(
        self, operation: _Operation, written: list[torch.Tensor], args: tuple[Any, ...]
    ) -> list[torch.Tensor]:
        """Note which stored tensors the operation reaches for; returns those that must not be written to."""
        reached = written
        if operation.reaches:
            reached = [args[0]] if args[0].is_cpu else []
        protected = []
        for tensor in reached:
            if self._memory is None:
                self._memory = Memory(self._stored)
            names = [name for piece in plain(tensor) for name, _ in self._memory.meeting(piece)]
            for name in names:
                self._note(name, tensor.numel() if written else 0)
            if names and written and self._protect:
                protected.append(tensor)
        return protected

    def _note(self, name: str, written: int) -> None:
        write = self.writes.get(name)
        if write is None:
            if self.was_written_elsewhere(name):
                self._elsewhere.add(name)
            pieces = plain(self._stored[name])
            nbytes = sum(piece.numel() * piece.element_size() for piece in pieces)
            before = None
            if len(pieces) == 1 and self._kept + nbytes <= _MOST_KEPT:
                self._kept += nbytes
                before = pieces[0].detach().to("cpu", copy=True)
            self.writes[name] = Write(_culprit(), written, before)
        elif written > write.size or not write.was_seen:
            write.by, write.size = _culprit(), written

    def _look_at_placeholders(
        self, operation: _Operation, written: list[torch.Tensor], args: tuple[Any, ...], result: Any
    ) -> None:
        if operation.reaches and self._placeholders and args[0].is_cpu and self._is_untouched(args[0]):
            for piece in plain(args[0]):
                self._samples.setdefault(_address(piece), _sample(piece))
        # What is copied from memory without values has none either.
        empty = operation.copies and bool(self._placeholders) and self._is_untouched(args[1] if written else args[0])
        if operation.makes_empty or (empty and not written and result.numel() == args[0].numel()):
            self.add_placeholder(result)
        elif not empty:
            for tensor in written:
                for piece in plain(tensor):
                    self._mark(piece)

    def _is_placeholder(self, piece: torch.Tensor) -> bool:
        address = _address(piece)
        storage, noted = self._placeholders.get(address, (None, 0))
        if storage is None or storage.expired():
            return False
        return address in self._changed or _version(piece) == noted

    def _is_untouched(self, tensor: object) -> bool:
        pieces = plain(tensor) if isinstance(tensor, torch.Tensor) else []
        return bool(pieces) and all(
            self._is_placeholder(piece) and _address(piece) not in self._written for piece in pieces
        )

    def _mark(self, piece: torch.Tensor) -> None:
        if not self._is_placeholder(piece):
            return
        address, elements = _address(piece), piece.untyped_storage().nbytes() // piece.element_size()
        marks = self._written.get(address)
        # Written whole; or through a view of another element size, after which nothing is claimed.
        if piece.numel() >= elements or (marks is not None and marks.numel() != elements):
            del self._placeholders[address]
            self._written.pop(address, None)
            return
        if marks is None:
            marks = self._written[address] = torch.zeros(elements, dtype=torch.bool)
        marks.as_strided(piece.shape, piece.stride(), piece.storage_offset()).fill_(True)
        if address in self._samples:  # what changes from here on changes unseen
            self._samples[address] = _sample(piece)


def _version(tensor: torch.Tensor) -> int:
    """How often torch has written to a tensor and its views, in whatever thread; not through `.data`.

    0 where torch does not count, and on meta, where nothing can be lost.
    """
    return 0 if tensor.is_meta or tensor.is_inference() else tensor._version


def _address(piece: torch.Tensor) -> int:
    """Of the object that stands for a plain tensor's memory, and tells it from all others while that lives."""
    return int(piece.untyped_storage()._cdata)


def _addresses(tensor: torch.Tensor) -> list[int]:
    """Of all memory that a tensor lies in, also where it is a view of no elements: writing to it counts, too."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    is_empty = is_plain and not tensor.numel() and not tensor.is_meta
    return [_address(piece) for piece in ([tensor] if is_empty else plain(tensor))]


def _changed(operation: _Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for place, name in operation.changes:
        value = args[place] if place < len(args) else kwargs.get(name)
        found += [value] if isinstance(value, torch.Tensor) else value or ()
    return found


@cache
def _hide_from_dynamo() -> None:
    Watch.__torch_dispatch__ = torch.compiler.disable(Watch.__torch_dispatch__)  # type: ignore[method-assign]


def _sample(piece: torch.Tensor) -> torch.Tensor:
    """Up to some 1,024 bytes of the memory that a tensor is in, evenly spaced."""
    memory = torch.empty(0, dtype=torch.uint8).set_(piece.untyped_storage())
    return memory[:: max(1, memory.numel() // 1024)].clone()


def _returned(func: Any, written: list[torch.Tensor]) -> Any:
    """What an operation that returns the tensors it wrote to returns."""
    returned = written[: len(func._schema.returns)]
    return returned[0] if len(returned) == 1 else tuple(returned) or None


def _culprit() -> str:
    """The innermost function outside torch that led here, as `by Class.function (file:line)`."""
    frame = sys._getframe(2)
    while _is_on_the_way(frame.f_globals.get("__name__", "")) and frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    owner = frame.f_locals.get("self")
    name = getattr(code, "co_qualname", f"{type(owner).__name__}.{code.co_name}" if owner is not None else code.co_name)
    return f"by {name.rpartition('<locals>.')[2]} ({code.co_filename}:{frame.f_lineno})"


def _is_on_the_way(module: str) -> bool:
    return module.split(".")[0] in _NOT_THE_CULPRIT or module == "transformers.initialization"
