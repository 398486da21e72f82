"""`tiedquiet.check(model, path)`: a model in memory against what was saved of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    CLIPVisionConfig,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import tiedquiet
from tests.checkpoints import gpt2, state_of, t5
from tests.gate.test_compare import bert, mixtral
from tests.gate.test_resume import trained
from tiedquiet import Verdict


def llava() -> LlavaForConditionalGeneration:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = CLIPVisionConfig(**size, image_size=16, patch_size=8)
    text = LlamaConfig(**size, num_key_value_heads=2, vocab_size=64)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))


MODELS = {
    "tied": lambda: GPT2LMHeadModel(gpt2()),
    "encoder and decoder": lambda: T5ForConditionalGeneration(t5()),
    "renamed": llava,
    "converted": mixtral,
    "with buffers": lambda: BertModel(bert()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_what_save_pretrained_wrote_is_what_the_model_holds(name: str, size: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    state_of(model)
    model.save_pretrained(tmp_path, max_shard_size=size)
    proof = tiedquiet.check(model, tmp_path)
    assert proof.ok, proof
    assert proof.total == len(model.state_dict())
    tied = sum(finding.verdict is Verdict.TIED for finding in proof.findings)
    assert proof.stored + tied == proof.total


def test_a_renaming_that_fits_its_own_result(tmp_path: Path) -> None:
    """`layer.` becomes `model.layer.`, once, although the loaded model keeps what it was renamed by."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    DINOv3ViTBackbone(DINOv3ViTConfig(**size, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    proof = tiedquiet.check(DINOv3ViTBackbone.from_pretrained(tmp_path), tmp_path)
    assert proof.ok, proof
    stored = load_file(tmp_path / "model.safetensors")
    name = "layer.0.layer_scale1.lambda1"
    save_file({**stored, name: stored[name] + 1e10}, tmp_path / "model.safetensors", {"format": "pt"})
    (found,) = tiedquiet.check(DINOv3ViTBackbone.from_pretrained(tmp_path, dtype=torch.float16)).findings
    assert (found.key.removeprefix("model."), found.verdict) == (name, Verdict.OVERWRITTEN)


def test_a_model_that_was_trained_on(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(gpt2())
    folder = trained(model, tmp_path)
    assert tiedquiet.check(model, folder).ok
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[3] += 1
    proof = tiedquiet.check(model, folder)
    assert not proof.ok
    (found,) = (finding for finding in proof.findings if finding.verdict is not Verdict.TIED)
    assert (found.key, found.verdict) == ("transformer.h.0.ln_1.weight", Verdict.OVERWRITTEN)
    assert found.why == "differs from the file in 1 of 16 elements"


def test_experts_that_changed_places(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path)
    experts = next(tensor for tensor in model.parameters() if tensor.dim() == 3)
    experts.data = experts.data.flip(0).contiguous()
    proof = tiedquiet.check(model, tmp_path)
    assert [finding.verdict for finding in proof.findings] == [Verdict.UNPROVEN]


def test_a_file_that_lost_precision_or_a_tensor(tmp_path: Path) -> None:
    model = BertModel(bert())
    state_of(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    stored["pooler.dense.weight"] = stored["pooler.dense.weight"].bfloat16()
    del stored["pooler.dense.bias"]
    save_file(stored, path, {"format": "pt"})
    proof = tiedquiet.check(model, str(tmp_path))
    assert {f.key: f.verdict for f in proof.findings} == {
        "pooler.dense.bias": Verdict.MISSING,
        "pooler.dense.weight": Verdict.OVERWRITTEN,
    }
    assert (proof.stored, proof.missing) == (proof.total - 2, 1)


def test_a_file_with_a_tensor_under_two_names(tmp_path: Path) -> None:
    model = BertModel(bert())
    state_of(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["bert.pooler.dense.bias"] = stored["pooler.dense.bias"] + 1
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (finding,) = tiedquiet.check(model, tmp_path).findings
    assert (finding.key, finding.verdict) == ("pooler.dense.bias", Verdict.AMBIGUOUS)


def test_a_file_that_has_it_under_the_other_name_alone(tmp_path: Path) -> None:
    """What it has under the model's own name is something else."""
    model = GPT2LMHeadModel(gpt2())
    state_of(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.ln_1.weight"
    tensors["h.0.ln_1.weight"], tensors[name] = tensors[name], tensors[name] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    proof = tiedquiet.check(model, tmp_path)
    assert not proof.ok
    assert [(f.key, f.verdict) for f in proof.findings if f.verdict is not Verdict.TIED] == [(name, Verdict.AMBIGUOUS)]


def test_a_tie_that_came_apart_before_it_was_saved(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(gpt2())
    state_of(model)
    model.save_pretrained(tmp_path)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    proof = tiedquiet.check(model, tmp_path)
    assert {f.key: f.verdict for f in proof.findings} == {"lm_head.weight": Verdict.UNTIED}


def test_an_adapter_that_was_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert tiedquiet.check(merged, tmp_path / "merged").ok
    proof = tiedquiet.check(merged, tmp_path / "base")
    assert "transformer.h.0.attn.c_attn.weight" in {finding.key for finding in proof.findings}


@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
@pytest.mark.parametrize(
    "wrap", [torch.compile, torch.nn.DataParallel, lambda model: torch.compile(torch.nn.DataParallel(model))]
)
def test_what_is_around_a_model(wrap: Any, tmp_path: Path) -> None:
    """Also where it was saved with that, as a Trainer does of what was compiled before it was given."""
    model = mixtral()
    model.save_pretrained(tmp_path / "inside")
    Trainer(wrap(model), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)).save_model(tmp_path / "around")
    for folder in ("inside", "around"):
        proof = tiedquiet.check(wrap(model), tmp_path / folder)
        assert (proof.ok, proof.model) == (True, "MixtralForCausalLM")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    for folder in ("inside", "around"):
        assert len(tiedquiet.check(wrap(model), tmp_path / folder).findings) == 1


def test_a_base_model_and_the_file_of_one_with_a_head(tmp_path: Path) -> None:
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    assert tiedquiet.check(GPT2Model.from_pretrained(tmp_path), tmp_path).ok


def test_a_model_of_diffusers_and_one_of_nobody(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    vae.save_pretrained(tmp_path / "vae")
    assert tiedquiet.check(vae, tmp_path / "vae").ok
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    proof = tiedquiet.check(plain, tmp_path)
    assert (proof.ok, proof.stored, proof.total) == (True, 4, 4)


@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_a_variant_that_is_the_only_one_there(size: str, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert tiedquiet.check(model, tmp_path).ok
    GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)  # it would be read
    assert not tiedquiet.check(model, tmp_path).ok


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "holds no weights: model.safetensors, "),
        ({"model.safetensors": b"junk"}, "cannot be read: "),
        ({"model.safetensors.index.json": b"[]"}, "does not hold a JSON object"),
        (
            dict.fromkeys(("model.ema.safetensors", "model.fp16.safetensors"), b""),
            "holds ema and fp16; put the variant",
        ),
        (None, "is not a folder"),
    ],
)
def test_a_folder_without_such_files(content: dict[str, bytes] | None, says: str, tmp_path: Path) -> None:
    for name, stored in (content or {}).items():
        (tmp_path / name).write_bytes(stored)
    with pytest.raises(ValueError, match=says):
        tiedquiet.check(BertModel(bert()), tmp_path if content is not None else tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
def test_layers_that_are_wrapped_one_by_one(wrap: Any, tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path / "before")
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = wrap(layer)
    (tmp_path / "after").mkdir()
    save_file(model.state_dict(), tmp_path / "after" / "model.safetensors", {"format": "pt"})
    for folder in ("before", "after"):
        proof = tiedquiet.check(model, tmp_path / folder)
        assert (proof.ok, proof.stored) == (True, len(model.state_dict()))
    with torch.no_grad():
        next(layers.parameters()).view(-1)[0] += 1
    for folder in ("before", "after"):
        (finding,) = tiedquiet.check(model, tmp_path / folder).findings
        assert finding.verdict is Verdict.OVERWRITTEN
