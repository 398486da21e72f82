"""A model of diffusers (transformer, VAE, UNet, ControlNet), loaded as a pipeline loads it, against its files."""

from pathlib import Path
from typing import Any

import torch

from tiedquiet.gate.beside import rivals
from tiedquiet.gate.compare import compare
from tiedquiet.gate.components import Part
from tiedquiet.gate.diagnosis import CannotCheck, damage, explain
from tiedquiet.gate.load import How
from tiedquiet.gate.report import Result
from tiedquiet.gate.weights import OF_DIFFUSERS, pickles_are_unsafe, weights_of
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Verdict

_HALF = (torch.float16, torch.bfloat16)


def check_model(part: Part, kind: Any, how: How) -> Result:
    """Load a model of diffusers, and compare every tensor with the files that its folder holds.

    Raises:
        CannotCheck: it cannot be loaded.
    """
    forms = weights_of(part.source, part.name, OF_DIFFUSERS, how.trust_pickle)
    files = _files(part, kind, how, [str(path) for path in forms[0].files] if forms else [])
    checkpoint = Checkpoint(None, files)
    try:
        model = _load(part, kind, how, _dtype(how.dtype, checkpoint))
        in_files = _names_in_files(model, checkpoint)
    except Exception as error:
        folder = Path(files[0]).parent if files else part.source.folder(part.name)
        damaged = next(damage(folder), "") if folder.is_dir() else ""
        raise CannotCheck(f"cannot be loaded: {explain(error, folder, how.trust, damaged)}") from error
    state = survey(model).state
    stored = state.keys() & in_files.keys()
    known = Record(set(stored), state.keys() - stored, len(state), files=files)

    def undo(tensors: dict[str, Any]) -> dict[str, Any]:
        return {in_files.get(name, name): tensor for name, tensor in tensors.items()}

    held, total, buffers, findings = compare(model, known, checkpoint, [undo])
    missing = sorted(finding.key for finding in findings if finding.verdict is Verdict.MISSING)
    unexpected = sorted(checkpoint.tensors.keys() - {in_files[name] for name in stored})
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
        notes=notes,
    )


def _files(part: Part, kind: Any, how: How, files: list[str]) -> list[str]:
    """The files that are read; from the hub they are fetched now."""
    if files or part.source.is_local:
        return files
    unsafe = not how.trust_pickle and pickles_are_unsafe()
    for name in OF_DIFFUSERS[1:]:
        if (path := part.source.file(name, part.name)) is not None:
            if unsafe and not name.endswith(".safetensors"):
                raise CannotCheck(f"{part.label}: {name} is a pickle, and {unsafe}")
            return [str(path)]
    index = part.source.read(OF_DIFFUSERS[0], part.name) or {}
    shards = dict.fromkeys(index.get("weight_map", {}).values())
    return [str(path) for name in shards if (path := part.source.file(name, part.name)) is not None]


def _load(part: Part, kind: Any, how: How, dtype: Any) -> torch.nn.Module:
    options: dict[str, Any] = {"torch_dtype": dtype, "revision": part.source.revision, "subfolder": part.name}
    if how.device != "cpu":
        options["device_map"] = how.device
    model: torch.nn.Module = kind.from_pretrained(part.source.name, **{k: v for k, v in options.items() if v})
    return model


def _dtype(asked: str, checkpoint: Checkpoint) -> Any:
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
