"""What a folder has in the place of what is looked for, so that a line can say what to do."""

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tiedquiet.gate.printing import few
from tiedquiet.gate.source import CONFIGS, outside

_MOST = 3_000  # entries that are looked at: somebody may name a home directory
_DEEP = 3  # as a download that has not finished (`.cache/huggingface/download/...incomplete`)
_SHARD = re.compile(r"-\d+-of-\d+\.(?:safetensors|bin)$")


def of_config(folder: Path) -> str:
    """What to name, or what there is, in a folder without a config; a clause."""
    found = list(_files(folder))
    models = sorted({str(path.parent.relative_to(folder)) for path in found if path.name in CONFIGS})
    if len(models) == 1:
        return f"name the model in it, {folder / models[0]}"
    return f"name one of the models in it: {few(models)}" if models else _largest(folder, found)


def of_weights(folder: Path) -> str:
    """What there is in a folder without weights under the usual names; a clause."""
    said = _largest(folder, list(_files(folder)))
    if (folder / "adapter_config.json").is_file():
        said += "; transformers takes this adapter for a whole model because of its config.json: take that away"
    return said


def _largest(folder: Path, files: list[Path]) -> str:
    largest = max(files, key=_size, default=None)
    if largest is None:
        return "there is no file in it"
    kind = ", a shard, and no index names it" if _SHARD.search(largest.name) else ""
    kind = kind or ", which can be checked by its name" * (largest.suffix == ".gguf")
    return f"its largest file is {largest.relative_to(folder)}{kind}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it is gone
        return 0


def _files(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those inside, the nearest first; none to which a link leads outside."""
    # `Path.is_file` would raise where a link may not be followed.
    entries = (path for path in islice(_entries(folder), _MOST) if os.path.isfile(path))
    return (path for path in entries if None in (outside(folder, path), outside(path.parent, path)))


def _entries(folder: Path) -> Iterator[Path]:
    waiting = [(folder, _DEEP)]
    for place, deeper in waiting:
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:  # it may not be read
            continue
        yield from map(Path, entries)
        inside = (one for one in entries if one.is_dir(follow_symlinks=False) and one.name != ".git")
        waiting += [(Path(one), deeper - 1) for one in inside if deeper]
