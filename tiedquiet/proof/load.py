"""A load in progress: what was read, and the watch over it. It lives on the model, and leaves its record there."""

import sys
from collections import OrderedDict
from typing import Any

import torch

from tiedquiet.proof import record
from tiedquiet.proof.judge import judge
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import Record
from tiedquiet.proof.stored import writes_elsewhere
from tiedquiet.proof.survey import tensor_at
from tiedquiet.proof.watch import Watch
from tiedquiet.verdict import Finding

_ATTRIBUTE = "_tiedquiet_load"
_MOST_MARKED = 256


class Load:
    """One load of one model.

    Args:
        model: the model whose tensors have just been read.
        reading: what was read.
        protect: let no write to what was read through.
        is_resumed: the checkpoint is one of this very model, whose parameters stay the objects that they are.

    Attributes:
        known: what is known once it is judged.
        mended: findings that were repaired.
        where: where the checkpoint lies, as the loader's report says it.
        reported: the keys that the loader reported missing.
        dropped: those of them that were left out of its report.
        arguments: the model's class, torch's default type while its `__init__` ran, and what that was given: config,
            positional and keyword arguments.
        computed: the buffers that an `__init__` like that computes, once they were asked for.
        is_in_call: whether its watch is left when the call around it returns.
        is_over: whether that has returned.
        is_strict: whether to look at each value that was cast to a smaller type.
    """

    def __init__(
        self, model: torch.nn.Module, reading: Reading, protect: bool = False, is_resumed: bool = False
    ) -> None:
        self.reading = reading
        self.watch = Watch(reading.read_to, protect, reading.is_in_files)
        self.in_flight = sys.exc_info()[1]
        self.known: Record | None = None
        self.mended: list[Finding] = []
        self.where: object = None
        self.reported: set[str] = set()
        self.dropped: set[str] = set()
        self.arguments: tuple[Any, ...] = ()
        self.computed: dict[str, torch.Tensor] | None = None
        self.is_in_call = self.is_over = self.is_strict = False
        self.is_resumed = is_resumed
        vars(model)[_ATTRIBUTE] = self

    @staticmethod
    def of(model: torch.nn.Module) -> "Load | None":
        """The load that this model is in the middle of."""
        load = vars(model).get(_ATTRIBUTE)
        return load if isinstance(load, Load) else None

    def __deepcopy__(self, memo: object) -> "Load":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # as the record is

    def move(self, model: torch.nn.Module, other: torch.nn.Module) -> None:
        """Go on as the load of another model, which was made of this one."""
        del vars(model)[_ATTRIBUTE]
        vars(other)[_ATTRIBUTE] = self

    def may_be_replaced(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The tensors in place of which others may be allocated, by name: buffers, and what was not read."""
        # Buffers first: those are filled in many a way, and of very many tensors not all can be marked.
        names = (*self.reading.buffers, *self.reading.missing)
        return {name: tensor for name in names if (tensor := tensor_at(model, name)) is not None}

    def note_placeholders(self, model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
        """Note what has just been allocated in place of these tensors: unwritten memory, whatever they held.

        What `__init__` makes without a device (`torch.from_numpy`, `torch.FloatTensor`) had its values until then.
        """
        was_open, self.watch.open = self.watch.open, False  # it is not to see how they are marked
        now = ((tensor_at(model, name), earlier) for name, earlier in before.items())
        fresh = [tensor for tensor, earlier in now if tensor is not None and tensor is not earlier]
        with self.watch.aside():
            for number, tensor in enumerate(fresh):
                if not tensor.is_meta:
                    self.watch.placeholders.add(tensor, is_fresh=number < _MOST_MARKED)
        self.watch.open = was_open

    def findings(self, model: torch.nn.Module) -> list[Finding]:
        """Judge it, now that it has ended; later writes do not concern it.

        Raises:
            Exception: what went wrong under the watch; after that nothing can be said.
        """
        if self.watch.open:  # what is written afterwards, `repair` writes
            self.watch.open = False
            self.watch.writes.update(writes_elsewhere(self.watch))
        self.known = None  # what was known before counts for nothing if this fails
        self.known = judge(model, self.reading, self.watch, self.is_resumed, self.is_over, is_strict=self.is_strict)
        return list(self.known.findings.values())

    def close(self, model: torch.nn.Module) -> None:
        """Leave the record on the model, if it was judged, and nothing else."""
        if vars(model).get(_ATTRIBUTE) is self:
            del vars(model)[_ATTRIBUTE]
        known, self.known = self.known, None
        self.watch.open = False
        self.watch.placeholders.take_marks_off()
        self.watch = Watch({}, protect=False)  # a reference to this load keeps no tensor and no exception alive
        self.reading, self.in_flight, self.arguments = Reading(self.reading.checkpoint, {}, {}, set(), 0), None, ()
        self.computed = None
        if known is not None:
            earlier = record.of(model)
            record.leave(model, known if earlier is None else known.after(earlier))
