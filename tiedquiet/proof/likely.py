"""Which tensor of the files a missing key most likely is: of those of its shape, by what is alike in their names."""

from collections.abc import Iterable, Sequence

import torch

from tiedquiet.proof.names import MOST_TRIED, Headers


def in_common(key: str, name: str) -> tuple[int, int]:
    """How many parts at the end of two names are the same; and how many wherever they are."""
    ours, theirs = key.split(".")[::-1], name.split(".")[::-1]
    end = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), len(ours))
    return end, len(set(ours) & set(theirs))


def most_alike(name: str, others: Iterable[str]) -> list[str]:
    """Those of several names that have as much in common with one as any."""
    common = {other: in_common(other, name) for other in others}
    most = max(common.values())
    return [other for other, one in common.items() if one == most]


def by_shape(unread: Headers) -> dict[torch.Size, list[str]]:
    """The names of all tensors of each shape."""
    found: dict[torch.Size, list[str]] = {}
    for name, header in unread.items():
        found.setdefault(header.shape, []).append(name)
    return found


def likely(key: str, alike: Sequence[str]) -> str | None:
    """The unread tensor of the files that a missing key most likely is: the one with the longest common end.

    Args:
        key: the missing key.
        alike: those of its shape.
    """
    if not alike or len(alike) > MOST_TRIED:
        return None  # one of very many is not likely
    best = most_alike(key, alike)[0]
    return best if in_common(key, best)[0] else None
