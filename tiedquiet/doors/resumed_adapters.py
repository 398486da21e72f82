"""Adapters of a Trainer's model that Trainer did not read from its checkpoint.

peft writes each adapter to a folder of its own, but that called `default`; when it takes its best model back, Trainer
looks for one in the checkpoint's folder itself.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

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
    base, prefix = base_of(model)
    state, earlier = survey(model).state, record.of(base)
    own = {adapter: saved(model, adapter) for adapter in before}
    read = {id(state[key]) for adapter in before.keys() - set(rest) for key in own[adapter]}
    in_base_names = [key for key in state if key.startswith(prefix)]
    in_base = {id(state[key]) for key in in_base_names}
    known, repaired, lines = Record(set(), set(), 0, model=ref(base)), [], []
    for adapter in rest:
        # What the layers share has a name above them as well.
        names = {key: n for key, n in own[adapter].items() if key.startswith(prefix) or id(state[key]) not in in_base}
        checkpoint = found_in(str(Path(folder, "" if adapter == "default" else adapter)), kind="adapter_model")
        if not checkpoint.files:
            if earlier is not None and {key.removeprefix(prefix) for key in names} <= earlier.stored:
                continue  # it came from somewhere else
            what = f"the checkpoint has no files of the adapter {adapter}, which keeps the values that it had"
            lines.append((logging.WARNING, f"{words.name_of(model, folder)}: {what}"))
        elif not names and (wrong := altered_prompts(model, adapter, checkpoint)):
            why = f"{wrong[0]} of the adapter {adapter} was not read, {_WHY}"
            known.findings[""] = Finding("", Verdict.UNREAD, wrong[0], why, True, FOR_INFERENCE)
        known.files += checkpoint.files
        known.adapted |= {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        names |= base_s_own(checkpoint.headers, names, in_base_names)
        missing = []
        for name, own_name in ((name, n) for name, n in names.items() if id(state[name]) not in read):
            key, values = name.removeprefix(prefix), checkpoint.tensors.get(own_name)
            finding = Finding(key, Verdict.MISSING)
            if values is not None:
                finding = Finding(key, Verdict.UNREAD, own_name, _WHY, True, _CURE)
            is_held = values is not None and bool(equals(state[name], values()))
            if values is not None and not is_held and mode.current() == "repair":
                is_held = copy_in_place(state[name], values())
                repaired += [finding] if is_held else []
            if name.startswith(prefix):
                (known.stored if is_held else known.missing).add(key)
            elif not is_held:  # prompts are no part of the base model, whose record this is
                finding = replace(finding, key="", why=f"{own_name} of the adapter {adapter} was not read, {_WHY}")
            if not is_held:
                known.findings[finding.key] = finding
                missing += [key] if values is None else []
        if checkpoint.files and missing:
            lines.append((logging.WARNING, f"{words.name_of(model, folder)}: {of_missing(missing, len(names))}"))
    known.total = len(known.stored) + len(known.missing)
    if not known.total and not known.findings and not repaired:
        return None
    known.lasting = {key: f for key, f in known.findings.items() if f.verdict is Verdict.UNREAD or not key}
    known.tensors = record.refs_to({key: state[prefix + key] for key in known.stored})
    outcome = outcome_of(model, folder, list(known.findings.values()), repaired, set(), known.total)
    outcome.lines += lines
    record.leave(base, known if earlier is None else known.after(earlier))
    return outcome
