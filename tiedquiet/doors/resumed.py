"""What a Trainer has read of a folder by plain `load_state_dict`, and what the folder has but nothing read.

What the files would give by transformers' own rules is compared with what was read, by names and shapes; in `repair`,
the rest is read here.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from tiedquiet import mode
from tiedquiet.proof import names
from tiedquiet.proof.files import Checkpoint, of_folder
from tiedquiet.proof.memory import plain, same
from tiedquiet.proof.reading import Reading, find_unread, in_two_files, note_unread, read
from tiedquiet.proof.repair import copy_in_place
from tiedquiet.proof.survey import Survey, survey
from tiedquiet.verdict import Finding

_Values = Iterator[tuple[str, torch.Tensor]]

_WHY = "because Trainer reads a checkpoint without the renaming and conversion that from_pretrained applies"
_CURE = "Set TIEDQUIET=repair to read them, or give Trainer a model that from_pretrained loaded from this checkpoint"


def read_folder(
    model: Any, folder: str, missing: set[str], unexpected: set[str]
) -> tuple[Reading, list[Finding], set[str]]:
    """What was read from a folder, and what it has but nothing read; in `repair`, that is read now.

    Returns:
        The reading; what was read now; and the keys that nothing had to read, since the model has their values already.
    """
    checkpoint = _checkpoint(folder, getattr(model, "base_model_prefix", ""))
    in_files, now = {name for name, _ in checkpoint.names}, survey(model)
    missing |= (checkpoint.promised - in_files) & now.state.keys()  # the Trainer believes the index
    found = _origins(model, checkpoint, missing, unexpected & in_files, now) if unexpected & in_files else []
    # What a module sets by itself where it is not delivered (a batch norm's count of batches), no loader calls missing.
    reading = read(model, missing.union(*(made for _, made in found)), checkpoint)
    for name, first, second in checkpoint.twice():
        if name in reading.held:
            reading.found[name] = in_two_files(name, first, second)
    held: dict[str, tuple[str, ...]] = {}
    done: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()

    def take(names_of: dict[str, tuple[str, ...]], values: Callable[[Collection[str]], _Values]) -> None:
        # Just one of them first: if there is something to report, it costs no more than that one.
        if names_of and all(_are_held(now, keys, values(keys)) for keys in ({*list(names_of)[:1]}, names_of.keys())):
            held.update(names_of)
        elif mode.current() == "repair":
            copied = [k for k, value in values(names_of) if k in names_of and copy_in_place(now.state[k], value)]
            done.update((key, names_of[key]) for key in copied)

    for conversions, made in found:
        note_unread(reading, made, _WHY, _CURE)
        used |= {name for origin in made.values() for name in origin.names}
        take({k: o.names for k, o in made.items()}, partial(_converted, model, checkpoint, now, conversions, made))
    left = {name: checkpoint.headers[name] for name in unexpected & in_files - used}
    _, prefixes = find_unread(model, reading, left, cure="Set TIEDQUIET=repair to read them")
    if prefixes is not None:
        fits = prefixes.names
        take({k: (n,) for k, n in fits.items()}, lambda keys: ((k, checkpoint.tensors[fits[k]]()) for k in keys))
    if not done and not held:
        return reading, [], set()
    came = done | held
    mended = [reading.found[key] for key in sorted(done)]
    again = read(model, reading.missing - came.keys(), checkpoint)
    again.found.update({key: finding for key, finding in reading.found.items() if key not in came})
    again.likely, again.names_of = reading.likely, lambda key: came.get(key, ())
    return again, mended, set(held)


def _converted(
    model: Any,
    checkpoint: Checkpoint,
    now: Survey,
    conversions: list[Any],
    made: Mapping[str, names.Origin],
    keys: Collection[str],
) -> _Values:
    headers = {name: checkpoint.headers[name] for key in keys for name in made[key].names}
    values = names.converted(model, headers, now.state, conversions, lambda name: checkpoint.tensors[name]())
    return ((key, value) for key, _, value in values)


def _are_held(now: Survey, keys: Collection[str], values: _Values) -> bool:
    """Whether the model has all of these values already: `from_pretrained` made it from this very checkpoint, say."""
    seen: set[str] = set()
    for key, tensor, value in ((key, now.state[key], value) for key, value in values if key in keys):
        pieces = plain(tensor)
        if tensor.is_meta or len(pieces) != 1 or not same(pieces[0], value):
            return False
        seen.add(key)
    return seen == set(keys)


def _origins(
    model: Any, checkpoint: Checkpoint, missing: set[str], unexpected: set[str], now: Survey
) -> list[tuple[list[Any], dict[str, names.Origin]]]:
    """What `from_pretrained` would make of what was left over: by the class's conversions, and by the model's own.

    The model's own are those that it was loaded with: a `key_mapping`, under whose names transformers saves it again.
    """
    found: list[tuple[list[Any], dict[str, names.Origin]]] = []
    claimed: set[str] = set()
    for conversions in (names.conversions_of(model), list(getattr(model, "_weight_conversions", None) or ())):
        made = {
            key: origin
            for key, origin in names.origins(model, checkpoint.headers, now.state, conversions).items()
            if key not in claimed
            and not unexpected.isdisjoint(origin.names)
            and (key in missing or key not in origin.names)
            and not (_renames_itself(model, key) and same(now.state[key], checkpoint.tensors[origin.names[0]]()))
        }
        claimed |= made.keys()
        found.append((conversions, made))
    return found


def _renames_itself(model: Any, key: str) -> bool:
    """Whether a module around a tensor changes names while it is read, as weight norm does: then values must tell."""
    module = model
    for part in key.split(".")[:-1]:
        if module._load_state_dict_pre_hooks:
            return True
        module = module._modules[part]
    return bool(module._load_state_dict_pre_hooks)


def _checkpoint(folder: str, base: str) -> Checkpoint:
    """The files that Trainer has just read; none if they cannot be identified."""
    nothing = Checkpoint({})
    try:
        checkpoint = of_folder(folder, base)
        nothing.closed = checkpoint.closed
        checkpoint.names  # noqa: B018 (it opens the files)
    except Exception:
        return nothing
    return checkpoint
