"""The census: every class of transformers that declares ties, saved and loaded back in nine ways.

    python benchmarks/census.py                              # the transformers of this interpreter, two minutes
    python benchmarks/census.py --release 5.2.0 --jobs 2     # in an environment of tests/compat
    python benchmarks/census.py --only 'T5|Bart' --out /tmp/census

Each class is built tiny from its own default configuration and filled with random values, so that the bytes of a file
tell which tensor is which. After each load the truth about every member of every tie, and about every row of the
report, is read from those bytes; that two names are one tensor is read from what happens to one when the other is
written to. tiedquiet's verdict and what was printed are held against it. Beside it stand two simpler rules: drop every
row that `_tied_weights_keys` covers, and drop every row whose tensor `is` that of another name.
"""

import argparse
import importlib
import json
import logging
import os
import re
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
from benchmarks import tiny_models
from benchmarks.record import arguments, pins_of, stop, versions, write

ROOT = Path(__file__).parents[1]
SECONDS = 300  # that one class may take
NO_TIES = "declares no tie in its default configuration"
LOUD = ("untied", "overwritten", "unwritten", "ambiguous")
COUNTED = ("hidden_wrongly", "kept_wrongly", "verdict_wrong", "said_nothing", "failed_because_of_it")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--release", help="a release of transformers that tests/compat has an environment for")
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
        return in_environment(options)
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
    modules = tiny_models.declaring_modules()
    with ProcessPoolExecutor(options.jobs, initializer=prepare) as pool, lines.open("a") as file:
        futures = [pool.submit(census_of_module, module, options.only, done) for module in modules]
        for future in tqdm(as_completed(futures), total=len(futures), unit="module"):
            for line in future.result():
                file.write(json.dumps(line) + "\n")
            file.flush()
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    summary = summarise(records)
    configuration = {"only": options.only, "jobs": options.jobs, "seconds": round(time.perf_counter() - started)}
    path = write(f"census-{transformers.__version__}", configuration, summary, options.out)
    text = table(transformers.__version__, summary)
    path.with_suffix(".md").write_text(text)
    print(text)
    print(path)
    return 1 if any(summary["total"][what] for what in COUNTED) else 0


def in_environment(options: argparse.Namespace) -> int:
    from tests.compat.__main__ import python_of

    pins_of([options.release])
    command = [python_of(options.release), __file__, "--only", options.only, "--jobs", str(options.jobs)]
    command += ["--out", str(options.out.absolute()), *(["--resume"] if options.resume else [])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def prepare() -> None:
    """Make a worker quiet and single-threaded."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()


# One class


def census_of_module(name: str, only: str, done: set[str]) -> list[dict[str, Any]]:
    """One line per class and way; a class or a way that cannot be tried is a line with its reason."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        short = name.rsplit(".", 1)[-1]
        return [] if short in done else [{"class": short, "way": None, "reason": reason(error)}]
    lines = []
    for cls in tiny_models.declaring_classes(module):
        if re.search(only, cls.__name__) and cls.__name__ not in done:
            with limited(SECONDS):
                try:
                    lines += list(census_of_class(cls))
                except Exception as error:
                    lines.append({"class": cls.__name__, "way": None, "reason": reason(error)})
    return lines


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:300]}"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

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
        self.model.tie_weights()
        self.state = state_of(self.model)
        self.meant = dict(self.model.get_expanded_tied_weights_keys(all_submodels=True))
        self.groups = grouped(self.meant)
        self.sources = {**self.meant, **declared_sources(self.model)}
        if not self.groups:
            raise ValueError(NO_TIES)
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


class Way(NamedTuple):
    tensors: Callable[[Saved], Tensors | None]
    change: Callable[[dict[str, Any]], None] = lambda config: None
    write: Callable[[Tensors, Path], None] = one_file


WAYS = {
    "as saved": Way(as_saved),
    "flag off": Way(as_saved, flag_off),
    "flag off at the top only": Way(of_a_composite, flag_off_at_the_top),
    "under a target's name": Way(under_a_target_s_name),
    "under a target's name, flag off": Way(under_a_target_s_name, flag_off),
    "base model's file": Way(base_model_s_file),
    "two ends that differ": Way(two_ends_that_differ),
    "sharded": Way(as_saved, write=shards),
    ".bin": Way(as_saved, write=bin_file),
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
        if file is None:
            yield {**line, "reason": "does not apply"}
            continue
        config = json.loads(json.dumps(saved.config))
        way.change(config)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            way.write(file, Path(folder))
            yield {**line, **census_of_load(saved, file, Path(folder), base=way.tensors is base_model_s_file)}


# One load


def census_of_load(saved: Saved, file: dict[str, Any], folder: Path, base: bool) -> dict[str, Any]:
    import torch

    import tiedquiet
    from tests.idioms import dirty_memory

    tiedquiet.disable()
    try:
        with overheard() as (reports, printed), tiedquiet.enable("on"), dirty_memory():
            model, info = saved.cls.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        try:
            saved.cls.from_pretrained(folder)
        except Exception:
            return {"reason": f"transformers does not load it: {reason(error)}"}
        return {"failed_because_of_it": [reason(error)]}
    truth = Truth(saved, file, model, base, reported=set(info["missing_keys"]))
    ties = {finding.key: str(finding.verdict) for finding in tiedquiet.check(model).findings}
    assert len(reports) <= 1, "one load makes one report"
    shown = reports[0] if reports else set()
    expected = truth.verdicts()
    wrong = [
        [key, ties.get(key), expected.get(key)]
        for key in {*ties, *expected}
        if ties.get(key) != expected.get(key)
        and not (ties.get(key) == "unwritten" and truth.everything[key].dtype == torch.bool)
        # Two stored values where there is one tensor in the end: whether it was one before it was read cannot be told.
        and not (key in truth.clashes and ties.get(key) == "overwritten")
    ]
    kinds = {verdict for verdict in ties.values() if verdict in LOUD}
    rows = {key: truth.is_false(key, expected) for key in truth.reported}
    false, true = {k for k, value in rows.items() if value}, {k for k, value in rows.items() if not value}
    covered = {key for key in rows if saved.group_of(key)}
    same = {key for key in rows if any(truth.one(key, other) for other in truth.now if other != key)}
    return {
        "rows_true": len(true),
        "rows_false": len(false),
        "hidden_wrongly": sorted(true - shown),
        "kept_wrongly": sorted(false & shown),
        "verdict_wrong": sorted(wrong),
        "said_nothing": sorted(kind for kind in kinds if not any(kind in text for text in printed.loud)),
        "clashes": truth.clashes,
        "verdicts": dict(Counter(ties.values())),
        "rules": {
            "declared": {"hidden_wrongly": len(true & covered), "kept_wrongly": len(false - covered)},
            "is": {"hidden_wrongly": len(true & same), "kept_wrongly": len(false - same)},
        },
    }


@contextmanager
def overheard() -> Iterator[tuple[list[set[str]], Any]]:
    """The missing keys that transformers' own report was given, and what both libraries logged."""
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

    theirs = logging.getLogger("transformers")
    handlers, theirs.handlers = theirs.handlers, []
    loading_report.log_state_dict_report = modeling_utils.log_state_dict_report = report
    try:
        with printing() as printed:
            yield reports, printed
    finally:
        loading_report.log_state_dict_report = modeling_utils.log_state_dict_report = original
        theirs.handlers = handlers


def never_written(tensor: Any) -> bool:
    """Whether a tensor holds what `dirty_memory` filled its memory with; of booleans nobody can tell."""
    import torch

    if tensor.is_meta or not tensor.numel() or tensor.dtype == torch.bool:
        return False
    if tensor.is_floating_point():
        return bool(torch.isnan(tensor.detach()).any())
    return bool((tensor == torch.iinfo(tensor.dtype).max).any())


class Truth:
    """What is true of a loaded model, from the bytes of the file it was loaded from."""

    def __init__(self, saved: Saved, file: dict[str, Any], model: Any, base: bool, reported: set[str]) -> None:
        self.saved = saved
        self.model = model
        self.now = dict(model.state_dict(keep_vars=True))
        self.everything = {**self.now, **dict(model.named_buffers(remove_duplicate=False))}
        self.reported = reported
        self.stored: dict[str, Any] = {}
        # Stored values that gave way to those of another stored name.
        self.clashes: list[str] = []
        for key, value in file.items():
            prefixed = f"{saved.model.base_model_prefix}.{key}"
            name = prefixed if base and prefixed in self.now else saved.name_in_model(key, value)
            # The bytes of a merged or split tensor are nobody's: what the loader does not miss is then delivered.
            if name is not None and name in self.now and name not in reported:
                self.stored[name] = value

    def one(self, a: str, b: str) -> bool:
        """Whether two names are one tensor: whether what is written to one is read from the other."""
        import torch

        left, right = self.now[a], self.now[b]
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

        stored, now = self.stored[name], self.now[name]
        return not now.is_meta and holds(now.detach(), stored.to(now.dtype), any_row=True)

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
                    if verdict != "absent" or key not in found:
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
            return "absent"
        followed = [name for name in stored if self.one(key, name)]
        if not followed:
            now = self.now[key]
            equal = not now.is_meta and any(torch.equal(now, self.stored[name].to(now.dtype)) for name in stored)
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


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    ways: dict[str, Counter[str]] = {way: Counter() for way in WAYS}
    disagreements, clashes, without = [], [], []
    unbuilt, unloaded = {}, {}
    for record in records:
        name, way = record["class"], record["way"]
        if record.get("reason") == NO_TIES:
            without.append(name)
        elif way is None:
            unbuilt[name] = record["reason"]
        elif "reason" in record:
            if record["reason"] != "does not apply":
                unloaded[f"{name}, {way}"] = record["reason"]
        else:
            count = ways[way]
            count["loads"] += 1
            for what in ("rows_true", "rows_false"):
                count[what] += record.get(what, 0)
            for what in COUNTED:
                count[what] += len(record.get(what, ()))
            for rule, numbers in record.get("rules", {}).items():
                for what, number in numbers.items():
                    count[f"{rule}_{what}"] += number
            count["clashes"] += len(record.get("clashes", ()))
            if record.get("clashes"):
                clashes.append(f"{name}, {way}: {len(record['clashes'])} tensors, {record['clashes'][0]} first")
            if any(record.get(what) for what in COUNTED):
                disagreements.append(record)
    total: Counter[str] = Counter()
    for count in ways.values():
        total.update(count)
    return {
        "classes": len({record["class"] for record in records}) - len(unbuilt) - len(without),
        "ways": {way: dict(count) for way, count in ways.items()},
        "total": {what: total[what] for what in dict.fromkeys((*total, *COUNTED))},
        "disagreements": disagreements,
        "clashes": clashes,
        "unbuilt": unbuilt,
        "without_ties": sorted(without),
        "unloaded": unloaded,
        "versions": versions(),
    }


def table(release: str, summary: dict[str, Any]) -> str:
    lines = [
        f"## transformers {release}: {summary['classes']} classes",
        "",
        "| way | loads | rows true | rows false | hidden wrongly | kept wrongly | verdicts wrong "
        "| hidden by 'declared' | kept | hidden by `is` | kept |",
        "| --- |" + " ---: |" * 10,
    ]
    for way, count in [*summary["ways"].items(), ("all", summary["total"])]:
        columns = ("loads", "rows_true", "rows_false", "hidden_wrongly", "kept_wrongly", "verdict_wrong")
        rules = [f"{rule}_{what}" for rule in ("declared", "is") for what in ("hidden_wrongly", "kept_wrongly")]
        lines.append(f"| {way} | {' | '.join(f'{count.get(name, 0):,}' for name in (*columns, *rules))} |")
    if summary["clashes"]:
        lines += ["", "Two stored values read into one tensor by the loader, which no row says:", ""]
        lines += [f"- {clash}" for clash in summary["clashes"]]
    if summary["without_ties"]:
        lines += ["", f"No tie in the default configuration: {', '.join(summary['without_ties'])}"]
    for title, what in (("Could not be built", "unbuilt"), ("Not tried, for transformers' own reason", "unloaded")):
        if summary[what]:
            lines += ["", f"{title}: {len(summary[what])}", ""]
            lines += [f"- {name}: {why}" for name, why in sorted(summary[what].items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
