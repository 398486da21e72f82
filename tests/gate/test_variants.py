"""Files of a variant (`model.fp16.safetensors`): read where they are asked for, and named where they are all there is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2
from tests.gate.test_check import check
from tests.gate.test_pipeline import wan
from tiedquiet.gate.weights import OF_DIFFUSERS, OF_TRANSFORMERS, of_variant

__all__ = ["wan"]  # the fixture


def components(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    return {found["component"]: found for found in json.loads(capsys.readouterr().out)["components"]}


def test_the_names_are_those_of_both_libraries() -> None:
    from transformers.modeling_utils import _add_variant as of_transformers

    of_diffusers = pytest.importorskip("diffusers.utils.hub_utils")._add_variant
    for name, ours in zip(OF_TRANSFORMERS, of_variant(OF_TRANSFORMERS, "fp16"), strict=True):
        assert ours == of_transformers(name, "fp16")
    for name, ours in zip(OF_DIFFUSERS, of_variant(OF_DIFFUSERS, "fp16"), strict=True):
        assert ours == of_diffusers(name, "fp16")
    assert of_variant(OF_TRANSFORMERS, "") == OF_TRANSFORMERS


@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_a_folder_of_a_variant_alone(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2LMHeadModel(gpt2()).half().save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    capsys.readouterr()
    assert check(tmp_path, "--variant", "fp16", "--json") == 0
    found = components(capsys)["."]
    assert all("fp16" in path for path in found["files"])
    assert found["held"] == found["tensors"] == 16
    assert check(tmp_path) == 2
    says = f"tiedquiet: {tmp_path} has weights of variant fp16 and none without one; --variant fp16 reads them\n"
    assert capsys.readouterr().err == says
    assert check(tmp_path, "--variant", "bf16") == 2
    assert "has weights of variant fp16 and none of variant bf16" in capsys.readouterr().err


def test_a_variant_beside_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two differ on purpose; each is held against itself."""
    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert check(tmp_path) == 0
    assert check(tmp_path, "--variant", "fp16") == 0
    capsys.readouterr()
    assert check(tmp_path, "--variant", "bf16") == 2
    says = "has weights without a variant and of variant fp16 and none of variant bf16; --variant fp16 reads them"
    assert says in capsys.readouterr().err
    for path in tmp_path.glob("*.fp16.*"):
        path.unlink()
    assert check(tmp_path, "--variant", "fp16") == 2
    assert "has weights without a variant and none of variant fp16; leave out" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1GB", "4KB"])
def test_a_pipeline_of_which_one_part_has_it(size: str, wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = wan / "transformer"
    model = diffusers.WanTransformer3DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    model.to(torch.bfloat16).save_pretrained(folder, variant="bf16", max_shard_size=size)
    capsys.readouterr()
    assert check(wan, "--variant", "bf16", "--json") == 0
    found = components(capsys)
    assert found["transformer"]["held"] == found["transformer"]["tensors"] == len(model.state_dict())
    assert all("bf16" in path for path in found["transformer"]["files"])
    assert not any("bf16" in path for path in found["vae"]["files"])
    assert check(wan, "--json") == 1
    assert (
        "has weights of variant bf16 and none without one; --variant bf16" in components(capsys)["transformer"]["error"]
    )
    assert check(wan, "--variant", "fp16") == 2
    assert "no component of this pipeline has weights of variant fp16" in capsys.readouterr().err
    assert check(folder, "--variant", "bf16") == 0


def test_a_text_encoder_s(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = wan / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    assert check(wan, "--variant", "fp16", "--json") == 0
    capsys.readouterr()
    stored = load_file(path.with_name("model.fp16.safetensors"))
    name = next(iter(stored))
    del stored[name]
    save_file(stored, path.with_name("model.fp16.safetensors"), {"format": "pt"})
    assert check(wan, "--variant", "fp16", "--json") == 1
    assert components(capsys)["text_encoder"]["missing"] == [name]


def test_an_adapter_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    assert check(tmp_path / "adapter", "--variant", "fp16") == 2
    assert "adapters have no variants; leave out --variant" in capsys.readouterr().err
