"""The judge: from what was read, what was seen since and the model as it is, to findings. It changes none of them.

That two names share a tensor proves nothing: a module shared in `__init__` can be initialised anew after it was loaded,
and then both names hold the same random values. So a stored tensor counts as held only if it lies where it was read to
and nobody was seen to write there, or if it equals in full what was read.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from weakref import ref

import torch

from tiedquiet.proof import record
from tiedquiet.proof.memory import Memory, Place, equals, holds, is_at_limit, is_copy, lies_at, plain, same
from tiedquiet.proof.reading import Reading, by_object
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import Survey, embeddings, is_denied, is_moved, survey, ties
from tiedquiet.proof.ties import Group
from tiedquiet.proof.watch import Watch, Write
from tiedquiet.verdict import BUFFER, Finding, Proof, Verdict

Values = Callable[[str], "torch.Tensor | None"]
_REPAIR = "If it should be one tensor, set TIEDQUIET=repair"
_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def judge(
    model: torch.nn.Module,
    reading: Reading,
    watch: Watch,
    reported: set[str],
    is_resumed: bool = False,
    is_over: bool = False,
    is_strict: bool = False,
) -> Record:
    """Judge a load, now that it has ended.

    Args:
        model: the loaded model.
        reading: what was read into it.
        watch: what was seen since.
        reported: the keys that the loader is about to report missing.
        is_resumed: the checkpoint is one of this very model.
        is_over: nothing more of it comes: what stays on disk has what will read it.
        is_strict: values that were cast to a smaller type are worth a look at each of them.

    Returns:
        What is known; its `settled` are the findings.

    Raises:
        Exception: what went wrong under the watch; after that nothing can be said.
    """
    if watch.error is not None:
        raise watch.error
    missing = reading.missing if watch.was_entered or is_resumed else reading.missing & reported
    now = survey(model)
    if not reading.held.keys() <= now.state.keys():
        now = _as_loaded(now)
    lost, grown, altered = _judge_stored(model, reading, watch.writes, now, is_over, is_strict)
    known = Record(
        reading.stored,
        missing,
        len(reading.stored) + len(missing),
        reading.free & missing,
        lasting={**reading.found, **lost, **_judge_placeholders(reading, missing, watch, model, now)},
        grown=grown,
        altered=altered,
        narrowed=set(reading.narrowed),
        places=reading.offloaded,
        likely=reading.likely,
        reported=reported,
        is_resumed=is_resumed,
        files=list(reading.checkpoint.files),
        tensors={name: ref(tensor) for name, tensor in now.state.items() if name in reading.held},
        model=ref(model),
    )
    known.two_ends = {finding.key: finding for finding in _judge_two_ends(known, now, reading.values)}
    known.settled = {finding.key: finding for finding in _judge_now(model, known, now, reading.values)}
    return known


def proof(model: Any, inert: str = "") -> Proof:
    """What is known of a model, or of those inside it: of `torch.compile`, DDP, PEFT, or a composite of several.

    Args:
        model: any object.
        inert: why no load can have been seen.
    """
    found: list[tuple[str, Proof]] = []
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        known = record.of(module)
        inside = any(name.startswith(outer) for outer, _ in found)
        if known is not None and not inside:
            found.append((f"{name}." if name else "", proof_of(module, known)))
    if len(found) == 1:
        return found[0][1]
    findings = [
        replace(finding, key=prefix + finding.key, source=finding.source and prefix + finding.source)
        for prefix, part in found
        for finding in part.findings
    ]
    if not found:
        why = inert or "no record of a load: it was loaded before tiedquiet was enabled, or not from a checkpoint"
        findings = [Finding("", Verdict.UNPROVEN, None, why)]
    stored, total = (sum(getattr(part, what) for _, part in found) for what in ("stored", "total"))
    return Proof(type(model).__name__, stored, tuple(findings), total)


def proof_of(model: torch.nn.Module, known: Record) -> Proof:
    """What is known of a model's own load, and what can be seen to have changed since. To train it is no change."""
    now = _as_loaded(survey(model))
    findings = {finding.key: finding for finding in _judge_now(model, known, now)}
    findings.update(
        (finding.key, finding) for finding in _judge_since(model, known, now) if finding.key not in findings
    )
    stored = len(known.stored - findings.keys())
    return Proof(type(model).__name__, stored, tuple(findings[key] for key in sorted(findings)), known.total)


def _as_loaded(now: Survey) -> Survey:
    """The same with the names that tensors had when they were loaded beside those that PEFT gave them."""
    for parts in (now.state, now.others):
        for name, tensor in list(parts.items()):
            parts.setdefault(record.loaded_name(name), tensor)
    return now


def _judge_now(model: Any, known: Record, now: Survey, values: Values | None = None) -> list[Finding]:
    findings = {**known.two_ends, **known.lasting}
    for finding in _judge_missing(model, known, now, values):
        # A tie of which no end was stored does not explain why nothing was written to this one.
        # And what the files have and nothing read is no tie that came apart.
        known_of_it = findings.get(finding.key)
        if known_of_it is None or (
            Verdict.UNREAD is not known_of_it.verdict and finding.verdict is not Verdict.MISSING
        ):
            findings[finding.key] = finding
    return [findings[key] for key in sorted(findings) if key in now.state or key in now.others or not key]


# What was read


def writes_elsewhere(reading: Reading, watch: Watch) -> dict[str, Write]:
    """The writes of which torch tells and the watch did not see: those of other threads."""
    found = {}
    for name in watch.written_elsewhere():
        seen = watch.writes.get(name)
        by = seen.by if seen and seen.was_seen else "by another thread or by compiled code"
        found[name] = write = Write(by, 0, None)
        if before_writing(reading, name, write) is not None:
            write.size = reading.held[name].numel()
    return found


def _judge_stored(
    model: torch.nn.Module, reading: Reading, writes: dict[str, Write], now: Survey, is_over: bool, is_strict: bool
) -> tuple[dict[str, Finding], set[str], set[str]]:
    """Findings on stored keys that no longer hold what was read; those made larger; those altered and not lost."""
    found, grown, altered = {}, set(), set()
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
            found[name] = Finding(name, Verdict.UNPROVEN, None, "what became of its values cannot be told")
        elif held:
            if isinstance(before, torch.Tensor) and current.numel() > before.numel():
                grown.add(name)
            elif not is_equal:
                altered.add(name)
            if is_strict and name in reading.narrowed:
                found.update(_judge_narrowed(reading, name, current))
        elif write and write.is_transformers_own and is_padding(model, name, current, before):
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


def _judge_placeholders(
    reading: Reading, missing: set[str], watch: Watch, model: Any, now: Survey
) -> dict[str, Finding]:
    """Findings on memory that was allocated while the model was loaded, and has no values."""
    on_disk = any(tensor.is_meta for tensor in reading.held.values())
    tensors = {**{key: now.state[key] for key in missing if key in now.state}, **now.others}
    return {
        name: Finding(name, Verdict.UNWRITTEN, None, _kind(tensor), True)
        for name, tensor in tensors.items()
        if watch.placeholders.has(tensor)
        or (tensor.is_meta and not on_disk and name in now.others and not is_moved(model, name))
    }


def _judge_since(model: torch.nn.Module, known: Record, now: Survey) -> Iterator[Finding]:
    """Findings on what can be seen to have changed since the load; of a copy, none."""
    if known.model is None or known.model() is not model:
        return  # a copy has tensors of its own
    for name in sorted(known.stored):
        tensor = now.state.get(name)
        if tensor is not None and (name in known.places or is_moved(model, name) or type(tensor) not in _ORDINARY):
            continue  # accelerate holds the values elsewhere, FSDP has parted them
        if tensor is None:
            yield Finding(name, Verdict.UNPROVEN, None, "it was read, and has been taken out of the model since")
        elif tensor.is_meta:
            yield Finding(
                name, Verdict.UNPROVEN, None, "it was read, and has been put on meta since, where nothing has values"
            )
        elif known.tensors[name]() is not tensor:
            yield Finding(name, Verdict.UNPROVEN, None, "it was read, and another tensor has taken its place since")
        elif name in known.narrowed and is_at_limit(tensor):
            why = f"it has values at the limit of {str(tensor.dtype).removeprefix('torch.')}, to which it was cast"
            yield Finding(name, Verdict.UNPROVEN, None, why)


# What was not


def _judge_missing(model: Any, known: Record, now: Survey, values: Values | None) -> Iterator[Finding]:
    """Findings on missing keys: ties, what lies in the memory of a stored one, and what nothing supplies."""
    missing = [key for key in known.missing if key in now.state]
    if not missing:
        return
    stored = {name: now.state[name] for name in known.stored if name in now.state}
    memory: Memory | None = None
    names_of, tied = by_object(stored), ties(now, known.missing, known.stored)
    for key in missing:
        tensor, group = now.state[key], tied.get(key)
        if tensor.is_meta and key in known.settled:
            yield known.settled[key]  # moved to disk since then
            continue
        followed = names_of.get(id(tensor), [])
        if not followed and (pieces := plain(tensor)):
            memory = memory or Memory(stored)
            followed = memory.holding(pieces[0])
        if followed:
            yield _judge_follower(key, followed, group or Group(), stored, known)
            continue
        finding = _judge_parted(model, key, tensor, group, stored, known, values) if group else None
        if finding is None and (key not in known.free or (tensor.is_meta and not known.place(key))):
            why = "no end of its tie is in the checkpoint" if group else ""
            if end := next((name for name in (group.members if group else ()) if name in known.lasting), None):
                why = f"it is tied to {end}, which was not read"
            elif (name := known.likely.get(key)) is not None:
                why = f"it may be {name} in the checkpoint, which nothing read"
            finding = Finding(key, Verdict.MISSING, known.likely.get(key), why)
        if finding is not None:
            yield finding


def _judge_follower(
    key: str, followed: list[str], group: Group, stored: dict[str, torch.Tensor], known: Record
) -> Finding:
    """The verdict on a missing key that lies in a stored one's memory."""
    for name in followed:
        lost = known.lasting.get(name)
        if lost is not None and lost.verdict is Verdict.OVERWRITTEN:
            return Finding(key, Verdict.OVERWRITTEN, name, lost.why, True)
        if lost is None and name in known.narrowed and is_at_limit(stored[name]):
            return Finding(key, Verdict.UNPROVEN, name, f"{name} has values at the limit of its type")
        if lost is not None or name in known.grown:
            return Finding(key, Verdict.UNPROVEN, name, lost.why if lost else f"{name} was made larger")
    meant = next((name for name in group.chain(key) if name in stored), None)
    source = meant if meant in followed else min(set(followed) & set(group.members) or followed)
    # Following its own declared source is what the author asked for, whatever the rest of the group holds
    # (a T5 with an `lm_head` of its own). Otherwise two different stored values leave the choice open.
    if source != meant and (rival := rival_of(source, group, stored)):
        return Finding(key, Verdict.AMBIGUOUS, source, f"not of {rival}", True)
    if known.place(source) != known.place(key):
        # One tensor, without values: accelerate reads them for each name anew, and up to 5.12.1 it is not told
        # where those of a tied one are.
        why, cure = "because accelerate finds nothing on disk under its name", "load it without disk offload"
        return Finding(key, Verdict.UNTIED, source, why, True, f"{_REPAIR} or {cure}")
    return Finding(key, Verdict.TIED, source)


def _judge_parted(
    model: Any,
    key: str,
    tensor: torch.Tensor,
    group: Group,
    stored: dict[str, torch.Tensor],
    known: Record,
    values: Values | None,
) -> Finding | None:
    """The verdict on a missing key of a tie that lies in memory of its own; None where no end of it was stored."""
    members = [name for name in group.members if name in stored]
    if not members:
        return None
    meant = next((name for name in group.chain(key) if name in stored), None)
    source = meant or members[0]
    if tensor.is_meta and (place := known.place(key)) is not None and place == known.place(source):
        return Finding(key, Verdict.TIED, source)
    if not tensor.is_meta:  # what is on meta and not in the index of what is on disk has no values at all
        other = stored[source]
        if other.is_meta and values is not None and (value := values(source)) is not None:  # it stays on disk
            other = value
        if not plain(tensor) or not plain(other):
            if key in known.settled:
                return known.settled[key]  # at the load they could be compared
            kinds = " and ".join(f"{type(t).__name__} on {t.device}" for t in (tensor, other))
            return Finding(key, Verdict.UNPROVEN, source, f"the two cannot be compared ({kinds})")
        # Two tensors of one constant are equal by accident: biases that start at zero.
        equal = is_copy(tensor, other) and not _is_constant(tensor) and source not in known.lasting
        if equal and (meant or rival_of(source, group, stored) is None):
            # Unless the files may have values of its own for it, which nothing read.
            return Finding(key, Verdict.COPIED, source) if key not in known.likely else None
    flag = group.flags.get(key, "")
    broken = not flag or (key not in known.free and not _is_new_head(model, tensor, known.is_resumed))
    why, cure = (flag, "correct config.json") if flag else _why_untied(model, group)
    cure = f"{_REPAIR} or {cure}" if cure else _REPAIR
    if (name := known.likely.get(key)) is not None:
        cure = f"Look whether it is {name}, which the checkpoint has and nothing read"
    return Finding(key, Verdict.UNTIED, source, why, broken, cure)


def _judge_two_ends(known: Record, now: Survey, values: Values) -> Iterator[Finding]:
    """Findings on ties that are asked for and whose two ends were both stored, with different values.

    transformers parts them, with one warning, and training goes on with two.
    """
    stored = {name for name in known.stored if name in now.state and name not in known.lasting}
    tied = ties(now, known.missing, known.stored) if stored else {}
    for key, group in tied.items():
        source = next((name for name in group.chain(key) if name in stored), None)
        if key not in stored or source is None or group.flags.get(key) or now.state[key] is now.state[source]:
            continue
        # What stays on disk is read from there under each of the two names.
        ends = [end if not end.is_meta else values(name) for name in (key, source) for end in (now.state[name],)]
        if ends[0] is None or ends[1] is None or ({key, source} & known.altered and holds(ends[0], ends[1])):
            continue  # the class turned one of them
        if equals(ends[0], ends[1]) is False:
            if any(is_denied(model) for _, model in now.models):
                return
            why = "its own: the tie is asked for, but the checkpoint has both, and they differ"
            yield Finding(key, Verdict.AMBIGUOUS, source, why, True)


def _is_new_head(model: Any, tensor: torch.Tensor, is_resumed: bool) -> bool:
    """Whether a key whose tie the config switches off is a head that nobody asked to tie.

    It is not if the checkpoint was saved by the very class that is loaded, or by one that it inherits from: then
    the head had a value, and the file lacks it. Nor if it is no head: the flag of the config is about heads, and
    two input embeddings that are one by the model's design (UMT5's) cannot part.
    """
    saved_by = getattr(getattr(model, "config", None), "architectures", None) or ()
    if is_resumed or any(kind.__name__ in saved_by for kind in type(model).__mro__):
        return False
    head = embeddings(model, "output")
    return isinstance(head, torch.nn.Module) and any(parameter is tensor for parameter in head.parameters())


def _kind(tensor: torch.Tensor) -> str:
    return "a parameter" if isinstance(tensor, torch.nn.Parameter) else BUFFER


def _is_constant(tensor: torch.Tensor) -> bool:
    flat = plain(tensor)[0].detach().reshape(-1)
    return same(flat, flat[:1].expand_as(flat))


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


def rival_of(source: str, group: Group, stored: dict[str, torch.Tensor]) -> str | None:
    """A stored member of the group whose values are not those of `source`, or cannot be compared with them."""
    for name in group.members:
        if name in stored and stored[name] is not stored[source] and not equals(stored[name], stored[source]):
            return name
    return None


def _why_untied(model: Any, group: Group) -> tuple[str, str]:
    """Why a tie that is asked for does not hold, as a clause, and what cures it besides `repair`."""
    method = inspect.unwrap(getattr(type(model), "tie_weights", len))
    if "no_tie_weights" in method.__qualname__:
        why = "because two models were loaded at once in two threads, which left PreTrainedModel.tie_weights empty"
        return why, "load one after the other"
    if group.by_config:
        why = f"although its config asks for it, because {group.by_config}._tied_weights_keys does not declare it"
        return why, "declare it there"
    code = getattr(method, "__code__", None)
    if code is not None and not method.__module__.startswith("transformers."):
        why = f"because {method.__qualname__} ({code.co_filename}:{code.co_firstlineno}) does not tie it"
        return why, "mend that method"
    return "although its config asks for it", ""
