"""What strangers lay beside a model, or ask for in its config: `check` says in one line, and at once, what it refuses."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import find_adapter_config_file

from tests.gate.test_broken import cut
from tests.gate.test_check import check, config_of
from tests.gate.test_hub import cached
from tests.gate.test_security import write_gguf
from tiedquiet.gate.diagnosis import damage
from tiedquiet.gate.lacking import lacking_in

LORA = {"peft_type": "LORA", "target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True}
EVIL = "([a-z0-9_.]+)+!"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """What is said of a folder that is refused."""

    def say(folder: Path) -> str:
        capsys.readouterr()
        assert check(folder) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("tiedquiet: ")
        return error

    return say


def too_long(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100_000_001)


def adapter(folder: Path, base: str | None, **more: Any) -> Path:
    about = {**LORA, "base_model_name_or_path": base, **more}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(about))
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, 16), name.format("B"): torch.ones(48, 2)}, folder / WEIGHTS)
    return folder


def link(path: Path) -> None:
    """Put a file elsewhere, and a link to it in its place."""
    outside = path.parents[2] / f"{path.parents[1].name} {path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_gguf(folder: Path) -> Path:
    """A folder with a GGUF file; what lies beside it is looked at first."""
    for path in folder.iterdir():
        path.unlink()
    (folder / "m.gguf").write_bytes(b"GGUF")
    return folder


def as_part(folder: Path) -> Path:
    index = {"_class_name": "P", folder.name: ["transformers", "GPT2LMHeadModel"]}
    (folder.parent / "model_index.json").write_text(json.dumps(index))
    return folder.parent


def as_sentences(folder: Path) -> Path:
    entry = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([entry]))
    return folder


@pytest.mark.parametrize("place", [lambda f: f, as_gguf, as_part, as_sentences], ids=["alone", "gguf", "part", "st"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"megatron_config": {"x": 1}, "megatron_core": "evil"}, "asks for megatron_core, a module that peft imports"),
        ({"peft_type": "XLORA", "adapters": {"0": "elsewhere"}}, "adapter_config.json has other adapters read"),
        ({"target_modules": EVIL}, f"adapter_config.json has {EVIL}, a pattern whose search may never end"),
        (
            {"init_lora_weights": "pissa_niter_1_000"},
            "adapter_config.json asks for too many iterations (init_lora_weights)",
        ),
        ({"peft_type": "PEANUT", "depth": 10_001}, "adapter_config.json asks for more than 10,000 layers (depth)"),
        (
            {"layer_replication": [[0, 1]] * 1_001},
            "adapter_config.json asks for more than 1,000 layers (layer_replication)",
        ),
        (lambda f: link(f / "adapter_config.json"), "adapter_config.json points outside the folder"),
        (lambda f: link(f / WEIGHTS), f"{WEIGHTS} points outside the folder"),
        (lambda f: pipe(f / "adapter_config.json"), "adapter_config.json is not a regular file"),
    ],
    ids=["module", "others", "pattern", "iterations", "depth", "layers", "config", "weights", "pipe"],
)
def test_an_adapter_beside_a_model_is_held_to_the_rules(
    change: Any, says: str, place: Callable[[Path], Path], good: Path, refused: Callable[[Path], str]
) -> None:
    """Transformers loads it unasked."""
    folder = place(good)
    where = folder if (folder / "m.gguf").exists() else good
    adapter(where, str(folder), **(change if isinstance(change, dict) else {}))
    if not isinstance(change, dict):
        change(where)
    assert says in refused(folder)


def test_an_adapter_beside_its_own_model(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is loaded into it; releases up to 5.3 read the base model that it names instead."""
    alone = adapter(tmp_path / "alone", str(good))
    status, said = check(alone), capsys.readouterr().out
    both = adapter(shutil.copytree(good, tmp_path / "both"), str(good))
    assert (check(both), capsys.readouterr().out) == (status, said)


def test_an_adapter_that_has_another_model_read(good: Path, tmp_path: Path, refused: Callable[[Path], str]) -> None:
    """Nothing of that one would be checked: not even whether its config names code."""
    other = shutil.copytree(good, tmp_path / "other")
    config_of(other, _attn_implementation="somebody/kernel")
    folder = as_part(adapter(good, str(other)))
    if find_adapter_config_file(str(folder), subfolder="good") is None:  # transformers up to 5.9 looks at the top only
        assert check(folder) == 0
    else:
        assert "adapter_config.json makes transformers read its base model in place of" in refused(folder)
    for base in (str(other), "some/model", None):
        assert "makes transformers read its base model in place of" in refused(adapter(as_gguf(good), base))
    (good / "adapter_config.json").write_text(json.dumps(LORA))
    assert "makes transformers read its base model in place of" in refused(good)
    assert "adapter_config.json names no base model" in refused(adapter(tmp_path / "alone", None))


def test_an_adapter_on_top_of_a_sentence_transformers_folder(good: Path, refused: Callable[[Path], str]) -> None:
    entry = {"idx": 0, "name": "0", "path": good.name, "type": "sentence_transformers.models.Transformer"}
    (good.parent / "modules.json").write_text(json.dumps([entry]))
    assert check(good.parent) == 0
    adapter(good.parent, str(good))
    assert "transformers loads it into every module" in refused(good.parent)


def test_an_adapter_beside_a_model_on_the_hub(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[Path], str]
) -> None:
    """There the base model that it names is read."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = shutil.copytree(good, tmp_path / "base")
    config_of(base, _attn_implementation="somebody/kernel")
    cached(adapter(good, str(base)), tmp_path / "hub")
    assert "config.json names somebody/kernel" in refused(Path("some/model"))


def test_an_adapter_beside_a_model_of_diffusers_is_not_loaded(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    vae.save_pretrained(tmp_path / "vae")
    adapter(tmp_path / "vae", "some/model", megatron_config={"x": 1}, megatron_core="evil")
    assert check(tmp_path / "vae") == 0


@pytest.mark.parametrize("change", [link, pipe, too_long])
def test_what_lies_beside_damaged_weights_is_not_read(
    change: Callable[[Path], None], good: Path, refused: Callable[[Path], str]
) -> None:
    """Nor are the scales of codes looked for in it."""
    (good / "x.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": "secret"}}))
    change(good / "x.index.json")
    if change is not too_long:
        save_file({"x": torch.ones(1)}, good / "y.safetensors")
        change(good / "y.safetensors")
    assert lacking_in(good) == ""
    cut(good, 20)
    assert "secret" not in refused(good)
    assert [line for line in damage(good) if "x.index.json" not in line] == [
        "model.safetensors is truncated or not a safetensors file: it has 20 bytes, not even its header"
    ]


@pytest.mark.parametrize(
    ("change", "says"), [(link, "points outside the folder"), (pipe, "is not a regular file"), (too_long, "too many for a JSON file")]
)  # fmt: skip
@pytest.mark.parametrize("of_base", [False, True])
def test_a_generation_config_is_looked_at_before_it_is_read(
    of_base: bool, change: Callable[[Path], None], says: str, good: Path, tmp_path: Path, refused: Callable[[Path], str]
) -> None:
    change(good / "generation_config.json")
    assert f"generation_config.json {says}"[-20:] in refused(
        adapter(tmp_path / "alone", str(good)) if of_base else good
    )


@pytest.mark.parametrize(("change", "says"), [(link, "points outside the folder"), (pipe, "is not a regular file")])
def test_the_voices_of_qwen_omni_are_looked_at(
    change: Callable[[Path], None],
    says: str,
    good: Path,
    refused: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pickle beside the weights, which its own `from_pretrained` reads."""
    path = good / "spk_dict.pt"
    torch.save({"Chelsie": {"bos_token": 1}}, path)
    assert check(good) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.9.1")
        assert "spk_dict.pt is a pickle, and torch 2.9.1 does not read pickles safely" in refused(good)
        assert check(good, "--trust-pickle") == 0
    change(path)
    assert f"spk_dict.pt {says}" in refused(good)


def test_a_gguf_file_that_was_found_may_not_be_a_link_to_elsewhere(good: Path, refused: Callable[[Path], str]) -> None:
    link(as_gguf(good) / "m.gguf")
    assert "m.gguf points outside the folder" in refused(good)


def test_a_backbone_is_not_fetched_from_the_hub(
    good: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[Path], str]
) -> None:
    from huggingface_hub import constants

    asked = list[Any]()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **_: asked.append(given) or [])
    config = {"architectures": ["DetrForObjectDetection"], "model_type": "detr", "use_timm_backbone": False}
    config |= {"backbone": "some/model", "backbone_config": None, "use_pretrained_backbone": True}
    (good / "config.json").write_text(json.dumps(config))
    assert "it names a model that transformers gets from the hub, and for a folder nothing is fetched" in refused(good)
    assert (asked, constants.HF_HUB_OFFLINE) == ([], False)


def with_value(path: Path, kind: int, value: bytes) -> None:
    """Put another value before those in the metadata of a GGUF file."""
    content = path.read_bytes()
    count = int.from_bytes(content[16:24], "little") + 1
    path.write_bytes(content[:16] + struct.pack("<QQ1sI", count, 1, b"x", kind) + value + content[24:])


ARRAY, LIST, TEXT = 9, struct.Struct("<IQ"), struct.pack("<Q1s", 1, b"x")


@pytest.mark.parametrize(
    "value",
    [
        LIST.pack(0, 3_000_001) + bytes(3_000_001),
        LIST.pack(8, 2**40) + TEXT,
        LIST.pack(10, 2**60),
        LIST.pack(ARRAY, 4) + 4 * (LIST.pack(0, 10**6) + bytes(10**6)),
    ],
    ids=["bytes", "claims more than it has", "more than a file can have", "lists of lists"],
)
def test_a_gguf_file_with_values_without_end(value: bytes, tmp_path: Path, refused: Callable[[Path], str]) -> None:
    """They took a minute for each million, and a gigabyte."""
    write_gguf(tmp_path)
    with_value(tmp_path / "model.gguf", ARRAY, value)
    assert refused(tmp_path).endswith("model.gguf has more than 3,000,000 values in its metadata\n")


def test_a_gguf_file_with_tensors_without_end(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    write_gguf(tmp_path)
    path = tmp_path / "model.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:8] + struct.pack("<Q", 250_001) + content[16:])
    assert refused(tmp_path).endswith("model.gguf has more than 250,000 tensors\n")


@pytest.mark.parametrize(
    ("kind", "value"), [(8, struct.pack("<Q", 2**63)), (8, struct.pack("<Q", 2**62)), (77, b""), (ARRAY, LIST.pack(77, 1))]
)  # fmt: skip
def test_a_gguf_file_that_is_torn(kind: int, value: bytes, tmp_path: Path, refused: Callable[[Path], str]) -> None:
    write_gguf(tmp_path)
    with_value(tmp_path / "model.gguf", kind, value)
    assert "model.gguf is a GGUF file, which cannot be loaded here: " in refused(tmp_path)


def test_lists_in_a_gguf_file_are_gone_past(tmp_path: Path) -> None:
    write_gguf(tmp_path)
    with_value(tmp_path / "model.gguf", ARRAY, LIST.pack(8, 3) + 3 * TEXT)
    assert check(tmp_path) == 0
