"""What a cast from one type to another loses."""

import pytest
import torch

from tiedquiet.proof.casts import is_at_limit, is_beyond, may_lose, narrows
from tiedquiet.proof.memory import holds, same

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("stored", [*FLOATS, torch.complex64, *WHOLE])
@pytest.mark.parametrize("ours", [*FLOATS, torch.complex64, *WHOLE])
def test_a_cast_that_may_lose_more_than_digits_is_known_by_its_types(stored: torch.dtype, ours: torch.dtype) -> None:
    if stored is torch.bool:
        values = torch.tensor([False, True])
    elif stored in WHOLE:
        values = torch.tensor([torch.iinfo(stored).min, 5, torch.iinfo(stored).max]).to(stored)
    else:
        values = torch.tensor([0.75 + 0.5j if stored.is_complex else 0.75]).to(stored)
    cast = values.to(ours)
    is_lost = bool((cast.to(torch.complex128) != values.to(torch.complex128)).any())
    if stored in WHOLE and (ours.is_floating_point or ours.is_complex):
        assert not may_lose(stored, ours), "a float has whole numbers of any size, rounded"
    else:
        assert may_lose(stored, ours) is is_lost
        assert same(cast, values) is not is_lost


@pytest.mark.parametrize("stored", [*FLOATS, torch.complex64, *WHOLE])
@pytest.mark.parametrize("ours", [*FLOATS, torch.complex64, *WHOLE])
def test_a_cast_that_may_make_a_number_infinite_is_known_by_its_types(stored: torch.dtype, ours: torch.dtype) -> None:
    if stored.is_complex or not ours.is_floating_point or stored is torch.bool:
        assert not narrows(stored, ours)
        return
    largest = (torch.finfo if stored.is_floating_point else torch.iinfo)(stored).max
    assert narrows(stored, ours) is not bool(torch.tensor(largest, dtype=stored).to(ours).double().isfinite())


def test_what_a_narrower_type_cannot_hold_is_not_held() -> None:
    values = torch.tensor([1.0, 1e10], dtype=torch.bfloat16)
    assert not same(values.half(), values)
    assert same(values[:1].half(), values[:1])
    infinite = torch.tensor([float("inf")], dtype=torch.bfloat16)
    assert same(infinite.half(), infinite), "it was so in the file"
    assert not holds(torch.zeros(2, dtype=torch.int8), torch.tensor([0.2, 0.4]))
    assert holds(torch.tensor([1, 2], dtype=torch.int8), torch.tensor([1.0, 2.0]))
    assert not holds(torch.ones(2), torch.tensor([1 + 1j, 1 + 0j]))
    assert not same(torch.tensor([44], dtype=torch.uint8), torch.tensor([300]))
    assert not same(torch.tensor([True]), torch.tensor([2])), "which is true, and is not 2"
    eight = torch.tensor([1.0, 1e10]).to(torch.float8_e4m3fn)
    assert not same(eight, torch.tensor([1.0, 1e10])), "of a type without infinity it makes NaN"
    assert same(eight[:1], torch.tensor([1.0]))


def test_values_at_the_limit_of_their_type() -> None:
    assert not is_at_limit(torch.ones(3))
    for large in (torch.tensor([1e9]).half(), torch.tensor([-1e9]).half(), torch.tensor([float("nan")])):
        assert is_at_limit(large)
    assert is_at_limit(torch.tensor([1e9]).to(torch.float8_e4m3fn))
    for neither in (torch.tensor([7]), torch.empty(0), torch.ones(2, device="meta")):
        assert not is_at_limit(neither)


@pytest.mark.parametrize("ours", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_what_is_beyond_a_type_is_what_becomes_infinite(ours: torch.dtype) -> None:
    """Each number of float32 around the largest of a type, that is rounded to it or to infinity."""
    largest = torch.tensor(torch.finfo(ours).max).view(torch.int32)
    near = (largest + torch.linspace(-(2**21), 2**21, 4097).int()).view(torch.float32)
    near = near[near.isfinite()]
    near = torch.cat([near, -near, torch.tensor([torch.finfo(torch.float32).max, float("nan"), float("inf")])])
    is_lost = near.isfinite() & ~near.to(ours).float().isfinite()
    assert [is_beyond(value, ours) for value in near] == is_lost.tolist()
    assert is_lost.any()
    for value in near[::64]:
        assert same(value.to(ours), value) is not is_beyond(value, ours)
    assert not is_beyond(near[:0], ours)
