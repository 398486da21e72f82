"""A load that is going on: what was read, and the watch over it. It lives on the model, and leaves its record there."""

import sys
from typing import Any

import torch

from tiedquiet.proof import record
from tiedquiet.proof.judge import judge, writes_elsewhere
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.record import Record
from tiedquiet.proof.survey import tensor_at
from tiedquiet.proof.watch import Watch
from tiedquiet.verdict import Finding

_ATTRIBUTE = "_tiedquiet_load"


class Load:
    """One load of one model.

    Args:
        model: the model whose tensors have just been read.
        reading: what was read.
        protect: let no write to what was read through.
        is_resumed: the checkpoint is one of this very model.

    Attributes:
        known: what is known once it is settled.
        mended: findings that were put right while the checkpoint was being read.
    """

    def __init__(
        self, model: torch.nn.Module, reading: Reading, protect: bool = False, is_resumed: bool = False
    ) -> None:
        self.reading = reading
        self.watch = Watch(reading.read_to, protect)
        self.in_flight = sys.exc_info()[1]
        self.known: Record | None = None
        self.mended: list[Finding] = []
        self._is_resumed = is_resumed
        vars(model)[_ATTRIBUTE] = self

    @staticmethod
    def of(model: torch.nn.Module) -> "Load | None":
        """The load that this model is in the middle of."""
        load = vars(model).get(_ATTRIBUTE)
        return load if isinstance(load, Load) else None

    def __deepcopy__(self, memo: object) -> "Load":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # a model may be unpickled where there is no tiedquiet

    def note_placeholders(self, model: torch.nn.Module, were_on_meta: set[str]) -> None:
        """Note what has just been allocated for tensors that were on meta: memory without values."""
        for name in were_on_meta:
            tensor = tensor_at(model, name)
            if tensor is not None and not tensor.is_meta:
                self.watch.add_placeholder(tensor)

    def on_meta(self, model: torch.nn.Module) -> set[str]:
        """The names of the tensors without values that may get memory: what was not read, and buffers."""
        names = (*self.reading.missing, *self.reading.buffers)
        return {name for name in names if (tensor := tensor_at(model, name)) is not None and tensor.is_meta}

    def settle(self, model: torch.nn.Module, reported: set[str]) -> list[Finding]:
        """Judge it, now that it has ended; what is written from here on is not its business.

        Raises:
            Exception: what went wrong under the watch; after that nothing can be said.
        """
        self.watch.open = False
        if self.known is None:  # what is written afterwards, `repair` writes
            self.watch.writes.update(writes_elsewhere(self.reading, self.watch))
        self.known = judge(model, self.reading, self.watch, reported, self._is_resumed)
        return list(self.known.settled.values())

    def close(self, model: torch.nn.Module) -> None:
        """Leave the record on the model, if it was settled, and nothing else."""
        if vars(model).get(_ATTRIBUTE) is self:
            del vars(model)[_ATTRIBUTE]
        known, self.known = self.known, None
        self.watch = Watch({}, protect=False)  # whoever still holds this load keeps no tensor and no exception alive
        self.reading, self.in_flight = Reading(self.reading.checkpoint, {}, {}, set(), 0), None
        if known is not None:
            earlier = record.of(model)
            record.leave(model, known if earlier is None else known.after(earlier))
