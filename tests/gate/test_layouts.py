"""Folders as they are published or half downloaded: what is read in them, and what a line says that lacks something."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gate.test_check import check
from tests.gate.test_hub import cached
from tests.gate.test_pipeline import components, file_of, wan
from tiedquiet.gate import instead

__all__ = ["wan"]  # the fixture


def moved(folder: Path, name: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    return folder


# A folder that lacks something


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("onnx/model.onnx", "its largest file is onnx/model.onnx"),
        ("tf_model.h5", "its largest file is tf_model.h5"),
        ("consolidated.safetensors", "its largest file is consolidated.safetensors"),
        (".cache/huggingface/download/x.incomplete", "its largest file is .cache/huggingface/download/x.incomplete"),
        ("model-00001-of-00001.safetensors", "model-00001-of-00001.safetensors, a shard, and no index names it"),
        ("model-Q8_0.gguf", "its largest file is model-Q8_0.gguf, which can be checked by its name"),
        (".git/lfs/x", "its largest file is config.json"),
        ("a/b/c/d/x", "its largest file is config.json"),
    ],
)
def test_weights_under_another_name(name: str, says: str, good: Path, line: Callable[..., str]) -> None:
    said = line(moved(good, name))
    start = f"{good} cannot be loaded as GPT2LMHeadModel: it has no model.safetensors or pytorch_model.bin; its largest"
    assert said.startswith(start)
    assert said.endswith(says)


def test_a_config_beside_an_adapter(good: Path) -> None:
    (good / "adapter_config.json").write_text("{}")
    said = instead.of_weights(moved(good, "adapter_model.safetensors"))
    assert said.startswith("its largest file is adapter_model.safetensors; transformers takes this adapter for a whole")


def test_a_folder_above_its_models(good: Path, tmp_path: Path, line: Callable[..., str]) -> None:
    start = f"{tmp_path} has neither config.json nor model_index.json; "
    assert line(tmp_path) == f"{start}name the model in it, {good}"
    good.rename(tmp_path / "checkpoint-2")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-4")
    assert line(tmp_path) == f"{start}name one of the models in it: checkpoint-2, checkpoint-4"
    for path in tmp_path.glob("*/config.json"):
        path.unlink()
    assert line(tmp_path) == f"{start}its largest file is checkpoint-2/model.safetensors"
    (tmp_path / "empty").mkdir()
    assert line(tmp_path / "empty").endswith("; there is no file in it")


def test_a_folder_of_the_hub_s_cache(good: Path, tmp_path: Path, line: Callable[..., str]) -> None:
    repo = tmp_path / "hub" / "models--some--model"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for place, path in enumerate(good.iterdir()):
        path.rename(repo / "blobs" / str(place))
        (repo / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{place}")
    for folder in (repo, repo / "snapshots"):
        assert line(folder).endswith(f"; name the model in it, {repo / 'snapshots' / 'abc'}")
    assert check(repo / "snapshots" / "abc") == 0
    shutil.copytree(repo / "snapshots" / "abc", tmp_path / "alone" / "abc", symlinks=True)
    assert line(tmp_path / "alone").endswith("; there is no file in it")  # for what is outside is not looked at
    path = tmp_path / "alone" / "abc" / "config.json"
    target = (path.parent / path.readlink()).resolve()
    assert line(tmp_path / "alone" / "abc") == f"{path} is a link to {target}, which is not there"


def test_a_folder_that_may_not_be_listed(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    def gone(_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    assert instead.of_weights(good) == "its largest file is model.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", gone)  # as another process deletes it
        assert instead.of_weights(good) == "its largest file is config.json"
    monkeypatch.setattr("os.scandir", refuse)
    assert instead.of_weights(good) == "there is no file in it"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_looked_at(
    name: str, good: Path, line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's: whether it is there, nobody can say."""
    lstat = Path.lstat

    def refuse(path: Path) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", refuse)
    assert line(good) == f"{good / name} cannot be read: Permission denied"


def test_weights_that_may_not_be_opened(
    wan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipeline the other parts are checked all the same."""
    path, open_ = file_of(wan / "vae"), Path.open

    def refuse(own: Path, *given: Any, **more: Any) -> Any:
        if own == path:
            raise PermissionError(13, "Permission denied")
        return open_(own, *given, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert check(wan, "--json") == 1
    found = components(capsys)
    assert {name for name, component in found.items() if component["loud"]} == {"vae"}
    assert found["vae"]["error"].endswith(f"{path.name} cannot be read: Permission denied")


def test_half_a_download(good: Path, line: Callable[..., str]) -> None:
    """aria2 makes the file as long as it will be: what is missing in it are zeros."""
    path = good / "model.safetensors"
    (good / f"{path.name}.aria2").touch()
    assert line(good) == f"{path} has not been downloaded to its end: {path.name}.aria2 lies beside it"


@pytest.mark.parametrize("name", ["config.json", "model.gguf"])
def test_a_pointer_in_the_place_of_a_file(name: str, good: Path, tmp_path: Path, line: Callable[..., str]) -> None:
    folder = good if name == "config.json" else tmp_path / "gguf"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1234567\n")
    assert line(folder) == f"{folder / name} is a Git LFS pointer instead of the file: run `git lfs pull`"
    if name == "model.gguf":
        (folder / name).write_bytes(b"<html>" + bytes(1000))
        assert line(folder) == f"{folder / name} is not a GGUF file"
        (folder / name).unlink()
        os.mkfifo(folder / name)  # which would never end
        assert line(folder / name).endswith("model.gguf is neither a folder nor a file")
        assert line(folder).startswith(f"{folder / name} is a GGUF file, which cannot be loaded here")


def test_what_holds_no_weights(good: Path, tmp_path: Path, line: Callable[..., str]) -> None:
    path = Path(shutil.make_archive(str(tmp_path / "model"), "zip", good))
    says = "is not a file of weights that is read here; pass a folder, or one of .safetensors, .ckpt, .pt, .pth, .bin"
    assert line(path) == f"{path} {says}"


# What lies beside the models


def test_a_gguf_file_beside_an_index(wan: Path, good: Path) -> None:
    for folder in (wan, good):
        (folder / "a-Q8_0.gguf").write_bytes(b"GGUF")
        (folder / "b-Q4_0.gguf").write_bytes(b"GGUF")
        assert check(folder) == 0
    (good / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (good / name).rename(good / "0_Transformer" / name)
    module = {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
    (good / "modules.json").write_text(json.dumps([module]))
    assert check(good) == 0


# Pipelines


def flat(folder: Path) -> Path:
    """As the first pipelines were: each component in the pipeline's own folder."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    diffusers.UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, **blocks).save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **parts}))
    return folder


def test_components_in_the_pipeline_s_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = flat(tmp_path)
    loaded = pytest.importorskip("diffusers").DDPMPipeline.from_pretrained(folder).unet.state_dict()
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    capsys.readouterr()
    assert check(folder, "--json") == 0
    found = components(capsys)
    assert found.keys() == {"unet", "scheduler"}
    assert found["unet"]["held"] == len(stored)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert check(folder, "--json", "--variant", "fp16") == 0
    assert components(capsys)["unet"]["held"] == len(stored)
    assert check(folder) == 2
    error = capsys.readouterr().err
    assert ": unet: has weights of variant fp16 and none without one; --variant fp16 reads them" in error
    (folder / "scheduler_config.json").unlink()
    assert check(folder, "--json", "--variant", "fp16") == 1
    assert components(capsys)["scheduler"]["error"] == "model_index.json names it, but it is missing"


# On the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Puts a folder into the local cache, which is all that there is of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder: Path) -> str:
        cached(folder, tmp_path / "hub")
        return "some/model"

    return put


def test_a_pipeline_s_own_folder_on_the_hub(
    tmp_path: Path, hub: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = hub(flat(tmp_path / "flat"))
    capsys.readouterr()
    assert check(name, "--json") == 0
    found = components(capsys)
    assert found.keys() == {"unet", "scheduler"}
    assert found["unet"]["held"] > 0


def test_several_models_of_one_kind_on_the_hub(
    tmp_path: Path, hub: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "conditioning_embedding_out_channels": (8,)}
    for name in ("controlnet", "controlnet_1", "controlnet_3"):
        model = diffusers.ControlNetModel(block_out_channels=(8,), norm_num_groups=4, attention_head_dim=2, **blocks)
        model.save_pretrained(tmp_path / "pipe" / name)
    file_of(tmp_path / "pipe" / "controlnet_1").write_bytes(b"junk")
    index = {"controlnet": ["diffusers", "MultiControlNetModel"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    name = hub(tmp_path / "pipe")
    capsys.readouterr()
    assert check(name, "--json") == 1
    assert {part: found["loud"] for part, found in components(capsys).items()} == {
        "controlnet": False,
        "controlnet_1": True,
    }


@pytest.mark.parametrize("of_adapter", [False, True])
def test_half_of_it_in_the_local_cache(
    of_adapter: bool, good: Path, tmp_path: Path, hub: Callable[[Path], str], line: Callable[..., str]
) -> None:
    (good / "model.safetensors").unlink()
    name = hub(good)
    if of_adapter:
        adapter = {"peft_type": "LORA", "base_model_name_or_path": name, "target_modules": ["c_attn"]}
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
        save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    said = line(tmp_path / "adapter" if of_adapter else name)
    assert "the local cache has no pytorch_model.bin and no model.safetensors, and the hub cannot be reached: " in said
    assert line(name, "--revision", "v9").startswith(f"{name} at v9 is no folder, the local cache has no config.json")
