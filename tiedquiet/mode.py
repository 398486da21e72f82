"""How tiedquiet was asked to behave: the mode in force, and the only reader of the environment.

A `with enable(...)` sets the mode of its context (`contextvars`), a plain call that of the process. A new thread begins
with an empty context; so that a guard set around it holds there as well, the strictest mode in force anywhere counts
if a context sets none.
"""

import os
import sys
from contextvars import ContextVar
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


@dataclass(frozen=True, eq=False)
class Setting:
    """One call of `enable` or `disable`."""

    mode: Mode
    origin: str


_of_context: ContextVar[Setting | None] = ContextVar("tiedquiet", default=None)
_of_process: list[Setting] = [Setting("off", "not enabled")]  # the last one counts
_around: list[Setting] = []  # that of every context that is inside a `with`


def setting() -> Setting:
    """The setting that counts here."""
    own = _of_context.get()
    if own is not None or not _around:
        return own or _of_process[-1]
    return max((_of_process[-1], *_around), key=lambda one: _STRICTNESS.index(one.mode))


def current() -> Mode:
    """The mode in force here."""
    return setting().mode


def is_on_somewhere() -> bool:
    """Whether any context or the process has a mode other than `off`."""
    return any(one.mode != "off" for one in (_of_process[-1], *_around))


def put(chosen: Setting) -> Setting | None:
    """Set the mode of the `with` around this call, or else of the process; returns the one that it replaces."""
    before = _of_context.get()
    if before is None:
        _of_process.append(chosen)
    else:
        _replace(before, chosen)
    return before


def enter(chosen: Setting) -> None:
    """Move what was set for the process to the context."""
    if chosen in _of_process:
        _of_process.remove(chosen)
        _replace(None, chosen)


def leave(chosen: Setting, before: Setting | None) -> None:
    """Undo a setting, and give the context its previous one; harmless the second time."""
    if chosen in _of_process:
        _of_process.remove(chosen)
    _replace(_of_context.get(), before)


def _replace(old: Setting | None, new: Setting | None) -> None:
    if old in _around:
        _around.remove(old)
    if new is not None:
        _around.append(new)
    _of_context.set(new)


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
