"""Every tensor of a model against the bytes of its files."""

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5ForConditionalGeneration,
)
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from tests.checkpoints import gpt2, save, state_of, t5
from tiedquiet import Finding, Verdict
from tiedquiet.gate.compare import Comparison, compare
from tiedquiet.proof import record
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.names import conversions_of


def compared(model: Any, files: list[str] | None = None) -> Comparison:
    known = record.of(model)
    assert known is not None
    checkpoint = Checkpoint(None, files or known.files, model.base_model_prefix)
    return compare(model, known, checkpoint, [lambda tensors: revert_weight_conversion(model, tensors)])


def verdicts(found: Comparison) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in found.findings}


def change(path: Path, **renamed: str) -> None:
    """Write the same values under other names."""
    stored = load_file(path)
    save_file(
        {renamed.get(key.replace(".", "__"), key): value for key, value in stored.items()}, path, {"format": "pt"}
    )


def test_a_good_load_is_held_in_full(tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    found = compared(model)
    stored = model.state_dict().keys()
    buffers = [name for name, _ in model.named_buffers() if name not in stored]  # its masks, on some releases
    assert (found.held, found.total, found.buffers) == (16, 16, len(buffers))
    assert verdicts(found) == {"lm_head.weight": Verdict.TIED}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_is_compared_after_the_same_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype)
    assert compared(model).held == 16
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[3, 3] *= 2
    assert compared(model).held == 15


def test_one_element_that_differs_is_told_and_so_is_what_is_tied_to_it(tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    model.transformer.wte.weight.data.numpy()[5, 7] = 3.0  # after the load: nothing watches
    found = compared(model)
    assert (found.held, found.total) == (15, 16)
    assert verdicts(found) == dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), Verdict.OVERWRITTEN)
    assert {finding.why for finding in found.findings} == {"differs from the file in 1 of 1,024 elements"}


class _SetBehindTorch(GPT2LMHeadModel):
    """A foreign kernel: the watch is blind to it."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        weight = self.transformer.h[0].ln_1.weight
        if not weight.is_meta:
            ctypes.memset(weight.data_ptr(), 0, weight.nbytes)


def test_what_the_watch_cannot_see(tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = _SetBehindTorch.from_pretrained(tmp_path)
    assert verdicts(compared(model))["transformer.h.0.ln_1.weight"] is Verdict.OVERWRITTEN


def test_another_file_than_the_one_that_was_read(tmp_path: Path) -> None:
    for name in ("read", "other"):
        save(BertModel(bert()), tmp_path / name)
    model = BertModel.from_pretrained(tmp_path / "read")
    path = tmp_path / "other" / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    found = compared(model, [str(path)])
    assert (found.held, set(verdicts(found).values())) == (0, {Verdict.OVERWRITTEN})


def bert() -> BertConfig:
    return BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, tie_word_embeddings=False)  # fmt: skip
    model = MixtralForCausalLM(config)
    state_of(model)
    return model


def test_fused_experts_are_held_against_the_single_ones_of_the_file(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    assert any(".experts.2.w1" in key for key in load_file(tmp_path / "model.safetensors"))
    model = MixtralForCausalLM.from_pretrained(tmp_path)
    found = compared(model)
    assert (found.held, found.findings) == (found.total, [])
    experts = next(name for name, tensor in model.named_parameters() if tensor.dim() == 3)
    model.get_parameter(experts).data[1], model.get_parameter(experts).data[2] = (
        model.get_parameter(experts).data[2].clone(),
        model.get_parameter(experts).data[1].clone(),
    )
    found = compared(model)  # the same values, in other places
    assert found.held == found.total - 1
    (finding,) = found.findings
    assert (finding.key, finding.verdict) == (experts, Verdict.UNPROVEN)
    assert "converted back, it does not match the file" in finding.why


def test_merged_tensors_are_made_again_only_where_they_cannot_be_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtral().save_pretrained(tmp_path)
    model = MixtralForCausalLM.from_pretrained(tmp_path)
    known, conversions = record.of(model), conversions_of(model)
    assert known is not None
    merged = {name for name, tensor in model.named_parameters() if tensor.dim() == 3}
    made: list[str] = []

    def convert(self: Any, key: str, **options: Any) -> Any:
        made.extend([key] if key in merged else [])  # the other way it is called with the names of the files
        return truth(self, key, **options)

    def refuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if merged & tensors.keys():
            raise ValueError
        return dict(revert_weight_conversion(model, tensors))

    truth = WeightConverter.convert
    monkeypatch.setattr(WeightConverter, "convert", convert)
    checkpoint = Checkpoint(None, known.files, model.base_model_prefix)
    found = compare(model, known, checkpoint, [partial(revert_weight_conversion, model)], conversions)
    assert (found.held, made) == (found.total, [])
    found = compare(model, known, checkpoint, [refuse], conversions)
    assert (found.held, set(made)) == (found.total, merged)
    model.get_parameter(made[0]).data[0, 0, 0] += 1
    assert compare(model, known, checkpoint, [refuse], conversions).held == found.total - 1


def test_what_was_renamed_is_found_by_its_values(tmp_path: Path) -> None:
    save(BertModel(bert()), tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    change(tmp_path / "model.safetensors", pooler__dense__weight="old.name", pooler__dense__bias="old.bias")
    found = compared(model)
    assert (found.held, found.findings) == (found.total, [])
    with torch.no_grad():
        model.pooler.dense.weight[0, 0] += 1
    found = compared(model)
    assert [(f.key, f.why) for f in found.findings] == [
        ("pooler.dense.weight", "no file holds these values, under this name or any other")
    ]


def test_one_tensor_of_the_file_proves_one_of_the_model(tmp_path: Path) -> None:
    save(BertModel(bert()), tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    with torch.no_grad():  # now two of the model are equal, and the file has that once
        model.encoder.layer[0].attention.self.key.weight.copy_(model.encoder.layer[0].attention.self.query.weight)
    start = "encoder__layer__0__attention__self__"
    change(tmp_path / "model.safetensors", **{f"{start}query__weight": "x", f"{start}key__weight": "y"})
    assert compared(model).held == compared(model).total - 1


def test_a_base_model_s_file(tmp_path: Path) -> None:
    save(BertModel(bert()), tmp_path)
    from transformers import BertForTokenClassification

    found = compared(BertForTokenClassification.from_pretrained(tmp_path))
    assert found.held == found.total > 0


def test_what_loading_could_not_prove_the_bytes_do(tmp_path: Path) -> None:
    save(T5ForConditionalGeneration(t5()), tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path)
    load = record.of(model)
    assert load is not None
    load.lasting["shared.weight"] = Finding("shared.weight", Verdict.UNPROVEN, None, "cannot be told")
    assert verdicts(compared(model)).get("shared.weight") is None


def test_types_that_do_not_show_their_values_stay_unproven(tmp_path: Path) -> None:
    save(BertModel(bert()), tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    model.pooler.dense.weight = nn.Parameter(model.pooler.dense.weight.data.to_sparse())
    model.pooler.dense.bias = nn.Parameter(torch.zeros(3))
    model.embeddings.LayerNorm.to("meta")
    why = {finding.key: finding.why for finding in compared(model).findings}
    assert why["pooler.dense.weight"] == "the values of a Parameter cannot be read"
    assert why["pooler.dense.bias"] == "the file has it as (8,) of float32, the model as (3,) of float32"
    assert why["embeddings.LayerNorm.bias"] == "it has no values: it is on meta"


def test_files_that_cannot_be_read_prove_nothing(tmp_path: Path) -> None:
    save(BertModel(bert()), tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    found = compared(model, [str(tmp_path / "x.gguf")])
    assert (found.held, verdicts(found)) == (0, {"": Verdict.UNPROVEN})
    assert "x.gguf is a GGUF file" in found.findings[0].why


class _Empty(BertModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.post_init()


def test_a_tensor_without_elements_is_held(tmp_path: Path) -> None:
    save(_Empty(bert()), tmp_path)
    found = compared(_Empty.from_pretrained(tmp_path))
    assert (found.held, found.findings) == (found.total, [])


def test_several_tensors_that_were_one_in_the_file(tmp_path: Path) -> None:
    save(BertModel(bert()), tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    start = "encoder.layer.0.attention.self."
    stored = load_file(tmp_path / "model.safetensors")
    stored["joined"] = torch.cat([stored.pop(f"{start}query.weight"), stored.pop(f"{start}key.weight")])
    save_file(stored, tmp_path / "model.safetensors")

    def undo(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rest = dict(tensors)
        parts = [rest.pop(f"{start}{name}.weight", None) for name in ("query", "key")]
        if any(part is not None for part in parts):
            rest["joined"] = torch.cat(parts)  # raises where one of them is not given
        return rest

    load = record.of(model)
    assert load is not None
    found = compare(model, load, Checkpoint(None, load.files, "bert"), [undo])
    assert (found.held, found.findings) == (found.total, [])
