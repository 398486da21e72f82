"""Adapters of a Trainer's model that Trainer did not read from its checkpoint.

peft writes each adapter to a folder of its own, but that called `default`; when it takes its best model back, Trainer
looks for one in the checkpoint's folder itself.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import ref

from tiedquiet import mode, words
from tiedquiet.doors.outcome import Outcome, told
from tiedquiet.proof import record
from tiedquiet.proof.adapted import names_in_files
from tiedquiet.proof.files import Checkpoint, of_folder
from tiedquiet.proof.memory import plain, same
from tiedquiet.proof.placeholders import version_of
from tiedquiet.proof.record import Record
from tiedquiet.proof.repair import copy_in_place
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Finding, Verdict

_WHY = "because Trainer read no adapter, or another"
_CURE = "Set TIEDQUIET=repair to read them, or call the model's load_adapter for each adapter's folder"

Versions = Mapping[str, Mapping[str, tuple[int, int]]]


def has_adapters(model: Any) -> bool:
    """Whether peft wrapped the model: its adapters have their own door."""
    from transformers import PreTrainedModel

    return isinstance(getattr(model, "peft_config", None), dict) and not isinstance(model, PreTrainedModel)


def versions(model: Any) -> Versions:
    """For each adapter the versions of its tensors, by which is seen whether anything is written to them."""
    if mode.current() == "off" or not has_adapters(model):
        return {}
    base = model.get_base_model()
    state = survey(base).state
    adapters = (name for name, config in model.peft_config.items() if not config.is_prompt_learning)
    found = {name: names_in_files(base, name) for name in adapters}  # prompts are no part of the base model
    return {
        name: {key: (id(state[key]), version_of(state[key])) for key in keys} for name, keys in found.items() if keys
    }


def judge_rest(model: Any, folder: str, before: Versions, is_best: bool) -> Outcome | None:
    """Compare what Trainer did not read into a model's adapters with their files, and leave the record.

    Args:
        model: peft's.
        folder: the checkpoint.
        before: the versions of the adapters' tensors before Trainer read it.
        is_best: whether it reads its best model: then it gives what it finds in the folder to the active adapter.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    now = versions(model)
    rest = [name for name in before if now.get(name) == before[name] or (is_best and name != "default")]
    if not rest:
        return None
    base = model.get_base_model()
    prefix = next(name for name, module in model.named_modules() if module is base) + "."
    state, earlier = survey(base).state, record.of(base)
    known, repaired, lines = Record(set(), set(), 0), [], []
    for adapter in rest:
        keys = names_in_files(base, adapter)
        checkpoint = _files(folder, adapter)
        if checkpoint is None and earlier is not None and keys.keys() <= earlier.stored:
            continue  # it came from somewhere else
        if checkpoint is None:
            what = f"the checkpoint has no files of the adapter {adapter}, which keeps the values that it had"
            lines.append((logging.WARNING, f"{words.name_of(model, folder)}: {what}"))
        known.files += checkpoint.files if checkpoint else []
        for key, own in keys.items():
            values = checkpoint.tensors.get(prefix + own) if checkpoint else None
            finding = Finding(key, Verdict.MISSING)
            if values is not None:
                finding = Finding(key, Verdict.UNREAD, prefix + own, _WHY, True, _CURE)
            pieces = plain(state[key])
            if values is not None and len(pieces) == 1 and same(pieces[0], values()):
                known.stored.add(key)
            elif values is not None and mode.current() == "repair" and copy_in_place(state[key], values()):
                known.stored.add(key)
                repaired.append(finding)
            else:
                known.missing.add(key)
                known.settled[key] = finding
    if not known.stored and not known.missing:
        return None
    known.total = len(known.stored) + len(known.missing)
    known.lasting = {key: finding for key, finding in known.settled.items() if finding.verdict is Verdict.UNREAD}
    known.tensors = {key: ref(state[key]) for key in known.stored}
    outcome = told(model, folder, list(known.settled.values()), repaired, set(), known.total)
    outcome.lines += lines
    record.leave(base, known if earlier is None else known.after(earlier))
    return outcome


def _files(folder: str, adapter: str) -> Checkpoint | None:
    """The files that peft has written of an adapter; None where there are none that can be read."""
    try:
        checkpoint = of_folder(str(Path(folder, "" if adapter == "default" else adapter)), kind="adapter_model")
        checkpoint.tensors  # noqa: B018 (it opens the files)
    except Exception:
        return None
    return checkpoint
