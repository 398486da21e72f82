"""A model in memory against a folder that it was saved to, byte for byte: `tiedquiet.check(model, path)`."""

from functools import partial
from typing import Any

import torch

from tiedquiet.gate.compare import compare
from tiedquiet.gate.diagnosis import CannotCheck
from tiedquiet.gate.load import undo, undo_anew
from tiedquiet.gate.source import Source
from tiedquiet.gate.weights import OF_ADAPTERS, OF_DIFFUSERS, OF_TRANSFORMERS, weights_of
from tiedquiet.proof import names
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.reading import read
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Proof

_PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


def check(model: Any, path: str) -> Proof:
    """Compare a model with a folder's files, under the names that transformers gives its tensors when it saves them.

    Args:
        model: any module; of what `torch.compile` or DDP made of one, the one inside.
        path: a folder with weights in safetensors or `.bin`, whole or in shards.

    Raises:
        CannotCheck: there are none, or they cannot be read.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    model = model.module if isinstance(model, _PARALLEL) else model
    checkpoint = Checkpoint(None, _files(path), getattr(model, "base_model_prefix", ""))
    conversions = [*names.conversions_of(model), *(getattr(model, "_weight_conversions", None) or ())]
    state = survey(model).state
    try:
        found = names.origins(model, checkpoint.headers, state, conversions)
    except Exception as error:
        raise CannotCheck(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    reading = read(model, state.keys() - found.keys(), checkpoint)
    total = len(reading.stored) + len(reading.missing)
    known = Record(reading.stored, reading.missing, total, reading.free, lasting=reading.found, files=checkpoint.files)
    result = compare(model, known, checkpoint, [partial(undo, model), partial(undo_anew, model)], conversions)
    return Proof(type(model).__name__, result.held, tuple(result.findings), total)


def _files(path: str) -> list[str]:
    source = Source(path, None)
    if not source.is_local:
        raise CannotCheck(f"{path} is no folder")
    forms = weights_of(source, "", (*OF_TRANSFORMERS, *OF_DIFFUSERS), trust=True)
    if not forms and weights_of(source, "", OF_ADAPTERS, trust=True):
        raise CannotCheck(f"{path} holds an adapter; merge it into its model, save that, and check that")
    if not forms or not forms[0].files:
        raise CannotCheck(f"{path} holds no weights: {', '.join((*OF_TRANSFORMERS, *OF_DIFFUSERS))}")
    return [str(file) for file in forms[0].files]
