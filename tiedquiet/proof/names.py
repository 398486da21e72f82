"""How names in a checkpoint's files map to a model's names: by transformers' own rules, then by one of prefixes.

Nothing here reads a value: tensors are headers on meta.
"""

import copy
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Headers = Mapping[str, torch.Tensor]
_MOST_TRIED = 64


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
        prefix: what the files' names have before those that the conversions know.
        cure: how to have `from_pretrained` read them, as a clause; empty where nothing is known.
    """

    origins: dict[str, Origin]
    why: str
    conversions: Sequence[Any] = ()
    prefix: str = ""
    cure: str = ""

    @property
    def key_of(self) -> dict[str, str]:
        """For each of the names in the files that it takes, one of the model's names that is made of it."""
        return {name: key for key, origin in self.origins.items() for name in origin.names}


@dataclass(frozen=True)
class Prefixes:
    """A prefix of the files' names where the model has another.

    Attributes:
        old: as the files have it, with its last dot; empty where it has to be added.
        new: as the model has it, in the same form.
        names: for each of the model's names the one in the files.
        is_of_files: whether they are as the files have them; else as transformers had already renamed them.
    """

    old: str
    new: str
    names: dict[str, str]
    is_of_files: bool = True

    @property
    def why(self) -> str:
        """Why nothing read them, as a clause."""
        return f"because the checkpoint has {self.old or 'no prefix'} where the model has {self.new or 'no prefix'}"

    def key_mapping(self) -> dict[str, str]:
        """The `key_mapping` that makes `from_pretrained` read them; empty if none does."""
        if not self.is_of_files:
            return {}
        if self.old:
            return {f"^{re.escape(self.old)}": self.new}
        first = sorted({name.partition(".")[0] for name in self.names.values()})
        return {f"^(?=({'|'.join(map(re.escape, first))})\\b)": self.new}

    @property
    def cure(self) -> str:
        """How to have `from_pretrained` read them, as a clause; empty where no `key_mapping` does it."""
        mapping = self.key_mapping()
        return f"pass key_mapping={mapping} to from_pretrained" if mapping else ""


def native_class(model: Any) -> Any:
    """The class of transformers that a model's class extends; None if it is one itself, or extends none."""
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")]
    return None if not kinds or kinds[0] is type(model) else kinds[0]


def conversions_of(model: Any) -> list[Any]:
    """What transformers renames and converts when it reads a checkpoint of this class; nothing for other modules."""
    if not hasattr(model, "base_model_prefix"):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


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


def _patterns(conversion: Any) -> tuple[Any, ...]:
    scope = getattr(conversion, "scope_prefix", None)
    return type(conversion), conversion.source_patterns, conversion.target_patterns, scope


def conversions_of_native(model: Any) -> list[Any]:
    """What transformers would rename and convert for the class that the model's class is made from."""
    native = native_class(model)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return conversions_of(native(copy.deepcopy(model.config)))
    except Exception:
        return []  # it cannot be built from this config alone


def conversions_of_others(model: Any) -> Iterator[tuple[str, str, list[Any]]]:
    """What transformers would rename and convert for classes that a model's is made from, or around.

    Yields:
        A class that may have saved the files, what the model's is to it, and its conversions.
    """
    ours = type(model).__name__
    if (native := native_class(model)) is not None:
        yield native.__name__, f"its subclass {ours}", conversions_of_native(model)
    if (base := getattr(model, "base_model", model)) is not model:
        yield type(base).__name__, f"{ours} around it", conversions_of(base)


def has_converter(conversions: Sequence[Any]) -> bool:
    """Whether any of these conversions does more than rename."""
    return bool(_machinery(conversions)[2]) if conversions else False


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
    model: Any, headers: Headers, state: Headers, conversions: Sequence[Any], prefix: str = ""
) -> dict[str, Origin]:
    """What each tensor of a model is made of by `from_pretrained`, by names and shapes.

    Args:
        model: it, or what stands for it.
        headers: what the files hold.
        state: the model's tensors by name.
        conversions: transformers' own for its class.
        prefix: what the files' names have before those that the conversions know; all others are left out.

    Returns:
        For each of the model's names that the files have something for: what. What does not fit its shape is left out.
    """
    short = {name[len(prefix) :]: header for name, header in headers.items() if name.startswith(prefix)}
    made = converted(model, short, state, conversions, short.__getitem__)
    fits = {key: origin for key, origin, tensor in made if tensor.shape == state[key].shape}
    return {key: o._replace(names=tuple(prefix + name for name in o.names)) for key, o in fits.items()}


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
    for name in sorted(headers, key=in_order):
        key, pattern = rename(name, renamings, converters, base, state)
        if key not in state and name in state:
            key, pattern = name, None
        if key in state:
            yield name, key, None if pattern is None else (by_pattern[pattern], pattern)


def _machinery(conversions: Sequence[Any]) -> tuple[Any, list[Any], list[Any], Any]:
    """Transformers' own function that renames, the two kinds of conversions, and the order in which names are taken."""
    from transformers import core_model_loading as theirs

    renamings = [one for one in conversions if isinstance(one, theirs.WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, theirs.WeightConverter)]
    return theirs.rename_source_key, renamings, converters, theirs.dot_natural_key


def may_cross(model: Any) -> bool:
    """Whether a model and its base model have tensors under one name: adding a prefix or taking it off, both exist."""
    base = getattr(model, "_modules", {}).get(getattr(model, "base_model_prefix", ""))
    if base is None:
        return False
    if model._parameters.keys() & base._parameters.keys() or model._buffers.keys() & base._buffers.keys():
        return True
    both = model._modules.keys() & base._modules.keys()
    return any(next(model._modules[name].parameters(), None) is not None for name in both if model._modules[name])


def crossed(
    model: Any, headers: Headers, state: Headers, made: Mapping[str, Origin], conversions: Sequence[Any]
) -> dict[str, str]:
    """The keys that transformers reads into another one.

    It adds the prefix of the base model to a name, or takes it off, wherever the result is a name of the model. But
    where one of the files' names has that prefix, none of them needs another.

    Args:
        model: the model.
        headers: what the files hold.
        state: the model's tensors by name.
        made: what each of them is read from.
        conversions: what the loader renames and converts.

    Returns:
        For each of these keys the name that the files have for it.
    """
    straight = renamed(model, headers, conversions) if may_cross(model) else {}
    if not any(own.startswith(f"{model.base_model_prefix}.") and own in state for own in straight.values()):
        return {}
    read_into = {name: key for key, origin in made.items() if not origin.is_converted for name in origin.names}
    return {own: name for name, key in read_into.items() if (own := straight[name]) != key and own in state}


def by_prefix(unread: Headers, missing: Headers, needed: Collection[str], own: Collection[str] = ()) -> Prefixes | None:
    """The one prefix that, put in place of another, makes every unread name a missing one of the same shape.

    It has to fit all of the files' unread tensors, or all that the model needs; to be the only one; and, where it is
    not just added or removed, to move more than one module: `classifier` is not `score` because both have a weight.
    It replaces no number by another, and nothing under which the model has such tensors itself: layer 2 is not layer 0.

    Args:
        unread: tensors of the files that nothing read.
        missing: tensors of the model that the files did not deliver, by name.
        needed: those of them that nothing else supplies.
        own: the names of all of the model's tensors.
    """
    found: dict[tuple[tuple[str, str], ...], Prefixes] = {}
    for old, new in _candidates(unread, missing, needed):
        moved = {new + name[len(old) :]: name for name in unread if name.startswith(old)}
        names = {
            key: name for key, name in moved.items() if key in missing and missing[key].shape == unread[name].shape
        }
        modules = {name.rpartition(".")[0] for name in names}
        is_whole = len(names) == len(unread)
        if _is_elsewhere(old, new, names.values(), own):
            continue
        if (is_whole or (needed and names.keys() >= set(needed) and len(modules) > 1)) and (
            len(modules) > 1 or not (old and new)
        ):
            found.setdefault(tuple(sorted(names.items())), Prefixes(old, new, names))  # the shortest comes first
    # `module.model.` for `model.` is a part of what `module.` for nothing says.
    whole = [
        one for one in found.values() if not any(one.names.items() < other.names.items() for other in found.values())
    ]
    return whole[0] if len(whole) == 1 else None


def _candidates(unread: Headers, missing: Headers, needed: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of prefixes that make one chosen tensor of either side one of the other; the shortest of them.

    What fits all of a side fits the chosen one. It is the one with the fewest partners of its shape, and a file of
    strangers may have any number: of many pairs those are tried that leave the most of the names alone.
    """
    by_shape: dict[torch.Size, tuple[list[str], list[str]]] = {}
    for side, headers in enumerate((unread, missing)):
        for name, header in headers.items():
            by_shape.setdefault(header.shape, ([], []))[side].append(name)
    found: set[tuple[str, str]] = set()
    if (rarest := min(unread, key=lambda name: len(by_shape[unread[name].shape][1]), default=None)) is not None:
        found |= {pair for key in by_shape[unread[rarest].shape][1] for pair in _pairs(rarest, key)}
    if (rarest := min(needed, key=lambda key: len(by_shape[missing[key].shape][0]), default=None)) is not None:
        found |= {pair for name in by_shape[missing[rarest].shape][0] for pair in _pairs(name, rarest)}
    return sorted(found, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))[:_MOST_TRIED]


def _pairs(name: str, key: str) -> Iterator[tuple[str, str]]:
    """The pairs of prefixes that turn a name into a key: what is left of each common end of them."""
    ends = [name[place:] for place in range(len(name)) if place == 0 or name[place - 1] == "."]
    for end in ends:
        if key == end or key.endswith("." + end):
            yield name[: len(name) - len(end)], key[: len(key) - len(end)]


def _is_elsewhere(old: str, new: str, names: Collection[str], own: Collection[str]) -> bool:
    """Whether two prefixes are two places of a model, and not two names of one."""
    theirs, ours = old.split(".")[:-1], new.split(".")[:-1]
    while theirs and ours and theirs[-1] == ours[-1]:
        theirs.pop(), ours.pop()
    numbers = [[part for part in parts if part.isdecimal()] for parts in (theirs, ours)]
    if all(numbers) and numbers[0] != numbers[1]:
        return True
    depth = len(theirs) + 1
    places = {tuple(name.split(".")[:depth]) for name in names} if theirs else set()
    taken = (tuple(key.split(".")) for key in own if places)
    return any(parts[:depth] in places or parts[:-1] == tuple(theirs) for parts in taken)


def by_shape(unread: Headers) -> dict[torch.Size, list[str]]:
    """The names of all tensors of each shape."""
    found: dict[torch.Size, list[str]] = {}
    for name, header in unread.items():
        found.setdefault(header.shape, []).append(name)
    return found


def likely(key: str, alike: Sequence[str]) -> str | None:
    """The unread tensor of the files that a missing key most likely is: the one with the longest common end.

    Args:
        key: the missing key.
        alike: those of its shape.
    """
    parts = key.split(".")[::-1]

    def common(name: str) -> tuple[int, int]:
        theirs = name.split(".")[::-1]
        end = next((i for i, pair in enumerate(zip(parts, theirs, strict=False)) if len(set(pair)) > 1), len(parts))
        return end, len(set(parts) & set(theirs))

    if len(alike) > _MOST_TRIED:
        return None  # one of very many is not likely
    best = max(alike, key=common, default=None)
    return best if best is not None and common(best)[0] else None


def common_prefixes(all_of: Collection[str]) -> list[str]:
    """The prefixes that all of these names have, the shortest first."""
    first_and_last = (min(all_of, default=""), max(all_of, default=""))
    parts = zip(*(name.split(".")[:-1] for name in first_and_last), strict=False)
    common = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts)]
    return [".".join([*common[:end], ""]) for end in range(1, len(common) + 1)]


def renamed(model: Any, headers: Headers, conversions: Sequence[Any]) -> dict[str, str]:
    """What transformers makes of each of the files' names by renaming alone, whether the model has it or not."""
    rename, renamings, _, _ = _machinery(conversions)
    base = getattr(model, "base_model_prefix", "")
    return {name: rename(name, renamings, [], base, {})[0] for name in headers}
