"""Whether two tensors are the same, one is made of the other, or nobody ever wrote to one."""

from collections.abc import Iterable
from typing import Any

LOUD = ("unread", "untied", "overwritten", "unwritten", "ambiguous")


def equal(a: Any, b: Any) -> bool:
    """Whether two tensors are the same to the bit."""
    from tests.idioms import same

    return b is not None and same(a, b)


def is_made_of(tensor: Any, value: Any) -> bool:
    """Whether a tensor of a file is this one, or goes into it: one value of it at least."""
    import torch

    if value is None:
        return False
    return equal(tensor, value) or bool(torch.isin(tensor.flatten(), value.flatten().to(tensor.dtype)).any())


def is_one_of(tensor: Any, values: Iterable[Any]) -> bool:
    """Whether a tensor is one of these, cast to its type."""
    import torch

    return any(torch.equal(tensor, value.to(tensor.dtype)) for value in values)


def never_written(tensor: Any) -> bool:
    """Whether a tensor holds what `dirty_memory` filled its memory with; of booleans nobody can tell."""
    import torch

    if tensor.is_meta or not tensor.numel() or tensor.dtype == torch.bool:
        return False
    if tensor.is_floating_point():
        return bool(torch.isnan(tensor.detach()).any())
    return bool((tensor == torch.iinfo(tensor.dtype).max).any())
