"""What a model declares: parameter names in, tie groups out. No tensors, no torch."""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import cast


@dataclass(frozen=True)
class Declaration:
    """The `_tied_weights_keys` of one model or sub-model.

    Attributes:
        prefix: dotted path of the sub-model inside the loaded model with its last dot, empty for the model itself.
        keys: the attribute in whatever form its author chose (dict, list, None, ...).
        flag: the config flag that switches these ties off, in words; empty where they are on.
    """

    prefix: str
    keys: object
    flag: str = ""


@dataclass
class Group:
    """Names that are meant to be one tensor.

    Attributes:
        members: all of them.
        sources: what each target was declared tied to.
        flags: for each name that a declaration mentions, on either side, the flag that switches it off, in words.
        by_config: the class whose config asks for the tie, where nothing declares it.
    """

    members: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    by_config: str = ""

    def chain(self, key: str) -> Iterator[str]:
        """The source of `key`, the source of that, and so on; a ring is walked once."""
        seen = {key}
        while (source := self.sources.get(key)) is not None and source not in seen:
            yield source
            seen.add(source)
            key = source

    def source_of(self, key: str, stored: Collection[str]) -> str | None:
        """The nearest of these that was stored."""
        return next((name for name in self.chain(key) if name in stored), None)


def groups(declarations: Iterable[Declaration], names: Collection[str]) -> dict[str, Group]:
    """Expand declarations over the model's tensor `names` into disjoint tie groups, each under all of its members.

    A declaration that names what the model does not have, or whose two sides do not match up, declares
    nothing. So does a list (the form of transformers 4): it names targets without their sources.
    """
    ordered: list[str] = []
    declared: dict[str, tuple[str, str]] = {}
    for declaration in declarations:
        if isinstance(declaration.keys, Mapping):
            for target, source in _pairs(declaration, names, ordered):
                # A later line about the same target replaces an earlier one (Deformable DETR relies on it).
                declared[target] = source, declaration.flag
    found: dict[str, Group] = {}
    for target, (source, flag) in declared.items():
        group, other = (found.get(name) or Group([name]) for name in (source, target))
        if group is not other:
            if len(group.members) < len(other.members):
                group, other = other, group
            group.members += other.members
            group.sources.update(other.sources)
            group.flags.update(other.flags)
            found.update(dict.fromkeys([*other.members, source, target], group))
        group.sources[target] = source
        group.flags[target] = flag
        group.flags.setdefault(source, flag)
    return found


def _pairs(declaration: Declaration, names: Collection[str], ordered: list[str]) -> Iterator[tuple[str, str]]:
    for target, source in cast(Mapping[object, object], declaration.keys).items():
        targets = _matches(declaration.prefix, target, names, ordered)
        sources = _matches(declaration.prefix, source, names, ordered)
        if sources and len(targets) % len(sources) == 0:
            yield from ((t, s) for t, s in zip(targets, cycle(sources), strict=False) if t != s)


def _matches(prefix: str, pattern: object, names: Collection[str], ordered: list[str]) -> list[str]:
    """The names that one side of a declaration stands for: a name itself, or a pattern for tensors or modules.

    transformers takes every name that starts with a match. Here the match has to end where a part of the name does, or
    just behind its dot: `head.weight`, where there is none, is not `head.weight_v`.
    """
    if not isinstance(pattern, str):
        return []
    if prefix + pattern in names:
        return [prefix + pattern]
    if not ordered:  # sorted once, for the first pattern: most declarations name their tensors as they are
        ordered += sorted(names)
    try:
        regex = re.compile(rf"(?:{pattern})(?:(?=\.|$)|(?<=\.))")
    except re.error:
        return []
    # Only names that share the pattern's literal start can match: without this, many patterns over many
    # names would cost their product.
    literal = re.match(r"\w*(?![?*{])", pattern)
    start = prefix + (literal[0] if literal and "|" not in pattern else "")
    low, high = bisect_left(ordered, start), bisect_left(ordered, start + "\U0010ffff")
    return [name for name in ordered[low:high] if regex.match(name[len(prefix) :])]
