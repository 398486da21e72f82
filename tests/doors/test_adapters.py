"""Adapters: what of their files reaches the model, by peft's functions and by transformers' own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

import tiedquiet
from tests.checkpoints import Printed
from tiedquiet import LoadError, Verdict

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    Qwen2ForCausalLM(Qwen2Config(**SMALL)).save_pretrained(folder / "base")
    for name, whole in (("adapter", ["norm"]), ("lora", [])):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        how = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": whole}
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, **how))
        for value in model.parameters():
            if value.requires_grad:
                torch.nn.init.normal_(value)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def reads_whole(saved: Path) -> bool:
    """Whether transformers itself reads what an adapter saves of whole modules; 5.16.1 and older do not."""
    with tiedquiet.enable("off"):
        return not lost(by_transformers(saved, saved / "adapter"), saved / "adapter")


@pytest.fixture
def adapter(saved: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy that a test may change, of one that its door reads as a whole."""
    load = request.getfixturevalue("load") if "load" in request.fixturenames else by_peft
    source = saved / ("adapter" if load is by_peft or request.getfixturevalue("reads_whole") else "lora")
    (tmp_path / "adapter").mkdir()
    for path in source.iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "adapter"


def by_peft(saved: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), adapter)


def by_transformers(saved: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    model.load_adapter(str(adapter))
    return model


WAYS = pytest.mark.parametrize("load", [by_peft, by_transformers])


def lost(model: Any, adapter: Path) -> set[str]:
    """The names of the tensors in an adapter's file that its model does not hold, by peft's naming."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    now = {
        "base_model.model." + name.replace(".modules_to_save.default", "").replace(".default", ""): value
        for name, value in base.named_parameters()
        if ".default" in name
    }
    return {name for name, value in load_file(adapter / FILE).items() if not torch.equal(now[name], value)}


def rename(adapter: Path, change: Callable[[str], str | None]) -> None:
    tensors = load_file(adapter / FILE)
    save_file({new: v for key, v in tensors.items() if (new := change(key))}, adapter / FILE, {"format": "pt"})


def in_model(model: Any, part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if part in name and "default" in name}


@WAYS
def test_a_sound_adapter(load: Any, saved: Path, adapter: Path, printed: Printed) -> None:
    with tiedquiet.enable("strict"):
        model = load(saved, adapter)
    proof = tiedquiet.check(model)
    assert proof.ok, proof
    assert not printed.loud
    base = len(load_file(saved / "base" / "model.safetensors"))
    assert proof.stored == base + len(load_file(adapter / FILE))
    assert not model._load_state_dict_post_hooks


def test_whole_modules_that_transformers_does_not_read(saved: Path, reads_whole: bool, printed: Printed) -> None:
    if reads_whole:
        pytest.skip("this release reads them")
    adapter = saved / "adapter"
    printed.records.clear()
    model = by_transformers(saved, adapter)
    gone = lost(model, adapter)
    proof = tiedquiet.check(model)
    assert {finding.source for finding in proof.findings if finding.verdict is Verdict.UNREAD} == gone
    (line,) = printed.loud
    assert f"unread, {len(gone)} of {len(load_file(adapter / FILE))} tensors were NOT read" in line
    assert "PeftModel.from_pretrained" in line
    assert not lost(by_peft(saved, adapter), adapter), "the cure that it names"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        by_transformers(saved, adapter)


def test_a_name_of_peft_s_that_nothing_read(saved: Path) -> None:
    from tiedquiet.doors.adapters import note_rest
    from tiedquiet.proof.files import of_folder
    from tiedquiet.proof.reading import read

    model = by_transformers(saved, saved / "adapter")
    files = of_folder(str(saved / "adapter"), kind="adapter_model")
    key, name = "model.norm.modules_to_save.default.weight", "base_model.model.model.norm.weight"
    for other, verdict in ((files.headers[name], Verdict.UNREAD), (torch.empty(3, device="meta"), Verdict.MISSING)):
        reading = read(model, {key}, files)
        note_rest(model, reading, {name: other})
        assert (key in reading.found) == (verdict is Verdict.UNREAD), "by its name and its shape"
        assert ("" in reading.found) == (verdict is Verdict.MISSING)


@WAYS
def test_keys_under_another_prefix(load: Any, saved: Path, adapter: Path, printed: Printed) -> None:
    truth = {name: v.clone() for name, v in in_model(load(saved, adapter), "v_proj").items()}
    rename(adapter, lambda key: key.replace("model.layers", "decoder.layers") if "v_proj" in key else key)
    printed.records.clear()
    model = load(saved, adapter)
    found = {f.key: f.verdict for f in tiedquiet.check(model).findings if f.verdict is not Verdict.TIED}
    assert set(found.values()) == {Verdict.UNREAD}
    assert len(found) == len(truth) == 4
    assert any(f"4 of {len(load_file(adapter / FILE))} tensors were NOT read" in line for line in printed.loud)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread"):
        load(saved, adapter)
    with tiedquiet.enable("repair"):
        model = load(saved, adapter)
    now = in_model(model, "v_proj")
    assert all(torch.equal(now[name], value) for name, value in truth.items())
    assert tiedquiet.check(model).ok


@WAYS
def test_tensors_that_the_model_has_no_place_for(load: Any, saved: Path, adapter: Path, printed: Printed) -> None:
    rename(adapter, lambda key: key.replace("q_proj", f"{key[-13:-7]}_proj") if "layers.0" in key else key)
    printed.records.clear()
    proof = tiedquiet.check(load(saved, adapter))
    assert not proof.ok
    (whole,) = [finding for finding in proof.findings if not finding.key]
    total = len(load_file(adapter / FILE))
    assert f"{total - 2} of {total} tensors of the adapter were read" in whole.why
    assert any(f"{total - 2} of {total} tensors of the adapter were read" in line for line in printed.loud)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="of the adapter were read"):
        load(saved, adapter)


@WAYS
def test_a_file_without_half_of_them(load: Any, saved: Path, adapter: Path) -> None:
    rename(adapter, lambda key: None if "lora_B" in key else key)
    with tiedquiet.enable("strict"):  # nothing in the file says what they should be
        proof = tiedquiet.check(load(saved, adapter))
    assert {f.verdict for f in proof.findings if "lora_B" in f.key} == {Verdict.MISSING}
    assert proof.missing == 4
    assert not proof.ok


def test_tensors_that_took_the_place_of_the_base_s(saved: Path, adapter: Path, printed: Printed) -> None:
    tensors = load_file(adapter / FILE)
    base = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, base: torch.ones(64, 32)}, adapter / FILE, {"format": "pt"})
    model = by_peft(saved, adapter)
    assert bool((model.get_parameter(base) == 1).all())
    assert any(f"loading it also changed tensors of the base model: {base}" in line for line in printed.of("tiedquiet"))
    assert tiedquiet.check(model).ok


@WAYS
def test_an_older_file_beside_a_newer_one(load: Any, saved: Path, adapter: Path, printed: Printed) -> None:
    own = load_file(adapter / FILE)
    name = min(own)
    os.utime(adapter / FILE, (0, 0))
    for others in ({**own, name: own[name] + 1}, {**own, "more": own[name]}, "junk"):
        torch.save(others, adapter / "adapter_model.bin")
        printed.records.clear()
        found = [f for f in tiedquiet.check(load(saved, adapter)).findings if f.verdict is not Verdict.TIED]
        assert [(f.key, f.verdict) for f in found] == [("", Verdict.AMBIGUOUS)]
        assert any("adapter_model.bin beside it is newer and was not" in line for line in printed.loud)
    torch.save(own, adapter / "adapter_model.bin")
    with tiedquiet.enable("strict"):
        assert tiedquiet.check(load(saved, adapter)).ok, "the two hold the same"
    torch.save("junk", adapter / "adapter_model.bin")
    os.utime(adapter / FILE)
    assert tiedquiet.check(load(saved, adapter)).ok


@pytest.mark.parametrize("name", ["0", "weight", "model"])
def test_an_adapter_that_is_called_like_a_part_of_the_base(name: str, saved: Path, tmp_path: Path) -> None:
    """What is known of the base stays: here, that its head is random."""
    shutil.copytree(saved / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))

    def proof_of(name: str, adapter: Path) -> tiedquiet.Proof:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return tiedquiet.check(peft.PeftModel.from_pretrained(base, adapter, adapter_name=name))

    proof = proof_of(name, saved / "adapter")
    assert [(f.key, f.verdict) for f in proof.findings] == [("lm_head.weight", Verdict.UNTIED)]
    assert proof == proof_of("default", saved / "adapter")
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda key: key.replace("q_proj", f"{key[-13:-7]}_proj") if "layers.0" in key else key)
    (whole,) = [finding for finding in proof_of(name, tmp_path / "adapter").findings if not finding.key]
    assert whole.source in load_file(tmp_path / "adapter" / FILE)


def test_a_second_adapter_adds_to_what_is_known(saved: Path, adapter: Path) -> None:
    with tiedquiet.enable("off"):
        base = AutoModelForCausalLM.from_pretrained(saved / "base")
    model = peft.PeftModel.from_pretrained(base, saved / "adapter")
    assert tiedquiet.check(model).stored == len(load_file(adapter / FILE)), "nothing is known of the base model"
    model = by_peft(saved, saved / "adapter")
    before = tiedquiet.check(model)
    rename(adapter, lambda key: None if "lora_B" in key else key)
    model.load_adapter(adapter, "second")
    proof = tiedquiet.check(model)
    assert {f.key.split(".")[-2] for f in proof.findings if f.verdict is Verdict.MISSING} == {"second"}
    assert (proof.missing, proof.stored) == (4, before.stored + len(load_file(adapter / FILE)))


def test_prompts_are_no_part_of_the_model(saved: Path, tmp_path: Path, printed: Printed) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "prompts")
    with tiedquiet.enable("strict"):
        model = by_peft(saved, tmp_path / "prompts")
    assert tiedquiet.check(model).ok
    assert not printed.confirmed
    assert not printed.loud
    with tiedquiet.enable("off"):
        base = AutoModelForCausalLM.from_pretrained(saved / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "prompts")
    assert not tiedquiet.check(model).ok, "nothing is known of the model that they are put before"
    more = {**load_file(tmp_path / "prompts" / FILE), "stranger": torch.ones(1)}
    save_file(more, tmp_path / "prompts" / FILE, {"format": "pt"})
    proof = tiedquiet.check(by_peft(saved, tmp_path / "prompts"))
    assert [f.source for f in proof.findings if f.verdict is Verdict.UNREAD] == ["stranger"]
    save_file({"prompt_embeddings": more["prompt_embeddings"]}, tmp_path / "prompts" / FILE, {"format": "pt"})
    newer = {name: value + 1 for name, value in load_file(tmp_path / "prompts" / FILE).items()}
    torch.save(newer, tmp_path / "prompts" / "adapter_model.bin")
    os.utime(tmp_path / "prompts" / FILE, (0, 0))
    proof = tiedquiet.check(by_peft(saved, tmp_path / "prompts"))
    assert [(f.key, f.verdict) for f in proof.findings if f.verdict is not Verdict.TIED] == [("", Verdict.AMBIGUOUS)]


def test_files_that_cannot_be_told(saved: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of the hub: what peft says of its keys is all that is known."""
    snapshot = tmp_path / "hub" / "models--us--it" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    rename(adapter, lambda key: f"nowhere.{key}" if "lora_A" in key else key)
    for path in adapter.iterdir():
        shutil.copy(path, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    proof = tiedquiet.check(peft.PeftModel.from_pretrained(base, "us/it", cache_dir=tmp_path / "hub"))
    assert any(not finding.key and "some were not read" in finding.why for finding in proof.findings)
    assert proof.missing == 4


def test_off_is_off(saved: Path, adapter: Path, printed: Printed) -> None:
    rename(adapter, lambda key: f"nowhere.{key}" if "lora" in key else key)
    with tiedquiet.enable("off"):
        by_peft(saved, adapter)
    assert not printed.of("tiedquiet")


@pytest.mark.parametrize("part", ["_note", "_judge"])
def test_a_failure_of_ours_leaves_the_adapter_alone(
    part: str, saved: Path, adapter: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiedquiet.doors import adapters

    def breaks(*_: Any, **__: Any) -> Any:
        raise KeyError("injected")

    monkeypatch.setattr(adapters, part, breaks)
    assert by_peft(saved, adapter) is not None
    assert any("goes on without it: KeyError" in line for line in printed.loud)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="tiedquiet failed, and the mode is strict"):
        by_peft(saved, adapter)


def test_a_trainer_s_adapter(saved: Path, tmp_path: Path, printed: Printed) -> None:
    def trainer() -> Any:
        base = AutoModelForCausalLM.from_pretrained(saved / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        how = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "save_steps": 1}
        data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        return Trainer(model, TrainingArguments(output_dir=str(tmp_path), **how), train_dataset=data)

    first = trainer()
    first.train()
    second = trainer()
    with tiedquiet.enable("strict"):
        second._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert not printed.loud
    proof = tiedquiet.check(second.model)
    assert proof.ok
    trained = in_model(first.model, "lora_")
    assert all(torch.equal(trained[name], value) for name, value in in_model(second.model, "lora_").items())
