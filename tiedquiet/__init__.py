"""Proves that a loaded model holds what its checkpoint stored, and quiets the MISSING rows that are false.

>>> import tiedquiet  # switches it on
>>> from transformers import AutoModel
"""

import os
from typing import TYPE_CHECKING

from tiedquiet.mode import is_command_line as _is_command_line
from tiedquiet.switch import disable, enable
from tiedquiet.verdict import Finding, LoadError, Proof, Verdict
from tiedquiet.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["Finding", "LoadError", "Proof", "Verdict", "__version__", "check", "disable", "enable"]


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
        from tiedquiet.gate.refusal import CannotCheck

        try:
            return live.check(model, os.fspath(path))
        except CannotCheck as error:
            raise ValueError(str(error)) from error
    from tiedquiet.proof import since

    return since.proof(model, wrapping.inert_because())


try:
    enable()
except ValueError:
    if not _is_command_line():
        raise
