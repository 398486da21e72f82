"""The first question: each way of dealing with the report against each situation."""

import io
import logging
import re
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.silencers.situations import Situation, of_the_report
from benchmarks.silencers.tables import BOTH, FALSE, HIDDEN, RIGHT
from benchmarks.silencers.ways import WAYS

Cell = dict[str, Any]


def cells() -> dict[str, dict[str, Cell]]:
    """Each way against each situation, on the transformers of this interpreter."""
    import torch
    import transformers

    import tiedquiet
    from benchmarks.silencers.unread import never_read

    tiedquiet.disable()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_warning()
    found: dict[str, dict[str, Cell]] = {way: {} for way in WAYS}
    # The Trainer prints to stdout.
    for name, situation in {**of_the_report(), **never_read()}.items():
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            load, stored = situation.make(Path(folder))
            for way in WAYS:
                model, told = practise(way, situation, load)
                found[way][name] = score(situation, model, stored, told)
    return found


def practise(way: str, situation: Situation, load: Any) -> tuple[Any, list[str]]:
    """What a load in this way leaves in the program's hands, and all that it tells: log records, warnings, errors."""
    import tiedquiet
    from tests.checkpoints import printing
    from tests.idioms import dirty_memory

    around, after = WAYS[way]
    told: list[str] = []
    loaded = None
    with printing() as printed, warnings.catch_warnings(record=True) as warned, dirty_memory():
        warnings.simplefilter("always")
        with around(situation.row):
            try:
                loaded, info = load(output_loading_info=True)
                told.append(after(loaded, info) if after else "")
            except tiedquiet.LoadError as error:
                told.append(str(error))
    if loaded is None:
        with printing(), warnings.catch_warnings(), dirty_memory():
            warnings.simplefilter("ignore")
            loaded = load()  # what was refused is judged as it would have been
    told += [record.getMessage() for record in printed.records if record.levelno >= logging.WARNING]
    return loaded, told + [str(each.message) for each in warned]


def score(situation: Situation, model: Any, stored: dict[str, Any], told: list[str]) -> Cell:
    """Hold what was told against the bytes: which watched keys have to be shown, and which were."""
    import torch

    from benchmarks.census.truth import read_from_disk
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
    shown = [key for key in situation.tied if names(key, "\n".join(told))]
    hidden, false = [k for k in must if k not in shown], [k for k in shown if k not in must]
    verdict = {(False, False): RIGHT, (False, True): FALSE, (True, False): HIDDEN, (True, True): BOTH}
    return {"score": verdict[bool(hidden), bool(false)], "must": must, "shown": shown}


def names(key: str, text: str) -> bool:
    """Whether a text names a key, with or without what peft puts in front of it."""
    return re.search(rf"(?<![\w.])(?:base_model\.model\.)?{re.escape(key)}(?!\w|\.\w)", text) is not None
