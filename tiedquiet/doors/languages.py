"""The door of an adapter for a language: `Wav2Vec2PreTrainedModel.load_adapter`, as MMS has one for each.

It reads a file of its own (`adapter.fra.safetensors`) over what the checkpoint gave: by itself, or while the model is
loaded, if `from_pretrained` is given a `target_lang`; `tie_weights` calls it there.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from tiedquiet import mode, words
from tiedquiet.doors.outcome import fold
from tiedquiet.doors.wrapping import Seam, add, bind, stand_aside
from tiedquiet.proof import record
from tiedquiet.proof.casts import cast_finding
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.load import Load
from tiedquiet.proof.memory import equals
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Finding, LoadError, Verdict

_FORMS = (".safetensors", ".bin")
_WHERE = ("cache_dir", "token", "revision")  # what of the call's arguments says where a file of the hub lies


def _on_load(wrapped: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `load_adapter`: what it reads has its values from that file now, in place of the checkpoint's."""
    if mode.current() == "off":
        return wrapped(*args, **kwargs)
    load = Load.of(model)
    failure: LoadError | None = None
    with load.watch.aside() if load is not None else nullcontext():
        result = wrapped(*args, **kwargs)
        try:
            _note(model, load, bind(wrapped, args, kwargs))
        except Exception as error:
            if load is not None:
                load.watch.give_up(error)  # said when the load is judged
            else:
                failure = stand_aside(error)
    if failure is not None:
        raise failure
    return result


def _note(model: Any, load: Load | None, given: dict[str, Any]) -> None:
    """Note what was read, in the load that is in progress or in a record of its own."""
    checkpoint = _files_of(model, given)
    tensors = {} if checkpoint.closed else checkpoint.tensors
    file, state = Path(checkpoint.files[0]).name if checkpoint.files else "its adapter", survey(model).state
    read = {key: state[key] for key in model._get_adapters()}
    held = {key for key, tensor in read.items() if key in tensors and equals(tensor, tensors[key]())}
    lost = {key: _lost(key, read[key], tensors.get(key), checkpoint.closed, file) for key in read.keys() - held}
    if load is None:
        earlier, known = record.of(model), Record(set(read), set(), len(read), lasting=lost, files=checkpoint.files)
        known.tensors = record.refs_to(read)
        record.leave(model, known if earlier is None else known.after(earlier))
        return
    if was_missing := held & load.reading.missing:
        line = f"{words.name_of(model, model.config._name_or_path)}: reported missing but read from {file}: "
        words.say(logging.INFO, line + words.few(was_missing, fold))
    for key in read:
        load.take(key, read[key], tensors.get(key), lost.get(key))


def _lost(key: str, tensor: torch.Tensor, values: Any, closed: str, file: str) -> Finding:
    """The finding on a tensor that is not known to have the values that the file has for it."""
    if values is not None and values().dtype != tensor.dtype:
        return cast_finding(key, values().dtype, tensor.dtype, is_too_large=True)
    why = closed or f"load_adapter read {file} into it, and it is not known to have that file's values"
    return Finding(key, Verdict.UNPROVEN, None, why)


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
