"""Proves tied weights and quiets the MISSING rows that are false. Importing it switches it on.

>>> import tiedquiet
>>> from transformers import AutoModel
"""

from types import TracebackType
from typing import TYPE_CHECKING

from tiedquiet import mode as _modes
from tiedquiet.switch import switch as _switch

if TYPE_CHECKING:
    import torch

    from tiedquiet.proof import Tie, Verdict
    from tiedquiet.report import TieError

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
        _switch(self._previous)


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
    previous = _modes.current
    _switch(chosen)
    return _Restore(previous)


def disable() -> None:
    """Put transformers' own functions back. Harmless when already disabled."""
    _switch("off")


def check(model: "torch.nn.Module") -> "list[Tie]":
    """Judge the ties of a loaded model.

    Args:
        model: a model that transformers loaded while tiedquiet was enabled; of any other model, every
            declared tie is `unproven`.

    Returns:
        One `Tie` for each member of a tie that the checkpoint did not store, and for each stored member whose
        values were lost while loading; sorted by key. A model that stores all its tensors gives none.
    """
    from tiedquiet import patch, proof

    patch.warn_if_inert()
    return sorted((finding.tie for finding in proof.check(model)), key=lambda tie: tie.key)


def __getattr__(name: str) -> object:
    # These live where they are used; importing that takes time, and nobody needs it before transformers is there.
    if name in ("Tie", "Verdict"):
        from tiedquiet import proof

        return getattr(proof, name)
    if name == "TieError":
        from tiedquiet.report import TieError

        return TieError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


enable()
