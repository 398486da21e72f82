"""What `from_pretrained` would make of what nothing read, by the first rule that fits: names alone, no values."""

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

from tiedquiet.proof import names, prefixes
from tiedquiet.proof.missing import is_of_another_class, saved_by
from tiedquiet.proof.prefixes import Prefixes, are_copies, candidates, is_elsewhere, is_enough
from tiedquiet.proof.survey import asks_for_ties, declared, survey
from tiedquiet.proof.ties import Declaration, groups

_SAMPLE = 512
_MOST_CHANGES = 8  # of each kind that are tried before conversions: to try one takes a walk over all names


class Leftovers(NamedTuple):
    """What nothing read, beside the model that lacks something.

    Attributes:
        model: the model, or what stands for it.
        unread: what the files have and nothing read.
        missing: what the model lacks.
        needed: those of them that nothing else supplies.
        state: all of the model's tensors.
        conversions: transformers' own for its class, or what the loader renamed and converted.
        was_read: what else the files have.
    """

    model: Any
    unread: names.Headers
    missing: names.Headers
    needed: Collection[str]
    state: names.Headers
    conversions: Sequence[Any]
    was_read: names.Headers = MappingProxyType({})

    def made(self, is_resumed: bool = False) -> names.Made | None:
        """What the first rule that fits makes of the unread tensors.

        Args:
            is_resumed: whether the checkpoint is one of this very model, head and all.
        """
        model, unread, missing = self.model, self.unread, self.missing
        if own := [key for key, tensor in missing.items() if key in unread and unread[key].shape == tensor.shape]:
            why = "because they are renamed while they are read, to names that the model does not have"
            return names.Made({key: names.Origin((key,), False) for key in own}, why)
        sides = self._sides(is_resumed)
        others = list(names.conversions_of_others(model))
        for why, cure, rules in others:
            origins = {k: o for k, o in names.origins(model, unread, self.state, rules).items() if k in missing}
            if origins:
                made = names.Made(origins, why, rules, leads=self._leads({name: name for name in unread}, rules))
                tried = ((side._prefix_in_files() or side._prefix_of_renamed()) for side in sides)
                change = next(filter(None, tried), None)
                return made._replace(cure=self._cure([*_mappings_of(change), names.own_mapping(model)], made) or cure)
        ways = [("", self.conversions)]
        if not is_resumed:  # of a wrapper's prefix in a Trainer's checkpoint more is asked
            ways += [(f", and {why}", rules) for why, _, rules in others if rules]
        for side in sides:
            if (found := side._with_other_names(ways)) is not None:
                made, change = found
                return made._replace(cure=self._cure(_mappings_of(change), made))
        return self._by_ties() if asks_for_ties(model) else None

    def without(self, made: names.Made) -> "Leftovers":
        """What is left of either side besides what was found."""
        used = made.key_of
        return self._replace(
            unread={name: header for name, header in self.unread.items() if name not in used},
            missing={key: tensor for key, tensor in self.missing.items() if key not in made.origins},
            needed=set(self.needed) - made.origins.keys(),
        )

    def _by_ties(self) -> names.Made | None:
        """What the class that saved the files ties, or its base model: they may have a name that this model lacks.

        That class is looked for beside the model's own, where it was written; nothing is imported. A base model has the
        same prefix; what others of that prefix declare under it, the files do not have.
        """
        ties, own_base = declared(survey(self.model)), f"{getattr(self.model, 'base_model_prefix', '')}."
        ends = [key for key in self.missing if key not in ties or not self.missing.keys() & ties[key].chain(key)]
        modules = (vars(sys.modules.get(kind.__module__, object)) for kind in reversed(type(self.model).__mro__))
        beside = {name: one for module in modules for name, one in module.items() if isinstance(one, type)}
        for kind in filter(None, map(beside.get, saved_by(self.model))):
            base = f"{getattr(kind, 'base_model_prefix', '')}."
            ours = {own: key for key in ends for own in (key.removeprefix(own_base), base + key, key)}
            bases = [one for one in beside.values() if f"{getattr(one, 'base_model_prefix', '')}." == base]
            whole = [("", kind), *((base, one) for one in bases)]
            tied = [Declaration(start, getattr(one, "_tied_weights_keys", None)) for start, one in whole]
            found: dict[str, names.Origin] = {}
            for own, group in groups(tied, {*ours, *self.unread, *self.was_read}).items():
                theirs = [end for end in group.members if end in self.unread or end in self.was_read]
                header = self.unread.get(theirs[0]) if len(theirs) == 1 else None
                if own in ours and header is not None and header.shape == self.missing[ours[own]].shape:
                    found[ours[own]] = names.Origin((theirs[0],), False)
            if found:
                why = f"because {kind.__name__}, which saved the checkpoint, ties the two and stores one of them"
                mapping = {f"^{re.escape(origin.names[0])}$": key for key, origin in found.items()}
                made = names.Made(found, why)
                return made._replace(cure=self._cure([mapping], made))
        return None

    def _sides(self, is_resumed: bool) -> list["Leftovers"]:
        """What may have to fit as a whole: all of it; and all of the base model by itself."""
        # What the class says that it has no place for is no part of a whole that one prefix has to fit. Where
        # transformers' own renaming has a place for it, the class does not speak of it.
        theirs, base = self.not_ignored(), getattr(self.model, "base_model_prefix", "")
        if is_of_another_class(self.model) and any(names.is_in(base, name) for name in self.was_read):
            # The rest is that class's head, unless it is named as one missing key alone is.
            count = Counter(end for key in self.state for end in _ends(key))
            wanted = {end for key in self.missing for end in _ends(key) if count[end] == 1}
            theirs = {
                name: header
                for name, header in theirs.items()
                if names.is_in(base, name) or not wanted.isdisjoint(_ends(name))
            }
        of_base = {name: header for name, header in theirs.items() if names.is_in(base, name)} or theirs
        sides = [self._replace(unread=theirs)]
        # A head may be in neither: that of another class in the files, and a new one in the model. One module is no
        # base.
        if not is_resumed and len({name.rpartition(".")[0] for name in of_base}) > 1:
            needed = {key for key in self.needed if names.is_in(base, key)}
            sides.append(self._replace(unread=of_base, needed=needed))
        return sides

    def not_ignored(self) -> names.Headers:
        """Those of the unread tensors that the class does not say it has no place for."""
        ends = {end for key in self.missing for end in _ends(key)}
        some = names.of_models(self.unread)
        return {name: header for name, header in some.items() if not is_ignored(self.model, name, ends)}

    def _with_other_names(self, ways: Sequence[tuple[str, Sequence[Any]]]) -> tuple[names.Made, Prefixes] | None:
        """What becomes of them with a prefix in place of another; renamed or converted, if that alone is not enough.

        Args:
            ways: whose conversions, as a clause, and these; what most is made by counts.
        """
        if (found := self._prefix_in_files()) is not None:
            leads = self._leads(found.known_as(self.unread), self.conversions)
            return _straight(found)._replace(leads=leads), found
        tried: list[tuple[names.Made, Prefixes]] = []
        for why, rules in ((why, rules) for why, rules in ways if rules):
            side = self._replace(conversions=rules)
            if (change := side._prefix_of_renamed()) is not None:
                reported = names.renamed(self.model, self.unread, rules)
                known_as = change.known_as(reported.values())
                leads = self._leads({name: known_as[new] for name, new in reported.items() if new in known_as})
                one: tuple[names.Made, Prefixes] | None = (_straight(change)._replace(leads=leads), change)
            else:
                one = side.under_other_names()
            if one is not None:
                made, change = one
                tried.append((made._replace(why=made.why + why), change))
                if made.origins.keys() >= self.missing.keys():
                    break  # no other makes more
        return max(tried, key=lambda one: len(one[0].origins), default=None)

    def _prefix_in_files(self) -> Prefixes | None:
        """The prefix that fits, of the names that the files have."""
        return prefixes.by_prefix(self.unread, self.missing, self.needed, self.state, self._may_move_one)

    def _may_move_one(self, old: str, new: str) -> bool:
        """Whether one prefix in place of another may move one module alone.

        In a file of another class, of which the rest was read, that is another module, whatever it is called.
        """
        if old and new:
            return False
        is_another_s = bool(self.was_read) and is_of_another_class(self.model)
        return not is_another_s or old + new == f"{getattr(self.model, 'base_model_prefix', '')}."

    def _prefix_of_renamed(self) -> Prefixes | None:
        """The prefix that fits, of what transformers has made of these names."""
        in_files = {new: old for old, new in names.renamed(self.model, self.unread, self.conversions).items()}
        in_theirs = {new: self.unread[old] for new, old in in_files.items()}
        found = prefixes.by_prefix(in_theirs, self.missing, self.needed, self.state, self._may_move_one)
        return found and replace(found, names={key: in_files[name] for key, name in found.names.items()})

    def under_other_names(self, wrappers: Collection[str] = ()) -> tuple[names.Made, Prefixes] | None:
        """What transformers would convert if the files' names were others: the only change with which all fits.

        Args:
            wrappers: prefixes of what may be around the model: of these, all that lies under one has to fit.
        """
        changes = list(self._changes(wrappers))
        # Of very many names some tell which changes are worth trying; what fits all of them fits these.
        some = list(self.unread)[:: len(self.unread) // _SAMPLE + 1]
        in_some = [self._hits(change.known_as(some)) for change in changes]
        changes = [change for change, count in zip(changes, in_some, strict=True) if 2 * count >= max(in_some) > 0]
        tried: list[tuple[int, Prefixes, dict[str, str]]] = []
        for change in changes:
            known_as = change.known_as(self.unread)
            is_clear = len(set(known_as.values())) == len(known_as)
            if is_clear and not is_elsewhere(change.old, change.new, known_as, self.state):
                tried.append((self._hits(known_as), change, known_as))
        most = max((count for count, *_ in tried), default=0)
        found: dict[frozenset[tuple[str, names.Origin]], tuple[names.Made, Prefixes]] = {}
        for _, change, known_as in (one for one in tried if one[0] == most):  # to convert takes longer than names do
            leads = self._leads(known_as, self.conversions)
            origins = self._converted(known_as)
            made = names.Made(origins, change.why, self.conversions, known_as, leads=leads, prefixes=change.olds)
            is_part = change.old in wrappers or change.instead
            whole = known_as.keys() if is_part else self.unread.keys()
            # What is just added or removed may lead to keys of another shape as well, but to fewer of these.
            is_other = bool((change.old and change.new) or change.instead)
            leads_all = most >= len(whole) < 2 * len(made.key_of) and not is_other
            is_whole = leads_all or made.key_of.keys() >= whole
            first = {key: origin.names[0] for key, origin in made.origins.items()}
            among = None if is_other or not self._may_move_one(change.old, change.new) else self.missing
            if is_enough(first, is_whole, self.needed, among):
                found.setdefault(frozenset(made.origins.items()), (made, change))  # one file may fit two halves
        if not found or not are_copies([(made.origins, change.new) for made, change in found.values()]):
            return None
        made, change = next(iter(found.values()))
        return made, replace(change, names={key: name for name, key in made.key_of.items()})

    def _leads(self, known_as: dict[str, str], conversions: Sequence[Any] = ()) -> dict[str, str]:
        """For each of the files' names the one of the model's that it leads to, if it is known as another.

        That has its shape; what is merged or split leads nowhere.
        """
        there = {name: self.unread[name] for name in known_as}
        if conversions:
            headers = {new: there[name] for name, new in known_as.items()}
            made = names.sources(self.model, headers, self.state, conversions).items()
            targets = {new: key for key, origin in made if not origin.is_converted for new in origin.names}
            known_as = {name: targets[new] for name, new in known_as.items() if new in targets}
        return {
            name: key
            for name, key in known_as.items()
            if key in self.state and self.state[key].shape == there[name].shape
        }

    def _hits(self, known_as: dict[str, str]) -> int:
        """How many of the files' names lead to what is missing, if they are known as these."""
        headers = {new: self.unread[name] for name, new in known_as.items()}
        targets = names.targets(self.model, headers, self.state, self.conversions).values()
        return sum(key in self.missing for key in targets)

    def _converted(self, known_as: dict[str, str]) -> dict[str, names.Origin]:
        """What is missing and would be made of the files' names, if they were known as these."""
        in_files = {new: name for name, new in known_as.items()}
        headers = {new: self.unread[name] for new, name in in_files.items()}
        return {
            key: origin._replace(names=tuple(map(in_files.__getitem__, origin.names)))
            for key, origin in names.origins(self.model, headers, self.state, self.conversions).items()
            if key in self.missing
        }

    def _changes(self, wrappers: Collection[str]) -> Iterator[Prefixes]:
        """What the files' names may have: a prefix of all or of many, one for another, parts in the middle."""
        unread, conversions = self.unread, self.conversions
        first = Counter(f"{name.partition('.')[0]}." for name in unread).most_common(_MOST_CHANGES)
        pairs = [(start, "") for start in (*wrappers, *prefixes.common_prefixes(unread), *dict(first))]
        in_theirs = {new: unread[old] for old, new in names.renamed(self.model, unread, conversions).items()}
        for some in (unread, in_theirs):
            pairs += candidates(some, self.missing, self.needed)[:_MOST_CHANGES]
        yield from (Prefixes(old, new, {}) for old, new in dict.fromkeys(pairs))
        patterns = [str(pattern) for one in conversions for pattern in one.source_patterns]
        known = set(re.findall(r"\w+", " ".join([*self.state, *patterns])))
        if inside := prefixes.parts_besides(unread, known):
            yield Prefixes("", "", {}, inside=tuple(sorted(inside)))
        ours = Counter(word for word in re.findall(r"\w+", " ".join([*patterns, *self.missing])) if word.isidentifier())
        parts = list(islice(prefixes.other_parts(unread, known), _MOST_CHANGES))
        in_files = {start for name in (*unread, *self.was_read) if parts for start in prefixes.starts(name)}
        for part, under in parts:
            one = min(under)  # tells which changes are worth trying
            for other, _ in ours.most_common(names.MOST_TRIED):
                change = Prefixes("", "", {}, inside=(part,), instead=other)
                places = (prefixes.place_of_part(name, part, other) for name in under)
                # What the files have in that place by itself they call as the model does.
                if self._hits(change.known_as([one])) and in_files.isdisjoint(places):
                    yield change

    def _cure(self, mappings: Sequence[dict[str, str]], made: names.Made) -> str:
        """How to have `from_pretrained` read them, as a clause: by the first `key_mapping` that does it, if any does.

        A `key_mapping` takes the place of the user's own, and up to 5.3 of the class's: what was read by those is still
        to be read into the same keys.
        """
        was_read = names.targets(self.model, self.was_read, self.state, self.conversions) if any(mappings) else {}
        for mapping in filter(None, mappings):
            whole = mapping | names.mapping_besides(self.conversions, names.conversions_of(self.model, mapping))
            rules = names.conversions_of(self.model, whole)
            read_to = names.targets(self.model, {**self.was_read, **self.unread}, self.state, rules)
            cures = all(read_to.get(name) in made.origins for name in made.key_of)
            if cures and all(read_to.get(name) == key for name, key in was_read.items()):
                # Else they are saved under the names that the files had, and up to 5.3 under names that nothing has.
                # A pipeline or a composite, which loads it, takes none for it.
                to = f"{type(self.model).__name__}.from_pretrained"
                return f"pass key_mapping={whole} to {to}, and save_original_format=False to save_pretrained"
        return ""


def _ends(name: str) -> list[str]:
    """A name, and what is left of it without its first parts."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _straight(change: Prefixes) -> names.Made:
    """What is made of the files' tensors if nothing but their names is another."""
    origins = {key: names.Origin((name,), False) for key, name in change.names.items()}
    return names.Made(origins, change.why, prefixes=change.olds)


def _mappings_of(change: Prefixes | None) -> list[dict[str, str]]:
    return [] if change is None else [change.key_mapping(), change.key_mapping(is_narrow=True)]


def is_ignored(model: Any, name: str, ends: Collection[str] = ()) -> bool:
    """Whether the class says that the files may have a name for which the model has no place.

    Args:
        model: the model.
        name: the name in the files.
        ends: all ends of the names for which the model lacks a tensor. If what a class ignores (`pooler`) is there in
            the model, the files' is meant for it, under another prefix.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    matches = (re.search(pattern, name) for pattern in (*patterns, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"))
    return any(match and name[name.rfind(".", 0, match.start() + 1) + 1 :] not in ends for match in matches)
