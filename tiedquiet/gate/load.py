"""Compares a transformers model, loaded as users load it, with its files."""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tiedquiet.gate import progress
from tiedquiet.gate.bounds import MOST_LABELS, bounded, size_of
from tiedquiet.gate.components import Part, adapted, folders_of, loader_of
from tiedquiet.gate.confined import without_hub
from tiedquiet.gate.diagnosis import damage, damage_of, explain, nested
from tiedquiet.gate.lacking import lacking_in
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.report import Result
from tiedquiet.gate.source import check_length, under
from tiedquiet.gate.unplaced import IS_IT, OfGguf, left_of, of_gguf, of_transformers
from tiedquiet.gate.weights import (
    OF_ADAPTERS,
    OF_TRANSFORMERS,
    Weights,
    of_variant,
    only_of_variants,
    pickles_are_unsafe,
    refuse_distributed,
    variants_in,
    weights_of,
)
from tiedquiet.verdict import Finding, Verdict

_HEAD = re.compile(r"\.(?:classifier|score)\.(?:[a-z_]+\.)?weight$")  # as peft takes them for those of its tasks
_NOT_THERE = re.compile(r"does not appear to have (?:a file|files) named (.+?)(?:\. Checkout|\.?$)", re.MULTILINE)
_VOICES = "spk_dict.pt"  # which Qwen2.5-Omni's `from_pretrained` reads besides


@dataclass(frozen=True)
class How:
    """How to load a model.

    Attributes:
        dtype: the type, or `auto` for the file's.
        device: where to.
        trust: whether code that comes with the checkpoint may run.
        trust_pickle: whether a pickle may be opened with a torch that does not do so safely.
        is_resume: whether a Trainer has to read all of it.
        variant: of the files' names: `fp16` of `model.fp16.safetensors`; empty for those without.
        lora: the LoRA file to load into it as well; empty for none.
    """

    dtype: str = "auto"
    device: str = "cpu"
    trust: bool = False
    trust_pickle: bool = False
    is_resume: bool = False
    variant: str = ""
    lora: str = ""


def check_model(part: Part, how: How, kind: Any = None) -> Result:
    """Load a model of transformers, and compare every tensor with the files that it was read from.

    Args:
        part: what to load.
        how: how to load it.
        kind: the class to load it as; None for the one that its config names, or the user.

    Raises:
        CannotCheck: it cannot be loaded.
    """
    from tiedquiet.gate.adapters import WithAdapter
    from tiedquiet.gate.automatic import other_class
    from tiedquiet.gate.beside import rivals
    from tiedquiet.gate.compare import compare
    from tiedquiet.gate.quantised import settle
    from tiedquiet.gate.resume import of_trainer
    from tiedquiet.proof import record
    from tiedquiet.proof.files import Checkpoint

    progress.loading(part.label)
    part = adapted(part, how.trust)
    loader, problem = (kind, "") if kind else loader_of(part, how.trust)
    forms = _forms(part, how)
    model, info = _load(part, loader, how)
    known = record.of(model)
    name = type(model).__name__
    if known is None or not known.total:
        raise CannotCheck(
            f"{part.label}: {name} was not loaded by transformers' `from_pretrained`, so nothing is known about it"
        )
    if problem:
        problem += f": loaded as {name}, so a head, if there is one, was not checked; name the class with --class"
    files = list(dict.fromkeys(known.files))
    checkpoint: Checkpoint = WithAdapter(files, getattr(model, "base_model_prefix", ""), known.adapted)
    undos = [partial(undo, model), partial(undo_anew, model)]
    conversions = getattr(model, "_weight_conversions", None) or ()
    again, settled, fit = _begin_again(part, loader, how, model), None, OfGguf()
    if again is not None:
        settled = settle(model, again, checkpoint, known.stored)
        fit = of_gguf(model, files, again) if part.source.gguf else fit
        settled.findings.update(fit.partial)
        conversions = ()  # a quantiser's may change the model that they are carried out on
        checkpoint = Checkpoint({}) if part.source.gguf else checkpoint
    of_quantiser = settled.findings if settled is not None else None
    held, total, buffers, findings = compare(model, known, checkpoint, undos, conversions, of_quantiser)
    judged = {finding.key for finding in findings}
    missing = {finding.key for finding in findings if finding.verdict is Verdict.MISSING}
    # Of a model of its own transformers leaves out what needs no file; of an adapter it does not.
    reported = known.missing - known.free if info is None else set(info["missing_keys"])
    missing |= reported - judged - (set() if part.base is None else known.free)
    allowed = sorted(known.missing - missing - judged)
    notes = settled.notes if settled is not None else []
    for form in forms:
        of_form = rivals(form, how.trust_pickle)
        findings, notes = findings + of_form[0], notes + of_form[1]
    left = left_of(model, checkpoint, conversions) if info is None else info["unexpected_keys"]
    unexpected, told = sorted(left), ""
    if part.source.gguf and again is not None:
        unexpected, told = list(fit.left) or unexpected, fit.told
    elif unexpected:
        told = of_transformers(model, checkpoint, conversions)
    if told and not any(finding.verdict is Verdict.UNREAD for finding in findings):
        if part.cls is None:
            problem = problem or told + IS_IT
        else:
            notes.append(told)
    if kind is None and part.cls is None and part.base is None and part.config.get("architectures"):
        said, is_wrong = other_class(model, part.config, checkpoint)
        problem = problem or said * is_wrong
        notes += [said] * (bool(said) and not is_wrong)
    if kind is None and (resume := of_trainer(part, model)) is not None:
        if how.is_resume and resume.read < resume.stored:
            findings.append(Finding("", Verdict.UNREAD, None, str(resume), True))
        else:
            notes.append(str(resume))
    return Result(
        part.name,
        name,
        files,
        held,
        total,
        buffers,
        findings,
        sorted(missing),
        allowed,
        unexpected,
        problem,
        notes,
        maker=settled.maker if settled is not None else "",
    )


def _forms(part: Part, how: How) -> list[list[Weights]]:
    """The forms in which the folders hold weights, those that are read first; raises if they must not be opened."""
    for source in filter(None, (part.source, part.base)):
        if not source.gguf:
            refuse_distributed(source, part.name)
        path = source.file("generation_config.json", part.name) if source.is_local else None
        if path is not None:
            check_length(path)
        unsafe = "" if how.trust_pickle else pickles_are_unsafe()
        if (source.is_local or unsafe) and source.file(_VOICES, part.name) is not None and unsafe:
            raise CannotCheck(f"{part.label}: {_VOICES} is a pickle, and {unsafe}")
    has_adapter = part.source.file("adapter_config.json", part.name) is not None
    adapter = [weights_of(part.source, part.name, OF_ADAPTERS, how.trust_pickle)] if has_adapter else []
    if part.source.gguf:
        return adapter
    own = part.config.get("transformers_weights")
    names = of_variant(OF_TRANSFORMERS, how.variant)
    names = (own, *names) if isinstance(own, str) else names
    if part.base is None:
        forms = weights_of(part.source, part.name, names, how.trust_pickle)
        if not forms and (others := variants_in(part.source, part.name, OF_TRANSFORMERS)):
            raise CannotCheck(only_of_variants(part.label, others, how.variant))
        return [forms, *adapter]
    if how.variant:
        raise CannotCheck(f"{part.label} is an adapter, and adapters have no variants; leave out --variant")
    return [weights_of(part.base, "", names, how.trust_pickle), *adapter]


def _begin_again(part: Part, loader: Any, how: How, model: Any) -> Any:
    """The load once more, if a quantiser had its hands in it; None where none had.

    Raises:
        CannotCheck: it cannot be loaded a second time.
    """
    if (
        not part.source.gguf
        and getattr(model, "hf_quantizer", None) is None
        and not under(part.config, "quantization_config")
    ):
        return None
    from tiedquiet.gate.again import begin

    again = begin(partial(_from_pretrained, part, loader, how))
    if again is None:
        raise CannotCheck(f"{part.label}: it is quantised, and its values cannot be read a second time")
    return again if again.quantiser is not None or again.given is not None else None


def _load(part: Part, loader: Any, how: How) -> tuple[Any, dict[str, Any] | None]:
    """The model, and what transformers says of its load: None where its class can only be loaded without that."""
    import torch

    try:
        try:
            loaded = _from_pretrained(part, loader, how)
        except (AttributeError, TypeError):
            # A `from_pretrained` of its own may do something to the model, and took the pair for it; and 5.2 and 5.3
            # have nothing to say of an adapter's load. What else is wrong fails once more.
            loaded = _from_pretrained(part, loader, how, output_loading_info=False), None
    except Exception as error:
        raise CannotCheck(_reason(part, loader, how, error)) from error
    if not isinstance(loaded, tuple) or len(loaded) != 2 or not isinstance(loaded[0], torch.nn.Module):
        raise CannotCheck(f"{part.label} cannot be loaded as {loader.__name__}: that is not a model")
    return loaded


def _from_pretrained(part: Part, loader: Any, how: How, **other: Any) -> Any:
    is_local = part.source.is_local and (part.base is None or part.base.is_local)
    with without_hub(is_local and not how.trust), bounded(_stored(part, how)):
        return loader.from_pretrained(part.source.name, **{**_options(part, how), **other})


def _stored(part: Part, how: How) -> int:
    """How many bytes the files have that are read; 0 where they are not known."""
    kinds = _forms(part, how)
    if not all(forms and forms[0].files for forms in kinds):
        return 0  # on the hub, or under a name of its own
    own = [Path(part.source.name, part.source.gguf)] if part.source.gguf else []
    return size_of((*own, *(path for forms in kinds for path in forms[0].files)))


def _options(part: Part, how: How) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": how.dtype,
        "device_map": how.device,
        "output_loading_info": True,
        "trust_remote_code": how.trust,  # said in any case: where it is not, transformers asks
    }
    optional = {
        "subfolder": part.name,
        "revision": part.source.revision,
        "gguf_file": part.source.gguf,
        "variant": how.variant,
    }
    options |= {name: value for name, value in (*optional.items(), ("num_labels", _labels_of(part))) if value}
    if not part.source.is_local and not how.trust_pickle and pickles_are_unsafe():
        options["use_safetensors"] = True
    return options


def _labels_of(part: Part) -> int:
    """How many labels the head of an adapter has, as whoever loads it says; its base model's config may have others."""
    from tiedquiet.proof.files import Checkpoint

    if part.made_for is None or (path := part.source.file(OF_ADAPTERS[0])) is None:
        return 0
    with suppress(Exception):  # which the load says
        heads = {name: head for name, head in Checkpoint(None, [str(path)]).headers.items() if _HEAD.search(name)}
        labels = heads[max(heads)].shape[0]  # of a head of two layers, `dense` comes before `out_proj`
        return labels if labels <= MOST_LABELS else 0
    return 0


def _reason(part: Part, loader: Any, how: How, error: Exception) -> str:
    if part.source.gguf:
        path = Path(part.source.name, part.source.gguf)
        if path.is_file() and (problem := damage_of(path)):  # to open a pipe would never end
            return f"{path} {problem}"
        return f"{path} is a GGUF file, which cannot be loaded here: {explain(error, None, how.trust)}"
    folder = next(folders_of(part), None)
    if folder is None and (config := part.source.file("config.json", part.name)):
        folder = config.parent
    damaged = next((line for place in (folder, *folders_of(part)) if place for line in damage(place)), "")
    if under(part.config, "quantization_config") and folder is not None and not damaged:
        damaged = lacking_in(folder)
    if folder is not None and not damaged:
        damaged = nested(folder)
    reason = explain(error, folder, how.trust, damaged)
    if (absent := _NOT_THERE.search(str(error))) and not damaged and (why := (part.base or part.source).unreachable()):
        reason = f"the local cache has no {absent[1].replace(' or ', ' and no ')}, and {why}"
    if "use_safetensors" in _options(part, how) and "use_safetensors" in str(error):
        reason = f"it has no safetensors file, and {pickles_are_unsafe()}"
    if part.source.is_local and any(
        words in str(error) for words in ("offline mode is enabled", "couldn't connect to")
    ):
        reason = f"it names a model that transformers gets from the hub, and for a folder nothing is fetched ({reason})"
    return f"{part.label} cannot be loaded as {getattr(loader, '__name__', loader)}: {reason}"


def undo(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Give tensors back the names and the form that they had in the files, as saving the model does."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))


def undo_anew(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same by the conversions of its class: an adapter that was loaded since leaves the model its own alone."""
    used = vars(model).pop("_weight_conversions", None)
    try:
        return undo(model, tensors)
    finally:
        if used is not None:
            model._weight_conversions = used
