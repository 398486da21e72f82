"""Reading: what the loader read of a checkpoint's files until it was done, and where the files have that.

What was read is kept by tensor and by memory, so that what happens to it afterwards can be judged.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch

from tiedquiet.proof import names
from tiedquiet.proof.casts import narrows
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import Place, aliases, by_object, equals, types_of
from tiedquiet.proof.record import stored_name
from tiedquiet.proof.survey import declared, only, survey
from tiedquiet.verdict import Finding, Verdict


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
        crossed: keys that another name of the files was read into, and their own name there.
        likely: for each missing key that unread tensors of the files fit by their shape, which one it most likely is;
            None if none is likely.
        beside: what reads the values of tensors that a file beside the checkpoint has given since: an adapter's.
        offloaded: transformers' index of what stays on disk: for each key, a file and the name in it.
        buffers: names of the buffers that are in no state dict.
        has_loose: whether a module has a tensor on meta that it does not register.
        made_of: gives what the loader made tensors of; those left out have their own names in the files, if any.
        is_converted: whether it may have merged or split tensors: what `made_of` leaves out is then in no file as such.
        is_quantised: whether a quantiser has changed them, so that nothing of the kind is known.
        is_of_adapter: whether an adapter was read into a model that is there already.
        may_grow: whether `repair` may read more: not where values stay on disk, or a quantiser has changed them.
    """

    checkpoint: Checkpoint
    held: dict[str, torch.Tensor]
    read_to: dict[str, Place]
    missing: set[str]
    total: int
    free: set[str] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    found: dict[str, Finding] = field(default_factory=dict)
    crossed: dict[str, str] = field(default_factory=dict)
    likely: dict[str, str | None] = field(default_factory=dict)
    beside: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    offloaded: dict[str, Any] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    has_loose: bool = False
    made_of: Callable[[], Mapping[str, names.Origin]] = dict
    is_converted: bool = False
    is_quantised: bool = False
    is_of_adapter: bool = False
    may_grow: bool = True

    @property
    def stored(self) -> set[str]:
        """The names that the checkpoint delivered."""
        return set(self.held)

    def values(self, name: str) -> torch.Tensor | None:
        """The checkpoint's values of one of the model's tensors; None where they cannot be told or were converted."""
        try:
            if name in self.beside:
                return self.beside[name]()
            own = self._name_of(name)
            return None if own is None else self.checkpoint.tensors[own]()
        except Exception:
            return None

    def sources(self, name: str) -> list[Callable[[], torch.Tensor]] | None:
        """What reads each tensor of the files that one of the model's was made of; None where that is not known."""
        try:
            if name in self.beside:
                return [self.beside[name]]
            origin = self._origin(name)
            return [self.checkpoint.tensors[own] for own in origin.names] if origin is not None else None
        except Exception:
            return None

    def is_in_files(self, name: str) -> bool:
        """Whether what was read into a tensor can be had from the files once more, so that nothing need be kept of it.

        Not for a state dict that the caller handed over: it may change, and the model may hold these very tensors.
        """
        try:
            return name in self.beside or (self.checkpoint.state_dict is None and self._name_of(name) is not None)
        except Exception:
            return False

    def take(
        self, key: str, tensor: torch.Tensor, read: Callable[[], torch.Tensor] | None, finding: Finding | None
    ) -> None:
        """Note that another file has just given a tensor its values.

        Args:
            key: its name.
            tensor: what the model has under it.
            read: reads them; None if nothing can.
            finding: what is wrong with them; None if nothing is.
        """
        self.held[key] = tensor
        (self.read_to[key],) = aliases([tensor])
        self.missing.discard(key)
        for known in (self.found, self.likely, self.crossed):
            known.pop(key, None)
        if read is not None:
            self.beside[key] = read
        if finding is not None:
            self.found[key] = finding

    @cached_property
    def narrowed(self) -> set[str]:
        """Names of what may have been read into a type with a smaller range than the stored one.

        By all types that the files have, as far as no header need be parsed for that: it is no verdict yet.
        """
        if self.is_quantised:  # types differ anyway
            return set()
        ours = types_of(self.held.values())
        small = {own for own in set(ours) if any(narrows(theirs, own) for theirs in self.checkpoint.dtypes)}
        return {name for name, own in zip(self.held, ours, strict=True) if own in small} if small else set()

    def _name_of(self, name: str) -> str | None:
        """The name that the files have for a tensor whose values were at most cast."""
        origin = self._origin(name)
        return None if origin is None or origin.is_converted else origin.names[0]

    def _origin(self, name: str) -> names.Origin | None:
        """What a tensor was made of; None where that is not known, or where several names could be it."""
        if self.is_quantised:
            return None
        if (origin := self._made.get(name)) is not None:
            return origin if origin.is_converted or len(origin.names) == 1 else None
        own = None if self.is_converted else next(self.checkpoint.names_of(name), None)
        return None if own is None else names.Origin((own,), False)

    @cached_property
    def _made(self) -> Mapping[str, names.Origin]:
        return self.made_of()


def read(
    model: torch.nn.Module,
    missing: set[str],
    checkpoint: Checkpoint | None = None,
    offloaded: dict[str, Any] | None = None,
    made_of: Callable[[], Mapping[str, names.Origin]] = dict,
    is_converted: bool = False,
    is_quantised: bool = False,
) -> Reading:
    """Note what has just been read into a model, and where it is.

    Args:
        model: the model.
        missing: the keys that the checkpoint did not deliver.
        checkpoint: its files.
        offloaded: transformers' index of what stays on disk.
        made_of: gives what the loader made of what, where more than names of the model's own is known.
        is_converted: whether it may have merged or split tensors.
        is_quantised: whether a quantiser has changed them.
    """
    now = survey(model)
    missing = now.state.keys() & missing
    held = only(now.state, now.state.keys() - missing)
    if not now.is_plain:  # what is kept out of its state dict was asked of no checkpoint
        names_there = model.state_dict().keys()
        held = only(held, {name for name in held if name in names_there or stored_name(name) in names_there})
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
        has_loose=bool(now.loose),
        made_of=made_of,
        is_converted=is_converted,
        is_quantised=is_quantised,
    )
    if reading.checkpoint.closed:
        unknown = missing - reading.free - reading.tied
        reading.found.update({key: Finding(key, Verdict.UNPROVEN, None, reading.checkpoint.closed) for key in unknown})
    reading.found.update(_clashes(reading))
    if not is_quantised:
        reading.found.update((finding.key, finding) for finding in _misfits(reading))
    return reading


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


def _misfits(reading: Reading) -> Iterator[Finding]:
    """Findings on what stays on disk in another shape than the model's: transformers compares only what it reads."""
    headers = cache(lambda path: Checkpoint(None, [path]).headers)
    for key, entry in reading.offloaded.items():
        tensor, path = reading.held.get(key), entry.get("safetensors_file")
        there = headers(path).get(entry.get("weight_name", key)) if path and tensor is not None else None
        if there is not None and tensor is not None and there.shape != tensor.shape:
            why = f"what lies on disk for it has the shape {tuple(there.shape)}, and not {tuple(tensor.shape)}"
            cure = "Load it without disk offload, and transformers says what does not fit"
            yield Finding(key, Verdict.UNREAD, None, why, True, cure)


def _is_free(model: Any, name: str) -> bool:
    """Whether the class says that a key needs no file: by a pattern, or because it is kept out of every file."""
    return name in (getattr(model, "_keys_to_ignore_on_save", None) or ()) or any(
        re.search(pattern, name) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    )
