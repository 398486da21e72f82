"""How much of a LoRA file reaches a pipeline's components when diffusers loads it.

Diffusers loads it by its own code, with its own renaming and scaling, into components that have shapes and no values.
That takes the memory of two such files, however large the pipeline is.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from tiedquiet.gate import classes, components, report
from tiedquiet.gate.bounds import bounded, check_adapter, roomy, size_of
from tiedquiet.gate.components import Part
from tiedquiet.gate.confined import without_hub
from tiedquiet.gate.diagnosis import explain
from tiedquiet.gate.diffusion import silent
from tiedquiet.gate.load import How
from tiedquiet.gate.patterns import ENDLESS, endless
from tiedquiet.gate.printing import few, printable
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.report import Result
from tiedquiet.gate.source import Source, own_files
from tiedquiet.gate.trace import Trace
from tiedquiet.gate.weights import check_header
from tiedquiet.proof.memory import same
from tiedquiet.switch import enable
from tiedquiet.verdict import Finding, Verdict

_NAME = "of_the_file"  # the adapter's, for as long as it is looked at
_MOST = 400  # letters of what diffusers says
Tensors = dict[str, torch.Tensor]


class File(NamedTuple):
    """What a LoRA file holds.

    Attributes:
        path: where it lies.
        tensors: by name, each in a memory of its own.
        metadata: what diffusers wrote beside them of the adapter's configuration; None where it did not.
    """

    path: Path
    tensors: Tensors
    metadata: Any


def read(name: str, trust: bool) -> File:
    """Read a LoRA file.

    Args:
        name: its path.
        trust: whether code that it names may run.

    Raises:
        CannotCheck: there is none, it is no safetensors file, it is damaged, or it names code.
    """
    path = Path(name)
    if not path.is_file():
        raise CannotCheck(f"{name} is not a regular file; --lora takes the LoRA file itself")
    if path.suffix != ".safetensors":
        raise CannotCheck(f"{name} is not a .safetensors file; --lora opens no other")
    check_header(path)
    try:
        with safe_open(name, "pt") as file:
            written = (file.metadata() or {}).get("lora_adapter_metadata")
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (it is no mapping)
            metadata = None if written is None else json.loads(written)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CannotCheck(f"{name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict | None):
        raise CannotCheck(f"{name}: its lora_adapter_metadata does not hold a JSON object")
    given = metadata or {}
    if not trust and any(value for key, value in given.items() if key.rpartition(".")[2] == "megatron_config"):
        raise CannotCheck(
            f"{name} asks for megatron_core, a module that peft imports by its name; --trust-remote-code allows it"
        )
    check_adapter(name, "its lora_adapter_metadata", given)
    if not trust and (pattern := endless(given)):
        raise CannotCheck(f"{name}: its lora_adapter_metadata {ENDLESS.format(pattern)}")
    return File(path, tensors, metadata)


def check_pipeline(source: Source, file: File, how: How) -> Result:
    """What reaches a pipeline's components, through the pipeline's own class."""
    name = (source.read("model_index.json") or {}).get("_class_name")
    kind = classes.named("diffusers", name)
    shown = name if isinstance(name, str) else repr(name)
    if kind is None or not hasattr(kind, "lora_state_dict"):
        why = "which is no pipeline of the installed diffusers" if kind is None else "which loads no LoRA files"
        return _failed(file, shown, f"model_index.json names {shown}, {why}")
    try:
        pipeline = kind.__new__(kind)
        expected, _ = kind._get_signature_keys(kind)
        entries = [e for e in components.entries_of(source) if e.name in kind._lora_loadable_modules]
        empty = {entry.name: _empty(components.part_of(source, entry, how.trust), entry, how) for entry in entries}
        pipeline.register_modules(**{**dict.fromkeys(expected), **empty})
        pipeline.lora_state_dict = _with_metadata(kind, file)
    except Exception as error:
        return _failed(file, shown, f"cannot be loaded: {explain(error, None, how.trust)}")

    def load(tensors: Tensors) -> None:
        pipeline.load_lora_weights(tensors, adapter_name=_NAME, low_cpu_mem_usage=True)

    return judge(file, shown, empty, load, how)


def check_model(part: Part, kind: Any, file: File, how: How) -> Result:
    """What reaches one model of diffusers, by the names of its own tensors: it knows no others."""
    try:
        model = _empty(part, components.Entry(part.name, "diffusers", kind.__name__), how)
    except Exception as error:
        return _failed(file, kind.__name__, f"cannot be loaded: {explain(error, None, how.trust)}")
    if not hasattr(model, "load_lora_adapter"):
        return _failed(file, kind.__name__, f"{kind.__name__} loads no LoRA files")
    first = {name.partition(".")[0] for name in file.tensors}
    prefix = next(iter(first)) if len(first) == 1 and not hasattr(model, next(iter(first))) else None

    def load(tensors: Tensors) -> None:
        how_to = {"prefix": prefix, "adapter_name": _NAME, "low_cpu_mem_usage": True, "metadata": file.metadata}
        model.load_lora_adapter(tensors, **how_to)

    result = judge(file, kind.__name__, {"": model}, load, how)
    if (result.problem or result.error) and not result.held:
        result.notes.append(
            "only a pipeline's class converts other tools' names: for these, pass the pipeline's folder"
        )
    return result


def _failed(file: File, name: str, why: str) -> Result:
    return Result(file.path.name, name, error=why, is_component=False)


def _with_metadata(kind: Any, file: File) -> Any:
    """The pipeline's own function, which does not see a file's metadata where it is handed the file's tensors."""

    def lora_state_dict(tensors: Tensors, **options: Any) -> Any:
        result = kind.lora_state_dict(tensors, **options)
        return (*result[:-1], file.metadata) if options.get("return_lora_metadata") else result

    return lora_state_dict


def _empty(part: Part, entry: components.Entry, how: How) -> Any:
    """A component with the shapes that its config gives it; each parameter is one zero, repeated by its strides."""
    from accelerate import init_empty_weights

    kind = components.class_of(entry)
    config = part.source.file("config.json", part.name)
    folder = config.parent if config else None
    files = own_files(folder, ".safetensors", ".bin") if folder and part.source.is_local else None
    stored = 0 if files is None else 1 + size_of(files)
    with without_hub(not how.trust), init_empty_weights(), bounded(), roomy(stored):
        if classes.is_of_diffusers(kind):
            model = kind.from_config(kind.load_config(folder))
        else:
            model = kind(kind.config_class.from_pretrained(folder))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(zero, requires_grad=False)
    return model


def judge(file: File, name: str, empty: dict[str, Any], load: Callable[[Tensors], None], how: How) -> Result:
    """Load a file into components without values, and compare what they then have with the file.

    Args:
        file: it.
        name: of the class that loads it.
        empty: the components, by name.
        load: loads the tensors that it is given.
        how: how models are to be loaded.
    """
    given = {key: tensor.clone() for key, tensor in file.tensors.items()}  # diffusers scales some of them in place
    trace, size = Trace(given), 1 + sum(tensor.nbytes for tensor in given.values())
    try:
        with silent(), roomy(size), enable("off"), trace:
            load(given)
    except Exception as error:
        why = explain(error, None, how.trust)
        why = f"none of its {len(file.tensors):,} tensors is loaded, since diffusers refuses the file: {why}"
        return _failed(file, name, printable(why, _MOST))
    layers = [layer for component, model in empty.items() for layer in _layers(component, model)]
    found = [_compare(layer, file.tensors, trace) for layer in layers]
    reached = set().union(*(one.reached for one in found))
    findings = [finding for one in found for finding in one.findings]
    scaled, merged = sum(one.is_scaled for one in found), sum(one.merged for one in found)
    left = [key for key in file.tensors if key not in reached]
    problem = f"{len(left):,} of {len(file.tensors):,} match nothing: {few(left)}" if left else ""
    notes = [f"layers scaled by the file's alpha: {scaled:,}"] if scaled else []
    notes += [f"merged by diffusers from several of the file's tensors, and not compared: {merged:,}"] if merged else []
    parts = " and ".join(sorted({layer.component for layer in layers} - {""})) or name
    return report.of_file(
        file.path,
        name,
        len(reached),
        len(file.tensors),
        parts,
        findings=findings,
        missing=[finding.key for finding in findings if finding.verdict is Verdict.MISSING],
        unexpected=left,
        problem=problem if file.tensors else "it has no tensors",
        notes=notes,
    )


class _Layer(NamedTuple):
    """A layer that an adapter was put into: its component, the adapter's tensors by name, and their scale."""

    component: str
    name: str
    tensors: Tensors
    scale: float


class _Found(NamedTuple):
    """What came out for a layer: names of the file, findings, whether alpha scales it, what was made of several."""

    reached: set[str]
    findings: list[Finding]
    is_scaled: bool
    merged: int


def _compare(layer: _Layer, stored: Tensors, trace: Trace) -> _Found:
    reached: set[str] = set()
    findings: list[Finding] = []
    factors: dict[str, float] = {}
    merged = 0
    for key, tensor in layer.tensors.items():
        sources = frozenset() if tensor.is_meta else trace.of(tensor)
        reached |= sources
        if tensor.is_meta:
            findings.append(Finding(key, Verdict.MISSING, None, "the file has nothing for it"))
        elif len(sources) > 1:
            merged += 1
        elif sources:
            (source,) = sources
            factors[source] = factor_of(tensor, stored[source])
            if not factors[source]:
                why = "what diffusers made of it does not hold its values"
                findings.append(Finding(key, Verdict.OVERWRITTEN, source, why, True))
    alphas = {f"{_stem(source)}.alpha" for source in factors} & trace.asked
    if all(factors.values()) and (wrong := _wrong_scale(layer, factors, stored)):
        findings.append(wrong)
    return _Found(reached | alphas, findings, bool(alphas), merged)


def _layers(component: str, model: Any) -> Iterator[_Layer]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    start = component and f"{component}."
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            own = {start + _shown(name, k): t for k, t in module.named_parameters() if _NAME in k.split(".")}
            yield _Layer(component, start + name, own, getattr(module, "scaling", {}).get(_NAME, 1.0))


def _shown(layer: str, key: str) -> str:
    return f"{layer}.{'.'.join(part for part in key.split('.') if part != _NAME)}"


def factor_of(tensor: torch.Tensor, stored: torch.Tensor) -> float:
    """By what a tensor is a multiple of what is stored, or of a part of its rows; 0 where it is none.

    Query, key, value and what follows them are split off one tensor: each begins where as many of its size end, or ends
    where all of it does.
    """
    rows = max(*tensor.shape[:1], 1) if tensor.dim() else 1
    is_whole = stored.numel() == tensor.numel() or not stored.dim()
    parts = [stored] if is_whole else [*stored.split(rows), stored[-rows:]]
    ours = tensor.detach().reshape(-1)
    for theirs in (part.reshape(-1) for part in parts if part.numel() == tensor.numel()):
        if same(ours, theirs):
            return 1.0
        most = theirs.double().abs().argmax()
        factor = float(ours[most]) / (float(theirs[most]) or math.inf)
        near = torch.finfo(stored.dtype).eps * 2 if stored.is_floating_point() else 0.0
        if math.isfinite(factor) and factor and torch.allclose(ours.double(), theirs.double() * factor, rtol=near):
            return factor
    return 0.0


def _stem(name: str) -> str:
    """The part of a name that the tensors of one layer share."""
    return name.partition(".lora_")[0]


def _wrong_scale(layer: _Layer, factors: dict[str, float], stored: Tensors) -> Finding | None:
    """A finding if a layer's scale is not the file's: alpha over rank, or one."""
    stems = {_stem(source) for source in factors}
    alpha = stored.get(f"{next(iter(stems))}.alpha") if len(stems) == 1 and len(factors) == 2 else None
    if alpha is None:
        return None
    rank = min(min(stored[source].shape[:2]) for source in factors)
    wanted, is_ = float(alpha) / rank, math.prod(factors.values()) * layer.scale
    if math.isclose(wanted, is_, rel_tol=1e-2):
        return None
    why = f"its scale is {is_:g}, but by the file's alpha it should be {wanted:g}"
    return Finding(layer.name, Verdict.OVERWRITTEN, None, why, True)
