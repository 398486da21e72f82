"""Every class of a module in every way: what transformers and tiedquiet say of each load, against the truth."""

import gc
import importlib
import json
import logging
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks import tiny_models
from benchmarks.census import resume
from benchmarks.census.comparing import LOUD, is_one_of
from benchmarks.census.models import Saved
from benchmarks.census.truth import Truth
from benchmarks.census.ways import WAYS, Tensors, Way, base_model_s_file

SECONDS = 300  # that one class may take


# One class


def census_of_module(name: str, only: str, done: set[str], every: bool = False) -> list[dict[str, Any]]:
    """One line per class and way; a class or a way that cannot be tried is a line with its reason."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        short = name.rsplit(".", 1)[-1]
        return [] if short in done else [{"class": short, "way": None, "reason": reason(error)}]
    gc.freeze()  # or each collection walks over every module of transformers anew
    lines = []
    declaring = tiny_models.declaring_classes(module)
    carrying = tiny_models.classes_with_modules(module) if every else tiny_models.classes_that_may_carry(module)
    for cls in dict.fromkeys((*declaring, *carrying)):
        if re.search(only, cls.__name__) and cls.__name__ not in done:
            with limited(SECONDS):
                try:
                    lines += list(census_of_class(cls, not every))
                except Exception as error:
                    line = {"class": cls.__name__, "way": None, "reason": reason(error)}
                    line["no_ties"] = isinstance(error, tiny_models.NoTies)
                    line["may_carry"] = not every and cls not in declaring
                    lines.append(line)
    return lines


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:300]}"


@contextmanager
def limited(seconds: int, error: type[BaseException] = TimeoutError) -> Iterator[None]:
    """Raise an error in what takes longer."""

    def late(*_: object) -> None:
        raise error(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def census_of_class(cls: type[Any], needs_ties: bool = True) -> Iterator[dict[str, Any]]:
    saved = Saved(cls, needs_ties)
    for name, way in WAYS.items():
        line: dict[str, Any] = {"class": cls.__name__, "way": name}
        try:
            file = way.tensors(saved)
        except Exception as error:
            yield {**line, "reason": f"transformers does not save it: {reason(error)}"}
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = way.load(saved, Path(folder))
            if file is None or options is None:
                yield {**line, "reason": "does not apply"}
                continue
            config = json.loads(json.dumps(saved.config))
            way.change(config)
            Path(folder, "config.json").write_text(json.dumps(config))
            way.write(file, Path(folder))
            yield {**line, **census_of_load(saved, way, file, Path(folder), options)}
    line = {"class": cls.__name__, "way": "resume"}
    try:
        yield {**line, **resume.census_of_resume(saved)}
    except resume.NotTried as error:
        yield {**line, "reason": f"transformers does not resume it: {reason(error.__cause__ or error)}"}


# One load


def census_of_load(
    saved: Saved, way: Way, file: dict[str, Any], folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    import tiedquiet
    from tests.checkpoints import printing
    from tests.idioms import dirty_memory

    tiedquiet.disable()
    cls = way.cls(saved.cls)
    try:
        with overheard() as (reports, printed, read), tiedquiet.enable("on"), dirty_memory():
            model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        try:
            with printing():
                cls.from_pretrained(folder, output_loading_info=True, **options)
        except Exception:
            return {"reason": f"transformers does not load it: {reason(error)}"}
        return {"failed_because_of_it": [reason(error)]}
    truth = Truth(saved, way, file, model, info, read)
    if cls is not saved.cls and truth.reported:
        truth.note_unread(read_by(saved.cls, folder, saved.state))
    if way.tensors is base_model_s_file and truth.reported:
        prefix, base = saved.model.base_model_prefix, saved.model.base_model
        own = {name.removeprefix(f"{prefix}."): value for name, value in saved.state.items() if name.startswith(prefix)}
        truth.note_unread({f"{prefix}.{name}" for name in read_by(type(base), folder, own)})
    proof = tiedquiet.check(model)
    said = {finding.key: str(finding.verdict) for finding in proof.findings}
    hints = {finding.key: finding.source for finding in proof.findings if finding.verdict == "missing"}
    assert len(reports) <= 1, "one load makes one report"
    shown = reports[0] if reports else set()
    expected = truth.verdicts()
    wrong: dict[str, list[Any]] = {"missed": [], "false_alarms": [], "verdict_wrong": []}
    for key in sorted({*said, *expected}):
        ours, true = said.get(key), expected.get(key)
        if ours != true and not truth.cannot_tell(key, ours, hints.get(key)):
            kind = "missed" if true in LOUD else "false_alarms"
            wrong["verdict_wrong" if (ours in LOUD) is (true in LOUD) else kind].append([key, ours, true])
    kinds = {verdict for verdict in said.values() if verdict in LOUD}
    rows = {key: truth.is_false(key, expected) for key in truth.reported}
    false, true_rows = {k for k, value in rows.items() if value}, {k for k, value in rows.items() if not value}
    return {
        "tensors": len(truth.stored),
        "buffers": len(truth.buffers),
        "loud": sum(verdict in LOUD for verdict in expected.values()),
        "rows_true": len(true_rows),
        "rows_false": len(false),
        "hidden_wrongly": sorted(true_rows - shown),
        "kept_wrongly": sorted(false & shown),
        **wrong,
        "cause_wrong": [
            [f.key, said[f.key], f.source, f.why]
            for f in proof.findings
            if said[f.key] == expected.get(f.key) and not truth.is_right_cause(f)
        ],
        "said_nothing": sorted(kind for kind in kinds if not any(kind in text for text in printed.loud)),
        "clashes": truth.clashes,
        "padding": sorted(truth.padding),
        "read_otherwise": truth.read_otherwise,
        "other_buffers": truth.other_buffers(),
        "verdicts": dict(Counter(said.values())),
        "declared_hides": sum(bool(saved.group_of(key)) for key in true_rows),
        "is_hides": sum(any(truth.one(key, other) for other in truth.now if other != key) for key in true_rows),
    }


def read_by(cls: type[Any], folder: Path, saved: Tensors) -> set[str]:
    """What transformers reads from these files for a class, of what was saved: it mixes up a few.

    Merged or split tensors may be read otherwise than they were saved; what has another's values is mixed up.
    """
    from tests.checkpoints import holds, printing

    with printing():
        model, info = cls.from_pretrained(folder, output_loading_info=True)
    state = model.state_dict()
    read = state.keys() - info["missing_keys"] - {entry[0] for entry in info["mismatched_keys"]}
    right = {
        name for name in read & saved.keys() if holds(state[name], saved[name].to(state[name].dtype), any_row=True)
    }
    return right | {name for name in read & saved.keys() - right if not is_one_of(state[name], saved.values())}


@contextmanager
def overheard() -> Iterator[tuple[list[set[str]], Any, Tensors]]:
    """The missing keys that transformers' own report was given, what both libraries logged, and what was read."""
    from transformers import modeling_utils
    from transformers.utils import loading_report

    from tests.checkpoints import printing

    reports: list[set[str]] = []
    original = loading_report.log_state_dict_report

    @wraps(original)
    def report(*args: Any, **kwargs: Any) -> Any:
        info = kwargs.get("loading_info")
        reports.append(set(info.missing_keys if info is not None else kwargs["missing_keys"]))
        return original(*args, **kwargs)

    read: Tensors = {}
    reading = modeling_utils.PreTrainedModel._load_pretrained_model

    @wraps(reading)
    def noted(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = reading(model, *args, **kwargs)
        state = model.state_dict(keep_vars=True).items()
        read.update((name, tensor.detach().clone()) for name, tensor in state if not tensor.is_meta)
        return result

    theirs = logging.getLogger("transformers")
    handlers, theirs.handlers = theirs.handlers, []
    loading_report.log_state_dict_report = modeling_utils.log_state_dict_report = report
    modeling_utils.PreTrainedModel._load_pretrained_model = staticmethod(noted)
    try:
        with printing() as printed:
            yield reports, printed, read
    finally:
        modeling_utils.PreTrainedModel._load_pretrained_model = staticmethod(reading)
        loading_report.log_state_dict_report = modeling_utils.log_state_dict_report = original
        theirs.handlers = handlers
