"""Where the elements of a file's tensors went, through what a library does to tensors that have no values."""

from collections.abc import Callable

import pytest
import torch

from tiedquiet.gate.moves import Arrived, Moves, arrived

Tensors = dict[str, torch.Tensor]
Made = Callable[[Tensors], torch.Tensor]
FILE = {"a": (6, 4), "b": (6, 4), "c": (4,)}


def follow(make: Made) -> tuple[Moves, Tensors, torch.Tensor]:
    given = {name: torch.empty(shape, device="meta") for name, shape in FILE.items()}
    moves = Moves(given)
    with moves:
        made = make(dict(given))
    return moves, given, made


def values() -> Tensors:
    return {name: torch.randn(shape) for name, shape in FILE.items()}


MOVED: list[tuple[Made, dict[str, Arrived]]] = [
    (lambda t: t["a"], {"a": Arrived(24, 24)}),
    (lambda t: t["a"].half(), {"a": Arrived(24, 24)}),
    (lambda t: torch.nn.Parameter(t["a"].detach().view(4, 6)), {"a": Arrived(24, 24)}),
    (lambda t: t["a"].T.contiguous(), {"a": Arrived(24, 24)}),
    (lambda t: t["a"].T.clone()[1:], {"a": Arrived(18, 18)}),
    (lambda t: t["a"].chunk(3)[1], {"a": Arrived(8, 8)}),
    (lambda t: t["a"][:, ::2], {"a": Arrived(12, 12)}),
    (lambda t: t["a"][2:].half()[1:, 3], {"a": Arrived(3, 3)}),
    (lambda t: t["c"].expand(3, 4), {"c": Arrived(4, 12)}),
    (lambda t: torch.cat(t["a"].chunk(2)[::-1]), {"a": Arrived(24, 24)}),
    (lambda t: torch.cat([t["a"], t["b"]], dim=1), {"a": Arrived(24, 24), "b": Arrived(24, 24)}),
    (lambda t: torch.cat([t["a"], t["b"]])[4:7], {"a": Arrived(8, 8), "b": Arrived(4, 4)}),
    (lambda t: torch.stack([t["a"][0], t["c"], t["a"][0]]).T, {"a": Arrived(4, 8), "c": Arrived(4, 4)}),
    (lambda t: torch.cat([torch.cat([t["c"]]), t["c"].double().float()]), {"c": Arrived(4, 8)}),
]


@pytest.mark.parametrize(("make", "wanted"), MOVED)
def test_what_is_moved_can_be_moved_again(make: Made, wanted: dict[str, Arrived]) -> None:
    moves, given, made = follow(make)
    assert moves.is_moved(made)
    assert moves.of(made) == wanted.keys()
    file = values()
    again = moves.moved(made, lambda name: file[name])
    assert torch.equal(again.to(made.dtype), make(dict(file)))
    assert dict(arrived(moves, given, [made])) == wanted


@pytest.mark.parametrize(
    ("make", "sources"),
    [
        (lambda t: t["a"] + 1, {"a"}),
        (lambda t: t["a"] @ t["b"].T, {"a", "b"}),
        (lambda t: t["c"].mul_(2), {"c"}),
        (lambda t: torch.cat([t["a"], t["b"] * 2]), {"a", "b"}),
        (lambda t: torch.empty(4, device="meta").copy_(t["c"]), {"c"}),
        (lambda t: t["c"].view(torch.int32), {"c"}),
        (lambda t: (t["c"] * 2)[1:], {"c"}),
    ],
)
def test_what_is_computed_is_not_moved(make: Made, sources: set[str]) -> None:
    moves, _, made = follow(make)
    assert moves.of(made) == sources
    assert not moves.is_moved(made)


def test_what_is_made_of_nothing() -> None:
    moves, _, made = follow(lambda t: torch.eye(3))
    assert moves.of(made) == set()
    assert not moves.is_moved(made)


def test_several_that_are_made_of_one() -> None:
    given = {"a": torch.empty(6, device="meta")}
    moves = Moves(given)
    with moves:
        one, other = given["a"].split(4)
    assert dict(arrived(moves, given, [one, other])) == {"a": Arrived(6, 6)}
    assert dict(arrived(moves, given, [one, one, other])) == {"a": Arrived(6, 10)}
    assert dict(arrived(moves, given, [one, one])) == {"a": Arrived(4, 8)}
