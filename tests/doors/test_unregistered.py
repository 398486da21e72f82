"""Tensors that a module has in an attribute: transformers builds a model on meta, and moves what is registered."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiedquiet
from tests.checkpoints import Printed
from tests.idioms import Idiom, Tiny
from tiedquiet import LoadError, Verdict
from tiedquiet.proof.reading import Reading
from tiedquiet.proof.stored import judge_placeholders
from tiedquiet.proof.survey import survey
from tiedquiet.proof.watch import Watch


class Positions(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.rows = torch.arange(3).flip(0)
        self.table = torch.nn.Embedding(3, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(self.rows[: x.shape[-2]])


class InAnAttribute(Tiny):
    def add(self, config: Any) -> None:
        self.positions = Positions(config.hidden_size)
        self.scale = torch.tensor(3.0)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.positions(x)


class Hidden(Tiny):
    """A teacher that no state dict is to have, and a way back to the model."""

    def add(self, config: Any) -> None:
        self.teacher = [torch.nn.Conv1d(1, 2, 1), torch.nn.BatchNorm1d(2, affine=False)]
        self.teacher[0].student = [self]
        self.part.owner = (self, "no module")


class InContainers(Tiny):
    def add(self, config: Any) -> None:
        self.tables = [torch.ones(2), torch.zeros(0), "no tensor"]
        self.both = (torch.ones(1),)
        self.named = {"cos": torch.ones(2), 4: torch.ones(1)}
        self.sizes, self.nothing = [4, 5], {"a": 1}


def unwritten(model: Any) -> list[str]:
    return [finding.key for finding in tiedquiet.check(model).findings if finding.verdict is Verdict.UNWRITTEN]


def test_it_is_told_although_torch_computes_with_it(tmp_path: Path, printed: Printed) -> None:
    """Silently: an embedding takes indices on meta for some, and returns memory that nobody wrote."""
    Idiom(InAnAttribute).save(tmp_path)
    loaded = InAnAttribute.from_pretrained(tmp_path)
    assert loaded.positions.rows.is_meta
    assert not loaded(torch.tensor([[1, 2, 3]])).is_meta
    assert unwritten(loaded) == ["positions.rows", "scale"]
    assert not tiedquiet.check(loaded).ok
    (said,) = printed.loud
    assert "unwritten, on meta, where nothing has values: positions.rows, scale. " in said
    assert said.endswith("Set TIEDQUIET=repair, or register them as buffers and compute them in _init_weights too")
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"positions\.rows, scale"):
        InAnAttribute.from_pretrained(tmp_path)


def test_repair_computes_it_as_a_buffer(tmp_path: Path, printed: Printed) -> None:
    Idiom(InAnAttribute).save(tmp_path)
    with tiedquiet.enable("repair"):
        loaded = InAnAttribute.from_pretrained(tmp_path)
    assert loaded.positions.rows.tolist() == [2, 1, 0]
    assert loaded.scale.item() == 3.0
    assert tiedquiet.check(loaded).ok
    (said,) = printed.confirmed
    assert said.endswith("never written by transformers, repaired with what __init__ computes: positions.rows, scale")
    built = Idiom(InAnAttribute).build()
    built.load_state_dict(loaded.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.eval()(ids), built(ids))


def test_what_lies_in_lists_and_dicts_is_told(tmp_path: Path, printed: Printed) -> None:
    Idiom(InContainers).save(tmp_path)
    told = ["both.0", "named.4", "named.cos", "tables.0"]
    assert unwritten(InContainers.from_pretrained(tmp_path)) == told
    with tiedquiet.enable("repair"):
        assert unwritten(InContainers.from_pretrained(tmp_path)) == told, "only an attribute can be given another"


def test_a_module_in_a_list_has_no_values_either(tmp_path: Path, printed: Printed) -> None:
    Idiom(Hidden).save(tmp_path)
    names = ["0.bias", "0.weight", "1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert unwritten(Hidden.from_pretrained(tmp_path)) == [f"teacher.{name}" for name in names]
    sound = Hidden.from_pretrained(tmp_path)
    sound.teacher = Hidden(sound.config).teacher
    assert unwritten(sound) == [], "it has values by now"


def test_what_a_model_registers_elsewhere_is_not_told(tmp_path: Path, printed: Printed) -> None:
    class Refers(Tiny):
        def add(self, config: Any) -> None:
            self.others = [self.lin, self.head]

    Idiom(Refers).save(tmp_path / "model")
    places = {"lin": "disk", **dict.fromkeys(("embed", "part", "head"), "cpu")}
    loaded = Refers.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert loaded.others[0].weight.is_meta
    assert unwritten(loaded) == []


def test_what_is_given_values_during_the_load_is_not_told(tmp_path: Path, printed: Printed) -> None:
    class Computes(InAnAttribute):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            model: Any = super().from_pretrained(*args, **kwargs)
            model.positions.rows, model.scale = torch.arange(3), torch.tensor(3.0)
            return model

    Idiom(Computes).save(tmp_path)
    with tiedquiet.enable("strict"):
        assert tiedquiet.check(Computes.from_pretrained(tmp_path)).ok


def test_it_is_told_of_each_load_once(tmp_path: Path, printed: Printed) -> None:
    Idiom(InAnAttribute).save(tmp_path / "base")
    tuned = get_peft_model(Idiom(InAnAttribute).build(), LoraConfig(target_modules=["lin"]))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = PeftModel.from_pretrained(InAnAttribute.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert len(printed.loud) == 1
    assert unwritten(model) == ["positions.rows", "scale"]


def test_a_model_that_is_to_be_on_meta_is_told_as_such(tmp_path: Path, printed: Printed) -> None:
    Idiom(InAnAttribute).save(tmp_path)
    assert unwritten(InAnAttribute.from_pretrained(tmp_path, device_map="meta")) == []


def test_a_quantiser_makes_those_of_its_layers_later() -> None:
    model = Idiom(InAnAttribute).build()
    model.scale = model.scale.to("meta")
    held = dict(model.named_parameters())
    for is_quantised in (False, True):
        reading = Reading(None, held, {}, set(), 0, is_quantised=is_quantised)  # type: ignore[arg-type]
        found = judge_placeholders(reading, set(), Watch({}, protect=False), model, survey(model))
        assert list(found) == ["scale"] * (not is_quantised)


def test_classes_of_torch_and_transformers_are_not_looked_at() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), Positions(2))
    for module in model:
        module.rows = torch.ones(2, device="meta")
    assert list(survey(model).loose) == ["1.rows"]
