"""What lies where, what holds what, and what a checkpoint's files hold."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import Memory, holds, plain, same

ROWS = torch.arange(12.0).view(4, 3)


def test_the_plain_tensors_behind_a_tensor() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert len(plain(nested)) >= 1, "a wrapper that tells"
    assert plain(ROWS) == [ROWS]
    for nothing in (ROWS.to_sparse(), ROWS.to("meta"), torch.empty(0)):
        assert plain(nothing) == []


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
        (lambda whole: whole.view(2, 6), True),
        (lambda whole: whole.view(torch.int32), False),
        (lambda whole: torch.ones(2), False),
        (lambda whole: torch.as_strided(whole, (3,), (1,), 11), False),
    ],
    ids=["itself", "slice", "transposed", "reshaped", "another type", "elsewhere", "beyond the end"],
)
def test_a_view_lies_in_the_memory_of_the_whole(tensor, inside: bool) -> None:  # type: ignore[no-untyped-def]
    memory = torch.arange(16.0)
    whole = memory[:12].view(4, 3)
    assert (Memory({"whole": whole}).holding(tensor(whole)) == ["whole"]) is inside


def test_what_lies_in_the_gaps_of_another_is_not_inside_it() -> None:
    fused = torch.arange(12.0).view(3, 4)
    even, odd = fused[:, 0::2], fused[:, 1::2]
    memory = Memory({"even": even, "fused": fused})
    assert sorted(memory.holding(even[1:])) == ["even", "fused"]
    assert memory.holding(odd[1:2]) == ["fused"]
    assert [name for name, _ in Memory({"even": even}).meeting(odd[1:2])] == ["even"], "addresses meet"


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
        (torch.cat([ROWS, torch.ones(1, 3)]), True),
        (ROWS + 1, False),
        (ROWS[:3], False),
        (torch.cat([torch.ones(1, 4, 3), ROWS[None]]), None),
        (ROWS.to_sparse(), None),
    ],
    ids=["copy", "cast", "transposed", "reshaped", "rows appended", "other", "cut", "larger", "unreadable"],
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
        assert torch.equal(checkpoint.read("head.weight"), ROWS + 1)
        assert torch.equal(checkpoint.read("base.embed.weight"), ROWS)
        # A base model's own file has no prefix; a file of a model with a head has one.
        assert (checkpoint.read("embed.weight") is not None) == (base == "base")
        assert checkpoint.read("gone.weight") is None
    assert Checkpoint({"embed.weight": ROWS, "step": 3}, None, "base").read("base.embed.weight") is ROWS
    assert Checkpoint({"step": 3}, None).read("step") is None
    assert Checkpoint(None, None).read("head.weight") is None
