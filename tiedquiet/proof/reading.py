"""Reading: what a checkpoint's files hold, and what happened to each of their tensors until the loader was done.

What was read is kept by tensor and by memory, so that what happens to it afterwards can be judged. What was not read is
looked up in the headers of the files, and only if a load is not plainly clean.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from tiedquiet.proof import names
from tiedquiet.proof.casts import may_lose, narrows
from tiedquiet.proof.codes import CODES, Scales, without_scale
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import Place, aliases, by_object, equals, types_of
from tiedquiet.proof.rivals import has_more, judge_ways
from tiedquiet.proof.survey import declared, only, survey
from tiedquiet.verdict import Finding, Verdict

_REPAIR = "Set TIEDQUIET=repair to read them"


@dataclass
class Reading:
    """What was read into a model, what was not, and what the files have for it.

    Attributes:
        checkpoint: the files.
        held: the tensors that the checkpoint delivered, by the model's names.
        read_to: aliases of the memory that they were read to.
        missing: names that it did not deliver (mismatched shapes included).
        total: how many names the state dict has.
        free: those missing that the class itself says need no file.
        tied: those missing that a declared tie explains: another member of it was read.
        found: findings on the reading itself, which nothing later changes.
        likely: for missing keys, an unread tensor of the files that fits their shape.
        offloaded: transformers' index of what stays on disk: for each key, a file and the name in it.
        buffers: names of the buffers that are in no state dict.
        names_of: the names that the files have for one of the model's; none where that is not known.
        made_of: what the loader made each tensor of, where it converted any; None where it converted none.
    """

    checkpoint: Checkpoint
    held: dict[str, torch.Tensor]
    read_to: dict[str, Place]
    missing: set[str]
    total: int
    free: set[str] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    found: dict[str, Finding] = field(default_factory=dict)
    likely: dict[str, str] = field(default_factory=dict)
    offloaded: dict[str, Any] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    names_of: Callable[[str], tuple[str, ...]] = lambda name: ()
    made_of: Callable[[], Mapping[str, names.Origin]] | None = None

    @property
    def stored(self) -> set[str]:
        """The names that the checkpoint delivered."""
        return set(self.held)

    def values(self, name: str) -> torch.Tensor | None:
        """The checkpoint's values of one of the model's tensors; None where they cannot be told or were converted."""
        try:
            return self.checkpoint.tensors[own]() if (own := self._name_of(name)) is not None else None
        except Exception:
            return None

    def sources(self, name: str) -> list[Callable[[], torch.Tensor]] | None:
        """What reads each tensor of the files that one of the model's was made of; None where that is not known."""
        try:
            made, tensors = self._made, self.checkpoint.tensors
            own = filter(None, [self._name_of(name)]) if made is None else made[name].names
            return [tensors[key] for key in own] or None
        except Exception:
            return None

    def is_in_files(self, name: str) -> bool:
        """Whether what was read into a tensor can be had from the files once more, so that nothing need be kept of it.

        Not for a state dict that the caller handed over: it may change, and the model may hold these very tensors.
        """
        try:
            return self.checkpoint.state_dict is None and self._name_of(name) is not None
        except Exception:
            return False

    @cached_property
    def narrowed(self) -> set[str]:
        """Names of what may have been read into a type with a smaller range than the stored one.

        By all types that the files have, as far as no header need be parsed for that: it is no verdict yet.
        """
        if self.made_of is dict:  # a quantiser has changed it, so that types differ anyway
            return set()
        ours = types_of(self.held.values())
        small = {own for own in set(ours) if any(narrows(theirs, own) for theirs in self.checkpoint.dtypes)}
        return {name for name, own in zip(self.held, ours, strict=True) if own in small} if small else set()

    def _name_of(self, name: str) -> str | None:
        """The one name that the files have for a tensor whose values were at most cast."""
        if (made := self._made) is not None:
            origin = made.get(name)
            return None if origin is None or origin.is_converted else origin.names[0]
        if own := self.names_of(name):  # not the same one, if the loader gave that to another tensor
            return own[0] if len(own) == 1 else None
        return next(self.checkpoint.names_of(name), None)

    @cached_property
    def _made(self) -> Mapping[str, names.Origin] | None:
        return None if self.made_of is None else self.made_of()


def read(
    model: torch.nn.Module,
    missing: set[str],
    checkpoint: Checkpoint | None = None,
    offloaded: dict[str, Any] | None = None,
    names_of: Callable[[str], tuple[str, ...]] = lambda name: (),
    made_of: Callable[[], Mapping[str, names.Origin]] | None = None,
) -> Reading:
    """Note what has just been read into a model, and where it is.

    Args:
        model: the model.
        missing: the keys that the checkpoint did not deliver.
        checkpoint: its files.
        offloaded: transformers' index of what stays on disk.
        names_of: names that the files have for those that were renamed.
        made_of: what the loader made each tensor of, where it converted any.
    """
    now = survey(model)
    missing = now.state.keys() & missing
    held = only(now.state, now.state.keys() - missing)
    if held and not now.is_plain:  # what is kept out of its state dict was asked of no checkpoint
        held = only(held, model.state_dict().keys())
    reading = Reading(
        checkpoint or Checkpoint({}),
        held,
        dict(zip(held, aliases(held.values()), strict=True)),
        missing,
        len(held) + len(missing),
        free={name for name in missing if _is_free(model, name)},
        tied={
            key for key, group in declared(now).items() if key in missing and not held.keys().isdisjoint(group.members)
        },
        offloaded={} if offloaded is None else offloaded,
        buffers=list(now.others),
        names_of=names_of,
        made_of=made_of,
    )
    if reading.checkpoint.closed:
        unknown = missing - reading.free - reading.tied
        reading.found.update({key: Finding(key, Verdict.UNPROVEN, None, reading.checkpoint.closed) for key in unknown})
    reading.found.update(_clashes(reading))
    return reading


def names_in_files(
    model: Any, checkpoint: Checkpoint, conversions: list[Any], known: dict[str, tuple[str, ...]], key: str
) -> tuple[str, ...]:
    """The names that the files have for what was read into a key.

    Args:
        model: the model.
        checkpoint: its files.
        conversions: what the loader renamed and converted.
        known: those of all keys, from the first call on.
        key: one of the model's names.
    """
    if not known:
        for name, target in names.targets(model, checkpoint.headers, survey(model).state, conversions).items():
            known[target] = *known.get(target, ()), name
    return known.get(key, ())


def origins_in_files(model: Any, checkpoint: Checkpoint, conversions: list[Any]) -> dict[str, names.Origin]:
    """What the loader made each of the model's tensors of."""
    return names.origins(model, checkpoint.headers, survey(model).state, conversions)


def needs_headers(reading: Reading, unexpected: set[str]) -> bool:
    """Whether the files have to be asked: where the loader did not account for all of them and of the model.

    That is where it reports keys that no tie explains, where two files may have one name, where they have more than was
    read, and where a type of the model may not hold what one of theirs does.
    """
    if unexpected or reading.missing - reading.free - reading.tied:
        return True
    checkpoint = reading.checkpoint
    if len(checkpoint.files) > 1 and checkpoint.is_mapped:
        return True
    if reading.made_of is not dict and has_more(checkpoint, reading.held.values(), reading.made_of is not None):
        return True
    ours = set(types_of(reading.held.values()))
    return any(
        may_lose(theirs, own) or (theirs in CODES and theirs != own) for theirs in checkpoint.dtypes for own in ours
    )


def ask_headers(
    model: Any, reading: Reading, conversions: list[Any], is_quantised: bool, also: Mapping[str, str] | None = None
) -> names.Headers:
    """Compare the headers of the files with what was read: two values of one name, types, and what nothing read.

    Args:
        model: the model.
        reading: what was read; findings are added to it.
        conversions: what the loader renamed and converted.
        is_quantised: a quantiser has changed it, so that types and shapes of the two differ anyway.
        also: names of the files that were read into keys of the model by no rule of the loader's.

    Returns:
        The tensors of the files that nothing read.
    """
    headers = reading.checkpoint.headers
    state = survey(model).state
    made = names.sources(model, headers, state, conversions)
    came_from = {name: key for key, origin in made.items() for name in origin.names} | dict(also or {})
    for name, first, second in reading.checkpoint.twice():
        for key in [key for key in (came_from.get(name), name) if key in reading.held][:1]:
            reading.found[key] = in_two_files(key, first, second)
    unread = {n: h for n, h in headers.items() if came_from.get(n) not in reading.held and not is_ignored(model, n)}
    if is_quantised:
        return unread
    scales, tensors = Scales(unread), reading.checkpoint.tensors
    read_to: dict[str, list[str]] = {}
    for name, key in came_from.items():
        read_to.setdefault(key, []).append(name)
    for key in filter(reading.held.__contains__, read_to):
        own = {name: headers[name] for name in read_to[key]}
        if (found := _judge_types(reading, key, own, scales)) is None and key in made and made[key].ways > 1:
            found = judge_ways(model, key, reading.read_to[key], own, conversions, lambda name: tensors[name]())
        if found is not None:
            reading.found[key] = found
    return unread


def in_two_files(key: str, first: str, second: str) -> Finding:
    """The finding on a key of which two files have different values; the second was read last."""
    return Finding(key, Verdict.AMBIGUOUS, None, f"{second}, which was read last, has other values than {first}", True)


def find_unread(
    model: Any, reading: Reading, unread: names.Headers, conversions: Sequence[Any] = (), cure: str = ""
) -> tuple[dict[str, names.Origin], names.Prefixes | None]:
    """Look for missing tensors among what the files have and nothing read, and note the findings.

    Args:
        model: the model.
        reading: what was read; findings are added to it.
        unread: what else the files have.
        conversions: what the loader renamed and converted.
        cure: what to do about it, if not to have `from_pretrained` read it.

    Returns:
        By transformers' renaming for the class that the model's is made from, what each is read from; and else the
        prefix that fits.
    """
    now = survey(model)
    missing = {key: now.state[key] for key in reading.missing - reading.found.keys() if key in now.state}
    if not missing or not unread:
        return {}, None
    tied = declared(now)
    needed = {key for key in missing if key not in tied and key not in reading.free}
    prefixes = _prefixes(model, unread, missing, needed, now.state, conversions)
    native = names.native_class(model)
    made = names.origins(model, unread, now.state, names.conversions_of_native(model)) if native else {}
    origins = {key: origin for key, origin in made.items() if key in missing}
    mapping = prefixes.key_mapping() if prefixes else {}
    other = f"pass key_mapping={mapping} to from_pretrained" if mapping else ""
    used: set[str] = set()
    if origins:
        ours, theirs = type(model).__name__, native.__name__
        why = f"because transformers renames what it reads for {theirs}, but not for its subclass {ours}"
        other = other or f"register the conversion of {theirs} for {ours} (register_checkpoint_conversion_mapping)"
        note_unread(reading, origins, why, cure or f"{_REPAIR}, or {other}")
        used, prefixes = {name for origin in origins.values() for name in origin.names}, None
    elif prefixes is not None:
        fits = {key: names.Origin((name,), False) for key, name in prefixes.names.items()}
        note_unread(reading, fits, prefixes.why, cure or (f"{_REPAIR}, or {other}" if other else _REPAIR))
        used = set(prefixes.names.values())
    rest = names.by_shape({name: header for name, header in unread.items() if name not in used})
    for key in sorted(missing.keys() - reading.found.keys()):
        if (name := names.likely(key, rest.get(missing[key].shape, ()))) is not None:
            reading.likely[key] = name
    return origins, prefixes


def _prefixes(
    model: Any,
    unread: names.Headers,
    missing: names.Headers,
    needed: set[str],
    own: Collection[str],
    conversions: Sequence[Any],
) -> names.Prefixes | None:
    """The prefix that fits: of the names that the files have, or of what transformers made of these."""
    if (prefixes := names.by_prefix(unread, missing, needed, own)) is not None or not conversions:
        return prefixes
    in_files = {new: old for old, new in names.renamed(model, unread, list(conversions)).items()}
    prefixes = names.by_prefix({new: unread[old] for new, old in in_files.items()}, missing, needed, own)
    if prefixes is None:
        return None
    of_files = {key: in_files[name] for key, name in prefixes.names.items()}
    return replace(prefixes, names=of_files, is_of_files=False)


def note_unread(reading: Reading, origins: Mapping[str, names.Origin], why: str, cure: str) -> None:
    """Note that nothing read what the files have for these keys."""
    for key, origin in origins.items():
        reading.found[key] = Finding(key, Verdict.UNREAD, origin.names[0], why, True, cure)


def _judge_types(reading: Reading, key: str, own: names.Headers, scales: Scales) -> Finding | None:
    """A finding if the type that a tensor was read into cannot hold what is stored, or says nothing of it."""
    ours = reading.held[key].dtype
    for name, header in own.items():
        if found := without_scale(key, name, header.dtype, ours, scales):
            return found
    (name, header), *others = own.items()
    if others or not may_lose(header.dtype, ours) or equals(reading.read_to[key], reading.checkpoint.tensors[name]()):
        return None
    kinds = [str(kind).removeprefix("torch.") for kind in (header.dtype, ours)]
    return Finding(key, Verdict.OVERWRITTEN, key, f"by the cast to {kinds[1]}: the file has it as {kinds[0]}", True)


def _clashes(reading: Reading) -> Iterator[tuple[str, Finding]]:
    """Findings on two names of one tensor that were both read: the last one stayed, whatever the other held."""
    if len(set(map(id, reading.held.values()))) == len(reading.held):
        return
    for own in by_object(reading.held).values():
        if len(own) > 1:
            values = {name: reading.values(name) for name in sorted(own)}
            won = [n for n, value in values.items() if value is not None and equals(reading.read_to[n], value)]
            for name in values.keys() - set(won):
                if won and values[name] is not None:
                    yield (
                        name,
                        Finding(name, Verdict.AMBIGUOUS, won[0], "not its own: both were read into one tensor", True),
                    )
                else:
                    why = "two stored keys share one tensor, and under these names the file does not have them"
                    yield name, Finding(name, Verdict.UNPROVEN, None, why)


def _is_free(model: Any, name: str) -> bool:
    """Whether the class says that a key needs no file: by a pattern, or because it is kept out of every file."""
    return name in (getattr(model, "_keys_to_ignore_on_save", None) or ()) or any(
        re.search(pattern, name) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    )


def is_ignored(model: Any, name: str) -> bool:
    """Whether the class says that the files may have a name for which the model has no place."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in (*patterns, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"))
