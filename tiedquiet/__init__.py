"""Proves that a loaded model holds what its checkpoint stored, and quiets the MISSING rows that are false.

>>> import tiedquiet  # switches it on
>>> from transformers import AutoModel
"""

from types import TracebackType
from typing import TYPE_CHECKING

from tiedquiet import mode as _modes
from tiedquiet.switch import switch as _switch
from tiedquiet.verdict import Finding, LoadError, Proof, Verdict

if TYPE_CHECKING:
    import torch

__all__ = ["Finding", "LoadError", "Proof", "Verdict", "__version__", "check", "disable", "enable"]
__version__ = "0.2.0"


class _Restore:
    """Puts back the mode that was in force, when left as a context manager."""

    def __init__(self, mode: _modes.Mode, origin: str) -> None:
        self._mode, self._origin = mode, origin

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self._mode, self._origin)


def enable(mode: str | None = None) -> _Restore:
    """Switch tiedquiet on for every load from here on.

    Args:
        mode: `on`, `repair`, `strict` or `off` (or a synonym that `TIEDQUIET` takes); None reads `TIEDQUIET`.

    Returns:
        A context manager; leaving it restores the mode that was in force before this call.

    Raises:
        ValueError: the mode is none of these; the message lists them.
        LoadError: the mode is `strict`, and the transformers that is imported cannot be guarded.
    """
    chosen, origin = _modes.from_environment() if mode is None else (_modes.parse(mode, "mode"), "tiedquiet.enable")
    previous = _Restore(_modes.current, _modes.origin)
    _switch(chosen, origin)
    return previous


def disable() -> None:
    """Put transformers' own functions back. Harmless when there is nothing to put back."""
    _switch("off", "tiedquiet.disable")


def check(model: "torch.nn.Module") -> Proof:
    """Say what is known of a loaded model.

    Args:
        model: one that transformers loaded while tiedquiet was enabled; or a copy of it, or what `torch.compile`,
            DDP or PEFT made of it, or a module that has several of them inside.

    Returns:
        A `Proof`. Of a model whose load was not seen it says that, and its `ok` is false.
    """
    from tiedquiet import load, patch  # they import torch, which takes seconds and is needed only with a model

    return load.proof(model, patch.inert_because())


enable()
