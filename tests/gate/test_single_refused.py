"""`check FILE --config`: files, configs and options of which nothing can be made, and pickles."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.gate.test_check import check
from tests.gate.zoo import pickles

diffusers = pytest.importorskip("diffusers")
Tensors = dict[str, torch.Tensor]
QUERY = "blocks.0.self_attn.q.weight"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is truncated or not a safetensors file"),
        (b"junk", "is truncated or not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\xff\xff\xff\xff\0\0\0\0" + b"{" * 99, "is truncated or not a safetensors file"),
    ],
)
def test_a_file_that_is_none(
    content: bytes, says: str, wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert check(tmp_path / "x.safetensors", "--config", str(wan_folder / "transformer")) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_truncated_file(
    wan_folder: Path, wan_stored: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wan.safetensors"
    save_file(wan_stored, file)
    file.write_bytes(file.read_bytes()[:9000])
    assert check(file, "--config", str(wan_folder / "transformer")) == 2
    assert "wan.safetensors is truncated: its header promises " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["absent.safetensors", "folder", "pipe.safetensors", "model.gguf"])
def test_what_is_no_file_of_weights(
    name: str, wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert check(tmp_path / name, "--config", str(wan_folder / "transformer")) == 2
    says = "is a GGUF file, whose values" if name.endswith("gguf") else "is not a regular file; --config is for"
    assert says in capsys.readouterr().err


# Configs and options


def test_a_config_that_does_not_fit(
    wan_folder: Path, wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]
) -> None:
    found = of_single(wan_stored, 2, config=wan_folder / "vae")
    assert "cannot be loaded as AutoencoderKLWan: the file has nothing for 90 of 90 tensors" in found["error"]
    found = of_single({**wan_stored, QUERY: wan_stored[QUERY][:3]}, 2)
    assert found["error"].endswith(": blocks.0.attn1.to_q.weight is 3 by 24 in the file and 24 by 24 in the model")
    found = of_single({**wan_stored, QUERY: torch.ones(())}, 2)
    assert found["error"].endswith(": blocks.0.attn1.to_q.weight is a scalar in the file and 24 by 24 in the model")


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ("", (), "WanPipeline is not a pipeline of diffusers that has from_single_file; choose one of its parts: --class WanTransformer3DModel"),
        ("", ("--class", "FluxTransformer2DModel"), "is a pipeline without a FluxTransformer2DModel"),
        ("text_encoder", (), "UMT5EncoderModel is not a class of diffusers that has from_single_file; put the file"),
        ("", ("--class", "UMT5EncoderModel"), "UMT5EncoderModel is not a class of diffusers that has from_single_file"),
        ("transformer", ("--class", "UNet2DModel"), "UNet2DModel is not a class of diffusers that has from_single_file"),
        ("absent", (), "has neither config.json nor model_index.json"),
        ("transformer/config.json", (), "config.json is a file, and no folder"),
        ("scheduler", (), "has neither config.json nor model_index.json"),
        ("transformer", ("--resume",), "leave out --resume, --variant and --lora"),
        ("transformer", ("--variant", "fp16"), "leave out --resume, --variant and --lora"),
        ("transformer", ("--lora", "x.safetensors"), "leave out --resume, --variant and --lora"),
    ],
)  # fmt: skip
def test_what_a_config_cannot_be(
    config: str,
    options: tuple[str, ...],
    says: str,
    wan_folder: Path,
    wan_stored: Tensors,
    of_single: Callable[..., dict[str, Any]],
) -> None:
    folder = wan_folder / config
    if config == "absent":
        folder.mkdir(exist_ok=True)
    assert says in of_single(wan_stored, 2, *options, config=folder)["error"]


def test_a_part_of_a_pipeline_that_has_no_config(
    wan_stored: Tensors, tmp_path: Path, of_single: Callable[..., dict[str, Any]]
) -> None:
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    error = of_single(wan_stored, 2, "--class", "WanTransformer3DModel", config=tmp_path)["error"]
    assert error == f"{tmp_path}/transformer: model_index.json names it, but it is missing: it has no config.json"


def test_without_diffusers(
    wan_folder: Path, wan_stored: Tensors, of_single: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert of_single(wan_stored, 2)["error"] == "--config needs diffusers, which is not installed"


def test_without_a_config(
    wan_folder: Path, wan_stored: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is fetched: what diffusers would take is named."""
    file = tmp_path / "wan.safetensors"
    for tensors, likely in (
        (wan_stored, "; diffusers takes it for Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        ({"x": torch.ones(1)}, ""),
        ({"model.diffusion_model.x": torch.ones(1)}, "; diffusers takes it for stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ):  # fmt: skip
        save_file(tensors, file)
        assert check(file) == 2
        says = f"{file} is a single file: pass the folder, or the hub model, that has its config as --config{likely}\n"
        assert capsys.readouterr().err == f"tiedquiet: {says}"
    file.write_bytes(b"junk")
    assert check(file) == 2
    assert capsys.readouterr().err.endswith("that has its config as --config\n")


# Pickles


def test_a_pickle_of_tensors(
    wan_folder: Path,
    wan_stored: Tensors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, config = tmp_path / "wan.ckpt", str(wan_folder / "transformer")
    turned = {key: t.t().contiguous().t() if t.dim() == 2 else t for key, t in wan_stored.items()}
    torch.save({"state_dict": {"state_dict": turned}, "global_step": 7}, file)
    assert check(file, "--config", config) == 0
    assert "42 of 42" in capsys.readouterr().out
    torch.save({**wan_stored, "epoch": 3}, file)
    assert check(file, "--config", config) == 0
    capsys.readouterr()
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert check(file, "--config", config) == 2
    assert f"{file} is a pickle, and torch 2.9.1 does not read pickles safely" in capsys.readouterr().err
    assert check(file, "--config", config, "--trust-pickle") == 0


@pytest.mark.parametrize("name", ["reduce_system", "name_posix", "then_broken", "nested"])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors", ""])
def test_a_pickle_that_wants_to_run_code(
    name: str, suffix: str, wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "RAN"
    (tmp_path / f"x{suffix}").write_bytes(pickles(str(mark))[name])
    for options in ((), ("--config", str(wan_folder / "transformer"))):
        assert check(tmp_path / f"x{suffix}", *options) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not mark.exists()


NESTED: dict[str, Any] = {}
NESTED["state_dict"] = NESTED


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 3}, torch.ones(2), NESTED])
def test_a_pickle_of_something_else(
    content: Any, wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert check(tmp_path / "x.pt", "--config", str(wan_folder / "transformer")) == 2
    assert capsys.readouterr().err.endswith("x.pt holds no tensors by name\n")


def test_a_pickle_with_names_that_are_none(
    wan_folder: Path, wan_stored: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**wan_stored, 1: torch.ones(1)}, tmp_path / "x.pt")
    assert check(tmp_path / "x.pt", "--config", str(wan_folder / "transformer")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    torch.save({1: torch.ones(1)}, tmp_path / "x.pt")
    assert check(tmp_path / "x.pt", "--config", str(wan_folder / "transformer")) == 2
    assert capsys.readouterr().err.count("\n") == 1
