"""The verdict on what was read: whether it is still there; and on memory that was allocated but never written."""

from collections.abc import Callable, Iterator
from functools import cache
from operator import attrgetter
from typing import Any, Literal

import torch

from tiedquiet.proof import names
from tiedquiet.proof.aside import in_memory, is_served, with_aside
from tiedquiet.proof.casts import cast_finding, is_at_limit, is_beyond
from tiedquiet.proof.files import Checkpoint, stamp
from tiedquiet.proof.memory import Place, all_lie_at, equals, holds, lies_at, plain, same
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import Survey, survey
from tiedquiet.proof.watch import TRANSFORMERS, Watch, Write
from tiedquiet.verdict import BUFFER, KEPT_OUT, LOOSE, Finding, Verdict

Sources = Callable[[str], "list[Callable[[], torch.Tensor]] | None"]
_Kept = Literal["grown", "altered"]
_IS_META = attrgetter("is_meta")


def writes_elsewhere(watch: Watch) -> dict[str, Write]:
    """The writes that torch counted but the watch did not see: those of other threads."""
    found = {}
    for name in watch.written_elsewhere():
        seen = watch.writes.get(name)
        by = seen.by if seen and seen.was_seen else "by another thread or by compiled code"
        found[name] = Write(by, 0, None)
    return found


def judge_stored(
    model: torch.nn.Module, reading: Reading, writes: dict[str, Write], now: Survey, is_over: bool
) -> tuple[dict[str, Finding], set[str], set[str]]:
    """Findings on stored keys that no longer hold what was read; those made larger; those altered and not lost."""
    found: dict[str, Finding] = {}
    kept: dict[_Kept, set[str]] = {"grown": set(), "altered": set()}
    # The answer of nearly every load, in half the time that it takes to ask of each by itself.
    if not writes and all_lie_at([now.state.get(name) for name in reading.held], reading.read_to.values()):
        return found, kept["grown"], kept["altered"]
    what: Finding | _Kept | None
    for name, tensor in reading.held.items():
        current, write = now.state.get(name), writes.get(name)
        if current is not None and current.is_meta and name not in reading.offloaded and is_served(model, name):
            aside = in_memory(model, name)
            # Most often accelerate put its values aside where they were read to.
            current = tensor if aside is None or lies_at(aside, reading.read_to[name]) else aside
        if current is tensor and write is None and lies_at(current, reading.read_to[name]):
            what = _without_values(model, reading, name, is_over) if current.is_meta else None
        elif name in reading.offloaded and not (is_over and current is not None and not current.is_meta):
            what = None  # its values stay on disk, and are read from there whenever they are needed; not a buffer's
        else:
            what = _judge_changed(model, reading, name, current, write)
        if isinstance(what, Finding):
            found[name] = what
        elif what is not None:
            kept[what].add(name)
    return found, kept["grown"], kept["altered"]


def _without_values(model: torch.nn.Module, reading: Reading, name: str, is_over: bool) -> Finding | None:
    """The finding on a stored tensor that is on meta, as it was when it was read; None if something will read it."""
    if name not in reading.offloaded:
        return Finding(name, Verdict.UNPROVEN, None, "it is on meta, where nothing has values")
    if is_over and not is_served(model, name):  # up to 5.3.0, where all of a model is
        return Finding(name, Verdict.UNPROVEN, None, "its values stay on disk, and nothing reads them")
    return None


def _judge_changed(
    model: torch.nn.Module, reading: Reading, name: str, current: torch.Tensor | None, write: Write | None
) -> "Finding | _Kept | None":
    """The finding on a stored tensor that was written to or replaced; or how it has its values all the same."""
    before = before_writing(reading, name, write)
    is_equal = current is not None and before is not None and equals(current, before)
    held = is_equal or (None if current is None or before is None else holds(current, before))
    if current is None or (held is None and not (write and write.was_seen)):
        return Finding(name, Verdict.UNPROVEN, None, "its values cannot be traced")
    if held:
        if isinstance(before, torch.Tensor) and current.numel() > before.numel():
            return "grown"
        return None if is_equal else "altered"
    if write and write.prepares_adapter:
        return Finding(name, Verdict.UNPROVEN, None, f"peft prepared it for its adapter, {write.by}")
    if write and write.package == TRANSFORMERS and is_padding(model, name, current, before):
        return "altered"
    by = write.by if write else "by another tensor that took its place"
    return Finding(name, Verdict.OVERWRITTEN, name, by, True)


def judge_casts(known: Record, now: Survey, sources: Sources, and_on_disk: bool = False) -> None:
    """Look at what the load cast to a smaller type: what that made infinite is a finding that lasts.

    A value that is at the limit of its type may be so in the file (a mask of minus infinity): the files are asked.

    Args:
        known: what is known of the load. What has been looked at is not asked again.
        now: the tensors of the very model that was loaded.
        sources: gives what reads the files' tensors that one of the model's was made of, or None.
        and_on_disk: look at what will be cast when it is read from there, too.
    """
    for name in sorted(known.narrowed - known.lasting.keys()):
        tensor, then = now.state.get(name), known.tensors.get(name)
        is_another = then is not None and then() is not tensor
        if tensor is None or is_another or (tensor.is_meta and not and_on_disk):
            continue
        if tensor.is_meta or any(map(is_at_limit, plain(tensor))):
            if (own := sources(name)) is None:
                continue
            stored = next((values.dtype for read in own if is_beyond(values := read(), tensor.dtype)), None)
            if stored is not None:
                known.lasting[name] = cast_finding(name, stored, tensor.dtype, is_too_large=True)
        known.narrowed.discard(name)


def sources_since(model: Any, known: Record, now: Survey) -> Sources:
    """The sources of a model's tensors once its load is over: by names, if its files are the same as then."""

    @cache
    def origins() -> tuple[Checkpoint, dict[str, names.Origin]]:
        checkpoint = Checkpoint(None, known.files, getattr(model, "base_model_prefix", ""))
        conversions = names.all_conversions(model, getattr(model, "_weight_conversions", None) or ())
        return checkpoint, names.sources(model, checkpoint.headers, now.state, conversions)

    def sources(name: str) -> list[Callable[[], torch.Tensor]] | None:
        try:
            if not known.stamps or any(stamp(path) != then for path, then in known.stamps.items()):
                return None
            checkpoint, made = origins()
            return [checkpoint.tensors[key] for key in made[name].names]
        except Exception:  # what cannot be read or is not named there; and a stamp cannot be had of what is gone
            return None

    return sources


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
    """Findings on what was not read and has no values: memory that was allocated for it, or no memory at all."""
    # What of a state dict was neither read nor missing is what the class keeps out of it; or an adapter's base.
    rest = missing if reading.is_of_adapter else now.state.keys() - reading.held.keys()
    tensors = {**{key: now.state[key] for key in rest if key in now.state}, **now.others}
    are_on_meta = list(map(_IS_META, reading.held.values()))
    on_disk = any(are_on_meta)
    unwritten = {
        name: Finding(name, Verdict.UNWRITTEN, None, _kind(tensor), True)
        for name, tensor in with_aside(model, tensors).items()
        if watch.placeholders.has(tensor)
        or (tensor.is_meta and not on_disk and name not in missing and not is_served(model, name))
    }
    # A base's were told when that was loaded, a quantiser makes its layers' later, and a model on meta is told as such.
    if not (reading.is_of_adapter or reading.is_quantised or all(are_on_meta)):
        unwritten.update((finding.key, finding) for finding in _judge_loose(model, now))
    return unwritten


def _judge_loose(model: torch.nn.Module, now: Survey) -> Iterator[Finding]:
    """Findings on what no module registers; `repair` fills what is an attribute by itself, and no list of them."""
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)} if now.loose else ()
    for name in now.loose:
        is_by_itself = name.rpartition(".")[0] in paths
        cure = "" if is_by_itself else "Register them as buffers and compute them in _init_weights too"
        yield Finding(name, Verdict.UNWRITTEN, None, LOOSE, True, cure)


def _kind(tensor: torch.Tensor) -> str:
    if not isinstance(tensor, torch.nn.Parameter):
        return BUFFER
    return KEPT_OUT if tensor.is_meta else "a parameter"


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
