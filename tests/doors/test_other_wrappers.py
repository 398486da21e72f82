"""What other packages do to the functions that are wrapped: put back, replaced, loaded anew; and an interrupted load."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import wrapt
from transformers import GPT2LMHeadModel, PreTrainedModel, Trainer

import tiedquiet
from tests.checkpoints import Printed, gpt2
from tests.doors.test_wrapping import run
from tests.doors.training import trainer_of
from tests.programs import LOAD
from tiedquiet import LoadError, Verdict
from tiedquiet.doors import call, wrapping
from tiedquiet.doors import trainer as door

OVERWRITTEN = ["transformer.ln_f.weight"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    return tmp_path


def lost(model: Any) -> list[str]:
    return [finding.key for finding in tiedquiet.check(model).findings if finding.verdict is Verdict.OVERWRITTEN]


def writes(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A `from_pretrained` that overwrites what it has loaded."""
    model = super(cls, cls).from_pretrained(*args, **kwargs)
    model.transformer.ln_f.weight.data.zero_()
    return model


def through(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


def closure(function: Any) -> Any:
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Functions of `PreTrainedModel` that are as they were again when the test is over."""
    names = ["from_pretrained", "_load_pretrained_model", "_move_missing_keys_from_meta_to_device"]
    tiedquiet.disable()
    originals = {name: vars(PreTrainedModel)[name] for name in names}
    tiedquiet.enable("on")
    yield names
    for name, original in originals.items():
        setattr(PreTrainedModel, name, original)


def states() -> dict[str, tuple[str, bool]]:
    return {name.rpartition(".")[2]: (state, well) for name, state, well in wrapping.states()}


def test_where_the_originals_were_put_back_they_are_wrapped_again(path: Path, names: list[str]) -> None:
    """As when a package undoes what it did before tiedquiet came."""
    for name in names:
        setattr(PreTrainedModel, name, vars(PreTrainedModel)[name].__wrapped__)
        assert states()[name] == ("not wrapped: taken off since", False)
    with tiedquiet.enable("strict"), pytest.raises(LoadError):
        GPT2LMHeadModel.from_pretrained(path, tie_word_embeddings=False)
    assert {states()[name] for name in names} == {("wrapped", True)}


def test_what_another_package_s_wrapper_leads_to_is_not_wrapped_twice(
    path: Path, names: list[str], printed: Printed
) -> None:
    ours = vars(PreTrainedModel)["_move_missing_keys_from_meta_to_device"]
    PreTrainedModel._move_missing_keys_from_meta_to_device = closure(ours)
    theirs = vars(PreTrainedModel)["_move_missing_keys_from_meta_to_device"]
    own = PreTrainedModel.from_pretrained
    PreTrainedModel.from_pretrained = classmethod(
        functools.wraps(own)(lambda cls, *a, **k: own.__get__(None, cls)(*a, **k))
    )
    around = vars(PreTrainedModel)["from_pretrained"]
    for mode in ("on", "repair", "on"):
        tiedquiet.enable(mode)
    assert vars(PreTrainedModel)["_move_missing_keys_from_meta_to_device"] is theirs
    assert vars(PreTrainedModel)["from_pretrained"] is around
    assert states()["from_pretrained"][0].startswith("wrapped, and again by ")


def test_a_library_that_was_loaded_anew_is_guarded_from_the_next_enable_on() -> None:
    again = """
import importlib, sys, tiedquiet, transformers.modeling_utils
importlib.reload(sys.modules["transformers.utils.loading_report"])
importlib.reload(transformers.modeling_utils)
for name in [name for name in sys.modules if name.startswith("transformers.models.gpt2")]:
    del sys.modules[name]
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
with tiedquiet.enable("strict"):
    try:
        GPT2LMHeadModel.from_pretrained(path, tie_word_embeddings=False)
    except tiedquiet.LoadError:
        print("stopped")
tiedquiet.disable()
print(type(vars(transformers.modeling_utils.PreTrainedModel)["from_pretrained"]).__name__)
"""
    assert run("import tiedquiet\n" + LOAD + again).stdout.split() == ["stopped", "classmethod"]


def test_an_override_that_another_package_has_wrapped_is_watched(path: Path) -> None:
    tiedquiet.disable()
    kind: Any = type("Wrapped", (GPT2LMHeadModel,), {"from_pretrained": classmethod(writes), "__module__": __name__})
    theirs = kind.from_pretrained = wrapt.FunctionWrapper(vars(kind)["from_pretrained"], through)
    tiedquiet.enable("on")
    assert lost(kind.from_pretrained(path)) == OVERWRITTEN
    tiedquiet.disable()
    assert vars(kind)["from_pretrained"] is theirs


def test_an_override_that_was_put_in_since_is_unproven_once_and_watched_from_then_on(path: Path) -> None:
    kind: Any = type("Patched", (GPT2LMHeadModel,), {"__module__": __name__})
    kind.from_pretrained = classmethod(writes)
    (finding,) = [f for f in tiedquiet.check(kind.from_pretrained(path)).findings if f.verdict is Verdict.UNPROVEN]
    assert "given another from_pretrained" in finding.why
    assert lost(kind.from_pretrained(path)) == OVERWRITTEN


def test_an_override_that_was_put_in_before_a_with_is_watched_in_it(path: Path) -> None:
    kind: Any = type("Patched", (GPT2LMHeadModel,), {"__module__": __name__})
    kind.from_pretrained = classmethod(writes)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="overwritten"):
        kind.from_pretrained(path)


@pytest.fixture
def interrupting() -> Iterator[Callable[..., None]]:
    """Interrupts a call once, at the first line after a variable of the context was set: Ctrl-C may come there."""

    def interrupting(variable: Any, act: Callable[[], object]) -> None:
        def trace(frame: FrameType, event: str, _: object) -> Any:
            if event == "line" and variable.get() is not None:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        with pytest.raises(KeyboardInterrupt):
            act()
        assert variable.get() is None

    before = sys.gettrace()
    yield interrupting
    sys.settrace(before)


def test_after_an_interrupted_load_the_next_one_is_guarded(path: Path, interrupting: Callable[..., None]) -> None:
    interrupting(call._CURRENT, lambda: GPT2LMHeadModel.from_pretrained(path))
    with tiedquiet.enable("strict"), pytest.raises(LoadError):
        GPT2LMHeadModel.from_pretrained(path, tie_word_embeddings=False)


@pytest.mark.parametrize("name", ["_load_from_checkpoint", "_issue_warnings_after_load"])
def test_after_an_interrupted_resume_the_next_one_is_guarded(
    path: Path, interrupting: Callable[..., None], name: str
) -> None:
    trainer = trainer_of(GPT2LMHeadModel(gpt2()), path)
    interrupting(door._going_on, lambda: getattr(Trainer, name)(trainer, str(path)))
