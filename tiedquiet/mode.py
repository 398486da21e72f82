"""How tiedquiet was asked to behave: the mode in force, and the only reader of the environment.

A `with enable(...)` sets the mode of its context (`contextvars`), a plain call that of the process. A new thread begins
with an empty context; so that a guard set around it holds there as well, the strictest mode in force anywhere counts
if a context sets none.

Any thread may ask at any moment: what takes another's place is put in before that is taken out, each in a single step.
"""

import os
import sys
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

Mode = Literal["off", "on", "repair", "strict"]

VARIABLE = "TIEDQUIET"
_WORDS: dict[str, Mode] = {
    **dict.fromkeys(("0", "off", "false", "no"), "off"),
    **dict.fromkeys(("", "1", "on", "true", "yes"), "on"),
    "repair": "repair",
    "strict": "strict",
}
_STRICTNESS: tuple[Mode, ...] = ("off", "on", "repair", "strict")


@dataclass(eq=False)
class Setting:
    """One call of `enable` or `disable`.

    Attributes:
        mode: what it asks for.
        origin: where it comes from.
        around: that of the `with` that it was made in, or began; None if it is the process's.
        is_left: whether it began a `with` that has been left.
        here: of the context that it was made in, and of no other.
    """

    mode: Mode
    origin: str
    around: "Setting | None" = None
    is_left: bool = False
    here: Token[None] | None = None

    def is_of_this_context(self) -> bool:
        """Whether it was made in this very context, and not in the one that a task's is a copy of."""
        try:
            if self.here is not None:
                _here.reset(self.here)
        except ValueError:
            return False
        self.here = _here.set(None)
        return True


_here: ContextVar[None] = ContextVar("tiedquiet_here", default=None)
_of_context: ContextVar[Setting | None] = ContextVar("tiedquiet", default=None)
_of_process: list[Setting] = [Setting("off", "not enabled")]  # the last one counts
_in_force: list[Setting] = []  # those of all contexts that are inside a `with`


def setting() -> Setting:
    """The setting that counts here."""
    own = _of_context.get()
    if own is not None or not _in_force:
        return own or _of_process[-1]
    return max((_of_process[-1], *_in_force), key=lambda one: _STRICTNESS.index(one.mode))


def current() -> Mode:
    """The mode in force here."""
    return setting().mode


def is_on_somewhere() -> bool:
    """Whether any context or the process has a mode other than `off`."""
    return any(one.mode != "off" for one in (_of_process[-1], *_in_force))


def put(chosen: Setting) -> Setting | None:
    """Set the mode of the `with` around this call, or else of the process; returns the one that it replaces."""
    before = _of_context.get()
    if before is None:
        _of_process.append(chosen)
    else:
        _replace(before, chosen, before.around)
    return before


def enter(chosen: Setting) -> None:
    """Begin a `with`: what was set for the process, or for the `with` around it, is this one's."""
    if chosen in _of_process:
        _replace(None, chosen, chosen)
        _take(_of_process, chosen)
    elif _of_context.get() is chosen:
        chosen.around = chosen


def leave(chosen: Setting, before: Setting | None) -> None:
    """Undo a setting, and give the context its previous one; harmless the second time.

    Whatever was set inside its `with` ends with it, in the contexts of tasks as well; and what a context has that is
    none of its own stays: a generator may be closed in another than the one that it was begun in.
    """
    chosen.is_left = True
    own = _of_context.get()
    if own is not None and chosen in (own, own.around):
        if before is not None and before.around is not None and not before.around.is_left and before not in _in_force:
            _in_force.append(before)
        _of_context.set(before)
    _take(_of_process, chosen)
    for one in list(_in_force):
        if one is chosen or one.around is chosen:
            _take(_in_force, one)


def _replace(old: Setting | None, new: Setting, around: Setting | None) -> None:
    """Set the context's; the old one stays in force in the context that this one is a copy of."""
    new.around = around
    new.is_of_this_context()
    _in_force.append(new)
    _of_context.set(new)
    if old in _in_force and old.is_of_this_context():
        _take(_in_force, old)


def _take(settings: list[Setting], one: Setting) -> None:
    """Take one out and nothing else, whatever other threads put in or take out meanwhile."""
    with suppress(ValueError):
        settings.remove(one)


def parse(value: str, name: str = VARIABLE) -> Mode:
    """Turn a word into a mode; `name` says in the error where the word came from.

    Raises:
        ValueError: `value` is not one of the words; the message lists them.
    """
    try:
        return _WORDS[value.strip().lower()]
    except (KeyError, AttributeError):
        words = ", ".join(word for word in _WORDS if word)
        raise ValueError(f"{name}={value!r} is not a mode of tiedquiet; valid values: {words}") from None


def from_environment() -> Setting:
    """The mode that `TIEDQUIET` asks for, and where that came from; unset or empty means `on`."""
    value = os.environ.get(VARIABLE, "")
    return Setting(parse(value), f"{VARIABLE}={value}" if value else f"the default; {VARIABLE} is not set")


def is_command_line() -> bool:
    """Whether this process is tiedquiet's own command line, which reports errors itself, in one line."""
    started: list[str] = getattr(sys, "argv", None) or [""]  # there is none yet while start-up files run
    if started[0] == "-m":  # the package is imported, and then its __main__
        return is_run_as_module()
    return Path(started[0]).stem == "tiedquiet"


def is_run_as_module() -> bool:
    """Whether this process was started by `python -m tiedquiet`."""
    return any(pair == ("-m", "tiedquiet") for pair in pairwise(sys.orig_argv))


def is_main_process() -> bool:
    """Whether this process is rank 0 of a distributed launch, or not part of one."""
    return os.environ.get("RANK", "0") in ("", "0")
