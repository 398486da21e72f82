"""Which memory the watch takes for written, and which for never written: element by element, through views and without torch."""

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


def test_marks_are_taken_off_again() -> None:
    left, half = torch.full((300,), 5.0), torch.full((300,), 5.0)
    watch = Watch({}, protect=False)
    for tensor in (left, half):  # as if they had just been allocated
        watch.placeholders.add(tensor)
        assert len(tensor.unique()) == 2
    with watch:
        half.numpy()[:100] = 7
    for tensor in (left, half):
        watch.placeholders.take_marks_off(tensor)
        watch.placeholders.take_marks_off(tensor)
    assert left.eq(5).all()
    assert half[:100].eq(7).all()
    assert half[100:].eq(5).all()
    assert left._version == 0


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
