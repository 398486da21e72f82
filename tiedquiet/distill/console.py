"""Console output besides the run's own: warnings while a bar is shown, and errors of the disk and of memory."""

import contextlib
import logging
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tiedquiet.distill.options import fail


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


def in_one_line(main: Callable[[], int]) -> int:
    """Run it, with one line instead of a traceback where the world is not as it should be; returns the exit status."""
    try:
        return main()
    except KeyboardInterrupt:  # outside training, which saves a checkpoint
        print("tiedquiet.distill: interrupted; what was cached is kept", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:  # a full or read-only disk, at any moment
        what = f"{error.filename or 'the disk'}: {error.strerror}" if error.strerror else str(error)
        fail(" ".join(what.split())[:300])  # libraries have errors of the kind that are not the disk's
    except torch.OutOfMemoryError as error:
        asked = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        fail(
            f"{asked}; what was saved before is kept; --plan says what training takes, "
            "--lora_rank, --gradient_checkpointing and a smaller --train_batch_size take less"
        )
    except (SafetensorError, RuntimeError) as error:  # that is what the disk's errors become in their writers
        refused = re.search(r"I/O error: (.+?) \(os error|inline_container|PytorchStreamWriter", str(error))
        if not refused:
            raise
        fail(f"the disk: {refused[1] or 'a checkpoint could not be written'}; what was saved before is kept")
