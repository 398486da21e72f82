"""What a loader may read and run: some configs have it read other models than the one that was named."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from tiedquiet.gate.source import looked_at, outside
from tiedquiet.proof.files import closed_because

_OTHER = "it has {} read, which is no part of it; --trust-remote-code allows it"


@contextmanager
def confined(trust: bool) -> Iterator[None]:
    """Inside, transformers finds no code, and of the files on this machine only those in folders that are looked at.

    A config may name a folder with another model, or one in the hub's cache, and say itself that its code may run:
    `{"backbone": "x", "backbone_kwargs": {"trust_remote_code": true}}`. And a config inside may be the one by which the
    class of a part reads other weights: `{"text_config": {"transformers_weights": "../x.safetensors"}}`.

    Args:
        trust: whether it may.
    """
    from transformers import modeling_utils
    from transformers.utils import hub

    find, find_weights = hub.cached_files, modeling_utils._get_resolved_checkpoint_files

    @wraps(find)
    def found(path_or_repo_id: Any, *given: Any, **more: Any) -> Any:
        paths = find(path_or_repo_id, *given, **more)
        for path in map(Path, paths or ()):
            if path.suffix == ".py":
                raise OSError(f"it has code run, {path}; --trust-remote-code allows it")
            if os.path.isdir(path_or_repo_id) and not _is_in(path.parent, path):
                raise OSError(_OTHER.format(path))
        return paths

    @wraps(find_weights)
    def found_weights(**given: Any) -> Any:
        paths, about = find_weights(**given)
        if os.path.isdir(str(given["pretrained_model_name_or_path"])):
            for path in map(Path, paths or ()):
                if not any(_is_in(folder, path) for folder in path.parents):  # an index may name a folder inside
                    raise OSError(_OTHER.format(path))
        if reason := closed_because(paths or ()):
            raise OSError(reason)
        return paths, about

    if not trust:
        hub.cached_files, modeling_utils._get_resolved_checkpoint_files = found, found_weights
    looked_at.clear()
    try:
        yield
    finally:
        hub.cached_files, modeling_utils._get_resolved_checkpoint_files = find, find_weights


def _is_in(folder: Path, path: Path) -> bool:
    """Whether a folder is looked at, and a path in it leads to nowhere else."""
    return Path(os.path.realpath(folder)) in looked_at and outside(folder, path) is None


@contextmanager
def without_hub(is_wanted: bool) -> Iterator[None]:
    """Nothing is asked of the hub meanwhile, where that is wanted: a config may have any model fetched (`backbone`)."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or is_wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
