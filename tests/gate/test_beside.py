"""Weights that lie beside those that are read: quiet while they agree, told where one of the two is out of date."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from tests.checkpoints import gpt2
from tests.gate.test_check import check
from tests.proof.test_reading import compress


def a_pickle(folder: Path, changed: bool, age: int) -> None:
    """A `.bin` beside the `.safetensors`, so many seconds older."""
    stored = load_file(folder / "model.safetensors")
    if changed:
        stored["transformer.wte.weight"] = stored["transformer.wte.weight"] + 1
    path = folder / "pytorch_model.bin"
    torch.save(stored, path)
    written = (folder / "model.safetensors").stat().st_mtime - age
    os.utime(path, (written, written))


@pytest.fixture
def good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    capsys.readouterr()
    return tmp_path


@pytest.mark.parametrize("age", [-100, 100])
def test_both_forms_of_the_same_values(age: int, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_pickle(good, changed=False, age=age)
    assert check(good) == 0
    assert "beside" not in capsys.readouterr().out


def test_a_pickle_that_is_compressed(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody reads it as long as there is another form. Alone, transformers takes the compressed bytes for numbers."""
    a_pickle(good, changed=True, age=100)
    compress(good / "pytorch_model.bin")
    assert check(good) == 0
    (good / "model.safetensors").unlink()
    capsys.readouterr()
    assert check(good) == 2
    said = "pytorch_model.bin is compressed, and torch maps it and takes the compressed bytes for numbers: save it anew"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("age", "says"), [(-100, "newer"), (100, "older")])
def test_other_values(age: int, says: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_pickle(good, changed=True, age=age)
    assert check(good) == 1
    why = (
        f"model.safetensors is read, and pytorch_model.bin beside it is {says} and has other values for 1 of 16 tensors"
    )
    assert why in capsys.readouterr().out


def test_shards_beside_a_whole_file(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = good / "model.safetensors"
    stored = load_file(whole)
    GPT2LMHeadModel.from_pretrained(good).save_pretrained(good, max_shard_size="8KB")
    save_file(stored, whole, {"format": "pt"})
    capsys.readouterr()
    assert check(good) == 0
    save_file({**stored, "transformer.wpe.weight": stored["transformer.wpe.weight"] * 2}, whole, {"format": "pt"})
    assert check(good) == 1
    assert "model.safetensors.index.json beside it is older and has other values for 1 of" in capsys.readouterr().out


@pytest.mark.parametrize("change", [0, 1])
def test_a_shard_that_the_index_does_not_name(change: int, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left by an older save of as many."""
    GPT2LMHeadModel.from_pretrained(good).save_pretrained(good, max_shard_size="8KB")
    (good / "model.safetensors").unlink()
    shards = sorted(good.glob("model-*"))
    stored = load_file(shards[0])
    beside = good / shards[0].name.replace("00001-of", "00000-of")
    save_file({name: tensor + change for name, tensor in stored.items()}, beside, {"format": "pt"})
    capsys.readouterr()
    assert check(good) == change
    why = f"model.safetensors.index.json is read, and {beside.name} beside it is newer and has other values for {len(stored)} of"
    assert (why in capsys.readouterr().out) is bool(change)


def test_other_names_altogether(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(1)}, good / "pytorch_model.bin")
    assert check(good) == 1
    assert "has 1 tensor under other names" in capsys.readouterr().out


def test_what_lies_beside_and_is_damaged_is_nobody_s_business(good: Path) -> None:
    (good / "pytorch_model.bin").write_bytes(b"junk")
    (good / "model.safetensors.index.json").write_text("[]")
    assert check(good) == 0
    (good / "pytorch_model.bin").unlink()
    (good / "pytorch_model.bin").symlink_to("../.git/annex/objects/not-fetched")
    (good / "pytorch_model.bin.index.json").mkdir()
    assert check(good) == 0


def test_a_newer_pickle_that_must_not_be_opened(
    good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    a_pickle(good, changed=True, age=100)
    assert check(good) == 0
    assert "newer" not in capsys.readouterr().out
    a_pickle(good, changed=True, age=-100)
    assert check(good) == 0  # age alone proves nothing: a clone writes files in any order
    says = "  pytorch_model.bin is newer than model.safetensors, which is read; it was not opened: it is a pickle\n"
    assert says in capsys.readouterr().out
    assert check(good, "--trust-pickle") == 1
    assert "has other values for 1 of 16 tensors" in capsys.readouterr().out
