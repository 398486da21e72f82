"""A single file of weights in the form of other tools, made a model by diffusers' `from_single_file`, against it.

Diffusers converts it twice: once as users do; and once without values, where each of the model's tensors is followed
back to the elements of the file that it is made of. The first is held against these, read from the file anew.
"""

import re
from collections.abc import Callable, Collection, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiedquiet.gate import progress, report
from tiedquiet.gate.bounds import bounded, roomy
from tiedquiet.gate.compare import compare
from tiedquiet.gate.diagnosis import damage_of, explain
from tiedquiet.gate.diffusion import dtype_of, silent
from tiedquiet.gate.load import How
from tiedquiet.gate.moves import Moves, arrived
from tiedquiet.gate.printing import few
from tiedquiet.gate.refusal import CannotCheck
from tiedquiet.gate.report import Result
from tiedquiet.gate.unplaced import IS_IT, left_over
from tiedquiet.gate.weights import check_header, pickles_are_unsafe
from tiedquiet.proof.codes import Scales, without_scale
from tiedquiet.proof.files import Checkpoint, unpickled
from tiedquiet.proof.memory import same
from tiedquiet.proof.prefixes import MOST_PARTS
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import survey
from tiedquiet.switch import enable
from tiedquiet.verdict import Finding, Verdict

_MISMATCH = re.compile(r"(\S+) expected shape (?:torch\.Size)?\(?\[(.*?)\]\)?, but got (?:torch\.Size)?\(?\[(.*?)\]")
_MOST_NESTED = 9  # `state_dict` inside `state_dict`
Tensors = dict[str, torch.Tensor]


class File(NamedTuple):
    """A file of weights.

    Attributes:
        path: where it lies.
        checkpoint: its tensors.
        others: what a pickle holds beside them, by name.
    """

    path: Path
    checkpoint: Checkpoint
    others: dict[str, Any]

    @property
    def headers(self) -> Tensors:
        """Names, shapes and types of its tensors, on meta."""
        return self.checkpoint.headers


class Way(NamedTuple):
    """A way to make a model of the file.

    Attributes:
        name: of the model's class.
        load: makes the model of the file, as users do.
        follow: makes it of the tensors that it is given, which have no values.
        device: where these have to be.
    """

    name: str
    load: Callable[[], Any]
    follow: Callable[[dict[str, Any]], Any]
    device: str = "meta"


class Made(NamedTuple):
    """What came out for a model that was made of the file, and the names of the file's tensors that reached it."""

    result: Result
    reached: frozenset[str]


def read(name: str, how: How) -> File:
    """Open a file of weights.

    Raises:
        CannotCheck: there is none, it is damaged, or it must not be opened.
    """
    path = Path(name)
    if not path.is_file():
        raise CannotCheck(f"{name} is not a regular file; --config is for a single file of weights")
    if path.suffix == ".gguf":
        raise CannotCheck(
            f"{name} is a GGUF file, whose values diffusers changes while it reads them; --config takes none"
        )
    check_header(path)
    if damaged := damage_of(path):
        raise CannotCheck(f"{name} {damaged}")
    if path.suffix == ".safetensors":
        return File(path, Checkpoint(None, [str(path)]), {})
    if not how.trust_pickle and (reason := pickles_are_unsafe()):
        raise CannotCheck(f"{name} is a pickle, and {reason}")
    try:
        content = unpickled(str(path))
    except Exception as error:
        raise CannotCheck(f"{name} cannot be read: {explain(error, None, how.trust)}") from error
    for _ in range(_MOST_NESTED):  # diffusers goes on for ever where one holds itself
        if isinstance(content, dict) and "state_dict" in content:
            content = content["state_dict"]
    if not isinstance(content, dict) or "state_dict" in content:
        raise CannotCheck(f"{name} holds no tensors by name")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and torch.is_tensor(value)}
    others = {key: value for key, value in content.items() if key not in tensors}
    return File(path, Checkpoint(tensors), others)


def loaded(file: File, how: How) -> dict[str, Any]:
    """What diffusers reads a file as: its tensors by name, mapped.

    Raises:
        CannotCheck: diffusers cannot read it.
    """
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    try:
        with silent():
            return dict(load_single_file_checkpoint(str(file.path)))
    except Exception as error:
        raise CannotCheck(f"{file.path} cannot be read by diffusers: {_reason(error, how)}") from error


def of_class(kind: Any, file: File, folder: Path, how: How) -> Way:
    """How diffusers makes a model of the file, with the config in a folder."""
    options = {"config": str(folder), "local_files_only": True, "torch_dtype": dtype_of(how.dtype, file.checkpoint)}
    device = {"device": how.device} if how.device != "cpu" else {}
    return Way(
        kind.__name__,
        lambda: kind.from_single_file(str(file.path), **options, **device),
        lambda given: kind.from_single_file(given, **options, device="meta"),
    )


def make(component: str, file: File, way: Way, how: How) -> Made:
    """Make a model of the file, and hold each of its tensors against the elements of the file that it is made of.

    Args:
        component: the model's name in a pipeline; empty where it is all.
        file: it.
        way: how the model is made.
        how: how models are to be loaded.

    Raises:
        CannotCheck: it cannot be made, or cannot be followed.
    """
    progress.loading(f"{file.path.name}: {way.name}")
    try:
        moves, state = _follow(file, way)
        lost = ""
    except Exception as error:
        moves, state, lost = Moves({}), {}, _reason(error, how)
    try:
        with silent(), bounded(), roomy(file.path.stat().st_size), enable("off"):
            model = way.load()
    except Exception as error:
        absent = sorted(key for key, tensor in state.items() if tensor.is_meta and not moves.of(tensor))
        why = f"the file has nothing for {len(absent):,} of {len(state):,} tensors: {few(absent)}"
        raise CannotCheck(f"cannot be loaded as {way.name}: {why if absent else _reason(error, how)}") from error
    if lost:
        raise CannotCheck(f"can be loaded as {way.name}, but how diffusers converts it cannot be followed: {lost}")
    return _hold(component, model, file, moves, state, way)


def of_file(file: File, name: str, reached: Collection[str], parts: list[str]) -> Result:
    """How much of a file reaches any of a pipeline's components."""
    left, last = sorted(file.headers.keys() - reached), parts[-1:]
    there = " and ".join(filter(None, (", ".join(parts[:-1]), *last))) or "no component"
    problem = (over := left_over(name, file.headers, left)) and over + IS_IT
    return report.of_file(file.path, name, len(reached), len(file.headers), there, unexpected=left, problem=problem)


def with_leftovers(made: Made, file: File, ignored: Collection[str], is_asked: bool) -> Result:
    """The result for the one model of a file, with what of the file has no place in it.

    Args:
        made: what came out for it.
        file: it.
        ignored: patterns of names that its class says it ignores.
        is_asked: whether the user named the class, who may want a part of the file only.
    """
    result = made.result
    result.unexpected.extend(sorted(file.headers.keys() - made.reached))
    left = [name for name in result.unexpected if not any(re.search(pattern, name) for pattern in ignored)]
    if (over := left_over(result.cls, file.headers, left)) and is_asked:
        result.notes.append(over)
        over = ""
    return Result(**{**vars(result), "problem": over and over + IS_IT})


class _Converted(Checkpoint):
    """What the file holds for each of a model's tensors, under the model's names."""

    def __init__(self, file: File, moves: Moves, moved: Tensors) -> None:
        super().__init__({})
        self._file, self._moves, self._moved = file, moves, moved

    @cached_property
    def tensors(self) -> dict[str, Callable[[], torch.Tensor]]:
        stored = self._file.checkpoint.tensors
        return {
            key: partial(self._moves.moved, tensor, lambda name: stored[name]()) for key, tensor in self._moved.items()
        }


def _follow(file: File, way: Way, without: Collection[str] = ()) -> tuple[Moves, Tensors]:
    """Let diffusers convert tensors that have no values; what followed them, and what the model's tensors are then."""
    given = {
        name: torch.empty(header.shape, dtype=header.dtype, device=way.device)
        for name, header in file.headers.items()
        if name not in without
    }
    moves = Moves(given)
    with silent(), bounded(), roomy(file.path.stat().st_size), enable("off"), moves:
        model = way.follow({**file.others, **given})
    return moves, survey(model).state


def _hold(component: str, model: Any, file: File, moves: Moves, state: Tensors, way: Way) -> Made:
    of_file = {key: tensor for key, tensor in state.items() if moves.of(tensor)}
    moved = {key: tensor for key, tensor in of_file.items() if moves.is_moved(tensor)}
    ours = survey(model).state
    known = Record(set(moved), ours.keys() - of_file.keys(), len(ours), files=[str(file.path)])
    held, total, buffers, findings = compare(model, known, _Converted(file, moves, moved), [dict])
    for key in sorted(of_file.keys() - moved.keys()):
        why = f"diffusers computes it from {few(sorted(moves.of(of_file[key])))}"
        findings.append(Finding(key, Verdict.UNPROVEN, None, why))
    reached = frozenset().union(*map(moves.of, of_file.values()))
    findings += _partial(moves, file, moved)
    findings += _scales(moves, file, of_file, ours, reached)
    findings += _rivals(moves, file, way, moved, reached)
    apart = sum(not moves.is_whole(tensor) for tensor in moved.values())
    notes = [f"split, joined or transposed by diffusers, and compared element by element: {apart:,}"] if apart else []
    missing = sorted(finding.key for finding in findings if finding.verdict is Verdict.MISSING)
    total += len(of_file) - len(moved)
    name = type(model).__name__
    return Made(
        Result(component, name, [str(file.path)], held, total, buffers, findings, missing, notes=notes), reached
    )


def _partial(moves: Moves, file: File, moved: Tensors) -> Iterator[Finding]:
    """Findings on tensors of the file that arrive in part, or more than once."""
    own = {id(tensor): tensor for tensor in moved.values()}  # a tied one has two names
    for name, (elements, places) in arrived(moves, file.headers, own.values()):
        count = file.headers[name].numel()
        if elements < count:
            why = f"{count - elements:,} of its {count:,} elements reach nothing"
            yield Finding("", Verdict.UNREAD, name, why, True)
        if places > elements:
            both = sorted(key for key, tensor in moved.items() if name in moves.of(tensor))
            yield Finding("", Verdict.UNPROVEN, name, f"diffusers makes several tensors of it: {few(both)}")


def _scales(moves: Moves, file: File, of_file: Tensors, ours: Tensors, reached: Collection[str]) -> Iterator[Finding]:
    """Findings on codes that were read as numbers, while nothing reads the scale beside them."""
    unread = file.headers.keys() - reached
    scales = Scales(unread)
    for key, tensor in of_file.items() if unread else ():
        for name in moves.of(tensor):
            if found := without_scale(key, name, file.headers[name].dtype, ours[key], scales):
                yield found


def _rivals(moves: Moves, file: File, way: Way, moved: Tensors, reached: Collection[str]) -> Iterator[Finding]:
    """Findings on tensors that the file has twice, with a prefix and without, and either would be read."""
    headers = file.headers
    left = headers.keys() - reached
    ends = {end: name for name in left for end in _ends(name) if end in reached}
    pairs = {name: ends.get(name) or next((end for end in _ends(name) if end in left), "") for name in reached}
    without = {n for n, other in pairs.items() if other and headers[other].shape == headers[n].shape}
    try:
        others, state = _follow(file, way, without) if without else (moves, {})
    except Exception:
        return  # the others are none that diffusers takes
    for key in sorted(state.keys() & moved.keys()):
        one, other = moves.of(moved[key]), others.of(state[key])
        if one == other or not others.is_moved(state[key]):
            continue
        values = [
            m.moved(t, lambda n: file.checkpoint.tensors[n]()) for m, t in ((moves, moved[key]), (others, state[key]))
        ]
        if not same(*values):
            won, lost = min(one - other), min(other - one)
            yield Finding(key, Verdict.AMBIGUOUS, won, f"not of {lost}: the file has both", True)


def _ends(name: str) -> Iterator[str]:
    """A name without its first part, and so on, as far as a prefix goes."""
    for _ in range(min(name.count("."), MOST_PARTS)):
        name = name.partition(".")[2]
        yield name


def _reason(error: Exception, how: How) -> str:
    """Why diffusers cannot convert it, as a clause."""
    if type(error).__name__ == "SingleFileComponentError":
        return "the file has no weights for it"
    if isinstance(error, KeyError):
        return f"diffusers asks the file or its config for {error.args[0]}, which they do not have"
    if match := _MISMATCH.search(str(error)):
        key, wanted, stored = match[1], *(match[i].replace(", ", " by ") or "a scalar" for i in (2, 3))
        return f"{key} is {stored} in the file and {wanted} in the model"
    return explain(error, None, how.trust)
