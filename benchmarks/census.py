"""The census: every class of transformers that declares or carries ties, saved and loaded back in many ways.

    python benchmarks/census.py                              # the transformers of this interpreter
    python benchmarks/census.py 5.0.0 5.2.0 5.3.0 5.13.1 5.20.2 5.24.0 --jobs 2    # in environments of tests/compat
    python benchmarks/census.py --only 'T5|Bart' --out /tmp/census

Each class is built tiny from its own default configuration and filled with random values, so that the bytes of a file
tell which tensor is which. After each load every tensor that the file holds is compared with the file, every buffer
that no file holds with a model that was built and not loaded, and the truth about every member of every tie and every
row of the report is read from both. Memory is filled with NaN before it is handed out, so that what nobody wrote to
shows; that two names are one tensor is read from what happens to one when the other is written to. tiedquiet's verdict,
its cause and what was printed are held against all that. Beside it stand two simpler rules: drop every row that
`_tied_weights_keys` covers, and drop every row whose tensor `is` that of another name.
"""

import argparse
import gc
import importlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import census_resume, tiny_models
from benchmarks.census_resume import LOUD, is_made_of, never_written
from benchmarks.record import arguments, pins_of, stop, write

ROOT = Path(__file__).parents[1]
SECONDS = 300  # that one class may take
# What must be 0: rows, then tensors and buffers, then words.
COUNTED = (
    "hidden_wrongly",
    "kept_wrongly",
    "missed",
    "false_alarms",
    "verdict_wrong",
    "cause_wrong",
    "said_nothing",
    "failed_because_of_it",
    *census_resume.COUNTED,
)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "release",
        nargs="*",
        help="releases of transformers that tests/compat has an environment for (default: this one)",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only classes whose name has a match")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the lines that --out already has")
    options = parser.parse_args()
    try:
        re.compile(options.only)
    except re.error as error:
        stop(f"--only {options.only!r} is no regular expression: {error}")
    if options.jobs < 1:
        stop("--jobs is at least 1")
    if options.release:
        return in_environments(options)
    os.environ["HF_HUB_OFFLINE"] = "1"  # some default configurations ask the hub for a backbone
    import transformers
    from tqdm import tqdm

    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / f"census-{transformers.__version__}.jsonl"
    done: set[str] = set()
    if options.resume and lines.exists():
        # A class is written at once, but an interrupted run may have cut its last line.
        whole = [line for line in lines.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        lines.write_text("".join(whole))
        done = {json.loads(line)["class"] for line in whole}
    else:
        lines.write_text("")
    started = time.perf_counter()
    modules = tiny_models.modules_with_ties(options.only)
    with ProcessPoolExecutor(options.jobs, initializer=prepare) as pool, lines.open("a") as file:
        futures = [pool.submit(census_of_module, module, options.only, done) for module in modules]
        for future in tqdm(as_completed(futures), total=len(futures), unit="module"):
            for line in future.result():
                file.write(json.dumps(line) + "\n")
            file.flush()
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    summary = summarise(records)
    # Processor time says what it takes on an idle machine, however busy this one is.
    own, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    configuration = {
        "only": options.only,
        "jobs": options.jobs,
        "resumed": bool(done),  # then the times are of the last part alone
        "seconds": round(time.perf_counter() - started),
        "processor_seconds": round(own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime),
    }
    path = write(f"census-{transformers.__version__}", configuration, summary, options.out)
    path.with_suffix(".md").write_text(table(transformers.__version__, summary, records))
    print(row(["transformers", *COLUMNS.values()]), row(["---", *["---:"] * len(COLUMNS)]), sep="\n")
    print(row([transformers.__version__, *cells(summary["total"])]))
    print(path.with_suffix(".md"), file=sys.stderr)
    return 1 if any(summary["total"][what] for what in COUNTED) else 0


def in_environments(options: argparse.Namespace) -> int:
    from tests.compat.__main__ import python_of

    pins_of(options.release)
    worst, head = 0, 2
    for release in options.release:
        command = [python_of(release), __file__, "--only", options.only, "--jobs", str(options.jobs)]
        command += ["--out", str(options.out.absolute()), *(["--resume"] if options.resume else [])]
        done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
        worst = max(worst, abs(done.returncode))
        print("\n".join(done.stdout.splitlines()[2 - head :]), flush=True)
        head = 0
    return worst


def prepare() -> None:
    """Make a worker quiet and single-threaded."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # what building odd configurations says; a load is overheard


# One class


def census_of_module(name: str, only: str, done: set[str]) -> list[dict[str, Any]]:
    """One line per class and way; a class or a way that cannot be tried is a line with its reason."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        short = name.rsplit(".", 1)[-1]
        return [] if short in done else [{"class": short, "way": None, "reason": reason(error)}]
    gc.freeze()  # or each collection walks over every module of transformers anew
    lines = []
    declaring = tiny_models.declaring_classes(module)
    for cls in (*declaring, *tiny_models.classes_that_may_carry(module)):
        if re.search(only, cls.__name__) and cls.__name__ not in done:
            with limited(SECONDS):
                try:
                    lines += list(census_of_class(cls))
                except Exception as error:
                    line = {"class": cls.__name__, "way": None, "reason": reason(error)}
                    line["no_ties"] = isinstance(error, tiny_models.NoTies)
                    line["may_carry"] = cls not in declaring
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


class Saved:
    """A tiny model full of random values, what `save_pretrained` makes of it, and which ties are declared."""

    def __init__(self, cls: type[Any]) -> None:
        from safetensors.torch import load_file

        from tests.checkpoints import state_of

        self.cls = cls
        self.model = tiny_models.tiny(cls)
        self.meant = dict(self.model.get_expanded_tied_weights_keys(all_submodels=True))
        self.model.tie_weights()
        self.state = state_of(self.model)
        self.groups = grouped(self.meant)
        self.buffers = buffers_beside_the_state(self.model)
        self.sources = {**self.meant, **declared_sources(self.model)}
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.config = json.loads(Path(folder, "config.json").read_text())
            self.config["architectures"] = [cls.__name__]
            self.file = load_file(Path(folder, "model.safetensors"))
        self.aliases: dict[Any, list[str]] = {}
        for key, value in self.state.items():
            self.aliases.setdefault(fingerprint(value), []).append(key)

    def name_in_model(self, key: str, value: Any) -> str | None:
        """The name that a tensor of a file has in the model; a renamed one is known by its bytes."""
        if key in self.state:
            return key
        names = self.aliases.get(fingerprint(value), [])
        return next((name for name in names if name not in self.meant), names[0] if names else None)

    def name_in_file(self, name: str) -> str | None:
        """The name that a file has for a member of a tie: its own, or renamed as a stored member was."""
        if name in self.file:
            return name
        for key, value in self.file.items():
            own = self.name_in_model(key, value)
            if own == key and own in self.group_of(name):
                return name
            if own in self.group_of(name) and own is not None and key != own:
                tail = next(own[i:] for i in range(len(own) + 1) if key.endswith(own[i:]))
                old, new = own.removesuffix(tail), key.removesuffix(tail)
                if name.startswith(old):
                    return new + name[len(old) :]
        return None

    def group_of(self, name: str) -> set[str]:
        return next((group for group in self.groups if name in group), set())


def buffers_beside_the_state(model: Any) -> dict[str, Any]:
    """The buffers that no file holds."""
    state = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in state}


def declared_sources(model: Any) -> dict[str, str]:
    """What each target is declared tied to, line by line.

    transformers replaces a source that is itself a target by that one's source. Where both are stored and differ, the
    replacement is not what the line says, and which of them was meant is open.
    """
    from transformers import PreTrainedModel

    names = sorted(model.state_dict())
    sources = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        keys = module._tied_weights_keys if isinstance(module, PreTrainedModel) else None
        start = re.escape(f"{prefix}." if prefix else "")
        for target, source in (keys or {}).items():
            pairs = [[name for name in names if re.match(f"{start}(?:{side})", name)] for side in (target, source)]
            if pairs[1] and len(pairs[0]) % len(pairs[1]) == 0:
                sources.update(zip(pairs[0], pairs[1] * (len(pairs[0]) // len(pairs[1])), strict=True))
    return {target: source for target, source in sources.items() if target != source}


def asked_for(model: Any) -> set[str]:
    """The targets of declared ties that the declaring model's config asks for, and that of its text model allows."""
    from transformers import PreTrainedModel

    found = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PreTrainedModel) and module._tied_weights_keys and asks(module.config):
            found |= {f"{prefix}.{name}" if prefix else name for name in declared_sources(module)}
    return found


def asks(config: Any) -> bool:
    """Whether a config asks for ties: its flag is true, would not be so in any case, and is not denied inside."""
    if not getattr(config, "tie_word_embeddings", False):
        return False
    if getattr(getattr(config, "text_config", None), "tie_word_embeddings", None) is False:
        return False
    without = config.to_dict()
    flag_off(without)
    # T5's sets it whatever the file says, since the embeddings of its two halves are one in any case.
    return type(config).from_dict(without).tie_word_embeddings is False


def grouped(meant: dict[str, str]) -> list[set[str]]:
    """The names that declarations join, as transformers itself expands them."""
    groups: list[set[str]] = []
    for pair in meant.items():
        joined = set(pair)
        for group in [group for group in groups if group & joined]:
            groups.remove(group)
            joined |= group
        groups.append(joined)
    return groups


def fingerprint(tensor: Any) -> Any:
    return (
        tuple(tensor.shape),
        tensor.flatten()[:64].float().numpy().tobytes(),
        float(tensor.double().sum()),
    )


# The ways: which tensors a file holds (None where a way does not apply), and what is changed about it

Tensors = dict[str, Any]


def as_saved(saved: Saved) -> Tensors | None:
    return saved.file


def of_a_composite(saved: Saved) -> Tensors | None:
    inner = [v for v in saved.config.values() if isinstance(v, dict) and v.get("model_type")]
    return saved.file if inner else None


def under_a_target_s_name(saved: Saved) -> Tensors | None:
    file = dict(saved.file)
    for key, value in saved.file.items():
        own = saved.name_in_model(key, value)
        targets = [name for name in sorted(saved.group_of(own or "")) if name in saved.meant and name != own]
        name = saved.name_in_file(targets[0]) if targets else None
        if name and name not in saved.file:
            file[name] = file.pop(key)
    return file if file.keys() != saved.file.keys() else None


def base_model_s_file(saved: Saved) -> Tensors | None:
    from safetensors.torch import load_file

    base = saved.model.base_model
    if base is saved.model:
        return None
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors"))


def two_ends_that_differ(saved: Saved) -> Tensors | None:
    import torch

    file = dict(saved.file)
    for group in saved.groups:
        absent = [name for name in sorted(group) if name in saved.meant and name not in saved.file]
        name = saved.name_in_file(absent[0]) if absent else None
        if name and name not in file and saved.state[absent[0]].is_floating_point():
            file[name] = torch.randn(saved.state[absent[0]].shape) * 0.1 + 0.01
    return file if len(file) > len(saved.file) else None


def without_any_end(saved: Saved) -> Tensors | None:
    tied = {name for group in saved.groups for name in group}
    return {key: value for key, value in saved.file.items() if saved.name_in_model(key, value) not in tied}


def without_biases(saved: Saved) -> Tensors | None:
    """A missing sibling: the initialiser is then called for a module of which the weight was loaded."""
    tied = {name for group in saved.groups for name in group}
    return {
        key: value
        for key, value in saved.file.items()
        if not (key.endswith(".bias") and key in saved.state and key not in tied)
    }


def in_bfloat16(saved: Saved) -> Tensors | None:
    import torch

    return {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in saved.file.items()}


def other_vocabulary(config: dict[str, Any]) -> None:
    for name, value in config.items():
        if isinstance(value, dict):
            other_vocabulary(value)
        elif re.fullmatch(r"(\w+_)?vocab_size", name) and type(value) is int and value and name != "type_vocab_size":
            config[name] = value + 8


def flag_off(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    for value in config.values():
        if isinstance(value, dict) and ("tie_word_embeddings" in value or "model_type" in value):
            flag_off(value)


def flag_off_at_the_top(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False


def one_file(file: Tensors, folder: Path) -> None:
    from safetensors.torch import save_file

    whole = {key: value.contiguous() for key, value in file.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


def shards(file: Tensors, folder: Path) -> None:
    from safetensors.torch import save_file

    halves = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(file.items())[i::2]) for i in (0, 1)}
    for name, half in halves.items():
        save_file(half, folder / name, {"format": "pt"})
    weights = {key: name for name, half in halves.items() for key in half}
    index = {"metadata": {"total_size": sum(v.nbytes for v in file.values())}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bin_file(file: Tensors, folder: Path) -> None:
    import torch

    torch.save(file, folder / "pytorch_model.bin")


def subclass(cls: type[Any]) -> type[Any]:
    """What a user derives from a class of transformers."""
    return type(f"Users{cls.__name__}", (cls,), {"__doc__": "A user's."})


def subclass_of_version_4(cls: type[Any]) -> type[Any]:
    """The same in the manner of version 4: an initialiser that writes through `.data`, a table made in `__init__`."""
    import torch
    from torch import nn

    class Users(cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_buffer("table", torch.arange(1.0, 9.0), persistent=False)

        def _init_weights(self, module: Any) -> None:
            super()._init_weights(module)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data.normal_(std=0.02)

    return Users


def as_it_comes(saved: Saved, folder: Path) -> dict[str, Any]:
    return {}


def as_type(name: str) -> Callable[[Saved, Path], dict[str, Any]]:
    def options(saved: Saved, folder: Path) -> dict[str, Any]:
        import torch

        return {"dtype": getattr(torch, name)}

    return options


def mismatches_allowed(saved: Saved, folder: Path) -> dict[str, Any]:
    return {"ignore_mismatched_sizes": True}


def partly_on_disk(saved: Saved, folder: Path) -> dict[str, Any] | None:
    """Every block that has a member of a tie stays on disk, the others come into memory."""
    places: dict[str, str] = {}
    tied = {name for group in saved.groups for name in group}

    def place(name: str, module: Any) -> None:
        prefix = f"{name}." if name else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        # accelerate's hooks are those of modules: one with a tied parameter of its own goes there as a whole.
        is_tied = any(prefix + key in tied for key, _ in own)
        if name and not any(key.startswith(prefix) for key in tied):
            places[name] = "cpu"
        elif name and (is_tied or not any(True for _ in module.children())):
            places[name] = "disk"
        else:
            places.update((prefix + key, "cpu") for key, _ in own)
            for child, part in module.named_children():
                place(prefix + child, part)

    place("", saved.model)
    if {*places.values()} != {"cpu", "disk"}:
        return None
    return {"device_map": places, "offload_folder": str(folder / "offloaded")}


class Way(NamedTuple):
    """How a checkpoint is written and loaded.

    `tensors` is what the file holds (None where the way does not apply), `change` what config.json says besides, `load`
    the arguments of `from_pretrained`, `cls` the class that is asked to load it.
    """

    tensors: Callable[[Saved], Tensors | None]
    change: Callable[[dict[str, Any]], None] = lambda config: None
    write: Callable[[Tensors, Path], None] = one_file
    load: Callable[[Saved, Path], dict[str, Any] | None] = as_it_comes
    cls: Callable[[type[Any]], type[Any]] = lambda cls: cls

    @property
    def is_flag_off(self) -> bool:
        return self.change in (flag_off, flag_off_at_the_top)


WAYS = {
    "as saved": Way(as_saved),
    "flag off": Way(as_saved, flag_off),
    "flag off at the top only": Way(of_a_composite, flag_off_at_the_top),
    "under a target's name": Way(under_a_target_s_name),
    "under a target's name, flag off": Way(under_a_target_s_name, flag_off),
    "base model's file": Way(base_model_s_file),
    "two ends that differ": Way(two_ends_that_differ),
    "no end of a tie": Way(without_any_end),
    ".bin": Way(as_saved, write=bin_file),
    "float32 into bfloat16": Way(as_saved, load=as_type("bfloat16")),
    "bfloat16 into float32": Way(in_bfloat16, load=as_type("float32")),
    "another vocabulary": Way(as_saved, other_vocabulary, load=mismatches_allowed),
    "partly on disk": Way(as_saved, load=partly_on_disk),
    "a user's subclass, shards": Way(as_saved, write=shards, cls=subclass),
    "a user's subclass of version 4, no biases": Way(without_biases, cls=subclass_of_version_4),
}


def census_of_class(cls: type[Any]) -> Iterator[dict[str, Any]]:
    saved = Saved(cls)
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
        yield {**line, **census_resume.census_of_resume(saved)}
    except census_resume.NotTried as error:
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
                cls.from_pretrained(folder, **options)
        except Exception:
            return {"reason": f"transformers does not load it: {reason(error)}"}
        return {"failed_because_of_it": [reason(error)]}
    truth = Truth(saved, way, file, model, info, read)
    if cls is not saved.cls and truth.reported:
        truth.note_unread(read_by(saved.cls, folder))
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


def read_by(cls: type[Any], folder: Path) -> set[str]:
    """What transformers reads from these files for a class."""
    from tests.checkpoints import printing

    with printing():
        model, info = cls.from_pretrained(folder, output_loading_info=True)
    return model.state_dict().keys() - info["missing_keys"] - {entry[0] for entry in info["mismatched_keys"]}


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


def read_from_disk(model: Any, name: str) -> Any:
    """What accelerate puts in the place of a tensor on meta while its module is called; None if it has nothing.

    A module with two names has a hook for each, and each looks under its own.
    """
    path, _, last = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        weights = getattr(each, "weights_map", None)
        if weights is not None and weights.prefix + last == name:
            try:
                return weights[last]
            except KeyError:
                return None
    return None


class Truth:
    """What is true of a loaded model, from the bytes of the file it was loaded from."""

    def __init__(
        self, saved: Saved, way: Way, file: dict[str, Any], model: Any, info: dict[str, Any], read: Tensors
    ) -> None:
        import torch

        self.saved = saved
        self.way = way
        self.file = file
        self.model = model
        self.now = dict(model.state_dict(keep_vars=True))
        self.buffers = buffers_beside_the_state(model)
        self.everything = {**self.now, **self.buffers}
        self.reported = set(info["missing_keys"])
        self.stored: dict[str, Any] = {}
        self._on_disk: dict[str, Any] = {}
        # Stored tensors of which one row is zero again, and all others as they were: the padding's.
        self.padding: set[str] = set()
        # Stored values that gave way to those of another stored name.
        self.clashes: list[str] = []
        # Merged or split tensors that transformers reads otherwise than it saved them.
        self.read_otherwise: list[str] = []
        # Keys that the loader reported missing, and the names under which the file has their values all the same;
        # empty where it has them in another form.
        self.unread: dict[str, str] = {}
        mismatched = {entry[0] for entry in info["mismatched_keys"]}
        not_delivered = self.reported | mismatched
        base = f"{saved.model.base_model_prefix}." if way.tensors is base_model_s_file else ""
        for key, value in file.items():
            name = (
                base + key if base and base + key in self.now else saved.name_in_model(key, saved.file.get(key, value))
            )
            if name in self.now and name not in not_delivered:
                self.stored[name] = value
            elif name in self.reported - mismatched and self.now[name].shape == value.shape:
                self.unread[name] = key
        # Of a merged or split tensor no file has the bytes: what the loader does not miss is then delivered, and
        # what it should be, the model that was saved tells; or what was read, where that was something else.
        not_delivered |= {name for group in saved.groups for name in group}
        places = {tensor.data_ptr() for name, tensor in self.now.items() if name in self.stored}
        for name in sorted(self.now.keys() - self.stored.keys() - not_delivered):
            if not self.needs_no_file(name) and self.now[name].data_ptr() not in places:
                value = saved.state[name]
                if way.tensors is in_bfloat16 and value.is_floating_point():
                    value = value.bfloat16()
                if name in read and not torch.equal(read[name], value.to(read[name].dtype)):
                    self.read_otherwise.append(name)
                    value = read[name]
                self.stored[name] = value

    def needs_no_file(self, name: str) -> bool:
        """Whether the class itself says so."""
        patterns = [*(self.model._keys_to_ignore_on_load_missing or ()), *(self.model._keys_to_ignore_on_save or ())]
        return any(re.search(pattern, name) for pattern in patterns)

    def value(self, name: str) -> Any:
        """What a forward pass would find under a name; None where that is nothing."""
        if not (tensor := self.now[name]).is_meta:
            return tensor.detach()
        if name not in self._on_disk:
            self._on_disk[name] = read_from_disk(self.model, name)
        return self._on_disk[name]

    def one(self, a: str, b: str) -> bool:
        """Whether two names are one tensor: whether what is written to one is read from the other."""
        import torch

        left, right = self.now[a], self.now[b]
        if left.is_meta and right.is_meta and left.shape == right.shape:
            # What is on disk is read anew for each name, whatever the names share in memory.
            left, right = self.value(a), self.value(b)
            return left is not None and right is not None and torch.equal(left, right)
        if left is right:
            return True
        if left.is_meta or right.is_meta or left.shape != right.shape or not left.numel() or left.dtype != right.dtype:
            return False
        if left.data_ptr() != right.data_ptr():  # spares writing to pairs that cannot be one
            return False
        with torch.no_grad():
            before = left.flatten()[0].clone()
            left.view(-1)[0] = 1 - before
            follows = bool(right.flatten()[0] == 1 - before)
            left.view(-1)[0] = before
        return follows

    def intact(self, name: str) -> bool:
        from tests.checkpoints import holds

        stored, now = self.stored[name], self.value(name)
        if now is None or not holds(now, stored.to(now.dtype), any_row=True):
            return False
        if not bool((now == stored.to(now.dtype)).all()):
            self.padding.add(name)
        return True

    def note_unread(self, others: set[str]) -> None:
        """Note the missing keys that the files have for the class that a user's is derived from."""
        for key in self.reported & others - self.saved.meant.keys():
            self.unread.setdefault(key, "")

    def cannot_tell(self, key: str, ours: str | None, hint: str | None) -> bool:
        """Whether the bytes leave open what tiedquiet says."""
        import torch

        # Memory that nobody wrote reads as true.
        if ours == "unwritten" and self.everything[key].dtype == torch.bool:
            return bool(self.everything[key].all())
        # Under a name that only this census gives it: then all that can be said is that it may be that one.
        if ours == "missing" and hint and self.way.tensors is under_a_target_s_name:
            return self.unread.get(key) == hint
        # Two stored values where there is one tensor in the end: whether it was one before it was read.
        return key in self.clashes and ours == "overwritten"

    def is_right_cause(self, found: Any) -> bool:
        """Whether what a finding says beside its verdict is so: its source, and the cause."""
        import torch

        follows = found.source in self.stored and self.one(found.key, found.source)
        match str(found.verdict):
            case "tied":
                return follows and self.intact(found.source)
            case "copied":
                return torch.equal(self.value(found.key), self.stored[found.source].to(self.now[found.key].dtype))
            case "untied":
                blames_the_flag = "tie_word_embeddings is false" in found.why
                return found.source in self.stored and blames_the_flag is self.way.is_flag_off
            case "ambiguous":
                rivals = [name for name in self.stored if name in found.why] or [found.key]
                differ = any(not torch.equal(self.stored[n], self.stored[found.source]) for n in rivals)
                return (follows or found.key in self.stored) and differ and self.intact(found.source)
            case "overwritten":
                # Of the code that writes in the other ways only transformers knows.
                by_us = self.way.cls is subclass_of_version_4
                return follows and (not by_us or f"._init_weights ({__file__}:" in found.why)
            case "unread":
                return is_made_of(self.saved.state[found.key], self.file.get(found.source))
            case "missing":
                # A guess at what it may be in the file is no more than that, but it has to be there.
                return found.source is None or found.source in self.file
            case "unwritten":
                return (found.why == "a buffer") is (found.key in dict(self.model.named_buffers()))
        return True

    def other_buffers(self) -> list[str]:
        """Buffers that were written, and not with what they hold in a model that is built and not loaded."""
        import torch

        right = self.saved.buffers
        return [
            name
            for name, buffer in self.buffers.items()
            if name in right and buffer.shape == right[name].shape and buffer.dtype == right[name].dtype
            if not never_written(buffer) and not torch.equal(buffer, right[name])
        ]

    def chain(self, key: str) -> list[str]:
        chain: list[str] = []
        while (key := self.saved.sources.get(key, "")) and key not in chain:
            chain.append(key)
        return chain

    def verdicts(self) -> dict[str, str]:
        """The verdict that each tensor should get that is not simply stored and unchanged."""
        found = {name: "unwritten" for name, tensor in self.everything.items() if never_written(tensor)}
        for key in self.stored:
            if not self.intact(key):
                found[key] = "overwritten"
        for group in self.saved.groups:
            members = sorted(name for name in group if name in self.now)
            stored = [name for name in members if name in self.stored]
            for key in members:
                if key not in self.stored:
                    verdict = self.verdict(key, stored)
                    if verdict != "missing" or key not in found:
                        found[key] = verdict
                elif not self.intact(key) and any(self.one(key, name) and self.intact(name) for name in stored):
                    # Two names were one tensor before the load: the loader read both values into it, and the last
                    # one stayed.
                    self.clashes.append(key)
                    found[key] = "ambiguous"
        if head := self.asked_for_by_the_config():
            key, source = head
            if key not in found and key not in self.stored and source in self.stored and not self.one(key, source):
                found[key] = "untied"
        for key in self.reported:
            if key not in found and (served := [name for name in self.stored if self.one(key, name)]):
                found[key] = self.verdict(key, served)
        return self.not_supplied(self.parted(found))

    def parted(self, found: dict[str, str]) -> dict[str, str]:
        """With the targets of ties that are asked for, of which both ends are stored, with two different values."""
        import torch

        for key in asked_for(self.model):
            source = next((name for name in self.chain(key) if name in self.stored), None)
            is_parted = key in self.stored and source is not None and not self.one(key, source)
            if is_parted and key not in found and not torch.equal(self.stored[key], self.stored[source]):
                found[key] = "ambiguous"
        return found

    def not_supplied(self, found: dict[str, str]) -> dict[str, str]:
        """With what nothing supplied: the file has it under a name that nothing read, or it has nothing for it."""
        for key in self.now.keys() - self.stored.keys():
            if found.get(key, "missing") in ("missing", "untied") and not any(self.one(key, n) for n in self.stored):
                if key in self.unread:
                    found[key] = "unread"
                elif found.setdefault(key, "missing") == "missing" and self.needs_no_file(key):
                    del found[key]
        return found

    def asked_for_by_the_config(self) -> tuple[str, str] | None:
        """The output and the input embedding, where the config wants them to be one."""
        if not getattr(self.model.config, "tie_word_embeddings", False):
            return None
        try:
            ends = self.model.get_output_embeddings().weight, self.model.get_input_embeddings().weight
        except (AttributeError, NotImplementedError):
            return None
        names = [next((name for name, tensor in self.now.items() if tensor is end), "") for end in ends]
        return (names[0], names[1]) if all(names) and ends[0].shape == ends[1].shape else None

    def verdict(self, key: str, stored: list[str]) -> str:
        import torch

        if not stored:
            return "missing"
        followed = [name for name in stored if self.one(key, name)]
        if not followed:
            now = self.value(key)
            equal = now is not None and any(torch.equal(now, self.stored[name].to(now.dtype)) for name in stored)
            return "copied" if equal and not (now == now.flatten()[0]).all() else "untied"
        if not all(self.intact(name) for name in followed):
            return "overwritten"
        first = self.stored[followed[0]]
        rivals = [name for name in stored if not torch.equal(self.stored[name], first)]
        meant = next((name for name in self.chain(key) if name in stored), None)
        return "ambiguous" if rivals and meant not in followed else "tied"

    def is_false(self, key: str, verdicts: dict[str, str]) -> bool:
        """Whether a MISSING row is false: its values are those of the file, and nothing leaves them in doubt."""
        served = [name for name in self.stored if self.one(key, name)]
        held = bool(served) and all(map(self.intact, served)) and verdicts.get(key) != "ambiguous"
        return held or verdicts.get(key) == "copied"


# What comes out

# What is counted of a load, and what the column is called.
COLUMNS = {
    "classes": "classes",
    "loads": "loads",
    "tensors": "stored tensors",
    "buffers": "buffers",
    "rows_true": "rows true",
    "rows_false": "rows false",
    "hidden_wrongly": "hidden wrongly",
    "kept_wrongly": "kept wrongly",
    "loud": "lost, untied or never written",
    "missed": "of them missed",
    "false_alarms": "false alarms",
    "verdict_wrong": "other verdicts wrong",
    "cause_wrong": "causes wrong",
    "declared_hides": "true rows hidden by 'declared'",
    "is_hides": "by `is`",
}


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    ways: dict[str, Counter[str]] = {way: Counter() for way in (*WAYS, "resume")}
    disagreements, without, not_seen = [], [], []
    clashes: dict[str, int] = {}
    padding: dict[str, int] = Counter()
    otherwise: dict[str, int] = Counter()
    unbuilt, unloaded, buffers = {}, {}, {}
    classes = set()
    for record in records:
        name, way = record["class"], record["way"]
        if record.get("may_carry"):
            not_seen += [] if record["no_ties"] else [name]
        elif record.get("no_ties"):
            without.append(name)
        elif way is None:
            unbuilt[name] = record["reason"]
        elif "reason" in record:
            if record["reason"] != "does not apply":
                unloaded.setdefault(f"{name}: {record['reason']}", []).append(way)
        else:
            classes.add(name)
            count = ways[way]
            count["loads"] += 1
            for what in COLUMNS.keys() | set(COUNTED):
                value = record.get(what, 0)
                count[what] += value if isinstance(value, int) else len(value)
            count["classes"] += 1
            if record.get("clashes"):
                clashes[f"{name}, {way}"] = len(record["clashes"])
            for key in record.get("padding", ()):
                padding[f"{name}: {key}"] += 1
            for key in record.get("read_otherwise", ()):
                otherwise[f"{name}: {key}"] += 1
            if record.get("other_buffers"):
                buffers[f"{name}, {way}"] = record["other_buffers"]
            if any(record.get(what) for what in COUNTED):
                disagreements.append(record)
    total: Counter[str] = Counter()
    for count in ways.values():
        total.update(count)
    total["classes"] = len(classes)
    return {
        "ways": {way: {what: count[what] for what in (*COLUMNS, *COUNTED)} for way, count in ways.items()},
        "total": {what: total[what] for what in (*COLUMNS, *COUNTED)},
        "disagreements": disagreements,
        "clashes": clashes,
        "padding": dict(padding),
        "read_otherwise": dict(otherwise),
        "other_buffers": buffers,
        "unbuilt": unbuilt,
        "without_ties": sorted(without),
        "not_built_and_may_carry": sorted(not_seen),
        "unloaded": unloaded,
        "resumed": census_resume.totals(records),
        "resumed_with_a_loss": census_resume.by_class(records),
    }


def cells(count: dict[str, int]) -> list[str]:
    return [f"{count[what]:,}" for what in COLUMNS]


def row(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def table(release: str, summary: dict[str, Any], records: list[dict[str, Any]]) -> str:
    lines = [
        f"## transformers {release}",
        "",
        row(["way", *COLUMNS.values()]),
        row(["---", *["---:"] * len(COLUMNS)]),
        *(row([way, *cells(count)]) for way, count in summary["ways"].items()),
        row(["all", *cells(summary["total"])]),
        *census_resume.table(records),
    ]
    unloaded = {text: ", ".join(ways) for text, ways in summary["unloaded"].items()}
    for title, found in (
        ("Where tiedquiet and the bytes disagree", [json.dumps(record) for record in summary["disagreements"]]),
        (
            "Two stored values read into one tensor by the loader, which no row says",
            [f"{where}: {number} tensors" for where, number in summary["clashes"].items()],
        ),
        (
            "The row of the padding zeroed again by transformers, which tiedquiet takes for no loss",
            [f"{where}, in {number} loads" for where, number in summary["padding"].items()],
        ),
        (
            "Merged or split tensors that transformers reads otherwise than it saved them, before anything is watched",
            [f"{where}, in {number} loads" for where, number in summary["read_otherwise"].items()],
        ),
        (
            "Buffers that were written, and not with what a model has that was built and not loaded",
            [f"{where}: {', '.join(names)}" for where, names in summary["other_buffers"].items()],
        ),
        ("No tie in the default configuration", summary["without_ties"]),
        ("Could not be built", [f"{name}: {why}" for name, why in sorted(summary["unbuilt"].items())]),
        ("Could not be built, so that it is not known whether it carries a tie", summary["not_built_and_may_carry"]),
        ("Not tried, for transformers' own reason", [f"{text} ({ways})" for text, ways in sorted(unloaded.items())]),
    ):
        if found:
            lines += ["", f"{title}: {len(found)}", "", *(f"- {item}" for item in found)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
