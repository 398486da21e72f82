"""Tensors, where they lie, and whether they hold the same: what the proof stands on. Nothing here writes."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping

import torch

_CHUNK = 1 << 22  # elements compared at once: a comparison may make a mask as large as what it compares


def plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors whose memory holds the values: of a DTensor its local part, of a quantised one its inner ones.

    Of a parameter that DeepSpeed has partitioned it is this process's part. Empty for what is on meta, sparse or empty,
    and for a type that does not tell.
    """
    if (kind := type(tensor)) is not torch.nn.Parameter and kind is not torch.Tensor:
        if hasattr(kind, "__tensor_flatten__"):
            inner, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            parts = (getattr(tensor, name) for name in inner)
            return [piece for part in parts if isinstance(part, torch.Tensor) for piece in plain(part)]
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return []
    if (part := getattr(tensor, "ds_tensor", None)) is not None:
        return [part.detach()]
    return [tensor] if not tensor.is_meta and tensor.layout is torch.strided and tensor.numel() else []


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a plain tensor, and the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


class Memory:
    """Which tensors lie where."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._pieces = sorted(
            ((*_extent(piece), name, piece) for name, tensor in tensors.items() for piece in plain(tensor)),
            key=lambda piece: piece[0],
        )
        self._starts = [start for start, _, _, _ in self._pieces]
        self._reach: list[int] = []  # the furthest end of all pieces up to this one: pieces can lie inside one another
        for _, end, _, _ in self._pieces:
            self._reach.append(max(end, self._reach[-1]) if self._reach else end)

    def meeting(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Names, and their plain tensors, whose addresses meet those of a plain tensor."""
        start, end = _extent(tensor)
        place = bisect_left(self._starts, end) - 1
        while place >= 0 and self._reach[place] > start:
            _, its_end, name, piece = self._pieces[place]
            if its_end > start and piece.device == tensor.device:
                yield name, piece
            place -= 1

    def holding(self, tensor: torch.Tensor) -> list[str]:
        """Names whose memory holds the whole of a plain tensor: it is the same tensor, or a view of it."""
        start, end = _extent(tensor)
        place = bisect_left(self._starts, start + 1) - 1
        if place < 0 or self._reach[place] <= start:
            return []  # the usual answer, given early
        found = []
        for name, whole in self.meeting(tensor):
            first, last = _extent(whole)
            if whole.dtype == tensor.dtype and first <= start and end <= last:
                size = whole.element_size()
                if whole.numel() * size < last - first:  # it has gaps, in which another tensor may lie
                    marks = torch.zeros((last - first) // size, dtype=torch.bool)
                    marks.as_strided(whole.shape, whole.stride())[...] = True
                    if not marks.as_strided(tensor.shape, tensor.stride(), (start - first) // size).all():
                        continue
                found.append(name)
        return found


def loses(stored: torch.dtype, ours: torch.dtype) -> bool:
    """Whether a cast from one type to the other cannot but lose values: fractions, or an imaginary part."""
    return (stored.is_floating_point and not (ours.is_floating_point or ours.is_complex)) or (
        stored.is_complex and not ours.is_complex
    )


def same(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a plain tensor equals others, cast to its type, to the last bit: NaN is NaN, and -0 is not 0.

    Where its type cannot but lose values, it is cast to theirs instead; what becomes infinite is not equal.
    """
    if tensor.shape != values.shape:
        return False
    if loses(values.dtype, tensor.dtype):
        return same(values, tensor)
    chunks = (part.detach().reshape(-1).split(_CHUNK) for part in (tensor, values))
    overflows = narrows(values.dtype, tensor.dtype)
    return all(
        torch.equal(left.contiguous().view(torch.uint8), (cast := right.to(left)).contiguous().view(torch.uint8))
        and not (overflows and bool((cast.isinf() & right.to(left.device).isfinite()).any()))
        for left, right in zip(*chunks, strict=True)
    )


def narrows(stored: torch.dtype, ours: torch.dtype) -> bool:
    """Whether a cast from one floating type to the other can make finite values infinite.

    Not bfloat16 from float32, whose largest numbers are nearly the same.
    """
    both = stored.is_floating_point and ours.is_floating_point
    return both and torch.finfo(stored).max > 2 * torch.finfo(ours).max


def holds(tensor: torch.Tensor, values: torch.Tensor) -> bool | None:
    """Whether all of `values` are still there: cast, transposed, reshaped, or with rows appended to them.

    None where that cannot be told.
    """
    pieces, wanted = plain(tensor), plain(values)
    if len(pieces) != len(wanted) or not pieces:
        return None
    if len(pieces) > 1:
        return all(map(same, pieces, wanted))
    now, before = pieces[0], wanted[0]
    if now.dim() == before.dim() > 0 and now.shape[1:] == before.shape[1:] and len(now) >= len(before):
        return same(now[: len(before)], before)
    if now.shape == before.shape[::-1]:
        return same(now.t(), before)
    if now.numel() == before.numel():
        return same(now.reshape(-1), before.reshape(-1))
    return None if now.numel() > before.numel() else False


def lies_at(tensor: torch.Tensor, read: torch.Tensor) -> bool:
    """Whether it is the same view of the same memory: a square matrix that was transposed has the address, too."""
    return tensor is read or (
        tensor.data_ptr() == read.data_ptr()
        and tensor.shape == read.shape
        and tensor.stride() == read.stride()
        and tensor.dtype is read.dtype
    )
