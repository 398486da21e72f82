"""Patterns of strangers that would be searched for without end are refused; those that people write are not."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.gate.test_check import check
from tiedquiet.gate.bounds import check_size
from tiedquiet.gate.lora import read
from tiedquiet.gate.patterns import endless
from tiedquiet.gate.refusal import CannotCheck

EVIL = "([a-z0-9_.]+)+!"
# Of unsloth, which writes it into the adapters that it trains.
LONG = (
    r"(?:.*?(?:vision|image|language|text).*?(?:self_attn|attention|mlp|dense).*?(?:k_proj|v_proj|q_proj|fc1|fc2).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))"
)


WRITTEN = (LONG, r".*\.(q|k|v)_proj", r"^blocks\.\d+\.attn\.to_q$", "re:.*self_attn.*", r"-:.*\.18\..*gate.*", r"(.*\.)?x", "model.layers.0", "a/b+c", "x(y)+z", "(a|b)?c", "1.0 (x+y)", "[a+]*", "[]a]*", r"\(a+\)+", "a|b*", "+:x", ")", "[x", "(?#(a+)+b", "(?i)x+", "a{1,}x{2}{,3}")  # fmt: skip
ENDLESS = (EVIL, "(a+)+b", "([a-z]+)*!", "(a|a)*b", "(a?){50}b", "((a+))+", "(?:a+)+", "(a+|b)*?x", "(x(a+)y)+", "(a{1,9}){9}", "(?:(?:a|b))*c", "a?" * 30, ".*" * 8 + "x", "[]a]+" * 9, "(.*.*.*|.*.*.*.*.*.*)x", "(.*.*.*|x).*.*", "(?x)([a-z]+#)\n)+!", "(?ix:([a-z]+#)\n)+!)", "([a-z]+(?#())+!", "(?#[)([a-z]+)+!", "([a-z]+)(?#c)+!", "(?#\\)()([a-z]+)+!")  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
def test_what_people_write(text: str) -> None:
    assert endless([{"target_modules": text}]) == ""


@pytest.mark.parametrize("text", ENDLESS)
def test_what_never_ends(text: str) -> None:
    assert endless({"rank_pattern": {"x": 1, text: 8}}) == text


N = 10**5


@pytest.mark.parametrize("text", ["[" * N, "{" + "1" * N, "{1," * N, "(?#" * N, "(" * N, "\\" * N])
def test_a_long_text_takes_no_time(text: str) -> None:
    """Some took the square of their length: hours."""
    started = time.monotonic()
    assert endless(text) == ""
    assert time.monotonic() - started < 10


def test_a_long_name_in_a_config_takes_no_time() -> None:
    started = time.monotonic()
    check_size("a", "config.json", {"layers_per_" * 10**5 + "!": 1})
    assert time.monotonic() - started < 10


def test_a_file_that_asks_for_such_a_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    about = json.dumps({"transformer.rank_pattern": {EVIL: 8}})
    save_file({"x": torch.ones(1)}, path, {"lora_adapter_metadata": about})
    with pytest.raises(CannotCheck, match=r"its lora_adapter_metadata has .* a pattern whose search may never end"):
        read(str(path), trust=False)
    assert read(str(path), trust=True).metadata == json.loads(about)


def test_a_file_that_asks_for_work_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for asked, is_right in (("pissa_niter_16", True), ([[0, 9], ["x"], 5], True), ("pissa_niter_10000", False)):
        about = json.dumps({"transformer.init_lora_weights": asked, "transformer.layer_replication": asked})
        save_file({"x": torch.ones(1)}, path, {"lora_adapter_metadata": about})
        if is_right:
            assert read(str(path), trust=False).metadata == json.loads(about)
        else:
            with pytest.raises(CannotCheck, match="its lora_adapter_metadata asks for too many iterations"):
                read(str(path), trust=True)


@pytest.mark.parametrize("place", ["adapter_config.json", "config.json"])
def test_a_folder_that_asks_for_one_is_refused(
    place: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: dict[str, Any] = json.loads((good / "config.json").read_text())
    if place == "config.json":
        own = {**own, "quantization_config": {"quant_method": "compressed-tensors", "ignore": [f"re:{EVIL}"]}}
    else:
        own = {"base_model_name_or_path": str(good), "peft_type": "LORA", "target_modules": EVIL}
    folder = good if place == "config.json" else tmp_path
    (folder / place).write_text(json.dumps(own))
    assert check(folder) == 2
    error = capsys.readouterr().err
    assert f"{EVIL}, a pattern whose search may never end; --trust-remote-code allows it" in error
    assert error.count("\n") == 1
