"""Classes of a user's that are made from one of transformers, with a config of another type, or with none inside."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, MixtralConfig, MixtralForCausalLM, MixtralModel, PreTrainedModel

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.renamed import mapping_of, register_as, stopped_and_repaired, written, wrong
from tests.doors.training import mixtral


class OwnConfig(MixtralConfig):
    model_type = "type_of_its_own"


class OwnMixtral(MixtralForCausalLM):
    config_class = OwnConfig


class AroundMixtral(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = MixtralModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@pytest.mark.parametrize("kind", [OwnMixtral, AroundMixtral])
def test_a_config_that_has_a_type_of_its_own(
    kind: Any, tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers goes by the type: a class of the user's, made from Mixtral's, loses all experts in any release."""
    truth = written(mixtral(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": OwnConfig.model_type}))
    lost = wrong(kind.from_pretrained(tmp_path), truth)
    assert any("experts" in key for key in lost)
    (line,) = printed.loud
    assert f"unread, {len(lost)} of {len(truth)} tensors" in line
    theirs = "ForCausalLM, but not for its subclass" if kind is OwnMixtral else "Model, but not for"
    assert f"renames what it reads for Mixtral{theirs} {kind.__name__}" in line
    model = stopped_and_repaired(kind, tmp_path)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok
    register_as(line, monkeypatch)
    with tiedquiet.enable("strict"):
        assert not wrong(kind.from_pretrained(tmp_path), truth)


class AroundPlain(PreTrainedModel):
    config_class = GPT2Config
    base_model_prefix = "trunk"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
        self.post_init()


def test_a_base_model_that_is_no_model_of_transformers(tmp_path: Path, printed: Printed) -> None:
    truth = written(AroundPlain(GPT2Config()), tmp_path, lambda key: f"net.{key}")
    assert wrong(AroundPlain.from_pretrained(tmp_path), truth) == truth.keys()
    (line,) = printed.loud
    assert not wrong(AroundPlain.from_pretrained(tmp_path, key_mapping=mapping_of(line)), truth)
