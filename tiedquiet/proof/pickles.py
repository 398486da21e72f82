"""Whether a `.bin` may be opened: it is a pickle, which not every torch reads safely."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

SAFE = (2, 10)  # of torch: its `weights_only` ran code up to 2.5, and corrupted memory up to 2.9
_trusted = ContextVar("_trusted", default=False)


def unsafe() -> str:
    """Why a pickle must not be opened with the installed torch, as a clause; empty if it may be."""
    version = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if _trusted.get() or version is None or tuple(map(int, version.groups())) >= SAFE:
        return ""
    return (
        f"torch {torch.__version__} does not read pickles safely (CVE-2025-32434, CVE-2026-24747); "
        f"install torch {SAFE[0]}.{SAFE[1]} or newer"
    )


@contextmanager
def trusted(trust: bool) -> Iterator[None]:
    """Inside, a pickle may be opened with any torch, if the user trusts the file."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)
