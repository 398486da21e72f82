"""Adapters of a Trainer's model, which it looks for in one place only: in best models, and on resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.training import EVALUATED, llama, trainer_of
from tiedquiet import LoadError, Verdict
from tiedquiet.doors import resumed_adapters, trainer

peft = pytest.importorskip("peft")
FILE = "adapter_model.safetensors"
# Which adapters a model has, with what each is of, and which are active.
MANY: dict[str, tuple[dict[str, str], list[str]]] = {
    "one of another name": ({"mine": "q_proj"}, ["mine"]),
    "two, both active": ({"default": "q_proj", "two": "v_proj"}, ["default", "two"]),
    "two, the second active": ({"default": "q_proj", "two": "q_proj"}, ["two"]),
}


def with_adapters(runs: Any, adapters: dict[str, str], active: list[str]) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(runs(llama) / "base")
    first, *others = adapters
    of = {name: peft.LoraConfig(target_modules=[target], r=2) for name, target in adapters.items()}
    model = peft.get_peft_model(base, of[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, of[name])
    model.base_model.set_adapter(active)
    return model


def trained(runs: Any, folder: Path, name: str) -> tuple[Any, Path]:
    """A model that has taken its best values back, and where these are."""
    model = with_adapters(runs, *MANY[name])
    run = trainer_of(model, folder, 4, load_best_model_at_end=True, **EVALUATED)
    run.train()
    return model, Path(str(run.state.best_model_checkpoint))


def differing(model: Any, checkpoint: Path) -> set[str]:
    """The names of the adapters' tensors that have other values than their files."""
    now, found = model.get_base_model().state_dict(), set()
    for adapter in model.peft_config:
        for name, value in load_file(checkpoint / ("" if adapter == "default" else adapter) / FILE).items():
            key = name.removeprefix("base_model.model.").replace(".weight", f".{adapter}.weight")
            if not torch.equal(now[key], value):
                found.add(key)
    return found


def unread(model: Any) -> set[str]:
    return {f.key for f in tiedquiet.check(model).findings if f.verdict is Verdict.UNREAD}


@pytest.mark.parametrize("name", MANY)
def test_the_best_model_s_adapters(name: str, runs: Any, tmp_path: Path, printed: Printed) -> None:
    model, best = trained(runs, tmp_path / "on", name)
    lost = differing(model, best)
    assert unread(model) == lost != set()
    assert any("because Trainer read no adapter, or another" in line for line in printed.loud)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        trained(runs, tmp_path / "strict", name)
    with tiedquiet.enable("repair"):
        model, best = trained(runs, tmp_path / "repair", name)
    assert differing(model, best) == set()
    assert tiedquiet.check(model).ok
    with tiedquiet.enable("strict"):  # what it holds already, nothing has to read
        run = trainer_of(model, tmp_path)
        run.state.best_model_checkpoint = str(best)
        if name == "one of another name":
            run._load_best_model()
    assert tiedquiet.check(model).ok


@pytest.mark.parametrize("name", MANY)
def test_a_resume(name: str, runs: Any, tmp_path: Path) -> None:
    """The newest release reads all of them; 5.0.0 reads no `default` beside another."""
    with tiedquiet.enable("off"):
        _, best = trained(runs, tmp_path, name)
    for kind in ("on", "repair"):
        model = with_adapters(runs, *MANY[name])
        with tiedquiet.enable(kind):
            trainer_of(model, tmp_path)._load_from_checkpoint(str(best))
        lost = differing(model, best)
        assert unread(model) == lost
        assert tiedquiet.check(model).ok is (lost == set())
    assert lost == set()


def test_an_adapter_without_files(runs: Any, tmp_path: Path, printed: Printed) -> None:
    with tiedquiet.enable("off"):
        _, best = trained(runs, tmp_path, "two, both active")
    shutil.move(best / "two", tmp_path / "two")
    for kind in ("strict", "repair"):
        model = with_adapters(runs, *MANY["two, both active"])
        printed.records.clear()
        with tiedquiet.enable(kind):
            trainer_of(model, tmp_path)._load_from_checkpoint(str(best))
        wrong = {f.key for f in tiedquiet.check(model).findings if f.verdict is Verdict.MISSING}
        assert wrong == {key for key in model.get_base_model().state_dict() if ".two." in key}
        assert "the checkpoint has no files of the adapter two, which keeps the values that it had" in printed.loud[-1]
    model.load_adapter(str(tmp_path / "two"), "two")
    assert tiedquiet.check(model).ok
    printed.records.clear()
    trainer_of(model, tmp_path)._load_from_checkpoint(str(best))
    assert tiedquiet.check(model).ok, "it was read from elsewhere"
    assert not printed.loud


def test_files_that_lack_a_tensor(runs: Any, tmp_path: Path) -> None:
    with tiedquiet.enable("off"):
        _, best = trained(runs, tmp_path, "one of another name")
    other = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(runs(llama) / "base"), other, adapter_name="mine")
    with tiedquiet.enable("repair"):
        run = trainer_of(model, tmp_path)
        run.state.best_model_checkpoint = str(best)
        run._load_best_model()
    wrong = {f.key: f.verdict for f in tiedquiet.check(model).findings if f.verdict is not Verdict.TIED}
    assert set(wrong.values()) == {Verdict.MISSING}
    assert all("k_proj" in key for key in wrong)


def test_prompts_are_no_part_of_the_model(runs: Any, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(runs(llama) / "base")
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert resumed_adapters.versions(model) == {}


def breaks(*_: Any) -> Any:
    raise KeyError("injected")


@pytest.mark.parametrize("name", ["versions", "judge_rest"])
def test_it_survives_an_error_of_ours(
    name: str, runs: Any, tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, name, breaks)
    trained(runs, tmp_path / "on", "one of another name")
    assert any("goes on without it: KeyError" in line for line in printed.loud)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="tiedquiet failed"):
        trained(runs, tmp_path / "strict", "one of another name")
