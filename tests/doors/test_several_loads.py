"""Several loads in one call of `from_pretrained`: each is judged by itself."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.test_call import saved, verdicts
from tests.idioms import Tiny
from tiedquiet import Verdict


class LoadsAnother(Tiny):
    """Loads a second model in its own `from_pretrained`, and writes to the first one meanwhile."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        model.other = Tiny.from_pretrained(*args, **kwargs)
        model.lin.weight.data.mul_(2)
        model.other.part.weight.data.mul_(2)
        return model


def test_a_load_inside_a_load_is_judged_when_it_returns(tmp_path: Path) -> None:
    model = LoadsAnother.from_pretrained(saved(tmp_path))
    assert verdicts(model) == {"lin.weight": Verdict.OVERWRITTEN}
    assert tiedquiet.check(model.other).ok, "what is done to it afterwards is its owner's business"
    assert tiedquiet.check(model).total == 2 * tiedquiet.check(model.other).total


class AddsToAnother(Tiny):
    """Puts a layer into a second model that it loads, once that is loaded."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        model.other = Tiny.from_pretrained(*args, **kwargs)
        model.other.more = torch.nn.Linear(4, 4, bias=False)
        return model


def test_what_is_put_into_a_model_that_was_loaded_inside_comes_from_no_file(tmp_path: Path) -> None:
    model = AddsToAnother.from_pretrained(saved(tmp_path))
    assert verdicts(model) == {"other.more.weight": Verdict.MISSING}
    assert not tiedquiet.check(model).ok


class LoadsTwice(Tiny):
    """Writes to the first model once the second is loaded."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        first, second = (super(LoadsTwice, cls).from_pretrained(*args, **kwargs) for _ in range(2))
        first.lin.weight.data.mul_(2)
        second.other = first
        return second


class MakesOneAnew(Tiny):
    """Loads a model of a class below as well, and returns another one that has all of its own."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not MakesOneAnew:
            return super().from_pretrained(*args, **kwargs)
        below, own = Below.from_pretrained(*args, **kwargs), super().from_pretrained(*args, **kwargs)
        model = cls(own.config)
        model.load_state_dict(own.state_dict())
        below.lin.weight.data.mul_(2)
        model.other = below
        return model


class Below(MakesOneAnew):
    pass


@pytest.mark.parametrize("kind", [LoadsTwice, MakesOneAnew])
def test_of_two_loads_in_one_call_each_is_judged_by_itself(kind: Any, tmp_path: Path) -> None:
    model = kind.from_pretrained(saved(tmp_path))
    other = vars(model)["_modules"].pop("other")
    assert tiedquiet.check(model).ok
    assert verdicts(other) == {"lin.weight": Verdict.OVERWRITTEN}


class Keeps(Tiny):
    """Loads each time, and returns what it returned the first time."""

    kept: Any = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        cls.kept = cls.kept or model
        return cls.kept


def test_what_was_loaded_before_is_not_what_this_call_has_read(tmp_path: Path, printed: Printed) -> None:
    with torch.no_grad():
        Keeps.from_pretrained(saved(tmp_path)).lin.weight.mul_(2)  # it was trained since
    with tiedquiet.enable("strict"):
        assert tiedquiet.check(Keeps.from_pretrained(tmp_path)).ok
    assert not printed.loud


class Retries(Tiny):
    """Takes a second try after a first that failed late, as one may where the GPU is full."""

    kept: Any = None
    is_kept_meanwhile = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        Retries.kept = None
        try:
            return super().from_pretrained(*args, **kwargs)
        except MemoryError:
            pass
        gc.collect()
        Retries.is_kept_meanwhile = cls.kept() is not None
        assert _get_current_dispatch_mode_stack() == []
        return super().from_pretrained(*args, **kwargs)

    def eval(self) -> "Retries":
        if Retries.kept is None:
            Retries.kept = weakref.ref(self)
            self.lin.weight.data.zero_()
            raise MemoryError
        return super().eval()


def test_a_second_try_is_judged_and_the_first_is_let_go(tmp_path: Path, printed: Printed) -> None:
    with tiedquiet.enable("strict"):
        model = Retries.from_pretrained(saved(tmp_path))
    assert tiedquiet.check(model).ok
    assert not Retries.is_kept_meanwhile
    assert printed.loud == []


class LoadsElsewhere(Tiny):
    """Has another thread load it, which has this one's context and goes on with other work: `asyncio.to_thread`."""

    worker = ThreadPoolExecutor(1)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        load = partial(super().from_pretrained, *args, **kwargs)
        return cls.worker.submit(copy_context().run, load).result()


def test_a_load_for_a_call_of_another_thread_leaves_nothing_in_its_own(tmp_path: Path) -> None:
    assert tiedquiet.check(LoadsElsewhere.from_pretrained(saved(tmp_path))).ok
    assert LoadsElsewhere.worker.submit(_get_current_dispatch_mode_stack).result() == []
