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
    """Takes a mode back when left as a context manager; inside, the mode is that of this context alone."""

    def __init__(self, setting: _modes.Setting) -> None:
        self._setting, self._before = setting, _modes.put(setting)

    def __enter__(self) -> None:
        _modes.enter(self._setting)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _modes.leave(self._setting, self._before)
        _unwrap()


def enable(mode: str | None = None) -> _Restore:
    """Switch tiedquiet on for every load from here on.

    Args:
        mode: `on`, `repair`, `strict` or `off` (or a synonym that `TIEDQUIET` takes); None reads `TIEDQUIET`.
            With `off` the functions stay wrapped and do nothing of ours; `disable` puts the originals back.

    Returns:
        A context manager. In a `with`, the mode is that of this context (thread, task) and of the threads started in
        it, and leaving restores the mode that was in force before; without, it is the process's from here on.

    Raises:
        ValueError: the mode is none of these; the message lists them.
        LoadError: the mode is `strict`, and the transformers that is imported cannot be guarded.
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
    """Say what is known of a loaded model; with a path, compare it with the files there, byte for byte.

    Args:
        model: one that was loaded while tiedquiet was enabled; or a copy of it, or what `torch.compile`, DDP or PEFT
            made of it, or a module that has several of them inside. With a path, any model.
        path: a folder that the model was saved to, by `save_pretrained` or `Trainer.save_model`, say. Where it has an
            adapter that is not merged: that one's folder, for the adapter, or its base model's, for the rest.

    Returns:
        A `Proof`. Of a model whose load was not seen it says that, and its `ok` is false. With a path it says how many
        tensors the files hold as the model does, now.

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
