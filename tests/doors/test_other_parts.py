"""Files that call a part in the middle of names otherwise, in every layer, and have it in a form that is converted."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, ViTConfig, ViTModel

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.renamed import SMALL, TOWER, mapping_of, stopped_and_repaired, verdicts, written, wrong
from tests.gate.test_compare import mixtral
from tiedquiet import Verdict


def qwen3_moe(layers: int = 2) -> Any:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SMALL, "num_hidden_layers": layers}, **experts))


def vit() -> Any:
    return ViTModel(ViTConfig(**TOWER, image_size=16, patch_size=8))


def called(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def change(key: str) -> str:
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        return key

    return change


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (qwen3_moe, called((".mlp.", ".moe."))),
        (qwen3_moe, called((".mlp.", ".moe."), (".self_attn.", ".attention."))),
        (mixtral, called((".block_sparse_moe.", ".ffn."))),
        (mixtral, called((".experts.", ".expert_bank."))),
        (vit, called(("attention.attention.", "attention.core."))),
    ],
)
def test_what_is_merged_or_renamed_under_another_part(
    build: Any, change: Callable[[str], str], tmp_path: Path, printed: Printed
) -> None:
    truth = written(build(), tmp_path, change)
    kind = type(build())
    assert not wrong(stopped_and_repaired(kind, tmp_path), truth)
    model = kind.from_pretrained(tmp_path)
    assert (
        wrong(model, truth) == {key for key, verdict in verdicts(model).items() if verdict is Verdict.UNREAD} != set()
    )
    for line in (line for line in printed.loud if "key_mapping=" in line):
        assert wrong(kind.from_pretrained(tmp_path, key_mapping=mapping_of(line)), truth) < wrong(model, truth)


def test_neither_of_two_copies_is_read(tmp_path: Path) -> None:
    """Averaged over time, say; which one is the model's, no name tells."""
    truth = written(qwen3_moe(), tmp_path, called((".mlp.", ".moe.")))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    averaged = {key.replace(".moe.", ".moe_ema."): value / 2 for key, value in tensors.items() if ".moe." in key}
    save_file(tensors | averaged, path, {"format": "pt"})
    with tiedquiet.enable("repair"):
        model = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert (
        wrong(model, truth) == {key for key in truth if ".mlp." in key} == verdicts(model).keys() - {"lm_head.weight"}
    )


def test_a_part_of_which_something_has_no_place_is_left(tmp_path: Path) -> None:
    """Experts of other layers than the model's, or of another kind beside them."""
    truth = written(qwen3_moe(), tmp_path, called((".mlp.", ".moe.")), **{"model.layers.0.moe.bias": torch.ones(3)})
    with tiedquiet.enable("repair"):
        model = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    lost = wrong(model, truth)
    assert lost
    assert {key: verdicts(model)[key] for key in lost} == dict.fromkeys(lost, Verdict.MISSING)


def test_one_module_alone_is_no_other_part(tmp_path: Path) -> None:
    """A single router, of which a matrix of the same shape may be anything."""
    truth = written(qwen3_moe(), tmp_path, lambda key: re.sub(r"layers\.0\.mlp\.gate\.", "layers.0.top.gate.", key))
    with tiedquiet.enable("repair"):
        model = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert wrong(model, truth) == {"model.layers.0.mlp.gate.weight"}
    assert verdicts(model)["model.layers.0.mlp.gate.weight"] is Verdict.MISSING


def test_a_part_that_the_files_have_as_the_model_calls_it_has_no_other_name(tmp_path: Path) -> None:
    """What lies beside `self_attn` is another module's: averaged over time, say."""
    truth = written(qwen3_moe(), tmp_path, called(("self_attn.q_proj", "attn_ema.q_proj")))
    with tiedquiet.enable("repair"):
        model = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    lost = {key for key in truth if "q_proj" in key}
    assert wrong(model, truth) == lost
    assert {key: verdicts(model)[key] for key in lost} == dict.fromkeys(lost, Verdict.MISSING)
