"""The record of a load: names and verdicts, left on the model. It holds no tensor and keeps none alive."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch

from tiedquiet.proof.memory import ORDINARY
from tiedquiet.verdict import IN_FILES, WELL, Finding, Verdict

_WRAPPED = re.compile(r"\.((token_adapter\.)?base_layer|original_module)(?=\.)")
_RECOMPUTED = "_checkpoint_wrapped_module."  # around a layer whose activations are recomputed
_OF_TORCH = re.compile(rf"\b(_orig_mod\.|{re.escape(_RECOMPUTED)})")
_ATTRIBUTE = "_tiedquiet_record"


@dataclass
class Record:
    """What is known about one load of one model. It travels with the model, and into its copies.

    Attributes:
        stored: names that the checkpoint delivered.
        missing: names that it did not deliver.
        total: how many names the state dict had.
        free: those missing that the class itself says need no file.
        lasting: findings on the load itself, which nothing later changes.
        two_ends: findings on ties of which both ends were stored, with different values.
        findings: all of them when the load had ended.
        grown: names of tensors that were made larger.
        altered: names of tensors that were turned, or whose own row for padding transformers zeroed again: no loss.
        narrowed: names of what may have been cast to a type with a smaller range, and has not been looked at.
        gone: names of those of which the quantiser made other tensors when all was read.
        adapted: names of those that an adapter brought: to delete it again takes them away.
        had: names of those missing that an earlier load of the same model had read.
        places: where what stays on disk is, by name.
        likely: for each missing key that unread tensors of the files fit by their shape, which one it most likely is;
            None if none is likely.
        is_resumed: whether the checkpoint is one of this very model.
        files: where the checkpoint lies.
        stamps: size and time that each of these files had then.
        tensors: the tensors when the load had ended, for as long as anybody else keeps them; not those that torch may
            swap with others.
    """

    stored: set[str]
    missing: set[str]
    total: int
    free: set[str] = field(default_factory=set)
    lasting: dict[str, Finding] = field(default_factory=dict)
    two_ends: dict[str, Finding] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    grown: set[str] = field(default_factory=set)
    altered: set[str] = field(default_factory=set)
    narrowed: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    adapted: set[str] = field(default_factory=set)
    had: set[str] = field(default_factory=set)
    places: dict[str, Any] = field(default_factory=dict)
    likely: dict[str, str | None] = field(default_factory=dict)
    is_resumed: bool = False
    files: list[str] = field(default_factory=list)
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: "dict[str, ref[torch.Tensor]]" = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Record":
        """That of the copy, whose tensors are in the memo by now: a module has its attributes copied in order.

        Of a tensor that the model has no more there is no copy, and the copy is seen to lack it as well.
        """
        theirs = {name: memo[id(own)] for name, tensor in self.tensors.items() if id(own := tensor()) in memo}
        others = {name: tensor for name, tensor in self.tensors.items() if name not in theirs}
        return replace(self, tensors={**others, **refs_to(theirs)})

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # there may be no tiedquiet then; and `torch.load(weights_only=True)` takes this

    @property
    def tied(self) -> set[str]:
        """Names that it did not deliver, of tensors that hold its values all the same."""
        return {key for key in self.missing if key in self.findings and self.findings[key].verdict in WELL}

    def place(self, key: str) -> tuple[object, object] | None:
        """The file on disk, and the name in it, that a key's values are read from whenever they are needed."""
        entry = self.places.get(key)
        return (entry.get("safetensors_file"), entry.get("weight_name")) if entry else None

    def renewed(self, state: Mapping[str, torch.Tensor]) -> "Record":
        """The same once a quantiser has made other tensors of some of these, or of two one; or of a copy made before.

        Args:
            state: the model's tensors by name.
        """
        gone = self.stored - state.keys()
        tensors = refs_to({name: state[name] for name in self.tensors if name not in gone})
        return replace(self, gone=self.gone | gone, tensors=tensors)

    def renamed(self, name: Callable[[str], str | None]) -> "Record":
        """The same of a model inside this one, or under other names.

        Args:
            name: that model's name for each tensor; None for one that is not its own.
        """

        def of_finding(finding: Finding) -> Finding:
            source = finding.source
            if source is not None and finding.verdict not in IN_FILES:
                source = name(source) or source
            return replace(finding, key=new[finding.key], source=source)

        known = self.stored | self.missing | self.lasting.keys() | self.findings.keys()
        new = {key: own for key in known if (own := name(key) if key else key) is not None}
        changed: dict[str, Any] = {}
        for what in ("stored", "missing", "free", "grown", "altered", "narrowed", "gone", "adapted", "had"):
            changed[what] = {new[key] for key in getattr(self, what) if key in new}
        for what in ("places", "likely", "tensors"):
            changed[what] = {new[key]: value for key, value in getattr(self, what).items() if key in new}
        for what in ("lasting", "two_ends", "findings"):
            findings = (of_finding(f) for f in getattr(self, what).values() if f.key in new)
            changed[what] = {finding.key: finding for finding in findings}
        return replace(self, **changed, total=len(changed["stored"]) + len(changed["missing"]))

    def after(self, earlier: "Record") -> "Record":
        """What is known after an earlier load of the same model as well: of its base before an adapter's, say.

        What this load read or missed is its own, whatever the earlier one called it before PEFT wrapped the module that
        it is in; of all else the earlier one tells.
        """
        own = self.stored | self.missing
        own |= set(map(loaded_name, own))
        if self.is_resumed:  # of the whole state dict; a buffer beside it is as it was
            others = {k: f for k, f in earlier.lasting.items() if k not in own and f.verdict is Verdict.UNWRITTEN}
            self.lasting = {**others, **self.lasting}
            return self
        for kept in ("lasting", "two_ends", "findings", "places", "likely", "tensors"):
            setattr(
                self, kept, {**{k: v for k, v in getattr(earlier, kept).items() if k not in own}, **getattr(self, kept)}
            )
        for kept in ("grown", "altered", "narrowed", "free", "gone", "adapted"):
            setattr(self, kept, getattr(self, kept) | (getattr(earlier, kept) - own))
        self.stored = self.stored | (earlier.stored - own)
        self.missing = self.missing | (earlier.missing - own)
        self.total = earlier.total + len(self.stored | self.missing) - len(earlier.stored | earlier.missing)
        self.files = earlier.files + self.files
        self.stamps = earlier.stamps | self.stamps
        return self


def refs_to(tensors: Mapping[str, torch.Tensor]) -> "dict[str, ref[torch.Tensor]]":
    """Weak references to tensors, but for those that `Module.to` swaps with converted ones.

    Torch refuses to swap a tensor that there is a weak reference to, and the program would stop. It swaps those of
    types that consist of other tensors (DTensor, torchao's), and all of them where it is told to.
    """
    if torch.__future__.get_swap_module_params_on_conversion():
        return {}
    return {name: ref(tensor) for name, tensor in tensors.items() if type(tensor) in ORDINARY}


def leave(model: torch.nn.Module, record: Record) -> None:
    """Leave a record on a model."""
    vars(model)[_ATTRIBUTE] = record


def of(module: Any) -> Record | None:
    """The record of a module's own load; None if that was not seen, or it is no module."""
    record = getattr(module, "__dict__", {}).get(_ATTRIBUTE)
    return record if isinstance(record, Record) else None


def loaded_name(name: str) -> str:
    """The name that a tensor had when it was loaded, before PEFT or torch wrapped the module that it is in."""
    return _WRAPPED.sub("", without_wrappers(name))


def parents(name: str) -> Iterator[str]:
    """The names of the modules that something is in."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def is_same_place(name: str, earlier: str) -> bool:
    """Whether two names differ by the layers that were put around one, or taken away, and how its tensor is called."""
    longer, shorter = name.split("."), earlier.split(".")
    return _is_within(shorter[:-1], longer) or _is_within(longer[:-1], shorter)


def _is_within(some: list[str], parts: list[str]) -> bool:
    """Whether all of these parts are among others, in their order."""
    left = iter(parts)
    return all(part in left for part in some)


def without_wrappers(name: str) -> str:
    """The same, of what lies in a layer that is compiled by itself, or whose activations are recomputed."""
    return _OF_TORCH.sub("", name) if "_mod" in name else name


def uncompiled(model: Any) -> Any:
    """The module that `torch.compile` made a model of, or the model, where it has anything besides one of that name.

    PEFT's hands on the attributes of its base, and so is not asked by `getattr`.
    """
    parts = vars(model)
    modules = parts.get("_modules", {})
    is_all = modules.keys() == {"_orig_mod"} and not parts["_parameters"] and not parts["_buffers"]
    return modules["_orig_mod"] if is_all else model


def stored_name(name: str) -> str:
    """The name that a tensor has in the state dict: the hooks of the second of these take its part out of it."""
    return name.replace(_RECOMPUTED, "")
