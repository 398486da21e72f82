"""What a model says about itself: its tensors in one walk, and its embeddings."""

from collections.abc import Iterator, Set
from typing import Any, NamedTuple

import torch

from tiedquiet.proof.ties import Declaration, Group, groups

# Classes whose own attributes are not looked at: some of transformers leave tensors on meta there that nothing uses
# (the paddings of Mimi's convolutions), or that the first forward fails over (Llama 4's vision model, up to 5.3).
_OURS = ("transformers.", "torch.")
_KINDS = (torch.Tensor, torch.nn.Module)
_REGISTERED = ("_parameters", "_buffers", "_modules")


class Survey(NamedTuple):
    """A model in one walk.

    Attributes:
        state: the tensors of its state dict, under each of their names.
        others: its non-persistent buffers.
        models: prefix and module of each model in it, itself included.
        is_plain: whether no module changes what its state dict holds.
        loose: what somebody else's module has on meta and does not register: in an attribute, or a list or dict there.
    """

    state: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]
    models: list[tuple[str, Any]]
    is_plain: bool
    loose: dict[str, torch.Tensor]


def survey(model: torch.nn.Module) -> Survey:
    """Walk a model once. Not by `named_modules`, whose nested generators take most of a millisecond."""
    state: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    unregistered: list[tuple[str, Any]] = []
    models: list[tuple[str, Any]] = []
    is_model: dict[type[torch.nn.Module], bool] = {}
    is_foreign: dict[type[torch.nn.Module], bool] = {}
    hooks = False
    prefixes, modules = [""], [model]
    next_prefix, next_module = prefixes.pop, modules.pop
    while modules:
        prefix, module = next_prefix(), next_module()
        parts, kind = module.__dict__, type(module)
        if "_modules" not in parts:  # a class of torch.jit's hands on whatever it is asked for
            parts = parts["_actual_script_module"].__dict__
        if children := parts["_modules"]:
            for name, child in children.items():
                if child is not None:
                    prefixes.append(f"{prefix}{name}.")
                    modules.append(child)
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
            is_foreign[kind] = not kind.__module__.startswith(_OURS)
        if is_foreign[kind]:
            unregistered += ((prefix + name, one) for name, one in _unregistered(parts))
        if is_model[kind] or "_tied_weights_keys" in parts:
            models.append((prefix, module))
    bare = torch.nn.Module
    custom = any(
        k.state_dict is not bare.state_dict or k._save_to_state_dict is not bare._save_to_state_dict for k in is_model
    )
    return Survey(state, others, models, not hooks and not custom, dict(_on_meta(model, unregistered)))


def _unregistered(parts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors that a module has in an attribute, and the tensors and modules in a list or dict of such there."""
    for name, value in parts.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], _KINDS):
            yield from ((f"{name}.{number}", one) for number, one in enumerate(value))
        elif isinstance(value, dict) and name not in _REGISTERED and isinstance(next(iter(value.values()), 0), _KINDS):
            yield from ((f"{name}.{key}", one) for key, one in value.items())


def _on_meta(model: torch.nn.Module, found: list[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of these tensors, and in these modules, that are on meta; what the model registers elsewhere is none."""
    own = set(map(id, model.modules())) if found else set()
    for name, one in found:
        if isinstance(one, torch.nn.Module) and id(one) not in own:
            inside = (*one.named_parameters(), *one.named_buffers())
            yield from ((f"{name}.{key}", tensor) for key, tensor in inside if tensor.is_meta)
        elif isinstance(one, torch.Tensor) and one.is_meta and one.numel():
            yield name, one


def only(tensors: dict[str, torch.Tensor], names: Set[str]) -> dict[str, torch.Tensor]:
    """Those of these names, in the order of `tensors`; fast where that is nearly all of them."""
    found = dict(tensors)
    for name in tensors.keys() - names:
        del found[name]
    return found


def tensor_at(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer of that name; None where there is none."""
    *path, last = name.split(".")
    module: Any = model
    for part in path:
        if (module := _at(module._modules, part)) is None:
            return None
    tensor: torch.Tensor | None = _at(module._parameters, last)
    return tensor if tensor is not None else _at(module._buffers, last)


def _at(parts: Any, name: str) -> Any:
    """What a module has under a name; None where there is nothing."""
    return parts[name] if name in parts else None  # noqa: SIM401 (torch.jit's has no `get`)


def asks_for_ties(model: Any) -> bool:
    """Whether the config wants the output embedding to be the input embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def denial(model: Any) -> str:
    """Why a model's config does not ask for its ties, in words; empty if it does."""
    if asks_for_ties(model):
        return ""
    config = getattr(model, "config", None)
    inner = getattr(getattr(config, "text_config", None), "tie_word_embeddings", False)
    return f"because {type(config).__name__}.tie_word_embeddings is false" + (
        ", although that of its text_config is true" if inner else ""
    )


def is_denied(model: Any) -> bool:
    """Whether nobody asks for the ties that a model's config seems to ask for.

    The config of the text model inside may deny them. And where a config class sets the flag itself, whatever the file
    says (T5's, MT5's), nobody asked for the flag, unless something else tells that the file has it (T5's again).
    """
    config: Any = getattr(model, "config", None)
    if getattr(getattr(config, "text_config", None), "tie_word_embeddings", None) is False:
        return True
    try:
        on, off = (vars(type(config)(tie_word_embeddings=flag)) for flag in (True, False))
        tells = [name for name, value in on.items() if name in off and off[name] != value]
        is_set_by_class = asks_for_ties(model) and bool(off["tie_word_embeddings"])
        return is_set_by_class and not (tells and all(getattr(config, name) == on[name] for name in tells))
    except Exception:
        return False  # a config that cannot be made from this alone


def declared(now: Survey) -> dict[str, Group]:
    """The groups of names that are declared to be one tensor, in a model or in those inside it, under each name."""
    declarations = [
        Declaration(prefix, keys, denial(model))
        for prefix, model in now.models
        if (keys := getattr(model, "_tied_weights_keys", None))
    ]
    return groups(declarations, now.state) if declarations else {}


def ties(now: Survey, missing: set[str], stored: set[str]) -> dict[str, Group]:
    """Those, and what the config alone asks to tie: output and input embedding, of which one is missing."""
    found = declared(now)
    for _, model in now.models:
        if asks_for_ties(model):
            head, embedding = (
                name_of(getattr(embeddings(model, which), "weight", None), now.state) for which in ("output", "input")
            )
            for key, source in (head, embedding), (embedding, head):
                asked = key in missing and source in stored and key not in found
                if asked and now.state[key].shape == now.state[source].shape:
                    found[key] = Group([source, key], {key: source}, by_config=type(model).__name__)
    return found


def embeddings(model: Any, which: str) -> Any:
    """The module of the `input` or `output` embeddings; None where the model names none."""
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


def name_of(tensor: torch.Tensor | None, state: dict[str, torch.Tensor]) -> str:
    """The first of a tensor's names; empty where it has none."""
    return next((name for name, other in state.items() if other is tensor), "")
