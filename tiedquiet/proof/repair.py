"""Repairing a load: the only part of the proof that writes to a model."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

import torch

from tiedquiet.proof.aside import is_moved
from tiedquiet.proof.load import Load
from tiedquiet.proof.memory import equals, plain, same
from tiedquiet.proof.missing import rival_of
from tiedquiet.proof.stored import before_writing
from tiedquiet.proof.survey import Survey, only, survey, ties
from tiedquiet.proof.watch import Watch
from tiedquiet.verdict import BUFFER, LOOSE, Finding, Verdict

# A twin is made with settings of the whole process: two threads that make theirs would take over each other's.
_one_at_a_time = RLock()
_MENDABLE = (Verdict.UNTIED, Verdict.COPIED, Verdict.OVERWRITTEN, Verdict.UNWRITTEN)


def repair(load: Load, model: Any, findings: list[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Repair what can be repaired without losing anything that was stored.

    Args:
        load: the load, which has been judged.
        model: its model.
        findings: what was found.

    Returns:
        The findings afterwards, and those before that are right now, judged by the same rules.
    """
    protected = [
        Finding(name, Verdict.OVERWRITTEN, name, write.by, True)
        for name, write in load.watch.writes.items()
        if write.was_seen
    ]
    before = {f.key: f for f in [*protected, *findings] if f.verdict in _MENDABLE}
    for _ in range(2):  # what is tied to a stored tensor may have to wait until that is put back
        now = survey(model)
        for finding in findings:
            key = finding.key
            if finding.verdict is Verdict.OVERWRITTEN and key in load.reading.held:
                _put_back(load, model, key, now)
            elif finding.verdict is Verdict.COPIED or (finding.verdict is Verdict.UNTIED and finding.broken):
                _tie(load, model, finding, now)
            elif finding.why in (BUFFER, LOOSE) and key not in load.reading.likely:
                _fill(load, model, key, _computed(load).get(key), now)
        findings = load.findings(model)
        before = {**{f.key: f for f in findings if f.verdict is Verdict.UNTIED}, **before}
    left = {f.key for f in findings if f.verdict is not Verdict.TIED}
    return findings, [before[key] for key in sorted(before) if key not in left]


def prepare(load: Load, model: Any) -> None:
    """Compute what tensors without values may need while the call lasts: what a class sets for it may count.

    Args:
        load: the load.
        model: its model.
    """
    with load.watch.aside():
        if load.reading.has_loose or any(map(load.watch.placeholders.has, model.buffers())):
            _computed(load)


def copy_in_place(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Copy a value into a model's tensor, which stays the object that it is, with its type and device.

    Returns:
        Whether it holds the value now, cast to its own type. Where the shapes differ, nothing is written.
    """
    if tensor.shape != value.shape or not plain(tensor):
        return False
    with torch.no_grad():
        tensor.copy_(value)
    return same(plain(tensor)[0], value)


def put_in_place(model: torch.nn.Module, state: dict[str, torch.Tensor], key: str, value: torch.Tensor) -> bool:
    """Put a value where a model has a tensor on meta, with its type, on the device of what is next to it.

    Args:
        model: the model.
        state: its tensors under all of their names, which is brought up to date.
        key: the tensor's name.
        value: the value.

    Returns:
        Whether it holds the value now. Where the shapes differ, or accelerate has the values elsewhere, nothing is put.
    """
    tensor, parts = state[key], key.split(".")
    if not tensor.is_meta or tensor.shape != value.shape or is_moved(model, key):
        return False
    around = (*(".".join(parts[:end]) + "." for end in range(len(parts) - 1, 0, -1)), "")
    near = (t.device for start in around for name, t in state.items() if name.startswith(start) and not t.is_meta)
    put = value.to(next(near, value.device), tensor.dtype, copy=True)
    if isinstance(tensor, torch.nn.Parameter):
        put = torch.nn.Parameter(put, tensor.requires_grad)
    for name in [name for name, other in state.items() if other is tensor]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, put)
        state[name] = put
    return same(put.detach(), value)


def _put_back(load: Load, model: torch.nn.Module, key: str, now: Survey) -> None:
    if now.state[key].is_meta and is_moved(model, key):
        return  # what is put in its place gives way to what accelerate keeps, at the next forward pass
    tensor, read = load.reading.held[key], load.reading.read_to[key]
    pieces, before = plain(read), before_writing(load.reading, key, load.watch.writes.get(key))
    if isinstance(before, torch.Tensor) and len(pieces) == 1:
        pieces[0].copy_(before)
    if isinstance(read, torch.Tensor):
        tensor.data = read
    taken = now.state[key]
    # Whatever follows the tensor that took its place goes back with it: a decoder tied to an alias of it, say. Not
    # where that is another stored one's.
    is_another_s = any(other is taken for other in load.reading.held.values())
    followers = [name for name, other in now.state.items() if other is taken and not is_another_s]
    for follower in followers or [key]:
        parent, _, name = follower.rpartition(".")
        setattr(model.get_submodule(parent), name, tensor)


def _tie(load: Load, model: Any, finding: Finding, now: Survey) -> None:
    key, source_key = finding.key, str(finding.source)
    known, reading = load.known, load.reading
    ours, source = now.state[key], now.state[source_key]
    together = ours.is_meta or source.is_meta or ours.device == source.device
    if known is None or source_key in known.lasting or key in known.likely:
        return  # the files may have it, and nothing read it
    if (ours.shape, ours.dtype) != (source.shape, source.dtype) or not together:
        return
    if source_key in reading.offloaded:  # what is to stay on disk is looked for there
        reading.offloaded[key] = reading.offloaded[source_key]
    if ours is source or (ours.is_meta and is_moved(model, key)):  # its values are elsewhere already
        return
    if source.is_meta and not ours.is_meta:
        if (values := reading.values(source_key)) is not None:
            ours.data.copy_(values)
        return
    group = ties(now, known.missing, known.stored)[key]
    if load.is_resumed and group.flags.get(key):
        return  # it has the values of a base model, say, and the config of the run itself wants two tensors
    stored = only(now.state, known.stored)
    if source_key not in group.chain(key) and rival_of(source_key, group, stored):
        return
    if load.is_resumed:  # an optimizer may hold this very parameter
        copy_in_place(ours, source)
        return
    parent, _, name = key.rpartition(".")
    setattr(model.get_submodule(parent), name, source)


def _fill(load: Load, model: Any, key: str, values: torch.Tensor | None, now: Survey) -> None:
    tensors = now.state | now.others | now.loose
    buffer = tensors[key]
    if values is None or (values.shape, values.dtype) != (buffer.shape, buffer.dtype):
        return
    if put_in_place(model, tensors, key, values) or buffer.is_meta:
        return
    buffer.copy_(values)
    load.watch.placeholders.note_written(buffer)
    load.reading.free.add(key)  # it has what its class computes: that the files lack it is no loss


def _computed(load: Load) -> dict[str, torch.Tensor]:
    if load.computed is None:
        load.computed = _tensors_of_twins(load.arguments)
    return load.computed


def _tensors_of_twins(arguments: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    """The buffers and the like that a second `__init__` computes, with the arguments of the first, and a third as well.

    What differs between the two was drawn or counted, and nobody can tell what the first one made of it.
    """
    with _one_at_a_time:
        first, second = (_tensors_of_a_twin(arguments, seed) for seed in (1, 2))
    return {name: buffer for name, buffer in first.items() if name in second and equals(buffer, second[name])}


def _tensors_of_a_twin(arguments: tuple[Any, ...], seed: int) -> dict[str, torch.Tensor]:
    watch, default = Watch({}, protect=False), torch.get_default_dtype()
    try:
        kind, dtype, config, args, kwargs = copy.deepcopy(arguments)
        torch.set_default_dtype(dtype)  # as `from_pretrained` does
        with _drawing_from(seed), watch, _parameters_on_meta():
            twin = kind(config, *args, **kwargs)
    except Exception:
        return {}  # what it was made with is not known: its buffers stay, and are reported
    finally:
        torch.set_default_dtype(default)
    if watch.error is not None:
        raise watch.error  # it does not know which of them have values
    loose = {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in twin.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    return {
        name: tensor
        for name, tensor in (*twin.named_buffers(remove_duplicate=False), *loose.items())
        if not tensor.is_meta and not watch.placeholders.has(tensor)
    }


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give the modules that this thread makes parameters without values, and leave those of other threads alone.

    accelerate's `init_empty_weights` takes them from all threads; and if two leave it in the order in which they came,
    from every module that the program makes from then on.
    """
    theirs, thread, is_over = torch.nn.Module.register_parameter, get_ident(), False

    def register_parameter(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        theirs(self, name, param)
        if param is not None and get_ident() == thread and not is_over:
            more = {**vars(param), "requires_grad": param.requires_grad}
            self._parameters[name] = type(param)(param.to("meta"), **more)

    torch.nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        is_over = True
        if torch.nn.Module.register_parameter is register_parameter:
            torch.nn.Module.register_parameter = theirs  # type: ignore[method-assign]


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Draw random numbers from a seed; afterwards the program's own go on where they were, those of GPUs included."""
    import numpy  # as transformers does

    before, before_of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` seeds every GPU as well
        random.seed(seed)
        numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            numpy.random.set_state(before_of_numpy)
