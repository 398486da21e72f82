"""How tiedquiet was asked to behave: the mode in force, and the only reader of the environment."""

import os
from typing import Literal

Mode = Literal["off", "on", "repair", "strict"]

VARIABLE = "TIEDQUIET"
_WORDS: dict[str, Mode] = {
    **dict.fromkeys(("0", "off", "false", "no"), "off"),
    **dict.fromkeys(("", "1", "on", "true", "yes"), "on"),
    "repair": "repair",
    "strict": "strict",
}

current: Mode = "off"
origin = "not enabled"


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


def from_environment() -> tuple[Mode, str]:
    """The mode that `TIEDQUIET` asks for, and where that came from; unset or empty means `on`."""
    value = os.environ.get(VARIABLE, "")
    return parse(value), f"{VARIABLE}={value}" if value else f"the default; {VARIABLE} is not set"


def is_main_process() -> bool:
    """Whether this process is rank 0 of a distributed launch, or not part of one."""
    return os.environ.get("RANK", "0") in ("", "0")
