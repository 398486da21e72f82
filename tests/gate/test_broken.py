"""What cannot be loaded: one line that says why, and a status of 2."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from tests.checkpoints import T5, gpt2
from tests.gate.test_check import check, config_of
from tiedquiet.__main__ import main
from tiedquiet.gate.diagnosis import damage, explain


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path.parent


def cut(folder: Path, size: int) -> Path:
    path = folder / "model.safetensors"
    return write(path, path.read_bytes()[:size])


def as_bin(folder: Path, extra: Any = None, keep: int | None = None) -> Path:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({**stored, **(extra or {})}, path)
    return write(path, path.read_bytes()[:keep])


def no_bin(folder: Path, content: str | bytes) -> Path:
    (folder / "model.safetensors").unlink()
    return write(folder / "pytorch_model.bin", content)


def adapter_of(folder: Path) -> Path:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["c_attn"], "r": 2}
    torch.save({}, write(folder.parent / "adapter" / "adapter_config.json", json.dumps(config)) / "adapter_model.bin")
    return folder.parent / "adapter"


def model_of_diffusers(folder: Path) -> Path:
    pytest.importorskip("diffusers").AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(folder)
    return changed(folder, norm_num_groups=0)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-was-run",)


def without_a_shard(folder: Path) -> Path:
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    return folder


def as_an_index(folder: Path, content: Any) -> Path:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    return write(folder / "model.safetensors.index.json", json.dumps(content))


def changed(folder: Path, **changes: Any) -> Path:
    config_of(folder, **changes)
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda g: g.parent / "nowhere" / "at" / "all", "is not a folder, and not a valid name for a model on the hub"),
        (lambda g: "https://huggingface.co/some/model", "is a URL; name a folder, or a model on the hub by its owner/name"),
        (lambda g: "some/model", "is no folder, the local cache has no config.json of it, and the hub cannot be reached: HF_HUB_OFFLINE is set"),
        (lambda g: g.parent, "has neither config.json nor model_index.json"),
        (lambda g: g / "model.safetensors", "is a file; pass the folder that it is in"),
        (lambda g: write(g / "config.json", "{"), "cannot be read"),
        (lambda g: write(g / "config.json", "\ufeff{}"), "begins with a byte order mark; save it as UTF-8 without one"),
        (lambda g: write(g / "config.json", "[]"), "does not hold a JSON object"),
        (lambda g: write(g / "model_index.json", "{}"), "is a pipeline, and its model_index.json names no component"),
        (lambda g: changed(g, architectures=["NoSuchModel"]), "config.json names NoSuchModel, which transformers"),
        (lambda g: changed(g, architectures=["GPT2PreTrainedModel"]), "GPT2PreTrainedModel, which is not a model; name"),
        (lambda g: changed(g, vocab_size=80), "transformer.wte.weight is 64 by 16 in the file and 80 by 16 in the model"),
        (lambda g: cut(g, 5000), "model.safetensors is truncated: its header promises"),
        (lambda g: cut(g, 100), "model.safetensors is truncated or not a safetensors file: it has 100 bytes"),
        (lambda g: cut(g, 0), "model.safetensors is truncated or not a safetensors file: it has 0 bytes"),
        (lambda g: write(g / "model.safetensors", b"\x04" + bytes(7) + b"abcd"), "is damaged: its header cannot be read"),
        (lambda g: write(g / "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid"), "is a Git LFS pointer"),
        (without_a_shard, "names model-00002-of-0000"),
        (lambda g: write(g / "model.safetensors.index.json", "[]") and cut(g, 0), "model.safetensors.index.json is damaged"),
        (lambda g: as_an_index(g, {"metadata": {}, "weight_map": {}}), "model.safetensors.index.json is damaged: it lists no files"),
        (lambda g: as_an_index(g, {"weight_map": {"transformer.wte.weight": "a.safetensors"}}), "index.json has no metadata, which transformers requires"),
        (lambda g: as_bin(g, keep=3000), "pytorch_model.bin is truncated: its end is missing"),
        (lambda g: as_bin(g, keep=0), "pytorch_model.bin is empty"),
        (lambda g: as_bin(g, {"x": RunsCode()}), "pytorch_model.bin is a pickle that wants to run code when it is read"),
        *((lambda g, c=content: no_bin(g, c), "pytorch_model.bin is not a file of tensors that torch.save wrote")
          for content in ("<html>404</html>", '{"error": "not found"}', bytes(20_000))),
        (adapter_of, "it has adapter_model.bin; PeftModel reads that"),
        (model_of_diffusers, "good cannot be loaded: ZeroDivisionError"),
        (lambda g: write(g.parent / "gguf" / "m.gguf", b"GGUF" + bytes(50)), "m.gguf is a GGUF file, which cannot be loaded here: "),
        (lambda g: write(g.parent / "gguf" / "m.gguf", b"GGUF" + bytes(50)) / "m.gguf", "m.gguf is a GGUF file, which cannot be loaded here: "),
        (lambda g: write(g.parent / "two" / "a.gguf", b"") and write(g.parent / "two" / "b.gguf", b""), "holds 2 GGUF files; name one of them"),
        (lambda g: write(g.parent / "lora" / "adapter_config.json", '{"base_model_name_or_path": "no/base"}'), "lora is an adapter, and its base model is not available: no/base is no folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_gets_one_line(
    make: Any, says: str, good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = make(good)
    capsys.readouterr()
    assert check(path) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert error.startswith("tiedquiet: ")
    assert "report" not in error
    assert not Path("it-was-run").exists()


def test_a_file_that_may_not_be_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert list(damage(good)) == [
        "generation_config.json cannot be read as a JSON object",
        "model.safetensors cannot be read: Permission denied",
    ]


def test_all_that_is_wrong_with_a_folder(good: Path) -> None:
    (good / "model.safetensors.index.json").write_text("[]")
    (good / "a.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": "model.safetensors"}}))
    (good / "b.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": "one.bin", "y": "two.bin"}}))
    cut(good, 0)
    assert [line.partition(":")[0] for line in damage(good)] == [
        "b.bin.index.json names one.bin, two.bin, which are missing",
        "model.safetensors.index.json is damaged",
        "model.safetensors is truncated or not a safetensors file",
    ]


def test_a_line_counts_what_it_has_no_room_for(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is cut where it is too long, and its end says what is wrong."""
    changed(good, n_embd=32)
    assert check(good) == 2
    assert capsys.readouterr().err.endswith(" is 48 in the file and 96 in the model; transformer.h.0.attn.c_attn.weight is 16 by 48 in the file and 32 by 96 in the model; transformer.h.0.attn.c_proj.bias is 16 in the file and 32 in the model; and 13 more\n")  # fmt: skip
    shards = {f"x{number}": f"model-{number:05}-of-00163.safetensors" for number in range(1, 164)}
    (good / "model.safetensors").unlink()
    (good / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert check(good) == 2
    assert "model-00003-of-00163.safetensors and 160 more, which are missing\n" in capsys.readouterr().err


@pytest.mark.parametrize("change", ['"attribute_map": 5', '"x": ' + 900 * '{"a":' + "1" + 900 * "}"])
def test_a_config_that_is_no_error_of_ours(change: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good / "config.json"
    path.write_text(f"{path.read_text().rstrip().removesuffix('}')}, {change}}}")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000)  # Python's own, which packages raise for the rest of the process: then it can be read
    try:
        assert check(good, "--trust-remote-code") == 2
    finally:
        sys.setrecursionlimit(limit)
    assert "internal error" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no such names")
def test_a_path_that_is_no_text(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(good.rename(good.with_name("caf\udce9"))) == 2
    assert "model.safetensors has a path that is not valid UTF-8, which safetensors" in capsys.readouterr().err


def test_an_error_that_only_looks_like_one_of_transformers_4_is_told_as_it_is() -> None:
    assert explain(AttributeError("'list' object has no attribute 'keys'"), None, False) == "AttributeError: 'list' object has no attribute 'keys'"  # fmt: skip
    assert explain(TypeError("X.tie_weights() got an unexpected keyword argument 'y'"), None, False).startswith("X.tie_weights takes no")  # fmt: skip
    assert explain(AttributeError("'X' object has no attribute 'all_tied_weights_keys'"), None, False).startswith("X.__init__ does")  # fmt: skip
    assert explain(KeyError(), None, False) == "KeyError"


def test_a_class_that_has_no_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nowhere")
    module.__file__ = __file__  # 5.0.0 opens it, and it does not have the class
    monkeypatch.setitem(sys.modules, "nowhere", module)
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec(
        "class NoFile(Base):\n    _tied_weights_keys = ['lm_head.weight']\n", {**names, "Base": GPT2LMHeadModel}, names
    )
    with pytest.raises(AttributeError) as raised:
        names["NoFile"](gpt2())
    assert explain(raised.value, None, False).startswith("NoFile._tied_weights_keys is a list, but transformers 5")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 2**63),
        ("depths", [2, 10**6]),
        ("text_config", {"num_layers": 10_001}),
        ("layers_per_block", 10**9),
        ("transformer_layers_per_block", [6_000, [1, 4_000]]),
    ],
)
def test_layers_without_end(key: str, value: Any, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**json.loads((good / "config.json").read_text()), "n_layer": 1, key: value}
    (good / "config.json").write_text(json.dumps(config))
    assert check(good) == 2
    named = next(iter(value)) if isinstance(value, dict) else key
    assert capsys.readouterr().err == f"tiedquiet: {good}: config.json asks for more than 10,000 layers ({named})\n"


def test_shards_without_end(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether they are there or not."""
    index = good / "model.safetensors.index.json"
    (good / "model.safetensors").unlink()
    index.write_text(json.dumps({"metadata": {}, "weight_map": {f"x{i}": f"{i}.safetensors" for i in range(10_001)}}))
    assert check(good) == 2
    assert capsys.readouterr().err == f"tiedquiet: {index} names more than 10,000 files\n"


@pytest.mark.parametrize("many", [100, 101])
def test_parts_without_end(many: int, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each was loaded, from one folder that has many names, or without any name."""
    (good / "0_Normalize").mkdir()
    kinds = [{"path": "0_Normalize", "type": "sentence_transformers.models.Normalize"}] * (many - 1)
    own = {"path": "", "type": "sentence_transformers.models.Transformer"}
    (good / "modules.json").write_text(json.dumps([*kinds, own]))
    assert check(good) == (0 if many == 100 else 2)
    assert capsys.readouterr().err == (
        "" if many == 100 else f"tiedquiet: {good}/modules.json names more than 100 parts\n"
    )
    index = {"./" * number + good.name: ["transformers", "GPT2LMHeadModel"] for number in range(many)}
    (good.parent / "model_index.json").write_text(json.dumps(index))
    if many > 100:
        assert check(good.parent) == 2
        assert "model_index.json names more than 100 parts\n" in capsys.readouterr().err


def test_labels_without_end(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(changed(good, num_labels=10**12)) == 2
    assert (
        capsys.readouterr().err == f"tiedquiet: {good}: config.json asks for more than 1,000,000 labels (num_labels)\n"
    )


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (
            lambda tensors: {"state_dict": tensors, "step": 3},
            "has its tensors under 'state_dict', where no loader looks",
        ),
        (lambda tensors: list(tensors.values()), "holds a list instead of tensors by name"),
        (lambda tensors: torch.ones(3), "holds a Tensor instead of tensors by name"),
        (lambda tensors: None, "holds a NoneType instead of tensors by name"),
        (lambda tensors: {**tensors, 5: torch.ones(1)}, "has 5 where the name of a tensor should be"),
    ],
)
def test_a_pickle_whose_tensors_lie_deeper(
    held: Any, says: str, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(good / "model.safetensors")
    (good / "model.safetensors").unlink()
    torch.save(held(stored), good / "pytorch_model.bin")
    assert check(good) == 2
    assert f"cannot be loaded as GPT2LMHeadModel: pytorch_model.bin {says}" in capsys.readouterr().err


def test_experts_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tiedquiet.gate.bounds._MOST_TENSORS", 1_000)
    sizes = {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
    SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes)).save_pretrained(tmp_path)
    assert check(tmp_path) == 0
    capsys.readouterr()
    assert check(changed(tmp_path, num_experts=10**5)) == 2
    assert capsys.readouterr().err.endswith(": its config asks for more than 1,000 tensors\n")


def test_a_list_of_the_layers_that_differ_is_not_added_up(good: Path) -> None:
    assert check(changed(good, mlp_only_layers=list(range(200)))) == 0


def test_a_shape_that_no_memory_has_room_for(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(changed(good, vocab_size=10**12)) == 2
    told = "its config asks for more than 1,001,268,736 numbers, and its files have 19,824 bytes\n"
    assert capsys.readouterr().err.endswith(told)
    changed(good, vocab_size=64, n_positions=10**8)
    stored = load_file(good / "model.safetensors")
    (good / "model.safetensors").unlink()
    torch.save({**stored, "transformer.wpe.weight": torch.zeros(1).expand(10**8, 16)}, good / "pytorch_model.bin")
    assert check(good) == 2  # it took memory for all of it
    assert "its config asks for more than" in capsys.readouterr().err


def test_a_buffer_that_no_memory_has_room_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
    GPTNeoForCausalLM(GPTNeoConfig(**sizes, max_position_embeddings=16)).save_pretrained(tmp_path)
    assert check(tmp_path) == 0
    stored = load_file(tmp_path / "model.safetensors")
    del stored["transformer.wpe.weight"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    assert check(changed(tmp_path, max_position_embeddings=10**6)) == 2  # its mask has a million rows and columns
    assert "its config asks for more than" in capsys.readouterr().err


def test_the_size_of_a_model_of_which_only_pointers_are_there(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(good, vocab_size=10**9)
    write(good / "model.safetensors", "version https://git-lfs.github.com/spec/v1\n")
    assert check(good) == 2
    assert "model.safetensors is a Git LFS pointer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "source"),
    [
        (("--class", "GPT2LMHeadModel", "./nope"), "./nope"),
        (("--dtype", "float16", "./nope"), "./nope"),
        (("./nope", "--no-such-option"), "./nope"),
    ],
)
def test_the_json_of_a_failure_says_what_was_given(
    given: tuple[str, ...], source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *given, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["source"] == source
