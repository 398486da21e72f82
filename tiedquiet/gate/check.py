"""Checks a folder or a model on the hub: its one model, or each component of a pipeline."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiedquiet.gate import bare, classes, components, diffusion, from_file, load, lora, sentences
from tiedquiet.gate.components import Entry
from tiedquiet.gate.load import How
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.report import Result
from tiedquiet.gate.source import Source
from tiedquiet.gate.weights import has_variant, has_weights

_NO_LORA = "{} is not a model of diffusers, which --lora is for; a peft adapter is a folder"


def check(
    name: str, revision: str | None, cls: str | None, how: How, config: str | None = None
) -> tuple[list[Result], bool]:
    """Check what a name stands for.

    Args:
        name: a folder, a `.gguf` file, a model's name on the hub, or a single file of weights.
        revision: branch, tag or commit on the hub; of a single file that of its config.
        cls: the class to load it as; None for the one that it names.
        how: how to load it.
        config: where the config of a single file lies, a folder or a model's name on the hub.

    Returns:
        The result for each component, and whether it is a pipeline.

    Raises:
        CannotCheck: nothing of it can be checked.
    """
    if config is None and os.path.isfile(name) and not name.endswith(".gguf"):
        raise CannotCheck(from_file.no_config(name))
    if config is not None:
        if not classes.has_diffusers():
            raise CannotCheck("--config needs diffusers, which is not installed")
        results, is_pipeline = from_file.check(name, config, revision, cls, how, lambda s, e: _component(s, e, how))
        return (_all(name, results) if is_pipeline else results), is_pipeline
    source = Source(name, revision)
    is_pipeline = components.is_pipeline(source)
    if how.is_resume and (is_pipeline or source.gguf or source.file("trainer_state.json") is None):
        raise CannotCheck(f"{name} has no trainer_state.json, so it is not a Trainer's checkpoint; leave out --resume")
    if not is_pipeline and cls is None and not how.is_resume and sentences.is_one(source):
        if how.lora:
            raise CannotCheck(_NO_LORA.format(name))
        return [*_all(name, found := sentences.check(source, how)), *_beside_index(source, found, how)], True
    if not is_pipeline:
        part = components.the_part(source, cls, how.trust)
        if kind := components.class_of_diffusers(part):
            file = _lora_of(how)
            result = diffusion.check_model(part, kind, how)
            return [result] if file is None else [result, lora.check_model(part, kind, file, how)], False
        if how.lora:
            raise CannotCheck(_NO_LORA.format(name))
        return [load.check_model(part, how)], False
    if cls:
        raise CannotCheck(f"{name} is a pipeline of several models; --class is for a folder of one model")
    file = _lora_of(how)
    entries = components.entries_of(source)
    hows = _by_variant(source, entries, how)
    results = [_component(source, entry, hows[entry.name]) for entry in entries]
    results += [_lacking(*lacking) for lacking in components.lacking(source)]
    results = _all(name, sorted(results, key=lambda result: result.component))
    results += _beside_index(source, results, how)
    return results if file is None else [*results, lora.check_pipeline(source, file, how)], True


def _all(name: str, results: list[Result]) -> list[Result]:
    """What came out for all components; raises where nothing could be checked."""
    looked_at = [result for result in results if result.has_tensors and result.is_component]
    if all(result.error for result in looked_at):
        why = f"{looked_at[0].component}: {looked_at[0].error}" if looked_at else "it has no model"
        raise CannotCheck(f"{name}: no part of this pipeline can be checked: {why}")
    return results


def _beside_index(source: Source, results: list[Result], how: How) -> list[Result]:
    """The model that lies beside an index of others: transformers reads it from the same folder, and no index."""
    if any(result.component == "." for result in results) or not source.is_local:
        return []
    if any(Path(file).parent == source.folder() for result in results for file in result.files):
        return []  # a component was read from there
    if source.file("config.json") is None or not has_weights(source.folder()):
        return []
    how = how if how.variant and has_variant(source, "", how.variant) else replace(how, variant="")
    try:
        part = components.the_part(source, None, how.trust)
        kind = components.class_of_diffusers(part)
        result = load.check_model(part, how) if kind is None else diffusion.check_model(part, kind, how)
    except CannotCheck as error:
        return [Result(".", "a model of its own", error=str(error))]
    return [replace(result, component=".")]


def _lacking(part: str, cls: str, said: str, is_wrong: bool) -> Result:
    if is_wrong:
        return Result(part, cls, error=said)
    return Result(part, cls, notes=[said], has_tensors=False, is_component=False)


def _lora_of(how: How) -> Any:
    return lora.read(how.lora, how.trust) if how.lora else None


def _by_variant(source: Source, entries: list[Entry], how: How) -> dict[str, How]:
    """How each component is loaded: those that lack a variant are loaded without it, as diffusers does."""
    if not how.variant:
        return {entry.name: how for entry in entries}
    places = {entry.name: source.place_of(entry.name, "config.json") for entry in entries}
    having = {name for name, place in places.items() if has_variant(source, place, how.variant)}
    if not having:
        raise CannotCheck(f"{source.name}: no component of this pipeline has weights of variant {how.variant}")
    return {entry.name: how if entry.name in having else replace(how, variant="") for entry in entries}


def _component(source: Source, entry: Entry, how: How) -> Result:
    """The result for one component; that it cannot be checked is a result here, and the others are checked."""
    name = entry.cls if isinstance(entry.cls, str) else repr(entry.cls)
    try:
        kind = components.class_of(entry)
        if classes.is_of_diffusers(kind):
            result = diffusion.check_model(components.part_of(source, entry, how.trust), kind, how)
            return replace(result, component=entry.name)
        if classes.is_of_transformers(kind):
            result = load.check_model(components.part_of(source, entry, how.trust), how, kind)
            return replace(result, component=entry.name)
        if classes.is_module(kind):
            raise CannotCheck(f"{name} is neither a model of transformers nor one of diffusers")
        bare.check(source, entry, kind)
    except CannotCheck as error:
        said = str(error).removeprefix(f"{source.name}/{entry.name} ").removeprefix(f"{source.name} ")
        return Result(entry.name, name, error=said)
    return Result(entry.name, name, has_tensors=False)
