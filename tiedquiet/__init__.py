"""Proves tied weights and quiets the MISSING rows that are false. Importing it switches it on.

>>> import tiedquiet
>>> from transformers import AutoModel
"""

import logging
from types import TracebackType
from typing import TYPE_CHECKING

from tiedquiet import mode as _modes
from tiedquiet import patch as _patch
from tiedquiet.proof import Tie, Verdict
from tiedquiet.proof import check as _check
from tiedquiet.report import TieError, say

if TYPE_CHECKING:
    import torch

__all__ = ["Tie", "TieError", "Verdict", "__version__", "check", "disable", "enable"]
__version__ = "0.1.0"


class _Restore:
    """Puts back the mode that was in force, when left as a context manager."""

    def __init__(self, previous: _modes.Mode) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _patch.set_mode(self._previous)


def enable(mode: str | None = None) -> _Restore:
    """Switch tiedquiet on for every load from here on.

    Args:
        mode: `on`, `repair`, `strict` or `off` (or a synonym that `TIEDQUIET` takes); None reads `TIEDQUIET`.

    Returns:
        A context manager; leaving it restores the mode that was in force before this call.

    Raises:
        ValueError: the mode is none of these; the message lists them.
    """
    chosen = _modes.from_environment() if mode is None else _modes.parse(mode, "mode")
    previous = _patch.mode_now()
    _patch.set_mode(chosen)
    return _Restore(previous)


def disable() -> None:
    """Put transformers' own functions back. Harmless when already disabled."""
    _patch.set_mode("off")


def check(model: "torch.nn.Module") -> list[Tie]:
    """Judge the ties of a loaded model.

    Args:
        model: a model that transformers loaded while tiedquiet was enabled; of any other model, every
            declared tie is `unproven`.

    Returns:
        One `Tie` for each member of a tie that the checkpoint did not store, and for each stored member whose
        values were lost while loading; sorted by key. A model that stores all its tensors gives none.
    """
    if reason := _patch.inert_because():
        say(logging.WARNING, reason)
    return sorted((finding.tie for finding in _check(model)), key=lambda tie: tie.key)


enable()
