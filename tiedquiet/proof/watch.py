"""The watch: from the end of reading until the door's call returns, it sees what torch writes, and where.

It notes writes to memory that holds stored values, with the line of code that wrote, and memory that was allocated and
never written since, or only with what was computed from such memory. Code that reaches for a stored tensor may write to
it behind torch's back, so it is compared at the end: with the file, or with a copy if no file has its values.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode, _push_mode
from torch.utils._pytree import tree_map

from tiedquiet.proof.memory import Memory, Place, holds, lies_at, plain
from tiedquiet.proof.operations import (
    Operation,
    changed_by,
    do_likewise,
    operation_of,
    read_by,
    returned_by,
    tensors_in,
)
from tiedquiet.proof.placeholders import Placeholders, addresses_of, version_of, versions_of

_MOST_KEPT = 1 << 30  # bytes of main memory for copies of what somebody reaches for; anything beyond counts as lost
TRANSFORMERS = "transformers"
_NOT_THE_CULPRIT = {"torch", "tiedquiet", "contextlib", "copy", "functools", "accelerate"}


@dataclass
class Write:
    """Some code reached for a stored tensor.

    Attributes:
        by: the function, file and line that wrote the most at once; while none was seen to, what last reached for it.
        size: how many elements that was.
        before: a copy of the values as they were read, in main memory, where the files do not have them as such.
        package: whose code that was.
    """

    by: str
    size: int
    before: torch.Tensor | None
    package: str = ""

    @property
    def was_seen(self) -> bool:
        """Whether a write was seen."""
        return self.size > 0

    @property
    def prepares_adapter(self) -> bool:
        """Whether it was an initialiser of peft's, which takes a part of the base out of it for an adapter."""
        return _prepares_adapter(self.by, self.package)


class Watch(TorchDispatchMode):
    """Sees the torch operations of this thread while it is entered and open.

    Args:
        stored: where the tensors lie that the checkpoint delivered, by name.
        protect: let no write to them through.
        is_in_files: whether the values of one can be had from the files, so that no copy of it need be kept.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise the first operation imports torch._dynamo, which takes a second. Where that is there already,
        # compiled code may run under the watch: `_hide_from_dynamo`.
        return False

    def __init__(
        self, stored: Mapping[str, Place], protect: bool, is_in_files: Callable[[str], bool] = lambda name: False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.writes: dict[str, Write] = {}
        self.open = True
        self.error: Exception | None = None
        self._stored = stored
        self._protect = protect
        self._is_in_files = is_in_files
        self._memory: Memory | None = None
        self._kept = 0
        # What torch had counted of writes to them, and which storages were changed under the watch: of these, the count
        # no longer says anything about other threads.
        self._versions = dict(zip(stored, versions_of(stored.values()), strict=True))
        self._changed: set[int] = set()
        self._elsewhere: set[str] = set()
        self.placeholders = Placeholders(self._changed)

    # Not the base class's, which also sets flags of the whole process that two loads in two threads would leave on.
    def __enter__(self) -> "Watch":
        try:
            if "torch._dynamo" in sys.modules:
                _hide_from_dynamo()
        except Exception as error:
            self.give_up(error)  # said when the load is judged
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = args, kwargs
        operation: Operation | None = None
        written: list[torch.Tensor] = []
        is_empty, lifted = False, []
        try:
            operation = operation_of(func) if self.open else None
            if operation is not None and operation.only_computes and not self.placeholders:
                operation = None  # a class may compute a lot, and the look takes as long as the call of it
            if operation is not None:
                changed = changed_by(operation, args, kwargs)
                written = changed if operation.writes else []
                protected = self._look_at_stored(operation, written, args, kwargs)
                self._changed.update(address for tensor in changed for address in addresses_of(tensor))
                if protected and len(protected) == len(written) and operation.returns_only_these:
                    return returned_by(func, written)
                if protected:  # it must run for its other arguments, or for what else it returns
                    stand_ins = {id(tensor): tensor.clone() for tensor in protected}
                    call = tree_map(lambda value: stand_ins.get(id(value), value), call)
                is_empty = self._takes_from_placeholders(operation, args, kwargs)
                if is_empty:
                    for tensor in written:
                        self.placeholders.take_marks_off(tensor)
                    lifted = self.placeholders.lift_marks(read_by(operation, args, kwargs))
        except Exception as error:
            self.give_up(error)
            call = args, kwargs
        try:
            result = func(*call[0], **call[1])
        finally:
            try:
                self.placeholders.lay_marks(lifted)
            except Exception as error:
                self.give_up(error)
        if operation is not None:
            try:
                likewise = partial(do_likewise, func, args) if operation.overwrites_some else None
                self._look_at_placeholders(operation, written, result, is_empty, likewise)
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

    def written_elsewhere(self) -> list[str]:
        """The stored tensors of which torch counted writes that were not made under the watch."""
        if versions_of(self._stored.values()) == list(self._versions.values()):
            return []
        return [name for name in self._versions if name in self._elsewhere or self._is_changed_elsewhere(name)]

    def _is_changed_elsewhere(self, name: str) -> bool:
        tensor = self._stored[name]
        if version_of(tensor) == self._versions[name]:
            return False
        addresses = addresses_of(tensor)  # none on meta, where nothing can be lost
        return bool(addresses) and self._changed.isdisjoint(addresses)

    def note_read(self, names: Collection[str]) -> None:
        """Take what lies under these names now for what was read: a loader has just read it anew."""
        self._versions |= {name: version_of(self._stored[name]) for name in names}
        self._versions = {name: self._versions[name] for name in self._stored}  # in their order
        for name in names:
            self.writes.pop(name, None)
        self._elsewhere.difference_update(names)
        self._memory = None

    def give_up(self, error: Exception) -> None:
        """From here on nothing is known; the program goes on."""
        self.open, self.error = False, error

    def go_on(self) -> None:
        """Look again, after the load was judged and perhaps repaired in between."""
        self._versions = dict(zip(self._stored, versions_of(self._stored.values()), strict=True))
        self.open = self.error is None

    def _look_at_stored(
        self, operation: Operation, written: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Note which stored tensors the operation reaches for; returns those that must not be written to."""
        reached, values = [(tensor, True) for tensor in written], args[1] if operation.copies else None
        if operation.may_write or (operation.reaches and args[0].is_cpu):
            reached += [(tensor, False) for tensor in read_by(operation, args, kwargs)]
        protected = []
        for tensor, is_written in reached:
            pieces = plain(tensor)
            if self._memory is None or any(map(self._memory.has_moved, pieces)):
                self._memory = Memory(self._stored)
            names = [name for piece in pieces for name, _ in self._memory.meeting(piece)]
            if not names:
                continue
            is_kept = self._protect and self._keeps_all(names, tensor, values)
            for name in names:
                self._note(name, tensor.numel() if is_written and not is_kept else 0)
            if self._protect and is_written and not is_kept and not _prepares_adapter(*_culprit()):
                protected.append(tensor)
        return protected

    def _keeps_all(self, names: list[str], tensor: torch.Tensor, values: torch.Tensor | None) -> bool:
        """Whether what is copied into stored tensors is what they hold, its dimensions perhaps in another order."""
        return (
            values is not None
            and all(lies_at(tensor, self._stored[name]) for name in names)
            and set(addresses_of(values)).isdisjoint(addresses_of(tensor))
            and bool(holds(values.to(tensor), tensor))
        )

    def _note(self, name: str, written: int) -> None:
        write = self.writes.get(name)
        if write is None:
            if self._is_changed_elsewhere(name):
                self._elsewhere.add(name)
            before = None
            if not self._is_in_files(name) and len(pieces := plain(self._stored[name])) == 1:
                nbytes = pieces[0].numel() * pieces[0].element_size()
                if self._kept + nbytes <= _MOST_KEPT:
                    self._kept += nbytes
                    before = pieces[0].detach().to("cpu", copy=True)
            by, package = _culprit()
            self.writes[name] = Write(by, written, before, package)
        elif written > write.size:
            (write.by, write.package), write.size = _culprit(), written
        elif not write.was_seen and (culprit := _culprit())[1] != TRANSFORMERS:  # whose own code looks, and no more
            write.by, write.package = culprit

    def _takes_from_placeholders(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the operation computes from memory without values, so that what it gives has none either."""
        return operation.takes_values and any(map(self.placeholders.has, read_by(operation, args, kwargs)))

    def _look_at_placeholders(
        self,
        operation: Operation,
        written: list[torch.Tensor],
        result: Any,
        is_empty: bool,
        likewise: Callable[[torch.Tensor], object] | None,
    ) -> None:
        if operation.makes_empty:
            self.placeholders.add(result)
        elif is_empty:
            for tensor in written:
                self.placeholders.note_unwritten(tensor)
            for tensor in tensors_in((result,)):
                self.placeholders.add_computed(tensor)
        else:
            for tensor in written:
                self.placeholders.note_written(tensor, likewise)


@cache
def _hide_from_dynamo() -> None:
    Watch.__torch_dispatch__ = torch.compiler.disable(Watch.__torch_dispatch__)  # type: ignore[method-assign]


def _culprit() -> tuple[str, str]:
    """The innermost function outside torch that led here, as `by Class.function (file:line)`, and its package."""
    frame = sys._getframe(2)
    while _is_on_the_way(frame.f_globals.get("__name__", "")) and frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the second alone
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return f"by {name.rpartition('<locals>.')[2]} ({code.co_filename}:{frame.f_lineno})", package


def _prepares_adapter(by: str, package: str) -> bool:
    # `LoraLayer.pissa_init` and its like: what else peft writes to a base model, such as a merge, is a write as any.
    return package == "peft" and "_init (" in by


def _is_on_the_way(module: str) -> bool:
    return module.partition(".")[0] in _NOT_THE_CULPRIT or module == "transformers.initialization"
