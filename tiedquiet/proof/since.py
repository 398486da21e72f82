"""What is known of a model once its load is over, of the models inside it as well; and what has changed since."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from tiedquiet.proof import record
from tiedquiet.proof.adapted import replaced
from tiedquiet.proof.aside import is_moved, is_served
from tiedquiet.proof.casts import is_at_limit
from tiedquiet.proof.judge import as_loaded, judge_now, put_in
from tiedquiet.proof.memory import ORDINARY, by_object, equals
from tiedquiet.proof.record import Record
from tiedquiet.proof.stored import Sources, judge_casts, sources_since
from tiedquiet.proof.survey import Survey, survey, ties
from tiedquiet.verdict import IN_FILES, WELL, Finding, Proof, Verdict

Objects = Callable[[], dict[int, list[str]]]

_TO_META = "moved to meta, where nothing has values"


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
    for name in sorted(put_in(model, now, known, tensors)):
        why = "no load of it was seen" if known is None else "it was put in since, and no load of it was seen"
        yield Finding(prefix + name, Verdict.MISSING, None, why, since=known is not None)


def proof_of(model: torch.nn.Module, known: Record) -> Proof:
    """What is known about a model's own load, and what is seen to have changed since. Training is no change."""
    known, now = _as_it_is(model, known)
    sources = sources_since(model, known, now)
    judge_casts(known, now, sources)
    objects = cache(partial(by_object, now.state))
    judged = _judge_ties_now(model, known, now)
    findings = {finding.key: _as_change(model, known, now, objects, finding) for finding in judged}
    changed = _judge_since(model, known, now, objects, sources)
    findings.update((finding.key, finding) for finding in changed if finding.key not in findings)
    stored = len(known.stored - findings.keys())
    return Proof(type(model).__name__, stored, tuple(findings[key] for key in sorted(findings)), known.total)


def _as_change(model: torch.nn.Module, known: Record, now: Survey, objects: Objects, finding: Finding) -> Finding:
    """A finding; one on what was well when the load had ended tells of a change."""
    key, then = finding.key, known.findings.get(finding.key)
    if then is None or then.verdict not in WELL:
        return finding
    if now.state[key].is_meta and not _is_served(model, key, objects()[id(now.state[key])]):
        return Finding(key, Verdict.UNPROVEN, None, f"it was {then.verdict}, and has since been {_TO_META}", since=True)
    if finding.verdict in WELL:
        return finding
    return replace(finding, why=f"it was {then.verdict} when it was loaded, and is not any more", since=True)


def untied_since(model: torch.nn.Module, known: Record) -> list[Finding]:
    """Findings on ties of a model that do not hold, now that its load is over; no value that was cast is looked at."""
    return [f for f in _judge_ties_now(model, *_as_it_is(model, known)) if f.verdict is Verdict.UNTIED]


def _as_it_is(model: torch.nn.Module, known: Record) -> tuple[Record, Survey]:
    """What is known of a load, under the names that the tensors have by now; and these."""
    now = as_loaded(survey(model))
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
    return judge_now(model, by_loaded_name, now, tied)


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


def _judge_since(
    model: torch.nn.Module, known: Record, now: Survey, objects: Objects, sources: Sources
) -> Iterator[Finding]:
    """Findings on what is seen to have changed since the load."""
    merged = {id(known.tensors[name]()) for name in known.adapted & known.tensors.keys()}  # it may be the head now
    read_inside = cache(partial(_put_in_and_read, now))
    for name in sorted(known.stored - known.gone):
        tensor = now.state.get(name)
        if tensor is None:
            if name in read_inside():
                continue  # it has another name since
            is_elsewhere = name in known.tensors and id(known.tensors[name]()) in objects()
            became = "moved to another place in the model" if is_elsewhere else "removed from the model"
        elif tensor.is_meta and not _is_served(model, name, objects()[id(tensor)]):
            became = _TO_META
        elif tensor.is_meta or is_moved(model, name) or type(tensor) not in ORDINARY:
            continue  # accelerate or FSDP holds the values elsewhere, or has parted them
        elif name in known.tensors and (then := known.tensors[name]()) is not tensor and id(tensor) not in merged:
            # `Module.to` makes other buffers, where it keeps parameters. What takes the place of a parameter may be
            # as good, but an optimizer may hold the other one.
            is_free = then is None or not isinstance(tensor, torch.nn.Parameter)
            if name in read_inside() or (is_free and _has_values(tensor, sources(name))):
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


def _is_served(model: torch.nn.Module, name: str, names: Iterable[str]) -> bool:
    """Whether something puts values in the place of a tensor on meta; PEFT may have put a layer around its own."""
    return any(is_served(model, own) for own in names if own == name or record.loaded_name(own) == name)


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
