"""Compares a model in memory with a folder it was saved to, byte for byte: `tiedquiet.check(model, path)`."""

import copy
from collections.abc import Callable, Collection
from functools import cached_property, partial
from typing import Any

import torch

from tiedquiet.gate.adapters import check_adapter
from tiedquiet.gate.again import Again, begin
from tiedquiet.gate.compare import compare
from tiedquiet.gate.load import undo, undo_anew
from tiedquiet.gate.quantised import settle
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.source import Source
from tiedquiet.gate.weights import OF_ADAPTERS, OF_DIFFUSERS, OF_TRANSFORMERS, of_variant, variants_in, weights_of
from tiedquiet.proof import names
from tiedquiet.proof.adapted import names_in_files
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.reading import read
from tiedquiet.proof.record import Record, loaded_name, uncompiled, without_wrappers
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Proof

_PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


class _OfWrappers(Checkpoint):
    """Files that modules around the model, or some of them, were saved to, under the model's own names.

    Args:
        files: their paths.
        base: as of any checkpoint.
        around: what each of these modules puts before them, the outermost first.
    """

    def __init__(self, files: list[str], base: str, around: list[str]) -> None:
        super().__init__(None, files, base)
        self._around = around

    def _inside(self, name: str) -> str:
        for prefix in self._around:
            name = name.removeprefix(prefix)
        return name

    @cached_property
    def headers(self) -> dict[str, torch.Tensor]:
        return {self._inside(name): header for name, header in super().headers.items()}

    @cached_property
    def tensors(self) -> dict[str, Callable[[], torch.Tensor]]:
        return {self._inside(name): read for name, read in super().tensors.items()}


def check(model: Any, path: str) -> Proof:
    """Compare a model with a folder's files, under the names that transformers gives its tensors when it saves them.

    Args:
        model: any module; of what `torch.compile` or DDP made of one, the one inside.
        path: a folder with weights in safetensors or `.bin`, whole or in shards. Where the model has an adapter that is
            not merged, the folder of that adapter, with which the adapter is compared; or that of its base model, with
            which the rest is.

    Raises:
        CannotCheck: there are none, or they cannot be read.
    """
    around: list[str] = []
    while (name := _inside(model)) is not None:
        model = getattr(model, name)
        around.append(f"{name}.")
    files, is_adapter = _files(path)
    configs, is_peft_s = getattr(model, "peft_config", None), hasattr(model, "get_base_model")
    # A merged adapter may leave its configuration behind, but no tensors.
    adapters = [a for a in configs if is_peft_s or names_in_files(model, a)] if isinstance(configs, dict) else []
    if is_adapter and adapters:
        return check_adapter(model, adapters, files, path)
    if is_adapter:
        raise CannotCheck(f"{path} holds an adapter, and the model has none; check the folder of its base model")
    base = uncompiled(model.get_base_model()) if adapters and is_peft_s else model
    return _check(base, _OfWrappers(files, getattr(base, "base_model_prefix", ""), around), path, adapters)


def _inside(model: Any) -> str | None:
    """The name of the model inside what `torch.compile` or DDP made of it; None for any other."""
    if isinstance(model, _PARALLEL):
        return "module"
    return "_orig_mod" if isinstance(model, torch.nn.Module) and uncompiled(model) is not model else None


def _check(model: Any, checkpoint: Checkpoint, path: str, adapters: list[str]) -> Proof:
    """Compare a model without its adapters, under the names that its tensors had before these were put in."""
    conversions = names.all_conversions(model, getattr(model, "_weight_conversions", None) or ())
    put_in = {key for adapter in adapters for key in names_in_files(model, adapter)}
    now = survey(model).state
    settled = None
    found: Collection[str]
    try:
        were_wrapped = any(without_wrappers(name) != name for name in checkpoint.headers)
        as_saved = loaded_name if adapters else str if were_wrapped else without_wrappers
        before = {key: as_saved(key) for key in now if key not in put_in}
        state = {own: now[key] for key, own in before.items()}
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
    reading = read(model, put_in | {key for key, own in before.items() if own not in found}, checkpoint)
    stored, missing, free = (
        {before[key] for key in some if key in before} for some in (reading.stored, reading.missing, reading.free)
    )
    total = len(stored) + len(missing)
    known = Record(stored, missing, total, free, lasting=reading.found, files=checkpoint.files)
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
        raise CannotCheck(f"{path} does not load as a quantised model, so it cannot be compared with one")
    return again


def _files(path: str) -> tuple[list[str], bool]:
    """The weights of a folder, and whether they are an adapter's."""
    source = Source(path, None)
    if not source.is_local:
        raise CannotCheck(f"{path} is not a folder")
    usual = (*OF_TRANSFORMERS, *OF_DIFFUSERS)
    variants = variants_in(source, "", usual) or [""]
    if len(variants) > 1 and variants[0]:
        raise CannotCheck(
            f"{path} holds {' and '.join(variants)}; put the variant to compare with into a folder of its own"
        )
    forms = weights_of(source, "", of_variant(usual, variants[0]), trust=True)
    of_adapter = [] if forms else weights_of(source, "", OF_ADAPTERS, trust=True)
    first = next(iter(forms or of_adapter), None)
    if first is None or not first.files:
        raise CannotCheck(f"{path} holds no weights: {', '.join(usual)}")
    return [str(file) for file in first.files], bool(of_adapter)
