"""One seed: a class, its changed file, who reads it in each mode; and what is wrong with what came of it."""

import importlib
import random
import re
import tempfile
import traceback
from contextlib import ExitStack, suppress
from functools import cached_property
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tiedquiet
from benchmarks import tiny_models
from benchmarks.census import resume
from benchmarks.census.loads import limited
from benchmarks.census.models import Saved
from benchmarks.census.ways import Tensors, one_file, subclass
from benchmarks.damage.changes import CONTENTS, LAYOUTS, NAMES, File, Original, Part, write
from benchmarks.fuzz.loading import dirty_memory, overheard
from benchmarks.fuzz.running import scratch
from tests.checkpoints import holds
from tests.idioms import same
from tiedquiet import LoadError, Verdict

SECONDS = 240  # that one seed may take
READERS = ("itself", "a subclass", "an Auto class", "the base model", "another dtype", "mismatches allowed", "a resume")
# One of these moves every name in the same way, and the others leave it so: then `strict` has to see it.
UNIFORM = {"prefix added", "prefix taken off", "prefix replaced", "part in the middle"}
HARMLESS = {*CONTENTS, "dropped", "shards", ".bin"}
QUIET = {Verdict.TIED, Verdict.COPIED}
BATCHES = "num_batches_tracked"  # which no loader calls missing


class Skipped(Exception):
    """There is nothing to judge; the text says why."""


class Read(NamedTuple):
    """What a load or a resume gave: every tensor, what was not read, what tiedquiet says, and what went wrong."""

    state: Tensors
    missing: set[str]
    unfit: set[str]
    proof: Any
    error: Exception | None
    aside: str

    def verdicts(self, key: str) -> set[Verdict]:
        return {finding.verdict for finding in self.proof.findings if finding.key == key}

    def said(self, key: str) -> str:
        return ", ".join(f"{f.verdict} ({f.source})" for f in self.proof.findings if f.key == key) or "nothing"


class Case:
    """What a seed draws, written into folders.

    Attributes:
        cls: the class whose file is changed.
        kinds: what was done to the file.
        original: what the file held before its names were changed.
        file: the changed one.
        hidden: the names in it that a loader has no way to.
        model: the last one that was loaded.
    """

    def __init__(self, seed: int, name: str, folder: Path) -> None:
        self.seed, rng = seed, random.Random(seed)
        torch.manual_seed(seed)
        try:
            self.cls = _drawn_class(rng, name)
            self._saved = Saved(self.cls, needs_ties=False)
        except Exception as error:
            raise Skipped("not built") from error
        self.reader = rng.choice(READERS)
        drawn = list(dict.fromkeys(rng.sample([*CONTENTS, *NAMES, *NAMES, *LAYOUTS], rng.randint(1, 3))))
        self.original = Original(self._saved, drawn, rng)
        self.file = File({name: Part(value, name) for name, value in self.original.file.items()})
        done = [kind for kind in drawn if kind in NAMES and NAMES[kind](self.file, rng)]
        layout = next((kind for kind in drawn if kind in LAYOUTS), "")
        self.kinds = [*self.original.kinds, *done, *filter(None, [layout])]
        self._changed, self._unchanged, self._base = (folder / name for name in ("changed", "unchanged", "base"))
        for path in (self._changed, self._unchanged):
            path.mkdir()
            config = {**self._saved.config, "architectures": [self.original.architecture]}
            (path / "config.json").write_text(dumps(config))
        one_file(self.original.file, self._unchanged)
        self.hidden = write(self.file, layout, rng, self._changed)

    def read(self, mode: str) -> Read:
        if self.reader != "a resume":
            return self._load(self._changed, mode)
        try:
            if not self._base.exists():
                resume.prepare(self._saved, self._base, self._base.parent, lambda trained, path: None)
        except Exception as error:
            raise Skipped("not resumed") from error
        found = resume.resume(self.cls, self._base, self._changed, mode)
        aside = next((line for line in found.loud if line.startswith("tiedquiet failed")), "")
        return Read(found.tensors, set(), set(), found.proof, found.failure, aside)

    @cached_property
    def reference(self) -> Read:
        """What transformers makes of the file as it was."""
        return self._load(self._unchanged, "off")

    def _load(self, folder: Path, mode: str) -> Read:
        cls, options = self._way()
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        with tiedquiet.enable(mode), overheard() as heard, dirty_memory():
            try:
                self.model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
            except Exception as error:
                return Read({}, set(), set(), None, error, heard.fell_aside())
        if not isinstance(self.model, (self.cls, type(self._saved.model.base_model))):
            raise Skipped("read by a class beside it")
        unfit = {entry[0] for entry in info["mismatched_keys"]}
        state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        missing = set(info["missing_keys"]) | unfit
        return Read(state, missing, unfit, tiedquiet.check(self.model), None, heard.fell_aside())

    def _way(self) -> tuple[Any, dict[str, Any]]:
        may_differ = "other rows" in self.kinds or self.reader == "mismatches allowed"
        options: dict[str, Any] = {"ignore_mismatched_sizes": True} if may_differ else {}
        match self.reader:
            case "a subclass":
                return subclass(self.cls), options
            case "an Auto class":
                return _auto_class(self._saved), options
            case "the base model":
                return type(self._saved.model.base_model), options
            case "another dtype":
                options["dtype"] = random.Random(self.seed).choice((torch.bfloat16, torch.float16))
        return self.cls, options

    def own(self, key: str) -> str:
        """The name that a tensor of the model which was read has in the class whose file it is."""
        inside = f"{self.cls.base_model_prefix}.{key}"
        return inside if not isinstance(self.model, self.cls) and inside in self.original.state else key


def _drawn_class(rng: random.Random, name: str) -> Any:
    modules = tiny_models.modules_with_ties(f"^{name}$" if name else "", "")
    classes = tiny_models.classes_with_modules(importlib.import_module(rng.choice(modules)))
    return rng.choice([cls for cls in classes if name in ("", cls.__name__)])


def _auto_class(saved: Saved) -> Any:
    """The first of transformers' Auto classes that reads the class, else its base model, else the class itself."""
    import transformers

    for cls in (saved.cls, type(saved.model.base_model)):
        for name in sorted(name for name in dir(transformers) if name.startswith("AutoModel")):
            with suppress(Exception):  # some of them name classes that are nowhere
                found = getattr(transformers, name)._model_mapping.get(cls.config_class, None)
                if cls in (found if isinstance(found, tuple) else (found,)):
                    return getattr(transformers, name)
    return saved.cls


class Truth:
    """What each tensor of the model that is read may hold."""

    def __init__(self, case: Case) -> None:
        self._case, self._parts, self._again = case, case.file.parts, case.file.again
        self._values = [part.value for parts in (self._parts, self._again) for part in parts.values()]

    def _right(self, key: str) -> list[Any]:
        """The values that are right: its own, and what the file has under its very name."""
        case, own, reference = self._case, self._case.own(key), self._case.reference
        found = [case.original.state[own]] if own in case.original.state else []
        if own not in case.original.names and key in reference.state.keys() - reference.missing:
            found.append(reference.state[key])  # converted, perhaps otherwise than it was saved
        prefix, at = f"{case.cls.base_model_prefix}.", case.original.names.get(own, own)
        also = {own, prefix + key, key.removeprefix(prefix)} - reference.state.keys()
        its = [name for name, part in self._parts.items() if part.of == at]
        its = its or [name for name, part in self._parts.items() if part.beside == at]
        names = {key, at, *also, *its} - case.hidden
        return found + [parts[name].value for name in names for parts in (self._parts, self._again) if name in parts]

    def holds(self, key: str, state: Tensors) -> bool:
        """Whether a tensor of a model is right, perhaps but for a row that transformers zeroes again."""
        if self._has_own(key, state):
            return True
        # The head that the file has nothing for is the embedding, since the config asks for that.
        head, embedding = self._ends
        right = [state[name] for name in embedding if self._has_own(name, state)]
        return key in head and not self.is_in_file(key) and any(same(state[key], value) for value in right)

    def _has_own(self, key: str, state: Tensors) -> bool:
        return any(holds(state[key], value, any_row=True) for value in self._right(key))

    @cached_property
    def _ends(self) -> list[list[str]]:
        """The names of the output and of the input embeddings."""
        model, found = self._case.model, []
        for ask in (model.get_output_embeddings, model.get_input_embeddings):
            with suppress(AttributeError, NotImplementedError):
                end = ask().weight
                found.append([name for name, one in model.state_dict(keep_vars=True).items() if one is end])
        return found if len(found) > 1 else [[], []]

    def is_another_s(self, now: Any) -> bool:
        """Whether this is some tensor of the file."""
        return _is_one_of(now, self._values)

    def is_in_file(self, key: str) -> bool:
        """Whether the file has what is right for a key, whatever its name there."""
        there = {part.of for name, part in self._parts.items() if name not in self._case.hidden}
        at = self._case.original.names.get(self._case.own(key))
        return at in there if at else there >= self._case.original.file.keys()

    def needs_no_file(self, key: str) -> bool:
        model = self._case.model  # itself: it has the patterns of the models inside it as well
        patterns = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
        return key.endswith(BATCHES) or any(re.search(pattern, key) for pattern in patterns)


def _is_one_of(now: Any, values: list[Any]) -> bool:
    return any(value.shape == now.shape and torch.equal(now, value.to(now.dtype)) for value in values)


def judged(seed: int, name: str = "") -> dict[str, Any]:
    """The line about a seed, with the class that it draws, or with this one."""
    line: dict[str, Any] = {"seed": seed, "class": name, "kinds": [], "faults": [], "counts": {}, "unproven": {}}
    line["skipped"] = ""
    try:
        with limited(SECONDS), ExitStack() as entered:
            folder = entered.enter_context(tempfile.TemporaryDirectory(dir=scratch()))
            case = Case(seed, name, Path(folder))
            line |= {"class": case.cls.__name__, "kinds": sorted({*case.kinds, f"by {case.reader}"})}
            if not case.kinds:
                raise Skipped("nothing was changed")
            _judge(case, line)
    except (Skipped, TimeoutError) as why:
        line["skipped"] = str(why)
    except Exception:  # a mistake of this program's own: seen, and not taken for one of tiedquiet's
        return {"seed": seed, "class": line["class"], "skipped": "", "error": traceback.format_exc()}
    return line


def _judge(case: Case, line: dict[str, Any]) -> None:
    def add(fault: str, mode: str, key: str, truth: str, said: str) -> None:
        line["faults"].append([fault, mode, key, truth, said, f"{line['class']}: {', '.join(case.kinds)}"])

    off = case.read("off")
    if off.error is not None or case.reference.error is not None:
        raise Skipped("fails without tiedquiet")
    on, repair, strict = (case.read(mode) for mode in ("on", "repair", "strict"))
    for mode, read in (("on", on), ("repair", repair), ("strict", strict)):
        if read.aside or "tiedquiet failed" in str(read.error or ""):
            add("fell aside", mode, "", "", read.aside or str(read.error)[:300])
        if read.error is not None and not (mode == "strict" and isinstance(read.error, LoadError)):
            add("broke", mode, "", "does not fail without tiedquiet", repr(read.error)[:300])
    if on.error is not None or repair.error is not None:
        return
    truth = Truth(case)
    was = {key: truth.holds(key, off.state) for key in off.state}
    wrong = {key for key, is_right in was.items() if not is_right}
    line["counts"] = {
        "truths": len(wrong),
        "told": sum(bool(on.verdicts(key) - QUIET) for key in wrong),
        "repaired": sum(truth.holds(key, repair.state) for key in wrong),
    }
    for key in off.state.keys() | on.state.keys():
        if key not in off.state or key not in on.state or not same(off.state[key], on.state[key]):
            add("broke", "on", key, "another value without tiedquiet", "")
    for key, value in repair.state.items():
        is_written = not truth.holds(key, repair.state) and not same(value, off.state[key])
        if is_written and (was[key] or truth.is_another_s(value)):
            add("repaired wrongly", "repair", key, "right before" if was[key] else "another's value", repair.said(key))
    for mode, read in (("on", on), ("repair", repair)):
        for key in read.state:
            is_right, said = truth.holds(key, read.state), read.verdicts(key)
            if not is_right and said <= QUIET and (said or not truth.needs_no_file(key)):
                add("missed" if mode == "on" else "repaired wrongly", mode, key, "not the file's", read.said(key))
            # What nobody read is right by accident: the buffers of a new batch norm, a bias of zeros.
            is_read = key not in off.missing and not truth.needs_no_file(key)
            if is_right and is_read and said - QUIET - {Verdict.UNPROVEN, Verdict.AMBIGUOUS}:
                add("false alarm", mode, key, "the file's", read.said(key))
    could = {key for key in case.reference.state if truth.holds(key, case.reference.state)}
    lost = sorted(key for key in wrong & could if truth.is_in_file(key))
    # Of some classes tiny models have other shapes when they are loaded than when they were saved.
    kinds = set(case.kinds if not case.reference.unfit else ())
    if "another class's file" in kinds and 2 * len(lost) <= len(wrong):
        kinds = set()  # little of it is this class's
    if strict.error is None and lost and len(kinds & UNIFORM) == 1 and kinds - UNIFORM <= HARMLESS:
        add("passed by strict", "strict", lost[0], f"{len(lost)} are in the file", on.said(lost[0]))
