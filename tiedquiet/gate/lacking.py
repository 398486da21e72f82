"""What belongs to a tensor of codes and is not in the files, by the names in their headers and what others have.

Each form of quantisation calls a scale otherwise (`SCB`, `weight.absmax`, `_weight_scale`, `down_proj_scales`), and all
layers of a file are in one form. So what lies beside most tensors of codes, and not beside one, is missing there.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from tiedquiet.gate.source import own_files
from tiedquiet.proof.codes import CODES
from tiedquiet.proof.files import Checkpoint
from tiedquiet.verdict import Finding, Verdict

_MOST = 64  # tensors of one module, and rules; where a module has more, they belong to no one tensor of codes
Rule = tuple[str, str, str]  # the last part of a name, or its end; how that ends, and what takes the place of the end


def lacking_in(folder: Path) -> str:
    """The same of a folder's safetensors files; empty where they cannot be read."""
    with suppress(Exception):  # which the load says
        return lacking(Checkpoint(None, [str(path) for path in own_files(folder, ".safetensors")]).headers)
    return ""


def lacking(headers: Mapping[str, torch.Tensor]) -> str:
    """What the files lack beside tensors of codes, as a clause; empty where that cannot be told.

    Args:
        headers: name, shape and type of each tensor of the files.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    codes = {name for name, header in headers.items() if is_codes(header)}
    for name in headers:
        for module in _modules_of(name):
            modules[module].append(name)
    beside = {name: modules[_module_of(name)] for name in codes}
    found: Counter[Rule] = Counter()
    for name, others in beside.items():
        if len(others) <= _MOST:
            rules_here = (_rule(name, other) for other in others if other != name and not other.endswith("bias"))
            found.update(list(dict.fromkeys(rules_here)))  # in an order that is always the same
    often = found.most_common(_MOST)
    alike = Counter(kind for name in codes for kind in {rule[:2] for rule, _ in often} if _is_of(name, *kind))
    rules = [rule for rule, count in often if 2 * count >= alike[rule[:2]]]
    absent: dict[str, list[str]] = defaultdict(list)
    for name in sorted(codes):
        for leaf, end, other in rules:
            if _is_of(name, leaf, end) and (wanted := name[: len(name) - len(end)] + other) not in headers:
                absent[wanted].append(name)
    if not absent:
        return ""
    wanted, names = next(iter(absent.items()))
    name = max(names, key=lambda one: headers[one].numel())
    kind = str(headers[name].dtype).removeprefix("torch.")
    more = f" (and {len(absent) - 1:,} more)" * (len(absent) > 1)
    return f"the files have no {wanted}, which belongs to {name} (codes of {kind}){more}"


def without_scale(name: str, kind: torch.dtype) -> Finding:
    """The finding on a matrix of numbers that the files have as codes alone, which say nothing without their scale."""
    what = str(kind).removeprefix("torch.")
    return Finding(name, Verdict.MISSING, None, f"the file has {what} codes for it, and no scale", True)


def is_codes(header: torch.Tensor) -> bool:
    """Whether a tensor of a file is codes, by its type; of 32 bits, several of them are packed in a matrix."""
    return header.dtype in CODES or (header.dtype is torch.int32 and header.dim() > 1)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _modules_of(name: str) -> list[str]:
    """The module that a tensor is of, and the one above: bitsandbytes' `weight.absmax` is of the one with `weight`."""
    module = _module_of(name)
    return [module, _module_of(module)] if module else [module]


def _rule(name: str, other: str) -> Rule:
    pairs = enumerate(zip(name, other, strict=False))
    shared = next((place for place, (one, two) in pairs if one != two), min(len(name), len(other)))
    end = name[shared:]
    return ("" if end else name.rpartition(".")[2], end, other[shared:])


def _is_of(name: str, leaf: str, end: str) -> bool:
    return name.endswith(end) and (not leaf or name.rpartition(".")[2] == leaf)
