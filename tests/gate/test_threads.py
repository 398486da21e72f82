"""Pairs of tensors, compared by several threads."""

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiedquiet.gate import threads
from tiedquiet.gate.threads import Pair, Threads
from tiedquiet.proof.memory import Bytes, bytes_of, same


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads, and slices and batches so small that tensors of a test are shared."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "_SMALL", 64)
    monkeypatch.setattr(threads, "_SLICE", 256)
    monkeypatch.setattr(threads, "_BATCH", 1000)


def outcomes(pairs: list[Pair | None]) -> list[bool]:
    with Threads() as these:
        return list(these.same(pairs))


@pytest.mark.usefixtures("four")
def test_the_threads_share_one_tensor_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []

    def equal(part: Bytes) -> bool:
        seen.append((threading.current_thread().name, part.start, part.length))
        return truth(part)

    truth = Bytes.equal
    monkeypatch.setattr(Bytes, "equal", equal)
    large = torch.arange(300)
    assert outcomes([(large, large.clone())]) == [True]
    assert sorted(part for _, *part in seen) == [[start, min(256, 2400 - start)] for start in range(0, 2400, 256)]
    assert all(name.startswith("tiedquiet") for name, _, _ in seen)
    assert not any(thread.name.startswith("tiedquiet") for thread in threading.enumerate())


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("place", [0, 150, 299])
def test_one_element_that_differs_is_found_in_whichever_part_it_lies(place: int) -> None:
    large = torch.arange(300)
    other = large.clone()
    other[place] += 1
    assert outcomes([(large, large.clone()), (large, other)]) == [True, False]


@pytest.mark.usefixtures("four")
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_it_is_what_one_thread_would_say(data: st.DataObject) -> None:
    """Types, layouts, what has to be cast, what has no partner; and one byte that differs, wherever it lies."""
    pairs: list[Pair | None] = []
    expected: list[bool] = []
    for _ in range(data.draw(st.integers(0, 30))):
        kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64]))
        count = data.draw(st.sampled_from([0, 1, 63, 64, 65, 255, 256, 257, 1000, 3001]))
        tensor = (torch.arange(count) % 3 % 2).to(kind)
        values = tensor.clone()
        if count and data.draw(st.booleans()):
            place = data.draw(st.sampled_from([0, count // 2, count - 1]))
            values[place] = values[place] == 0
        other = data.draw(st.sampled_from(["as it is", "cast", "strided", "nothing"]))
        if other == "cast":
            values = values.to(torch.complex128)
        elif other == "strided":
            values = values.repeat_interleave(2)[::2]
        pairs.append(None if other == "nothing" else (tensor, values))
        expected.append(other != "nothing" and bool((tensor == values).all()))
    assert outcomes(pairs) == expected == [pair is not None and same(*pair) for pair in pairs]


@pytest.mark.usefixtures("four")
def test_pairs_are_taken_two_batches_ahead() -> None:
    taken = 0

    def pairs() -> Iterator[Pair]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield torch.ones(100), torch.ones(100)

    with Threads() as these:
        assert next(these.same(pairs()))
        assert taken == 3 + 3


@pytest.mark.usefixtures("four")
def test_what_goes_wrong_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bytes, "equal", lambda part: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        outcomes([(torch.ones(100), torch.ones(100))])


def test_one_thread_hands_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(threads, "_SMALL", 0)
    with Threads() as these:
        assert list(these.same([(torch.ones(9), torch.ones(9))])) == [True]
        assert not any(thread.name.startswith("tiedquiet") for thread in threading.enumerate())


def test_bits_count_and_not_numbers() -> None:
    nan, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    zero = torch.zeros(())
    assert outcomes([(nan, nan.clone()), (nan, other), (zero, -zero), (zero, zero)]) == [True, False, False, True]


def test_what_is_not_just_its_bytes_is_not_compared_as_bytes() -> None:
    class Own(torch.Tensor):
        pass

    plain = torch.arange(4.0).view(2, 2)
    assert bytes_of(plain, torch.nn.Parameter(plain)) is not None
    turned = torch.complex(plain, plain).conj()
    for other in (plain.t(), plain.double(), plain.flatten(), plain.to("meta"), plain.as_subclass(Own)):
        assert bytes_of(plain, other) is None
    assert bytes_of(turned, turned) is None
    assert bytes_of(turned.imag, turned.imag) is None
    assert same(plain, plain.clone().as_subclass(Own))
    assert not same(plain, (plain + 1).as_subclass(Own))
