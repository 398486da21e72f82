"""`check FILE --config` of a whole pipeline: its parts are made of one file, as its own `from_single_file` makes them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

from tests.checkpoints import TOKENS, t5
from tests.gate import originals
from tests.gate.test_check import check

diffusers = pytest.importorskip("diffusers")
Tensors = dict[str, torch.Tensor]
ENCODER = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, Any]:
    """The configs of a Stable Diffusion pipeline, its file's tensors, and its models."""
    folder = tmp_path_factory.mktemp("sd")
    models = originals.sd_pipeline(folder)
    return folder, originals.stable_diffusion(*models), models


@pytest.fixture
def configs(made: tuple[Path, Tensors, Any], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "configs")


@pytest.fixture
def outcome(configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What is said of tensors written to a file, by component; of a status of 2 the error."""

    def say(tensors: Tensors, status: int, *options: str) -> dict[str, Any]:
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "sd.safetensors")
        capsys.readouterr()
        found = check(tmp_path / "sd.safetensors", "--config", str(configs), *options, "--json")
        said = json.loads(capsys.readouterr().out)
        assert found == status, said
        return {component["component"]: component for component in said["components"]} or {"error": said["error"]}

    return say


def change(path: Path, **values: Any) -> None:
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_whole_pipeline(
    made: tuple[Path, Tensors, Any], configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(made[1], tmp_path / "sd.safetensors")
    assert check(tmp_path / "sd.safetensors", "--config", str(configs)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "scheduler: PNDMScheduler: has no tensors",
        "text_encoder: CLIPTextModel: 20 of 20 tensors hold the file's bytes; 1 buffer, written",
        "unet: UNet2DConditionModel: 208 of 208 tensors hold the file's bytes",
        "vae: AutoencoderKL: 92 of 92 tensors hold the file's bytes",
        "sd.safetensors: StableDiffusionPipeline: 320 of 320 tensors of the file reach text_encoder, unet and vae",
        "4 of 4 components are sound; 320 of 320 tensors hold the files' bytes",
    ]


def test_it_is_what_diffusers_makes(
    made: tuple[Path, Tensors, Any], configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values of the models that the file was written from."""
    _, tensors, models = made
    save_file(tensors, tmp_path / "sd.safetensors")
    more = {"tokenizer": None, "feature_extractor": None, "image_encoder": None, "safety_checker": None}
    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "sd.safetensors"), config=str(configs), local_files_only=True, **more
    )
    for ours, theirs in zip(models, (pipeline.unet, pipeline.vae, pipeline.text_encoder), strict=True):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_half_precision(made: tuple[Path, Tensors, Any], outcome: Callable[..., dict[str, Any]]) -> None:
    half = {key: tensor.half() for key, tensor in made[1].items()}
    for options in ((), ("--dtype", "float32"), ("--dtype", "bfloat16")):
        found = outcome(half, 0, *options)
        assert (found["unet"]["held"], found["text_encoder"]["held"]) == (208, 20)


def test_weights_that_are_averaged_over_training(
    made: tuple[Path, Tensors, Any], outcome: Callable[..., dict[str, Any]]
) -> None:
    """Published files have them beside the others; diffusers takes the others."""
    unet = {key: tensor for key, tensor in made[1].items() if key.startswith("model.")}
    average = {f"model_ema.{key.replace('.', '')}": tensor for key, tensor in unet.items()}
    found = outcome({**made[1], **average}, 0)
    assert (found["sd.safetensors"]["unexpected"], found["unet"]["unexpected"]) == (sorted(average), [])
    rest = {f"other.{key}": tensor for key, tensor in made[1].items()}
    found = outcome({**made[1], **average, **rest}, 1)["sd.safetensors"]
    assert found["problem"].endswith(" have no place in StableDiffusionPipeline: is that the right class?")
    assert found["counted"] == "tensors of the file reach text_encoder, unet and vae"


def test_a_part_that_the_file_does_not_have(
    made: tuple[Path, Tensors, Any], configs: Path, outcome: Callable[..., dict[str, Any]]
) -> None:
    _, tensors, (*_, encoder) = made
    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    found = outcome(unet, 1)
    assert found["vae"]["error"] == "cannot be loaded as AutoencoderKL: the file has no weights for it"
    assert found["text_encoder"]["error"] == "neither the file nor the folder of its config has weights for it"
    assert found["sd.safetensors"]["counted"] == "tensors of the file reach unet"
    encoder.save_pretrained(configs / "text_encoder")
    with_vae = {key: tensor for key, tensor in tensors.items() if not key.startswith("cond")}
    found = outcome(with_vae, 0)
    assert (found["text_encoder"]["held"], found["text_encoder"]["tensors"]) == (20, 20)
    assert found["text_encoder"]["files"] == [str(configs / "text_encoder" / "model.safetensors")]
    found = outcome({"x": torch.ones(1)}, 1)
    assert found["sd.safetensors"]["counted"] == "tensors of the file reach no component"


def test_a_tensor_that_diffusers_leaves_without_values(
    made: tuple[Path, Tensors, Any], outcome: Callable[..., dict[str, Any]]
) -> None:
    """It raises for its own models, and says nothing of the text encoder."""
    tensors = dict(made[1])
    del tensors[f"{ENCODER}final_layer_norm.bias"]
    (missing,) = outcome(tensors, 1)["text_encoder"]["missing"]
    assert missing.removeprefix("text_model.") == "final_layer_norm.bias"  # up to 5.5
    del tensors["first_stage_model.quant_conv.bias"]
    found = outcome(tensors, 1)
    assert found["vae"]["error"].endswith("the file has nothing for 1 of 92 tensors: quant_conv.bias")


def test_the_encoder_of_stable_diffusion_3(
    tmp_path: Path, configs: Path, outcome: Callable[..., dict[str, Any]]
) -> None:
    """Diffusers loses the tie of its embeddings: where the file does not have both, one of them has no values."""
    encoder = T5EncoderModel(t5())
    encoder.config.save_pretrained(configs / "text_encoder_3")
    index = {"text_encoder_3": ["transformers", "T5EncoderModel"], "unet": None, "vae": None, "text_encoder": None}
    change(configs / "model_index.json", _class_name="StableDiffusion3Pipeline", **index)
    tensors = {f"text_encoders.t5xxl.transformer.{key}": tensor for key, tensor in encoder.state_dict().items()}
    found = outcome(tensors, 0)["text_encoder_3"]
    assert (found["held"], found["tensors"]) == (12, 12)
    del tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"]
    found = outcome(tensors, 1)["text_encoder_3"]
    assert [(f["key"], f["verdict"]) for f in found["findings"]] == [("encoder.embed_tokens.weight", "untied")]


def test_a_tensor_with_the_name_of_a_state_dict(
    made: tuple[Path, Tensors, Any], outcome: Callable[..., dict[str, Any]]
) -> None:
    """Diffusers takes it for one."""
    tensors = {**made[1], "state_dict": torch.ones(2)}
    assert "sd.safetensors cannot be read by diffusers: " in outcome(tensors, 2)["error"]
    assert (
        "sd.safetensors cannot be loaded as AutoencoderKL: " in outcome(tensors, 2, "--class", "AutoencoderKL")["error"]
    )


def test_the_second_encoder_of_stable_diffusion_xl(configs: Path, outcome: Callable[..., dict[str, Any]]) -> None:
    """Diffusers copies slices of its projections, and turns one."""
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=50, max_position_embeddings=12, projection_dim=8, **size, **TOKENS)
    encoder = CLIPTextModelWithProjection(config)
    config.save_pretrained(configs / "text_encoder_2")
    index = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "unet": None, "vae": None}
    change(configs / "model_index.json", _class_name="StableDiffusionXLPipeline", text_encoder=None, **index)
    tensors = originals.open_clip(encoder, 2)
    found = outcome(tensors, 0)
    assert (found["text_encoder_2"]["held"], found["text_encoder_2"]["tensors"]) == (37, 37)
    assert found["text_encoder_2"]["notes"] == [
        "split, joined or transposed by diffusers, and compared element by element: 13"
    ]
    assert (found["sd.safetensors"]["held"], found["sd.safetensors"]["unexpected"]) == (len(tensors), [])


@pytest.mark.parametrize(
    ("part", "entry", "says"),
    [
        ("unet", ["evil", "Model"], "names Model of evil, which is not an installed class"),
        ("unet", ["os", "system"], "names system of os, which is not an installed class"),
        ("unet", ["diffusers", "no.Class"], "names no.Class of diffusers, which is not an installed class"),
        ("unet", [["diffusers"], 7], "names 7 of ['diffusers'], which is not an installed class"),
        ("other", ["diffusers", "UNet2DConditionModel"], "it is missing: it has no config.json"),
        ("other", ["transformers", "GPT2LMHeadModel"], "other has no config.json"),
    ],
)
def test_what_an_index_cannot_mean(
    part: str,
    entry: Any,
    says: str,
    made: tuple[Path, Tensors, Any],
    configs: Path,
    outcome: Callable[..., dict[str, Any]],
) -> None:
    change(configs / "model_index.json", **{part: entry})
    assert says in outcome(made[1], 1)[part]["error"]


def test_a_pipeline_that_makes_nothing_of_a_file(
    made: tuple[Path, Tensors, Any], configs: Path, outcome: Callable[..., dict[str, Any]]
) -> None:
    index = {"unet": ["evil", "Model"], "vae": None, "text_encoder": None}
    change(configs / "model_index.json", _class_name="WanPipeline", **index)
    error = outcome(made[1], 2)["error"]
    assert error.endswith("WanPipeline is not a pipeline of diffusers that has from_single_file")
    change(configs / "model_index.json", _class_name="StableDiffusionPipeline", unet=None)
    assert outcome(made[1], 2)["error"].endswith("no part of this pipeline can be checked: it has no model")


def test_a_kernel_that_the_config_of_an_encoder_names(
    made: tuple[Path, Tensors, Any], configs: Path, outcome: Callable[..., dict[str, Any]]
) -> None:
    change(configs / "text_encoder" / "config.json", _attn_implementation="somebody/kernel")
    assert "config.json names somebody/kernel, compiled code" in outcome(made[1], 1)["text_encoder"]["error"]


def test_a_config_in_the_hub_s_cache(
    made: tuple[Path, Tensors, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are links into the cache, and nothing is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--some--sd"
    shutil.copytree(made[0], repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    save_file(made[1], tmp_path / "sd.safetensors")
    assert check(tmp_path / "sd.safetensors", "--config", "some/sd") == 0
    assert check(tmp_path / "sd.safetensors", "--config", "some/sd", "--class", "AutoencoderKL") == 0
    assert check(tmp_path / "sd.safetensors", "--config", "some/other") == 2
    assert "some/other is no folder, the local cache has no config.json of it" in capsys.readouterr().err
