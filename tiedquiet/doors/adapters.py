"""The door of peft: `PeftModel.load_adapter`, through which `PeftModel.from_pretrained` goes as well.

Adapters that transformers loads itself come through its own functions (from_pretrained.py); the checks that only
adapters need are here, for both.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple
from weakref import ref

from tiedquiet import mode, words
from tiedquiet.doors.outcome import Outcome, fold, say, told
from tiedquiet.doors.wrapping import Seam, add, bind, stand_aside
from tiedquiet.proof import names, record
from tiedquiet.proof.adapted import names_in_files, saved, without
from tiedquiet.proof.files import Checkpoint, found_in
from tiedquiet.proof.load import Load
from tiedquiet.proof.memory import equals, types_of
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import Record
from tiedquiet.proof.repair import copy_in_place
from tiedquiet.proof.survey import survey
from tiedquiet.proof.unread import cast_finding, out_of_date
from tiedquiet.verdict import Finding, Verdict

_BY_PEFT = "Load the adapter with peft's PeftModel.from_pretrained"
_CURE = "Set TIEDQUIET=repair to read them, or load the adapter into the model that it was trained on"

FOR_INFERENCE = "Load the adapter for inference, with is_trainable=False"


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
    alive, state = {id(tensor) for tensor in read if tensor is not None}, survey(model).state
    earlier = {key for key in others & state.keys() if id(state[key]) in alive}
    line = f"{words.name_of(model, load.where)}: reported missing but read by an earlier load: "
    return earlier, [(logging.INFO, line + words.few(earlier, fold))] if earlier else []


def note_rest(model: Any, reading: Reading, unread: names.Headers) -> None:
    """Note what else an adapter's files hold but nothing read: by peft's names for it, and then what has no place."""
    state, missing = survey(model).state, reading.missing - reading.found.keys()
    for key, own in ((key, own) for adapter in model.peft_config for key, own in saved(model, adapter).items()):
        # DoRA's magnitudes are modules in the model, and have no `.weight` in the file.
        names_there = (f"base_model.model.{one}" for one in (own, own.removesuffix(".weight")))
        name = next((one for one in names_there if one in unread), None)
        if key in missing and name is not None and unread[name].shape == state[key].shape:
            why = (
                "because load_adapter in this release of transformers looks for it under a name that peft does not use"
            )
            reading.found[key] = Finding(key, Verdict.UNREAD, name, why, True, _BY_PEFT)
    claimed = {finding.source for finding in reading.found.values()}
    rest = sorted(name for name in unread if name not in claimed and not _is_held(model, name, reading.checkpoint))
    count = len(rest) + len(claimed & unread.keys())
    reading.found.update(_of_the_whole(reading.checkpoint, count, rest))


def _is_held(model: Any, name: str, checkpoint: Checkpoint) -> bool:
    """Whether every layer has made from a seed what the files have once, above all of them (RandLora's bases)."""
    last, now = name.rpartition(".")[-1], survey(model)
    tensors = {**now.state, **now.others}
    own = [key for adapter in model.peft_config for key in tensors if key.endswith(f".{last}.{adapter}")]
    return bool(own) and all(equals(tensors[key], checkpoint.tensors[name]()) for key in own)


def _on_load(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `PeftModel.load_adapter`: compare what it says about its keys with what the adapter's files hold."""
    if mode.current() == "off":
        return wrapped(*args, **kwargs)
    before: _Before | None = None
    outcome, failure = None, None
    try:
        before = _note(wrapped, instance, args, kwargs)
    except Exception as error:
        failure = stand_aside(error)
    try:
        result = wrapped(*args, **kwargs)
    finally:
        if before is not None:
            before.hook.remove()
    if before is not None:
        try:
            outcome = _judge(before, result)
        except Exception as error:
            failure = stand_aside(error)
    if outcome is not None:
        say(outcome)
        failure = outcome.failure
    if failure is not None:
        raise failure
    return result


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
    versions = {name: (id(t), t._version) for name, t in model.named_parameters() if not t.is_inference()}
    given, unseen = bind(wrapped, args, kwargs), set[str]()
    hook = model.register_load_state_dict_post_hook(lambda _, keys: unseen.update(keys.missing_keys))
    return _Before(model, given, versions, unseen, hook)


def _judge(before: _Before, result: Any) -> Outcome:
    model, given, versions, unseen, _ = before
    where, adapter = os.path.join(given["model_id"], *filter(None, [given.get("subfolder")])), given["adapter_name"]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model.base_model.model
    prefix = next(name for name, module in model.named_modules() if module is base) + "."
    checkpoint = found_in(where, kind="adapter_model")
    state, whole = survey(base).state, survey(model).state
    own = saved(model, adapter)
    in_files = {key: own[prefix + key] for key in state if prefix + key in own}
    # Layers may share a tensor that the file has once, under another name (VB-LoRA's vector bank).
    read = {id(whole[name]) for name in own.keys() - unseen}
    missing = {key for key in in_files if id(state[key]) not in read}
    known = Record(in_files.keys() - missing, missing, len(in_files), files=checkpoint.files, model=ref(base))
    known.tensors, known.adapted = record.refs_to({key: state[key] for key in known.stored}), set(in_files)
    # Prompts are no part of the model: peft calls them unexpected, and reads them by code of their own.
    others = [] if model.peft_config[adapter].is_prompt_learning else result.unexpected_keys
    unexpected = {_as_given(adapter, name, checkpoint.headers) for name in others}
    by_their_names = {in_files[key] for key in known.stored}
    left_over = checkpoint.headers.keys() - by_their_names
    if by_their_names <= checkpoint.headers.keys() and len(left_over) == len(others):
        unexpected = set(left_over)  # peft may have renamed what it then found no place for
    # VeRA's projections are drawn from a seed that is saved as well: peft 0.18 has no place for those in the file.
    drawn = [(key, name) for key, name in names_in_files(model, adapter).items() if name in unexpected]
    drawn_again = {
        name for key, name in drawn if name in checkpoint.tensors and equals(whole[key], checkpoint.tensors[name]())
    }
    unexpected -= drawn_again
    unread = {name: checkpoint.headers[name] for name in unexpected & checkpoint.headers.keys()}
    key_of = {in_files[key]: key for key in missing}
    by_name = {name: state[key] for name, key in key_of.items()}
    prefixes = names.by_prefix(unread, by_name, key_of, [prefix + key for key in state])
    repaired = []
    for expected, name in (prefixes.names if prefixes else {}).items():
        key = key_of[expected]
        finding = Finding(key, Verdict.UNREAD, name, prefixes.why if prefixes else "", True, _CURE)
        unexpected.discard(name)
        if mode.current() == "repair" and copy_in_place(state[key], checkpoint.tensors[name]()):
            repaired.append(finding)
            known.stored, known.missing = known.stored | {key}, known.missing - {key}
            known.tensors.update(record.refs_to({key: state[key]}))
        else:
            known.lasting[key] = finding
    known.lasting.update(_of_the_whole(checkpoint, len(others) - len(drawn_again), sorted(unexpected)))
    # A mapping of the caller's may have exchanged names.
    lost = () if given.get("key_mapping") else _lost_in_casts(known, in_files, state, checkpoint)
    for finding in lost:
        values = checkpoint.tensors[in_files[finding.key]]
        if mode.current() == "repair" and copy_in_place(state[finding.key], values()):
            repaired.append(finding)
        else:
            known.lasting[finding.key] = finding
    if wrong := altered_prompts(model, adapter, checkpoint):
        known.lasting[""] = _of_prompts(wrong)
    # Of these peft speaks itself, if it was told to go on in spite of them.
    there = {k: checkpoint.headers.get(in_files[k]) for k in known.missing - known.lasting.keys()}
    too_other = [k for k, header in there.items() if header is not None and header.shape != state[k].shape]
    why = "the file has it in another shape"
    known.lasting.update({key: Finding(key, Verdict.MISSING, None, why) for key in too_other})
    left = known.missing - known.lasting.keys()
    if checkpoint.closed:
        known.lasting.update({key: Finding(key, Verdict.UNPROVEN, None, checkpoint.closed) for key in sorted(left)})
        left = set()
    findings = [*known.lasting.values(), *(Finding(key, Verdict.MISSING) for key in sorted(left))]
    outcome = told(model, where, findings, repaired, set(), known.total)
    if left:
        outcome.lines.append((logging.WARNING, f"{words.name_of(model, where)}: {of_missing(left, known.total)}"))
    put_in = names_in_files(model, adapter)
    now = {name: (id(t), t._version) for name, t in model.named_parameters() if name in versions.keys() - put_in.keys()}
    if changed := sorted(n for n, seen in now.items() if n.startswith(prefix) and seen != versions[n]):
        of_base = words.few(changed, fold)
        line = f"{words.name_of(model, where)}: loading it also changed tensors of the base model: {of_base}"
        outcome.lines.append((logging.INFO, line))
    known.settled = {finding.key: finding for finding in findings}
    earlier = record.of(base)
    if earlier is not None or in_files or findings:
        record.leave(base, known if earlier is None else known.after(earlier))
    return outcome


def _of_the_whole(checkpoint: Checkpoint, unread: int, rest: list[str]) -> dict[str, Finding]:
    """What there is to say about an adapter as a whole: tensors without a place, or files that are out of date."""
    if not rest:
        return {"": older} if (older := out_of_date(checkpoint)) else {}
    total = len(checkpoint.headers)
    of = f"{total - unread:,} of {total:,} tensors of the adapter were read" if total else "some were not read"
    why = f"{of}; the model has no place for {words.few(rest, fold)}"
    return {"": Finding("", Verdict.UNREAD, rest[0], why, True, "Load it into the model that it was trained on")}


def _lost_in_casts(
    known: Record, in_files: dict[str, str], state: names.Headers, checkpoint: Checkpoint
) -> Iterator[Finding]:
    """Findings on what was read into a type that cannot hold it, or went through one: that of the layer, for one."""
    types = set(types_of(state.values()))
    if len(types | checkpoint.dtypes) < 2:
        return
    for key in sorted(known.stored):
        header, tensor = checkpoint.headers.get(in_files[key]), state[key]
        if header is None or header.shape != tensor.shape:
            continue
        if equals(tensor, values := checkpoint.tensors[in_files[key]]()) is not False:
            continue
        if header.dtype != tensor.dtype:
            yield cast_finding(key, header.dtype, tensor.dtype)
            continue
        through = next((kind for kind in types if equals(tensor, values.to(kind).to(values.dtype))), None)
        by = f"by a cast to {str(through).removeprefix('torch.')} and back" if through else "by what read it"
        yield Finding(key, Verdict.OVERWRITTEN, key, by, True)


def altered_prompts(model: Any, adapter: str, checkpoint: Checkpoint) -> list[str]:
    """What the files have of an adapter's prompts, where the model's are others once they went through an encoder."""
    from peft import get_peft_model_state_dict

    if not model.peft_config[adapter].is_prompt_learning or checkpoint.closed:
        return []
    now = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return sorted(n for n, read in checkpoint.tensors.items() if n in now and not equals(now[n], read()))


def _of_prompts(names_there: list[str]) -> Finding:
    why = (
        f"{words.few(names_there)} of the adapter was read, but the model makes other values of it: peft saves what a "
        "prompt encoder computes, not the encoder, and has read it into what goes into a new one"
    )
    return Finding("", Verdict.UNREAD, names_there[0], why, True, FOR_INFERENCE)


def of_missing(keys: Collection[str], total: int) -> str:
    """What there is to say of an adapter's tensors that its files do not have: no report of peft's names them all."""
    of = f"{len(keys):,} of {total:,} tensors of the adapter {'is' if len(keys) == 1 else 'are'}"
    what = "not in its files under their names, and kept the values that the model had"
    return f"missing, {of} {what}: {words.few(keys, fold)}"


def _as_given(adapter: str, name: str, headers: names.Headers) -> str:
    """The name in the files of what peft found no place for: peft may have put the adapter's own into it."""
    parts = name.split(".")
    own = [without(parts, place) for place, part in enumerate(parts) if part == adapter and place]
    return next((known for known in (name, *own) if known in headers), [name, *own][-1])


add(
    Seam(
        "peft.peft_model", "PeftModel", ("load_adapter",), (frozenset({"self", "model_id", "adapter_name"}),), _on_load
    ),
)
