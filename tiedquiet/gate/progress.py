"""A progress bar on a terminal: nothing for the first two seconds, and it leaves nothing behind."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread
from typing import Any

from tiedquiet.gate.printing import is_terminal, printable

_DELAY, _EVERY = 2.0, 0.1  # seconds
_MOST_OF_A_LABEL = 40
_LOADING = "loading {desc} [{elapsed}]"
_COMPARING = "comparing {desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}]"
_shown: ContextVar[Any] = ContextVar("tiedquiet_progress", default=None)


@contextmanager
def shown(is_wanted: bool) -> Iterator[None]:
    """Draw a bar on stderr while the body runs, if that is a terminal that can redraw a line."""
    if not is_wanted or not is_terminal(sys.stderr) or os.environ.get("TERM") == "dumb":
        yield
        return
    from tqdm import tqdm  # transformers needs it

    bar = tqdm(
        unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True, leave=False, delay=_DELAY, bar_format=_LOADING
    )
    over = Event()
    drawing = Thread(target=_draw, args=(bar, over), name="tiedquiet-progress", daemon=True)
    token = _shown.set(bar)
    drawing.start()
    try:
        yield
    finally:
        _shown.reset(token)
        over.set()
        drawing.join()
        bar.close()


def loading(label: str) -> None:
    """Say what is loaded from now on; its text may be that of strangers."""
    if (bar := _shown.get()) is not None:
        bar.bar_format, bar.desc = _LOADING, printable(label, _MOST_OF_A_LABEL)
        bar.start_t = time.time()


def comparing(total: int) -> None:
    """Say that so many bytes of it are compared from now on."""
    if (bar := _shown.get()) is not None:
        bar.total, bar.n, bar.start_t = total, 0, time.time()
        bar.bar_format = _COMPARING


def compared(count: int) -> None:
    """Say that so many more bytes have been compared."""
    if (bar := _shown.get()) is not None:
        bar.n += count


def _draw(bar: Any, over: Event) -> None:
    # By the clock, not by progress: nothing says how far a load has come.
    if not over.wait(_DELAY):
        while not over.wait(_EVERY):
            bar.refresh()
        bar.clear()
