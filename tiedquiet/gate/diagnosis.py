"""Why a checkpoint cannot be loaded: from an exception and the folder's contents to one line for the user."""

import inspect
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tiedquiet.gate import instead
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.source import MOST, POINTER, own_files, read_json

_OF_DIFFUSERS = "diffusion_pytorch_model.safetensors or .bin"  # of which its message names the second alone
_FEW = 3  # names in a line, which is cut where it is too long, and its end says what is wrong
_NO_WEIGHTS = re.compile(r"Error no file named (?P<names>.+?),? found in directory (?P<folder>.+?)\.?$")


def explain(error: BaseException, folder: Path | None, trust: bool, damaged: str = "") -> str:
    """What is wrong, where, and what to do, as one line without a full stop.

    Args:
        error: what a `from_pretrained` raised.
        folder: where the checkpoint's files lie, if they are on this machine.
        trust: whether code that comes with the checkpoint was allowed to run.
        damaged: the first of what `damage` says of the folder.
    """
    message = " ".join(str(error).split())
    if reason := _of_the_code(error) or damaged or _of_conversion(error) or _of_shapes(error):
        return reason
    if "weights_only" in message or isinstance(error, pickle.UnpicklingError):
        wanted = re.search(r"GLOBAL ([\w.]+)", message)
        what = f" ({wanted[1]})" if wanted else ""
        names = ", ".join(path.name for path in _weights(folder) if path.suffix == ".bin") if folder else ""
        if not wanted and not re.search("unrecognized function|allowlisted", message):
            return f"{names or 'its file'} is not a file of tensors that torch.save wrote"
        return (
            f"{names or 'its file'} is a pickle that wants to run code when it is read{what}; it was not run. "
            "Ask its author for a safetensors file"
        )
    if "adapter_model.safetensors" in message and folder and (folder / "adapter_model.bin").is_file():
        return (
            "transformers reads adapters of safetensors files only, and it has adapter_model.bin; PeftModel reads that"
        )
    if (absent := _NO_WEIGHTS.search(message)) and folder is not None and absent["folder"] == str(folder):
        names = absent["names"].replace(", or ", " or ").replace("diffusion_pytorch_model.bin", _OF_DIFFUSERS)
        return f"it has no {names}; {instead.of_weights(folder)}"
    if "trust_remote_code" in message and not trust:
        return "its class is code that ships with the checkpoint; --trust-remote-code allows it to run"
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()] or [""]
    of_two = lines[0].endswith(":") and len(lines) > 1  # "Validation error for field 'n_head':", and then what it is
    said = [lines[of_two].rstrip(".:")]
    if not of_two and (not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) or not lines[0]):
        said.insert(0, type(error).__name__)  # the message alone says little: "'metadata'"
    return ": ".join(filter(None, (*_pickle_read(error), *said)))


def damage(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a folder, a line each."""
    for path in own_files(folder, ".index.json"):
        index = _json(path)
        if reason := damaged_index(index):
            yield f"{path.name} is damaged: {reason}"
            continue
        if not isinstance(index.get("metadata"), dict):
            yield f"{path.name} has no metadata, which transformers requires"
        named = set(index["weight_map"].values())
        if absent := sorted(name for name in named if not (folder / name).is_file()):
            more = f" and {len(absent) - _FEW:,} more" * (len(absent) > _FEW)
            missing = "is" if len(absent) == 1 else "are"
            yield f"{path.name} names {', '.join(absent[:_FEW])}{more}, which {missing} missing"
    path = folder / "generation_config.json"
    if path in own_files(folder, path.name) and _json(path) is None:
        yield f"{path.name} cannot be read as a JSON object"
    for path in _weights(folder):
        try:
            problem = damage_of(path)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            yield f"{path.name} {problem}"


def nested(folder: Path) -> str:
    """What is wrong with a pickle that does not hold tensors by name; empty for others."""
    from tiedquiet.proof.files import closed_because, unpickled

    for path in (path for path in _weights(folder) if path.suffix == ".bin" and not closed_because([str(path)])):
        with suppress(Exception):  # what cannot be read says so itself
            held = unpickled(str(path))
            if not isinstance(held, dict):
                return f"{path.name} holds a {type(held).__name__} instead of tensors by name"
            if (odd := next((key for key in held if not isinstance(key, str)), "")) != "":
                return f"{path.name} has {odd!r} where the name of a tensor should be"
            under = next((key for key, value in held.items() if isinstance(value, dict) and value), None)
            if under is not None and not any(hasattr(value, "shape") for value in held.values()):
                return f"{path.name} has its tensors under {under!r}, where no loader looks: save that object alone"
    return ""


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except CannotCheck:
        return None


def damaged_index(index: Any) -> str:
    """What is wrong with the contents of an index of shards; empty if nothing is."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        return "it lists no files"
    return ""


def _weights(folder: Path) -> list[Path]:
    return own_files(folder, ".safetensors", ".bin")


def damage_of(path: Path) -> str:
    """What is wrong with a file of weights, as the end of a sentence; empty where nothing is seen."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if start == POINTER.encode():
            return "is a Git LFS pointer instead of the file: run `git lfs pull`"
        if path.suffix == ".gguf":
            return "" if start[:4] == b"GGUF" else "is not a GGUF file"
        if path.suffix != ".safetensors":
            is_torn = start[:2] == b"PK" and not zipfile.is_zipfile(path)
            return "is empty" if not size else "is truncated: its end is missing" if is_torn else ""
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return f"is truncated or not a safetensors file: it has {size:,} bytes, not even its header"
        if length > MOST:
            return f"has a header of {length:,} bytes, and the format allows {MOST:,}"
        try:
            entries = json.loads(file.read(length))
            end = 8 + length + max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "is damaged: its header cannot be read"
    if size < end:
        return f"is truncated: its header promises {end:,} bytes, and it has {size:,}"
    if not _is_unicode(path):
        return "has a path that is not valid UTF-8, which safetensors cannot open: rename the folder"
    from safetensors import safe_open

    try:
        with safe_open(path, "pt"):
            return ""
    except Exception as error:
        return f"is damaged: {' '.join(str(error).split())}"


def _is_unicode(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _of_conversion(error: BaseException) -> str:
    """What transformers could not convert: its own words point to a report, where each has a traceback."""
    infos = [frame.f_locals["loading_info"] for frame in _frames(error) if "loading_info" in frame.f_locals]
    for key, trace in sorted(dict(getattr(infos[-1], "conversion_errors", ()) if infos else ()).items()):
        said = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", str(trace), re.MULTILINE)
        return f"{key} cannot be made of what the files have for it: {' '.join(said[:1] or [str(trace)])}"
    return ""


def _of_shapes(error: BaseException) -> str:
    """Which tensors have another shape in the files: transformers' own words point to a report."""
    found: dict[str, Any] = {}
    for frame in _frames(error) if "ignore_mismatched_sizes" in str(error) else ():
        if str(frame.f_globals.get("__name__")).startswith("transformers."):
            info = frame.f_locals.get("loading_info")
            keys = getattr(info, "mismatched_keys", None) or frame.f_locals.get("mismatched_keys")  # of older releases
            found |= {key: shapes for key, *shapes in keys or ()}
    said = [
        f"{key} is {_shape(stored)} in the file and {_shape(wanted)} in the model"
        for key, (stored, wanted) in sorted(found.items())
    ]
    return "; ".join([*said[:_FEW], *([f"and {len(said) - _FEW:,} more"] * (len(said) > _FEW))])


def _shape(shape: Any) -> str:
    return " by ".join(map(str, shape)) or "a scalar"


# Modelling files that were written for transformers 4


def _of_the_code(error: BaseException) -> str:
    message = str(error)
    models = list(_models(error))
    if isinstance(error, AttributeError) and "object has no attribute 'keys'" in message:
        lists = ((m, keys) for m in models if isinstance(keys := getattr(m, "_tied_weights_keys", None), (list, tuple)))
        model, keys = next(lists, (None, ()))
        if model is not None:
            return (
                f"{_place(type(model), '_tied_weights_keys')} is a {type(keys).__name__}, but transformers 5 needs "
                f"to know what each key is tied to; write _tied_weights_keys = {_as_dictionary(model, keys)}"
            )
    if match := re.search(r"([\w.]*\btie_weights)\(\) got an unexpected keyword argument", message):
        owner = next((type(model) for model in models), None)
        place = _place(owner, "tie_weights") if owner else match[1]
        return (
            f"{place} takes no arguments, but transformers 5 passes some; write "
            "def tie_weights(self, *args, **kwargs), or delete the method if _tied_weights_keys already says the same"
        )
    if match := re.search(r"'(\w+)' object has no attribute 'all_tied_weights_keys'", message):
        owner = next((type(model) for model in models if type(model).__name__ == match[1]), None)
        place = _place(owner, "__init__") if owner else f"{match[1]}.__init__"
        return (
            f"{place} does not call self.post_init(), which transformers 5 needs; call it on the last line of __init__"
        )
    return ""


def _frames(error: BaseException) -> list[FrameType]:
    """Where the code was, the innermost last."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def _pickle_read(error: BaseException) -> list[str]:
    """The name of the file that `torch.load` was reading, which its errors do not say."""
    calls = [frame for frame in _frames(error) if frame.f_globals.get("__name__") == "torch.serialization"]
    return [f"{Path(str(frame.f_locals['f'])).name} cannot be read" for frame in calls if "f" in frame.f_locals][:1]


def _models(error: BaseException) -> Iterator[Any]:
    """The models that the code was working on, the innermost first."""
    base = sys.modules["transformers"].PreTrainedModel
    for frame in reversed(_frames(error)):
        # By its type: a config whose `attribute_map` is a number cannot be asked for its class.
        yield from (v for v in (frame.f_locals.get("self"), frame.f_locals.get("model")) if issubclass(type(v), base))


def _place(owner: type, name: str) -> str:
    """`Class.name (file:line)`, of the class that defines it."""
    owner = next((kind for kind in owner.__mro__ if name in vars(kind)), owner)
    try:
        lines, start = inspect.getsourcelines(owner)
        offset = next((i for i, line in enumerate(lines) if re.match(rf"\s+(def )?{name}\b", line)), 0)
        return f"{owner.__name__}.{name} ({inspect.getsourcefile(owner)}:{start + offset})"
    except (OSError, TypeError):
        return f"{owner.__name__}.{name}"


def _as_dictionary(model: Any, keys: Iterable[str]) -> str:
    """What the list should be: each tensor that it means, tied to what it is one with already, or to the embedding.

    A bias is not the embedding: of what has another shape, nobody can tell what it is to be tied to.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    targets = dict.fromkeys(name for key in keys for name in own if _means(key, name))
    try:
        embedding = model.get_input_embeddings().weight
        source = next(name for name, parameter in own.items() if parameter is embedding)
    except (AttributeError, NotImplementedError, StopIteration):
        embedding, source = None, "NAME_OF_THE_INPUT_EMBEDDING.weight"
    ties: dict[str, str] = {}
    for name in targets:
        same = [other for other, tensor in own.items() if tensor is own[name] and other not in targets]
        fits = embedding is None or own[name].shape == embedding.shape
        ties[name] = same[0] if same else source if fits else "NAME_OF_WHAT_IT_IS_TIED_TO"
    return json.dumps({name: other for name, other in ties.items() if name != other})


def _means(key: str, name: str) -> bool:
    """Whether an entry of such a list, a pattern to transformers 4, means a tensor."""
    try:
        return re.search(key, name) is not None
    except re.error:
        return key == name
