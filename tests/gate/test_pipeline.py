"""Pipelines of diffusers: every component that the index names has a line, and every tensor of it is compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.doors.test_from_pretrained import wan_pipeline
from tests.gate.test_check import check

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    folder = wan_pipeline(tmp_path / "wan")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["tie_word_embeddings"] = True  # up to some release that decides, and the rest is what is asked here
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    return folder


def components(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    return {component["component"]: component for component in json.loads(capsys.readouterr().out)["components"]}


def file_of(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    stored: dict[str, Any] = {**load_file(path), **{key.replace("__", "."): value for key, value in tensors.items()}}
    save_file({key: value for key, value in stored.items() if value is not None}, path, {"format": "pt"})


def test_a_pipeline_that_is_well(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(wan) == 0
    *_, transformer, vae, last = capsys.readouterr().out.splitlines()
    tensors = len(load_file(file_of(wan / "transformer")))
    assert transformer.startswith(f"transformer: WanTransformer3DModel: {tensors} of {tensors} tensors hold the file's")
    assert vae.startswith("vae: AutoencoderKLWan: ")
    assert last.startswith("4 of 4 components are sound; ")
    assert check(wan, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "scheduler"])
def test_a_part_that_is_not_there_is_red_and_the_others_are_checked(
    part: str, wan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(wan / part)
    assert check(wan, "--json") == 1
    found = components(capsys)
    assert {name for name, component in found.items() if component["loud"]} == {part}
    assert "model_index.json names it, but it is missing" in found[part]["error"]
    assert check(wan, "--quiet") == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{part}: ")
    assert ": cannot be checked: model_index.json names it, but it is missing" in line
    assert last.startswith("3 of 4 components are sound; ")


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("junk", [b"junk", b"", b"\xff" * 100])
def test_a_part_whose_weights_are_junk_is_red(
    part: str, junk: bytes, wan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_of(wan / part).write_bytes(junk)
    assert check(wan, "--json") == 1
    found = components(capsys)
    assert {name for name, component in found.items() if component["loud"]} == {part}
    assert "diffusion_pytorch_model.safetensors is truncated or not a safetensors file" in found[part]["error"]


def test_a_part_without_weights_is_red(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file_of(wan / "vae").unlink()
    assert check(wan, "--json") == 1
    assert (
        "it has no diffusion_pytorch_model.safetensors or .bin; its largest file is config.json"
        in components(capsys)["vae"]["error"]
    )


@pytest.mark.parametrize("form", ["shards", "bin", "half"])
def test_the_forms_that_a_model_of_diffusers_has(form: str, wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = wan / "transformer"
    model = diffusers.WanTransformer3DModel.from_pretrained(folder)
    file_of(folder).unlink()
    if form == "shards":
        model.save_pretrained(folder, max_shard_size="4KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif form == "bin":
        torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    else:
        half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        save_file(half, file_of(folder), {"format": "pt"})
    capsys.readouterr()
    assert check(wan, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bar either
    (found,) = (component for component in json.loads(out)["components"] if component["component"] == "transformer")
    assert found["held"] == found["tensors"] == len(model.state_dict())


def test_a_shard_that_lacks_what_the_index_promises(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Diffusers says nothing of it, and leaves the parameter on meta."""
    folder = wan / "transformer"
    model = diffusers.WanTransformer3DModel.from_pretrained(folder)
    file_of(folder).unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    name = sorted(load_file(shard))[0]
    change(shard, **{name.replace(".", "__"): None})
    _, info = diffusers.WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == []
    assert check(wan, "--json") == 1
    assert components(capsys)["transformer"]["missing"] == [name]


def test_missing_and_unexpected_tensors(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(file_of(wan / "vae"), quant_conv__bias=None, extra=torch.ones(2))
    assert check(wan, "--json") == 1
    found = components(capsys)["vae"]
    assert (found["missing"], found["unexpected"]) == (["quant_conv.bias"], ["extra"])
    assert found["held"] == found["tensors"]


def test_a_part_of_several_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"block_out_channels": (4,), "norm_num_groups": 2, "cross_attention_dim": 8, "attention_head_dim": 2}
    sizes["down_block_types"] = ("CrossAttnDownBlock2D",)
    unet = diffusers.UNet2DConditionModel(**sizes, up_block_types=("CrossAttnUpBlock2D",))
    singles = [diffusers.ControlNetModel(**sizes, conditioning_embedding_out_channels=(4,)) for _ in range(2)]
    several = diffusers.MultiControlNetModel(singles)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": diffusers.DDIMScheduler()}
    parts |= {"unet": unet, "controlnet": several, "safety_checker": None, "feature_extractor": None}
    diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    capsys.readouterr()
    assert check(tmp_path, "--json") == 0
    found = components(capsys)
    assert found["controlnet"]["held"] == found["controlnet_1"]["held"] == len(several.nets[0].state_dict())
    change(file_of(tmp_path / "controlnet_1"), conv_in__bias=None)
    assert check(tmp_path, "--quiet") == 1
    assert capsys.readouterr().out.startswith("controlnet_1: ControlNetModel: ")


def test_names_of_older_releases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Diffusers renames them while it reads one file."""
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    vae.save_pretrained(tmp_path / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored = load_file(file_of(tmp_path / "vae"))
    for new, name in old.items():
        stored = {key.replace(f".{new}.", f".{name}.") if "attentions" in key else key: t for key, t in stored.items()}
    assert any(".query." in key for key in stored)
    save_file(stored, file_of(tmp_path / "vae"), {"format": "pt"})
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    assert check(tmp_path, "--json") == 0
    found = components(capsys)["vae"]
    assert (found["held"], found["unexpected"], found["missing"]) == (len(stored), [], [])


def test_one_model_of_diffusers(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(wan / "vae") == 0
    assert capsys.readouterr().out.startswith("AutoencoderKLWan: 90 of 90 tensors hold the file's bytes")
    assert check(wan / "vae", "--class", "AutoencoderKLWan") == 0
    file_of(wan / "vae").write_bytes(b"junk")
    assert check(wan / "vae") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("bars", [True, False])
def test_the_bars_of_diffusers_are_as_before(bars: bool, wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.utils.logging, "_tqdm_active", bars)
    level = diffusers.utils.logging.get_verbosity()
    assert check(wan / "vae") == 0
    assert diffusers.utils.logging.is_progress_bar_enabled() is bars
    assert diffusers.utils.logging.get_verbosity() == level


def test_one_name_in_two_shards_and_a_prefix_that_nothing_maps(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = wan / "transformer"
    model = diffusers.WanTransformer3DModel.from_pretrained(folder)
    stored = load_file(file_of(folder))
    save_file({f"module.{name}": tensor for name, tensor in stored.items()}, file_of(folder), {"format": "pt"})
    assert check(folder, "--json") == 1
    (component,) = json.loads(capsys.readouterr().out)["components"]
    assert {finding["verdict"] for finding in component["findings"]} == {"unread"}
    assert len(component["findings"]) == len(stored)
    file_of(folder).unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, tensor = sorted(load_file(second).items())[0]
    change(first, **{name.replace(".", "__"): tensor + 1})
    assert check(folder, "--json") == 1
    (component,) = json.loads(capsys.readouterr().out)["components"]
    assert {finding["key"]: finding["verdict"] for finding in component["findings"]} == {name: "ambiguous"}


def test_another_type_and_another_device(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(wan, "--dtype", "bfloat16", "--json") == 0
    assert components(capsys)["transformer"]["held"] > 0
    assert check(wan, "--dtype", "float16") == 0
    capsys.readouterr()
    assert check(wan, "--device", "nonsense") == 2
    assert "no part of this pipeline can be checked" in capsys.readouterr().err


def test_a_class_of_the_pipeline_s_own_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stable Diffusion's index names its safety checker by the module of diffusers that has it."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**size, "image_size": 8, "patch_size": 4}, text_config=size, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(tmp_path / "safety_checker")
    index = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    status = check(tmp_path, "--json")
    out, err = capsys.readouterr()
    assert status == 0, (out, err)
    (found,) = json.loads(out)["components"]
    assert found["class"] == "StableDiffusionSafetyChecker"
    assert found["held"] == found["tensors"] > 0


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            ["diffusers", "AutoencoderOfNobody"],
            "names AutoencoderOfNobody of diffusers, which is not an installed class",
        ),
        (["torch.nn", "Linear"], "names Linear of torch.nn, which is not an installed class"),
        (["shap_e", "VoidNeRFModel"], "is neither a model of transformers nor one of diffusers"),
        (["os", "system"], "names system of os, which is not an installed class"),
        (["diffusers", "StableDiffusionPipeline"], "neither a model that can be compared nor a scheduler"),
        (["diffusers", "DDIMScheduler"], "but it is missing"),
        (["diffusers", None], "names None of diffusers"),
        ([{}, "x"], "names x of {}"),
        (["transformers", "GPT2LMHeadModel"], "it has no config.json"),
    ],
)
def test_what_an_index_cannot_mean(entry: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"part": entry}))
    assert check(tmp_path) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_pipeline_without_a_model(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (wan / "model_index.json").write_text(json.dumps(index))
    assert check(wan) == 2
    assert capsys.readouterr().err.endswith("no part of this pipeline can be checked: it has no model\n")
