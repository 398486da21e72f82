"""Names of the files that lead somewhere else: to another layer, to memory that nothing wrote, to each other's places."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralForCausalLM,
    MixtralModel,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers import initialization as init

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.renamed import SMALL, TOWER, llava, mapping_of, qwen2, stopped_and_repaired, verdicts, written, wrong
from tests.gate.test_compare import bert, mixtral
from tests.idioms import Idiom, Part, Tiny
from tiedquiet import LoadError, Verdict
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.names import conversions_of, has_converter
from tiedquiet.proof.reading import read
from tiedquiet.proof.unread import find_unread


def qwen3_moe() -> Any:
    more = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **more, tie_word_embeddings=True))


def test_a_layer_is_not_read_into_another(tmp_path: Path, printed: Printed) -> None:
    def one_up(key: str) -> str:
        return re.sub(r"layers\.(\d)", lambda number: f"layers.{int(number[1]) + 1}", key)

    truth = written(qwen2(), tmp_path, one_up)
    with tiedquiet.enable("repair"):
        model = type(qwen2()).from_pretrained(tmp_path)
    found = verdicts(model)
    assert {key for key, verdict in found.items() if verdict is Verdict.MISSING} == {
        k for k in truth if "layers.0." in k
    }
    assert torch.equal(
        model.state_dict()["model.layers.1.mlp.up_proj.weight"], truth["model.layers.0.mlp.up_proj.weight"]
    )
    assert not tiedquiet.check(model).ok
    assert not any("read by TIEDQUIET=repair" in line for line in printed.confirmed)


def assert_told_and_cured(kind: Any, folder: Path, truth: dict[str, torch.Tensor], printed: Printed) -> None:
    """`strict` stops what is wrong without tiedquiet; `repair`, and the advised mapping if there is one, put it right."""
    assert wrong(kind.from_pretrained(folder), truth)
    if mapping := mapping_of(printed.loud[0]):
        assert not wrong(kind.from_pretrained(folder, key_mapping=mapping), truth), "the cure cures"
    model = stopped_and_repaired(kind, folder)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok


@pytest.mark.parametrize(
    ("build", "renamed"),
    [
        (llava, {"vision_tower": "vit", "multi_modal_projector": "mm_proj"}),
        (lambda: BertModel(bert()), {"^embeddings": "emb", "^encoder": "enc"}),
        (lambda: BertModel(bert()), {"attention.self": "attn"}),
        (lambda: BertModel(bert()), {"^embeddings": "emb", "^encoder": "enc", "Norm.weight": "Norm.gamma"}),
        (lambda: BertModel(bert()), {"^": "module.", "Norm.weight": "Norm.gamma"}),
    ],
)
def test_several_parts_under_other_prefixes(
    build: Any, renamed: dict[str, str], tmp_path: Path, printed: Printed
) -> None:
    def other(key: str) -> str:
        for old, new in renamed.items():
            key = re.sub(old, new, key, count=1)
        return key

    truth = written(build(), tmp_path, other)
    assert_told_and_cured(type(build()), tmp_path, truth, printed)


@pytest.mark.parametrize("key", ["state_dict", "module", "model"])  # the last is a prefix of the model's own as well
def test_a_pickle_in_which_all_lies_in_a_dict(key: str, tmp_path: Path, printed: Printed) -> None:
    """A training script wrote it, and somebody gave it the name that transformers reads."""
    model = qwen2()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    truth = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({key: truth, "epoch": 3, "random": {"numbers": torch.ones(3)}}, tmp_path / "pytorch_model.bin")
    assert set(verdicts(type(model).from_pretrained(tmp_path)).values()) == {Verdict.UNREAD}
    assert "dict, where no loader looks. Set TIEDQUIET=repair to read them, or save these tensors" in printed.loud[0]
    assert "key_mapping" not in printed.loud[0]
    repaired = stopped_and_repaired(type(model), tmp_path)
    assert not wrong(repaired, truth)
    assert tiedquiet.check(repaired).ok


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_a_prefix_before_what_is_converted_while_it_is_read(
    build: Any, prefix: str, tmp_path: Path, printed: Printed
) -> None:
    truth = written(build(), tmp_path, lambda key: prefix + key)
    kind = type(build())
    model = kind.from_pretrained(tmp_path)
    found = verdicts(model)
    assert {key for key, verdict in found.items() if verdict is Verdict.UNREAD} == truth.keys() - {"lm_head.weight"} | (
        {"lm_head.weight"} - set(model.all_tied_weights_keys)
    )
    assert not wrong(kind.from_pretrained(tmp_path, key_mapping=mapping_of(printed.loud[0])), truth), "the cure cures"
    printed.records.clear()
    with tiedquiet.enable("repair"):
        kind.from_pretrained(tmp_path)
    assert "UNEXPECTED" not in printed.report, "all of it was read after all"
    model = stopped_and_repaired(kind, tmp_path)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok


@pytest.mark.parametrize(
    ("build", "start", "new", "beside"),
    [
        (mixtral, r"model\.layers", "model.blocks", 0),
        (qwen3_moe, r"model\.layers", "model.blocks", 0),
        (qwen3_moe, "", "student.", 4),
        (llava, "", "student.", 4),
        (llava, "", "module.", 0),
    ],
)
def test_a_prefix_in_place_of_another_before_what_is_converted_or_renamed(
    build: Any, start: str, new: str, beside: int, tmp_path: Path, printed: Printed
) -> None:
    others = {f"encoder.{number}.weight": torch.ones(3, 1 + number) for number in range(beside)}
    truth = written(build(), tmp_path, lambda key: re.sub(f"^{start}", new, key), **others)
    assert_told_and_cured(type(build()), tmp_path, truth, printed)


class Ignoring(BertModel):
    """As Bros, which has all of this."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["pooler"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings.register_buffer("position_ids", self.embeddings.position_ids.clone())


def test_what_a_class_ignores_and_has(tmp_path: Path) -> None:
    truth = written(Ignoring(bert()), tmp_path, lambda key: f"module.{key}")
    with tiedquiet.enable("repair"):
        model = Ignoring.from_pretrained(tmp_path)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok


def test_of_two_models_that_fit_neither_is_read(tmp_path: Path) -> None:
    truth = written(mixtral(), tmp_path, lambda key: f"student.{key}")
    stored = load_file(tmp_path / "model.safetensors")
    stored |= {key.replace("student.", "teacher."): value + 1 for key, value in stored.items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("repair"):
        proof = tiedquiet.check(MixtralForCausalLM.from_pretrained(tmp_path))
    assert (proof.stored, proof.unread, proof.missing) == (0, len(truth), 0)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="is there as well, and has other values"):
        MixtralForCausalLM.from_pretrained(tmp_path)


def test_of_two_wrappers_that_both_fit_neither_is_read(tmp_path: Path) -> None:
    truth = written(mixtral(), tmp_path, lambda key: re.sub(r"(layers\.\d\.)", r"\1_one.", key))
    stored = load_file(tmp_path / "model.safetensors")
    stored |= {key.replace("_one", "_two"): value + 1 for key, value in stored.items() if "_one" in key}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    found = verdicts(MixtralForCausalLM.from_pretrained(tmp_path))
    assert found == dict.fromkeys((key for key in truth if "layers." in key), Verdict.MISSING)


def test_a_prefix_that_is_added_before_what_is_converted(tmp_path: Path, printed: Printed) -> None:
    """The language model of a larger one, by itself."""
    written(mixtral().model, tmp_path)
    truth = {
        f"model.language_model.{key}": value
        for key, value in MixtralModel.from_pretrained(tmp_path).state_dict().items()
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=16, patch_size=8), text_config=mixtral().config
    )
    config.save_pretrained(tmp_path)
    found = verdicts(LlavaForConditionalGeneration.from_pretrained(tmp_path))
    if not has_converter(conversions_of(LlavaForConditionalGeneration(config))):
        pytest.skip("this release converts nothing of a model inside another")
    assert {key for key, verdict in found.items() if verdict is Verdict.UNREAD} == truth.keys()
    assert not wrong(stopped_and_repaired(LlavaForConditionalGeneration, tmp_path), truth)


def test_what_was_read_is_not_unread_under_another_prefix(tmp_path: Path) -> None:
    norm = torch.ones_like(mixtral().model.norm.weight)
    truth = written(mixtral(), tmp_path, lambda key: f"module.{key}", **{"model.norm.weight": norm})
    found = verdicts(MixtralForCausalLM.from_pretrained(tmp_path))
    assert found == dict.fromkeys(truth.keys() - {"model.norm.weight"}, Verdict.UNREAD)


def test_one_module_that_a_prefix_is_before_and_that_is_converted(tmp_path: Path) -> None:
    experts = re.compile(r"^(?=.*layers\.0\..*\.experts\.)")
    truth = written(mixtral(), tmp_path, lambda key: experts.sub("module.", key))
    assert verdicts(MixtralForCausalLM.from_pretrained(tmp_path)).keys() == {k for k in truth if "0.mlp.experts" in k}
    assert not wrong(stopped_and_repaired(MixtralForCausalLM, tmp_path), truth)


def test_no_mapping_is_advised_that_does_not_lead_there(tmp_path: Path, printed: Printed) -> None:
    truth = written(llava(), tmp_path, lambda key: key.replace("language_model.model.layers", "language_model.model.h"))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert set(verdicts(model).values()) == {Verdict.UNREAD}
    if "key_mapping" in printed.loud[0]:
        how = {"key_mapping": mapping_of(printed.loud[0])}
        assert not wrong(LlavaForConditionalGeneration.from_pretrained(tmp_path, **how), truth), "the cure cures"
    assert not wrong(stopped_and_repaired(LlavaForConditionalGeneration, tmp_path), truth)


def test_one_module_beside_others_is_no_other_name(tmp_path: Path) -> None:
    change = re.compile(r"^(?=model\.norm\.)")
    truth = written(mixtral(), tmp_path, lambda key: change.sub("teacher.", key), other=torch.ones(3))
    model = MixtralForCausalLM.from_pretrained(tmp_path)
    assert wrong(model, truth) == {"model.norm.weight"}
    assert verdicts(model)["model.norm.weight"] is Verdict.MISSING


def test_what_has_no_place_under_its_prefix_is_no_other_name(tmp_path: Path) -> None:
    written(mixtral(), tmp_path, lambda key: "module." + key.replace("experts", "others").replace("self_attn", "mixer"))
    found = verdicts(MixtralForCausalLM.from_pretrained(tmp_path))
    assert Verdict.UNREAD not in found.values()
    assert Verdict.MISSING in found.values()


def test_where_ties_alone_are_missing_a_prefix_that_fits_nothing_claims_nothing(
    tmp_path: Path, printed: Printed
) -> None:
    written(qwen3_moe(), tmp_path, lambda key: key.replace("embed_tokens", "table"))
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert verdicts(model) == dict.fromkeys(["lm_head.weight", "model.embed_tokens.weight"], Verdict.MISSING)
    assert any("model.embed_tokens.weight may be model.table.weight" in line for line in printed.loud)


class Normed(Tiny):
    """Every `weight_g` and `weight_v` is renamed by transformers 5.0 to 5.2."""

    def add(self, config: Any) -> None:
        self.normed = torch.nn.utils.weight_norm(torch.nn.Linear(4, 4))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_names_that_are_the_model_s_own(tmp_path: Path, printed: Printed) -> None:
    truth = written(Normed(Normed.config_class()), tmp_path)
    model = Normed.from_pretrained(tmp_path)
    lost = wrong(model, truth)
    assert {key for key, verdict in verdicts(model).items() if verdict is Verdict.UNREAD} == lost
    assert tiedquiet.check(model).ok == (not lost)
    assert all("they are renamed while they are read" in line for line in printed.loud)
    with tiedquiet.enable("repair"):
        model = Normed.from_pretrained(tmp_path)
    assert not wrong(model, truth)
    assert tiedquiet.check(model).ok


class InitialisesNothing(Tiny):
    """What the files do not deliver stays memory that nobody wrote."""

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, Part):
            init.copy_(module.mask, torch.zeros_like(module.mask))


def test_what_the_files_have_is_unread_also_where_nothing_wrote_it(tmp_path: Path, printed: Printed) -> None:
    stored = Idiom(InitialisesNothing).save(tmp_path)
    save_file(
        {f"module.{key}": value for key, value in stored.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert verdicts(InitialisesNothing.from_pretrained(tmp_path)) == dict.fromkeys(stored, Verdict.UNREAD)
    assert all("module." in line for line in printed.loud)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="unread, ") as raised:
        InitialisesNothing.from_pretrained(tmp_path)
    assert "unwritten" not in str(raised.value)
    with tiedquiet.enable("repair"):
        model = InitialisesNothing.from_pretrained(tmp_path)
    assert not wrong(model, stored)
    assert tiedquiet.check(model).ok


class LooksAtItsWeights(Tiny):
    """Two equal layers, and code that reaches for each weight without writing to it."""

    def add(self, config: Any) -> None:
        self.one = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.two = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        self.norms = [float(weight.data.norm()) for weight in self.parameters() if not weight.is_meta]


SWAPPED = {r"^one\.": "three.", r"^two\.": "one.", r"^three\.": "two."}


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
def test_two_layers_that_a_key_mapping_swaps_hold_each_other_s_values(
    mode: Any, tmp_path: Path, printed: Printed
) -> None:
    Idiom(LooksAtItsWeights).save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    with tiedquiet.enable(mode):
        model = LooksAtItsWeights.from_pretrained(tmp_path, key_mapping=SWAPPED)
    assert model.norms
    assert torch.equal(model.one.weight, stored["two.weight"])
    assert torch.equal(model.two.weight, stored["one.weight"])
    assert tiedquiet.check(model).ok
    assert not printed.loud


def test_the_model_s_own_name_that_a_loader_left_unread(tmp_path: Path) -> None:
    """As transformers 5.0 to 5.2 does above, told by the same rule on every release."""
    written(qwen2(tie_word_embeddings=False), tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    checkpoint = Checkpoint(None, [str(tmp_path / "model.safetensors")])
    left = {name: checkpoint.headers[name] for name in ("lm_head.weight", "model.norm.weight")}
    reading = read(model, {"lm_head.weight", "model.layers.0.input_layernorm.weight"}, checkpoint)
    (made,) = find_unread(model, reading, left)
    assert made.key_of == {"lm_head.weight": "lm_head.weight"}
    assert {key: (f.verdict, f.source) for key, f in reading.found.items()} == {
        "lm_head.weight": (Verdict.UNREAD, "lm_head.weight")
    }
    assert reading.likely == {"model.layers.0.input_layernorm.weight": "model.norm.weight"}


class NamesItsOwnState(Tiny):
    def state_dict(self) -> Any:  # type: ignore[override]
        return super().state_dict()


def test_a_state_dict_that_takes_no_arguments(tmp_path: Path, printed: Printed) -> None:
    Idiom(Tiny).save(tmp_path)
    with tiedquiet.enable("strict"):
        assert tiedquiet.check(NamesItsOwnState.from_pretrained(tmp_path)).ok
    assert not printed.loud
