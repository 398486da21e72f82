"""The verdict on what was read: whether it is still there; and on memory that was allocated but never written."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch

from tiedquiet.proof.memory import Place, all_lie_at, equals, holds, is_at_limit, lies_at, plain, same
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.survey import Survey, is_moved, survey
from tiedquiet.proof.watch import PEFT, TRANSFORMERS, Watch, Write
from tiedquiet.verdict import BUFFER, Finding, Verdict

_IS_META = attrgetter("is_meta")


def writes_elsewhere(reading: Reading, watch: Watch) -> dict[str, Write]:
    """The writes that torch counted but the watch did not see: those of other threads."""
    found = {}
    for name in watch.written_elsewhere():
        seen = watch.writes.get(name)
        by = seen.by if seen and seen.was_seen else "by another thread or by compiled code"
        found[name] = write = Write(by, 0, None)
        if before_writing(reading, name, write) is not None:
            write.size = reading.held[name].numel()
    return found


def judge_stored(
    model: torch.nn.Module, reading: Reading, writes: dict[str, Write], now: Survey, is_over: bool, is_strict: bool
) -> tuple[dict[str, Finding], set[str], set[str]]:
    """Findings on stored keys that no longer hold what was read; those made larger; those altered and not lost."""
    found: dict[str, Finding] = {}
    grown: set[str] = set()
    altered: set[str] = set()
    # The answer of nearly every load, in half the time that it takes to ask of each by itself.
    is_untouched = not writes and not (is_strict and reading.narrowed)
    if is_untouched and all_lie_at([now.state.get(name) for name in reading.held], reading.read_to.values()):
        return found, grown, altered
    for name, tensor in reading.held.items():
        read = reading.read_to[name]
        current, write = now.state.get(name), writes.get(name)
        if current is tensor and write is None and lies_at(current, read):
            if current.is_meta and name not in reading.offloaded:
                found[name] = Finding(name, Verdict.UNPROVEN, None, "it is on meta, where nothing has values")
            elif current.is_meta and is_over and not is_moved(model, name):  # up to 5.3.0, where all of a model is
                found[name] = Finding(name, Verdict.UNPROVEN, None, "its values stay on disk, and nothing reads them")
            elif is_strict and name in reading.narrowed:
                found.update(_judge_narrowed(reading, name, current))
            continue
        if name in reading.offloaded and not (is_over and current is not None and not current.is_meta):
            continue  # its values stay on disk, and are read from there whenever they are needed; not those of a buffer
        if current is not None and current.is_meta and not tensor.is_meta and is_moved(model, name):
            current = tensor  # accelerate put its values aside, where they were read to
            if write is None and lies_at(current, read):
                continue
        before = before_writing(reading, name, write)
        is_equal = current is not None and before is not None and equals(current, before)
        held = is_equal or (None if current is None or before is None else holds(current, before))
        if current is None or (held is None and not (write and write.was_seen)):
            found[name] = Finding(name, Verdict.UNPROVEN, None, "its values cannot be traced")
        elif held:
            if isinstance(before, torch.Tensor) and current.numel() > before.numel():
                grown.add(name)
            elif not is_equal:
                altered.add(name)
            if is_strict and name in reading.narrowed:
                found.update(_judge_narrowed(reading, name, current))
        elif write and write.package == PEFT:
            # PiSSA and its like put a part of the base into the adapter, and take it out of the base.
            found[name] = Finding(name, Verdict.UNPROVEN, None, f"peft prepared it for its adapter, {write.by}")
        elif write and write.package == TRANSFORMERS and is_padding(model, name, current, before):
            altered.add(name)
        else:
            by = write.by if write else "by another tensor that took its place"
            found[name] = Finding(name, Verdict.OVERWRITTEN, name, by, True)
    return found, grown, altered


def _judge_narrowed(reading: Reading, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Finding]]:
    """A finding on values that were too large for the type that they were cast to, or will be once they are needed."""
    values = reading.values(name) if tensor.is_meta or is_at_limit(tensor) else None
    if values is not None and equals(values.to(tensor.dtype) if tensor.is_meta else tensor, values) is False:
        kinds = [str(kind).removeprefix("torch.") for kind in (values.dtype, tensor.dtype)]
        why = f"by the cast to {kinds[1]}, which is too small for values that the file has as {kinds[0]}"
        yield name, Finding(name, Verdict.OVERWRITTEN, name, why, True)


def before_writing(reading: Reading, name: str, write: Write | None) -> Place | None:
    """The values of a stored tensor as they were read; None where they are nowhere to be had."""
    read = reading.read_to[name]
    if write is None:
        return read  # nobody touched that memory
    if write.before is not None:
        return write.before
    values, pieces = reading.values(name) if reading.checkpoint.state_dict is None else None, plain(read)
    if values is None or len(pieces) != 1 or values.shape != pieces[0].shape:
        return None
    return values.to(pieces[0].dtype)


def judge_placeholders(
    reading: Reading, missing: set[str], watch: Watch, model: Any, now: Survey
) -> dict[str, Finding]:
    """Findings on memory that was allocated while the model was loaded, and has no values."""
    on_disk = any(map(_IS_META, reading.held.values()))
    tensors = {**{key: now.state[key] for key in missing if key in now.state}, **now.others}
    return {
        name: Finding(name, Verdict.UNWRITTEN, None, _kind(tensor), True)
        for name, tensor in tensors.items()
        if watch.placeholders.has(tensor)
        or (tensor.is_meta and not on_disk and name in now.others and not is_moved(model, name))
    }


def _kind(tensor: torch.Tensor) -> str:
    return "a parameter" if isinstance(tensor, torch.nn.Parameter) else BUFFER


def is_padding(model: Any, name: str, tensor: torch.Tensor, before: Place | None) -> bool:
    """Whether all that changed is an embedding's own row for padding, zeroed again as releases before 5.9 do.

    No other token may have that row as well.
    """
    owner, pieces = model.get_submodule(name.rpartition(".")[0]), plain(tensor)
    row = getattr(owner, "padding_idx", None)
    if not isinstance(owner, torch.nn.Embedding) or row is None or row in _other_tokens(model) or len(pieces) != 1:
        return False
    now = pieces[0].detach()
    if not isinstance(before, torch.Tensor) or now.shape != before.shape:
        return False
    return not now[row].any() and same(now[:row], before[:row]) and same(now[row + 1 :], before[row + 1 :])


def _other_tokens(model: Any) -> set[Any]:
    """The numbers of all special tokens but padding that the configs of a model name."""
    found: set[Any] = set()
    for _, part in survey(model).models:
        for key, value in vars(getattr(part, "config", None) or object).items():
            if key.endswith("_token_id") and key != "pad_token_id":
                found.update(value if isinstance(value, list) else [value])
    return found
