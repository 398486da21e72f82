"""The door of peft: `PeftModel.load_adapter`, through which `PeftModel.from_pretrained` goes as well.

Adapters that transformers loads itself come through its own functions (from_pretrained.py); the checks that only
adapters need are here, for both.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

from tiedquiet import mode, words
from tiedquiet.doors.adapter_files import Adapter, made_again, of_missing, of_the_whole
from tiedquiet.doors.outcome import Outcome, carry_out, fold, outcome_of
from tiedquiet.doors.wrapping import Seam, add, bind, guarded
from tiedquiet.proof import names, record
from tiedquiet.proof.adapted import PREFIX, names_in_files, saved
from tiedquiet.proof.load import Load
from tiedquiet.proof.placeholders import version_of
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import Record
from tiedquiet.proof.since import untied_since
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Finding, Verdict

# The names of the adapters that were judged, for a call around theirs that asks for them: a Trainer's.
judged: ContextVar[set[str] | None] = ContextVar("tiedquiet_judged_adapters", default=None)
_BY_PEFT = "Load the adapter with peft's PeftModel.from_pretrained"
_COPIED_BY_PEFT = f"{_BY_PEFT} and without low_cpu_mem_usage"
_PARTED = "although the two were one tensor when the base model was loaded"


def is_loading(model: Any) -> bool:
    """Whether transformers is loading an adapter into a model, not the model itself."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def leave_out_others(model: Any, reading: Reading) -> None:
    """Leave out of what was missed what the adapter's files need not have: its base model, and other adapters.

    Nothing says which adapter it is: the one that something was read for, or else the one that was put in last.
    """
    keys = {adapter: names_in_files(model, adapter) for adapter in model.peft_config}
    loaded = [adapter for adapter, own in keys.items() if own.keys() & reading.held.keys()] or list(keys)[-1:]
    in_files = {key for adapter in loaded for key in saved(model, adapter)}
    own = in_files.union(*(keys[adapter] for adapter in loaded))
    reading.found = {key: finding for key, finding in reading.found.items() if key in own or key not in reading.missing}
    reading.missing &= own
    reading.is_of_adapter = True
    reading.total = len(reading.held) + len(reading.missing)
    reading.free |= reading.missing - in_files


def read_earlier(load: Load, model: Any, reported: set[str]) -> tuple[set[str], list[tuple[int, str]]]:
    """Which keys are reported missing although their tensor is still the one that an earlier load read.

    Args:
        load: of an adapter, whose report has keys of the adapters that were loaded before.
        model: the model.
        reported: the keys.

    Returns:
        Them, and what to say.
    """
    others, known = reported - load.reading.missing, record.of(model)
    if not others or known is None:
        return set(), []
    read = [known.tensors[name]() for name in known.tensors.keys() & known.stored - known.lasting.keys()]
    alive, state = set(map(id, read)), survey(model).state
    earlier = {key for key in others & state.keys() if id(state[key]) in alive}
    line = f"{words.name_of(model, load.where)}: reported missing but read by an earlier load: "
    return earlier, [(logging.INFO, line + words.few(earlier, fold))] if earlier else []


def unreported(load: Load, model: Any) -> list[tuple[int, str]]:
    """What to say of an adapter's tensors that are missing and in no row of transformers': biases of the base model."""
    reading = load.reading
    left = reading.missing - reading.found.keys() - reading.free - load.reported if reading.is_of_adapter else set()
    line = f"{words.name_of(model, load.where)}: {of_missing(left, reading.total)}"
    return [(logging.WARNING, line)] if left else []


def note_parted(model: Any, where: object, earlier: Record | None, outcome: Outcome) -> None:
    """Add to an outcome what was tied when the base model was loaded, and is another weight now that an adapter is in.

    The embedding that an adapter brings along may be put in the place of the base model's, which is one with its head.

    Args:
        model: the base model, with the record of both loads.
        where: the adapter.
        earlier: the record of the base model's load.
        outcome: what the adapter's load has come to.
    """
    tied = {key for key, finding in earlier.findings.items() if finding.verdict is Verdict.TIED} if earlier else set()
    if not tied or (known := record.of(model)) is None:
        return
    now = [finding for finding in untied_since(model, known) if finding.key in tied]
    parted = [replace(finding, why=_PARTED, broken=True, cure=_COPIED_BY_PEFT) for finding in now]
    rest = outcome_of(model, where, parted, [], set(), known.total)
    outcome.lines += rest.lines
    outcome.failure = outcome.failure or rest.failure


def note_names(model: Any, reading: Reading, unread: names.Headers, conversions: Sequence[Any] = ()) -> names.Headers:
    """Note what an adapter's files hold under peft's own names for it, but nothing read; returns the others.

    Args:
        model: the model.
        reading: what was read; findings are added to it.
        unread: what nothing read.
        conversions: what renames the model's tensors, if the adapter may be older than their names.
    """
    if not unread:
        return unread
    state, missing = survey(model).state, reading.missing - reading.found.keys()
    theirs = {own: key for adapter in model.peft_config for key, own in saved(model, adapter).items() if key in missing}
    # DoRA's magnitudes are modules in the model, and have no `.weight` in the file.
    theirs |= {own.removesuffix(".weight"): key for own, key in theirs.items()}
    full = {name.removeprefix(PREFIX): name for name in unread}
    known, headers = {own: state[key] for own, key in theirs.items()}, {short: unread[n] for short, n in full.items()}
    found = names.targets(model, headers, known, conversions) if conversions else {own: own for own in headers}
    for short, own in ((short, own) for short, own in found.items() if own in known):
        if headers[short].shape == known[own].shape:
            why = (
                "because load_adapter in this release of transformers looks for it under a name that peft does not use"
            )
            reading.found[theirs[own]] = Finding(theirs[own], Verdict.UNREAD, full[short], why, True, _BY_PEFT)
    claimed = {finding.source for finding in reading.found.values()}
    return {name: header for name, header in unread.items() if name not in claimed}


def note_rest(model: Any, reading: Reading, unread: names.Headers, known: Collection[str] = ()) -> None:
    """Note what else an adapter's files hold but nothing read: by peft's names for it, and then what has no place.

    Args:
        model: the model.
        reading: what was read; findings are added to it.
        unread: what nothing read.
        known: the names in that of what is known to be the model's.
    """
    rest = note_names(model, reading, unread, names.conversions_of(model)).keys() - set(known)
    rest -= {finding.source for finding in reading.found.values()}
    drawn_again = made_again(model, model.peft_config, rest, reading.checkpoint)
    reading.found.update(of_the_whole(reading.checkpoint, len(unread) - len(drawn_again), sorted(rest - drawn_again)))


def _on_load(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `PeftModel.load_adapter`: compare what it says about its keys with what the adapter's files hold."""
    if mode.current() == "off":
        return wrapped(*args, **kwargs)
    before, failure = guarded(lambda: _note(wrapped, instance, args, kwargs))
    try:
        result = wrapped(*args, **kwargs)
    finally:
        if before is not None:
            before.hook.remove()
    if failure is not None:
        raise failure
    return result if before is None else carry_out(lambda: _judge(before, result), lambda: result)


class _Before(NamedTuple):
    """What is known before the call: the model, the call's arguments, and each parameter's count of writes.

    Attributes:
        unseen: takes the names of all tensors that `load_state_dict` finds no values for; peft hands on only those with
            its layers' prefix.
        hook: what puts them there.
    """

    model: Any
    given: dict[str, Any]
    versions: dict[str, tuple[int, int]]
    unseen: set[str]
    hook: Any


def _note(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Before:
    # PeftMixedModel calls `PeftModel.load_adapter(self, ...)` without being one; what it is wrapt then does not say.
    model, args = (args[0], args[1:]) if instance is None else (instance, args)
    versions = {name: (id(tensor), version_of(tensor)) for name, tensor in model.named_parameters()}
    given, unseen = bind(wrapped, args, kwargs), set[str]()
    hook = model.register_load_state_dict_post_hook(lambda _, keys: unseen.update(keys.missing_keys))
    return _Before(model, given, versions, unseen, hook)


def _judge(before: _Before, result: Any) -> Outcome:
    adapter, model = Adapter(before.model, before.given, before.unseen), before.model
    known, base = adapter.known, adapter.base
    findings = adapter.judge(result.unexpected_keys)
    outcome = outcome_of(model, adapter.where, findings, adapter.repaired, set(), known.total)
    name = words.name_of(model, adapter.where)
    if left := known.missing - known.lasting.keys():
        are_on_meta = any(adapter.is_on_meta(key) for key in left)
        outcome.lines.append((logging.WARNING, f"{name}: {of_missing(left, known.total, are_on_meta)}"))
    if beside := adapter.lost_beside():
        total = known.total + len(adapter.beside)
        outcome.lines.append((logging.WARNING, f"{name}: {of_missing(beside, total)}"))
    if changed := _changed_in_base(before, adapter.prefix):
        line = f"{name}: loading it also changed tensors of the base model: {words.few(changed, fold)}"
        outcome.lines.append((logging.INFO, line))
    known.findings = {finding.key: finding for finding in findings}
    earlier = record.of(base)
    if adapter.in_files or findings:
        record.leave(base, known if earlier is None else known.after(earlier))
    note_parted(base, adapter.where, earlier, outcome)
    if (told := judged.get()) is not None:
        told.add(before.given["adapter_name"])
    return outcome


def _changed_in_base(before: _Before, prefix: str) -> list[str]:
    """The names of the base model's tensors that were written to or replaced."""
    then, model = before.versions, before.model
    put_in = names_in_files(model, before.given["adapter_name"])
    now = {name: (id(t), version_of(t)) for name, t in model.named_parameters() if name.startswith(prefix)}
    return sorted(name for name in now.keys() & then.keys() - put_in.keys() if now[name] != then[name])


add(
    Seam(
        "peft.peft_model", "PeftModel", ("load_adapter",), (frozenset({"self", "model_id", "adapter_name"}),), _on_load
    ),
)
