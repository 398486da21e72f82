"""Other ways a model is loaded: Trainer, adapters, pipelines, shards, offload, dtypes, threads."""

import copy
import gc
import json
import logging
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    GPT2LMHeadModel,
    PreTrainedModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    UMT5EncoderModel,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2, loading, save, state_of, t5, umt5
from tests.compat import cases
from tiedquiet import LoadError, Verdict


def verdicts(model: Any) -> dict[str, Verdict]:
    return {finding.key: finding.verdict for finding in tiedquiet.check(model).findings}


def trainer_of(model: torch.nn.Module, folder: Path) -> Trainer:
    return Trainer(model, TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True))


def missing_lists(printed: Printed) -> list[str]:
    return [line for line in printed.of("transformers.trainer") if "missing keys" in line]


# Trainer


def test_a_resume_from_the_trainer_s_own_checkpoint_is_quiet(tmp_path: Path, printed: Printed) -> None:
    trainer = trainer_of(T5ForConditionalGeneration(t5()), tmp_path)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert missing_lists(printed) == []
    (line,) = printed.confirmed
    for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        assert f"{key} is shared.weight" in line


def test_the_best_model_s_reload_is_quiet(tmp_path: Path, printed: Printed) -> None:
    trainer = trainer_of(GPT2LMHeadModel(gpt2()), tmp_path)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    assert missing_lists(printed) == []
    assert len(printed.confirmed) == 1


def test_a_sharded_resume_is_quiet(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="8KB")
    assert (tmp_path / "checkpoint-1" / "model.safetensors.index.json").exists()
    trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert not any("lm_head" in line for line in missing_lists(printed))


class Result:
    """Stands in no one's place: `load_state_dict`'s own result, with its keys edited."""

    @staticmethod
    def of(model: torch.nn.Module, without: tuple[str, ...], extra: tuple[str, ...] = ()) -> Any:
        state = {key: value for key, value in model.state_dict().items() if key not in without}
        return model.load_state_dict({**state, **{key: torch.ones(1) for key in extra}}, strict=False)


def test_really_missing_and_unexpected_keys_are_still_printed(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    result = Result.of(model, ("lm_head.weight", "transformer.ln_f.bias"), ("stranger",))
    trainer_of(model, tmp_path)._issue_warnings_after_load(result)
    (line,) = missing_lists(printed)
    assert "transformer.ln_f.bias" in line
    assert "lm_head" not in line
    assert any("unexpected keys" in text and "stranger" in text for text in printed.of("transformers.trainer"))


def test_a_resumed_model_that_is_not_tied_keeps_its_key_and_learns_why(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2(tie_word_embeddings=False))
    trainer = trainer_of(model, tmp_path)
    result = Result.of(model, ("lm_head.weight",))
    trainer._issue_warnings_after_load(result)
    assert "lm_head.weight" in missing_lists(printed)[0]
    assert "untied" in printed.loud[0]
    with tiedquiet.enable("strict"), pytest.raises(LoadError):
        trainer._issue_warnings_after_load(result)
    with tiedquiet.enable("repair"):
        before = model.lm_head.weight
        trainer._issue_warnings_after_load(result)
    assert model.lm_head.weight is before, "an optimizer may hold it"
    assert torch.equal(before, model.transformer.wte.weight)
    assert "in a tensor of its own" in printed.confirmed[-1]


def test_the_ignore_on_save_branch_still_ties_again(tmp_path: Path, printed: Printed) -> None:
    class Ignores(GPT2LMHeadModel):
        _keys_to_ignore_on_save = ["lm_head.weight"]  # noqa: RUF012
        tied = 0

        def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
            type(self).tied += 1
            return super().tie_weights(*args, **kwargs)

    model = Ignores(gpt2())
    trainer = trainer_of(model, tmp_path)
    before = Ignores.tied
    trainer._issue_warnings_after_load(Result.of(model, ("lm_head.weight",)))
    assert Ignores.tied == before + 1
    assert missing_lists(printed) == []


def test_true_keys_that_would_then_equal_the_ignored_set_are_not_hidden(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    model._keys_to_ignore_on_save = ["transformer.ln_f.bias"]
    trainer_of(model, tmp_path)._issue_warnings_after_load(
        Result.of(model, ("lm_head.weight", "transformer.ln_f.bias"))
    )
    assert "transformer.ln_f.bias" in printed.loud[0]
    assert "lm_head" not in printed.loud[0]


def test_a_result_without_missing_keys_is_passed_on(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    trainer_of(model, tmp_path)._issue_warnings_after_load(Result.of(model, ()))
    assert not printed.loud
    assert not printed.confirmed


def test_a_plain_module_in_a_trainer_keeps_its_list(tmp_path: Path, printed: Printed) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model._keys_to_ignore_on_save = None
    trainer = trainer_of(model, tmp_path)
    trainer._issue_warnings_after_load(Result.of(model, ("1.weight",)))
    assert "1.weight" in missing_lists(printed)[0]


# Files


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
        cure = "correct config.json" if name == "gpt2_flag_off" else "mend that method"
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


class Overrides(cases.OverridesTieWeights):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        state.pop("transformer.wte.weight", None)
        return state


class Hooks(cases.OverridesTieWeights):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.register_state_dict_post_hook(self.keep_back)

    @staticmethod
    def keep_back(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _: object) -> None:
        del state[f"{prefix}wte.weight"]


@pytest.mark.parametrize("keeps_back", [Overrides, Hooks])
def test_a_tensor_kept_out_of_the_state_dict_counts_as_not_stored(
    keeps_back: type[PreTrainedModel], tmp_path: Path, printed: Printed
) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    loaded = keeps_back.from_pretrained(tmp_path)
    assert Verdict.TIED not in verdicts(loaded).values()


def test_a_submodule_that_is_none(tmp_path: Path, printed: Printed) -> None:
    class NoAdapter(cases.OverridesTieWeights):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_module("adapter", None)

    save(NoAdapter(gpt2()), tmp_path, [key for key in NoAdapter(gpt2()).state_dict() if key != "lm_head.weight"])
    loaded = NoAdapter.from_pretrained(tmp_path)
    assert list(verdicts(loaded).values()) == [Verdict.TIED]


# Adapters, pipelines


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


# Records


def test_nothing_keeps_a_model_or_its_tensors_alive(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    model = cls.from_pretrained(tmp_path)
    gone = [weakref.ref(model), weakref.ref(model.transformer.wte.weight)]
    memory = StorageWeakRef(model.transformer.wte.weight.untyped_storage())
    model.transformer.wte.weight.data = torch.zeros(1)
    assert memory.expired(), "the load's record has names, no tensors"
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


class EqualToAll(cases.DeclaresNothing):
    """Value-equal models are still two."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.nn.Module)

    __hash__ = torch.nn.Module.__hash__


def test_models_that_are_equal_keep_their_own_records(tmp_path: Path) -> None:
    cases.CASES["DeclaresNothing"](tmp_path)
    loaded, fresh = EqualToAll.from_pretrained(tmp_path), EqualToAll(gpt2())
    assert tiedquiet.check(loaded).ok
    assert not tiedquiet.check(fresh).ok


class Wrapper(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def peft_of(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn", "lm_head"], r=2, fan_in_fan_out=True))


@pytest.mark.parametrize("wrap", [copy.deepcopy, torch.compile, Wrapper, peft_of])
@pytest.mark.filterwarnings("ignore")  # what PEFT thinks of tied targets
def test_check_sees_through_what_is_made_of_a_model(wrap: Any, tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    proof = tiedquiet.check(wrap(cls.from_pretrained(tmp_path)))
    assert proof.ok
    assert proof.stored == 16
    assert [finding.key for finding in proof.findings] == ["lm_head.weight"]


@pytest.mark.usefixtures("process_group")
def test_check_sees_through_ddp(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path / "model")
    assert tiedquiet.check(torch.nn.parallel.DistributedDataParallel(cls.from_pretrained(tmp_path / "model"))).ok


def test_check_of_a_module_with_two_loaded_models_names_both(tmp_path: Path) -> None:
    whole = torch.nn.Module()
    for name in ("DeclaresNothing", "gpt2_flag_off"):
        cls, _ = cases.CASES[name](tmp_path / name)
        setattr(whole, name, cls.from_pretrained(tmp_path / name))
    proof = tiedquiet.check(whole)
    assert proof.stored == 32
    assert [(f.key, f.verdict) for f in proof.findings] == [
        ("DeclaresNothing.lm_head.weight", Verdict.TIED),
        ("gpt2_flag_off.lm_head.weight", Verdict.UNTIED),
    ]


def test_a_pickled_model_needs_no_tiedquiet(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    data = pickle.dumps(cls.from_pretrained(tmp_path))
    assert b"tiedquiet" not in data.replace(b"_tiedquiet_record", b"")
    assert not tiedquiet.check(pickle.loads(data)).ok


def test_two_threads_do_not_mix_their_records(tmp_path: Path, printed: Printed) -> None:
    """One load in the middle of another, in a thread of its own.

    Not simply side by side: two `from_pretrained` at once can leave transformers itself without
    `PreTrainedModel.tie_weights` (each swaps it for an empty function while it builds its model).
    """
    other, _ = cases.CASES["TiesManyHeads"](tmp_path / "other")
    found: dict[str, Verdict] = {}

    class Waits(cases.DeclaresNothing):
        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights()
            if not self.lm_head.weight.is_meta and not found:
                thread = threading.Thread(
                    target=lambda: found.update(verdicts(other.from_pretrained(tmp_path / "other")))
                )
                thread.start()
                thread.join()

    cases.CASES["DeclaresNothing"](tmp_path / "this")
    model = Waits.from_pretrained(tmp_path / "this")
    assert list(verdicts(model)) == ["lm_head.weight"]
    assert list(found) == [*(f"heads.{i}.weight" for i in range(3)), "lm_head.weight"]
    assert set(found.values()) == {Verdict.TIED}
    assert [line.split()[0] for line in printed.confirmed] == ["TiesManyHeads", "Waits"]


def test_a_model_that_loads_another_while_it_is_built(tmp_path: Path, printed: Printed) -> None:
    inner_cls, _ = cases.CASES["DeclaresNothing"](tmp_path / "inner")

    class Outer(PreTrainedModel):
        config_class = inner_cls.config_class

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.part = inner_cls(config)
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                torch.nn.init.normal_(module.weight)

        def tie_weights(self, *_: Any, **__: Any) -> None:
            if not self.part.transformer.wte.weight.is_meta:
                self.other = inner_cls.from_pretrained(tmp_path / "inner")
            self.part.tie_weights()

    model = Outer(gpt2())
    keys = [key for key in model.state_dict() if key.startswith("part.") and key != "part.lm_head.weight"]
    save(model, tmp_path / "outer", keys)
    del model
    loaded = Outer.from_pretrained(tmp_path / "outer")
    assert {key: verdict for key, verdict in verdicts(loaded).items() if key.startswith("part.")} == {
        "part.lm_head.weight": Verdict.TIED
    }


@pytest.mark.parametrize("model", [GPT2LMHeadModel(gpt2()), torch.nn.Linear(1, 1)])
def test_what_was_not_seen_to_be_loaded_is_not_well(model: Any) -> None:
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.stored) == (False, 0)
    assert str(proof).startswith(f"{type(model).__name__}: nothing is known of its load\n")
    assert "no record of a load" in str(proof)


def test_a_copy_that_is_not_one_is_not_taken_for_the_loaded_model(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    model = cls.from_pretrained(tmp_path)
    rebuilt = cls(model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert not tiedquiet.check(rebuilt).ok


def test_check_sees_what_became_of_a_tie_after_loading(tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.add_(1)  # training is no loss
    assert list(verdicts(model).values()) == [Verdict.TIED]
    model.lm_head.weight = torch.nn.Parameter(torch.ones(64, 16))
    assert list(verdicts(model).values()) == [Verdict.UNTIED]
    model.lm_head = None
    assert verdicts(model) == {}


@pytest.mark.filterwarnings("ignore")  # what PEFT thinks of tied layers
def test_a_second_load_adds_to_what_was_stored(tmp_path: Path, printed: Printed) -> None:
    """An adapter that brings the head along: nothing is untied any more."""
    peft = pytest.importorskip("peft")
    save(GPT2LMHeadModel(gpt2()), tmp_path / "base", flag=False)
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], r=2, fan_in_fan_out=True)
    peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config).save_pretrained(
        tmp_path / "adapter"
    )
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    assert verdicts(model) == {"lm_head.weight": Verdict.UNTIED}
    model.load_adapter(str(tmp_path / "adapter"))
    assert Verdict.OVERWRITTEN not in verdicts(model).values()


def test_a_form_that_transformers_5_0_used_is_understood(tmp_path: Path, printed: Printed) -> None:
    """The old keyword-only report, called as 5.0.0 calls it, on whatever release is installed."""
    from types import SimpleNamespace

    import wrapt

    from tiedquiet.doors import from_pretrained

    shown: dict[str, Any] = {}

    def log_state_dict_report(*, model: Any, load_config: Any, logger: Any = None, missing_keys: Any = None) -> None:
        shown.update(missing=missing_keys)

    model = GPT2LMHeadModel(gpt2())
    model.load_state_dict(state_of(model))
    loading(model, {"lm_head.weight", "transformer.ln_f.bias"})
    wrapped = wrapt.FunctionWrapper(log_state_dict_report, from_pretrained._on_report)
    wrapped(
        model=model,
        load_config=SimpleNamespace(pretrained_model_name_or_path="there"),
        missing_keys={"lm_head.weight", "transformer.ln_f.bias"},
    )
    assert shown["missing"] == {"transformer.ln_f.bias"}
    assert printed.confirmed[0].startswith("GPT2LMHeadModel from there: ")
    wrapped(
        model=model, load_config=SimpleNamespace(pretrained_model_name_or_path="there"), missing_keys={"lm_head.weight"}
    )
    assert shown["missing"] == {"lm_head.weight"}, "a report without a load record passes untouched"


class _Changes(cases.DeclaresNothing):
    """Does something to the stored end after it was read, which keeps its values."""

    def change(self) -> None:
        raise NotImplementedError

    def tie_weights(self, *_: Any, **__: Any) -> None:
        if not self.transformer.wte.weight.is_meta:
            self.change()
        super().tie_weights()


class _Casts(_Changes):
    def change(self) -> None:
        self.transformer.wte.to(torch.float64)


class _Resizes(_Changes):
    def change(self) -> None:
        self.transformer.wte.weight = torch.nn.Parameter(
            torch.cat([self.transformer.wte.weight.data, torch.ones(1, 16)])
        )


class _Subclass(torch.nn.Parameter):
    pass


class _Wraps(_Changes):
    def change(self) -> None:
        self.transformer.wte.weight = _Subclass(self.transformer.wte.weight.data)


class _Hides(_Changes):
    """A tensor of a type that does not tell where its values are."""

    def change(self) -> None:
        self.transformer.wte.weight = torch.nn.Parameter(self.transformer.wte.weight.data.to_sparse())


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(_Casts, Verdict.TIED), (_Wraps, Verdict.TIED), (_Resizes, Verdict.UNPROVEN), (_Hides, Verdict.UNPROVEN)],
)
def test_what_can_be_followed_through_a_change_is_proven(
    cls: type[_Changes], expected: Verdict, tmp_path: Path, printed: Printed
) -> None:
    keys = [key for key in GPT2LMHeadModel(gpt2()).state_dict() if key != "lm_head.weight"]
    save(GPT2LMHeadModel(gpt2()), tmp_path, keys)
    model = cls.from_pretrained(tmp_path)
    assert verdicts(model)["lm_head.weight"] is expected
    assert printed.shows("lm_head.weight") == (expected is Verdict.UNPROVEN)
    assert bool(printed.confirmed) == (expected is Verdict.TIED)
    assert any("unproven" in line for line in printed.of("tiedquiet", logging.DEBUG)) == (expected is Verdict.UNPROVEN)


def test_more_ties_than_are_looked_up_one_by_one(tmp_path: Path, printed: Printed) -> None:
    class SeventyHeads(cases.DeclaresNothing):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.heads = torch.nn.ModuleList(torch.nn.Linear(16, 64, bias=False) for _ in range(70))

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights()
            for head in getattr(self, "heads", ()):
                head.weight = self.transformer.wte.weight

    save(SeventyHeads(gpt2()), tmp_path, [k for k in SeventyHeads(gpt2()).state_dict() if "head" not in k])
    loaded = SeventyHeads.from_pretrained(tmp_path)
    assert list(verdicts(loaded).values()) == [Verdict.TIED] * 71
    assert "heads.{0...69}.weight is transformer.wte.weight" in printed.confirmed[0]


def test_two_stored_ends_are_compared_in_full(tmp_path: Path) -> None:
    embedding = torch.randn(640, 16)
    head = embedding.clone()
    head[333, 5] += 1
    model = T5ForConditionalGeneration(t5(vocab_size=640))
    keys = [key for key in model.state_dict() if key not in ("shared.weight", "encoder.embed_tokens.weight")]
    save(model, tmp_path, keys, lm_head__weight=head, decoder__embed_tokens__weight=embedding)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert verdicts(loaded) == {"shared.weight": Verdict.AMBIGUOUS, "encoder.embed_tokens.weight": Verdict.AMBIGUOUS}


def test_nan_is_equal_to_itself(tmp_path: Path) -> None:
    """A diverged checkpoint: its two ends are equal to the last bit."""
    embedding = torch.full((64, 16), float("nan"))
    embedding[0] = 1
    model = T5ForConditionalGeneration(t5())
    keys = [key for key in model.state_dict() if key not in ("shared.weight", "encoder.embed_tokens.weight")]
    save(model, tmp_path, keys, lm_head__weight=embedding.clone(), decoder__embed_tokens__weight=embedding)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert set(verdicts(loaded).values()) == {Verdict.TIED}


def test_a_marian_resume_says_each_key_once(tmp_path: Path, printed: Printed) -> None:
    """What its checkpoint leaves out on purpose is all that remains: the Trainer would say nothing, or all of it."""
    cls, _ = cases.CASES["marian_flag_off"](tmp_path / "from")
    config = cls.config_class.from_pretrained(tmp_path / "from", tie_word_embeddings=True)
    trainer = trainer_of(cls(config), tmp_path)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    tied = {"model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"}
    said = "\n".join(printed.of("tiedquiet", logging.INFO))
    assert all(f"{key} is model.shared.weight" in said for key in tied)
    loud = "\n".join([*missing_lists(printed), *printed.loud])
    assert not any(key in loud for key in tied)
    assert "model.encoder.embed_positions.weight" in loud
