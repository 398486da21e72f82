"""A call of `from_pretrained` in progress: the watch is in force until it returns, whatever the class does in it.

That is: overrides of the functions that it calls, `eval()` with what a layer merges there, kernels, and the class's own
`from_pretrained` around transformers'.
"""

from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from threading import get_ident
from typing import Any

from torch.nn import Module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

from tiedquiet import words
from tiedquiet.doors.outcome import conclude, say
from tiedquiet.doors.wrapping import guarded, stand_aside
from tiedquiet.proof import record
from tiedquiet.proof.load import Load
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Finding, LoadError, Verdict

_UNSEEN = (
    "its from_pretrained did not read it the way that tiedquiet watches: code of its class did, or "
    "torch.distributed.checkpoint"
)
_LATE = (
    "its class was given another from_pretrained after tiedquiet was enabled, and what that did to it was not seen; it "
    "is from now on"
)


class Call:
    """One call.

    Args:
        kind: the class that is loaded.
        is_late: whether it is made in a `from_pretrained` of the class itself that is not watched.

    Attributes:
        arguments: those of the load, where they are known.
        was_read: whether transformers read anything in it the way that is watched.
        thread: the one that it is made in.
    """

    def __init__(self, kind: type, is_late: bool = False) -> None:
        self.kind = kind
        self._is_late = is_late
        self.arguments: tuple[Any, ...] = ()
        self.was_read = False
        self._open: list[tuple[Load, Any]] = []
        self._modes = _modes()
        self.thread = get_ident()

    def includes(self, kind: type) -> bool:
        """Whether a call for this class is a part of it: for the class itself, or one below it, which a factory picks.

        A composite loads models of other classes, each by a call of its own. A static method has no class.
        """
        return not isinstance(self.kind, type) or (isinstance(kind, type) and issubclass(kind, self.kind))

    def run(self, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call; judge what was loaded in it once it has returned.

        Raises:
            LoadError: in `strict`, what was loaded is not sound, or our own code failed.
        """
        before = _CURRENT.get()
        try:
            try:
                _CURRENT.set(self)  # here: an interrupt comes between any two calls, and a token would be lost
                result = self.attempt(wrapped, args, kwargs)
            finally:
                _CURRENT.set(before)
        finally:
            self._leave_watch(self._modes)
        returned = result[0] if isinstance(result, tuple) and result else result
        _, failure = guarded(lambda: self._see_to_another(returned))
        failures = [failure, *(end(load, model) for load, model in self._open)]
        with suppress(Exception):
            self._see_to_copy(returned)
            self._see_to_unseen(returned)
        if (failure := next(filter(None, failures), None)) is not None:
            result = returned = None  # who keeps the error keeps this frame, and is not to keep the model
            self._open.clear()
            raise failure
        return result

    def _see_to_another(self, model: Any) -> None:
        """Judge what the call returns, where its class made that anew of the one model that it read."""
        loads = [(load, read) for load, read in self._open if type(read) is type(model)]
        if len(loads) == 1 and Load.of(model) is None and record.of(model) is None:
            ((load, read),) = loads
            if all(part is not read for part in model.modules()):
                load.move(read, model)
                self._open = [(own, model if own is load else other) for own, other in self._open]

    def _see_to_copy(self, model: Any) -> None:
        """Leave the record on what the call returns as well, where that is a copy which was made during the load."""
        load = Load.of(model)
        for own, original in self._open:
            if own is load is not None and (known := record.of(original)) is not None:
                load.close(model)
                record.leave(model, known.renewed(survey(model).state))

    def _see_to_unseen(self, model: Any) -> None:
        """Leave word on what the call returns that nobody saw how it was read."""
        if not self.was_read and isinstance(model, Module) and not any(map(record.of, model.modules())):
            finding = Finding("", Verdict.UNPROVEN, None, _UNSEEN)
            record.leave(model, Record(set(), set(), 0, lasting={"": finding}))
        if self._is_late and (known := record.of(model)) is not None:
            known.lasting[""] = Finding("", Verdict.UNPROVEN, None, _LATE)

    def attempt(self, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call in it, after which another may follow: if it fails, what it read is neither judged nor kept."""
        opened, modes = len(self._open), _modes()
        try:
            return wrapped(*args, **kwargs)
        except BaseException:
            self._leave_watch(modes)
            for load, model in self._open[opened:]:
                with suppress(Exception):
                    load.close(model)
            del self._open[opened:]
            raise

    def watch(self, load: Load, model: Any) -> None:
        """Watch over what was read into a model until the call returns."""
        load.is_in_call = True
        self._open.append((load, model))
        load.watch.__enter__()

    def end_earlier(self, model: Any) -> None:
        """Judge what was read into the model before: an adapter is about to be read into it.

        Raises:
            LoadError: in `strict`, as above.
        """
        earlier = [pair for pair in self._open if pair[1] is model]
        if earlier:
            self._leave_watch(self._modes)
            self._open = [pair for pair in self._open if pair[1] is not model]
            for load, _ in earlier:
                if (failure := end(load, model)) is not None:
                    raise failure

    @staticmethod
    def _leave_watch(modes: int) -> None:
        """Leave all dispatch modes but the outer ones: the code that entered the others has ended."""
        held = _get_current_dispatch_mode_stack()  # up to torch 2.6, to pop what nothing else holds ends the process
        while len(held) > modes:
            _pop_mode()
            held.pop()


def _modes() -> int:
    """How many dispatch modes are in force."""
    return len(_get_current_dispatch_mode_stack())


_CURRENT: ContextVar[Call | None] = ContextVar("tiedquiet_call", default=None)


def current() -> Call | None:
    """The call in progress here; not one of another thread, of whose context this one has a copy."""
    call = _CURRENT.get()
    return call if call is not None and call.thread == get_ident() else None


def end(load: Load, model: Any) -> LoadError | None:
    """Judge a load that has ended, log what there is to say, and leave its record on the model.

    Returns:
        What is to be raised.
    """
    load.is_over = True
    try:
        outcome = conclude(load, model)
    except Exception as error:
        with suppress(Exception):
            load.close(model)
        rows = f"; not proven, although left out of the report: {words.few(load.dropped)}" if load.dropped else ""
        return stand_aside(error, rows)
    say(outcome)
    return outcome.failure
