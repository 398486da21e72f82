"""`python -m tiedquiet check`: load a checkpoint as users do, and compare every tensor of the model with its files."""

import argparse
import atexit
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from importlib import import_module, metadata
from typing import TextIO

from tiedquiet.gate import progress, report
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.switch import enable
from tiedquiet.version import __version__

PACKAGES = ("tiedquiet", "transformers", "torch", "wrapt", "diffusers", "accelerate", "peft")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `check` takes to its parser."""
    parser.add_argument(
        "source",
        metavar="PATH|HUB_ID",
        type=_named,
        help="a folder, a .gguf file, a model's name on the hub, or a file of weights (--config)",
    )
    parser.add_argument("--revision", type=_named, help="branch, tag or commit on the hub (default: main)")
    parser.add_argument(
        "--class",
        dest="cls",
        metavar="NAME",
        type=_named,
        help="class to load it as: one of transformers, of the checkpoint's own code, or package.module.Class "
        "(default: what its config names)",
    )
    parser.add_argument(
        "--config",
        metavar="PATH|HUB_ID",
        type=_named,
        help="check a single file, as diffusers' from_single_file makes it the model or the pipeline of this config",
    )
    parser.add_argument(
        "--device", default="cpu", type=_named, help="where to load it: cpu (default), cuda, cuda:1, ..."
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="load it as this type (default: the file's)")
    parser.add_argument("--variant", type=_named, help="read this variant of the files: fp16 of model.fp16.safetensors")
    parser.add_argument(
        "--lora", type=_named, metavar="FILE", help="say how much of this LoRA file reaches the pipeline"
    )
    parser.add_argument("--resume", action="store_true", help="exit with 1 if the Trainer would not read all of it")
    parser.add_argument("--json", action="store_true", help="print JSON for machines instead of lines")
    parser.add_argument("--all", action="store_true", help="print every row, not the first 50 of a kind")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code that comes with the checkpoint run")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="open a .bin or .ckpt file even with a torch older than 2.10, which is not safe",
    )


def _named(text: str) -> str:
    """What a script takes from a variable that is not set names nothing."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def check(options: argparse.Namespace) -> int:
    """Check what `add_arguments` describes; 0 no problems, 1 problems found.

    Raises:
        CannotCheck: it cannot be loaded.
    """
    import_module("transformers")
    from tiedquiet.doors import wrapping

    if reason := wrapping.inert_because():
        raise CannotCheck(reason)
    from tiedquiet.gate import check as checking
    from tiedquiet.gate.confined import confined
    from tiedquiet.gate.load import How
    from tiedquiet.proof import pickles

    how = How(
        options.dtype,
        options.device,
        options.trust_remote_code,
        options.trust_pickle,
        options.resume,
        options.variant or "",
        options.lora or "",
    )
    shown = progress.shown(not options.json and not options.quiet)
    trusted = pickles.trusted(how.trust_pickle)
    with shown, _silence(how.trust), confined(how.trust), trusted, enable("on"):
        results, is_pipeline = checking.check(options.source, options.revision, options.cls, how, options.config)
    status = int(any(result.is_loud for result in results))
    if options.json:
        print(report.as_json(status, options.source, versions(), results))
    else:
        for line in report.as_lines(results, is_pipeline, options.all, options.quiet):
            print(line)
    return status


def versions() -> dict[str, str | None]:
    """The installed version of each package that matters; None if it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return {**found, "tiedquiet": __version__}


@cache
def _nowhere() -> TextIO:
    """What is written to it is lost. It stays open: a library that is imported meanwhile may log to it for good."""
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)
    atexit.register(nowhere.close)
    return nowhere


@contextmanager
def _silence(trust: bool) -> Iterator[None]:
    """Nothing is logged, warned of or asked, and no bar is drawn, while a checkpoint is loaded.

    What is printed afterwards says it all. A library may print names that strangers chose, and draw bars of its own:
    that goes nowhere. What code of the checkpoint prints, if it may run, goes to stderr.
    """
    from transformers.utils import logging as theirs

    disabled, bars = logging.root.manager.disable, theirs.is_progress_bar_enabled()
    logging.disable()
    theirs.disable_progress_bar()
    stdin, told = sys.stdin, sys.stderr if trust else _nowhere()
    try:
        with open(os.devnull) as nothing, redirect_stdout(told), redirect_stderr(told), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.stdin = nothing
            yield
    finally:
        sys.stdin = stdin
        logging.disable(disabled)
        if bars:
            theirs.enable_progress_bar()
