"""What a quantiser does to a model when all of it is read: repacked, counted from another number, and proven all the same."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

import tiedquiet
from tests.gate.quantised import Make, plain
from tests.gate.test_quantised import check, down, flip
from tiedquiet import Verdict
from tiedquiet.doors import from_pretrained
from tiedquiet.gate import load, report

pytestmark = pytest.mark.filterwarnings("ignore")
MLP = "model.layers.0.mlp"
FILE = "differs from the file in 1 of {} elements"
MADE = "differs from what {} makes of the file in {} elements"
Spoil = Callable[[Any], object]


class _Config(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method = "last"


class _Quantizer(HfQuantizer):
    """Changes one weight in place, replaces one, and makes two of another; what it cannot do, it says."""

    fails = False

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if self.fails and len(model.model.layers[0].self_attn._modules) < 4:
            raise RuntimeError("no attention")
        for module in model.modules():
            if hasattr(module, "up_proj"):
                module.down_proj.weight.data.add_(1)
                module.gate_proj.weight = torch.nn.Parameter(module.gate_proj.weight.data.flip(0))
                rows, module.up_proj.weight = module.up_proj.weight, None
                module.up_proj.register_buffer("even", rows.data[::2].clone())
                module.up_proj.register_buffer("odd", rows.data[1::2].clone())


@pytest.fixture
def last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkpoint that goes through such a quantiser."""
    register_quantization_config("last")(_Config)
    register_quantizer("last")(_Quantizer)
    monkeypatch.setattr(_Quantizer, "fails", False)
    path = plain(tmp_path / "last") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "last"}}))
    yield path.parent
    del AUTO_QUANTIZATION_CONFIG_MAPPING["last"], AUTO_QUANTIZER_MAPPING["last"]


def test_what_it_makes_is_made_once_more_and_equal(last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, last) == (
        0,
        ["LlamaForCausalLM: 11 of 11 tensors hold the file's bytes; 2 buffers, all written"],
    )
    stored = load_file(last / "model.safetensors")
    (last / "model.safetensors").unlink()
    torch.save(stored, last / "pytorch_model.bin")  # the values of which lie where it writes
    for _ in range(2):
        assert check(capsys, last)[0] == 0


SPOILT: dict[str, tuple[Spoil, str]] = {
    "in place": (lambda m: flip(down(m).weight), f"{MLP}.down_proj.weight  overwritten  {MADE.format('transformers (last)', '1 of 8,192')}"),
    "left undone": (lambda m: down(m).weight.data.sub_(1), f"{MLP}.down_proj.weight  overwritten  {MADE.format('transformers (last)', '8,192 of 8,192')}"),
    "replaced": (lambda m: flip(m.get_submodule(f"{MLP}.gate_proj").weight), f"{MLP}.gate_proj.weight  overwritten  {MADE.format('transformers (last)', '1 of 8,192')}"),
    "made of another": (lambda m: flip(m.get_submodule(f"{MLP}.up_proj").odd), f"{MLP}.up_proj.odd  overwritten  {MADE.format('transformers (last)', '1 of 4,096')}"),
    "made of another, and gone": (lambda m: delattr(m.get_submodule(f"{MLP}.up_proj"), "odd"), f"{MLP}.up_proj.odd  unproven  its odd is absent, and (64, 64) of bfloat16 in what transformers (last) makes"),
    "not gone": (lambda m: setattr(m.get_submodule(f"{MLP}.up_proj"), "weight", torch.nn.Parameter(torch.zeros(2))), f"{MLP}.up_proj.weight  unproven  its weight is (2,) of float32, and absent in what transformers (last) makes"),
    "beside it": (lambda m: flip(m.model.norm.weight), f"model.norm.weight  overwritten  {FILE.format(64)}"),
}  # fmt: skip


def spoilt(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    own = load._load

    def loaded(*arguments: Any) -> Any:
        result = own(*arguments)
        spoil(result[0])
        return result

    monkeypatch.setattr(load, "_load", loaded)


@pytest.mark.parametrize("attack", SPOILT)
def test_what_is_spoilt_after_it_is_told(
    attack: str, last: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, wanted = SPOILT[attack]
    spoilt(monkeypatch, spoil)
    status, lines = check(capsys, last)
    assert status == 1
    assert len(lines) == 2
    assert wanted in lines[1]


def test_what_it_cannot_do_once_more_is_unproven_with_its_words(
    last: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Quantizer, "fails", True)
    own = load._begin_again

    def begun(*arguments: Any) -> Any:
        again = own(*arguments)
        again.model.model.layers[0].self_attn.q_proj = None
        return again

    monkeypatch.setattr(load, "_begin_again", begun)
    status, lines = check(capsys, last)
    rows = [line for line in lines if f"{MLP}.down_proj.weight" in line or "gate_proj" in line]
    assert status == 1
    assert len(rows) == 2
    assert all("unproven  transformers (last) cannot make it from the file again: no attention" in row for row in rows)


def test_the_shim_leaves_to_it_what_it_does(last: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mode in "on", "repair", "strict":
        with tiedquiet.enable(mode):
            model = LlamaForCausalLM.from_pretrained(last)
        proof = tiedquiet.check(model)
        assert (proof.stored, proof.total, proof.findings, proof.ok) == (12, 12, (), True)
        stored = load_file(last / "model.safetensors")[f"{MLP}.down_proj.weight"]
        assert torch.equal(down(model).weight, stored + 1)
    assert not caplog.records
    down(model).weight = torch.nn.Parameter(down(model).weight.data.clone())
    (finding,) = tiedquiet.check(model).findings
    assert (finding.key, finding.verdict) == (f"{MLP}.down_proj.weight", Verdict.UNPROVEN)


def test_a_last_step_that_is_overridden_as_a_whole(
    last: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not wrapped, so the watch ends with the report, before it; `check` does it again."""

    def step(quantiser: Any, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if hasattr(module, "up_proj"):
                module.down_proj.weight.data.add_(1)
        return model

    monkeypatch.setattr(
        _Quantizer, "_process_model_after_weight_loading", HfQuantizer._process_model_after_weight_loading
    )
    monkeypatch.setattr(_Quantizer, "postprocess_model", step, raising=False)
    with tiedquiet.enable("strict"):
        model = LlamaForCausalLM.from_pretrained(last)
    assert torch.equal(down(model).weight, load_file(last / "model.safetensors")[f"{MLP}.down_proj.weight"] + 1)
    assert tiedquiet.check(model).ok
    assert check(capsys, last)[0] == 0


class _Merging(LlamaForCausalLM):
    """Writes to what was read in `eval()`, as layers do that merge something there."""

    def eval(self) -> Any:
        self.model.norm.weight.data.add_(1)
        return super().eval()


def test_what_is_written_before_it_is_told(last: Path) -> None:
    with tiedquiet.enable("on"):
        model = _Merging.from_pretrained(last)
    (finding,) = tiedquiet.check(model).findings
    assert (finding.key, finding.verdict) == ("model.norm.weight", Verdict.OVERWRITTEN)
    assert "_Merging.eval" in finding.why
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match=r"model\.norm\.weight"):
        _Merging.from_pretrained(last)


def test_where_its_step_cannot_be_seen_the_watch_ends_with_the_report(
    last: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = from_pretrained.is_wrapped
    monkeypatch.setattr(
        from_pretrained, "is_wrapped", lambda seam: seam is not from_pretrained._LAST_STEP and seen(seam)
    )
    with tiedquiet.enable("strict"):
        assert tiedquiet.check(_Merging.from_pretrained(last)).stored == 12


@pytest.fixture
def gptq(make: Make) -> Path:
    return make("gptq")


def test_zero_points_of_gptq_are_what_the_package_makes_of_the_file_s(
    gptq: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = check(capsys, gptq)
    assert (status, lines[2]) == (0, "  7 tensors were read again from the file by gptqmodel, and are equal")
    model = LlamaForCausalLM.from_pretrained(gptq, device_map="cpu", dtype="auto")
    assert not torch.equal(down(model).qzeros, load_file(gptq / "model.safetensors")[f"{MLP}.down_proj.qzeros"])


SPOILT_CODES = {
    "qweight": MADE.format("gptqmodel", "1 of 1,024"),
    "qzeros": MADE.format("gptqmodel", "1 of 32"),
    "scales": FILE.format(256),
    "g_idx": FILE.format(128),
}


@pytest.mark.parametrize("part", SPOILT_CODES)
def test_what_is_spoilt_of_gptq_is_told(
    part: str, gptq: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt(monkeypatch, lambda model: flip(getattr(down(model), part)))
    status, lines = check(capsys, gptq)
    assert status == 1
    assert f"{MLP}.down_proj.{part}  overwritten  {SPOILT_CODES[part]}" in lines[-1]


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
def test_the_load_and_the_model_in_memory_are_sound_too(mode: str, gptq: Path, tmp_path: Path) -> None:
    with tiedquiet.enable(mode):
        model = LlamaForCausalLM.from_pretrained(gptq, device_map="cpu", dtype="auto")
    for proof in tiedquiet.check(model), tiedquiet.check(model, str(gptq)):
        assert (proof.stored, proof.findings, proof.ok) == (33, (), True)
    shutil.copytree(gptq, tmp_path, dirs_exist_ok=True)
    other = load_file(gptq / "model.safetensors")
    flip(other[f"{MLP}.down_proj.qzeros"])
    save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
    (finding,) = tiedquiet.check(model, str(tmp_path)).findings
    assert (finding.key, finding.verdict) == (f"{MLP}.down_proj.qzeros", Verdict.OVERWRITTEN)


def test_what_is_said_of_tensors_that_do_not_hold_the_file_s_own_bytes() -> None:
    made = report.Result("text_encoder", "LlamaForCausalLM", held=33, total=33, maker="gptqmodel")
    wanted = "tensors hold the file's bytes, or what gptqmodel makes of them"
    assert made.as_json()["counted"] == wanted
    plain_one = report.Result("vae", "AutoencoderKL", held=7, total=7)
    assert list(report.as_lines([made, plain_one], is_pipeline=True)) == [
        f"text_encoder: LlamaForCausalLM: 33 of 33 {wanted}",
        "vae: AutoencoderKL: 7 of 7 tensors hold the file's bytes",
        "2 of 2 components are sound; 40 of 40 tensors hold the files' bytes, or what is made of them",
    ]
    *_, last = report.as_lines([plain_one], is_pipeline=True)
    assert last == "1 of 1 components are sound; 7 of 7 tensors hold the files' bytes"
