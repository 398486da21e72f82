"""What `check` is given, a folder or a model on the hub, and the files in it.

Whoever made it may have put anything there: a link to another place, a pipe that never ends, a name with `..` in it.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tiedquiet.gate.refusal import CannotCheck

MOST = 100_000_000  # bytes of a header, by the format of safetensors; and of a JSON file
POINTER = "version https://git-lfs"  # what a file begins with that git has in the place of a large one
# Any of these says what a folder is: a GGUF file beside it is one more form of that.
_OF_WHOLE = ("config.json", "model_index.json", "modules.json")
CONFIGS = (*_OF_WHOLE, "adapter_config.json")
# Under these, a config names code to be fetched from the hub and run: `{"_attn_implementation": "somebody/kernel"}`,
# and in the first releases `_attn_implementation_internal`.
_KERNELS = ("attn_implementation", "experts_implementation")


looked_at: set[Path] = set()  # the folders from which a loader may read, without links


class Source:
    """A folder, or a model on the hub.

    Raises:
        CannotCheck: it is a file that is no checkpoint by itself.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        if not _can_be_a_path(name):
            raise CannotCheck(f"{name} is neither the name of a folder nor that of a model on the hub")
        if "://" in name and not os.path.lexists(name):
            raise CannotCheck(f"{name} is a URL; name a folder, or a model on the hub by its owner/name")
        path = Path(name)
        self.name, self.revision, self.gguf = name, revision, ""
        self.is_local, self._unreachable = os.path.lexists(path), False
        if path.is_file() and path.suffix == ".gguf":
            self.name, self.gguf = str(path.parent), path.name
        elif path.is_file():
            raise CannotCheck(f"{name} is a file, and no folder")
        elif self.is_local and not path.is_dir():
            raise CannotCheck(f"{name} is neither a folder nor a file")
        elif not any((path / config).is_file() for config in _OF_WHOLE) and (found := sorted(path.glob("*.gguf"))):
            self.gguf = found[0].name
            if len(found) > 1:
                raise CannotCheck(f"{name} holds {len(found)} GGUF files; name one of them")
            self._keep_inside(found[0])

    def folder(self, part: str = "") -> Path:
        """The folder itself, or that of a part of a pipeline.

        Raises:
            CannotCheck: the part's name points outside it.
        """
        path = Path(self.name, part)
        if part and not is_inside(part):
            raise CannotCheck(f"model_index.json names {part}, which points outside the folder")
        if self.is_local:
            self._keep_inside(path)
            looked_at.add(Path(os.path.realpath(path)))
        return path

    def file(self, name: str, part: str = "") -> Path | None:
        """A file of it on this machine, downloaded if need be; None where it has none.

        Raises:
            CannotCheck: it is outside the folder, not a regular file, or cannot be downloaded.
        """
        folder = self.folder(part)
        if self.is_local:
            path = folder / name
            try:
                path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise CannotCheck(f"{path} cannot be read: {error.strerror}") from error
            self._keep_inside(path)
            if not path.is_file():
                raise CannotCheck(f"{path} is not a regular file")
            return path
        from huggingface_hub import errors, hf_hub_download

        get = partial(hf_hub_download, subfolder=part or None, revision=self.revision)
        try:
            path = Path(get(self.name, name, local_files_only=self._unreachable))
            looked_at.add(Path(os.path.realpath(path.parent)))
            return path
        except errors.EntryNotFoundError as error:
            self._unreachable |= isinstance(error, errors.LocalEntryNotFoundError)
            return None
        except errors.HFValidationError as error:
            raise CannotCheck(f"{self.name} is not a folder, and not a valid name for a model on the hub") from error
        except (errors.HfHubHTTPError, OSError) as error:
            reason = " ".join(str(error).strip().split("\n\n")[-1].split())
            raise CannotCheck(f"{self.name} is not a folder, and it cannot be downloaded: {reason}") from error

    def place_of(self, part: str, *files: str) -> str:
        """Where diffusers reads a part of a pipeline: in the folder of its name, or, where there is none, in its own.

        Args:
            part: its name.
            files: of which the folder has one, for a pipeline on the hub, of which no folder can be listed.
        """
        if self.is_local:
            return part if self.folder(part).is_dir() else ""
        return part if any(self.file(file, part) is not None for file in files) else ""

    def absence(self) -> str:
        """Why there is no config to read."""
        if not (why := self.unreachable()):
            return f"{self.name} has neither config.json nor model_index.json"
        what = f"{self.name} at {self.revision}" if self.revision else self.name
        return f"{what} is no folder, the local cache has no config.json of it, and {why}"

    def unreachable(self) -> str:
        """Why no more than the local cache could be asked for a file that it lacks, as a clause; empty if more was."""
        from huggingface_hub import constants

        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there is no connection"
        return f"the hub cannot be reached: {why}" if self._unreachable else ""

    def read(self, name: str, part: str = "", kind: type = dict) -> Any:
        """A JSON file of it, an object or another kind; None where it has none.

        Raises:
            CannotCheck: it cannot be read, or holds something else.
        """
        path = self.file(name, part)
        return None if path is None else read_json(path, kind)

    def _keep_inside(self, path: Path) -> None:
        if path.is_symlink() and not path.exists():
            raise CannotCheck(f"{path} is a link to {os.path.realpath(path)}, which is not there")
        if (target := outside(Path(self.name), path)) is not None:
            raise CannotCheck(f"{path} points outside the folder, to {target}; copy its target into the folder")


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds: an object, or a list.

    Raises:
        CannotCheck: it is too large, cannot be read, or holds something else.
    """
    try:
        check_length(path)
        text = path.read_text(encoding="utf-8")
        if text.startswith(POINTER):
            raise CannotCheck(f"{path} is a Git LFS pointer instead of the file: run `git lfs pull`")
        if text.startswith("\ufeff"):  # transformers cannot read it, either
            raise CannotCheck(f"{path} begins with a byte order mark; save it as UTF-8 without one")
        content = json.loads(text)
    except RecursionError as error:
        raise CannotCheck(f"{path} cannot be read: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise CannotCheck(f"{path} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise CannotCheck(f"{path} does not hold a JSON {'object' if kind is dict else 'list'}")
    return content


def check_length(path: Path) -> None:
    """Raise CannotCheck if a file is too large to be one of JSON."""
    if (size := path.stat().st_size) > MOST:
        raise CannotCheck(f"{path} has {size:,} bytes, too many for a JSON file")


def own_files(folder: Path, *ends: str) -> list[Path]:
    """The files of a folder whose names end so; no pipe and no device, and nothing to which a link leads outside."""
    named = (path for path in folder.iterdir() if path.name.endswith(ends))
    return sorted(path for path in named if path.is_file() and outside(folder, path) is None)


def is_inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it starts from, on any system."""
    kinds = PurePosixPath(name), PureWindowsPath(name)
    return _can_be_a_path(name) and not any(p.anchor or p.drive or ".." in p.parts for p in kinds)


def _can_be_a_path(name: str) -> bool:
    try:
        return bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def kernels(config: object) -> Iterator[str]:
    """The kernels of the hub that a config names, at any depth: transformers fetches such code, and runs it."""
    for key, value in entries(config):
        if any(name in str(key) for name in _KERNELS):
            named = value.values() if isinstance(value, dict) else [value]
            yield from (name for name in named if isinstance(name, str) and "/" in name)


def under(config: object, wanted: str) -> list[Any]:
    """What a config has under a key, at any depth."""
    return [value for key, value in entries(config) if key == wanted]


def entries(config: object) -> Iterator[tuple[str, Any]]:
    """Each key of a config and its value, at any depth."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def outside(folder: Path, path: Path) -> Path | None:
    """Where a path leads, if that is not in a folder."""
    root, target = (Path(os.path.realpath(place)) for place in (folder, path))
    return None if any(target.is_relative_to(place) for place in (root, *_blobs(root))) else target


def _blobs(root: Path) -> Iterator[Path]:
    """Where the hub's cache keeps the files to which the links in a snapshot lead."""
    for place in root.parents:
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            yield place.parent / "blobs"
