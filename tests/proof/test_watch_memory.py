"""Which memory the watch takes for written, and which for never written: element by element, through views and without torch."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.idioms import dirty_memory
from tiedquiet.proof.watch import Watch


def test_what_was_protected_stays_and_the_rest_of_the_operation_is_done() -> None:
    stored, other = torch.ones(4), torch.ones(4)
    watch = Watch({"stored": stored}, protect=True)
    with watch:
        assert stored.mul_(2) is stored
        torch._foreach_mul_([stored, other], 3)
        values, places = torch.empty(()), torch.empty((), dtype=torch.long)
        torch.max(torch.tensor([1.0, 5.0]), 0, out=(values, places))
        stored[1:3].zero_()
        assert torch.add(other, 1, out=stored) is stored
        stored.t_()
    assert stored.tolist() == [1, 1, 1, 1]
    assert other.tolist() == [3, 3, 3, 3]
    assert (values.item(), places.item()) == (5, 1)
    assert watch.error is None
    assert "test_what_was_protected" in watch.writes["stored"].by


@pytest.mark.parametrize(
    ("write", "is_let_through"),
    [
        (lambda t: t.copy_(t.t().clone()), True),
        (lambda t: t.data[:].copy_(t.t().contiguous()), True),
        (lambda t: [t.copy_(t.t().clone()) for _ in range(3)], True),
        (lambda t: (t.zero_(), t.copy_(t.t().clone())), True),
        (lambda t: (t.copy_(t.t().clone()), t.zero_()), True),
        (lambda t: torch.ops.aten.copy_(t, src=t.t().clone()), True),
        (lambda t: t.copy_(t.flip(0)), False),
        (lambda t: t.copy_(t.t().double()), True),
        (lambda t: t.copy_(t.t().to(torch.float8_e5m2)), False),
        (lambda t: t.copy_(t[0].clone()), False),
        (lambda t: t.copy_(t.t()), False),
        (lambda t: t[:2, :2].copy_(t[:2, :2].t().clone()), False),
        (lambda t: t.view(-1).copy_(t.t().reshape(-1)), False),
    ],
)
def test_a_matrix_that_is_turned_in_its_place_is_protected_from_all_else(write: Any, is_let_through: bool) -> None:
    tensor = torch.arange(16.0).view(4, 4)
    before = tensor.clone()
    watch = Watch({"stored": tensor}, protect=True)
    with watch:
        write(tensor)
    assert watch.error is None
    assert tensor.equal(before.t() if is_let_through else before)


def test_memory_of_another_element_size_is_not_claimed() -> None:
    watch = Watch({}, protect=False)
    with watch:
        table = torch.empty(8)
        table.view(torch.int16)[:4] = 1
        untouched = torch.empty(8)
    assert not watch.placeholders.has(table)
    assert watch.placeholders.has(untouched)
    assert watch.placeholders.has(untouched.to(torch.float64)) is False, "made after the watch"


@pytest.mark.parametrize(
    ("compute", "is_empty"),
    [
        (lambda inv: inv.to(torch.float64), True),
        (lambda inv: inv.clone(), True),
        (lambda inv: torch.empty(4).copy_(inv), True),
        (lambda inv: torch.zeros(4).copy_(inv), True),
        (lambda inv: torch.nn.functional.pad(inv, (0, 2)), True),
        (lambda inv: inv.cos() * 2, True),
        (lambda inv: torch.outer(torch.arange(3.0), inv), True),
        (lambda inv: torch.cat([torch.ones(2), inv]), True),
        (lambda inv: torch.stack([inv, inv])[1], True),
        (lambda inv: inv[torch.tensor([2, 0])], True),
        (lambda inv: inv.flip(0), True),
        (lambda inv: torch.zeros(4).add_(inv), True),
        (lambda inv: inv.mul_(2), True),
        (lambda inv: torch.add(inv, 1, out=torch.empty(4)), True),
        (lambda inv: torch.split(inv.sin(), 2)[0], True),
        (lambda inv: inv.sort().values, True),
        (lambda inv: inv.view(2, 2).t(), True),
        (lambda inv: torch.zeros_like(inv), False),
        (lambda inv: inv.new_ones(3), False),
        (lambda inv: torch.full_like(inv, 2).cos(), False),
        (lambda inv: inv.zero_().cos(), False),
        (lambda inv: inv.copy_(torch.ones(4)).sin(), False),
        (lambda inv: inv.normal_(), False),
        (lambda inv: (torch._foreach_copy_([inv], [torch.ones(4)]), inv)[1], False),
        (lambda inv: (torch._foreach_mul_([inv], 2), inv)[1], True),
        (lambda inv: inv.fill_(1).mul_(2), False),
        (lambda inv: torch.arange(inv.shape[0]), False),
    ],
)
def test_what_is_computed_from_memory_without_values_has_none(compute: Any, is_empty: bool) -> None:
    watch = Watch({}, protect=False)
    with watch:
        made = compute(torch.empty(4))
        also = torch.ones(1).expand(4).clone()
    assert watch.error is None
    assert watch.placeholders.has(made) is is_empty
    assert not watch.placeholders.has(also)


def test_a_part_without_values_makes_no_more_than_that_part_empty() -> None:
    watch = Watch({}, protect=False)
    with watch:
        inv, table, half = torch.empty(4), torch.zeros(2, 4), torch.empty(6)
        table[1].copy_(inv)
        half[:3] = 1
        first, second, both = half[:3].cos(), half[3:].cos(), half + 1
        table_of_rows = table[0] * 2, table[1] * 2
    has = watch.placeholders.has
    assert has(table)
    assert [has(row) for row in (table[0], table[1], *table_of_rows)] == [False, True, False, True]
    assert [has(part) for part in (first, second, both)] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("size", [1, 5, 64, 65, 1000])
@pytest.mark.parametrize("around", [nullcontext, dirty_memory])
def test_memory_that_is_written_without_torch_shows_by_its_marks(
    dtype: torch.dtype, size: int, around: Callable[[], Any]
) -> None:
    like = torch.uint8 if dtype is torch.bool else torch.int16 if dtype in (torch.bfloat16, torch.float16) else dtype
    watch = Watch({}, protect=False)
    with around(), watch:
        whole, half, none = (torch.empty(size, dtype=dtype) for _ in range(3))
        whole.view(like).numpy()[:] = 0
        half.view(like).numpy()[: size // 2] = 0
    assert not watch.placeholders.has(whole)
    assert watch.placeholders.has(half)
    assert watch.placeholders.has(none)
    assert not watch.placeholders.has(half[: size // 2]) or size == 1


def in_rows(rows: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[rows] = True
    return mask


# Each writes ones to some rows, and nothing but its other arguments says to which.
SOME: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "an index": lambda t, rows: t.__setitem__(rows, 1.0),
    "a mask": lambda t, rows: t.__setitem__(in_rows(rows), 1.0),
    "index_put_": lambda t, rows: t.index_put_((rows,), torch.ones(8)),
    "masked_fill_": lambda t, rows: t.masked_fill_(in_rows(rows), 1.0),
    "masked_fill_ with a tensor": lambda t, rows: t.masked_fill_(in_rows(rows), torch.tensor(1.0)),
    "index_fill_": lambda t, rows: t.index_fill_(0, rows, 1.0),
    "index_copy_": lambda t, rows: t.index_copy_(0, rows, torch.ones(len(rows), 8)),
    "scatter_": lambda t, rows: t.scatter_(0, rows[:, None].expand(-1, 8), 1.0),
    "scatter_ from a tensor": lambda t, rows: t.scatter_(0, rows[:, None].expand(-1, 8), torch.ones(len(rows), 8)),
    "put_": lambda t, rows: t.put_(in_rows(rows).view(-1).nonzero()[:, 0], torch.ones(8 * len(rows))),
    "masked_scatter_": lambda t, rows: t.masked_scatter_(in_rows(rows), torch.ones(64)),
    "a transposed view": lambda t, rows: t.t().index_fill_(1, rows, 1.0),
}


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize("how", SOME)
def test_what_writes_some_elements_leaves_the_others_without_values(how: str, is_marked: bool) -> None:
    first, rest = torch.tensor([5, 0]), torch.tensor([1, 2, 3, 4, 6, 7])
    part, steps, whole = (torch.full((8, 8), 5.0) for _ in range(3))
    watch = Watch({}, protect=False)
    for table in (part, steps, whole):
        watch.placeholders.add(table, is_fresh=is_marked)
    with watch:
        SOME[how](part, first)
        for rows in (first, rest):
            SOME[how](steps, rows)
        SOME[how](whole, torch.arange(8))
    has = watch.placeholders.has
    assert watch.error is None
    assert [has(table) for table in (part, steps, whole)] == [True, False, False]
    assert [has(row) for row in part] == [row not in (0, 5) for row in range(8)]
    watch.placeholders.take_marks_off()
    assert part[first].eq(1).all()
    assert part[rest].eq(5).all()
    assert steps.eq(1).all()


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.scatter_(0, torch.zeros(1, 8, dtype=torch.long), 1.0, reduce="add"),
        lambda t: t.index_put_((torch.arange(8),), torch.ones(8), accumulate=True),
        lambda t: torch.where(t.isnan(), torch.ones(8, 8), t, out=t),
        lambda t: torch.where(torch.eye(8).bool(), torch.ones(8, 8), t, out=t),
        lambda t: t.copy_(t),
        lambda t: t.index_copy_(0, torch.arange(8), t.clone()),
    ],
)
def test_what_is_written_again_from_memory_without_values_has_none(write: Any) -> None:
    watch = Watch({}, protect=False)
    table = torch.full((8, 8), 5.0)
    watch.placeholders.add(table, is_fresh=False)
    with watch:
        write(table)
    assert watch.error is None
    assert watch.placeholders.has(table)


def fill_a_slice_in_a_thread(tensor: torch.Tensor) -> None:
    thread = threading.Thread(target=lambda: tensor[:20].fill_(7))
    thread.start()
    thread.join()


def fill_through_another_element_size(tensor: torch.Tensor) -> None:
    tensor[:10] = 7
    tensor.view(torch.int16)[20:40] = 1


# What somebody does to memory that is marked; each leaves all but the first twenty elements as they were.
LEFT: dict[str, Callable[[torch.Tensor], Any]] = {
    "nothing": lambda t: None,
    "numpy": lambda t: t.numpy()[:20].fill(7),
    "a slice": lambda t: t[:20].fill_(7),
    "an index": lambda t: t.__setitem__(torch.arange(20), 7.0),
    "a slice, in a thread": fill_a_slice_in_a_thread,
    "another element size": fill_through_another_element_size,
    "from what has no values": lambda t: t[:20].copy_(torch.empty(20)),
    "a sum, in a slice": lambda t: t[:20].add_(1),
    "an overlapping view": lambda t: t.as_strided((400,), (0,)).fill_(7),
}


@pytest.mark.parametrize("how", LEFT)
def test_no_mark_is_left(how: str) -> None:
    tensor = torch.full((300,), 5.0)
    watch = Watch({}, protect=False)
    watch.placeholders.add(tensor)  # as if it had just been allocated
    assert len(tensor.unique()) == 2
    with watch:
        LEFT[how](tensor)
    has = watch.placeholders.has(tensor)
    for _ in range(2):
        watch.placeholders.take_marks_off()
        assert tensor[20:].eq(5).all()
    assert has or how == "another element size", "of that nothing is claimed"
    assert tensor._version == 0 or how not in ("nothing", "numpy")


def test_what_is_computed_is_the_same_as_without_marks_and_they_are_there_afterwards() -> None:
    tensor, table = torch.full((300,), 5.0), torch.zeros(300)
    watch = Watch({}, protect=False)
    watch.placeholders.add(tensor)
    with watch:
        made = [tensor.clone(), tensor.double(), tensor[100:] * 1, torch.cat([tensor, tensor]), table.copy_(tensor)]
        with pytest.raises(RuntimeError, match="must match the size"):
            tensor + torch.ones(7)
        assert watch.placeholders.has(tensor)
        tensor.numpy().fill(7)
    assert watch.error is None
    for copy in made:
        assert copy.eq(5).all()
        assert watch.placeholders.has(copy)
    assert not watch.placeholders.has(tensor)


def test_marks_tell_of_numpy_after_something_was_computed() -> None:
    tensor, watch = torch.full((300,), 5.0), Watch({}, protect=False)
    watch.placeholders.add(tensor)
    with watch:
        tensor.sum()
        tensor.numpy()[:100].fill(7)
        tensor.sum()
        half = watch.placeholders.has(tensor)
        tensor.numpy()[100:].fill(7)
    assert half
    assert not watch.placeholders.has(tensor)
    watch.placeholders.take_marks_off()
    assert tensor.eq(7).all()


def test_no_mark_is_left_where_memory_is_added_again() -> None:
    tensor, watch = torch.full((300,), 5.0), Watch({}, protect=False)
    for is_fresh in (True, True, False):
        watch.placeholders.add(tensor, is_fresh)
    assert tensor.eq(5).all()


@pytest.mark.parametrize("change", [lambda s: s.resize_(0), lambda s: s.resize_(8), lambda s: s.resize_(4000)])
def test_marks_in_memory_that_is_gone_or_has_another_size(change: Any) -> None:
    tensor, watch = torch.full((300,), 5.0), Watch({}, protect=False)
    for some in (tensor, torch.full((300,), 5.0)):  # of the second nothing is left
        watch.placeholders.add(some)
    del some
    change(tensor.untyped_storage())
    watch.placeholders.take_marks_off()
    assert tensor.untyped_storage().nbytes() < 1200 or tensor.eq(5).all()


def test_a_value_that_looks_like_a_mark_stays() -> None:
    mark = 0xA5
    watch = Watch({}, protect=False)
    part, whole, masked = (torch.full((300,), 5, dtype=torch.uint8) for _ in range(3))
    for tensor in (part, whole, masked):
        watch.placeholders.add(tensor)
    with watch:
        part[:20] = mark
        whole.fill_(mark)
        masked.masked_fill_(torch.arange(300) < 20, mark)
        watch.placeholders.take_marks_off(masked)
    watch.placeholders.take_marks_off()
    assert whole.eq(mark).all()
    for tensor in (part, masked):
        assert tensor[:20].eq(mark).all()
        assert tensor[20:].eq(5).all()


def test_in_which_part_of_another_type_some_elements_lie_is_not_known() -> None:
    """As where DeepSpeed has parted a parameter: what writes to it says nothing of the part's elements."""
    tensor, part = torch.zeros(8), torch.full((4,), 5.0)
    tensor.ds_tensor = part  # type: ignore[attr-defined]
    watch = Watch({}, protect=False)
    watch.placeholders.add(tensor)
    assert watch.placeholders.has(tensor)
    with watch:
        tensor[torch.tensor([0])] = 1
    assert watch.error is None
    assert not watch.placeholders.has(tensor)
    assert part.eq(5).all()


def test_what_is_counted_as_a_write_and_writes_nothing_leaves_memory_without_values() -> None:
    watch = Watch({}, protect=False)
    with watch:
        nothing, turned, sparse = torch.empty(4), torch.empty(2, 3), torch.empty(0).to_sparse()
        nothing[:0].zero_()
        turned.t_()
        sparse.zero_()
    assert watch.error is None
    assert watch.placeholders.has(nothing)
    assert watch.placeholders.has(turned)
