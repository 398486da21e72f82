"""Load records, fingerprints, verdicts and repair. The only file that touches tensors.

A shared tensor alone proves no tie: a module shared in `__init__` can be re-initialised after it was loaded,
and then both names hold the same random values. So a fingerprint of every stored member is taken the moment
the checkpoint has been read, before transformers initialises or ties anything, and compared when the report
is made.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from tiedquiet.ties import Declaration, Group, groups

if TYPE_CHECKING:
    import torch

RUNS, RUN = 4, 16  # a fingerprint is 4 evenly spaced runs of 16 elements: each run is one small copy off the GPU


class Verdict(str, Enum):
    """What is true of one member of a tie group after loading."""

    TIED = "tied"
    UNTIED = "untied"
    OVERWRITTEN = "overwritten"
    ABSENT = "absent"
    AMBIGUOUS = "ambiguous"
    UNPROVEN = "unproven"

    __str__ = str.__str__


@dataclass(frozen=True)
class Tie:
    """The verdict on one key.

    Attributes:
        key: the parameter's name in the model's state dict.
        source: the stored key that it follows, or should follow; None where nothing is known to be stored.
        verdict: what was found.
        declared: whether `_tied_weights_keys` declares the tie; False where it was only seen.
    """

    key: str
    source: str | None
    verdict: Verdict
    declared: bool


class Finding(NamedTuple):
    """A tie, what is known of its cause in words, and whether that is a config flag that switches it off."""

    tie: Tie
    why: str = ""
    off: bool = False


class Fingerprint(NamedTuple):
    """The form of a tensor, and up to 64 of its elements as bytes."""

    form: "tuple[torch.dtype, torch.Size]"
    data: bytes


@dataclass
class Record:
    """What one load delivered of the tensors that matter for ties.

    Attributes:
        missing: keys that the checkpoint did not deliver (mismatched shapes included).
        stored: fingerprint of each key that it did deliver; None where the tensor cannot be read.
        groups: the declared tie groups.
        loose: missing keys outside them that have the shape of a stored one.
        lost: stored keys whose values are no longer the stored ones, as found when the report was made.
    """

    missing: set[str]
    stored: dict[str, Fingerprint | None]
    groups: list[Group]
    loose: set[str]
    lost: set[str] = field(default_factory=set)


_loading: "WeakKeyDictionary[torch.nn.Module, Record]" = WeakKeyDictionary()
_settled: "WeakKeyDictionary[torch.nn.Module, Record]" = WeakKeyDictionary()


def begin(model: "torch.nn.Module", missing: set[str]) -> None:
    """Record a load whose values have just been copied in; `missing` are the keys it did not deliver."""
    _loading[model] = _record(model, missing)


def settle(model: "torch.nn.Module", repairing: bool = False) -> tuple[list[Finding], list[Finding]] | None:
    """Judge the load that `begin` recorded, once; None where there is none.

    Returns the findings and, of them, those that are tied only because they were repaired here.
    """
    record = _loading.pop(model, None)
    if record is None:
        return None
    if not record.groups and not record.loose:
        return [], []
    now = _now(model, record)
    _compare(record, now)
    findings = list(_judge(record, now))
    repaired: list[Finding] = []
    if repairing:
        keys = {f.tie.key for f in findings if f.tie.verdict is Verdict.UNTIED and _repair(model, f.tie, record, now)}
        if keys:
            now = _now(model, record)
            findings = list(_judge(record, now))
            repaired = [f for f in findings if f.tie.key in keys and f.tie.verdict is Verdict.TIED]
    _settled[model] = _merged(_settled.get(model), record)
    return findings, repaired


def check(model: "torch.nn.Module") -> list[Finding]:
    """Judge a loaded model as it is now; what was lost while loading is known from the load itself."""
    record = _settled.get(model)
    if record is not None:
        return list(_judge(record, _now(model, record)))
    survey = _survey(model)
    why = "no load record: it was loaded before tiedquiet was enabled, or not from a checkpoint"
    return [
        Finding(Tie(key, group.sources[key], Verdict.UNPROVEN, True), why)
        for group in groups(survey.declarations, survey.tensors)
        for key in group.members
        if key in group.sources
    ]


class _Survey(NamedTuple):
    """A model in one walk: tensors under each of their names, what is declared, whether tensors are kept back."""

    tensors: "dict[str, torch.Tensor]"
    declarations: list[Declaration]
    keeps_back: bool


def _survey(model: "torch.nn.Module") -> _Survey:
    import torch

    tensors: dict[str, torch.Tensor] = {}
    declarations: list[Declaration] = []
    of_class: dict[type[torch.nn.Module], object] = {}
    hooks = False
    # Not `named_modules`: a load waits for this, and its nested generators take most of a millisecond.
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        state = module.__dict__
        for name, child in state["_modules"].items():
            if child is not None:
                stack.append((f"{prefix}{name}.", child))
        for name, parameter in state["_parameters"].items():
            if parameter is not None:
                tensors[prefix + name] = parameter
        if buffers := state["_buffers"]:
            for name, buffer in buffers.items():
                if buffer is not None and name not in state["_non_persistent_buffers_set"]:
                    tensors[prefix + name] = buffer
        if state["_state_dict_hooks"]:
            hooks = True
        if (kind := type(module)) not in of_class:
            of_class[kind] = getattr(kind, "_tied_weights_keys", None)
        keys = getattr(module, "_tied_weights_keys", None) if of_class[kind] else state.get("_tied_weights_keys")
        if keys:
            config = getattr(module, "config", None)
            on = getattr(config, "tie_word_embeddings", False)
            off = None if on else f"{type(config).__name__}.tie_word_embeddings is false"
            declarations.append(Declaration(prefix, keys, off))
    plain = torch.nn.Module
    customs = any(
        kind.state_dict is not plain.state_dict or kind._save_to_state_dict is not plain._save_to_state_dict
        for kind in of_class
    )
    return _Survey(tensors, declarations, hooks or customs)


def _now(model: "torch.nn.Module", record: Record) -> "dict[str, torch.Tensor]":
    """The tensors that the record speaks of, those of them that the model still has."""
    names = {*record.stored, *record.loose, *(key for group in record.groups for key in group.members)}
    if len(names) > 64:
        return _survey(model).tensors
    found = ((name, _tensor_at(model, name)) for name in names)
    return {name: tensor for name, tensor in found if tensor is not None}


def _tensor_at(model: "torch.nn.Module", key: str) -> "torch.Tensor | None":
    *path, name = key.split(".")
    module: torch.nn.Module | None = model
    for part in path:
        module = module._modules.get(part) if module is not None else None
    return None if module is None else module._parameters.get(name, module._buffers.get(name))


def _record(model: "torch.nn.Module", missing: set[str]) -> Record:
    tensors, declarations, keeps_back = _survey(model)
    declared = groups(declarations, tensors)
    grouped = {key for group in declared for key in group.members}
    stored = tensors.keys() - missing
    # An override of `tie_weights` may tie what nothing declares: any stored tensor of a missing one's shape.
    loose = {key for key in missing - grouped if key in tensors} if stored else set()
    shapes = {tensors[key].shape for key in loose}
    wanted = {key for key in stored if key in grouped or (shapes and tensors[key].shape in shapes)}
    if wanted and keeps_back:
        wanted &= model.state_dict(keep_vars=True).keys()  # what is kept out of it was asked of no checkpoint
    shapes = {tensors[key].shape for key in wanted}
    loose = {key for key in loose if tensors[key].shape in shapes}
    return Record(missing, _fingerprints({key: tensors[key] for key in wanted}), declared, loose)


def _merged(old: Record | None, new: Record) -> Record:
    """The record that `check` uses: a second load (an adapter, a resume) adds to what the first one stored."""
    if old is None:
        return new
    stored = {**old.stored, **new.stored}
    lost = {key for key in old.lost if key not in new.stored} | new.lost
    return Record(
        (old.missing | new.missing) - stored.keys(), stored, new.groups, (old.loose | new.loose) - stored.keys(), lost
    )


def _fingerprints(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, Fingerprint | None]:
    """Sample tensors; a tensor of several names is sampled once. None for those that cannot be read."""
    prints = {id(tensor): _fingerprint(tensor) for tensor in tensors.values()}
    return {name: prints[id(tensor)] for name, tensor in tensors.items()}


def _fingerprint(tensor: "torch.Tensor") -> Fingerprint | None:
    import torch

    if not _readable(tensor):
        return None
    size, values = tensor.numel(), tensor.detach()
    if size <= RUNS * RUN:
        runs = [values.reshape(-1)]
    else:
        # In the middle of each quarter, away from both ends, where padding rows lie.
        starts = [(2 * i + 1) * (size - RUN) // (2 * RUNS) for i in range(RUNS)]
        if values.is_contiguous():
            # Copied run by run, straight from where they lie: a gather would allocate on the GPU at the load's peak.
            runs = [values.view(-1)[start : start + RUN] for start in starts]
        else:
            # Flattening it would copy it whole.
            places = torch.tensor([start + i for start in starts for i in range(RUN)], device=values.device)
            runs = [values[torch.unravel_index(places, values.shape)]]
    samples = runs[0].cpu() if len(runs) == 1 else torch.cat([run.cpu() for run in runs])
    return Fingerprint((tensor.dtype, tensor.shape), bytes(samples.view(torch.uint8).tolist()))


def _readable(tensor: "torch.Tensor") -> bool:
    """Whether the tensor's own memory holds its values: not on meta, no shard, no quantised or other subclass."""
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def _compare(record: Record, now: Mapping[str, "torch.Tensor"]) -> None:
    """Find what was lost; where nothing can be compared (cast, resized, moved to meta) forget the fingerprint."""
    current = _fingerprints({key: now[key] for key, stored in record.stored.items() if stored and key in now})
    for key, fingerprint in current.items():
        before = record.stored[key]
        if before is None or fingerprint is None or before.form != fingerprint.form:
            record.stored[key] = None
        elif _changed(before, fingerprint):
            record.lost.add(key)


def _changed(before: Fingerprint, now: Fingerprint) -> bool:
    """Whether stored values are gone. A re-zeroed padding row is no loss: few samples, and all of them zero."""
    width = before.form[0].itemsize
    zero = bytes(width)
    chunks = [(before.data[i : i + width], now.data[i : i + width]) for i in range(0, len(now.data), width)]
    differing = [new for old, new in chunks if old != new]
    return any(new != zero for new in differing) or 2 * len(differing) > sum(old != zero for old, _ in chunks)


def _judge(record: Record, now: Mapping[str, "torch.Tensor"]) -> Iterator[Finding]:
    """One finding for every member that was not stored, and for every stored one that was lost."""
    for group in record.groups:
        members = [key for key in group.members if key in now]
        stored = [key for key in members if key in record.stored]
        for key in members:
            if key in record.lost:
                yield Finding(Tie(key, key, Verdict.OVERWRITTEN, True))
            elif key not in record.stored:
                yield _judge_one(key, stored, record, now, group)
    grouped = {key for group in record.groups for key in group.members}
    holders: dict[int, list[str]] = defaultdict(list)
    for key in record.stored:
        if key in now and _readable(now[key]):
            holders[now[key].data_ptr()].append(key)
    if holders:
        for key in record.loose - grouped:
            if key in now and _readable(now[key]):
                same = [s for s in holders.get(now[key].data_ptr(), ()) if _same(now[key], now[s])]
                if same:
                    yield _judge_one(key, same, record, now, Group())


def _judge_one(key: str, stored: list[str], record: Record, now: Mapping[str, "torch.Tensor"], group: Group) -> Finding:
    """The verdict on a member that was not stored, given the members of its group that were."""
    declared = key in group.members
    if not stored:
        return Finding(Tie(key, None, Verdict.ABSENT, declared), "no member of its tie is in the checkpoint")
    meant = next((s for s in group.chain(key) if s in stored), None)
    followed = [s for s in stored if _same(now[key], now[s])]
    source = meant if meant in followed or (meant and not followed) else (followed or stored)[0]
    if not followed or record.stored[source] is None:
        # A key left on meta beside a source in memory is another tensor for certain; any other such pair may be one.
        astray = now[key].is_meta and _readable(now[source])
        unreadable = [k for k in (key, source) if not _readable(now[k])]
        if (unreadable and not astray) or record.stored[source] is None:
            tensor = now[unreadable[0] if unreadable else source]
            why = f"its values cannot be followed through the load ({type(tensor).__name__} on {tensor.device})"
            return Finding(Tie(key, source, Verdict.UNPROVEN, declared), why)
        flag = group.off.get(key)
        return Finding(Tie(key, source, Verdict.UNTIED, declared), flag or "", flag is not None)
    if any(s in record.lost for s in followed):
        return Finding(Tie(key, source, Verdict.OVERWRITTEN, declared))
    # Following its own declared source is what the author asked for, whatever the rest of the group holds
    # (a T5 with an `lm_head` of its own). Otherwise two different stored values leave the choice open.
    rivals = [s for s in stored if s not in followed and _differ(s, source, record, now)]
    if rivals and source != meant:
        return Finding(Tie(key, source, Verdict.AMBIGUOUS, declared), rivals[0])
    return Finding(Tie(key, source, Verdict.TIED, declared))


def _same(a: "torch.Tensor", b: "torch.Tensor") -> bool:
    """Whether two names hold one tensor: one object, or two views of the same memory."""
    if a is b:
        return True
    if not (_readable(a) and _readable(b)) or a.data_ptr() != b.data_ptr():
        return False
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _differ(a: str, b: str, record: Record, now: Mapping[str, "torch.Tensor"]) -> bool:
    import torch

    if record.stored[a] != record.stored[b]:
        return True
    left, right = now[a].reshape(-1), now[b].reshape(-1)
    # In slices: comparing at once would need a mask as large as the embedding.
    return not all(map(torch.equal, torch.split(left, 1 << 22), torch.split(right, 1 << 22)))


def _repair(model: "torch.nn.Module", tie: Tie, record: Record, now: Mapping[str, "torch.Tensor"]) -> bool:
    """Tie `tie.key` to its source where the two tensors agree in form and no stored value is lost by it."""
    group = next(g for g in record.groups if tie.key in g.members)
    source_key = str(tie.source)
    ours, source = now[tie.key], now[source_key]
    if source_key in record.lost:
        return False
    if (ours.shape, ours.dtype) != (source.shape, source.dtype) or not (ours.is_meta or ours.device == source.device):
        return False
    rivals = [s for s in group.members if s in record.stored and s != source_key]
    if source_key not in group.chain(tie.key) and any(_differ(s, source_key, record, now) for s in rivals):
        return False
    parent, _, name = tie.key.rpartition(".")
    module = model.get_submodule(parent)
    # The module may carry a second, stored name: re-pointing it would lose what was stored under that one.
    if any(tensor is ours and key not in record.missing for key, tensor in _survey(model).tensors.items()):
        return False
    setattr(module, name, source)
    mapping = getattr(model, "all_tied_weights_keys", None)
    if isinstance(mapping, dict):
        mapping[tie.key] = source_key
    return True
