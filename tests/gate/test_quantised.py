"""Quantised checkpoints: codes and scales are the file's, or what the quantiser makes of it once more; and if not, told."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import HrmTextConfig, HrmTextForCausalLM, LlamaForCausalLM
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import tiedquiet
from tests.gate.quantised import MAKERS, Make, configured, plain
from tiedquiet import Verdict
from tiedquiet.__main__ import main
from tiedquiet.gate import load

pytestmark = pytest.mark.filterwarnings("ignore")
STORED = "compared in their stored form (codes and scales)"
AGAIN = "again from the file by {}, and are equal"
WAYS: dict[str, tuple[int, str]] = {
    "bitsandbytes, 8 bits": (7, STORED),
    "bitsandbytes, 4 bits": (7, STORED),
    "bitsandbytes, 4 bits twice": (7, STORED),
    "torchao": (7, STORED),
    "compressed-tensors": (7, STORED),
    "compressed-tensors, 4 bits": (7, STORED),
    "fp8": (7, f"dequantised {AGAIN.format('transformers (fp8)')}"),
    "fp8 experts": (6, f"dequantised {AGAIN.format('transformers (fp8)')}"),
    "mxfp4": (2, f"dequantised {AGAIN.format('transformers (mxfp4)')}"),
    "gptq": (7, STORED),
    "gptq of version 2": (14, STORED),
    "awq": (14, STORED),
    "gguf": (12, f"dequantised {AGAIN.format('the gguf package')}"),
    "gguf, k": (12, f"dequantised {AGAIN.format('the gguf package')}"),
    "gguf of transformers": (21, f"dequantised {AGAIN.format('transformers (gguf)')}"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_sound_one_is_held_in_full_and_the_note_says_how(
    kind: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(kind)
    status, lines = check(capsys, folder)
    held, total = re.search(r"(\d+) of (\d+) tensors", lines[0]).groups()  # type: ignore[union-attr]
    assert (status, held) == (0, total)
    count, way = WAYS[kind]
    assert lines[1] == f"  {count} tensors were {way}"
    made_by = [line.rpartition(" by ")[2].partition(",")[0] for line in lines[1:] if "again from the file by" in line]
    ends = (
        f"tensors hold the file's bytes, or what {made_by[0]} makes of them"
        if made_by
        else "tensors hold the file's bytes"
    )
    assert lines[0].partition(";")[0].endswith(ends)


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = main(["check", *map(str, arguments)])
    return status, capsys.readouterr().out.splitlines()


def flip(tensor: torch.Tensor) -> None:
    """Change one bit of the first element."""
    with torch.no_grad():
        tensor.data.reshape(-1)[:1].view(torch.uint8)[0] ^= 1


def down(model: Any) -> Any:
    return model.get_submodule("model.layers.0.mlp.down_proj")


def _other_copy(model: Any) -> None:
    """What bitsandbytes computes with, and no state dict has."""
    down(model).weight.CB = down(model).weight.CB.clone()
    flip(down(model).weight.CB)


def _other_blocks(model: Any) -> None:
    down(model).weight.block_size = [1, 32]


SPOILT: dict[str, tuple[str, Callable[[Any], None], str, str]] = {
    "code of 8 bits": ("bitsandbytes, 8 bits", lambda m: flip(down(m).weight.data), "overwritten", "bitsandbytes makes of the file in 1 of 8,192 elements"),
    "scale of 8 bits": ("bitsandbytes, 8 bits", lambda m: flip(down(m).weight.SCB), "overwritten", "in 1 of 64 elements of SCB"),
    "codes beside": ("bitsandbytes, 8 bits", _other_copy, "overwritten", "in 1 of 8,192 elements of CB"),
    "code of 4 bits": ("bitsandbytes, 4 bits", lambda m: flip(down(m).weight.data), "overwritten", "in 1 of 4,096 elements"),
    "scale of 4 bits": ("bitsandbytes, 4 bits", lambda m: flip(down(m).weight.quant_state.absmax), "overwritten", "in 1 of 128 elements of weight.absmax"),
    "size of blocks of 4 bits": ("bitsandbytes, 4 bits", lambda m: setattr(down(m).weight.quant_state, "blocksize", 128), "unproven", "its weight.quant_state.bitsandbytes__fp4 is (80,) of uint8, and (79,) of uint8 in what bitsandbytes makes"),
    "scale of scales": ("bitsandbytes, 4 bits twice", lambda m: flip(down(m).weight.quant_state.state2.absmax), "overwritten", "elements of weight.nested_absmax"),
    "code of torchao": ("torchao", lambda m: flip(down(m).weight.qdata), "overwritten", "in 1 of 8,192 elements of _weight_qdata"),
    "scale of torchao": ("torchao", lambda m: flip(down(m).weight.scale), "overwritten", "in 1 of 64 elements of _weight_scale"),
    "size of blocks of torchao": ("torchao", _other_blocks, "overwritten", "and torchao reads those of the file by {'block_size': [1, 128]"),
    "no longer quantised": ("torchao", lambda m: setattr(down(m), "weight", torch.nn.Parameter(down(m).weight.dequantize())), "unproven", "its _weight_qdata is absent, and (64, 128) of int8 in what torchao makes"),
    "code of compressed-tensors": ("compressed-tensors", lambda m: flip(down(m).weight.data), "overwritten", "in 1 of 8,192 elements"),
    "packed code of compressed-tensors": ("compressed-tensors, 4 bits", lambda m: flip(down(m).weight_packed.data), "overwritten", "compressed-tensors makes of the file in 1 of 1,024 elements"),
    "scale of packed codes": ("compressed-tensors, 4 bits", lambda m: flip(down(m).weight_scale.data), "overwritten", "differs from the file in 1 of 256 elements"),
    "scale of compressed-tensors": ("compressed-tensors", lambda m: flip(down(m).weight_scale.data), "overwritten", "differs from the file in 1 of 64 elements"),
    "value from fp8": ("fp8", lambda m: flip(down(m).weight.data), "overwritten", "in 1 of 8,192 elements"),
    "value beside fp8": ("fp8", lambda m: flip(m.model.norm.weight.data), "overwritten", "in 1 of 64 elements"),
    "value from fp8 experts": ("fp8 experts", lambda m: flip(m.model.layers[0].mlp.experts.down_proj.data), "overwritten", "in 1 of 4,096 elements"),
    "value from mxfp4": ("mxfp4", lambda m: flip(m.model.layers[0].mlp.experts.down_proj.data), "overwritten", "in 1 of 8,192 elements"),
    "value from gguf": ("gguf", lambda m: flip(down(m).weight.data), "overwritten", "what the gguf package makes of the file in 1 of 65,536 elements"),
    "value beside gguf": ("gguf, k", lambda m: flip(m.model.norm.weight.data), "overwritten", "in 1 of 256 elements"),
    "value from gguf of transformers": ("gguf of transformers", lambda m: flip(m.model.layers[0].feed_forward.w1.weight.data), "overwritten", "in 1 of 65,536 elements"),
}  # fmt: skip


@pytest.mark.parametrize("attack", SPOILT)
def test_what_is_spoilt_in_memory_is_told(
    attack: str, make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the watch's back, when the load has ended."""
    kind, spoil, verdict, why = SPOILT[attack]
    folder, own = make(kind), load._load

    def loaded(*arguments: Any) -> Any:
        result = own(*arguments)
        spoil(result[0])
        return result

    monkeypatch.setattr(load, "_load", loaded)
    status, lines = check(capsys, folder)
    assert status == 1
    assert f"; 1 {verdict}" in lines[0]
    (row,) = (line for line in lines[1:] if f"  {verdict}" in line)
    assert why in row


@pytest.mark.parametrize("kind", ["bitsandbytes, 8 bits", "bitsandbytes, 4 bits twice"])
def test_a_model_that_is_compared_is_left_as_it_was(kind: str, make: Make) -> None:
    """What bitsandbytes makes of files, it may leave on the model that it makes them for; so that is another one."""
    folder = make(kind)
    model = LlamaForCausalLM.from_pretrained(folder, device_map="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        proof = tiedquiet.check(model, folder)
        assert (proof.stored, proof.findings) == (proof.total, ())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_what_is_quantised_while_it_is_loaded_is_quantised_again(package: str, tmp_path: Path) -> None:
    config = configured(package, **({"load_in_4bit": True} if package == "bitsandbytes" else {}))
    source = plain(tmp_path / "source")
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=copy.deepcopy(config), device_map="cpu", dtype="auto")  # fmt: skip
    proof = tiedquiet.check(model, source)
    assert (proof.stored, proof.total, proof.findings) == (12, 12, ())
    model.save_pretrained(tmp_path / "saved")
    assert tiedquiet.check(model, tmp_path / "saved").ok
    weight = down(model).weight
    flip(weight.scale if package == "torchao" else weight.quant_state.absmax)
    for path in source, tmp_path / "saved":
        (finding,) = tiedquiet.check(model, path).findings
        assert (finding.key, finding.verdict) == ("model.layers.0.mlp.down_proj.weight", Verdict.OVERWRITTEN)


class _Pair(torch.Tensor):
    """Codes and scales in one tensor, as torchao has them."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, block: int) -> "_Pair":
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, block: int) -> None:
        self.codes, self.scale, self.block = codes, scale, block

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, int]]:
        return ["codes", "scale"], {"block": self.block}

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is torch.ops.aten.detach.default, function
        return cls(args[0].codes, args[0].scale, args[0].block)


class _PairConfig(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method = "pairs"


class _PairQuantizer(HfQuantizer):
    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return "_proj." in param_name

    def get_quantize_ops(self) -> Any:
        return _ToPairs()

    def is_serializable(self, **_: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _ToPairs(ConversionOps):
    def convert(self, input_dict: Any, **_: Any) -> dict[str, torch.Tensor]:
        made = {}
        for name, (values,) in input_dict.items():
            scale = values.abs().amax(1, keepdim=True) / 127
            codes = (values / scale).round().to(torch.int8)
            made[name] = torch.nn.Parameter(_Pair(codes, scale, values.shape[1]), requires_grad=False)
        return made


def test_a_tensor_that_consists_of_several_is_compared_piece_by_piece(tmp_path: Path) -> None:
    register_quantization_config("pairs")(_PairConfig)
    register_quantizer("pairs")(_PairQuantizer)
    source = plain(tmp_path)
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=_PairConfig(), dtype="auto")
    assert type(down(model).weight) is _Pair
    assert tiedquiet.check(model, source).findings == ()
    down(model).weight.block = 32
    flip(model.model.layers[0].mlp.up_proj.weight.scale)
    whys = [finding.why for finding in tiedquiet.check(model, source).findings]
    by = "transformers (pairs)"
    assert whys == [
        f"its codes are read by {{'block': 32}}, and {by} reads those of the file by {{'block': 128}}",
        f"differs from what {by} makes of the file in 1 of 128 elements of _weight_scale",
    ]


def test_a_folder_that_cannot_be_loaded_proves_nothing_of_a_quantised_model(make: Make, tmp_path: Path) -> None:
    folder = make("bitsandbytes, 8 bits")
    model = LlamaForCausalLM.from_pretrained(folder, device_map="cpu")
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="does not load as a quantised model"):
        tiedquiet.check(model, tmp_path)


def test_what_one_tensor_of_the_file_is_split_into_is_compared(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    source = plain(tmp_path, HrmTextForCausalLM(HrmTextConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)))
    config = configured("bitsandbytes", load_in_8bit=True)
    model = HrmTextForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu", dtype="auto")
    proof = tiedquiet.check(model, source)
    assert (proof.stored, proof.findings) == (proof.total, ())
    key = "model.H_module.layers.0.mlp.up_proj.weight"
    assert key not in load_file(source / "model.safetensors")
    flip(model.get_parameter(key).SCB)
    (finding,) = tiedquiet.check(model, source).findings
    assert (finding.key, finding.verdict) == (key, Verdict.OVERWRITTEN)


class _Once(LlamaForCausalLM):
    """Is loaded once, and then no more: what is checked must not depend on it unsaid."""

    count = 0

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        cls.count += 1
        if cls.count % 2 == 0:
            raise OSError("no longer there")
        return super().from_pretrained(*args, **kwargs)


class _Named(LlamaForCausalLM):
    """Does not tell its tensors to a second load."""

    count = 0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        type(self).count += 1
        self.number = self.count

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.number % 2 == 0:
            raise RuntimeError("no names")
        return super().state_dict(*args, **kwargs)


class _Kept(_Named):
    """Does not tell a second load what a parameter is: the quantiser gives it up, and goes on."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return LlamaForCausalLM.state_dict(self, *args, **kwargs)

    def get_parameter_or_buffer(self, target: str) -> Any:
        if self.number % 2 == 0:
            raise RuntimeError("no parameter")
        return super().get_parameter_or_buffer(target)


def test_what_cannot_be_read_a_second_time_cannot_be_checked(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(make("fp8")), "--class", f"{__name__}._Once"]) == 2
    assert "it is quantised, and its values cannot be read a second time" in capsys.readouterr().err


def test_what_the_loader_cannot_make_once_more_is_proven_by_the_file_alone(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "_Named", "_Kept":
        status, lines = check(capsys, make("bitsandbytes, 8 bits"), "--class", f"{__name__}.{name}")
        assert (status, lines[1]) == (0, f"  7 tensors were {STORED}"), name
    status, lines = check(capsys, make("fp8"), "--class", f"{__name__}._Named")
    told = " ".join(lines).count("transformers (fp8) cannot make it from the file again: no names")
    assert (status, told) == (1, 7)


def test_a_quantiser_that_transformers_does_not_know_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plain(tmp_path) / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "evil.module"}}
    path.write_text(json.dumps(config))
    assert check(capsys, tmp_path)[0] == 0
