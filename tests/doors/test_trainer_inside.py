"""A Trainer whose model is inside another: compiled, in an adapter's wrapper of peft, in a module of the user's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainingArguments

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.test_trainer_overrides import SaysNothing
from tests.doors.training import LOSSY, differing, llama, llava, mixtral, right, state, trainer_of
from tiedquiet import LoadError, Verdict

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

# Each with what it has tied, which is the tensor of another name.
TIED: dict[Callable[[], Any], set[str]] = {llama: {"lm_head.weight"}, llava: set(), mixtral: set()}


class Holder(torch.nn.Module):
    """A module of the user's around a model."""

    _keys_to_ignore_on_save = None

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


class WithValue(Holder):
    """The same with a head of its own."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.value = torch.nn.Linear(32, 1)


class WithTwin(Holder):
    """The same with a head that has the name of the model's, in a module whose name is as long."""

    def __init__(self, inner: Any) -> None:
        super().__init__(torch.nn.ModuleDict({"lm_head": torch.nn.Linear(32, 64, bias=False)}))
        self.other = inner


def lora(model: Any, *targets: str) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets or ("q_proj", "v_proj")), r=2))


def resumed_in(wrap: Callable[[Any], Any], build: Callable[[], Any], folder: Path, checkpoint: Path) -> tuple[Any, Any]:
    model = type(build()).from_pretrained(folder / "base")
    whole = wrap(model)
    trainer_of(whole, folder)._load_from_checkpoint(str(checkpoint))
    return model, whole


def own_values(model: Any) -> dict[str, torch.Tensor]:
    """A model's values under the names that they had before peft came, without an adapter's."""
    return {key.replace(".base_layer", ""): value for key, value in state(model).items() if "lora" not in key}


@pytest.mark.parametrize("build", TIED)
@pytest.mark.parametrize("wrap", [torch.compile, Holder, WithValue, lora])
def test_a_wrapped_model_resumed_from_the_checkpoint_of_a_plain_one(wrap: Any, build: Any, runs: Any) -> None:
    folder = runs(build)
    checkpoint = folder / "checkpoint-2"
    truth = right(build, checkpoint)
    model, whole = resumed_in(wrap, build, folder, checkpoint)
    lost = {key for key, value in own_values(model).items() if not torch.equal(value, truth[key])}
    lost -= TIED[build]
    assert lost
    for proof, start in (tiedquiet.check(model), ""), (tiedquiet.check(whole), "inner." if wrap is WithValue else ""):
        assert lost <= {f.key.removeprefix(start) for f in proof.findings if f.verdict is Verdict.UNREAD}
        assert not proof.ok
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        resumed_in(wrap, build, folder, checkpoint)


@pytest.mark.parametrize("build", TIED)
@pytest.mark.parametrize("wrap", [torch.compile, Holder, WithValue, lora])
def test_repair_reads_into_the_wrapped_model(wrap: Any, build: Any, runs: Any, printed: Printed) -> None:
    folder = runs(build)
    checkpoint = folder / "checkpoint-2"
    truth = right(build, checkpoint)
    model = type(build()).from_pretrained(folder / "base")
    whole = wrap(model)
    before = dict(whole.named_parameters())
    with tiedquiet.enable("repair"):
        trainer_of(whole, folder)._load_from_checkpoint(str(checkpoint))
    now = own_values(model)
    assert all(torch.equal(now[key], value) for key, value in truth.items())
    assert all(dict(whole.named_parameters())[name] is parameter for name, parameter in before.items())
    rest = {f.key for f in tiedquiet.check(model).findings if f.verdict is not Verdict.TIED}
    assert all("lora_" in key for key in rest), "what the checkpoint does not have is still missing"
    assert tiedquiet.check(model).total == len(model.state_dict()), "what is beside it is not counted"
    outside = {f.key for f in tiedquiet.check(whole).findings if f.verdict is not Verdict.TIED}
    assert outside == ({"value.weight", "value.bias"} if wrap is WithValue else rest)
    listed = " ".join(printed.of("transformers.trainer"))
    assert ("value.weight" in listed) is (wrap is WithValue)
    assert ("lora_A" in listed) is (wrap is lora)
    assert "embed_tokens" not in listed
    (line,) = printed.confirmed
    assert "read by TIEDQUIET=repair, because the checkpoint has no prefix where the model has " in line


def test_what_lies_beside_the_model_is_none_of_it(runs: Any) -> None:
    folder = runs(llava)
    model = type(llava()).from_pretrained(folder / "base")
    whole = WithTwin(model)
    before = whole.inner.lm_head.weight.clone()
    with tiedquiet.enable("repair"):
        trainer_of(whole, folder)._load_from_checkpoint(str(folder / "checkpoint-2"))
    assert differing(model, right(llava, folder / "checkpoint-2")) == set()
    assert torch.equal(whole.inner.lm_head.weight, before)
    assert tiedquiet.check(model).ok
    assert not tiedquiet.check(whole).ok


@pytest.mark.parametrize("build", TIED)
@pytest.mark.parametrize("wrap", [torch.compile, lambda model: model], ids=["compiled", "plain"])
def test_the_checkpoint_of_a_compiled_model(wrap: Any, build: Any, runs: Any, tmp_path: Path, printed: Printed) -> None:
    """It has the wrapper's prefix before every name, the published names after it."""
    trained = type(build()).from_pretrained(runs(build) / "checkpoint-2")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    trainer_of(torch.compile(trained), tmp_path).save_model(str(tmp_path / "c"))
    assert all(key.startswith("_orig_mod.") for key in load_file(tmp_path / "c" / "model.safetensors"))
    printed.records.clear()
    model, whole = resumed_in(wrap, build, runs(build), tmp_path / "c")
    unread = {f.key for f in tiedquiet.check(whole).findings if f.verdict is Verdict.UNREAD}
    assert unread >= differing(model, state(trained)) - TIED[build]
    assert len(printed.loud) == bool(unread)
    with tiedquiet.enable("repair"):
        model, whole = resumed_in(wrap, build, runs(build), tmp_path / "c")
    assert differing(model, state(trained)) == set()
    assert tiedquiet.check(model).ok
    assert tiedquiet.check(whole).ok
    with tiedquiet.enable("strict"):  # what it holds already, nothing has to read
        trainer_of(whole, tmp_path)._load_from_checkpoint(str(tmp_path / "c"))


def test_a_prefix_under_which_not_all_finds_its_place_is_no_claim(runs: Any, tmp_path: Path) -> None:
    tensors = load_file(runs(mixtral) / "checkpoint-2" / "model.safetensors")
    stranger = {"old.stranger": torch.ones(3), **{f"old.{key}": value for key, value in tensors.items()}}
    (tmp_path / "c").mkdir()
    save_file(stranger, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    model, _ = resumed_in(lambda model: model, mixtral, runs(mixtral), tmp_path / "c")
    proof = tiedquiet.check(model)
    assert (proof.unread, proof.ok) == (0, False)


def test_what_lies_beside_a_wrapper_s_prefix_need_not_fit(runs: Any, tmp_path: Path) -> None:
    checkpoint = runs(mixtral) / "checkpoint-2"
    tensors = load_file(checkpoint / "model.safetensors")
    beside = {"teacher.weight": torch.ones(3), "value.weight": torch.ones(1, 32), "value.bias": torch.ones(1)}
    (tmp_path / "c").mkdir()
    inner = {f"inner.{key}": value for key, value in tensors.items()}
    save_file(beside | inner, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("repair"):
        model, _ = resumed_in(WithValue, mixtral, runs(mixtral), tmp_path / "c")
    assert own_values(model).keys() == right(mixtral, checkpoint).keys()
    assert all(torch.equal(own_values(model)[key], value) for key, value in right(mixtral, checkpoint).items())
    assert tiedquiet.check(model).ok


def test_a_checkpoint_of_all_that_a_peft_model_has(runs: Any, tmp_path: Path, printed: Printed) -> None:
    """Its own names, two of them of one tensor: torch reads them all."""
    trained = lora(type(llama()).from_pretrained(runs(llama) / "checkpoint-2"))
    (tmp_path / "c").mkdir()
    torch.save(trained.state_dict(), tmp_path / "c" / "pytorch_model.bin")
    printed.records.clear()
    with tiedquiet.enable("strict"):
        model, whole = resumed_in(lora, llama, runs(llama), tmp_path / "c")
    assert differing(model, state(trained.get_base_model())) == set()
    proof = tiedquiet.check(whole)
    assert (proof.ok, proof.stored) == (True, proof.total)
    whole.merge_and_unload()
    assert tiedquiet.check(model).stored == len(model.state_dict())


def test_a_wrapped_module_that_is_none_of_transformers(tmp_path: Path) -> None:
    class Own(torch.nn.Sequential):
        _keys_to_ignore_on_save = None

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return Own(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    trainer_of(build(0), tmp_path).save_model(str(tmp_path / "c"))
    model = build(1)
    with tiedquiet.enable("repair"):
        trainer_of(torch.compile(model), tmp_path)._load_from_checkpoint(str(tmp_path / "c"))
    assert differing(model, state(build(0))) == set()
    assert tiedquiet.check(model).ok


def in_each_layer(wrap: Callable[[Any], Any], model: Any) -> None:
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = wrap(layer)


def bare(key: str) -> str:
    return key.replace("_orig_mod.", "")


def compiled(layer: Any) -> Any:
    return torch.compile(layer, backend="eager")


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled])
@pytest.mark.parametrize("build", [llama, mixtral])
def test_layers_that_are_wrapped_one_by_one(wrap: Any, build: Any, runs: Any, printed: Printed) -> None:
    """A compiled layer has its part in all names; that of `checkpoint_wrapper` is in the lists of `load_state_dict`."""
    folder = runs(build)
    truth = right(build, folder / "checkpoint-2")

    def resumed() -> Any:
        model = type(build()).from_pretrained(folder / "base")
        trainer = trainer_of(model, folder)
        in_each_layer(wrap, model)
        printed.records.clear()
        trainer._load_from_checkpoint(str(folder / "checkpoint-2"))
        return model

    lost = [key for key in truth if ".layers." in key and (wrap is compiled or (build in LOSSY and LOSSY[build](key)))]
    proof = tiedquiet.check(resumed())
    assert (proof.total, proof.unread, proof.ok) == (len(truth), len(lost), not lost)
    assert ("names in the model have _orig_mod in them" in str(printed.loud)) is (wrap is compiled)
    if lost:
        with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
            resumed()
    with tiedquiet.enable("repair"):
        model = resumed()
    assert not printed.loud
    assert not any("keys in the checkpoint" in line for line in printed.of("transformers"))
    assert tiedquiet.check(model).ok
    assert {bare(key): value.tolist() for key, value in model.state_dict().items()} == {
        key: value.tolist() for key, value in truth.items()
    }


def test_layers_that_are_wrapped_and_an_override_that_says_nothing(runs: Any) -> None:
    folder = runs(mixtral)
    with tiedquiet.enable("repair"):
        model = type(mixtral()).from_pretrained(folder / "base")
        in_each_layer(checkpoint_wrapper, model)
        given = TrainingArguments(str(folder), use_cpu=True, report_to=[])
        SaysNothing(model, given)._load_from_checkpoint(str(folder / "checkpoint-2"))
    assert differing(model, right(mixtral, folder / "checkpoint-2")) == set()
