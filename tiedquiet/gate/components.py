"""The models in what `check` is given, and the class to load each as."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from tiedquiet.gate import classes, instead
from tiedquiet.gate.bounds import check_adapter, check_gguf, parts_of
from tiedquiet.gate.config import as_read
from tiedquiet.gate.patterns import ENDLESS, endless
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.source import Source
from tiedquiet.gate.weights import has_weights

_LIBRARIES = (["diffusers"], ["transformers"])
# The classes of diffusers that are read from several folders (`controlnet`, `controlnet_1`, ...), and of what they are.
_SEVERAL = {
    "MultiAdapter": "T2IAdapter",
    "MultiControlNetModel": "ControlNetModel",
    "MultiControlNetUnionModel": "ControlNetUnionModel",
}


class Part(NamedTuple):
    """A model to load: all of the source, or the part of a pipeline that lies in a subfolder.

    Attributes:
        source: where it lies.
        name: the subfolder; empty for all of it.
        config: what its config holds; that of its base model where it is an adapter.
        cls: the name of the class that the user gave to load it as.
        base: the base model of an adapter.
        made_for: the class that the adapter was made for, if its head is another than that of its base model.
    """

    source: Source
    name: str
    config: dict[str, Any]
    cls: str | None
    base: Source | None = None
    made_for: Any = None

    @property
    def label(self) -> str:
        """How a line about it begins."""
        return f"{self.source.name}/{self.name}" if self.name else self.source.name


class Entry(NamedTuple):
    """What a pipeline's index says of a component."""

    name: str
    library: Any
    cls: Any


def is_pipeline(source: Source) -> bool:
    """Whether it is a folder of several models, with an index of them."""
    return not source.gguf and source.file("model_index.json") is not None


def entries_of(source: Source) -> list[Entry]:
    """The components that a pipeline's index names, by name; a component that is switched off is none.

    One that consists of several models is each of these, by the folder that it is read from.

    Raises:
        CannotCheck: the index cannot be read, or names nothing.
    """
    index = source.read("model_index.json") or {}
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    named = [Entry(name, *value) for name, value in sorted(pairs.items()) if value != [None, None]]
    if not (found := [entry for entry in named if not entry.name.startswith("_")]):
        raise CannotCheck(f"{source.name} is a pipeline, and its model_index.json names no component")
    return parts_of(f"{source.name}/model_index.json", (one for entry in found for one in _singly(source, entry)))


def _singly(source: Source, entry: Entry) -> Iterator[Entry]:
    single = _SEVERAL.get(entry.cls) if entry.library == "diffusers" and isinstance(entry.cls, str) else None
    yield entry if single is None else entry._replace(cls=single)
    if single is not None:
        names = (f"{entry.name}_{number}" for number in count(1))
        there = takewhile(lambda name: source.place_of(name, "config.json") == name, names)
        yield from (Entry(name, entry.library, single) for name in there)


def lacking(source: Source) -> Iterator[tuple[str, str, str, bool]]:
    """Parts of a pipeline that its index does not name although its class needs them, or the folder has their weights.

    Yields:
        The name of each; that of the pipeline's class; what is to be said; and whether that is wrong. It is right to
        switch a part off: whoever loads the pipeline passes another, or None. And a folder may hold other models, too.
    """
    index = source.read("model_index.json") or {}
    name = index.get("_class_name")
    parts = classes.parts_of(name)
    if parts is None:
        alike = (key for key, given in index.items() if isinstance(given, list) and given[:1] in _LIBRARIES)
        parts = dict.fromkeys((key for key in alike if not key.startswith("_")), False)
    for part, is_needed in sorted(parts.items()):
        given = index.get(part)
        if isinstance(given, list) and given[:1] == [None]:
            if is_needed:
                yield part, str(name), "switched off: from_pretrained has to be given one, or None", False
        elif part in index and (not isinstance(given, list) or len(given) != 2):
            yield part, str(name), f"model_index.json gives {given!r} for it, not its library and its class", True
        elif part not in index and is_needed:
            yield part, str(name), "it cannot be made without one, and model_index.json does not name it", True
    for part in _unnamed(source, index):
        if part not in parts:
            yield part, str(name), "model_index.json does not name it, so nothing reads its weights", False
        elif not parts[part]:
            yield part, str(name), "it has weights, and model_index.json does not name it: nothing reads them", True


def _unnamed(source: Source, index: dict[str, Any]) -> list[str]:
    """The subfolders with weights that an index does not name; none of a pipeline on the hub: they are not fetched."""
    named = index.keys() | {entry.name for entry in entries_of(source)}
    found = (path for path in source.folder().iterdir() if path.name not in named) if source.is_local else ()
    return sorted(path.name for path in found if not path.is_symlink() and path.is_dir() and has_weights(path))


def class_of(entry: Entry) -> Any:
    """The class of a component; it is looked up, never imported by name.

    Raises:
        CannotCheck: there is none.
    """
    library, name = entry.library, entry.cls
    found = (
        classes.named(library, classes.today(name) if library == "transformers" else name)
        if isinstance(library, str)
        else None
    )
    if found is None:
        raise CannotCheck(f"model_index.json names {name} of {library}, which is not an installed class")
    return found


def part_of(source: Source, entry: Entry, trust: bool) -> Part:
    """A component that is a model.

    Args:
        source: the pipeline.
        entry: what its index says of the component.
        trust: whether code that comes with it may run.

    Raises:
        CannotCheck: it is missing, or its config cannot be read.
    """
    part = Part(source, source.place_of(entry.name, "config.json"), {}, None)
    if (config := source.read("config.json", part.name)) is None:
        raise CannotCheck("model_index.json names it, but it is missing: it has no config.json")
    return _with_config(part, config, trust)


def class_of_diffusers(part: Part) -> Any:
    """The class of a folder that is one model of diffusers; None where it is another library's."""
    name = part.cls or part.config.get("_class_name")
    found = None if name is None or part.source.gguf else classes.named("diffusers", name)
    return found if classes.is_of_diffusers(found) else None


def the_part(source: Source, cls: str | None, trust: bool) -> Part:
    """The one model of a folder, or of an adapter and its base model.

    Args:
        source: what was named; no pipeline.
        cls: the class that it is to be loaded as; None for the one that it names.
        trust: whether code that comes with it may run.

    Raises:
        CannotCheck: there is none.
    """
    part = Part(source, "", {}, cls)
    if source.gguf:
        return part
    own = source.read("config.json")
    if own is None and (adapter := _adapter_of(part, trust)) is not None:
        return _with_base(part, adapter, trust)
    if own is None:
        said = source.absence()
        raise CannotCheck(f"{said}; {instead.of_config(source.folder())}" if source.is_local else said)
    return _with_config(part, own, trust)


def adapted(part: Part, trust: bool) -> Part:
    """The same part, or that with the base model of an adapter beside it, if transformers reads that one instead.

    transformers loads an adapter that lies beside a model without being asked.

    Raises:
        CannotCheck: such an adapter must not be loaded, or has another model read in place of this one.
    """
    if part.base is not None or (adapter := _adapter_of(part, trust)) is None or not _is_left_for_base(part):
        return part
    if part.name or part.source.gguf:
        raise CannotCheck(
            f"{part.label}: adapter_config.json makes transformers read its base model in place of this one; "
            "put the adapter into a folder of its own"
        )
    return _with_base(part, adapter, trust)


def _adapter_of(part: Part, trust: bool) -> dict[str, Any] | None:
    """What the config of a part's adapter holds; None where there is none."""
    adapter: dict[str, Any] | None = part.source.read("adapter_config.json", part.name)
    if adapter is not None:
        check_adapter(part.label, "adapter_config.json", adapter)
    if adapter is None or trust:
        return adapter
    if adapter.get("megatron_config"):
        raise CannotCheck(
            f"{part.label}: adapter_config.json asks for megatron_core, a module that peft imports by its name; "
            "--trust-remote-code allows it"
        )
    if adapter.get("adapters"):  # X-LoRA's: each is the name of a folder anywhere, or of one on the hub
        raise CannotCheck(
            f"{part.label}: adapter_config.json has other adapters read, which are not looked at; "
            "--trust-remote-code allows it"
        )
    if pattern := endless(adapter):
        raise CannotCheck(f"{part.label}: adapter_config.json {ENDLESS.format(pattern)}")
    return adapter


def _is_left_for_base(part: Part) -> bool:
    """Whether the installed transformers reads the base model of a part's adapter in place of the part."""
    from transformers.integrations.peft import maybe_load_adapters

    where = {"subfolder": part.name, "revision": part.source.revision, "local_files_only": True}
    try:
        return bool(maybe_load_adapters(part.source.name, where)[1] != part.source.name)
    except KeyError:  # it looked for the name of the base model, and there is none
        return True


def _with_base(part: Part, adapter: dict[str, Any], trust: bool) -> Part:
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CannotCheck(f"{part.label} is an adapter, and its adapter_config.json names no base model")
    try:
        origin = Source(base, None)
        if (config := origin.read("config.json")) is None:
            raise CannotCheck(f"{base} is a pipeline of several models" if is_pipeline(origin) else origin.absence())
    except CannotCheck as error:
        raise CannotCheck(f"{part.label} is an adapter, and its base model is not available: {error}") from error
    return _with_config(part._replace(base=origin, made_for=classes.of_adapter(adapter)), config, trust)


def _with_config(part: Part, config: dict[str, Any], trust: bool) -> Part:
    source, place = (part.source, part.name) if part.base is None else (part.base, "")
    return part._replace(config=as_read(part.label, config, lambda file: source.read(file, place), trust))


def loader_of(part: Part, trust: bool) -> tuple[Any, str]:
    """What has the `from_pretrained` to call; and what has to be said about that, empty where the config names it.

    Raises:
        CannotCheck: there is no such class, or it is code that must not run.
    """
    import transformers

    if part.source.gguf:
        check_gguf(part.source.folder() / part.source.gguf)
    own = part.config.get("auto_map")
    own = own if isinstance(own, dict) else {}
    name = part.cls
    if name is None and part.made_for is not None:
        return part.made_for, ""
    if name is None:
        listed = part.config.get("architectures")
        if not listed and part.source.gguf:
            return _of_gguf(part)
        if not listed:
            return transformers.AutoModel, "config.json names no class in `architectures`"
        name = listed[0] if isinstance(listed, list) else None
        if not isinstance(name, str):
            raise CannotCheck(f"{part.label}: `architectures` in config.json is not a list of names: {listed!r}")
    auto = next((key for key, value in own.items() if str(value).rpartition(".")[2] == name), "")
    if trust and (found := classes.automatic(auto)) is not None:
        return found, ""
    found = classes.named("transformers", name)
    if classes.is_of_transformers(found):
        return found, ""
    if auto:
        code = str(own[auto]).rpartition("--")[2].rpartition(".")[0]
        own_name = getattr(classes.native(auto, part.config.get("model_type")), "__name__", "")
        other = f", and without it {auto} makes {own_name} of this type: --class {own_name}"
        raise CannotCheck(
            f"{part.label}: its class {name} is code that ships with it ({code}.py); "
            f"--trust-remote-code allows it to run{other * bool(own_name)}"
        )
    if part.cls is not None:
        return _by_user(part, name), ""
    what = (
        "which is not a model" if found is not None else f"which transformers {transformers.__version__} does not have"
    )
    raise CannotCheck(f"{part.label}: config.json names {name}, {what}; name another class with --class")


def _of_gguf(part: Part) -> tuple[Any, str]:
    """The class of a GGUF file: the one that transformers has for it, or the language model of its kind."""
    import transformers

    with suppress(Exception):  # loading it says what is wrong
        config = _config_of_gguf(part)
        named = (classes.named("transformers", name) for name in config.architectures or ())
        found = [kind for kind in named if classes.is_of_transformers(kind)]
        of_language: Any = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
        found += [auto for auto in of_language if type(config) in auto._model_mapping]
        return found[0], ""
    return transformers.AutoModel, "a GGUF file names no class"


def _config_of_gguf(part: Part) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(part.source.name, gguf_file=part.source.gguf, trust_remote_code=False)


def folders_of(part: Part) -> Iterator[Path]:
    """The folders on this machine from which a part is loaded."""
    for source in filter(None, (part.source, part.base)):
        if source.is_local:
            yield source.folder(part.name if source is part.source else "")


def _by_user(part: Part, name: str) -> Any:
    try:
        return classes.by_user(name)
    except CannotCheck as error:
        raise CannotCheck(f"{part.label}: {error}") from error
