"""What the installed Trainer would read of its own checkpoint on resume.

It loads the file's names as they are, without the renaming and conversion that `from_pretrained` applies.
"""

from typing import Any, NamedTuple

from tiedquiet.gate.components import Part
from tiedquiet.proof import names
from tiedquiet.proof.files import of_folder
from tiedquiet.proof.survey import survey


class Resume(NamedTuple):
    """How much of a checkpoint a Trainer reads.

    Attributes:
        read: how many of its tensors.
        stored: how many `from_pretrained` reads.
    """

    read: int
    stored: int

    def __str__(self) -> str:
        said = f"Trainer would read {self.read:,} of {self.stored:,} tensors on resume"
        return said if self.read == self.stored else f"{said}; TIEDQUIET=repair reads all"


def of_trainer(part: Part, model: Any) -> Resume | None:
    """What a Trainer would read of a folder, by names; None where the folder is no checkpoint of one.

    Of an adapter it reads what peft reads.
    """
    if part.name or part.base or not part.source.is_local or part.source.file("trainer_state.json") is None:
        return None
    checkpoint, state = of_folder(part.source.name), survey(model).state
    conversions = [*names.conversions_of(model)]
    stored = names.targets(model, checkpoint.headers, state, conversions)
    return Resume(sum(name in state for name in stored), len(stored))
