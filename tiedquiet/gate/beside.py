"""Weights next to the file that a loader reads, with other values: one of the two is out of date."""

from collections.abc import Sequence
from pathlib import Path

from tiedquiet.gate.printing import few
from tiedquiet.gate.weights import Weights, pickles_are_unsafe
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import same
from tiedquiet.verdict import Finding, Verdict


def rivals(forms: Sequence[Weights], trust: bool = False) -> tuple[list[Finding], list[str]]:
    """Compare the other forms of a folder's weights with the one that is read.

    Args:
        forms: what the folder holds them in, that which is read first.
        trust: open a pickle with any torch.

    Returns:
        A finding for each that differs, and a note for each that is newer and must not be opened.
    """
    findings, notes = [], []
    others = [*forms[1:], *map(_unlisted, forms[:1])]
    for first, other in ((forms[0], other) for other in others if forms[0].files and other.files):
        if other.is_pickle and not trust and pickles_are_unsafe():
            if _written(other) > _written(first):
                notes.append(
                    f"{other.name} is newer than {first.name}, which is read; it was not opened: it is a pickle"
                )
        elif differs := _difference(first, other, other in forms):
            why = f"{first.name} is read, and {other.name} beside it {differs}"
            findings.append(Finding("", Verdict.AMBIGUOUS, first.name, why, True, "Delete the one that is out of date"))
    return findings, notes


def _unlisted(first: Weights) -> Weights:
    """The shards beside those that are read, of as many, that the index does not name."""
    files = Checkpoint(None, list(map(str, first.files))).unlisted().files
    return first._replace(name=few([Path(path).name for path in files]), files=tuple(map(Path, files)))


def _difference(first: Weights, other: Weights, is_form: bool) -> str:
    """How the values of two forms differ, as a clause; empty where they do not, or one of them is damaged.

    Args:
        first: what is read.
        other: what is not.
        is_form: whether it should be the same once more; what a shard has that the others lack is told by the load.
    """
    ours, theirs = (Checkpoint(None, [str(path) for path in form.files]) for form in (first, other))
    try:
        both = [name for name in theirs.tensors if name in ours.tensors]
        changed = sum(not same(ours.tensors[name](), theirs.tensors[name]()) for name in both)
        others = len(theirs.tensors) - len(both)
    except Exception:  # nobody reads it
        return ""
    age = "newer" if _written(other) > _written(first) else "older"
    if changed:
        return f"is {age} and has other values for {changed:,} of {len(both):,} tensors"
    if not is_form or not others or both:
        return ""
    return f"is {age} and has {others:,} tensor{'s' * (others > 1)} under other names"


def _written(form: Weights) -> float:
    return max(Path(path).stat().st_mtime for path in form.files)
