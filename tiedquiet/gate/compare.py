"""Compares a model with its checkpoint's files, every byte: this sees what the watch missed, or what was misread."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tiedquiet.gate import progress
from tiedquiet.gate.lacking import without_scale
from tiedquiet.gate.threads import Pair, Threads
from tiedquiet.proof.aside import is_served
from tiedquiet.proof.codes import is_coded_matrix, is_whole
from tiedquiet.proof.crossing import has_all_with
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import differing, holds, plain, same
from tiedquiet.proof.missing import is_of_another_class
from tiedquiet.proof.names import converted
from tiedquiet.proof.record import Record, loaded_name
from tiedquiet.proof.since import proof_of
from tiedquiet.proof.stored import is_padding
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import WELL, Finding, Verdict

Tensors = dict[str, torch.Tensor]
Undo = Callable[[Tensors], Tensors]
_PREFIX = 16  # elements that tell which tensors can be equal


class Comparison(NamedTuple):
    """What came out.

    Attributes:
        held: how many tensors of the model hold the files' bytes.
        total: how many the checkpoint delivered.
        buffers: how many of the model's tensors are in no state dict, and have values.
        findings: those of the load, and what the comparison adds to them, sorted by key.
    """

    held: int
    total: int
    buffers: int
    findings: list[Finding]


def compare(
    model: torch.nn.Module,
    known: Record,
    checkpoint: Checkpoint,
    undos: Sequence[Undo],
    conversions: Sequence[Any] = (),
    settled: Mapping[str, Finding | None] | None = None,
) -> Comparison:
    """Compare each tensor that the checkpoint delivered with the files.

    Args:
        model: a loaded model.
        known: what is known of its load.
        checkpoint: the files that it was loaded from.
        undos: each gives tensors of the model, by name, back in the form and under the names that files have for them.
        conversions: those that it was loaded with; what cannot be given back is made from the files again.
        settled: names that were compared already: what is wrong, or None.

    Returns:
        What was found. Where the files cannot be read, that is a finding.
    """
    now = survey(model)
    state = dict(now.state)
    for name, tensor in now.state.items():
        state.setdefault(loaded_name(name), tensor)
    findings = {finding.key: finding for finding in proof_of(model, known).findings}
    lost = {key for key, finding in findings.items() if finding.verdict not in (*WELL, Verdict.UNPROVEN)}
    names = sorted(known.stored & state.keys())
    buffers = sum(not tensor.is_meta for tensor in now.others.values())
    try:
        checkpoint.tensors  # noqa: B018 (it opens the files)
    except Exception as error:
        why = f"no value was compared: {' '.join(str(error).split(chr(10))[0].split())}"
        unread = Finding("", Verdict.UNPROVEN, None, why)
        return Comparison(0, len(names), buffers, [*findings.values(), unread])
    settled = {
        name: finding
        for name, finding in (settled or {}).items()
        if name not in lost and (finding is not None or name in known.stored)
    }
    open_ = {name: state[name] for name in names if name not in lost and name not in settled}
    empty = [name for name, tensor in open_.items() if tensor.is_meta]
    on_disk = {name for name in empty if known.place(name) is not None or is_served(model, name)}
    progress.comparing(sum(map(_size, open_.values())))
    with Threads() as threads:
        comparing = _Comparing(model, open_, checkpoint, undos, on_disk, known.altered, threads)
        comparing.make_again(conversions)
        found = [*comparing.run(), *comparing.rivals(state.keys()), *comparing.codes(), *filter(None, settled.values())]
    held = comparing.held | {name for name, finding in settled.items() if finding is None}
    for name in held:
        findings.pop(name, None)  # what could not be proven by watching is proven now
    findings.update({finding.key: finding for finding in found})
    for finding in list(findings.values()):
        source = findings.get(finding.source or "")
        if finding.verdict in WELL and source is not None and source.verdict not in WELL:
            findings[finding.key] = Finding(finding.key, source.verdict, finding.source, source.why, source.broken)
    return Comparison(len(held.intersection(names)), len(names), buffers, [findings[key] for key in sorted(findings)])


class _Comparing:
    def __init__(
        self,
        model: torch.nn.Module,
        state: Tensors,
        checkpoint: Checkpoint,
        undos: Sequence[Undo],
        on_disk: Collection[str],
        altered: Collection[str],
        threads: Threads,
    ) -> None:
        self._model, self._state, self._checkpoint, self._undo = model, state, checkpoint, undos[0]
        self._undos, self._on_disk, self._altered, self._threads = undos, on_disk, altered, threads
        self.held: set[str] = set()
        self._claimed: set[str] = set()  # names in the files
        self._prefixes: dict[tuple[int, torch.dtype], dict[bytes, list[str]]] = {}

    def run(self) -> list[Finding]:
        for name, key in zip(self._state, self._keys_of(self._state), strict=True):
            if key is not None:
                self._hold([name], [key])
        for undo in self._undos:
            self._undo = undo
            self._go_back()
        return [self._explain(name) for name in self._open()]

    def make_again(self, conversions: Sequence[Any]) -> None:
        """Count as held what transformers' own conversion makes from the files again: it is several tensors there."""
        if not any(isinstance(one, _converter()) for one in conversions):
            return
        made = converted(
            self._model,
            self._checkpoint.headers,
            self._state,
            list(conversions),
            lambda name: self._checkpoint.tensors[name](),
            self._is_given_back,
        )
        for name, origin, values in made:
            pieces = plain(self._state[name])
            if origin.is_converted and len(pieces) == 1 and same(pieces[0], values):
                self._hold([name], origin.names)

    def _is_given_back(self, name: str) -> bool:
        """Whether it is held once converted back; nothing is copied if that gives slices of it."""
        self._try_names(self._undone([name]), [name])
        return name in self.held

    def _go_back(self) -> None:
        # One at a time, as far as that goes: several tensors that were one in the file have to go back together.
        for name in self._open():
            back = self._undone([name])
            self._try_names(back, [name])
            if back and all(self._is_itself(name, tensor) for tensor in back.values()):  # at most renamed
                self._try_content(name)
        layers: dict[str, list[str]] = {}
        for name in self._open():
            layer = re.match(r".*?\.\d+\.", name)
            layers.setdefault(layer[0] if layer else "", []).append(name)
        for names in layers.values():
            self._try_names(self._undone(names), names)

    def rivals(self, own: Collection[str]) -> Iterator[Finding]:
        """Findings on tensors that hold one of two that a file has for them, with a base model's prefix and without.

        Args:
            own: the names of all of the model's tensors; what has one of these is no other's rival.
        """
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        # And what is beside it is the head's.
        is_base = is_of_another_class(self._model) and has_all_with(prefix, own, self._checkpoint.tensors)
        for name in self.held:
            keys = [key for key in self._checkpoint.names_of(name) if key == name or key not in own]
            pieces = plain(self._state[name]) if len(keys) > 1 else []
            if len(pieces) == 1:
                won = [key for key in keys if same(pieces[0], self._checkpoint.tensors[key]())]
                if won and len(won) < len(keys) and not (is_base and prefix + name in won):
                    rival = next(key for key in keys if key not in won)
                    yield Finding(name, Verdict.AMBIGUOUS, won[0], f"not of {rival}: the file has both", True)

    def codes(self) -> Iterator[Finding]:
        """Findings on matrices of numbers that a file has as codes: they hold its bytes, which say nothing alone."""
        for name in sorted(self.held) if any(map(is_whole, self._checkpoint.dtypes)) else ():
            stored = self._checkpoint.headers.get(next(self._checkpoint.names_of(name), ""))
            if stored is not None and is_coded_matrix(stored.dtype, self._state[name]):
                self.held.discard(name)
                yield without_scale(name, stored.dtype)

    def _open(self) -> list[str]:
        return [name for name in self._state if name not in self.held]

    def _undone(self, names: list[str]) -> Tensors:
        try:
            return self._undo({name: self._state[name] for name in names})
        except Exception:
            return {}  # it wants more tensors than these, or cannot be undone

    def _is_itself(self, name: str, tensor: torch.Tensor) -> bool:
        ours = self._state[name]
        return ours is tensor or (bool(plain(tensor) and plain(ours)) and ours.data_ptr() == tensor.data_ptr())

    def _try_names(self, tensors: Tensors, names: list[str]) -> None:
        """Take the names for held if the files have all of the tensors, which are these in the files' form."""
        keys = {key for key in self._keys_of(tensors) if key is not None}
        if tensors and len(keys) == len(tensors):
            self._hold(names, keys)

    def _hold(self, names: Collection[str], keys: Collection[str]) -> None:
        progress.compared(sum(_size(self._state[name]) for name in names if name not in self.held))
        self.held.update(names)
        self._claimed.update(keys)

    def _keys_of(self, tensors: Tensors) -> Iterator[str | None]:
        """For each tensor the name under which a file has it, of those that its name in the model tells."""
        pairs = (self._pair_of(name, tensor) for name, tensor in tensors.items())
        for (name, tensor), is_same in zip(tensors.items(), self._threads.same(pairs), strict=True):
            yield next(self._checkpoint.names_of(name)) if is_same else self._key_of(name, tensor)

    def _pair_of(self, name: str, tensor: torch.Tensor) -> Pair | None:
        """The tensor and what a file has under the first of these names, which is nearly always the one."""
        key, pieces = next(self._checkpoint.names_of(name), None), _pieces(tensor)
        return None if key is None or len(pieces) != 1 else (pieces[0], self._checkpoint.tensors[key]())

    def _key_of(self, name: str, tensor: torch.Tensor) -> str | None:
        pieces = _pieces(tensor)
        for key in self._checkpoint.names_of(name) if len(pieces) == 1 else ():
            values = self._checkpoint.tensors[key]()
            if same(pieces[0], values):
                return key
            if name in self._altered and (holds(tensor, values) or is_padding(self._model, name, tensor, values)):
                return key
        return None

    def _try_content(self, name: str) -> None:
        pieces = plain(self._state[name])
        if name in self.held or len(pieces) != 1 or any(self._checkpoint.names_of(name)):
            return
        tensor, kind = pieces[0], (pieces[0].numel(), pieces[0].dtype)
        if kind not in self._prefixes:
            self._prefixes[kind] = {}
            for key, read in self._checkpoint.tensors.items():
                if (values := read()).numel() == kind[0]:
                    self._prefixes[kind].setdefault(_prefix(values, tensor.dtype), []).append(key)
        for key in self._prefixes[kind].get(_prefix(tensor, tensor.dtype), ()):
            if key not in self._claimed and same(tensor, self._checkpoint.tensors[key]()):
                self._hold([name], [key])
                return

    def _explain(self, name: str) -> Finding:
        tensor, pieces = self._state[name], plain(self._state[name])
        if tensor.is_meta:
            why = "its values stay on disk" if name in self._on_disk else "it has no values: it is on meta"
            return Finding(name, Verdict.UNPROVEN, None, why)
        if len(pieces) != 1:
            return Finding(name, Verdict.UNPROVEN, None, f"the values of a {type(tensor).__name__} cannot be read")
        back = self._undone([name])
        if not any(key for other in back for key in self._checkpoint.names_of(other)):
            back = {name: tensor}  # 5.0.0 gives names back that are older than the file
        for other, values in back.items():
            key = next(self._checkpoint.names_of(other), None)
            if key is None:
                continue
            stored = self._checkpoint.tensors[key]()
            if stored.shape != values.shape or stored.is_floating_point() != values.is_floating_point():
                kinds = [f"{tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in (stored, values)]
                return Finding(name, Verdict.UNPROVEN, None, f"the file has it as {kinds[0]}, the model as {kinds[1]}")
            if len(back) == 1 and self._is_itself(name, values):
                where = "the file" if key == name else f"{key} in the file"
                why = f"differs from {where} in {differing(values, stored):,} of {values.numel():,} elements"
                return Finding(name, Verdict.OVERWRITTEN, name, why, True)
            why = "transformers converted it on loading; converted back, it does not match the file"
            return Finding(name, Verdict.UNPROVEN, None, why)
        return Finding(name, Verdict.UNPROVEN, None, "no file holds these values, under this name or any other")


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    return plain(tensor) or ([] if tensor.is_meta or tensor.numel() else [tensor])


def _converter() -> type:
    from transformers.core_model_loading import WeightConverter

    return WeightConverter  # type: ignore[no-any-return]


def _prefix(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    few = tensor.detach().reshape(-1)[:_PREFIX].to("cpu", dtype).contiguous()
    return bytes(few.view(torch.uint8).tolist())
