"""The second question: who notices that the model that a program goes on with is not what its file stores."""

import hashlib
import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.silencers.tables import ALARM, CHECK, MISSED, NEEDS, NOTICED, QUIET

# What happens to the checkpoint, and the idiom of tests/idioms/ that does it; whether it is corrupt on a release is
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


def cells() -> dict[str, dict[str, dict[str, str]]]:
    """Each practice against each checkpoint: whether the model is corrupt, and whether that is noticed."""
    from tests.idioms import IDIOMS

    found: dict[str, dict[str, dict[str, str]]] = {practice: {} for practice in NEEDS}
    for name, idiom in CORRUPTION.items():
        for practice in NEEDS:
            with tempfile.TemporaryDirectory() as folder:
                corrupt, noticed = practise(practice, IDIOMS[idiom], Path(folder))
            score = {(True, True): NOTICED, (True, False): MISSED, (False, True): ALARM, (False, False): QUIET}
            found[practice][name] = {"score": score[corrupt, noticed]}
    return found


def practise(practice: str, idiom: Any, folder: Path) -> tuple[bool, bool]:
    """Whether the loaded model is corrupt, and whether somebody who does this notices."""
    import tiedquiet
    from tests.checkpoints import printing
    from tests.idioms import dirty_memory, outputs_agree, truth
    from tiedquiet.verdict import LOUD

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
        concerned = {key for key, words in found.verdicts(file).items() if words & {*LOUD}}
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
