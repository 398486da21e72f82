"""What has the values of a tensor on meta: accelerate's hooks, or FSDP, hold them elsewhere until they are needed."""

from collections.abc import Iterator, Mapping
from itertools import starmap
from typing import Any

import torch


def is_moved(model: torch.nn.Module, name: str) -> bool:
    """Whether accelerate or FSDP holds a tensor, or moved it: what was read is another object then."""
    return any(True for _ in _managers(model, name))


def is_served(model: torch.nn.Module, name: str) -> bool:
    """Whether something puts values in the place of a tensor on meta when it is needed.

    A hook of accelerate's does that for its own module alone, and for what its map has a name for: a parameter that a
    device map names by itself has none.
    """
    for module, _ in _managers(model, name):
        hooks = list(_hooks(module))
        if not hooks or any(not hasattr(hook, "weights_map") for hook in hooks):
            return True  # FSDP, or somebody's own hook, of which nothing is known
    return any(starmap(_has, _places(model, name)))


def with_aside(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors of a model, but what accelerate keeps in main memory for those on meta; not what is on disk."""
    found = {
        id(one): aside for name, one in tensors.items() if one.is_meta and (aside := in_memory(model, name)) is not None
    }
    return {name: found.get(id(one), one) for name, one in tensors.items()} if found else tensors


def in_memory(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """What accelerate keeps in main memory for a tensor on meta; None if that is nothing."""
    kept = (weights.get(key) for weights, key in _places(model, name) if isinstance(weights, dict))
    return next((tensor for tensor in kept if isinstance(tensor, torch.Tensor)), None)


def _places(model: torch.nn.Module, name: str) -> Iterator[tuple[Any, str]]:
    """The maps in which hooks look a tensor up, and its name in each."""
    for module, rest in _managers(model, name):
        yield from filter(None, (_place(hook, rest) for hook in _hooks(module)))


def _managers(model: torch.nn.Module, name: str) -> Iterator[tuple[torch.nn.Module, str]]:
    """Each module on the way to a tensor that accelerate or FSDP wraps, and the name of the tensor in it."""
    module: Any = model
    while True:
        # To ask the module takes ten times as long where it has neither. FSDP2 makes it a class of its own.
        if "_hf_hook" in vars(module) or hasattr(type(module), "set_reshard_after_forward"):
            yield module, name
        part, _, name = name.partition(".")
        children = module._modules
        if not name or part not in children or (module := children[part]) is None:
            return


def _hooks(module: torch.nn.Module) -> Iterator[Any]:
    if "_hf_hook" in vars(module):
        hook = module._hf_hook
        yield from getattr(hook, "hooks", (hook,))


def _place(hook: Any, name: str) -> tuple[Any, str] | None:
    """The map in which a hook looks a tensor up, and the name there; None where it does not.

    Args:
        hook: that of a module.
        name: of a tensor in that module.
    """
    weights = getattr(hook, "weights_map", None)
    if weights is None or not hook.offload or ("." in name and not hook.place_submodules):
        return None
    while hasattr(weights, "prefix"):
        weights, name = weights.dataset, weights.prefix + name
    in_memory = getattr(weights, "state_dict", None)
    return (in_memory, name) if isinstance(in_memory, dict) and name in in_memory else (weights, name)


def _has(weights: Any, name: str) -> bool:
    """Whether a map has a name; what it has on disk is not read for that."""
    names = getattr(weights, "index", weights)  # its list of all keys lacks what `repair` has added
    return name in names if isinstance(names, dict) else isinstance(names, Mapping)
