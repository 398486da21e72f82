"""The ways in which code of a class writes to a tensor while it is loaded."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

Owner = Any


class How(NamedTuple):
    """A way to write.

    Attributes:
        run: called with the module, the name of its tensor, and a row.
        blind: nobody can see it from inside torch; the pages say so.
        turns: how the values lie afterwards, where they are put in another order on purpose.
        min_dims: the fewest dimensions that it needs.
        oblong: whether it needs a shape that is another one backwards.
    """

    run: Callable[[Owner, str, int], None]
    blind: bool = False
    turns: Callable[[torch.Tensor], torch.Tensor] | None = None
    min_dims: int = 1
    oblong: bool = False


def tensor_of(owner: Owner, name: str) -> torch.Tensor:
    return owner._parameters.get(name, owner._buffers.get(name))  # type: ignore[no-any-return]


def _in_thread(write: Callable[[], object]) -> None:
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()


def _data_normal(owner: Owner, name: str, row: int) -> None:
    tensor_of(owner, name).data.normal_(0.0, 0.02)


def _fill(owner: Owner, name: str, row: int) -> None:
    with torch.no_grad():
        tensor_of(owner, name).fill_(0.5)


def _scale(owner: Owner, name: str, row: int) -> None:
    tensor_of(owner, name).data.mul_(0.5)


def _slice(owner: Owner, name: str, row: int) -> None:
    tensor_of(owner, name).data[row : row + 2].fill_(0.25)


def _zero_row(owner: Owner, name: str, row: int) -> None:
    tensor_of(owner, name).data[row].zero_()


def _one_element(owner: Owner, name: str, row: int) -> None:
    with torch.no_grad():
        tensor_of(owner, name).view(-1)[-1] = 7.0


def _copy(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    tensor.data.copy_(torch.randn(tensor.shape, dtype=torch.float32))


def _same_again(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    tensor.data.copy_(tensor.data.clone())


def _numpy(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        tensor = tensor.data.view(torch.int16)
    tensor.detach().numpy()[...] = 3


def _numpy_row(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name).data
    tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    tensor.numpy()[row] = 0


def _dlpack(owner: Owner, name: str, row: int) -> None:
    from_dlpack(tensor_of(owner, name).detach()).fill_(0.75)


def _thread(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)

    def write() -> None:
        with torch.no_grad():
            tensor.fill_(0.5)

    _in_thread(write)


def _thread_data(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    _in_thread(lambda: tensor.data.fill_(0.5))


def _address(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    ctypes.memset(tensor.data_ptr(), 1, tensor.numel() * tensor.element_size())


def _put(owner: Owner, name: str, value: torch.Tensor) -> None:
    if name in owner._parameters:
        setattr(owner, name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        setattr(owner, name, value)


def _replaced(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    _put(owner, name, torch.randn(tensor.shape).to(tensor.dtype))


def _data_replaced(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    tensor.data = torch.randn(tensor.shape).to(tensor.dtype)


def _clone(owner: Owner, name: str, row: int) -> None:
    _put(owner, name, tensor_of(owner, name).detach().clone())


def _to_int8(owner: Owner, name: str, row: int) -> None:
    _put(owner, name, tensor_of(owner, name).detach().to(torch.int8))


def _rounded(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    tensor.data = tensor.data.to(torch.float8_e4m3fn).to(tensor.dtype)


def _to_double(owner: Owner, name: str, row: int) -> None:
    _put(owner, name, tensor_of(owner, name).detach().double())


def _turn(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    tensor.data = tensor.data.permute(*reversed(range(tensor.dim()))).contiguous()


def _turn_view(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name)
    _put(owner, name, tensor.detach().permute(*reversed(range(tensor.dim()))))


def _turned(values: torch.Tensor) -> torch.Tensor:
    return values.permute(*reversed(range(values.dim())))


def _flatten(owner: Owner, name: str, row: int) -> None:
    _put(owner, name, tensor_of(owner, name).detach().reshape(-1))


def _shuffle(owner: Owner, name: str, row: int) -> None:
    """The same memory and shape, read in another order."""
    tensor = tensor_of(owner, name).detach()
    _put(owner, name, tensor.reshape(*reversed(tensor.shape)).permute(*reversed(range(tensor.dim()))))


def _expand_row(owner: Owner, name: str, row: int) -> None:
    tensor = tensor_of(owner, name).detach()
    _put(owner, name, tensor[:1].expand_as(tensor))


WAYS: dict[str, How] = {
    ".data.normal_()": How(_data_normal),
    "fill_()": How(_fill),
    ".data.mul_()": How(_scale),
    "a slice": How(_slice),
    "a row zeroed": How(_zero_row, min_dims=2),
    "one element": How(_one_element),
    ".data.copy_()": How(_copy),
    "the same values": How(_same_again),
    "numpy": How(_numpy),
    "a row by numpy": How(_numpy_row, min_dims=2),
    "dlpack": How(_dlpack),
    "another thread": How(_thread),
    "another thread's .data": How(_thread_data, blind=True),
    "an address": How(_address, blind=True),
    "another parameter": How(_replaced),
    "another .data": How(_data_replaced),
    "a clone": How(_clone),
    "cast to int8": How(_to_int8),
    "rounded to float8 and back": How(_rounded),
    "cast to float64": How(_to_double),
    "turned": How(_turn, turns=_turned, min_dims=2),
    "turned view": How(_turn_view, turns=_turned, min_dims=2),
    "flattened": How(_flatten, turns=lambda values: values.reshape(-1), min_dims=2),
    "read in another order": How(_shuffle, min_dims=2, oblong=True),
    "one row expanded": How(_expand_row, min_dims=2),
}
