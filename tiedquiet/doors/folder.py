"""A folder that a Trainer reads by plain `load_state_dict`: its files, beside the model that they are for."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from tiedquiet.proof import crossing, names
from tiedquiet.proof.files import found_in
from tiedquiet.proof.leftovers import Leftovers
from tiedquiet.proof.memory import equals, holds
from tiedquiet.proof.prefixes import Prefixes, common_prefixes
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import loaded_name, stored_name, without_wrappers
from tiedquiet.proof.rivals import judge_ways
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Finding

_WHY = "because Trainer reads a checkpoint without the renaming and conversion that from_pretrained applies"


class Inside(NamedTuple):
    """What is judged of the model that a Trainer has, and by which class's rules.

    Attributes:
        model: what is judged: of what `torch.compile`, peft or a module of the user's wraps, the model inside; where
            that module has tensors of its own, all of it.
        path: what the names of the outer state dict have before those of `model`.
        core: the model of transformers whose rules apply.
        at: what the names of `model` have before those of `core`.
    """

    model: Any
    path: str
    core: Any
    at: str

    @property
    def has_adapters(self) -> bool:
        """Whether peft has put its layers around some of the tensors."""
        return isinstance(getattr(self.core, "peft_config", None), dict)

    @property
    def as_loaded(self) -> Callable[[str], str]:
        """Gives the core's own name for a tensor of the judged model, before peft put anything in."""
        start = len(self.at)
        return (lambda name: loaded_name(name[start:])) if self.has_adapters else (lambda name: name[start:])


def inside(model: Any) -> Inside:
    """What is judged of a Trainer's model."""
    from transformers import PreTrainedModel

    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "_orig_mod", None)
    found = (pair for pair in model.named_modules() if isinstance(pair[1], PreTrainedModel) or pair[1] is wrapped)
    name, core = next(found, ("", model))
    path = f"{name}." if name else ""
    if not path or all(own.startswith(path) for own in survey(model).state):
        return Inside(core, path, core, "")
    return Inside(model, "", core, path)


class Folder:
    """A folder's files, beside the model that they are for.

    Attributes:
        core: the model whose rules apply.
        checkpoint: the files.
        state: the tensors of the judged model.
        own: for each of them the name under which a plain `load_state_dict` finds it.
        unfit: what was left over and has another shape than the model's; known once `made` was asked.
        rivals: tensors that were read under their own name, and for which the files have something else as well: their
            names in the core, all names in the files, and the conversions; known once `made` was asked.
    """

    def __init__(self, of: Inside, folder: str) -> None:
        self._of, self.core = of, of.core
        self.checkpoint = found_in(folder, of.path.rstrip("."))
        self.state = survey(of.model).state
        self.own = {key: of.path + stored_name(key) for key in self.state}
        self.unfit: dict[str, names.Origin] = {}
        self.rivals: dict[str, tuple[str, names.Origin, list[Any]]] = {}

    def made(self, missing: set[str], unexpected: set[str]) -> Iterator[names.Made]:
        """What `from_pretrained` would make of what was left over: by the class's conversions, and by the model's own.

        The model's own are those that it was loaded with: a `key_mapping`, under whose names transformers saves it
        again.
        """
        claimed = set[str]()
        for conversions in self._conversions:
            core, headers = self.core, self.checkpoint.headers
            unfit: dict[str, names.Origin] = {}
            made = names.origins(core, headers, self._core, conversions, unfit)
            self.unfit |= {self._key_of[name]: own for name, own in unfit.items() if unexpected >= set(own.names)}
            for name, own in crossing.crossed(core, headers, self._core, made, conversions).items():
                made.pop(name, None)  # Trainer reads each under its own name alone
                if own is not None:
                    made[name] = names.Origin((own,), False)
            origins = {
                key: origin
                for key, origin in ((self._key_of[name], origin) for name, origin in made.items())
                if key not in claimed
                and not unexpected.isdisjoint(origin.names)
                and (key in missing or self.own[key] not in origin.names)
            }
            claimed |= origins.keys()
            used = {name for key, origin in origins.items() if key in missing for name in origin.names}
            self._note_rivals(missing, unexpected - used, conversions)
            origins = {key: origin for key, origin in origins.items() if key not in self.rivals}
            compiled = {k: o for k, o in origins.items() if o.names == (without_wrappers(k),) != (stored_name(k),)}
            if compiled:
                yield names.Made(compiled, Prefixes("", "", {}, inside=("_orig_mod",), has_them="model").why)
            yield names.Made({k: o for k, o in origins.items() if k not in compiled}, self._why(""), conversions)

    def _note_rivals(self, missing: set[str], others: set[str], conversions: list[Any]) -> None:
        """Note what was read under its own name, if `from_pretrained` would read something else into it as well."""
        headers = self.checkpoint.headers
        found = {name: header for name, header in headers.items() if name in others}
        to = {self._key_of[name] for name in names.targets(self.core, found, self._core, conversions).values()}
        own = {self.own[key]: headers[self.own[key]] for key in to - missing if self.own[key] in headers}
        for name, every in names.sources(self.core, found | own, self._core, conversions).items() if own else ():
            key = self._key_of[name]
            if self.own[key] in own and self.own[key] in every.names:
                self.rivals[key] = name, every, conversions

    def under_a_prefix(self, missing: set[str], unread: names.Headers) -> names.Made | None:
        """The same of what files have under other names: that of the wrapper that the model has, or once had."""
        own = self._of.path + self._of.at
        ours = {name: self._core[name] for name, key in self._key_of.items() if key in missing}
        left = Leftovers(self.core, unread, ours, (), self._core, ())
        theirs = left.not_ignored()
        wrappers = list(filter(None, (own, *common_prefixes(theirs))))
        for conversions in filter(None, self._conversions if theirs and ours else ()):
            found = left._replace(unread=theirs, conversions=conversions).under_other_names(wrappers)
            if found is not None:
                made, change = found
                origins = {self._key_of[name]: origin for name, origin in made.origins.items()}
                why = change.why if change.inside or change.new else self._why(change.old)
                return made._replace(origins=origins, why=why)
        return None

    def values(self, made: names.Made) -> Iterator[tuple[str, torch.Tensor]]:
        """What the files give for the tensors of which it is known what they are made of."""
        tensors = self.checkpoint.tensors
        plainly = {key: origin.names[0] for key, origin in made.origins.items() if not origin.is_converted}
        yield from ((key, tensors[name]()) for key, name in plainly.items())
        full = {made.known_as.get(name, name): name for name, key in made.key_of.items() if key not in plainly}
        headers = {short: self.checkpoint.headers[name] for short, name in full.items()}
        rules, key_of = made.conversions, self._key_of
        found = names.converted(self.core, headers, self._core, rules, lambda short: tensors[full[short]]())
        yield from ((key_of[name], value) for name, _, value in found if key_of[name] in made.origins)

    def holds(self, made: names.Made) -> bool:
        """Whether the model has all of these values already: it was made from this very checkpoint, say."""
        seen: set[str] = set()
        for key, value in self.values(made):
            if not equals(self.state[key], value):
                return False
            seen.add(key)
        return seen == made.origins.keys()

    def has_in_larger(self, key: str, origin: names.Origin) -> bool:
        """Whether a tensor that has another shape than the files' has all of their values."""
        return not origin.is_converted and bool(holds(self.state[key], self.checkpoint.tensors[origin.names[0]]()))

    def judge_rivals(self, reading: Reading) -> Iterator[Finding]:
        """Findings on tensors that were read, and for which the files have something else that differs."""
        tensors = self.checkpoint.tensors
        for key in self.rivals.keys() & reading.read_to.keys():
            name, every, conversions = self.rivals[key]
            headers = {own: self.checkpoint.headers[own] for own in every.names}
            place = reading.read_to[key]
            found = judge_ways(self.core, name, place, headers, conversions, lambda own: tensors[own]())
            if found is not None:
                yield replace(found, key=key)

    def _why(self, prefix: str) -> str:
        """Why nothing read what the files have under a prefix."""
        own = self._of.path + self._of.at
        return _WHY if prefix == own else Prefixes(prefix, own, {}).why

    def as_in_files(self, unexpected: set[str]) -> set[str]:
        """The files' names of these: a wrapper's hook puts its part into what it has no place for, too."""
        return {name if name in self.in_files else stored_name(name) for name in unexpected}

    @cached_property
    def in_files(self) -> set[str]:
        """All of the files' names."""
        return {name for name, _ in self.checkpoint.names}

    @cached_property
    def key_at(self) -> dict[str, str]:
        """The tensor that a plain `load_state_dict` reads each name into."""
        return {name: key for key, name in self.own.items()}

    @cached_property
    def renamed(self) -> dict[str, names.Origin]:
        """What is read by another name than that of the judged model's tensor."""
        path = self._of.path
        others = {key: name for key, name in self.own.items() if len(name) != len(path) + len(key)}
        return {key: names.Origin((name,), False) for key, name in others.items()}

    @cached_property
    def unasked(self) -> set[str]:
        """What a module sets by itself where its files do not have it, so that no loader calls it missing.

        That is a batch norm's count of batches.
        """
        counts = {key for key in self.state if key.endswith("num_batches_tracked")}
        return {key for key in counts if self.own[key] not in self.in_files}

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any]]:
        core = self.core
        return names.conversions_of(core), list(getattr(core, "_weight_conversions", None) or ())

    @cached_property
    def _key_of(self) -> dict[str, str]:
        """For each tensor of the core, by the names that files may have for it, that of the judged model."""
        as_loaded, at = self._of.as_loaded, self._of.at
        found = {as_loaded(key): key for key in self.state if key.startswith(at)}
        return found | {without_wrappers(name): key for name, key in found.items()}

    @cached_property
    def _core(self) -> dict[str, torch.Tensor]:
        return {name: self.state[key] for name, key in self._key_of.items()}
