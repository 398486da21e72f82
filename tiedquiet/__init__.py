"""Proves that a loaded model holds what its checkpoint stored, and quiets the MISSING rows that are false.

>>> import tiedquiet  # switches it on
>>> from transformers import AutoModel
"""

import os
from types import TracebackType
from typing import TYPE_CHECKING

from tiedquiet import mode as _modes
from tiedquiet.switch import unwrap as _unwrap
from tiedquiet.switch import wrap as _wrap
from tiedquiet.verdict import Finding, LoadError, Proof, Verdict

if TYPE_CHECKING:
    import torch

__all__ = ["Finding", "LoadError", "Proof", "Verdict", "__version__", "check", "disable", "enable"]
__version__ = "0.3.0.dev0"


class _Restore:
    """Undoes a mode when left as a context manager; inside, the mode applies to this context alone."""

    def __init__(self, setting: _modes.Setting) -> None:
        self._setting, self._before = setting, _modes.put(setting)

    def __enter__(self) -> None:
        _modes.enter(self._setting)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _modes.leave(self._setting, self._before)
        _wrap()  # inside, all may have been switched off
        _unwrap()


def enable(mode: str | None = None) -> _Restore:
    """Switch tiedquiet on for every load from here on.

    Args:
        mode: `on`, `repair`, `strict` or `off` (or a synonym that `TIEDQUIET` takes); None reads `TIEDQUIET`.
            With `off` the functions stay wrapped, but do nothing; `disable` puts the originals back.

    Returns:
        A context manager. In a `with`, the mode applies to this context (thread, task) and to the threads started in
        it, and leaving restores the previous mode; without, it applies to the process from here on.

    Raises:
        ValueError: not a mode; the message lists the modes.
        LoadError: the mode is `strict`, and the imported transformers cannot be guarded.
    """
    setting = (
        _modes.from_environment() if mode is None else _modes.Setting(_modes.parse(mode, "mode"), "tiedquiet.enable")
    )
    restore = _Restore(setting)
    _wrap()
    return restore


def disable() -> None:
    """Put the libraries' own functions back. Harmless when there is nothing to put back."""
    _modes.put(_modes.Setting("off", "tiedquiet.disable"))
    _unwrap()


def check(model: "torch.nn.Module", path: "str | os.PathLike[str] | None" = None) -> Proof:
    """Say what is known about a loaded model; with a path, compare it with the files there, byte for byte.

    Args:
        model: one that was loaded while tiedquiet was enabled; or a copy of it, one wrapped by `torch.compile`, DDP or
            PEFT, or a module that contains several of them. With a path, any model.
        path: a folder that the model was saved to, by `save_pretrained` or `Trainer.save_model`, say. If the model has
            an unmerged adapter: the adapter's folder, to compare the adapter, or the base model's, for the rest.

    Returns:
        A `Proof`. If the model's load was not seen, it says so, and its `ok` is false. With a path it says how many
        tensors of the model equal the files now.

    Raises:
        TypeError: the model is a path; the message names the command that checks one.
        ValueError: the path holds no weights, or they cannot be read.
    """
    if not hasattr(model, "named_modules"):
        kind = type(model).__name__
        raise TypeError(f"check takes a model, not {kind}; for files, use python -m tiedquiet check PATH|HUB_ID")
    from tiedquiet.doors import wrapping  # it imports torch, which takes seconds and is needed only with a model

    if path is not None:
        from tiedquiet.gate import live
        from tiedquiet.gate.diagnosis import CannotCheck

        try:
            return live.check(model, os.fspath(path))
        except CannotCheck as error:
            raise ValueError(str(error)) from error
    from tiedquiet.proof import judge

    return judge.proof(model, wrapping.inert_because())


try:
    enable()
except ValueError:
    if not _modes.is_command_line():
        raise
