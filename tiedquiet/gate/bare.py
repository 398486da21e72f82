"""The parts of a pipeline that have no tensors: schedulers, tokenizers, processors. What each is made of must be there.

They are not loaded. Without its files a tokenizer is made nonetheless, with no words, and nothing is said.
"""

from typing import Any

from tiedquiet.gate import classes
from tiedquiet.gate.components import Entry
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.source import Source, own_files

_WEIGHTS = (".safetensors", ".bin", ".onnx", ".pt", ".ckpt", ".msgpack")
_OF_DIFFUSERS = ("SchedulerMixin", "BaseGuidance")
_OF_PROCESSORS = ("FeatureExtractionMixin", "ImageProcessingMixin", "ProcessorMixin")
# In the order in which transformers takes them; the class has names of its own for a vocabulary.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def check(source: Source, entry: Entry, kind: Any) -> None:
    """Raise where diffusers would not make a part of what lies in its folder, or would make it of nothing.

    Args:
        source: the pipeline.
        entry: what its index says of the part.
        kind: its class, which is no model.

    Raises:
        CannotCheck: why.
    """
    folder, is_dummy = source.folder(entry.name), hasattr(kind, "_backends")
    names = () if is_dummy else _files_of(kind)
    place = source.place_of(entry.name, *names)
    found = next((name for name in names if source.file(name, place) is not None), None)
    if source.is_local and not place and found is None:
        raise CannotCheck("model_index.json names it, but it is missing")
    if is_dummy:
        # It stands for a class whose package is not installed, which may be another on the machine that uses it.
        weights = own_files(folder, *_WEIGHTS) if source.is_local else []
        if weights:
            needs = " and ".join(kind._backends)
            raise CannotCheck(f"it has {weights[0].name}, and {entry.cls} needs {needs}, which cannot be imported here")
        return
    if names and found is None:
        raise CannotCheck(f"it has none of {', '.join(names)}" if names[1:] else f"it has no {names[0]}")
    for name in (found, "tokenizer_config.json"):
        if name is not None and name.endswith(".json"):
            source.read(name, place)


def _files_of(kind: Any) -> tuple[str, ...]:
    """The files of which one has to be there; none for a tokenizer of bytes."""
    if _extends(kind, "diffusers", _OF_DIFFUSERS):
        return (kind.config_name,)
    if _extends(kind, "transformers", ("PreTrainedTokenizerBase",)):
        own = kind.vocab_files_names.values()
        return tuple(dict.fromkeys((_VOCABULARIES[0], *own, *_VOCABULARIES))) if own else ()
    if _extends(kind, "transformers", _OF_PROCESSORS):
        return _PROCESSORS
    what = "a model that can be compared nor a scheduler, a tokenizer or a processor"
    raise CannotCheck(f"{kind.__name__} is neither {what}")


def _extends(kind: Any, library: str, names: tuple[str, ...]) -> bool:
    found = (classes.named(library, name) for name in names)
    return any(base is not None and issubclass(kind, base) for base in found)
