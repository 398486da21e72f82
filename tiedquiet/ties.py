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
        off: the config flag that switches these ties off, in words; None where they are on.
    """

    prefix: str
    keys: object
    off: str | None = None


@dataclass
class Group:
    """Names that are meant to be one tensor; `sources` holds what each target was declared tied to."""

    members: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    off: dict[str, str | None] = field(default_factory=dict)

    def chain(self, key: str) -> Iterator[str]:
        """The source of `key`, the source of that, and so on; a ring is walked once."""
        seen = {key}
        while (source := self.sources.get(key)) is not None and source not in seen:
            yield source
            seen.add(source)
            key = source


def groups(declarations: Iterable[Declaration], names: Collection[str]) -> list[Group]:
    """Expand declarations over the model's tensor `names` into disjoint tie groups.

    A declaration that names what the model does not have, or whose two sides do not match up, declares
    nothing. So does a list (the form of transformers 4): it names targets without their sources.
    """
    declared = [d for d in declarations if isinstance(d.keys, Mapping) and d.keys]
    if not declared:
        return []
    ordered: list[str] = []
    sources: dict[str, str] = {}
    off: dict[str, str | None] = {}
    for declaration in declared:
        for target, source in _pairs(declaration, names, ordered):
            # A later line about the same target replaces an earlier one (Deformable DETR relies on it).
            sources[target] = source
            off[target] = declaration.off
    group_of: dict[str, Group] = {}
    for target, source in sources.items():
        left = group_of.setdefault(source, Group([source]))
        right = group_of.setdefault(target, Group([target]))
        if left is not right:
            if len(left.members) < len(right.members):
                left, right = right, left
            left.members += right.members
            left.sources.update(right.sources)
            left.off.update(right.off)
            group_of.update(dict.fromkeys(right.members, left))
        left.sources[target] = source
        left.off[target] = off[target]
    return list({id(group): group for group in group_of.values()}.values())


def _pairs(declaration: Declaration, names: Collection[str], ordered: list[str]) -> Iterator[tuple[str, str]]:
    prefix = declaration.prefix
    for target, source in cast(Mapping[object, object], declaration.keys).items():
        targets = _matches(prefix, target, names, ordered)
        sources = _matches(prefix, source, names, ordered)
        if sources and len(targets) % len(sources) == 0:
            yield from ((t, s) for t, s in zip(targets, cycle(sources), strict=False) if t != s)


def _matches(prefix: str, pattern: object, names: Collection[str], ordered: list[str]) -> list[str]:
    """Names that a side of a declaration stands for: itself, or all that start with a match, as in transformers."""
    if not isinstance(pattern, str):
        return []
    if prefix + pattern in names:
        return [prefix + pattern]
    if not ordered:  # sorted once, for the first pattern: most declarations name their tensors as they are
        ordered += sorted(names)
    try:
        regex = re.compile(f"{re.escape(prefix)}(?:{pattern})")
    except re.error:
        return []
    # Only names that share the pattern's literal start can match: without this, many patterns over many
    # names would cost their product.
    literal = re.match(r"\w*(?![?*{])", pattern)
    start = prefix + (literal[0] if literal and "|" not in pattern else "")
    low, high = bisect_left(ordered, start), bisect_left(ordered, start + "\U0010ffff")
    return [name for name in ordered[low:high] if regex.match(name)]
