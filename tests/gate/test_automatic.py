"""A `model_type` that is not that of the class beside it: what transformers' `Auto` classes make of it is the truth."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.gate.test_check import check

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def said(folder: Path, status: int, capsys: pytest.CaptureFixture[str], **change: Any) -> tuple[str | None, list[str]]:
    """Its problem and its notes, with another config; ... for what it lacks."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    capsys.readouterr()
    assert check(folder, "--json") == status
    (found,) = json.loads(capsys.readouterr().out)["components"]
    return found["problem"], found["notes"]


def test_a_model_of_which_auto_classes_read_nothing(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem, _ = said(good, 1, capsys, **SIZE, num_key_value_heads=2, model_type="llama")
    loaded, info = AutoModelForCausalLM.from_pretrained(good, output_loading_info=True)
    count = len(info["unexpected_keys"])
    assert count == len(load_file(good / "model.safetensors"))
    assert problem == (
        f"config.json has the model_type llama, of which AutoModelForCausalLM makes {type(loaded).__name__}: "
        f"{count} of {count} tensors of the file have no place in LlamaForCausalLM"
    )


def test_a_kind_that_has_the_same_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RobertaForMaskedLM(RobertaConfig(**SIZE, max_position_embeddings=16)).save_pretrained(tmp_path)
    problem, notes = said(tmp_path, 0, capsys, model_type="camembert")
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert (set(info["unexpected_keys"]), set(info["missing_keys"])) == (set(), set())
    assert problem is None
    makes = "config.json has the model_type camembert, of which AutoModelForMaskedLM makes CamembertForMaskedLM"
    assert notes == [makes]


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        (
            {"model_type": ...},
            ["config.json has no model_type, without which transformers' Auto classes do not load it"],
        ),
        ({"model_type": ..., "auto_map": {"AutoConfig": "mine.Config"}}, []),
        ({"model_type": "nobody_has_it"}, []),  # Auto classes say so
        ({"model_type": "vit"}, []),  # of these images no Auto class makes a language model
    ],
)
def test_where_there_is_nothing_to_compare_with(
    change: dict[str, Any], notes: list[str], good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(good, 0, capsys, **change) == (None, notes)


def test_kinds_that_share_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """InternLM 3 is a Llama to transformers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(tmp_path)
    alike = [
        kind.model_type for kind in MODEL_FOR_CAUSAL_LM_MAPPING if MODEL_FOR_CAUSAL_LM_MAPPING[kind] is LlamaForCausalLM
    ]
    for name in alike[:4]:
        assert said(tmp_path, 0, capsys, model_type=name) == (None, [])
