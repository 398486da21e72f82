"""A config that names another model, or says itself that code may run: transformers does as it says; `check` does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Model
from transformers.utils import cached_file

from tests.checkpoints import gpt2
from tests.gate.test_check import check, config_of
from tests.gate.test_hub import cached
from tests.gate.test_strangers import _offline, refused
from tiedquiet.gate.confined import confined
from tiedquiet.gate.source import Source

__all__ = ["_offline", "refused"]

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def with_code(folder: Path, mark: Path) -> Path:
    """A folder with a config that is code, which leaves a mark."""
    folder.mkdir()
    code = f"from transformers import GPT2Config\nopen({str(mark)!r}, 'w')\nclass Own(GPT2Config):\n    model_type = 'own'\n"
    (folder / "own.py").write_text(code)
    own = {"AutoConfig": "own.Own", "AutoBackbone": "own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    return folder


def detr(named: str, **more: Any) -> dict[str, Any]:
    own = {"architectures": ["DetrForObjectDetection"], "model_type": "detr", "use_timm_backbone": False}
    return {**own, "backbone": named, "backbone_config": None, "use_pretrained_backbone": True, **more}


def lightglue(named: str) -> dict[str, Any]:
    inner = {"model_type": "own", "_name_or_path": named}
    own = {"architectures": ["LightGlueForKeypointMatching"], "model_type": "lightglue"}
    return {**own, "trust_remote_code": True, "keypoint_detector_config": inner}


@pytest.mark.parametrize(
    "config", [lambda named: detr(named, backbone_kwargs={"trust_remote_code": True}), lightglue], ids=["detr", "lightglue"]
)  # fmt: skip
@pytest.mark.parametrize("is_inside", [False, True])
def test_a_config_does_not_let_code_run(
    is_inside: bool,
    config: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[Path], str],
) -> None:
    """Releases up to 5.3 ran it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "model").mkdir()
    other = with_code(tmp_path / ("model/inner" if is_inside else "other"), tmp_path / "RAN")
    save_file({"x": torch.ones(1)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text(json.dumps(config(str(other))))
    assert "cannot be loaded as" in refused(tmp_path / "model")
    assert not (tmp_path / "RAN").exists()


@pytest.fixture
def of_text(tmp_path: Path) -> Callable[[str], Path]:
    """A folder whose class takes the config inside for its own, and that config names weights."""
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, num_key_value_heads=1, head_dim=8))
    model.save_pretrained(tmp_path / "text")
    path = tmp_path / "text" / "config.json"
    inner = json.loads(path.read_text())

    def make(weights: str) -> Path:
        config = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3"}
        path.write_text(json.dumps({**config, "text_config": {**inner, "transformers_weights": weights}}))
        return path.parent

    return make


def test_weights_that_a_config_inside_names(
    of_text: Callable[[str], Path], tmp_path: Path, refused: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = of_text("inner/x.safetensors")
    (folder / "inner").mkdir()
    (folder / "model.safetensors").rename(folder / "inner" / "x.safetensors")
    assert check(folder) == 1  # an Auto class makes another model of it
    (folder / "inner" / "x.safetensors").rename(tmp_path / "x.safetensors")
    assert "x.safetensors" in refused(of_text("../x.safetensors"))
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    assert "it has" in refused(of_text("link.safetensors"))
    torch.save(load_file(tmp_path / "x.safetensors"), folder / "adapter_model.bin")
    (folder / "link.safetensors").unlink()
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert "adapter_model.bin is a pickle, and torch 2.9.1 does not read" in refused(of_text("adapter_model.bin"))


def test_what_transformers_finds(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = with_code(tmp_path / "other", tmp_path / "RAN")
    (good / "own.py").write_text("")
    (good / "link.json").symlink_to(other / "config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(other, tmp_path / "hub")
    with confined(trust=False):
        with pytest.raises(OSError, match=r"good/config\.json read, which is no part of it"):
            AutoConfig.from_pretrained(good)
        Source(str(good), None).file("config.json")
        assert AutoConfig.from_pretrained(good).model_type == "gpt2"
        assert cached_file(good, "absent.json", _raise_exceptions_for_missing_entries=False) is None
        with pytest.raises(OSError, match=r"link\.json read, which is no part of it"):
            cached_file(good, "link.json")
        with pytest.raises(OSError, match=r"/other/config\.json read, which is no part of it"):
            cached_file(good, "config.json", subfolder="../other")
        for where in (good, "some/model"):
            with pytest.raises(OSError, match=r"has code run, .*/own\.py; --trust-remote-code allows it"):
                cached_file(where, "own.py")
        assert cached_file("some/model", "config.json") is not None
    with confined(trust=True):
        assert cached_file(other, "own.py") == str(other / "own.py")


def test_a_model_of_the_hub_s_cache_is_read(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(good, tmp_path / "hub")
    assert check(Path("some/model")) == 0


def test_nothing_is_asked_of_the_hub_for_the_class_that_auto_classes_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[Any]()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **_: asked.append(given) or [])
    GPT2Model(gpt2()).save_pretrained(tmp_path)
    config_of(tmp_path, **{**detr("some/model"), "architectures": ["GPT2Model"]})
    capsys.readouterr()
    assert check(tmp_path) == 0
    assert "config.json has the model_type detr, of which AutoModel makes DetrModel\n" in capsys.readouterr().out
    assert asked == []
