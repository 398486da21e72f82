"""What a single file of weights is checked as: the one model, or each part of the pipeline, that its config names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiedquiet.gate import bare, classes, components, single
from tiedquiet.gate.components import Entry, Part
from tiedquiet.gate.diffusion import dtype_of
from tiedquiet.gate.load import How
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.report import Result
from tiedquiet.gate.single import File, Way
from tiedquiet.gate.source import Source

_OF_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_OF_LDM = re.compile(r"model\.diffusion_model\.")  # what is nothing else, diffusers takes for Stable Diffusion 1


def check(
    name: str, config: str, revision: str | None, cls: str | None, how: How, beside: Callable[[Source, Entry], Result]
) -> tuple[list[Result], bool]:
    """Check what diffusers makes of a single file.

    Args:
        name: the file.
        config: a folder with the config of the model or of the pipeline, or its name on the hub.
        revision: branch, tag or commit of the config on the hub.
        cls: the class to make; None for the one that the config names.
        how: how to load it.
        beside: checks a part of a pipeline that has weights of its own beside the config.

    Returns:
        What came out for each component, and whether it is a pipeline.

    Raises:
        CannotCheck: nothing of it can be checked.
    """
    if how.is_resume or how.variant or how.lora:
        raise CannotCheck(f"{name} is checked as a single file; leave out --resume, --variant and --lora")
    file = single.read(name, how)
    source = Source(config, revision)
    if not components.is_pipeline(source):
        part = components.the_part(source, cls, how.trust)
        kind = components.class_of_diffusers(part)
    elif cls is None:
        return _pipeline(file, source, how, beside), True
    else:
        part, kind = _part_of_class(source, cls, how)
    if not is_convertible(kind):
        named = cls or part.config.get("_class_name") or part.config.get("architectures")
        what = ", ".join(map(str, named[:3])) if isinstance(named, list) else named
        raise CannotCheck(
            f"{name}: {what} is not a class of diffusers that has from_single_file; "
            "put the file into a folder with its config.json, under the name that its library reads, and check that"
        )
    folder = _config_of(source, part.name).parent
    try:
        made = single.make("", file, single.of_class(kind, file, folder, how), how)
    except CannotCheck as error:
        raise CannotCheck(f"{name} {error}") from error
    ignored = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [single.with_leftovers(made, file, ignored, cls is not None)], False


def no_config(name: str) -> str:
    """What to say of a file of weights that is named without a config; nothing is fetched."""
    if Path(name).parent.joinpath("config.json").is_file():
        return f"{name} is a file; pass the folder that it is in, with its config.json"
    if Path(name).suffix not in _OF_WEIGHTS:
        return f"{name} is not a file of weights that is read here; pass a folder, or one of {', '.join(_OF_WEIGHTS)}"
    return f"{name} is a single file: pass the folder, or the hub model, that has its config as --config{_likely(name)}"


def _likely(name: str) -> str:
    """Which model diffusers takes a file for, in brackets; empty where it knows none."""
    try:
        from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

        headers = single.read(name, How()).headers
        found = fetch_diffusers_config(headers)["pretrained_model_name_or_path"]
        is_guess = infer_diffusers_model_type(headers) == "v1" and not any(map(_OF_LDM.match, headers))
    except Exception:  # no diffusers, or no weights
        return ""
    return "" if is_guess else f"; diffusers takes it for {found}"


def is_convertible(kind: Any) -> bool:
    """Whether it is a class of diffusers that makes a model of a single file."""
    return classes.is_of_diffusers(kind) and hasattr(kind, "from_single_file")


def _pipeline(file: File, source: Source, how: How, beside: Callable[[Source, Entry], Result]) -> list[Result]:
    """Each component in turn, as the pipeline's own `from_single_file` loads them, of the same tensors."""
    index = source.read("model_index.json") or {}
    name = index.get("_class_name")
    kind = classes.named("diffusers", name)
    if not hasattr(kind, "from_single_file"):
        known = [entry.cls for entry in components.entries_of(source) if is_convertible(_class_or_none(entry))]
        hint = f"; choose one of its parts: --class {known[0]}" if known else ""
        raise CannotCheck(f"{source.name}: {name} is not a pipeline of diffusers that has from_single_file{hint}")
    from diffusers.loaders.single_file import SINGLE_FILE_OPTIONAL_COMPONENTS

    results, reached, parts = [], set[str](), []
    given = single.loaded(file, how)
    for entry in components.entries_of(source):
        if entry.name in SINGLE_FILE_OPTIONAL_COMPONENTS:
            continue
        try:
            way = _way(file, source, entry, given, how)
            if way is None:
                results.append(_beside(source, entry, beside))
                continue
            made = single.make(entry.name, file, way, how)
        except CannotCheck as error:
            results.append(Result(entry.name, str(entry.cls), error=str(error)))
            continue
        results.append(made.result)
        reached |= made.reached
        parts += [entry.name] if made.reached else []
    return [*results, single.of_file(file, str(name), reached, parts)]


def _beside(source: Source, entry: Entry, check: Callable[[Source, Entry], Result]) -> Result:
    """What came out for a component that is not made of the file: its weights have to lie beside the configs."""
    kind = components.class_of(entry)
    if not classes.is_module(kind):
        bare.check(source, entry, kind)
        return Result(entry.name, str(entry.cls), has_tensors=False)
    root = _config_of(source, entry.name).parent.parent
    if not any((root / entry.name).glob("*.safetensors")) and not any((root / entry.name).glob("*.bin")):
        raise CannotCheck("neither the file nor the folder of its config has weights for it")
    return check(Source(str(root), None), entry)


def _part_of_class(source: Source, cls: str, how: How) -> tuple[Part, Any]:
    """The part of a pipeline that is of a class, and the class."""
    entry = next((entry for entry in components.entries_of(source) if entry.cls == cls), None)
    if entry is None:
        raise CannotCheck(f"{source.name} is a pipeline without a {cls}")
    try:
        return components.part_of(source, entry, how.trust), components.class_of(entry)
    except CannotCheck as error:
        raise CannotCheck(f"{source.name}/{entry.name}: {error}") from error


def _config_of(source: Source, part: str) -> Path:
    """Where a config that was read lies on this machine."""
    path = source.file("config.json", part)
    if path is None:
        raise CannotCheck(f"{part or source.name} has no config.json")
    return path


def _class_or_none(entry: Entry) -> Any:
    try:
        return components.class_of(entry)
    except CannotCheck:
        return None


def _way(file: File, source: Source, entry: Entry, given: dict[str, Any], how: How) -> Way | None:
    """How the pipeline makes a component of the file; None for one that it does not make of it.

    Args:
        file: it.
        source: where the pipeline's configs lie.
        entry: the component.
        given: the file's tensors, which diffusers takes from there as it goes.
        how: how models are to be loaded.
    """
    from diffusers import pipelines
    from diffusers.loaders import single_file, single_file_utils

    kind = components.class_of(entry)  # of transformers or diffusers: what is imported by its name below
    is_model = is_convertible(kind)
    if not is_model:
        is_encoder = classes.is_of_transformers(kind) and (
            single_file_utils.is_clip_model_in_single_file(kind, file.headers)
            or single_file_utils.is_t5_in_single_file(file.headers)
        )
        if not is_encoder:
            return None
    components.part_of(source, entry, how.trust)  # raises where it must not be read
    folder = _config_of(source, entry.name).parent.parent
    options = {
        "library_name": entry.library,
        "class_name": entry.cls,
        "name": entry.name,
        "pipelines": pipelines,
        "is_pipeline_module": hasattr(pipelines, entry.library),
        "cached_model_config_path": str(folder),
        "torch_dtype": dtype_of(how.dtype, file.checkpoint),
        "local_files_only": True,
    }

    def load(tensors: dict[str, Any], **more: Any) -> Any:
        return single_file.load_single_file_sub_model(checkpoint=tensors, **options, **more)

    if is_model:
        return Way(kind.__name__, lambda: load(given), lambda empty: load(empty, device="meta"))
    return Way(kind.__name__, lambda: load(given), load, "cpu")
