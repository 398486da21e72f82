"""Whether a class is the one that a file was made for: at least half of the file should have a place in it."""

from collections.abc import Collection, Sequence
from typing import Any

from tiedquiet.proof import names
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.reading import is_ignored
from tiedquiet.proof.survey import survey

IS_IT = ": is that the right class?"


def left_over(name: str, headers: names.Headers, unplaced: Collection[str]) -> str:
    """What to say if at least half of a file's tensors, or of its bytes, have no place in a model; else empty.

    A class that reads a part of a checkpoint on purpose declares what it ignores, and a head is a small part of one. If
    half of the file is left over, it is for another class, or another number of layers.

    Args:
        name: of the class.
        headers: what the files hold.
        unplaced: the names in the files that the model has no place for, without those that its class says it ignores.
    """
    size = {key: header.numel() * header.element_size() for key, header in headers.items()}
    part, whole = sum(size[key] for key in unplaced), sum(size.values())
    if not unplaced or (2 * len(unplaced) < len(size) and 2 * part < whole):
        return ""
    with_bytes = "" if 2 * len(unplaced) >= len(size) else f", with {part:,} of its {whole:,} bytes,"
    return f"{len(unplaced):,} of {len(size):,} tensors of the file{with_bytes} have no place in {name}"


def of_transformers(model: Any, checkpoint: Checkpoint, conversions: Sequence[Any]) -> str:
    """The same for a model of transformers, by its own renaming and conversion; empty for files that cannot be opened.

    Args:
        model: it.
        checkpoint: the files that it was read from.
        conversions: those that it was loaded with.
    """
    rules = [*names.conversions_of(model), *conversions]
    try:
        headers = checkpoint.headers
    except Exception:
        return ""  # as the comparison says
    placed, renamed = names.targets(model, headers, survey(model).state, rules), names.renamed(model, headers, rules)
    left = [n for n in headers if n not in placed and not is_ignored(model, n) and not is_ignored(model, renamed[n])]
    return left_over(type(model).__name__, headers, left)
