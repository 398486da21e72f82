"""Adapters of a Trainer's model that Trainer did not read from its checkpoint.

peft writes each adapter to a folder of its own, but that called `default`; when it takes its best model back, Trainer
looks for one in the checkpoint's folder itself.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

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
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    state = survey(model).state
    # What has no adapter's name may be several adapters' (biases of the base model).
    found = {name: names_in_files(model, name) or saved(model, name) for name in model.peft_config}
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
    model = getattr(model, "_orig_mod", model)
    now = versions(model)
    rest = [name for name in before if now.get(name) == before[name] or (is_best and name != "default")]
    if not rest:
        return None
    judged = _Rest(model, folder, before.keys() - set(rest))
    for adapter in rest:
        judged.add(adapter)
    return judged.outcome()


class _Rest:
    """Adapters that Trainer did not read, beside their files.

    Args:
        model: peft's.
        folder: the checkpoint.
        read: the adapters that Trainer did read.
    """

    def __init__(self, model: Any, folder: str, read: Collection[str]) -> None:
        self._model, self._folder = model, folder
        self._base, self._prefix = base_of(model)
        self._state = survey(model).state
        self._in_base = [key for key in self._state if key.startswith(self._prefix)]
        # What the layers share has a name above them as well.
        shared = {id(self._state[key]) for key in self._in_base}
        self._places = {*self._in_base, *(key for key, tensor in self._state.items() if id(tensor) not in shared)}
        self._read = {id(self._state[key]) for adapter in read for key in saved(model, adapter)}
        self._earlier = record.of(self._base)
        self._known = Record(set(), set(), 0, model=ref(self._base))
        self._repaired: list[Finding] = []
        self._said: list[str] = []

    def add(self, adapter: str) -> None:
        """Judge one of them."""
        known, prefix = self._known, self._prefix
        names = {key: own for key, own in saved(self._model, adapter).items() if key in self._places}
        checkpoint = found_in(str(Path(self._folder, "" if adapter == "default" else adapter)), kind="adapter_model")
        if not checkpoint.files:
            if self._earlier is not None and {key.removeprefix(prefix) for key in names} <= self._earlier.stored:
                return  # it came from somewhere else
            self._said.append(
                f"the checkpoint has no files of the adapter {adapter}, which keeps the values that it had"
            )
        elif not names and (wrong := altered_prompts(self._model, adapter, checkpoint)):
            why = f"{wrong[0]} of the adapter {adapter} was not read, {_WHY}"
            known.findings[""] = Finding("", Verdict.UNREAD, wrong[0], why, True, FOR_INFERENCE)
        known.files += checkpoint.files
        known.adapted |= {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        names |= base_s_own(checkpoint.headers, names, self._in_base)
        missing = []
        for name, own in ((name, own) for name, own in names.items() if id(self._state[name]) not in self._read):
            values = checkpoint.tensors.get(own)
            if not self._judge(adapter, name, own, values) and values is None:
                missing.append(name.removeprefix(prefix))
        if checkpoint.files and missing:
            self._said.append(of_missing(missing, len(names)))

    def _judge(self, adapter: str, name: str, own: str, values: Callable[[], torch.Tensor] | None) -> bool:
        """Note what became of one tensor, in `repair` reading it first; returns whether the model has its values."""
        key, tensor = name.removeprefix(self._prefix), self._state[name]
        finding, is_held = Finding(key, Verdict.MISSING), False
        if values is not None:
            finding, is_held = Finding(key, Verdict.UNREAD, own, _WHY, True, _CURE), bool(equals(tensor, values()))
            if not is_held and mode.current() == "repair" and copy_in_place(tensor, values()):
                is_held = True
                self._repaired.append(finding)
        if name.startswith(self._prefix):
            (self._known.stored if is_held else self._known.missing).add(key)
        else:  # prompts are no part of the base model, whose record this is
            finding = replace(finding, key="", why=f"{own} of the adapter {adapter} was not read, {_WHY}")
        if not is_held:
            self._known.findings[finding.key] = finding
        return is_held

    def outcome(self) -> Outcome | None:
        """What comes of all of them; leaves the record."""
        known = self._known
        known.total = len(known.stored) + len(known.missing)
        if not known.total and not known.findings and not self._repaired:
            return None
        known.lasting = {key: f for key, f in known.findings.items() if f.verdict is Verdict.UNREAD or not key}
        known.tensors = record.refs_to({key: self._state[self._prefix + key] for key in known.stored})
        found = list(known.findings.values())
        outcome = outcome_of(self._model, self._folder, found, self._repaired, set(), known.total)
        name = words.name_of(self._model, self._folder)
        outcome.lines += [(logging.WARNING, f"{name}: {line}") for line in self._said]
        record.leave(self._base, known if self._earlier is None else known.after(self._earlier))
        return outcome
