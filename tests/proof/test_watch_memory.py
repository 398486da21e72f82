"""What the watch takes for written, and for never written: element by element, and through views; what it protects."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

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
        assert stored.data.data_ptr() == stored.data_ptr()
        stored.t_()
    assert stored.tolist() == [1, 1, 1, 1]
    assert other.tolist() == [3, 3, 3, 3]
    assert (values.item(), places.item()) == (5, 1)
    assert watch.error is None
    assert "test_what_was_protected" in watch.writes["stored"].by


@pytest.mark.parametrize("is_index_stored", [True, False])
def test_what_is_protected_is_returned_as_if_it_had_been_written_to(is_index_stored: bool) -> None:
    most, index = torch.full((), 9.0), torch.full((), 9)
    stored = {"most": most, **({"index": index} if is_index_stored else {})}
    watch = Watch(stored, protect=True)
    with watch:
        returned = torch.max(torch.tensor([1.0, 5.0]), 0, out=(most, index))
        torch._foreach_mul_([most, most], 2)
    assert watch.error is None
    assert returned[0] is most
    assert returned[1] is index
    assert (most.item(), index.item()) == (9, 9 if is_index_stored else 1)


@pytest.mark.parametrize("protect", [True, False])
def test_an_operation_that_returns_something_else_than_what_it_writes_to(protect: bool) -> None:
    mean, x = torch.ones(3), torch.arange(6.0).view(2, 3)
    normalise = torch.ops.aten._native_batch_norm_legit
    right, *_ = normalise(x, None, None, mean.clone(), mean.clone(), True, 0.1, 1e-5)
    watch = Watch({"mean": mean}, protect)
    with watch:
        made, *_ = normalise(x, None, None, mean, mean.clone(), True, 0.1, 1e-5)
        of_nothing, *_ = normalise(torch.empty(2, 3), None, None, mean.clone(), mean.clone(), True, 0.1, 1e-5)
    assert watch.error is None
    assert made.equal(right)
    assert mean.eq(1).all() == protect
    assert watch.placeholders.has(of_nothing)
    assert not watch.placeholders.has(made)


def test_once_it_has_given_up_it_keeps_no_write_back() -> None:
    stored = torch.ones(2)
    watch = Watch({"stored": stored}, protect=True)
    with watch:
        watch.give_up(ArithmeticError("injected"))
        stored.zero_()
    assert stored.eq(0).all()
    assert watch.writes == {}


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


def test_what_is_written_through_another_element_size_is_known_to_the_byte() -> None:
    watch = Watch({}, protect=False)
    has = watch.placeholders.has
    with watch:
        table, pairs, untouched = torch.empty(8), torch.empty(4, dtype=torch.complex64), torch.empty(8)
        table.view(torch.int16)[:4] = 1
        table[4:].copy_(torch.empty(4))
        torch.view_as_real(pairs)[:, 0] = 1
    half = has(pairs)
    with watch:
        torch.view_as_real(pairs)[:, 1] = 1
    assert watch.error is None
    assert [has(part) for part in (table, table[:2], table[2:], table.view(torch.int16)[:5])] == [
        True,
        False,
        True,
        True,
    ]
    assert half
    assert not has(pairs)
    assert has(untouched)
    assert has(untouched.to(torch.float64)) is False, "made after the watch"


def test_of_memory_that_was_given_another_size_nothing_is_claimed() -> None:
    watch = Watch({}, protect=False)
    with watch:
        tensor = torch.empty(4)
        tensor.resize_(8)
        tensor[:4] * 2
    assert watch.error is None
    assert not watch.placeholders.has(tensor[:4])


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
        (lambda inv: torch.add(torch.ones(4), 1, out=inv), False),
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


def test_the_parts_of_two_tensors_in_one_memory_are_told_apart() -> None:
    memory, one, other = torch.full((8,), 5.0), torch.zeros(4), torch.zeros(4)
    one.ds_tensor, other.ds_tensor = memory[:4], memory[4:]  # type: ignore[attr-defined]
    watch = Watch({}, protect=False)
    watch.placeholders.add(one)
    with watch:
        one.fill_(1)
    assert not watch.placeholders.has(one)
    assert watch.placeholders.has(other)


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
        nothing, turned, sparse = torch.empty(4) * 1, torch.empty(2, 3), torch.empty(0).to_sparse()
        nothing[:0].zero_()
        turned.t_()
        sparse.zero_()
    assert watch.error is None
    assert watch.placeholders.has(nothing)
    assert watch.placeholders.has(turned)
