"""Which of a model's tensors belong to an adapter that peft put into it."""

from collections.abc import Collection, Iterable
from typing import Any

import torch

from tiedquiet.proof.memory import equals
from tiedquiet.proof.record import stored_name, uncompiled
from tiedquiet.proof.survey import survey

PREFIX = "base_model.model."  # which peft and transformers put before the names in an adapter's files


def base_of(model: Any) -> tuple[Any, str]:
    """The model that peft's has put its adapters into, and what the names of its tensors have before them in peft's."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model.base_model.model
    base = uncompiled(base)  # which the record of its own load is on
    return base, next(name for name, module in model.named_modules() if module is base) + "."


def names_in_files(base: torch.nn.Module, adapter: str) -> dict[str, str]:
    """An adapter's tensors in its base model, each with its name in the files: without the adapter's own.

    An adapter may be called `0` or `weight`, as a part of the names of others is. Its tensors are those that lie under
    its name in a dictionary of a layer of peft's.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    found = {}
    for key in survey(base).state:
        parts = key.split(".")
        for place in (place for place, part in enumerate(parts) if part == adapter and place):
            holder, owner = modules[".".join(parts[:place])], modules[".".join(parts[: place - 1])]
            if _is_peft_s(owner) and adapter in getattr(holder, "keys", tuple)():
                found[key] = stored_name(without(parts, place))
    return found


def saved(model: Any, adapter: str) -> dict[str, str]:
    """What peft saves of an adapter: each tensor under all of its names in a model, with its name in the files.

    That is more than what lies under the adapter's name, and less: biases of the base model are trained with it, what
    the layers share lies above them, and AdaLoRA's `ranknum` is in no file. Of what computes prompts only those are.
    """
    from peft import get_peft_model_state_dict

    is_prompts, state = model.peft_config[adapter].is_prompt_learning, model.state_dict(keep_vars=True)
    # peft goes by the names of modules, which a wrapper's part is in, and finds nothing under those of the state dict.
    wrapped = {name: tensor for name, tensor in survey(model).state.items() if name not in state}
    wrapped = {name: tensor for name, tensor in wrapped.items() if state.pop(stored_name(name), None) is not None}
    state |= wrapped
    found = get_peft_model_state_dict(model, state, adapter_name=adapter, save_embedding_layers=False)
    theirs = {stored_name(name): tensor for name, tensor in found.items()}
    by_tensor = {id(tensor): name for name, tensor in theirs.items()}
    by_name = names_in_files(model, adapter)  # for what peft cuts to size
    if is_prompts:  # which are computed
        by_name = {key: name for key in by_name for name in theirs if equals(state[key], theirs[name])}
    names = {key: by_tensor.get(id(tensor), by_name.get(key, "")) for key, tensor in state.items()}
    return {key: name for key, name in names.items() if name in theirs}


def base_s_own(in_files: Collection[str], adapted: Collection[str], names: Iterable[str]) -> dict[str, str]:
    """What an adapter's files have of the base model, each tensor with its name in them.

    With embeddings that were made larger, or that are adapted, peft saves the base model's own as well.

    Args:
        in_files: the names in the files.
        adapted: the names of the adapter's tensors.
        names: those of the base model's, in peft's model.
    """
    return {name: name for name in names if name in in_files and name not in adapted}


def replaced(model: torch.nn.Module, missing: Collection[str], read: Collection[str]) -> set[str]:
    """Those of the missing tensors in whose place the model uses what its adapters brought: a head that was trained.

    peft keeps the module of the base model beside those, and uses it where the adapters are disabled.

    Args:
        model: the base model, with the layers that peft put into it.
        missing: names that they had before.
        read: names of what was read.
    """
    found: set[str] = set()
    for name, module in model.named_modules() if missing else ():
        if isinstance(getattr(module, "modules_to_save", None), torch.nn.ModuleDict) and _is_peft_s(module):
            used = [] if module.disable_adapters else list(module.active_adapters)
            for key in (key for key in missing if key.startswith(f"{name}.")):
                own = {f"{name}.modules_to_save.{adapter}{key[len(name) :]}" for adapter in used}
                found.update([key] if own and own.issubset(read) else [])
    return found


def is_in_peft_s(model: torch.nn.Module, name: str) -> bool:
    """Whether a tensor lies in a module that is peft's."""
    module: Any = model
    for part in name.split(".")[:-1]:
        module = module._modules[part]
        if _is_peft_s(module):
            return True
    return False


def _is_peft_s(module: torch.nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def without(parts: list[str], place: int) -> str:
    """A name without the adapter's own name, which peft inserts at this place."""
    return ".".join(parts[: place - (parts[place - 1] == "modules_to_save")] + parts[place + 1 :])
