"""What each way of silencing the loading report hides, and what it leaves.

    python benchmarks/silencers.py                  # five releases of transformers, in the environments of tests/compat
    python benchmarks/silencers.py 5.2.0 5.23.0

Every way meets every situation, with tiny checkpoints and the real loader. What is true of a key is read from the
bytes of the file, after the load. A cell is `right` only if no row is left that is false and none is hidden that is
true. A row counts as shown if transformers' report or list has it, or if a warning or an error names its key.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.record import arguments, pins_of, write

ROOT = Path(__file__).parents[1]
RELEASES = ("5.0.0", "5.2.0", "5.3.0", "5.13.1", "5.23.0")
RIGHT, FALSE, HIDDEN, BOTH = "right", "false row stays", "**hides a true row**", "**both**"
SCORES = (RIGHT, FALSE, HIDDEN, BOTH)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("release", nargs="*", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--here", action="store_true", help="only the transformers of this interpreter; prints JSON")
    options = parser.parse_args()
    if options.here:
        json.dump(cells(), sys.stdout)  # the parent reads it
        return 0

    chosen = options.release or list(RELEASES)
    pins = pins_of(chosen)
    from tqdm import tqdm

    from tests.compat.__main__ import python_of

    results = {}
    environment = {**os.environ, "TIEDQUIET": "0", "HF_HUB_OFFLINE": "1"}
    for release in tqdm(chosen, unit="release"):
        command = [python_of(release), __file__, "--here"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        results[release] = json.loads(done.stdout)
    path = write("silencers", {"releases": pins}, results, options.out)
    plot(path, results)
    text = "\n\n".join([summary(results), *(table(release, result) for release, result in results.items())])
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    print(path)
    return 0


# Situations: what is loaded, and which keys somebody would have to be told about, or not


class Situation(NamedTuple):
    """`make` writes a checkpoint into a folder; returns how to load it, and the tensors that the file holds.

    `tied` is what each watched key is meant to be, None where it is its own; `row` the row that people silence;
    `doubtful` says that the key must be shown whatever it holds: two stored ends of its tie differ.
    """

    make: Callable[[Path], tuple[Callable[[], Any], dict[str, Any]]]
    tied: dict[str, str | None]
    row: str
    doubtful: bool = False


def situations() -> dict[str, Situation]:
    import torch
    from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

    from tests.checkpoints import gpt2, save
    from tests.compat import cases

    def case(name: str, **options: Any) -> Callable[[Path], tuple[Callable[[], Any], dict[str, Any]]]:
        def make(folder: Path) -> tuple[Callable[[], Any], dict[str, Any]]:
            cls, stored = cases.CASES[name](folder)
            return lambda: cls.from_pretrained(folder, **options), stored

        return make

    def resume(folder: Path) -> tuple[Callable[[], Any], dict[str, Any]]:
        model = GPT2LMHeadModel(gpt2())
        quiet = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model, quiet)
        trainer.save_model(str(folder / "checkpoint-1"))
        stored = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}

        def load() -> Any:
            with torch.no_grad():
                model.transformer.wte.weight.zero_()
            trainer._load_from_checkpoint(str(folder / "checkpoint-1"))
            return model

        return load, stored

    def other_rows(folder: Path) -> tuple[Callable[[], Any], dict[str, Any]]:
        cls = cases.OverridesTieWeights
        keys = [key for key in cls(gpt2()).state_dict() if key != "lm_head.weight"]
        odd = {"transformer__ln_f__bias": torch.ones(7), "extra": torch.ones(3)}
        stored = save(cls(gpt2()), folder, keys, **odd)
        return lambda: cls.from_pretrained(folder, ignore_mismatched_sizes=True), stored

    head, wte, embed = "lm_head.weight", "transformer.wte.weight", "encoder.embed_tokens.weight"
    return {
        "false row by override": Situation(case("OverridesTieWeights"), {head: wte}, head),
        "Trainer resume": Situation(resume, {head: wte}, head),
        "untied, as in Wan": Situation(case("umt5_as_wan_stores_it"), {embed: "shared.weight"}, embed),
        "overwritten": Situation(case("shares_a_module"), {embed: "shared.weight"}, embed),
        "absent": Situation(case("gpt2_with_neither_end"), {head: None, wte: None}, head),
        "ambiguous": Situation(
            case("t5_two_different_members_without_the_source"), {"shared.weight": None}, "shared.weight", True
        ),
        "unrelated MISSING": Situation(
            case("gpt2_with_an_unrelated_key_missing"), {head: wte, "transformer.ln_f.bias": None}, head
        ),
        "MISMATCH, UNEXPECTED": Situation(
            other_rows, {head: wte, "transformer.ln_f.bias": None, "extra": None}, head
        ),
    }  # fmt: skip


# Ways: what people do about the report


@contextmanager
def nothing(_: object = None) -> Iterator[None]:
    yield


@contextmanager
def filter_warnings(_: Situation) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        yield


@contextmanager
def verbosity_error(_: object = None) -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def record_filter(_: object = None) -> Iterator[None]:
    def drop(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


@contextmanager
def ignore_the_key(situation: Situation) -> Iterator[None]:
    from transformers import PreTrainedModel

    before = PreTrainedModel._keys_to_ignore_on_load_missing
    PreTrainedModel._keys_to_ignore_on_load_missing = [re.escape(situation.row)]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_missing = before


@contextmanager
def dropping(drop: Callable[[Any, set[str]], set[str]]) -> Iterator[None]:
    """A hand-written shim: the report without the missing keys that `drop` names."""
    from transformers import modeling_utils

    original = modeling_utils.log_state_dict_report

    def report(*args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if (info := kwargs.get("loading_info")) is not None:
            before, info.missing_keys = info.missing_keys, info.missing_keys - drop(model, info.missing_keys)
            try:
                return original(*args, **kwargs)
            finally:
                info.missing_keys = before
        missing = set(kwargs["missing_keys"])  # the form of 5.0.0
        return original(*args, **{**kwargs, "missing_keys": missing - drop(model, missing)})

    modeling_utils.log_state_dict_report = report
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = original


def drop_declared(_: Situation) -> Any:
    def drop(model: Any, missing: set[str]) -> set[str]:
        patterns = list(model._tied_weights_keys or ())
        return {key for key in missing if any(re.search(pattern, key) for pattern in patterns)}

    return dropping(drop)


def drop_by_is(_: Situation) -> Any:
    def drop(model: Any, missing: set[str]) -> set[str]:
        state = model.state_dict(keep_vars=True)
        names = Counter(map(id, state.values()))
        return {key for key in missing if names[id(state.get(key))] > 1}

    return dropping(drop)


def tiedquiet_mode(mode: str) -> Callable[[Situation], Any]:
    def enabled(_: Situation) -> Any:
        import tiedquiet

        return tiedquiet.enable(mode)

    return enabled


WAYS: dict[str, Callable[[Situation], Any]] = {
    "nothing": nothing,
    '`warnings.filterwarnings("ignore")`': filter_warnings,
    "`set_verbosity_error()`": verbosity_error,
    "a filter for LOAD REPORT records": record_filter,
    "the key in `_keys_to_ignore_on_load_missing`": ignore_the_key,
    "dropping what `_tied_weights_keys` covers": drop_declared,
    "an `is` check": drop_by_is,
    "tiedquiet": tiedquiet_mode("on"),
    "tiedquiet, `repair`": tiedquiet_mode("repair"),
    "tiedquiet, `strict`": tiedquiet_mode("strict"),
}


# Cells


def cells() -> dict[str, dict[str, dict[str, Any]]]:
    """Each way against each situation, on the transformers of this interpreter."""
    import torch
    import transformers

    import tiedquiet
    from tests.checkpoints import printing

    tiedquiet.disable()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_warning()
    found: dict[str, dict[str, dict[str, Any]]] = {way: {} for way in WAYS}
    for name, situation in situations().items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            load, stored = situation.make(Path(folder))
            for way, applied in WAYS.items():
                told: list[str] = []
                loaded = None
                with printing() as printed, applied(situation):
                    try:
                        loaded = load()
                    except tiedquiet.LoadError as error:
                        told.append(str(error))
                if loaded is None:
                    with printing():
                        loaded = load()  # what was refused is judged as it would have been
                told += [r.getMessage() for r in printed.records if r.levelno >= logging.WARNING]
                found[way][name] = score(situation, loaded.state_dict(), stored, told)
    return found


def score(situation: Situation, now: dict[str, Any], stored: dict[str, Any], told: list[str]) -> dict[str, Any]:
    """Hold what was told against the bytes: which watched keys have to be shown, and which were."""
    import torch

    from tests.checkpoints import same_memory

    must = []
    for key, source in situation.tied.items():
        values = stored.get(source or key)
        held = values is not None and key in now and torch.equal(now[key], values)
        # Memory that was never initialised may hold, by accident, what the loader freed: equal values are no tie.
        if situation.doubtful or not held or not same_memory(now[key], now[source or key]):
            must.append(key)
    text = "\n".join(told)
    shown = [key for key in situation.tied if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", text)]
    hidden, false = [k for k in must if k not in shown], [k for k in shown if k not in must]
    return {"score": SCORES[2 * bool(hidden) + bool(false)], "must": must, "shown": shown}


# What comes out


def table(release: str, result: dict[str, dict[str, dict[str, Any]]]) -> str:
    names = list(next(iter(result.values())))
    lines = [f"transformers {release}:", "", f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for way, row in result.items():
        lines.append(f"| {way} | {' | '.join(row[name]['score'] for name in names)} |")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    lines = [
        f"| of {sum(len(next(iter(result.values()))) for result in results.values())} loads on {len(results)} releases "
        "| right | a false row stays | a true row is hidden |",
        "| --- | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        scores = [cell["score"] for result in results.values() for cell in result[way].values()]
        counts = [sum(s in kind for s in scores) for kind in ((RIGHT,), (FALSE, BOTH), (HIDDEN, BOTH))]
        lines.append(f"| {way} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def plot(path: Path, results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = ["#7fbf7b", "#fee08b", "#d73027", "#762a83"]
    figure, axes = plt.subplots(
        1, len(results), figsize=(4 + 2.6 * len(results), 5), sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, (release, result) in zip(axes[0], results.items(), strict=True):
        names = list(next(iter(result.values())))
        grid = [[SCORES.index(result[way][name]["score"]) for name in names] for way in WAYS]
        axis.imshow(grid, cmap=ListedColormap(colors), vmin=0, vmax=3, aspect="auto")
        axis.set_title(f"transformers {release}", fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(WAYS)), [way.replace("`", "") for way in WAYS], fontsize=8)
        axis.set_xticks([x - 0.5 for x in range(1, len(names))], minor=True)
        axis.set_yticks([y - 0.5 for y in range(1, len(WAYS))], minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="minor", length=0)
    words = ["right", "a false row stays", "hides a true row", "both"]
    handles = [Patch(color=color, label=word) for color, word in zip(colors, words, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    sys.exit(main())
