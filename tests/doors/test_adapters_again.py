"""Adapters beside others, over one of the same name, and with a tensor too many: each is judged by its own file."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.test_adapters import FILE, SMALL, by_peft, rename
from tiedquiet import LoadError, Verdict

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A base model, and the adapters `one` and `two` of it."""
    Qwen2ForCausalLM(Qwen2Config(**SMALL)).save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        peft.get_peft_model(base_of(tmp_path), config).save_pretrained(tmp_path / name)
    return tmp_path


def base_of(saved: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved / "base")


def holds(model: Any, saved: Path, adapter: str, name: str) -> bool:
    """Whether a model of transformers holds what an adapter's file has, under the name that the adapter has there."""
    state = model.state_dict()
    own = {key.removeprefix("base_model.model."): value for key, value in load_file(saved / adapter / FILE).items()}
    return all(torch.equal(state[key.replace(".weight", f".{name}.weight")], value) for key, value in own.items())


def two(saved: Path) -> Any:
    model = base_of(saved)
    model.load_adapter(str(saved / "one"), adapter_name="one")
    model.load_adapter(str(saved / "two"), adapter_name="two")
    return model


def test_two_that_transformers_loads(saved: Path, printed: Printed) -> None:
    base = tiedquiet.check(base_of(saved)).stored
    printed.records.clear()
    with tiedquiet.enable("strict"):
        model = two(saved)
    assert holds(model, saved, "one", "one")
    assert holds(model, saved, "two", "two")
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.stored, proof.total) == (True, base + 16, base + 17)
    assert not printed.loud
    assert not printed.report, "transformers calls the first one's keys missing from the second one's file"
    assert any("reported missing but read by an earlier load: model.layers." in line for line in printed.confirmed)


def test_an_adapter_that_is_deleted_leaves_a_sound_model(saved: Path) -> None:
    model = two(saved)
    for name in ("one", "two"):
        for module in model.modules():  # as `delete_adapter` does, which transformers 5.24.0 keeps from peft 0.21
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.delete_adapter(name)
        assert f"model.layers.0.self_attn.q_proj.lora_A.{name}.weight" not in model.state_dict()
        assert tiedquiet.check(model).ok
    del model.model.norm
    assert [finding.key for finding in tiedquiet.check(model).findings if finding.verdict is Verdict.UNPROVEN] == [
        "model.norm.weight"
    ]


def test_what_an_adapter_brought_is_not_counted_once_it_is_deleted(saved: Path) -> None:
    model = base_of(saved)
    whole, base = tiedquiet.check(model), model
    for name in ("one", "two"):  # each time another, as a server may have them come and go
        adapted = peft.PeftModel.from_pretrained(base, saved / name)
        assert tiedquiet.check(adapted).total > whole.total
        base = adapted.unload()
        assert str(tiedquiet.check(base)) == str(whole)


def test_of_two_that_transformers_loads_one_is_broken(saved: Path, printed: Printed) -> None:
    rename(saved / "one", lambda key: None if "lora_A" in key else key)
    rename(saved / "two", lambda key: None if "lora_B" in key else key)
    printed.records.clear()
    model = two(saved)
    proof = tiedquiet.check(model)
    missing = {finding.key for finding in proof.findings if finding.verdict is Verdict.MISSING}
    assert missing == {key for key in model.state_dict() if "lora_A.one" in key or "lora_B.two" in key}
    assert {part for part in ("A.one", "B.one", "A.two", "B.two") if f"lora_{part}" in printed.report} == {
        "A.one",
        "B.two",
    }


def test_what_no_load_read_stays_in_the_report(saved: Path, printed: Printed) -> None:
    model = base_of(saved)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model, "new")
    printed.records.clear()
    model.load_adapter(str(saved / "two"), adapter_name="two")
    assert "lora_A.new" in printed.report
    assert not any("read by an earlier load" in line for line in printed.confirmed)
    with tiedquiet.enable("off"):
        model = base_of(saved)
        model.load_adapter(str(saved / "one"), adapter_name="one")
    printed.records.clear()
    model.load_adapter(str(saved / "two"), adapter_name="two")
    assert "lora_A.one" in printed.report, "nobody saw how it was loaded"


@pytest.mark.parametrize("name", ["model", "layers", "0", "weight", "self_attn"])
def test_names_that_are_parts_of_others(name: str, saved: Path, printed: Printed) -> None:
    model = base_of(saved)
    with tiedquiet.enable("strict"):
        model.load_adapter(str(saved / "one"), adapter_name=name)
    assert holds(model, saved, "one", name)
    assert tiedquiet.check(model).ok
    assert not printed.loud
    rename(saved / "two", lambda key: None if "lora_B" in key else key)
    model = base_of(saved)
    model.load_adapter(str(saved / "two"), adapter_name=name)
    assert tiedquiet.check(model).missing == 4


def test_one_that_is_swapped_for_another(saved: Path) -> None:
    model = two(saved)
    model.load_adapter(str(saved / "two"), adapter_name="one", hotswap=True)
    assert holds(model, saved, "two", "one")
    assert tiedquiet.check(model).ok
    rename(saved / "one", lambda key: None if "lora_B" in key else key)
    model.load_adapter(str(saved / "one"), adapter_name="one", hotswap=True)
    proof = tiedquiet.check(model)
    assert {f.key for f in proof.findings if f.verdict is Verdict.MISSING} == {
        key for key in model.state_dict() if "lora_B.one" in key
    }


def test_another_prefix_beside_a_sound_one(saved: Path) -> None:
    rename(saved / "two", lambda key: key.replace("model.layers", "decoder.layers"))
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread, 8 of 8 tensors were NOT read"):
        two(saved)
    with tiedquiet.enable("repair"):
        model = two(saved)
    rename(saved / "two", lambda key: key.replace("decoder.layers", "model.layers"))
    assert holds(model, saved, "one", "one")
    assert holds(model, saved, "two", "two")
    assert tiedquiet.check(model).ok


def test_one_in_a_subfolder_of_another_s(saved: Path) -> None:
    shutil.copytree(saved / "two", saved / "one" / "below")
    for folder in ("one", "one/below"):
        rename(saved / folder, lambda key: f"module.{key}")

    def load() -> Any:
        return peft.PeftModel.from_pretrained(base_of(saved), saved / "one", subfolder="below")

    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=f"from {saved}/one/below: unread, 8 of 8 tensors"):
        load()
    with tiedquiet.enable("repair"):
        model = load()
    assert holds(model.get_base_model(), saved, "two", "default")
    assert tiedquiet.check(model).ok


def test_what_repair_has_read_is_there_the_next_time(saved: Path, printed: Printed) -> None:
    """The same file once more: nothing reads it, and nothing is lost."""
    rename(saved / "one", lambda key: f"module.{key}")
    with tiedquiet.enable("repair"):
        model = by_peft(saved, saved / "one")
    with tiedquiet.enable("strict"):
        model.load_adapter(saved / "one", "default")
    assert tiedquiet.check(model).ok
    assert not printed.loud


def test_half_a_file_over_one_of_the_same_name(saved: Path) -> None:
    model = by_peft(saved, saved / "one")
    model.load_adapter(saved / "two", "default")
    assert tiedquiet.check(model).ok
    rename(saved / "one", lambda key: None if "layers.0" in key else key)
    model.load_adapter(saved / "one", "default")
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.missing) == (False, 4)
    assert {f.key.split(".")[2] for f in proof.findings if f.verdict is Verdict.MISSING} == {"0"}
    assert not tiedquiet.check(model, saved / "one").ok


def test_those_of_different_kinds(saved: Path) -> None:
    """A `PeftMixedModel` calls the function of a class that it does not extend."""
    with tiedquiet.enable("strict"):
        model = peft.PeftMixedModel.from_pretrained(base_of(saved), saved / "one")
        model.load_adapter(saved / "two", "two")
    assert holds(model.base_model.model, saved, "one", "default")
    assert holds(model.base_model.model, saved, "two", "two")
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.stored) == (True, tiedquiet.check(base_of(saved)).stored + 16)
    rename(saved / "two", lambda key: None if "lora_B" in key else key)
    proof = tiedquiet.check(peft.PeftMixedModel.from_pretrained(base_of(saved), saved / "two"))
    assert (proof.ok, proof.missing) == (False, 4)


@pytest.mark.parametrize("kind", ["another layer's", "of a prefix that fits others", "a number of its layer", "mapped"])
def test_one_tensor_too_many(kind: str, saved: Path, printed: Printed) -> None:
    """It is counted, and told by the name that the file has, whatever else is wrong."""
    tensors = load_file(saved / "one" / FILE)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.{}".format
    lacking = name(0, "lora_A.weight")
    if kind == "another layer's":
        more = name(7, "lora_A.weight")
        del tensors[lacking]
    elif kind == "a number of its layer":  # peft's layer has it by that name
        more = name(0, "scaling")
    elif kind == "mapped":  # no name that was read is the file's
        more = name(7, "lora_A.weight")
        tensors = {key.replace("layers", "blocks"): tensor for key, tensor in tensors.items()}
    else:
        more = f"module.{name(7, 'lora_A.weight')}"
        tensors = {f"module.{key}": tensor for key, tensor in tensors.items()}
    save_file({**tensors, more: torch.ones(2, 32)}, saved / "one" / FILE, {"format": "pt"})
    how = {"key_mapping": {"blocks": "layers"}} if kind == "mapped" else {}
    proof = tiedquiet.check(peft.PeftModel.from_pretrained(base_of(saved), saved / "one", **how))
    (whole,) = (finding for finding in proof.findings if not finding.key)
    total, missing = len(tensors) + 1, proof.missing
    unread = [finding for finding in proof.findings if finding.verdict is Verdict.UNREAD]
    assert f"{total - len(unread)} of {total} tensors of the adapter were read" in whole.why, whole
    assert whole.why.endswith(f"the model has no place for {more}")
    of_missing = f"missing, 1 of {total - 1 + missing} tensors of the adapter is not in its files"
    assert any(of_missing in line for line in printed.loud) == (kind == "another layer's"), printed.loud


def test_what_another_has_beside_the_base_model(saved: Path) -> None:
    if not hasattr(peft, "FrodConfig"):
        pytest.skip("this release of peft has no such kind")
    for name in ("one", "two"):
        trained = peft.get_peft_model(base_of(saved), peft.FrodConfig(target_modules=["q_proj"]))
        trained.save_pretrained(saved / f"{name} beside")
    with tiedquiet.enable("strict"):
        model = peft.PeftModel.from_pretrained(base_of(saved), saved / "one beside")
        model.load_adapter(saved / "two beside", "two")
    assert tiedquiet.check(model).ok
