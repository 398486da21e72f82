"""What `check` is pointed at: a folder or a model on the hub, the models in it, and the class to load each as."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tiedquiet.gate.diagnosis import CannotCheck


class Source:
    """A folder, or a model on the hub."""

    def __init__(self, name: str, revision: str | None) -> None:
        path = Path(name)
        self.name, self.revision, self.gguf = name, revision, ""
        self.is_local, self._unreachable = path.exists(), False
        if path.is_file() and path.suffix == ".gguf":
            self.name, self.gguf = str(path.parent), path.name
        elif path.is_file():
            raise CannotCheck(f"{name} is a file; give the folder that it is in")
        elif path.is_dir() and not (path / "config.json").is_file() and (found := sorted(path.glob("*.gguf"))):
            self.gguf = found[0].name
            if len(found) > 1:
                raise CannotCheck(f"{name} holds {len(found)} GGUF files; name one of them")

    def file(self, name: str, part: str = "") -> Path | None:
        """A file of it on this machine, downloaded if need be; None where it has none."""
        if self.is_local:
            path = Path(self.name, part, name)
            return path if path.is_file() else None
        from huggingface_hub import errors, hf_hub_download

        get = partial(hf_hub_download, subfolder=part or None, revision=self.revision)
        try:
            return Path(get(self.name, name, local_files_only=self._unreachable))
        except errors.EntryNotFoundError as error:
            self._unreachable |= isinstance(error, errors.LocalEntryNotFoundError)
            return None
        except errors.HFValidationError as error:
            raise CannotCheck(f"{self.name} is not a folder, and no model on the hub can have this name") from error
        except (errors.HfHubHTTPError, OSError) as error:
            reason = " ".join(str(error).strip().split("\n\n")[-1].split())
            raise CannotCheck(f"{self.name} is not a folder, and it cannot be downloaded: {reason}") from error

    def absence(self) -> str:
        """Why there is no config to read."""
        if not self._unreachable:
            return f"{self.name} has neither config.json nor model_index.json"
        from huggingface_hub import constants

        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there is no connection"
        return f"{self.name} is neither a folder nor in the local cache, and the hub cannot be reached: {why}"

    def read(self, name: str, part: str = "") -> dict[str, Any] | None:
        """A JSON file of it; None where it has none."""
        path = self.file(name, part)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CannotCheck(f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise CannotCheck(f"{path} holds no JSON object")
        return content


class Part(NamedTuple):
    """A model to load: all of the source, or the part of a pipeline that lies in a subfolder."""

    source: Source
    name: str
    config: dict[str, Any]
    cls: str | None

    @property
    def label(self) -> str:
        """What a line about it begins with."""
        return f"{self.source.name}/{self.name}" if self.name else self.source.name


def parts_of(source: Source, cls: str | None) -> tuple[list[Part], list[str]]:
    """The models that are looked at, and the names of the parts that are not.

    Args:
        source: what was named.
        cls: the class that it is to be loaded as; None for the one that it names.

    Raises:
        CannotCheck: there is none.
    """
    if (index := source.read("model_index.json")) is not None:
        if cls:
            raise CannotCheck(f"{source.name} is a pipeline of several models; --class is for a folder of one")
        entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
        parts, others = [], []
        for name, (library, kind) in sorted(entries.items()):
            config = source.read("config.json", name) if kind else None
            if library == "transformers" and config is not None:
                parts.append(Part(source, name, config, kind))
            elif config is not None:
                others.append(f"{name} ({kind} of {library})")
        if not parts:
            raise CannotCheck(f"{source.name} is a pipeline without a model of transformers")
        return parts, others
    if source.gguf:
        return [Part(source, "", {}, cls)], []
    if (adapter := source.read("adapter_config.json")) is not None and source.file("config.json") is None:
        base = adapter.get("base_model_name_or_path")
        try:
            origin = Source(str(base), None)
            if (config := origin.read("config.json")) is None:
                raise CannotCheck(origin.absence())
        except CannotCheck as error:
            raise CannotCheck(f"{source.name} is an adapter, and its base model is not available: {error}") from error
        return [Part(source, "", config, cls)], []
    if (config := source.read("config.json")) is None:
        raise CannotCheck(source.absence())
    return [Part(source, "", config, cls)], []


def loader_of(part: Part, trust: bool) -> tuple[Any, str]:
    """What has the `from_pretrained` to call; and what has to be said about that, empty where the config names it.

    Raises:
        CannotCheck: there is no such class, or it is code that must not run.
    """
    import transformers

    name = part.cls or next(iter(part.config.get("architectures") or ()), None)
    if not name:
        return transformers.AutoModel, "config.json names no class in `architectures`"
    own = part.config.get("auto_map") or {}
    auto = next((key for key, value in own.items() if str(value).rpartition(".")[2] == name), "")
    if trust and hasattr(transformers, auto):
        return getattr(transformers, auto), ""
    if hasattr(transformers, name):
        return getattr(transformers, name), ""
    if auto:
        code = str(own[auto]).rpartition("--")[2].rpartition(".")[0]
        raise CannotCheck(
            f"{part.label}: its class {name} is code that ships with it ({code}.py); "
            "--trust-remote-code allows it to run"
        )
    module, _, last = name.rpartition(".")
    try:
        return getattr(import_module(module), last), ""
    except (ImportError, AttributeError, ValueError) as error:
        if part.cls:
            raise CannotCheck(f"{part.label}: there is no class {name} to load it as") from error
        raise CannotCheck(
            f"{part.label}: config.json names {name}, which transformers {transformers.__version__} does not have; "
            "name another class with --class"
        ) from error
