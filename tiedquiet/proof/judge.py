"""The judge: from what was read, what was seen since and the model as it is, to findings. It changes none of them.

That two names share a tensor proves nothing: a module shared in `__init__` can be re-initialised after it was loaded,
and then both names hold the same random values. So a stored tensor counts as held only if it is where it was read to
and nobody was seen to write there, or if it equals in full what was read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from tiedquiet.proof import record
from tiedquiet.proof.adapted import is_in_peft_s, replaced
from tiedquiet.proof.casts import is_at_limit
from tiedquiet.proof.files import stamp
from tiedquiet.proof.memory import ORDINARY, by_object, equals
from tiedquiet.proof.missing import Values, judge_missing, judge_two_ends
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import Record
from tiedquiet.proof.stored import Sources, judge_casts, judge_placeholders, judge_stored, sources_since
from tiedquiet.proof.survey import Survey, is_moved, only, survey, ties
from tiedquiet.proof.ties import Group
from tiedquiet.proof.watch import Watch
from tiedquiet.verdict import IN_FILES, WELL, Finding, Proof, Verdict

_TO_META = "moved to meta, where nothing has values"


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
        missing = missing | _put_in(model, now, so_far, reading.held.values())
    if not reading.held.keys() <= now.state.keys():
        now = _as_loaded(now)
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
    known.findings = {finding.key: finding for finding in _judge_now(model, known, now, tied, reading.values)}
    return known


def _put_in(
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


def proof(model: Any, inert: str = "") -> Proof:
    """What is known about a model, or those inside it: `torch.compile`, DDP, PEFT, or a composite of several.

    Args:
        model: any object.
        inert: why no load can have been seen.
    """
    found: list[tuple[str, Proof]] = []
    outermost: list[tuple[str, Any]] = []
    counted: set[str] = set()
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        known = record.of(module)
        if known is None:
            continue
        prefix = f"{name}." if name else ""
        own = {prefix + key for key in known.stored | known.missing}
        if any(prefix.startswith(outer) for outer, _ in found):
            others = counted | set(map(record.loaded_name, counted))
            if others.issuperset(map(record.loaded_name, own)):
                continue  # of an earlier load; what was put in later has names of its own, all of them or some
            known = _without(known, prefix, others)
        counted |= own
        if not any(prefix.startswith(outer) for outer, _ in outermost):
            outermost.append((prefix, module))
        found.append((prefix, proof_of(module, known)))
    if found and hasattr(type(model), "_tied_weights_keys"):
        outermost = [("", model)]  # what somebody else puts around models is his own
    beside = [finding for prefix, module in outermost for finding in _beside(prefix, module)]
    if len(found) == 1 and not beside:
        return found[0][1]
    findings = [
        replace(f, key=prefix + f.key, source=prefix + f.source if f.source and f.verdict not in IN_FILES else f.source)
        for prefix, part in found
        for f in part.findings
    ]
    if not found:
        why = inert or (
            "no record of a load: it was loaded before tiedquiet was enabled, or not from a checkpoint; or it is "
            "a part or a pickled copy of what was loaded"
        )
        findings = [Finding("", Verdict.UNPROVEN, None, why)]
    findings = sorted((*findings, *beside), key=lambda finding: finding.key)
    stored, total = (sum(getattr(part, what) for _, part in found) for what in ("stored", "total"))
    return Proof(type(model).__name__, stored, tuple(findings), total + len(beside))


def _without(known: Record, prefix: str, others: set[str]) -> Record:
    """A record without the names that are others under a prefix."""
    return known.renamed(lambda key: None if record.loaded_name(prefix + key) in others else key)


def _beside(prefix: str, model: torch.nn.Module) -> Iterator[Finding]:
    """Findings on tensors of a model, or of those inside it, that no load was of.

    Args:
        prefix: that of its names.
        model: a model that was loaded, or one of transformers with such in it.
    """
    now, known = survey(model), record.of(model)
    tensors = [one() for one in known.tensors.values()] if known is not None else []
    for name in sorted(_put_in(model, now, known, tensors)):
        why = "no load of it was seen" if known is None else "it was put in since, and no load of it was seen"
        yield Finding(prefix + name, Verdict.MISSING, None, why, since=known is not None)


def proof_of(model: torch.nn.Module, known: Record) -> Proof:
    """What is known about a model's own load, and what is seen to have changed since. Training is no change."""
    known, now = _as_it_is(model, known)
    sources = sources_since(model, known, now)
    judge_casts(known, now, sources)
    findings = {finding.key: _as_change(model, known, now, finding) for finding in _judge_ties_now(model, known, now)}
    findings.update(
        (finding.key, finding) for finding in _judge_since(model, known, now, sources) if finding.key not in findings
    )
    stored = len(known.stored - findings.keys())
    return Proof(type(model).__name__, stored, tuple(findings[key] for key in sorted(findings)), known.total)


def _as_change(model: torch.nn.Module, known: Record, now: Survey, finding: Finding) -> Finding:
    """A finding; one on what was well when the load had ended tells of a change."""
    key, then = finding.key, known.findings.get(finding.key)
    if then is None or then.verdict not in WELL:
        return finding
    if now.state[key].is_meta and not is_moved(model, key):
        return Finding(key, Verdict.UNPROVEN, None, f"it was {then.verdict}, and has since been {_TO_META}", since=True)
    if finding.verdict in WELL:
        return finding
    return replace(finding, why=f"it was {then.verdict} when it was loaded, and is not any more", since=True)


def untied_since(model: torch.nn.Module, known: Record) -> list[Finding]:
    """Findings on ties of a model that do not hold, now that its load is over; no value that was cast is looked at."""
    return [f for f in _judge_ties_now(model, *_as_it_is(model, known)) if f.verdict is Verdict.UNTIED]


def _as_it_is(model: torch.nn.Module, known: Record) -> tuple[Record, Survey]:
    """What is known of a load, under the names that the tensors have by now; and these."""
    now = _as_loaded(survey(model))
    known = _followed(known, now)
    set_aside = replaced(model, known.missing, known.stored - known.lasting.keys())
    deleted = known.adapted - now.state.keys()  # with the adapter that had brought them
    stored, missing = known.stored - deleted, known.missing - set_aside - deleted
    total = known.total - len(known.stored | known.missing) + len(stored | missing)
    return replace(known, stored=stored, missing=missing, total=total), now


def _judge_ties_now(model: torch.nn.Module, known: Record, now: Survey) -> list[Finding]:
    # A tie is declared under the names that its ends had before PEFT wrapped one of them.
    before = set(map(record.loaded_name, known.stored)) - known.missing
    by_loaded_name = replace(known, stored=known.stored | before)
    tied = ties(now, known.missing, by_loaded_name.stored) if known.missing else {}
    return _judge_now(model, by_loaded_name, now, tied)


def _followed(known: Record, now: Survey) -> Record:
    """The same where tensors that were read have other names since, which are given their old ones beside these.

    A layer may have been put around one, or taken away from it. What was missing under such a name is there now, unless
    the two were tied: then one of them may be gone.
    """
    gone = known.tensors.keys() - now.state.keys()
    names_of = by_object(now.state) if gone else {}
    arrived: set[str] = set()
    for name in gone:
        tensor = known.tensors[name]()
        for own in names_of.get(id(tensor), ()):
            were_tied = _were_tied(known, own, name)
            if tensor is not None and (were_tied or record.is_same_place(own, name)):
                now.state[name] = tensor
                arrived.update({own} & known.missing if not were_tied else ())
    return replace(known, missing=known.missing - arrived, total=known.total - len(arrived))


def _were_tied(known: Record, key: str, source: str) -> bool:
    return (finding := known.findings.get(key)) is not None and finding.source == source


def _stamps(files: list[str]) -> dict[str, tuple[int, int]]:
    try:
        return {path: stamp(path) for path in files}
    except OSError:
        return {}


def _as_loaded(now: Survey) -> Survey:
    """The same with the names that tensors had when they were loaded beside those that PEFT gave them."""
    for parts in (now.state, now.others):
        for name, tensor in list(parts.items()):
            parts.setdefault(record.loaded_name(name), tensor)
    return now


def _judge_now(
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


def _judge_since(model: torch.nn.Module, known: Record, now: Survey, sources: Sources) -> Iterator[Finding]:
    """Findings on what is seen to have changed since the load."""
    merged = {id(known.tensors[name]()) for name in known.adapted & known.tensors.keys()}  # it may be the head now
    put_in, objects = cache(partial(_put_in_and_read, now)), cache(partial(by_object, now.state))
    for name in sorted(known.stored - known.gone):
        tensor = now.state.get(name)
        if tensor is None:
            if name in put_in():
                continue  # it has another name since
            is_elsewhere = name in known.tensors and id(known.tensors[name]()) in objects()
            became = "moved to another place in the model" if is_elsewhere else "removed from the model"
        elif is_moved(model, name) or type(tensor) not in ORDINARY:
            continue  # accelerate or FSDP holds the values elsewhere, or has parted them
        elif tensor.is_meta:
            became = _TO_META
        elif name in known.tensors and (then := known.tensors[name]()) is not tensor and id(tensor) not in merged:
            # `Module.to` makes other buffers, where it keeps parameters. What takes the place of a parameter may be
            # as good, but an optimizer may hold the other one.
            is_free = then is None or not isinstance(tensor, torch.nn.Parameter)
            if name in put_in() or (is_free and _has_values(tensor, sources(name))):
                continue
            became = "replaced by another tensor"
        elif name in known.narrowed and is_at_limit(tensor):
            why = f"it has values at the limit of {str(tensor.dtype).removeprefix('torch.')}, to which it was cast"
            yield Finding(name, Verdict.UNPROVEN, None, why)
            continue
        else:
            continue
        why = f"it was read, and has since been {became}"
        yield Finding(name, Verdict.UNPROVEN, None, why, since=name not in known.lasting)


def _put_in_and_read(now: Survey) -> set[str]:
    """The names of what models inside read, each in a load of its own, and have to this day."""
    found: set[str] = set()
    for prefix, model in now.models:
        if prefix and (own := record.of(model)) is not None:
            changed = {finding.key for finding in proof_of(model, own).findings}
            found.update(record.loaded_name(prefix + name) for name in (own.stored & own.tensors.keys()) - changed)
    return found


def _has_values(tensor: torch.Tensor, own: list[Callable[[], torch.Tensor]] | None) -> bool:
    """Whether a tensor has the values that the files have for it, cast to its type."""
    return own is not None and len(own) == 1 and bool(equals(tensor, own[0]()))
