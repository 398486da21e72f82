"""What a loader may read and run: some configs have it read other models than the one that was named."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from tiedquiet.gate.source import looked_at, outside


@contextmanager
def confined(trust: bool) -> Iterator[None]:
    """Inside, transformers finds no code, and of the files on this machine only those in folders that are looked at.

    A config may name a folder with another model, or one in the hub's cache, and say itself that its code may run:
    `{"backbone": "x", "backbone_kwargs": {"trust_remote_code": true}}`.

    Args:
        trust: whether it may.
    """
    from transformers.utils import hub

    kept = hub.cached_files  # which `cached_file` calls as well

    @wraps(kept)
    def find(path_or_repo_id: Any, *given: Any, **more: Any) -> Any:
        found = kept(path_or_repo_id, *given, **more)
        for path in map(Path, found or ()):
            if path.suffix == ".py":
                raise OSError(f"its config has code run, {path}; --trust-remote-code allows it")
            folder = Path(os.path.realpath(path.parent))
            if os.path.isdir(path_or_repo_id) and (folder not in looked_at or outside(folder, path) is not None):
                raise OSError(f"its config has {path} read, which is no part of it; --trust-remote-code allows it")
        return found

    if not trust:
        hub.cached_files = find
    looked_at.clear()
    try:
        yield
    finally:
        hub.cached_files = kept


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
