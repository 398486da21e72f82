"""Models that a quantiser reads: what it makes of them, and does last, is no loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.test_call import verdicts
from tests.idioms import IDIOMS, Tiny
from tiedquiet import Verdict


def quantiser(kind: str, **methods: Any) -> Any:
    """The config of a quantiser with these methods, registered in transformers' own way."""
    quantizers = pytest.importorskip("transformers.quantizers")
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
        def __init__(self, **_: Any) -> None:
            self.quant_method = kind

    needed = {"requires_calibration": False, "is_serializable": lambda *_: False, "is_trainable": False}
    quantizers.register_quantization_config(kind)(Config)
    quantizers.register_quantizer(kind)(type("Quantizer", (quantizers.HfQuantizer,), {**needed, **methods}))
    return Config()


@pytest.mark.parametrize("mode", ["off", "on", "repair", "strict"])
def test_what_a_quantiser_does_last_is_no_loss(mode: str, tmp_path: Path) -> None:
    def halve(self: Any, model: Any, **_: Any) -> Any:
        model.lin.weight.data.mul_(0.5)
        return model

    config = quantiser(f"halved in {mode}", _process_model_after_weight_loading=halve)
    file = IDIOMS["good citizen"].save(tmp_path)
    with tiedquiet.enable(mode):
        model = Tiny.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(model.lin.weight, file["lin.weight"] * 0.5)
    assert verdicts(model) == ({"": Verdict.UNPROVEN} if mode == "off" else {})


def test_what_a_quantiser_reads_is_read_once(tmp_path: Path, printed: Printed) -> None:
    """Not again under other names; and what another shape keeps out is no adapter's, if its last step is its own."""
    file = IDIOMS["good citizen"].save(tmp_path)
    renamed = {f"module.{name}": value for name, value in file.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("repair"):
        model = Tiny.from_pretrained(tmp_path, quantization_config=quantiser("under a prefix"))
    assert set(verdicts(model).values()) == {Verdict.UNREAD}
    assert not any(torch.equal(model.state_dict()[name], value) for name, value in file.items())
    save_file({**file, "lin.weight": torch.ones(1, 1)}, tmp_path / "model.safetensors", {"format": "pt"})
    config = quantiser("of another shape", postprocess_model=lambda self, model, **_: model)
    printed.records.clear()
    model = Tiny.from_pretrained(tmp_path, quantization_config=config, ignore_mismatched_sizes=True)
    assert verdicts(model) in ({"lin.weight": Verdict.MISSING}, {}), "up to 5.3 the shapes are not compared"
    assert not any("adapter" in line for line in printed.loud)


def test_a_quantiser_may_make_another_module_while_it_reads(tmp_path: Path) -> None:
    from transformers.core_model_loading import ConversionOps

    class Another(ConversionOps):  # type: ignore[misc, unused-ignore]
        def convert(self, input_dict: Any, *_: Any, model: Any, **__: Any) -> Any:
            before, model.lin = model.lin, torch.nn.Linear(*reversed(model.lin.weight.shape), device="meta")
            model.lin.bias = before.bias
            return {name: values[0] if isinstance(values, list) else values for name, values in input_dict.items()}

    config = quantiser(
        "another module",
        param_needs_quantization=lambda self, model, param_name, **_: param_name == "lin.weight",
        get_quantize_ops=lambda self: Another(),
    )
    file = IDIOMS["good citizen"].save(tmp_path)
    with tiedquiet.enable("strict"):
        model = Tiny.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(model.lin.weight, file["lin.weight"])
    proof = tiedquiet.check(model)
    assert (proof.stored, proof.findings) == (len(file), ())


class MakesMore(Tiny):
    """Puts a layer in once the files have been read."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        model.more = torch.nn.Linear(4, 4, bias=False)
        return model


@pytest.mark.parametrize("last", ["_process_model_after_weight_loading", "postprocess_model"])
def test_what_a_class_puts_in_besides_comes_from_no_file(last: str, tmp_path: Path) -> None:
    """The scale that the quantiser puts into a layer is its own, whichever its last step is."""

    def scale(self: Any, model: Any, **_: Any) -> Any:
        model.lin.register_buffer("scale", torch.ones(1))
        return model

    IDIOMS["good citizen"].save(tmp_path)
    config = quantiser(f"scaled by {last}", **{last: scale})
    assert verdicts(Tiny.from_pretrained(tmp_path, quantization_config=config)) == {}
    model = MakesMore.from_pretrained(tmp_path, quantization_config=config)
    assert verdicts(model) == {"more.weight": Verdict.MISSING}
