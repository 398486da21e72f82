"""What a cast from one type to another can lose, and whether it lost it: numbers too large, fractions, a sign."""

import torch

from tiedquiet.verdict import Finding, Verdict

CHUNK = 1 << 22  # elements that are cast and compared at once


def cast_finding(key: str, stored: torch.dtype, ours: torch.dtype, is_too_large: bool = False) -> Finding:
    """The finding on a key that the type of the model's tensor cannot hold as the file has it.

    Args:
        key: its name in the model.
        stored: the type in the file.
        ours: that of the model's tensor.
        is_too_large: whether it is for the size of the numbers.
    """
    theirs, own = (str(kind).removeprefix("torch.") for kind in (stored, ours))
    why = (
        f", which is too small for values that the file has as {theirs}"
        if is_too_large
        else f": the file has it as {theirs}"
    )
    return Finding(key, Verdict.OVERWRITTEN, key, f"by the cast to {own}{why}", True, cure_of_cast(stored, ours))


def may_lose(stored: torch.dtype, ours: torch.dtype) -> bool:
    """Whether a cast from one type to the other can lose more than the last digits of a number.

    That is fractions, an imaginary part, or whole numbers that are too large for a smaller type.
    """
    if ours.is_floating_point or ours.is_complex:
        return stored.is_complex and not ours.is_complex
    return stored != ours and (stored.is_floating_point or stored.is_complex or not _contains(ours, stored))


def _contains(ours: torch.dtype, stored: torch.dtype) -> bool:
    """Whether one type of whole numbers has all numbers of another."""
    if torch.bool in (ours, stored):
        return stored is torch.bool
    outer, inner = torch.iinfo(ours), torch.iinfo(stored)
    return outer.min <= inner.min and outer.max >= inner.max


def cure_of_cast(stored: torch.dtype, ours: torch.dtype) -> str:
    """What to do about a cast that lost values: `dtype=` sets the type of floating tensors, and of no others."""
    if stored.is_complex or not ours.is_floating_point:
        return f"Give it the type {stored} in the model's class"
    return f"Load it with dtype={stored if stored.is_floating_point else torch.float32}"


def narrows(stored: torch.dtype, ours: torch.dtype) -> bool:
    """Whether a cast to a floating type can make finite values infinite: float32's largest are too large for bfloat16.

    What can lose more than that is told by `may_lose`.
    """
    if not ours.is_floating_point or stored.is_complex or stored is torch.bool:
        return False
    info = torch.finfo(stored) if stored.is_floating_point else torch.iinfo(stored)
    return bool(info.max > torch.finfo(ours).max)


def is_at_limit(tensor: torch.Tensor) -> bool:
    """Whether a floating tensor has values that its type makes of numbers too large for it; copies nothing large."""
    if not tensor.dtype.is_floating_point or not tensor.numel() or tensor.is_meta:
        return False
    low, high = (tensor.float() if tensor.element_size() == 1 else tensor).detach().aminmax()
    limit = torch.finfo(tensor.dtype).max
    return not (-limit < float(low) and float(high) < limit)


def is_beyond(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values are too large for a floating type, which makes them infinite, NaN or its largest."""
    parts = values.detach().reshape(-1).split(CHUNK) if values.numel() else ()
    return any(_is_part_beyond(part, torch.finfo(dtype)) for part in parts)


def _is_part_beyond(values: torch.Tensor, limit: torch.finfo) -> bool:
    # Of whole numbers and of eight bits torch does not say what is finite; and not every device has double.
    values = values.cpu().double()
    low, high = values.aminmax()
    if -limit.max <= float(low) and float(high) <= limit.max:
        return False  # the usual answer, given early
    is_cut = ~values.to(getattr(torch, limit.dtype)).double().isfinite() | (values.abs() > limit.max * (1 + limit.eps))
    return bool((values.isfinite() & is_cut).any())
