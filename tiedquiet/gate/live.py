"""A model in memory against a folder that it was saved to, byte for byte: `tiedquiet.check(model, path)`."""

import copy
from collections.abc import Collection
from functools import partial
from typing import Any

import torch

from tiedquiet.gate.again import Again, begin
from tiedquiet.gate.compare import compare
from tiedquiet.gate.diagnosis import CannotCheck
from tiedquiet.gate.load import undo, undo_anew
from tiedquiet.gate.quantised import settle
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
    state, settled = survey(model).state, None
    found: Collection[str]
    try:
        if (again := _begin_again(model, path)) is None:
            found = names.origins(model, checkpoint.headers, state, conversions).keys()
        else:
            settled = settle(model, again, checkpoint, set(state)).findings
            conversions = []  # a quantiser's may change the model that they are carried out on
            theirs = survey(again.model).state
            found = names.sources(again.model, checkpoint.headers, theirs, again.conversions).keys() | settled.keys()
    except CannotCheck:
        raise
    except Exception as error:
        raise CannotCheck(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    reading = read(model, state.keys() - found, checkpoint)
    total = len(reading.stored) + len(reading.missing)
    known = Record(reading.stored, reading.missing, total, reading.free, lasting=reading.found, files=checkpoint.files)
    undos = [partial(undo, model), partial(undo_anew, model)]
    result = compare(model, known, checkpoint, undos, conversions, settled)
    return Proof(type(model).__name__, result.held, tuple(result.findings), total)


def _begin_again(model: Any, path: str) -> Again | None:
    """The load of a quantised model, from these files, as it was loaded; None for one that is not quantised."""
    if (quantiser := getattr(model, "hf_quantizer", None)) is None:
        return None
    options = {"dtype": model.config.dtype, "device_map": getattr(model, "hf_device_map", str(model.device))}
    if not quantiser.pre_quantized:
        options["quantization_config"] = copy.deepcopy(quantiser.quantization_config)
    again = begin(partial(type(model).from_pretrained, path, **options))
    if again is None or again.quantiser is None:
        raise CannotCheck(f"{path} does not load as a quantised model, and without that it cannot be compared with one")
    return again


def _files(path: str) -> list[str]:
    source = Source(path, None)
    if not source.is_local:
        raise CannotCheck(f"{path} is no folder")
    forms = weights_of(source, "", (*OF_TRANSFORMERS, *OF_DIFFUSERS), trust=False)
    if not forms and weights_of(source, "", OF_ADAPTERS, trust=False):
        raise CannotCheck(f"{path} holds an adapter; merge it into its model, save that, and check that")
    if not forms or not forms[0].files:
        raise CannotCheck(f"{path} holds no weights: {', '.join((*OF_TRANSFORMERS, *OF_DIFFUSERS))}")
    return [str(file) for file in forms[0].files]
