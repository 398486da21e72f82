"""The verdict on missing keys: ties that hold or came apart, and keys that nothing supplies."""

import inspect
from collections.abc import Callable, Collection, Iterator
from itertools import compress
from typing import Any

import torch

from tiedquiet.proof.aside import with_aside
from tiedquiet.proof.casts import is_at_limit
from tiedquiet.proof.likely import most_alike
from tiedquiet.proof.memory import Memory, by_object, equals, holds, is_copy, plain, same
from tiedquiet.proof.names import is_in
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import Survey, embeddings, is_denied, only, survey
from tiedquiet.proof.ties import Group
from tiedquiet.verdict import ONE_OF_TWO, Finding, Verdict

Values = Callable[[str], "torch.Tensor | None"]
_REPAIR = "set TIEDQUIET=repair"
WHY_TWO_ENDS = "the config ties them, but the checkpoint has both, and they differ"
_BOTH = "; or, if with both, set tie_word_embeddings to false throughout config.json"
# The base model may have been stored without a head, which its flag would then leave random.
BOTH_OF_RUN = (
    "; or, if with both, set tie_word_embeddings to false throughout this checkpoint's config.json, and load the model "
    "from there"
)


def judge_missing(
    model: Any, known: Record, now: Survey, tied: dict[str, Group], values: Values | None
) -> Iterator[Finding]:
    """Findings on missing keys: ties, what lies in the memory of a stored one, and what nothing supplies.

    Args:
        model: the model.
        known: what is known of its load.
        now: its tensors.
        tied: the ties that are asked for, under each name.
        values: has the checkpoint's values.
    """
    missing = [key for key in known.missing if key in now.state]
    if not missing:
        return
    state = with_aside(model, now.state)
    stored = only(state, known.stored)
    memory: Memory | None = None
    wanted = {id(state[key]) for key in missing}
    names_of = by_object(dict(compress(stored.items(), map(wanted.__contains__, map(id, stored.values())))))
    for key in missing:
        tensor, group = state[key], tied.get(key)
        if tensor.is_meta and key in known.findings:
            yield known.findings[key]  # moved to disk since then
            continue
        followed = names_of.get(id(tensor), [])
        if not followed and (pieces := plain(tensor)):
            memory = memory or Memory(stored)
            followed = memory.holding(pieces[0])
        if followed:
            yield _judge_follower(key, followed, group or Group(), stored, known)
            continue
        if group and key in known.had and (group.flags.get(key) or group.by_config):
            group = None  # two tensors in the run, by its config or its class, and in what it was made from
        finding = _judge_parted(model, key, now, tensor, group, stored, known, values) if group else None
        if finding is None and (key not in known.free or (tensor.is_meta and not known.place(key))):
            members = group.members if group and not group.flags.get(key) else ()
            why = "neither end of its tie is in the checkpoint" if members else ""
            if end := next((name for name in members if name in known.lasting), None):
                why = f"it is tied to {end}, which was not read"
            elif known.likely.get(key):
                why = f"it may be {_unread(key, known)}"
            finding = Finding(key, Verdict.MISSING, known.likely.get(key), why)
        if finding is None and known.likely.get(key):
            why = f"its class says that it needs no file, but it may be {_unread(key, known)}"
            finding = Finding(key, Verdict.UNPROVEN, known.likely.get(key), why)
        if finding is not None:
            yield finding


def _unread(key: str, known: Record) -> str:
    """What of the files may be this key, in words."""
    name = known.likely[key]
    if name is None:
        return "one of the tensors of its shape that are in the checkpoint and were not read"
    return f"{name}, which is in the checkpoint and was not read"


def _judge_follower(
    key: str, followed: list[str], group: Group, stored: dict[str, torch.Tensor], known: Record
) -> Finding:
    """The verdict on a missing key that lies in a stored one's memory."""
    for name in followed:
        lost = known.lasting.get(name)
        if lost is not None and lost.verdict is Verdict.OVERWRITTEN:
            return Finding(key, Verdict.OVERWRITTEN, name, lost.why, True, lost.cure)
        if lost is not None or name in known.grown:
            return Finding(key, Verdict.UNPROVEN, name, lost.why if lost else f"{name} was made larger")
        # For bfloat16 only numbers next to float32's largest are too large: no reason to look at them in every load.
        is_open = name in known.narrowed and stored[name].dtype is not torch.bfloat16
        if is_open and is_at_limit(stored[name]):
            return Finding(key, Verdict.UNPROVEN, name, f"{name} has values at the limit of its type")
    meant = group.source_of(key, stored)
    source = meant if meant in followed else min(set(followed) & set(group.members) or followed)
    # Following its own declared source is what the author asked for, whatever the rest of the group holds
    # (a T5 with an `lm_head` of its own). Otherwise two different stored values leave the choice open.
    if source != meant and (rival := rival_of(source, group, stored)):
        return Finding(key, Verdict.AMBIGUOUS, source, f"not of {rival}", True)
    # A tie that nobody asks for may be in the place of values that the files have, and nothing read.
    is_asked_for = source == meant and not group.flags.get(key)
    if not is_asked_for and key in known.likely:
        return Finding(key, Verdict.MISSING, known.likely[key], f"it may be {_unread(key, known)}")
    if known.place(source) != known.place(key):
        # One tensor, without values: accelerate reads them again for each name, and up to 5.12.1 it is not told
        # where those of a tied one are.
        why = "because accelerate finds nothing on disk under its name"
        return Finding(key, Verdict.UNTIED, source, why, True, _to_tie(_REPAIR, "load it without disk offload"))
    return Finding(key, Verdict.TIED, source)


def _judge_parted(
    model: Any,
    key: str,
    now: Survey,
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
    meant = group.source_of(key, stored)
    source = meant or next((name for name in members if is_copy(tensor, stored[name])), members[0])
    if tensor.is_meta and (place := known.place(key)) is not None and place == known.place(source):
        return Finding(key, Verdict.TIED, source)
    if not tensor.is_meta:  # what is on meta and not in the index of what is on disk has no values at all
        other = stored[source]
        if other.is_meta and values is not None and (value := values(source)) is not None:  # it stays on disk
            other = value
        if not plain(tensor) or not plain(other):
            if key in known.findings:
                return known.findings[key]  # at the load they could be compared
            kinds = " and ".join(f"{type(t).__name__} on {t.device}" for t in (tensor, other))
            return Finding(key, Verdict.UNPROVEN, source, f"the two cannot be compared ({kinds})")
        # Two tensors of one constant are equal by accident: biases that start at zero.
        if is_copy(tensor, other) and not _is_constant(tensor) and source not in known.lasting:
            if meant is None and (rival := rival_of(source, group, stored)):
                return Finding(key, Verdict.AMBIGUOUS, source, f"not of {rival}", True)
            # Unless the files may have values of its own for it, which nothing read.
            return Finding(key, Verdict.COPIED, source) if key not in known.likely else None
    flag = group.flags.get(key, "")
    broken = not flag or (key not in known.free and not _is_new_head(model, now.state[key], known.is_resumed))
    why, cure = (flag, "correct config.json") if flag else _why_untied(model, group)
    # What differs in more than its values, `repair` leaves, and what the config of the run itself denies.
    fits = not cure or (tensor.shape, tensor.dtype) == (stored[source].shape, stored[source].dtype)
    cure = _to_tie(_REPAIR if fits and not (flag and known.is_resumed) else "", cure)
    if known.likely.get(key) == key:
        cure = "Check config.json: the checkpoint has this tensor in another shape"
    elif key in known.likely:
        cure = f"Check whether it is {_unread(key, known)}, and rename that in the file if so"
    return Finding(key, Verdict.UNTIED, source, why, broken, cure)


def _to_tie(*ways: str) -> str:
    return f"If it should be one tensor, {' or '.join(filter(None, ways))}"


def judge_two_ends(known: Record, now: Survey, tied: dict[str, Group], values: Values) -> Iterator[Finding]:
    """Findings on ties that are asked for and whose two ends were both stored, with different values.

    transformers parts them, with one warning, and training goes on with two. The arguments are those of
    `judge_missing`.
    """
    stored = known.stored & now.state.keys() - known.lasting.keys() if tied else set()
    # Not where the same flag ties what the checkpoint does not have.
    is_needed = any(key in tied and not tied[key].flags.get(key) for key in known.missing)
    both = "" if is_needed else BOTH_OF_RUN if known.is_resumed else _BOTH
    for key, group in tied.items():
        source = group.source_of(key, stored)
        if key not in stored or source is None or group.flags.get(key) or now.state[key] is now.state[source]:
            continue
        # What stays on disk is read from there under each of the two names.
        ends = [end if not end.is_meta else values(name) for name in (key, source) for end in (now.state[name],)]
        if ends[0] is None or ends[1] is None or ({key, source} & known.altered and holds(ends[0], ends[1])):
            continue  # the class turned one of them
        if equals(ends[0], ends[1]) is False:
            is_of_inputs = _are_inputs(now, key, source)
            if not is_of_inputs and any(is_denied(model) for _, model in now.models):
                continue
            yield Finding(
                key, Verdict.AMBIGUOUS, source, WHY_TWO_ENDS, True, ONE_OF_TWO + ("" if is_of_inputs else both)
            )


def _are_inputs(now: Survey, *keys: str) -> bool:
    """Whether these are input embeddings of the model, or of models inside: the flag of the config is about heads."""
    inputs = [getattr(embeddings(model, "input"), "weight", None) for _, model in now.models]
    return all(any(now.state[key] is one for one in inputs) for key in keys)


def _is_new_head(model: Any, tensor: torch.Tensor, is_resumed: bool) -> bool:
    """Whether a key whose tie the config switches off is a head that nobody asked to tie.

    It is not if the checkpoint was saved by the very class that is loaded, or by one that it inherits from: then
    the head had a value, and the file lacks it. Nor if it is no head: the flag of the config is about heads, and
    two input embeddings that are one by the model's design (UMT5's) cannot part.
    """
    if is_resumed or _is_one_of(model, saved_by(model)):
        return False
    head = embeddings(model, "output")
    return isinstance(head, torch.nn.Module) and any(parameter is tensor for parameter in head.parameters())


def perhaps_unread(model: Any, findings: Collection[Finding]) -> list[Finding]:
    """Findings on missing keys that the files may have under another name, without those that a head explains.

    Those are what lies outside the base model in a file that another class saved: a masked language model's
    `lm_head.dense` is no `classifier.dense`. But if nothing of the base model was read, that may have any name.
    """
    if not (some := [finding for finding in findings if finding.verdict is Verdict.MISSING and finding.source]):
        return []
    state = survey(model).state
    some = list(_most_alike(some, state))
    theirs, base = saved_by(model), getattr(model, "base_model_prefix", "")
    # The base model by itself has no head, and its own names without that prefix.
    is_ours = any(_is_one_of(part, theirs) for part in (model, getattr(model, "base_model", model)))
    if is_ours or not theirs or not base:
        return some
    ours = {key for key in state if is_in(base, key)} or state.keys()  # the base model by itself
    is_lost = ours <= {finding.key for finding in findings if finding.verdict is Verdict.MISSING}
    return [finding for finding in some if is_lost or is_in(base, str(finding.source))]


def _most_alike(findings: Collection[Finding], state: dict[str, torch.Tensor]) -> Iterator[Finding]:
    """For each tensor of the files the one tensor that it may be; none if several are as much like it.

    Args:
        findings: those on missing keys.
        state: the model's tensors: the ends of a tie are one.
    """
    found: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        found.setdefault(str(finding.source), {})[finding.key] = finding
    for name, keys in found.items():
        best = most_alike(name, keys)
        if len({id(state.get(key, key)) for key in best}) == 1:
            yield keys[best[0]]


def saved_by(model: Any) -> Collection[str]:
    """The classes that the checkpoint's config names; whoever wrote it may have put anything there."""
    named = getattr(getattr(model, "config", None), "architectures", None)
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else ()


def is_of_another_class(model: Any) -> bool:
    """Whether the checkpoint's config says that another class saved it."""
    theirs = saved_by(model)
    return bool(theirs) and not _is_one_of(model, theirs)


def _is_one_of(model: Any, names: Collection[str]) -> bool:
    """Whether a model's class, or one that it inherits from, has one of these names."""
    return any(kind.__name__ in names for kind in type(model).__mro__)


def _is_constant(tensor: torch.Tensor) -> bool:
    flat = plain(tensor)[0].detach().reshape(-1)
    return same(flat, flat[:1].expand_as(flat))


def rival_of(source: str, group: Group, stored: dict[str, torch.Tensor]) -> str | None:
    """A stored member of the group whose values are not those of `source`, or cannot be compared with them."""
    for name in group.members:
        if name in stored and stored[name] is not stored[source] and not equals(stored[name], stored[source]):
            return name
    return None


def _why_untied(model: Any, group: Group) -> tuple[str, str]:
    """Why a tie that is asked for does not hold, as a clause, and what fixes it besides `repair`."""
    methods = [inspect.unwrap(vars(kind)["tie_weights"]) for kind in type(model).__mro__ if "tie_weights" in vars(kind)]
    if any("no_tie_weights" in method.__qualname__ for method in methods):  # an override may call that one
        why = "because two models were loaded at once in two threads, which left PreTrainedModel.tie_weights empty"
        return why, "load one after the other"
    if group.by_config:
        why = f"although its config asks for it, because {group.by_config}._tied_weights_keys does not declare it"
        return why, "declare it there"
    method = methods[0] if methods else len
    code = getattr(method, "__code__", None)
    if code is not None and not method.__module__.startswith("transformers."):
        why = f"because {method.__qualname__} ({code.co_filename}:{code.co_firstlineno}) does not tie it"
        return why, "fix that method"
    return "although its config asks for it", ""
