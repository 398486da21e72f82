"""Adapters of a model whose vocabulary was made larger: peft saves the embeddings of the base model along with them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.test_adapters import FILE, SMALL, rename
from tests.doors.test_adapters_kinds import PROJECTIONS, are_all_in
from tests.doors.training import mixtral, trainer_of
from tiedquiet.proof import stored

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings:UserWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": PROJECTIONS},
    "the head": {"target_modules": [*PROJECTIONS, "lm_head"]},
    "tokens": {"target_modules": PROJECTIONS, "trainable_token_indices": [65, 66]},
    "whole": {"target_modules": PROJECTIONS, "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(params=[True, False], ids=["tied", "parted"])
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "tie_word_embeddings": request.param})).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def larger(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    return model


def saved(base: Path, kind: str = "", **how: Any) -> Path:
    with tiedquiet.enable("off"):
        model = peft.get_peft_model(larger(base), peft.LoraConfig(r=2, **(how or KINDS[kind])))
        for value in model.parameters():
            if value.requires_grad:
                torch.nn.init.normal_(value)
        model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


@pytest.mark.parametrize("how", [{}, {"low_cpu_mem_usage": True}], ids=["copied", "assigned"])
@pytest.mark.parametrize("kind", KINDS)
def test_sound_ones(kind: str, how: dict[str, Any], base: Path, printed: Printed) -> None:
    adapter = saved(base, kind)
    with tiedquiet.enable("strict"):
        model = peft.PeftModel.from_pretrained(larger(base), adapter, **how)
    assert are_all_in(model, adapter)
    proof = tiedquiet.check(model)
    assert proof.ok, proof
    assert not printed.loud


@pytest.mark.parametrize("kind", KINDS)
def test_those_that_transformers_loads(kind: str, base: Path, printed: Printed) -> None:
    adapter, model = saved(base, kind), larger(base)
    model.load_adapter(str(adapter))
    head = load_file(adapter / FILE).get("base_model.model.lm_head.weight")
    # Some releases do not read all of it, and up to 5.3 a tied head is parted from the embedding that is read.
    is_sound = are_all_in(model, adapter) and (head is None or torch.equal(model.get_output_embeddings().weight, head))
    assert tiedquiet.check(model).ok == is_sound
    assert bool(printed.loud) != is_sound


def test_one_of_the_two_names_that_has_other_values(base: Path) -> None:
    adapter = saved(base, "whole")
    tensors = load_file(adapter / FILE)
    again = "base_model.model.lm_head.modules_to_save.weight"
    if again not in tensors:
        pytest.skip("this release of peft writes it once")
    save_file({**tensors, again: tensors[again] + 1}, adapter / FILE, {"format": "pt"})
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match="has no place for"):
        peft.PeftModel.from_pretrained(larger(base), adapter)


@pytest.mark.parametrize("how", [{}, {"low_cpu_mem_usage": True}], ids=["copied", "left on meta"])
@pytest.mark.parametrize("kind", ["layers", "the head"])
def test_all_under_the_names_of_a_wrapper(kind: str, how: dict[str, Any], base: Path, printed: Printed) -> None:
    """What `repair` reads is all of it: the base model's own, and what peft had no values for."""
    adapter = saved(base, kind)
    tensors = load_file(adapter / FILE)
    rename(adapter, lambda key: f"_orig_mod.{key}")
    of = f"{len(tensors)} of {len(tensors)} tensors were NOT read"
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match=of):
        peft.PeftModel.from_pretrained(larger(base), adapter, **how)
    with tiedquiet.enable("repair"):
        model = peft.PeftModel.from_pretrained(larger(base), adapter, **how)
    assert are_all_in(model, adapter)
    proof = tiedquiet.check(model)
    assert proof.ok, proof
    assert not printed.loud
    again = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(torch.equal(again[key], tensors[key]) for key in again)
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    assert not any(value.requires_grad for value in model.parameters())


def test_what_no_file_has_and_peft_leaves_on_meta(base: Path, printed: Printed) -> None:
    adapter = saved(base, "layers")
    rename(adapter, lambda key: None if "q_proj" in key else key)
    peft.PeftModel.from_pretrained(larger(base), adapter, low_cpu_mem_usage=True)
    (line,) = printed.loud
    assert "not in its files under their names, and have no values, because low_cpu_mem_usage left them on meta" in line


def with_the_base_s_own(tmp_path: Path) -> Path:
    """An adapter under a wrapper's names: where the embeddings are adapted, peft saves the base's as they were."""
    Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "tie_word_embeddings": False})).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=[*PROJECTIONS, "embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda key: f"_orig_mod.{key}")
    return tmp_path / "adapter"


def test_the_base_s_own_that_it_has_already(tmp_path: Path, printed: Printed) -> None:
    adapter = with_the_base_s_own(tmp_path)
    with tiedquiet.enable("repair"):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    assert are_all_in(model, adapter)
    assert not printed.loud
    assert not any("base_layer" in line for line in printed.confirmed)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # of an older peft's
def test_the_base_s_own_under_its_own_name(tmp_path: Path, printed: Printed) -> None:
    """Over merged experts peft may read an adapter whose names lack its prefix, but for the base model's own."""
    mixtral().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapter = tmp_path / "adapter"
    peft.get_peft_model(model, config).save_pretrained(adapter)
    rename(adapter, lambda key: key.removeprefix("base_model.model."))
    tensors = load_file(adapter / FILE)
    own = next(key for key in tensors if "lm_head" in key and "lora" not in key)
    for values in (tensors[own], tensors[own] + 1):
        save_file({**tensors, own: values}, adapter / FILE, {"format": "pt"})
        printed.records.clear()
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
        is_sound = are_all_in(model, adapter)
        assert (tiedquiet.check(model).ok, bool(printed.loud)) == (is_sound, not is_sound)


def test_the_base_s_own_in_another_shape(tmp_path: Path) -> None:
    """It is none of the base's that is here: the model has no place for it."""
    adapter = with_the_base_s_own(tmp_path)
    tensors = load_file(adapter / FILE)
    (own,) = (key for key in tensors if "base_layer" in key)
    save_file({**tensors, own: tensors[own][:-1].clone()}, adapter / FILE, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = model.get_input_embeddings().weight.clone()
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match="has no place for"):
        peft.PeftModel.from_pretrained(model, adapter)
    with tiedquiet.enable("repair"):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    assert torch.equal(model.get_base_model().get_input_embeddings().base_layer.weight, before)


def test_the_base_s_embeddings_stay_when_the_adapter_is_taken_away(base: Path) -> None:
    model = peft.PeftModel.from_pretrained(larger(base), saved(base, "layers"), low_cpu_mem_usage=True)
    assert tiedquiet.check(model.unload()).ok


@pytest.mark.parametrize("base", [True], indirect=True, ids=["tied"])
@pytest.mark.parametrize("how", ["copied", "assigned", "by transformers"])
def test_a_head_that_is_parted_from_the_embedding_that_the_adapter_brings(
    how: str, base: Path, printed: Printed
) -> None:
    """Peft copies it into the base model's, or puts it in its place; the head is then what it was."""
    adapter = saved(base, target_modules=[*PROJECTIONS, "embed_tokens"])

    def load() -> tuple[Any, Any]:
        model = larger(base)
        if how == "by transformers":
            model.load_adapter(str(adapter))
        else:
            peft.PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=how == "assigned")
        return model, model.get_input_embeddings().base_layer.weight

    model, embedding = load()
    is_parted = not torch.equal(model.lm_head.weight, embedding)
    assert is_parted == (how != "copied")
    assert tiedquiet.check(model).ok != is_parted
    assert any("lm_head.weight is not model.embed_tokens.weight" in line for line in printed.loud) == is_parted
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match="untied") if is_parted else nullcontext():
        load()


def test_no_value_of_a_cast_base_is_looked_at_for_its_ties(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes a pass over all of the memory: `check` makes it, and no load."""
    adapter, looked_at = saved(base, "layers"), []
    is_at_limit = stored.is_at_limit
    monkeypatch.setattr(stored, "is_at_limit", lambda tensor: looked_at.append(tensor) or is_at_limit(tensor))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    model.resize_token_embeddings(70)
    model = peft.PeftModel.from_pretrained(model, adapter)
    assert not looked_at
    tiedquiet.check(model)
    assert looked_at


def test_the_best_model_s_adapter_that_trainer_does_not_read(base: Path) -> None:
    folder = base.parent / "checkpoint-2"
    for is_first in (True, False):
        model = peft.get_peft_model(
            larger(base), peft.LoraConfig(r=2, target_modules=PROJECTIONS), adapter_name="other"
        )
        if is_first:
            model.save_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    trainer = trainer_of(model, base.parent)
    trainer.state.best_model_checkpoint = str(folder)
    with tiedquiet.enable("repair"):
        trainer._load_best_model()
    assert are_all_in(model, folder / "other")
    assert tiedquiet.check(model).ok
