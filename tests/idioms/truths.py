"""What a load really did: read from the bytes of the file, from memory, and from a model that was never loaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.idioms.tiny import CONFIRMED, LOUD, Tiny
from tiedquiet import Proof, Verdict


@contextmanager
def dirty_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN or the largest integer, and never what it should by accident.

    Fresh pages are zero, and what a model of the class left behind can be right to the bit. Torch fills inside
    `empty` itself, below every dispatch mode, so nothing that is loaded can tell.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """One integer row for each element: NaN equals itself, and -0.0 is not 0.0."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).view(flat.numel(), flat.element_size())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and (a.is_meta or torch.equal(bits(a), bits(b)))


def places(tensor: torch.Tensor) -> frozenset[int]:
    """The address of every element; none where transformers left a tensor on meta."""
    if tensor.is_meta:
        return frozenset()
    storage, size = tensor.untyped_storage(), tensor.element_size()
    index = torch.arange(storage.nbytes() // size).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return frozenset((storage.data_ptr() + index.flatten() * size).tolist())


def never_written(tensor: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether some of it holds what `dirty_memory` puts into memory that nobody writes."""
    if tensor.is_meta:
        return True
    if tensor.dtype is torch.bool:
        return not same(tensor, reference)
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return bool((tensor == torch.iinfo(tensor.dtype).max).any())


def is_lost(now: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a tensor has other values than the file: these are classes of users, of which nothing is forgiven."""
    stored = stored.to(now.dtype)
    if now.shape != stored.shape or now.is_meta:
        return True
    return bool((bits(now) != bits(stored)).any())


@dataclass
class Truth:
    """What became of a load, from the bytes.

    Attributes:
        lost: stored keys that do not hold what the file has.
        rivals: stored keys that share one tensor and have different values in the file.
        unwritten: buffers and missing parameters that hold, in part, memory that nobody wrote.
        wrong: buffers outside the file that differ from those of a model that was not loaded.
        shared: for each missing key, the intact stored keys in whose memory it lies.
        drowned: the same for lost ones.
        overlapping: missing keys that lie in part in the memory of a stored key.
        equal: for each missing key, the stored keys whose values in the file it has in memory of its own.
        constant: those of `equal` that are one constant.
        ties: for each missing key, the stored keys that it is meant to be.
        perhaps: the same where that may be argued about.
        asked: missing keys that config or file ask to be tied.
        missing: keys that the file has nothing for.
        computed: buffers among them that have no garbage: their class, or `repair`, computed them.
        parted: groups of stored keys that are meant to be one and have different values, in memory of their own.
    """

    lost: set[str] = field(default_factory=set)
    rivals: set[str] = field(default_factory=set)
    unwritten: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    shared: dict[str, set[str]] = field(default_factory=dict)
    drowned: dict[str, set[str]] = field(default_factory=dict)
    overlapping: set[str] = field(default_factory=set)
    equal: dict[str, set[str]] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)
    ties: dict[str, set[str]] = field(default_factory=dict)
    perhaps: dict[str, set[str]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    computed: set[str] = field(default_factory=set)
    parted: list[set[str]] = field(default_factory=list)

    def verdicts(self, file: Mapping[str, torch.Tensor]) -> dict[str, set[Verdict | None]]:
        """What may be said of each key; None stands for no word. Of all other keys there is nothing to say."""
        allowed: dict[str, set[Verdict | None]] = {}
        for key in self.lost - self.rivals:
            allowed[key] = {Verdict.OVERWRITTEN}
        for key in self.rivals:
            # One of the two stands for both, unless both are lost besides.
            allowed[key] = {Verdict.AMBIGUOUS, None} | ({Verdict.OVERWRITTEN} if key in self.lost else set())
        for key in self.ties.keys() | self.perhaps.keys() | self.shared.keys() | self.drowned.keys():
            ends = self.ties.get(key, set()) | self.shared.get(key, set())
            differ = any(not same(file[a], file[b]) for a in ends for b in ends if file[a].shape == file[b].shape)
            if self.shared.get(key):
                allowed[key] = {Verdict.AMBIGUOUS if differ else Verdict.TIED}
                if self.drowned.get(key):  # two names of one memory, of which one has what the file has
                    allowed[key] |= {Verdict.OVERWRITTEN, Verdict.AMBIGUOUS}
            elif self.drowned.get(key):
                allowed[key] = {Verdict.OVERWRITTEN}
            elif key in self.overlapping:
                allowed[key] = {*Verdict, None} - {Verdict.TIED, Verdict.COPIED}
            elif not ends:
                allowed[key] = {Verdict.MISSING}
                if key in self.perhaps:
                    allowed[key] |= {Verdict.COPIED if self.equal.get(key) else Verdict.UNTIED}
            elif key in self.constant:
                allowed[key] = {Verdict.UNTIED, Verdict.UNPROVEN, None}
            elif differ:
                allowed[key] = {Verdict.AMBIGUOUS, Verdict.UNTIED}
            elif self.equal.get(key, set()) & ends:
                allowed[key] = {Verdict.COPIED}
            else:
                allowed[key] = {Verdict.UNTIED}
        for key in self.overlapping - allowed.keys():
            allowed[key] = {*Verdict, None} - {Verdict.TIED, Verdict.COPIED}
        for key in self.missing - allowed.keys():
            allowed[key] = {Verdict.MISSING, None} if key in self.computed else {Verdict.MISSING}
        for key in {key for group in self.parted for key in group} - allowed.keys():
            allowed[key] = {Verdict.AMBIGUOUS, None}
        for key in self.unwritten:
            allowed[key] = {Verdict.UNWRITTEN} | (allowed.get(key, set()) & {Verdict.UNTIED, Verdict.OVERWRITTEN})
        return allowed

    def broken(self, file: Mapping[str, torch.Tensor]) -> bool | None:
        """Whether `strict` must raise; None where that may be argued about."""
        answers = set()
        for key, allowed in self.verdicts(file).items():
            words: set[Any] = {
                word if word is not Verdict.UNTIED or key in self.asked or key in self.perhaps else None
                for word in allowed
            }
            answers.add(True if words <= LOUD else None if words & LOUD else False)
        # Two rivals have one finding between them: that some word is loud is certain, of which key is not.
        return True if True in answers or self.rivals or self.parted else None if None in answers else False


def truth(
    model: PreTrainedModel,
    file: Mapping[str, torch.Tensor],
    reference: PreTrainedModel,
    architectures: tuple[str, ...] | None = None,
) -> Truth:
    """What became of a load: `file` holds the stored tensors, `reference` was built on the CPU and never loaded."""
    found = Truth()
    now = {key: value.detach() for key, value in model.state_dict(keep_vars=True).items()}
    right = reference.state_dict(keep_vars=True)
    where = {key: places(value) for key, value in now.items()}
    missing = found.missing = now.keys() - file.keys()
    found.lost = {key for key in file if is_lost(now[key], file[key])}
    found.rivals = {
        key
        for key in file
        for other in file
        if key != other and where[key] == where[other] and not same(file[key], file[other])
    }
    for key in missing:
        holders = {s for s in file if where[key] and where[key] <= where[s]}
        if intact := holders - found.lost:
            found.shared[key] = intact
        if drowned := holders & found.lost:
            found.drowned[key] = drowned
        if holders:
            continue
        if any(where[key] & where[s] for s in file):
            found.overlapping.add(key)
        else:
            equals = {s for s in file if _has_the_values(now[key], file[s].to(now[key].dtype))}
            if equals and (bits(now[key]) == bits(now[key])[0]).all():
                found.constant.add(key)
            elif equals:
                found.equal[key] = equals
    buffers = dict(model.named_buffers(remove_duplicate=False))
    expected = dict(reference.named_buffers(remove_duplicate=False))
    for key in buffers.keys() - file.keys():
        if never_written(buffers[key], expected[key]):
            found.unwritten.add(key)
        if not same(buffers[key], expected[key]):
            found.wrong.add(key)
    found.computed = (missing & buffers.keys()) - found.unwritten
    for key in missing - buffers.keys():
        if never_written(now[key], right[key]):
            found.unwritten.add(key)
    asked_by_file = architectures is None or type(model).__name__ in architectures
    for group in _groups(_declared(model)):
        for key in group & missing:
            found.ties[key] = group & file.keys()
            if model.config.tie_word_embeddings or asked_by_file:
                found.asked.add(key)
        ends = group & file.keys()
        differ = any(not same(file[a], file[b]) for a in ends for b in ends if file[a].shape == file[b].shape)
        if model.config.tie_word_embeddings and differ and len({places(now[key]) for key in ends}) > 1:
            found.parted.append(ends)
    spots = {key: places(value) for key, value in right.items()}
    for key in missing - found.ties.keys():
        if also := {s for s in file if spots[key] and spots[key] == spots[s]}:
            found.perhaps[key] = also
    return found


def _has_the_values(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    return same(tensor, stored) or (tensor.dim() == 2 and stored.dim() == 2 and same(tensor, stored.t().contiguous()))


def _declared(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Pairs that are meant to be one tensor: by declaration, or by the config and the two embeddings."""
    names = dict(model.state_dict(keep_vars=True))
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        start = f"{prefix}." if prefix else ""
        if isinstance(declared := module._tied_weights_keys, Mapping):
            yield from ((start + target, start + source) for target, source in declared.items())
        if not isinstance(module, Tiny):
            continue
        paths = {id(part): f"{start}{path}.weight" for path, part in module.named_modules()}
        target, source = paths[id(module.get_output_embeddings())], paths[id(module.get_input_embeddings())]
        if module.config.tie_word_embeddings and names[target].shape == names[source].shape:
            yield target, source


def _groups(pairs: Iterator[tuple[str, str]]) -> list[set[str]]:
    groups: dict[str, set[str]] = {}
    for a, b in pairs:
        union = groups.get(a, {a}) | groups.get(b, {b})
        groups.update(dict.fromkeys(union, union))
    return list({id(group): group for group in groups.values()}.values())


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**model.state_dict(keep_vars=True), **dict(model.named_buffers(remove_duplicate=False))}


def assert_agrees(proof: Proof, model: PreTrainedModel, found: Truth, file: Mapping[str, torch.Tensor]) -> None:
    """Every finding is true, and everything that is true is found."""
    allowed = found.verdicts(file)
    said: dict[str, set[Verdict]] = {}
    for finding in proof.findings:
        said.setdefault(finding.key, set()).add(finding.verdict)
        assert finding.verdict in allowed.get(finding.key, set()), (finding, allowed.get(finding.key))
        match finding.verdict:
            case Verdict.TIED:
                assert finding.source in found.shared[finding.key], finding
            case Verdict.COPIED:
                assert finding.source in found.equal[finding.key], finding
            case Verdict.OVERWRITTEN if finding.key not in file:
                assert finding.source in found.drowned[finding.key], finding
            case Verdict.UNTIED:
                assert finding.source in found.ties.get(finding.key, set()) | found.perhaps.get(finding.key, set())
            case Verdict.AMBIGUOUS:
                assert finding.source in file, finding
    silent = {key for key, words in allowed.items() if None not in words and not said.get(key)}
    assert not silent, (silent, proof)
    for rival in found.rivals:
        group = {key for key in found.rivals if places(everything(model)[key]) == places(everything(model)[rival])}
        assert any(said.get(key) for key in group), (group, proof)
    for ends in found.parted:
        assert any(said.get(key) for key in ends), (ends, proof)
    intact = file.keys() - found.lost
    unchanged = [key for key in intact if same(everything(model)[key].detach(), file[key].to(everything(model)[key]))]
    of_parted = {key for ends in found.parted for key in ends}
    sure = {places(everything(model)[key]) for key in unchanged if key not in found.rivals | of_parted}
    assert len(sure) <= proof.stored
    assert proof.stored <= len(file.keys() - (found.lost - found.rivals))
    if found.lost or found.unwritten or found.rivals or found.parted:
        assert not proof.ok
    if all(words <= CONFIRMED for words in allowed.values()):
        assert proof.ok
    assert all(finding.key in str(proof) for finding in proof.findings)
