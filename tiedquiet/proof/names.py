"""How names in a checkpoint's files map to a model's names by transformers' own rules; prefixes.py has another.

Nothing here reads a value: tensors are headers on meta.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

Headers = Mapping[str, torch.Tensor]
MOST_TRIED = 64
_OWN = "_checkpoint_conversion_mapping"
_LONGEST = 1_000  # letters of a name


class Origin(NamedTuple):
    """What `from_pretrained` makes a tensor of.

    Attributes:
        names: the names that the files have for it; several where it is merged from them.
        is_converted: whether its values are more than renamed.
        ways: how many of these names, or how many merged from them, could be it: more than one, and one is dropped.
    """

    names: tuple[str, ...]
    is_converted: bool
    ways: int = 1


class Made(NamedTuple):
    """What `from_pretrained` would make of names in the files that nothing read, by one set of rules.

    Attributes:
        origins: for each of the model's names, what it is made of.
        why: why nothing read them, as a clause.
        conversions: transformers' own, by which they are made; none where no more than names differ.
        known_as: for each of the files' names the one that the conversions know, where that is another.
        cure: how to have `from_pretrained` read them, as a clause; empty where nothing is known.
        leads: for all of the files' names that the rules lead to one of the model's, missing or not, that one.
        prefixes: what these names of the files begin with, where the model has another prefix, or none.
    """

    origins: dict[str, Origin]
    why: str
    conversions: Sequence[Any] = ()
    known_as: Mapping[str, str] = MappingProxyType({})
    cure: str = ""
    leads: Mapping[str, str] = MappingProxyType({})
    prefixes: Collection[str] = ()

    @property
    def key_of(self) -> dict[str, str]:
        """For each of the names in the files that it takes, one of the model's names that is made of it."""
        return {name: key for key, origin in self.origins.items() for name in origin.names}


def native_class(model: Any) -> Any:
    """The class of transformers that a model's class extends; None if it is one itself, or extends none."""
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")]
    return None if not kinds or kinds[0] is type(model) else kinds[0]


def conversions_of(model: Any, key_mapping: dict[str, str] | None = None) -> list[Any]:
    """What transformers renames and converts when it reads a checkpoint of this class; nothing for other modules."""
    if not hasattr(model, "base_model_prefix"):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, key_mapping))


def all_conversions(model: Any, used: Sequence[Any]) -> list[Any]:
    """Those of its class, and before them what it was loaded with besides: a user's `key_mapping`, an adapter's.

    None twice: `cls_token` that becomes `embeddings.cls_token` would become `embeddings.embeddings.cls_token`.

    Args:
        model: it.
        used: those that it was loaded with.
    """
    own = conversions_of(model)
    known = [_patterns(one) for one in own]
    return [*(one for one in used if _patterns(one) not in known), *own]


def mapping_besides(used: Sequence[Any], own: Sequence[Any]) -> dict[str, str]:
    """What of the renamings that a model was loaded with is not among others, as a `key_mapping`."""
    known = [_patterns(one) for one in own]
    besides = [one for one in _machinery(used)[1] if _patterns(one) not in known]
    return {one.source_patterns[0]: one.target_patterns[0] for one in besides}


def _patterns(conversion: Any) -> tuple[Any, ...]:
    scope = getattr(conversion, "scope_prefix", None)
    return type(conversion), conversion.source_patterns, conversion.target_patterns, scope


def own_mapping(model: Any) -> dict[str, str]:
    """The mapping that a class carries itself, which transformers 5.4 and newer do not read."""
    own = getattr(model, _OWN, None)
    return dict(own) if isinstance(own, Mapping) else {}


def conversions_of_native(model: Any) -> list[Any]:
    """What transformers would rename and convert for the class that the model's class is, or is made from."""
    native = native_class(model) or type(model)
    try:
        config = copy.deepcopy(model.config)
        config.model_type = native.config_class.model_type  # transformers goes by that, and a user's may have its own
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return conversions_of(native(config))
    except Exception:
        return []  # it cannot be built from this config alone


def conversions_of_others(model: Any) -> Iterator[tuple[str, str, list[Any]]]:
    """What transformers would rename and convert by what a model's class says itself, or for a class beside it.

    Yields:
        Why transformers does not do so, as a clause; what would make it, where more is known than a `key_mapping`; and
        the conversions.
    """
    ours = type(model).__name__
    if own := own_mapping(model):
        rules: list[Any] = []
        with suppress(Exception):  # a stranger's patterns
            rules = conversions_of(model, own)
        yield f"because transformers does not read {ours}.{_OWN}", "", rules
    if (native := native_class(model)) is not None:
        yield *_of_another(native, f"its subclass {ours}", model), conversions_of_native(model)
    if (base := getattr(model, "base_model", model)) is not model:
        theirs, own_type = _types(type(base), base)
        rules = conversions_of(base) if theirs == own_type else conversions_of_native(base)
        yield *_of_another(type(base), f"{ours} around it", model), rules


def _of_another(other: Any, around: str, model: Any) -> tuple[str, str]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping as get

    why = f"because transformers renames what it reads for {other.__name__}, but not for {around}"
    # By a class's name, or by the type of its config: what is registered for one is not found by the other.
    for source, target in ((other.__name__, type(model).__name__), _types(other, model)):
        if source and target and get(source) is not None:
            given = f"{target!r}, get_checkpoint_conversion_mapping({source!r}), overwrite=True"
            call = f"call register_checkpoint_conversion_mapping({given}) of transformers.conversion_mapping first"
            return why, call
    return why, ""


def _types(kind: Any, model: Any) -> tuple[str, str]:
    """The type that the configs of a class have, and that of a model's."""
    configs = getattr(kind, "config_class", None), getattr(model, "config", None)
    theirs, ours = (getattr(config, "model_type", "") for config in configs)
    return theirs, ours


def has_converter(conversions: Sequence[Any]) -> bool:
    """Whether any of these conversions does more than rename."""
    return bool(_machinery(conversions)[2])


def targets(model: Any, headers: Headers, state: Headers, conversions: Sequence[Any]) -> dict[str, str]:
    """Which of a model's names `from_pretrained` reads each of the files' names into; the first, where it is split."""
    return {name: key for name, key, _ in _renamed(model, headers, state, conversions)}


def sources(model: Any, headers: Headers, state: Headers, conversions: Sequence[Any]) -> dict[str, Origin]:
    """What each tensor of a model is made of, by names alone, nothing converted; of what is split, its first part."""
    found: dict[str, Origin] = {}
    for name, key, converter in _renamed(model, headers, state, conversions):
        before = found.get(key, Origin((), False, 0))
        is_another = converter is None or not before.is_converted
        found[key] = Origin(
            (*before.names, name), before.is_converted or converter is not None, before.ways + is_another
        )
    return found


def origins(
    model: Any, headers: Headers, state: Headers, conversions: Sequence[Any], unfit: dict[str, Origin] | None = None
) -> dict[str, Origin]:
    """What each tensor of a model is made of by `from_pretrained`, by names and shapes.

    Args:
        model: it, or what stands for it.
        headers: what the files hold.
        state: the model's tensors by name.
        conversions: transformers' own for its class.
        unfit: takes what does not fit the model's shape.

    Returns:
        For each of the model's names that the files have something for: what. What does not fit its shape is left out.
    """
    found: dict[str, Origin] = {}
    for key, origin, tensor in converted(model, headers, state, conversions, headers.__getitem__):
        if tensor.shape == state[key].shape:
            found[key] = origin
        elif unfit is not None:
            unfit[key] = origin
    return found


def converted(
    model: Any,
    headers: Headers,
    state: Headers,
    conversions: Sequence[Any],
    read: Callable[[str], torch.Tensor],
    leave_out: Callable[[str], bool] = lambda key: False,
) -> Iterator[tuple[str, Origin, torch.Tensor]]:
    """Each tensor that `from_pretrained` makes of what the files hold, by transformers' own code, one group at a time.

    Args:
        model: it, or what stands for it.
        headers: what the files hold.
        state: the model's tensors by name.
        conversions: transformers' own for its class.
        read: gives the tensor that the files have under a name, or its header.
        leave_out: asked of each of the model's names before it is converted to.
    """
    groups: dict[str, list[tuple[str, Any, str]]] = {}
    for name, key, converter in _renamed(model, headers, state, conversions):
        if converter is None:
            yield key, Origin((name,), False), read(name)
        else:
            groups.setdefault(key, []).append((name, *converter))
    for key, parts in groups.items():
        if leave_out(key):
            continue
        one, origin = copy.deepcopy(parts[0][1]), Origin(tuple(name for name, _, _ in parts), True)
        with suppress(Exception):  # it wants values, or a tensor that the files do not have
            for name, _, pattern in parts:
                one.add_tensor(key, name, pattern, read(name))
            made = one.convert(key, model=model, config=model.config)
            for made_key, made_tensor in (made[0] if isinstance(made, tuple) else made).items():
                if made_key in state:
                    yield made_key, origin, made_tensor[0] if isinstance(made_tensor, list) else made_tensor


def _renamed(
    model: Any, headers: Headers, state: Headers, conversions: Sequence[Any]
) -> Iterator[tuple[str, str, tuple[Any, str] | None]]:
    """Each of the files' names that leads to one of the model's: that one, and the conversion with its pattern."""
    rename, renamings, converters, in_order = _machinery(conversions)
    base = getattr(model, "base_model_prefix", "")
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    for name in _sorted(headers, in_order):
        key, pattern = rename(name, renamings, converters, base, state)
        if key not in state and name in state:
            key, pattern = name, None
        if key in state:
            yield name, key, None if pattern is None else (by_pattern[pattern], pattern)


def _sorted(headers: Headers, in_order: Callable[[str], Any]) -> list[str]:
    """In the order in which transformers takes names; of some, 5.0 cannot say which comes first."""
    try:
        return sorted(headers, key=in_order)
    except TypeError:
        return sorted(headers)


def _machinery(conversions: Sequence[Any]) -> tuple[Any, list[Any], list[Any], Any]:
    """Transformers' own function that renames, the two kinds of conversions, and the order in which names are taken."""
    from transformers import core_model_loading as theirs

    renamings = [one for one in conversions if isinstance(one, theirs.WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, theirs.WeightConverter)]
    return theirs.rename_source_key, renamings, converters, theirs.dot_natural_key


def of_models(unread: Headers) -> Headers:
    """Without the names that are longer than any in a model, whatever is around it: over them rules take hours."""
    return {name: header for name, header in unread.items() if len(name) <= _LONGEST}


def is_in(base: str, name: str) -> bool:
    """Whether a name is one of the base model's, whatever is before it."""
    return f".{base}." in f".{name}"


def renamed(model: Any, headers: Headers, conversions: Sequence[Any], and_merged: bool = False) -> dict[str, str]:
    """What transformers makes of each of the files' names, whether the model has it or not.

    Args:
        model: it, or what stands for it.
        headers: what the files hold.
        conversions: transformers' own for its class.
        and_merged: by merging and splitting as well, as it names what it did not read; else by renaming alone.
    """
    rename, renamings, converters, _ = _machinery(conversions)
    base = getattr(model, "base_model_prefix", "")
    return {name: rename(name, renamings, converters if and_merged else [], base, {})[0] for name in headers}
