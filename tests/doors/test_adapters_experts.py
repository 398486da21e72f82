"""Adapters from transformers 4: names that the model had then, an A and a B for each expert, which are merged now."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.test_adapters import FILE, WAYS, rename
from tests.doors.training import SMALL, llava, mixtral
from tiedquiet import Verdict

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

WIDTH = SMALL["hidden_size"]
PARTS = ["self_attn.q_proj"]
PARTS += [f"block_sparse_moe.experts.{expert}.{part}" for expert in range(2) for part in ("w1", "w2", "w3")]


def tensors(prefix: str, layers: int = 2) -> Iterator[tuple[str, torch.Tensor]]:
    for layer in range(layers):
        for part in PARTS:
            name = f"base_model.model.{prefix}model.layers.{layer}.{part}"
            yield f"{name}.lora_A.weight", torch.randn(2, WIDTH)
            yield f"{name}.lora_B.weight", torch.randn(WIDTH, 2)


def written(folder: Path, **how: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    mixtral().save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "w1", "w2", "w3"], "task_type": "CAUSAL_LM"}
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    adapter = dict(tensors(**how))
    save_file(adapter, folder / "adapter" / FILE, {"format": "pt"})
    return adapter


@WAYS
def test_none_is_read_under_another_prefix(load: Any, tmp_path: Path, printed: Printed) -> None:
    """Each is named as the file names it, and said to have no place only if it has none."""
    adapter = written(tmp_path, prefix="module.")
    printed.records.clear()
    model = load(tmp_path, tmp_path / "adapter")
    proof = tiedquiet.check(model)
    has_a_place = any("experts" in name for name, _ in model.named_parameters() if "lora_" in name)
    found = [finding for finding in proof.findings if finding.verdict is Verdict.UNREAD]
    assert {finding.source for finding in found} <= adapter.keys()
    counted = re.findall(r"([\d,]+) of ([\d,]+) tensors of the adapter were read", " ".join(printed.loud))
    assert counted == ([] if has_a_place and not proof.missing else [("0", str(len(adapter)))]), printed.loud
    assert found
    assert not proof.ok


def test_a_layer_too_many(tmp_path: Path, printed: Printed) -> None:
    """Where peft has merged some that were read, and some that were not, nothing tells how many those were."""
    adapter = written(tmp_path, prefix="", layers=3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    printed.records.clear()
    proof = tiedquiet.check(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert not proof.ok
    ((read, total),) = re.findall(r"(\w+) (?:of (\d+) tensors of the adapter )?were (?:not )?read", printed.loud[0])
    assert (read, total) == ("some", "") or int(total) - int(read) >= len(adapter) // 3


def test_magnitudes_under_the_names_that_the_model_had(tmp_path: Path, printed: Printed) -> None:
    """A release of transformers that renames a DoRA's A and B finds no magnitudes: those have a place all the same."""
    torch.manual_seed(0)
    llava().save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    now, before = "model.model.language_model.", "model.language_model.model."
    rename(tmp_path / "adapter", lambda name: name.replace(now, before))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    printed.records.clear()
    model.load_adapter(str(tmp_path / "adapter"))
    unread = [finding for finding in tiedquiet.check(model).findings if finding.verdict is Verdict.UNREAD]
    names = {name for name in load_file(tmp_path / "adapter" / FILE) if "magnitude" in name}
    assert {finding.source for finding in unread} >= names
    assert not any("has no place" in line for line in printed.loud)
