"""Adapters that take a part of the base model over, and one that was made for another part of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2, save
from tests.doors.renamed import BERT, qwen2, verdicts
from tests.doors.test_adapters import FILE
from tiedquiet import LoadError, Verdict

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("mode", ["on", "repair", "strict"])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_what_peft_prepares_is_left_to_it(kind: str, mode: Any, tmp_path: Path, printed: Printed) -> None:
    torch.manual_seed(0)
    qwen2().save_pretrained(tmp_path / "base")
    ids = torch.arange(6)[None]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=kind)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) / 10
    trained = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    with tiedquiet.enable(mode):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.eval()(ids).logits, trained)
    assert not printed.loud
    found = verdicts(loaded)
    assert Verdict.OVERWRITTEN not in found.values()
    assert found.pop("lm_head.weight") is Verdict.TIED
    assert list(found.values()) == [Verdict.UNPROVEN] * 2, "in each of two layers the base is no longer the file's"


def test_the_head_that_an_adapter_brought_is_the_head(tmp_path: Path) -> None:
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    trained = peft.get_peft_model(base(), config)
    assert not tiedquiet.check(trained).ok, "it was drawn"
    trained.save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert tiedquiet.check(model).ok
    with model.disable_adapter():
        assert not tiedquiet.check(model).ok
    trained_head = model.base_model.model.classifier.modules_to_save["default"].weight
    for alone in (copy.deepcopy(model).unload(), model.merge_and_unload()):
        assert torch.equal(alone.classifier.weight, trained_head)
        assert tiedquiet.check(alone).ok


class Merges(Qwen2ForCausalLM):
    """Merges an adapter of its own as peft does, in the last step of the load."""

    def eval(self) -> "Merges":
        if not self.model.layers[0].mlp.up_proj.weight.is_meta:
            config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
            peft.get_peft_model(self, config).merge_and_unload()
        return super().eval()


def test_what_else_peft_writes_to_the_base_is_a_loss(tmp_path: Path) -> None:
    qwen2().save_pretrained(tmp_path)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"up_proj\.weight.* by .*merge"):
        Merges.from_pretrained(tmp_path)


class TwoHeads(GPT2LMHeadModel):
    """One of its heads is tied, and one is not, although the class says so."""

    _tied_weights_keys = dict.fromkeys(("lm_head.weight", "other.weight"), "transformer.wte.weight")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.other = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        if hasattr(self, "other"):
            self.other.weight = torch.nn.Parameter(torch.ones_like(self.other.weight))


def test_what_was_no_tie_before_is_not_parted_by_it(tmp_path: Path, printed: Printed) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path / "base")

    def base() -> Any:
        return TwoHeads.from_pretrained(tmp_path / "base")

    ties = {"lm_head.weight": Verdict.TIED, "other.weight": Verdict.UNTIED}
    assert verdicts(base()) == ties
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path / "adapter")
    model = base()
    printed.records.clear()
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not printed.loud
    assert verdicts(model) == ties


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_the_adapter_of_one_layer_is_not_read_into_another(tmp_path: Path, printed: Printed) -> None:
    qwen2().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace("q_proj", "o_proj"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with tiedquiet.enable("repair"):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not tiedquiet.check(loaded).ok
    assert not any("read by TIEDQUIET=repair" in line for line in printed.confirmed)
    assert any("0 of 2 tensors of the adapter were read" in line for line in printed.loud)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_what_layers_share_is_repaired_under_each_of_its_names(tmp_path: Path, printed: Printed) -> None:
    qwen2().save_pretrained(tmp_path / "base")
    shape = {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2}
    config = peft.VBLoRAConfig(target_modules=["q_proj", "v_proj"], init_logits_std=1.0, **shape)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / FILE)
    save_file({f"module.{name}": value for name, value in tensors.items()}, tmp_path / "adapter" / FILE)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    printed.records.clear()
    with tiedquiet.enable("repair"):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    now = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(now[name], value) for name, value in tensors.items())
    assert tiedquiet.check(loaded).ok
    assert not printed.loud


def with_an_adapter(tmp_path: Path) -> Path:
    qwen2().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("is_lean", [True, False])
def test_what_lies_on_meta_once_it_was_read(is_lean: bool, tmp_path: Path, printed: Printed) -> None:
    """An adapter goes where its layers are; and DoRA over those of bitsandbytes' puts these on meta itself."""
    adapter = with_an_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    printed.records.clear()
    model = peft.PeftModel.from_pretrained(base.to("meta"), adapter, low_cpu_mem_usage=is_lean)
    assert all(value.is_meta for name, value in model.named_parameters() if "lora" in name)
    assert any(
        "where nothing has values. Load the adapter into a model that has values" in line for line in printed.loud
    )
    assert not tiedquiet.check(model).ok
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="stored values were LOST"):
        peft.PeftModel.from_pretrained(base.to("meta"), adapter, low_cpu_mem_usage=is_lean)


def test_what_accelerate_keeps_on_disk_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # peft writes there, too
    adapter = with_an_adapter(tmp_path)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers.1": "disk", **dict.fromkeys(parts, "cpu")}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "disk")
    )
    inside = {f"base_model.model.{part}": place for part, place in places.items()}
    more = {"device_map": inside, "offload_dir": str(tmp_path / "more"), "low_cpu_mem_usage": True}
    try:
        with tiedquiet.enable("strict"):
            model = peft.PeftModel.from_pretrained(base, adapter, **more)
    except KeyError:
        pytest.skip("this release of peft cannot put such a model aside")
    assert any(value.is_meta for name, value in model.named_parameters() if "lora" in name)
    assert any(value.is_meta for name, value in model.named_parameters() if "base_layer" in name)
    proof = tiedquiet.check(model)
    assert proof.ok, proof


def test_an_adapter_around_a_base_that_was_compiled(tmp_path: Path, printed: Printed) -> None:
    with_an_adapter(tmp_path)
    base = torch.compile(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), backend="eager")
    tensors = load_file(tmp_path / "adapter" / FILE)
    compiled = {
        name.replace("base_model.model.", "base_model.model._orig_mod."): value for name, value in tensors.items()
    }
    save_file(compiled, tmp_path / "adapter" / FILE, {"format": "pt"})  # as peft saves that of such a base
    printed.records.clear()
    with tiedquiet.enable("strict"):
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not printed.loud
    assert tiedquiet.check(model).ok
    assert tiedquiet.check(model, tmp_path / "base").ok
    proof = tiedquiet.check(model, tmp_path / "adapter")
    assert (proof.ok, proof.stored, proof.total) == (True, len(tensors), len(tensors))


class Named(PreTrainedModel):
    """One of its two layers has the name that `torch.compile` gives to what it makes a model of."""

    config_class = PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._orig_mod, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.post_init()


def test_a_layer_that_is_called_as_what_was_compiled(tmp_path: Path, printed: Printed) -> None:
    Named(PretrainedConfig()).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["_orig_mod", "head"], init_lora_weights=False)
    peft.get_peft_model(Named.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    printed.records.clear()
    model = Named.from_pretrained(tmp_path / "base")
    proof = tiedquiet.check(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"))
    assert (proof.ok, proof.stored, proof.total) == (True, 8, 8)
    assert not printed.loud
    model = Named.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.head.weight.add_(1)
    assert {finding.key for finding in tiedquiet.check(model, tmp_path / "base").findings} == {"head.weight"}


class Silent(torch.nn.Linear):
    """As quanto's layers do, it tells nobody that it found no values for its bias."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        own = (state_dict.get(prefix + name) for name in ("weight", "bias"))
        for tensor, values in zip((self.weight, self.bias), own, strict=True):
            if values is not None:
                tensor.data.copy_(values)


def test_biases_that_the_file_lacks_and_a_layer_does_not_miss(tmp_path: Path, printed: Printed) -> None:
    qwen2().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    for is_whole in (True, False):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        for layer in base.model.layers:
            layer.self_attn.k_proj.__class__ = Silent
        printed.records.clear()
        with tiedquiet.enable("strict"):
            loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert tiedquiet.check(loaded).ok == is_whole
        assert bool(printed.loud) != is_whole
        tensors = load_file(tmp_path / "adapter" / FILE)
        tensors.pop("base_model.model.model.layers.0.self_attn.k_proj.bias", None)
        save_file(tensors, tmp_path / "adapter" / FILE, {"format": "pt"})
    (line,) = printed.loud
    assert f"missing, 1 of {len(tensors) + 1} tensors of the adapter is not in its files" in line
    assert line.endswith(": model.layers.0.self_attn.k_proj.bias")


def test_what_lies_beside_the_base_model(tmp_path: Path, printed: Printed) -> None:
    """X-LoRA's classifier, of which peft 0.21 leaves a part out of the file, because its number is an adapter's name."""
    qwen2().save_pretrained(tmp_path / "base")

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.config.use_cache = False
        return model

    experts = {}
    for number in ("0", "1"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(base(), config).save_pretrained(tmp_path / number)
        experts[number] = str(tmp_path / number)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=base().config.hidden_size, xlora_depth=1, adapters=experts
    )
    trained = peft.get_peft_model(base(), config)
    trained.save_pretrained(tmp_path / "mixed")
    classifier = {name: value for name, value in trained.state_dict().items() if "classifier" in name}
    path = tmp_path / "mixed" / FILE
    for in_file in (classifier, {}):
        save_file(in_file, path, {"format": "pt"})
        printed.records.clear()
        model = peft.PeftModel.from_pretrained(base(), tmp_path / "mixed")
        assert all(torch.equal(model.state_dict()[name], value) for name, value in in_file.items())
        proof = tiedquiet.check(model)
        assert (proof.ok, proof.missing) == (bool(in_file), int(not in_file))
        assert any("missing, 2 of 2 tensors of the adapter" in line for line in printed.loud) == (not in_file)
        assert not any("also changed tensors of the base model" in line for line in printed.of("tiedquiet"))
    save_file({f"module.{name}": value for name, value in classifier.items()}, path, {"format": "pt"})
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="0 of 2 tensors of the adapter were read"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "mixed")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_layers_in_a_wrapper_of_torch_s(tmp_path: Path) -> None:
    """Of these peft 0.21 reads nothing, and saves nothing; 0.18 does both."""
    qwen2().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    trained = peft.get_peft_model(base(), config)
    trained.save_pretrained(tmp_path / "adapter")
    truth = {name: value for name, value in trained.state_dict().items() if "lora_" in name}

    def loaded() -> tuple[Any, int]:
        model = base()
        model.model.layers[0], model.model.layers[1] = map(checkpoint_wrapper, model.model.layers)
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        now = model.state_dict()
        return model, sum(torch.equal(now[name], value) for name, value in truth.items())

    model, held = loaded()
    proof = tiedquiet.check(model)
    assert (proof.unread, proof.ok) == (len(truth) - held, held == len(truth))
    assert proof.total == len(base().state_dict()) + len(truth)
    with tiedquiet.enable("repair"):
        model, held = loaded()
    assert held == len(truth)
    assert tiedquiet.check(model).ok
    file = tmp_path / "adapter" / FILE
    save_file({n: t for n, t in load_file(file).items() if "layers.0" not in n}, file, {"format": "pt"})
    with tiedquiet.enable("repair"):
        model, _ = loaded()
    assert tiedquiet.check(model).missing == len(truth) // 2
