"""Tensors that transformers mixes up: a model and its base model have them under one name.

Nothing here reads a value: tensors are headers on meta.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tiedquiet.proof import names


def may_cross(model: Any) -> bool:
    """Whether a model and its base model have tensors under one name: adding a prefix or taking it off, both exist."""
    base = getattr(model, "_modules", {}).get(getattr(model, "base_model_prefix", ""))
    if base is None:
        return False
    own = model._parameters.keys() & base._parameters.keys() | model._buffers.keys() & base._buffers.keys()
    modules = (model._modules[name] for name in model._modules.keys() & base._modules.keys())
    return bool(own) or any(next(module.parameters(), None) is not None for module in modules if module is not None)


def crossed(
    model: Any,
    headers: names.Headers,
    state: names.Headers,
    made: Mapping[str, names.Origin],
    conversions: Sequence[Any],
) -> dict[str, str | None]:
    """The keys that transformers reads into another one, or another one into them.

    It adds the prefix of the base model to a name, or takes it off, wherever the result is a name of the model. But
    where one of the files' names has that prefix, as they are or as they are renamed for the class that may have saved
    them, none of them needs another. And where all that the base model needs has it, what has none is the head's.

    Args:
        model: the model.
        headers: what the files hold.
        state: the model's tensors by name.
        made: what each of them is read from.
        conversions: what the loader renames and converts.

    Returns:
        For each of these keys the name that the files have for it; None where they have none.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if not may_cross(model):
        if all(origin.ways == 1 for origin in made.values()):
            return {}
        named = {own: name for name, own in names.renamed(model, headers, conversions).items()}
        is_whole = has_all_with(prefix, state, named)
        return {key: named[prefix + key] for key in state if key in named} if is_whole else {}
    for rules in (conversions, *(rules for _, _, rules in names.conversions_of_others(model))):
        straight = names.renamed(model, headers, rules)
        meant_for = {own: name for name, own in straight.items() if own in state}
        if any(own.startswith(prefix) for own in meant_for):
            break
    else:
        return {}
    given = _strayed(made, straight, state)
    would = {} if rules is conversions else _strayed(names.sources(model, headers, state, rules), straight, state)
    return {key: meant_for.get(key) for key in (*(straight[name] for name in (*given, *would)), *given.values())}


def has_all_with(prefix: str, own: Collection[str], there: Collection[str]) -> bool:
    """Whether names have all that there is for a model with a prefix, and only some without: those are another's."""
    return {key for key in own if key in there} < {key for key in own if prefix + key in there}


def _strayed(made: Mapping[str, names.Origin], straight: Mapping[str, str], state: names.Headers) -> dict[str, str]:
    """The names that are read into another key than they say, and that key."""
    plainly = {name: key for key, origin in made.items() if not origin.is_converted for name in origin.names}
    return {name: key for name, key in plainly.items() if straight[name] in state and straight[name] != key}
