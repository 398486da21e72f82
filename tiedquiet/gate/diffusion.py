"""Compares a diffusers model (transformer, VAE, UNet, ControlNet), loaded as a pipeline loads it, with its files."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tiedquiet.gate import progress
from tiedquiet.gate.beside import rivals
from tiedquiet.gate.bounds import bounded, size_of
from tiedquiet.gate.compare import compare
from tiedquiet.gate.components import Part
from tiedquiet.gate.confined import without_hub
from tiedquiet.gate.diagnosis import damage, explain
from tiedquiet.gate.load import How
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.report import Result
from tiedquiet.gate.unplaced import IS_IT, left_over
from tiedquiet.gate.weights import (
    OF_DIFFUSERS,
    of_variant,
    only_of_variants,
    pickles_are_unsafe,
    variants_in,
    weights_of,
)
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.reading import read
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import survey
from tiedquiet.proof.unread import ask_headers, find_unread
from tiedquiet.verdict import Verdict

_HALF = (torch.float16, torch.bfloat16)


def check_model(part: Part, kind: Any, how: How) -> Result:
    """Load a model of diffusers, and compare every tensor with the files that its folder holds.

    Raises:
        CannotCheck: it cannot be loaded.
    """
    progress.loading(part.label)
    names = of_variant(OF_DIFFUSERS, how.variant)
    forms = weights_of(part.source, part.name, names, how.trust_pickle)
    if not forms and (others := variants_in(part.source, part.name, OF_DIFFUSERS)):
        raise CannotCheck(only_of_variants(part.label, others, how.variant))
    is_here = part.source.is_local
    files = [str(path) for form in forms[:1] for path in form.files] if is_here else _files(part, how, names)
    checkpoint = Checkpoint(None, files)
    folder = part.source.folder(part.name) if is_here or not files else Path(files[0]).parent  # in the hub's cache
    try:
        options: dict[str, Any] = {"torch_dtype": dtype_of(how.dtype, checkpoint)}
        if how.variant:
            options["variant"] = how.variant
        if how.device != "cpu":
            options["device_map"] = how.device
        with silent(), bounded(size_of(files)):
            model = kind.from_pretrained(folder, **options)
        in_files = _names_in_files(model, checkpoint)
    except Exception as error:
        damaged = next(damage(folder), "") if folder.is_dir() else ""
        raise CannotCheck(f"{part.label} cannot be loaded: {explain(error, folder, how.trust, damaged)}") from error
    state = survey(model).state
    reading = read(model, state.keys() - in_files.keys(), checkpoint)
    reading.is_quantised = getattr(model, "hf_quantizer", None) is not None
    unread = ask_headers(model, reading)
    find_unread(model, reading, unread, cure="Rename them in the file")
    stored = reading.stored
    known = Record(stored, reading.missing, len(state), lasting=reading.found, files=files)

    def undo(tensors: dict[str, Any]) -> dict[str, Any]:
        return {in_files.get(name, name): tensor for name, tensor in tensors.items()}

    held, total, buffers, findings = compare(model, known, checkpoint, [undo])
    missing = sorted(finding.key for finding in findings if finding.verdict is Verdict.MISSING)
    unexpected = sorted(checkpoint.tensors.keys() - {in_files[name] for name in stored})
    ignored = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = [name for name in unexpected if not any(re.search(pattern, name) for pattern in ignored)]
    is_unread = any(finding.verdict is Verdict.UNREAD for finding in findings)
    over = "" if is_unread else left_over(type(model).__name__, checkpoint.headers, left)
    told, notes = rivals(forms, how.trust_pickle)
    return Result(
        part.name,
        type(model).__name__,
        files,
        held,
        total,
        buffers,
        findings + told,
        missing,
        unexpected=unexpected,
        problem=over and over + IS_IT,
        notes=notes,
    )


@contextmanager
def silent() -> Iterator[None]:
    """Diffusers draws no bars, logs nothing and asks nothing of the hub: what is wanted from there has been fetched.

    It may have been imported just now, and set its level as it was.
    """
    from diffusers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity(theirs.CRITICAL)
    try:
        with without_hub(True):
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _files(part: Part, how: How, of_kind: Sequence[str]) -> list[str]:
    """The files that a model on the hub is read from, fetched now."""
    index = part.source.read(of_kind[0], part.name)
    names = list(of_kind[1:]) if index is None else list(dict.fromkeys(index["weight_map"].values()))
    unsafe = "" if how.trust_pickle else pickles_are_unsafe()
    found: list[str] = []
    for name in names:
        if index is None and not found and unsafe and not name.endswith(".safetensors"):
            raise CannotCheck(f"{part.label} has no safetensors file, and {unsafe}")
        if (index is not None or not found) and (path := part.source.file(name, part.name)) is not None:
            found.append(str(path))
    return found


def dtype_of(asked: str, checkpoint: Checkpoint) -> Any:
    """The type to load it as; of a file that is all of one half precision that, so that no memory is lost by it."""
    if asked != "auto":
        return getattr(torch, asked)
    kinds = {header.dtype for header in checkpoint.headers.values() if header.is_floating_point()}
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= set(_HALF) else None


def _names_in_files(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """For each name of the model the one that the files have, which may be that of an older release."""
    names: dict[str, str] = {name: name for name in checkpoint.tensors}
    if len(checkpoint.files) == 1:  # of several shards diffusers renames nothing
        model._fix_state_dict_keys_on_load(names)
    return names
