"""Where tensors are in memory, and whether they hold the same: what the proof rests on. Nothing here writes."""

import ctypes
import os
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import permutations
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from tiedquiet.proof.casts import CHUNK, is_at_limit, is_beyond, may_lose, narrows

_MOST_DIMENSIONS = 6  # of what may be held in another order of its dimensions

# Types whose memory is their own: each holds its values, and none has an inner tensor for them.
ORDINARY = (torch.Tensor, torch.nn.Parameter)
_TYPE = attrgetter("dtype")

# Where a tensor was read to: an alias of its memory, or one of each plain tensor that another type consists of.
Place = torch.Tensor | tuple[torch.Tensor, ...]

# Of the C library: `torch.equal` goes from element to element, and of bytes that is a fifth of memory's speed.
_memcmp = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


def plain(tensor: Place) -> list[torch.Tensor]:
    """The plain tensors whose memory holds the values: of a DTensor its local part, of a quantised one its inner ones.

    Of a parameter that DeepSpeed has partitioned it is this process's part. Empty for what is on meta, sparse or empty,
    and for a type that does not tell.
    """
    if isinstance(tensor, tuple):
        return list(tensor)
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


def aliases(tensors: Collection[torch.Tensor]) -> list[Place]:
    """What shares each tensor's memory: it keeps that alive, and knows where it is, whatever `.data` is set to."""
    if are_ordinary(tensors):
        return list(map(torch.Tensor.detach, tensors))
    return [
        tensor.detach()
        if type(tensor) in ORDINARY
        else tuple(piece.as_subclass(torch.Tensor).detach() for piece in plain(tensor))
        for tensor in tensors
    ]


def by_object(tensors: Mapping[str, torch.Tensor]) -> dict[int, list[str]]:
    """The names of each tensor."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    return names_of


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a plain tensor, and the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


class Memory:
    """Which tensors lie where. Sharing a tensor with other processes moves it: then another one has to be made."""

    def __init__(self, tensors: Mapping[str, Place]) -> None:
        self._pieces = sorted(
            ((*_extent(piece), name, piece) for name, tensor in tensors.items() for piece in plain(tensor)),
            key=lambda piece: piece[0],
        )
        self._starts = [start for start, _, _, _ in self._pieces]
        self._reach: list[int] = []  # the furthest end of all pieces up to this one: pieces can lie inside one another
        for _, end, _, _ in self._pieces:
            self._reach.append(max(end, self._reach[-1]) if self._reach else end)
        storages = [piece.untyped_storage() for _, _, _, piece in self._pieces]
        self._places = {storage._cdata: storage.data_ptr() for storage in storages}

    def has_moved(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a plain tensor, in which others lie as well, is elsewhere by now."""
        storage = tensor.untyped_storage()
        return self._places.get(storage._cdata, place := storage.data_ptr()) != place

    def meeting(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Names, and their plain tensors, whose addresses meet those of a plain tensor."""
        start, end = _extent(tensor)
        place = bisect_left(self._starts, end) - 1
        while place >= 0 and self._reach[place] > start:
            its_start, its_end, name, piece = self._pieces[place]
            if its_end > start and piece.device == tensor.device and piece.data_ptr() == its_start:
                yield name, piece
            place -= 1

    def holding(self, tensor: torch.Tensor) -> list[str]:
        """Names of which a plain tensor is the whole, a slice or the transpose: their values in their order."""
        start, _ = _extent(tensor)
        place = bisect_left(self._starts, start + 1) - 1
        if place < 0 or self._reach[place] <= start:
            return []  # the usual answer, given early
        return [name for name, whole in self.meeting(tensor) if _is_in_order(tensor, whole)]


def _is_in_order(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a tensor that meets another's memory has its values in their order, and not just some of its bytes."""
    if tensor.dtype != whole.dtype:
        return False
    offset = (tensor.data_ptr() - whole.data_ptr()) // whole.element_size()
    # Of a square matrix the transpose has the shape of the matrix itself: whether that is meant cannot be seen.
    if whole.dim() == 2 and tensor.shape == whole.shape[::-1] != whole.shape and offset == 0:
        return tensor.stride() == whole.stride()[::-1]
    dims = [(length, stride) for length, stride in zip(whole.shape, whole.stride(), strict=True) if length > 1]
    if len(dims) == 1 and tensor.is_contiguous():
        return 0 <= offset <= (dims[0][0] - tensor.numel()) * dims[0][1] and dims[0][1] == 1
    sizes, place = [1] * len(dims), -1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size > 1:  # a dimension of one has any stride
            place = next((i for i in range(place + 1, len(dims)) if dims[i][1] == stride), len(dims))
            if place == len(dims):
                return False
            sizes[place] = size
    for size, (length, stride) in sorted(zip(sizes, dims, strict=True), key=lambda pair: -pair[1][1]):
        first, offset = divmod(offset, stride) if stride else (-1, 0)
        if first < 0 or first + size > length:
            return False
    return offset == 0


def same(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a plain tensor equals others, cast to its type, to the last bit: NaN is NaN, and -0 is not 0.

    Where that cast may lose something, its own values are cast to the others' type instead; and what is too large for
    its type is not equal.
    """
    if tensor.shape != values.shape:
        return False
    if (both := bytes_of(tensor, values)) is not None:
        return both.equal()
    if may_lose(values.dtype, tensor.dtype):
        if not may_lose(tensor.dtype, values.dtype):
            return same(values, tensor)
        # Unsigned and signed: each has numbers that the other lacks, and what is negative is no number of both.
        one, other = (part.to(torch.int64) for part in (tensor, values))
        return same(one, other) and not bool((one < 0).any())
    if tensor.dtype is values.dtype and tensor.device == values.device:
        return _same_bits(tensor, values)
    chunks = (part.detach().reshape(-1).split(CHUNK) for part in (tensor, values))
    overflows = narrows(values.dtype, tensor.dtype)
    return all(
        _same_bits(left, right.to(left)) and not (overflows and is_at_limit(left) and is_beyond(right, left.dtype))
        for left, right in zip(*chunks, strict=True)
    )


def identical(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a plain tensor equals others to the last bit, and is of their type."""
    return tensor.dtype is values.dtype and same(tensor, values)


def differing(tensor: torch.Tensor, values: torch.Tensor) -> int:
    """How many elements of a plain tensor differ in a bit from others of its shape, cast to its type."""
    if same(tensor, values):
        return 0
    ours, theirs = (
        part.detach()
        .to("cpu", tensor.dtype)
        .resolve_conj()
        .resolve_neg()
        .reshape(-1)
        .contiguous()
        .view(torch.uint8)
        .reshape(tensor.numel(), -1)
        for part in (tensor, values)
    )
    return int((ours != theirs).any(1).sum())


class Bytes(NamedTuple):
    """The memory of two tensors, which is compared without making anything.

    Attributes:
        tensors: the two, which live as long as this.
        start: the first byte of them that is compared.
        length: how many bytes are.
    """

    tensors: tuple[torch.Tensor, torch.Tensor]
    start: int
    length: int

    def equal(self) -> bool:
        """Whether all these bytes are the same; other threads run meanwhile."""
        one, other = (tensor.data_ptr() + self.start for tensor in self.tensors)
        return bool(_memcmp(one, other, self.length) == 0)

    def parts(self, most: int) -> Iterator["Bytes"]:
        """The same in parts of at most so many bytes."""
        for start in range(self.start, self.start + self.length, most):
            yield self._replace(start=start, length=min(most, self.start + self.length - start))


def bytes_of(tensor: torch.Tensor, values: torch.Tensor) -> Bytes | None:
    """The memory of two tensors, if they are the same exactly when that is; else None."""
    if tensor.dtype is not values.dtype or tensor.shape != values.shape or not (_is_bare(tensor) and _is_bare(values)):
        return None
    return Bytes((tensor, values), 0, tensor.nbytes)


def _is_bare(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are the bytes at its address, one after the other, in this process's memory."""
    return (
        type(tensor) in ORDINARY
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        # FSDP 1 frees the memory of a tensor that it has parted.
        and tensor.untyped_storage().nbytes() >= tensor.storage_offset() * tensor.element_size() + tensor.nbytes
    )


def _same_bits(*pair: torch.Tensor) -> bool:
    """Whether two tensors of one type and size are equal to the last bit; of what is contiguous, nothing is copied."""
    # Not reshape, which leaves one element its stride, whatever that is. A view that is conjugated or negated as it is
    # read has no bytes of its own.
    plainly = (tensor.detach().resolve_conj().resolve_neg().contiguous() for tensor in pair)
    one, other = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in plainly)
    both = bytes_of(one, other)
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if both is None else both.equal()


def equals(tensor: Place, values: Place) -> bool | None:
    """Whether a tensor has these values in their order, cast to its type; None where that cannot be told."""
    pieces, wanted = plain(tensor), plain(values)
    if len(pieces) != len(wanted) or not pieces:
        return None
    return all(map(same, pieces, wanted))


def is_copy(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a tensor has the values of another in their order, or is the transpose of one that is not square."""
    turned = values.dim() == 2 and tensor.shape == values.shape[::-1] != values.shape
    return bool(equals(tensor.t() if turned else tensor, values))


def holds(tensor: Place, values: Place) -> bool | None:
    """Whether all of `values` are still there: cast, permuted, reshaped, or with rows appended to them.

    Permuted means with its dimensions in another order, like a transposed matrix; a convolution may then be flattened.

    None where that cannot be told.
    """
    pieces, wanted = plain(tensor), plain(values)
    if len(pieces) != 1 or len(wanted) != 1:
        return equals(tensor, values)
    now, before = pieces[0], wanted[0]
    if now.dim() == before.dim() > 0 and now.shape[1:] == before.shape[1:] and len(now) > len(before):
        return same(now[: len(before)], before)
    if now.numel() != before.numel():
        return None if now.numel() > before.numel() else False
    if same(now.reshape(-1), before.reshape(-1)):
        return True
    if not 1 < before.dim() <= _MOST_DIMENSIONS:
        return False
    turned = (before.permute(order) for order in permutations(range(before.dim())))
    fitting = (other for other in turned if _is_flattened(now.shape, other.shape))
    return any(_has_first(now, other) and same(now.reshape(other.shape), other) for other in fitting)


def _is_flattened(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether a shape is another one, or what is left of it when neighbouring dimensions are made one.

    A matrix that is transposed and given its own shape again has its values in nobody's order.
    """
    left = [size for size in whole if size != 1]
    for size in shape:
        product = 1
        while product < size and left:
            product *= left.pop(0)
        if product != size:
            return False
    return not left


def _has_first(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a tensor begins with the first of what other dimensions make of values: to make all of it takes long."""
    first = values[:1].reshape(-1)
    return same(tensor.reshape(-1)[: len(first)], first)


def types_of(tensors: Iterable[Any]) -> list[torch.dtype]:
    """The type of each, asked without a step of Python for each."""
    return list(map(_TYPE, tensors))


def are_ordinary(values: Iterable[object]) -> bool:
    """Whether each is a tensor of torch's own two types."""
    return set(map(type, values)).issubset(ORDINARY)


def all_lie_at(tensors: Collection[Any], read: Collection[Any]) -> bool:
    """Whether each lies where it was read to, asked of all at once.

    Args:
        tensors: tensors, or None where there is none.
        read: their places, in the same order.

    Returns:
        False also where that has to be asked of each by itself.
    """
    if not (are_ordinary(tensors) and are_ordinary(read)):
        return False
    types = types_of(tensors)
    if types != types_of(read) or any(dtype.is_complex for dtype in set(types)):
        return False
    try:
        return all(map(torch.Tensor.is_set_to, tensors, read))
    except RuntimeError:  # what is on meta lies nowhere, and what is sparse does not tell
        return False


def lies_at(tensor: torch.Tensor, read: Place) -> bool:
    """Whether it is the same view of the same memory: a square matrix that was transposed has the address, too."""
    if isinstance(read, tuple):
        pieces = plain(tensor)
        return len(pieces) == len(read) and all(map(lies_at, pieces, read))
    if tensor.is_conj() is not read.is_conj() or tensor.is_neg() is not read.is_neg():
        return False
    if type(tensor) is torch.nn.Parameter and not tensor.is_meta and not read.is_meta:
        return tensor.is_set_to(read) and tensor.dtype is read.dtype  # the same in one call
    return (
        tensor.data_ptr() == read.data_ptr()
        and tensor.shape == read.shape
        and tensor.stride() == read.stride()
        and tensor.dtype is read.dtype
    )
