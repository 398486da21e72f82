"""The judge: from what was read, what was seen since and the model as it is, to findings. It changes none of them.

That two names share a tensor proves nothing: a module shared in `__init__` can be re-initialised after it was loaded,
and then both names hold the same random values. So a stored tensor counts as held only if it is where it was read to
and nobody was seen to write there, or if it equals in full what was read.
"""

from collections.abc import Iterable
from typing import Any

import torch

from tiedquiet.proof import record
from tiedquiet.proof.adapted import is_in_peft_s
from tiedquiet.proof.files import stamp
from tiedquiet.proof.missing import Values, judge_missing, judge_two_ends
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import Record
from tiedquiet.proof.stored import judge_casts, judge_placeholders, judge_stored
from tiedquiet.proof.survey import Survey, only, survey, ties
from tiedquiet.proof.ties import Group
from tiedquiet.proof.watch import Watch
from tiedquiet.verdict import Finding, Verdict


def judge(
    model: torch.nn.Module,
    reading: Reading,
    watch: Watch,
    is_resumed: bool = False,
    is_over: bool = False,
    is_strict: bool = False,
) -> Record:
    """Judge a load, now that it has ended.

    Args:
        model: the loaded model.
        reading: what was read into it.
        watch: what was seen since.
        is_resumed: the checkpoint is one of this very model.
        is_over: nothing more of it follows: what stays on disk has what will read it.
        is_strict: values that were cast to a smaller type are worth a look at each of them.

    Returns:
        What is known, with all findings.

    Raises:
        Exception: what went wrong under the watch; after that nothing can be said.
    """
    if watch.error is not None:
        raise watch.error
    missing, now = reading.missing, survey(model)
    if is_over and now.state.keys() - reading.held.keys() - missing:  # to ask is not free, and most have none
        so_far = Record(set(reading.held), missing, len(reading.held) + len(missing))
        missing = missing | put_in(model, now, so_far, reading.held.values())
    if not reading.held.keys() <= now.state.keys():
        now = as_loaded(now)
    lost, grown, altered = judge_stored(model, reading, watch.writes, now, is_over)
    unread = {key: found for key, found in reading.found.items() if found.verdict is Verdict.UNREAD}
    unwritten = judge_placeholders(reading, missing, watch, model, now)
    known = Record(
        stored := reading.stored,
        missing,
        len(stored) + len(missing),
        reading.free & missing,
        lasting={**reading.found, **lost, **unwritten, **unread},
        grown=grown,
        altered=altered,
        narrowed=set(reading.narrowed),
        adapted=stored if reading.is_of_adapter else set(),
        had=missing & _read_before(now) if is_resumed and missing else set(),
        places=reading.offloaded,
        likely=reading.likely,
        is_resumed=is_resumed,
        files=list(reading.checkpoint.files),
        stamps=_stamps(reading.checkpoint.files),
        tensors=record.refs_to(only(now.state, stored)),
    )
    if is_strict:
        judge_casts(known, now, reading.sources, and_on_disk=True)
    tied = ties(now, known.missing, stored)
    known.two_ends = {finding.key: finding for finding in judge_two_ends(known, now, tied, reading.values)}
    known.findings = {finding.key: finding for finding in judge_now(model, known, now, tied, reading.values)}
    return known


def _read_before(now: Survey) -> set[str]:
    """The names of what earlier loads of a model, or of models inside it, have read."""
    earlier = ((prefix, own) for prefix, one in now.models if (own := record.of(one)) is not None)
    return {prefix + key for prefix, own in earlier for key in own.stored | own.had}


def put_in(
    model: torch.nn.Module, now: Survey, known: Record | None, tensors: Iterable[torch.Tensor | None]
) -> set[str]:
    """The names of what was put into a model once its checkpoint had been read, by no load of a model inside.

    What a quantiser, an adapter or a wrapper adds lies where a layer was read, and in whose place it is; or in a module
    of peft's that is not around one of the model's own.

    Args:
        model: the model.
        now: the model as it is.
        known: what is known of its own load; None if only models inside it were loaded.
        tensors: those of that load.
    """
    inside = [(prefix, own) for prefix, one in now.models if prefix and (own := record.of(one)) is not None]
    records = [("", known), *inside] if known is not None else inside
    names = {prefix + key for prefix, own in records for key in own.stored | own.missing}
    others = now.state.keys() - names
    if others and not now.is_plain:
        others &= model.state_dict().keys()
    if not others:
        return set()
    objects = {*map(id, tensors), *(id(now.state[name]) for name in names & now.state.keys())}
    held = [name for name, tensor in now.state.items() if id(tensor) in objects]
    tied = {prefix + key for prefix, own in records for key in own.tied}
    # A head that was tied may have been replaced by a new one, which has its own names.
    left = {
        key for key in tied if key in now.state or any(name.startswith(key.rpartition(".")[0] + ".") for name in held)
    }
    read = {prefix + key for prefix, own in records for key in own.stored} | left
    layers = {name.rpartition(".")[0] for name in read}
    layers -= {parent for name in names for parent in record.parents(name.rpartition(".")[0])} | {""}
    unknown = tuple(prefix for prefix, own in records if not own.total)  # somebody else's code read it
    return {
        name
        for name in others
        if id(now.state[name]) not in objects
        and (own_name := record.loaded_name(name)) not in names
        and layers.isdisjoint(record.parents(name))
        and not name.startswith(unknown)
        and not (own_name == name and is_in_peft_s(model, name))
    }


def _stamps(files: list[str]) -> dict[str, tuple[int, int]]:
    try:
        return {path: stamp(path) for path in files}
    except OSError:
        return {}


def as_loaded(now: Survey) -> Survey:
    """The same with the names that tensors had when they were loaded beside those that PEFT gave them."""
    for parts in (now.state, now.others):
        for name, tensor in list(parts.items()):
            parts.setdefault(record.loaded_name(name), tensor)
    return now


def judge_now(
    model: Any, known: Record, now: Survey, tied: dict[str, Group], values: Values | None = None
) -> list[Finding]:
    findings = {**known.two_ends, **known.lasting}
    for finding in judge_missing(model, known, now, tied, values):
        # A tie of which no end was stored does not explain why nothing was written to this one.
        # And what the files have, once or twice, and nothing read is no tie that came apart.
        known_of_it = findings.get(finding.key)
        if known_of_it is None or (
            known_of_it.verdict not in (Verdict.UNREAD, Verdict.AMBIGUOUS) and finding.verdict is not Verdict.MISSING
        ):
            findings[finding.key] = finding
    tensors = ({""}, now.state, now.others, now.loose)  # the first of what is about the whole load
    return [findings[key] for key in sorted(findings) if any(key in some for some in tensors)]
