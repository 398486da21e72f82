"""Adapters of a Trainer's model that Trainer did not read from its checkpoint.

peft writes each adapter to a folder of its own, but that called `default`; when it takes its best model back, Trainer
looks for one in the checkpoint's folder itself.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiedquiet import mode, words
from tiedquiet.doors.adapter_files import FOR_INFERENCE, altered_prompts, of_missing
from tiedquiet.doors.outcome import Outcome, outcome_of
from tiedquiet.proof import record
from tiedquiet.proof.adapted import base_of, base_s_own, names_in_files, saved
from tiedquiet.proof.files import found_in
from tiedquiet.proof.memory import equals
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
    model = record.uncompiled(model)
    state = survey(model).state
    # What has no adapter's name may be several adapters' (biases of the base model).
    found = {name: names_in_files(model, name) or saved(model, name) for name in model.peft_config}
    return {
        name: {key: (id(state[key]), version_of(state[key])) for key in keys} for name, keys in found.items() if keys
    }


def judge_rest(model: Any, folder: str, before: Versions, told: Collection[str], is_best: bool) -> Outcome | None:
    """Compare what Trainer did not read into a model's adapters with their files, and leave the record.

    Args:
        model: peft's.
        folder: the checkpoint.
        before: the versions of the adapters' tensors before Trainer read it.
        told: the names of those of which their own door has told what became of them.
        is_best: whether it reads its best model: then it gives what it finds in the folder to the active adapter.
    """
    model = record.uncompiled(model)
    now = versions(model)
    left = {name for name in before if now.get(name) == before[name]} - set(told)
    rest = [name for name in before if name in left or (is_best and name != "default")]
    if not rest:
        return None
    judged = _Adapters(model, folder, before.keys() - set(rest))
    for adapter in rest:
        judged.judge(adapter)
    return judged.outcome()


class _Adapters:
    """Adapters of a model that Trainer did not read, beside the files that a checkpoint has of them.

    Args:
        model: peft's.
        folder: the checkpoint.
        others: the adapters that it did read.
    """

    def __init__(self, model: Any, folder: str, others: Collection[str]) -> None:
        self._model, self._folder = model, folder
        self._base, self._prefix = base_of(model)
        self._state, self._earlier = survey(model).state, record.of(self._base)
        self._read = {id(self._state[key]) for adapter in others for key in saved(model, adapter)}
        self._in_base = {key: id(tensor) for key, tensor in self._state.items() if key.startswith(self._prefix)}
        self._known = Record(set(), set(), 0)
        self._repaired: list[Finding] = []
        self._lines: list[tuple[int, str]] = []

    def judge(self, adapter: str) -> None:
        """Compare one of them; what `repair` reads is read now."""
        known, prefix = self._known, self._prefix
        checkpoint = found_in(str(Path(self._folder, "" if adapter == "default" else adapter)), kind="adapter_model")
        ids = set(self._in_base.values())
        own = saved(self._model, adapter)
        # What the layers share has a name above them as well.
        names = {key: n for key, n in own.items() if key in self._in_base or id(self._state[key]) not in ids}
        if not checkpoint.files:
            if self._earlier is not None and {key.removeprefix(prefix) for key in names} <= self._earlier.stored:
                return  # it came from somewhere else
            self._warn(f"the checkpoint has no files of the adapter {adapter}, which keeps the values that it had")
        elif wrong := sorted(set(altered_prompts(self._model, adapter, checkpoint)) - set(names.values())):
            why = f"{wrong[0]} of the adapter {adapter} was not read, {_WHY}"
            known.findings[""] = Finding("", Verdict.UNREAD, wrong[0], why, True, FOR_INFERENCE)
        known.files += checkpoint.files
        known.adapted |= {key.removeprefix(prefix) for key in names.keys() & self._in_base.keys()}
        names |= base_s_own(checkpoint.headers, names, self._in_base)
        missing = []
        for key, name in ((key, n) for key, n in names.items() if id(self._state[key]) not in self._read):
            read = checkpoint.tensors.get(name)
            self._compare(adapter, key, name, read)
            missing += [key.removeprefix(prefix)] if read is None else []
        if checkpoint.files and missing:
            self._warn(of_missing(missing, len(names)))

    def _compare(self, adapter: str, key: str, name: str, read: Callable[[], torch.Tensor] | None) -> None:
        """Compare a tensor with what the files have under its name, if they have that."""
        tensor, own_key = self._state[key], key.removeprefix(self._prefix)
        finding = Finding(own_key, Verdict.MISSING)
        if read is not None:
            finding = Finding(own_key, Verdict.UNREAD, name, _WHY, True, _CURE)
        is_held = read is not None and bool(equals(tensor, read()))
        if read is not None and not is_held and mode.current() == "repair" and copy_in_place(tensor, read()):
            self._repaired.append(finding)
            is_held = True
        if key in self._in_base:
            (self._known.stored if is_held else self._known.missing).add(own_key)
        else:  # prompts are no part of the base model, whose record this is
            finding = replace(finding, key="", why=f"{name} of the adapter {adapter} was not read, {_WHY}")
        if not is_held:
            self._known.findings[finding.key] = finding

    def outcome(self) -> Outcome | None:
        """What it has come to; leaves the record."""
        known, earlier = self._known, self._earlier
        known.total = len(known.stored) + len(known.missing)
        if not known.total and not known.findings and not self._repaired:
            return None
        known.lasting = {key: f for key, f in known.findings.items() if f.verdict is Verdict.UNREAD or not key}
        known.tensors = record.refs_to({key: self._state[self._prefix + key] for key in known.stored})
        outcome = outcome_of(
            self._model, self._folder, list(known.findings.values()), self._repaired, set(), known.total
        )
        outcome.lines += self._lines
        record.leave(self._base, known if earlier is None else known.after(earlier))
        return outcome

    def _warn(self, what: str) -> None:
        self._lines.append((logging.WARNING, f"{words.name_of(self._model, self._folder)}: {what}"))
