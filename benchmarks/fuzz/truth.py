"""What is true of a loaded model, from the bytes of its files and from a model that was built without loading."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.fuzz.draw import tied_keys
from benchmarks.fuzz.files import Files, reference
from benchmarks.fuzz.loading import Loaded
from benchmarks.fuzz.plan import Plan
from benchmarks.fuzz.writes import WAYS

WELL = ("held", "tied", "copied", "right")
OPEN = ("open", "free")
BAD = ("lost", "two values", "codes", "unread", "untied", "unwritten", "follows what is lost", "parted", "missing")


@dataclass
class Fact:
    """What is true of one name.

    Attributes:
        state: one of those above.
        must_raise: whether `strict` has to stop for it; None where either is right.
        blind: whether no one inside torch can see it.
        group: names of which one may stand for all, where they are about one tensor.
        exact: of a buffer, whether it is what `__init__` computes to the bit.
    """

    state: str
    must_raise: bool | None = False
    blind: bool = False
    group: frozenset[str] = frozenset()
    exact: bool = True

    @property
    def is_bad(self) -> bool:
        return self.state in BAD


class Truth:
    """What is true of a model that was loaded.

    Attributes:
        facts: by name, of its state dict and of its other buffers.
    """

    def __init__(self, plan: Plan, files: Files, loaded: Loaded) -> None:
        self.plan, self.files, self.model = plan, files, loaded.model
        self.missing = loaded.missing
        self.now: dict[str, Any] = dict(self.model.state_dict(keep_vars=True))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        self.others = {name: buffer for name, buffer in buffers.items() if name not in self.now}
        self.dtype = getattr(torch, plan.way.dtype or plan.stored.dtype)
        self.built = reference(plan, files, self.dtype)
        self.computed = dict(self.built.named_buffers(remove_duplicate=False))
        self.targets, self.by_config = self._targets()
        self.written = {write.key: write for write in plan.writes}
        self.facts: dict[str, Fact] = {}
        if plan.way.device_map == "meta":
            self.facts = {name: Fact("open", None) for name in (*self.now, *self.others)}
            return
        for key in self.now:
            if key in files.held:
                self.facts[key] = self._of_stored(key)
        for key in self.now:
            if key in files.elsewhere:
                self.facts[key] = self._of_unread(key)
        for key in self.now.keys() - self.facts.keys():
            self.facts[key] = self._of_missing(key)
        for name in self.others:
            self.facts[name] = self._of_buffer(name)
        self._note_parted()
        if plan.shape.shared and plan.way.device_map == "disk":  # one module, and accelerate hooks it for one name
            shared = ("second.", f"{plan.shape.shared}.")
            self.facts.update((name, Fact("open", None)) for name in self.facts if name.startswith(shared))

    @property
    def is_sound(self) -> bool:
        return all(fact.state in (*WELL, "free") for fact in self.facts.values())

    def _targets(self) -> tuple[dict[str, str], bool]:
        """What transformers itself says is to be tied to what, were the flag on; and whether the config alone asks."""
        ties = self.plan.shape.ties
        if ties is None:
            return {}, False
        model: Any = self.built
        if ties.form == "none":
            names = tied_keys(self.plan.shape)
            by_shape = [name for name in names[1:] if self.now[name].shape == self.now[names[0]].shape]
            return dict.fromkeys(by_shape[:1], names[0]), True
        kept = model.config.tie_word_embeddings
        model.config.tie_word_embeddings = True
        try:
            return dict(model.get_expanded_tied_weights_keys(all_submodels=True)), False
        finally:
            model.config.tie_word_embeddings = kept

    @property
    def asked(self) -> bool:
        return self.plan.shape.ties is not None and self.plan.shape.ties.flag is not False

    def value(self, name: str) -> torch.Tensor | None:
        """What a forward pass would find under a name."""
        tensor = self.now[name] if name in self.now else self.others[name]
        if not tensor.is_meta:
            return tensor.detach()  # type: ignore[no-any-return]
        path, _, last = name.rpartition(".")
        hook = getattr(self.model.get_submodule(path), "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            weights = getattr(each, "weights_map", None)
            if weights is not None and weights.prefix + last == name:
                try:
                    return weights[last]  # type: ignore[no-any-return]
                except KeyError:
                    return None
        return None

    def _of_stored(self, key: str) -> Fact:
        values, write = self.files.held[key], self.written.get(key)
        blind = self._is_blind(key)
        if len(values) > 1 and not same(values[0], values[1]):
            return Fact("two values", True, blind or not self.files.are_listed)  # nothing opens what no index names
        now = self.value(key)
        held = self._keeps(key, values[0])
        odd = self.plan.stored.odd.get(key)
        if held and odd == "int8 scale":
            return Fact("codes", True)
        if held:
            return self._of_held(key, values[0])
        if write is not None and write.way in ("a row zeroed", "a row by numpy"):
            owner = self.built.get_submodule(key.rpartition(".")[0])
            if getattr(owner, "padding_idx", None) == write.row and keeps_but(now, values[0], self.dtype, write.row):
                return Fact("open", None)
        group = frozenset(other for other in self.files.held if other != key and self._one(key, other))
        rivals = frozenset(other for other in group if not same(self.files.held[other][0], values[0]))
        return Fact("lost", True, blind, rivals)

    def _of_held(self, key: str, value: torch.Tensor) -> Fact:
        now = self.value(key)
        if value.dtype == torch.int8 and now is not None and now.is_floating_point():
            return Fact("open", None)  # nobody can know whether there was a scale, or whether one elsewhere is theirs
        return Fact("held")

    def _keeps(self, key: str, value: torch.Tensor) -> bool:
        """Whether a key holds a value, in the order in which its class may have put it on purpose."""
        now, write = self.value(key), self.written.get(key)
        turns = WAYS[write.way].turns if write else None
        return now is not None and any(
            keeps(now, each, self.dtype) for each in (value, *((turns(value),) if turns else ()))
        )

    def _of_unread(self, key: str) -> Fact:
        """Of a key that the files have under another name."""
        name, value = self.files.elsewhere[key]
        if self._keeps(key, value):
            return self._of_held(key, value)
        if self._ends_read(key) and self.asked:
            return self._of_missing(key)
        if any(self._one(key, other) for other in self.files.held):
            return Fact("open", None)  # one tensor by what `__init__` or an override does, whatever the files say
        # By one prefix that fits all it is told for certain; for one renamed module, or where the files have more than
        # fits (a scale), there may be a hint.
        is_certain = name == f"wrapped.{key}" and not self.files.extra
        return Fact("unread", True if is_certain else None, self._is_blind(key))

    def _ends_read(self, key: str) -> set[str]:
        """The members of the same tie whose values were read."""
        root = self.targets.get(key, key)
        ends = {root, *(target for target, source in self.targets.items() if source == root)} - {key}
        read = {end for end in ends if end in self.files.elsewhere and self.facts.get(end) == Fact("held")}
        return (ends & self.files.held.keys()) | read

    def _may_differ(self, others: set[str]) -> bool:
        """Whether these members of a tie may have other values than the rest of it."""
        stored = self.plan.stored
        return any(not stored.equal or end in stored.odd or self.facts[end].state == "lost" for end in others)

    def _of_missing(self, key: str) -> Fact:
        known = [name for name in self.facts if name in self.files.held or name in self.files.elsewhere]
        one = [other for other in known if other != key and self._one(key, other)]
        states = {self.facts[other].state for other in one}
        source = min(self._ends_read(key), default=None)
        if "held" in states:
            return Fact("open", None) if self._may_differ(self._ends_read(key) - set(one)) else Fact("tied")
        if states & {"open", "codes", "two values"} or self._is_another_view(key):
            return Fact("open", None)
        if one:
            sure = True if states != {"unread"} else None
            return Fact("follows what is lost", sure, self._is_blind(key), frozenset(one))
        if key in self.computed:
            return self._of_buffer(key)
        if key in self.written and self.written[key].way == "cast to int8":
            return Fact("open", None)  # in whole numbers NaN does not show
        if self._garbage(key):
            return Fact("unwritten", None if source or self.value(key) is None else True)
        if source is not None:
            return self._of_untied(key, source)
        return Fact("free") if self._is_ignored(key) else Fact("missing")

    def _of_untied(self, key: str, source: str) -> Fact:
        now, other = self.value(key), self.value(source)
        if (
            now is not None
            and other is not None
            and now.shape == other.shape
            and torch.equal(now.double(), other.double())
        ):
            others = self._ends_read(key)
            is_meant = self.targets.get(key) in others
            if self.facts[source].state == "held" and (is_meant or not self._may_differ(others - {source})):
                return Fact("copied")
            return Fact("open", None)
        return Fact("untied", True if self.asked and self.facts[source].state == "held" else None, self._is_blind(key))

    def _of_buffer(self, name: str) -> Fact:
        now, right = self.value(name), self.computed[name].detach()
        if now is None:
            return Fact("unwritten", None)
        if now.shape != right.shape:
            return Fact("open", None)
        close = now.shape == right.shape and torch.allclose(now.double(), right.double(), rtol=3e-2, atol=1e-6)
        if name in self.written and not close and not self._garbage(name):
            return Fact("open", None)  # these are the values that its class gave it
        return Fact("right" if close else "unwritten", not close, exact=same(now, right))

    def _is_another_view(self, key: str) -> bool:
        """Whether a head is a view of the embedding that its class may well multiply by."""
        ties = self.plan.shape.ties
        if ties is None or ties.override != "transposed" or key != tied_keys(self.plan.shape)[1]:
            return False
        now, embedding = self.value(key), self.value(tied_keys(self.plan.shape)[0])
        return now is not None and embedding is not None and torch.equal(now.t(), embedding)

    def _note_parted(self) -> None:
        """Two ends of a tie that is asked for, both stored with other values: one of them has to be told."""
        if not self.asked:
            return
        parted: dict[str, set[str]] = {}
        for ends in () if self.by_config else self.targets.items():
            values = [self._in_files(end) for end in ends]
            is_lost = any(end in self.facts and self.facts[end].state == "lost" for end in ends)
            if values[0] is not None and values[1] is not None and (is_lost or not same(values[0], values[1])):
                for end in ends:
                    parted.setdefault(end, set()).update(ends)
        now = {end: self.facts[end].state for end in parted}
        for end, group in parted.items():
            if now[end] == "held":
                # Where another end is lost, to say that the two differ is right, and not needed.
                both = all(now[other] == "held" for other in group)
                self.facts[end] = Fact("parted", True, group=frozenset(group)) if both else Fact("open", None)

    def _in_files(self, key: str) -> torch.Tensor | None:
        if key in self.files.held:
            return self.files.held[key][0]
        return self.files.elsewhere[key][1] if key in self.files.elsewhere else None

    def _is_ignored(self, key: str) -> bool:
        ignored = self.plan.shape.ignored
        return bool(ignored) and key.startswith(f"{ignored}.")

    def _is_blind(self, key: str) -> bool:
        return any(
            WAYS[write.way].blind and (write.key == key or self._one(write.key, key)) for write in self.plan.writes
        )

    def _garbage(self, key: str) -> bool:
        now = self.value(key)
        if now is None:
            return True
        if now.dtype == torch.bool:
            return bool(now.all())
        if now.is_floating_point():
            return bool(now.isnan().any())
        return bool((now == torch.iinfo(now.dtype).max).any())

    def _one(self, a: str, b: str) -> bool:
        """Whether two names are one tensor, in order: what is written to one is read from the other."""
        left, right = self.now[a], self.now[b]
        if left.is_meta and right.is_meta and left is right:
            values = [self.value(name) for name in (a, b)]  # what is on disk is read anew for each name
            return values[0] is not None and values[1] is not None and torch.equal(values[0], values[1])
        if left is right:
            return True
        if left.is_meta or right.is_meta or left.dtype != right.dtype or left.dim() != right.dim():
            return False
        if left.untyped_storage().data_ptr() != right.untyped_storage().data_ptr():
            return False  # spares writing to pairs that cannot be one
        small, large = (left, right) if left.numel() <= right.numel() else (right, left)
        small, large = small.detach(), large.detach()[: len(small)]
        if small.shape != large.shape:
            return False
        kept = small.clone()
        marks = torch.arange(small.numel()).view(small.shape).remainder(120).to(small.dtype)
        small.copy_(marks) if 0 not in small.stride() else small.fill_(1)
        follows = torch.equal(large, marks)
        if 0 not in small.stride():
            small.copy_(kept)
        else:
            small[:1].copy_(kept[:1])
        return follows


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def keeps(now: torch.Tensor, stored: torch.Tensor, asked: torch.dtype) -> bool:
    """Whether nothing was lost beyond the rounding that the load asked for."""
    if now.shape != stored.shape:
        return False
    if not (now.is_floating_point() and stored.is_floating_point()):
        real = torch.real(stored) if stored.is_complex() and not now.is_complex() else stored
        if stored.is_complex() and not now.is_complex() and bool(torch.imag(stored).any()):
            return False
        return torch.equal(now.to(torch.float64), real.to(torch.float64))
    for cast in (stored.to(now.dtype), stored.to(asked).to(now.dtype)):
        if torch.equal(cast, now) and not bool((cast.isinf() & stored.isfinite()).any()):
            return True
    return False


def keeps_but(now: torch.Tensor | None, stored: torch.Tensor, asked: torch.dtype, row: int) -> bool:
    """Whether all rows but one are as they were stored, and that one is zero."""
    if now is None or now.shape != stored.shape or bool(now[row].any()):
        return False
    rest = [place for place in range(len(now)) if place != row]
    return keeps(now[rest], stored[rest], asked)
