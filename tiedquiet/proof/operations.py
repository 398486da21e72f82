"""What has to be known of an operation of torch: what it changes, what it makes, and what it reaches for."""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

_aten = torch.ops.aten
_EMPTY = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)
_REACH = (_aten.detach, _aten.is_pinned)  # `.data`, `.detach()`, `.numpy()`; dlpack
_TORCH = {"aten", "prim", "prims"}  # torch's own namespaces: what is defined there declares what it writes to...
_UNDECLARED = "running_mean"  # ... but for this: a batch norm that is training writes to its statistics
# What writes to a tensor without a look at what it held. All else that writes to one in place makes new of old.
_OVERWRITES = {
    "bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_", "random_",
    "set_", "uniform_", "zero_",
}  # fmt: skip
# The same of some elements; which, its other arguments say, but for those with the values.
_OVERWRITES_SOME = {
    "index_copy_", "index_fill_", "index_put_", "masked_fill_", "masked_scatter_", "put_", "scatter_",
}  # fmt: skip
_VALUES = {"source", "src", "value", "values"}


class Operation(NamedTuple):
    """What has to be known of an operator: the arguments that it changes, by place and name, and what it makes."""

    changes: tuple[tuple[int, str], ...]
    writes: bool  # to their memory
    returns_only_these: bool
    reads_these: bool
    overwrites_some: bool
    copies: bool
    makes_empty: bool
    reaches: bool
    may_write: bool  # to any of its arguments, although it does not say so
    takes_values: bool  # of its other arguments, and not their shape alone

    @property
    def only_computes(self) -> bool:
        """Whether it leaves the memory that is there alone, and gives values if it is given some."""
        return not (self.changes or self.makes_empty or self.reaches or self.may_write)


@cache
def operation_of(func: Any) -> Operation | None:
    """None for what has no schema, so that nothing is known of it."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None

    def is_written(value: Any) -> bool:
        return value.alias_info is not None and value.alias_info.is_write

    changes = tuple((place, a.name) for place, a in enumerate(schema.arguments) if is_written(a))
    packet, name = func.overloadpacket, schema.name.rpartition("::")[2]
    overwrites_some = name in _OVERWRITES_SOME and all(a.name != "reduce" for a in schema.arguments)
    is_view = not changes and any(value.alias_info is not None for value in schema.returns)
    overwrites = overwrites_some or name.removeprefix("_foreach_") in _OVERWRITES
    return Operation(
        changes,
        writes=torch.Tag.inplace_view not in func.tags,
        returns_only_these=all(map(is_written, schema.returns)),
        reads_these=not overwrites and not any(a.is_out for a in schema.arguments),
        overwrites_some=overwrites_some,
        copies=packet is _aten.copy_,
        makes_empty=packet in _EMPTY and not changes,
        reaches=packet in _REACH,
        may_write=schema.name.partition("::")[0] not in _TORCH or any(a.name == _UNDECLARED for a in schema.arguments),
        takes_values=not (name.endswith("_like") or name.startswith("new_") or is_view),
    )


def changed_by(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for place, name in operation.changes:
        value = args[place] if place < len(args) else kwargs.get(name)
        found += [value] if isinstance(value, torch.Tensor) else value or ()
    return found


def read_by(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors whose values it computes from."""
    written = set() if operation.reads_these else {word for change in operation.changes for word in change}
    given = chain(enumerate(args), kwargs.items())
    return tensors_in(value for place_or_name, value in given if place_or_name not in written)


def do_likewise(func: Any, args: tuple[Any, ...], written: torch.Tensor) -> None:
    """Set to True, of a map of a tensor's elements, those that an operation gave the tensor values for."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    if given.get("accumulate"):
        return  # it added to what was there
    for name in given.keys() & _VALUES:
        value = given[name]
        given[name] = torch.ones_like(value, dtype=torch.bool) if isinstance(value, torch.Tensor) else True
    given = tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, given)
    func(**{**given, "self": written})


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments or results of an operation."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def returned_by(func: Any, written: list[torch.Tensor]) -> Any:
    """What an operation that returns the tensors it wrote to returns."""
    returned = written[: len(func._schema.returns)]
    return returned[0] if len(returned) == 1 else tuple(returned) or None
