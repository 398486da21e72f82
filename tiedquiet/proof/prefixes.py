"""How names in a checkpoint's files map to a model's names where no rule of transformers does: by what else is in them.

That is a prefix, or parts in the middle of names: a wrapper's, of all the model or of each of its layers. Nothing here
reads a value: tensors are headers on meta.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tiedquiet.proof.likely import in_common, most_alike
from tiedquiet.proof.names import MOST_TRIED, Headers

_MOST_PARTNERS = 1_000  # of one tensor: who has more is junk
MOST_PARTS = 16  # of a name that may be a prefix
_MOST_NAMED = 2


@dataclass(frozen=True)
class Prefixes:
    """A prefix of the files' names where the model has another.

    Attributes:
        old: as the files have it, with its last dot; empty where it has to be added.
        new: as the model has it, in the same form.
        names: for each of the model's names the one in the files.
        parts: in place of one prefix, several, each of names of its own.
        inside: in place of a prefix, parts in the middle of names.
        instead: what the model has where the files have one such part; empty where it has nothing.
        has_them: which of the two has these parts in its names.
    """

    old: str
    new: str
    names: dict[str, str]
    parts: "tuple[Prefixes, ...]" = ()
    inside: tuple[str, ...] = ()
    instead: str = ""
    has_them: str = "checkpoint"

    @property
    def why(self) -> str:
        """Why nothing read them, as a clause."""
        if self.instead:
            return f"because the checkpoint has .{self.inside[0]}. where the model has .{self.instead}."
        if self.inside:
            return f"because names in the {self.has_them} have {' and '.join(self.inside)} in them"
        pairs = [
            f"{one.old or 'no prefix'} where the model has {one.new or 'no prefix'}" for one in self.parts or [self]
        ]
        more = [f"{len(pairs) - _MOST_NAMED} more such prefixes"] if len(pairs) > _MOST_NAMED else []
        return f"because the checkpoint has {' and '.join(pairs[:_MOST_NAMED] + more)}"

    @property
    def olds(self) -> list[str]:
        """Those that names in the files begin with."""
        return [one.old for one in self.parts or [self] if one.old]

    def known_as(self, of: Collection[str]) -> dict[str, str]:
        """What becomes of the files' names, without those that do not begin with this prefix."""
        if self.instead:
            return {name: new for name in of if (new := _with_other(name, self.inside[0], self.instead)) != name}
        if self.inside:
            return {name: without(name, self.inside) for name in of}
        if self.parts:
            return {name: new for one in self.parts for name, new in one.known_as(of).items()}
        return {name: self.new + name[len(self.old) :] for name in of if name.startswith(self.old)}

    def key_mapping(self, is_narrow: bool = False) -> dict[str, str]:
        """The `key_mapping` that makes `from_pretrained` read them; empty if none does.

        Args:
            is_narrow: not of all that begins with this prefix, but of what follows it in these names.
        """
        if self.instead:
            return {rf"\.{re.escape(self.inside[0])}\.": f".{self.instead}."}
        if self.inside:
            return {}
        if self.parts:
            return {old: new for one in self.parts for old, new in one.key_mapping(is_narrow).items()}
        # Of whole names: transformers replaces what a pattern matched wherever it is, and up to 5.3 each time.
        if self.old and not is_narrow:
            return {f"^{re.escape(self.old)}(.+)": rf"{self.new}\1"}
        first = sorted({name[len(self.old) :].partition(".")[0] for name in self.names.values()})
        return {f"^{re.escape(self.old)}((?:{'|'.join(map(re.escape, first))})\\b.*)": rf"{self.new}\1"}


def by_prefix(
    unread: Headers,
    missing: Headers,
    needed: Collection[str],
    own: Collection[str] = (),
    may_move_one: Callable[[str, str], bool] = lambda old, new: not (old and new),
) -> Prefixes | None:
    """The one prefix that, put in place of another, makes every unread name a missing one of the same shape.

    It has to fit all of the files' unread tensors, or all that the model needs; to lead to the same keys as any other
    that does; and, where it is not just added or removed, to move more than one module: `classifier` is not `score`
    because both have a weight.
    It replaces no number by another, and nothing under which the model has such tensors itself: layer 2 is not layer 0.
    If none does, one that is just added or removed may lead to keys of another shape as well, but to fewer of these.

    Args:
        unread: tensors of the files that nothing read.
        missing: tensors of the model that the files did not deliver, by name.
        needed: those of them that nothing else supplies.
        own: the names of all of the model's tensors.
        may_move_one: whether one prefix in place of another may move one module alone.
    """
    found: dict[tuple[tuple[str, str], ...], Prefixes] = {}
    in_part: dict[tuple[tuple[str, str], ...], Prefixes] = {}
    for old, new in candidates(unread, missing, needed):
        led = {new + name[len(old) :]: name for name in unread if name.startswith(old)}
        names = {key: name for key, name in led.items() if _fits(unread[name], missing.get(key))}
        # What has its place, in another shape (a larger vocabulary), is led there as well.
        others = set() if old and new else {key for key in led if key in missing and key not in names}
        is_whole = len(names) + len(others) == len(unread)
        among = missing if may_move_one(old, new) else None
        is_most = is_enough(names, is_whole, set(needed) - others, among) and len(names) > len(others)
        if is_most and not is_elsewhere(old, new, names.values(), own):
            some = in_part if others else found
            some.setdefault(tuple(sorted(names.items())), Prefixes(old, new, names))  # the shortest comes first
    found = found or in_part
    # `module.model.` for `model.` is a part of what `module.` for nothing says.
    whole = [
        one for one in found.values() if not any(one.names.items() < other.names.items() for other in found.values())
    ]
    if whole:
        # Of two copies of all that is missing, somebody else says whether they differ.
        return whole[0] if are_copies([(one.names, one.new) for one in whole]) else None
    return _by_parts(unread, missing, needed, own) or _by_subtrees(unread, missing, needed, own)


def are_copies(ways: Sequence[tuple[Collection[str], str]]) -> bool:
    """Whether ways to find something lead to the same keys, under the same prefix of the model's.

    Args:
        ways: of each, the model's names, and the prefix that they have there.
    """
    (first, new), *others = ways
    return all(set(keys) == set(first) and other == new for keys, other in others)


def is_enough(names: Mapping[str, str], is_whole: bool, needed: Collection[str], among: Headers | None = None) -> bool:
    """Whether so much is found under other names that it is no chance.

    Args:
        names: what was found: for each of the model's names the one in the files.
        is_whole: whether that takes all that the files have.
        needed: what the model needs.
        among: where all may be one module, what else its tensors may be by their shapes.
    """
    if len({key.rpartition(".")[0] for key in names}) < 2:
        return is_whole and among is not None and all(_is_likeliest(key, name, among) for key, name in names.items())
    return is_whole or (bool(needed) and set(needed).issubset(names))


def _is_likeliest(key: str, name: str, among: Headers) -> bool:
    """Whether no other key of its shape is more like a name of the files."""
    return key in most_alike(name, [other for other, tensor in among.items() if _fits(among[key], tensor)])


def _by_parts(unread: Headers, missing: Headers, needed: Collection[str], own: Collection[str]) -> Prefixes | None:
    """The parts that names of one side have and none of the other, if that is all they differ in: a wrapper's."""
    for longer, shorter, others in ((unread, missing, own), (missing, unread, unread)):
        inside = parts_besides(longer, others)
        pairs = [(name, without(name, inside)) for name in longer]
        pairs = [(long, short) for long, short in pairs if _fits(longer[long], shorter.get(short))]
        names = {short: long for long, short in pairs} if longer is unread else dict(pairs)
        if not len(names) == len(set(names.values())) == len(pairs):
            return None
        if is_enough(names, len(names) == len(unread), needed):
            used = sorted({part for long, _ in pairs for part in long.split(".")}.intersection(inside))
            return Prefixes("", "", names, inside=tuple(used), has_them="checkpoint" if longer is unread else "model")
    return None


def _by_subtrees(unread: Headers, missing: Headers, needed: Collection[str], own: Collection[str]) -> Prefixes | None:
    """Several prefixes, each in place of another: what the files have under one is what is needed under the other.

    Each has to be the only one with these names and shapes, or with these numbers in it, and to move more than one
    module. Together they have to fit as one has to.
    """
    wanted = {key: missing[key] for key in needed}
    theirs, ours = (
        {(name.rpartition(".")[2], header.shape) for name, header in some.items()} for some in (unread, wanted)
    )
    if not (ours <= theirs or theirs <= ours):
        return None  # the usual answer, given early: junk by the thousands takes no time
    alike: dict[object, list[str]] = {}
    for old, content in _subtrees(unread).items():
        for like in (content, (content, _numbers(old.split(".")))):
            alike.setdefault(like, []).append(old)
    if (found := _of_subtrees(wanted, alike, own)) and is_enough(found.names, len(found.names) == len(unread), needed):
        return found
    # Of a tie whose ends are all missing none is needed, and the part that one of them lies in is whole with it alone.
    found = _of_subtrees(missing, alike, own) if len(missing) > len(wanted) else None
    return found if found and len(found.names) == len(unread) else None


def _of_subtrees(wanted: Headers, alike: Mapping[object, list[str]], own: Collection[str]) -> Prefixes | None:
    """The prefixes in place of others that fit, if no name of the files has two places.

    Args:
        wanted: what is missing.
        alike: the prefixes of each content in the files, and of each with the same numbers in them.
        own: the names of all of the model's tensors.
    """
    names: dict[str, str] = {}
    found: list[Prefixes] = []
    for new, content in sorted(_subtrees(wanted).items(), key=lambda one: (len(one[0]), one[0])):
        olds = alike.get(content, [])
        if len(olds) > 1:  # layers, most often
            olds = alike.get((content, _numbers(new.split("."))), [])
        of_these = {new + rest: olds[0] + rest for rest, _ in content} if len(olds) == 1 else {}
        if not of_these or not names.keys().isdisjoint(of_these):
            continue  # or it is a part of what was found
        old, new = _without_common_end(olds[0], new)
        modules = {name.rpartition(".")[0] for name in of_these}
        if len(modules) > 1 and not is_elsewhere(old, new, of_these.values(), own):
            found.append(Prefixes(old, new, of_these))
            names |= of_these
    is_one_to_one = len(set(names.values())) == len(names)
    return Prefixes("", "", names, parts=tuple(found)) if found and is_one_to_one else None


def _subtrees(headers: Headers) -> dict[str, frozenset[tuple[str, torch.Size]]]:
    """Names without their prefix, and shapes, of all that lies under each prefix."""
    found: dict[str, set[tuple[str, torch.Size]]] = {}
    for name, header in headers.items():
        for start in starts(name):
            found.setdefault(start, set()).add((name[len(start) :], header.shape))
    return {prefix: frozenset(content) for prefix, content in found.items()}


def starts(name: str) -> Iterator[str]:
    """The prefixes of a name, the shortest first."""
    places = (place + 1 for place, letter in enumerate(name) if letter == ".")
    return (name[:place] for place in itertools.islice(places, MOST_PARTS))


def _without_common_end(old: str, new: str) -> tuple[str, str]:
    theirs, ours = old.split(".")[:-1], new.split(".")[:-1]
    while theirs and ours and theirs[-1] == ours[-1]:
        theirs.pop(), ours.pop()
    return ".".join([*theirs, ""]), ".".join([*ours, ""])


def _numbers(parts: list[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part.isdecimal())


def parts_besides(names: Collection[str], others: Collection[str]) -> set[str]:
    """The parts of names, numbers aside, that none of the others has."""
    ours, theirs = ({part for name in some for part in name.split(".")} for some in (names, others))
    return {part for part in ours - theirs if not part.isdecimal()}


def without(name: str, inside: Collection[str]) -> str:
    """A name without some of its parts; its last one is no wrapper's."""
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in inside), last])


def other_parts(unread: Headers, known: Collection[str]) -> Iterator[tuple[str, Collection[str]]]:
    """Each part in the middle of the files' names that the model does not know, and the names that have it.

    Not two of them that stand in the same place of names that are the same otherwise: one may be of a second copy.

    Args:
        unread: tensors of the files that nothing read.
        known: the parts that the model and its conversions know.
    """
    found: dict[str, dict[str, str]] = {}
    for name in unread:
        for part in set(name.split(".")[1:-1]).difference(known):
            if not part.isdecimal():
                found.setdefault(part, {})[name] = _with_other(name, part, "")
    count = Counter(place for places in found.values() for place in places.values())
    for part, places in sorted(found.items(), key=lambda one: (-len(one[1]), one[0])):
        if all(count[place] == 1 for place in places.values()):
            yield part, places.keys()


def place_of_part(name: str, part: str, other: str) -> str:
    """Where a name has a part in its middle, if that were another: the prefix that ends with it."""
    path = name.split(".")
    return ".".join([*path[: path.index(part, 1)], other, ""])


def _with_other(name: str, part: str, other: str) -> str:
    first, *path, last = name.split(".")
    return ".".join([first, *(other if one == part else one for one in path), last]) if path else name


def candidates(unread: Headers, missing: Headers, needed: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of prefixes that make one chosen tensor of either side one of the other; the shortest of them.

    What fits all of a side fits the chosen one. It is the one with the fewest partners of its shape, and a file of
    strangers may have any number: of many pairs those are tried that leave the most of the names alone. What has none
    is made of several, or by a conversion.
    """
    by_shape: dict[torch.Size, tuple[list[str], list[str]]] = {}
    for side, headers in enumerate((unread, missing)):
        for name, header in headers.items():
            by_shape.setdefault(header.shape, ([], []))[side].append(name)
    found: set[tuple[str, str]] = set()
    partners = {name: keys for name, header in unread.items() if (keys := by_shape[header.shape][1])}
    if (rarest := min(partners, key=lambda name: len(partners[name]), default=None)) is not None:
        found |= {pair for key in partners[rarest][:_MOST_PARTNERS] for pair in _pairs(rarest, key)}
    partners = {key: some for key in needed if (some := by_shape[missing[key].shape][0])}
    if (rarest := min(partners, key=lambda key: len(partners[key]), default=None)) is not None:
        found |= {pair for name in partners[rarest][:_MOST_PARTNERS] for pair in _pairs(name, rarest)}
    return sorted(found, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))[:MOST_TRIED]


def _pairs(name: str, key: str) -> Iterator[tuple[str, str]]:
    """The pairs of prefixes that turn a name into a key: what is left of each common end of them."""
    parts = key.split(".")
    for end in range(in_common(key, name)[0], 0, -1):
        shared = len(".".join(parts[-end:]))
        yield name[: len(name) - shared], key[: len(key) - shared]


def is_elsewhere(old: str, new: str, names: Collection[str], own: Collection[str]) -> bool:
    """Whether two prefixes are two places of a model, and not two names of one."""
    theirs, ours = (prefix.split(".")[:-1] for prefix in _without_common_end(old, new))
    numbers = [_numbers(parts) for parts in (theirs, ours)]
    if all(numbers) and numbers[0] != numbers[1]:
        return True
    depth = len(theirs) + 1
    places = {tuple(name.split(".")[:depth]) for name in names}
    taken = (tuple(key.split(".")) for key in own if theirs)
    return any(parts[:depth] in places or parts[:-1] == tuple(theirs) for parts in taken)


def _fits(header: torch.Tensor, tensor: torch.Tensor | None) -> bool:
    return tensor is not None and header.shape == tensor.shape


def common_prefixes(all_of: Collection[str]) -> list[str]:
    """The prefixes that all of these names have, the shortest first."""
    first_and_last = (min(all_of, default=""), max(all_of, default=""))
    parts = zip(*(name.split(".")[:-1] for name in first_and_last), strict=False)
    common = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts)][:MOST_PARTS]
    return [".".join([*common[:end], ""]) for end in range(1, len(common) + 1)]
