"""Tensors that a quantiser had its hands in, against the files: codes, scales, and what the loader makes of them."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tiedquiet.gate.again import Again, Made
from tiedquiet.gate.lacking import is_codes, without_scale
from tiedquiet.proof.codes import CODES
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import differing, identical
from tiedquiet.proof.names import Origin, sources
from tiedquiet.proof.record import loaded_name
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Finding, Verdict

Pieces = dict[str, torch.Tensor]
# What a form is read by; the others are transformers' own.
_PACKAGES = {name: name for name in ("bitsandbytes", "compressed-tensors", "quanto", "torchao")}
_PACKAGES |= {"gptq": "gptqmodel", "awq": "gptqmodel"}
_STORED = "compared in {its} stored form (codes and scales)"


@dataclass
class Settled:
    """What came out.

    Attributes:
        findings: by the model's names: what is wrong; None where it is the file's.
        ways: how many were proven in which way, as the end of a sentence.
        maker: what made those that do not hold the file's own bytes; empty where all do.
    """

    findings: dict[str, Finding | None] = field(default_factory=dict)
    ways: Counter[str] = field(default_factory=Counter)
    maker: str = ""

    @property
    def notes(self) -> list[str]:
        """A line for each way."""
        return [
            f"{count:,} tensor{'s' * (count > 1)} {'were' if count > 1 else 'was'} "
            + way.format(its="their" if count > 1 else "its", are="are" if count > 1 else "is")
            for way, count in sorted(self.ways.items())
        ]


def settle(model: torch.nn.Module, again: Again, checkpoint: Checkpoint, stored: Collection[str]) -> Settled:
    """Compare what went through a quantiser, or through a conversion beside one, a layer at a time.

    A tensor of a model may be several in its files, codes and scales, and more than its codes in memory. It is held if
    the loader makes the same of the files once more, every piece to the bit; or, where the loader cannot, if the files
    have each piece under the name that the model would save it under. A quantiser may have a last step, for which all
    is read: it repacks codes for a kernel, or counts zero points from another number. That is part of what it makes.

    Args:
        model: a loaded model.
        again: the load that it came from, begun once more.
        checkpoint: the files.
        stored: names of the model that the load delivered.
    """
    settling = _Settling(model, again, checkpoint)
    layers: dict[str, list[str]] = {}
    for key in stored & settling.sources.keys():
        if settling.is_touched(key):
            layer = re.match(r".*?\.\d+\.", key)
            layers.setdefault(layer[0] if layer else key.rpartition(".")[0], []).append(key)
    for _, keys in sorted(layers.items()):
        settling.layer(sorted(keys))
    return settling.settled


class _Settling:
    def __init__(self, model: torch.nn.Module, again: Again, checkpoint: Checkpoint) -> None:
        self._model, self._again, self._checkpoint = model, again, checkpoint
        self._skeleton = again.model
        self._ours = {loaded_name(name): name for name in survey(model).state}
        self._theirs = survey(self._skeleton).state
        self._headers: Mapping[str, Any] = checkpoint.headers if again.given is None else again.given
        self.sources: dict[str, Origin] = sources(self._skeleton, self._headers, self._theirs, again.conversions)
        self.settled = Settled()
        self._is_stored = getattr(again.quantiser, "pre_quantized", True)
        self._by = _name(again)
        # Asked once: a quantiser may answer otherwise when it has quantised.
        self._quantised = {key for key in self.sources if again.given is None and self._needs(key)}

    def is_touched(self, key: str) -> bool:
        """Whether the loader does more with it than to rename and cast it, or it is codes."""
        is_made = self._again.has_last_step or self._is_made(key)
        return is_made or self._is_codes(key, self.sources[key].names[0])

    def _is_codes(self, key: str, name: str) -> bool:
        """By its type; several codes are packed into one number of a parameter or matrix, which no other one is of."""
        header = self._headers[name]
        return is_codes(header) or (
            header.dtype is torch.int32 and isinstance(self._theirs.get(key), torch.nn.Parameter)
        )

    def _is_made(self, key: str) -> bool:
        return self.sources[key].is_converted or self._again.given is not None or key in self._quantised

    def _needs(self, key: str) -> bool:
        return bool(self._again.quantiser.param_needs_quantization(self._skeleton, key))

    def layer(self, keys: list[str]) -> None:
        names = [name for key in keys for name in self.sources[key].names]
        read = self._checkpoint.tensors if self._again.given is None else None
        given = {name: read[name]() if read is not None else self._headers[name] for name in names}
        is_split = any(self.sources[key].is_converted for key in keys)
        theirs: dict[str, _Parts] = {}
        reason = f"{self._by} does not make it from the file again"
        try:
            with self._again.made_of(given) as made:
                wanted = made.tensors.keys() & {*keys, *self._others(made, is_split)}
                theirs = {key: _parts(made.model, key) for key in wanted}
                theirs |= dict.fromkeys(made.gone & {*keys}, _NOTHING)  # as they have to be in the model
        except Exception as error:
            reason = f"{self._by} cannot make it from the file again: {' '.join(str(error).split())}"
        for key in dict.fromkeys((*keys, *sorted(theirs))):
            self._settle(key, theirs.get(key), reason)

    def _others(self, made: Made, is_split: bool) -> Iterable[str]:
        """What the loader makes without a tensor of the files that has its name."""
        if self._again.has_last_step:
            return made.tensors.keys()
        return (made.tensors.keys() & self._ours.keys()) - self.sources.keys() if is_split else ()

    def _settle(self, key: str, theirs: "_Parts | None", reason: str) -> None:
        ours = _parts(self._model, self._ours[key]) if key in self._ours else _NOTHING
        names = self.sources[key].names if key in self.sources else ()
        rows = _rows(key, ours)
        finding = None
        if names and self._is_made(key) and (codes := self._codes_alone(names)) is not None:
            finding = without_scale(key, codes)
        elif len(rows) > 1 and (left := self._left_over(rows, names)) is not None:
            finding = Finding(key, Verdict.UNREAD, left, "it belongs to this tensor, but is not in the model", True)
        elif theirs is not None:
            finding = _difference(key, ours, theirs, self._by)
            is_plain = key in self.sources and not self._is_made(key) and not self._is_coded(key, names)
            if finding is not None and is_plain and self._is_in_file(_rows(key, theirs), names):
                finding = _difference(key, ours, theirs, "")
        elif not self._is_in_file(rows, names):
            finding = Finding(key, Verdict.UNPROVEN, None, reason)
        self.settled.findings[key] = finding
        if finding is None and self._is_coded(key, names):
            is_the_file_s = self._is_in_file(rows, names)
            self.settled.ways[_STORED if is_the_file_s else self._way(ours.pieces)] += 1
            self.settled.maker = self.settled.maker if is_the_file_s else self._by

    def _left_over(self, rows: Pieces, names: tuple[str, ...]) -> str | None:
        """A tensor of the file that belongs to one of the model, which has all of its other pieces, and lacks this."""
        if not self._is_stored or self._again.given is not None:
            return None
        of = {row: set(self._checkpoint.names_of(row)) & set(names) for row in rows if _BESIDE not in row}
        found = set().union(*of.values())
        return min(set(names) - found, default=None) if all(of.values()) else None

    def _way(self, ours: Pieces) -> str:
        is_plain = len(ours) == 1 and all(piece.is_floating_point() for piece in ours.values())
        did = "dequantised" if is_plain else "read" if self._is_stored else "quantised"
        return f"{did} again from the file by {self._by}, and {{are}} equal"

    def _is_coded(self, key: str, names: tuple[str, ...]) -> bool:
        is_given = self._again.given is not None
        return is_given or key in self._quantised or any(self._is_codes(key, name) for name in names)

    def _codes_alone(self, names: tuple[str, ...]) -> torch.dtype | None:
        """The type of the codes, where the file has nothing beside them that could be their scale."""
        if self._again.given is not None or not self._is_stored:
            return None
        scales = [name for name in names if "activation" not in name]
        return kind if len(scales) == 1 and (kind := self._headers[scales[0]].dtype) in CODES else None

    def _is_in_file(self, rows: Pieces, names: tuple[str, ...]) -> bool:
        """Whether all of the pieces, and nothing else, are in the files as the model would save them."""
        if not self._is_stored or self._again.given is not None:
            return False
        found: set[str] = set()
        for row, piece in rows.items():
            read = [name for name in self._checkpoint.names_of(row.replace(_BESIDE, "")) if name in names]
            if read and identical(piece, self._checkpoint.tensors[read[0]]()):
                found.add(read[0])
            elif _BESIDE not in row or not any(
                identical(piece, other) for other in rows.values() if other is not piece
            ):
                return False
        return found == set(names)


_BESIDE = "(beside)"  # marks the name of a piece that no state dict has


class _Parts(NamedTuple):
    """What one tensor of a model is made of.

    Attributes:
        pieces: plain tensors, by the names that they are saved under, less their module's: what the module writes into
            a state dict, with the inner tensors of what consists of several; and, marked as such, what the tensor keeps
            beside itself, with which bitsandbytes computes.
        numbers: what a tensor that consists of several knows of itself, such as the size of a block.
    """

    pieces: Pieces
    numbers: object


_NOTHING = _Parts({}, None)


def _parts(model: torch.nn.Module, key: str) -> _Parts:
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    own = {**module._parameters, **module._buffers}
    found: Pieces = {}
    for name, tensor in module.state_dict().items():
        is_inside = name.partition(".")[0] in module._modules
        is_beside = name not in own and not is_inside and _owner(name, own) in ("", leaf)
        if (name == leaf or is_beside) and isinstance(tensor, torch.Tensor):
            found |= _flat(name, tensor)
    whole: Any = own[leaf]
    if _inner(whole):
        return _Parts(found, whole.__tensor_flatten__()[1])
    found |= {f"{name}{_BESIDE}": one for name, one in vars(whole).items() if isinstance(one, torch.Tensor)}
    return _Parts(found, None)


def _owner(name: str, own: Collection[str]) -> str:
    return max((leaf for leaf in own if name.lstrip("_").startswith(leaf)), key=len, default="")


def _flat(name: str, tensor: torch.Tensor) -> Pieces:
    found: Pieces = {}
    for inner in _inner(tensor):
        found |= _flat(f"_{name}_{inner}", getattr(tensor, inner))
    return found or {name: tensor}


def _inner(tensor: torch.Tensor) -> list[str]:
    """The names of the tensors that another consists of; none where it is one by itself."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return []
    return [name for name in tensor.__tensor_flatten__()[0] if getattr(tensor, name) is not None]  # type: ignore[attr-defined]


def _rows(key: str, parts: _Parts) -> Pieces:
    """The pieces of a tensor by their names in a state dict."""
    return {f"{key.rpartition('.')[0]}.{name}": piece for name, piece in parts.pieces.items()}


def _difference(key: str, ours: _Parts, theirs: _Parts, by: str) -> Finding | None:
    """What differs between a tensor of the model and what it should be; None where nothing does.

    Args:
        key: its name in the model.
        ours: the model's.
        theirs: what it should be.
        by: what makes that of the file; empty where it is the file's own.
    """
    made = f"what {by} makes of the file" if by else "the file"
    for name in sorted(ours.pieces.keys() | theirs.pieces.keys()):
        shown = [_kind(parts.pieces.get(name)) for parts in (ours, theirs)]
        if shown[0] != shown[1]:
            why = f"its {name} is {shown[0]}, and {shown[1]} in {made}"
            return Finding(key, Verdict.UNPROVEN, None, why)
    for name, piece in ours.pieces.items():
        if count := differing(piece, theirs.pieces[name]):
            where = "" if name == key.rpartition(".")[2] else f" of {name.removesuffix(_BESIDE)}"
            why = f"differs from {made} in {count:,} of {piece.numel():,} elements{where}"
            return Finding(key, Verdict.OVERWRITTEN, key, why, True)
    if ours.numbers != theirs.numbers:
        why = f"its codes are read by {ours.numbers}, and {by} reads those of the file by {theirs.numbers}"
        return Finding(key, Verdict.OVERWRITTEN, key, why, True)
    return None


def _kind(piece: torch.Tensor | None) -> str:
    return "absent" if piece is None else f"{tuple(piece.shape)} of {str(piece.dtype).removeprefix('torch.')}"


def _name(again: Again) -> str:
    if again.given is not None and not getattr(again.quantiser, "supported", False):
        return "the gguf package"
    method = again.quantiser.quantization_config.quant_method
    name = str(getattr(method, "value", method))
    return _PACKAGES.get(name, f"transformers ({name})")
