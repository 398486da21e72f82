"""What the tests of the gate share."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2, save
from tests.doors.test_from_pretrained import wan_pipeline
from tests.gate import originals
from tests.gate.quantised import MAKERS, Make
from tests.gate.test_check import check

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save(GPT2LMHeadModel(gpt2()), tmp_path / "good")
    return tmp_path / "good"


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def wan_stored(wan_folder: Path) -> Tensors:
    """The transformer under the names of Wan's authors."""
    diffusers = pytest.importorskip("diffusers")
    return originals.wan(diffusers.WanTransformer3DModel.from_pretrained(wan_folder / "transformer"))


@pytest.fixture
def of_single(wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What is said of tensors written to a file."""

    def say(tensors: Tensors, status: int, *options: str, config: Path = wan_folder / "transformer") -> dict[str, Any]:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "one.safetensors")
        capsys.readouterr()
        found = check(tmp_path / "one.safetensors", "--config", str(config), *options, "--json")
        out, err = capsys.readouterr()
        said = json.loads(out)
        assert (found, err) == (status, "" if status < 2 else f"tiedquiet: {said['error']}\n"), said
        (component,) = said["components"] or [{"error": said["error"]}]
        return component  # type: ignore[no-any-return]

    return say


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a quantised checkpoint of a kind; each once."""

    @cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("quantised")
        MAKERS[kind](folder)
        return folder

    return made


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line that says why a folder cannot be checked."""

    def said(folder: Path | str, *options: str) -> str:
        capsys.readouterr()
        assert check(folder, *options) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err.removeprefix("tiedquiet: ").rstrip("\n")

    return said
