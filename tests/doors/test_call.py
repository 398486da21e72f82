"""The watch covers the whole call of `from_pretrained`; what comes after it, it leaves alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import wrapt
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from transformers import GPT2LMHeadModel, MixtralForCausalLM

import tiedquiet
from tests.checkpoints import Printed, gpt2, save
from tests.gate.test_compare import mixtral
from tests.idioms import IDIOMS, IdiomConfig, Tiny
from tiedquiet import LoadError, Verdict


def saved(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    IDIOMS["good citizen"].save(folder)
    return folder


def verdicts(model: nn.Module) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in tiedquiet.check(model).findings}


class Leaves(TorchDispatchMode):
    """Somebody's mode around what it overrides: leaving it takes away whatever lies on top."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class ReadsByItself(Tiny):
    @classmethod
    def from_pretrained(cls, path: Path, **_: Any) -> Any:
        model = cls(IdiomConfig())
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
def test_what_a_class_reads_by_itself_is_unproven(mode: str, tmp_path: Path) -> None:
    with tiedquiet.enable(mode):
        model = ReadsByItself.from_pretrained(saved(tmp_path))
    (finding,) = tiedquiet.check(model).findings
    assert (finding.key, finding.verdict) == ("", Verdict.UNPROVEN)
    assert "code of its class" in finding.why
    assert not tiedquiet.check(model).ok


class ReadsUnderAMode(Tiny):
    @classmethod
    def _load_pretrained_model(cls, *args: Any, **kwargs: Any) -> Any:
        with Leaves():
            return super()._load_pretrained_model(*args, **kwargs)


@pytest.mark.parametrize("fails", [False, True])
def test_no_mode_is_left_behind(fails: bool, tmp_path: Path) -> None:
    class Under(ReadsUnderAMode):
        def eval(self) -> "Under":
            if fails:
                raise ArithmeticError("the load's own")
            return super().eval()

    folder = saved(tmp_path)
    with Leaves() as around:
        if fails:
            with pytest.raises(ArithmeticError, match="the load's own"):
                Under.from_pretrained(folder)
        else:
            Under.from_pretrained(folder)
        assert _get_current_dispatch_mode_stack() == [around]
    assert _get_current_dispatch_mode_stack() == []


class MakesMore(Tiny):
    """Puts layers in once the files have been read; one of them is another's weight."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        model.more, model.same = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
        model.same.weight = model.lin.weight
        return model


def test_what_a_class_puts_in_after_reading_comes_from_no_file(tmp_path: Path) -> None:
    with tiedquiet.enable("strict"):
        model = MakesMore.from_pretrained(saved(tmp_path))
    assert verdicts(model) == {"more.weight": Verdict.MISSING}


class Zeroes:
    """A mixin that is no model itself."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model.lin.weight.data.zero_()
        return model


class WithMixin(Zeroes, Tiny):
    pass


class Picks(Tiny):
    """A factory: what it loads is of a class below."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not Picks:
            return super().from_pretrained(*args, **kwargs)
        model = Picked.from_pretrained(*args, **kwargs)
        model.lin.weight.data.zero_()
        return model


class Picked(Picks):
    pass


class Static(Tiny):
    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        model = Tiny.from_pretrained(*args, **kwargs)
        model.lin.weight.data.zero_()
        return model


class AsksAStaticOne(Tiny):
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        model.other = Static.from_pretrained(*args, **kwargs)
        return model


def test_a_static_one_that_another_class_asks_has_a_call_of_its_own(tmp_path: Path) -> None:
    model = AsksAStaticOne.from_pretrained(saved(tmp_path))
    assert verdicts(model) == {"other.lin.weight": Verdict.OVERWRITTEN}
    assert verdicts(model.other) == {"lin.weight": Verdict.OVERWRITTEN}


@pytest.mark.parametrize("kind", [WithMixin, Picks, Static])
def test_a_from_pretrained_of_a_mixin_or_a_factory_is_watched_until_it_returns(kind: Any, tmp_path: Path) -> None:
    assert verdicts(kind.from_pretrained(saved(tmp_path))) == {"lin.weight": Verdict.OVERWRITTEN}
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"lin\.weight by \w+\.from_pretrained"):
        kind.from_pretrained(tmp_path)


def test_a_mixin_has_its_own_function_again_when_switched_off() -> None:
    assert isinstance(vars(Zeroes)["from_pretrained"], wrapt.FunctionWrapper)
    tiedquiet.disable()
    try:
        assert type(vars(Zeroes)["from_pretrained"]) is classmethod
    finally:
        tiedquiet.enable("on")
    assert isinstance(vars(Zeroes)["from_pretrained"], wrapt.FunctionWrapper)


class ReturnsACopy(Tiny):
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(super().from_pretrained(*args, **kwargs))


@pytest.mark.parametrize("how", [{}, {"output_loading_info": True}])
def test_a_copy_that_is_returned_has_the_record(how: Any, tmp_path: Path) -> None:
    loaded = ReturnsACopy.from_pretrained(saved(tmp_path), **how)
    model = loaded[0] if how else loaded
    assert tiedquiet.check(model).ok
    assert [name for name in vars(model) if "tiedquiet" in name] == ["_tiedquiet_record"]


def test_what_overrides_from_pretrained_is_its_own_again_when_switched_off(tmp_path: Path) -> None:
    class Own(Tiny):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return super().from_pretrained(*args, **kwargs)

    class Wrapped(Own):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return super().from_pretrained(*args, **kwargs)

    ours, somebody_s = vars(Own)["from_pretrained"], classmethod(lambda cls, *_: None)
    Wrapped.from_pretrained = somebody_s  # type: ignore[method-assign, assignment]
    tiedquiet.disable()
    try:
        original = vars(Own)["from_pretrained"]
        assert original is not ours
        assert isinstance(original, classmethod)
        assert vars(Wrapped)["from_pretrained"] is somebody_s
        assert tiedquiet.check(Own.from_pretrained(saved(tmp_path))).stored == 0
    finally:
        tiedquiet.enable()
    assert vars(Own)["from_pretrained"] is not original, "it is there already, and is wrapped again"
    assert tiedquiet.check(Own.from_pretrained(tmp_path)).ok


def test_an_adapter_of_a_broken_base_stops_strict(tmp_path: Path, printed: Printed) -> None:
    peft = pytest.importorskip("peft")

    class Broken(GPT2LMHeadModel):
        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights(*args, **kwargs)
            if not self.transformer.wpe.weight.is_meta:
                self.transformer.wpe.weight.data.zero_()

    save(GPT2LMHeadModel(gpt2()), tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True, init_lora_weights=False)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"transformer\.wpe\.weight by"):
        Broken.from_pretrained(tmp_path / "adapter")
    whole = Broken.from_pretrained(tmp_path / "adapter")
    assert verdicts(whole)["transformer.wpe.weight"] is Verdict.OVERWRITTEN

    class Merges(GPT2LMHeadModel):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            model = super().from_pretrained(*args, **kwargs)
            model.transformer.h[0].attn.c_attn.merge()
            return model

    merged = Merges.from_pretrained(tmp_path / "adapter")
    assert Verdict.OVERWRITTEN not in verdicts(merged).values(), "the load of the base model is over by then"


class LooksAtAll(MixtralForCausalLM):
    """Looks at every tensor that was read; those of the experts were converted while they were."""

    touched: Any = staticmethod(lambda data: None)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        for name, parameter in self.named_parameters():
            if not parameter.is_meta and "experts" in name:
                type(self).touched(parameter.data.numpy())


def test_what_was_converted_is_compared_with_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixtral().save_pretrained(tmp_path)
    assert tiedquiet.check(LooksAtAll.from_pretrained(tmp_path)).ok
    monkeypatch.setattr(LooksAtAll, "touched", staticmethod(lambda data: data.fill(0)))
    lost = verdicts(LooksAtAll.from_pretrained(tmp_path))
    assert lost
    assert set(lost.values()) == {Verdict.OVERWRITTEN}


class WritesThroughWhatItWasGiven(Tiny):
    given: Any = None

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        if not self.lin.weight.is_meta:
            type(self).given["lin.weight"].numpy()[:] = 7


def test_a_state_dict_is_not_compared_with_itself(tmp_path: Path) -> None:
    file = IDIOMS["good citizen"].save(tmp_path)
    WritesThroughWhatItWasGiven.given = given = dict(file)
    model = WritesThroughWhatItWasGiven.from_pretrained(None, config=IdiomConfig(), state_dict=given)
    assert model.lin.weight.eq(7).all() == (verdicts(model) == {"lin.weight": Verdict.OVERWRITTEN})
