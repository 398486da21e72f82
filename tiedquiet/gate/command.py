"""`python -m tiedquiet check`: load a checkpoint as users do, and hold every tensor of the model against its files."""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import tiedquiet
from tiedquiet.gate.diagnosis import CannotCheck, damage, explain
from tiedquiet.gate.source import Part, Source, loader_of, parts_of
from tiedquiet.verdict import BUFFER, LOUD, WELL, Finding, Verdict

PACKAGES = ("tiedquiet", "transformers", "torch", "wrapt", "diffusers", "accelerate", "peft")
_ABSENT = "not in the checkpoint"
DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `check` takes to its parser."""
    parser.add_argument("source", metavar="PATH|HUB_ID", help="a folder, a .gguf file, or a model's name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument(
        "--class",
        dest="cls",
        metavar="NAME",
        help="class to load it as: of transformers, of the checkpoint's own code, or package.module.Class "
        "(default: what its config names)",
    )
    parser.add_argument("--device", default="cpu", help="where to load it: cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="load it as this type (default: the file's)")
    parser.add_argument("--json", action="store_true", help="print JSON for machines instead of lines")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code that comes with the checkpoint run")


def check(options: argparse.Namespace) -> int:
    """Check what `add_arguments` describes; 0 all is well, 1 something is not.

    Raises:
        CannotCheck: it cannot be loaded.
    """
    import_module("transformers")
    from tiedquiet.doors import wrapping

    if reason := wrapping.inert_because():
        raise CannotCheck(reason)
    with _silence(), tiedquiet.enable("on"):
        source = Source(options.source, options.revision)
        parts, others = parts_of(source, options.cls)
        results = [_check(part, options) for part in parts]
    if options.json:
        found = [result.as_json() for result in results]
        all_of_it = {"versions": versions(), "source": options.source, "components": found, "not_checked": others}
        print(json.dumps(all_of_it, indent=2))
    else:
        print("\n".join(line for result in results for line in result.as_lines()))
        if others:
            print(f"not checked: {', '.join(others)}")
    return int(any(result.is_loud for result in results))


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is logged, and no bar is drawn, while a checkpoint is loaded: what is printed afterwards says it all.

    What code of the checkpoint prints goes to stderr.
    """
    from transformers.utils import logging as theirs

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "tiedquiet")]
    levels, bars = [logger.level for logger in loggers], theirs.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()


def versions() -> dict[str, str | None]:
    """The installed version of each package that matters; None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return {**found, "tiedquiet": tiedquiet.__version__}


# One model


class _Result(NamedTuple):
    part: str
    cls: str
    files: list[str]
    held: int
    total: int
    buffers: int
    findings: list[Finding]
    missing: list[str]
    allowed: list[str]
    unexpected: list[str]
    note: str

    @property
    def is_loud(self) -> bool:
        return bool(self.missing or self.note) or any(f.verdict not in WELL for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "component": self.part or ".",
            "class": self.cls,
            "loud": self.is_loud,
            "files": self.files,
            "held": self.held,
            "tensors": self.total,
            "buffers": self.buffers,
            "findings": [asdict(finding) for finding in self.findings],
            "missing": self.missing,
            "missing_allowed": self.allowed,
            "unexpected": self.unexpected,
            "note": self.note,
        }

    def as_lines(self) -> Iterator[str]:
        tensors = "tensor holds" if self.total == 1 else "tensors hold"
        said = [f"{self.held:,} of {self.total:,} {tensors} the file's bytes"]
        count = Counter(finding.verdict for finding in self.findings)
        unwritten = sum(1 for f in self.findings if f.verdict is Verdict.UNWRITTEN and f.why == BUFFER)
        said += [
            f"{count[verdict]:,} {verdict.value}" for verdict in (*WELL, *LOUD, Verdict.UNPROVEN) if count[verdict]
        ]
        said += [f"{len(self.missing):,} missing"] if self.missing else []
        said += [f"{len(self.allowed):,} not stored, which its class allows"] if self.allowed else []
        if self.buffers:
            written = f"{unwritten:,} never written" if unwritten else "written" if self.buffers == 1 else "all written"
            said.append(f"{self.buffers:,} buffer{'s' * (self.buffers > 1)}, {written}")
        yield f"{self.part and self.part + ': '}{self.cls}: {'; '.join(said)}"
        if self.note:
            yield f"  {self.note}"
        rows = [
            (f.key, f.verdict.value, f.source if f.source and f.source != f.key else "", _why(f)) for f in self.findings
        ]
        found = {finding.key for finding in self.findings}
        rows += [(key, "missing", "", _ABSENT) for key in self.missing if key not in found]
        rows += [(key, "unexpected", "", "in the checkpoint but not in the model") for key in self.unexpected]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip()


def _check(part: Part, options: argparse.Namespace) -> _Result:
    from tiedquiet.gate.compare import compare
    from tiedquiet.proof import record
    from tiedquiet.proof.files import Checkpoint

    loader, note = loader_of(part, options.trust_remote_code)
    model, info = _load(part, loader, options)
    known = record.of(model)
    name = type(model).__name__
    if known is None:
        raise CannotCheck(
            f"{part.label}: {name} was not loaded by `from_pretrained` of transformers, so nothing can be said"
        )
    if note:
        note += f": loaded as {name}, so a head, if there is one, was not checked; name the class with --class"
    files = list(dict.fromkeys(known.files))
    checkpoint = Checkpoint(None, files, getattr(model, "base_model_prefix", ""))
    undos = [partial(_undo, model), partial(_undo_anew, model)]
    conversions = getattr(model, "_weight_conversions", None) or ()
    held, total, buffers, findings = compare(model, known, checkpoint, undos, conversions)
    judged = {finding.key for finding in findings}
    missing = {finding.key for finding in findings if finding.verdict is Verdict.MISSING}
    missing |= set(info["missing_keys"]) - judged
    allowed = sorted(known.missing - missing - judged)
    unexpected = sorted(info["unexpected_keys"])
    return _Result(part.name, name, files, held, total, buffers, findings, sorted(missing), allowed, unexpected, note)


def _undo(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Give tensors the names and the form back that they had in the files, as saving the model does."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))


def _undo_anew(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same by the conversions of its class: an adapter that was loaded since leaves the model its own alone."""
    used = vars(model).pop("_weight_conversions", None)
    try:
        return _undo(model, tensors)
    finally:
        if used is not None:
            model._weight_conversions = used


def _load(part: Part, loader: Any, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    how = {"dtype": options.dtype, "device_map": options.device, "output_loading_info": True}
    optional = {
        "subfolder": part.name,
        "revision": part.source.revision,
        "gguf_file": part.source.gguf,
        "trust_remote_code": options.trust_remote_code,
    }
    how |= {name: value for name, value in optional.items() if value}
    try:
        loaded: tuple[Any, dict[str, Any]] = loader.from_pretrained(part.source.name, **how)
        return loaded
    except Exception as error:
        if part.source.gguf:
            kind = f"{Path(part.source.name, part.source.gguf)} is a GGUF file, which cannot be loaded here"
            raise CannotCheck(f"{kind}: {explain(error, None, options.trust_remote_code)}") from error
        config = part.source.file("config.json", part.name) or part.source.file("adapter_config.json", part.name)
        folder = config.parent if config else None
        damaged = next(damage(folder), "") if folder else ""
        reason = explain(error, folder, options.trust_remote_code, damaged)
        if "ignore_mismatched_sizes" in str(error) and not damaged:
            with suppress(Exception):
                _, info = loader.from_pretrained(part.source.name, **how, ignore_mismatched_sizes=True)
                reason = "; ".join(
                    f"{key} is {_shape(stored)} in the file and {_shape(wanted)} in the model"
                    for key, stored, wanted in sorted(info["mismatched_keys"])
                )
        raise CannotCheck(f"{part.label} cannot be loaded as {loader.__name__}: {reason}") from error


def _why(finding: Finding) -> str:
    if finding.verdict is Verdict.MISSING:
        return finding.why or _ABSENT
    return f"{finding.why}: it holds whatever was in memory" if finding.verdict is Verdict.UNWRITTEN else finding.why


def _shape(shape: Any) -> str:
    return " by ".join(map(str, shape)) or "a scalar"
