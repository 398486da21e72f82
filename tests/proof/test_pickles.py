"""With a torch that does not read pickles safely, nothing of ours opens one, whatever is asked; what then cannot be known
is unproven, and a load that is clean stays clean.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer, TrainingArguments

import tiedquiet
from tests.checkpoints import gpt2
from tests.gate.test_resume import trained
from tiedquiet import Verdict
from tiedquiet.proof import pickles

OLD = "2.9.1+cu128"
REASON = f"is a pickle, and torch {OLD} does not read pickles safely"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of ours that call `torch.load`, under an older torch."""
    calls: list[str] = []
    load = torch.load

    def spy(*args: Any, **kwargs: Any) -> Any:
        path = Path(sys._getframe(1).f_code.co_filename)
        calls.extend([str(path)] if path.is_relative_to(Path(tiedquiet.__file__).parent) else [])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    monkeypatch.setattr(torch, "__version__", OLD)
    return calls


def as_pickle(folder: Path, *left_out: str, name: str = "model", **more: torch.Tensor) -> Path:
    stored = load_file(folder / f"{name}.safetensors")
    (folder / f"{name}.safetensors").unlink()
    tensors = {key: tensor for key, tensor in {**stored, **more}.items() if key not in left_out}
    torch.save(tensors, folder / ("pytorch_model.bin" if name == "model" else f"{name}.bin"))
    return folder


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
def test_a_clean_load_stays_clean_and_a_tie_is_proven_without_the_file(
    mode: str, opened: list[str], tmp_path: Path
) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    as_pickle(tmp_path)
    with tiedquiet.enable(mode):
        model = GPT2LMHeadModel.from_pretrained(tmp_path)
    proof = tiedquiet.check(model)
    assert (proof.ok, [finding.verdict for finding in proof.findings]) == (True, [Verdict.TIED])
    assert opened == []


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
def test_what_is_missing_may_lie_in_the_file_under_another_name(mode: str, opened: list[str], tmp_path: Path) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    as_pickle(tmp_path, "transformer.ln_f.weight", other=torch.ones(16))
    with tiedquiet.enable(mode):
        model = GPT2LMHeadModel.from_pretrained(tmp_path)
    proof = tiedquiet.check(model)
    found = {finding.key: finding for finding in proof.findings if finding.verdict is not Verdict.TIED}
    assert {key: finding.verdict for key, finding in found.items()} == {"transformer.ln_f.weight": Verdict.UNPROVEN}
    assert f"pytorch_model.bin {REASON}" in found["transformer.ln_f.weight"].why
    assert opened == []


def test_a_trainer_that_resumes(opened: list[str], tmp_path: Path) -> None:
    folder = as_pickle(trained(GPT2LMHeadModel(gpt2()), tmp_path), "transformer.ln_f.weight")
    model = GPT2LMHeadModel(gpt2())
    Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))._load_from_checkpoint(str(folder))
    proof = tiedquiet.check(model)
    found = {finding.key: finding for finding in proof.findings if finding.verdict is not Verdict.TIED}
    assert {key: finding.verdict for key, finding in found.items()} == {"transformer.ln_f.weight": Verdict.UNPROVEN}
    assert REASON in found["transformer.ln_f.weight"].why
    assert opened == []


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter(whole: bool, opened: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    as_pickle(tmp_path / "adapter", *([] if whole else [name]), name="adapter_model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    proof = tiedquiet.check(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    found = [finding for finding in proof.findings if finding.verdict is not Verdict.TIED]
    assert [finding.verdict for finding in found] == ([] if whole else [Verdict.UNPROVEN])
    assert all(REASON in finding.why for finding in found)
    assert opened == []


def test_a_folder_that_a_model_in_memory_was_saved_to(opened: list[str], tmp_path: Path) -> None:
    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(tmp_path)
    as_pickle(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read: pytorch_model\.bin is a pickle, and torch 2\.9\.1") as error:
        tiedquiet.check(model, tmp_path)
    assert "--trust-pickle" not in str(error.value)
    assert opened == []


def test_who_trusts_a_file_says_so_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.0")
    with pickles.trusted(True):
        assert pickles.unsafe() == ""
    assert "torch 2.5.0 does not read pickles safely" in pickles.unsafe()
