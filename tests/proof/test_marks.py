"""The marks in memory without values: what they tell of who wrote there without torch, and that they are gone afterwards."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.idioms import dirty_memory
from tiedquiet.proof.watch import Watch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("size", [1, 5, 64, 65, 1000])
@pytest.mark.parametrize("around", [nullcontext, dirty_memory, torch.inference_mode])
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
    "an overlapping view": lambda t: t.as_strided((300,), (0,)).fill_(7),
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
    assert has
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
    assert watch.placeholders.has(tensor)
    tensor.numpy()[100:].fill(7)
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


def test_marks_that_torch_wrote_over_tell_nothing_of_the_rest() -> None:
    watch = Watch({}, protect=False)
    odd, even = torch.full((300,), 5.0), torch.full((300,), 5.0)
    for tensor in (odd, even):
        watch.placeholders.add(tensor)
    like_a_mark = torch.full((4,), 0xA5, dtype=torch.uint8).view(torch.float32).item()
    with watch:
        odd[::5] = 7
        even[:100] = like_a_mark
        even.detach().numpy()[100:] = 7
    assert watch.placeholders.has(odd)
    assert not watch.placeholders.has(even)


@pytest.mark.parametrize(("dtype", "filled", "is_empty"), [
    (torch.float32, 290, True), (torch.uint8, 150, True), (torch.uint8, 300, False),
])  # fmt: skip
def test_a_byte_may_have_the_value_of_a_mark_by_accident(dtype: torch.dtype, filled: int, is_empty: bool) -> None:
    watch = Watch({}, protect=False)
    tensor = torch.full((300,), 5, dtype=dtype)
    watch.placeholders.add(tensor)
    tensor.numpy()[:filled] = range(filled) if dtype is torch.float32 else [number % 256 for number in range(filled)]
    assert 0xA5 in tensor[::5]
    assert watch.placeholders.has(tensor) is is_empty


@pytest.mark.parametrize("part", [slice(4), slice(4, None), slice(0, None, 2)])
def test_no_mark_is_put_where_others_may_have_values(part: slice) -> None:
    memory, watch = torch.full((8,), 5.0), Watch({}, protect=False)
    watch.placeholders.add(memory[part])
    assert memory.eq(5).all()
    assert watch.placeholders.has(memory[part])
