"""The door of transformers' `Trainer`: the resume of a run, and its best model.

`save_pretrained` writes the published names. `Trainer` reads them back with `load_state_dict(..., strict=False)`,
without the renaming and conversion that `from_pretrained` applies: what has another name in the file keeps its old
values. What the files would give by transformers' own rules is compared with what was read, by names and shapes.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from tiedquiet import mode, words
from tiedquiet.doors.adapters import judged
from tiedquiet.doors.folder import Inside, inside
from tiedquiet.doors.outcome import Outcome, carry_out, conclude, fold, outcome_of
from tiedquiet.doors.resumed import came_from, read_folder, without_a_place
from tiedquiet.doors.resumed_adapters import has_adapters, judge_rest, versions
from tiedquiet.doors.wrapping import Seam, add, bind, guarded, wrap_overrides
from tiedquiet.proof import record
from tiedquiet.proof.adapted import base_of
from tiedquiet.proof.files import found_in
from tiedquiet.proof.load import Load
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import Record, stored_name
from tiedquiet.verdict import Finding, Verdict


@dataclass
class _Resume:
    """A call in progress.

    Attributes:
        folder: what it reads.
        trainer: who reads it; None where somebody only tells what was missing.
        is_best: whether for its best model.
        was_judged: whether what it read was judged.
        is_telling: whether what follows from that is being carried out.
        other: the model that it is read into, if not into the trainer's own.
        is_by_trainer: whether transformers' own code is reading just now, and not an override: that may read any file.
        said: what the model's own `load_state_dict` has said in it: the keys that no call of it found, and the names
            that one of them had no place for.
    """

    folder: str
    trainer: Any = None
    is_best: bool = False
    other: Any = None
    is_by_trainer: bool = False
    was_judged: bool = False
    is_telling: bool = False
    said: tuple[set[str], set[str]] | None = None

    def hear(self, keys: Any) -> None:
        """Take in what a call of it says."""
        missing, unexpected = set(keys.missing_keys), set(keys.unexpected_keys)
        self.said = (missing, unexpected) if self.said is None else (self.said[0] & missing, self.said[1] | unexpected)

    def model(self, trainer: Any) -> Any:
        """What it is read into; an override may have given the trainer another model since."""
        return getattr(trainer, "model", None) if self.other is None else self.other

    def known_by(self, trainer: Any) -> Any:
        """What has the record of that: the trainer's own model has it itself, and not what wraps it."""
        model = self.model(trainer)
        return getattr(trainer, "model", None) if model is getattr(trainer, "model_wrapped", None) else model


class _Ear:
    """A hook of torch's that hears what `load_state_dict` says. A copy of the model, or its pickle, has a deaf one."""

    def __init__(self, resume: _Resume) -> None:
        self._resume = resume

    def __call__(self, _: object, keys: Any) -> None:
        self._resume.hear(keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes whatever it is given, and returns nothing


_going_on: ContextVar[_Resume | None] = ContextVar("tiedquiet_resume", default=None)


def _on_init(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer.__init__`: what a class of the user's overrides is guarded as well."""
    with suppress(Exception):
        owner = sys.modules["transformers.trainer"].Trainer
        for seam in _READS:
            wrap_overrides(type(trainer), owner, seam.names[0], seam.hook)
    return wrapped(*args, **kwargs)


def _on_resume(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer._load_from_checkpoint`."""
    folder, other = [*args, None, None][:2]
    folder, other = kwargs.get("resume_from_checkpoint", folder), kwargs.get("model", other)
    return _around(wrapped, trainer, args, kwargs, _Resume(str(folder), trainer, other=other))


def _on_best_model(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer._load_best_model`."""
    folder = getattr(trainer.state, "best_model_checkpoint", None)
    return _around(wrapped, trainer, args, kwargs, _Resume(str(folder), trainer, is_best=True))


def _around(
    wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], resume: _Resume
) -> Any:
    is_by_trainer = getattr(wrapped, "__module__", None) == "transformers.trainer"
    outer = _going_on.get()
    if outer is not None and outer.trainer is trainer:  # an override has called what it overrides
        outer.folder, outer.other = resume.folder, resume.other
        outer.is_by_trainer, of_override = is_by_trainer, outer.is_by_trainer
        try:
            return wrapped(*args, **kwargs)
        finally:
            outer.is_by_trainer = of_override
    resume.is_by_trainer = is_by_trainer
    known = record.of(resume.known_by(trainer))
    # Under FSDP and DeepSpeed nothing shows whether anything is read into an adapter.
    adapters, failure = guarded(lambda: {} if _is_parted(trainer) else versions(resume.known_by(trainer)))
    told = set[str]()
    told_before = judged.get()
    try:
        _going_on.set(resume)  # in the `try`, as an interrupt comes between any two calls
        judged.set(told)
        with _listening(trainer, resume):
            result = wrapped(*args, **kwargs)
    finally:
        _going_on.set(outer)
        judged.set(told_before)
    model = resume.known_by(trainer)
    if not resume.was_judged and record.of(model) is known:  # nor did another door judge it
        is_fsdp = getattr(trainer, "is_fsdp_enabled", False)
        by = "FSDP" if is_fsdp else f"{type(trainer).__name__}'s own code"
        # The resume is through: what fails here has nothing more to stop, under `strict` either.
        guarded(lambda: _leave_unproven(model, resume.folder, by, is_parted=is_fsdp))
        carry_out(partial(_judge_said, model, resume), lambda: None)
    if failure is not None:
        raise failure
    if not adapters:
        return result
    return carry_out(lambda: judge_rest(model, resume.folder, adapters, told, resume.is_best), lambda: result)


@contextmanager
def _listening(trainer: Any, resume: _Resume) -> Iterator[None]:
    """Hear what the model's `load_state_dict` says, since an override of the user's may call it and pass nothing on."""
    hook: Any = None
    with suppress(Exception):
        model = resume.known_by(trainer)
        if mode.current() != "off" and not _is_parted(trainer) and not has_adapters(model):
            hook = inside(model).model.register_load_state_dict_post_hook(_Ear(resume))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _is_parted(trainer: Any) -> bool:
    """Whether FSDP or DeepSpeed have parted the model's tensors."""
    return any(getattr(trainer, f"is_{which}_enabled", False) for which in ("fsdp", "deepspeed"))


def _on_deepspeed(wrapped: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `deepspeed_load_checkpoint`, by which a Trainer resumes under DeepSpeed."""
    result = wrapped(*args, **kwargs)
    bound = bind(wrapped, args, kwargs)
    guarded(lambda: _leave_unproven(bound["deepspeed_engine"].module, bound["checkpoint_path"], "DeepSpeed"))
    return result


def _leave_unproven(model: Any, folder: object, by: str, is_parted: bool = True) -> None:
    """Leave the record of a resume that went another way; adapters have their own door, if their files were read."""
    if mode.current() == "off" or (not is_parted and has_adapters(model)):
        return
    why = f"{folder} was read by {by}, which tiedquiet does not inspect"
    if not is_parted and not found_in(str(folder)).files:
        why = f"{folder} has no file that Trainer reads; what else was read of it, tiedquiet does not inspect"
    base = base_of(model)[0] if has_adapters(model) else model
    record.leave(base, Record(set(), set(), 0, lasting={"": Finding("", Verdict.UNPROVEN, None, why)}))
    words.say(logging.DEBUG, f"{words.name_of(model, folder)}: unproven: {why}")


def _on_warnings(wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `Trainer._issue_warnings_after_load`: the same for what is still true of the two lists."""
    resume = _going_on.get()
    if resume is None or resume.trainer is not trainer:
        resume = _Resume("")
    if resume.is_telling:  # an override has called what it overrides, with lists that are judged
        return wrapped(*args, **kwargs)

    def decide() -> Outcome | None:
        if mode.current() == "off":
            return None
        model, loaded = resume.model(trainer), (*args, *kwargs.values())[0]  # an override may call it by another name
        if resume.folder and not resume.is_by_trainer and not _is_of_folder(model, resume.folder, loaded):
            return None  # no more is known than what its `load_state_dict` has said
        resume.was_judged = True
        if resume.is_best and has_adapters(model):
            return None  # then peft's `load_adapter` has read it, which is a door of its own
        return _judge(model, resume, loaded)

    def tell(*given: Any, load_result: Any = None) -> Any:
        return wrapped(*(given or (load_result,)))

    before = _going_on.get()
    try:
        _going_on.set(resume)
        resume.is_telling = True
        return carry_out(decide, tell, *args, **kwargs)
    finally:
        _going_on.set(before)
        resume.is_telling = False


def _judge(whole: Any, resume: _Resume, loaded: Any) -> Outcome:
    of, folder = inside(whole), resume.folder
    model, missing = of.model, {key.removeprefix(of.path) for key in loaded.missing_keys}
    reading, mended, held = read_folder(of, folder, set(missing), set(loaded.unexpected_keys), is_best=resume.is_best)
    load = Load(model, reading, is_resumed=True)
    load.mended, load.where, load.reported = mended, folder or "the Trainer's checkpoint", missing
    outcome = conclude(load, model)
    _leave_inside(of)
    if rows := outcome.missing & held:
        outcome.missing -= held
        what = (
            f"reported missing, but the model already holds what the checkpoint stores: {words.few(sorted(rows), fold)}"
        )
        outcome.lines.append((logging.INFO, f"{words.name_of(model, folder)}: {what}"))
    names_read = {name for origin in reading.made_of().values() for name in origin.names}
    left = [key for key in loaded.missing_keys if key.removeprefix(of.path) in outcome.missing]
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    if set(loaded.missing_keys) == ignored:
        left = list(loaded.missing_keys)  # for exactly that set the Trainer ties again, and prints nothing
    elif left and set(left) == ignored:
        # The Trainer would take what is left for that set, and print nothing.
        what = "not in the checkpoint, because the model's _keys_to_ignore_on_save leaves them out"
        outcome.lines.append((logging.WARNING, f"{words.name_of(model, '')}: {what}: {left}"))
    unexpected = [name for name in loaded.unexpected_keys if names_read.isdisjoint((name, stored_name(name)))]
    outcome.arguments = {"load_result": loaded._replace(missing_keys=left, unexpected_keys=unexpected)}
    return outcome


def _is_of_folder(whole: Any, folder: str, loaded: Any) -> bool:
    """Whether what an override of the user's has read is what the files of its folder have, to the bit."""
    of = inside(whole)
    missing = {key.removeprefix(of.path) for key in loaded.missing_keys}
    return came_from(of, folder, missing, set(loaded.unexpected_keys))


def _judge_said(whole: Any, resume: _Resume) -> Outcome | None:
    """What an override has left unread, by what `load_state_dict` said in it; of all else nothing is known."""
    if resume.said is None or not resume.said[0]:
        return None
    of = inside(whole)
    missing = {key.removeprefix(of.path) for key in resume.said[0]}
    # Some take out what has no place before they call it.
    unexpected = resume.said[1] | without_a_place(of, resume.folder)
    # Where nothing was without a place, what the rest of the files would make may have been put to use: a scale.
    only = None if resume.said[1] else missing
    reading, mended, _ = read_folder(of, resume.folder, set(missing), unexpected, may_write=False)
    # Where the code may have read other files, weights averaged over time for one, nothing of these is put beside them.
    is_repair = mode.current() == "repair"
    if is_repair and _unread_in(reading, only) and came_from(of, resume.folder, missing, unexpected):
        reading, mended, _ = read_folder(of, resume.folder, set(missing), unexpected)
    unread = _unread_in(reading, only)
    (record.of(whole) or Record(set(), set(), 0)).lasting.update(unread)
    return outcome_of(of.model, resume.folder, list(unread.values()), mended, set(), reading.total)


def _unread_in(reading: Reading, known_missing: set[str] | None) -> dict[str, Finding]:
    return {
        key: found
        for key, found in reading.found.items()
        if found.verdict is Verdict.UNREAD and (known_missing is None or key in known_missing)
    }


def _leave_inside(of: Inside) -> None:
    """Leave the record on the model inside as well, and under the names that its tensors had before peft came."""
    known, as_loaded = record.of(of.model) or Record(set(), set(), 0), of.as_loaded
    record.leave(of.core, known.renamed(lambda key: as_loaded(key) if key.startswith(of.at) else None))


_READS = tuple(
    Seam("transformers.trainer", "Trainer", (name,), (frozenset({parameter}),), hook, has_overrides=True)
    for name, parameter, hook in (
        ("_load_from_checkpoint", "resume_from_checkpoint", _on_resume),
        ("_load_best_model", "self", _on_best_model),
        ("_issue_warnings_after_load", "load_result", _on_warnings),
    )
)
add(
    Seam("transformers.trainer", "Trainer", ("__init__",), (frozenset({"model", "args"}),), _on_init),
    *_READS,
    Seam(
        "transformers.integrations.deepspeed",
        "",
        ("deepspeed_load_checkpoint",),
        (frozenset({"deepspeed_engine", "checkpoint_path"}),),
        _on_deepspeed,
    ),
)
