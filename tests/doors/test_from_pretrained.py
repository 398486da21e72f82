"""Every form of file, of declaration and of pipeline that `from_pretrained` reads: types, disk, rows, adapters."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    GPT2LMHeadModel,
    PreTrainedModel,
    UMT5EncoderModel,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2, save, umt5
from tests.compat import cases
from tiedquiet import LoadError, Verdict


def verdicts(model: Any) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in tiedquiet.check(model).findings}


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_every_file_form(form: str, tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(tmp_path, **({"max_shard_size": "8KB"} if form == "shards" else {}))
    if form == "bin":
        state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = cases.DeclaresNothing.from_pretrained(tmp_path)
    assert verdicts(loaded) == {"lm_head.weight": Verdict.TIED}
    assert not printed.report
    assert len(printed.confirmed) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_while_loading_is_no_loss(dtype: torch.dtype, tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype is dtype
    assert list(verdicts(loaded).values()) == [Verdict.TIED]
    assert not printed.report


def on_disk(name: str, folder: Path) -> Any:
    """Load with both ends of the tie left on disk."""
    cls, _ = cases.CASES[name](folder)
    there = {"transformer.wte": "disk", "transformer.wpe": "cpu", "transformer.h": "cpu", "transformer.ln_f": "cpu"}
    return cls.from_pretrained(folder, device_map={**there, "lm_head": "disk"}, offload_folder=folder / "off")


def runs(model: Any) -> bool:
    try:
        model(torch.tensor([[1, 2, 3]]))
    except KeyError:  # accelerate looks for the values of `lm_head.weight` on disk, and there are none
        return False
    return True


@pytest.mark.parametrize("name", ["OverridesTieWeights", "DoesNothing", "Clones", "DeclaresNothing", "gpt2_flag_off"])
def test_what_stays_on_disk_is_proven_by_its_place_there(name: str, tmp_path: Path, printed: Printed) -> None:
    model = on_disk(name, tmp_path)
    verdict = verdicts(model)["lm_head.weight"]
    assert bool(printed.loud) == (verdict is Verdict.UNTIED)
    assert (verdict is Verdict.TIED) == runs(model)
    if verdict is Verdict.TIED:
        assert not printed.shows("lm_head.weight")
    elif name != "gpt2_flag_off" or printed.report:  # 5.2.0 has no row for what the config does not tie
        assert printed.shows("lm_head.weight")
    if verdict is Verdict.UNTIED:
        cure = "correct config.json" if name == "gpt2_flag_off" else "fix that method"
        cure = "load it without disk offload" if "accelerate" in printed.loud[0] else cure
        assert f"set TIEDQUIET=repair or {cure};" in printed.loud[0]
        with tiedquiet.enable("strict"), pytest.raises(LoadError, match="untied"):
            on_disk(name, tmp_path / "strict")


@pytest.mark.parametrize("name", ["DoesNothing", "gpt2_flag_off", "DeclaresNothing", "OverridesTieWeights"])
def test_repair_ties_what_stays_on_disk(name: str, tmp_path: Path, printed: Printed) -> None:
    with tiedquiet.enable("repair"):
        model = on_disk(name, tmp_path)
    assert tiedquiet.check(model).ok
    assert not printed.shows("lm_head.weight")
    ids = torch.tensor([[1, 2, 3]])
    states = model.transformer(ids).last_hidden_state
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.allclose(model(ids).logits, states @ file.get_tensor("transformer.wte.weight").T)


def test_device_map_auto(tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES["OverridesTieWeights"](tmp_path)
    loaded = cls.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GB"})
    assert list(verdicts(loaded).values()) == [Verdict.TIED]
    assert len(printed.confirmed) == 1


class Rows(cases.DeclaresNothing):
    """Zeroes a row; `own` says whose code that seems to be."""

    own = __name__

    def tie_weights(self, *_: Any, **__: Any) -> None:
        super().tie_weights()
        weight = self.transformer.wte.weight
        if not weight.is_meta:
            row = self.config.row
            exec("weight.data[row] = 0", {"__name__": self.own, "weight": weight, "row": row})


@pytest.mark.parametrize(
    ("own", "config", "expected"),
    [
        ("transformers.models.kosmos2.modeling_kosmos2", {"row": 3, "index": 3}, Verdict.TIED),
        ("transformers_modules.kosmos2", {"row": 3, "index": 3}, Verdict.OVERWRITTEN),
        ("transformers.models.kosmos2.modeling_kosmos2", {"row": 4, "index": 3}, Verdict.OVERWRITTEN),
        (
            "transformers.models.kosmos2.modeling_kosmos2",
            {"row": 3, "index": None, "pad_token_id": 3},
            Verdict.OVERWRITTEN,
        ),
        (
            "transformers.models.kosmos2.modeling_kosmos2",
            {"row": 3, "index": 3, "sep_token_id": 3},
            Verdict.OVERWRITTEN,
        ),
        (
            "transformers.models.kosmos2.modeling_kosmos2",
            {"row": 3, "index": 3, "eos_token_id": [5, 3]},
            Verdict.OVERWRITTEN,
        ),
    ],
    ids=["its own", "a stranger's code", "another row", "of the config alone", "also a separator", "also an end"],
)
def test_a_row_that_is_zeroed_again(
    own: str, config: dict[str, Any], expected: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers itself does it to the padding row of Kosmos 2, up to 5.20.2."""
    monkeypatch.setattr(Rows, "own", own)
    model = cases.DeclaresNothing(gpt2(**config))
    save(model, tmp_path, [key for key in model.state_dict() if key != "lm_head.weight"])
    index = config["index"]

    class WithPadding(Rows):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.transformer.wte.padding_idx = index

    assert verdicts(WithPadding.from_pretrained(tmp_path))["lm_head.weight"] is expected


class DeclaresByAProperty(GPT2LMHeadModel):
    """As Deimv2 does: what is declared is worked out when it is asked for."""

    @property
    def _tied_weights_keys(self) -> Any:
        return {"lm_head.weight": "transformer.wte.weight"}


class Withdraws(GPT2LMHeadModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._tied_weights_keys = None


@pytest.mark.parametrize(("cls", "expected"), [(DeclaresByAProperty, [Verdict.UNTIED]), (Withdraws, [Verdict.MISSING])])
def test_a_declaration_is_the_instance_s_own(
    cls: type[PreTrainedModel], expected: list[Verdict], tmp_path: Path, printed: Printed
) -> None:
    model = cls(gpt2(tie_word_embeddings=False))
    save(model, tmp_path, [key for key in model.state_dict() if key != "lm_head.weight"], flag=False)
    assert list(verdicts(cls.from_pretrained(tmp_path)).values()) == expected


def test_a_submodule_that_is_none(tmp_path: Path, printed: Printed) -> None:
    class NoAdapter(cases.OverridesTieWeights):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_module("adapter", None)

    save(NoAdapter(gpt2()), tmp_path, [key for key in NoAdapter(gpt2()).state_dict() if key != "lm_head.weight"])
    loaded = NoAdapter.from_pretrained(tmp_path)
    assert list(verdicts(loaded).values()) == [Verdict.TIED]


def test_an_adapter_keeps_the_base_model_s_verdicts(tmp_path: Path, printed: Printed) -> None:
    peft = pytest.importorskip("peft")
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    peft.get_peft_model(cls.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    model = cls.from_pretrained(tmp_path / "base")
    said = len(printed.of("tiedquiet"))
    model.load_adapter(str(tmp_path / "adapter"))
    assert tiedquiet.check(model).stored >= 16, "the base model's too"
    (part,) = [value for name, value in model.named_parameters() if "lora_A" in name]
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    if not any(torch.equal(part, value) for name, value in stored.items() if "lora_A" in name):  # up to 5.3.0
        assert set(verdicts(model).values()) == {Verdict.TIED, Verdict.UNREAD}
        return
    assert verdicts(model) == {"lm_head.weight": Verdict.TIED}
    assert len(printed.of("tiedquiet", logging.WARNING)) == 0
    assert len(printed.of("tiedquiet")) == said
    whole = cls.from_pretrained(tmp_path / "adapter")
    assert list(verdicts(whole).values()) == [Verdict.TIED]


def wan_pipeline(folder: Path) -> Path:
    """A tiny Wan pipeline whose text encoder is stored as the published ones are."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    )
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1,
        patch_size=(1, 2, 2), cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    encoder = UMT5EncoderModel(umt5())
    keys = [key for key in encoder.state_dict() if key != "encoder.embed_tokens.weight"]
    save(encoder, folder / "text_encoder", keys, flag=False)
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": [None, None],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_wan_pipeline(tmp_path: Path, printed: Printed) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = wan_pipeline(tmp_path)
    encoder = diffusers.DiffusionPipeline.from_pretrained(folder, tokenizer=None).text_encoder
    tied = encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()
    assert list(verdicts(encoder).values()) == [Verdict.TIED if tied else Verdict.UNTIED]
    assert printed.shows("encoder.embed_tokens.weight") is not tied
    assert bool(printed.loud) is not tied
    with tiedquiet.enable("repair"):
        encoder = diffusers.DiffusionPipeline.from_pretrained(folder, tokenizer=None).text_encoder
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
