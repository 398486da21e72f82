"""Adapters of a Trainer's model, which it looks for in one place only: in best models, and on resume."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.training import EVALUATED, SMALL, llama, state, trainer_of
from tiedquiet import LoadError, Verdict
from tiedquiet.doors import trainer

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


def test_files_that_lack_a_tensor(runs: Any, tmp_path: Path, printed: Printed) -> None:
    with tiedquiet.enable("off"):
        _, best = trained(runs, tmp_path, "one of another name")
    other = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2)
    for how in ("on", "repair"):
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(runs(llama) / "base"), other, adapter_name="mine")
        printed.records.clear()
        with tiedquiet.enable(how):
            run = trainer_of(model, tmp_path)
            run.state.best_model_checkpoint = str(best)
            run._load_best_model()
        found = {f.key: f.verdict for f in tiedquiet.check(model).findings}
        assert {key for key, verdict in found.items() if verdict is Verdict.MISSING} == {
            f"model.layers.{layer}.self_attn.k_proj.lora_{which}.mine.weight" for layer in (0, 1) for which in "AB"
        }
        assert ("unread" in printed.loud[0]) == (how == "on"), "what repair has read is not lost"
        assert "4 of 8 tensors of the adapter are not in its files" in printed.loud[-1]
        assert "q_proj" not in printed.loud[-1], "the files have those"


@pytest.mark.parametrize("is_best", [False, True])
def test_what_another_door_has_judged_is_told_once(is_best: bool, runs: Any, tmp_path: Path, printed: Printed) -> None:
    """Trainer has peft's `load_adapter` read the adapter called `default`."""
    with tiedquiet.enable("off"):
        with_adapters(runs, {"default": "q_proj"}, ["default"]).save_pretrained(tmp_path)
    other = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(runs(llama) / "base"), other)
    run = trainer_of(model, tmp_path)
    run.state.best_model_checkpoint = str(tmp_path)
    printed.records.clear()
    run._load_best_model() if is_best else run._load_from_checkpoint(str(tmp_path))
    assert ["4 of 8 tensors of the adapter are not in its files" in line for line in printed.loud] == [True]
    assert tiedquiet.check(model).missing == 4


@pytest.mark.parametrize("is_best", [False, True])
def test_what_another_door_found_unread_stays_that(is_best: bool, runs: Any, tmp_path: Path, printed: Printed) -> None:
    """Nothing was written to the adapter, and its file has none of its names."""
    with tiedquiet.enable("off"):
        with_adapters(runs, {"default": "q_proj"}, ["default"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"module.{name}": tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    model = with_adapters(runs, {"default": "q_proj"}, ["default"])
    run = trainer_of(model, tmp_path)
    run.state.best_model_checkpoint = str(tmp_path)
    printed.records.clear()
    run._load_best_model() if is_best else run._load_from_checkpoint(str(tmp_path))
    (line,) = printed.loud
    assert "unread, 4 of 4 tensors" in line
    proof = tiedquiet.check(model)
    assert (proof.unread, proof.missing) == (4, 0)


def test_without_files_and_of_a_base_that_was_not_loaded(runs: Any, tmp_path: Path, printed: Printed) -> None:
    """`off` says nothing; else it is told, and there is no earlier load that may have read it."""
    for how in ("off", "on"):
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2), adapter_name="mine")
        run = trainer_of(model, tmp_path)
        run.state.best_model_checkpoint = str(tmp_path)
        with tiedquiet.enable(how):
            run._load_best_model()
        said = "no files of the adapter mine, which keeps the values that it had"
        assert [said in line for line in printed.loud] == [True] * (how == "on")


KINDS: dict[str, Any] = {
    "magnitudes": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "use_dora": True}),
    "biases": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "bias": "all"}),
    "ranks that change": (
        "AdaLoraConfig",
        {"init_r": 3, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"]},
    ),
    "made from a seed": ("VeraConfig", {"r": 2, "target_modules": ["q_proj"], "save_projection": False}),
    "one bank": (
        "VBLoRAConfig",
        {"r": 2, "target_modules": ["q_proj"], "num_vectors": 8, "vector_length": 4, "topk": 2},
    ),
    "one vector": ("UniLoraConfig", {"target_modules": ["q_proj"]}),
    "vectors": ("TinyLoraConfig", {"target_modules": ["q_proj"]}),
    "in the attention": ("AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 1}),
    "prompts": ("PromptTuningConfig", {"num_virtual_tokens": 2}),
}


def of_kind(runs: Any, kind: str, adapter: str) -> Any:
    """A model with an adapter of some kind; the base has biases, which some kinds train."""
    name, how = KINDS[kind]
    if not hasattr(peft, name):
        pytest.skip("this release of peft has no such kind")
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(runs(with_biases) / "base")
    config = getattr(peft, name)(task_type="CAUSAL_LM", **how)
    return peft.get_peft_model(base, config, adapter_name=adapter)


def with_biases() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True))


def changed(model: Any) -> dict[str, torch.Tensor]:
    """What an adapter is once it was trained: every tensor has other values than one that begins."""
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value)
    return state(model)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_peft_saves_of_a_best_model(kind: str, runs: Any, tmp_path: Path) -> None:
    """Under the names that the files have for it: what has no adapter's name, too, and not what no file has."""
    with tiedquiet.enable("off"):
        truth = changed(model := of_kind(runs, kind, "mine"))
        model.save_pretrained(tmp_path)
    for how in ("on", "strict", "repair"):
        model = of_kind(runs, kind, "mine")
        run = trainer_of(model, tmp_path)
        run.state.best_model_checkpoint = str(tmp_path)
        raises = pytest.raises(LoadError, match="unread") if how == "strict" else nullcontext()
        with tiedquiet.enable(how), raises:
            run._load_best_model()
        proof = tiedquiet.check(model)
        lost = {key for key, value in model.state_dict().items() if not torch.equal(value, truth[key])}
        assert bool(lost) == (how != "repair")
        in_base = {key.removeprefix("base_model.model.") for key in lost if key.startswith("base_model.model.")}
        assert in_base <= {f.key for f in proof.findings if f.verdict is Verdict.UNREAD}
        assert proof.unread or not lost
        assert not proof.missing
    assert proof.ok or kind == "prompts", "of the base model nothing is known here"


def test_prompts_that_an_encoder_computes(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes is saved, the encoder is not; and that is read into what goes in."""
    computed = ("PromptEncoderConfig", {"num_virtual_tokens": 2, "encoder_hidden_size": 4})
    monkeypatch.setitem(KINDS, "computed", computed)
    for adapter, is_best in (("default", False), ("mine", True)):
        with tiedquiet.enable("off"):
            changed(model := of_kind(runs, "computed", adapter))
            model.save_pretrained(tmp_path / adapter)
        run = trainer_of(model := of_kind(runs, "computed", adapter), tmp_path)
        run.state.best_model_checkpoint = str(tmp_path / adapter)
        with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread, prompt_embeddings of the adapter"):
            run._load_best_model() if is_best else run._load_from_checkpoint(str(tmp_path / adapter))
        assert not tiedquiet.check(model).ok
    with tiedquiet.enable("strict"):  # without an encoder they are what the files have
        base = LlamaForCausalLM.from_pretrained(runs(with_biases) / "base")
        assert tiedquiet.check(peft.PeftModel.from_pretrained(base, tmp_path / "default")).ok


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
