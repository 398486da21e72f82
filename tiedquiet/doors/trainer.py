"""The door of transformers' `Trainer`: the resume of a run, and its best model.

`save_pretrained` writes the published names. `Trainer` reads them back with `load_state_dict(..., strict=False)`,
without the renaming and conversion that `from_pretrained` applies: what has another name in the file keeps its old
values. What the files would give by transformers' own rules is compared with what was read, by names and shapes.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tiedquiet import mode, words
from tiedquiet.doors.outcome import Outcome, carry_out, conclude, fold
from tiedquiet.doors.wrapping import Seam, add, bind, stand_aside
from tiedquiet.proof import names, record
from tiedquiet.proof.files import Checkpoint, of_folder
from tiedquiet.proof.load import Load
from tiedquiet.proof.memory import plain, same
from tiedquiet.proof.reading import Reading, find_unread, in_two_files, note_unread, read
from tiedquiet.proof.record import Record
from tiedquiet.proof.repair import copy_in_place
from tiedquiet.proof.survey import Survey, survey
from tiedquiet.verdict import Finding, Verdict

_Values = Iterator[tuple[str, torch.Tensor]]

_WHY = "because Trainer reads a checkpoint without the renaming and conversion that from_pretrained applies"
_CURE = "Set TIEDQUIET=repair to read them, or give Trainer a model that from_pretrained loaded from this checkpoint"


@dataclass
class _Resume:
    """A call in progress: the folder that it reads, and whether what it read was judged."""

    folder: str
    was_judged: bool = False


_going_on: ContextVar[_Resume | None] = ContextVar("tiedquiet_resume", default=None)


def _on_resume(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer._load_from_checkpoint`."""
    return _around(wrapped, trainer, args, kwargs, args[0] if args else kwargs.get("resume_from_checkpoint"))


def _on_best_model(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer._load_best_model`."""
    return _around(wrapped, trainer, args, kwargs, getattr(trainer.state, "best_model_checkpoint", None))


def _around(
    wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], folder: object
) -> Any:
    resume = _Resume(str(folder))
    before = _going_on.set(resume)
    try:
        result = wrapped(*args, **kwargs)
    finally:
        _going_on.reset(before)
    if not resume.was_judged:
        _leave_unproven(trainer.model, folder, "FSDP" if getattr(trainer, "is_fsdp_enabled", False) else "code")
    return result


def _on_deepspeed(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `deepspeed_load_checkpoint`, by which a Trainer resumes under DeepSpeed."""
    result = wrapped(*args, **kwargs)
    bound = bind(wrapped, args, kwargs)
    _leave_unproven(getattr(bound["deepspeed_engine"], "module", None), bound["checkpoint_path"], "DeepSpeed")
    return result


def _leave_unproven(model: Any, folder: object, how: str) -> None:
    """Leave the record of a resume that went another way; adapters have their own door."""
    try:
        if mode.current() != "off" and model is not None and not _has_adapters(model):
            why = f"{folder} was read by {how}, which tiedquiet does not inspect"
            record.leave(model, Record(set(), set(), 0, lasting={"": Finding("", Verdict.UNPROVEN, None, why)}))
            words.say(logging.DEBUG, f"{words.name_of(model, folder)}: unproven: {why}")
    except Exception as error:
        stand_aside(error)  # the resume is through; under `strict` there is nothing more to stop


def _on_warnings(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer._issue_warnings_after_load`: the same for what is still true of the two lists."""

    def decide() -> Outcome | None:
        if mode.current() == "off" or _has_adapters(trainer.model):
            return None
        resume = _going_on.get() or _Resume("")
        resume.was_judged = True
        return _judge(trainer.model, resume.folder, bind(wrapped, args, kwargs)["load_result"])

    return carry_out(decide, wrapped, args, kwargs)


def _judge(model: Any, folder: str, loaded: Any) -> Outcome:
    reading, mended, held = _read(model, folder, set(loaded.missing_keys), set(loaded.unexpected_keys))
    load = Load(model, reading, is_resumed=True)
    load.mended = mended
    outcome = conclude(load, model, folder or "the Trainer's checkpoint", set(loaded.missing_keys), in_place=True)
    if rows := outcome.missing & held:
        outcome.missing -= held
        what = (
            f"reported missing, but the model already holds what the checkpoint stores: {words.few(sorted(rows), fold)}"
        )
        outcome.lines.append((logging.INFO, f"{words.name_of(model, folder)}: {what}"))
    names_read = {name for key in (*held, *(finding.key for finding in mended)) for name in reading.names_of(key)}
    left = [key for key in loaded.missing_keys if key in outcome.missing]
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    if set(loaded.missing_keys) == ignored:
        left = list(loaded.missing_keys)  # for exactly that set the Trainer ties again, and prints nothing
    elif left and outcome.missing == ignored:
        # The Trainer would take what is left for that set, and print nothing.
        what = "not in the checkpoint, because the model's _keys_to_ignore_on_save leaves them out"
        outcome.lines.append((logging.WARNING, f"{words.name_of(model, '')}: {what}: {left}"))
    unexpected = [name for name in loaded.unexpected_keys if name not in names_read]
    outcome.arguments = {"load_result": loaded._replace(missing_keys=left, unexpected_keys=unexpected)}
    return outcome


def _read(model: Any, folder: str, missing: set[str], unexpected: set[str]) -> tuple[Reading, list[Finding], set[str]]:
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


def _has_adapters(model: Any) -> bool:
    """Whether peft wrapped the model: its adapters have their own door."""
    return isinstance(getattr(model, "peft_config", None), dict) and not isinstance(model, _model_class())


def _model_class() -> type:
    from transformers import PreTrainedModel

    return PreTrainedModel  # type: ignore[no-any-return]


add(
    Seam(
        "transformers.trainer",
        "Trainer",
        ("_load_from_checkpoint",),
        (frozenset({"resume_from_checkpoint"}),),
        _on_resume,
    ),
    Seam(
        "transformers.integrations.deepspeed",
        "",
        ("deepspeed_load_checkpoint",),
        (frozenset({"deepspeed_engine", "checkpoint_path"}),),
        _on_deepspeed,
    ),
    Seam("transformers.trainer", "Trainer", ("_load_best_model",), (frozenset({"self"}),), _on_best_model),
    Seam(
        "transformers.trainer", "Trainer", ("_issue_warnings_after_load",), (frozenset({"load_result"}),), _on_warnings
    ),
)
