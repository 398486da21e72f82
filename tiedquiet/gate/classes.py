"""Which class a name stands for. A name from a checkpoint is looked up among models, and never imported."""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from tiedquiet.gate.refusal import CannotCheck

# Of what peft calls the tasks of adapters, those that bring a head of their own.
_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def named(library: str, name: object) -> Any:
    """The class that a library of models has under a name; None if it has none.

    Args:
        library: `transformers`, `diffusers`, or what a pipeline's index calls a part of `diffusers.pipelines`.
        name: any value of a config.

    Raises:
        CannotCheck: the library has it and cannot import it.
    """
    place = _library(library)
    if place is None or not isinstance(name, str) or not name.isidentifier():
        return None
    try:
        found = getattr(place, name, None)
    except Exception as error:
        raise CannotCheck(f"{library} cannot import {name}: {' '.join(str(error).split())}") from error
    return found if isinstance(found, type) else None


def is_of_transformers(kind: object) -> bool:
    """Whether it is one of transformers' models, or extends one; what several have in common makes no model."""
    from transformers import PreTrainedModel

    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        return False
    return next(base for base in kind.__mro__ if "__init__" in vars(base)) is not PreTrainedModel


def is_of_diffusers(kind: object) -> bool:
    """Whether it is one of diffusers' models."""
    diffusers = _library("diffusers")
    return diffusers is not None and isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)


def has_diffusers() -> bool:
    """Whether diffusers is installed."""
    return _library("diffusers") is not None


def today(name: object) -> object:
    """The name that transformers has today for a class of it, by diffusers' list of those that were renamed."""
    try:
        from diffusers.utils import _maybe_remap_transformers_class as new_name
    except ImportError:
        return name
    return (isinstance(name, str) and new_name(name)) or name


def parts_of(name: object) -> dict[str, bool] | None:
    """The parts that a pipeline of diffusers is made of, and whether it needs each; None for any other class.

    Args:
        name: what an index calls it.
    """
    kind = named("diffusers", name)
    base = None if kind is None else getattr(_library("diffusers"), "DiffusionPipeline", None)
    if base is None or kind is base or not issubclass(kind, base):
        return None
    parts, _ = kind._get_signature_keys(kind)
    # Such a pipeline is made of two, and what it lacks comes from the other.
    return {part: part not in kind._optional_components and not kind._load_connected_pipes for part in parts}


def is_module(kind: object) -> bool:
    """Whether it has tensors at all."""
    import torch

    return isinstance(kind, type) and issubclass(kind, torch.nn.Module)


def automatic(name: object) -> Any:
    """One of transformers' `Auto` classes by its name; None for any other."""
    found = named("transformers", name)
    return found if found is not None and found.__module__.startswith("transformers.models.auto.") else None


def of_adapter(adapter: dict[str, Any]) -> Any:
    """The class that an adapter was made for, if that has a head; None where its base model's own class will do.

    Args:
        adapter: what its config holds.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    task, mapping = adapter.get("task_type"), adapter.get("auto_mapping")
    if isinstance(task, str) and task in _TASKS:
        return named("transformers", _TASKS[task])
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    without_head = (names if isinstance(names, tuple) else (names,) for names in MODEL_MAPPING_NAMES.values())
    found = None if any(name in names for names in without_head) else named("transformers", name)
    return found if is_of_transformers(found) else None


def native(auto: str, model_type: object) -> Any:
    """What one of transformers' `Auto` classes makes of a type where no code may run; None where it makes nothing.

    Args:
        auto: the name of the `Auto` class.
        model_type: any value of a config.
    """
    from transformers import CONFIG_MAPPING

    kind = automatic(auto)
    if kind is None or not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    found = getattr(kind, "_model_mapping", {}).get(CONFIG_MAPPING[model_type], None)
    found = found[0] if isinstance(found, tuple) else found
    return found if is_of_transformers(found) else None


def by_user(name: str) -> Any:
    """What the user named: a class of transformers, or any other with its module, also from the current folder.

    Raises:
        CannotCheck: there is none.
    """
    if (found := named("transformers", name.removeprefix("transformers."))) is not None:
        return found
    module, _, last = name.rpartition(".")
    if not module:
        why = "transformers has none of that name, and a class of your own is named with its module"
        raise CannotCheck(f"there is no class {name} to load it as: {why}")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(import_module(module), last)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CannotCheck(f"there is no class {name} to load it as: {why}") from error
    finally:
        sys.path.remove(os.getcwd())


def _library(name: str) -> Any:
    if name == "transformers":
        return import_module(name)
    try:
        diffusers = import_module("diffusers")
    except ImportError:
        return None
    if name == "diffusers":
        return diffusers
    found = getattr(diffusers.pipelines, name, None) if name.isidentifier() else None
    return found if isinstance(found, ModuleType) else None
