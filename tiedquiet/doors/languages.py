"""The door of an adapter for a language: `Wav2Vec2PreTrainedModel.load_adapter`, as MMS has one for each.

It reads a file of its own (`adapter.fra.safetensors`) over what the checkpoint gave: by itself, or while the model is
loaded, if `from_pretrained` is given a `target_lang`; `tie_weights` calls it there.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tiedquiet import mode, words
from tiedquiet.doors.outcome import Outcome, carry_out, fold, outcome_of
from tiedquiet.doors.wrapping import Seam, add, bind
from tiedquiet.proof import record
from tiedquiet.proof.casts import cast_finding
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.load import Load
from tiedquiet.proof.memory import equals
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Finding, Verdict

_FORMS = (".safetensors", ".bin")
_WHERE = ("cache_dir", "token", "revision")  # what of the call's arguments says where a file of the hub lies


def _on_load(wrapped: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `load_adapter`: what it reads has its values from that file now, in place of the checkpoint's."""
    if mode.current() == "off":
        return wrapped(*args, **kwargs)
    if (load := Load.of(model)) is None:
        result = wrapped(*args, **kwargs)
        return carry_out(lambda: _judge(model, _Read(model, bind(wrapped, args, kwargs))), lambda: result)
    with load.watch.aside():
        result = wrapped(*args, **kwargs)
        try:
            _take(load, model, _Read(model, bind(wrapped, args, kwargs)))
        except Exception as error:
            load.watch.give_up(error)  # said when the load is judged
    return result


class _Read:
    """What was just read.

    Args:
        model: the model.
        given: the arguments of the call.

    Attributes:
        checkpoint: the file.
        tensors: what reads each of its tensors; none if it must not be opened.
        file: its name.
        into: what the model has under the names of the adapter.
        lost: findings on those that are not known to have the file's values.
    """

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.checkpoint = _files_of(model, given)
        self.tensors = {} if self.checkpoint.closed else self.checkpoint.tensors
        self.file = Path(self.checkpoint.files[0]).name if self.checkpoint.files else "its adapter"
        state = survey(model).state
        self.into = {key: state[key] for key in model._get_adapters()}
        lost = {key: self._lost(key, tensor) for key, tensor in self.into.items()}
        self.lost = {key: finding for key, finding in lost.items() if finding is not None}

    def _lost(self, key: str, tensor: torch.Tensor) -> Finding | None:
        values = self.tensors[key]() if key in self.tensors else None
        if values is not None and equals(tensor, values):
            return None
        if values is not None and values.dtype != tensor.dtype:
            return cast_finding(key, values.dtype, tensor.dtype, is_too_large=True)
        why = f"load_adapter read {self.file} into it, and it is not known to have that file's values"
        return Finding(key, Verdict.UNPROVEN, None, self.checkpoint.closed or why)


def _take(load: Load, model: Any, read: _Read) -> None:
    """Note what was read in the load that is in progress."""
    if was_missing := load.reading.missing & read.into.keys() - read.lost.keys():
        line = f"{words.name_of(model, model.config._name_or_path)}: reported missing but read from {read.file}: "
        words.say(logging.INFO, line + words.few(was_missing, fold))
    for key, tensor in read.into.items():
        load.reading.take(key, tensor, read.tensors.get(key), read.lost.get(key))
    load.watch.note_read(read.into)


def _judge(model: Any, read: _Read) -> Outcome:
    """Judge what was read by itself, and leave its record."""
    known = Record(set(read.into), set(), len(read.into), lasting=read.lost, files=read.checkpoint.files)
    known.tensors = record.refs_to(read.into)
    earlier = record.of(model)
    record.leave(model, known if earlier is None else known.after(earlier))
    return outcome_of(model, model.config._name_or_path, list(read.lost.values()), [], set(), len(read.into))


def _files_of(model: Any, given: dict[str, Any]) -> Checkpoint:
    """The file that was just read, which lies in the folder or in the hub's cache; no file if it is not found."""
    from transformers.utils import cached_file

    where = {key: given[key] for key in _WHERE if key in given}
    for form in _FORMS[given.get("use_safetensors") is False :]:
        with suppress(OSError):
            name = f"adapter.{given['target_lang']}{form}"
            path = cached_file(model.config._name_or_path, name, local_files_only=True, **where)
            return Checkpoint(None, [str(path)])
    return Checkpoint({})


add(
    Seam(
        "transformers.models.wav2vec2.modeling_wav2vec2",
        "Wav2Vec2PreTrainedModel",
        ("load_adapter",),
        (frozenset({"self", "target_lang"}),),
        _on_load,
    ),
)
