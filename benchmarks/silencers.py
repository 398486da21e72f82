"""What each way of silencing the loading report hides, what it leaves, and what each guard against corruption notices.

    python benchmarks/silencers.py                  # five releases of transformers, in the environments of tests/compat
    python benchmarks/silencers.py 5.2.0 5.24.0

Every way meets every situation, with tiny checkpoints and the real loader. What is true of a key is read from the
bytes of the file, after the load, and from a model that was built and not loaded. A cell of the first table is `right`
only if no row is left that is false and none is hidden that is true. A row counts as shown if transformers' report or
list has it, or if a warning or an error names its key. A cell of the second table is `right` only if a model that does
not hold what its file stores is noticed, and one that does is not.
"""

import hashlib
import io
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
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.census import LOUD
from benchmarks.record import arguments, pins_of, write

ROOT = Path(__file__).parents[1]
RELEASES = ("5.0.0", "5.2.0", "5.3.0", "5.13.1", "5.24.0")
RIGHT, FALSE, HIDDEN, BOTH = "right", "false row stays", "**hides a true row**", "**both**"
SCORES = (RIGHT, FALSE, HIDDEN, BOTH)
ALARM, MISSED = "false alarm", "**missed**"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("release", nargs="*", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--here", action="store_true", help="only the transformers of this interpreter; prints JSON")
    options = parser.parse_args()
    if options.here:
        json.dump({"report": cells(), "corruption": corruption_cells()}, sys.stdout)  # the parent reads it
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
    tables = [
        table(f"transformers {release}, {words}", result[what])
        for what, words in (("report", "the report"), ("corruption", "corruption"))
        for release, result in results.items()
    ]
    text = "\n\n".join([summary(results), corruption_summary(results), *tables])
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    print(path)
    return 0


# Situations: what is loaded, and which keys somebody would have to be told about, or not


class Situation(NamedTuple):
    """`make` writes a checkpoint into a folder; returns how to load it, and the tensors that the model should hold.

    `tied` is what each watched key is meant to be, None where it is its own; `row` the row that people silence;
    `doubtful` says that the key must be shown whatever it holds: two stored ends of its tie differ.
    """

    make: Callable[[Path], tuple[Callable[..., Any], dict[str, Any]]]
    tied: dict[str, str | None]
    row: str
    doubtful: bool = False


def situations() -> dict[str, Situation]:
    import torch
    from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

    from tests.checkpoints import gpt2, save
    from tests.compat import cases
    from tests.idioms import IDIOMS

    def case(name: str, **options: Any) -> Callable[[Path], tuple[Callable[..., Any], dict[str, Any]]]:
        def make(folder: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
            cls, stored = cases.CASES[name](folder)
            return lambda **more: cls.from_pretrained(folder, **options, **more), stored

        return make

    def idiom(name: str) -> Callable[[Path], tuple[Callable[..., Any], dict[str, Any]]]:
        def make(folder: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
            chosen = IDIOMS[name]
            built = dict(chosen.build().named_buffers())
            return lambda **more: chosen.cls.from_pretrained(folder, **more), {**built, **chosen.save(folder)}

        return make

    def resume(folder: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
        model = GPT2LMHeadModel(gpt2())
        quiet = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model, quiet)
        trainer.save_model(str(folder / "checkpoint-1"))
        stored = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}

        def load(output_loading_info: bool = False) -> Any:
            with torch.no_grad():
                model.transformer.wte.weight.zero_()
            trainer._load_from_checkpoint(str(folder / "checkpoint-1"))
            return (model, {}) if output_loading_info else model  # a resume hands out no such thing

        return load, stored

    def other_rows(folder: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
        cls = cases.OverridesTieWeights
        keys = [key for key in cls(gpt2()).state_dict() if key != "lm_head.weight"]
        odd = {"transformer__ln_f__bias": torch.ones(7), "extra": torch.ones(3)}
        stored = save(cls(gpt2()), folder, keys, **odd)
        return lambda **more: cls.from_pretrained(folder, ignore_mismatched_sizes=True, **more), stored

    blocks = ("transformer.wpe", "transformer.drop", "transformer.h", "transformer.ln_f")
    on_disk = {**dict.fromkeys(blocks, "cpu"), "transformer.wte": "disk", "lm_head": "disk"}
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
        "overwritten outside ties": Situation(idiom("BesideABuffer"), {"part.weight": None}, "part.weight"),
        "unwritten buffer": Situation(idiom("InternLM2"), {"rotary.inv_freq": None}, "rotary.inv_freq"),
        "untied, declared by nobody": Situation(
            idiom("AskedForByTheConfigAlone"), {"head.weight": "embed.weight"}, "head.weight"
        ),
        "disk offload": Situation(
            case("OverridesTieWeights", device_map=on_disk), {head: wte}, head
        ),
        "alias": Situation(
            idiom("OneModuleTwoNames, both stored and different"),
            {"embed.weight": None, "decoder.embed.weight": None}, "embed.weight", True,
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


def tie_by_hand(model: Any, _: dict[str, Any]) -> str:
    model.tie_weights()
    return ""


def read_info(_: Any, info: dict[str, Any]) -> str:
    return str([info.get(f"{kind}_keys") for kind in ("missing", "mismatched", "unexpected")])


class Way(NamedTuple):
    """What is done around the load, and what after it with the model and its loading info, which returns a text."""

    around: Callable[[Situation], Any]
    after: Callable[[Any, dict[str, Any]], str] | None = None


WAYS = {
    "nothing": Way(nothing),
    '`warnings.filterwarnings("ignore")`': Way(filter_warnings),
    "`set_verbosity_error()`": Way(verbosity_error),
    "`set_verbosity_error()`, then `model.tie_weights()`": Way(verbosity_error, tie_by_hand),
    "`set_verbosity_error()`, reading `output_loading_info`": Way(verbosity_error, read_info),
    "a filter for LOAD REPORT records": Way(record_filter),
    "the key in `_keys_to_ignore_on_load_missing`": Way(ignore_the_key),
    "dropping what `_tied_weights_keys` covers": Way(drop_declared),
    "an `is` check": Way(drop_by_is),
    "tiedquiet": Way(tiedquiet_mode("on")),
    "tiedquiet, `repair`": Way(tiedquiet_mode("repair")),
    "tiedquiet, `strict`": Way(tiedquiet_mode("strict")),
}


# Cells


def cells() -> dict[str, dict[str, dict[str, Any]]]:
    """Each way against each situation, on the transformers of this interpreter."""
    import torch
    import transformers

    import tiedquiet
    from tests.checkpoints import printing
    from tests.idioms import dirty_memory

    tiedquiet.disable()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_warning()
    found: dict[str, dict[str, dict[str, Any]]] = {way: {} for way in WAYS}
    for name, situation in situations().items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            load, stored = situation.make(Path(folder))
            for way, (around, after) in WAYS.items():
                told: list[str] = []
                loaded = None
                with printing() as printed, around(situation), dirty_memory():
                    try:
                        loaded, info = load(output_loading_info=True)
                        told.append(after(loaded, info) if after else "")
                    except tiedquiet.LoadError as error:
                        told.append(str(error))
                if loaded is None:
                    with printing(), dirty_memory():
                        loaded = load()  # what was refused is judged as it would have been
                told += [r.getMessage() for r in printed.records if r.levelno >= logging.WARNING]
                found[way][name] = score(situation, loaded, stored, told)
    return found


def score(situation: Situation, model: Any, stored: dict[str, Any], told: list[str]) -> dict[str, Any]:
    """Hold what was told against the bytes: which watched keys have to be shown, and which were."""
    import torch

    from benchmarks.census import read_from_disk
    from tests.checkpoints import same_memory
    from tests.idioms import everything

    now = everything(model)
    places = dict(now)
    for key in [key for key in situation.tied if key in now and now[key].is_meta]:
        # What is on disk is read anew for every use: one place there is one tensor.
        values = read_from_disk(model, key)
        now[key] = places[key] if values is None else values
    must = []
    for key, source in situation.tied.items():
        values = stored.get(source or key)
        held = values is not None and key in now and not now[key].is_meta and torch.equal(now[key], values)
        # Memory that was never initialised may hold, by accident, what the loader freed: equal values are no tie.
        one = held and (places[key].is_meta or same_memory(now[key], now[source or key]))
        if situation.doubtful or not one:
            must.append(key)
    text = "\n".join(told)
    shown = [key for key in situation.tied if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w|\.\w)", text)]
    hidden, false = [k for k in must if k not in shown], [k for k in shown if k not in must]
    return {"score": SCORES[2 * bool(hidden) + bool(false)], "must": must, "shown": shown}


# Corruption: does the model that a program goes on with hold what its file stores?

# What happens to the checkpoint, and the idiom of tests/idioms.py that does it; whether it is corrupt on a release is
# read from the bytes.
CORRUPTION = {
    "a weight beside a buffer": "BesideABuffer",
    "a weight beside a missing bias": "MissingSibling",
    "embedding mostly zeroed": "TiedAndMostlyZeroed",
    "one row of `tie_weights`": "WritesInTieWeights",
    "rotary table never written": "InternLM2",
    "Qwen 1: both": "Qwen1",
    "untied, declared by nobody": "AskedForByTheConfigAlone",
    "`tie_weights` does nothing": "DoesNothing",
    "a module shared": "OneModuleTwoNames",
    "alias": "OneModuleTwoNames, both stored and different",
    "written through an address": "WritesToAnAddress",
    "sound": "good citizen",
    "sound, tied by an override": "DeclaresNone",
    "sound, a clone": "Clones",
    "a row for padding, zeroed by a user's class": "ZeroesThePaddingRow",
    "sound, written and restored": "WritesAndRestores",
}
CHECK = "`python -m tiedquiet check`"
NEEDS = {
    "nothing": "",
    "hashing the file": "a published hash",
    "comparing logits by hand": "a reference model, a forward pass of both",
    "tiedquiet": "",
    "tiedquiet, `repair`": "",
    "tiedquiet, `strict`": "",
    CHECK: "",
}


def corruption_cells() -> dict[str, dict[str, dict[str, Any]]]:
    """Each practice against each checkpoint: whether the model is corrupt, and whether that is noticed."""
    from tests.idioms import IDIOMS

    found: dict[str, dict[str, dict[str, Any]]] = {practice: {} for practice in NEEDS}
    for name, idiom in CORRUPTION.items():
        for practice in NEEDS:
            with tempfile.TemporaryDirectory() as folder:
                corrupt, noticed = practise(practice, IDIOMS[idiom], Path(folder))
            score = RIGHT if corrupt is noticed else MISSED if corrupt else ALARM
            found[practice][name] = {"score": score, "corrupt": corrupt, "noticed": noticed}
    return found


def practise(practice: str, idiom: Any, folder: Path) -> tuple[bool, bool]:
    """Whether the loaded model is corrupt, and whether somebody who does this notices."""
    import tiedquiet
    from tests.checkpoints import printing
    from tests.idioms import dirty_memory, outputs_agree, truth

    file = idiom.save(folder)
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    mode = {"tiedquiet": "on", "tiedquiet, `repair`": "repair", "tiedquiet, `strict`": "strict"}.get(practice, "off")
    told: list[str] = []
    model = None
    with printing() as printed, tiedquiet.enable(mode), dirty_memory():
        try:
            model, missing = idiom.load(folder)
        except tiedquiet.LoadError as error:
            told.append(str(error))
    if model is None:
        with printing(), tiedquiet.enable("off"), dirty_memory():
            model, missing = idiom.load(folder)
    found = truth(model, file, idiom.build(), idiom.architectures)
    corrupt = found.broken(file) is True
    if practice == "comparing logits by hand":
        return corrupt, not outputs_agree(idiom, model, file)
    if practice == CHECK:
        return corrupt, check(idiom, folder) == 1
    if practice == "hashing the file":
        return corrupt, hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() != before
    if mode == "off":
        # The report tells of a loss only where a row of it names a tensor that is concerned.
        concerned = {key for key, words in found.verdicts(file).items() if {str(word) for word in words} & {*LOUD}}
        return corrupt, any(printed.shows(key) for key in (concerned if corrupt else missing))
    return corrupt, bool(told or printed.loud)


def check(idiom: Any, folder: Path) -> int:
    """The exit status of `python -m tiedquiet check`."""
    from tests.idioms import dirty_memory
    from tiedquiet.__main__ import main

    dtype = str(idiom.dtype or "float32").removeprefix("torch.")
    cls = f"{idiom.cls.__module__}.{idiom.cls.__name__}"
    with redirect_stdout(io.StringIO()), dirty_memory():
        return main(["check", str(folder), "--class", cls, "--dtype", dtype])


# What comes out


def table(title: str, result: dict[str, dict[str, dict[str, Any]]]) -> str:
    names = list(next(iter(result.values())))
    lines = [f"{title}:", "", f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for way, row in result.items():
        lines.append(f"| {way} | {' | '.join(row[name]['score'] for name in names)} |")
    return "\n".join(lines)


def loads_of(results: dict[str, Any], what: str) -> int:
    return sum(len(next(iter(result[what].values()))) for result in results.values())


def summary(results: dict[str, Any]) -> str:
    lines = [
        f"| of {loads_of(results, 'report')} loads on {len(results)} releases "
        "| right | a false row stays | a true row is hidden |",
        "| --- | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        scores = [cell["score"] for result in results.values() for cell in result["report"][way].values()]
        counts = [sum(s in kind for s in scores) for kind in ((RIGHT,), (FALSE, BOTH), (HIDDEN, BOTH))]
        lines.append(f"| {way} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def corruption_summary(results: dict[str, Any]) -> str:
    lines = [
        f"| of {loads_of(results, 'corruption')} loads on {len(results)} releases "
        "| corrupt | noticed | missed | false alarms | what it needs |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for practice, needs in NEEDS.items():
        found = [cell for result in results.values() for cell in result["corruption"][practice].values()]
        corrupt = sum(cell["corrupt"] for cell in found)
        missed, alarms = (sum(cell["score"] == score for cell in found) for score in (MISSED, ALARM))
        lines.append(f"| {practice} | {corrupt} | {corrupt - missed} | {missed} | {alarms} | {needs or 'nothing'} |")
    return "\n".join(lines)


def plot(path: Path, results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = {
        RIGHT: "#7fbf7b",
        **dict.fromkeys((FALSE, ALARM), "#fee08b"),
        **dict.fromkeys((HIDDEN, MISSED), "#d73027"),
    }
    colors[BOTH] = "#762a83"
    order = list(colors)
    figure, axes = plt.subplots(
        2, len(results), figsize=(5 + 3.4 * len(results), 11), sharey="row", squeeze=False, constrained_layout=True,
        height_ratios=(len(WAYS), len(NEEDS)),
    )  # fmt: skip
    for column, (release, result) in enumerate(results.items()):
        for axis, what in zip(axes[:, column], ("report", "corruption"), strict=True):
            ways, names = list(result[what]), list(next(iter(result[what].values())))
            grid = [[order.index(result[what][way][name]["score"]) for name in names] for way in ways]
            axis.imshow(grid, cmap=ListedColormap(list(colors.values())), vmin=0, vmax=len(order) - 1, aspect="auto")
            axis.set_title(f"transformers {release}: {what}", fontsize=10)
            columns, rows = ([word.replace("`", "") for word in words] for words in (names, ways))
            axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
            axis.set_yticks(range(len(rows)), rows, fontsize=8)
            axis.set_xticks([x - 0.5 for x in range(1, len(names))], minor=True)
            axis.set_yticks([y - 0.5 for y in range(1, len(ways))], minor=True)
            axis.grid(which="minor", color="white", linewidth=1.5)
            axis.tick_params(which="minor", length=0)
    words = {
        RIGHT: "right", FALSE: "a false row stays, or a false alarm",
        HIDDEN: "a true row is hidden, or corruption missed", BOTH: "both",
    }  # fmt: skip
    handles = [Patch(color=colors[score], label=word) for score, word in words.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    sys.exit(main())
