"""Kinds of adapters: what each of them saves reaches the model, and no other tensor is asked for."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tiedquiet
from tests.checkpoints import Printed
from tests.doors.test_adapters import FILE, SMALL, rename
from tests.doors.training import differing, llava, state
from tiedquiet.__main__ import main

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings:UserWarning"),
]

PROJECTIONS = ["q_proj", "v_proj"]
KINDS: dict[str, Callable[[], Any]] = {
    "biases of the layers": lambda: peft.LoraConfig(r=2, target_modules=PROJECTIONS, bias="lora_only"),
    "all biases": lambda: peft.LoraConfig(r=2, target_modules=PROJECTIONS, bias="all"),
    "tokens besides": lambda: peft.LoraConfig(r=2, target_modules=PROJECTIONS, trainable_token_indices=[1, 2]),
    "the embedding": lambda: peft.LoraConfig(r=2, target_modules=[*PROJECTIONS, "embed_tokens"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2]),
    "magnitudes": lambda: peft.LoraConfig(r=2, target_modules=PROJECTIONS, use_dora=True),
    "ranks that change": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=PROJECTIONS),
}


@pytest.fixture(params=[True, False], ids=["tied", "parted"])
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    model = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "tie_word_embeddings": request.param}))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def base_of(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def saved(base: Path, config: Any) -> Path:
    """An adapter whose tensors all were trained."""
    with tiedquiet.enable("off"):
        model = peft.get_peft_model(base_of(base), config)
        for value in model.parameters():
            if value.requires_grad and value.is_floating_point():
                torch.nn.init.normal_(value)
        model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


def by_transformers(base: Path, adapter: Path) -> Any:
    model = base_of(base)
    model.load_adapter(str(adapter))
    return model


def are_all_in(model: Any, adapter: Path) -> bool:
    """Whether each tensor of an adapter's file is one of the model's."""
    now = list(model.state_dict().values())
    return all(any(torch.equal(value, one) for one in now) for value in load_file(adapter / FILE).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_one_that_transformers_loads(kind: str, base: Path) -> None:
    adapter = saved(base, KINDS[kind]())
    proof = tiedquiet.check(model := by_transformers(base, adapter))
    is_sound = are_all_in(model, adapter)  # some releases do not read all of it
    if kind == "tokens" and is_sound and proof.unread:
        pytest.skip("this release reads the tensor under one of its two names, and that is told")
    assert proof.ok == is_sound, proof
    assert main(["check", str(adapter)]) == (0 if is_sound else 1)
    advice = [finding.cure for finding in proof.findings if finding.broken]
    assert all("PeftModel.from_pretrained" in cure for cure in advice), "which reads it, as the next test shows"
    with tiedquiet.enable("strict"), nullcontext() if is_sound else pytest.raises(tiedquiet.LoadError):
        by_transformers(base, adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_one_that_peft_loads(kind: str, base: Path) -> None:
    adapter = saved(base, KINDS[kind]())
    with tiedquiet.enable("strict"):
        model = peft.PeftModel.from_pretrained(base_of(base), adapter)
    assert are_all_in(model, adapter)
    proof = tiedquiet.check(model)
    assert proof.ok, proof
    total = len(load_file(adapter / FILE))
    proof = tiedquiet.check(model, adapter)
    assert (proof.ok, proof.stored, proof.total) == (True, total, total)


def test_a_projection_that_is_drawn_from_a_seed_again(base: Path) -> None:
    """Releases of peft up to 0.18 do not read it, and have no need to."""
    adapter = saved(base, peft.VeraConfig(target_modules=["q_proj"], r=2))
    with tiedquiet.enable("strict"):
        model = peft.PeftModel.from_pretrained(base_of(base), adapter)
    assert are_all_in(model, adapter)
    assert tiedquiet.check(model).ok
    tensors = load_file(adapter / FILE)
    save_file({**tensors, "base_model.vera_A": tensors["base_model.vera_A"] + 1}, adapter / FILE)
    model = peft.PeftModel.from_pretrained(base_of(base), adapter)
    assert tiedquiet.check(model).ok == are_all_in(model, adapter)


def test_a_tensor_that_layers_share(base: Path) -> None:
    config = peft.VBLoRAConfig(target_modules=PROJECTIONS, r=2, num_vectors=8, vector_length=4, topk=2)
    adapter = saved(base, config)
    with tiedquiet.enable("strict"):
        model = peft.PeftModel.from_pretrained(base_of(base), adapter)
    assert are_all_in(model, adapter)
    assert tiedquiet.check(model).ok
    rename(adapter, lambda key: None if "vector_bank" in key else key)
    proof = tiedquiet.check(peft.PeftModel.from_pretrained(base_of(base), adapter))
    assert {f.key.split(".")[-2] for f in proof.findings if f.verdict is tiedquiet.Verdict.MISSING} == {
        "vblora_vector_bank"
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tokens"])
def test_half_of_one(kind: str, base: Path) -> None:
    adapter = saved(base, KINDS[kind]())
    rename(adapter, lambda key: None if "layers.1" in key else key)
    proof = tiedquiet.check(by_transformers(base, adapter))
    assert not proof.ok
    assert proof.missing >= 4
    assert main(["check", str(adapter)]) == 1


@pytest.mark.parametrize("base", [True], indirect=True, ids=["tied"])
def test_two_values_for_one_tensor(base: Path) -> None:
    adapter = saved(base, KINDS["tokens"]())
    tensors = load_file(adapter / FILE)
    assert len(tensors) == 2
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, adapter / FILE, {"format": "pt"})
    found = [f.verdict for f in tiedquiet.check(by_transformers(base, adapter)).findings if f.broken]
    assert found in ([tiedquiet.Verdict.AMBIGUOUS], [tiedquiet.Verdict.UNREAD]), "5.0.0 reads one of them"
    assert main(["check", str(adapter)]) == 1


def test_biases_that_the_file_lacks_and_no_row_names(base: Path, printed: Printed) -> None:
    adapter = saved(base, KINDS["all biases"]())
    rename(adapter, lambda key: None if key.endswith("k_proj.bias") else key)
    proof = tiedquiet.check(by_transformers(base, adapter))
    missing = [f.key for f in proof.findings if f.verdict is tiedquiet.Verdict.MISSING]
    assert len(missing) == 2
    assert all(".k_proj." in key for key in missing)
    assert any("not in its files" in line and "k_proj" in line for line in printed.loud)


def test_a_bias_that_changed_since(base: Path) -> None:
    adapter = saved(base, KINDS["all biases"]())
    model = by_transformers(base, adapter)
    layer = model.model.layers[0].self_attn.q_proj.base_layer
    layer.bias = torch.nn.Parameter(layer.bias + 1)
    (finding,) = (one for one in tiedquiet.check(model).findings if one.verdict is tiedquiet.Verdict.UNPROVEN)
    assert finding.key == "model.layers.0.self_attn.q_proj.base_layer.bias"


def test_the_base_beside_tokens(base: Path) -> None:
    """Its embedding is wrapped twice."""
    model = peft.PeftModel.from_pretrained(base_of(base), saved(base, KINDS["tokens besides"]()))
    assert tiedquiet.check(model, base).ok
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.token_adapter.base_layer.weight[5, 5] += 1
    assert not tiedquiet.check(model, base).ok


OUTSIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases": ("LoraConfig", {"r": 2, "target_modules": PROJECTIONS, "bias": "all"}, "k_proj.bias"),
    "in the attention": ("AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 1}, "adaption_gate"),
    "one vector": ("UniLoraConfig", {"target_modules": PROJECTIONS}, "theta_d"),
    "vectors": ("TinyLoraConfig", {"target_modules": PROJECTIONS}, "tinylora_v.0"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_peft_does_not_call_missing(kind: str, tmp_path: Path, printed: Printed) -> None:
    """It names only what has its layers' prefix and the adapter's name."""
    name, how, part = OUTSIDE[kind]
    if not hasattr(peft, name):
        pytest.skip("this release of peft has no such kind")
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": False}, attention_bias=True)).save_pretrained(base)
    adapter = saved(base, getattr(peft, name)(task_type="CAUSAL_LM", **how))
    assert tiedquiet.check(peft.PeftModel.from_pretrained(base_of(base), adapter)).ok
    printed.records.clear()
    rename(adapter, lambda key: None if part in key else key)
    proof = tiedquiet.check(peft.PeftModel.from_pretrained(base_of(base), adapter))
    assert proof.missing
    assert all(part.partition(".")[0] in f.key for f in proof.findings if f.verdict is tiedquiet.Verdict.MISSING)
    assert any(
        "not in its files under their names, and kept the values that the model had" in line for line in printed.loud
    )


def test_a_prefix_before_names_that_peft_renames(runs: Any) -> None:
    """What it has renamed, and then found no place for, is told under the name that the file has."""
    folder = runs(llava)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False))
    model.save_pretrained(folder / "adapter")
    truth = state(model)
    rename(folder / "adapter", lambda key: f"module.{key}")
    with tiedquiet.enable("off"):
        try:
            peft.PeftModel.from_pretrained(
                LlavaForConditionalGeneration.from_pretrained(folder / "base"), folder / "adapter"
            )
        except ValueError:
            pytest.skip("this release of peft does not read it at all")
    names = set(load_file(folder / "adapter" / FILE))
    for mode in ("on", "repair"):
        base = LlavaForConditionalGeneration.from_pretrained(folder / "base")
        with tiedquiet.enable(mode):
            model = peft.PeftModel.from_pretrained(base, folder / "adapter")
        found = [f for f in tiedquiet.check(model).findings if f.verdict is tiedquiet.Verdict.UNREAD]
        assert {f.source for f in found} == (names if mode == "on" else set())
    assert not differing(model, truth)


def test_numbers_that_are_too_large_for_the_type_of_the_layers(base: Path) -> None:
    adapter = saved(base, KINDS["magnitudes"]())
    tensors = load_file(adapter / FILE)
    name = min(tensors)
    tensors[name][0] = 1e6
    save_file(tensors, adapter / FILE, {"format": "pt"})
    said = r"by the cast to float16.*\. Load the base model with dtype=torch\.float32$"
    for dtype, is_sound in ((torch.float16, False), (torch.float32, True), (torch.bfloat16, True)):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        raises = nullcontext() if is_sound else pytest.raises(tiedquiet.LoadError, match=said)
        with tiedquiet.enable("strict"), raises:
            peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        proof = tiedquiet.check(model)
        assert [f.key for f in proof.findings if f.broken] == ([] if is_sound else [proof.findings[-1].key])
        assert proof.ok is is_sound


@pytest.mark.parametrize("base", [False], indirect=True, ids=["parted"])
def test_digits_that_were_lost_on_the_way(base: Path) -> None:
    """Peft casts what it has read to the type of the layer, and that back to float32."""
    adapter = saved(base, KINDS["tokens besides"]())

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        return peft.PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True)

    proof = tiedquiet.check(model := load())
    lost = {f.key for f in proof.findings if f.why == "by a cast to bfloat16 and back"}
    assert len(lost) == sum(value.dtype is torch.float32 for value in model.parameters()) > 0
    assert not tiedquiet.check(model, adapter).ok
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match="by a cast to bfloat16 and back"):
        load()
    with tiedquiet.enable("repair"):
        model = load()
    assert are_all_in(model, adapter)
    assert tiedquiet.check(model).ok


def test_what_changes_after_the_adapter_was_loaded(base: Path) -> None:
    """It is told of the base model's tensors; those that only have another name did not change.

    An adapter is there to be taken away again.
    """
    model = peft.PeftModel.from_pretrained(base_of(base), saved(base, KINDS["magnitudes"]()))
    assert tiedquiet.check(model).ok
    norm = model.get_base_model().model.norm
    norm.weight = torch.nn.Parameter(norm.weight + 1)
    model.delete_adapter("default")
    (found,) = (f for f in tiedquiet.check(model).findings if f.verdict is tiedquiet.Verdict.UNPROVEN)
    assert (found.key, "replaced by another tensor" in found.why) == ("model.norm.weight", True)


def test_another_rank(base: Path, printed: Printed) -> None:
    """What peft leaves out, and says so, is in the file."""
    adapter = saved(base, KINDS["biases of the layers"]())
    model = peft.get_peft_model(base_of(base), peft.LoraConfig(r=4, target_modules=PROJECTIONS))
    with pytest.warns(UserWarning, match="being ignored because you passed"):
        model.load_adapter(adapter, "default", ignore_mismatched_sizes=True)
    missing = [f for f in tiedquiet.check(model).findings if f.verdict is tiedquiet.Verdict.MISSING]
    assert len(missing) == 8
    assert all(f.why == "the file has it in another shape" for f in missing)
    assert not any("not in its files" in line for line in printed.loud)
    tensors = load_file(adapter / FILE)
    stranger = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, stranger: next(iter(tensors.values())).clone()}, adapter / FILE, {"format": "pt"})
    with pytest.warns(UserWarning, match="being ignored because you passed"):
        model.load_adapter(adapter, "default", ignore_mismatched_sizes=True)
    assert [f.source for f in tiedquiet.check(model).findings if f.verdict is tiedquiet.Verdict.UNREAD] == [stranger]
    read = len(tensors) - 8
    assert any(f"{read} of {len(tensors) + 1} tensors of the adapter were read" in line for line in printed.loud)


@pytest.mark.parametrize("base", [False], indirect=True, ids=["parted"])
def test_a_mapping_that_exchanges_two_layers(base: Path) -> None:
    """Then the file has other values under a tensor's name, and nothing is lost."""
    adapter = saved(base, KINDS["magnitudes"]())
    mapping = {r"layers\.0\.": "layers.1.", r"layers\.1\.": "layers.0."}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with tiedquiet.enable("strict"):
        model = peft.PeftModel.from_pretrained(model, adapter, key_mapping=mapping)
    assert are_all_in(model, adapter)
    assert tiedquiet.check(model).ok


@pytest.mark.parametrize("base", [False], indirect=True, ids=["parted"])
@pytest.mark.parametrize("seed", [None, 7])
def test_what_a_layer_keeps_outside_of_its_state_dict(seed: int | None, base: Path, printed: Printed) -> None:
    """SHiRA's indices: transformers has no place for them, and the layer has drawn the same; or others."""
    adapter = saved(base, peft.ShiraConfig(r=2, target_modules=PROJECTIONS))
    if seed is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "random_seed": seed}))
    with tiedquiet.enable("strict"):
        if seed is None:
            assert tiedquiet.check(by_transformers(base, adapter)).ok
            assert not printed.loud
        else:
            with pytest.raises(tiedquiet.LoadError, match=r"no place for .*shira_indices"):
                by_transformers(base, adapter)


@pytest.mark.parametrize("base", [False], indirect=True, ids=["parted"])
def test_what_each_layer_makes_from_a_seed_is_held(base: Path) -> None:
    """The file has it once, above the layers, where transformers finds no place for it."""
    adapter = saved(base, peft.RandLoraConfig(r=4, target_modules=PROJECTIONS))
    with tiedquiet.enable("strict"):
        model = by_transformers(base, adapter)
    assert tiedquiet.check(model).ok
    tensors = load_file(adapter / FILE)
    save_file({**tensors, "base_model.randlora_A": tensors["base_model.randlora_A"] + 1}, adapter / FILE)
    with tiedquiet.enable("strict"), pytest.raises(tiedquiet.LoadError, match=r"no place for base_model\.randlora_A\."):
        by_transformers(base, adapter)
