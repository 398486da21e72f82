"""Files of codes that lack a scale."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

import tiedquiet
from tests.checkpoints import gpt2
from tests.gate.quantised import MAKERS, Make
from tiedquiet import Verdict
from tiedquiet.__main__ import main
from tiedquiet.gate import quantised
from tiedquiet.gate.again import Again
from tiedquiet.gate.lacking import lacking, lacking_in
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.names import Origin

pytestmark = pytest.mark.filterwarnings("ignore")
DOWN = "model.layers.0.mlp.down_proj"


def no(lacks: str, beside: str, kind: str) -> str:
    return f"LlamaForCausalLM: the files have no {DOWN}.{lacks}, which belongs to {DOWN}.{beside} (codes of {kind})"


WITHOUT = {
    "scale of fp8": ("fp8", "weight_scale_inv", 1, "missing  the file has float8_e4m3fn codes for it, and no scale"),
    "scale of scales": ("bitsandbytes, 4 bits twice", "nested_absmax", 1, "nested_quant_map  it belongs to this tensor, but is not in the model"),
    "scale of compressed-tensors": ("compressed-tensors", "weight_scale", 1, "unwritten  a parameter: uninitialised memory"),
    "scale of 8 bits": ("bitsandbytes, 8 bits", "SCB", 2, no("SCB", "weight", "int8")),
    "codes of 8 bits": ("bitsandbytes, 8 bits", "weight", 2, no("weight", "weight_format", "uint8")),
    "scale of 4 bits": ("bitsandbytes, 4 bits", "absmax", 2, no("weight.absmax", "weight", "uint8")),
    "map of 4 bits": ("bitsandbytes, 4 bits twice", "weight.quant_map", 2, no("weight.quant_map", "weight", "uint8")),
    "state of 4 bits": ("bitsandbytes, 4 bits", "bitsandbytes__fp4", 2, f"LlamaForCausalLM: {DOWN}.weight cannot be made of what the files have for it: "),
    "scale of torchao": ("torchao", "_weight_scale", 2, no("_weight_scale", "_weight_qdata", "int8")),
    "scale of fp8 experts": ("fp8 experts", "experts.1.down_proj.weight_scale_inv", 2, "the files have no model.layers.0.mlp.experts.1.down_proj.weight_scale_inv, which belongs to"),
    "codes of fp8 experts": ("fp8 experts", "experts.1.down_proj.weight", 2, "mlp.experts.down_proj cannot be made of what the files have for it: "),
    "scale of mxfp4": ("mxfp4", "down_proj_scales", 2, "model.layers.0.mlp.experts.down_proj_scales, which belongs to model.layers.0.mlp.experts.down_proj_blocks (codes of uint8)"),
}  # fmt: skip


@pytest.mark.parametrize("attack", WITHOUT)
def test_a_file_without_a_scale_does_not_pass(
    attack: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, name, wanted, says = WITHOUT[attack]
    path = make(kind) / "model.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith(name) and "down_proj" in key)]
    (tmp_path / "config.json").write_text((path.parent / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", about)
    assert main(["check", str(tmp_path)]) == wanted
    said = capsys.readouterr()
    assert says in said.out + said.err


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "gguf" not in kind])
def test_a_sound_file_lacks_nothing(kind: str, make: Make) -> None:
    assert lacking(Checkpoint(None, [str(make(kind) / "model.safetensors")]).headers) == ""


def file_of(layers: int, *more: str) -> dict[str, torch.Tensor]:
    codes, scale = torch.empty(4, 4, dtype=torch.int8, device="meta"), torch.empty(4, device="meta")
    found = {f"layers.{i}.weight": codes for i in range(layers)} | {f"layers.{i}.scale": scale for i in range(layers)}
    return found | dict.fromkeys(more, scale)


def test_what_most_have_is_missing_where_one_has_it_not() -> None:
    headers = file_of(4, *(f"layers.{i}.bias" for i in range(3)))
    assert lacking(headers) == ""  # a layer may have no bias
    del headers["layers.1.scale"]
    says = "the files have no layers.1.scale, which belongs to layers.1.weight (codes of int8)"
    assert lacking(headers) == says
    del headers["layers.2.scale"]
    assert lacking(headers) == f"{says} (and 1 more)"
    del headers["layers.0.scale"]
    assert lacking(headers) == ""  # the form is another one


def test_what_lies_beside_a_hundred_belongs_to_none(tmp_path: Path) -> None:
    headers = file_of(2)
    one = {name: header for name, header in headers.items() if name != "layers.1.scale"}
    assert lacking(one) != ""
    assert lacking(one | {f"layers.0.{i}": headers["layers.0.scale"] for i in range(100)}) == ""
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert lacking_in(tmp_path) == ""


class _Coded(torch.nn.Linear):
    """It saves a scale next to its codes, as the layers of bitsandbytes do."""

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = torch.ones(2)


class _Quantizer:
    """What is asked of a quantiser before a layer is made again."""

    pre_quantized = True
    quantization_config = SimpleNamespace(quant_method="coded")

    def param_needs_quantization(self, *_: Any) -> bool:
        return True


@pytest.mark.parametrize("more", [(), ("0.weight.offset",)], ids=["as it was saved", "with an offset"])
def test_a_piece_of_the_file_that_the_model_does_not_have(more: tuple[str, ...]) -> None:
    model = torch.nn.Sequential(_Coded())
    stored = {**model.state_dict(), **dict.fromkeys(more, torch.ones(2))}
    again = Again(model, None, SimpleNamespace(hf_quantizer=None, weight_mapping=None))
    again.quantiser = _Quantizer()
    settling = quantised._Settling(model, again, Checkpoint(stored))
    settling.sources = {"0.weight": Origin(tuple(stored), True)}
    settling._settle("0.weight", None, "nobody can make it again")
    found = settling.settled.findings["0.weight"]
    assert (found is None) == (not more)
    assert found is None or (found.verdict, found.source) == (Verdict.UNREAD, *more)


@pytest.mark.parametrize(
    ("dtype", "status"),
    [(torch.int8, 1), (torch.uint8, 1), (torch.int16, 1), (torch.int64, 1), (torch.float8_e4m3fn, 0)],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_codes_that_no_config_and_no_scale_tell(
    form: str, dtype: torch.dtype, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole numbers for a matrix; of a vector or a mask they may be what is meant, and eight bits of a float as well."""
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    stored["transformer.ln_f.bias"] = stored["transformer.ln_f.bias"].to(dtype)
    stored["transformer.wpe.weight"] = torch.ones_like(stored["transformer.wpe.weight"]).to(dtype)
    if form == "bin":
        torch.save(stored, tmp_path / "pytorch_model.bin")
        path.unlink()
    else:
        save_file(stored, path, {"format": "pt"})
    capsys.readouterr()
    assert main(["check", str(tmp_path)]) == status
    said = capsys.readouterr().out
    name = str(dtype).removeprefix("torch.")
    assert (f"{name} codes were read as values, and the checkpoint has no scale beside them" in said) is bool(status)
    assert f"{16 - status} of 16 tensors hold the file's bytes" in said


class _Counts(GPT2LMHeadModel):
    """Has whole numbers of its own, so that the shim does not open headers to see which tensors have them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("steps", torch.ones(2, dtype=torch.int8))


def test_codes_in_a_type_that_the_model_has_elsewhere(tmp_path: Path) -> None:
    key = "transformer.wpe.weight"
    _Counts(gpt2()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[key] = torch.ones_like(tensors[key]).to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = _Counts.from_pretrained(tmp_path)
    (found,) = [one for one in tiedquiet.check(model, tmp_path).findings if one.verdict is not Verdict.TIED]
    assert (found.key, found.verdict, found.why) == (
        key,
        Verdict.MISSING,
        "the file has int8 codes for it, and no scale",
    )
