"""Which line of an idiom changed a stored tensor."""

import os.path
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from types import FrameType
from typing import Any

import torch

from tests.idioms.tiny import Idiom, Tiny
from tests.idioms.truths import same


class Culprits:
    """The lines of this folder that change a stored tensor, found by comparing its bytes after every line.

    Slow, and blind outside this folder; but it cannot be wrong about what it names. Only lines that write to the
    memory that the tensor was read to count: one that puts another in its place leaves no trace to follow.
    """

    def __init__(self, idiom: Idiom, file: Mapping[str, torch.Tensor]) -> None:
        self.idiom, self.file = idiom, file
        self.of: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self._model: Tiny | None = None
        self._last: tuple[str, str] | None = None
        self._read_to: dict[str, int] = {}
        self._seen: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "Culprits":
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if not _ours(frame.f_code.co_filename) or frame.f_code.co_name in (
            "__init__",
            "__exit__",
            "add",
            "load",
            "_enter",
        ):
            return None
        # The model comes to light as `self` of its own `_init_weights` or `tie_weights`.
        if self._model is None and isinstance(candidate := frame.f_locals.get("self"), self.idiom.cls):
            self._model = candidate
        return self._step

    def _step(self, frame: FrameType, event: str, _arg: object) -> Any:
        if self._model is not None:
            sys.settrace(None)  # comparing would be traced, too
            self._compare(self._model)
            sys.settrace(self._enter)
        if event == "line":
            self._last = _place(frame)
        elif event == "return" and (caller := frame.f_back) is not None:
            self._last = _place(caller) if _ours(caller.f_code.co_filename) else None
        return self._step

    def _compare(self, model: "Tiny") -> None:
        for key, value in model.state_dict(keep_vars=True).items():
            if key not in self.file or value.is_meta:
                continue
            now = value.detach()
            if same(now, self.file[key].to(now.dtype)):
                self._read_to.setdefault(key, now.data_ptr())
            before = self._seen.get(key)
            if before is not None and same(before, now):
                continue
            if before is not None and self._last and self._read_to.get(key) == now.data_ptr():
                self.of[key].add(self._last)
            self._seen[key] = now.clone()


@cache
def _ours(filename: str) -> bool:
    return os.path.dirname(filename) == os.path.dirname(__file__)


def _place(frame: FrameType) -> tuple[str, str]:
    """The function, and the line as a message names it."""
    return frame.f_code.co_name, f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
