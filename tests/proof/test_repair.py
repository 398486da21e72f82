"""What `repair` fills buffers with: what the first `__init__` computed, and nothing else."""

import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file

import tiedquiet
from tests.checkpoints import Printed
from tests.idioms import Idiom, Tiny, dirty_memory, same, ties
from tests.proof.test_watch import saved, verdicts
from tiedquiet import Verdict
from tiedquiet.proof.repair import put_in_place


class WantsMore(Tiny):
    """Computes a buffer in `__init__` of what it is given besides its config, and of what it makes of that."""

    def __init__(self, config: Any, more: int = 1, kind: str = "table") -> None:
        config.start = getattr(config, "start", 2) + 1
        super().__init__(config)
        values = {
            "table": torch.arange(float(more)) + config.start,
            "drawn": torch.rand(4),
            "counted": torch.full((2,), float(WantsMore.made)),
        }
        if kind == "once":
            values["once"] = torch.ones(TICKETS.pop())
        WantsMore.made += 1
        self.register_buffer("table", values[kind], persistent=False)

    made = 0


TICKETS: list[int] = []


def test_buffers_are_repaired_by_an_init_that_is_like_the_first(tmp_path: Path, printed: Printed) -> None:
    file = saved(tmp_path, "good citizen")
    with tiedquiet.enable("repair"):
        model = WantsMore.from_pretrained(file, more=3)
        assert verdicts(model) == {}
        assert model.table.tolist() == [3, 4, 5]
        assert model.config.start == 3
        assert printed.loud == []
        with dirty_memory():
            for kind in ("drawn", "counted"):  # no second one has the first one's values
                model = WantsMore.from_pretrained(file, kind=kind)
                assert verdicts(model) == {"table": Verdict.UNWRITTEN}
                assert model.table.isnan().all()
            TICKETS.append(2)  # a second `__init__` fails
            model = WantsMore.from_pretrained(file, kind="once")
            assert verdicts(model) == {"table": Verdict.UNWRITTEN}
    assert len(printed.loud) == 3
    assert all("unwritten" in line for line in printed.loud)


class DependsOnMore(Tiny):
    """Computes buffers of what is in force while it is loaded: torch's default type, a number of the class."""

    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["embed"]
    base = 1.0
    made = 0

    def add(self, config: Any) -> None:
        DependsOnMore.made += 1
        powers = torch.arange(4.0, dtype=torch.get_default_dtype())
        self.register_buffer("table", (1 / 3**powers).float() * self.base, persistent=False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        cls.base = 5.0
        try:
            return super().from_pretrained(*args, **kwargs)
        finally:
            cls.base = 1.0


class ComputesItAgain(DependsOnMore):
    """The same, and nothing to repair."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.table.fill_(2)


@pytest.mark.parametrize(("cls", "made"), [(DependsOnMore, 3), (ComputesItAgain, 1)])
def test_buffers_are_repaired_with_what_was_in_force(
    cls: type[DependsOnMore], made: int, tmp_path: Path, printed: Printed
) -> None:
    saved(tmp_path, "good citizen")
    powers = torch.arange(4.0, dtype=torch.bfloat16)
    before = DependsOnMore.made
    with tiedquiet.enable("repair"), dirty_memory():
        model = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (model.dtype, model.lin.weight.dtype) == (torch.float32, torch.bfloat16)
    assert same(model.table, torch.full((4,), 2.0) if made == 1 else (1 / 3**powers).float() * 5)
    assert DependsOnMore.made - before == made, "the second and the third are made where they are needed, and once"
    assert verdicts(model) == {}
    assert printed.loud == []


class Draws(Tiny):
    """Draws a buffer in `__init__`."""

    how: Callable[[], float]

    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.full((2,), Draws.how()), persistent=False)


@pytest.mark.parametrize("how", [random.random, numpy.random.rand, lambda: float(torch.rand((), device="cpu"))])
def test_what_is_drawn_is_not_repaired_and_the_numbers_drawn_next_are_the_same(
    how: Callable[[], float], tmp_path: Path
) -> None:
    saved(tmp_path, "good citizen")
    Draws.how, drawn = how, {}
    for mode in ("off", "repair"):
        random.seed(3)
        numpy.random.seed(3)
        torch.manual_seed(3)
        with tiedquiet.enable(mode):
            model = Draws.from_pretrained(tmp_path)
        drawn[mode] = how()
    assert verdicts(model) == {"table": Verdict.UNWRITTEN}
    assert drawn["off"] == drawn["repair"]


class HasOthersBesideIt(Tiny):
    """What another thread does while its `__init__` runs: it makes a layer, and takes parameters away for a while."""

    others: ExitStack
    beside: ClassVar[list[torch.nn.Module]] = []

    def add(self, config: Any) -> None:
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        thread = Thread(target=lambda: self.beside.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        if len(self.beside) == 2:
            self.others.enter_context(init_empty_weights())


def test_a_second_init_takes_parameters_from_no_other_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "good citizen")
    monkeypatch.setattr(torch.nn.Module, "register_parameter", torch.nn.Module.register_parameter)
    with tiedquiet.enable("repair"), ExitStack() as HasOthersBesideIt.others:
        assert verdicts(HasOthersBesideIt.from_pretrained(tmp_path)) == {}
    made = [*HasOthersBesideIt.beside[:2], torch.nn.Linear(2, 2)]
    assert [layer.weight.device.type for layer in made] == ["cpu"] * 3


class GivesOtherMemory(Tiny):
    """Its parameters stay, and lie elsewhere."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        self.lin.weight.data = self.lin.weight.data * 2
        self.part.weight.data = self.part.weight.data + 1


def test_what_was_given_other_memory_is_put_back(tmp_path: Path) -> None:
    file = load_file(saved(tmp_path, "good citizen") / "model.safetensors")
    with tiedquiet.enable("on"):
        assert set(verdicts(GivesOtherMemory.from_pretrained(tmp_path))) == {"lin.weight", "part.weight"}
    with tiedquiet.enable("repair"):
        model = GivesOtherMemory.from_pretrained(tmp_path)
    assert verdicts(model) == {}
    assert all(same(tensor, file[name]) for name, tensor in model.state_dict().items() if name in file)


class LeavesItsHead(ties.AskedForByTheConfigAlone):
    """And nothing writes to the end that the file lacks."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        if module is not self.head:
            super()._init_weights(module)


def test_a_tie_of_which_one_end_was_never_written_is_tied(tmp_path: Path) -> None:
    Idiom(LeavesItsHead, missing=("head.weight",), config={"tie_word_embeddings": True}).save(tmp_path)
    with dirty_memory():  # else it may be that of an embedding which was given back, and has its values
        model = LeavesItsHead.from_pretrained(tmp_path)
        assert verdicts(model) == {"head.weight": Verdict.UNTIED}
        model.head.weight = model.embed.weight
        assert verdicts(model) == {"head.weight": Verdict.TIED}
        with tiedquiet.enable("repair"):
            model = LeavesItsHead.from_pretrained(tmp_path)
    assert model.head.weight is model.embed.weight
    assert tiedquiet.check(model).ok


def test_nothing_is_tied_to_what_two_files_have_differently(tmp_path: Path) -> None:
    stored = Idiom(ties.DoesNothing, missing=("head.weight",), config={"tie_word_embeddings": True}).save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file(stored, tmp_path / shards[0], {"format": "pt"})
    save_file({"embed.weight": stored["embed.weight"] + 1}, tmp_path / shards[1], {"format": "pt"})
    where = dict.fromkeys(stored, shards[0]) | {"embed.weight": shards[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with tiedquiet.enable("repair"):
        model = ties.DoesNothing.from_pretrained(tmp_path)
    assert verdicts(model) == {"embed.weight": Verdict.AMBIGUOUS, "head.weight": Verdict.UNTIED}
    assert model.head.weight is not model.embed.weight


class Marked(torch.Tensor):
    """A type of the user's: of such a tensor only the plain ones in it are kept."""


class PutsAnother(Tiny):
    """Puts another tensor in the place of what was read."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        self.lin.weight = torch.nn.Parameter(torch.zeros_like(self.lin.weight))


def test_a_tensor_of_another_type_is_put_back_as_it_is(tmp_path: Path) -> None:
    file = load_file(saved(tmp_path, "good citizen") / "model.safetensors")
    given = {name: value.as_subclass(Marked) for name, value in file.items()}
    config = Tiny.config_class.from_pretrained(tmp_path)
    with tiedquiet.enable("on"):
        model = PutsAnother.from_pretrained(None, config=config, state_dict=dict(given))
        assert verdicts(model)["lin.weight"] is Verdict.OVERWRITTEN
    with tiedquiet.enable("repair"):
        model = PutsAnother.from_pretrained(None, config=config, state_dict=dict(given))
    assert "lin.weight" not in verdicts(model)
    assert isinstance(model.lin.weight, Marked)
    assert same(model.lin.weight.as_subclass(torch.Tensor), file["lin.weight"])


def test_a_value_is_put_where_one_of_its_shape_is_on_meta() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    module[0].register_buffer("running_mean", torch.empty(3, device="meta"))
    state, value = dict(module.state_dict(keep_vars=True)), torch.arange(3.0)
    assert not put_in_place(module, state, "0.running_mean", value[:2])
    assert not put_in_place(module, state, "0.running_var", value), "it has values"
    assert put_in_place(module, state, "0.running_mean", value)
    assert torch.equal(module[0].running_mean, value)
    assert state["0.running_mean"] is module[0].running_mean
    assert not isinstance(module[0].running_mean, torch.nn.Parameter)
    assert torch.equal(module[0].running_var, torch.ones(3))
