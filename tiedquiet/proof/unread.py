"""What the files have and nothing read; and of what was read, whether the files have it once, and in what type.

Their headers are asked, and only if a load is not plainly clean.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tiedquiet.proof import crossing, names
from tiedquiet.proof.casts import cast_finding, may_lose
from tiedquiet.proof.codes import CODES, Scales, is_whole, without_scale
from tiedquiet.proof.doubts import doubts_of
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.leftovers import Leftovers, is_ignored
from tiedquiet.proof.likely import by_shape, likely, most_alike
from tiedquiet.proof.memory import equals, same, types_of
from tiedquiet.proof.missing import is_of_another_class
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.rivals import has_more, judge_ways
from tiedquiet.proof.survey import Survey, declared, only, survey, ties
from tiedquiet.verdict import Finding, Verdict

_REPAIR = "Set TIEDQUIET=repair to read them"
_DOUBT = "Find out which of them the model was trained with, and store only those"
_Ends = Mapping[str, Sequence[torch.Tensor]]


def needs_headers(reading: Reading, unexpected: set[str]) -> bool:
    """Whether the files have to be asked: where the loader did not account for all of them and of the model.

    That is where it reports keys that no tie explains, where two files may have one name or lie beside one more, where
    they have more than was read, and where a type of the model may not hold what one of theirs does.
    """
    if unexpected or reading.missing - reading.free - reading.tied:
        return True
    checkpoint = reading.checkpoint
    if checkpoint.is_parted and checkpoint.tells:
        return True
    if not reading.is_quantised and has_more(checkpoint, reading.held.values(), reading.is_converted):
        return True
    ours = set(types_of(reading.held.values()))
    if any(is_whole(theirs) for theirs in checkpoint.dtypes - ours):  # for a matrix they are codes
        return True
    return any(
        may_lose(theirs, own) or (theirs in CODES and theirs != own) for theirs in checkpoint.dtypes for own in ours
    )


def ask_headers(
    model: Any, reading: Reading, conversions: Sequence[Any] = (), also: Mapping[str, str] | None = None
) -> names.Headers:
    """Compare the headers of the files with what was read: two values of one name, types, and what nothing read.

    Args:
        model: the model.
        reading: what was read; findings are added to it.
        conversions: what the loader renamed and converted.
        also: names of the files that were read into keys of the model by no rule of the loader's.

    Returns:
        The tensors of the files that nothing read.
    """
    headers = reading.checkpoint.headers
    state = survey(model).state
    made = names.sources(model, headers, state, conversions)
    came_from = {name: key for key, origin in made.items() for name in origin.names} | dict(also or {})
    crossed = crossing.crossed(model, headers, state, made, conversions)
    left = {key: name for key, name in crossed.items() if name is None or came_from.get(name) != key}
    _note_crossed(model, reading, made, left)
    twice = list(reading.checkpoint.twice())
    # What is split goes into more keys than its first part.
    parts = names.origins(model, headers, state, conversions).items() if twice else ()
    for name, first, second in twice:
        keys = {came_from.get(name), *(key for key, origin in parts if name in origin.names)}
        for key in reading.held.keys() & keys or reading.held.keys() & {name}:
            reading.found[key] = in_two_files(key, first, second)
    told = set(crossed.values())
    unread = {n: header for n, header in headers.items() if came_from.get(n) not in reading.held and n not in told}
    if reading.is_quantised:
        return unread  # types and shapes of the two differ anyway
    scales, tensors = Scales(unread), reading.checkpoint.tensors
    read_to: dict[str, list[str]] = {}
    for name, key in came_from.items():
        read_to.setdefault(key, []).append(name)
    for key in filter(reading.held.__contains__, read_to):
        own = {name: headers[name] for name in read_to[key]}
        if (found := _judge_types(reading, key, own, scales)) is None and key in made and made[key].ways > 1:
            found = judge_ways(model, key, reading.read_to[key], own, conversions, lambda name: tensors[name]())
            meant = crossed.get(key) if is_of_another_class(model) and not reading.held[key].is_meta else None
            if found is not None and meant is not None:
                found = None if found.source == meant else _mixed_up(model, reading, key, meant)
        if found is not None:
            reading.found[key] = found
    return unread


def _note_crossed(
    model: Any, reading: Reading, made: Mapping[str, names.Origin], crossed: Mapping[str, str | None]
) -> None:
    """Note the keys that were read into another, or another into them, if that has other values.

    The files tell that of what stays on disk, or was quantised, as well; there, nothing can be put right.
    """
    tensors = reading.checkpoint.tensors
    for key, name in crossed.items():
        if name is None:
            reading.found[key] = Finding(key, Verdict.MISSING, None, f"it was given what is {made[key].names[0]} there")
        elif key not in reading.held or (key in made and not equals(tensors[made[key].names[0]](), tensors[name]())):
            reading.found[key] = _mixed_up(model, reading, key, name)


def _mixed_up(model: Any, reading: Reading, key: str, name: str) -> Finding:
    """The finding on a key that has another's values, or none; what can be put right is noted."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    cure = "Rename one of the two modules, and its tensors in the file"
    if key in reading.held and not reading.is_quantised and not reading.held[key].is_meta:
        reading.crossed[key], cure = name, _REPAIR
    why = f"because transformers adds {prefix} to some names, takes it off others, and so mixes up these tensors"
    return Finding(key, Verdict.UNREAD, name, why, True, cure)


def in_two_files(key: str, first: str, second: str) -> Finding:
    """The finding on a key of which two files have different values; the second was read last."""
    return Finding(key, Verdict.AMBIGUOUS, None, f"{second}, which was read last, has other values than {first}", True)


def out_of_date(checkpoint: Checkpoint) -> Finding | None:
    """A finding on a `.safetensors` that was read although a later `.bin` next to it has other values."""
    for path in map(Path, checkpoint.files):
        rival = path.with_name("pytorch_model.bin") if path.stem == "model" else path.with_suffix(".bin")
        is_newer = rival.is_file() and rival.stat().st_mtime > path.stat().st_mtime + 1
        if is_newer and not _is_equal(checkpoint, Checkpoint(None, [str(rival)])):
            why = f"{path.name} was read; {rival.name} beside it is newer and was not"
            return Finding("", Verdict.AMBIGUOUS, path.name, why, False, "Delete the one that is out of date")
    return None


def _is_equal(checkpoint: Checkpoint, other: Checkpoint) -> bool:
    """Whether another file is known to hold the same: some must not be opened."""
    try:
        ours, theirs = checkpoint.tensors, other.tensors
        return ours.keys() == theirs.keys() and all(same(ours[name](), theirs[name]()) for name in ours)
    except Exception:
        return False


def find_unread(
    model: Any,
    reading: Reading,
    unread: names.Headers,
    conversions: Sequence[Any] = (),
    cure: str = "",
    is_resumed: bool = False,
) -> list[names.Made]:
    """Look for missing tensors among what the files have and nothing read, and note the findings.

    Args:
        model: the model.
        reading: what was read; findings are added to it.
        unread: what else the files have.
        conversions: what the loader renamed and converted.
        cure: what to do about it, if not to have `from_pretrained` read it.
        is_resumed: whether the checkpoint is one of this very model, head and all.

    Returns:
        What they are made of: by the model's own names; or by transformers' renaming for the class that the model's
        is made from; or by one prefix in place of another, after which its own conversions may apply. What one of
        these leaves, another may fit.
    """
    found: list[names.Made] = []
    wanted = reading.missing - reading.found.keys()
    if not unread or not wanted:
        return found
    now = survey(model)
    state = {key: _whole(tensor) for key, tensor in now.state.items()}
    missing, tied = {key: state[key] for key in wanted}, declared(now)
    ends = _ends(reading, now)
    needed = {key for key in missing if key not in tied and key not in reading.free}
    was_read = {name: header for name, header in reading.checkpoint.headers.items() if name not in unread}
    left = Leftovers(model, unread, missing, needed, state, conversions, was_read)
    for _ in missing:  # each time at least one of them is found, or it was the last
        if not (left.unread and left.missing) or (made := left.made(is_resumed)) is None:
            break
        if any(map(reading.checkpoint.is_inside, made.key_of)):  # no key_mapping leads there
            why = "because the file has them inside a dict, where no loader looks"
            made = made._replace(why=why, cure="save these tensors by themselves, with no dict around them")
        left = left.without(made)
        lost = {k: o for k, o in made.origins.items() if not _is_held(ends.get(k, ()), o, reading.checkpoint)}
        for key, why in doubts_of(reading, made._replace(origins=lost), unread).items():
            note_unread(reading, made._replace(origins={key: lost.pop(key)}, why=f"{made.why}, {why}"), _DOUBT)
        if lost:
            found.append(made._replace(origins=lost))
            note_unread(reading, found[-1], cure or _to_read(reading, made))
    _note_likely(reading, left.missing, left.not_ignored(), reading.checkpoint, ends)
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in its full shape: of a parameter DeepSpeed's ZeRO-3 keeps a part, and that elsewhere."""
    shape = getattr(tensor, "ds_shape", None)
    return tensor if shape is None else torch.empty(shape, dtype=tensor.dtype, device="meta")


def _to_read(reading: Reading, made: names.Made) -> str:
    """How to have `from_pretrained` read what it left, as a sentence."""
    way = made.cure if reading.may_grow else made.cure or "rename them in the file"
    cure = ", or ".join(filter(None, (_REPAIR if reading.may_grow else "", way)))
    return cure[0].upper() + cure[1:]


def _ends(reading: Reading, now: Survey) -> dict[str, list[torch.Tensor]]:
    """For missing keys, the tensors that were read which each of them is, or is to be by a tie that is asked for."""
    held = set(map(id, reading.held.values()))
    found = {key: [now.state[key]] for key in reading.missing if id(now.state[key]) in held}
    for key, group in ties(now, reading.missing, reading.stored).items():
        if key in reading.missing and not group.flags.get(key):
            found.setdefault(key, []).extend(reading.held[name] for name in group.members if name in reading.held)
    return found


def _is_held(ends: Sequence[torch.Tensor], origin: names.Origin, files: Checkpoint) -> bool:
    """Whether one of these tensors has the very values that files have for a key: then nothing is lost."""
    if not ends or origin.is_converted or len(origin.names) > 1:
        return False
    return any(equals(end, files.tensors[origin.names[0]]()) for end in ends)


def _note_likely(
    reading: Reading, missing: names.Headers, unread: names.Headers, files: Checkpoint, ends: _Ends
) -> None:
    """Note which of the unread tensors of some files each missing key may be."""

    def is_held(key: str, name: str) -> bool:
        return _is_held(ends.get(key, ()), names.Origin((name,), False), files)

    rest = by_shape(unread)
    for shape, keys in by_shape(missing).items():
        alike = rest.get(shape, [])
        if len(alike) <= names.MOST_TRIED and not ends.keys().isdisjoint(keys):
            alike = [name for name in alike if not all(is_held(key, name) for key in most_alike(name, keys))]
        reading.likely |= {key: likely(key, alike) for key in keys if alike}


def note_unlisted(model: Any, reading: Reading, conversions: Sequence[Any]) -> None:
    """Note what lies in a shard that the index does not name: a tie would give it other values than it has there."""
    wanted = reading.missing - reading.free - reading.found.keys()
    if not wanted or not (others := reading.checkpoint.unlisted()).files:
        return
    with suppress(Exception):  # of files that nobody reads
        now, headers, own = survey(model), others.headers, reading.checkpoint.headers
        ends = _ends(reading, now)
        made = names.origins(model, headers, now.state, conversions)
        shards = ", ".join(Path(path).name for path in others.files)
        cure = "Add these tensors to the weight_map of the index"
        found = {k: o for k, o in made.items() if k in wanted and not _is_held(ends.get(k, ()), o, others)}
        note_unread(reading, names.Made(found, f"because the index does not name {shards}"), cure)
        rest = {name: header for name, header in headers.items() if name not in own and not is_ignored(model, name)}
        _note_likely(reading, only(now.state, wanted - found.keys()), rest, others, ends)


def note_unread(reading: Reading, made: names.Made, cure: str) -> None:
    """Note that nothing read what the files have for these keys."""
    for key, origin in made.origins.items():
        reading.found[key] = Finding(key, Verdict.UNREAD, origin.names[0], made.why, True, cure)
    taken = made.key_of
    reading.likely = {key: name for key, name in reading.likely.items() if name not in taken}


def _judge_types(reading: Reading, key: str, own: names.Headers, scales: Scales) -> Finding | None:
    """A finding if the type that a tensor was read into cannot hold what is stored, or says nothing of it."""
    tensor = reading.held[key]
    for name, header in own.items():
        if found := without_scale(key, name, header.dtype, tensor, scales):
            return found
    ours = tensor.dtype
    (name, header), *others = own.items()
    if others or not may_lose(header.dtype, ours) or equals(reading.read_to[key], reading.checkpoint.tensors[name]()):
        return None
    return cast_finding(key, header.dtype, ours)
