"""What is asked of a model: its tensors in one walk, and what it says of its embeddings."""

from typing import Any, NamedTuple

import torch


class Survey(NamedTuple):
    """A model in one walk.

    Attributes:
        state: the tensors of its state dict, under each of their names.
        others: its non-persistent buffers.
        models: prefix and module of each model in it, itself included.
        is_plain: whether no module changes what its state dict holds.
    """

    state: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]
    models: list[tuple[str, Any]]
    is_plain: bool


def survey(model: torch.nn.Module) -> Survey:
    """Walk a model once. Not by `named_modules`, whose nested generators take most of a millisecond."""
    state: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    models: list[tuple[str, Any]] = []
    is_model: dict[type[torch.nn.Module], bool] = {}
    hooks = False
    stack = [("", model)]
    pop, push = stack.pop, stack.append
    while stack:
        prefix, module = pop()
        parts, kind = module.__dict__, type(module)
        if children := parts["_modules"]:
            for name, child in children.items():
                if child is not None:
                    push((f"{prefix}{name}.", child))
        if parameters := parts["_parameters"]:
            for name, parameter in parameters.items():
                if parameter is not None:
                    state[prefix + name] = parameter
        if buffers := parts["_buffers"]:
            for name, buffer in buffers.items():
                if buffer is not None:
                    (others if name in parts["_non_persistent_buffers_set"] else state)[prefix + name] = buffer
        if parts["_state_dict_hooks"]:
            hooks = True
        if kind not in is_model:
            is_model[kind] = hasattr(kind, "_tied_weights_keys")
        if is_model[kind] or "_tied_weights_keys" in parts:
            models.append((prefix, module))
    bare = torch.nn.Module
    custom = any(
        k.state_dict is not bare.state_dict or k._save_to_state_dict is not bare._save_to_state_dict for k in is_model
    )
    return Survey(state, others, models, not hooks and not custom)


def tensor_at(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer of that name; None where there is none."""
    *path, last = name.split(".")
    module: Any = model
    for part in path:
        module = module._modules.get(part) if module is not None else None
    return None if module is None else module._parameters.get(last, module._buffers.get(last))


def asks_for_ties(model: Any) -> bool:
    """Whether the config wants the output embedding to be the input embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def embeddings(model: Any, which: str) -> Any:
    """The module of the `input` or `output` embeddings; None where the model names none."""
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


def name_of(tensor: torch.Tensor | None, state: dict[str, torch.Tensor]) -> str:
    """The first of a tensor's names; empty where it has none."""
    return next((name for name, other in state.items() if other is tensor), "")
