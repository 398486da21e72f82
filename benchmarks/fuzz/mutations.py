"""Rules of the proof that can be taken away, each at its seam. A seam that is not there is an error, never a pass."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock


class Seam(NamedTuple):
    """What is replaced: a name in a module (`Class.method` for a method), and by what.

    Attributes:
        module: the module.
        name: the name in it.
        make: from the original to what takes its place.
    """

    module: str
    name: str
    make: Callable[[Any], Any]


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda original: lambda *args, **kwargs: value


def _nowhere(original: Any) -> Any:
    """`find_unread`: nothing is found."""
    return lambda *args, **kwargs: None


def _memory_alone(original: Any) -> Any:
    """`Memory.holding`: whoever lies in the memory, in whatever order, and whether or not it has gaps."""

    def holding(self: Any, tensor: Any) -> list[str]:
        return [name for name, _ in self.meeting(tensor)]

    return holding


def _kept_shut(original: Any) -> Any:
    """`Watch.__enter__`: entered, and closed at once."""

    def enter(self: Any) -> Any:
        result = original(self)
        self.open = False
        return result

    return enter


def _unmarked(original: Any) -> Any:
    """`Placeholders.add`: nothing is marked."""
    return lambda self, tensor, is_fresh=True: original(self, tensor, False)


def _until_the_report(original: Any) -> Any:
    """`_filter`: what comes after the report is nobody's business."""

    def until(load: Any, bound: Any) -> Any:
        result = original(load, bound)
        load.watch.open = False
        return result

    return until


def _plain_arguments(original: Any) -> Any:
    """`_tensors_of_twins`: made with a config alone."""
    return lambda arguments: original((*arguments[:3], (), {}))


def _unguarded(original: Any) -> Any:
    """`Watch.__init__`: writes are let through in `repair` as well."""

    def init(self: Any, stored: Any, protect: bool, *more: Any) -> None:
        original(self, stored, False, *more)

    return init


_PROOF = "tiedquiet.proof"
TABLE: dict[str, tuple[Seam, ...]] = {
    "any zeroed row is padding": (Seam(f"{_PROOF}.stored", "is_padding", _always(True)),),
    "no cast loses anything": (
        Seam(f"{_PROOF}.memory", "may_lose", _always(False)),
        Seam(f"{_PROOF}.unread", "may_lose", _always(False)),
        Seam(f"{_PROOF}.reading", "narrows", _always(False)),
        Seam(f"{_PROOF}.memory", "narrows", _always(False)),
    ),
    "what lies in the memory is the weight": (Seam(f"{_PROOF}.memory", "Memory.holding", _memory_alone),),
    "what lies where it was read is the same view": (
        Seam(f"{_PROOF}.stored", "lies_at", lambda original: lambda a, b: a.data_ptr() == b.data_ptr()),
    ),
    "asked of all at once, all lie where they were read": (Seam(f"{_PROOF}.stored", "all_lie_at", _always(True)),),
    "every replacement holds the values": (Seam(f"{_PROOF}.stored", "holds", _always(True)),),
    "nothing is looked for among what was not read": (
        Seam("tiedquiet.doors.from_pretrained", "find_unread", _nowhere),
    ),
    "no headers are asked for": (Seam("tiedquiet.doors.from_pretrained", "needs_headers", _always(False)),),
    "no memory counts as unwritten": (Seam(f"{_PROOF}.placeholders", "Placeholders.has", _always(False)),),
    "what is computed from unwritten memory is written": (
        Seam(f"{_PROOF}.watch", "Watch._takes_from_placeholders", _always(False)),
    ),
    "unwritten memory is not marked": (Seam(f"{_PROOF}.placeholders", "Placeholders.add", _unmarked),),
    "no count of other threads' writes": (Seam(f"{_PROOF}.watch", "Watch.written_elsewhere", _always([])),),
    "the watch ends with the report": (Seam("tiedquiet.doors.from_pretrained", "_filter", _until_the_report),),
    "a class's own from_pretrained is not looked at": (
        Seam("tiedquiet.doors.from_pretrained", "wrap_overrides", _always(None)),
    ),
    "a twin is made of the config alone": (Seam(f"{_PROOF}.repair", "_tensors_of_twins", _plain_arguments),),
    "no value is too large for its type": (Seam(f"{_PROOF}.stored", "is_at_limit", _always(False)),),
    "the watch is shut": (Seam(f"{_PROOF}.watch", "Watch.__enter__", _kept_shut),),
    "no rival among the ends of a tie": (Seam(f"{_PROOF}.missing", "rival_of", _always(None)),),
    "two ends that differ are no finding": (Seam(f"{_PROOF}.judge", "judge_two_ends", _always(())),),
    "every constant is a value": (Seam(f"{_PROOF}.missing", "_is_constant", _always(False)),),
    "repair lets writes through": (Seam(f"{_PROOF}.watch", "Watch.__init__", _unguarded),),
    "repair leaves what took a tensor's place": (Seam(f"{_PROOF}.repair", "_put_back", _always(None)),),
    "the twin's buffers are zero": (
        Seam(
            f"{_PROOF}.repair",
            "_tensors_of_a_twin",
            lambda original: lambda *args: {name: value * 0 for name, value in original(*args).items()},
        ),
    ),
    "a head is always a new one": (Seam(f"{_PROOF}.missing", "_is_new_head", _always(True)),),
    "ties are declared by nobody": (Seam(f"{_PROOF}.survey", "groups", _always({})),),
}


@contextmanager
def removed(name: str) -> Iterator[None]:
    """Take a rule away.

    Args:
        name: a name of the table; empty for none.

    Raises:
        LookupError: no such rule, or its seam is not there: the table has to follow the proof.
    """
    with ExitStack() as stack:
        for seam in TABLE[name] if name else ():
            module = importlib.import_module(seam.module)
            *owners, last = seam.name.split(".")
            owner: Any = module
            for part in owners:
                owner = getattr(owner, part, None)
            if owner is None or last not in vars(owner):
                raise LookupError(f"rule {name!r}: {seam.module} has no {seam.name}; benchmarks/fuzz/mutations.py")
            stack.enter_context(mock.patch.object(owner, last, seam.make(vars(owner)[last])))
        yield
