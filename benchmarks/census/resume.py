"""The way `resume`: what transformers' `Trainer` takes back of a checkpoint that it has written itself.

A model is read from a folder, as users read one from the hub, is given the values of a trained one and saved by a real
Trainer. A second model, read from that same first folder, is resumed from the checkpoint by its own Trainer. What
`from_pretrained` gives of the checkpoint is the truth, tensor by tensor: a tensor is lost if that depends on the files
alone and the resumed model has other values, which are not those that the file has under this very name either
(releases before 5.9 zero the row of the padding once more, and a resume does not).
"""

import ast
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.census.comparing import LOUD, equal, is_made_of, never_written
from benchmarks.census.models import Saved

# What must be 0 of a resume, beside what must be 0 of a load.
COUNTED = ("not_repaired", "other_objects", "strict_wrong", "best_differs")

Tensors = dict[str, Any]


class NotTried(Exception):
    """transformers itself does not write, read or resume it; the cause says why."""


class Resumed(NamedTuple):
    """What is left of one resume.

    Attributes:
        tensors: a copy of the values under each name of the state dict.
        objects: the tensors themselves.
        before: those that the model had before it was resumed.
        proof: what tiedquiet knows of it.
        rows: the missing keys that the Trainer printed.
        loud: the warnings that tiedquiet printed.
        failure: what the resume raised.
        unwritten: names of buffers that nobody had written to when the base model was loaded; of booleans, which do not
            show it, all.
    """

    tensors: Tensors
    objects: Tensors
    before: Tensors
    proof: Any
    rows: set[str]
    loud: list[str]
    failure: Exception | None
    unwritten: set[str]


def by_trainer(model: Any, folder: Path) -> None:
    """The checkpoint as the Trainer saves it."""
    trainer_of(model, folder).save_model(str(folder))


def in_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")


def as_bin(model: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    by_trainer(model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def census_of_resume(saved: Saved, write: Callable[[Any, Path], None] = by_trainer) -> dict[str, Any]:
    """Resume a class from a checkpoint of its own, in each mode; the line of the census about it."""
    import tiedquiet

    with tempfile.TemporaryDirectory() as folder:
        base, checkpoint = Path(folder, "base"), Path(folder, "checkpoint")
        tiedquiet.disable()
        try:
            prepare(saved, base, checkpoint, write)
            truth = Truth(saved, base, checkpoint)
        except Exception as error:
            raise NotTried from error
        off = resume(saved.cls, base, checkpoint, "off")
        if off.failure is not None:
            raise NotTried from off.failure
        on = resume(saved.cls, base, checkpoint, "on")
        lost = truth.lost(off)
        line: dict[str, Any] = {"tensors": len(truth.of_file), "loud": len(lost), "lost": len(lost)}
        if on.failure is not None:
            return {**line, "failed_because_of_it": [repr(on.failure)[:300]]}
        best = resume(saved.cls, base, checkpoint, "on", is_best=True)
        line |= what_was_said(truth, off, on, lost)
        line["best_differs"] = sorted(loud_keys(best) ^ loud_keys(on) | truth.lost(best) ^ lost)
        line |= what_was_repaired(truth, off, resume(saved.cls, base, checkpoint, "repair"))
        line["strict_wrong"] = what_strict_did(resume(saved.cls, base, checkpoint, "strict"), bool(lost))
        return line


def prepare(saved: Saved, base: Path, checkpoint: Path, write: Callable[[Any, Path], None]) -> None:
    """The folder of the model that training begins with, and the checkpoint that it has written."""
    import torch

    with torch.no_grad(), heard():
        give(saved.model, other_values(saved.state))
        try:
            saved.model.save_pretrained(base)
        finally:
            give(saved.model, saved.state)
        trained = saved.cls.from_pretrained(base)
        give(trained, saved.state)
        write(trained, checkpoint)


def give(model: Any, values: Tensors) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.copy_(values[name])


def other_values(state: Tensors) -> Tensors:
    """Other ones for every tensor, so that it shows which file a tensor is from."""
    import torch

    torch.manual_seed(1)
    other = {}
    for name, value in state.items():
        if value.is_floating_point():
            other[name] = torch.randn_like(value) * 0.1 - 0.02
        else:
            other[name] = ~value if value.dtype == torch.bool else value + 1
    return other


def trainer_of(model: Any, folder: Path) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True)
    return Trainer(model, arguments)


def resume(cls: type[Any], base: Path, checkpoint: Path, mode: str, is_best: bool = False) -> Resumed:
    """Read a model from `base`, and have its Trainer take the checkpoint, or take it back as the best one."""
    import torch

    import tiedquiet
    from tests.idioms import dirty_memory

    failure = None
    torch.manual_seed(5)
    with heard() as printed:
        # What `strict` says of the base model is the business of the other ways.
        with tiedquiet.enable("on" if mode == "strict" else mode), dirty_memory():
            model = cls.from_pretrained(base)
        buffers = model.named_buffers(remove_duplicate=False)
        unwritten = {name for name, buffer in buffers if never_written(buffer) or buffer.dtype is torch.bool}
        before = dict(model.state_dict(keep_vars=True))
        trainer = trainer_of(model, checkpoint.parent)
        with tiedquiet.enable(mode):
            try:
                if is_best:
                    trainer.state.best_model_checkpoint = str(checkpoint)
                    trainer._load_best_model()
                else:
                    trainer._load_from_checkpoint(str(checkpoint))
            except Exception as error:
                failure = error
    now = dict(model.state_dict(keep_vars=True))
    loud = printed.of("tiedquiet", logging.WARNING)
    return Resumed(
        {name: tensor.detach().clone() for name, tensor in now.items()},
        now,
        before,
        tiedquiet.check(model),
        rows(printed.of("transformers", logging.WARNING), loud),
        loud,
        failure,
        unwritten,
    )


@contextmanager
def heard() -> Iterator[Any]:
    """What both libraries log, which goes nowhere else."""
    from tests.checkpoints import printing

    theirs = logging.getLogger("transformers")
    handlers, theirs.handlers = theirs.handlers, []
    try:
        with printing() as printed:
            yield printed
    finally:
        theirs.handlers = handlers


def rows(theirs: list[str], ours: list[str]) -> set[str]:
    """The missing keys that were printed: by the Trainer, or by tiedquiet where the Trainer would have said nothing."""
    found: set[str] = set()
    for text in theirs:
        if match := re.search(r"There were missing keys in the checkpoint model loaded: (\[.*\])\.", text):
            found |= set(ast.literal_eval(match[1]))
    for text in ours:
        if match := re.search(r"not in the checkpoint, .*: (\[.*\])$", text):
            found |= set(ast.literal_eval(match[1]))
    return found


class Truth:
    """What `from_pretrained` makes of the checkpoint.

    Attributes:
        right: the values under each name.
        of_file: one name of each tensor that has its values from the files, and other ones in the base model.
        name_of: that name, for all names of such a tensor.
        missing: names that `from_pretrained` itself reports missing.
    """

    def __init__(self, saved: Saved, base: Path, checkpoint: Path) -> None:
        import torch

        first = load(saved.cls, base, 2)[0].state_dict()
        model, info = load(saved.cls, checkpoint, 3)
        tensors = dict(model.state_dict(keep_vars=True))
        self.file = stored(checkpoint)
        self.right = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.missing = set(info["missing_keys"])
        again: Tensors | None = None
        self.name_of: dict[str, str] = {}
        names: dict[int, str] = {}
        for name, value in self.right.items():
            if torch.equal(value, first[name]):
                continue  # nobody could tell which of the two folders it is from
            if not torch.equal(value, saved.state[name]):
                # It was initialised, or transformers reads it otherwise than it saved it. Only the first depends on
                # the seed, and is the same where the checkpoint is another.
                again = load(saved.cls, checkpoint, 4)[0].state_dict() if again is None else again
                if not torch.equal(value, again[name]):
                    continue
                # Where it mixes up two tensors, what was saved is right.
                if any(torch.equal(value, other) for other in saved.state.values()):
                    self.right[name] = saved.state[name].clone()
            self.name_of[name] = names.setdefault(id(tensors[name]), name)
        self.of_file = set(self.name_of.values())

    def lost(self, resumed: Resumed) -> set[str]:
        """One name of each tensor that should have its values from the checkpoint, and has others."""
        return {own for name, own in self.name_of.items() if not self.is_held(name, resumed)}

    def is_held(self, name: str, resumed: Resumed) -> bool:
        now, own = resumed.tensors[name], self.name_of[name]
        return equal(now, self.right[name]) or any(equal(now, self.file.get(key)) for key in (name, own))


def load(cls: type[Any], folder: Path, seed: int) -> tuple[Any, dict[str, Any]]:
    import torch

    torch.manual_seed(seed)
    with heard():
        model, info = cls.from_pretrained(folder, output_loading_info=True)
    return model, info


def stored(folder: Path) -> Tensors:
    """Every tensor that the files of a checkpoint have."""
    import torch
    from safetensors.torch import load_file

    found: Tensors = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found.update(load_file(path))
        elif re.fullmatch(r"pytorch_model.*\.bin", path.name):
            found.update(torch.load(path, weights_only=True))
    return found


def loud_keys(resumed: Resumed) -> set[str]:
    return {finding.key for finding in resumed.proof.findings if finding.verdict in LOUD}


def what_was_said(truth: Truth, off: Resumed, on: Resumed, lost: set[str]) -> dict[str, Any]:
    """Verdicts, rows and lines of a resume in the default mode against the truth."""
    said = {finding.key: str(finding.verdict) for finding in on.proof.findings}
    names: dict[str, set[str]] = {own: set() for own in lost}
    for name, own in truth.name_of.items():
        if own in lost:
            names[own].add(name)
    told = {own for own in lost if any(said.get(name) in LOUD for name in names[own])}
    of_lost = set().union(*names.values())
    # What is lost is unread, and where it has a second name, that one may be missing; it is not well.
    allowed = {"unread", "missing", None}
    wrong = [[key, said.get(key), "unread"] for key in sorted(of_lost) if said.get(key) not in allowed]
    wrong += [
        [key, verdict, None]
        for key, verdict in sorted(said.items())
        if verdict == "missing" and key in truth.name_of and key not in of_lost
    ]
    false = {key for key in off.rows if key in truth.name_of and key not in of_lost}
    kinds = {said[key] for key in loud_keys(on)}
    return {
        "told": len(told),
        "rows_true": len(off.rows - false),
        "rows_false": len(false),
        "hidden_wrongly": sorted(off.rows - false - on.rows),
        "kept_wrongly": sorted(false & on.rows),
        "missed": [[own, said.get(own), "unread"] for own in sorted(lost - told)],
        "false_alarms": [[key, said[key], None] for key in sorted(loud_keys(on) - of_lost - on.unwritten)],
        "verdict_wrong": wrong,
        "cause_wrong": [
            [f.key, said[f.key], f.source, f.why]
            for f in on.proof.findings
            if said[f.key] == "unread"
            and f.key in of_lost
            and not is_made_of(truth.right[f.key], truth.file.get(f.source))
        ],
        "said_nothing": sorted(kind for kind in kinds if not any(kind in text for text in on.loud)),
        "verdicts": dict(Counter(said.values())),
    }


def what_was_repaired(truth: Truth, off: Resumed, repaired: Resumed) -> dict[str, Any]:
    """Whether every tensor is right to the bit after `repair`, and the object that it was."""
    if repaired.failure is not None:
        return {"failed_because_of_it": [f"repair: {repaired.failure!r}"[:300]]}
    left = truth.lost(repaired)
    others = [
        name
        for name, value in off.tensors.items()
        if name not in truth.name_of and not equal(repaired.tensors[name], value) and name not in truth.missing
    ]
    return {
        "left": len(left),
        "not_repaired": [*sorted(left), *others],
        "other_objects": [name for name, tensor in repaired.before.items() if repaired.objects.get(name) is not tensor],
    }


def what_strict_did(strict: Resumed, has_lost: bool) -> list[str]:
    import tiedquiet

    raised = isinstance(strict.failure, tiedquiet.LoadError)
    if strict.failure is not None and not raised:
        return [f"raised {strict.failure!r}"[:300]]
    return [] if raised is has_lost else [f"raised {strict.failure!r}"[:300]]
