"""What transformers makes from a checkpoint's files, made again, on a model without values."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, takewhile
from threading import get_ident
from typing import Any, NamedTuple

import torch

from tiedquiet.proof.survey import survey
from tiedquiet.switch import enable

_SEAM = "_load_pretrained_model"  # of every release since 5.0: the model is built, and no value was read
_LAST_STEPS = ("postprocess_model", "_process_model_after_weight_loading")


class Made(NamedTuple):
    """What the loader made.

    Attributes:
        model: where it lies: the model without values, or what that has of the modules concerned.
        tensors: by the model's names.
        gone: the names of those that were read, and of which the quantiser made others since.
    """

    model: Any
    tensors: dict[str, torch.Tensor]
    gone: set[str]


class Again:
    """A load that stopped before it read a value, and then reads what it is told to.

    Attributes:
        model: as the loader built it, on meta, with a quantiser's layers where that puts its own.
        given: what it would have read, under its names, where that does not come from the files as it is; GGUF.
        quantiser: the loader's own; None where it has none.
        conversions: what the loader renames and converts.
        has_last_step: whether the quantiser goes through the model once more when all of it is read.
    """

    def __init__(self, model: Any, given: Mapping[str, Any] | None, config: Any) -> None:
        self.model, self.given, self._config = model, given, config
        self.quantiser = config.hf_quantizer
        self.conversions = list(config.weight_mapping or ())
        # With a GGUF file transformers looks for kernels then, on the hub, and does nothing to tensors.
        self.has_last_step = given is None and self.quantiser is not None and _has_last_step(self.quantiser)

    @contextmanager
    def made_of(self, tensors: Mapping[str, Any]) -> Iterator[Made]:
        """What the loader makes of some tensors of the files, its last step included; gone when the `with` ends.

        Args:
            tensors: all that one tensor of the model is made of, or several.

        Raises:
            Exception: the loader cannot.
        """
        before = survey(self.model).state
        try:
            with enable("off"):
                if self.has_last_step:  # which may write where the values of the files lie
                    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                getattr(type(self.model), _SEAM)(self.model, dict(tensors), None, self._config)
                made = Made(self.model, _changed(self.model, before), set())
                if self.has_last_step:
                    part = _part(self.model, made.tensors)
                    self.quantiser.postprocess_model(part)
                    gone = made.tensors.keys() - survey(part).state.keys()
                    made = Made(part, _changed(part, before), gone)
            yield made
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
        with enable("off"), suppress(Exception):
            load()
    finally:
        setattr(PreTrainedModel, _SEAM, kept)
    return found[0] if found else None


def _has_last_step(quantiser: Any) -> bool:
    from transformers.quantizers import HfQuantizer

    # By where they are defined: what is wrapped is another object each time that a class is asked for it.
    own = takewhile(lambda kind: kind is not HfQuantizer, type(quantiser).__mro__)
    return any(not vars(kind).keys().isdisjoint(_LAST_STEPS) for kind in own)


def _changed(model: Any, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    now = survey(model).state
    return {name: tensor for name, tensor in now.items() if tensor is not before.get(name) and not tensor.is_meta}


def _part(module: Any, names: Collection[str], prefix: str = "") -> Any:
    """A copy of a module, with those of its modules that have some tensors, or none at all; the tensors are the same.

    What is done to all of a model can be done to that, and the module itself stays as it is.
    """
    part = copy.copy(module)
    for what in ("_parameters", "_buffers", "_modules"):
        vars(part)[what] = dict(vars(module)[what])
    part._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        path = f"{prefix}{name}."
        if any(key.startswith(path) for key in names):
            part._modules[name] = _part(child, names, path)
        elif child is None or next(chain(child.parameters(), child.buffers()), None) is not None:
            del part._modules[name]
    return part


def _begun(model: Any, given: Any = None, files: Any = None, config: Any = None, *_: Any, **__: Any) -> tuple[Any, ...]:
    return model, given, config


class _Stopped(Exception):
    """The load has come as far as it should."""
