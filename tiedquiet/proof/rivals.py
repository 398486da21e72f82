"""What the files of a checkpoint have in more than one way for one tensor of a model: a loader drops all but one."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from tiedquiet.proof import names
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import Place, equals, identical
from tiedquiet.verdict import Finding, Verdict


def has_more(checkpoint: Checkpoint, held: Collection[torch.Tensor], is_merged: bool) -> bool:
    """Whether the files have more than was read, by numbers that are known at once.

    Args:
        checkpoint: the files.
        held: what was read. Where the loader reported a tensor that it did not read, this need not be asked.
        is_merged: tensors may have been merged or split while they were read, so that their elements are to be counted.
    """
    if is_merged:
        return checkpoint.elements > sum(map(torch.numel, held))
    return checkpoint.count > len(held)


def judge_ways(
    model: Any,
    key: str,
    place: Place,
    headers: names.Headers,
    conversions: Sequence[Any],
    read: Callable[[str], torch.Tensor],
) -> Finding | None:
    """A finding on a tensor for which the files have several names that differ; None where they are all the same.

    Args:
        model: the model.
        key: the model's name.
        place: where it was read to.
        headers: what the files have for it, and nothing else.
        conversions: what the loader renamed and converted.
        read: gives the tensor that the files have under a name.
    """
    state = {key: next(iter(headers.values()))}
    made = names.converted(model, headers, state, conversions, read)
    ways = [(origin.names[0], tensor) for _, origin, tensor in made]
    if all(identical(tensor, ways[0][1]) for _, tensor in ways):
        return None
    won = next((way for way in ways if equals(place, way[1])), ways[0])
    lost = next(name for name, tensor in ways if not identical(tensor, won[1]))
    return Finding(key, Verdict.AMBIGUOUS, won[0], f"not of {lost}: the file has both", True)
