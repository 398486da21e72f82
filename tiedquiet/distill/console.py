"""What else is said while a bar is shown."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


@contextlib.contextmanager
def words_above_the_bar() -> Iterator[None]:
    """Warnings and log lines, torch's compiler has many, get lines of their own instead of the middle of the bar's."""
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    console = [one for one in loggers if any(getattr(it, "stream", None) is sys.stderr for it in one.handlers)]
    with warnings.catch_warnings(), logging_redirect_tqdm(console):
        warnings.showwarning = _write_warning
        yield


def _write_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    tqdm.write(warnings.formatwarning(message, category, filename, lineno, line).rstrip(), file=sys.stderr)
