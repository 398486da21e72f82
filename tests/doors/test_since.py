"""What `check` says of what a program has done with a model since it was loaded, and that it may do so."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification, ResNetConfig, ResNetModel

import tiedquiet
from tests.doors.renamed import qwen2, written
from tests.idioms import Idiom, Tiny
from tiedquiet import Verdict


def test_what_has_changed_since_is_said_as_changed(tmp_path: Path) -> None:
    written(qwen2(), tmp_path)

    def after(change: Callable[[Any], Any]) -> dict[str, str]:
        model = Qwen2ForCausalLM.from_pretrained(tmp_path)
        assert tiedquiet.check(model).ok
        change(model)
        return {f.key: f.why for f in tiedquiet.check(model).findings if f.verdict is Verdict.UNPROVEN}

    def replace(model: Any) -> None:
        model.model.norm.weight = nn.Parameter(torch.ones(32))

    assert after(replace) == {"model.norm.weight": "it was read, and has since been replaced by another tensor"}
    assert after(lambda model: delattr(model.model, "norm")) == {
        "model.norm.weight": "it was read, and has since been removed from the model"
    }
    assert after(lambda model: model.model.norm.to("meta")) == {
        "model.norm.weight": "it was read, and has since been moved to meta, where nothing has values"
    }

    def replace_by_the_same(model: Any) -> None:
        model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())

    def replace_under_an_optimizer(model: Any) -> None:
        model.optimizer = torch.optim.SGD(model.parameters())
        replace_by_the_same(model)

    def part(model: Any) -> None:
        part = torch.ones(16).as_subclass(OfAnotherType)
        model.model.norm.weight = nn.Parameter(part)

    def put_aside(model: Any) -> None:
        accelerate.cpu_offload(model)
        assert model.model.norm.weight.is_meta

    convert = lambda model: model.half()  # noqa: E731
    for harmless in (convert, lambda model: model.requires_grad_(False), part, put_aside, replace_by_the_same):
        assert after(harmless) == {}
    assert after(replace_under_an_optimizer) == {
        "model.norm.weight": "it was read, and has since been replaced by another tensor"
    }, "the optimizer trains the other one"


class OfAnotherType(torch.Tensor):
    """As where FSDP parts what was read."""


def test_what_was_lost_while_it_was_loaded_stays_lost(tmp_path: Path) -> None:
    Idiom(Resets).save(tmp_path)
    model: Any = Resets.from_pretrained(tmp_path)
    assert [(f.key, f.verdict) for f in tiedquiet.check(model).findings] == [("part.weight", Verdict.OVERWRITTEN)]
    model.part.weight = nn.Parameter(torch.ones(8, 8))
    assert [(f.key, f.verdict) for f in tiedquiet.check(model).findings] == [("part.weight", Verdict.OVERWRITTEN)]
    del model.part
    assert [(f.key, f.verdict) for f in tiedquiet.check(model).findings] == [("part.weight", Verdict.UNPROVEN)]


def test_what_is_said_of_the_load_stays_true(tmp_path: Path) -> None:
    written(qwen2(tie_word_embeddings=False), tmp_path / "sound")
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path / "sound")
    model.lm_head.weight = nn.Parameter(torch.ones(64, 32))
    assert "; 1 unproven; the load was sound, with 1 change since\n" in str(tiedquiet.check(model))
    model.model.extra = nn.Linear(2, 2, bias=False)
    assert "; 1 missing; 1 unproven; the load was sound, with 2 changes since\n" in str(tiedquiet.check(model))
    Idiom(Resets).save(tmp_path / "lost")
    model = Resets.from_pretrained(tmp_path / "lost")
    model.extra = nn.Linear(2, 2, bias=False)
    assert "; the load was not sound, with 1 change since\n" in str(tiedquiet.check(model))
    del model.extra, model.part
    assert "; 1 unproven; the load was not proven to be sound\n" in str(tiedquiet.check(model))


def test_a_head_that_was_moved_to_meta_is_tied_no_more(tmp_path: Path) -> None:
    written(qwen2(tie_word_embeddings=True), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
    model.lm_head.to("meta")
    assert [(f.key, f.why, f.since) for f in tiedquiet.check(model).findings] == [
        ("lm_head.weight", "it was tied, and has since been moved to meta, where nothing has values", True)
    ]
    offloaded = accelerate.cpu_offload(Qwen2ForCausalLM.from_pretrained(tmp_path))
    assert offloaded.lm_head.weight.is_meta
    assert tiedquiet.check(offloaded).ok


class Resets(Tiny):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.part:
            self.part.weight.data.zero_()


def test_a_head_that_was_taken_off_is_not_spoken_of(tmp_path: Path) -> None:
    written(qwen2(), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    del model.lm_head
    assert tiedquiet.check(model).findings == ()


def test_what_stays_on_disk_and_nothing_reads_from_there_any_more(tmp_path: Path) -> None:
    written(qwen2(tie_word_embeddings=True), tmp_path / "model")
    places = {"model.layers": "disk", **dict.fromkeys(("lm_head", "model.embed_tokens", "model.norm"), "cpu")}
    model: Any = Qwen2ForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "model.rotary_emb": "cpu"}, offload_folder=tmp_path / "disk"
    )
    assert tiedquiet.check(model).ok
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    proof = tiedquiet.check(model)
    on_meta = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    assert {f.key for f in proof.findings if f.verdict is Verdict.UNPROVEN} == on_meta != set()


def test_a_copy_on_meta_has_no_values(tmp_path: Path) -> None:
    written(qwen2(), tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    twin = copy.deepcopy(model).to("meta")
    proof = tiedquiet.check(twin)
    assert (proof.stored, proof.ok) == (0, False)
    assert tiedquiet.check(model).ok


def test_a_copy_is_followed_as_the_model_is(tmp_path: Path) -> None:
    written(qwen2(tie_word_embeddings=False), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
    before, sound = copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))
    model.lm_head = nn.Linear(32, model.config.vocab_size, bias=False)
    after = copy.deepcopy(model)
    before.model.norm = nn.Identity()
    why = "it was read, and has since been "
    for one, key, what in (
        (model, "lm_head.weight", "replaced by another tensor"),
        (after, "lm_head.weight", "replaced by another tensor"),
        (before, "model.norm.weight", "removed from the model"),
    ):
        assert [(f.key, f.why) for f in tiedquiet.check(one).findings] == [(key, why + what)]
    assert tiedquiet.check(sound.half()).ok
    del model, before, after  # a copy needs no original
    assert tiedquiet.check(sound).ok
    sound.lm_head.weight = nn.Parameter(sound.lm_head.weight.detach() + 1)
    assert not tiedquiet.check(sound).ok


def test_a_shallow_copy_is_followed_too(tmp_path: Path) -> None:
    """It has the model's own modules by name, until it is given others."""
    written(qwen2(tie_word_embeddings=False), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    assert tiedquiet.check(twin).ok
    twin.lm_head = nn.Linear(32, model.config.vocab_size, bias=False)
    assert [finding.key for finding in tiedquiet.check(twin).findings] == ["lm_head.weight"]
    assert tiedquiet.check(model).ok


def test_a_copy_s_tensors_may_be_swapped_as_the_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses that for tensors that anybody refers to weakly."""
    written(qwen2(), tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    twin = copy.deepcopy(model).half()
    assert tiedquiet.check(twin).ok


def test_buffers_of_a_model_that_was_converted(tmp_path: Path) -> None:
    """`Module.to` makes other buffers, of whatever has batch norm, say, and keeps parameters."""
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path)
    model: Any = ResNetModel.from_pretrained(tmp_path)
    for convert in (lambda: model.half(), lambda: model.to(torch.float64)):
        convert()
        assert tiedquiet.check(model).ok
    model.embedder.embedder.normalization.running_mean = torch.ones(8)
    assert [finding.key for finding in tiedquiet.check(model).findings] == [
        "embedder.embedder.normalization.running_mean"
    ]
    (tmp_path / "model.safetensors").unlink()
    assert not tiedquiet.check(model).ok, "there is nothing to compare with"


def test_what_cannot_be_compared_any_more_is_as_it_was(tmp_path: Path) -> None:
    """Offloaded after it was loaded, by accelerate, say."""
    written(qwen2(), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)

    def of_head() -> list[Verdict]:
        return [f.verdict for f in tiedquiet.check(model).findings if f.key == "lm_head.weight"]

    assert of_head() == [Verdict.UNTIED]
    model.model.embed_tokens.to("meta")
    assert of_head() == [Verdict.UNTIED]


class Around(nn.Module):
    """A layer written by hand around another."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


@pytest.mark.usefixtures("process_group")
def test_what_fsdp_has_gathered_is_what_was_read(tmp_path: Path) -> None:
    """Other tensors, from a forward to the next backward, with whatever values training has given them."""
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    written(qwen2(tie_word_embeddings=False), tmp_path / "model")
    model = fully_shard(Qwen2ForCausalLM.from_pretrained(tmp_path / "model"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model(torch.ones(1, 2, dtype=torch.long))
    assert not isinstance(model.model.norm.weight, torch.distributed.tensor.DTensor)
    assert tiedquiet.check(model).ok


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_around_one_that_was_read_removes_nothing(tied: bool, tmp_path: Path) -> None:
    written(qwen2(tie_word_embeddings=tied), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
    model.model.embed_tokens, model.model.norm = Around(model.model.embed_tokens), Around(model.model.norm)
    before, proof = tiedquiet.check(Qwen2ForCausalLM.from_pretrained(tmp_path)), tiedquiet.check(model)
    assert proof.ok
    assert (proof.stored, proof.total) == (before.stored, before.total)
    assert [(f.key, f.verdict) for f in proof.findings] == [("lm_head.weight", Verdict.TIED)] * tied
    model.model.norm = Around(nn.LayerNorm(32))
    assert [f.why for f in tiedquiet.check(model).findings if f.key == "model.norm.weight"] == [
        "it was read, and has since been removed from the model"
    ]


@pytest.mark.filterwarnings("ignore")  # what peft thinks of tied layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_head_that_an_adapter_brought_is_no_tie_that_came_apart(dtype: torch.dtype, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    written(qwen2(tie_word_embeddings=True), tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], r=2)
    adapted = peft.get_peft_model(Qwen2ForCausalLM.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    base = Qwen2ForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert tiedquiet.check(merged).ok
    merged.lm_head = nn.Linear(32, 64, bias=False)
    assert not tiedquiet.check(merged).ok


def test_a_model_can_be_converted_where_torch_swaps_what_tensors_hold(tmp_path: Path) -> None:
    written(qwen2(tie_word_embeddings=True), tmp_path)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
        weight = model.model.norm.weight
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.model.norm.weight is weight
    assert weight.dtype is torch.bfloat16
    assert tiedquiet.check(model).ok


class Gated(nn.Module):
    """A layer of the user's around another one, with a parameter of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.gate = layer, nn.Parameter(torch.ones(1))


def missing(model: Any) -> list[str]:
    return [f.key for f in tiedquiet.check(model).findings if f.verdict is Verdict.MISSING]


def test_what_is_put_into_a_model_later_comes_from_no_file(tmp_path: Path) -> None:
    written(qwen2(), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
    before = tiedquiet.check(model)
    model.model.layers[0].extra = nn.Linear(2, 2, bias=False)
    model.model.layers[1] = Gated(model.model.layers[1])
    proof = tiedquiet.check(model)
    assert missing(model) == ["model.layers.0.extra.weight", "model.layers.1.gate"]
    assert [f.key for f in proof.findings] == sorted(f.key for f in proof.findings)
    assert (proof.stored, proof.total) == (before.stored, before.total + 2)
    assert missing(nn.ModuleDict({"language": model})) == [f"language.{key}" for key in missing(model)]
    assert missing(copy.deepcopy(model)) == missing(model), "its layers have other names, and are other tensors"


def test_what_is_put_into_a_tied_layer_is_that_layers(tmp_path: Path) -> None:
    """As quanto's scales are."""
    written(qwen2(tie_word_embeddings=True), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
    model.lm_head.register_buffer("scale", torch.ones(1))
    assert missing(model) == []


def test_a_head_in_the_place_of_one_that_no_file_has_comes_from_none_either(tmp_path: Path) -> None:
    written(qwen2(), tmp_path)
    model: Any = Qwen2ForSequenceClassification.from_pretrained(tmp_path)
    assert missing(model) == ["score.weight"]
    model.score = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 2, bias=False))
    assert missing(model) == ["score.0.weight", "score.1.weight"]


@pytest.mark.filterwarnings("ignore")  # what peft thinks of tied layers
def test_a_new_adapter_is_no_layer_of_the_model(tmp_path: Path) -> None:
    """Nor are its prompts, which are in no layer that was read; what else is put in is one, with an adapter as well."""
    peft = pytest.importorskip("peft")
    written(qwen2(), tmp_path)
    for config in (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=1, adapter_len=2, target_modules="self_attn"),
    ):
        model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
        if isinstance(config, peft.AdaptionPromptConfig):
            model.config.model_type = "llama"  # the one kind that peft knows these prompts of
        adapted = peft.get_peft_model(model, config)
        assert tiedquiet.check(adapted).ok
        model.model.layers[0].extra = nn.Linear(2, 2, bias=False)
        assert missing(adapted) == ["base_model.model.model.layers.0.extra.weight"]


@pytest.mark.filterwarnings("ignore")  # what peft thinks of tied layers
def test_a_layer_that_was_put_in_stays_one_under_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    written(qwen2(), tmp_path)
    model: Any = Qwen2ForCausalLM.from_pretrained(tmp_path)
    model.model.layers[0].extra = nn.Linear(2, 2, bias=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["extra", "q_proj"], r=2))
    assert missing(adapted) == ["base_model.model.model.layers.0.extra.base_layer.weight"]
