"""What lies where, what holds what, and what a checkpoint's files hold."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import (
    Memory,
    aliases,
    all_lie_at,
    bytes_of,
    differing,
    equals,
    holds,
    is_copy,
    lies_at,
    plain,
    same,
)

ROWS = torch.arange(12.0).view(4, 3)


def test_the_plain_tensors_behind_a_tensor() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert len(plain(nested)) >= 1, "a wrapper that tells"
    assert plain(ROWS) == [ROWS]
    for nothing in (ROWS.to_sparse(), ROWS.to("meta"), torch.empty(0)):
        assert plain(nothing) == []


class Named(torch.Tensor):
    """A type of somebody's own, with the memory of a plain tensor."""


class Opaque(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_a_type_that_does_not_tell_has_no_memory_that_is_known() -> None:
    assert plain(torch.Tensor._make_subclass(Opaque, ROWS)) == []


@pytest.mark.parametrize(
    ("tensor", "inside"),
    [
        (lambda whole: whole, True),
        (lambda whole: whole[1:3], True),
        (lambda whole: whole.t(), True),
        (lambda whole: whole[2], True),
        (lambda whole: whole[:, 1:], True),
        (lambda whole: whole[1:3, :2], True),
        (lambda whole: whole.view(2, 6), False),
        (lambda whole: whole.view(3, 4).t(), False),
        (lambda whole: whole[:3].t(), False),
        (lambda whole: whole[1:2].expand(4, 3), False),
        (lambda whole: whole[:, ::2], False),
        (lambda whole: whole.view(torch.int32), False),
        (lambda whole: torch.ones(2), False),
        (lambda whole: torch.as_strided(whole, (3,), (1,), 11), False),
    ],
    ids=[
        "itself",
        "rows",
        "transposed",
        "a row",
        "columns",
        "a block",
        "reshaped",
        "scrambled",
        "a square turned",
        "one row expanded",
        "every second column",
        "another type",
        "elsewhere",
        "beyond the end",
    ],
)
def test_a_view_is_the_same_weight_if_it_has_its_values_in_order(tensor, inside: bool) -> None:  # type: ignore[no-untyped-def]
    memory = torch.arange(16.0)
    whole = memory[:12].view(4, 3)
    assert (Memory({"whole": whole}).holding(tensor(whole)) == ["whole"]) is inside


def test_views_with_other_dimensions_or_of_another_view() -> None:
    whole = torch.arange(12.0).view(4, 3)
    memory = Memory({"whole": whole, "left": whole[:, :2], "flat": whole.view(-1), "one": whole[:, 2:]})
    assert sorted(memory.holding(whole[1:, :2])) == ["left", "whole"]
    assert sorted(memory.holding(whole[:2])) == ["flat", "whole"], "left has no third column"
    assert sorted(memory.holding(whole[:, 2])) == ["one", "whole"]
    assert memory.holding(whole.view(12)[4:7]) == ["flat"], "from the middle of one row to that of the next"
    turned = whole.t()
    assert Memory({"turned": turned}).holding(turned[:, 1:]) == ["turned"]
    assert Memory({"one": whole[:1, :1].expand(4, 3)}).holding(whole[:1, :1]) == []
    assert [name for name, _ in Memory({"even": whole[:, ::2]}).meeting(whole[:, 1:2])] == ["even"], "addresses meet"


def halved(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.half().float()


def reread_as_whole_numbers(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.view(torch.int32)


def turned(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.t()


def moved_by_one(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.reshape(-1).roll(1).view(3, 3)


def negated(tensor: torch.Tensor) -> None:
    tensor.data = torch._neg_view(tensor.data)


@pytest.mark.parametrize("change", [halved, reread_as_whole_numbers, turned, moved_by_one, negated])
@pytest.mark.parametrize("among", [0, 7])
@pytest.mark.parametrize("as_parameter", [True, False])
def test_all_at_once_or_one_by_one_a_tensor_that_was_changed_lies_elsewhere(
    change: Any, among: int, as_parameter: bool
) -> None:
    plainly = [torch.arange(9.0).view(3, 3) for _ in range(8)]
    tensors = [torch.nn.Parameter(tensor, requires_grad=False) if as_parameter else tensor for tensor in plainly]
    read = [tensor.detach() for tensor in tensors]
    assert all_lie_at(tensors, read)
    change(tensors[among])
    assert not all_lie_at(tensors, read)
    assert [lies_at(*pair) for pair in zip(tensors, read, strict=True)] == [n != among for n in range(8)]


def test_conjugated_in_its_place_it_has_other_values() -> None:
    tensor = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 4j]), requires_grad=False)
    read = tensor.detach()
    assert lies_at(tensor, read)
    tensor.data = tensor.data.conj()
    assert tensor.data_ptr() == read.data_ptr()
    assert not lies_at(tensor, read)
    assert not all_lie_at([tensor], [read])
    assert not same(tensor, read)
    assert same(tensor, read.clone().conj_physical())
    assert differing(tensor, read) == 2
    imaginary = read.conj().imag  # negated as it is read
    assert same(imaginary, torch.tensor([-2.0, 4.0]))
    assert not same(imaginary, torch.tensor([2.0, -4.0]))


@pytest.mark.parametrize(
    "odd",
    [None, ROWS.to("meta"), ROWS.to_sparse(), ROWS.to(torch.complex64), torch.Tensor._make_subclass(Named, ROWS)],
    ids=["gone", "on meta", "sparse", "complex", "of another type"],
)
def test_what_must_be_asked_by_itself_is_not_answered_for_all(odd: Any) -> None:
    assert not all_lie_at([ROWS, odd], [ROWS.detach(), odd])


def test_tensors_that_lie_in_one_another_are_all_found() -> None:
    memory = torch.arange(100.0)
    tensors = {"all": memory, "first": memory[:10], "middle": memory[40:60], "last": memory[90:]}
    assert sorted(name for name, _ in Memory(tensors).meeting(memory[45:95])) == ["all", "last", "middle"]
    assert list(Memory({}).meeting(memory)) == []


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (ROWS.clone(), True),
        (ROWS.to(torch.float16), True),
        (ROWS.t().contiguous(), True),
        (ROWS.reshape(2, 6), True),
        (ROWS.flip(0), False),
        (ROWS[[0, 1, 2, 2]], False),
        (torch.cat([ROWS, torch.ones(1, 3)]), True),
        (ROWS + 1, False),
        (ROWS[:3], False),
        (torch.cat([torch.ones(1, 4, 3), ROWS[None]]), None),
        (ROWS.to_sparse(), None),
    ],
    ids=[
        "copy",
        "cast",
        "transposed",
        "reshaped",
        "upside down",
        "a row lost",
        "rows appended",
        "other",
        "cut",
        "larger",
        "unreadable",
    ],
)
def test_whether_all_values_are_still_there(tensor: torch.Tensor, expected: bool | None) -> None:
    assert holds(tensor, ROWS) is expected


def test_a_wrapper_is_compared_part_by_part() -> None:
    one, two = (
        torch.nested.nested_tensor([torch.full((2,), v), torch.ones(3)], layout=torch.jagged) for v in (1.0, 2.0)
    )
    assert holds(one, one.clone()) is True
    if len(plain(one)) == len(plain(two)):
        assert holds(one, two) is False


def test_values_are_compared_to_the_last_bit() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same(nan, nan.clone())
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.ones(2), torch.ones(3))
    assert same(torch.tensor(1.0), torch.tensor(1.0))
    large = torch.zeros((1 << 22) + 5)
    other = large.clone()
    other[-1] = 1
    assert not same(large, other)


@pytest.mark.parametrize("form", ["safetensors", "bin", "state dict"])
def test_a_checkpoint_is_read_under_the_names_of_the_model(form: str, tmp_path: Path) -> None:
    tensors = {"base.embed.weight": ROWS, "head.weight": ROWS + 1}
    files = [str(tmp_path / f"model.{form}")]
    if form == "safetensors":
        save_file(tensors, files[0])
    elif form == "bin":
        torch.save(tensors, files[0])
    state_dict = tensors if form == "state dict" else None
    for base in ("base", ""):
        checkpoint = Checkpoint(state_dict, None if state_dict else files, base)
        assert torch.equal(checkpoint.tensors["head.weight"](), ROWS + 1)
        assert torch.equal(checkpoint.tensors["base.embed.weight"](), ROWS)
        # A base model's own file has no prefix; a file of a model with a head has one.
        assert list(checkpoint.names_of("embed.weight")) == (["base.embed.weight"] if base else [])
        assert list(checkpoint.names_of("gone.weight")) == []
    given = Checkpoint({"embed.weight": ROWS, "step": 3}, None, "base")
    assert list(given.names_of("base.embed.weight")) == ["embed.weight"]
    assert given.tensors["embed.weight"]() is ROWS
    assert "step" not in given.tensors
    assert Checkpoint(None, None).tensors == {}


def test_whole_numbers_are_compared_as_numbers() -> None:
    small = torch.tensor([1, 2], dtype=torch.int8)
    assert same(small, torch.tensor([1, 2], dtype=torch.uint8))
    assert not same(torch.tensor([-1], dtype=torch.int8), torch.tensor([255], dtype=torch.uint8))
    assert same(torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.uint64))
    same_bits = torch.tensor([-(2**63)]), torch.tensor([2**63], dtype=torch.uint64)
    assert not same(*same_bits)
    assert not same(*same_bits[::-1])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_all_values_are_there_in_whatever_order_of_dimensions(data: Any) -> None:
    """`holds`, over shapes, layouts, types and kinds of tensors; and one value less is one too few.

    A convolution that is turned for a linear layer is flattened as well.
    """
    shape = data.draw(st.lists(st.integers(1, 4), max_size=6))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float64]))
    before = (torch.randperm(max(1, math.prod(shape))).view(shape) + 1).to(dtype)
    order = data.draw(st.permutations(range(len(shape))))
    now = before.permute(order)
    now = now.flatten(data.draw(st.integers(0, now.dim() - 1))) if shape and data.draw(st.booleans()) else now
    now = data.draw(st.sampled_from([now, now.contiguous(), torch.nn.Parameter(now.double(), requires_grad=False)]))
    if data.draw(st.booleans()):
        now = now.clone().as_subclass(Kind)
    assert holds(now, before) is True
    spoilt = now.clone(memory_format=torch.contiguous_format)
    spoilt.view(-1)[data.draw(st.integers(0, now.numel() - 1))] = 0
    assert holds(spoilt, before) is False


def test_a_matrix_that_is_turned_and_given_its_own_shape_again_holds_nothing() -> None:
    """All values are there, and each in a place that nobody gave it: a common mistake with `view`."""
    matrix, convolution = torch.arange(24.0).view(4, 6), torch.arange(48.0).view(4, 3, 2, 2)
    assert holds(matrix.t().reshape(4, 6), matrix) is False
    assert holds(convolution.permute(1, 0, 2, 3).reshape(4, 12), convolution) is False
    assert holds(convolution.permute(0, 2, 3, 1).reshape(4, 12), convolution) is True
    assert holds(convolution.flatten(1).t(), convolution) is True


META, MATRIX, SQUARE = torch.empty(2, device="meta"), torch.arange(6.0).view(2, 3), torch.arange(4.0).view(2, 2)
CONVOLUTION, COMPLEX = torch.arange(48.0).view(4, 3, 2, 2), torch.tensor([1 + 2j, 3 - 4j])
WITH_ONE, BLOCK = torch.arange(24.0).view(4, 3, 2, 1), torch.arange(24.0).view(2, 3, 4)
FLAT = torch.arange(6.0)


def freed() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: equals(META, META), None),
        (lambda: holds(META, MATRIX), None),
        (lambda: is_copy(MATRIX.t().clone(), MATRIX), True),
        (lambda: is_copy(SQUARE.t(), SQUARE), False),
        (lambda: (same(SQUARE, SQUARE.t()), same(SQUARE.t(), SQUARE)), (False, False)),
        (lambda: holds(WITH_ONE.permute(2, 0, 1, 3).reshape(8, 3), WITH_ONE), True),
        (lambda: holds(CONVOLUTION.permute(1, 0, 2, 3).reshape(6, 8), CONVOLUTION), False),
        (lambda: (same(COMPLEX, COMPLEX.conj()), same(COMPLEX.imag, COMPLEX.conj().imag)), (False, False)),
        (lambda: lies_at(COMPLEX.imag, COMPLEX.conj().imag), False),
        (lambda: lies_at(SQUARE, ()), False),
        (lambda: bytes_of(freed(), torch.ones(2)), None),
        (lambda: Memory({"block": BLOCK}).holding(BLOCK.permute(2, 1, 0)), []),
        (lambda: Memory({"row": FLAT.as_strided((1, 6), (0, 1))}).holding(FLAT[2:4]), ["row"]),
        (lambda: all_lie_at([SQUARE.view(torch.int32)], [SQUARE]), False),
        (lambda: (all_lie_at([None], [SQUARE]), all_lie_at([SQUARE], [(SQUARE,)])), (False, False)),
        (lambda: same(torch.tensor([math.inf]).half(), torch.tensor([math.inf])), True),
        (lambda: [type(place) for place in aliases([SQUARE, Kind()])], [torch.Tensor, tuple]),
    ],
)  # fmt: skip
def test_what_is_the_same_and_what_only_looks_like_it(found: Any, expected: Any) -> None:
    assert found() == expected


class Kind(torch.Tensor):
    """A subclass that is no wrapper."""
