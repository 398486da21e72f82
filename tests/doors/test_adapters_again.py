"""Adapters beside others, and over one of the same name: each is judged by its own file."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import tiedquiet
from tests.doors.test_adapters import SMALL, by_peft, rename
from tiedquiet import Verdict

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")


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
