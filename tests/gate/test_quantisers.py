"""Loads that quantise: what was read stays what it is, whatever type it has become. Runs where the packages are."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import tiedquiet
from tests.checkpoints import save

KINDS = ("bitsandbytes, 8 bits", "bitsandbytes, 4 bits", "torchao")


def config_of(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(kind.partition(",")[0])
        if kind == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
        return BitsAndBytesConfig(load_in_8bit="8" in kind, load_in_4bit="4" in kind)


def load(quantisation: Any, folder: Path, tied: bool) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    save(LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=64, tie_word_embeddings=tied)), folder)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=quantisation, device_map="cpu")


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_load_is_proven(kind: str, mode: str, tmp_path: Path) -> None:
    quantisation = config_of(kind)
    with tiedquiet.enable(mode):
        model = load(quantisation, tmp_path, tied=True)
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ in ("Int8Params", "Params4bit", "Int8Tensor")
    proof = tiedquiet.check(model)
    assert (proof.stored, [finding.key for finding in proof.findings], proof.ok) == (11, ["lm_head.weight"], True)


def test_a_quantised_model_is_not_called_equal_to_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.gate.test_compare import compared

    quantisation = config_of("bitsandbytes, 8 bits")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(quantisation, tmp_path, tied=False)
    found = compared(model)
    assert found.held < found.total
    assert {finding.verdict for finding in found.findings} == {tiedquiet.Verdict.UNPROVEN}
