"""Tensors of the files that the model has no place for: a head is let be, half of a file is told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5ForConditionalGeneration,
)

import tiedquiet
from tests.checkpoints import gpt2, t5
from tests.doors.test_from_pretrained import wan_pipeline
from tests.gate import quantised
from tests.gate.test_check import check, config_of
from tests.gate.test_compare import mixtral
from tiedquiet.gate.again import Again
from tiedquiet.gate.unplaced import OfGguf, of_gguf, of_transformers
from tiedquiet.proof.files import Checkpoint

WHOLE = 16  # tensors of this GPT-2 in a file


def component(path: Path, status: int, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert check(path, "--json", *options) == status
    return json.loads(capsys.readouterr().out)["components"][0]


def more(path: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})


@pytest.mark.parametrize(("extra", "status"), [(WHOLE - 1, 0), (WHOLE, 1)])
def test_as_many_as_the_model_has(extra: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    more(tmp_path / "model.safetensors", **{f"x.{i}": torch.ones(1) for i in range(extra)})
    found = component(tmp_path, status, capsys)
    assert len(found["unexpected"]) == extra
    says = "16 of 32 tensors of the file have no place in GPT2LMHeadModel: is that the right class?"
    assert found["problem"] == (says if status else None)


def test_one_that_is_larger_than_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    own = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    more(tmp_path / "model.safetensors", x=torch.ones(own, dtype=torch.uint8))
    says = f"1 of 17 tensors of the file, with {own:,} of its {2 * own:,} bytes, have no place in GPT2LMHeadModel"
    assert component(tmp_path, 1, capsys)["problem"] == f"{says}: is that the right class?"
    by_user = component(tmp_path, 0, capsys, "--class", "GPT2LMHeadModel")
    assert (by_user["problem"], by_user["notes"]) == (None, [says])
    more(tmp_path / "model.safetensors", x=torch.ones(own - 1, dtype=torch.uint8))
    assert component(tmp_path, 0, capsys, "--class", "GPT2LMHeadModel")["notes"] == []


def test_experts_are_counted_as_the_file_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transformers reports those of a layer as one or two tensors."""
    model = MixtralForCausalLM(MixtralConfig(**{**mixtral().config.to_dict(), "num_hidden_layers": 4}))
    model.save_pretrained(tmp_path)
    config_of(tmp_path, num_hidden_layers=1)
    stored = load_file(tmp_path / "model.safetensors")
    left = sum(any(f"layers.{i}." in name for i in (1, 2, 3)) for name in stored)
    found = component(tmp_path, 1, capsys)
    assert found["problem"] == (
        f"{left} of {len(stored)} tensors of the file have no place in MixtralForCausalLM: is that the right class?"
    )
    assert len(found["unexpected"]) < left


def test_what_a_class_says_that_it_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    T5ForConditionalGeneration(t5()).save_pretrained(tmp_path)
    config_of(tmp_path, architectures=["T5EncoderModel"])
    found = component(tmp_path, 0, capsys)
    assert 2 * found["tensors"] < len(load_file(tmp_path / "model.safetensors"))


def test_a_tower_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={**size, "vocab_size": 64}, vision_config={**size, "image_size": 16, "patch_size": 8}
    )
    CLIPModel(config).save_pretrained(tmp_path)
    assert component(tmp_path, 0, capsys)["problem"] is None
    config_of(tmp_path, architectures=["CLIPVisionModel"])
    assert "have no place in CLIPVisionModel: is that the right class?" in component(tmp_path, 1, capsys)["problem"]


def test_a_prefix_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = {f"module.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(stored, path, {"format": "pt"})
    found = component(tmp_path, 1, capsys)
    assert {finding["verdict"] for finding in found["findings"]} >= {"unread"}
    assert found["problem"] is None


@pytest.mark.parametrize(("extra", "status"), [(1, 0), (200, 1)])
def test_a_model_of_diffusers(extra: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wan = wan_pipeline(tmp_path)
    more(wan / "vae" / "diffusion_pytorch_model.safetensors", **{f"encoder.x.{i}": torch.ones(1) for i in range(extra)})
    found = component(wan / "vae", status, capsys)
    assert bool(found["problem"]) is bool(status)
    assert not status or found["problem"].startswith("200 of 290 tensors of the file have no place in AutoencoderKLWan")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert of_transformers(GPT2LMHeadModel(gpt2()), Checkpoint(None, [str(tmp_path / "model.gguf")]), []) == ""


@pytest.mark.parametrize("kind", ["gguf", "gguf of transformers"])
@pytest.mark.parametrize("extra", [0, 1, 30])
def test_what_a_gguf_file_has_and_the_model_has_not(
    kind: str, extra: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers reads no more layers than the file's metadata says, and says nothing of the others."""
    close = quantised.Gguf.close
    more = [f"blk.7.{number:02}" for number in range(extra)]

    def close_with_more(self: quantised.Gguf) -> None:
        for name in more:
            self.add(name, 256)
        close(self)

    monkeypatch.setattr(quantised.Gguf, "close", close_with_more)
    quantised.MAKERS[kind](tmp_path / "made")
    found = component(tmp_path / "made" / "model.gguf", int(extra == 30), capsys)
    assert found["unexpected"] == [f"{name}.weight" for name in more]
    count = found["tensors"] + extra
    says = f"{extra} of {count} tensors of the file have no place in {found['class']}: is that the right class?"
    assert found["problem"] == (says if extra == 30 else None)


@pytest.mark.parametrize("without", ["", "gate", "up"])
def test_experts_that_a_gguf_file_has_in_one_have_their_place(
    without: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers reads them by rules of its own, and takes zeros for the half that the file does not have."""
    file = quantised.Gguf(tmp_path / "moe", "qwen2moe", ("Q8_0",))
    file.about(context_length=64, embedding_length=64, block_count=1, feed_forward_length=128, head_count=2, head_count_kv=2, vocab_size=64, layer_norm_rms_eps=1e-5, rope_freq_base=1e4, expert_count=2, expert_used_count=1, name="x")  # fmt: skip
    for name, *shape in (
        ("token_embd", 64, 64), ("output", 64, 64), ("output_norm", 64),
        *((f"blk.0.attn_{name}", 64, 64) for name in ("q", "k", "v", "output")),
        ("blk.0.attn_norm", 64), ("blk.0.ffn_norm", 64), ("blk.0.ffn_gate_inp", 2, 64),
        ("blk.0.ffn_gate_exps", 2, 1408, 64), ("blk.0.ffn_up_exps", 2, 1408, 64), ("blk.0.ffn_down_exps", 2, 64, 1408),
        ("blk.0.ffn_gate_shexp", 5632, 64), ("blk.0.ffn_up_shexp", 5632, 64), ("blk.0.ffn_down_shexp", 64, 5632),
        ("blk.0.ffn_gate_inp_shexp", 64),
    ):  # fmt: skip
        if not without or f"ffn_{without}_exps" not in name:
            file.add(name, *shape)
    for name in ("q", "k", "v"):
        file.writer.add_tensor(f"blk.0.attn_{name}.bias", torch.ones(64).numpy())
    file.close()
    found = component(tmp_path / "moe" / "model.gguf", int(bool(without)), capsys)
    assert (found["unexpected"], found["problem"]) == ([], None)
    assert found["held"] == found["tensors"] - bool(without)
    assert {(finding["verdict"], finding["why"]) for finding in found["findings"]} == {
        ("missing", f"the file has 180,224 of its 360,448 elements, and no blk.0.ffn_{part}_exps")
        for part in filter(None, [without])
    }


def test_a_gguf_file_of_an_encoder_and_a_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its kind has no causal language model, and T5Model has no head."""
    file = quantised.Gguf(tmp_path / "t5", "t5", ("Q8_0", "F16"))
    file.about(context_length=64, embedding_length=64, block_count=1, feed_forward_length=64, head_count=2, key_length=32, vocab_size=64, relative_attn_buckets_count=32, layer_norm_rms_eps=1e-6)  # fmt: skip
    for name in ("token_embd", "output"):
        file.add(name, 64, 64)
    for start in ("enc", "dec"):
        file.add(f"{start}.output_norm", 64)
        file.writer.add_tensor(f"{start}.blk.0.attn_rel_b.weight", torch.ones(32, 2).numpy())
        for part in ("attn", "cross_attn") if start == "dec" else ("attn",):
            file.add(f"{start}.blk.0.{part}_norm", 64)
            for name in "qkvo":
                file.add(f"{start}.blk.0.{part}_{name}", 64, 64)
        file.add(f"{start}.blk.0.ffn_norm", 64)
        for name in ("gate", "up", "down"):
            file.add(f"{start}.blk.0.ffn_{name}", 64, 64)
    file.close()
    found = component(tmp_path / "t5" / "model.gguf", 0, capsys)
    assert (found["class"], found["unexpected"]) == ("T5ForConditionalGeneration", [])


def quantised_tensor() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def nested_tensor() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def with_one_beyond_sizes(path: Path) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    place = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    odd = {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [place, place]}
    header = json.dumps({**entries, "x": odd}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


@pytest.mark.filterwarnings("ignore")  # such tensors are deprecated, or prototypes
@pytest.mark.parametrize("kind", ["quantised", "nested", "beyond"])
def test_one_tensor_that_meta_cannot_have_ends_nothing(
    kind: str, good: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = good / "model.safetensors"
    config_of(good, dtype="float32")  # else transformers itself reads all of the file on meta
    if kind == "beyond":
        with_one_beyond_sizes(path)
    else:
        extra = quantised_tensor() if kind == "quantised" else nested_tensor()
        torch.save({**load_file(path), "x": extra}, good / "pytorch_model.bin")
        path.unlink()
    with tiedquiet.enable("on"):
        loaded = GPT2LMHeadModel.from_pretrained(good)
    assert tiedquiet.check(loaded).ok
    assert not [line for line in caplog.messages if "tiedquiet failed" in line]
    found = component(good, 0, capsys)
    assert (found["unexpected"], found["held"]) == (["x"], WHOLE)


def test_a_gguf_file_whose_names_are_not_known() -> None:
    model = GPT2LMHeadModel(gpt2())
    assert of_gguf(model, [], Again(model, {}, SimpleNamespace(hf_quantizer=None, weight_mapping=None))) == OfGguf()
