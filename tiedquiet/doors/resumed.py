"""What a Trainer has read of a folder by plain `load_state_dict`, and what the folder has but nothing read.

What the files would give by transformers' own rules is compared with what was read, by names and shapes; in `repair`,
the rest is read here.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch

from tiedquiet import mode
from tiedquiet.proof import names
from tiedquiet.proof.files import found_in
from tiedquiet.proof.leftovers import Leftovers
from tiedquiet.proof.memory import equals, holds, types_of
from tiedquiet.proof.prefixes import Prefixes, common_prefixes
from tiedquiet.proof.reading import Reading, read
from tiedquiet.proof.record import loaded_name, without_wrappers
from tiedquiet.proof.repair import copy_in_place
from tiedquiet.proof.survey import stored_name, survey
from tiedquiet.proof.unread import ask_headers, find_unread, in_two_files, note_unread, out_of_date
from tiedquiet.verdict import Finding

_WHY = "because Trainer reads a checkpoint without the renaming and conversion that from_pretrained applies"
_REPAIR = "Set TIEDQUIET=repair to read them"
_BY_HAND = "give Trainer a model that from_pretrained loaded from this checkpoint"
_BY_HAND_OF_BEST = "load this checkpoint with from_pretrained"


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


def read_folder(
    of: Inside, folder: str, missing: set[str], unexpected: set[str], may_write: bool = True, is_best: bool = False
) -> tuple[Reading, list[Finding], set[str]]:
    """What was read from a folder, and what it has but nothing read; in `repair`, that is read now.

    Args:
        of: the model.
        folder: where the files are.
        missing: the names of the judged model that were reported missing.
        unexpected: the files' names that were reported to have no place.
        may_write: whether it is certain that these are the files which were read.
        is_best: whether the run is over, and it was its best model.

    Returns:
        The reading; what was read now; and the keys that nothing had to read, since the model has their values already.
    """
    model, there = of.model, _Folder(of, folder)
    checkpoint, state = there.checkpoint, there.state
    in_files = there.in_files
    # The Trainer believes the index.
    missing |= {there.key_at[name] for name in (checkpoint.promised - in_files) & there.key_at.keys()}
    unexpected = there.as_in_files(unexpected) & in_files
    unasked = there.unasked - missing if unexpected else set()
    twice = {name: (first, second) for name, first, second in checkpoint.twice()}
    found = list(there.made(missing, unexpected)) if unexpected else []
    asked = missing.union(unasked, *(made.origins for made in found))
    reading = read(model, asked, checkpoint, made_of=lambda: there.renamed)
    reading.free |= unasked
    for name, files in twice.items():
        if (key := there.key_at.get(name)) in reading.held:
            reading.found[key] = in_two_files(key, *files)
    if (older := out_of_date(checkpoint)) is not None:
        reading.found[""] = older
    if _has_cast(there, reading):
        names_of = {there.own[key]: key for key in reading.held}
        ask_headers(model, reading, also={name: names_of[name] for name in names_of if name in checkpoint.headers})
    # What an index lacks and a shard has is read along with that shard.
    own = {key: names.Origin((there.own[key],), False) for key in reading.missing if there.own[key] in in_files}
    held = {key: origin for key, origin in own.items() if there.holds(names.Made({key: origin}, ""))}
    done: dict[str, names.Origin] = {}

    def take(made: names.Made) -> None:
        once = {}
        for key, origin in made.origins.items():
            if doubled := twice.keys() & set(origin.names):
                reading.found[key] = in_two_files(key, *twice[min(doubled)])
            else:
                once[key] = origin
        made = made._replace(origins=once)
        # Just one of them first: if there is something to report, it costs no more than that one.
        if once and there.holds(made._replace(origins=dict([*once.items()][:1]))) and there.holds(made):
            held.update(once)
        elif may_write and mode.current() == "repair":
            done.update((key, once[key]) for key, value in there.values(made) if copy_in_place(state[key], value))

    by_hand = _BY_HAND_OF_BEST if is_best else _BY_HAND
    for made in found:
        note_unread(reading, made, f"{_REPAIR}, or {by_hand}")
        take(made)
    unfit = {key: own for key, own in there.unfit.items() if key in reading.missing - reading.found.keys()}
    # Rows that were appended since, to what the model was made from, are no loss.
    grown = {key: own for key, own in unfit.items() if there.has_in_larger(key, own)}
    held.update(grown)
    lost = names.Made({key: own for key, own in unfit.items() if key not in grown}, "in another shape")
    note_unread(reading, lost, by_hand[0].upper() + by_hand[1:])
    used = {name for made in (*found, names.Made(unfit, "")) for name in made.key_of}
    left = {name: checkpoint.headers[name] for name in unexpected - used if name in checkpoint.headers}
    rest = find_unread(model, reading, left, cure=_REPAIR, is_resumed=True)
    if not rest and (under := there.under_a_prefix(reading.missing - reading.found.keys(), left)) is not None:
        note_unread(reading, under, _REPAIR)
        rest = [under]
    for made in rest:
        take(made)
    came = done | held
    unasked -= reading.found.keys()
    if not came and not unasked:
        return reading, [], set()
    mended = [reading.found[key] for key in sorted(done)]
    again = read(model, reading.missing - came.keys() - unasked, checkpoint, made_of=lambda: {**there.renamed, **came})
    again.found.update({key: finding for key, finding in reading.found.items() if key not in came})
    again.likely = {key: name for key, name in reading.likely.items() if key not in unasked}
    again.narrowed = reading.narrowed
    return again, mended, set(held)


def came_from(of: Inside, folder: str, missing: set[str], unexpected: set[str]) -> bool:
    """Whether a folder's files have all that somebody's code was seen to read, each value to the bit.

    Args:
        of: the model.
        folder: where the files are.
        missing: the names of the judged model that nothing was read into.
        unexpected: the names of what was read and had no place.
    """
    there = _Folder(of, folder)
    unexpected = there.as_in_files(unexpected)
    read_into = {key: names.Origin((there.own[key],), False) for key in there.state.keys() - missing - there.unasked}
    made = names.Made(read_into, "")
    return there.checkpoint.tensors.keys() >= unexpected | made.key_of.keys() and there.holds(made)


def _has_cast(there: "_Folder", reading: Reading) -> bool:
    """Whether anything was read into another type than the file has it in, and by no quantiser."""
    checkpoint = reading.checkpoint
    if getattr(there.core, "hf_quantizer", None) or len({*checkpoint.dtypes, *types_of(reading.held.values())}) < 2:
        return False
    headers = checkpoint.headers
    stored = ((headers.get(there.own[key]), tensor) for key, tensor in reading.held.items())
    return any(header is not None and header.dtype != tensor.dtype for header, tensor in stored)


class _Folder:
    """A folder's files, beside the model that they are for.

    Attributes:
        core: the model whose rules apply.
        checkpoint: the files.
        state: the tensors of the judged model.
        own: for each of them the name under which a plain `load_state_dict` finds it.
        unfit: what was left over and has another shape than the model's; known once `made` was asked.
    """

    def __init__(self, of: Inside, folder: str) -> None:
        self._of, self.core = of, of.core
        self.checkpoint = found_in(folder, of.path.rstrip("."))
        self.state = survey(of.model).state
        self.own = {key: of.path + stored_name(key) for key in self.state}
        self.unfit: dict[str, names.Origin] = {}

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
            for name, own in names.crossed(core, headers, self._core, made, conversions).items():
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
            compiled = {k: o for k, o in origins.items() if o.names == (without_wrappers(k),) != (stored_name(k),)}
            if compiled:
                yield names.Made(compiled, Prefixes("", "", {}, inside=("_orig_mod",), has_them="model").why)
            yield names.Made({k: o for k, o in origins.items() if k not in compiled}, self._why(""), conversions)

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
