"""Checks a sentence-transformers folder: the modules that its `modules.json` names, one after the other.

What is not a model of transformers is small, and read by sentence-transformers with a strict `load_state_dict`, where
names and shapes decide. A type is a dotted name that strangers wrote: it is looked up here, and never imported.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tiedquiet.gate import components, load
from tiedquiet.gate.beside import rivals
from tiedquiet.gate.bounds import parts_of
from tiedquiet.gate.lacking import without_scale
from tiedquiet.gate.load import How
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.report import Result
from tiedquiet.gate.source import Source, is_inside
from tiedquiet.gate.weights import pickles_are_unsafe, weights_of
from tiedquiet.proof.codes import is_whole
from tiedquiet.proof.files import Checkpoint
from tiedquiet.verdict import Finding, Verdict

_OF_MODULES = ("model.safetensors", "pytorch_model.bin")
_BARE = {"Normalize": False, "Pooling": True, "Dropout": True, "SpladePooling": True}  # without tensors; with a config?
_TASKS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
}
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}
Shapes = dict[str, tuple[int, ...]]


class Module(NamedTuple):
    """An entry of `modules.json`: the folder it lies in, empty for all of it, and the name of its type."""

    path: str
    kind: str

    @property
    def name(self) -> str:
        """The last part of its type, if it is one of sentence-transformers; else empty."""
        return self.kind.rpartition(".")[2] if self.kind.startswith("sentence_transformers.") else ""


def is_one(source: Source) -> bool:
    """Whether a folder is one of sentence-transformers."""
    return not source.gguf and source.file("modules.json") is not None


def check(source: Source, how: How) -> list[Result]:
    """Check each module.

    Raises:
        CannotCheck: `modules.json` cannot be read, or names nothing.
    """
    entries = source.read("modules.json", kind=list)
    if not entries:
        raise CannotCheck(f"{source.name}: modules.json names no module")
    parts = parts_of(f"{source.name}/modules.json", entries)
    return [_check(source, place, entry, how) for place, entry in enumerate(parts)]


def _check(source: Source, place: int, entry: Any, how: How) -> Result:
    found = [entry.get(key) for key in ("path", "type")] if isinstance(entry, dict) else []
    if len(found) != 2 or not all(isinstance(value, str) for value in found):
        return Result(str(place), repr(entry), error="modules.json does not give both its folder and its type")
    module = Module(*map(str, found))
    label = module.path or "."
    try:
        if module.path and not is_inside(module.path):
            raise CannotCheck("modules.json names a folder outside this one")
        if module.name in ("Transformer", "MLMTransformer"):
            return replace(_transformer(source, module, how), component=label)
        if module.name in _BARE:
            if _BARE[module.name]:
                _config(source, module)
            return Result(label, module.name, has_tensors=False)
        if module.name in ("Dense", "LayerNorm"):
            return _layer(source, module, how)
    except CannotCheck as error:
        return Result(label, module.name or module.kind, error=str(error))
    what = "whose tensors are not known" if module.name else "which is not one of sentence-transformers' own"
    return Result(label, module.name or module.kind, error=f"its type is {module.kind}, {what}")


def _config(source: Source, module: Module) -> dict[str, Any]:
    config = source.read("config.json", module.path)
    if config is None:
        raise CannotCheck("modules.json names it, but it is missing: it has no config.json")
    return dict(config)


def _transformer(source: Source, module: Module, how: How) -> Result:
    import transformers

    entry = components.Entry(module.path, "transformers", "")
    _config(source, module)
    if module.path and source.file("adapter_config.json") is not None:
        raise CannotCheck("adapter_config.json lies beside modules.json, and transformers loads it into every module")
    part = components.part_of(source, entry, how.trust)
    own = source.read("sentence_bert_config.json", module.path) or {}
    task = own.get("transformer_task", "fill-mask" if module.name == "MLMTransformer" else "feature-extraction")
    name = _TASKS.get(task) if isinstance(task, str) else None
    if name is None:
        raise CannotCheck(f"sentence_bert_config.json names the task {task}, for which no class is known")
    kind = part.config.get("model_type")
    if name == "AutoModel" and isinstance(kind, str):
        name = _ENCODERS.get(kind, name)
    return load.check_model(part, how, getattr(transformers, name))


def _layer(source: Source, module: Module, how: How) -> Result:
    config = _config(source, module)
    wanted = dict(_shapes(module.name, config))
    forms = weights_of(source, module.path, _OF_MODULES, how.trust_pickle)
    files = [str(path) for form in forms[:1] for path in form.files] or _fetched(source, module)
    if not files:
        raise CannotCheck(f"it has none of {', '.join(_OF_MODULES)}")
    checkpoint = Checkpoint(None, files)
    try:
        stored: Shapes = {name: tuple(read().shape) for name, read in checkpoint.tensors.items()}
        kinds = {name: read().dtype for name, read in checkpoint.tensors.items()}
    except Exception as error:
        raise CannotCheck(f"{Path(files[0]).name} cannot be read: {' '.join(str(error).split())}") from error
    fits = [name for name, shape in wanted.items() if stored.get(name) == shape]
    codes = [name for name in fits if len(wanted[name]) > 1 and is_whole(kinds[name])]
    findings = [
        Finding(name, Verdict.UNREAD, name, f"it is {stored[name]} in the file, but {shape} by its config", True)
        for name, shape in wanted.items()
        if name in stored and name not in fits
    ]
    findings += [without_scale(name, kinds[name]) for name in codes]
    told, notes = rivals(forms, how.trust_pickle) if forms else ([], [])
    extra = sorted(stored.keys() - wanted.keys())
    return Result(
        module.path,
        module.name,
        files,
        len(fits) - len(codes),
        len(wanted),
        findings=findings + told,
        missing=sorted({*(wanted.keys() - stored.keys()), *codes}),
        unexpected=extra,
        problem="sentence-transformers refuses a file with more tensors than these" if extra else "",
        notes=notes,
        counted="tensors have the names and shapes that its config asks for",
    )


def _fetched(source: Source, module: Module) -> list[str]:
    """The file of a module on the hub, fetched now."""
    names = [] if source.is_local else [_OF_MODULES[0]] if pickles_are_unsafe() else _OF_MODULES
    paths = (source.file(name, module.path) for name in names)
    return [str(path) for path in paths if path is not None][:1]


def _shapes(name: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that sentence-transformers gives a module of this config."""
    keys = ("dimension",) if name == "LayerNorm" else ("out_features", "in_features")
    sizes = tuple(size for size in map(config.get, keys) if type(size) is int and size > 0)
    if len(sizes) < len(keys):
        raise CannotCheck(f"its config.json does not say how large it is: {', '.join(keys)}")
    if name == "LayerNorm":
        yield from (("norm.weight", sizes), ("norm.bias", sizes))
        return
    yield "linear.weight", sizes
    if config.get("bias", True):
        yield "linear.bias", sizes[:1]
    if config.get("use_residual") and sizes[0] != sizes[1]:
        yield "residual.weight", sizes
