"""Two names of the files for one tensor of the model, of which transformers drops one without a word."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, GPT2LMHeadModel, MixtralForCausalLM

import tiedquiet
from tests.checkpoints import Printed, gpt2
from tests.doors.renamed import BERT, verdicts, written
from tests.doors.test_unread_ends import in_two_shards
from tests.doors.training import differing, llama, state, trainer_of
from tests.gate.test_check import check
from tests.gate.test_compare import mixtral
from tiedquiet import LoadError, Verdict
from tiedquiet.proof.names import MOST_TRIED


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**BERT))


DENSE, LAYER_NORM = "encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.LayerNorm"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
# A model, one of its keys, and the second name that the file has for it.
TWO_NAMES: dict[str, tuple[Any, str, str]] = {
    "with and without the prefix": (bert, f"bert.{DENSE}", DENSE),
    "old and new": (bert, f"{LAYER_NORM}.weight", f"{LAYER_NORM}.gamma"),
    "by a key_mapping": (lambda: GPT2LMHeadModel(gpt2()), "transformer.ln_f.weight", "transformer.last.weight"),
    "merged and single": (mixtral, EXPERTS, EXPERTS),
}


def load(case: str, folder: Path, mode: str = "on") -> Any:
    how = {"key_mapping": {r"\.last\.": ".ln_f."}} if case == "by a key_mapping" else {}
    with tiedquiet.enable(mode):
        return type(TWO_NAMES[case][0]()).from_pretrained(folder, **how)


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin before torch 1.6", "shards"])
@pytest.mark.parametrize("case", TWO_NAMES)
def test_two_names_of_one_tensor(case: str, form: str, tmp_path: Path, printed: Printed) -> None:
    make, key, other = TWO_NAMES[case]
    written(make(), tmp_path)
    value = load(case, tmp_path).state_dict()[key]
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)

    def put(more: torch.Tensor) -> None:
        save_file(tensors, path, {"format": "pt"})
        if form == "shards":
            in_two_shards(tmp_path, {other: more})
        elif form == "safetensors":
            save_file({**tensors, other: more}, path, {"format": "pt"})
        else:
            path.unlink()
            is_new = form == "bin"
            torch.save({**tensors, other: more}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)

    put(value.clone())
    assert tiedquiet.check(load(case, tmp_path, "strict")).ok, "the same twice is well"
    put(value + 1)
    model = load(case, tmp_path)
    (finding,) = [found for found in tiedquiet.check(model).findings if found.verdict is not Verdict.TIED]
    assert (finding.key, finding.verdict) == (key, Verdict.AMBIGUOUS)
    has_first = torch.equal(model.state_dict()[key], value)
    assert (finding.source == other) is not has_first
    assert (f"not of {other}:" in finding.why) is has_first
    assert any(f"{key} has the values of {finding.source}, not of " in line for line in printed.loud)
    with pytest.raises(LoadError, match="ambiguous"):
        load(case, tmp_path, "strict")
    if case != "by a key_mapping":
        assert check(tmp_path) == 1


def of_llama() -> tuple[Any, dict[str, torch.Tensor], str]:
    model = llama()
    return model, {"model.model.norm.weight": model.model.norm.weight}, "model.norm.weight"


def of_experts(folder: Path) -> tuple[Any, dict[str, torch.Tensor], str]:
    model = mixtral()
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    return (
        model,
        {key: value for key, value in saved.items() if (".0." in key and ".w1" in key) or ".w3" in key},
        EXPERTS,
    )


@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.parametrize("case", ["a prefix twice", "single experts"])
def test_a_resume_from_two_names_of_one_tensor(case: str, is_same: bool, tmp_path: Path, printed: Printed) -> None:
    """The Trainer reads the one that is the model's own; `from_pretrained` would read the other one over it."""
    model, others, key = of_llama() if case == "a prefix twice" else of_experts(tmp_path)
    model.config.save_pretrained(tmp_path)
    truth = state(model)
    others = {name: value.detach().clone() + (0 if is_same else 1) for name, value in others.items()}
    stored = {name: value for name, value in truth.items() if name != "lm_head.weight" or "single" in case}
    save_file({**stored, **others}, tmp_path / "model.safetensors", {"format": "pt"})
    for mode in ("on", "repair", "strict"):
        again = type(model)(model.config)
        with tiedquiet.enable(mode):
            if mode == "strict" and not is_same:
                with pytest.raises(LoadError, match="the file has both"):
                    trainer_of(again, tmp_path)._load_from_checkpoint(str(tmp_path))
            else:
                trainer_of(again, tmp_path)._load_from_checkpoint(str(tmp_path))
        assert not differing(again, truth)
        if mode != "strict":
            found = {f.key: f.verdict for f in tiedquiet.check(again).findings if f.verdict is not Verdict.TIED}
            assert found == ({} if is_same else {key: Verdict.AMBIGUOUS})


def test_two_names_in_a_state_dict() -> None:
    tensors = {key: value.clone() for key, value in bert().state_dict().items()}
    given = {**tensors, DENSE: tensors[f"bert.{DENSE}"] + 1}
    model = BertForSequenceClassification.from_pretrained(None, config=BertConfig(**BERT), state_dict=given)
    assert verdicts(model) == {f"bert.{DENSE}": Verdict.AMBIGUOUS}


def test_experts_merged_and_single_in_two_types(tmp_path: Path) -> None:
    """The size of such a file does not tell how many elements it has."""
    written(mixtral(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    value = MixtralForCausalLM.from_pretrained(tmp_path).state_dict()[EXPERTS]
    save_file({**tensors, EXPERTS: value.bfloat16()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert verdicts(MixtralForCausalLM.from_pretrained(tmp_path)) == {EXPERTS: Verdict.AMBIGUOUS}


def test_a_second_name_that_a_header_writes_with_an_escape(tmp_path: Path) -> None:
    path, other = tmp_path / "model.safetensors", f"{LAYER_NORM}.gamma"
    written(bert(), tmp_path, **{other: torch.ones(BERT["hidden_size"])})
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(b'"%b":{"dtype"' % other.encode(), b'"%b":{"\\u0064type"' % other.encode())
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    assert len(header) > end - 8, "it is written with one"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="ambiguous"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def beside_a_shard(folder: Path, tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Two shards, of which the index names the first."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for name, some in zip(names, (tensors, others), strict=True):
        save_file(some, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, names[0])}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class TiesAnyway(GPT2LMHeadModel):
    """Its code ties the head to the embedding, whatever the config says."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        self.lm_head.weight = self.transformer.wte.weight


class DeclaresNothing(TiesAnyway):
    """Nor does anything declare it."""

    _tied_weights_keys: ClassVar[Any] = {}


@pytest.mark.parametrize("kind", [TiesAnyway, DeclaresNothing])
@pytest.mark.parametrize("stored", ["the_head.weight", "decoder_out", "of many", "in a shard", ""])
def test_a_tie_that_nobody_asks_for_beside_an_unread_head(
    stored: str, kind: type[GPT2LMHeadModel], tmp_path: Path, printed: Printed
) -> None:
    """With the head in the files the row may be true, and stays; else the two are one, as the class has it."""
    GPT2LMHeadModel(gpt2(tie_word_embeddings=False)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    of_many = {f"heads.{i}.weight": head + i for i in range(MOST_TRIED + 1)}
    others = of_many if stored == "of many" else {stored: head} if stored else {}
    if stored == "in a shard":
        beside_a_shard(tmp_path, tensors, {"decoder_out": head})
    else:
        save_file(tensors | others, tmp_path / "model.safetensors", {"format": "pt"})
    printed.records.clear()
    model = kind.from_pretrained(tmp_path)
    (found,) = tiedquiet.check(model).findings
    named = "the_head.weight" if stored == "the_head.weight" else None
    verdict, source = (Verdict.MISSING, named) if stored else (Verdict.TIED, "transformer.wte.weight")
    assert (found.key, found.verdict, found.source) == ("lm_head.weight", verdict, source)
    assert ("in the checkpoint and w" in found.why) is bool(stored)
    assert tiedquiet.check(model).ok is not bool(stored)
    assert printed.shows("lm_head.weight") is bool(stored)
    assert [f"may be {named}" in line for line in printed.loud] == [True] * bool(named)


@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.parametrize("where", ["module.lm_head.weight", "in a shard", "in a shard, and more is missing"])
def test_one_end_of_a_tie_is_not_unread_if_it_has_the_values_of_the_other(
    where: str, is_same: bool, tmp_path: Path
) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["transformer.wte.weight"] + (0 if is_same else 1)
    lost = {} if is_same else {"lm_head.weight": Verdict.UNREAD}
    if "more" in where:
        gone = ["transformer.ln_f.bias", "transformer.ln_f.weight"]
        tensors = {key: value for key, value in tensors.items() if key not in gone}
        lost |= dict.fromkeys(gone, Verdict.MISSING)
    if "shard" in where:
        beside_a_shard(tmp_path, tensors, {"lm_head.weight": head})
    else:
        save_file({**tensors, where: head}, tmp_path / "model.safetensors", {"format": "pt"})
    found = verdicts(GPT2LMHeadModel.from_pretrained(tmp_path))
    assert {"lm_head.weight": Verdict.TIED, **lost} == found


class SharesModules(GPT2LMHeadModel):
    """One attention and one norm in two layers, of which nothing declares it."""

    _tied_weights_keys: ClassVar[Any] = {}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        first, second = self.transformer.h
        second.attn, second.ln_1 = first.attn, first.ln_1
        self.post_init()


@pytest.mark.parametrize(
    ("old", "new", "verdict"), [("attn.", "mixer.", Verdict.UNREAD), ("ln_1.", "norm.", Verdict.MISSING)]
)
@pytest.mark.parametrize("is_same", [True, False])
def test_what_the_model_holds_already_is_not_unread(
    is_same: bool, old: str, new: str, verdict: Verdict, tmp_path: Path
) -> None:
    """Two names of one tensor, both in the file, one of them under another name there."""
    model = SharesModules(gpt2(n_layer=2))
    model.config.save_pretrained(tmp_path)
    tensors = {key.replace(f"h.1.{old}", f"h.1.{new}"): value.clone() for key, value in model.state_dict().items()}
    changed = next(name for name in tensors if f"h.1.{new}" in name and name.endswith("weight"))
    tensors[changed] += 0 if is_same else 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("repair"):  # up to 5.3 transformers initialises the module after reading it
        proof = tiedquiet.check(SharesModules.from_pretrained(tmp_path))
    lost = {} if is_same else {changed.replace(new, old): (verdict, changed)}
    if lost and verdict is Verdict.MISSING:  # the one unread tensor has the shape of the bias as well
        lost["transformer.h.1.ln_1.bias"] = (verdict, None)
    assert {f.key: (f.verdict, f.source) for f in proof.findings if f.verdict is not Verdict.TIED} == lost
    assert proof.ok is is_same


class NeedsNoNorm(GPT2LMHeadModel):
    _keys_to_ignore_on_load_missing: ClassVar[Any] = ["ln_f"]


@pytest.mark.parametrize("name", ["transformer.norm.weight", "transformer.scale"])
def test_what_needs_no_file_is_unproven_where_the_file_may_have_it(name: str, tmp_path: Path) -> None:
    """A norm that its class computes, it says; and a tensor of its shape that nothing read."""
    key = "transformer.ln_f.weight"
    model = NeedsNoNorm(gpt2(tie_word_embeddings=False))
    written(model, tmp_path, lambda own: own.replace(key, name))
    proof = tiedquiet.check(NeedsNoNorm.from_pretrained(tmp_path))
    is_like = name.endswith(".weight")
    assert proof.ok is not is_like
    assert [(f.key, f.verdict, f.source) for f in proof.findings] == [(key, Verdict.UNPROVEN, name)] * is_like
    with tiedquiet.enable("strict"):
        NeedsNoNorm.from_pretrained(tmp_path)


def test_what_needs_no_file_is_missing_where_the_file_has_it_in_another_shape(tmp_path: Path) -> None:
    written(NeedsNoNorm(gpt2()), tmp_path, **{"transformer.ln_f.weight": torch.ones(7)})
    proof = tiedquiet.check(NeedsNoNorm.from_pretrained(tmp_path, ignore_mismatched_sizes=True))
    found = {f.key: f.verdict for f in proof.findings}
    assert found == {"lm_head.weight": Verdict.TIED, "transformer.ln_f.weight": Verdict.MISSING}
    assert not proof.ok
