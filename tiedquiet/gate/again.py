"""What transformers makes from a checkpoint's files, made again, on a model without values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import get_ident
from typing import Any

import torch

import tiedquiet
from tiedquiet.proof.survey import survey

_SEAM = "_load_pretrained_model"  # of every release since 5.0: the model is built, and no value was read


class Again:
    """A load that stopped before it read a value, and then reads what it is told to.

    Attributes:
        model: as the loader built it, on meta, with a quantiser's layers where that puts its own.
        given: what it would have read, under its names, where that does not come from the files as it is; GGUF.
        quantiser: the loader's own; None where it has none.
        conversions: what the loader renames and converts.
    """

    def __init__(self, model: Any, given: Mapping[str, Any] | None, config: Any) -> None:
        self.model, self.given, self._config = model, given, config
        self.quantiser = config.hf_quantizer
        self.conversions = list(config.weight_mapping or ())

    @contextmanager
    def made_of(self, tensors: Mapping[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        """What the loader makes of some tensors of the files, by the model's names; gone when the `with` ends.

        Args:
            tensors: all that one tensor of the model is made of, or several.

        Raises:
            Exception: the loader cannot.
        """
        before = survey(self.model).state
        try:
            with tiedquiet.enable("off"):
                getattr(type(self.model), _SEAM)(self.model, dict(tensors), None, self._config)
            now = survey(self.model).state
            yield {name: tensor for name, tensor in now.items() if tensor is not before.get(name)}
        finally:
            for name, tensor in before.items():
                module, _, leaf = name.rpartition(".")
                owner = self.model.get_submodule(module)
                (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor


def begin(load: Callable[[], object]) -> Again | None:
    """Begin a load, and stop it before it reads a value; None if it reads none.

    Args:
        load: calls `from_pretrained`.
    """
    from transformers import PreTrainedModel

    found: list[Again] = []
    kept, here = vars(PreTrainedModel)[_SEAM], get_ident()

    def stop(*given: Any, **more: Any) -> Any:
        if get_ident() != here:  # somebody else's load
            return kept.__get__(None, PreTrainedModel)(*given, **more)
        found.append(Again(*_begun(*given, **more)))
        raise _Stopped

    setattr(PreTrainedModel, _SEAM, staticmethod(stop))
    try:
        with tiedquiet.enable("off"), suppress(Exception):
            load()
    finally:
        setattr(PreTrainedModel, _SEAM, kept)
    return found[0] if found else None


def _begun(model: Any, given: Any = None, files: Any = None, config: Any = None, *_: Any, **__: Any) -> tuple[Any, ...]:
    return model, given, config


class _Stopped(Exception):
    """The load has come as far as it should."""
